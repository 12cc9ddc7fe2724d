//! The control queue of a network device whose back-end is somebody else's (VIRTIO 1.2
//! section 5.1.6.5): such back-ends serve receive and transmit queues and leave this one
//! to the VMM.
//!
//! Carried out are the number of queue pairs (5.1.6.5.5), by enabling and disabling the
//! back-end's rings, and the acknowledgement of an announcement (5.1.6.5.4). All other
//! commands belong to features that are not offered and are answered with an error.
//!
//! The ring is the guest's: every descriptor is read once, a chain is bounded in length
//! and bytes, and one that breaks the rules stops the queue until a reset. The function's
//! own thread calls this under the function's lock.

use std::sync::atomic::Ordering;

use crate::memory::MappedMemory;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::backend::{Backend, Shape};
use super::common::{self, CommonConfig};
use super::events::FailReason;
use super::function::{Device, VirtioPciFunction};
use super::registers::{F_EVENT_IDX, net};
use super::stand_in::StandIn;
use crate::pci::NO_VECTOR;

/// The most descriptors of a command: header, data in two parts, status, each perhaps cut
/// in two.
const MAX_DESCRIPTORS: usize = 8;
/// The most bytes of a command: a MAC table with every entry that its counters allow is
/// less.
const MAX_BYTES: u64 = 64 << 10;
/// Of these, what the commands that are carried out consist of.
const LOOKED_AT: usize = 4;
/// Commands per turn under the lock.
pub(super) const BATCH: usize = 64;

const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
/// VRING_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
const OK: u8 = 0;
const ERR: u8 = 1;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// So many queue pairs shall be used.
    Pairs(u16),
    /// The driver has announced itself.
    Announced,
}

/// A turn at the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The driver wants an interrupt.
    pub signal: bool,
    /// There may be more.
    pub more: bool,
}

/// The driver broke the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The control queue and what it controls.
pub struct NetControl {
    pairs: u16,
    in_use: u16,
    ring: Option<Queue>,
    /// Its index and what the driver accepted, while the ring is there.
    index: u16,
    accepted: u64,
}

