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
//! A write that has completed is in the file, or in a table that the next flush writes
//! ([`crate::qcow2_overlay`]): like a disk's write cache, but it does not outlive this
//! process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::{FormatAccess, Mapping, ShallowMapping};

use crate::image_chain::{self, ImageError, Layer, MAX_PENDING, Opened};
use crate::image_io::{self, Buffer};
use crate::qcow2_header::Header;
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
    access: RwLock<FormatAccess<Store>>,
    top: Store,
    /// Held while clusters are allocated or metadata are written.
    alloc: Mutex<()>,
    /// Size of what lies beneath the top file.
    beneath: Option<u64>,
    header: Header,
    writable: bool,
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
    pub fn open(chain: Vec<Layer>, writable: bool) -> Result<Self, ImageError> {
        let Opened {
            access,
            top,
            header,
            beneath,
        } = image_chain::open(chain, writable)?;
        Ok(Self {
            access: RwLock::new(access),
            top,
            alloc: Mutex::new(()),
            beneath,
            header,
            writable,
        })
    }

    /// Size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.read_access().size()
    }

    fn read_access(&self) -> RwLockReadGuard<'_, FormatAccess<Store>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_access(&self) -> RwLockWriteGuard<'_, FormatAccess<Store>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_alloc(&self) -> MutexGuard<'_, ()> {
        self.alloc.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn need_writable(&self) -> io::Result<()> {
        if self.writable {
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
        let access = self.read_access();
        let (mapping, mapped) = access.get_mapping(step.offset, len)?;
        let len = len.min(mapped);
        match mapping {
            Mapping::Raw {
                storage, offset, ..
            } => read_data(storage.file(), step, len, offset),
            Mapping::Special { .. } => {
                let len = len.min(UNPACK);
                let mut buffer = Buffer::new(usize::try_from(len).unwrap_or(0), 4096);
                access.read(buffer.bytes(), step.offset)?;
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
        let access = self.read_access();
        let (extent, mapped) = extent(&access, step.offset, len)?;
        let len = len.min(mapped);
        if let Extent::Data(host) = extent {
            let (from, mut scratch) = (host..host.saturating_add(len), Vec::new());
            self.top.check_data(&from)?;
            let part = image_io::part(step, len, host, &mut scratch);
            let done = vectored::perform(self.top.file(), Direction::Write, &part, durable)?;
            self.top.wrote_to(host.saturating_add(u64::from(done)));
            return Ok(u64::from(done));
        }
        let alloc = self.lock_alloc();
        let done = self.allocate(&access, step, len)?;
        self.settle(
            &access,
            &alloc,
            extent != Extent::Nothing && extent != Extent::Beneath,
        )?;
        if durable {
            self.write_tables(&access, &alloc)?;
        }
        Ok(done)
    }

    /// Writes where there is no cluster yet: the data first, then the mapping.
    fn allocate(&self, access: &FormatAccess<Store>, step: &Step, len: u64) -> io::Result<u64> {
        let prepared = access.prepare_data_mapping(step.offset, len, true)?;
        if !prepared.storage().is(&self.top) {
            return Err(eio());
        }
        let (host, len) = (prepared.offset(), len.min(prepared.length()));
        let end = host.saturating_add(len);
        self.top.check_data(&(host..end))?;
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
            match vectored::perform(self.top.file(), Direction::Write, &part, false) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at = at.saturating_add(u64::from(n));
                    image_io::skip(&mut list, n as usize);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.top.wrote_to(end);
        access.commit_data_mapping(prepared)?;
        Ok(len)
    }

    /// After an allocation: what must not wait for the guest's next flush.
    fn settle(
        &self,
        access: &FormatAccess<Store>,
        alloc: &MutexGuard<'_, ()>,
        may_have_freed: bool,
    ) -> io::Result<()> {
        if may_have_freed {
            access.flush()?;
        }
        if self.top.must_apply() || self.top.pending() > MAX_PENDING {
            self.write_tables(access, alloc)?;
        }
        Ok(())
    }

    fn write_tables(
        &self,
        access: &FormatAccess<Store>,
        _alloc: &MutexGuard<'_, ()>,
    ) -> io::Result<()> {
        access.flush()?;
        self.top.apply()
    }

    /// Makes everything that was written durable.
    pub fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        let access = self.read_access();
        let alloc = self.lock_alloc();
        self.write_tables(&access, &alloc)
    }

    /// Gives up what the guest does not need any more, cluster by cluster; what is not a
    /// whole cluster stays. Reads as zeros then, or as before.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.need_writable()?;
        let mut access = self.write_access();
        self.release(&mut access, offset, len).map(|_| ())
    }

    /// Makes a range read as zeros. With `unmap`, its clusters are given up.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.need_writable()?;
        if unmap {
            let mut access = self.write_access();
            self.release(&mut access, offset, len)?;
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let access = self.read_access();
            let alloc = self.lock_alloc();
            let (extent, len) = extent(&access, at, end.saturating_sub(at))?;
            if len == 0 {
                return Err(eio());
            }
            match extent {
                Extent::Zero | Extent::Nothing => {}
                _ if self.header.version == 3 => {
                    access.write_zeroes(at, len)?;
                    self.settle(&access, &alloc, true)?;
                }
                _ => {
                    drop(alloc);
                    drop(access);
                    self.write_zero_data(at, len)?;
                }
            }
            at = at.saturating_add(len);
        }
        Ok(())
    }

    /// Version 2 has no mapping that says "zero".
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
    fn release(&self, access: &mut FormatAccess<Store>, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let mut holes: Vec<Range<u64>> = Vec::new();
            while at < end && holes.len() < MAX_PUNCHED {
                let (extent, len) = extent(access, at, end.saturating_sub(at))?;
                if len == 0 {
                    return Err(eio());
                }
                let allocated = matches!(extent, Extent::Data(_) | Extent::Shared);
                if allocated && self.can_release() {
                    if let Extent::Data(host) = extent {
                        let size = access.size();
                        holes.extend(self.whole_clusters(at, len, host, size));
                    }
                    if self.beneath.is_none() {
                        access.discard_to_backing(at, len)?;
                    } else {
                        access.discard_to_any(at, len)?;
                    }
                }
                at = at.saturating_add(len);
            }
            access.flush()?;
            self.top.apply()?;
            for hole in holes {
                // Only now that nothing refers to it. Not every file system can.
                if self.top.check_data(&hole).is_ok() {
                    let _ = image_io::punch(
                        self.top.file(),
                        hole.start,
                        hole.end.saturating_sub(hole.start),
                    );
                }
            }
        }
        Ok(())
    }

    /// Version 2 cannot hide what lies beneath.
    fn can_release(&self) -> bool {
        self.header.version == 3 || self.beneath.is_none()
    }

    /// The host clusters that discarding a range of guest data frees.
    fn whole_clusters(&self, at: u64, len: u64, host: u64, size: u64) -> Option<Range<u64>> {
        let mask = self.header.cluster_size() - 1;
        let start = at.checked_add(mask)? & !mask;
        let end = at.checked_add(len)?;
        // The disk's last cluster is whole wherever the disk ends.
        let end = if end == size {
            end.checked_add(mask)? & !mask
        } else {
            end & !mask
        };
        let first = host.checked_add(start.checked_sub(at)?)?;
        (start < end).then(|| first..first.saturating_add(end - start))
    }

    /// Makes the virtual disk larger; `Ok` if it is as large already.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        self.need_writable()?;
        let access = self.write_access();
        let old = access.size();
        if size <= old {
            return Ok(());
        }
        if !self.header.may_grow_to(size) {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        self.top.expect_size(size);
        // What lies beneath must not come to light in the new part.
        let mode = if self.beneath.is_some_and(|beneath| beneath > old) {
            PreallocateMode::Zero
        } else {
            PreallocateMode::None
        };
        let grown = access.resize_grow(size, mode);
        access.flush()?;
        self.top.apply()?;
        grown
    }
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
