//! The bytes between a guest that prints and a host that reads: bounded, so that a reader
//! that stands still costs the guest a short wait once and then bytes, never a vCPU.
//!
//! vCPU threads push; the `serial` thread takes.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::line::Line;

/// Bytes kept for a reader.
const CAPACITY: usize = 64 << 10;
/// Bytes taken beyond that while vCPUs are on their way to wait for room.
const SLACK: usize = 4 << 10;
/// How long a vCPU waits for room before bytes are dropped.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// The reader has used up its patience: drop until there is room again.
    stuck: bool,
    /// Nobody is there to read: keep the newest bytes for whoever comes.
    detached: bool,
    closed: bool,
}

/// The buffer.
#[derive(Debug)]
pub(super) struct Output {
    state: Mutex<State>,
    room: Condvar,
    wake: Arc<EventFd>,
    pub(super) dropped: AtomicU64,
}

impl Output {
    pub(super) fn new(wake: Arc<EventFd>) -> Self {
        Self {
            state: Mutex::default(),
            room: Condvar::new(),
            wake,
            dropped: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_bytes(&self, count: usize) {
        self.dropped.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Takes one byte from the guest, at once.
    pub(super) fn push(&self, byte: u8) {
        let mut state = self.lock();
        if state.closed || (state.stuck && state.bytes.len() >= CAPACITY) {
            return self.drop_bytes(1);
        }
        if state.detached && state.bytes.len() >= CAPACITY {
            state.bytes.pop_front();
            self.drop_bytes(1);
        } else if state.bytes.len() >= CAPACITY + SLACK {
            return self.drop_bytes(1);
        }
        state.bytes.push_back(byte);
        // Whoever finds the buffer empty wakes the thread; it takes everything at once.
        if state.bytes.len() == 1 {
            let _ = self.wake.write(1);
        }
    }

    /// Gives the reader a bounded time when the buffer is full. Called without any other lock.
    pub(super) fn wait_for_room(&self) {
        let mut state = self.lock();
        if state.bytes.len() < CAPACITY {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while state.bytes.len() >= CAPACITY && !(state.stuck || state.detached || state.closed) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.stuck = true;
                return;
            }
            state = self
                .room
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Copies up to `max` of the oldest bytes.
    pub(super) fn peek(&self, max: usize) -> Vec<u8> {
        self.lock().bytes.iter().take(max).copied().collect()
    }

    /// Removes what was written.
    pub(super) fn consume(&self, count: usize) {
        let mut state = self.lock();
        let count = count.min(state.bytes.len());
        state.bytes.drain(..count);
        state.stuck = false;
        self.room.notify_all();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    /// Says whether somebody reads.
    pub(super) fn set_detached(&self, detached: bool) {
        let mut state = self.lock();
        state.detached = detached;
        state.stuck = false;
        self.room.notify_all();
    }

    /// True while somebody reads.
    #[cfg(test)]
    pub(super) fn is_attached(&self) -> bool {
        !self.lock().detached
    }

    /// Nobody will ever read again: drops what there is and what comes.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let count = state.bytes.len();
        state.bytes.clear();
        self.drop_bytes(count);
        self.room.notify_all();
    }
}

/// The emulated UART's writer: to the backend, and to clients of the API.
pub(super) struct OutputWriter(pub(super) Arc<Output>, pub(super) Arc<Line>);

impl io::Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.push(*byte));
        self.1.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn output() -> Output {
        Output::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
    }

    fn dropped(output: &Output) -> usize {
        output.dropped.load(Ordering::Relaxed) as usize
    }

    #[test]
    fn a_stuck_reader_costs_one_wait_and_then_bytes() {
        let output = output();
        for _ in 0..CAPACITY {
            output.push(b'a');
        }
        assert_eq!(dropped(&output), 0);
        output.wait_for_room();
        for _ in 0..1000 {
            output.push(b'b');
            output.wait_for_room(); // returns at once: the patience is spent
        }
        assert_eq!(dropped(&output), 1000);
        output.consume(1);
        output.push(b'c');
        assert_eq!(dropped(&output), 1000, "there is room again");
        assert_eq!(output.peek(usize::MAX).len(), CAPACITY);
    }

    #[test]
    fn without_a_reader_the_newest_bytes_are_kept() {
        let output = output();
        output.set_detached(true);
        for _ in 0..CAPACITY {
            output.push(b'o');
        }
        b"new".iter().for_each(|byte| output.push(*byte));
        output.wait_for_room();
        assert_eq!(dropped(&output), 3);
        let kept = output.peek(usize::MAX);
        assert_eq!(kept.len(), CAPACITY);
        assert!(kept.ends_with(b"onew"));
    }

    #[test]
    fn vcpus_that_never_wait_do_not_grow_the_buffer() {
        let output = output();
        for _ in 0..10 * CAPACITY {
            output.push(b'x');
        }
        assert_eq!(output.peek(usize::MAX).len(), CAPACITY + SLACK);
        output.close();
        output.push(b'y');
        assert_eq!(dropped(&output), 10 * CAPACITY + 1);
        assert!(output.is_empty());
    }
}
