//! A disk in a format, with the files beneath it: opened from descriptors, read and written
//! as the guest sees it.
//!
//! What is opened is an attacker's: everything here runs after the process has given up all
//! that it could be made to misuse. No file is opened by name; the descriptors are the
//! chain, and a header that names more or fewer is refused.
//!
//! Guest data never pass through the format driver: it says where they lie, and they are
//! read and written there by one system call over the guest's own memory. The driver is
//! shared by all queue workers. Reads, and writes to what is allocated, run side by side;
//! writes that allocate take turns; a discard waits until it is alone, because it gives
//! clusters away that others might be about to write.
//!
//! A write that has completed is in the file, but the table that leads to it may wait for the
//! next flush ([`crate::qcow2_overlay`]). Where the front-end keeps memory for it, that
//! table outlives this process ([`crate::qcow2_journal`]); elsewhere it is lost with it,
//! like the write cache of a disk.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bulkhead_runtime::inflight::KeptMemory;
use imago::format::PreallocateMode;
use imago::{FormatAccess, Mapping, ShallowMapping};

use crate::backing::{self, Formatted};
use crate::disk;
use crate::disk_options::{Cache, DiskOptions};
use crate::image_chain::{self, ImageError, Layer, MAX_PENDING, Opened};
use crate::image_io::{self, Buffer};
use crate::qcow2_journal::{Journal, JournalError, Kept, LOG_BYTES};
use crate::qcow2_store::Backend;
use crate::qcow2_store::Store;
use crate::transfer::{Direction, Step};
use crate::vectored;

/// Longest piece of compressed data that is unpacked at a time.
const UNPACK: u64 = 256 * 1024;
/// Extents that one request may touch before others get their turn.
const MAX_PUNCHED: usize = 1024;
/// Zeros written at a time where an image cannot say "zero".
const ZEROS: usize = 64 * 1024;

/// An open image.
#[derive(Debug)]
pub struct Image {
    state: RwLock<Opened>,
    /// Held while clusters are allocated or metadata are written.
    alloc: Mutex<()>,
    chain: Vec<Layer>,
    writable: bool,
    /// This process has changed it, so that what it has read of it holds.
    changed: AtomicBool,
}

