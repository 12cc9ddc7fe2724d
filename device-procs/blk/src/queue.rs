//! What every engine does with a queue: requests are taken from the ring into slots, and a
//! slot's completion goes back into the ring.
//!
//! Owned by the queue's worker thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::status::QueueStatus;

use crate::backing::Backing;
use crate::disk::{Disk, RangeHow, RangeOp};
use crate::host::SECTOR;
use crate::request::{self, Action, Range, Request, Rules, Status};
use crate::transfer::{Direction, Transfer};

/// Most bounced transfers at a time in one queue: bounds what a guest can make this process
/// allocate.
const MAX_BOUNCED: usize = 16;
/// Steps in a row that the host may ask to be made again (EINTR, EAGAIN).
const MAX_RETRIES: u8 = 100;
/// Range lists longer than this are not kept for the next request.
const KEEP_RANGES: usize = 4;
/// Completions that are worth an interrupt while there is more to do, if they are half of
/// all, and in any case.
const WORTH_SHOWING: usize = 8;
const MUST_SHOW: usize = 32;

/// Work for the engine: in which slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Do the slot's transfer, step by step.
    Transfer(u16),
    /// Make everything durable.
    Flush(u16),
    /// Empty a range of the disk.
    Range(u16, RangeStep),
}

/// One range to be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeStep {
    /// What the request asks for.
    pub op: RangeOp,
    /// How a raw disk does it: never [`RangeHow::Write`], which is a transfer, nor
    /// [`RangeHow::Ignore`].
    pub how: RangeHow,
    /// Where.
    pub range: Range,
}

/// What a request in flight is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Doing {
    #[default]
    Transfer,
    Flush,
    /// Emptying the range at this index of the slot's list.
    Range(RangeOp, RangeHow, usize),
    /// Making emptied ranges durable.
    Sync(RangeOp),
}

/// A request in flight.
#[derive(Debug, Default)]
struct Slot {
    head: u16,
    status_addr: u64,
    started: Option<Instant>,
    doing: Doing,
    /// Bytes of a transfer.
    total: u32,
    /// Where the request begins on the disk.
    sector: u64,
    retries: u8,
    transfer: Transfer,
    ranges: Vec<Range>,
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
    waiting: VecDeque<u16>,
    features: u64,
    /// The time at which this batch was begun, once anybody asked.
    clock: Option<Instant>,
    /// When the completions that the driver has not been shown were taken from the ring.
    unshown: Vec<Instant>,
    /// A rate limit lets nothing pass before.
    throttled: Option<Instant>,
}

impl Queue {
    /// Serves `ring`.
    pub fn new(ring: ActiveRing, status: Arc<QueueStatus>, disk: Arc<Disk>) -> Self {
        let size = ring.size();
        let mut slots = Vec::new();
        slots.resize_with(usize::from(size), Slot::default);
        Self {
            features: ring.features(),
            ring,
            status,
            disk,
            chain: Chain::new(),
            slots,
            free: (0..size).rev().collect(),
            bounced: 0,
            waiting: VecDeque::new(),
            clock: None,
            unshown: Vec::new(),
            throttled: None,
        }
    }

    /// The ring.
    #[inline]
    pub fn ring(&mut self) -> &mut ActiveRing {
        &mut self.ring
    }

    /// Counters of the queue.
    #[inline]
    pub fn status(&self) -> &QueueStatus {
        &self.status
    }

    /// Whether no request is in flight.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether a write must be durable when it completes.
    #[inline]
    pub fn durable_writes(&self) -> bool {
        self.disk.durable_writes(self.features)
    }

    /// Ends service; the available index at which a successor goes on.
    pub fn stop(mut self) -> u16 {
        self.show();
        let requests = self.status.requests.get();
        if requests > 0 {
            let each = |n: u64| n as f64 / requests as f64;
            log::debug!(
                "{requests} requests by now; of each {:.3} kicks, {:.3} interrupts, {:.3} system calls",
                each(self.status.kicks.get()),
                each(self.status.interrupts.get()),
                each(self.status.syscalls.get())
            );
        }
        self.ring.stop()
    }

    /// A new batch begins: what is taken from now on starts now.
    #[inline]
    pub fn new_batch(&mut self) {
        self.clock = None;
    }