impl NetControl {
    /// For a device with so many queue pairs.
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs,
            in_use: 1,
            ring: None,
            index: 0,
            accepted: 0,
        }
    }

    /// Queue pairs in use.
    pub fn in_use(&self) -> u16 {
        self.in_use
    }

    /// Index of the control queue while it is served.
    pub fn queue(&self) -> Option<u16> {
        self.ring.as_ref().map(|_| self.index)
    }

    /// Which queues are the back-end's, for a driver that accepted these features: all
    /// before the control queue, which lies behind the pairs that the driver knows of.
    pub fn shape(&self, accepted: u64) -> Shape {
        let pairs = if accepted & net::F_MQ != 0 {
            self.pairs
        } else {
            1
        };
        Shape {
            served: pairs.saturating_mul(2),
            enabled: self.in_use.min(pairs).saturating_mul(2),
        }
    }

    /// The driver is up: its control queue, if it has one, is served from now on. Where
    /// the ring lies has been checked.
    pub fn start(&mut self, common: &CommonConfig) {
        self.reset();
        self.accepted = common.accepted();
        self.index = self.shape(self.accepted).served;
        if self.accepted & net::F_CTRL_VQ == 0 {
            return;
        }
        let queue = common
            .queues()
            .find(|(index, queue)| *index == self.index && queue.enabled);
        self.ring = queue.and_then(|(_, queue)| ring_of(queue, self.accepted));
    }

    /// Goes on where whoever served the ring before has come to.
    pub fn go_on(&mut self, memory: &MappedMemory) {
        let Some(ring) = &mut self.ring else { return };
        match ring.used_idx(memory, Ordering::Acquire) {
            Ok(used) => {
                ring.set_next_avail(used.0);
                ring.set_next_used(used.0);
            }
            Err(_) => self.ring = None,
        }
    }

    /// The device was reset.
    pub fn reset(&mut self) {
        self.in_use = 1;
        self.ring = None;
        self.accepted = 0;
    }

    /// Carries out what the driver has put into the queue; `act` says whether a command
    /// succeeded.
    pub fn serve(
        &mut self,
        memory: &MappedMemory,
        act: &mut dyn FnMut(Command) -> bool,
    ) -> Result<Served, Malformed> {
        let served = self.turn(memory, act);
        if served.is_err() {
            self.ring = None;
        }
        served
    }

    fn turn(
        &mut self,
        memory: &MappedMemory,
        act: &mut dyn FnMut(Command) -> bool,
    ) -> Result<Served, Malformed> {
        let mut used = false;
        let mut more = true;
        let Some(mut ring) = self.ring.take() else {
            return Ok(Served::default());
        };
        ring.disable_notification(memory).map_err(|_| Malformed)?;
        let mut waited = false;
        for _ in 0..BATCH {
            // Whoever waits for the lock waits for one back-end's answer, not for many.
            if waited {
                break;
            }
            let chain = ring.iter(memory).map_err(|_| Malformed)?.next();
            let Some(chain) = chain else {
                if ring.enable_notification(memory).map_err(|_| Malformed)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let (request, status) = read(chain, memory)?;
            let command = self.parse(&request);
            waited = matches!(command, Some(Command::Pairs(pairs)) if pairs != self.in_use);
            let done = command.is_some_and(|command| self.carry_out(command, act));
            let answer = if done { OK } else { ERR };
            memory.write_obj(answer, status).map_err(|_| Malformed)?;
            ring.add_used(memory, head, 1).map_err(|_| Malformed)?;
            used = true;
        }
        let signal = used
            && ring.needs_notification(memory).map_err(|_| Malformed)?
            && (ring.event_idx_enabled() || wants_interrupts(&ring, memory)?);
        self.ring = Some(ring);
        Ok(Served { signal, more })
    }

    fn carry_out(&mut self, command: Command, act: &mut dyn FnMut(Command) -> bool) -> bool {
        let done = act(command);
        if done && let Command::Pairs(pairs) = command {
            self.in_use = pairs;
        }
        done
    }

    fn parse(&self, request: &[u8]) -> Option<Command> {
        match *request {
            [CLASS_MQ, 0, low, high] if self.accepted & net::F_MQ != 0 => {
                let pairs = u16::from_le_bytes([low, high]);
                (1..=self.pairs)
                    .contains(&pairs)
                    .then_some(Command::Pairs(pairs))
            }
            [CLASS_ANNOUNCE, 0, ..] if self.accepted & net::F_GUEST_ANNOUNCE != 0 => {
                Some(Command::Announced)
            }
            _ => None,
        }
    }
}

/// A ring where the driver has put it, from its beginning; where it lies has been checked.
pub(super) fn ring_of(queue: &common::Queue, accepted: u64) -> Option<Queue> {
    let mut ring = Queue::new(queue.size).ok()?;
    ring.try_set_desc_table_address(GuestAddress(queue.descriptor))
        .ok()?;
    ring.try_set_avail_ring_address(GuestAddress(queue.driver))
        .ok()?;
    ring.try_set_used_ring_address(GuestAddress(queue.device))
        .ok()?;
    ring.set_event_idx(accepted & F_EVENT_IDX != 0);
    ring.set_ready(true);
    Some(ring)
}

/// What the driver says where event indices are not used (section 2.7.7).
pub(super) fn wants_interrupts(ring: &Queue, memory: &MappedMemory) -> Result<bool, Malformed> {
    let flags: u16 = memory
        .load(GuestAddress(ring.avail_ring()), Ordering::Acquire)
        .map_err(|_| Malformed)?;
    Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
}