/// Why the memory that outlives this process is not used.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// What was changed before cannot be written.
    #[error("the image's tables cannot be written: {0}")]
    Write(io::Error),
    /// There is no log.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// What was left does not make an image.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// What a stretch of the top file's guest clusters is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// Data of its own, at this offset, which nothing else refers to.
    Data(u64),
    /// Data that must be copied to be changed: compressed, or referred to more than once.
    Shared,
    /// Whatever lies beneath.
    Beneath,
    /// Zeros, which may or may not have a cluster.
    Zero,
    /// Nothing at all.
    Nothing,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Image {
    /// Opens a qcow2 image and what lies beneath it, top first.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn open(chain: Vec<Layer>, writable: bool) -> Result<Self, ImageError> {
        let state = image_chain::open(&chain, writable, Vec::new())?;
        Ok(Self {
            state: RwLock::new(state),
            alloc: Mutex::new(()),
            chain,
            writable,
            changed: AtomicBool::new(false),
        })
    }

    /// From now on, what a completed write needs to be found again is in `kept` too, which
    /// outlives this process. What another process left there is put into the image first. One
    /// that has changed nothing reads the image again: it may have been opened while another
    /// process still served it. No request may be in flight.
    ///
    /// # Errors
    /// One line; the image is as it was.
    pub fn keep(&self, kept: Box<dyn Kept>) -> Result<(), KeepError> {
        if !self.writable {
            return Ok(());
        }
        let mut state = self.write_state();
        self.write_tables(&state).map_err(KeepError::Write)?;
        let (mut journal, left) = Journal::open(kept)?;
        if !left.is_empty() {
            log::info!(
                "the process before this one left {} changed sectors: written",
                left.len()
            );
        }
        if !left.is_empty() || !self.changed.load(Ordering::Relaxed) {
            *state = image_chain::open(&self.chain, self.writable, left)?;
        }
        journal.clear();
        state.top.set_journal(journal);
        Ok(())
    }

    /// Size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.read_state().access.size()
    }

    fn read_state(&self) -> RwLockReadGuard<'_, Opened> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, Opened> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_alloc(&self) -> MutexGuard<'_, ()> {
        self.alloc.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before any change.
    fn need_writable(&self) -> io::Result<()> {
        if self.writable {
            self.changed.store(true, Ordering::Relaxed);
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EROFS))
        }
    }

    /// Does a step of a transfer as far as it goes in one piece: bytes done, at least one.
    /// The step's offset is the guest's. With `durable`, what was written is on stable
    /// storage afterwards.
    pub fn transfer(&self, direction: Direction, step: &Step, durable: bool) -> io::Result<u32> {
        let len = image_io::step_len(step).min(u64::from(u32::MAX));
        if len == 0 {
            return Err(eio());
        }
        let done = match direction {
            Direction::Read => self.read(step, len)?,
            Direction::Write => self.write(step, len, durable)?,
        };
        match u32::try_from(done) {
            Ok(done) if done > 0 => Ok(done),
            _ => Err(eio()),
        }
    }

    fn read(&self, step: &Step, len: u64) -> io::Result<u64> {
        let state = self.read_state();
        let (mapping, mapped) = state.access.get_mapping(step.offset, len)?;
        let len = len.min(mapped);
        match mapping {
            Mapping::Raw {
                storage, offset, ..
            } => read_data(storage.file(), step, len, offset),
            Mapping::Special { .. } => {
                let len = len.min(UNPACK);
                let mut buffer = Buffer::new(usize::try_from(len).unwrap_or(0), 4096);
                state.access.read(buffer.bytes(), step.offset)?;
                image_io::fill(step, buffer.bytes());
                Ok(len)
            }
            Mapping::Zero { .. } => {
                image_io::zero(step, len);
                Ok(len)
            }
            // Beyond the end of the disk; the request was checked against it.
            _ => Err(eio()),
        }
    }

    fn write(&self, step: &Step, len: u64, durable: bool) -> io::Result<u64> {
        self.need_writable()?;
        let state = self.read_state();
        let (extent, mapped) = extent(&state.access, step.offset, len)?;
        let len = len.min(mapped);
        if let Extent::Data(host) = extent {
            let (top, mut scratch) = (&state.top, Vec::new());
            top.check_data(&(host..host.saturating_add(len)))?;
            let part = image_io::part(step, len, host, &mut scratch);
            let done = vectored::perform(top.file(), Direction::Write, &part, durable)?;
            top.wrote_to(host.saturating_add(u64::from(done)));
            return Ok(u64::from(done));
        }
        let _alloc = self.lock_alloc();
        let done = allocate(&state, step, len)?;
        let may_have_freed = extent != Extent::Nothing && extent != Extent::Beneath;
        self.settle(&state, may_have_freed)?;
        if durable {
            self.write_tables(&state)?;
        }
        Ok(done)
    }

    /// After tables were changed, under the lock: what must not wait for the guest's next
    /// flush.
    fn settle(&self, state: &Opened, may_have_freed: bool) -> io::Result<()> {
        let Opened { access, top, .. } = state;
        if may_have_freed || top.is_logged() {
            access.flush()?;
        }
        if top.must_apply() || top.pending() > MAX_PENDING || !top.log() {
            self.write_tables(state)?;
        }
        Ok(())
    }

    fn write_tables(&self, state: &Opened) -> io::Result<()> {
        state.access.flush()?;
        state.top.apply()
    }

    /// Makes everything that was written durable.
    pub fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        let state = self.read_state();
        let _alloc = self.lock_alloc();
        self.write_tables(&state)
    }

    /// Gives up what the guest does not need any more, cluster by cluster; what is not a
    /// whole cluster stays. Reads as zeros then, or as before.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.need_writable()?;
        self.release(&mut self.write_state(), offset, len)
    }

    /// Makes a range read as zeros. With `unmap`, its clusters are given up.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.need_writable()?;
        if unmap {
            self.release(&mut self.write_state(), offset, len)?;
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let state = self.read_state();
            let alloc = self.lock_alloc();
            let (extent, len) = extent(&state.access, at, end.saturating_sub(at))?;
            if len == 0 {
                return Err(eio());
            }
            match extent {
                Extent::Zero | Extent::Nothing => {}
                _ => {
                    let size = state.access.size();
                    let whole = if state.header.version == 3 {
                        whole_clusters(at, len, size, state.header.cluster_size())
                    } else {
                        // Version 2 has no mapping that says "zero".
                        at..at
                    };
                    if !whole.is_empty() {
                        state.access.write_zeroes(whole.start, whole_len(&whole))?;
                        self.settle(&state, true)?;
                    }
                    drop(alloc);
                    drop(state);
                    // The driver's own way with parts of clusters fails on a disk that is
                    // smaller than one.
                    self.write_zero_data(at, whole.start.saturating_sub(at))?;
                    let end = at.saturating_add(len);
                    self.write_zero_data(whole.end, end.saturating_sub(whole.end))?;
                }
            }
            at = at.saturating_add(len);
        }
        Ok(())
    }

    /// Writes zeros as any other data.
    fn write_zero_data(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut zeros = Buffer::new(ZEROS, 4096);
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let piece = end.saturating_sub(at).min(ZEROS as u64);
            let segment = libc::iovec {
                iov_base: zeros.bytes().as_mut_ptr().cast(),
                iov_len: usize::try_from(piece).unwrap_or(0),
            };
            let step = Step {
                segments: &raw const segment,
                count: 1,
                single: Some(segment),
                offset: at,
            };
            at = at.saturating_add(u64::from(self.transfer(Direction::Write, &step, false)?));
        }
        Ok(())
    }

    /// Frees clusters, in the image and in the file system, nobody else being at work.
    fn release(&self, state: &mut Opened, offset: u64, len: u64) -> io::Result<()> {
        // Version 2 cannot hide what lies beneath.
        if state.header.version < 3 && state.beneath.is_some() {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let mut holes: Vec<Range<u64>> = Vec::new();
            while at < end && holes.len() < MAX_PUNCHED {
                let access = &mut state.access;
                let (extent, len) = extent(access, at, end.saturating_sub(at))?;
                if len == 0 {
                    return Err(eio());
                }
                if let Extent::Data(host) = extent {
                    let cluster = state.header.cluster_size();
                    let whole = whole_clusters(at, len, access.size(), cluster);
                    let first = host.saturating_add(whole.start.saturating_sub(at));
                    let len = whole_len(&whole).next_multiple_of(cluster);
                    if len > 0 {
                        holes.push(first..first.saturating_add(len));
                    }
                }
                match extent {
                    Extent::Data(_) | Extent::Shared if state.beneath.is_none() => {
                        access.discard_to_backing(at, len)?;
                    }
                    Extent::Data(_) | Extent::Shared => access.discard_to_any(at, len)?,
                    _ => {}
                }
                at = at.saturating_add(len);
            }
            self.write_tables(state)?;
            for hole in holes {
                // Only now that nothing refers to it. Not every file system can.
                if state.top.check_data(&hole).is_ok() {
                    let len = hole.end.saturating_sub(hole.start);
                    let _ = image_io::punch(state.top.file(), hole.start, len);
                }
            }
        }
        Ok(())
    }

    /// Makes the virtual disk larger; `Ok` if it is as large already.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        self.need_writable()?;
        let state = self.write_state();
        let old = state.access.size();
        if size <= old {
            return Ok(());
        }
        if !state.header.may_grow_to(size) {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        state.top.expect_size(size);
        // What lies beneath must not come to light in the new part.
        let mode = if state.beneath.is_some_and(|beneath| beneath > old) {
            PreallocateMode::Zero
        } else {
            PreallocateMode::None
        };
        let grown = state.access.resize_grow(size, mode);
        self.write_tables(&state)?;
        grown
    }
}

