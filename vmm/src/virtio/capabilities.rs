//! The configuration space of a virtio function: identity (VIRTIO 1.2 section 4.1.2), the
//! PCI Express endpoint capability, virtio's own capabilities (4.1.4) and MSI-X.

use super::kinds::class_code;
use super::registers::{NOTIFY_MULTIPLIER, bar, common};
use crate::pci::{ConfigSpace, Identity, MSIX_CAPABILITY_ID, Msix, PciError, reg};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
/// Memory space, bus master, interrupt disable.
const COMMAND_MASK: u16 = 0x0406;

const VENDOR_CAPABILITY: u8 = 0x09;
const EXPRESS_CAPABILITY: u8 = 0x10;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Offsets inside the PCI configuration access capability.
pub mod window {
    /// BAR to access.
    pub const BAR: u16 = 4;
    /// Offset in it.
    pub const OFFSET: u16 = 8;
    /// Access width.
    pub const LENGTH: u16 = 12;
    /// The data.
    pub const DATA: u16 = 16;
}

/// Where the capabilities lie that the function must act upon.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// MSI-X.
    pub msix: u16,
    /// PCI configuration access.
    pub window: u16,
}

/// The configuration space of a device type with these vectors.
pub fn build(
    device_type: u16,
    queues: u16,
    msix: &Msix,
) -> Result<(ConfigSpace, Places), PciError> {
    let identity = Identity {
        vendor: VENDOR,
        device: DEVICE_BASE | device_type,
        revision: 1,
        class: class_code(device_type),
        header_type: 0,
    };
    let mut space = ConfigSpace::new(identity, COMMAND_MASK);
    space.set(reg::SUBSYSTEM_VENDOR, &VENDOR.to_le_bytes());
    space.set(reg::SUBSYSTEM, &SUBSYSTEM.to_le_bytes());
    let bar_mask = !(bar::SIZE - 1) as u32;
    space.allow(reg::BAR0, &bar_mask.to_le_bytes());

    space.add_capability(EXPRESS_CAPABILITY, &endpoint(), &[])?;
    let doorbells = u32::from(queues).saturating_mul(NOTIFY_MULTIPLIER);
    let step = bar::STEP as u32;
    add(
        &mut space,
        CFG_COMMON,
        bar::COMMON as u32,
        common::LENGTH as u32,
        None,
    )?;
    add(
        &mut space,
        CFG_NOTIFY,
        bar::NOTIFY as u32,
        doorbells,
        Some(NOTIFY_MULTIPLIER),
    )?;
    add(&mut space, CFG_ISR, bar::ISR as u32, 1, None)?;
    // A whole page: drivers may trap on an access beyond the length that is given here.
    add(&mut space, CFG_DEVICE, bar::DEVICE as u32, step, None)?;
    let window = add(&mut space, CFG_PCI, 0, 0, Some(0))?;
    space.allow(window + window::BAR, &[0xff]);
    space.allow(window + window::OFFSET, &[0xff; 12]);
    let (body, mask) = msix.capability(bar::MSIX_TABLE as u32, bar::MSIX_PBA as u32);
    let msix = space.add_capability(MSIX_CAPABILITY_ID, &body, &mask)?;
    Ok((space, Places { msix, window }))
}

/// Adds a virtio capability for a structure in BAR 0, with one more word where its kind
/// has one.
fn add(
    space: &mut ConfigSpace,
    kind: u8,
    offset: u32,
    length: u32,
    more: Option<u32>,
) -> Result<u16, PciError> {
    let size: u8 = if more.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend(more.into_iter().flat_map(u32::to_le_bytes));
    space.add_capability(VENDOR_CAPABILITY, &body, &[])
}

/// The PCI Express capability of an endpoint after its two header bytes: version 2,
/// role-based error reporting, a 2.5 GT/s x1 link.
fn endpoint() -> [u8; 0x3a] {
    let mut body = [0; 0x3a];
    let mut put = |offset: usize, value: u32| {
        for (to, from) in body.iter_mut().skip(offset - 2).zip(value.to_le_bytes()) {
            *to = from;
        }
    };
    put(0x02, 0x0002);
    put(0x04, 0x8000);
    put(0x0c, 0x0011);
    put(0x12, 0x0011);
    put(0x2c, 0x0002);
    body
}
