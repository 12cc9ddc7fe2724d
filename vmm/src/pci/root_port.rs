//! A root port: a type 1 function on bus 0 with one slot below it (PCI-to-PCI Bridge
//! Architecture 1.2 section 3.2, PCI Express Base 5.0 section 7.5.3).
//!
//! The slot is declared without the hot-plug capable bit: hot-plug is signalled through
//! ACPI, and a guest that takes native hot-plug over would wait for events that never
//! come. There is no I/O window (base and limit are hard-wired to zero). vCPU threads
//! access the registers; the manager thread fills and empties the slot.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::bar::{AddressRange, BarClaim, BarDecoder, BarListener};
use super::config::{ConfigSpace, Identity, reg};
use super::{BarKind, PciError, PciFunction};
use crate::bus::BusDevice;

/// Red Hat's identity for a generic PCI Express root port: no quirks in any guest.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x000c;
const CLASS_BRIDGE_PCI: u32 = 0x06_0400;

const PRIMARY_BUS: u16 = 0x18;
const MEMORY_BASE: u16 = 0x20;
const MEMORY_LIMIT: u16 = 0x22;
const PREFETCH_BASE: u16 = 0x24;
const PREFETCH_LIMIT: u16 = 0x26;
const PREFETCH_BASE_UPPER: u16 = 0x28;
const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
const BRIDGE_CONTROL: u16 = 0x3e;
const SECONDARY_BUS_RESET: u16 = 1 << 6;
const COMMAND_MASK: u16 = 0x0546;
const COMMAND_MEMORY_AND_MASTER: u16 = 0x0006;

const CAPABILITY_PCIE: u8 = 0x10;
/// Offsets inside the PCI Express capability.
const LINK_STATUS: u16 = 0x12;
const SLOT_STATUS: u16 = 0x1a;
const LINK_X1_2GT5: u16 = 0x0011;
const LINK_ACTIVE: u16 = 1 << 13;
const PRESENCE: u16 = 1 << 6;

/// A root port to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// The name by which the API addresses it.
    pub name: String,
    /// Device number on bus 0, 1 to 31.
    pub device: u8,
    /// Physical slot number, unique in the machine, below 8192.
    pub slot: u16,
    /// Devices may come and go behind it.
    pub hotplug: bool,
}

/// What is programmed into a port before the guest starts.
pub(super) struct PortResources {
    pub secondary_bus: u8,
    pub memory: AddressRange,
    pub prefetchable: AddressRange,
}

/// A root port and what is plugged into it.
pub(super) struct RootPort {
    pub config: PortConfig,
    /// Secondary bus number, a copy of the register that routing reads without a lock.
    secondary: AtomicU8,
    registers: Mutex<ConfigSpace>,
    /// As they are before the guest starts, and nothing is plugged in.
    first: ConfigSpace,
    express: u16,
    function: RwLock<Option<Arc<dyn PciFunction>>>,
    /// Answers in the place of a function that left by surprise.
    ghost: Mutex<Option<Haunting>>,
}

/// A slot that was emptied by surprise.
struct Haunting {
    ghost: Arc<Ghost>,
    /// Where it answers.
    _claim: BarClaim,
}

impl Haunting {
    /// The guest has not let go.
    fn lasts(&self) -> bool {
        !self.ghost.let_go.load(Ordering::Acquire)
    }
}

/// What answers where a function was: zeros. A driver that is told late that its device is
/// gone resets it and waits for the status register to read as zero; all ones, as on hardware,
/// would hold Linux's there for ever.
///
/// Until the guest has let go, nothing else may be put in its place: a guest that looks then
/// takes the newcomer for what was there.
struct Ghost {
    /// Offset of the register to which the driver that held the function writes zero when it lets
    /// go; [`NOWHERE`]: no driver held it, and the guest only has to find the slot empty.
    register: AtomicU64,
    let_go: AtomicBool,
}

/// No register is watched.
const NOWHERE: u64 = u64::MAX;

impl BusDevice for Ghost {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.register.load(Ordering::Acquire) == offset && data.first() == Some(&0) {
            self.let_go.store(true, Ordering::Release);
        }
    }
}

impl BarListener for Ghost {
    fn mapped(&self, _base: u64) {}

    fn unmapped(&self, _base: u64) {}
}