impl backing::Image for Image {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn transfer(&self, direction: Direction, step: &Step, durable: bool) -> io::Result<u32> {
        Self::transfer(self, direction, step, durable)
    }

    fn flush(&self) -> io::Result<()> {
        Self::flush(self)
    }

    fn settle(&self) -> io::Result<()> {
        Self::flush(self)
    }

    fn can_discard(&self) -> bool {
        self.writable
    }

    fn discard_granularity(&self) -> u32 {
        u32::try_from(self.read_state().header.cluster_size()).unwrap_or(u32::MAX)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Self::discard(self, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        Self::write_zeroes(self, offset, len, unmap)
    }

    fn keep(&self, memory: KeptMemory) -> Result<(), String> {
        Self::keep(self, Box::new(memory)).map_err(|e| e.to_string())
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        Self::grow(self, size)
    }
}

impl Kept for KeptMemory {
    fn len(&self) -> usize {
        Self::len(self)
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        Self::read(self, at, buffer);
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        Self::write(self, at, bytes);
    }

    fn store(&self, at: usize, value: u64) {
        Self::store(self, at, value);
    }
}

/// A qcow2 disk over these files, top first, to be opened after confinement.
pub fn qcow2(chain: Vec<(String, disk::Opened)>, options: &DiskOptions) -> Formatted {
    let durable = options.cache != Cache::Unsafe;
    let writable = !options.readonly;
    let layers = chain.into_iter().map(|(name, opened)| Layer {
        name,
        backend: Arc::new(Backend {
            file: opened.file,
            len: opened.len,
            direct: opened.direct,
            durable,
        }),
    });
    let layers: Vec<Layer> = layers.collect();
    let open = move || match Image::open(layers, writable) {
        Ok(image) => Ok(Box::new(image) as Box<dyn backing::Image>),
        Err(e) => Err(e.to_string()),
    };
    Formatted::new(Box::new(open), if writable { LOG_BYTES } else { 0 })
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(e) = self.flush() {
            log::error!("the image's tables cannot be written: {e}");
        }
    }
}

