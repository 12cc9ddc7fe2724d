//! The life of a supervised device's processes: what follows what, without the deeds. The
//! manager thread feeds one [`Life`] per device with what it sees, and carries out the
//! [`Action`]s that come back; time is passed in, so that every order of events can be tested.
//!
//! ```text
//!               lost                ended, fenced, pause over
//!   serving ───────────▶ ending ────────────────────────────▶ starting
//!      ▲                 │ ▲  ▲ │                                │ │
//!      │                 │ │  └─┼──────────── not started ───────┘ │ answered
//!      │  budget spent,  │ │    │                                  ▼
//!      │  fence missing  ▼ │    └───────── not taken over ──── taking over
//!      │          quarantined                                      │
//!      └───────────────────────────────────────────────────────────┘
//! ```
//!
//! Two processes never serve a device at once: a new one is started only after the launcher
//! has reaped the old one *and* its fence has fallen. The fence is a pipe whose write end the
//! process and its rings hold: I/O outlives a process, and must not meet that of the next.

use std::time::{Duration, Instant};

use super::supervise::{Budget, CrashReason, Decision, Supervisor};

/// How long a process that hung up has to end by itself, so that it can be told why. One that was
/// killed closes its channels first, and may then take long to let go of rings and memory; one that
/// ends is known at once.
pub const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long a process that was killed, and its I/O, may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How long a new process may take to be started, greeted and told what it must know.
const START_LIMIT: Duration = Duration::from_secs(15);
/// How long it may take to have the rings.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(15);

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take the function from the process: a successor will come.
    Suspend(String),
    /// Listen no more to the process that was to take the rings over: it will not.
    HangUp(String),
    /// Tell the driver that the device needs a reset; nobody serves it.
    Fail(String),
    /// End the process that serves, or that is being started.
    Kill,
    /// All I/O of the old process has ended.
    Quiesced,
    /// Start a process.
    Start,
    /// Publish an event: its kind and detail.
    Tell(&'static str, String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Ending {
        /// Kill it then.
        kill_at: Option<Instant>,
        /// Give up waiting for its end.
        limit: Instant,
        /// Start the next one no earlier.
        not_before: Instant,
    },
    Starting {
        limit: Instant,
    },
    TakingOver {
        limit: Instant,
    },
    Quarantined {
        /// Kill what is left of the process then.
        kill_at: Option<Instant>,
        /// To be told once the process has ended, or has not by then.
        untold: Option<(Instant, String)>,
    },
}

/// A time without a process that serves.
#[derive(Clone, Debug)]
struct Outage {
    since: Instant,
    reason: Option<CrashReason>,
    told: bool,
}

/// One device's processes.
#[derive(Debug)]
pub struct Life {
    phase: Phase,
    supervisor: Supervisor,
    outage: Option<Outage>,
    /// The last process that was started has been reaped.
    exited: bool,
    /// Its fence has fallen.
    fallen: bool,
    /// What was told last, for programs.
    told: Told,
}

/// What [`Action::Tell`] tells, for programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Why the last process had to go.
    pub crash: Option<CrashReason>,
    /// How long nobody served.
    pub stall: Duration,
    /// Queues that the successor serves, and requests that it makes again.
    pub found: (u16, u64),
}

impl Life {
    /// A device whose first process serves.
    pub fn new(budget: Budget) -> Self {
        Self {
            phase: Phase::Serving,
            supervisor: Supervisor::new(budget),
            outage: None,
            exited: false,
            fallen: false,
            told: Told::default(),
        }
    }

    /// Its process serves.
    pub fn serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// The launcher has told the end of the last process that was started.
    pub fn has_exited(&self) -> bool {
        self.exited
    }

    /// The device has a process that serves it or is getting its rings; or one that was given up for
    /// good and has not ended. One that is being replaced does not count, whether it has ended or
    /// not, nor one that has not said yet that it is ready.
    pub fn is_manned(&self) -> bool {
        match self.phase {
            Phase::Serving | Phase::Quarantined { .. } => !self.exited,
            Phase::TakingOver { .. } => true,
            Phase::Ending { .. } | Phase::Starting { .. } => false,
        }
    }