/// The first bytes of a command and where its status goes.
fn read(
    chain: DescriptorChain<&MappedMemory>,
    memory: &MappedMemory,
) -> Result<(Vec<u8>, GuestAddress), Malformed> {
    let mut request = Vec::with_capacity(LOOKED_AT);
    let mut status = None;
    let mut bytes = 0_u64;
    let mut unfinished = false;
    for (count, descriptor) in (1..).zip(chain) {
        bytes = bytes.saturating_add(descriptor.len().into());
        if count > MAX_DESCRIPTORS || bytes > MAX_BYTES {
            return Err(Malformed);
        }
        unfinished = descriptor.has_next();
        if descriptor.is_write_only() {
            if status.is_none() && descriptor.len() > 0 {
                status = Some(descriptor.addr());
            }
            continue;
        }
        if status.is_some() {
            return Err(Malformed);
        }
        let wanted = LOOKED_AT.saturating_sub(request.len());
        let there = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let mut part = [0; LOOKED_AT];
        if let Some(part) = part.get_mut(..wanted.min(there))
            && !part.is_empty()
        {
            memory
                .read_slice(part, descriptor.addr())
                .map_err(|_| Malformed)?;
            request.extend_from_slice(part);
        }
    }
    // The iterator ends without a word where a chain leads out of the table.
    match status {
        Some(status) if !unfinished && memory.address_in_range(status) => Ok((request, status)),
        _ => Err(Malformed),
    }
}

impl VirtioPciFunction {
    /// The queues that the function's own thread serves: their doorbells are to be listened to.
    pub(super) fn own_queues(&self) -> Vec<u16> {
        let device = self.lock_device();
        let control = device.control.iter().filter_map(NetControl::queue);
        let stand_in = device.stand_in.iter().flat_map(StandIn::queues);
        control.chain(stand_in).collect()
    }

    /// A turn at the control queue; true when there may be more.
    pub(super) fn serve_control(&self) -> bool {
        let mut guard = self.lock_device();
        let device = &mut *guard;
        let Some(control) = &mut device.control else {
            return false;
        };
        let Some(index) = control.queue() else {
            return false;
        };
        let memory = std::sync::Arc::clone(device.backend.memory());
        let backend = &mut device.backend;
        let carries = device.carries;
        let mut in_use = control.in_use();
        let mut again = false;
        let served = control.serve(memory.memory(), &mut |command| match command {
            Command::Pairs(pairs) => {
                // The rings of a link that is down stay disabled until it comes up.
                let done = !carries || self.use_pairs(backend, in_use, pairs);
                if done {
                    in_use = pairs;
                }
                done
            }
            Command::Announced => {
                let mut space = self.lock_space();
                again |= self.signals.announce_twice.swap(false, Ordering::AcqRel);
                space.set_announce(again);
                true
            }
        });
        let more = self.conclude(device, index, served);
        self.publish(device);
        drop(guard);
        if again {
            self.config_changed();
        }
        more
    }

    /// Tells the driver of a turn at queue `index`; true when there may be more.
    pub(super) fn conclude(
        &self,
        device: &Device,
        index: u16,
        served: Result<Served, Malformed>,
    ) -> bool {
        let Ok(served) = served else {
            let id = &self.options.id;
            log::info!("device {id}: queue {index} is malformed");
            self.require_reset();
            return false;
        };
        let vector = device
            .common
            .queues()
            .find(|(at, _)| *at == index)
            .map_or(NO_VECTOR, |(_, queue)| queue.vector);
        if served.signal && vector != NO_VECTOR {
            self.doorbells.call(vector);
        }
        served.more
    }

    /// Enables or disables the rings between the two numbers of pairs. A back-end that is
    /// gone, or is lost over it, has a successor that is told.
    fn use_pairs(&self, backend: &mut Backend, before: u16, after: u16) -> bool {
        let deadline = self.deadline();
        let (first, last) = (before.min(after), before.max(after));
        for queue in first.saturating_mul(2)..last.saturating_mul(2) {
            if !self.link.serving() {
                break;
            }
            match backend.enable(queue, after > before, deadline) {
                Ok(()) => {}
                Err(error) if error.is_fatal() => self.lose(FailReason::from(&error)),
                Err(error) => {
                    log::info!("device {}: {error}", self.options.id);
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
