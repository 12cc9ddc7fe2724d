//! The io_uring engine: one ring per queue holds the kick, the orders, the disk's I/O, the
//! interrupt and the waits of rate limits, so that a worker makes one kind of system call,
//! io_uring_enter, and of that one or a few for all requests that came together.
//!
//! Kick and mailbox are watched by multishot polls, which fire for every write to the
//! eventfd and need no read. Guest memory is never registered as buffers: the kernel takes
//! the segments of each request anew, so a page that the balloon took back is not used
//! behind the guest's back.
//!
//! A disk that has nothing to do gets the first request of a batch at once and the others
//! in growing portions: it works while the worker still reads requests. Completions are
//! shown to the driver before the worker sleeps, or when they are half of what it waits for.
//!
//! Runs on the queue's worker thread, which makes the ring too (it is bound to it).

#![allow(unsafe_code)] // entries whose segments must outlive the operation

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::status::Sleep;
use bulkhead_runtime::sys;
use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::backing::Backing;
use crate::disk::{Disk, RangeHow};
use crate::host;
use crate::look::Look;
use crate::queue::{Queue, RangeStep, Work};
use crate::uring_entries::{
    self as entries, CALL, DISK, KICK, ONE, OPCODES, TAG_IO, TAG_KICK, TAG_SIGNAL, TAG_WAKEUP,
    WAKEUP, user_data,
};
use crate::vectored;

/// Submission entries; more requests than this at once are submitted in turns.
const ENTRIES: u32 = 256;
/// Requests taken before the kernel is told of them.
const PORTION: u32 = 32;

#[path = "engine_uring_orders.rs"]
mod orders;

/// An order that waits until nothing is in flight.
enum Draining {
    Stop,
    Memory(Arc<Memory>),
}

/// What the worker does when it has taken what there was.
enum Next {
    /// Tell the kernel, and take more.
    More,
    /// Wait for whatever happens first, at most until then.
    Wait(Option<Instant>),
}

/// A queue's engine.
pub struct Engine {
    port: WorkerPort,
    disk: Arc<Disk>,
    uring: IoUring,
    queue: Option<Queue>,
    draining: Option<Draining>,
    /// Counts the kick eventfds, so that a late completion of an old one is known as such.
    generation: u32,
    /// The kick's poll must be (re)armed.
    arm_kick: bool,
    arm_wakeup: bool,
    /// Completions of the last wait, as (user_data, result, flags).
    reaped: Vec<(u64, i32, u32)>,
    /// Operations on the disk that the kernel has, or will be given.
    in_kernel: u32,
    /// Requests to take before the kernel is told of them.
    portion: u32,
    /// Requests taken since there was nothing to do.
    round: u32,
    look: Look,
    /// Completions of some entries can be left out, which signalling by the ring needs.
    quiet: bool,
    /// The call eventfd is signalled by the ring: it is one that never blocks.
    signal_by_ring: bool,
    /// The disk's content is in memory: it is read and written by calls, at once.
    inline: bool,
}

impl Engine {
    /// Makes the ring. On the worker thread, before confinement is sealed.
    ///
    /// # Errors
    /// One line: the host has no such ring for this process.
    pub fn new(mut port: WorkerPort, disk: Arc<Disk>) -> Result<Self, String> {
        let Backing::Raw(file) = &disk.backing else {
            return Err("an image is not served by io_uring".into());
        };
        let fence = port.take_fence();
        let mut files = vec![file.as_raw_fd(), port.wakeup().as_raw_fd(), -1, -1];
        // It stays in the ring's table until the kernel has ended the ring's last operation.
        files.extend(fence.iter().map(AsRawFd::as_raw_fd));
        let RestrictedRing { ring, quiet, .. } = uring::restricted(&RingSpec {
            entries: ENTRIES,
            opcodes: &OPCODES,
            files: &files,
            spare_files: 0,
        })
        .map_err(|e| e.to_string())?;
        drop(fence);
        Ok(Self {
            inline: disk.in_memory,
            port,
            disk,
            uring: ring,
            queue: None,
            draining: None,
            generation: 0,
            arm_kick: false,
            arm_wakeup: true,
            reaped: Vec::new(),
            in_kernel: 0,
            portion: 1,
            round: 0,
            look: Look::new(),
            quiet,
            signal_by_ring: false,
        })
    }

