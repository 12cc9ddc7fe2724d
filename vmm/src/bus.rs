//! The guest-physical address buses (MMIO and port I/O): which device answers where.
//!
//! vCPU threads look devices up here on every exit; the manager thread inserts and
//! removes. Lookups take a read lock that is never held while a device works.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A device on a bus. Called from any vCPU thread, several at once: state lives behind
/// the device's own lock. `offset` is relative to the range's base and `data` is 1 to 8
/// bytes long and never crosses the end of the range.
pub trait BusDevice: Send + Sync {
    /// Answers a guest read by filling `data`, which arrives filled with 0xff.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a guest write.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be inserted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error("bus range {base:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Length of each range and its device, by first address.
type Ranges = BTreeMap<u64, (u64, Arc<dyn BusDevice>)>;

/// An address bus.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Ranges>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = match len.checked_sub(1).and_then(|l| base.checked_add(l)) {
            Some(last) => last,
            None => return Err(BusError::BadRange { base, len }),
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let clash = ranges
            .range(..=last)
            .next_back()
            .is_some_and(|(b, (l, _))| b.saturating_add(*l) > base);
        if clash {
            return Err(BusError::Overlap { base, len });
        }
        ranges.insert(base, (len, device));
        Ok(())
    }

    /// Removes the range that starts at `base`; true if there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// Removes every range: a device that knows the bus that it is on would keep both.
    pub fn clear(&self) {
        let ranges =
            std::mem::take(&mut *self.ranges.write().unwrap_or_else(PoisonError::into_inner));
        // The lock is free by now: devices that go may remove ranges of their own.
        drop(ranges);
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, (size, device)) = ranges.range(..=address).next_back()?;
        let offset = address.checked_sub(*base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= *size).then(|| (offset, Arc::clone(device)))
    }

    /// Serves a guest read; false (and `data` all ones) when nothing is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Serves a guest write; false when nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn ranges_do_not_overlap_and_accesses_do_not_cross_an_end() {
        let bus = Bus::new();
        let echo = Arc::new(Echo(Mutex::new(Vec::new())));
        bus.insert(0x1000, 0x100, echo.clone()).unwrap();
        for (base, len) in [(0xf01, 0x100), (0x10ff, 1), (0x1000, 1), (0xfff, 0x200)] {
            assert_eq!(
                bus.insert(base, len, echo.clone()),
                Err(BusError::Overlap { base, len })
            );
        }
        assert!(bus.insert(0x1100, 1, echo.clone()).is_ok());
        assert!(matches!(
            bus.insert(0, 0, echo.clone()),
            Err(BusError::BadRange { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, echo.clone()),
            Err(BusError::BadRange { .. })
        ));
        let mut data = [0; 4];
        assert!(bus.read(0x1010, &mut data));
        assert_eq!(data, [0x10; 4]);
        assert!(!bus.read(0x10fe, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(bus.write(0x1004, &[1, 2]));
        assert_eq!(*echo.0.lock().unwrap(), [(4, vec![1, 2])]);
        assert!(bus.remove(0x1000));
        assert!(!bus.write(0x1004, &[1]));
    }
}
