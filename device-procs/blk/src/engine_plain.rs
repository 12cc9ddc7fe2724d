//! The engine that does one request after another by system calls of its own: preadv2,
//! pwritev2, fallocate and fdatasync on a raw disk, or whatever an image does. Kicks and
//! orders are waited for by ppoll.
//!
//! It serves images, and hosts without io_uring.
//!
//! Runs on the queue's worker thread.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerPort};
use bulkhead_runtime::status::Sleep;
use bulkhead_runtime::sys::{self, PollFd};

use crate::backing::Backing;
use crate::disk::{Disk, RangeHow, RangeOp};
use crate::host;
use crate::look::Look;
use crate::queue::{Queue, RangeStep, Work};
use crate::vectored;

/// Requests done before orders are looked at.
const BATCH: u32 = 32;

/// What the worker does when it has done what there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// There may be more.
    More,
    /// Wait for a kick or an order, at most until then.
    Wait(Option<Instant>),
}

/// Serves one queue for ever.
pub fn run(port: &WorkerPort, disk: &Arc<Disk>, mut worker: Worker) -> ! {
    let mut queue: Option<Queue> = None;
    loop {
        let next = match &mut queue {
            Some(queue) => worker.serve(queue, disk),
            None => Next::Wait(None),
        };
        if wait(port, queue.as_mut(), next) {
            if let Some(order) = port.take() {
                port.answer(obey(order, &mut queue, port, disk));
            }
            if port.take_refresh()
                && let Some(queue) = &mut queue
            {
                queue.refresh();
            }
        }
    }
}

/// The habits of one worker.
#[derive(Debug, Default)]
pub struct Worker {
    look: Look,
    /// Requests done since there was nothing to do.
    round: u32,
}

impl Worker {
    /// A worker without habits.
    pub fn new() -> Self {
        Self {
            look: Look::new(),
            round: 0,
        }
    }

    /// Does what is there, up to a batch.
    pub(crate) fn serve(&mut self, queue: &mut Queue, disk: &Disk) -> Next {
        if let Some(until) = queue.throttled() {
            return Next::Wait(Some(until));
        }
        let mut budget = BATCH;
        queue.ring().disable_kicks();
        loop {
            queue.new_batch();
            let before = budget;
            while let Some(work) = queue.next(&mut budget) {
                perform(queue, disk, work);
                // Those that gave way to a bounce buffer's owner.
                while let Some(work) = queue.next_waiting() {
                    perform(queue, disk, work);
                }
                if queue.is_worth_showing() {
                    queue.show();
                    queue.new_batch();
                }
            }
            if budget < before {
                self.round = self.round.saturating_add(before.saturating_sub(budget));
                if let Some(now) = queue.clock() {
                    self.look.busy(now);
                }
            }
            if budget == 0 && queue.ring().available() > 0 {
                return Next::More;
            }
            queue.show();
            if let Some(until) = queue.throttled() {
                return Next::Wait(Some(until));
            }
            if budget == 0 {
                return Next::More;
            }
            if self.found(queue) {
                continue;
            }
            if !queue.ring().enable_kicks() {
                return Next::Wait(None);
            }
            queue.ring().disable_kicks();
        }
    }

    /// With nothing left to do, looks for requests for a while, if that is worth it.
    fn found(&mut self, queue: &mut Queue) -> bool {
        if !self.look.is_enabled() {
            return false;
        }
        let now = Instant::now();
        let time = self.look.idle(now, std::mem::take(&mut self.round));
        !time.is_zero() && self.look.until(time, || queue.ring().available() > 0)
    }
}

/// Sleeps until there is a kick or an order; with more to do, only looks. True for an order.
fn wait(port: &WorkerPort, queue: Option<&mut Queue>, next: Next) -> bool {
    port.status().syscalls.add(1);
    let mut fds = [
        PollFd::new(port.wakeup().as_fd(), libc::POLLIN),
        PollFd::none(),
    ];
    let timeout = match next {
        Next::More => 0,
        Next::Wait(None) => -1,
        // Rounded up: too early would only be once more round.
        Next::Wait(Some(until)) => {
            let left = until.saturating_duration_since(Instant::now());
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        }
    };
    let Some(queue) = queue else {
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut fds, timeout);
        return true;
    };
    if matches!(next, Next::Wait(Some(_))) {
        port.status().sleeps(Sleep::ByOrder);
    }
    let kick = Arc::clone(queue.ring().kick());
    // While a limit holds, a kick would change nothing.
    if !queue.ring().is_broken() && !matches!(next, Next::Wait(Some(_))) {
        fds = [
            PollFd::new(port.wakeup().as_fd(), libc::POLLIN),
            PollFd::new(kick.as_fd(), libc::POLLIN),
        ];
    }
    let _ = sys::poll(&mut fds, timeout);
    port.status().sleeps(Sleep::Idle);
    let [ordered, kicked] = fds;
    if kicked.revents() & libc::POLLIN != 0 {
        port.status().kicks.add(1);
        port.status().syscalls.add(1);
        let mut count = [0; 8];
        if !matches!((&*kick).read(&mut count), Ok(8)) {
            queue
                .ring()
                .break_because(&"the kick descriptor is no eventfd");
        }
    } else if kicked.revents() != 0 {
        queue
            .ring()
            .break_because(&"the kick descriptor cannot be waited for");
    }
    ordered.revents() != 0
}

