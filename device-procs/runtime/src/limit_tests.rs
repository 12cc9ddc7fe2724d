//! Tests of the rate limits. Time is made up here; nothing waits.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    Rate::new("rate", per_second, burst).unwrap()
}

#[test]
fn a_rate_is_checked_and_a_missing_burst_is_a_second_s_worth() {
    assert_eq!(Rate::new("bytes", 0, 0), Ok(None));
    let why = Rate::new("bytes", 0, 5).unwrap_err();
    assert!(why.starts_with("bytes: "), "{why}");
    let r = rate(7, 0).unwrap();
    assert_eq!((r.per_second(), r.burst()), (7, 7));
    assert_eq!(Rate::from_message("x", None).unwrap(), None);
}

#[test]
fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
    let start = Instant::now();
    let limiter = Limiter::new(None, rate(10, 4), start);
    for _ in 0..4 {
        assert_eq!(limiter.take(start, 1 << 40, 1), Ok(()));
    }
    let wait = limiter.take(start, 0, 1).unwrap_err();
    assert!(wait <= Duration::from_millis(100), "{wait:?}");
    let mut now = start;
    let mut passed = 0;
    while now < start + Duration::from_secs(3) {
        match limiter.take(now, 0, 1) {
            Ok(()) => passed += 1,
            Err(wait) => now += wait,
        }
    }
    assert_eq!(passed, 30);
}

#[test]
fn a_request_larger_than_the_burst_passes_and_those_after_it_pay() {
    let start = Instant::now();
    let limiter = Limiter::new(rate(1000, 10), None, start);
    assert_eq!(limiter.take(start, 5000, 1), Ok(()));
    let wait = limiter.take(start, 1, 1).unwrap_err();
    assert!(wait > Duration::from_millis(4989) && wait < Duration::from_millis(4992));
    assert_eq!(limiter.take(start + wait, 5000, 1), Ok(()));
}

#[test]
fn a_refused_request_takes_nothing_from_either_bucket() {
    let start = Instant::now();
    let limiter = Limiter::new(rate(100, 100), rate(1, 1), start);
    assert_eq!(limiter.take(start, 1, 1), Ok(()));
    for _ in 0..1000 {
        limiter.take(start, 50, 1).unwrap_err();
    }
    limiter.set(rate(100, 100), None, start);
    assert_eq!(limiter.take(start, 98, 1), Ok(()));
    assert_eq!(limiter.take(start, 1, 1), Ok(()));
    limiter.take(start, 1, 1).unwrap_err();
}

#[test]
fn limits_change_while_requests_wait() {
    let start = Instant::now();
    let limiter = Limiter::default();
    assert!(!limiter.is_limited());
    assert_eq!(limiter.take(start, u64::MAX, u64::MAX), Ok(()));
    limiter.set(rate(1, 1), None, start);
    assert_eq!(limiter.take(start, 1 << 30, 1), Ok(()));
    let wait = limiter.take(start, 1, 1).unwrap_err();
    assert_eq!(wait, LONGEST_WAIT);
    // A debt of years is not carried over to a rate under which it would not exist.
    limiter.set(rate(1 << 30, 0), None, start);
    let wait = limiter.take(start, 1, 1).unwrap_err();
    assert!(wait < Duration::from_millis(1), "{wait:?}");
    assert_eq!(limiter.take(start + wait, 1, 1), Ok(()));
    assert_eq!(limiter.rates(), (rate(1 << 30, 0), None));
    limiter.set(None, None, start);
    assert!(!limiter.is_limited());
    assert_eq!(limiter.take(start, u64::MAX, 1), Ok(()));
}

#[test]
fn a_clock_that_steps_back_gives_nothing() {
    let start = Instant::now() + Duration::from_secs(100);
    let mut bucket = TokenBucket::new(rate(10, 1).unwrap(), start);
    assert_eq!(bucket.take(start, 1), Ok(()));
    let earlier = start.checked_sub(Duration::from_secs(50)).unwrap();
    bucket.take(earlier, 1).unwrap_err();
    bucket.take(start, 1).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        rng_seed: RngSeed::Fixed(0x006c_696d_6974),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever is asked for when, the rate holds, a wait is exact, and nothing panics.
    #[test]
    fn the_rate_holds_and_a_wait_is_exact(
        per_second in prop_oneof![1u64..100, 1u64..u64::MAX],
        burst in prop_oneof![1u64..100, any::<u64>()],
        asks in prop::collection::vec((0u64..2_000_000_000, 0u64..1000), 1..100),
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut bucket = TokenBucket::new(rate(per_second, burst).unwrap(), start);
        let burst = u128::from(bucket.rate.burst());
        let (mut passed, mut last) = (0u128, 0u128);
        for (step, tokens) in asks {
            now += Duration::from_nanos(step);
            match bucket.take(now, tokens) {
                Ok(()) => {
                    passed += u128::from(tokens);
                    last = u128::from(tokens);
                }
                Err(wait) => {
                    prop_assert!(wait >= SHORTEST_WAIT);
                    let mut other = bucket.clone();
                    if wait < LONGEST_WAIT {
                        prop_assert_eq!(other.take(now + wait, tokens), Ok(()));
                    }
                    if wait > SHORTEST_WAIT {
                        let early = now + wait - Duration::from_nanos(1);
                        prop_assert!(bucket.clone().take(early, tokens).is_err());
                    }
                }
            }
            let gained = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
            prop_assert!(passed <= burst + gained + 1 + last);
        }
    }

    /// Two queues that ask in turn, one with huge requests, both get on.
    #[test]
    fn nobody_starves(small in 1u64..100, large in 1_000u64..1_000_000, per_second in 1u64..10_000) {
        let start = Instant::now();
        let limiter = Limiter::new(rate(per_second, 1), None, start);
        let mut now = start;
        let mut passed = [0; 2];
        for _ in 0..100 {
            for (count, bytes) in passed.iter_mut().zip([small, large]) {
                let mut tries = 0;
                while let Err(wait) = limiter.take(now, bytes, 1) {
                    now += wait;
                    tries += 1;
                    // A wait is told in pieces of at most an hour.
                    prop_assert!(tries <= 2 + large / per_second / 3600);
                }
                *count += 1;
            }
        }
        prop_assert_eq!(passed, [100, 100]);
    }
}
