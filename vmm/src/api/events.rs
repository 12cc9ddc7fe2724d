//! What happened to the machine, numbered, for the API's Events stream.
//!
//! Published from any thread; read by the `api` thread. A ring of a fixed number of events:
//! a subscriber keeps a position in it and no copy, so a slow one costs nothing, and one
//! that falls behind by more than the ring holds is told so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_proto::machine::{Event, EventGap, event::What};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::status::truncate;
use vmm_sys_util::eventfd::EventFd;

/// Events that are kept.
pub const CAPACITY: usize = 1024;
/// Longest kind and subject, and longest detail, in bytes; longer ones are cut.
const MAX_NAME: usize = 128;
const MAX_DETAIL: usize = 1024;
/// Processes whose pids are remembered: more than may run at a time, two for each device.
const MAX_PIDS: usize = 256;

struct Inner {
    /// Number of the event that `publish` makes next.
    next: u64,
    /// The newest events, encoded; the last has number `next - 1`.
    ring: VecDeque<Arc<[u8]>>,
    bells: Vec<Arc<EventFd>>,
    /// Pids of processes that run, by device and incarnation: who tells of their end often knows no
    /// more than those.
    pids: BTreeMap<(String, u64), i32>,
}

/// A bounded, numbered log of events. Numbers start at 1.
pub struct EventLog {
    inner: Mutex<Inner>,
    capacity: usize,
}

