//! What becomes of a device whose process has ended or gone astray: the decisions, without the
//! deeds. Time is passed in, so that they can be tested; the manager thread owns one
//! [`Supervisor`] per device and carries out what it says.
//!
//! A process that ends is replaced at once the first time, and after a growing pause each
//! further time within the window; past the budget the device is quarantined.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use crate::launcher::ExitOutcome;
use crate::vhost_user::VhostUserError;
use crate::virtio::ReconnectError;

/// Pause before the second restart within a window; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Most restarts that a budget may allow: each is remembered for the length of the window.
pub const MAX_BUDGET: u32 = 1_000_000;
/// Most crashes that are remembered; a larger budget is judged by these.
const MAX_REMEMBERED: usize = 4096;

/// Why a device process had to be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashReason {
    /// It called exit.
    Exit(i32),
    /// A signal ended it.
    Signal(i32),
    /// It made a system call outside its policy.
    Violation(String),
    /// It broke the protocol of one of its channels.
    Protocol(String),
    /// It missed a deadline on one of its channels.
    Deadline(String),
    /// A ring had work and made no progress.
    Hung {
        /// The queue.
        queue: u16,
    },
    /// The new process did not come up.
    Start(String),
}

impl CrashReason {
    /// How a process ended, as the launcher tells it.
    pub fn from_outcome(outcome: ExitOutcome) -> Self {
        match outcome {
            ExitOutcome::Status(status) => Self::Exit(status),
            ExitOutcome::Signal(signal) => Self::Signal(signal),
            ExitOutcome::Violation(call) => Self::Violation(call.name()),
        }
    }

    /// Why the process that was to take the rings over did not; `None`: its own end will tell,
    /// or whatever it was that had the function given up.
    pub fn from_takeover(error: &ReconnectError) -> Option<Self> {
        match error {
            ReconnectError::Backend(_, VhostUserError::Closed) | ReconnectError::GivenUp(_) => None,
            other => Some(Self::Start(other.to_string())),
        }
    }

    /// The class, as events carry it.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Exit(_) => "exit",
            Self::Signal(_) => "signal",
            Self::Violation(_) => "seccomp",
            Self::Protocol(_) => "protocol",
            Self::Deadline(_) => "deadline",
            Self::Hung { .. } => "hung",
            Self::Start(_) => "start",
        }
    }
}

impl fmt::Display for CrashReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit: status {status}"),
            Self::Signal(signal) => write!(f, "signal: {signal}"),
            Self::Violation(call) => write!(f, "seccomp: the system call {call}"),
            Self::Protocol(what) => write!(f, "protocol: {what}"),
            Self::Deadline(what) => write!(f, "deadline: {what}"),
            Self::Hung { queue } => write!(f, "hung: queue {queue} has work and makes no progress"),
            Self::Start(what) => write!(f, "start: {what}"),
        }
    }
}

/// How often a device may be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Restarts within the window; 0: none at all.
    pub restarts: u32,
    /// The window.
    pub window: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            restarts: 5,
            window: Duration::from_secs(60),
        }
    }
}

/// What to do about a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start a new process after this pause.
    Restart(Duration),
    /// Leave the device without one until somebody asks for it.
    Quarantine,
}

/// One device's history.
#[derive(Debug)]
pub struct Supervisor {
    budget: Budget,
    crashes: VecDeque<Instant>,
    /// Restarts since the device was made.
    restarts: u64,
}

impl Supervisor {
    /// A device that has not crashed yet.
    pub fn new(budget: Budget) -> Self {
        Self {
            budget: Budget {
                restarts: budget.restarts.min(MAX_BUDGET),
                ..budget
            },
            crashes: VecDeque::new(),
            restarts: 0,
        }
    }

    /// Its process has to be replaced: now what?
    pub fn crashed(&mut self, now: Instant) -> Decision {
        while let Some(oldest) = self.crashes.front()
            && now.saturating_duration_since(*oldest) >= self.budget.window
        {
            self.crashes.pop_front();
        }
        let recent = self.crashes.len();
        let allowed = usize::try_from(self.budget.restarts).unwrap_or(usize::MAX);
        if recent >= allowed {
            return Decision::Quarantine;
        }
        if recent >= MAX_REMEMBERED {
            self.crashes.pop_front();
        }
        self.crashes.push_back(now);
        self.restarts = self.restarts.saturating_add(1);
        // A budget that is meant for storms is not slowed down: the pause is that of a history
        // as long as the default budget at most, and only in its proportion.
        let step = recent.saturating_mul(5) / allowed.max(5);
        let pause = match u32::try_from(step) {
            Ok(0) => Duration::ZERO,
            Ok(n) => FIRST_PAUSE.saturating_mul(4u32.saturating_pow(n.saturating_sub(1))),
            Err(_) => LONGEST_PAUSE,
        };
        Decision::Restart(pause.min(LONGEST_PAUSE))
    }

    /// The guest reset the device, or a client asked for it: a quarantined device starts with
    /// a clean history.
    pub fn pardon(&mut self) {
        self.crashes.clear();
    }