    /// How many requests to take first, from a disk that has nothing to do.
    fn first_portion(&self) -> u32 {
        if self.inline { PORTION } else { 1 }
    }

    /// Serves the queue for ever.
    pub fn run(mut self) -> ! {
        loop {
            #[cfg(feature = "hostile")]
            bulkhead_runtime::hostile::strike_ring(&mut self.uring, &OPCODES);
            self.arm();
            let next = self.serve();
            let answered = self.finish_draining();
            match next {
                Next::Wait(until) if !answered && self.reaped.is_empty() => self.wait(until),
                _ => self.enter(0),
            }
            self.reap();
        }
    }

    /// Pushes an entry, submitting what is there if there is no room.
    fn push(&mut self, entry: &squeue::Entry) {
        let entry = entry.clone().flags(squeue::Flags::FIXED_FILE);
        loop {
            // SAFETY: an entry's segments lie in guest memory that the queue's ring keeps
            // mapped, in a bounce buffer of its slot, or in a static; slot and ring live
            // until nothing is in flight (finish_draining). The kernel takes the segment
            // lists themselves at submission, before the slot is touched again.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Completions may have to be taken before the kernel takes more entries.
            self.enter(0);
            self.collect();
        }
    }

    /// Submits, and waits for at least `want` completions.
    fn enter(&mut self, want: u32) {
        const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS
        loop {
            self.port.status().syscalls.add(1);
            let submit = {
                let mut queue = self.uring.submission();
                queue.sync();
                u32::try_from(queue.len()).unwrap_or(u32::MAX)
            };
            // SAFETY: no argument structure is passed; the entries are sound (push).
            let done = unsafe {
                self.uring
                    .submitter()
                    .enter::<libc::sigset_t>(submit, want, GETEVENTS, None)
            };
            match done {
                Ok(n) if n < submit as usize => {}
                Ok(_) => return,
                Err(e) => return passing(&e),
            }
        }
    }

    /// Submits, and waits until something has happened, or for the time.
    fn wait(&mut self, until: Option<Instant>) {
        self.port.status().sleeps(match until {
            _ if self.in_kernel > 0 => Sleep::ForHost,
            Some(_) => Sleep::ByOrder,
            None => Sleep::Idle,
        });
        match until {
            None => self.enter(1),
            Some(until) => {
                self.port.status().syscalls.add(1);
                let left = until.saturating_duration_since(Instant::now());
                let time = types::Timespec::from(left);
                let limit = types::SubmitArgs::new().timespec(&time);
                if let Err(e) = self.uring.submitter().submit_with_args(1, &limit) {
                    passing(&e);
                }
            }
        }
        self.port.status().sleeps(Sleep::Idle);
    }

    fn arm(&mut self) {
        if std::mem::take(&mut self.arm_wakeup) {
            let poll = opcode::PollAdd::new(WAKEUP, libc::POLLIN as u32).multi(true);
            self.push(&poll.build().user_data(user_data(TAG_WAKEUP, 0)));
        }
        if std::mem::take(&mut self.arm_kick) {
            let poll = opcode::PollAdd::new(KICK, libc::POLLIN as u32).multi(true);
            let generation = self.generation;
            self.push(&poll.build().user_data(user_data(TAG_KICK, generation)));
        }
    }

    /// Takes requests from the ring to the disk, up to a portion.
    fn serve(&mut self) -> Next {
        while let Some(work) = self.queue.as_mut().and_then(Queue::next_waiting) {
            self.start(work);
        }
        let Some(queue) = &mut self.queue else {
            return Next::Wait(None);
        };
        if self.draining.is_some() {
            self.show();
            return Next::Wait(None);
        }
        if let Some(until) = queue.throttled() {
            self.show();
            return Next::Wait(Some(until));
        }
        queue.ring().disable_kicks();
        loop {
            let full = self.take();
            let Some(queue) = &mut self.queue else {
                return Next::Wait(None);
            };
            let throttled = queue.throttled();
            if full && throttled.is_none() && queue.ring().available() > 0 {
                self.portion = self.portion.saturating_mul(2).min(PORTION);
                return Next::More;
            }
            self.show();
            if throttled.is_some() {
                return Next::Wait(throttled);
            }
            self.portion = if self.in_kernel == 0 {
                self.first_portion()
            } else {
                PORTION
            };
            if self.look() {
                continue;
            }
            let Some(queue) = &mut self.queue else {
                return Next::Wait(None);
            };
            if !queue.ring().enable_kicks() {
                return Next::Wait(None);
            }
            queue.ring().disable_kicks();
        }
    }

