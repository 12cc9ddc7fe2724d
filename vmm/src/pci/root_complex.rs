//! The root complex: host bridge 00:00.0, root ports on bus 0, configuration access
//! through ECAM (PCI Express Base 5.0 section 7.2.2) and through mechanism #1 at
//! CF8/CFC (PCI Local Bus 3.0 section 3.2.2.3.2).
//!
//! vCPU threads make configuration accesses; the manager thread attaches and detaches.
//! Routing follows the secondary bus numbers as the guest programmed them. Below a port
//! there is one device, number 0, with function 0; everything else reads as all ones.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::bar::{AddressRange, BarDecoder, Windows};
use super::config::{ConfigSpace, Identity, reg};
use super::root_port::{PortConfig, PortResources, RootPort};
use super::{PciAddress, PciError, PciFunction, Reset};
use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, BusError};

/// Red Hat's identity for a generic PCI Express host bridge.
const BRIDGE_VENDOR: u16 = 0x1b36;
const BRIDGE_DEVICE: u16 = 0x0008;
const CLASS_BRIDGE_HOST: u32 = 0x06_0000;

/// Each port's 32-bit window.
const PORT_MEMORY: u64 = 2 << 20;
/// The 64-bit window is divided by this, so that all 31 ports have an equal share.
const PORT_SHARES: u64 = 32;
const WINDOW_GRANULE: u64 = 1 << 20;
const MAX_SLOT: u16 = 0x1fff;

const CONFIG_ENABLE: u32 = 1 << 31;
const CF8_PORTS: u64 = 8;
const DATA_PORT: u64 = 4;

/// A function that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDeviceInfo {
    /// The device's name.
    pub id: String,
    /// The port it is behind.
    pub port: String,
    /// Where it answers now.
    pub address: PciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code, 24 bits.
    pub class: u32,
}

/// A root port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Its name.
    pub name: String,
    /// Device number on bus 0.
    pub device: u8,
    /// Physical slot number.
    pub slot: u16,
    /// Secondary bus number as programmed now.
    pub secondary_bus: u8,
    /// Whether a device is behind it.
    pub occupied: bool,
    /// A device was pulled out of it that the guest has not let go of yet: no other is put in.
    pub vacating: bool,
    /// Whether devices may come and go behind it.
    pub hotplug: bool,
}

impl PortInfo {
    /// Whether a device may be put behind it now.
    pub fn is_free(&self) -> bool {
        self.hotplug && !self.occupied && !self.vacating
    }
}

/// The root complex.
pub struct RootComplex {
    decoder: Arc<BarDecoder>,
    host_bridge: ConfigSpace,
    /// In order of device number.
    ports: Vec<RootPort>,
    /// CONFIG_ADDRESS: one for the machine, as on hardware.
    address: AtomicU32,
}

impl RootComplex {
    /// A root complex with these ports; bus numbers are given from 1 in order of device
    /// number, and each port gets its windows.
    pub fn new(
        mmio: Arc<Bus>,
        windows: Windows,
        ports: &[PortConfig],
    ) -> Result<Arc<Self>, PciError> {
        let mut ports = ports.to_vec();
        ports.sort_by_key(|port| port.device);
        check_ports(&ports)?;
        let share = (windows.mem64.size / PORT_SHARES) & !(WINDOW_GRANULE - 1);
        let too_small = || PciError::WindowsTooSmall { ports: ports.len() };
        let mut made = Vec::with_capacity(ports.len());
        for (index, config) in (0_u8..).zip(&ports) {
            let part = |window: AddressRange, size: u64| {
                let start = window
                    .start
                    .checked_add(u64::from(index).checked_mul(size)?)?;
                (size != 0 && window.contains(start, size)).then_some(AddressRange { start, size })
            };
            let resources = PortResources {
                secondary_bus: index + 1,
                memory: part(windows.mem32, PORT_MEMORY).ok_or_else(too_small)?,
                prefetchable: part(windows.mem64, share).ok_or_else(too_small)?,
            };
            made.push(RootPort::new(config.clone(), &resources)?);
        }
        let identity = Identity {
            vendor: BRIDGE_VENDOR,
            device: BRIDGE_DEVICE,
            revision: 0,
            class: CLASS_BRIDGE_HOST,
            header_type: 0,
        };
        Ok(Arc::new(Self {
            decoder: BarDecoder::new(mmio, windows),
            host_bridge: ConfigSpace::new(identity, 0),
            ports: made,
            address: AtomicU32::new(0),
        }))
    }

    /// Puts ECAM on `mmio` and CF8/CFC on `pio`.
    pub fn attach_to_buses(self: &Arc<Self>, mmio: &Bus, pio: &Bus) -> Result<(), BusError> {
        let ecam = Arc::new(Ecam(Arc::clone(self)));
        mmio.insert(layout::ECAM_START, layout::ECAM_SIZE, ecam)?;
        let ports = Arc::new(ConfigPorts(Arc::clone(self)));
        pio.insert(layout::PCI_CF8_PORT, CF8_PORTS, ports)
    }

