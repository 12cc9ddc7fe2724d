//! The io_uring engine: one ring per queue holds the kick, the orders and the disk's I/O,
//! so that a busy worker makes one io_uring_enter per batch and nothing else but the
//! interrupt.
//!
//! Kick and mailbox are watched by multishot polls, which fire for every write to the
//! eventfd and need no read. Guest memory is never registered as buffers: the kernel takes
//! the segments of each request anew, so a page that the balloon took back is not used
//! behind the guest's back.
//!
//! Runs on the queue's worker thread, which makes the ring too (it is bound to it).

#![allow(unsafe_code)] // entries whose segments must outlive the operation

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::mailbox::{Answer, Order, RingSetup, WorkerPort};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::sys;
use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::disk::Disk;
use crate::queue::{Queue, Work};
use crate::transfer::{Direction, Step};

/// Submission entries; more requests than this at once are submitted in turns.
const ENTRIES: u32 = 256;
/// Requests taken before completions are looked at again.
const BATCH: u32 = ENTRIES;

// Registered files.
const DISK: types::Fixed = types::Fixed(0);
const WAKEUP: types::Fixed = types::Fixed(1);
const KICK: types::Fixed = types::Fixed(2);

/// Operations that the ring takes, and no others.
const OPCODES: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// What a completion belongs to, as the upper half of user_data; the lower half is a slot
/// or the kick's generation.
const TAG_IO: u32 = 0;
const TAG_KICK: u32 = 1;
const TAG_WAKEUP: u32 = 2;
const TAG_CANCEL: u32 = 3;

