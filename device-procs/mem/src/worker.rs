//! The worker of the one queue: takes the guest's requests one after another, answers what it
//! can, and asks the VMM for the rest. A request that waits for the VMM is put back into the
//! ring meanwhile, so that an order of the main thread never finds one in flight: the VMM may
//! have to change the memory table for it first.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerPort};
use bulkhead_runtime::sys::{self, PollFd};

use crate::desk::{Desk, Progress};
use crate::request::{self, Request, Response};

/// Least time between two requests to the VMM, which takes a flood of them for an attack.
const PACE: Duration = Duration::from_millis(4);
/// Requests answered before orders are looked at.
const BATCH: u32 = 64;

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// There may be more.
    More,
    /// A kick.
    Kick,
    /// The VMM's answer, which comes as an order does.
    Vmm,
    /// The time to ask it.
    Pace(Duration),
}

/// The worker.
pub struct Worker {
    port: WorkerPort,
    desk: Arc<Desk>,
    bell: Arc<File>,
    ring: Option<ActiveRing>,
    chain: Chain,
    last_asked: Option<Instant>,
}

impl Worker {
    /// A worker without a ring.
    pub fn new(port: WorkerPort, desk: Arc<Desk>, bell: Arc<File>) -> Self {
        Self {
            port,
            desk,
            bell,
            ring: None,
            chain: Chain::new(),
            last_asked: None,
        }
    }

    /// Serves for ever.
    pub fn run(mut self) -> ! {
        loop {
            let next = self.serve();
            self.wait(next);
        }
    }

    fn serve(&mut self) -> Next {
        let Some(ring) = &mut self.ring else {
            return Next::Kick;
        };
        let mut next = Next::More;
        for _ in 0..BATCH {
            let Some(head) = ring.pop(&mut self.chain) else {
                next = if ring.enable_kicks() {
                    Next::More
                } else {
                    Next::Kick
                };
                break;
            };
            let memory = Arc::clone(ring.memory());
            let Some(request) = request::read(&self.chain, &memory) else {
                ring.reject(head, &"no request of a memory device");
                break;
            };
            let (response, state) = match request {
                Request::Unknown => (Response::Error, 0),
                Request::State(address, count) => {
                    match self.desk.with(|state| state.look(address, count)) {
                        Some(state) => (Response::Ack, state),
                        None => (Response::Error, 0),
                    }
                }
                Request::Change(wish) => match self.desk.with(|state| state.ask(wish)) {
                    None => (Response::Error, 0),
                    Some(wanted) => {
                        if !self.desk.asks()
                            && let Some(left) = pace(self.last_asked)
                            && !self.desk.is_answered(&wanted)
                        {
                            ring.unpop(head);
                            next = Next::Pace(left);
                            break;
                        }
                        match self.desk.want(&wanted) {
                            Progress::Answered(response) => (response, 0),
                            progress => {
                                ring.unpop(head);
                                if progress == Progress::Asked {
                                    self.last_asked = Some(Instant::now());
                                    sys::signal(&self.bell);
                                    self.port.status().syscalls.add(1);
                                }
                                next = Next::Vmm;
                                break;
                            }
                        }
                    }
                },
            };
            let bytes = response.encode(state);
            if request::answer(&self.chain, &memory, &bytes) {
                ring.complete(head, u32::try_from(bytes.len()).unwrap_or(0));
                self.port.status().requests.add(1);
                if response != Response::Ack {
                    self.port.status().errors.add(1);
                }
            } else {
                ring.reject(head, &"no room for the answer");
                break;
            }
        }
        ring.flush();
        next
    }

    /// Sleeps until there is something to do; then obeys an order.
    fn wait(&mut self, next: Next) {
        self.port.status().syscalls.add(1);
        let timeout = match next {
            Next::More => 0,
            Next::Kick | Next::Vmm => -1,
            Next::Pace(left) => i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(1),
        };
        let kick = match (&self.ring, next) {
            // With one request before the VMM, a kick would change nothing.
            (Some(ring), Next::Kick | Next::More) if !ring.is_broken() => {
                Some(Arc::clone(ring.kick()))
            }
            _ => None,
        };
        let mut fds = [
            PollFd::new(self.port.wakeup().as_fd(), libc::POLLIN),
            kick.as_ref()
                .map_or_else(PollFd::none, |k| PollFd::new(k.as_fd(), libc::POLLIN)),
        ];
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut fds, timeout);
        let [ordered, kicked] = fds;
        if let Some(kick) = kick
            && kicked.revents() != 0
        {
            self.port.status().kicks.add(1);
            let mut count = [0; 8];
            let sound =
                kicked.revents() & libc::POLLIN != 0 && matches!((&*kick).read(&mut count), Ok(8));
            if let (false, Some(ring)) = (sound, &mut self.ring) {
                ring.break_because(&"the kick descriptor is no eventfd");
            }
        }
        if ordered.revents() != 0 {
            if let Some(order) = self.port.take() {
                let answer = self.obey(order);
                self.port.answer(answer);
            }
            self.port.take_refresh();
        }
    }

    /// Carries out an order. Nothing is ever in flight between requests.
    fn obey(&mut self, order: Order) -> Answer {
        match order {
            Order::Start(setup) => {
                self.desk.forget_outcome();
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

/// How long to wait before the VMM may be asked again.
fn pace(last: Option<Instant>) -> Option<Duration> {
    PACE.checked_sub(last?.elapsed())
        .filter(|left| !left.is_zero())
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