/// What is at a position of the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// An encoded `Event`.
    Event(Arc<[u8]>),
    /// It has not happened yet.
    NotYet,
    /// It is no longer kept; this is the oldest number that is.
    Gone(u64),
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLog {
    /// An empty log that keeps [`CAPACITY`] events.
    pub fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    pub(super) fn with_capacity(capacity: usize) -> Self {
        let inner = Inner {
            next: 1,
            ring: VecDeque::new(),
            bells: Vec::new(),
            pids: BTreeMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            capacity: capacity.max(1),
        }
    }

    /// Adds an event that happens now and returns its number. Waits for no client.
    ///
    /// `kind` is "machine.running", "device.ready", …; `subject` is what it is about, empty
    /// for the machine; `detail` is one line.
    pub fn publish(&self, kind: &str, subject: &str, detail: &str) -> u64 {
        self.publish_typed(kind, subject, detail, None)
    }

    /// The same with what programs need of it. Its texts are to be bounded. A process is named in
    /// the line, too; its pid is added where only its incarnation is given.
    pub fn publish_typed(
        &self,
        kind: &str,
        subject: &str,
        detail: &str,
        mut what: Option<What>,
    ) -> u64 {
        let mut event = Event::new();
        event.kind = bounded(kind, MAX_NAME);
        event.subject = bounded(subject, MAX_NAME);
        event.detail = bounded(detail, MAX_DETAIL);
        let mut inner = self.lock();
        if let Some(what) = &mut what {
            inner.add_pid(&event.subject, what);
            if let Some(name) = whose(what) {
                event.detail = match event.detail.as_str() {
                    "" => name,
                    detail => format!("{detail} ({name})"),
                };
            }
        }
        event.what = what;
        // Under the lock, so that times do not run backwards along the numbers.
        event.time_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            });
        event.sequence = inner.next;
        // Encoding flat strings and numbers into memory does not fail; if it did, the
        // number must exist all the same.
        let encoded = event.write_to_bytes().unwrap_or_default();
        if inner.ring.len() >= self.capacity {
            inner.ring.pop_front();
        }
        inner.ring.push_back(encoded.into());
        inner.next = inner.next.saturating_add(1);
        for bell in &inner.bells {
            // Private to this process and non-blocking.
            let _ = bell.write(1);
        }
        event.sequence
    }

    /// Rings `bell` for every event from now on.
    pub(super) fn attach(&self, bell: Arc<EventFd>) {
        self.lock().bells.push(bell);
    }

    pub(super) fn detach(&self, bell: &Arc<EventFd>) {
        self.lock().bells.retain(|other| !Arc::ptr_eq(other, bell));
    }

    /// Number of the oldest event that is kept, or of the next one if none is.
    pub(super) fn oldest(&self) -> u64 {
        self.lock().oldest()
    }

    pub(super) fn get(&self, sequence: u64) -> Lookup {
        let inner = self.lock();
        let oldest = inner.oldest();
        match sequence.checked_sub(oldest) {
            None => Lookup::Gone(oldest),
            Some(index) => usize::try_from(index)
                .ok()
                .and_then(|index| inner.ring.get(index))
                .map_or(Lookup::NotYet, |event| Lookup::Event(Arc::clone(event))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reader gets in the place of events that are no longer kept, encoded.
pub(super) fn gap(first: u64, oldest: u64) -> Vec<u8> {
    let mut gap = EventGap::new();
    (gap.first, gap.last) = (first, oldest.saturating_sub(1));
    let mut event = Event::new();
    event.sequence = gap.last;
    event.kind = "events.gap".into();
    event.detail = format!("events {} to {} are no longer kept", gap.first, gap.last);
    event.set_gap(gap);
    // Flat strings and numbers: it does not fail.
    event.write_to_bytes().unwrap_or_default()
}

/// What a process is called in a line for people.
pub fn process_name(pid: i32, incarnation: u64) -> String {
    match pid {
        ..=0 => format!("incarnation {incarnation}"),
        pid => format!("pid {pid}, incarnation {incarnation}"),
    }
}

/// The name of the process that an event is about.
fn whose(what: &What) -> Option<String> {
    let (pid, incarnation) = match what {
        What::Spawned(e) => (e.pid, e.incarnation),
        What::Ready(e) => (e.pid, e.incarnation),
        What::Restarted(e) => (e.pid, e.incarnation),
        What::Updated(e) => (e.pid, e.incarnation),
        What::Crashed(e) => (e.pid, e.incarnation),
        What::Exited(e) => (e.pid, e.incarnation),
        _ => return None,
    };
    Some(process_name(pid, incarnation))
}

impl Inner {
    /// Remembers a process that is new, and names the pid of one that is told of later.
    fn add_pid(&mut self, subject: &str, what: &mut What) {
        let key = |incarnation| (subject.to_owned(), incarnation);
        match what {
            What::Spawned(e) => {
                if self.pids.len() >= MAX_PIDS {
                    self.pids.pop_first();
                }
                self.pids.insert(key(e.incarnation), e.pid);
            }
            What::Crashed(e) => {
                e.pid = self.pids.get(&key(e.incarnation)).copied().unwrap_or(0);
            }
            What::Exited(e) => e.pid = self.pids.remove(&key(e.incarnation)).unwrap_or(0),
            _ => {}
        }
    }

    fn oldest(&self) -> u64 {
        self.next.saturating_sub(self.ring.len() as u64)
    }
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLog")
            .field("next", &self.lock().next)
            .finish_non_exhaustive()
    }
}

fn bounded(text: &str, max: usize) -> String {
    let mut text = text.to_owned();
    truncate(&mut text, max);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(log: &EventLog, sequence: u64) -> Option<String> {
        match log.get(sequence) {
            Lookup::Event(bytes) => {
                let event = Event::parse_from_bytes(&bytes).unwrap();
                assert_eq!(event.sequence, sequence);
                Some(event.kind)
            }
            _ => None,
        }
    }

    #[test]
    fn numbers_start_at_one_and_the_oldest_events_go_first() {
        let log = EventLog::with_capacity(3);
        assert_eq!(log.get(1), Lookup::NotYet);
        assert_eq!(log.get(0), Lookup::Gone(1));
        for n in 1..=5 {
            assert_eq!(log.publish(&format!("k{n}"), "", ""), n);
        }
        assert_eq!(log.oldest(), 3);
        assert_eq!(log.get(2), Lookup::Gone(3));
        assert_eq!(kind_of(&log, 3).as_deref(), Some("k3"));
        assert_eq!(kind_of(&log, 5).as_deref(), Some("k5"));
        assert_eq!(log.get(6), Lookup::NotYet);
        assert_eq!(log.get(u64::MAX), Lookup::NotYet);
    }

    #[test]
    fn what_programs_need_is_kept_as_it_was_told() {
        let log = EventLog::new();
        let mut crashed = bulkhead_proto::machine::DeviceCrashed::new();
        (crashed.signal, crashed.what) = (9, "x".into());
        let what = Some(What::Crashed(crashed.clone()));
        let number = log.publish_typed("device.crashed", "d", "signal: 9", what);
        let Lookup::Event(bytes) = log.get(number) else {
            panic!("it was just published")
        };
        let event = Event::parse_from_bytes(&bytes).unwrap();
        assert_eq!(*event.crashed(), crashed);
    }

    #[test]
    fn a_process_is_named_from_its_start_to_its_end() {
        use crate::launcher::ExitOutcome;
        use crate::machine::supervise::CrashReason;
        use crate::machine::told;
        let log = EventLog::new();
        let told = |kind: &str, detail: &str, what: What| {
            let number = log.publish_typed(kind, "d", detail, Some(what));
            let Lookup::Event(bytes) = log.get(number) else {
                panic!("it was just published")
            };
            Event::parse_from_bytes(&bytes).unwrap()
        };
        let event = told("device.spawned", "", told::spawned(12, 3));
        assert_eq!(event.detail, "pid 12, incarnation 3");
        let reason = CrashReason::Signal(9);
        let event = told("device.crashed", "signal: 9", told::crashed(3, &reason));
        assert_eq!(event.detail, "signal: 9 (pid 12, incarnation 3)");
        assert_eq!(event.crashed().pid, 12);
        let outcome = ExitOutcome::Signal(9);
        let event = told("device.exited", "signal 9", told::exited(3, &outcome));
        assert_eq!(event.detail, "signal 9 (pid 12, incarnation 3)");
        assert_eq!(event.exited().pid, 12);
        // Its number is another's from then on; and nobody knows it of one that was never told.
        for incarnation in [3, 4] {
            let event = told("device.exited", "", told::exited(incarnation, &outcome));
            assert_eq!(event.detail, format!("incarnation {incarnation}"));
            assert_eq!(event.exited().pid, 0);
        }
        for n in 0..2000 {
            told("device.spawned", "", told::spawned(1, n));
        }
        assert_eq!(log.lock().pids.len(), MAX_PIDS);
    }

    #[test]
    fn long_details_are_cut() {
        let log = EventLog::new();
        let number = log.publish("k", "s", &"x".repeat(1 << 20));
        let Lookup::Event(bytes) = log.get(number) else {
            panic!("it was just published")
        };
        assert!(bytes.len() < 2 * MAX_DETAIL);
    }
}
