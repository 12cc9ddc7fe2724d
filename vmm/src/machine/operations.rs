//! What became of each operation (a device or vCPUs that come and go, another size of memory), by
//! its number, and clients that wait for one to end. Manager thread only.
//!
//! All that have not ended are known, and the newest that have.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bulkhead_proto::machine::{OperationInfo, OperationsResponse, operation_info};
use bulkhead_proto::status::truncate;
use bulkhead_proto::{Code, RpcStatus};

use crate::api::{ApiResponse, ReplyHandle};

/// Operations that have ended and are kept: an answer with all of them is shorter than one may be.
const KEPT: usize = 256;
/// Most calls that wait for one's end: fewer than what clients may have in hand together.
const MOST_WAITS: usize = 32;
/// Longest line of one, bytes.
const MAX_LINE: usize = 512;

/// A client that waits.
struct Wait {
    operation: u64,
    until: Instant,
    reply: ReplyHandle,
}

/// All operations.
#[derive(Default)]
pub struct Operations {
    last: u64,
    open: BTreeMap<u64, OperationInfo>,
    /// By their end.
    ended: VecDeque<OperationInfo>,
    /// One of these, or one before, is the newest that is not kept.
    forgotten: u64,
    waits: Vec<Wait>,
}

impl Operations {
    /// The number of a new one.
    pub fn new_number(&mut self) -> u64 {
        self.last = self.last.saturating_add(1);
        self.last
    }

    /// One has begun.
    pub fn begin(&mut self, operation: u64, subject: &str, what: &str) {
        let mut info = OperationInfo::new();
        info.operation = operation;
        info.subject = line(subject);
        info.what = line(what);
        info.state = operation_info::State::RUNNING.into();
        info.began_ns = now_ns();
        self.open.insert(operation, info);
    }

    /// It has begun, and not ended.
    pub fn is_open(&self, operation: u64) -> bool {
        self.open.contains_key(&operation)
    }

    /// It has ended. Who waits for it is told.
    pub fn end(&mut self, operation: u64, result: Result<&str, &str>) {
        let Some(mut info) = self.open.remove(&operation) else {
            return;
        };
        let (state, detail) = match result {
            Ok(how) => (operation_info::State::DONE, how),
            Err(why) => (operation_info::State::FAILED, why),
        };
        info.state = state.into();
        info.detail = line(detail);
        info.ended_ns = now_ns();
        if self.ended.len() >= KEPT
            && let Some(oldest) = self.ended.pop_front()
        {
            self.forgotten = self.forgotten.max(oldest.operation);
        }
        let (waited, waits) = std::mem::take(&mut self.waits)
            .into_iter()
            .partition(|wait| wait.operation == operation);
        self.waits = waits;
        for wait in waited {
            answer(wait.reply, &info);
        }
        self.ended.push_back(info);
    }

    /// Those that have not ended, and what they are about.
    pub fn open(&self) -> Vec<(u64, String)> {
        let open = self.open.values();
        open.map(|info| (info.operation, info.subject.clone()))
            .collect()
    }

    /// A client asks what became of one, and waits for its end until then.
    pub fn ask(&mut self, operation: u64, until: Option<Instant>, reply: ReplyHandle) {
        if let Some(info) = self.open.get(&operation) {
            let Some(until) = until else {
                return answer(reply, info);
            };
            self.waits.retain(|wait| !wait.reply.is_abandoned());
            if self.waits.len() >= MOST_WAITS {
                let line = format!(
                    "{MOST_WAITS} calls wait for operations: ask without a wait, or watch the events"
                );
                return reply.complete(Err(RpcStatus::new(Code::ResourceExhausted, line)));
            }
            return self.waits.push(Wait {
                operation,
                until,
                reply,
            });
        }
        match self.ended.iter().find(|info| info.operation == operation) {
            Some(info) => answer(reply, info),
            None => reply.complete(Err(self.unknown(operation))),
        }
    }

    fn unknown(&self, operation: u64) -> RpcStatus {
        match operation {
            1.. if operation <= self.forgotten => RpcStatus::new(
                Code::OutOfRange,
                format!(
                    "operation {operation} ended so long ago that it is no longer kept: see Events, or what it was about"
                ),
            ),
            _ => RpcStatus::new(
                Code::NotFound,
                format!(
                    "there has been no operation {operation}: the last one is {}: see Operations",
                    self.last
                ),
            ),
        }
    }

    /// When somebody has waited long enough.
    pub fn timer(&self) -> Option<Instant> {
        self.waits.iter().map(|wait| wait.until).min()
    }

    /// Tells those who have waited long enough how far it is. True: there were none.
    pub fn look(&mut self, now: Instant) -> bool {
        let (late, waits): (Vec<Wait>, Vec<Wait>) = std::mem::take(&mut self.waits)
            .into_iter()
            .partition(|wait| wait.until <= now);
        self.waits = waits;
        let none = late.is_empty();
        for wait in late {
            self.ask(wait.operation, None, wait.reply);
        }
        none
    }

