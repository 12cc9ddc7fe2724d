//! The generic event device (ACPI 6.5, 5.6.9, `ACPI0013`): how the machine tells the guest
//! that something happened to it. One level-triggered interrupt and one 32-bit word.
//!
//! The word is latched: an event raised before the guest's driver is up waits, with the
//! line asserted, until AML reads the word, and the read clears both. The manager thread
//! raises; the read comes on a vCPU thread. Word and line change under one lock, so that
//! they never disagree.
//!
//! | offset | register |
//! |---|---|
//! | 0 | events, read to clear (bit 0: power button, 1: slots, 2: vCPUs) |

use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, BusError};

/// A level-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    /// Asserts or releases the line.
    fn set(&self, asserted: bool);
}

/// Events by bit of the word; the DSDT's `_EVT` tests the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GedEvents(u32);

impl GedEvents {
    /// The power button was pressed.
    pub const POWER_BUTTON: Self = Self(1 << 0);
    /// Something happened to root ports' slots (`hotplug.rs`).
    pub const SLOTS: Self = Self(1 << 1);
    /// Something happened to vCPUs (`hotplug.rs`).
    pub const CPUS: Self = Self(1 << 2);

    /// The bits.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// The device.
pub struct Ged {
    latched: Mutex<u32>,
    line: Box<dyn IrqLine>,
}

impl Ged {
    /// A device without events that drives `line`.
    pub fn new(line: Box<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            latched: Mutex::new(0),
            line,
        })
    }

    /// Puts the register block on the MMIO bus.
    pub fn attach(self: &Arc<Self>, mmio: &Bus) -> Result<(), BusError> {
        mmio.insert(layout::GED_START, layout::GED_SIZE, Arc::clone(self) as _)
    }

    /// Latches `events` and asserts the line.
    pub fn raise(&self, events: GedEvents) {
        let mut latched = self.latched.lock().unwrap_or_else(PoisonError::into_inner);
        *latched |= events.bits();
        self.line.set(true);
    }

    /// Nothing has happened to a machine that begins anew.
    pub fn reset(&self) {
        let mut latched = self.latched.lock().unwrap_or_else(PoisonError::into_inner);
        *latched = 0;
        self.line.set(false);
    }

    /// What the host's "shut down" does: Notify(PWRB, 0x80) in the guest.
    pub fn press_power_button(&self) {
        self.raise(GedEvents::POWER_BUTTON);
    }
}

impl BusDevice for Ged {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Only the whole word is taken and cleared: a narrower read would lose events.
        if let (0, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            let mut latched = self.latched.lock().unwrap_or_else(PoisonError::into_inner);
            *word = std::mem::take(&mut *latched).to_le_bytes();
            self.line.set(false);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Line(Arc<AtomicBool>);
    impl IrqLine for Line {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    #[test]
    fn an_event_stays_latched_until_the_whole_word_is_read() {
        let line = Arc::new(AtomicBool::new(false));
        let ged = Ged::new(Box::new(Line(Arc::clone(&line))));
        let mmio = Bus::new();
        ged.attach(&mmio).unwrap();
        ged.press_power_button();
        ged.press_power_button();
        assert!(line.load(Ordering::SeqCst));
        for (address, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (4, 4), (0xffc, 4)] {
            let mut data = vec![0xff; width];
            assert!(mmio.read(layout::GED_START + address, &mut data));
            assert_eq!(data, vec![0; width]);
            assert!(line.load(Ordering::SeqCst));
        }
        mmio.write(layout::GED_START, &[0xff; 4]);
        let mut word = [0; 4];
        mmio.read(layout::GED_START, &mut word);
        assert_eq!(u32::from_le_bytes(word), GedEvents::POWER_BUTTON.bits());
        assert!(!line.load(Ordering::SeqCst));
        mmio.read(layout::GED_START, &mut word);
        assert_eq!(word, [0; 4]);
    }
}
