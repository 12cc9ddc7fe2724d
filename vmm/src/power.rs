//! The registers by which a guest ends itself: ACPI's sleep control and reset registers of a
//! hardware-reduced machine (ACPI 6.5, 4.8.3.6 and 4.8.3.7, named in the FADT), and the
//! keyboard controller's reset command that Linux falls back to.
//!
//! Written on vCPU threads; the manager hears of it through `events`.

use std::sync::Arc;

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, BusError};
use crate::events::{EventSender, MachineEvent};

/// SLP_TYP of S5 as the DSDT's `_S5` names it.
pub const S5_SLEEP_TYPE: u8 = 5;
/// SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// The keyboard controller's command port and its "pulse the reset line" command.
const I8042_COMMAND_PORT: u64 = 0x64;
const I8042_RESET: u8 = 0xfe;

struct SleepRegisters(EventSender);

impl BusDevice for SleepRegisters {
    /// Both registers read as zero: no sleep type is selected and there is no wake status.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [value, ..]) = (offset, data)
            && value & SLEEP_ENABLE != 0
            && (value >> 2) & 7 == S5_SLEEP_TYPE
        {
            self.0.send(MachineEvent::PowerOff);
        }
    }
}

struct ResetRegister(EventSender);

impl BusDevice for ResetRegister {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&layout::RESET_VALUE) {
            self.0.send(MachineEvent::Reset);
        }
    }
}

struct KeyboardController(EventSender);

impl BusDevice for KeyboardController {
    /// Status: both buffers empty, so that a guest that asks before the command goes on.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&I8042_RESET) {
            self.0.send(MachineEvent::Reset);
        }
    }
}

/// Puts the registers on the port bus.
pub fn attach(pio: &Bus, events: &EventSender) -> Result<(), BusError> {
    pio.insert(
        layout::SLEEP_CONTROL_PORT,
        2,
        Arc::new(SleepRegisters(events.clone())),
    )?;
    pio.insert(
        layout::RESET_PORT,
        1,
        Arc::new(ResetRegister(events.clone())),
    )?;
    pio.insert(
        I8042_COMMAND_PORT,
        1,
        Arc::new(KeyboardController(events.clone())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::event_channel;

    #[test]
    fn only_the_right_values_end_the_machine() {
        let (sender, receiver) = event_channel().unwrap();
        let pio = Bus::new();
        attach(&pio, &sender).unwrap();
        for value in 0..=u8::MAX {
            pio.write(layout::SLEEP_CONTROL_PORT, &[value]);
            let off = matches!(receiver.try_recv(), Some(MachineEvent::PowerOff));
            assert_eq!(off, value & 0x3c == 0x20 | (5 << 2), "{value:#x}");
            pio.write(layout::RESET_PORT, &[value]);
            let reset = matches!(receiver.try_recv(), Some(MachineEvent::Reset));
            assert_eq!(reset, value == layout::RESET_VALUE);
            pio.write(0x64, &[value]);
            let reset = matches!(receiver.try_recv(), Some(MachineEvent::Reset));
            assert_eq!(reset, value == 0xfe);
        }
        pio.write(layout::SLEEP_CONTROL_PORT + 1, &[0x34]);
        assert!(receiver.try_recv().is_none());
    }
}
