//! The device's side of a split virtqueue (virtio 1.2, 2.7), safe against its driver.
//!
//! The ring lies in memory that the guest writes at any time. So every field is read at
//! most once per use and only the copy is looked at; indices, counts and addresses are
//! checked before they are used; whatever breaks the rules is a [`RingError`], after
//! which the owner stops the ring. Nothing here waits, panics or allocates per request.
//!
//! A `Ring` belongs to one worker thread.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, VolatileSlice};

use crate::chain::{Chain, ChainError};
use crate::inflight::{InflightError, InflightRing, Log};
use crate::memory::{Area, Memory};

/// Largest ring accepted (QEMU's limit too).
pub const MAX_RING_SIZE: u16 = 1024;

const DESC_SIZE: usize = 16;
const AVAIL_HEADER: usize = 4;
const USED_HEADER: usize = 4;
const USED_ELEM: usize = 8;
/// VIRTQ_AVAIL_F_NO_INTERRUPT
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY
const USED_F_NO_NOTIFY: u16 = 1;

/// What makes a ring malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is zero, not a power of two, or above [`MAX_RING_SIZE`].
    #[error("ring size {0} is not a power of two up to {MAX_RING_SIZE}")]
    Size(u32),
    /// A part of the ring is not wholly inside one memory region, or is misaligned.
    #[error("the {0} lies outside guest memory or is misaligned")]
    Address(&'static str),
    /// The driver claims more new buffers than the ring has room for.
    #[error("available index {idx} is more than the ring size ahead of {next}")]
    AvailIndex {
        /// What the driver wrote.
        idx: u16,
        /// Where the device stands.
        next: u16,
    },
    /// A head that is beyond the descriptor table.
    #[error("available ring names descriptor {0}, which is beyond the table")]
    Head(u16),
    /// A head that the device still works on.
    #[error("descriptor {0} was made available twice")]
    Duplicate(u16),
    /// The chain that starts at a head is malformed.
    #[error("descriptor chain {head}: {source}")]
    Chain {
        /// Head of the chain.
        head: u16,
        /// What is wrong with it.
        source: ChainError,
    },
    /// The in-flight region cannot be gone on from.
    #[error("in-flight region {0}")]
    Inflight(#[from] InflightError),
}

/// Where a ring lies, as SET_VRING_NUM and SET_VRING_ADDR told: user addresses are the
/// front-end's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors.
    pub size: u32,
    /// User address of the descriptor table.
    pub desc: u64,
    /// User address of the available (driver) area.
    pub avail: u64,
    /// User address of the used (device) area.
    pub used: u64,
}

/// Negotiated features that change how a ring is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_RING_EVENT_IDX
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC
    pub indirect: bool,
}

/// The parts of a ring in one memory snapshot.
#[derive(Debug)]
struct Parts {
    size: u16,
    desc: Area,
    avail: Area,
    used: Area,
}

impl Parts {
    fn resolve(memory: &Memory, layout: RingLayout) -> Result<Self, RingError> {
        let size = u16::try_from(layout.size)
            .ok()
            .filter(|s| s.is_power_of_two() && *s <= MAX_RING_SIZE)
            .ok_or(RingError::Size(layout.size))?;
        let n = usize::from(size);
        let area = |addr, len, align, what| {
            memory
                .area_at_user_addr(addr, len)
                .filter(|a| a.is_aligned(align))
                .ok_or(RingError::Address(what))
        };
        Ok(Self {
            size,
            desc: area(layout.desc, DESC_SIZE * n, 16, "descriptor table")?,
            avail: area(layout.avail, AVAIL_HEADER + 2 * n + 2, 2, "available ring")?,
            used: area(layout.used, USED_HEADER + USED_ELEM * n + 2, 4, "used ring")?,
        })
    }
}

/// Where the chain at a head is, as the device sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Head {
    /// With the driver.
    #[default]
    Free,
    /// Left in flight by a process before this one, and not popped yet.
    Waiting,
    /// Popped.
    InFlight,
    /// In the used ring, which does not show it yet.
    Completed,
}

