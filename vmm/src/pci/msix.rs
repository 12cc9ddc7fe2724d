//! MSI-X: table, pending bits and their wiring to KVM (PCI Local Bus 3.0 section 6.8.2).
//!
//! Every vector has an eventfd that the device process signals, and while the vector is
//! unmasked KVM listens to it (irqfd), so that an interrupt never passes through the
//! VMM. While it is masked KVM does not listen and a signal stays in the eventfd: that
//! is the pending bit. Unmasking makes KVM listen again, and KVM injects at once what is
//! already signalled.
//!
//! The device process shares each vector's eventfd and may fill it or change its flags,
//! so the VMM only ever polls it, never reads or writes. Interrupts of the VMM's own
//! (configuration change) go through an eventfd that nobody else has, wired to the same
//! vector. vCPU threads access the table; the manager thread may signal.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::PciError;
use crate::hypervisor::{Gsi, Hypervisor, MsiMessage};

/// Capability ID of MSI-X.
pub const MSIX_CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub const VECTOR_ENTRY_SIZE: u64 = 16;
/// The most vectors that a function may have here.
pub const MAX_VECTORS: u16 = 256;
/// Virtio's "no vector" (VIRTIO 1.2 section 4.1.5.1.3).
pub const NO_VECTOR: u16 = 0xffff;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;
const VECTORS_PER_PBA_WORD: usize = 64;

struct Entry {
    message: MsiMessage,
    masked: bool,
    gsi: Option<Gsi>,
    routed: Option<MsiMessage>,
    /// KVM listens to the vector's eventfd.
    armed: bool,
}

struct State {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
    /// The vector of the VMM's own interrupts, and where its eventfd is wired now.
    own_vector: Option<u16>,
    own_armed: Option<Gsi>,
}

/// A function's MSI-X vectors.
pub struct Msix {
    hypervisor: Arc<dyn Hypervisor>,
    events: Vec<OwnedFd>,
    own_event: OwnedFd,
    state: Mutex<State>,
}