/// Does one request, or what is left of it, to its end.
fn perform(queue: &mut Queue, disk: &Disk, work: Work) {
    let durable = queue.durable_writes();
    let mut next = Some(work);
    while let Some(work) = next {
        queue.status().syscalls.add(1);
        queue.status().sleeps(Sleep::ForHost);
        let (index, result) = match work {
            Work::Flush(index) => (index, flush(disk)),
            Work::Range(index, step) => (index, empty(disk, &step)),
            Work::Transfer(index) => {
                let Some(transfer) = queue.transfer(index) else {
                    return;
                };
                let direction = transfer.direction();
                let step = transfer.step();
                let done = match &disk.backing {
                    Backing::Raw(file) => vectored::perform(file, direction, &step, durable),
                    Backing::Image(image) => image
                        .get()
                        .map_or_else(unopened, |image| image.transfer(direction, &step, durable)),
                };
                (index, done)
            }
        };
        queue.status().sleeps(Sleep::Idle);
        next = queue.finish(index, vectored::negated(result));
    }
}

fn unopened<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EIO))
}

fn flush(disk: &Disk) -> io::Result<u32> {
    match &disk.backing {
        Backing::Raw(file) => file.sync_data(),
        Backing::Image(image) => image.get().map_or_else(unopened, |image| image.flush()),
    }
    .map(|()| 0)
}

fn empty(disk: &Disk, step: &RangeStep) -> io::Result<u32> {
    let (offset, len) = (step.range.offset, u64::from(step.range.len));
    match &disk.backing {
        Backing::Raw(file) if step.how == RangeHow::Punch => host::punch(file, offset, len),
        Backing::Raw(file) if step.how == RangeHow::SecureErase => {
            host::secure_erase(file, offset, len)
        }
        Backing::Raw(file) => host::zero(file, offset, len),
        Backing::Image(image) => image.get().map_or_else(unopened, |image| match step.op {
            RangeOp::Discard => image.discard(offset, len),
            // Never offered of an image.
            RangeOp::SecureErase => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            RangeOp::Zero => image.write_zeroes(offset, len, false),
            RangeOp::ZeroUnmap => image.write_zeroes(offset, len, true),
        }),
    }
    .map(|()| 0)
}

/// Carries out an order. Nothing is ever in flight between requests.
fn obey(order: Order, queue: &mut Option<Queue>, port: &WorkerPort, disk: &Arc<Disk>) -> Answer {
    match order {
        Order::Start(setup) => match ActiveRing::start(*setup, port.index(), port.status()) {
            Ok(ring) => {
                let status = Arc::clone(port.status());
                *queue = Some(Queue::new(ring, status, Arc::clone(disk)));
                Answer::Done
            }
            Err(why) => Answer::Refused(why.to_string()),
        },
        Order::Stop => {
            if let Backing::Image(image) = &disk.backing
                && let Some(image) = image.get()
                && queue.is_some()
                && let Err(e) = image.settle()
            {
                log::error!("the image's tables cannot be written: {e}");
            }
            Answer::Stopped {
                next_avail: queue.take().map(Queue::stop),
            }
        }
        Order::Memory(memory) => match queue.as_mut().map(|q| q.ring().swap_memory(memory)) {
            Some(Err(why)) => Answer::Refused(why.to_string()),
            _ => Answer::Done,
        },
        Order::Call(call) => {
            if let Some(queue) = queue {
                queue.ring().set_call(call);
            }
            Answer::Done
        }
        Order::Err(err) => {
            if let Some(queue) = queue {
                queue.ring().set_err(err);
            }
            Answer::Done
        }
    }
}
