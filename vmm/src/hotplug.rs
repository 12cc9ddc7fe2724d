//! The registers by which hot-plug is told to the guest and acknowledged by it, read and
//! written by the AML in `arch::x86_64::acpi::hotplug` (ACPI 6.5, 5.6.6 and 6.3). What has
//! happened is latched here first, then the generic event device's line is raised (`ged.rs`):
//! an event from before the guest's driver waits.
//!
//! | offset | register |
//! |---|---|
//! | 0x00 | root ports whose slot was filled, or emptied by surprise: a bit for each device number; read to clear |
//! | 0x04 | root ports whose device shall be removed; read to clear |
//! | 0x08 | write: eject the devices behind these root ports |
//! | 0x100 + n | vCPU n, a byte. Read: bit 0 it is there, bit 1 it was added, bit 2 it shall be removed. Write: bits 1 and 2 take those notes back, bit 3 ejects it, bit 4 says that what was to become of it has |
//!
//! vCPU threads read and write; the manager notes what it wants and takes what was ejected.
//! An ejected device has left the bus before the guest's write returns, so that no scan finds
//! it again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, BusError};
use crate::events::{EventSender, MachineEvent};
use crate::pci::PciFunction;

/// Offset of the slots' insertion notes.
pub const SLOTS_INSERTED: u64 = 0x00;
/// Offset of the slots' removal notes.
pub const SLOTS_REMOVING: u64 = 0x04;
/// Offset of the slots' eject register.
pub const SLOTS_EJECT: u64 = 0x08;
/// Offset of the first vCPU's byte.
pub const CPUS: u64 = 0x100;
/// vCPU bits.
pub const CPU_PRESENT: u8 = 1 << 0;
/// It was added.
pub const CPU_INSERTED: u8 = 1 << 1;
/// It shall be removed.
pub const CPU_REMOVING: u8 = 1 << 2;
/// Eject it.
pub const CPU_EJECT: u8 = 1 << 3;
/// It was asked for, or ejected, and the guest is through with that (`_OST`, ACPI 6.5, 6.3.5).
pub const CPU_ANSWERED: u8 = 1 << 4;

/// Takes the device behind a root port, by its device number, off the bus. `None`: there is
/// none.
pub type Detach = Box<dyn Fn(u8) -> Option<Arc<dyn PciFunction>> + Send + Sync>;

#[derive(Default)]
struct State {
    inserted: u32,
    removing: u32,
    /// What the manager does not know of yet: no more than it has plugged in.
    ejected: Vec<Arc<dyn PciFunction>>,
    /// The bits of each vCPU that there may be.
    cpus: Vec<u8>,
    /// Requests for each vCPU that the guest has seen and not answered: it may give it up at any
    /// time, or has and will look whether it is really gone.
    asked: Vec<u8>,
    ejected_cpus: Vec<u32>,
}

/// The registers.
pub struct HotplugRegisters {
    state: Mutex<State>,
    detach: Detach,
    events: EventSender,
}

impl HotplugRegisters {
    /// Registers of a machine with `boot` of `max` vCPUs.
    pub fn new(boot: u32, max: u32, detach: Detach, events: EventSender) -> Arc<Self> {
        let cpus = (0..max).map(|n| if n < boot { CPU_PRESENT } else { 0 });
        Arc::new(Self {
            state: Mutex::new(State {
                cpus: cpus.collect(),
                asked: vec![0; max as usize],
                ..State::default()
            }),
            detach,
            events,
        })
    }

    /// Puts the register block on the MMIO bus.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, mmio: &Bus) -> Result<(), BusError> {
        let registers: Arc<dyn BusDevice> = Arc::clone(self) as _;
        mmio.insert(layout::HOTPLUG_START, layout::HOTPLUG_SIZE, registers)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest shall look at a slot: something was put in, or is gone.
    pub fn slot_changed(&self, device: u8) {
        let mut state = self.lock();
        state.inserted |= bit(device);
        state.removing &= !bit(device);
    }

    /// The guest shall give the device in a slot back.
    pub fn ask_for_slot(&self, device: u8) {
        self.lock().removing |= bit(device);
    }

    /// Withdraws that. False: the guest has seen it already.
    pub fn withdraw_slot(&self, device: u8) -> bool {
        let mut state = self.lock();
        let unseen = state.removing & bit(device) != 0;
        state.removing &= !bit(device);
        unseen
    }

