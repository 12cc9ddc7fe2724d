//! Frames from the tap to the guest (virtio 1.2, 5.1.6.3 and 5.1.6.4): judges frames that an
//! engine has read into private memory, and copies those that the driver wants into buffers
//! of the rx ring, merged where the driver takes merged ones.
//!
//! Owned by the worker thread of its pair. Buffers are taken from the ring only when the
//! frame for them is there, so nothing is in flight between two frames, and they go back in
//! the order in which they came.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::{Buffer, Chain};
use bulkhead_runtime::status::QueueStatus;

use crate::features::F_MRG_RXBUF;
use crate::filter::Filter;
use crate::state::State;
use crate::tap::{HEADER, MAX_FRAME};
use crate::transmit::{payload, report};

/// Where num_buffers lies in the header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// A chain that can hold no frame: the ring is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Malformed {
    #[error("receive buffer of {0} bytes, shorter than a frame's header")]
    Short(u32),
    #[error("a receive buffer is device-readable")]
    Readable,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The guest has it, or nobody wants it.
    Done,
    /// The ring has no room for it now; the driver kicks when it has added some.
    NoBuffers,
    /// A limit holds it back for so long.
    Held(Duration),
}

/// The receiving half of a pair.
pub struct Receive {
    ring: ActiveRing,
    status: Arc<QueueStatus>,
    state: Arc<State>,
    chain: Chain,
    heads: Vec<(u16, u32)>,
    buffers: Vec<Buffer>,
    filter: Filter,
    generation: u64,
    mergeable: bool,
    /// The frame at hand has been counted against the limit.
    paid: bool,
    failing: bool,
}

impl Receive {
    /// Serves this ring.
    pub fn new(ring: ActiveRing, status: Arc<QueueStatus>, state: Arc<State>) -> Self {
        let mergeable = ring.features() & F_MRG_RXBUF != 0;
        Self {
            heads: Vec::with_capacity(usize::from(ring.size())),
            buffers: Vec::with_capacity(usize::from(ring.size())),
            ring,
            status,
            filter: state.filter(),
            generation: u64::MAX,
            state,
            chain: Chain::new(),
            mergeable,
            paid: false,
            failing: false,
        }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut ActiveRing {
        &mut self.ring
    }

    /// The tap could not be read, for this reason.
    pub fn failed(&mut self, errno: i32) {
        self.status.errors.add(1);
        report(&self.state, &self.status, &mut self.failing, errno);
    }

    /// Hands a frame, with its header, to the guest. It may be called again with the same
    /// frame when the answer was not [`Delivery::Done`]. `now` is only asked for when there
    /// is a limit.
    #[inline]
    pub fn deliver(&mut self, frame: &mut [u8], now: impl Fn() -> Instant) -> Delivery {
        self.failing = false;
        if !self.paid {
            self.state
                .refresh_filter(&mut self.filter, &mut self.generation);
            let wanted = frame.len() <= MAX_FRAME
                && self.state.is_link_up()
                && frame.get(HEADER..).is_some_and(|f| self.filter.passes(f));
            if !wanted {
                return self.drop_frame();
            }
            let len = payload(u32::try_from(frame.len()).unwrap_or(u32::MAX));
            if self.state.to_guest.is_limited()
                && let Err(wait) = self.state.to_guest.take(now(), len, 1)
            {
                self.status.throttled.add(1);
                return Delivery::Held(wait);
            }
            self.paid = true;
        }
        let delivery = self.place(frame);
        self.paid = delivery != Delivery::Done;
        delivery
    }

    fn drop_frame(&mut self) -> Delivery {
        self.status.dropped.add(1);
        Delivery::Done
    }

    fn place(&mut self, frame: &mut [u8]) -> Delivery {
        self.heads.clear();
        self.buffers.clear();
        let mut room = 0usize;
        while room < frame.len() {
            if self.heads.len() >= usize::from(self.ring.size()) || (room > 0 && !self.mergeable) {
                // All buffers of the ring together, or the one there may be, cannot hold it.
                self.put_back();
                return self.drop_frame();
            }
            let Some(head) = self.ring.pop(&mut self.chain) else {
                // Asked for before the rest is put back: the next kick is to tell of more
                // buffers than there are now.
                if self.ring.enable_kicks() {
                    continue;
                }
                self.put_back();
                return if self.ring.is_broken() {
                    self.drop_frame()
                } else {
                    Delivery::NoBuffers
                };
            };
            let len = self.chain.writable_len();
            let malformed = if !self.chain.readable().is_empty() {
                Some(Malformed::Readable)
            } else if (len as usize) < HEADER {
                Some(Malformed::Short(len))
            } else {
                None
            };
            if let Some(why) = malformed {
                self.ring.reject(head, &why);
                self.put_back();
                return self.drop_frame();
            }
            self.heads.push((head, len));
            // Empty ones would let a chain of twelve bytes cost a thousand entries.
            let filled = self.chain.writable().iter().filter(|b| b.len > 0);
            self.buffers.extend(filled);
            room = room.saturating_add(len as usize);
        }
        let count = u16::try_from(self.heads.len()).unwrap_or(1);
        if let Some(field) = frame.get_mut(NUM_BUFFERS) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        self.copy(frame);
        Delivery::Done
    }

    fn put_back(&mut self) {
        while let Some((head, _)) = self.heads.pop() {
            self.ring.unpop(head);
        }
    }

    /// Fills the buffers and gives them back.
    fn copy(&mut self, frame: &[u8]) {
        let mut rest = frame;
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
            // Within guest memory, as the chain's walk has found.
            self.ring.memory().write(buffer.addr, now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        let mut left = u32::try_from(frame.len()).unwrap_or(0);
        self.status.requests.add(1);
        self.status.read_bytes.add(payload(left));
        for (head, len) in &self.heads {
            let filled = left.min(*len);
            left = left.saturating_sub(filled);
            self.ring.complete(*head, filled);
        }
    }

    /// Ends service; the available index at which a successor goes on.
    pub fn stop(self) -> u16 {
        self.ring.stop()
    }
}
