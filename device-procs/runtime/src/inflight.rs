//! The in-flight region: which requests a device has taken and not yet given back, kept in
//! memory that outlives the device process (vhost-user protocol, "Inflight I/O tracking",
//! the layout for split virtqueues).
//!
//! ```text
//!   region of queue i, each at a multiple of 64 bytes      descriptor state, 16 bytes each
//!    0 features u64          12 last_batch_head u16         0 inflight u8      6 next u16
//!    8 version u16 (1)       14 used_idx u16                1 padding [u8; 5]  8 counter u64
//!   10 desc_num u16          16 descriptor states
//! ```
//!
//! [`InflightRegion`] belongs to the main thread, which maps what the front-end hands over.
//! [`Log`] belongs to a ring, and so to its worker: a few plain stores per request, in the
//! order that the specification demands, so that the process may be killed between any two
//! of them. Nothing is read back while the ring runs.
//!
//! Behind the queues' regions, at the next page, there may be a piece for the device's own
//! use ([`KeptMemory`]), of which the front-end knows nothing but that it keeps it.
//!
//! What lies in the region when a ring starts was written by another process, or by
//! anyone: it is checked as a whole before any of it is obeyed, and refused if it cannot
//! have come from a device that keeps the rules. A front-end that shrinks its own file
//! later ends this process by SIGBUS, as with guest memory.

use std::fs::File;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, VolatileSlice};

use crate::memory::{Area, Memory, MemoryError, Region};
use crate::ring::MAX_RING_SIZE;

/// Version of the layout; 0 is a region that nobody has begun to use.
const VERSION: u16 = 1;
/// Each queue's region begins at a multiple of this (as libvhost-user and DPDK have it).
const ALIGN: usize = 64;
const PAGE: u64 = 4096;
const HEADER: usize = 16;
const STATE: usize = 16;
const WORD: usize = 8;

// Offsets in the header, and in a descriptor's state.
const AT_FEATURES: usize = 0;
const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
const OF_INFLIGHT: usize = 0;
const OF_NEXT: usize = 6;
const OF_COUNTER: usize = 8;

/// What is wrong with a queue's part of the region: no device that keeps the rules leaves it
/// like that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// Not a layout of ours.
    #[error("has version {version} and features {features:#x}, where 1 and 0 are known")]
    Version {
        /// The version that it says.
        version: u16,
        /// The features that it says.
        features: u64,
    },
    /// The header contradicts the message that came with the region.
    #[error("says {found} descriptors, the front-end {said}")]
    Descriptors {
        /// In the region.
        found: u16,
        /// In the message.
        said: u16,
    },
    /// The ring has more descriptors than the region.
    #[error("is for {have} descriptors, the ring has {need}")]
    Small {
        /// In the region.
        have: u16,
        /// In the ring.
        need: u16,
    },
    /// A descriptor's state is neither 0 nor 1, or lies beyond the ring.
    #[error("holds an impossible state for descriptor {0}")]
    State(u16),
    /// The used ring is further ahead than a batch can be.
    #[error("is {0} completions behind the used ring, more than the ring holds")]
    Batch(u16),
    /// The list of the last batch leaves the table or runs in a circle.
    #[error("has a broken list of completions at descriptor {0}")]
    List(u16),
    /// Two requests in flight claim the same place in the order.
    #[error("gives two requests the same place in the order")]
    Order,
    /// The memory is not there.
    #[error("is not mapped as it was described")]
    Mapping,
}

/// Why a region was refused as a whole.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// More queues than the device has, or none.
    #[error("in-flight region for {asked} queues; the device has {have}")]
    Queues {
        /// What the front-end said.
        asked: u16,
        /// What there is.
        have: u16,
    },
    /// A ring size that no ring may have.
    #[error("in-flight region for rings of {0}; from 1 to {MAX_RING_SIZE} is served")]
    QueueSize(u16),
    /// The region is smaller than its queues need.
    #[error("in-flight region of {have:#x} bytes; its queues need {need:#x}")]
    Size {
        /// What the front-end said.
        have: u64,
        /// What is needed.
        need: u64,
    },
    /// It begins at an odd place.
    #[error("in-flight region at offset {0:#x}, which is no multiple of 8")]
    Offset(u64),
    /// It cannot be mapped.
    #[error("in-flight region: {0}")]
    Map(#[from] MemoryError),
}