    /// When this batch began, if anything was taken in it.
    #[inline]
    pub fn clock(&self) -> Option<Instant> {
        self.clock
    }

    #[inline]
    fn now(&mut self) -> Instant {
        *self.clock.get_or_insert_with(Instant::now)
    }

    /// Until when a rate limit holds the queue back, if it does. Past that, it does no more.
    pub fn throttled(&mut self) -> Option<Instant> {
        let until = self.throttled?;
        if Instant::now() >= until {
            self.throttled = None;
        }
        self.throttled
    }

    /// The limits may have changed: asks anew.
    pub fn refresh(&mut self) {
        self.throttled = None;
    }

    /// Takes the next request that needs the engine. Requests that can be answered at once
    /// are answered on the way, at most `budget` of them.
    #[inline]
    pub fn next(&mut self, budget: &mut u32) -> Option<Work> {
        while *budget > 0 && self.throttled.is_none() {
            // A ring never has more requests in flight than descriptors, so there is a slot.
            let index = *self.free.last()?;
            let slot = self.slots.get_mut(usize::from(index))?;
            let head = self.ring.pop(&mut self.chain)?;
            let rules = Rules {
                geometry: &self.disk.geometry,
                sectors: self.disk.sectors(),
                features: self.features,
            };
            let parsed = request::parse(
                &self.chain,
                self.ring.memory(),
                &rules,
                &mut slot.transfer,
                &mut slot.ranges,
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
            let action = if self.disk.is_pulled() {
                slot.transfer.finish();
                Action::Answer(Status::IoErr, 0)
            } else {
                action
            };
            if self.disk.limiter.is_limited() && !self.may_pass(index, action) {
                self.ring.unpop(head);
                return None;
            }
            *budget = budget.saturating_sub(1);
            let now = self.now();
            let action = match action {
                Action::Flush if !self.disk.flushes() => Action::Answer(Status::Ok, 0),
                action => action,
            };
            if let Action::Answer(status, data) = action {
                self.answer(head, status_addr, status, data, now);
                continue;
            }
            let slot = self.slots.get_mut(usize::from(index))?;
            slot.head = head;
            slot.status_addr = status_addr;
            slot.started = Some(now);
            slot.retries = 0;
            self.free.pop();
            let work = match action {
                Action::Transfer => self.begin_transfer(index),
                Action::Flush => {
                    slot.doing = Doing::Flush;
                    slot.sector = 0;
                    Some(Work::Flush(index))
                }
                Action::Ranges(op) => {
                    let first = slot.ranges.first().map_or(0, |r| r.offset);
                    slot.sector = first / u64::from(SECTOR);
                    self.empty_range(index, op, 0)
                }
                Action::Answer(..) => None,
            };
            if work.is_some() {
                return work;
            }
        }
        None
    }

    /// Whether the rate limits let a request pass now; if not, nothing does for a while.
    #[cold]
    fn may_pass(&mut self, index: u16, action: Action) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return true;
        };
        let bytes = match action {
            Action::Transfer => u64::from(slot.transfer.remaining()),
            Action::Ranges(op) if self.disk.how(op) == RangeHow::Write => {
                slot.ranges.iter().map(|r| u64::from(r.len)).sum()
            }
            Action::Ranges(_) | Action::Flush => 0,
            Action::Answer(..) => return true,
        };
        let now = *self.clock.get_or_insert_with(Instant::now);
        match self.disk.limiter.take(now, bytes, 1) {
            Ok(()) => true,
            Err(wait) => {
                slot.transfer.finish();
                self.throttled = now.checked_add(wait);
                self.status.throttled.add(1);
                false
            }
        }
    }

    #[inline]
    fn begin_transfer(&mut self, index: u16) -> Option<Work> {
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.doing = Doing::Transfer;
        slot.total = slot.transfer.remaining();
        slot.sector = slot.transfer.offset() / u64::from(SECTOR);
        if let Some(direct) = self.disk.direct
            && !slot
                .transfer
                .is_aligned(direct.memory as usize, direct.offset as usize)
        {
            if self.bounced >= MAX_BOUNCED {
                self.waiting.push_back(index);
                return None;
            }
            self.bounced = self.bounced.saturating_add(1);
            slot.transfer.use_bounce(direct.memory as usize);
        }
        Some(Work::Transfer(index))
    }

    /// The next thing to do for a request that empties ranges, from the one at `at` on; None
    /// if it is done, or waits.
    fn empty_range(&mut self, index: u16, op: RangeOp, mut at: usize) -> Option<Work> {
        let raw = matches!(self.disk.backing, Backing::Raw(_));
        loop {
            let slot = self.slots.get_mut(usize::from(index))?;
            let Some(range) = slot.ranges.get(at).copied() else {
                if op != RangeOp::Discard && self.durable_writes() {
                    let slot = self.slots.get_mut(usize::from(index))?;
                    slot.doing = Doing::Sync(op);
                    return Some(Work::Flush(index));
                }
                self.complete(index, Status::Ok);
                return None;
            };
            // An image does it in its own way, in one go.
            let how = if raw {
                self.disk.how(op)
            } else {
                RangeHow::ZeroRange
            };
            slot.doing = Doing::Range(op, how, at);
            match how {
                RangeHow::Ignore => at = at.saturating_add(1),
                RangeHow::Write => {
                    if self.bounced >= MAX_BOUNCED {
                        self.waiting.push_back(index);
                        return None;
                    }
                    self.bounced = self.bounced.saturating_add(1);
                    let align = self.disk.direct.map_or(1, |d| d.memory as usize);
                    slot.transfer.begin_zeros(range.offset, range.len, align);
                    return Some(Work::Transfer(index));
                }
                RangeHow::Punch | RangeHow::ZeroRange | RangeHow::SecureErase => {
                    return Some(Work::Range(index, RangeStep { op, how, range }));
                }
            }
        }
    }

    /// A request that waited for a bounce buffer and has one now.
    pub fn next_waiting(&mut self) -> Option<Work> {
        if self.waiting.is_empty() || self.bounced >= MAX_BOUNCED {
            return None;
        }
        let index = self.waiting.pop_front()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        if let Doing::Range(op, _, at) = slot.doing {
            return self.empty_range(index, op, at);
        }
        let align = self.disk.direct.map_or(1, |d| d.memory as usize);
        slot.transfer.use_bounce(align);
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

    /// The engine's result for a slot: bytes moved, or a negated errno. What is to be done
    /// next for it, if anything.
    #[inline]
    pub fn finish(&mut self, index: u16, result: i32) -> Option<Work> {
        let slot = self.slots.get_mut(usize::from(index))?;
        let doing = slot.doing;
        let moving = match doing {
            Doing::Transfer | Doing::Range(_, RangeHow::Write, _) => true,
            Doing::Flush | Doing::Sync(_) | Doing::Range(..) => false,
        };
        match u32::try_from(result) {
            Err(_) => return self.failed(index, result.saturating_neg()),
            // The file ends before the disk does: it was truncated underneath.
            Ok(0) if moving => return self.failed(index, libc::EIO),
            Ok(done) if moving => {
                slot.transfer.advance(done);
                if slot.transfer.remaining() > 0 {
                    slot.retries = 0;
                    return Some(Work::Transfer(index));
                }
            }
            Ok(_) => {}
        }
        match doing {
            Doing::Range(op, _, at) => {
                slot.retries = 0;
                self.release(index);
                return self.empty_range(index, op, at.saturating_add(1));
            }
            Doing::Transfer | Doing::Flush | Doing::Sync(_) => self.complete(index, Status::Ok),
        }
        None
    }

    /// The host refused a step.
    #[cold]
    fn failed(&mut self, index: u16, errno: i32) -> Option<Work> {
        let slot = self.slots.get_mut(usize::from(index))?;
        if (errno == libc::EINTR || errno == libc::EAGAIN) && slot.retries < MAX_RETRIES {
            slot.retries = slot.retries.saturating_add(1);
            return Some(match slot.doing {
                Doing::Transfer | Doing::Range(_, RangeHow::Write, _) => Work::Transfer(index),
                Doing::Flush | Doing::Sync(_) => Work::Flush(index),
                Doing::Range(op, _, at) => return self.empty_range(index, op, at),
            });
        }
        if let Doing::Range(RangeOp::SecureErase, ..) = slot.doing
            && errno == libc::EOPNOTSUPP
        {
            // Nothing that is less may stand for it.
            self.complete(index, Status::Unsupported);
            return None;
        }
        if let Doing::Range(op, how, at) = slot.doing
            && errno == libc::EOPNOTSUPP
            && how != RangeHow::Write
            && matches!(self.disk.backing, Backing::Raw(_))
        {
            self.disk.cannot(how);
            return self.empty_range(index, op, at);
        }
        let (sector, doing) = (slot.sector, slot.doing);
        self.status.host_error(errno, sector);
        let (count, ..) = self.status.host_errors();
        // Each line says how many there were: a failing disk must not fill the log.
        if count.is_power_of_two() {
            let what = match doing {
                Doing::Transfer if slot.transfer.direction() == Direction::Read => "read",
                Doing::Transfer => "write",
                Doing::Flush => "flush",
                Doing::Range(RangeOp::SecureErase, ..) => "secure erase",
                Doing::Range(..) | Doing::Sync(_) => "discard or write-zeroes",
            };
            let why = std::io::Error::from_raw_os_error(errno);
            log::warn!("{what} at sector {sector}: {why} ({count} errors of the host so far)");
        }
        self.complete(index, Status::IoErr);
        None
    }

    /// Lets go of the slot's bounce buffer and segments.
    #[inline]
    fn release(&mut self, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            if slot.transfer.is_bounced() {
                self.bounced = self.bounced.saturating_sub(1);
            }
            slot.transfer.finish();
        }
    }

    #[inline]
    fn complete(&mut self, index: u16, status: Status) {
        self.release(index);
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        let mut data = 0;
        match slot.doing {
            _ if status != Status::Ok => {}
            Doing::Transfer => match slot.transfer.direction() {
                Direction::Read => {
                    data = slot.total;
                    self.status.read_bytes.add(u64::from(data));
                }
                Direction::Write => self.status.written_bytes.add(u64::from(slot.total)),
            },
            Doing::Flush => self.status.flushes.add(1),
            Doing::Range(RangeOp::Discard | RangeOp::SecureErase, ..)
            | Doing::Sync(RangeOp::Discard | RangeOp::SecureErase) => {
                self.status.discards.add(1);
            }
            Doing::Range(..) | Doing::Sync(_) => self.status.write_zeroes.add(1),
        }
        if slot.ranges.capacity() > KEEP_RANGES {
            slot.ranges = Vec::new();
        }
        let (head, addr, started) = (slot.head, slot.status_addr, slot.started);
        self.free.push(index);
        let started = started.unwrap_or_else(|| self.now());
        self.answer(head, addr, status, data, started);
    }

    #[inline]
    fn answer(&mut self, head: u16, addr: u64, status: Status, data: u32, started: Instant) {
        // The address was found in guest memory when the chain was walked.
        self.ring.memory().write(addr, &[status as u8]);
        self.ring.complete(head, data.saturating_add(1));
        self.status.requests.add(1);
        if status != Status::Ok {
            self.status.errors.add(1);
        }
        self.unshown.push(started);
    }

    /// Shows the driver what has completed; true if it must be signalled for that.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.unshown.is_empty() {
            return false;
        }
        let signal = self.ring.publish();
        let now = Instant::now();
        for started in self.unshown.drain(..) {
            let took = now.saturating_duration_since(started);
            self.status.record_latency(took);
        }
        signal
    }

    /// Shows the driver what has completed, and signals it.
    pub fn show(&mut self) {
        if self.publish()
            && let Some(call) = self.ring.call()
        {
            bulkhead_runtime::sys::signal(call);
            self.status.syscalls.add(1);
        }
    }

    /// Whether the driver should be shown what has completed although there is more to do
    /// at once: half of all that it waits for, so that it can work on that meanwhile, on
    /// another CPU.
    #[inline]
    pub fn is_worth_showing(&mut self) -> bool {
        let done = self.unshown.len();
        if done < WORTH_SHOWING {
            return false;
        }
        let left = self.ring.in_flight().saturating_add(self.ring.available());
        done >= usize::from(left).min(MUST_SHOW)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