    /// Takes a portion of requests; whether there may be more.
    #[inline]
    fn take(&mut self) -> bool {
        let mut budget = self.portion;
        let Some(queue) = &mut self.queue else {
            return false;
        };
        queue.new_batch();
        while let Some(work) = self.queue.as_mut().and_then(|q| q.next(&mut budget)) {
            self.start(work);
            if self.inline {
                self.show_early();
            }
        }
        if budget < self.portion {
            self.round = self
                .round
                .saturating_add(self.portion.saturating_sub(budget));
            if let Some(now) = self.queue.as_ref().and_then(Queue::clock) {
                self.look.busy(now);
            }
        }
        budget == 0
    }

    /// With nothing left to do, looks for requests for a while, if that is worth it. True
    /// if there are some.
    fn look(&mut self) -> bool {
        if !self.look.is_enabled() || !self.queue.as_ref().is_some_and(Queue::is_idle) {
            return false;
        }
        let now = Instant::now();
        let round = std::mem::take(&mut self.round);
        let time = self.look.idle(now, round);
        if time.is_zero() {
            return false;
        }
        // The interrupt, which waits in the ring.
        if !self.uring.submission().is_empty() {
            self.enter(0);
            self.collect();
            if !self.reaped.is_empty() {
                return false;
            }
        }
        let Some(queue) = &mut self.queue else {
            return false;
        };
        self.look.until(time, || queue.ring().available() > 0)
    }

