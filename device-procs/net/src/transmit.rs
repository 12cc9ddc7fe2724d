//! Frames from the guest to the tap (virtio 1.2, 5.1.6.2): takes chains from the tx ring in
//! batches and gives them back in order, whatever the engine did with them.
//!
//! Owned by the worker thread of its pair. Nothing is allocated per frame; a chain that is no
//! frame at all stops the ring, a frame that the tap does not take is dropped and counted.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::status::QueueStatus;
use libc::iovec;
use vm_memory::VolatileSlice;

use crate::state::State;
use crate::tap::{HEADER, MAX_FRAME};
use crate::{features, tap_ioctl};

/// Frames of a batch.
pub const BATCH: usize = 64;
/// Most segments of a frame (UIO_MAXIOV).
const MAX_SEGMENTS: usize = 1024;
/// A batch ends when it has so many segments.
const ENOUGH_SEGMENTS: usize = 1024;

/// A chain that can be no frame: the ring is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Malformed {
    #[error("frame of {0} bytes, shorter than its header")]
    Short(u32),
    #[error("a transmitted frame has device-writable buffers")]
    Writable,
}

/// A piece of a frame in guest memory. Whoever has one borrows it from the [`Transmit`] that
/// keeps the memory mapped.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Segment(iovec);

impl Segment {
    fn new(slice: &VolatileSlice<'_>) -> Self {
        Self(iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    /// Where it begins.
    pub fn start(&self) -> *const u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are none; segments of frames always have some.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// A list of segments as the kernel takes it.
    pub fn list(segments: &[Self]) -> *const iovec {
        // Transparent.
        segments.as_ptr().cast()
    }
}

/// What is to be done with a frame, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The tap is to get it.
    Waiting,
    /// The tap has it.
    Sent,
    /// Nobody gets it.
    Dropped,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    head: u16,
    first: usize,
    segments: usize,
    len: u32,
    fate: Fate,
}

/// The transmitting half of a pair.
pub struct Transmit {
    ring: ActiveRing,
    status: Arc<QueueStatus>,
    state: Arc<State>,
    /// What the driver accepted.
    features: u64,
    chain: Chain,
    frames: Vec<Frame>,
    segments: Vec<Segment>,
    /// A limit holds the next frame back for so long.
    held: Option<Duration>,
    /// The tap's last answer was an error of the host's.
    failing: bool,
}

impl Transmit {
    /// Serves this ring.
    pub fn new(ring: ActiveRing, status: Arc<QueueStatus>, state: Arc<State>) -> Self {
        Self {
            ring,
            status,
            features: state.features(),
            state,
            chain: Chain::new(),
            frames: Vec::with_capacity(BATCH),
            segments: Vec::with_capacity(ENOUGH_SEGMENTS + MAX_SEGMENTS),
            held: None,
            failing: false,
        }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut ActiveRing {
        &mut self.ring
    }

    /// How long a limit holds the next frame back.
    pub fn held(&self) -> Option<Duration> {
        self.held
    }

    /// Whether frames wait until the tap has room again.
    pub fn is_blocked(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Takes a batch of frames from the ring, unless an earlier one is still there. `now` is
    /// only asked for when there is a limit.
    pub fn fill(&mut self, now: impl Fn() -> Instant) {
        if !self.frames.is_empty() {
            return;
        }
        self.segments.clear();
        self.held = None;
        while self.frames.len() < BATCH && self.segments.len() < ENOUGH_SEGMENTS {
            let Some(head) = self.ring.pop(&mut self.chain) else {
                return;
            };
            let len = self.chain.readable_len();
            if (len as usize) < HEADER {
                return self.ring.reject(head, &Malformed::Short(len));
            }
            if !self.chain.writable().is_empty() {
                return self.ring.reject(head, &Malformed::Writable);
            }
            if self.state.from_guest.is_limited()
                && let Err(wait) = self.state.from_guest.take(now(), payload(len), 1)
            {
                self.ring.unpop(head);
                self.status.throttled.add(1);
                self.held = Some(wait);
                return;
            }
            self.add(head, len);
        }
    }

    fn add(&mut self, head: u16, len: u32) {
        let first = self.segments.len();
        let mut fate = Fate::Waiting;
        if len as usize > MAX_FRAME || !self.state.is_link_up() {
            fate = Fate::Dropped;
        } else {
            let memory = self.ring.memory();
            for buffer in self.chain.readable() {
                // Within guest memory, as the chain's walk has found: no piece is missing.
                memory.for_each_slice(buffer.addr, u64::from(buffer.len), |slice| {
                    if !slice.is_empty() {
                        self.segments.push(Segment::new(&slice));
                    }
                });
            }
        }
        let segments = self.segments.len().saturating_sub(first);
        if segments > MAX_SEGMENTS {
            self.segments.truncate(first);
            fate = Fate::Dropped;
        } else if fate == Fate::Waiting && !self.is_permitted(first) {
            self.status.errors.add(1);
            fate = Fate::Dropped;
        }
        self.frames.push(Frame {
            head,
            first,
            segments,
            len,
            fate,
        });
    }

    /// Whether what the frame's header says is left to do was negotiated. A guest that writes
    /// there meanwhile gets by: the kernel, which reads it anew, trusts no header.
    fn is_permitted(&self, first: usize) -> bool {
        let mut start = [0; 2];
        let mut have = 0;
        for segment in self.segments.get(first..).unwrap_or_default() {
            match start.get_mut(have..) {
                Some(rest) if !rest.is_empty() => {
                    have = have.saturating_add(tap_ioctl::gather(segment, rest));
                }
                _ => break,
            }
        }
        let [flags, gso_type] = start;
        start == [0; 2] || features::permits(self.features, flags, gso_type)
    }

    /// Frames of this batch; they have the numbers from 0 on.
    pub fn count(&self) -> usize {
        self.frames.len()
    }

    /// The frame of that number as segments of guest memory, if the tap is to get it. They
    /// stay mapped until [`Self::settle`] has given the frame back.
    #[inline]
    pub fn waiting(&self, number: usize) -> Option<&[Segment]> {
        let frame = self.frames.get(number)?;
        if frame.fate != Fate::Waiting {
            return None;
        }
        self.segments.get(frame.first..)?.get(..frame.segments)
    }

    /// What the tap answered for a frame: a length, or a negative errno. Without room
    /// (EAGAIN) it goes on waiting.
    pub fn answered(&mut self, number: usize, result: i32) {
        let Some(frame) = self.frames.get_mut(number) else {
            return;
        };
        if result >= 0 {
            frame.fate = Fate::Sent;
            self.failing = false;
        } else if result != -libc::EAGAIN {
            frame.fate = Fate::Dropped;
            self.status.errors.add(1);
            let errno = result.wrapping_neg();
            report(&self.state, &self.status, &mut self.failing, errno);
        }
    }

    /// Gives back, in order, all frames whose fate is known; true if others wait for room.
    pub fn settle(&mut self) -> bool {
        let known = self
            .frames
            .iter()
            .take_while(|frame| frame.fate != Fate::Waiting)
            .count();
        self.give_back(known);
        !self.frames.is_empty()
    }

    fn give_back(&mut self, count: usize) {
        for frame in self.frames.drain(..count.min(self.frames.len())) {
            match frame.fate {
                Fate::Sent => {
                    self.status.requests.add(1);
                    self.status.written_bytes.add(payload(frame.len));
                }
                Fate::Waiting | Fate::Dropped => self.status.dropped.add(1),
            }
            self.ring.complete(frame.head, 0);
        }
    }

    /// Gives everything back at once: what the tap has not got is lost.
    pub fn abandon(&mut self) {
        self.give_back(self.frames.len());
        self.segments.clear();
        self.held = None;
    }

    /// Ends service; the available index at which a successor goes on.
    pub fn stop(mut self) -> u16 {
        self.abandon();
        self.ring.stop()
    }
}

/// Bytes of a frame without its header.
pub(crate) fn payload(len: u32) -> u64 {
    u64::from(len).saturating_sub(HEADER as u64)
}

/// Notes an error of the host's, once until it has gone: the tap is down (EIO) or gone. One that
/// was deleted is noted as that only.
pub(crate) fn report(state: &State, status: &QueueStatus, failing: &mut bool, errno: i32) {
    if errno == libc::EBADFD && state.look_at_tap() {
        return;
    }
    if matches!(errno, libc::EIO | libc::EBADFD | libc::ENODEV) && !*failing {
        *failing = true;
        status.host_error(errno, 0);
        let reason = io::Error::from_raw_os_error(errno);
        if errno == libc::EIO {
            log::warn!("tap: {reason}; frames are dropped until it is up");
        } else {
            log::warn!("tap: {reason}; frames are dropped");
        }
    }
}
