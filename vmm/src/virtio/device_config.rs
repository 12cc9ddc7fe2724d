//! The device-specific configuration space as the function answers it (VIRTIO 1.2 sections
//! 2.5, 4.1.4.6 and, for a network device's status, 5.1.4): a copy of what the back-end
//! serves, or bytes of the VMM's own.
//!
//! What the driver wrote is remembered, so that a successor of the back-end can be told.
//! Lives under a short lock of its own: the manager thread changes the link's state here
//! while a vCPU may wait for the back-end.

use super::ConfigSource;

const STATUS_AT: usize = 6;
const LINK_UP: u8 = 1;
const ANNOUNCE: u8 = 2;

/// The configuration space.
pub struct DeviceConfig {
    bytes: Vec<u8>,
    served: bool,
    /// Bytes that the driver has written since the last reset.
    written: Vec<bool>,
}

impl DeviceConfig {
    /// As the options say; what a back-end serves is zero until it has been asked.
    pub fn new(source: &ConfigSource) -> Self {
        let (bytes, served) = match source {
            ConfigSource::Fixed(bytes) => (bytes.clone(), false),
            ConfigSource::Backend(size) => (vec![0; *size], true),
        };
        let written = vec![false; bytes.len()];
        Self {
            bytes,
            served,
            written,
        }
    }

    /// How many bytes to ask the back-end for; 0: none.
    pub fn served_size(&self) -> usize {
        if self.served { self.bytes.len() } else { 0 }
    }

    /// Answers a read; zeroes past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(start)) {
            *to = *from;
        }
    }

    /// The driver writes: true when the back-end must be told. Writes past the end, and
    /// all of them where the space is the VMM's own, are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let range = offset..offset.saturating_add(data.len());
        if !self.served || data.is_empty() {
            return false;
        }
        let (Some(place), Some(marks)) = (
            self.bytes.get_mut(range.clone()),
            self.written.get_mut(range),
        ) else {
            return false;
        };
        place.copy_from_slice(data);
        marks.fill(true);
        true
    }

    /// What the back-end says that it is now; true when that is something else.
    pub fn replace(&mut self, bytes: Vec<u8>) -> bool {
        let changed = bytes.len() == self.bytes.len() && bytes != self.bytes;
        if changed {
            self.bytes = bytes;
        }
        changed
    }

    /// What the driver has written, as runs of bytes by offset.
    pub fn writes(&self) -> Vec<(u32, Vec<u8>)> {
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut open = false;
        for ((at, byte), written) in (0..).zip(&self.bytes).zip(&self.written) {
            if *written {
                match runs.last_mut() {
                    Some((_, run)) if open => run.push(*byte),
                    _ => runs.push((at, vec![*byte])),
                }
            }
            open = *written;
        }
        runs
    }

    /// The device was reset: nothing of what the driver wrote counts.
    pub fn forget_writes(&mut self) {
        self.written.fill(false);
    }

    /// Sets a network device's link status; true when it was different.
    pub fn set_link(&mut self, up: bool) -> bool {
        self.set_status(LINK_UP, up)
    }

    /// Asks the driver to announce its address, or takes that back.
    pub fn set_announce(&mut self, on: bool) -> bool {
        self.set_status(ANNOUNCE, on)
    }

    fn set_status(&mut self, bit: u8, on: bool) -> bool {
        let Some(status) = self.bytes.get_mut(STATUS_AT) else {
            return false;
        };
        let before = *status;
        *status = if on { before | bit } else { before & !bit };
        *status != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_wrote_is_remembered_until_a_reset() {
        let mut config = DeviceConfig::new(&ConfigSource::Backend(8));
        assert!(config.write(1, &[1, 2]));
        assert!(config.write(3, &[3]));
        assert!(config.write(7, &[7]));
        assert!(!config.write(7, &[8, 9]) && !config.write(8, &[1]) && !config.write(0, &[]));
        assert!(!config.write(usize::MAX, &[1]));
        assert_eq!(config.writes(), [(1, vec![1, 2, 3]), (7, vec![7])]);
        assert!(config.replace(vec![9; 8]));
        assert!(!config.replace(vec![9; 8]) && !config.replace(vec![1; 7]));
        assert_eq!(config.writes(), [(1, vec![9, 9, 9]), (7, vec![9])]);
        config.forget_writes();
        assert!(config.writes().is_empty());
        let mut data = [0xff; 4];
        config.read(6, &mut data);
        assert_eq!(data, [9, 9, 0, 0]);
        config.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn the_link_of_a_network_device_goes_up_and_down() {
        let mut config = DeviceConfig::new(&ConfigSource::Fixed(vec![0; 12]));
        assert!(!config.write(0, &[1]), "fixed");
        assert!(config.set_link(true) && !config.set_link(true));
        assert!(config.set_announce(true));
        let mut data = [0; 2];
        config.read(6, &mut data);
        assert_eq!(data, [3, 0]);
        assert!(config.set_link(false) && config.set_announce(false));
        config.read(6, &mut data);
        assert_eq!(data, [0, 0]);
        let mut empty = DeviceConfig::new(&ConfigSource::Fixed(Vec::new()));
        assert!(!empty.set_link(true));
    }
}
