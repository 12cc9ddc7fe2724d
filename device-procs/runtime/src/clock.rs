//! A clock for deadlines and limits that never needs a system call.
//!
//! On a host whose clock source cannot be read from user space (hpet, a guest under TCG),
//! `Instant::now` is a system call; the coarse clock is not, anywhere. It steps with the timer
//! tick, every few milliseconds. Any thread.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::sys;

static START: OnceLock<(Instant, u64)> = OnceLock::new();

/// Begins to count. To be called before confinement; a later first use counts from there.
pub fn start() {
    START.get_or_init(|| (Instant::now(), sys::coarse_time()));
}

/// The time, as of the last timer tick.
pub fn now() -> Instant {
    let (instant, coarse) = START.get_or_init(|| (Instant::now(), sys::coarse_time()));
    let passed = sys::coarse_time().saturating_sub(*coarse);
    instant
        .checked_add(Duration::from_nanos(passed))
        .unwrap_or(*instant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_and_keeps_pace() {
        start();
        let (before, exact) = (now(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let passed = now().saturating_duration_since(before);
        assert!(passed >= Duration::from_millis(30), "{passed:?}");
        assert!(
            passed <= exact.elapsed() + Duration::from_millis(20),
            "{passed:?}"
        );
    }
}
