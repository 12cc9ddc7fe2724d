//! What happened to the machine, numbered, for the API's Events stream.
//!
//! Published from any thread; read by the `api` thread. A ring of a fixed number of events:
//! a subscriber keeps a position in it and no copy, so a slow one costs nothing, and one
//! that falls behind by more than the ring holds is told so.

use std::collections::VecDeque;
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
/// Processes whose pids are remembered: more than may run at a time.
const MAX_PIDS: usize = 256;
/// Processes that a device may have at a time: one that serves, and one on trial or on its way in.
const AT_A_TIME: usize = 2;

/// A process that was started and has not ended.
struct Running {
    device: String,
    incarnation: u64,
    pid: i32,
}

struct Inner {
    /// Number of the event that `publish` makes next.
    next: u64,
    /// The newest events, encoded; the last has number `next - 1`.
    ring: VecDeque<Arc<[u8]>>,
    bells: Vec<Arc<EventFd>>,
    /// Processes that run, in the order in which they were started: who tells of their end often
    /// knows no more than device and incarnation.
    running: VecDeque<Running>,
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
            running: VecDeque::new(),
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
    /// Remembers a process that is new, and names the pid of one that is told of later. Of two with
    /// one name, as another machine's may have that was given up, the older one ends first.
    fn add_pid(&mut self, device: &str, what: &mut What) {
        let running = &mut self.running;
        let is =
            |incarnation| move |r: &Running| r.incarnation == incarnation && r.device == device;
        match what {
            What::Spawned(e) => {
                if running.len() >= MAX_PIDS {
                    running.remove(least_missed(running));
                }
                running.push_back(Running {
                    device: device.to_owned(),
                    incarnation: e.incarnation,
                    pid: e.pid,
                });
            }
            What::Crashed(e) => {
                let newest = running.iter().rfind(|r| is(e.incarnation)(r));
                e.pid = newest.map_or(0, |r| r.pid);
            }
            What::Exited(e) => {
                let oldest = running.iter().position(is(e.incarnation));
                let ended = oldest.and_then(|at| running.remove(at));
                e.pid = ended.map_or(0, |r| r.pid);
            }
            _ => {}
        }
    }

    fn oldest(&self) -> u64 {
        self.next.saturating_sub(self.ring.len() as u64)
    }
}

/// Which one is to be forgotten when there are too many: one whose device has had as many after it
/// as it may have at a time, so that its end was not told; else the oldest.
fn least_missed(running: &VecDeque<Running>) -> usize {
    let outlived = running.iter().enumerate().position(|(at, one)| {
        let later = running.iter().skip(at.saturating_add(1));
        later.filter(|r| r.device == one.device).count() >= AT_A_TIME
    });
    outlived.unwrap_or(0)
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
        let told = |kind, detail, what| tell(&log, "d", kind, detail, what);
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
    }

    /// What clients are told.
    fn tell(log: &EventLog, device: &str, kind: &str, detail: &str, what: What) -> Event {
        let number = log.publish_typed(kind, device, detail, Some(what));
        let Lookup::Event(bytes) = log.get(number) else {
            panic!("it was just published")
        };
        Event::parse_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn processes_whose_end_is_never_told_crowd_out_none_that_runs() {
        use crate::launcher::ExitOutcome;
        use crate::machine::told;
        let log = EventLog::new();
        let spawned = |device: &str, pid, incarnation| {
            let what = told::spawned(pid, incarnation);
            tell(&log, device, "device.spawned", "", what);
        };
        let ended = |device: &str, incarnation| {
            let what = told::exited(incarnation, &ExitOutcome::Signal(9));
            let event = tell(&log, device, "device.exited", "", what);
            event.exited().pid
        };
        // Whatever an order by name or number would forget first.
        let still = [("a", 7, 1), ("m", 8, 1), ("z", 9, 5000)];
        for (device, pid, incarnation) in still {
            spawned(device, pid, incarnation);
        }
        for n in 1..=2000 {
            spawned("m2", 1000 + n, u64::from(n.unsigned_abs()));
        }
        assert_eq!(log.lock().running.len(), MAX_PIDS);
        assert_eq!((ended("m2", 2000), ended("m2", 1999)), (3000, 2999));
        assert_eq!(ended("m2", 1), 0);
        for (device, pid, incarnation) in still {
            assert_eq!(ended(device, incarnation), pid, "{device}");
        }
        // Each of another device: the first ones are forgotten, and no other has their numbers.
        for n in 1..=1000 {
            spawned(&format!("d{n}"), n, 1);
        }
        assert_eq!(log.lock().running.len(), MAX_PIDS);
        assert_eq!((ended("d1", 1), ended("d1000", 1)), (0, 1000));
    }

    #[test]
    fn of_two_processes_with_one_name_each_has_its_own_end() {
        use crate::launcher::ExitOutcome;
        use crate::machine::supervise::CrashReason;
        use crate::machine::told;
        let log = EventLog::new();
        for pid in [21, 22] {
            tell(&log, "d", "device.spawned", "", told::spawned(pid, 1));
        }
        let outcome = ExitOutcome::Signal(9);
        let exited = || tell(&log, "d", "device.exited", "", told::exited(1, &outcome));
        assert_eq!(exited().exited().pid, 21);
        let reason = CrashReason::Signal(9);
        let crashed = tell(&log, "d", "device.crashed", "", told::crashed(1, &reason));
        assert_eq!(crashed.crashed().pid, 22);
        assert_eq!(exited().exited().pid, 22);
        assert_eq!(exited().exited().pid, 0);
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