fn queue_bytes(queue_size: u16) -> usize {
    (HEADER + STATE * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// Bytes that a region for so many queues of such a size takes.
pub fn region_bytes(queues: u16, queue_size: u16) -> u64 {
    (queue_bytes(queue_size) as u64).saturating_mul(u64::from(queues))
}

/// Where the device's own piece begins.
fn kept_at(queues: u16, queue_size: u16) -> u64 {
    region_bytes(queues, queue_size).next_multiple_of(PAGE)
}

/// Whether a device with `have` queues can keep such a region.
fn check(asked: u16, queue_size: u16, have: u16) -> Result<(), RegionError> {
    if asked == 0 || asked > have {
        return Err(RegionError::Queues { asked, have });
    }
    if queue_size == 0 || queue_size > MAX_RING_SIZE {
        return Err(RegionError::QueueSize(queue_size));
    }
    Ok(())
}

/// What a device has to be kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    /// Its queues.
    pub(crate) queues: u16,
    /// Bytes that it uses itself.
    pub(crate) kept: u64,
}

/// The file that this process offers as region (GET_INFLIGHT_FD). It is made before
/// confinement, as large as it may ever have to be; until it is used it costs nothing.
#[derive(Debug)]
pub(crate) struct InflightFile {
    file: File,
    capacity: Capacity,
    used: bool,
}

impl InflightFile {
    /// A file for such a device, which nobody can make larger or smaller.
    pub(crate) fn new(capacity: Capacity) -> std::io::Result<Self> {
        let bytes = kept_at(capacity.queues, MAX_RING_SIZE).saturating_add(capacity.kept);
        let file = crate::sys::sealed_memfd("inflight", bytes)?;
        Ok(Self {
            file,
            capacity,
            used: false,
        })
    }

    /// A region for so many queues of such a size, all zeros: its bytes, and the file. There
    /// is only one, so no ring may be using it.
    pub(crate) fn offer(
        &mut self,
        queues: u16,
        queue_size: u16,
    ) -> Result<(u64, &File), RegionError> {
        check(queues, queue_size, self.capacity.queues)?;
        let bytes = match self.capacity.kept {
            0 => region_bytes(queues, queue_size),
            kept => kept_at(queues, queue_size).saturating_add(kept),
        };
        if self.used {
            let region = Memory::new(vec![Region::map(&self.file, 0, bytes, 0, 0)?])?;
            for at in (0..bytes).step_by(PAGE as usize) {
                let len = bytes.saturating_sub(at).min(PAGE);
                region.write(
                    at,
                    [0; PAGE as usize].get(..len as usize).unwrap_or_default(),
                );
            }
        }
        self.used = true;
        Ok((bytes, &self.file))
    }
}

/// A region that the front-end has handed over (SET_INFLIGHT_FD).
#[derive(Debug)]
pub(crate) struct InflightRegion {
    mapped: Memory,
    queues: u16,
    queue_size: u16,
    kept: usize,
}

impl InflightRegion {
    /// Maps what the front-end describes, for a device that has so much.
    pub(crate) fn map(
        file: &File,
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
        have: Capacity,
    ) -> Result<Self, RegionError> {
        check(queues, queue_size, have.queues)?;
        let need = region_bytes(queues, queue_size);
        if size < need {
            return Err(RegionError::Size { have: size, need });
        }
        if !offset.is_multiple_of(8) {
            return Err(RegionError::Offset(offset));
        }
        let kept_at = kept_at(queues, queue_size);
        let kept = size.saturating_sub(kept_at).min(have.kept);
        let mapped = if kept == 0 { need } else { kept_at + kept };
        let region = Region::map(file, 0, mapped, 0, offset)?;
        Ok(Self {
            mapped: Memory::new(vec![region])?,
            queues,
            queue_size,
            kept: usize::try_from(kept).unwrap_or(0),
        })
    }

    /// The piece for the device's own use, if there is one.
    pub(crate) fn kept(&self) -> Option<KeptMemory> {
        let at = kept_at(self.queues, self.queue_size);
        let area = self.mapped.area_at_user_addr(at, self.kept)?;
        (self.kept > 0).then_some(KeptMemory {
            area,
            len: self.kept,
        })
    }

    /// The part of one queue, if the region has one for it.
    pub(crate) fn ring(&self, index: usize) -> Option<InflightRing> {
        if index >= usize::from(self.queues) {
            return None;
        }
        let bytes = queue_bytes(self.queue_size);
        let at = u64::try_from(index.checked_mul(bytes)?).ok()?;
        Some(InflightRing {
            area: self.mapped.area_at_user_addr(at, bytes)?,
            desc_num: self.queue_size,
        })
    }
}

/// Memory that outlives the device process, for its own use: all zeros when the front-end
/// has just got it, else as the process before this one left it. Nothing that is in it is to
/// be trusted.
#[derive(Clone, Debug)]
pub struct KeptMemory {
    area: Area,
    len: usize,
}

impl KeptMemory {
    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads; what lies beyond the end stays as it is in `into`.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        let slice = self.area.slice().and_then(|s| s.offset(at).ok());
        if let Some(slice) = slice {
            // Short at the end of the memory.
            let _ = slice.read(into, 0);
        }
    }

    /// Writes, as far as the memory goes.
    pub fn write(&self, at: usize, from: &[u8]) {
        let slice = self.area.slice().and_then(|s| s.offset(at).ok());
        if let Some(slice) = slice {
            let _ = slice.write(from, 0);
        }
    }

    /// Writes eight bytes at a multiple of eight, little-endian: all or none, whenever the
    /// process ends, and after everything that was written before.
    pub fn store(&self, at: usize, value: u64) {
        if let Some(slice) = self.area.slice() {
            let _ = slice.store(value.to_le(), at, Ordering::Release);
        }
    }
}