/// Writes where there is no cluster yet: the data first, then the mapping.
fn allocate(state: &Opened, step: &Step, len: u64) -> io::Result<u64> {
    let Opened { access, top, .. } = state;
    let prepared = access.prepare_data_mapping(step.offset, len, true)?;
    if !prepared.storage().is(top) {
        return Err(eio());
    }
    let (host, len) = (prepared.offset(), len.min(prepared.length()));
    let end = host.saturating_add(len);
    top.check_data(&(host..end))?;
    let mut list = Vec::new();
    image_io::part(step, len, host, &mut list);
    let mut at = host;
    while !list.is_empty() {
        let segments = list.get(..list.len().min(1024)).unwrap_or_default();
        let part = Step {
            segments: segments.as_ptr(),
            count: u32::try_from(segments.len()).unwrap_or(0),
            single: None,
            offset: at,
        };
        match vectored::perform(top.file(), Direction::Write, &part, false) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                at = at.saturating_add(u64::from(n));
                image_io::skip(&mut list, n as usize);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    top.wrote_to(end);
    access.commit_data_mapping(prepared)?;
    Ok(len)
}

/// The clusters that lie in a range of guest data as a whole; empty if none does.
fn whole_clusters(at: u64, len: u64, size: u64, cluster: u64) -> Range<u64> {
    let mask = cluster.saturating_sub(1);
    let end = at.saturating_add(len);
    let start = at.saturating_add(mask) & !mask;
    // The disk's last cluster is whole wherever the disk ends.
    let last = if end == size { end } else { end & !mask };
    if start < last { start..last } else { at..at }
}

fn whole_len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn extent(access: &FormatAccess<Store>, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
    let (mapping, len) = access.get_shallow_mapping(offset, len)?;
    let extent = match mapping {
        ShallowMapping::Raw {
            offset,
            writable: true,
            ..
        } => Extent::Data(offset),
        ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } => Extent::Shared,
        ShallowMapping::Indirect { .. } => Extent::Beneath,
        ShallowMapping::Zero { explicit: true, .. } => Extent::Zero,
        ShallowMapping::Zero { .. } => Extent::Nothing,
        _ => return Err(eio()),
    };
    Ok((extent, len))
}

fn read_data(file: &File, step: &Step, len: u64, offset: u64) -> io::Result<u64> {
    let mut scratch = Vec::new();
    let part = image_io::part(step, len, offset, &mut scratch);
    let done = u64::from(vectored::perform(file, Direction::Read, &part, false)?);
    // The file may end before the cluster does, even within a sector: zeros from there on.
    if done == 0 || done % 512 != 0 {
        image_io::skip(&mut scratch, usize::try_from(done).unwrap_or(usize::MAX));
        let mut rest = Vec::new();
        let left = Step {
            segments: scratch.as_ptr(),
            count: u32::try_from(scratch.len()).unwrap_or(0),
            single: None,
            offset,
        };
        let left = image_io::part(&left, len, offset, &mut rest);
        image_io::zero(&left, len);
        return Ok(len);
    }
    Ok(done)
}