    /// Restarts since the device was made.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// What one look at a ring shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLook {
    /// Buffers that the driver has made available, modulo 2^16.
    pub avail: u16,
    /// Buffers that the device has used, modulo 2^16.
    pub used: u16,
    /// There is a reason: the device says that it waits for the host, or by order, or the VMM
    /// itself has it drained or the machine paused.
    pub excused: bool,
}

/// Finds a ring that has work and makes no progress, from a look once a second.
#[derive(Debug, Default)]
pub struct HangDetector {
    last: RingLook,
    stuck: u32,
}

impl HangDetector {
    /// Looks in a row without progress that make a hang.
    pub const LOOKS: u32 = 10;

    /// Notes a look; true if the ring hangs.
    pub fn look(&mut self, now: RingLook) -> bool {
        let work = now.avail != now.used;
        let same = now.used == self.last.used;
        if work && same && !now.excused {
            self.stuck = self.stuck.saturating_add(1);
        } else {
            self.stuck = 0;
        }
        self.last = now;
        self.stuck >= Self::LOOKS
    }

    /// A new process serves the ring.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_takeover_that_was_cut_short_is_explained_by_the_end_of_its_process() {
        let cut = [
            ReconnectError::GivenUp("vda".into()),
            ReconnectError::Backend("vda".into(), VhostUserError::Closed),
        ];
        for error in cut {
            assert_eq!(CrashReason::from_takeover(&error), None);
        }
        let (id, missing) = ("vda".into(), 1);
        let unfit = ReconnectError::Features { id, missing };
        let reason = CrashReason::from_takeover(&unfit);
        assert_eq!(reason.map(|reason| reason.class()), Some("start"));
    }

    #[test]
    fn the_first_restart_is_at_once_and_the_sixth_crash_in_a_minute_quarantines() {
        let start = Instant::now();
        let mut s = Supervisor::new(Budget::default());
        let pauses: Vec<_> = (0..6).map(|i| s.crashed(at(start, i * 1000))).collect();
        let restart = |ms| Decision::Restart(Duration::from_millis(ms));
        assert_eq!(
            pauses,
            [
                restart(0),
                restart(50),
                restart(200),
                restart(800),
                restart(3200),
                Decision::Quarantine
            ]
        );
        assert_eq!(s.restarts(), 5);
        s.pardon();
        assert_eq!(s.crashed(at(start, 7000)), restart(0));
    }

    #[test]
    fn crashes_are_forgotten_after_the_window() {
        let start = Instant::now();
        let mut s = Supervisor::new(Budget::default());
        for i in 0..100 {
            let decision = s.crashed(at(start, i * 61_000));
            assert_eq!(decision, Decision::Restart(Duration::ZERO));
        }
    }

    #[test]
    fn a_budget_of_none_quarantines_at_once() {
        let mut s = Supervisor::new(Budget {
            restarts: 0,
            ..Budget::default()
        });
        assert_eq!(s.crashed(Instant::now()), Decision::Quarantine);
    }

    #[test]
    fn a_large_budget_is_not_slowed_down_by_its_first_crashes() {
        let start = Instant::now();
        let mut s = Supervisor::new(Budget {
            restarts: 10_000,
            window: Duration::from_secs(3600),
        });
        for i in 0..500 {
            assert_eq!(
                s.crashed(at(start, i)),
                Decision::Restart(Duration::ZERO),
                "{i}"
            );
        }
    }

    proptest! {
        #[test]
        fn never_more_restarts_in_a_window_than_the_budget(
            gaps in proptest::collection::vec(0u64..30_000, 1..200),
            restarts in 0u32..8,
        ) {
            let start = Instant::now();
            let budget = Budget { restarts, window: Duration::from_secs(60) };
            let mut s = Supervisor::new(budget);
            let mut granted: Vec<u64> = Vec::new();
            let mut now = 0;
            for gap in gaps {
                now += gap;
                if let Decision::Restart(pause) = s.crashed(at(start, now)) {
                    prop_assert!(pause <= LONGEST_PAUSE);
                    granted.push(now);
                }
                let recent = granted.iter().filter(|t| now - **t < 60_000).count();
                prop_assert!(recent <= restarts as usize);
            }
        }
    }

    #[test]
    fn a_ring_hangs_only_with_work_without_progress_and_without_excuse() {
        let stuck = RingLook {
            avail: 7,
            used: 3,
            ..RingLook::default()
        };
        let hangs = |look: RingLook| {
            let mut d = HangDetector::default();
            (0..3 * HangDetector::LOOKS).any(|_| d.look(look))
        };
        assert!(hangs(stuck));
        assert!(!hangs(RingLook { used: 7, ..stuck }));
        assert!(!hangs(RingLook {
            excused: true,
            ..stuck
        }));
        let mut d = HangDetector::default();
        for used in 0..100 {
            assert!(!d.look(RingLook { used, ..stuck }), "progress at {used}");
        }
    }
}