/// A running split ring.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    layout: RingLayout,
    size: u16,
    features: RingFeatures,
    desc: Area,
    avail: Area,
    used: Area,
    /// Next entry of the available ring to look at.
    next_avail: u16,
    /// The driver's index when it was last read.
    seen_avail: u16,
    /// Next entry of the used ring to fill.
    next_used: u16,
    /// What of `next_used` the driver has been shown.
    published: u16,
    /// `next_used` when the driver was last signalled, if it ever was.
    signalled: Option<u16>,
    /// Where each head is.
    heads: Vec<Head>,
    /// Completed since the last `publish`.
    batch: Vec<u16>,
    in_flight: u16,
    /// Popped from the available ring and not put back.
    taken: u64,
    log: Option<Log>,
    /// What a process before this one left in flight, the next one at the end.
    resubmit: Vec<u16>,
    /// The driver has been asked for a kick, or may take it so.
    kicks_wanted: bool,
}

impl Ring {
    /// Resolves a ring in guest memory. It goes on at available index `base`; the used
    /// index is the one that the ring itself holds.
    pub fn new(
        memory: Arc<Memory>,
        layout: RingLayout,
        features: RingFeatures,
        base: u16,
    ) -> Result<Self, RingError> {
        let Parts {
            size,
            desc,
            avail,
            used,
        } = Parts::resolve(&memory, layout)?;
        let mut ring = Self {
            layout,
            size,
            features,
            desc,
            avail,
            used,
            next_avail: base,
            seen_avail: base,
            next_used: 0,
            published: 0,
            signalled: None,
            heads: vec![Head::Free; usize::from(size)],
            batch: Vec::with_capacity(usize::from(size)),
            in_flight: 0,
            kicks_wanted: true,
            taken: 0,
            log: None,
            resubmit: Vec::new(),
            memory,
        };
        ring.next_used = ring.load_u16(&ring.used, 2, Ordering::Acquire)?;
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Logs requests in flight from now on; to be called before anything is popped. If the
    /// region holds a log already, the ring goes on where that ends: its requests come out of
    /// `pop` first, in their old order, and the available index follows from the used index,
    /// whatever base was given. True in that case.
    pub fn keep_log(&mut self, region: InflightRing) -> Result<bool, RingError> {
        let (log, recovered) = Log::open(region, self.size, self.next_used)?;
        self.log = Some(log);
        let Some(recovered) = recovered else {
            return Ok(false);
        };
        for head in &recovered.resubmit {
            if let Some(at) = self.heads.get_mut(usize::from(*head)) {
                *at = Head::Waiting;
            }
        }
        // As many as the ring has descriptors, at most.
        let count = u16::try_from(recovered.resubmit.len()).unwrap_or(u16::MAX);
        self.next_avail = self.next_used.wrapping_add(count);
        self.seen_avail = self.next_avail;
        self.resubmit = recovered.resubmit;
        Ok(true)
    }

    /// Requests that a process before this one left in flight and that were not popped yet.
    #[inline]
    pub fn to_resubmit(&self) -> u16 {
        u16::try_from(self.resubmit.len()).unwrap_or(u16::MAX)
    }

    /// Forgets the log: a ring that ended as malformed is not gone on from, and its driver
    /// sets up another.
    pub fn discard_log(&mut self) {
        if let Some(log) = &mut self.log {
            // The region cannot vanish while it is mapped.
            let _ = log.discard();
        }
    }

    /// The same ring in another memory snapshot. Nothing may be in flight: that would point
    /// into the old one.
    pub fn relocate(&mut self, memory: Arc<Memory>) -> Result<(), RingError> {
        let parts = Parts::resolve(&memory, self.layout)?;
        self.desc = parts.desc;
        self.avail = parts.avail;
        self.used = parts.used;
        self.memory = memory;
        Ok(())
    }

    /// The memory snapshot that this ring and its buffers live in.
    #[inline]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where the ring lies, to resolve it again in another snapshot.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The features that it was made with.
    pub fn features(&self) -> RingFeatures {
        self.features
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The available index at which a successor goes on.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Requests popped and not yet completed.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    #[inline]
    fn load_u16(&self, area: &Area, offset: usize, order: Ordering) -> Result<u16, RingError> {
        area.slice()
            .and_then(|s| s.load::<u16>(offset, order).ok())
            .map(u16::from_le)
            .ok_or(RingError::Address("ring"))
    }

    #[inline]
    fn store_u16(
        &self,
        area: &Area,
        offset: usize,
        value: u16,
        order: Ordering,
    ) -> Result<(), RingError> {
        area.slice()
            .and_then(|s| s.store(value.to_le(), offset, order).ok())
            .ok_or(RingError::Address("ring"))?;
        #[cfg(test)]
        crate::crash::point();
        Ok(())
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size.wrapping_sub(1)))
    }

