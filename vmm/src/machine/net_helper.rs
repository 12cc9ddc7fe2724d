//! The process of an external helper (passt, virtiofsd) as the manager thread keeps it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// The event of a helper that has served and ended.
pub const EXITED: &str = "device.exited";

/// The running process of a helper.
#[derive(Debug)]
pub struct HelperProcess {
    /// Host pid.
    pub pid: i32,
    /// Keeps the pid from being reused.
    pub pidfd: OwnedFd,
    /// When it was asked for.
    pub begun: Instant,
    /// From then until it served.
    pub ready: Duration,
}

impl HelperProcess {
    /// One that was asked for at `begun` and serves now.
    pub fn serving(pid: i32, pidfd: OwnedFd, begun: Instant, now: Instant) -> Self {
        let ready = now.saturating_duration_since(begun);
        Self {
            pid,
            pidfd,
            begun,
            ready,
        }
    }

    /// From the request for it until it served, microseconds; 0: it has not.
    pub fn ready_us(&self) -> u64 {
        u64::try_from(self.ready.as_micros()).unwrap_or(u64::MAX)
    }
}