    /// Where functions register their BARs.
    pub fn decoder(&self) -> &Arc<BarDecoder> {
        &self.decoder
    }

    /// Plugs `function` in behind the named port, at any time. On return its
    /// configuration space answers.
    pub fn attach(
        &self,
        port: &str,
        function: Arc<dyn PciFunction>,
    ) -> Result<PciAddress, PciError> {
        let port = self.port(port)?;
        port.plug(&function)?;
        Ok(PciAddress {
            bus: port.secondary_bus(),
            device: 0,
            function: 0,
        })
    }

    /// Takes this function off the bus behind the named port: configuration space, BARs,
    /// doorbells and interrupts are gone on return.
    ///
    /// # Errors
    /// [`PciError::Empty`] when it is not there, or no longer.
    pub fn detach<F: PciFunction + ?Sized>(
        &self,
        port: &str,
        function: &Arc<F>,
    ) -> Result<Arc<dyn PciFunction>, PciError> {
        self.port(port)?.unplug(|there| is_same(there, function))
    }

    /// The same by the port's device number, as a guest's eject names it; `None`: there is none.
    pub fn detach_slot(&self, device: u8) -> Option<Arc<dyn PciFunction>> {
        let port = self.ports.iter().find(|p| p.config.device == device)?;
        port.unplug(|_| true).ok()
    }

    /// Takes every function out, and everything off the bus, of a machine that is given up: they
    /// know each other, and would stay.
    pub fn dismantle(&self) {
        for port in &self.ports {
            // An empty one is as it should be.
            let _ = port.unplug(|_| true);
        }
        self.decoder.bus().clear();
    }

    /// Resets every function and waits for that, then every port: all is as before the guest
    /// started, with what is plugged in now. No vCPU may run meanwhile. Waits for devices' processes
    /// as long as each of them may take: not for the manager thread.
    pub fn reset(&self) {
        let functions = self.ports.iter().filter_map(RootPort::function);
        let resets: Vec<Reset> = functions.map(|function| function.begin_reset()).collect();
        resets.into_iter().for_each(|wait| wait());
        self.address.store(0, Ordering::Relaxed);
        self.ports.iter().for_each(RootPort::power_on);
    }

    /// As [`detach`](Self::detach), of a function that the guest's driver may still use: nothing
    /// can be attached to the port until the guest has let go of it.
    ///
    /// # Errors
    /// As [`detach`](Self::detach).
    pub fn detach_by_surprise<F: PciFunction + ?Sized>(
        &self,
        port: &str,
        function: &Arc<F>,
    ) -> Result<Arc<dyn PciFunction>, PciError> {
        let port = self.port(port)?;
        port.unplug_by_surprise(|there| is_same(there, function), &self.decoder)
    }

    /// Whether this function is on the bus behind the named port.
    pub fn has<F: PciFunction + ?Sized>(&self, port: &str, function: &Arc<F>) -> bool {
        let there = self.port(port).ok().and_then(RootPort::function);
        there.is_some_and(|there| is_same(&there, function))
    }

    /// Every plugged-in function, in order of port.
    pub fn devices(&self) -> Vec<PciDeviceInfo> {
        self.ports
            .iter()
            .filter_map(|port| describe(port, port.function()?.as_ref()))
            .collect()
    }

    /// Every root port, in order of device number.
    pub fn ports(&self) -> Vec<PortInfo> {
        self.ports
            .iter()
            .map(|port| PortInfo {
                name: port.config.name.clone(),
                device: port.config.device,
                slot: port.config.slot,
                secondary_bus: port.secondary_bus(),
                occupied: port.function().is_some(),
                vacating: port.is_vacating(),
                hotplug: port.config.hotplug,
            })
            .collect()
    }

    /// The highest bus number that was programmed before the guest started.
    pub fn last_bus(&self) -> u8 {
        u8::try_from(self.ports.len()).unwrap_or(u8::MAX)
    }

    fn port(&self, name: &str) -> Result<&RootPort, PciError> {
        self.ports
            .iter()
            .find(|port| port.config.name == name)
            .ok_or_else(|| PciError::NoSuchPort(name.to_owned()))
    }

    /// A port on bus 0, or the function behind a port.
    fn target(&self, address: PciAddress) -> Option<Target<'_>> {
        if address.function != 0 {
            return None;
        }
        if address.bus == 0 {
            if address.device == 0 {
                return Some(Target::HostBridge(&self.host_bridge));
            }
            let port = self
                .ports
                .iter()
                .find(|port| port.config.device == address.device)?;
            return Some(Target::Port(port));
        }
        if address.device != 0 {
            return None;
        }
        let port = self
            .ports
            .iter()
            .find(|port| port.secondary_bus() == address.bus)?;
        Some(match port.function() {
            Some(function) => Target::Function(function),
            None => Target::Empty(port),
        })
    }

    /// An aligned configuration read of 1, 2 or 4 bytes.
    pub fn config_read(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        match self.target(address) {
            Some(Target::HostBridge(space)) => space.read(offset, data),
            Some(Target::Port(port)) => port.config_read(offset, data),
            Some(Target::Function(function)) => function.config_read(offset, data),
            Some(Target::Empty(port)) => {
                data.fill(0xff);
                if offset == reg::VENDOR {
                    port.found_empty();
                }
            }
            None => data.fill(0xff),
        }
    }

    /// An aligned configuration write of 1, 2 or 4 bytes.
    pub fn config_write(&self, address: PciAddress, offset: u16, data: &[u8]) {
        match self.target(address) {
            Some(Target::Port(port)) => port.config_write(offset, data),
            Some(Target::Function(function)) => function.config_write(offset, data),
            Some(Target::HostBridge(_) | Target::Empty(_)) | None => {}
        }
    }
}

