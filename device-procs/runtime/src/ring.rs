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
    /// One bit per head that was popped and not yet completed.
    outstanding: Vec<u64>,
    in_flight: u16,
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
        let desc = area(layout.desc, DESC_SIZE * n, 16, "descriptor table")?;
        let avail = area(layout.avail, AVAIL_HEADER + 2 * n + 2, 2, "available ring")?;
        let used = area(layout.used, USED_HEADER + USED_ELEM * n + 2, 4, "used ring")?;
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
            outstanding: vec![0; n.div_ceil(64)],
            in_flight: 0,
            memory,
        };
        ring.next_used = ring.load_u16(&ring.used, 2, Ordering::Acquire)?;
        ring.published = ring.next_used;
        Ok(ring)
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
            .ok_or(RingError::Address("ring"))
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size.wrapping_sub(1)))
    }

    /// Takes the next available chain into `chain` (whose buffers are reused). `None`
    /// when there is none.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        if self.next_avail == self.seen_avail && !self.refresh_avail()? {
            return Ok(None);
        }
        let at = AVAIL_HEADER + 2 * self.slot(self.next_avail);
        // The Acquire load of the index ordered this one behind it.
        let head = self.load_u16(&self.avail, at, Ordering::Relaxed)?;
        if head >= self.size {
            return Err(RingError::Head(head));
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        let Some(bits) = self.outstanding.get_mut(word) else {
            return Err(RingError::Head(head));
        };
        if *bits & bit != 0 {
            return Err(RingError::Duplicate(head));
        }
        let table: VolatileSlice<'_> = self
            .desc
            .slice()
            .ok_or(RingError::Address("descriptor table"))?;
        chain
            .walk(
                &self.memory,
                &table,
                self.size,
                head,
                self.features.indirect,
            )
            .map_err(|source| RingError::Chain { head, source })?;
        *bits |= bit;
        self.in_flight = self.in_flight.saturating_add(1);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
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

    /// Puts a completed chain into the used ring. The driver sees it after [`publish`].
    ///
    /// [`publish`]: Self::publish
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        match self.outstanding.get_mut(word) {
            Some(bits) if *bits & bit != 0 => *bits &= !bit,
            _ => return Err(RingError::Head(head)),
        }
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
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Gives up a popped chain without completing it: its ring is malformed and stops.
    pub fn forget(&mut self, head: u16) {
        let bit = 1u64 << (head % 64);
        if let Some(bits) = self.outstanding.get_mut(usize::from(head / 64))
            && *bits & bit != 0
        {
            *bits &= !bit;
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
        if self.features.event_idx {
            // The event index stays behind, which has the same effect.
            return Ok(());
        }
        self.store_u16(&self.used, 0, USED_F_NO_NOTIFY, Ordering::Relaxed)
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
