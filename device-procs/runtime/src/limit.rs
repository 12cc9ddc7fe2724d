//! Rate limits: token buckets for bytes and for operations, shared by all queues of a device.
//!
//! A request passes while its buckets hold anything at all, and then takes its whole cost,
//! into debt if need be. So the size of a request never decides whether it passes: one
//! larger than the burst waits no longer than a small one, none starves, and the debt makes
//! those that follow wait until the rate holds again. In any time t, what passes is at most
//! burst + rate·t and one request more.
//!
//! Workers call [`Limiter::take`] with the time of their choice; the main thread changes the
//! rates while they run ([`Limiter::set`]) and wakes the workers afterwards. Nothing here
//! reads a clock or sleeps. Without limits `take` is one load.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::common;

/// Tokens are counted in billionths: what a rate of one per second yields in a nanosecond.
const NANO: i128 = 1_000_000_000;
/// Shortest wait that is worth a timer; also keeps a wait from being zero.
const SHORTEST_WAIT: Duration = Duration::from_micros(1);
/// Longest wait that is told; who waits asks again then.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A steady rate and how much may be saved up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: NonZeroU64,
    burst: NonZeroU64,
}

impl Rate {
    /// `per_second` tokens a second and at most `burst` of them at once; a burst of 0 is a
    /// second's worth. None, no limit, if both are 0.
    ///
    /// # Errors
    /// A burst without a rate would never be refilled; the line says so and names `what`.
    pub fn new(what: &str, per_second: u64, burst: u64) -> Result<Option<Self>, String> {
        match (NonZeroU64::new(per_second), NonZeroU64::new(burst)) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(format!(
                "{what}: a burst without a rate; give per_second too"
            )),
            (Some(per_second), burst) => Ok(Some(Self {
                per_second,
                burst: burst.unwrap_or(per_second),
            })),
        }
    }

    /// One that is known at compile time.
    pub const fn fixed(per_second: NonZeroU64, burst: NonZeroU64) -> Self {
        Self { per_second, burst }
    }

    /// A bucket of a control message; absent is no limit.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, naming `what`.
    pub fn from_message(
        what: &str,
        bucket: Option<&common::TokenBucket>,
    ) -> Result<Option<Self>, RpcStatus> {
        bucket.map_or(Ok(None), |b| {
            Self::new(what, b.per_second, b.burst).map_err(RpcStatus::invalid_argument)
        })
    }

    /// Tokens per second.
    pub fn per_second(&self) -> u64 {
        self.per_second.get()
    }

    /// Most tokens that may be saved up.
    pub fn burst(&self) -> u64 {
        self.burst.get()
    }
}

/// One bucket: full at first.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// In billionths; negative is a debt.
    level: i128,
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            level: i128::from(rate.burst()).saturating_mul(NANO),
            filled: now,
        }
    }

    /// The same bucket at another rate. What is saved stays, up to the new burst; a debt of
    /// the old rate's is forgiven, or a rate of a few bytes, once set, would be felt for
    /// days.
    fn change(&mut self, rate: Rate, now: Instant) {
        self.fill(now);
        let full = i128::from(rate.burst()).saturating_mul(NANO);
        self.rate = rate;
        self.level = self.level.clamp(0, full);
    }

    /// Adds what has come since the last time. A clock that steps back adds nothing.
    fn fill(&mut self, now: Instant) {
        let ns = now.saturating_duration_since(self.filled).as_nanos();
        self.filled = self.filled.max(now);
        let full = i128::from(self.rate.burst()).saturating_mul(NANO);
        let gain = i128::try_from(ns)
            .unwrap_or(i128::MAX)
            .saturating_mul(i128::from(self.rate.per_second()));
        self.level = self.level.saturating_add(gain).min(full);
    }

    /// Time until a request may pass; None if it may now. `fill` has been called.
    fn wait(&self) -> Option<Duration> {
        if self.level > 0 {
            return None;
        }
        let missing = 1i128.saturating_sub(self.level).unsigned_abs();
        let ns = missing.div_ceil(u128::from(self.rate.per_second()));
        let wait = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
        Some(wait.clamp(SHORTEST_WAIT, LONGEST_WAIT))
    }

    fn spend(&mut self, tokens: u64) {
        let cost = i128::from(tokens).saturating_mul(NANO);
        self.level = self.level.saturating_sub(cost);
    }

    /// Takes `tokens`, or says how long to wait before asking again.
    ///
    /// # Errors
    /// The time to wait, never zero.
    pub fn take(&mut self, now: Instant, tokens: u64) -> Result<(), Duration> {
        self.fill(now);
        match self.wait() {
            Some(wait) => Err(wait),
            None => {
                self.spend(tokens);
                Ok(())
            }
        }
    }
}

#[derive(Debug, Default)]
struct Buckets {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

/// The limits on all queues of a device, or on one direction of it.
#[derive(Debug, Default)]
pub struct Limiter {
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
}

impl Limiter {
    /// Limits of `bytes` and `operations` (or packets) per second; none where None.
    pub fn new(bytes: Option<Rate>, operations: Option<Rate>, now: Instant) -> Self {
        let limiter = Self::default();
        limiter.set(bytes, operations, now);
        limiter
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces both limits. Workers that wait for the old ones must be woken afterwards
    /// (the runtime does so after [`Device::update`]).
    ///
    /// [`Device::update`]: crate::device::Device::update
    pub fn set(&self, bytes: Option<Rate>, operations: Option<Rate>, now: Instant) {
        fn change(bucket: &mut Option<TokenBucket>, rate: Option<Rate>, now: Instant) {
            match (bucket.as_mut(), rate) {
                (Some(b), Some(rate)) => b.change(rate, now),
                (_, rate) => *bucket = rate.map(|rate| TokenBucket::new(rate, now)),
            }
        }
        let mut buckets = self.lock();
        change(&mut buckets.bytes, bytes, now);
        change(&mut buckets.operations, operations, now);
        let limited = bytes.is_some() || operations.is_some();
        self.limited.store(limited, Ordering::Relaxed);
    }

    /// The limits in force: bytes and operations.
    pub fn rates(&self) -> (Option<Rate>, Option<Rate>) {
        let buckets = self.lock();
        let rate = |b: &Option<TokenBucket>| b.as_ref().map(|b| b.rate);
        (rate(&buckets.bytes), rate(&buckets.operations))
    }

    /// Whether there is any limit: if not, a worker need not even look at the clock.
    #[inline]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Lets a request of so many bytes and operations pass, or says how long to wait before
    /// asking again. Nothing is taken in that case.
    ///
    /// # Errors
    /// The time to wait, never zero.
    #[inline]
    pub fn take(&self, now: Instant, bytes: u64, operations: u64) -> Result<(), Duration> {
        if !self.is_limited() {
            return Ok(());
        }
        self.take_limited(now, bytes, operations)
    }

    fn take_limited(&self, now: Instant, bytes: u64, operations: u64) -> Result<(), Duration> {
        let mut buckets = self.lock();
        let Buckets {
            bytes: by_bytes,
            operations: by_operations,
        } = &mut *buckets;
        let mut wait = None;
        for bucket in [&mut *by_bytes, &mut *by_operations].into_iter().flatten() {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        if let Some(wait) = wait {
            return Err(wait);
        }
        if let Some(bucket) = by_bytes {
            bucket.spend(bytes);
        }
        if let Some(bucket) = by_operations {
            bucket.spend(operations);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
