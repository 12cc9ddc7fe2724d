//! Whether a worker that has run out of requests should look for more for a while, before it
//! asks for a kick and sleeps.
//!
//! To sleep and to be woken costs both sides CPU time (a context switch, the driver's kick,
//! an interrupt between CPUs) and the request latency. So a worker looks for as long as
//! that is worth, if the last gaps were so short that it will probably find something: a
//! little for one request, longer where many requests came together, which share the cost.
//! Where gaps are long nothing is spent: one look that found nothing ends the habit, until
//! a short gap is seen again.
//!
//! Owned by a queue's worker thread; the time is passed in.

use std::time::{Duration, Instant};

/// What it is worth not to sleep: at all, and per request of the last round.
const BASE: Duration = Duration::from_micros(8);
const PER_REQUEST: Duration = Duration::from_nanos(1500);
/// Longest look.
const MOST: Duration = Duration::from_micros(50);
/// Reading the clock must cost less than this.
const CHEAP_CLOCK: Duration = Duration::from_micros(1);

/// The habit of one worker.
#[derive(Debug, Default)]
pub struct Look {
    enabled: bool,
    /// The gap that is expected; none while looks are not worth it.
    expected: Option<Duration>,
    /// Since when there is nothing to do.
    idle: Option<Instant>,
    /// What the present gap may cost.
    worth: Duration,
}

impl Look {
    /// A habit to be formed; by calls that confinement forbids. With a single CPU nothing can happen while a worker looks, and
    /// with a clock that is a system call (a TCG guest) looking is dear.
    pub fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let start = Instant::now();
        let reads = 4;
        for _ in 0..reads {
            std::hint::black_box(Instant::now());
        }
        let cheap = start.elapsed() < CHEAP_CLOCK.saturating_mul(reads);
        Self {
            enabled: cpus > 1 && cheap,
            ..Self::default()
        }
    }

    /// Whether gaps matter at all.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// There is nothing to do from `now` on, after a round of `requests`. How long to look.
    #[inline]
    pub fn idle(&mut self, now: Instant, requests: u32) -> Duration {
        self.idle = Some(now);
        self.worth = BASE
            .saturating_add(PER_REQUEST.saturating_mul(requests))
            .min(MOST);
        match self.expected {
            Some(gap) if self.enabled && gap <= self.worth => self.worth,
            _ => Duration::ZERO,
        }
    }

    /// Looks until there is something, or for the time.
    #[inline]
    pub fn spin(since: Instant, time: Duration, mut found: impl FnMut() -> bool) -> bool {
        loop {
            for _ in 0..16 {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.elapsed() >= time {
                return false;
            }
        }
    }

    /// There is something to do again.
    #[inline]
    pub fn busy(&mut self, now: Instant) {
        if let Some(since) = self.idle.take() {
            let gap = now.saturating_duration_since(since);
            // A longer one could not have been waited for.
            self.expected = (gap <= self.worth).then_some(gap);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    /// Gaps of this length, after rounds of so many requests: how long the last look is.
    fn after(gaps: &[u64], requests: u32) -> Duration {
        let mut look = Look {
            enabled: true,
            ..Look::default()
        };
        let mut now = Instant::now();
        for gap in gaps {
            look.idle(now, requests);
            now = now.checked_add(us(*gap)).unwrap();
            look.busy(now);
        }
        look.idle(now, requests)
    }

    #[test]
    fn short_gaps_are_looked_through_and_long_ones_slept_through() {
        assert_eq!(after(&[], 1), Duration::ZERO, "no habit yet");
        assert!(after(&[5], 1) > us(5));
        assert_eq!(after(&[20], 1), Duration::ZERO, "not worth it for one");
        assert!(after(&[30], 32) > us(30));
        assert_eq!(after(&[1000], 32), Duration::ZERO);
        // One miss ends the habit, and one short gap begins it.
        assert_eq!(after(&[5, 5, 5, 1000], 1), Duration::ZERO);
        assert!(after(&[1000, 5], 1) > us(5));
    }

    #[test]
    fn a_look_is_bounded_and_can_be_off() {
        assert_eq!(after(&[1], u32::MAX), MOST);
        let mut look = Look::default();
        let now = Instant::now();
        look.idle(now, 32);
        look.busy(now);
        assert_eq!(look.idle(now, 32), Duration::ZERO);
        // Busy without having been idle says nothing.
        look.busy(now);
        look.busy(now);
        assert_eq!(look.idle, None);
    }
}