    /// Another guest begins, with the first `present` vCPUs: it is asked for nothing and has seen
    /// nothing.
    pub fn reset(&self, present: u32) {
        let mut state = self.lock();
        (state.inserted, state.removing) = (0, 0);
        state.ejected_cpus.clear();
        state.asked.fill(0);
        for (bits, index) in state.cpus.iter_mut().zip(0..) {
            *bits = if index < present { CPU_PRESENT } else { 0 };
        }
    }

    /// What the guest has ejected since the last call. Something else may be in its slot by now.
    pub fn take_ejected(&self) -> Vec<Arc<dyn PciFunction>> {
        std::mem::take(&mut self.lock().ejected)
    }

    /// vCPUs that there may be.
    pub fn possible_cpus(&self) -> u32 {
        u32::try_from(self.lock().cpus.len()).unwrap_or(u32::MAX)
    }

    /// vCPUs that are there or were added.
    pub fn present_cpus(&self) -> u32 {
        let state = self.lock();
        let present = state.cpus.iter().filter(|bits| **bits & CPU_PRESENT != 0);
        u32::try_from(present.count()).unwrap_or(u32::MAX)
    }

    /// The highest vCPU that is there and not asked back.
    pub fn last_cpu(&self) -> Option<u32> {
        let state = self.lock();
        let last = state
            .cpus
            .iter()
            .rposition(|bits| *bits & CPU_PRESENT != 0 && *bits & CPU_REMOVING == 0)?;
        u32::try_from(last).ok()
    }

    /// vCPUs that the guest has been asked for and has neither given up nor said that it keeps,
    /// whether it has seen the request or not.
    pub fn asked_cpus(&self) -> Vec<u32> {
        self.unanswered(true)
    }

    /// vCPUs that the guest has ejected and is not through with: one that came back now would look
    /// to it as if it had never gone.
    pub fn leaving_cpus(&self) -> Vec<u32> {
        self.unanswered(false)
    }

    fn unanswered(&self, present: bool) -> Vec<u32> {
        let state = self.lock();
        let cpus = (0..).zip(state.cpus.iter().zip(&state.asked));
        cpus.filter(|(_, (bits, asked))| *bits & CPU_REMOVING != 0 || **asked > 0)
            .filter(|(_, (bits, _))| (**bits & CPU_PRESENT != 0) == present)
            .map(|(index, _)| index)
            .collect()
    }

    /// The guest has had time enough to be through with those that it has ejected: it is one
    /// without `_OST`.
    pub fn forget_leaving_cpus(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        for (bits, asked) in state.cpus.iter().zip(&mut state.asked) {
            if *bits & CPU_PRESENT == 0 {
                *asked = 0;
            }
        }
    }

    /// The guest has had its time to answer: another kernel may run by now.
    pub fn forget_asked_cpus(&self) {
        self.lock().asked.fill(0);
    }

    /// Adds the lowest vCPU that is not there, nor leaving.
    pub fn add_cpu(&self) -> Option<u32> {
        let mut state = self.lock();
        let mut cpus = (0..).zip(state.cpus.iter().zip(&state.asked));
        let index = cpus.find_map(|(index, (bits, asked))| {
            // One whose eject the manager has not seen yet would be stopped by that.
            let free = bits & CPU_PRESENT == 0 && *asked == 0;
            (free && !state.ejected_cpus.contains(&index)).then_some(index as usize)
        })?;
        *state.cpus.get_mut(index)? = CPU_PRESENT | CPU_INSERTED;
        u32::try_from(index).ok()
    }

    /// The guest shall give a vCPU back.
    pub fn ask_for_cpu(&self, index: u32) {
        let mut state = self.lock();
        if let Some(bits) = state.cpus.get_mut(index as usize)
            && *bits & CPU_PRESENT != 0
        {
            *bits |= CPU_REMOVING;
        }
    }

    /// Withdraws that. False: the guest has seen it already.
    pub fn withdraw_cpu(&self, index: u32) -> bool {
        let mut state = self.lock();
        let Some(bits) = state.cpus.get_mut(index as usize) else {
            return false;
        };
        let unseen = *bits & CPU_REMOVING != 0;
        *bits &= !CPU_REMOVING;
        unseen
    }

