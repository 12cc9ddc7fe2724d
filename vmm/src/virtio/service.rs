//! The function's own thread: makes the register accesses for which the back-end is asked,
//! brings successors of the back-end in, and for a network device whose back-end is somebody
//! else's takes its link up and down and serves its control queue. It may wait for the back-end,
//! within deadlines.
//!
//! A vCPU thread never speaks to a back-end: its filter has no call for it. It hands such an
//! access over ([`Service::make`]), holding no lock, and waits until it is made.
//!
//! Made with the function, confined before it does anything, and ends with it: it holds
//! the function only while it works.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::DEFAULT_MESSAGE_TIMEOUT;
use super::function::VirtioPciFunction;
use super::succession::{ReconnectError, Reconnected};
use crate::threads;
use crate::vhost_user::Frontend;

type Finished = Result<Reconnected, ReconnectError>;

const WAKE: u64 = 0;
const CONTROL: u64 = 1;

/// Widest access of a guest, in bytes.
pub const WIDEST: usize = 8;

/// A register access that a vCPU thread hands over.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    /// Of so many bytes at this offset of BAR 0.
    Read(u64, usize),
    /// Of the first so many bytes.
    Write(u64, usize, [u8; WIDEST]),
    /// The bus is reset.
    BusReset,
    /// The machine is reset.
    PowerOn,
}

/// An access that waits, and its answer.
struct Errand {
    access: Access,
    answer: Mutex<Option<[u8; WIDEST]>>,
    made: Condvar,
}