/// One queue's part of the region.
#[derive(Clone, Debug)]
pub struct InflightRing {
    area: Area,
    desc_num: u16,
}

fn state(head: u16, field: usize) -> usize {
    HEADER + STATE * usize::from(head) + field
}

impl InflightRing {
    fn slice(&self) -> Result<VolatileSlice<'_>, InflightError> {
        self.area.slice().ok_or(InflightError::Mapping)
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> Result<T, InflightError> {
        self.slice()?
            .load(at, Ordering::Acquire)
            .map_err(|_| InflightError::Mapping)
    }

    /// Release, so that no store is seen before those that the program makes before it.
    #[inline]
    fn store<T: AtomicAccess>(&self, at: usize, value: T) -> Result<(), InflightError> {
        self.slice()?
            .store(value, at, Ordering::Release)
            .map_err(|_| InflightError::Mapping)?;
        #[cfg(test)]
        crate::crash::point();
        Ok(())
    }

    /// Begins a log in which nothing is in flight.
    fn initialise(&self, used_idx: u16) -> Result<(), InflightError> {
        self.store(AT_VERSION, 0u16)?;
        self.store(AT_FEATURES, 0u64)?;
        self.store(AT_DESC_NUM, self.desc_num)?;
        self.store(AT_LAST_BATCH_HEAD, 0u16)?;
        self.store(AT_USED_IDX, used_idx)?;
        for head in 0..self.desc_num {
            self.store(state(head, OF_INFLIGHT), 0u8)?;
            self.store(state(head, OF_NEXT), 0u16)?;
            self.store(state(head, OF_COUNTER), 0u64)?;
        }
        self.store(AT_VERSION, VERSION)
    }

    /// Whether a request is in flight, for each descriptor.
    fn states(&self, size: u16) -> Result<Vec<bool>, InflightError> {
        (0..self.desc_num)
            .map(|head| match self.load::<u8>(state(head, OF_INFLIGHT))? {
                0 => Ok(false),
                1 if head < size => Ok(true),
                _ => Err(InflightError::State(head)),
            })
            .collect()
    }

    /// The last `count` completions, newest first.
    fn last_batch(&self, count: u16, size: u16) -> Result<Vec<u16>, InflightError> {
        if count > size {
            return Err(InflightError::Batch(count));
        }
        let mut batch = Vec::with_capacity(usize::from(count));
        let mut head = self.load::<u16>(AT_LAST_BATCH_HEAD)?;
        for _ in 0..count {
            if head >= size || batch.contains(&head) {
                return Err(InflightError::List(head));
            }
            batch.push(head);
            head = self.load(state(head, OF_NEXT))?;
        }
        Ok(batch)
    }
}

/// What a ring that goes on where another process ended has to do first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads in flight, those to be submitted first at the end.
    pub(crate) resubmit: Vec<u16>,
}

/// The log of a running ring.
#[derive(Debug)]
pub(crate) struct Log {
    ring: InflightRing,
    /// Place in the order of the next request.
    counter: u64,
    /// As the header has them.
    last_batch_head: u16,
    used_idx: u16,
}

/// The first word of a descriptor's state.
#[inline]
fn state_word(inflight: u8, next: u16) -> u64 {
    let [n0, n1] = next.to_ne_bytes();
    u64::from_ne_bytes([inflight, 0, 0, 0, 0, 0, n0, n1])
}

