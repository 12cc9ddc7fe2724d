//! Calls to the launcher from other threads than the one that takes its events: they wait
//! without the lock, so that the manager's own requests, which never wait, go on meanwhile. The
//! manager finds the answer when it takes the events and passes it on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;

use super::{Answer, Launcher, LauncherError};
use crate::launcher::printable;
use crate::launcher::sys::ExitOutcome;

/// Ends that are remembered for whoever asks how a process ended.
const MAX_ENDS: usize = 64;
/// Number of a device's first process.
const FIRST: u64 = 1;
/// How long a process that was given up has to end.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// Pause before the next look.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// How a process ended.
struct End {
    device_id: String,
    incarnation: u64,
    outcome: ExitOutcome,
    last_line: String,
}

/// Other threads that wait, and what they may ask for.
#[derive(Default)]
pub(super) struct Beside {
    waiters: BTreeMap<u64, Sender<Answer>>,
    /// Devices whose first process was started from here, until they are settled.
    started: BTreeSet<String>,
    ends: VecDeque<End>,
}

impl Beside {
    /// Does a thread wait for this answer?
    pub(super) fn waits(&self, id: u64) -> bool {
        self.waiters.contains_key(&id)
    }

    /// Passes it on; one that has given up has closed its end, and descriptors close.
    pub(super) fn answer(&mut self, id: u64, answer: Answer) {
        if let Some(waiter) = self.waiters.remove(&id) {
            let _ = waiter.send(answer);
        }
    }

    /// The launcher is gone: nobody need wait.
    pub(super) fn lose(&mut self) {
        self.waiters.clear();
    }

    /// A process has ended.
    pub(super) fn note_end(
        &mut self,
        device_id: &str,
        incarnation: u64,
        outcome: ExitOutcome,
        last_line: &str,
    ) {
        if self.ends.len() >= MAX_ENDS {
            self.ends.pop_front();
        }
        self.ends.push_back(End {
            device_id: device_id.to_owned(),
            incarnation,
            outcome,
            last_line: last_line.to_owned(),
        });
    }

    fn end(&self, device_id: &str, incarnation: u64) -> Option<(ExitOutcome, String)> {
        // The last of this name: the same id may have had another device before.
        let mut ends = self.ends.iter().rev();
        let end = ends.find(|e| e.device_id == device_id && e.incarnation == incarnation)?;
        Some((end.outcome, end.last_line.clone()))
    }

    /// What is remembered of the processes of a device that is to be made anew.
    fn forget(&mut self, device_id: &str) {
        self.ends.retain(|end| end.device_id != device_id);
    }
}

impl Launcher {
    /// From now on the calling thread takes the events; calls from others wait beside it.
    pub fn attend(&self) {
        let _ = self.attendant.set(std::thread::current().id());
    }

    pub(super) fn is_beside(&self) -> bool {
        let attendant = self.attendant.get();
        attendant.is_some_and(|thread| *thread != std::thread::current().id())
    }

    /// One request and its reply, while another thread takes the events.
    pub(super) fn call_beside(
        &self,
        op: wire::request::Op,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
        what: &'static str,
    ) -> Result<Answer, LauncherError> {
        let deadline = Instant::now() + limit;
        let (sender, answer) = channel();
        let mut request = wire::Request {
            op: Some(op),
            ..Default::default()
        };
        loop {
            let mut inner = self.lock();
            match &request.op {
                Some(wire::request::Op::Spawn(op)) => inner.inbox.beside.forget(&op.device_id),
                Some(wire::request::Op::SpawnHelper(op)) => inner.inbox.beside.forget(&op.id),
                _ => {}
            }
            let id = inner.last_id.wrapping_add(1).max(1);
            request.id = id;
            let bytes = request
                .write_to_bytes()
                .map_err(|_| LauncherError::Protocol("a request that cannot be encoded"))?;
            let socket = inner.socket.as_ref().ok_or(LauncherError::Gone)?;
            match socket.send(&bytes, fds, None) {
                Ok(()) => {
                    inner.last_id = id;
                    inner.inbox.beside.waiters.insert(id, sender);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    return Err(LauncherError::Refused(format!(
                        "launcher: a {what} request larger than a packet"
                    )));
                }
                Err(_) => return Err(LauncherError::Gone),
            }
            drop(inner);
            if Instant::now() >= deadline {
                return Err(LauncherError::Deadline(what));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match answer.recv_timeout(left) {
            Ok((reply, ..)) if !reply.error.is_empty() => {
                Err(LauncherError::Refused(printable(&reply.error)))
            }
            Ok(answer) => {
                let started = match request.op {
                    Some(wire::request::Op::Spawn(op)) => Some(op.device_id),
                    Some(wire::request::Op::SpawnHelper(op)) => Some(op.id),
                    _ => None,
                };
                self.lock().inbox.beside.started.extend(started);
                Ok(answer)
            }
            Err(RecvTimeoutError::Timeout) => {
                self.lock().inbox.beside.waiters.remove(&request.id);
                Err(LauncherError::Deadline(what))
            }
            Err(RecvTimeoutError::Disconnected) => Err(LauncherError::Gone),
        }
    }

    /// A device was made, or could not be: then its first process, if it had one, has ended when
    /// this returns, so that its end is not taken for that of another of the same name.
    pub fn settle(&self, device_id: &str, made: bool) {
        let started = self.lock().inbox.beside.started.remove(device_id);
        if started && !made {
            let told = self.end_of_beside(device_id, FIRST, SETTLE_LIMIT);
            if told.is_none() {
                log::warn!("device {device_id}: the process that was given up has not ended");
            }
        }
    }

    /// How a process ended, if that is told within `limit`.
    pub(super) fn end_of_beside(
        &self,
        device_id: &str,
        incarnation: u64,
        limit: Duration,
    ) -> Option<(ExitOutcome, String)> {
        let deadline = Instant::now().checked_add(limit)?;
        loop {
            let told = self.lock().inbox.beside.end(device_id, incarnation);
            if told.is_some() || Instant::now() >= deadline {
                return told;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}
