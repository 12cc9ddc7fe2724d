//! The first 256 bytes of a function's configuration space as bytes with a mask of the
//! bits that a guest may write (PCI Local Bus 3.0 section 6.1), and its capability list
//! (section 6.7). The extended space reads as zero: no extended capabilities.
//!
//! Owned by a function behind that function's lock.

use super::PciError;

const SIZE: usize = 256;
/// Where the capability list starts to be filled.
const FIRST_CAPABILITY: usize = 0x40;

/// Status register bit: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Offsets of the common part of the header.
pub mod reg {
    /// Vendor ID.
    pub const VENDOR: u16 = 0x00;
    /// Device ID.
    pub const DEVICE: u16 = 0x02;
    /// Command.
    pub const COMMAND: u16 = 0x04;
    /// Status.
    pub const STATUS: u16 = 0x06;
    /// Revision ID, then the class code.
    pub const REVISION: u16 = 0x08;
    /// Cache line size.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Header type.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// The first BAR.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID (type 0).
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    /// Subsystem ID (type 0).
    pub const SUBSYSTEM: u16 = 0x2e;
    /// Capabilities pointer.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line: software's scratch byte.
    pub const INTERRUPT_LINE: u16 = 0x3c;
}

/// What identifies a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface in the low 24 bits.
    pub class: u32,
    /// Header type register.
    pub header_type: u8,
}

/// Configuration registers with write masks.
#[derive(Clone)]
pub struct ConfigSpace {
    data: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// Registers of a function with this identity, nothing writable but the command
    /// register's bits in `command_mask`, the cache line size and the interrupt line.
    pub fn new(identity: Identity, command_mask: u16) -> Self {
        let mut space = Self {
            data: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_link: usize::from(reg::CAPABILITIES),
        };
        space.set(reg::VENDOR, &identity.vendor.to_le_bytes());
        space.set(reg::DEVICE, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        space.set(reg::REVISION, &class.to_le_bytes());
        space.set(reg::HEADER_TYPE, &[identity.header_type]);
        space.allow(reg::COMMAND, &command_mask.to_le_bytes());
        space.allow(reg::CACHE_LINE, &[0xff]);
        space.allow(reg::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets register bytes from the device side, whatever the mask says. Bytes past the
    /// end are dropped.
    pub fn set(&mut self, offset: u16, bytes: &[u8]) {
        for (to, from) in self.data.iter_mut().skip(usize::from(offset)).zip(bytes) {
            *to = *from;
        }
    }

    /// Declares which bits the guest may write.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(usize::from(offset)).zip(mask) {
            *to = *from;
        }
    }

    /// Adds a capability: `body` follows the two header bytes, `mask` says which of its
    /// bits the guest may write (missing bytes: none). Returns the offset of the header.
    pub fn add_capability(&mut self, id: u8, body: &[u8], mask: &[u8]) -> Result<u16, PciError> {
        let start = self.next_capability;
        let end = start.saturating_add(2).saturating_add(body.len());
        let (Ok(offset), true) = (u16::try_from(start), end <= SIZE) else {
            return Err(PciError::ConfigSpaceFull(id));
        };
        let Ok(link) = u16::try_from(self.last_link) else {
            return Err(PciError::ConfigSpaceFull(id));
        };
        self.set(link, &offset.to_le_bytes()[..1]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, mask);
        let status = self.read_u16(reg::STATUS) | STATUS_CAPABILITIES;
        self.set(reg::STATUS, &status.to_le_bytes());
        self.last_link = start + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(offset)
    }

    /// Answers a guest read; bytes past the first 256 are zero.
    pub fn read(&self, offset: u16, out: &mut [u8]) {
        out.fill(0);
        for (to, from) in out
            .iter_mut()
            .zip(self.data.iter().skip(usize::from(offset)))
        {
            *to = *from;
        }
    }

    /// Takes a guest write, changing only what the mask allows.
    pub fn write(&mut self, offset: u16, bytes: &[u8]) {
        let offset = usize::from(offset);
        let registers = self.data.iter_mut().zip(&self.writable).skip(offset);
        for ((to, mask), from) in registers.zip(bytes) {
            *to = (*to & !mask) | (from & mask);
        }
    }

    /// A 16-bit register.
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A 32-bit register.
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            header_type: 0,
        };
        ConfigSpace::new(identity, 0x0406)
    }

    #[test]
    fn only_masked_bits_change_and_reads_past_the_end_are_zero() {
        let mut space = space();
        space.write(reg::VENDOR, &[0, 0, 0, 0]);
        assert_eq!(space.read_u32(reg::VENDOR), 0x1042_1af4);
        space.write(reg::COMMAND, &0xffff_u16.to_le_bytes());
        assert_eq!(space.read_u16(reg::COMMAND), 0x0406);
        assert_eq!(space.read_u32(reg::REVISION), 0x0180_0001);
        let mut data = [0xaa; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0; 4]);
        space.write(0xffe, &[1, 2, 3, 4]);
        space.read(0x100, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn capabilities_are_linked_aligned_and_refused_when_full() {
        let mut space = space();
        let first = space.add_capability(9, &[1; 11], &[]).unwrap();
        let second = space.add_capability(0x11, &[2; 10], &[0xff]).unwrap();
        assert_eq!((first, second), (0x40, 0x50));
        let mut byte = [0];
        space.read(reg::CAPABILITIES, &mut byte);
        assert_eq!(byte, [0x40]);
        space.read(0x41, &mut byte);
        assert_eq!(byte, [0x50]);
        space.read(0x51, &mut byte);
        assert_eq!(byte, [0]);
        assert_eq!(
            space.read_u16(reg::STATUS) & STATUS_CAPABILITIES,
            STATUS_CAPABILITIES
        );
        space.write(0x52, &[0xff, 0xff]);
        assert_eq!(space.read_u16(0x52), 0x02ff);
        assert_eq!(
            space.add_capability(9, &[0; 200], &[]),
            Err(PciError::ConfigSpaceFull(9))
        );
    }
}