    /// A new process is on its way in and may be spoken to.
    pub fn starting(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. })
    }

    /// As the API tells it, when it is not serving.
    pub fn state(&self) -> Option<&'static str> {
        match self.phase {
            Phase::Serving => None,
            Phase::Quarantined { .. } => Some("quarantined"),
            _ => Some("restarting"),
        }
    }

    /// Processes that have replaced another.
    pub fn restarts(&self) -> u64 {
        self.supervisor.restarts()
    }

    /// When [`on_timer`](Self::on_timer) is due.
    pub fn next_timer(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Serving => None,
            Phase::Quarantined { kill_at, untold } => {
                let untold = untold.iter().map(|(at, _)| *at);
                kill_at.iter().copied().chain(untold).min()
            }
            Phase::Ending {
                kill_at,
                limit,
                not_before,
            } => {
                let start = self.is_gone().then_some(*not_before);
                let wait = (!self.is_gone()).then_some(*limit);
                kill_at.iter().copied().chain(start).chain(wait).min()
            }
            Phase::Starting { limit } | Phase::TakingOver { limit } => Some(*limit),
        }
    }

    fn is_gone(&self) -> bool {
        self.exited && self.fallen
    }

    /// The process hung up, or did something for which it must go (`reason`), or the next one
    /// did not come to serve.
    pub fn lost(&mut self, reason: Option<CrashReason>, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.phase {
            Phase::Serving | Phase::Starting { .. } | Phase::TakingOver { .. } => {
                self.begin_outage(reason, now, &mut actions);
            }
            Phase::Ending { .. } | Phase::Quarantined { .. } => self.learn(reason, &mut actions),
        }
        actions
    }

    /// The launcher has reaped the process: [`ends`](Self::ends) and [`is_reaped`](Self::is_reaped)
    /// with nothing told in between.
    pub fn exited(&mut self, reason: CrashReason, now: Instant) -> Vec<Action> {
        let mut actions = self.ends(reason, now);
        actions.extend(self.is_reaped(now));
        actions
    }

    /// The process has ended like this: why it had to go is known now at the latest, and told
    /// before its end is. [`is_reaped`](Self::is_reaped) is to follow.
    pub fn ends(&mut self, reason: CrashReason, now: Instant) -> Vec<Action> {
        let mut actions = match self.phase {
            Phase::Serving | Phase::Starting { .. } | Phase::TakingOver { .. } => {
                self.lost(Some(reason), now)
            }
            _ => {
                let mut actions = Vec::new();
                self.learn(Some(reason), &mut actions);
                actions
            }
        };
        actions.retain(|action| *action != Action::Kill);
        if let Phase::Ending { kill_at, .. } | Phase::Quarantined { kill_at, .. } = &mut self.phase
        {
            *kill_at = None;
        }
        actions
    }

    /// The end of the process has been told: what follows from it does.
    pub fn is_reaped(&mut self, now: Instant) -> Vec<Action> {
        self.exited = true;
        let mut actions = Vec::new();
        self.tell_quarantine(&mut actions);
        self.proceed(now, &mut actions);
        actions
    }

    /// The fence of the process has fallen. That alone says nothing: a process can close it.
    pub fn fence_fell(&mut self, now: Instant) -> Vec<Action> {
        self.fallen = true;
        let mut actions = Vec::new();
        self.proceed(now, &mut actions);
        actions
    }

    /// The process that was started has answered all that it was asked: the function may hand
    /// its rings to it. False: nobody waits for it any more.
    pub fn answered(&mut self, now: Instant) -> bool {
        let waits = self.starting();
        if waits {
            self.phase = Phase::TakingOver {
                limit: after(now, TAKEOVER_LIMIT),
            };
        }
        waits
    }

    /// What the last actions tell, for programs.
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// What the process that takes the rings over found: queues, and requests in flight.
    pub fn found(&mut self, queues: u16, resubmitted: u64) {
        self.told.found = (queues, resubmitted);
    }

    /// The process has the rings. `detail` says what it found.
    pub fn took_over(&mut self, detail: &str, now: Instant) -> Vec<Action> {
        if !matches!(self.phase, Phase::TakingOver { .. }) {
            return Vec::new();
        }
        self.phase = Phase::Serving;
        let stall = self
            .outage
            .take()
            .map_or(Duration::ZERO, |o| now.saturating_duration_since(o.since));
        self.told.stall = stall;
        let detail = format!("after {} us, {detail}", stall.as_micros());
        vec![Action::Tell("device.restarted", detail)]
    }

    /// Another process serves in the place of the one that did: nothing that was seen of that
    /// one's end counts.
    pub fn replaced(&mut self) {
        if self.serving() {
            (self.exited, self.fallen) = (false, false);
        }
    }

    /// A client, or the guest by a reset, wants a quarantined device back. False: it is not
    /// quarantined.
    pub fn revive(&mut self, now: Instant) -> (bool, Vec<Action>) {
        let mut actions = Vec::new();
        let Phase::Quarantined { kill_at, .. } = self.phase else {
            return (false, actions);
        };
        self.tell_quarantine(&mut actions);
        self.supervisor.pardon();
        // Why the process had to go may still be for its end to tell.
        let told = self.exited || self.outage.as_ref().is_none_or(|outage| outage.told);
        self.outage = Some(Outage {
            since: now,
            reason: None,
            told,
        });
        self.phase = Phase::Ending {
            kill_at,
            limit: after(now, END_LIMIT),
            not_before: now,
        };
        self.proceed(now, &mut actions);
        (true, actions)
    }

    /// Looks at what is due.
    pub fn on_timer(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match &mut self.phase {
            Phase::Ending { kill_at, limit, .. } => {
                let (limit, late) = (*limit, kill_at.take_if(|at| *at <= now).is_some());
                if late {
                    self.outlives(&mut actions);
                }
                if limit <= now && !self.is_gone() {
                    let why = if self.exited {
                        "its I/O does not end: is the host's storage stuck?"
                    } else {
                        "its process does not end: is the host's storage stuck?"
                    };
                    self.quarantine(why, None, now, &mut actions);
                    self.tell_quarantine(&mut actions);
                } else {
                    self.proceed(now, &mut actions);
                }
            }
            Phase::Quarantined { kill_at, untold } => {
                let late = kill_at.take_if(|at| *at <= now).is_some();
                let overdue = untold.as_ref().is_some_and(|(at, _)| *at <= now);
                if late {
                    self.outlives(&mut actions);
                }
                if overdue {
                    self.tell_quarantine(&mut actions);
                }
            }
            Phase::Starting { limit } if *limit <= now => {
                let why = "it was not ready in time".to_owned();
                actions = self.lost(Some(CrashReason::Start(why)), now);
            }
            Phase::TakingOver { limit } if *limit <= now => {
                let why = "it did not take the rings over in time".to_owned();
                actions = self.lost(Some(CrashReason::Start(why)), now);
            }
            _ => {}
        }
        actions
    }

    fn begin_outage(
        &mut self,
        reason: Option<CrashReason>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let served = self.phase == Phase::Serving;
        let took_over = matches!(self.phase, Phase::TakingOver { .. });
        let known = reason.is_some();
        let since = self.outage.as_ref().map_or(now, |outage| outage.since);
        self.outage = Some(Outage {
            since,
            reason: None,
            told: false,
        });
        let why = || {
            let told = reason.as_ref().map(ToString::to_string);
            told.unwrap_or_else(|| "its process hung up".to_owned())
        };
        if served {
            actions.push(Action::Suspend(why()));
        } else if took_over {
            // Its channel is the device's already.
            actions.push(Action::HangUp(why()));
        }
        self.learn(reason, actions);
        if known {
            actions.push(Action::Kill);
        }
        match self.supervisor.crashed(now) {
            Decision::Restart(pause) => {
                self.phase = Phase::Ending {
                    kill_at: (!known).then(|| after(now, LAST_WORDS)),
                    limit: after(now, END_LIMIT),
                    not_before: after(now, pause),
                };
            }
            Decision::Quarantine => {
                let kill_at = (!known).then(|| after(now, LAST_WORDS));
                self.quarantine("it crashed too often", kill_at, now, actions);
            }
        }
    }

    /// Publishes why the process had to go, once that is known.
    fn learn(&mut self, reason: Option<CrashReason>, actions: &mut Vec<Action>) {
        let Some(outage) = &mut self.outage else {
            return;
        };
        if outage.reason.is_none() {
            outage.reason = reason;
        }
        if let (Some(reason), false) = (&outage.reason, outage.told) {
            outage.told = true;
            self.told.crash = Some(reason.clone());
            actions.push(Action::Tell("device.crashed", reason.to_string()));
        }
    }

    /// It hung up and had its time to end: that would tell no more than that it was killed.
    fn outlives(&mut self, actions: &mut Vec<Action>) {
        let why = "it closed one of its channels and lives on".to_owned();
        self.learn(Some(CrashReason::Protocol(why)), actions);
        actions.push(Action::Kill);
    }

    /// Nobody serves the device from now on. That is told once the process has ended, so that
    /// events come in their order.
    fn quarantine(
        &mut self,
        why: &str,
        kill_at: Option<Instant>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let detail = format!("{why}; resume-device, or a reset by the guest, brings it back");
        actions.push(Action::Fail(format!("quarantined: {detail}")));
        self.phase = Phase::Quarantined {
            kill_at,
            untold: Some((after(now, END_LIMIT), detail)),
        };
    }

    fn tell_quarantine(&mut self, actions: &mut Vec<Action>) {
        if let Phase::Quarantined { untold, .. } = &mut self.phase
            && let Some((_, detail)) = untold.take()
        {
            actions.push(Action::Tell("device.quarantined", detail));
        }
    }

    /// Goes on once nothing is left of the old process.
    fn proceed(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if !self.is_gone() {
            return;
        }
        match &self.phase {
            Phase::Ending { not_before, .. } => {
                if !actions.contains(&Action::Quiesced) {
                    actions.push(Action::Quiesced);
                }
                if *not_before <= now {
                    (self.exited, self.fallen) = (false, false);
                    self.phase = Phase::Starting {
                        limit: after(now, START_LIMIT),
                    };
                    actions.push(Action::Start);
                }
            }
            Phase::Quarantined { .. } => actions.push(Action::Quiesced),
            _ => {}
        }
    }

    /// The process that was to be started does not exist, so that nothing will be heard of
    /// its end.
    pub fn not_started(&mut self, why: String, now: Instant) -> Vec<Action> {
        if !self.starting() {
            return Vec::new();
        }
        (self.exited, self.fallen) = (true, true);
        let mut actions = self.lost(Some(CrashReason::Start(why)), now);
        actions.retain(|action| *action != Action::Kill);
        self.tell_quarantine(&mut actions);
        self.proceed(now, &mut actions);
        actions
    }
}

fn after(now: Instant, span: Duration) -> Instant {
    now.checked_add(span).unwrap_or(now)
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
