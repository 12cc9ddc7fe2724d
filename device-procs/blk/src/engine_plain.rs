//! The engine for hosts without io_uring: one request at a time by preadv2 and pwritev2,
//! kicks and orders by ppoll.
//!
//! Runs on the queue's worker thread.

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerPort};
use bulkhead_runtime::sys::{self, PollFd};

use crate::disk::Disk;
use crate::queue::{Queue, Work};
use crate::vectored;

/// Requests taken before completions are shown and orders looked at.
const BATCH: u32 = 32;

/// Serves one queue for ever.
pub fn run(port: &WorkerPort, disk: &Arc<Disk>) -> ! {
    let mut queue: Option<Queue> = None;
    loop {
        let more = queue.as_mut().is_some_and(|q| serve(q, disk));
        if wait(port, queue.as_mut(), more)
            && let Some(order) = port.take()
        {
            port.answer(obey(order, &mut queue, port, disk));
        }
    }
}

/// Sleeps until there is a kick or an order; with `more`, only looks. True for an order.
fn wait(port: &WorkerPort, queue: Option<&mut Queue>, more: bool) -> bool {
    port.status().syscalls.add(1);
    let mut fds = [
        PollFd::new(port.wakeup().as_fd(), libc::POLLIN),
        PollFd::none(),
    ];
    let Some(queue) = queue else {
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut fds, -1);
        return true;
    };
    let kick = Arc::clone(queue.ring().kick());
    if !queue.ring().is_broken() {
        fds = [
            PollFd::new(port.wakeup().as_fd(), libc::POLLIN),
            PollFd::new(kick.as_fd(), libc::POLLIN),
        ];
    }
    let _ = sys::poll(&mut fds, if more { 0 } else { -1 });
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

/// Does what is there, up to a batch; true if there may be more.
pub(crate) fn serve(queue: &mut Queue, disk: &Disk) -> bool {
    let mut budget = BATCH;
    queue.ring().disable_kicks();
    loop {
        while let Some(work) = queue.next(&mut budget) {
            perform(queue, disk, work);
        }
        queue.ring().flush();
        if budget == 0 {
            return true;
        }
        if !queue.ring().enable_kicks() {
            return false;
        }
    }
}

fn perform(queue: &mut Queue, disk: &Disk, work: Work) {
    let durable = queue.durable_writes();
    match work {
        Work::Flush(index) => loop {
            let result = negated(disk.file.sync_data().map(|()| 0));
            if !queue.finish(index, result) {
                return;
            }
        },
        Work::Transfer(index) => loop {
            let Some(transfer) = queue.transfer(index) else {
                return;
            };
            let direction = transfer.direction();
            let step = transfer.step();
            let result = negated(vectored::perform(&disk.file, direction, &step, durable));
            if !queue.finish(index, result) {
                return;
            }
        },
    }
}

fn negated(result: std::io::Result<u32>) -> i32 {
    match result {
        Ok(n) => i32::try_from(n).unwrap_or(i32::MAX),
        Err(e) => e.raw_os_error().map_or(-libc::EIO, i32::wrapping_neg),
    }
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
        Order::Stop => Answer::Stopped {
            next_avail: queue.take().map(Queue::stop),
        },
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
