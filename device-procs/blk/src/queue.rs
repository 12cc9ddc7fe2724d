//! What both engines do with a queue: requests are taken from the ring into slots, and a
//! slot's completion goes back into the ring.
//!
//! Owned by the queue's worker thread.

use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::status::QueueStatus;

use crate::config::F_FLUSH;
use crate::disk::Disk;
use crate::request::{self, Action, Request, Status};
use crate::transfer::{Direction, Transfer};

/// Most bounced transfers at a time in one queue: bounds what a guest can make this process
/// allocate.
const MAX_BOUNCED: usize = 16;

/// Work for the engine: in which slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Do the slot's transfer, step by step.
    Transfer(u16),
    /// Make everything durable.
    Flush(u16),
}

/// A request in flight.
#[derive(Debug, Default)]
struct Slot {
    head: u16,
    status_addr: u64,
    flush: bool,
    total: u32,
    transfer: Transfer,
}

/// A ring being served, with its requests in flight.
#[derive(Debug)]
pub struct Queue {
    ring: ActiveRing,
    status: Arc<QueueStatus>,
    disk: Arc<Disk>,
    chain: Chain,
    slots: Vec<Slot>,
    free: Vec<u16>,
    bounced: usize,
    /// Slots that wait for a bounce buffer.
    waiting: std::collections::VecDeque<u16>,
    durable: bool,
}

impl Queue {
    /// Serves `ring`.
    pub fn new(ring: ActiveRing, status: Arc<QueueStatus>, disk: Arc<Disk>) -> Self {
        let size = ring.size();
        let mut slots = Vec::new();
        slots.resize_with(usize::from(size), Slot::default);
        Self {
            durable: ring.features() & F_FLUSH == 0,
            ring,
            status,
            disk,
            chain: Chain::new(),
            slots,
            free: (0..size).rev().collect(),
            bounced: 0,
            waiting: std::collections::VecDeque::new(),
        }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut ActiveRing {
        &mut self.ring
    }

    /// Whether requests are in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Without VIRTIO_BLK_F_FLUSH a write must be durable when it completes (5.2.6.2).
    pub fn durable_writes(&self) -> bool {
        self.durable
    }

    /// Ends service; the available index at which a successor goes on.
    pub fn stop(self) -> u16 {
        self.ring.stop()
    }

    /// Takes the next request that needs the engine. Requests that can be answered at once
    /// are answered on the way, at most `budget` of them.
    #[inline]
    pub fn next(&mut self, budget: &mut u32) -> Option<Work> {
        while *budget > 0 {
            // A ring never has more requests in flight than descriptors, so there is a slot.
            let index = *self.free.last()?;
            let slot = self.slots.get_mut(usize::from(index))?;
            let head = self.ring.pop(&mut self.chain)?;
            *budget = budget.saturating_sub(1);
            let parsed = request::parse(
                &self.chain,
                self.ring.memory(),
                &self.disk.geometry,
                &mut slot.transfer,
            );
            let Request {
                status_addr,
                action,
            } = match parsed {
                Ok(request) => request,
                Err(why) => {
                    self.ring.reject(head, &why);
                    return None;
                }
            };
            slot.head = head;
            slot.status_addr = status_addr;
            match action {
                Action::Answer(status, data) => {
                    self.answer(head, status_addr, status, data);
                }
                Action::Flush => {
                    slot.flush = true;
                    self.free.pop();
                    return Some(Work::Flush(index));
                }
                Action::Transfer => {
                    slot.flush = false;
                    slot.total = slot.transfer.remaining();
                    self.free.pop();
                    if let Some(direct) = self.disk.direct
                        && !slot
                            .transfer
                            .is_aligned(direct.memory as usize, direct.offset as usize)
                    {
                        if self.bounced >= MAX_BOUNCED {
                            self.waiting.push_back(index);
                            continue;
                        }
                        self.bounced = self.bounced.saturating_add(1);
                        slot.transfer.use_bounce(direct.memory as usize);
                    }
                    return Some(Work::Transfer(index));
                }
            }
        }
        None
    }

    /// A transfer that waited for a bounce buffer and has one now.
    pub fn next_waiting(&mut self) -> Option<Work> {
        if self.bounced >= MAX_BOUNCED {
            return None;
        }
        let index = self.waiting.pop_front()?;
        let align = self.disk.direct.map_or(1, |d| d.memory as usize);
        self.slots
            .get_mut(usize::from(index))?
            .transfer
            .use_bounce(align);
        self.bounced = self.bounced.saturating_add(1);
        Some(Work::Transfer(index))
    }

    /// The transfer in a slot.
    #[inline]
    pub fn transfer(&mut self, index: u16) -> Option<&mut Transfer> {
        self.slots
            .get_mut(usize::from(index))
            .map(|s| &mut s.transfer)
    }

    /// Whether a slot's request is a flush.
    pub fn is_flush(&self, index: u16) -> bool {
        self.slots.get(usize::from(index)).is_some_and(|s| s.flush)
    }

    /// The engine's result for a slot: bytes moved, or a negated errno. True if the slot
    /// needs another step.
    #[inline]
    pub fn finish(&mut self, index: u16, result: i32) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return false;
        };
        let mut status = Status::Ok;
        match u32::try_from(result) {
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => return true,
            Err(_) => status = Status::IoErr,
            Ok(_) if slot.flush => {}
            // The file ends before the disk does: it was truncated underneath.
            Ok(0) => status = Status::IoErr,
            Ok(done) => {
                slot.transfer.advance(done);
                if slot.transfer.remaining() > 0 {
                    return true;
                }
            }
        }
        let mut data = 0;
        if slot.flush {
            self.status.flushes.add(1);
        } else if status == Status::Ok {
            match slot.transfer.direction() {
                Direction::Read => {
                    data = slot.total;
                    self.status.read_bytes.add(u64::from(data));
                }
                Direction::Write => self.status.written_bytes.add(u64::from(slot.total)),
            }
        }
        if slot.transfer.is_bounced() {
            self.bounced = self.bounced.saturating_sub(1);
        }
        slot.transfer.finish();
        let (head, addr) = (slot.head, slot.status_addr);
        self.free.push(index);
        self.answer(head, addr, status, data);
        false
    }

    #[inline]
    fn answer(&mut self, head: u16, addr: u64, status: Status, data: u32) {
        // The address was found in guest memory when the chain was walked.
        self.ring.memory().write(addr, &[status as u8]);
        self.ring.complete(head, data.saturating_add(1));
        self.status.requests.add(1);
        if status != Status::Ok {
            self.status.errors.add(1);
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
