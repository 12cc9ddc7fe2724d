//! What the outside may know about a ring: health and counters.
//!
//! The queue's worker writes, the main thread reads for Health and Stats. Each counter has
//! one writer, so an increment is a plain load and store, not a locked instruction. The
//! other way goes [`Pause`] alone.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a latency histogram: bucket i counts what took less than 2^i microseconds and
/// no less than half of that; the last one all that took longer.
pub const LATENCY_BUCKETS: usize = 32;

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the queue's own worker may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(n), Ordering::Relaxed);
    }

    /// Replaces the value; only the queue's own worker may call this.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a worker sleeps, as far as requests in its ring are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// It does not, or there are none: one that the driver offers wakes it.
    Idle,
    /// The host has not done its part yet: [`QueueStatus::waits_for_host`].
    ForHost,
    /// A limit, or buffers for what the host sends: [`QueueStatus::held`].
    ByOrder,
}

/// Health and counters of one queue since the process started.
#[derive(Debug, Default)]
pub struct QueueStatus {
    /// The ring is being served.
    pub started: AtomicBool,
    /// The ring was found malformed and stopped; cleared when it is set up anew.
    pub broken: AtomicBool,
    /// Requests popped and not yet completed.
    pub in_flight: Counter,
    /// Requests completed.
    pub requests: Counter,
    /// Bytes read from the device for the guest.
    pub read_bytes: Counter,
    /// Bytes written to the device for the guest.
    pub written_bytes: Counter,
    /// Flushes completed.
    pub flushes: Counter,
    /// Requests that ended in an error status.
    pub errors: Counter,
    /// Kicks seen.
    pub kicks: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    /// Times the worker entered the kernel.
    pub syscalls: Counter,
    /// Discards completed.
    pub discards: Counter,
    /// Write-zeroes completed.
    pub write_zeroes: Counter,
    /// Requests (frames) thrown away: no buffers, filtered, link down.
    pub dropped: Counter,
    /// Times that a rate limit made the queue wait.
    pub throttled: Counter,
    /// The worker is about to sleep (or sleeps) until the host has done something for the
    /// oldest request in flight. A worker that is merely stuck leaves it false.
    pub waits_for_host: AtomicBool,
    /// The worker is about to sleep (or sleeps) by order: a limit holds the ring back, or its
    /// buffers are for what the host will send. A worker that is merely stuck leaves it false.
    pub held: AtomicBool,
    host_errors: Counter,
    last_errno: AtomicI32,
    last_sector: AtomicU64,
    latency: [Counter; LATENCY_BUCKETS],
    pub(crate) pause: Pause,
}

impl QueueStatus {
    /// Says, before the worker sleeps, why requests in the ring may have to wait meanwhile.
    pub fn sleeps(&self, why: Sleep) {
        let host = why == Sleep::ForHost;
        self.waits_for_host.store(host, Ordering::Relaxed);
        let held = why == Sleep::ByOrder;
        self.held.store(held, Ordering::Relaxed);
    }

    /// The host failed a request: its errno (positive), and the sector where the request
    /// begins (0 if it has none). Only the queue's own worker may call this.
    pub fn host_error(&self, errno: i32, sector: u64) {
        self.last_errno.store(errno, Ordering::Relaxed);
        self.last_sector.store(sector, Ordering::Relaxed);
        self.host_errors.add(1);
    }

    /// Requests that the host failed, and the last one's errno and sector.
    pub fn host_errors(&self) -> (u64, i32, u64) {
        (
            self.host_errors.get(),
            self.last_errno.load(Ordering::Relaxed),
            self.last_sector.load(Ordering::Relaxed),
        )
    }

    /// A request took this long, from the ring until it went back. Only the queue's own
    /// worker may call this.
    #[inline]
    pub fn record_latency(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - us.leading_zeros()) as usize;
        if let Some(counter) = self.latency.get(bucket.min(LATENCY_BUCKETS - 1)) {
            counter.add(1);
        }
    }

    /// The latency histogram; empty if nothing was measured.
    pub fn latency(&self) -> Vec<u64> {
        let counts: Vec<u64> = self.latency.iter().map(Counter::get).collect();
        if counts.iter().all(|c| *c == 0) {
            return Vec::new();
        }
        counts
    }

    /// Drained: the worker has seen that it is paused, or serves no ring, and nothing is in
    /// flight.
    pub(crate) fn is_drained(&self) -> bool {
        let parked = self.pause.is_acknowledged() || !self.started.load(Ordering::Acquire);
        parked && self.in_flight.get() == 0
    }
}

/// Whether a worker takes new requests. The main thread writes `turn`, the worker answers in
/// `seen`: so a drain is never reported while the worker is between a look at the flag and
/// the request that it then took.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    /// Odd while paused; grows with each change.
    turn: AtomicU64,
    seen: AtomicU64,
}

impl Pause {
    /// Pauses or goes on; called by the main thread alone.
    pub(crate) fn set(&self, paused: bool) {
        let turn = self.turn.load(Ordering::Relaxed);
        if (turn & 1 != 0) != paused {
            self.turn.store(turn.wrapping_add(1), Ordering::Release);
        }
    }

    /// Whether new requests must wait; called by the worker alone, and noted.
    #[inline]
    pub(crate) fn look(&self) -> bool {
        let turn = self.turn.load(Ordering::Acquire);
        if turn & 1 == 0 {
            return false;
        }
        self.seen.store(turn, Ordering::Release);
        true
    }

    fn is_acknowledged(&self) -> bool {
        let turn = self.turn.load(Ordering::Relaxed);
        turn & 1 != 0 && self.seen.load(Ordering::Acquire) == turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_buckets_of_powers_of_two() {
        let status = QueueStatus::default();
        assert!(status.latency().is_empty(), "not measured");
        for us in [0, 1, 2, 3, 4, 1023, 1024] {
            status.record_latency(Duration::from_micros(us));
        }
        status.record_latency(Duration::from_nanos(999));
        status.record_latency(Duration::MAX);
        let mut expected = vec![0; LATENCY_BUCKETS];
        let counts = [(0, 2), (1, 1), (2, 2), (3, 1), (10, 1), (11, 1), (31, 1)];
        for (bucket, count) in counts {
            if let Some(e) = expected.get_mut(bucket) {
                *e = count;
            }
        }
        assert_eq!(status.latency(), expected);
    }

    #[test]
    fn the_last_host_error_is_kept() {
        let status = QueueStatus::default();
        assert_eq!(status.host_errors(), (0, 0, 0));
        status.host_error(libc::EIO, 77);
        status.host_error(libc::ENOSPC, 8);
        assert_eq!(status.host_errors(), (2, libc::ENOSPC, 8));
    }

    #[test]
    fn a_queue_is_drained_only_once_its_worker_has_seen_the_pause() {
        let status = QueueStatus::default();
        status.pause.set(true);
        assert!(status.is_drained(), "no ring is served");
        status.started.store(true, Ordering::Relaxed);
        assert!(!status.is_drained());
        assert!(status.pause.look());
        assert!(status.is_drained());
        status.in_flight.set(1);
        assert!(!status.is_drained());
        status.in_flight.set(0);
        // What was seen of an earlier pause does not count for a later one.
        status.pause.set(false);
        status.pause.set(true);
        status.pause.set(true);
        assert!(!status.is_drained());
        assert!(status.pause.look());
        assert!(status.is_drained());
        status.pause.set(false);
        assert!(!status.pause.look());
    }
}
