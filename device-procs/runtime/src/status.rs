//! What the outside may know about a ring: health and counters.
//!
//! The queue's worker writes, the main thread reads for Health and Stats. Each counter has
//! one writer, so an increment is a plain load and store, not a locked instruction.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
}