    /// Takes the next available chain into `chain` (whose buffers are reused). `None`
    /// when there is none. What is to be submitted again comes first.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        if !self.resubmit.is_empty() {
            return self.pop_again(chain);
        }
        if self.next_avail == self.seen_avail && !self.refresh_avail()? {
            return Ok(None);
        }
        let at = AVAIL_HEADER + 2 * self.slot(self.next_avail);
        // The Acquire load of the index ordered this one behind it.
        let head = self.load_u16(&self.avail, at, Ordering::Relaxed)?;
        let Some(at) = self.heads.get_mut(usize::from(head)) else {
            return Err(RingError::Head(head));
        };
        if *at != Head::Free {
            return Err(RingError::Duplicate(head));
        }
        Self::walk(
            &self.memory,
            &self.desc,
            self.size,
            self.features,
            head,
            chain,
        )?;
        *at = Head::InFlight;
        if let Some(log) = &mut self.log {
            log.taken(head)?;
        }
        self.in_flight = self.in_flight.saturating_add(1);
        self.taken = self.taken.wrapping_add(1);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    #[inline]
    fn walk(
        memory: &Memory,
        desc: &Area,
        size: u16,
        features: RingFeatures,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let table: VolatileSlice<'_> =
            desc.slice().ok_or(RingError::Address("descriptor table"))?;
        chain
            .walk(memory, &table, size, head, features.indirect)
            .map_err(|source| RingError::Chain { head, source })
    }

    /// The next request that a process before this one left in flight. It is in the log and
    /// among the outstanding ones already.
    #[cold]
    fn pop_again(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let Some(head) = self.resubmit.last().copied() else {
            return Ok(None);
        };
        Self::walk(
            &self.memory,
            &self.desc,
            self.size,
            self.features,
            head,
            chain,
        )?;
        self.resubmit.pop();
        self.mark(head, Head::Waiting, Head::InFlight)?;
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(Some(head))
    }

    /// Puts back the request that was popped last, as if it had never been seen: the next
    /// `pop` finds it again. Several are put back in the reverse of the order in which they
    /// were popped, with nothing completed in between.
    pub fn unpop(&mut self, head: u16) -> Result<(), RingError> {
        let Some(taken) = self.taken.checked_sub(1) else {
            // Nothing new was popped, so this one came from the log, and is still there.
            self.mark(head, Head::InFlight, Head::Waiting)?;
            self.in_flight = self.in_flight.saturating_sub(1);
            self.resubmit.push(head);
            return Ok(());
        };
        self.mark(head, Head::InFlight, Head::Free)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        self.taken = taken;
        self.next_avail = self.next_avail.wrapping_sub(1);
        match &mut self.log {
            Some(log) => Ok(log.untaken(head)?),
            None => Ok(()),
        }
    }

    #[inline]
    fn mark(&mut self, head: u16, from: Head, to: Head) -> Result<(), RingError> {
        match self.heads.get_mut(usize::from(head)) {
            Some(at) if *at == from => {
                *at = to;
                Ok(())
            }
            _ => Err(RingError::Head(head)),
        }
    }

    /// Reads the driver's index; true if there is something new.
    fn refresh_avail(&mut self) -> Result<bool, RingError> {
        let idx = self.load_u16(&self.avail, 2, Ordering::Acquire)?;
        if idx.wrapping_sub(self.next_avail) > self.size {
            return Err(RingError::AvailIndex {
                idx,
                next: self.next_avail,
            });
        }
        self.seen_avail = idx;
        Ok(idx != self.next_avail)
    }

    /// How many chains wait to be popped, those of the log included, as far as the driver
    /// has told by now.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        self.refresh_avail()?;
        Ok(self
            .seen_avail
            .wrapping_sub(self.next_avail)
            .saturating_add(self.to_resubmit()))
    }

    /// Puts a completed chain into the used ring. The driver sees it after [`publish`].
    ///
    /// [`publish`]: Self::publish
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.mark(head, Head::InFlight, Head::Completed)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        let at = USED_HEADER + USED_ELEM * self.slot(self.next_used);
        let mut elem = [0u8; USED_ELEM];
        let (id, len) = elem.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        len.copy_from_slice(&written.to_le_bytes());
        self.used
            .slice()
            .and_then(|s| s.write_slice(&elem, at).ok())
            .ok_or(RingError::Address("used ring"))?;
        #[cfg(test)]
        crate::crash::point();
        if let Some(log) = &mut self.log {
            log.completed(head)?;
        }
        self.batch.push(head);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Gives up a popped chain without completing it: its ring is malformed and stops.
    pub fn forget(&mut self, head: u16) {
        if self.mark(head, Head::InFlight, Head::Free).is_ok() {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
    }

    /// Shows the driver everything completed so far; true if it wants an interrupt for
    /// it. One call per batch.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.published == self.next_used {
            return Ok(false);
        }
        self.store_u16(&self.used, 2, self.next_used, Ordering::Release)?;
        self.published = self.next_used;
        if let Some(log) = &mut self.log {
            log.shown(&self.batch, self.next_used)?;
        }
        for head in self.batch.drain(..) {
            if let Some(at) = self.heads.get_mut(usize::from(head)) {
                *at = Head::Free;
            }
        }
        // The index must be visible before the driver's wish is read (2.7.7.2).
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            let flags = self.load_u16(&self.avail, 0, Ordering::Relaxed)?;
            return Ok(flags & AVAIL_F_NO_INTERRUPT == 0);
        }
        let at = AVAIL_HEADER + 2 * usize::from(self.size);
        let event = self.load_u16(&self.avail, at, Ordering::Relaxed)?;
        let wanted = match self.signalled {
            None => true,
            Some(old) => crossed(event, self.next_used, old),
        };
        self.signalled = Some(self.next_used);
        Ok(wanted)
    }

    /// Asks the driver to kick for the next buffer; true if one is there already, in
    /// which case the caller must look again before it sleeps.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        self.kicks_wanted = true;
        if self.features.event_idx {
            let at = USED_HEADER + USED_ELEM * usize::from(self.size);
            self.store_u16(&self.used, at, self.next_avail, Ordering::Relaxed)?;
        } else {
            self.store_u16(&self.used, 0, 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before the index is read again (2.7.10.1).
        fence(Ordering::SeqCst);
        self.refresh_avail()
    }

    /// Tells the driver that no kick is needed for now: the worker looks by itself.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        if !std::mem::replace(&mut self.kicks_wanted, false) {
            return Ok(());
        }
        if !self.features.event_idx {
            return self.store_u16(&self.used, 0, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
        // An index that the driver has passed. To leave it where it is would do only once
        // the driver has passed it, after a kick for that.
        let at = USED_HEADER + USED_ELEM * usize::from(self.size);
        let passed = self.next_avail.wrapping_sub(1);
        self.store_u16(&self.used, at, passed, Ordering::Relaxed)
    }
}

/// vring_need_event: did the index pass `event` on its way from `old` to `new`?
#[inline]
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