impl RootPort {
    pub fn new(config: PortConfig, resources: &PortResources) -> Result<Self, PciError> {
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision: 0,
            class: CLASS_BRIDGE_PCI,
            header_type: 1,
        };
        let mut space = ConfigSpace::new(identity, COMMAND_MASK);
        let express = space.add_capability(
            CAPABILITY_PCIE,
            &express_capability(config.device, config.slot),
            &express_mask(),
        )?;
        let bus = resources.secondary_bus;
        space.set(PRIMARY_BUS, &[0, bus, bus]);
        space.allow(PRIMARY_BUS, &[0xff, 0xff, 0xff]);
        program_window(&mut space, MEMORY_BASE, resources.memory, 0);
        program_window(&mut space, PREFETCH_BASE, resources.prefetchable, 1);
        space.allow(MEMORY_BASE, &0xfff0_fff0_u32.to_le_bytes());
        space.allow(PREFETCH_BASE, &0xfff0_fff0_u32.to_le_bytes());
        space.allow(PREFETCH_BASE_UPPER, &[0xff; 8]);
        space.allow(
            BRIDGE_CONTROL,
            &(0x0003 | SECONDARY_BUS_RESET).to_le_bytes(),
        );
        space.set(reg::COMMAND, &COMMAND_MEMORY_AND_MASTER.to_le_bytes());
        Ok(Self {
            config,
            secondary: AtomicU8::new(bus),
            first: space.clone(),
            registers: Mutex::new(space),
            express,
            function: RwLock::new(None),
            ghost: Mutex::new(None),
        })
    }

    pub fn secondary_bus(&self) -> u8 {
        self.secondary.load(Ordering::Relaxed)
    }

    pub fn function(&self) -> Option<Arc<dyn PciFunction>> {
        self.function
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub fn plug(&self, function: &Arc<dyn PciFunction>) -> Result<(), PciError> {
        let mut haunting = self.lock_ghost();
        let mut slot = self
            .function
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Err(PciError::Occupied(self.config.name.clone()));
        }
        if haunting.as_ref().is_some_and(Haunting::lasts) {
            return Err(PciError::Vacating(self.config.name.clone()));
        }
        haunting.take();
        self.place(function.as_ref());
        *slot = Some(Arc::clone(function));
        self.show_presence(true);
        Ok(())
    }

    /// Everything as before the guest started, with what is plugged in now, which has been reset.
    /// What was pulled out the guest has let go of.
    pub fn power_on(&self) {
        self.lock_ghost().take();
        let slot = self.function.read().unwrap_or_else(PoisonError::into_inner);
        {
            let mut registers = self.lock();
            *registers = self.first.clone();
            let [_, secondary] = registers.read_u16(PRIMARY_BUS).to_le_bytes();
            self.secondary.store(secondary, Ordering::Relaxed);
        }
        if let Some(function) = slot.as_ref() {
            self.place(function.as_ref());
        }
        self.show_presence(slot.is_some());
    }

    fn place(&self, function: &dyn PciFunction) {
        let (mut memory, mut prefetchable) = self.windows();
        function.place_bars(&mut |kind, size| match kind {
            BarKind::Memory32 => take(&mut memory, size),
            BarKind::Prefetchable64 => take(&mut prefetchable, size),
        });
    }

    /// Takes off the bus what is plugged in, if it is what `wanted` says.
    pub fn unplug(
        &self,
        wanted: impl FnOnce(&Arc<dyn PciFunction>) -> bool,
    ) -> Result<Arc<dyn PciFunction>, PciError> {
        let function = self
            .function
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(|function| wanted(function))
            .ok_or_else(|| PciError::Empty(self.config.name.clone()))?;
        self.show_presence(false);
        function.unplug();
        Ok(function)
    }

    /// As [`unplug`](Self::unplug), of a function that the guest's driver may still use: its
    /// accesses read as zero, and nothing else is plugged in, until the guest has let go.
    pub fn unplug_by_surprise(
        &self,
        wanted: impl FnOnce(&Arc<dyn PciFunction>) -> bool,
        decoder: &Arc<BarDecoder>,
    ) -> Result<Arc<dyn PciFunction>, PciError> {
        let mut haunting = self.lock_ghost();
        let function = self
            .function()
            .filter(|there| wanted(there))
            .ok_or_else(|| PciError::Empty(self.config.name.clone()))?;
        let (memory, _) = self.windows();
        // A register that lies elsewhere cannot be watched.
        let register = || {
            let at = function.release_register()?;
            let inside = memory.contains(at, 1);
            inside.then(|| at.saturating_sub(memory.start))
        };
        let before = register();
        let ghost = Arc::new(Ghost {
            register: AtomicU64::new(before.unwrap_or(NOWHERE)),
            let_go: AtomicBool::new(false),
        });
        // It answers from the moment at which the function no longer does.
        let claim = decoder.claim(
            memory.size,
            Arc::clone(&ghost) as _,
            Arc::clone(&ghost) as _,
        );
        claim.decode(Some(memory.start));
        self.unplug(|there| Arc::ptr_eq(there, &function))?;
        // The driver may have come or gone meanwhile.
        let after = register();
        if after != before {
            ghost
                .register
                .store(after.unwrap_or(NOWHERE), Ordering::Release);
        }
        *haunting = Some(Haunting {
            ghost,
            _claim: claim,
        });
        Ok(function)
    }

    /// It is empty, and the guest has not let go of what was there.
    pub fn is_vacating(&self) -> bool {
        self.lock_ghost().as_ref().is_some_and(Haunting::lasts)
    }

    /// The guest has read the first register of the empty slot: it knows that nothing is there.
    pub fn found_empty(&self) {
        if let Some(haunting) = self.lock_ghost().as_ref()
            && haunting.ghost.register.load(Ordering::Acquire) == NOWHERE
        {
            haunting.ghost.let_go.store(true, Ordering::Release);
        }
    }

    fn lock_ghost(&self) -> MutexGuard<'_, Option<Haunting>> {
        self.ghost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    pub fn config_write(&self, offset: u16, data: &[u8]) {
        let reset = {
            let mut registers = self.lock();
            let before = registers.read_u16(BRIDGE_CONTROL);
            registers.write(offset, data);
            let [_, secondary] = registers.read_u16(PRIMARY_BUS).to_le_bytes();
            self.secondary.store(secondary, Ordering::Relaxed);
            registers.read_u16(BRIDGE_CONTROL) & !before & SECONDARY_BUS_RESET != 0
        };
        if reset && let Some(function) = self.function() {
            function.bus_reset();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn show_presence(&self, present: bool) {
        let (link, slot) = if present {
            (LINK_ACTIVE, PRESENCE)
        } else {
            (0, 0)
        };
        let mut registers = self.lock();
        registers.set(
            self.express + LINK_STATUS,
            &(LINK_X1_2GT5 | link).to_le_bytes(),
        );
        registers.set(self.express + SLOT_STATUS, &slot.to_le_bytes());
    }

    /// The windows as they are programmed now; empty when closed.
    fn windows(&self) -> (AddressRange, AddressRange) {
        let registers = self.lock();
        let memory = (
            u64::from(registers.read_u16(MEMORY_BASE) & 0xfff0) << 16,
            u64::from(registers.read_u16(MEMORY_LIMIT) & 0xfff0) << 16,
        );
        let upper = |low: u16, high: u16| {
            u64::from(registers.read_u32(high)) << 32
                | u64::from(registers.read_u16(low) & 0xfff0) << 16
        };
        let prefetchable = (
            upper(PREFETCH_BASE, PREFETCH_BASE_UPPER),
            upper(PREFETCH_LIMIT, PREFETCH_LIMIT_UPPER),
        );
        (range(memory), range(prefetchable))
    }
}

/// A bridge window's range: the limit register names the last MiB.
fn range((base, limit): (u64, u64)) -> AddressRange {
    let size = (limit | 0xf_ffff)
        .checked_sub(base)
        .map_or(0, |last| last.saturating_add(1));
    AddressRange { start: base, size }
}

/// Takes `size` bytes, aligned to their size, from the front of `window`.
fn take(window: &mut AddressRange, size: u64) -> Option<u64> {
    let base = window.start.checked_next_multiple_of(size)?;
    if size == 0 || !window.contains(base, size) {
        return None;
    }
    let end = base.checked_add(size)?;
    window.size = window.size.checked_sub(end.checked_sub(window.start)?)?;
    window.start = end;
    Some(base)
}

fn program_window(space: &mut ConfigSpace, base_register: u16, window: AddressRange, kind: u16) {
    let last = window.start.saturating_add(window.size.saturating_sub(1));
    let field = |address: u64| ((address >> 16) & 0xfff0) as u16 | kind;
    space.set(base_register, &field(window.start).to_le_bytes());
    space.set(base_register + 2, &field(last).to_le_bytes());
    if kind == 1 {
        space.set(
            base_register + 4,
            &((window.start >> 32) as u32).to_le_bytes(),
        );
        space.set(base_register + 8, &((last >> 32) as u32).to_le_bytes());
    }
}

const EXPRESS_BODY: usize = 0x3a;

/// The PCI Express capability after its two header bytes.
fn express_capability(port: u8, slot: u16) -> [u8; EXPRESS_BODY] {
    let mut body = [0; EXPRESS_BODY];
    // Version 2, root port, slot implemented.
    put(&mut body, 0x02, &0x0142_u16.to_le_bytes());
    // Device: role-based error reporting, 128 byte payload.
    put(&mut body, 0x04, &0x8000_u32.to_le_bytes());
    // Link: 2.5 GT/s, x1, reports data link layer active.
    let link = 0x0000_0011 | 1 << 20 | u32::from(port) << 24;
    put(&mut body, 0x0c, &link.to_le_bytes());
    put(&mut body, LINK_STATUS, &LINK_X1_2GT5.to_le_bytes());
    // Slot: its number, no command completed notification.
    put(
        &mut body,
        0x14,
        &(u32::from(slot) << 19 | 1 << 18).to_le_bytes(),
    );
    // Link 2: 2.5 GT/s in the supported speeds vector.
    put(&mut body, 0x2c, &2_u32.to_le_bytes());
    body
}

fn express_mask() -> [u8; EXPRESS_BODY] {
    let mut mask = [0; EXPRESS_BODY];
    put(&mut mask, 0x08, &0x78ff_u16.to_le_bytes());
    put(&mut mask, 0x10, &0x00c3_u16.to_le_bytes());
    put(&mut mask, 0x1c, &0x001f_u16.to_le_bytes());
    mask
}

fn put(body: &mut [u8], offset: u16, bytes: &[u8]) {
    let start = usize::from(offset).saturating_sub(2);
    for (to, from) in body.iter_mut().skip(start).zip(bytes) {
        *to = *from;
    }
}