    /// All that are known, in their order: of one subject, or of those that run, if so wanted.
    pub fn list(&self, subject: &str, running: bool) -> OperationsResponse {
        let mut response = OperationsResponse::new();
        let ended = self.ended.iter().filter(|_| !running);
        let all = ended.chain(self.open.values());
        let wanted = all.filter(|info| subject.is_empty() || info.subject == subject);
        response.operations = wanted.cloned().collect();
        response.operations.sort_by_key(|info| info.operation);
        response
    }
}

fn answer(reply: ReplyHandle, info: &OperationInfo) {
    reply.complete(Ok(ApiResponse::Operation(Box::new(info.clone()))));
}

fn line(text: &str) -> String {
    let mut text = text.to_owned();
    truncate(&mut text, MAX_LINE);
    text
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::protobuf::Message;
    use operation_info::State;
    use std::sync::mpsc;
    use std::time::Duration;

    type Answer = Result<ApiResponse, RpcStatus>;

    fn asks(
        operations: &mut Operations,
        operation: u64,
        until: Option<Instant>,
    ) -> mpsc::Receiver<Answer> {
        let (sender, receiver) = mpsc::channel();
        let reply = ReplyHandle::new(Instant::now(), move |outcome| {
            let _ = sender.send(outcome);
        });
        operations.ask(operation, until, reply);
        receiver
    }

    fn state(answer: &mpsc::Receiver<Answer>) -> Option<State> {
        match answer.try_recv().ok()? {
            Ok(ApiResponse::Operation(info)) => info.state.enum_value().ok(),
            other => panic!("{other:?}"),
        }
    }

    fn code(answer: &mpsc::Receiver<Answer>) -> Code {
        answer.try_recv().unwrap().unwrap_err().code
    }

    #[test]
    fn one_is_asked_for_and_waited_for_as_often_as_one_likes() {
        let mut operations = Operations::default();
        assert_eq!(operations.new_number(), 1);
        operations.begin(1, "data", "add");
        assert_eq!(state(&asks(&mut operations, 1, None)), Some(State::RUNNING));
        let far = Instant::now() + Duration::from_secs(3600);
        let waiting = [
            asks(&mut operations, 1, Some(far)),
            asks(&mut operations, 1, Some(far)),
        ];
        assert_eq!(operations.timer(), Some(far));
        assert!(operations.look(Instant::now()));
        assert_eq!(state(&waiting[0]), None);
        assert!(operations.is_open(1));
        operations.end(1, Ok("added behind hp1"));
        operations.end(1, Err("twice"));
        assert!(!operations.is_open(1));
        for waiting in &waiting {
            assert_eq!(state(waiting), Some(State::DONE));
        }
        assert_eq!(operations.timer(), None);
        for until in [None, Some(far)] {
            assert_eq!(state(&asks(&mut operations, 1, until)), Some(State::DONE));
        }
    }

    #[test]
    fn who_has_waited_long_enough_is_told_how_far_it_is() {
        let mut operations = Operations::default();
        let operation = operations.new_number();
        operations.begin(operation, "data", "remove");
        let now = Instant::now();
        let waiting = asks(&mut operations, operation, Some(now));
        assert!(!operations.look(now));
        assert_eq!(state(&waiting), Some(State::RUNNING));
        operations.end(operation, Err("the guest kept it"));
        let list = operations.list("data", false);
        assert_eq!(list.operations[0].state, State::FAILED.into());
        assert_eq!(list.operations[0].detail, "the guest kept it");
        assert!(operations.list("data", true).operations.is_empty());
        assert!(operations.list("other", false).operations.is_empty());
    }

    #[test]
    fn the_oldest_are_forgotten_and_said_to_be() {
        let mut operations = Operations::default();
        let slow = operations.new_number();
        operations.begin(slow, "slow", "add");
        for _ in 0..KEPT + 1 {
            let operation = operations.new_number();
            operations.begin(operation, &"s".repeat(9999), &"w".repeat(9999));
            operations.end(operation, Err(&"d".repeat(9999)));
        }
        let list = operations.list("", false);
        assert_eq!(list.operations.len(), KEPT + 1);
        assert_eq!(list.operations[0].operation, slow, "it has not ended");
        assert!(list.compute_size() < 400 << 10, "it fits into an answer");
        assert_eq!(
            code(&asks(&mut operations, slow + 1, None)),
            Code::OutOfRange
        );
        assert_eq!(code(&asks(&mut operations, 0, None)), Code::NotFound);
        assert_eq!(code(&asks(&mut operations, 9999, None)), Code::NotFound);
    }
}
