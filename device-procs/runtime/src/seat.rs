//! The place of a ring in a worker that has nothing in flight between requests: it sleeps in
//! ppoll on the ring's kick and on the main thread's orders, and obeys those. A worker of several
//! rings, or of sockets beside them, sleeps by itself, and has a seat for each ring.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::active::ActiveRing;
use crate::mailbox::{Answer, Order, WorkerPort};
use crate::status::Sleep;
use crate::sys::{self, PollFd};

/// A worker's port, and its ring while it has one.
pub struct Seat {
    /// To the main thread.
    pub port: WorkerPort,
    /// The ring that is served.
    pub ring: Option<ActiveRing>,
}

/// What to wait for, beside orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// A kick: where one would change nothing, it is left alone.
    pub kick: bool,
    /// So long at most; `None`: for ever.
    pub limit: Option<Duration>,
    /// Why requests in the ring may have to wait meanwhile.
    pub why: Sleep,
}

impl Seat {
    /// One without a ring.
    pub fn new(port: WorkerPort) -> Self {
        Self { port, ring: None }
    }

    /// Sleeps until there is something to do; then obeys an order, if there is one.
    /// `starting` is called before a ring is begun.
    pub fn wait(&mut self, wait: Wait, starting: impl FnOnce()) {
        self.port.status().syscalls.add(1);
        let timeout = wait.limit.map_or(-1, |left| {
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let kick = wait.kick.then(|| self.kick()).flatten();
        let mut fds = [
            PollFd::new(self.port.wakeup().as_fd(), libc::POLLIN),
            kick.as_ref()
                .map_or_else(PollFd::none, |k| PollFd::new(k.as_fd(), libc::POLLIN)),
        ];
        self.port.status().sleeps(wait.why);
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut fds, timeout);
        self.port.status().sleeps(Sleep::Idle);
        let [ordered, kicked] = fds;
        if let Some(kick) = kick
            && kicked.revents() != 0
        {
            self.drain(&kick, kicked.revents());
        }
        if ordered.revents() != 0 {
            self.order(starting);
        }
    }

    /// The kick of its ring, if anything would come of it.
    pub fn kick(&self) -> Option<Arc<File>> {
        let ring = self.ring.as_ref().filter(|ring| !ring.is_broken())?;
        Some(Arc::clone(ring.kick()))
    }

    /// Empties a kick on which ppoll has told these events.
    pub fn drain(&mut self, mut kick: &File, events: i16) {
        self.port.status().kicks.add(1);
        let mut count = [0; 8];
        let sound = events & libc::POLLIN != 0 && matches!(kick.read(&mut count), Ok(8));
        if let (false, Some(ring)) = (sound, &mut self.ring) {
            ring.break_because(&"the kick descriptor is no eventfd");
        }
    }

    /// Obeys an order, if there is one. `starting` is called before a ring is begun.
    pub fn order(&mut self, starting: impl FnOnce()) {
        if let Some(order) = self.port.take() {
            let answer = self.obey(order, starting);
            self.port.answer(answer);
        }
        self.port.take_refresh();
    }

    fn obey(&mut self, order: Order, starting: impl FnOnce()) -> Answer {
        match order {
            Order::Start(setup) => {
                starting();
                match ActiveRing::start(*setup, self.port.index(), self.port.status()) {
                    Ok(ring) => {
                        self.ring = Some(ring);
                        Answer::Done
                    }
                    Err(why) => Answer::Refused(why.to_string()),
                }
            }
            Order::Stop => Answer::Stopped {
                next_avail: self.ring.take().map(ActiveRing::stop),
            },
            Order::Memory(memory) => match self.ring.as_mut().map(|r| r.swap_memory(memory)) {
                Some(Err(why)) => Answer::Refused(why.to_string()),
                _ => Answer::Done,
            },
            Order::Call(call) => {
                if let Some(ring) = &mut self.ring {
                    ring.set_call(call);
                }
                Answer::Done
            }
            Order::Err(err) => {
                if let Some(ring) = &mut self.ring {
                    ring.set_err(err);
                }
                Answer::Done
            }
        }
    }
}
