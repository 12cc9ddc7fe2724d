//! How the main thread gives a queue's worker its orders, one at a time.
//!
//! A worker sleeps in its own way (io_uring, poll) and watches [`WorkerPort::wakeup`]
//! there; an order lies in the mailbox when that eventfd fires. The main thread waits for
//! the answer on another eventfd together with its control channel, with a deadline, so a
//! worker that must first finish slow I/O never makes the process deaf.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::Memory;
use crate::ring::{RingFeatures, RingLayout};
use crate::status::QueueStatus;
use crate::sys;

/// Everything that a worker needs to serve a ring.
#[derive(Debug)]
pub struct RingSetup {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Where the ring lies.
    pub layout: RingLayout,
    /// How the ring is to be read.
    pub ring_features: RingFeatures,
    /// All feature bits that the driver accepted.
    pub features: u64,
    /// The available index at which to start.
    pub base: u16,
    /// Fires when the driver has made buffers available.
    pub kick: Arc<File>,
    /// To be signalled for completions.
    pub call: Option<Arc<File>>,
    /// To be signalled when the ring is malformed.
    pub err: Option<Arc<File>>,
}

/// An order to a worker.
#[derive(Debug)]
pub enum Order {
    /// Serve this ring, from its base on.
    Start(Box<RingSetup>),
    /// Take no more requests, finish those in flight, then say where to go on.
    Stop,
    /// Finish what is in flight, then go on with the same ring in this memory. The old
    /// snapshot is let go before the answer.
    Memory(Arc<Memory>),
    /// Signal completions here from now on.
    Call(Option<Arc<File>>),
    /// Signal a malformed ring here from now on.
    Err(Option<Arc<File>>),
}

/// A worker's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// The ring is stopped and has nothing in flight.
    Stopped {
        /// The available index at which to go on; None if no ring was being served.
        next_avail: Option<u16>,
    },
    /// The ring cannot be served as described, for this reason. It counts as broken.
    Refused(String),
}

#[derive(Debug, Default)]
struct Slots {
    order: Option<Order>,
    answer: Option<Answer>,
}

#[derive(Debug)]
struct Shared {
    slots: Mutex<Slots>,
    wakeup: File,
    answered: File,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The worker's end.
#[derive(Debug)]
pub struct WorkerPort {
    shared: Arc<Shared>,
    status: Arc<QueueStatus>,
    index: u16,
}

impl WorkerPort {
    /// Becomes readable when there is an order.
    pub fn wakeup(&self) -> &File {
        &self.shared.wakeup
    }

    /// Takes the order, if there is one. Empties the eventfd first, so that an order that
    /// arrives meanwhile fires it again.
    pub fn take(&self) -> Option<Order> {
        sys::drain(&self.shared.wakeup);
        self.shared.lock().order.take()
    }

    /// Answers the last order; each order gets exactly one answer.
    pub fn answer(&self, answer: Answer) {
        self.shared.lock().answer = Some(answer);
        sys::signal(&self.shared.answered);
    }

    /// Health and counters of this queue.
    pub fn status(&self) -> &Arc<QueueStatus> {
        &self.status
    }

    /// The queue's index.
    pub fn index(&self) -> u16 {
        self.index
    }
}

/// The main thread's end.
#[derive(Debug)]
pub struct WorkerHandle {
    shared: Arc<Shared>,
    status: Arc<QueueStatus>,
}

impl WorkerHandle {
    /// Gives an order. The answer to the one before must have been taken.
    pub fn order(&self, order: Order) {
        sys::drain(&self.shared.answered);
        {
            let mut slots = self.shared.lock();
            slots.answer = None;
            slots.order = Some(order);
        }
        sys::signal(&self.shared.wakeup);
    }

    /// Becomes readable when there is an answer.
    pub fn answered(&self) -> &File {
        &self.shared.answered
    }

    /// Takes the answer, if there is one.
    pub fn take_answer(&self) -> Option<Answer> {
        self.shared.lock().answer.take()
    }

    /// Health and counters of the queue.
    pub fn status(&self) -> &Arc<QueueStatus> {
        &self.status
    }
}

/// A mailbox for the worker of queue `index`.
pub fn mailbox(index: u16) -> io::Result<(WorkerHandle, WorkerPort)> {
    let shared = Arc::new(Shared {
        slots: Mutex::default(),
        wakeup: sys::eventfd()?,
        answered: sys::eventfd()?,
    });
    let status = Arc::new(QueueStatus::default());
    Ok((
        WorkerHandle {
            shared: Arc::clone(&shared),
            status: Arc::clone(&status),
        },
        WorkerPort {
            shared,
            status,
            index,
        },
    ))
}