impl Log {
    /// Goes on with the log that lies in the region, of a ring of `size` whose used index is
    /// `used_idx`; begins one, and answers None, if there is none yet.
    pub(crate) fn open(
        ring: InflightRing,
        size: u16,
        used_idx: u16,
    ) -> Result<(Self, Option<Recovered>), InflightError> {
        if size > ring.desc_num {
            return Err(InflightError::Small {
                have: ring.desc_num,
                need: size,
            });
        }
        let version = ring.load(AT_VERSION)?;
        if version == 0 {
            ring.initialise(used_idx)?;
            let log = Self {
                ring,
                counter: 0,
                last_batch_head: 0,
                used_idx,
            };
            return Ok((log, None));
        }
        let features = ring.load(AT_FEATURES)?;
        if version != VERSION || features != 0 {
            return Err(InflightError::Version { version, features });
        }
        let found = ring.load(AT_DESC_NUM)?;
        if found != ring.desc_num {
            return Err(InflightError::Descriptors {
                found,
                said: ring.desc_num,
            });
        }
        let mut in_flight = ring.states(size)?;
        let behind = used_idx.wrapping_sub(ring.load(AT_USED_IDX)?);
        if behind != 0 {
            // The last process ended while it noted a batch that the driver had been shown.
            // With nothing in flight there is nothing to note, and the used ring may even
            // be a new one.
            if in_flight.contains(&true) {
                let batch = ring.last_batch(behind, size)?;
                for head in batch {
                    ring.store(state(head, OF_INFLIGHT), 0u8)?;
                    if let Some(flag) = in_flight.get_mut(usize::from(head)) {
                        *flag = false;
                    }
                }
            }
            ring.store(AT_USED_IDX, used_idx)?;
        }
        let mut order = Vec::new();
        for (head, _) in (0..).zip(&in_flight).filter(|(_, flag)| **flag) {
            order.push((ring.load::<u64>(state(head, OF_COUNTER))?, head));
        }
        order.sort_unstable_by(|a, b| b.cmp(a));
        let counters = order.iter().map(|(counter, _)| counter);
        if counters.clone().zip(counters.skip(1)).any(|(a, b)| a == b) {
            return Err(InflightError::Order);
        }
        let newest = order.first().map_or(Some(0), |(c, _)| c.checked_add(1));
        let log = Self {
            counter: newest.ok_or(InflightError::Order)?,
            last_batch_head: ring.load(AT_LAST_BATCH_HEAD)?,
            used_idx,
            ring,
        };
        let resubmit = order.into_iter().map(|(_, head)| head).collect();
        Ok((log, Some(Recovered { resubmit })))
    }

    /// Stores whole words: fields that lie in one are known, and a store is a point at which
    /// the process may be killed.
    #[inline]
    fn store(&self, word: usize, value: u64) -> Result<(), InflightError> {
        let words = self.ring.area.words().ok_or(InflightError::Mapping)?;
        let word = words.get(word).ok_or(InflightError::Mapping)?;
        // Release: see InflightRing::store.
        word.store(value, Ordering::Release);
        #[cfg(test)]
        crate::crash::point();
        Ok(())
    }

    #[inline]
    fn store_state(&self, head: u16, inflight: u8, next: u16) -> Result<(), InflightError> {
        let word = (HEADER + STATE * usize::from(head)) / WORD;
        self.store(word, state_word(inflight, next))
    }

    /// Version, size, head of the last batch, used index.
    #[inline]
    fn store_header(&self) -> Result<(), InflightError> {
        let [v0, v1] = VERSION.to_ne_bytes();
        let [d0, d1] = self.ring.desc_num.to_ne_bytes();
        let [l0, l1] = self.last_batch_head.to_ne_bytes();
        let [u0, u1] = self.used_idx.to_ne_bytes();
        let word = u64::from_ne_bytes([v0, v1, d0, d1, l0, l1, u0, u1]);
        self.store(AT_VERSION / WORD, word)
    }

    /// A request was taken from the available ring.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) -> Result<(), InflightError> {
        self.store(state(head, OF_COUNTER) / WORD, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        // Its link was of use only until the batch that it was in had been noted.
        self.store_state(head, 1, 0)
    }

    /// The request taken last goes back to the available ring, untouched.
    pub(crate) fn untaken(&mut self, head: u16) -> Result<(), InflightError> {
        self.ring.store(state(head, OF_INFLIGHT), 0u8)
    }

    /// A request was put into the used ring, which does not show it yet.
    #[inline]
    pub(crate) fn completed(&mut self, head: u16) -> Result<(), InflightError> {
        self.store_state(head, 1, self.last_batch_head)?;
        self.last_batch_head = head;
        self.store_header()
    }

    /// The used ring, at `used_idx` now, shows these completions: all since the last time.
    #[inline]
    pub(crate) fn shown(&mut self, batch: &[u16], used_idx: u16) -> Result<(), InflightError> {
        // The links stay: a process that is killed here leaves the list to the next one. The
        // oldest one's leads out of the batch, and is not followed.
        let mut next = 0;
        for head in batch {
            self.store_state(*head, 0, next)?;
            next = *head;
        }
        self.used_idx = used_idx;
        self.store_header()
    }

    /// Forgets everything: the ring has ended in a way that nobody can go on from.
    pub(crate) fn discard(&mut self) -> Result<(), InflightError> {
        self.ring.store(AT_VERSION, 0u16)
    }
}

#[cfg(test)]
#[path = "inflight_region_tests.rs"]
mod region_tests;
#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