enum Target<'a> {
    HostBridge(&'a ConfigSpace),
    Port(&'a RootPort),
    Function(Arc<dyn PciFunction>),
    /// The function behind a port that has none.
    Empty(&'a RootPort),
}

/// Whether two references are to the same function.
pub fn is_same<A: ?Sized, B: ?Sized>(a: &Arc<A>, b: &Arc<B>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn check_ports(sorted: &[PortConfig]) -> Result<(), PciError> {
    let mut names = BTreeSet::new();
    let mut devices = BTreeSet::new();
    let mut slots = BTreeSet::new();
    for port in sorted {
        let why = if !(1..=31).contains(&port.device) {
            "the device number must be 1 to 31"
        } else if port.slot > MAX_SLOT {
            "the slot number must be below 8192"
        } else if port.name.is_empty() || !names.insert(&port.name) {
            "the name must be unique and not empty"
        } else if !devices.insert(port.device) {
            "another port has this device number"
        } else if !slots.insert(port.slot) {
            "another port has this slot number"
        } else {
            continue;
        };
        return Err(PciError::BadPort {
            name: port.name.clone(),
            device: port.device,
            why,
        });
    }
    Ok(())
}

fn describe(port: &RootPort, function: &dyn PciFunction) -> Option<PciDeviceInfo> {
    let read = |offset: u16| {
        let mut bytes = [0; 4];
        function.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let identity = read(reg::VENDOR);
    Some(PciDeviceInfo {
        id: function.id().to_owned(),
        port: port.config.name.clone(),
        address: PciAddress {
            bus: port.secondary_bus(),
            device: 0,
            function: 0,
        },
        vendor: u16::try_from(identity & 0xffff).ok()?,
        device: u16::try_from(identity >> 16).ok()?,
        class: read(reg::REVISION) >> 8,
    })
}

/// Cuts an access into naturally aligned pieces of at most 4 bytes: (offset in the
/// access, length).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = match len {
        1 | 2 | 4 if offset.is_multiple_of(len as u64) => len,
        8 if offset.is_multiple_of(4) => 4,
        _ => 1,
    };
    (0..len).step_by(step).map(move |at| (at, step))
}

struct Ecam(Arc<RootComplex>);

/// Bus, device, function and register of an offset into ECAM.
fn ecam_target(offset: u64) -> (PciAddress, u16) {
    let address = PciAddress {
        bus: (offset >> 20) as u8,
        device: (offset >> 15) as u8 & 0x1f,
        function: (offset >> 12) as u8 & 7,
    };
    (address, (offset & 0xfff) as u16)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, len) in pieces(offset, data.len()) {
            let (address, register) = ecam_target(offset.wrapping_add(at as u64));
            if let Some(piece) = data.get_mut(at..at + len) {
                self.0.config_read(address, register, piece);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, len) in pieces(offset, data.len()) {
            let (address, register) = ecam_target(offset.wrapping_add(at as u64));
            if let Some(piece) = data.get(at..at + len) {
                self.0.config_write(address, register, piece);
            }
        }
    }
}

/// CONFIG_ADDRESS and CONFIG_DATA: guests serialise the pair themselves.
struct ConfigPorts(Arc<RootComplex>);

impl ConfigPorts {
    /// What an access to the data port reaches; None when disabled, unaligned or not the
    /// data port.
    fn target(&self, port: u64, len: usize) -> Option<(PciAddress, u16)> {
        let selected = self.0.address.load(Ordering::Relaxed);
        let lane = u16::try_from(port.checked_sub(DATA_PORT)?).ok()?;
        let aligned = matches!(len, 1 | 2 | 4) && port.is_multiple_of(len as u64);
        if selected & CONFIG_ENABLE == 0 || !aligned || lane > 3 {
            return None;
        }
        let address = PciAddress {
            bus: (selected >> 16) as u8,
            device: (selected >> 11) as u8 & 0x1f,
            function: (selected >> 8) as u8 & 7,
        };
        Some((address, (selected & 0xfc) as u16 | lane))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.0.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            self.0.config_read(address, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0
                .address
                .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            self.0.config_write(address, register, data);
        }
    }
}

#[cfg(test)]
#[path = "root_complex_tests.rs"]
mod tests;
