//! The worker of the one queue: takes the guest's requests one after another, answers what it
//! can, and asks the VMM for the rest. A request that waits for the VMM is put back into the
//! ring meanwhile, so that an order of the main thread never finds one in flight: the VMM may
//! have to change the memory table for it first.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::seat::{Seat, Wait};
use bulkhead_runtime::status::Sleep;
use bulkhead_runtime::sys;

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
    seat: Seat,
    desk: Arc<Desk>,
    bell: Arc<File>,
    chain: Chain,
    last_asked: Option<Instant>,
}

impl Worker {
    /// A worker without a ring.
    pub fn new(port: WorkerPort, desk: Arc<Desk>, bell: Arc<File>) -> Self {
        Self {
            seat: Seat::new(port),
            desk,
            bell,
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
        let Some(ring) = &mut self.seat.ring else {
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
                                    self.seat.port.status().syscalls.add(1);
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
                self.seat.port.status().requests.add(1);
                if response != Response::Ack {
                    self.seat.port.status().errors.add(1);
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
        let (kick, limit, why) = match next {
            Next::More => (true, Some(Duration::ZERO), Sleep::Idle),
            Next::Kick => (true, None, Sleep::Idle),
            // With one request before the VMM, a kick would change nothing.
            Next::Vmm => (false, None, Sleep::ForHost),
            Next::Pace(left) => (false, Some(left), Sleep::ByOrder),
        };
        let desk = &self.desk;
        let wait = Wait { kick, limit, why };
        self.seat.wait(wait, || desk.forget_outcome());
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
