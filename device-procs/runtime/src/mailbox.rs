//! How the main thread gives a queue's worker its orders, one at a time.
//!
//! A worker sleeps in its own way (io_uring, poll) and watches [`WorkerPort::wakeup`]
//! there; an order lies in the mailbox when that eventfd fires. The main thread waits for
//! the answer by a futex, a moment at a time, and looks at its control channel in between, so
//! a worker that must first finish slow I/O never makes the process deaf.
//!
//! Beside the orders there are [`Signals`], which need no answer and can be given at any
//! time, even while an order is outstanding: "look again", "pause", "go on".

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::inflight::InflightRing;
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
    /// Where requests in flight are logged, so that a later process can take over.
    pub inflight: Option<InflightRing>,
}

/// An order to a worker.
#[derive(Debug)]
pub enum Order {
    /// Serve this ring, from its base on.
    Start(Box<RingSetup>),
    /// Take no more requests, finish those in flight, then say where to go on.
    Stop,
    /// Finish what is in flight, then go on with the same ring in this memory; at once, if it
    /// extends the one before. The old snapshot is let go before the answer.
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
    /// Grows with each answer.
    answers: AtomicU32,
    refresh: AtomicBool,
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
    fence: Option<OwnedFd>,
}

impl WorkerPort {
    /// Becomes readable when there is an order, or something to look at again.
    pub fn wakeup(&self) -> &File {
        &self.shared.wakeup
    }

    /// Takes the order, if there is one. Empties the eventfd first, so that an order that
    /// arrives meanwhile fires it again. To be called each time that the wakeup fires, and
    /// [`Self::take_refresh`] after it: one wakeup may stand for both.
    pub fn take(&self) -> Option<Order> {
        sys::drain(&self.shared.wakeup);
        #[cfg(feature = "hostile")]
        crate::hostile::strike_as_worker();
        self.status.pause.look();
        self.shared.lock().order.take()
    }

    /// Whether the device was updated, paused or resumed since the last call: then the
    /// worker looks again at whatever it shares with its device (limits, sizes), and for
    /// requests in its ring.
    pub fn take_refresh(&self) -> bool {
        self.shared.refresh.load(Ordering::Relaxed)
            && self.shared.refresh.swap(false, Ordering::AcqRel)
    }

    /// Whether the worker must not take new requests. [`ActiveRing`] sees to that by itself:
    /// its `pop` finds nothing new meanwhile. A worker that takes its work from elsewhere
    /// too (a tap) asks here.
    ///
    /// [`ActiveRing`]: crate::active::ActiveRing
    pub fn paused(&self) -> bool {
        self.status.pause.look()
    }

    /// The write end of the fence, if this process has one. A worker with a ring in io_uring
    /// takes it, registers it there as a fixed file and closes it, all before it says that it
    /// is prepared: then the fence falls when the kernel has ended the ring's last
    /// operation, and not before. Left here, it falls when the process is gone, which is
    /// right for a worker whose I/O is all in system calls of its own.
    pub fn take_fence(&mut self) -> Option<OwnedFd> {
        self.fence.take()
    }

    /// How others wake this worker.
    pub fn signals(&self) -> Signals {
        Signals {
            shared: Arc::clone(&self.shared),
            status: Arc::clone(&self.status),
        }
    }

    /// Answers the last order; each order gets exactly one answer.
    pub fn answer(&self, answer: Answer) {
        self.shared.lock().answer = Some(answer);
        self.shared.answers.fetch_add(1, Ordering::Release);
        sys::wake(&self.shared.answers);
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

/// What may be told to a worker at any time.
#[derive(Clone, Debug)]
pub struct Signals {
    shared: Arc<Shared>,
    status: Arc<QueueStatus>,
}

impl Signals {
    /// Makes the worker look again at what it shares with its device.
    pub fn refresh(&self) {
        self.shared.refresh.store(true, Ordering::Release);
        sys::signal(&self.shared.wakeup);
    }

    /// Takes no new requests from now on; what is in flight goes on.
    pub fn pause(&self) {
        self.status.pause.set(true);
        self.refresh();
    }

    /// Takes requests again.
    pub fn resume(&self) {
        self.status.pause.set(false);
        self.refresh();
    }

    /// Health and counters of the queue.
    pub fn status(&self) -> &Arc<QueueStatus> {
        &self.status
    }
}

/// The main thread's end.
#[derive(Debug)]
pub struct WorkerHandle {
    shared: Arc<Shared>,
    status: Arc<QueueStatus>,
}

impl WorkerHandle {
    /// The signals of this worker, to be given from elsewhere on the main thread.
    pub fn signals(&self) -> Signals {
        Signals {
            shared: Arc::clone(&self.shared),
            status: Arc::clone(&self.status),
        }
    }

    /// See [`Signals::refresh`].
    pub fn refresh(&self) {
        self.signals().refresh();
    }

    /// See [`Signals::pause`].
    pub fn pause(&self) {
        self.signals().pause();
    }

    /// See [`Signals::resume`].
    pub fn resume(&self) {
        self.signals().resume();
    }

    /// Gives an order. The answer to the one before must have been taken.
    pub fn order(&self, order: Order) {
        {
            let mut slots = self.shared.lock();
            slots.answer = None;
            slots.order = Some(order);
        }
        sys::signal(&self.shared.wakeup);
    }

    /// Sleeps until there is an answer, or the time is over; may return early.
    pub fn wait_answer(&self, milliseconds: u16) {
        let answers = self.shared.answers.load(Ordering::Acquire);
        if self.shared.lock().answer.is_none() {
            sys::sleep_while(&self.shared.answers, answers, milliseconds);
        }
    }

    /// Whether there is an answer.
    pub fn has_answer(&self) -> bool {
        self.shared.lock().answer.is_some()
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
    fenced_mailbox(index, None)
}

/// A mailbox, with a copy of the write end of the fence for the worker.
pub(crate) fn fenced_mailbox(
    index: u16,
    fence: Option<OwnedFd>,
) -> io::Result<(WorkerHandle, WorkerPort)> {
    let shared = Arc::new(Shared {
        slots: Mutex::default(),
        wakeup: sys::eventfd()?,
        answers: AtomicU32::new(0),
        refresh: AtomicBool::new(false),
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
            fence,
        },
    ))
}