    /// The guest has not seen yet that a vCPU was added.
    pub fn cpu_unseen(&self, index: u32) -> bool {
        let state = self.lock();
        let bits = state.cpus.get(index as usize);
        bits.is_some_and(|bits| bits & CPU_INSERTED != 0)
    }

    /// Takes back a vCPU that the guest has not seen. False: it has.
    pub fn withdraw_added(&self, index: u32) -> bool {
        let mut state = self.lock();
        match state.cpus.get_mut(index as usize) {
            Some(bits) if *bits & CPU_INSERTED != 0 => {
                *bits = 0;
                true
            }
            _ => false,
        }
    }

    /// vCPUs that the guest has ejected since the last call.
    pub fn take_ejected_cpus(&self) -> Vec<u32> {
        std::mem::take(&mut self.lock().ejected_cpus)
    }

    fn eject_slots(&self, slots: u32) {
        for device in (0..32).filter(|device| slots & bit(*device) != 0) {
            if let Some(function) = (self.detach)(device) {
                let mut state = self.lock();
                state.ejected.push(function);
                state.removing &= !bit(device);
                drop(state);
                // Should the queue be full, the manager looks anyway.
                self.events.send(MachineEvent::Ejected);
            }
        }
    }

    fn write_cpu(&self, index: usize, value: u8) {
        let mut state = self.lock();
        let Some(bits) = state.cpus.get_mut(index) else {
            return;
        };
        let before = *bits;
        *bits &= !(value & (CPU_INSERTED | CPU_REMOVING));
        let seen = before & value & CPU_REMOVING != 0;
        // The boot processor stays.
        let ejected = value & CPU_EJECT != 0 && before & CPU_PRESENT != 0 && index != 0;
        if ejected {
            *bits = 0;
        }
        let changed = *bits != before;
        let mut moved = false;
        if let Some(asked) = state.asked.get_mut(index) {
            let was = *asked;
            // A guest that ejects by its own will says what became of it, too.
            let own = ejected && was == 0;
            *asked = asked.saturating_add(u8::from(seen || own));
            if value & CPU_ANSWERED != 0 {
                *asked = asked.saturating_sub(1);
            }
            moved = *asked != was;
        }
        if ejected {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            state.ejected_cpus.push(index);
        }
        drop(state);
        // Only as often as the manager has noted something.
        if changed || moved {
            self.events.send(MachineEvent::Ejected);
        }
    }
}

fn bit(device: u8) -> u32 {
    1_u32.checked_shl(device.into()).unwrap_or(0)
}