fn user_data(tag: u32, value: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

/// An order that waits until nothing is in flight.
enum Draining {
    Stop,
    Memory(Arc<Memory>),
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
}

impl Engine {
    /// Makes the ring. On the worker thread, before confinement is sealed.
    pub fn new(port: WorkerPort, disk: Arc<Disk>) -> Result<Self, String> {
        let files = [disk.file.as_raw_fd(), port.wakeup().as_raw_fd()];
        let RestrictedRing { ring, .. } = uring::restricted(&RingSpec {
            entries: ENTRIES,
            opcodes: &OPCODES,
            files: &files,
            spare_files: 1,
        })
        .map_err(|e| e.to_string())?;
        Ok(Self {
            port,
            disk,
            uring: ring,
            queue: None,
            draining: None,
            generation: 0,
            arm_kick: false,
            arm_wakeup: true,
            reaped: Vec::new(),
        })
    }

    /// Serves the queue for ever.
    pub fn run(mut self) -> ! {
        loop {
            self.arm();
            let mut more = self.serve();
            more |= self.finish_draining();
            more |= !self.reaped.is_empty();
            self.enter(u32::from(!more));
            self.reap();
        }
    }

    /// Pushes an entry, submitting what is there if there is no room.
    fn push(&mut self, entry: &squeue::Entry) {
        let entry = entry.clone().flags(squeue::Flags::FIXED_FILE);
        loop {
            // SAFETY: an entry's segments lie in guest memory that the queue's ring keeps
            // mapped, or in a bounce buffer of its slot, and slot and ring live until
            // nothing is in flight (finish_draining). The kernel takes the segment lists
            // themselves at submission, before the slot is touched again.
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
        self.port.status().syscalls.add(1);
        loop {
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
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => return,
                // Completions must be taken first, or the kernel is short of memory for a
                // moment: what was not submitted stays in the ring for the next turn.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return,
                Err(e) => give_up(&e),
            }
        }
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

    /// Takes requests from the ring to the disk, up to a batch; true if there may be more.
    fn serve(&mut self) -> bool {
        let mut budget = BATCH;
        while let Some(work) = self.queue.as_mut().and_then(Queue::next_waiting) {
            self.start(work);
        }
        if self.draining.is_some() {
            self.flush();
            return false;
        }
        if let Some(queue) = &mut self.queue {
            queue.ring().disable_kicks();
        }
        loop {
            while let Some(work) = self.queue.as_mut().and_then(|q| q.next(&mut budget)) {
                self.start(work);
            }
            self.flush();
            if budget == 0 {
                return true;
            }
            let Some(queue) = &mut self.queue else {
                return false;
            };
            if !queue.ring().enable_kicks() {
                return false;
            }
        }
    }

    fn flush(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.ring().flush();
        }
    }

    /// Gives the kernel a request, or the next step of one.
    #[inline]
    fn start(&mut self, work: Work) {
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
            Work::Transfer(index) => {
                let durable = queue.durable_writes();
                let Some(transfer) = queue.transfer(index) else {
                    return;
                };
                let direction = transfer.direction();
                (index, entry(direction, &transfer.step(), durable))
            }
        };
        self.push(&entry.user_data(user_data(TAG_IO, u32::from(index))));
    }

    /// Takes completions off the ring.
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
            }
        }
    }

    #[inline]
    fn completed(&mut self, data: u64, result: i32, flags: u32) {
        let value = data as u32;
        match (data >> 32) as u32 {
            TAG_IO => {
                let Ok(index) = u16::try_from(value) else {
                    return;
                };
                let Some(queue) = &mut self.queue else {
                    return;
                };
                if queue.finish(index, result) {
                    let flush = queue.is_flush(index);
                    self.start(if flush {
                        Work::Flush(index)
                    } else {
                        Work::Transfer(index)
                    });
                }
            }
            TAG_KICK if value == self.generation => self.kicked(result, flags),
            TAG_WAKEUP => {
                self.arm_wakeup |= !cqueue::more(flags);
                if let Some(order) = self.port.take() {
                    self.obey(order);
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

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(setup) => {
                let answer = match self.start_ring(*setup) {
                    Ok(()) => Answer::Done,
                    Err(why) => Answer::Refused(why),
                };
                self.port.answer(answer);
            }
            // Answered by finish_draining.
            Order::Stop => self.draining = Some(Draining::Stop),
            Order::Memory(memory) => self.draining = Some(Draining::Memory(memory)),
            Order::Call(call) => {
                if let Some(queue) = &mut self.queue {
                    queue.ring().set_call(call);
                }
                self.port.answer(Answer::Done);
            }
            Order::Err(err) => {
                if let Some(queue) = &mut self.queue {
                    queue.ring().set_err(err);
                }
                self.port.answer(Answer::Done);
            }
        }
    }

    fn start_ring(&mut self, setup: RingSetup) -> Result<(), String> {
        let ring = ActiveRing::start(setup, self.port.index(), self.port.status())
            .map_err(|e| e.to_string())?;
        self.uring
            .submitter()
            .register_files_update(KICK.0, &[ring.kick().as_raw_fd()])
            .map_err(|e| format!("cannot register the kick eventfd: {e}"))?;
        let status = Arc::clone(self.port.status());
        self.queue = Some(Queue::new(ring, status, Arc::clone(&self.disk)));
        self.generation = self.generation.wrapping_add(1);
        self.arm_kick = true;
        Ok(())
    }

    /// Answers the order that waits for I/O to end, once it has ended. True if it did: then
    /// the ring must be looked at again before the thread sleeps.
    fn finish_draining(&mut self) -> bool {
        if self.draining.is_none() || self.queue.as_ref().is_some_and(|q| !q.is_idle()) {
            return false;
        }
        let answer = match (self.draining.take(), &mut self.queue) {
            (Some(Draining::Memory(memory)), Some(queue)) => {
                match queue.ring().swap_memory(memory) {
                    Ok(()) => Answer::Done,
                    Err(why) => Answer::Refused(why.to_string()),
                }
            }
            (Some(Draining::Stop), queue) => {
                let queue = queue.take();
                if queue.is_some() {
                    self.drop_kick();
                }
                Answer::Stopped {
                    next_avail: queue.map(Queue::stop),
                }
            }
            _ => Answer::Done,
        };
        self.port.answer(answer);
        true
    }

    /// Stops watching the kick and lets its eventfd go.
    fn drop_kick(&mut self) {
        let poll = user_data(TAG_KICK, self.generation);
        self.generation = self.generation.wrapping_add(1);
        self.arm_kick = false;
        self.push(
            &opcode::AsyncCancel::new(poll)
                .build()
                .user_data(user_data(TAG_CANCEL, 0)),
        );
        self.enter(0);
        if let Err(e) = self.uring.submitter().register_files_update(KICK.0, &[-1]) {
            log::warn!("cannot release a kick eventfd: {e}");
        }
    }
}

fn entry(direction: Direction, step: &Step, durable: bool) -> squeue::Entry {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    match (direction, step.single) {
        (Direction::Read, Some(s)) => {
            let len = u32::try_from(s.iov_len).unwrap_or(0);
            opcode::Read::new(DISK, s.iov_base.cast(), len)
                .offset(step.offset)
                .build()
        }
        (Direction::Write, Some(s)) => {
            let len = u32::try_from(s.iov_len).unwrap_or(0);
            opcode::Write::new(DISK, s.iov_base.cast(), len)
                .offset(step.offset)
                .rw_flags(flags)
                .build()
        }
        (Direction::Read, None) => opcode::Readv::new(DISK, step.segments, step.count)
            .offset(step.offset)
            .build(),
        (Direction::Write, None) => opcode::Writev::new(DISK, step.segments, step.count)
            .offset(step.offset)
            .rw_flags(flags)
            .build(),
    }
}

/// The ring itself fails: nothing can be served any more.
fn give_up(why: &io::Error) -> ! {
    log::error!("io_uring_enter: {why}; the process ends");
    sys::exit(1)
}
