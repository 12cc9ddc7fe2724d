//! A live update under way: a process of another binary on trial beside the one that serves.
//!
//! ```text
//!  Starting ── ready ──▶ Draining ── quiet ──▶ HandingOver ── has the rings ──▶ serves
//!      │                     │                     │
//!      └─────────────────────┴──── ended ──────────┴──▶ the one before goes on
//! ```
//!
//! While the rings are handed over the function's own thread decides which of the two has them:
//! what is seen of either meanwhile is noted here, and counts when that is known. Owned by the
//! manager thread; the deeds are in `host::updating`.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_proto::AsyncClient;
use bulkhead_proto::device::HelloResponse;

use super::life::LAST_WORDS;
use super::newcomer::Newcomer;
use super::supervise::CrashReason;
use crate::launcher::ExitOutcome;

/// How long a new process may take to be started, greeted and told what it must know.
const START_LIMIT: Duration = Duration::from_secs(15);

/// Where it is.
pub enum Stage {
    /// It is started and told what it must know.
    Starting(Box<Newcomer>),
    /// It is ready; the other one finishes what is in flight.
    Draining(Box<Candidate>),
    /// The function gives it the rings.
    HandingOver(Box<Candidate>),
}

/// A process that is ready.
pub struct Candidate {
    /// Its control channel.
    pub client: AsyncClient,
    /// Its vhost-user channel, until the function has it.
    pub vhost: Option<std::os::unix::net::UnixStream>,
    /// What it said of itself.
    pub hello: HelloResponse,
    /// From the request for it to its readiness.
    pub ready_us: u64,
    /// Its process.
    pub process: Option<(i32, OwnedFd)>,
}

/// The end of a process, as the launcher has told it.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Which one.
    pub incarnation: u64,
    /// How.
    pub outcome: ExitOutcome,
    /// What it logged last.
    pub last_line: String,
}

/// What was seen of the process that serves, while its rings were being handed over.
#[derive(Default)]
pub struct Seen {
    /// It is lost, for this reason if that is known.
    pub lost: Option<Option<CrashReason>>,
    /// It has ended.
    pub exited: Option<Ended>,
    /// Its fence has fallen.
    pub fence_fell: bool,
}

/// A process on trial.
pub struct Trial {
    /// Where it is.
    pub stage: Stage,
    /// It.
    pub incarnation: u64,
    /// Its binary, as the client named it.
    pub binary: String,
    /// Hangs up when nothing is left of it.
    pub fence: Option<OwnedFd>,
    /// Its fence has fallen.
    pub fence_fell: bool,
    /// It has ended.
    pub exited: Option<Ended>,
    /// Since when the device takes nothing new.
    pub quiet_since: Option<Instant>,
    /// Of the other one.
    pub seen: Seen,
    limit: Instant,
    hung_up: bool,
}

impl Trial {
    /// Of a process that the launcher was asked for.
    pub fn new(newcomer: Newcomer, binary: &str, now: Instant) -> Self {
        Self {
            incarnation: newcomer.incarnation,
            stage: Stage::Starting(Box::new(newcomer)),
            binary: binary.to_owned(),
            fence: None,
            fence_fell: false,
            exited: None,
            quiet_since: None,
            seen: Seen::default(),
            limit: now.checked_add(START_LIMIT).unwrap_or(now),
            hung_up: false,
        }
    }

    /// The function has the decision.
    pub fn hands_over(&self) -> bool {
        matches!(self.stage, Stage::HandingOver(_))
    }

    /// Its pid, once the launcher has told it; else 0.
    pub fn pid(&self) -> i32 {
        let started = match &self.stage {
            Stage::Starting(newcomer) => newcomer.started.as_ref(),
            Stage::Draining(candidate) | Stage::HandingOver(candidate) => {
                candidate.process.as_ref()
            }
        };
        started.map_or(0, |(pid, _)| *pid)
    }

    /// When it is to be looked at.
    pub fn next_timer(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Starting(_) if self.hung_up => Some(self.limit),
            Stage::Starting(newcomer) => {
                let answer = newcomer
                    .started
                    .as_ref()
                    .and_then(|_| newcomer.next_timer());
                answer.into_iter().chain([self.limit]).min()
            }
            // The drain and the handing over have deadlines of their own.
            Stage::Draining(_) | Stage::HandingOver(_) => None,
        }
    }

    /// It closed its control channel: its end, which tells why, is waited for a moment.
    pub fn hung_up(&mut self, now: Instant) {
        if !self.hung_up {
            self.hung_up = true;
            self.limit = now.checked_add(LAST_WORDS).unwrap_or(now);
        }
    }

    /// It did not come up in time: what is to be said of it.
    pub fn is_late(&self, now: Instant) -> Option<&'static str> {
        let late = matches!(self.stage, Stage::Starting(_)) && self.limit <= now;
        late.then_some(match self.hung_up {
            true => "it closed its control channel and lives on",
            false => "it was not ready in time",
        })
    }

    /// Gives it more time, because the manager itself was held up.
    pub fn extend(&mut self, span: Duration) {
        self.limit = self.limit.checked_add(span).unwrap_or(self.limit);
        if let Stage::Starting(newcomer) = &mut self.stage {
            newcomer.extend_deadlines(span);
        }
    }
}