impl BusDevice for HotplugRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut state = self.lock();
        match (offset, &mut *data) {
            // Only the whole word is taken and cleared: a narrower read would lose notes.
            (SLOTS_INSERTED, [_, _, _, _]) => {
                data.copy_from_slice(&std::mem::take(&mut state.inserted).to_le_bytes());
            }
            (SLOTS_REMOVING, [_, _, _, _]) => {
                data.copy_from_slice(&std::mem::take(&mut state.removing).to_le_bytes());
            }
            (CPUS.., [byte]) => {
                let index = usize::try_from(offset.saturating_sub(CPUS)).ok();
                *byte = index
                    .and_then(|index| state.cpus.get(index))
                    .copied()
                    .unwrap_or(0);
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLOTS_EJECT, [a, b, c, d]) => self.eject_slots(u32::from_le_bytes([*a, *b, *c, *d])),
            (CPUS.., [value]) => {
                if let Ok(index) = usize::try_from(offset.saturating_sub(CPUS)) {
                    self.write_cpu(index, *value);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{EventReceiver, event_channel};
    use crate::pci::BarKind;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A function of which only the name counts.
    struct Nothing(String);

    impl PciFunction for Nothing {
        fn id(&self) -> &str {
            &self.0
        }
        fn config_read(&self, _offset: u16, _data: &mut [u8]) {}
        fn config_write(&self, _offset: u16, _data: &[u8]) {}
        fn place_bars(&self, _place: &mut dyn FnMut(BarKind, u64) -> Option<u64>) {}
        fn bus_reset(&self) {}
        fn unplug(&self) {}
        fn release_register(&self) -> Option<u64> {
            None
        }
    }

    struct Bed {
        registers: Arc<HotplugRegisters>,
        bus: Bus,
        plugged: Arc<AtomicU32>,
        events: EventReceiver,
    }

    fn bed(boot: u32, max: u32) -> Bed {
        let (sender, events) = event_channel().unwrap();
        let plugged = Arc::new(AtomicU32::new(0));
        let there = Arc::clone(&plugged);
        let detach = move |device| {
            let was = there.fetch_and(!bit(device), Ordering::SeqCst);
            let function = Arc::new(Nothing(device.to_string())) as Arc<dyn PciFunction>;
            (was & bit(device) != 0).then_some(function)
        };
        let registers = HotplugRegisters::new(boot, max, Box::new(detach), sender);
        let bus = Bus::new();
        registers.attach(&bus).unwrap();
        Bed {
            registers,
            bus,
            plugged,
            events,
        }
    }

    impl Bed {
        fn word(&self, offset: u64) -> u32 {
            let mut word = [0; 4];
            assert!(self.bus.read(layout::HOTPLUG_START + offset, &mut word));
            u32::from_le_bytes(word)
        }

        fn cpu(&self, index: u64) -> u8 {
            let mut byte = [0];
            assert!(
                self.bus
                    .read(layout::HOTPLUG_START + CPUS + index, &mut byte)
            );
            byte[0]
        }

        fn eject(&self, slots: u32) {
            let at = layout::HOTPLUG_START + SLOTS_EJECT;
            self.bus.write(at, &slots.to_le_bytes());
        }

        fn write_cpu(&self, index: u64, value: u8) {
            self.bus
                .write(layout::HOTPLUG_START + CPUS + index, &[value]);
        }
    }

    #[test]
    fn notes_wait_until_the_whole_word_is_read() {
        let bed = bed(1, 1);
        bed.registers.slot_changed(3);
        bed.registers.slot_changed(31);
        bed.registers.ask_for_slot(5);
        bed.bus.read(layout::HOTPLUG_START, &mut [0; 2]);
        bed.bus.read(layout::HOTPLUG_START + 4, &mut [0; 8]);
        assert_eq!(bed.word(SLOTS_INSERTED), 1 << 3 | 1 << 31);
        assert_eq!(bed.word(SLOTS_INSERTED), 0);
        assert_eq!(bed.word(SLOTS_REMOVING), 1 << 5);
        assert!(!bed.registers.withdraw_slot(5), "seen");
        bed.registers.ask_for_slot(5);
        assert!(bed.registers.withdraw_slot(5));
        assert_eq!(bed.word(SLOTS_REMOVING), 0);
    }

    #[test]
    fn only_what_is_there_is_ejected_and_it_is_gone_at_once() {
        let bed = bed(1, 1);
        bed.eject(u32::MAX);
        assert!(bed.registers.take_ejected().is_empty());
        assert!(bed.events.try_recv().is_none());
        bed.plugged.store(1 << 4 | 1 << 9, Ordering::SeqCst);
        bed.registers.ask_for_slot(4);
        bed.eject(1 << 4);
        assert_eq!(bed.plugged.load(Ordering::SeqCst), 1 << 9);
        assert_eq!(bed.word(SLOTS_REMOVING), 0);
        assert!(matches!(bed.events.try_recv(), Some(MachineEvent::Ejected)));
        // Something else is put in before the manager has looked, and goes, too.
        bed.plugged.fetch_or(1 << 4, Ordering::SeqCst);
        bed.registers.slot_changed(4);
        bed.eject(1 << 9 | 1 << 4);
        let ejected = bed.registers.take_ejected();
        let ids: Vec<&str> = ejected.iter().map(|function| function.id()).collect();
        assert_eq!(ids, ["4", "4", "9"]);
        assert!(bed.registers.take_ejected().is_empty());
    }

    #[test]
    fn vcpus_come_and_go_and_the_first_one_stays() {
        let bed = bed(2, 4);
        assert_eq!([0, 1, 2, 3, 4].map(|n| bed.cpu(n)), [1, 1, 0, 0, 0]);
        assert_eq!(bed.registers.add_cpu(), Some(2));
        assert_eq!(bed.cpu(2), CPU_PRESENT | CPU_INSERTED);
        assert!(bed.registers.cpu_unseen(2));
        bed.write_cpu(2, CPU_INSERTED);
        assert_eq!(bed.cpu(2), CPU_PRESENT);
        assert!(!bed.registers.withdraw_added(2));
        assert_eq!(bed.registers.add_cpu(), Some(3));
        assert_eq!(bed.registers.add_cpu(), None);
        assert!(bed.registers.withdraw_added(3));
        assert_eq!(bed.registers.last_cpu(), Some(2));
        bed.registers.ask_for_cpu(2);
        assert_eq!(bed.registers.last_cpu(), Some(1));
        bed.write_cpu(2, CPU_REMOVING);
        bed.write_cpu(2, CPU_EJECT);
        bed.write_cpu(0, CPU_EJECT);
        bed.write_cpu(3, CPU_EJECT);
        bed.write_cpu(200, 0xff);
        assert_eq!(bed.registers.take_ejected_cpus(), [2]);
        assert_eq!(bed.registers.present_cpus(), 2);
    }

    #[test]
    fn a_vcpu_that_leaves_is_not_added() {
        let bed = bed(3, 4);
        bed.registers.ask_for_cpu(1);
        bed.write_cpu(1, CPU_REMOVING);
        bed.write_cpu(1, CPU_EJECT);
        // The guest is not through with it, and nobody has stopped it.
        assert_eq!(bed.registers.add_cpu(), Some(3));
        assert_eq!(bed.registers.add_cpu(), None);
        bed.write_cpu(1, CPU_ANSWERED);
        assert_eq!(bed.registers.add_cpu(), None, "it is to be stopped still");
        assert_eq!(bed.registers.take_ejected_cpus(), [1]);
        assert_eq!(bed.registers.add_cpu(), Some(1));
    }

    #[test]
    fn the_next_guest_is_asked_for_nothing() {
        let bed = bed(2, 4);
        bed.registers.slot_changed(3);
        bed.registers.ask_for_slot(4);
        assert_eq!(bed.registers.add_cpu(), Some(2));
        bed.registers.ask_for_cpu(1);
        bed.write_cpu(1, CPU_REMOVING);
        bed.write_cpu(1, CPU_EJECT);
        bed.registers.reset(3);
        assert_eq!([0, 1, 2, 3].map(|n| bed.cpu(n)), [1, 1, 1, 0]);
        assert_eq!((bed.word(SLOTS_INSERTED), bed.word(SLOTS_REMOVING)), (0, 0));
        assert!(bed.registers.take_ejected_cpus().is_empty());
        assert!(bed.registers.asked_cpus().is_empty());
        assert!(bed.registers.leaving_cpus().is_empty());
        assert_eq!(bed.registers.add_cpu(), Some(3));
    }

    #[test]
    fn a_vcpu_that_was_asked_for_is_so_until_the_guest_answers() {
        let bed = bed(4, 4);
        bed.write_cpu(3, CPU_ANSWERED);
        assert!(bed.events.try_recv().is_none(), "nobody asked");
        for index in [2, 3] {
            bed.registers.ask_for_cpu(index);
        }
        assert_eq!(bed.registers.asked_cpus(), [2, 3]);
        bed.write_cpu(3, CPU_REMOVING);
        assert!(matches!(bed.events.try_recv(), Some(MachineEvent::Ejected)));
        assert!(bed.registers.withdraw_cpu(2), "not seen");
        assert!(!bed.registers.withdraw_cpu(3), "seen");
        assert_eq!(bed.registers.asked_cpus(), [3]);
        bed.write_cpu(3, CPU_ANSWERED);
        assert!(bed.registers.asked_cpus().is_empty());
        assert!(matches!(bed.events.try_recv(), Some(MachineEvent::Ejected)));
        bed.write_cpu(3, CPU_ANSWERED | CPU_REMOVING);
        assert!(bed.events.try_recv().is_none(), "nothing was noted");
        bed.registers.ask_for_cpu(3);
        bed.write_cpu(3, CPU_REMOVING);
        bed.write_cpu(3, CPU_EJECT);
        assert!(bed.registers.asked_cpus().is_empty());
        assert_eq!(bed.registers.leaving_cpus(), [3]);
        assert_eq!(bed.registers.present_cpus(), 3);
        bed.write_cpu(3, CPU_ANSWERED);
        assert!(bed.registers.leaving_cpus().is_empty());
        // By its own will, and without a word.
        bed.write_cpu(2, CPU_EJECT);
        assert_eq!(bed.registers.leaving_cpus(), [2]);
        bed.registers.forget_leaving_cpus();
        assert!(bed.registers.leaving_cpus().is_empty());
    }
}