impl Errand {
    fn answer(&self, bytes: [u8; WIDEST]) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
        self.made.notify_one();
    }

    fn wait(&self) -> [u8; WIDEST] {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(bytes) = *answer {
                return bytes;
            }
            answer = self
                .made
                .wait(answer)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[derive(Default)]
struct Desk {
    /// At most one of each vCPU.
    errands: VecDeque<Arc<Errand>>,
    /// A successor that waits to be brought in.
    next: Option<UnixStream>,
    /// One is being brought in, or its end has not been taken note of.
    busy: bool,
    finished: Option<Finished>,
    closed: bool,
}

struct Shared {
    desk: Mutex<Desk>,
    /// Both are the VMM's alone: no write to them can wait.
    wake: OwnedFd,
    done: Arc<OwnedFd>,
}

/// The function's side of its thread.
pub struct Service {
    shared: Arc<Shared>,
}

impl Service {
    /// Without its thread yet.
    pub fn new() -> std::io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        Ok(Self {
            shared: Arc::new(Shared {
                desk: Mutex::default(),
                wake: event()?,
                done: Arc::new(event()?),
            }),
        })
    }

    /// Starts the thread.
    pub fn start(&self, function: &Arc<VirtioPciFunction>) -> std::io::Result<()> {
        let epoll = Epoll::new()?;
        watch(&epoll, &self.shared.wake, WAKE)?;
        let worker = Worker {
            function: Arc::downgrade(function),
            shared: Arc::clone(&self.shared),
            epoll,
            watched: Vec::new(),
        };
        let hook = Arc::clone(&function.options.hook);
        threads::spawn("device".to_owned(), hook, || Ok(()), move || worker.run())?;
        Ok(())
    }

    /// Signalled when [`take`](Self::take) has something.
    pub fn done(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.shared.done)
    }

    /// Has the thread make an access, and waits for it: the back-end has until the function's
    /// deadline. Zeroes once the thread has ended.
    pub fn make(&self, access: Access) -> [u8; WIDEST] {
        self.begin(access)()
    }

    /// Has the thread make an access; who calls what comes back waits for the answer.
    pub fn begin(&self, access: Access) -> impl FnOnce() -> [u8; WIDEST] + Send + use<> {
        let errand = Arc::new(Errand {
            access,
            answer: Mutex::default(),
            made: Condvar::new(),
        });
        {
            let mut desk = self.shared.lock();
            if desk.closed {
                errand.answer([0; WIDEST]);
            } else {
                desk.errands.push_back(Arc::clone(&errand));
            }
        }
        self.wake();
        move || errand.wait()
    }

    /// Hands a successor in; false while another one is being brought in.
    pub fn submit(&self, socket: UnixStream) -> bool {
        {
            let mut desk = self.shared.lock();
            if desk.busy || desk.closed {
                return false;
            }
            desk.busy = true;
            desk.next = Some(socket);
        }
        self.wake();
        true
    }

    /// What became of it, once.
    pub fn take(&self) -> Option<Finished> {
        let mut desk = self.shared.lock();
        let finished = desk.finished.take();
        if finished.is_some() {
            desk.busy = false;
        }
        finished
    }

    /// Has the thread look at the function again.
    pub fn wake(&self) {
        signal(&self.shared.wake);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.wake();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker {
    function: Weak<VirtioPciFunction>,
    shared: Arc<Shared>,
    epoll: Epoll,
    /// The queues whose doorbells are watched.
    watched: Vec<u16>,
}

impl Worker {
    /// Makes the accesses that wait.
    fn make_accesses(&self, function: &VirtioPciFunction) {
        loop {
            let Some(errand) = self.shared.lock().errands.pop_front() else {
                return;
            };
            errand.answer(function.make(errand.access));
        }
    }

    fn run(mut self) {
        let mut ready = [EpollEvent::default(); 2];
        loop {
            match self.epoll.wait(-1, &mut ready) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("a device's own thread ends: {error}");
                    return;
                }
            }
            let next = {
                let mut desk = self.shared.lock();
                if desk.closed {
                    return;
                }
                desk.next.take()
            };
            // Dropping the last reference here is fine: nothing joins this thread.
            let Some(function) = self.function.upgrade() else {
                return;
            };
            self.make_accesses(&function);
            if let Some(socket) = next {
                // It is given its rings as the link is wanted by now.
                function.follow_carrier();
                let finished = bring_in(&function, socket);
                self.shared.lock().finished = Some(finished);
                signal(&self.shared.done);
            }
            function.follow_carrier();
            function.follow_stand_in();
            self.follow_queues(&function);
            if function.serve_control() || function.serve_stand_in() {
                signal(&self.shared.wake);
            }
        }
    }

    /// Watches the doorbells of the queues that this thread serves now. One may be shared with a
    /// back-end, so it is never read: each signal is an edge.
    fn follow_queues(&mut self, function: &VirtioPciFunction) {
        let wanted = function.own_queues();
        if wanted == self.watched {
            return;
        }
        for queue in self.watched.iter().filter(|q| !wanted.contains(q)) {
            let Some(kick) = function.doorbells.kick(*queue) else {
                continue;
            };
            let gone = EpollEvent::default();
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, kick.as_raw_fd(), gone);
        }
        for queue in wanted.iter().filter(|q| !self.watched.contains(q)) {
            if let Some(kick) = function.doorbells.kick(*queue)
                && let Err(error) = watch(&self.epoll, kick, CONTROL)
            {
                log::error!("queue {queue} is not served: {error}");
            }
        }
        self.watched = wanted;
    }
}

impl Drop for Worker {
    /// Nobody waits for a thread that has ended.
    fn drop(&mut self) {
        let left = {
            let mut desk = self.shared.lock();
            desk.closed = true;
            std::mem::take(&mut desk.errands)
        };
        for errand in left {
            errand.answer([0; WIDEST]);
        }
    }
}

fn bring_in(function: &VirtioPciFunction, socket: UnixStream) -> Finished {
    let frontend = Frontend::connect(socket, DEFAULT_MESSAGE_TIMEOUT)
        .map_err(|error| ReconnectError::Backend(function.options.id.clone(), error))?;
    function.reconnect(frontend)
}

fn watch(epoll: &Epoll, fd: impl AsFd, token: u64) -> std::io::Result<()> {
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
    epoll.ctl(ControlOperation::Add, fd.as_fd().as_raw_fd(), event)
}

fn signal(event: &OwnedFd) {
    // A full one is signalled already.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}