impl Msix {
    /// `vectors` masked vectors, MSI-X disabled.
    pub fn new(vectors: u16, hypervisor: Arc<dyn Hypervisor>) -> Result<Self, PciError> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(PciError::BadVectorCount(vectors));
        }
        let events = (0..vectors)
            .map(|_| new_event())
            .collect::<Result<_, _>>()?;
        let entries = (0..vectors)
            .map(|_| Entry {
                message: MsiMessage::default(),
                masked: true,
                gsi: None,
                routed: None,
                armed: false,
            })
            .collect();
        Ok(Self {
            hypervisor,
            events,
            own_event: new_event()?,
            state: Mutex::new(State {
                entries,
                enabled: false,
                function_masked: false,
                own_vector: None,
                own_armed: None,
            }),
        })
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        // At most MAX_VECTORS by construction.
        u16::try_from(self.events.len()).unwrap_or(MAX_VECTORS)
    }

    /// The body of the capability for `add_capability`, and its write mask. Table and PBA
    /// lie in BAR 0 at these offsets (multiples of 8).
    pub fn capability(&self, table: u32, pba: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        let (control, offsets) = body.split_at_mut(2);
        control.copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        let (table_at, pba_at) = offsets.split_at_mut(4);
        table_at.copy_from_slice(&table.to_le_bytes());
        pba_at.copy_from_slice(&pba.to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes())
    }

    /// The eventfd that the device signals for `vector`.
    pub fn event(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.events.get(usize::from(vector)).map(AsFd::as_fd)
    }

    /// The message control register was written.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        let enabled = control & CONTROL_ENABLE != 0;
        let function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if (state.enabled, state.function_masked) != (enabled, function_masked) {
            state.enabled = enabled;
            state.function_masked = function_masked;
            self.rewire_all(&mut state);
        }
    }

    /// Everything as after power-on: disabled, vectors masked and empty.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.enabled = false;
        state.function_masked = false;
        state.own_vector = None;
        for entry in &mut state.entries {
            entry.masked = true;
            entry.message = MsiMessage::default();
        }
        self.rewire_all(&mut state);
    }

    /// Chooses the vector of the VMM's own interrupts; false when there is no such vector.
    pub fn set_own_vector(&self, vector: Option<u16>) -> bool {
        let mut state = self.lock();
        let known = vector.is_none_or(|vector| vector < self.vectors());
        state.own_vector = vector.filter(|_| known);
        self.rewire_own(&mut state);
        known
    }

    /// Raises the VMM's own interrupt, or leaves it pending. Never blocks: nobody else
    /// has this eventfd, and a full one is signalled already.
    pub fn signal_own(&self) {
        if let Err(error) = rustix::io::write(&self.own_event, &1_u64.to_ne_bytes())
            && error != rustix::io::Errno::AGAIN
        {
            log::warn!("cannot raise a configuration change interrupt: {error}");
        }
    }

    /// Answers a read of the table at `offset`; only aligned 4 and 8 byte accesses are
    /// defined, others read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_table_access(offset, data.len()) {
            return;
        }
        let state = self.lock();
        for (word, out) in (offset / 4..).zip(data.chunks_mut(4)) {
            let Some(entry) = index_of(word).and_then(|index| state.entries.get(index)) else {
                continue;
            };
            let [low, high] = split(entry.message.address);
            let value = match word % 4 {
                0 => low,
                1 => high,
                2 => entry.message.data,
                _ => u32::from(entry.masked),
            };
            out.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Takes a write to the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_table_access(offset, data.len()) {
            return;
        }
        let mut state = self.lock();
        for (word, bytes) in (offset / 4..).zip(data.chunks(4)) {
            let (Some(index), Ok(bytes)) = (index_of(word), <[u8; 4]>::try_from(bytes)) else {
                continue;
            };
            let value = u32::from_le_bytes(bytes);
            let Some(entry) = state.entries.get_mut(index) else {
                continue;
            };
            let [low, high] = split(entry.message.address);
            match word % 4 {
                0 => entry.message.address = join(value & !3, high),
                1 => entry.message.address = join(low, value),
                2 => entry.message.data = value,
                _ => entry.masked = value & ENTRY_MASKED != 0,
            }
            self.rewire(&mut state, index);
        }
        self.rewire_own(&mut state);
    }

    /// Answers a read of the pending bit array at `offset`.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        for (at, out) in (offset..).zip(data.iter_mut()) {
            for bit in 0..8 {
                let index = usize::try_from(at)
                    .ok()
                    .and_then(|at| at.checked_mul(8)?.checked_add(bit));
                if index.is_some_and(|index| self.is_pending(&state, index)) {
                    *out |= 1 << bit;
                }
            }
        }
    }

    /// Bytes of the pending bit array.
    pub fn pba_size(&self) -> usize {
        self.events.len().div_ceil(VECTORS_PER_PBA_WORD) * 8
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_pending(&self, state: &State, index: usize) -> bool {
        let (Some(entry), Some(event)) = (state.entries.get(index), self.events.get(index)) else {
            return false;
        };
        let own = state
            .own_vector
            .is_some_and(|vector| usize::from(vector) == index);
        !entry.armed && (is_signalled(event) || own && is_signalled(&self.own_event))
    }

    fn rewire_all(&self, state: &mut State) {
        for index in 0..state.entries.len() {
            self.rewire(state, index);
        }
        self.rewire_own(state);
    }

    /// Makes KVM listen to a vector exactly when it may deliver, with the right message.
    fn rewire(&self, state: &mut State, index: usize) {
        let deliver = state.enabled && !state.function_masked;
        let (Some(entry), Some(event)) = (state.entries.get_mut(index), self.events.get(index))
        else {
            return;
        };
        let wanted = deliver && !entry.masked;
        if wanted && let Err(error) = self.arm(entry, event.as_fd()) {
            log::warn!("MSI-X vector {index} stays silent: {error}");
        }
        if !wanted && entry.armed {
            entry.armed = false;
            if let Some(gsi) = entry.gsi
                && let Err(error) = self.hypervisor.remove_irqfd(event.as_fd(), gsi)
            {
                log::warn!("cannot unwire MSI-X vector {index}: {error}");
            }
        }
    }

    fn arm(&self, entry: &mut Entry, event: BorrowedFd<'_>) -> std::io::Result<()> {
        let gsi = match entry.gsi {
            Some(gsi) => gsi,
            None => *entry.gsi.insert(self.hypervisor.alloc_gsi()?),
        };
        if entry.routed != Some(entry.message) {
            entry.routed = None;
            self.hypervisor.route_msi(gsi, entry.message)?;
            entry.routed = Some(entry.message);
        }
        if !entry.armed {
            self.hypervisor.add_irqfd(event, gsi)?;
            entry.armed = true;
        }
        Ok(())
    }

    /// Moves the VMM's own eventfd to where its vector is wired.
    fn rewire_own(&self, state: &mut State) {
        let wanted = state
            .own_vector
            .and_then(|vector| state.entries.get(usize::from(vector)))
            .filter(|entry| entry.armed)
            .and_then(|entry| entry.gsi);
        if wanted == state.own_armed {
            return;
        }
        let event = self.own_event.as_fd();
        if let Some(gsi) = state.own_armed.take()
            && let Err(error) = self.hypervisor.remove_irqfd(event, gsi)
        {
            log::warn!("cannot unwire the configuration change interrupt: {error}");
        }
        if let Some(gsi) = wanted {
            match self.hypervisor.add_irqfd(event, gsi) {
                Ok(()) => state.own_armed = Some(gsi),
                Err(error) => log::warn!("cannot wire the configuration change interrupt: {error}"),
            }
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        self.reset();
        for entry in &mut self.lock().entries {
            if let Some(gsi) = entry.gsi.take() {
                self.hypervisor.free_gsi(gsi);
            }
        }
    }
}

fn new_event() -> Result<OwnedFd, PciError> {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
        .map_err(|error| PciError::EventFd(error.to_string()))
}

/// Whether an eventfd has a count, without touching it.
fn is_signalled(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let ready = poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    );
    ready.is_ok_and(|count| count > 0) && fds.iter().any(|fd| fd.revents().contains(PollFlags::IN))
}

fn is_table_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

/// Which entry a 32-bit word of the table belongs to.
fn index_of(word: u64) -> Option<usize> {
    usize::try_from(word / (VECTOR_ENTRY_SIZE / 4)).ok()
}

fn split(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
