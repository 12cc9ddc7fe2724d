//! Where the worker leaves what it wants of the VMM, and finds what came of it. The main thread
//! serves the other side, by the control channel.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::finish_request_request::Outcome;
use bulkhead_proto::device::{FinishRequestRequest, MemRequest, TakeRequestResponse};

use crate::request::Response;
use crate::state::State;

/// What both sides see.
#[derive(Debug)]
pub struct Desk {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    last: u64,
    /// What is wanted and not done.
    wanted: Option<(u64, MemRequest)>,
    /// What came of it, until the worker has seen it.
    outcome: Option<(MemRequest, Response)>,
}

/// What the worker finds when it wants something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Newly asked: the bell must be rung.
    Asked,
    /// The VMM is at it, or at something else still.
    Waiting,
    /// It has answered just that.
    Answered(Response),
}

impl Desk {
    /// An empty desk.
    pub fn new(state: State) -> Self {
        Self {
            inner: Mutex::new(Inner {
                state,
                last: 0,
                wanted: None,
                outcome: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the memory, to look at or to change.
    pub fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.lock().state)
    }

    /// The worker wants this; asked again until it is answered.
    pub fn want(&self, request: &MemRequest) -> Progress {
        let mut inner = self.lock();
        if inner.wanted.is_some() {
            return Progress::Waiting;
        }
        match inner.outcome.take() {
            Some((done, response)) if done == *request => return Progress::Answered(response),
            // Of a request that the guest has taken back by a reset, or changed.
            _ => {}
        }
        inner.last = inner.last.saturating_add(1);
        inner.wanted = Some((inner.last, request.clone()));
        Progress::Asked
    }

    /// Whether [`Self::want`] would find an answer to just that.
    pub fn is_answered(&self, request: &MemRequest) -> bool {
        let inner = self.lock();
        let outcome = inner.outcome.as_ref();
        outcome.is_some_and(|(done, _)| done == request)
    }

    /// Nobody will ask for the outcome of what was wanted last.
    pub fn forget_outcome(&self) {
        self.lock().outcome = None;
    }

    /// Something is wanted and not done.
    pub fn asks(&self) -> bool {
        self.lock().wanted.is_some()
    }

    /// For TakeRequest.
    pub fn take(&self) -> TakeRequestResponse {
        let mut response = TakeRequestResponse::new();
        if let Some((id, request)) = &self.lock().wanted {
            response.id = *id;
            response.set_mem(request.clone());
        }
        response
    }

    /// For FinishRequest.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: that is not what is wanted, or no outcome.
    pub fn finish(&self, request: &FinishRequestRequest) -> Result<(), RpcStatus> {
        let invalid = |why: &str| Err(RpcStatus::invalid_argument(why));
        let mut inner = self.lock();
        let response = match request.outcome.enum_value() {
            Ok(Outcome::ACK) => Response::Ack,
            Ok(Outcome::NACK) => Response::Nack,
            Ok(Outcome::BUSY) => Response::Busy,
            Ok(Outcome::ERROR) => Response::Error,
            Ok(Outcome::UNKNOWN) | Err(_) => return invalid("outcome: give 1 to 4"),
        };
        let Some((_, wanted)) = inner.wanted.take_if(|(id, _)| *id == request.id) else {
            return invalid("id: there is no such request");
        };
        if response == Response::Ack {
            inner.state.done(&wanted);
        }
        inner.outcome = Some((wanted, response));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Wish;
    use crate::state::Area;

    const START: u64 = 4 << 30;
    const BLOCK: u64 = 2 << 20;

    fn desk() -> Desk {
        Desk::new(State::new(Area::new(START, 8 * BLOCK, BLOCK).unwrap()))
    }

    fn finish(desk: &Desk, id: u64, outcome: Outcome) -> bool {
        let mut request = FinishRequestRequest::new();
        (request.id, request.outcome) = (id, outcome.into());
        desk.finish(&request).is_ok()
    }

    #[test]
    fn a_request_is_asked_once_and_its_answer_found() {
        let desk = desk();
        let plug = desk.with(|s| s.ask(Wish::Plug(START, 2))).unwrap();
        assert_eq!(desk.take().id, 0);
        assert_eq!(desk.want(&plug), Progress::Asked);
        assert_eq!(desk.want(&plug), Progress::Waiting);
        assert_eq!((desk.take().id, desk.take().mem()), (1, &plug));
        assert!(!finish(&desk, 2, Outcome::ACK) && !finish(&desk, 1, Outcome::UNKNOWN));
        assert!(desk.asks() && finish(&desk, 1, Outcome::ACK) && !desk.asks());
        assert!(!finish(&desk, 1, Outcome::ACK), "twice");
        assert_eq!(desk.with(|s| s.look(START, 2)), Some(0));
        assert_eq!(desk.want(&plug), Progress::Answered(Response::Ack));
        assert_eq!(desk.want(&plug), Progress::Asked, "another one like it");
    }

    #[test]
    fn what_the_guest_took_back_is_done_and_answers_nothing_else() {
        let desk = desk();
        let plug = desk.with(|s| s.ask(Wish::Plug(START, 2))).unwrap();
        let all = desk.with(|s| s.ask(Wish::UnplugAll)).unwrap();
        assert_eq!(desk.want(&plug), Progress::Asked);
        assert_eq!(desk.want(&all), Progress::Waiting);
        assert!(finish(&desk, 1, Outcome::ACK));
        assert_eq!(desk.with(|s| s.look(START, 2)), Some(0));
        assert_eq!(desk.want(&all), Progress::Asked);
        assert!(finish(&desk, 2, Outcome::NACK));
        assert_eq!(desk.with(|s| s.look(START, 2)), Some(0), "nothing was done");
        assert_eq!(desk.want(&all), Progress::Answered(Response::Nack));
    }
}
