//! Whether a worker that has run out of requests should look for more for a while, before it
//! asks for a kick and sleeps.
//!
//! To sleep and to be woken costs both sides CPU time (a context switch, the driver's kick,
//! an interrupt between CPUs, in a virtual machine an exit for each) and the request
//! latency. So after a short sleep the worker tries to look instead. It goes on doing so
//! while requests come soon enough to be cheaper than a sleep: a little time for one
//! request, more where many come together, which share the cost. A look that found nothing,
//! or found it too late, makes the next ones rarer, by half each time: where the driver
//! thinks for long, or has no other CPU to run on, there is no point in them.
//!
//! Owned by a queue's worker thread; the time is passed in.

use std::time::{Duration, Instant};

/// What it is worth not to sleep: at all, and per request of the last round.
const BASE: Duration = Duration::from_micros(20);
const PER_REQUEST: Duration = Duration::from_nanos(2500);
const MOST: Duration = Duration::from_micros(80);
/// A sleep that is shorter may have been longer than what it replaces: it has the cost of
/// being woken in it. So long is a first look, too.
const TRY: Duration = Duration::from_micros(50);
/// Most short sleeps that go by without a look, as a power of two.
const RAREST: u32 = 10;
/// Reading the clock must cost less than this.
const CHEAP_CLOCK: Duration = Duration::from_micros(1);

/// The habit of one worker.
#[derive(Debug, Default)]
pub struct Look {
    enabled: bool,
    /// The last gap was short.
    expecting: bool,
    /// Looks in a row that were not worth it.
    misses: u32,
    /// Gaps to let go by.
    skip: u32,
    /// Since when there is nothing to do.
    idle: Option<Instant>,
    /// What not to sleep in the present gap is worth.
    worth: Duration,
}

impl Look {
    /// A habit to be formed. Where reading the clock is a system call (in a TCG guest),
    /// looking is too dear.
    pub fn new() -> Self {
        let start = Instant::now();
        let reads = 4;
        for _ in 0..reads {
            std::hint::black_box(Instant::now());
        }
        Self {
            enabled: start.elapsed() < CHEAP_CLOCK.saturating_mul(reads),
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
        if !self.enabled || !self.expecting {
            return Duration::ZERO;
        }
        if self.skip > 0 {
            self.skip = self.skip.saturating_sub(1);
            return Duration::ZERO;
        }
        self.worth.max(TRY)
    }

    /// A look has ended, with something to do or without.
    #[inline]
    fn looked(&mut self, now: Instant, found: bool) {
        let took = self.idle.map(|since| now.saturating_duration_since(since));
        if found && took.is_some_and(|took| took <= self.worth) {
            self.misses = 0;
        } else {
            self.misses = self.misses.saturating_add(1).min(RAREST);
            self.skip = 1 << self.misses;
        }
    }

    /// Looks until there is something, or for the time.
    #[inline]
    pub fn until(&mut self, time: Duration, mut something: impl FnMut() -> bool) -> bool {
        // What was to be done first, such as an interrupt, has been done by now.
        let since = Instant::now();
        self.idle = Some(since);
        loop {
            let mut found = false;
            for _ in 0..16 {
                found = something();
                if found {
                    break;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if found || now.saturating_duration_since(since) >= time {
                self.looked(now, found);
                return found;
            }
        }
    }

    /// There is something to do again.
    #[inline]
    pub fn busy(&mut self, now: Instant) {
        if let Some(since) = self.idle.take() {
            self.expecting = now.saturating_duration_since(since) <= self.worth.max(TRY);
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

    /// A driver that answers rounds of `requests` after these gaps: how long each look may
    /// be, and one after them. What is seen by a look comes `sooner` than after a sleep.
    fn looks(gaps: &[u64], requests: u32, sooner: u64) -> Vec<Duration> {
        let mut look = Look {
            enabled: true,
            ..Look::default()
        };
        let mut now = Instant::now();
        let mut looks = Vec::new();
        for gap in gaps {
            let time = look.idle(now, requests);
            looks.push(time);
            let mut gap = us(*gap);
            if !time.is_zero() {
                gap = gap.saturating_sub(us(sooner));
                let end = now.checked_add(gap.min(time)).unwrap();
                look.looked(end, gap <= time);
            }
            now = now.checked_add(gap).unwrap();
            look.busy(now);
        }
        looks.push(look.idle(now, requests));
        looks
    }

    fn count(looks: &[Duration]) -> usize {
        looks.iter().filter(|t| !t.is_zero()).count()
    }

    #[test]
    fn short_gaps_are_looked_through_and_long_ones_slept_through() {
        assert_eq!(count(&looks(&[], 1, 0)), 0, "no habit yet");
        assert_eq!(count(&looks(&[15; 100], 1, 0)), 100);
        assert_eq!(
            count(&looks(&[40; 100], 1, 25)),
            100,
            "shorter than they seemed"
        );
        assert_eq!(count(&looks(&[75; 100], 32, 0)), 100, "worth it for many");
        assert_eq!(count(&looks(&[1000; 100], 32, 0)), 0);
        let longest = looks(&[1; 2], u32::MAX, 0).into_iter().max().unwrap();
        assert_eq!(longest, MOST);
    }

    #[test]
    fn looks_that_are_not_worth_it_become_rare() {
        // The driver thinks for longer than a sleep costs.
        let rare = count(&looks(&[40; 5000], 1, 0));
        assert!((8..20).contains(&rare), "{rare}");
        // Short gaps and long ones by turns.
        let turns: Vec<u64> = (0..5000)
            .map(|i| if i % 2 == 0 { 5 } else { 500 })
            .collect();
        let rare = count(&looks(&turns, 1, 0));
        assert!((8..20).contains(&rare), "{rare}");
    }

    #[test]
    fn a_look_can_be_off() {
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