    /// Shows the driver what has completed, and has it signalled if it wants that.
    fn show(&mut self) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        if !self.signal_by_ring {
            return queue.show();
        }
        if queue.publish() {
            // RWF_NOWAIT: an eventfd that could block is left alone, and says EAGAIN.
            let signal = opcode::Write::new(CALL, (&raw const ONE).cast(), 8)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
                .flags(squeue::Flags::SKIP_SUCCESS)
                .user_data(user_data(TAG_SIGNAL, 0));
            self.push(&signal);
        }
    }

    /// Shows the driver what has completed at once, if it is enough to be worth it.
    fn show_early(&mut self) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        if !queue.is_worth_showing() {
            return;
        }
        // Those that follow were taken later.
        queue.new_batch();
        self.show();
        if !self.uring.submission().is_empty() {
            self.enter(0);
            self.collect();
        }
    }

    /// Does a request, or the next step of one, or gives it to the kernel to do.
    #[inline]
    fn start(&mut self, work: Work) {
        match work {
            Work::Transfer(index) if self.inline => self.perform(index),
            Work::Range(index, step) if step.how == RangeHow::SecureErase => {
                self.erase(index, step);
            }
            work => self.submit(work),
        }
    }

    /// Erases ranges, one after another. No operation of a ring does it; so the queue waits.
    #[cold]
    fn erase(&mut self, index: u16, mut step: RangeStep) {
        // What was taken before goes on meanwhile.
        if !self.uring.submission().is_empty() {
            self.enter(0);
            self.collect();
        }
        loop {
            let Backing::Raw(file) = &self.disk.backing else {
                return;
            };
            let status = self.port.status();
            status.syscalls.add(1);
            status.sleeps(Sleep::ForHost);
            let (offset, len) = (step.range.offset, u64::from(step.range.len));
            let done = host::secure_erase(file, offset, len).map(|()| 0);
            status.sleeps(Sleep::Idle);
            let Some(queue) = &mut self.queue else {
                return;
            };
            match queue.finish(index, vectored::negated(done)) {
                Some(Work::Range(same, next)) if same == index => step = next,
                Some(work) => return self.submit(work),
                None => return,
            }
        }
    }

    /// Moves data to or from memory: what io_uring would have to give to a thread of the
    /// kernel, because such files do not tell whether they would wait.
    fn perform(&mut self, index: u16) {
        let Backing::Raw(file) = &self.disk.backing else {
            return;
        };
        loop {
            let Some(queue) = &mut self.queue else {
                return;
            };
            let Some(transfer) = queue.transfer(index) else {
                return;
            };
            self.port.status().syscalls.add(1);
            let direction = transfer.direction();
            let done = vectored::perform(file, direction, &transfer.step(), false);
            match queue.finish(index, vectored::negated(done)) {
                Some(Work::Transfer(same)) if same == index => {}
                Some(work) => return self.submit(work),
                None => return,
            }
        }
    }

    /// Gives the kernel a request, or the next step of one.
    #[inline]
    fn submit(&mut self, work: Work) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let (index, entry) = match work {
            Work::Flush(index) => (
                index,
                opcode::Fsync::new(DISK)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build(),
            ),
            Work::Range(index, step) => (index, entries::fallocate(&step)),
            Work::Transfer(index) => {
                let durable = queue.durable_writes();
                let Some(transfer) = queue.transfer(index) else {
                    return;
                };
                let direction = transfer.direction();
                (
                    index,
                    entries::transfer(direction, &transfer.step(), durable),
                )
            }
        };
        self.in_kernel = self.in_kernel.saturating_add(1);
        self.push(&entry.user_data(user_data(TAG_IO, u32::from(index))));
    }

    /// Takes completions off the ring.
    #[inline]
    fn collect(&mut self) {
        let completions = self.uring.completion();
        self.reaped
            .extend(completions.map(|c| (c.user_data(), c.result(), c.flags())));
    }

    /// Acts on completions, and on those that come to light meanwhile.
    fn reap(&mut self) {
        self.collect();
        while !self.reaped.is_empty() {
            let mut batch = std::mem::take(&mut self.reaped);
            for (data, result, flags) in batch.drain(..) {
                self.completed(data, result, flags);
            }
            if self.reaped.is_empty() {
                self.reaped = batch;
                break;
            }
        }
        if self.queue.as_mut().is_some_and(Queue::is_worth_showing) {
            self.show();
        }
    }

    #[inline]
    fn completed(&mut self, data: u64, result: i32, flags: u32) {
        let value = data as u32;
        match (data >> 32) as u32 {
            TAG_IO => {
                self.in_kernel = self.in_kernel.saturating_sub(1);
                let index = u16::try_from(value).ok();
                let queue = self.queue.as_mut();
                let work = queue
                    .zip(index)
                    .and_then(|(queue, index)| queue.finish(index, result));
                if let Some(work) = work {
                    self.start(work);
                }
            }
            TAG_KICK if value == self.generation => self.kicked(result, flags),
            TAG_WAKEUP => {
                self.arm_wakeup |= !cqueue::more(flags);
                if let Some(order) = self.port.take() {
                    self.obey(order);
                }
                if self.port.take_refresh()
                    && let Some(queue) = &mut self.queue
                {
                    queue.refresh();
                }
            }
            // Only a failure is told: an eventfd that may block, as a rule.
            TAG_SIGNAL => {
                self.signal_by_ring = false;
                let call = self.queue.as_mut().and_then(|q| q.ring().call().cloned());
                if let Some(call) = call {
                    sys::signal(&call);
                    self.port.status().syscalls.add(1);
                }
            }
            // A cancelled poll of an old kick, or the cancellation itself.
            _ => {}
        }
    }

    fn kicked(&mut self, result: i32, flags: u32) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        if result < 0 || result as u32 & libc::POLLIN as u32 == 0 {
            queue
                .ring()
                .break_because(&"the kick descriptor cannot be waited for");
            return;
        }
        self.port.status().kicks.add(1);
        self.arm_kick |= !cqueue::more(flags);
    }
}

/// An error of io_uring_enter that passes by itself, or the end.
fn passing(why: &io::Error) {
    match why.raw_os_error() {
        // A signal; the time is over.
        Some(libc::EINTR | libc::ETIME) => {}
        // Completions must be taken first, or the kernel is short of memory for a moment:
        // what was not submitted stays in the ring for the next turn.
        Some(libc::EBUSY | libc::EAGAIN) => {}
        // The ring itself fails: nothing can be served any more.
        _ => {
            log::error!("io_uring_enter: {why}; the process ends");
            sys::exit(1)
        }
    }
}
