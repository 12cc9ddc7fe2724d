//! A file beneath a format driver: what the crate `imago` calls a storage object. It opens
//! nothing, reads and writes by system calls on a descriptor that it was given, and shows
//! the driver a header of its own making ([`Header::sanitized`]).
//!
//! Of an image that is written, it knows where the metadata lie ([`Map`]). What the driver
//! writes there goes into an [`Overlay`] until [`Store::apply`] puts it into the file in an
//! order that no crash can spoil; what it writes anywhere else is data, or a table that
//! nothing refers to yet, and goes into the file at once. Where guest data would be written
//! over metadata, the image is corrupt and the write fails.
//!
//! Shared by the queue workers, through the driver.

#![allow(unsafe_code)] // the driver's trait has unsafe methods; nothing unsafe is done in them

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::disk::Alignment;
use crate::image_io::{self, Buffer};
use crate::qcow2_header::{
    AT_L1_ENTRIES, AT_L1_OFFSET, AT_REFTABLE_CLUSTERS, AT_REFTABLE_OFFSET, AT_SIZE, Header,
};
use crate::qcow2_journal::Journal;
use crate::qcow2_map::{Kind, Map, MapError};
use crate::qcow2_overlay::{Medium, Overlay};

/// Fields of the header that change while an image is served lie from the first to here.
const MUTABLE_END: usize = AT_REFTABLE_CLUSTERS + 4;
/// Growth of a file beyond what its contents explain.
const SLACK: u64 = 64 << 20;

/// How a file is reached.
#[derive(Debug)]
pub struct Backend {
    /// The file.
    pub file: File,
    /// Its length in bytes when it was opened.
    pub len: u64,
    /// What O_DIRECT asks for, if it is on.
    pub direct: Option<Alignment>,
    /// Whether a barrier reaches the disk (not with cache=unsafe).
    pub durable: bool,
}

#[derive(Debug)]
struct Inner {
    backend: Arc<Backend>,
    memory_align: usize,
    align: u64,
    len: AtomicU64,
    /// No write goes beyond.
    limit: AtomicU64,
    /// What the driver is shown in place of the first cluster.
    header: Option<(u64, Vec<u8>)>,
    meta: Option<Mutex<Meta>>,
    helper: CommonStorageHelper,
}

/// Metadata of an image that is written.
#[derive(Debug)]
struct Meta {
    map: Map,
    overlay: Overlay,
    header: Header,
    /// The header names other tables than it did: apply soon.
    moved: bool,
}

/// A file beneath a format driver; clones are the same file.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("image")
    }
}

fn corrupt(why: &MapError) -> io::Error {
    log::error!("the image {why}");
    io::Error::from_raw_os_error(libc::EIO)
}

impl Store {
    /// A file that is only read. With a header, it is a qcow2 image.
    pub fn read_only(backend: Arc<Backend>, len: u64, header: Option<&Header>) -> Self {
        Self::new(backend, len, header, None, 0)
    }

    /// A qcow2 image that is written.
    pub fn writable(
        backend: Arc<Backend>,
        len: u64,
        header: &Header,
        map: Map,
        overlay: Overlay,
    ) -> Self {
        let limit = growth_limit(len, header.size);
        let meta = Meta {
            map,
            overlay,
            header: header.clone(),
            moved: false,
        };
        Self::new(backend, len, Some(header), Some(meta), limit)
    }

    fn new(
        backend: Arc<Backend>,
        len: u64,
        header: Option<&Header>,
        meta: Option<Meta>,
        limit: u64,
    ) -> Self {
        let (memory_align, align) = backend
            .direct
            .map_or((1, 1), |d| (d.memory.max(1), d.offset.max(1)));
        Self(Arc::new(Inner {
            memory_align: memory_align as usize,
            align: u64::from(align),
            len: AtomicU64::new(len),
            limit: AtomicU64::new(limit),
            backend,
            header: header.map(|h| (h.cluster_size(), h.sanitized().to_vec())),
            meta: meta.map(Mutex::new),
            helper: CommonStorageHelper::default(),
        }))
    }

    /// The file, for data.
    pub fn file(&self) -> &File {
        &self.0.backend.file
    }

    /// Whether these are clones of one.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn meta(&self) -> Option<MutexGuard<'_, Meta>> {
        let meta = self.0.meta.as_ref()?;
        Some(meta.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether guest data may be written to this range of the file.
    pub fn check_data(&self, range: &Range<u64>) -> io::Result<()> {
        if range.end > self.0.limit.load(Ordering::Relaxed) {
            log::error!(
                "the image is corrupt: data at {:#x}, far beyond its end; see qemu-img check",
                range.start
            );
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if let Some((at, kind)) = self.meta().and_then(|m| m.map.first_in(range)) {
            log::error!(
                "the image is corrupt: data share the cluster at {at:#x} with metadata \
                 ({kind:?}); see qemu-img check"
            );
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// Data were written up to here: the file is at least this long.
    pub fn wrote_to(&self, end: u64) {
        self.0.len.fetch_max(end, Ordering::Relaxed);
    }

    /// Writes all metadata to the file, in order, and makes them and the data durable.
    pub fn apply(&self) -> io::Result<()> {
        let Some(mut meta) = self.meta() else {
            return self.barrier();
        };
        if meta.overlay.is_empty() {
            drop(meta);
            return self.barrier();
        }
        let Meta {
            map,
            overlay,
            header,
            moved,
        } = &mut *meta;
        overlay.apply(self, map, header.refcount_order)?;
        *moved = false;
        Ok(())
    }

    /// Whether clusters were freed, or tables moved, since the last call: then
    /// [`Self::apply`] must come before anything is allocated.
    pub fn must_apply(&self) -> bool {
        self.meta()
            .is_some_and(|mut m| m.overlay.take_freed() | m.moved)
    }

    /// Puts what has changed where it outlives this process. False: it must be applied.
    pub fn log(&self) -> bool {
        self.meta().is_none_or(|mut m| m.overlay.log())
    }

    /// Whether what changes is logged.
    pub fn is_logged(&self) -> bool {
        self.meta().is_some_and(|m| m.overlay.is_logged())
    }

    /// From now on, what changes is logged there. Everything must have been applied.
    pub fn set_journal(&self, journal: Journal) {
        if let Some(mut meta) = self.meta() {
            meta.overlay.set_journal(Some(journal));
        }
    }

    /// Sectors that wait to be applied.
    pub fn pending(&self) -> usize {
        self.meta().map_or(0, |m| m.overlay.len())
    }

    /// The image is about to be this large.
    pub fn expect_size(&self, size: u64) {
        let limit = growth_limit(self.0.len.load(Ordering::Relaxed), size);
        self.0.limit.fetch_max(limit, Ordering::Relaxed);
    }

    /// Writes bytes of the file's first cluster that the driver knows nothing of, at once.
    pub fn write_header(&self, bytes: &[u8], at: usize) -> io::Result<()> {
        Medium::write(self, bytes, at as u64)?;
        self.barrier()
    }

    fn is_aligned(&self, offset: u64, len: usize) -> bool {
        (offset | len as u64) & (self.0.align - 1) == 0
    }

    /// The driver wrote the first bytes of its header: takes what may change out of it.
    fn header_written(&self, meta: &mut Meta, bytes: &[u8]) -> io::Result<()> {
        let mut shown = meta.header.sanitized();
        if let Some(place) = shown.get_mut(..bytes.len().min(MUTABLE_END)) {
            place.copy_from_slice(bytes.get(..place.len()).unwrap_or_default());
        }
        let long = |at: usize| {
            let field = shown.get(at..at + 8).and_then(|f| f.try_into().ok());
            field.map_or(0, u64::from_be_bytes)
        };
        let word = |at: usize| (long(at) >> 32) as u32;
        let new = Header {
            size: long(AT_SIZE),
            l1_entries: word(AT_L1_ENTRIES),
            l1_offset: long(AT_L1_OFFSET),
            reftable_offset: long(AT_REFTABLE_OFFSET),
            reftable_clusters: word(AT_REFTABLE_CLUSTERS),
            ..meta.header.clone()
        };
        if new.l1_offset != meta.header.l1_offset {
            meta.overlay.forget(meta.map.l1());
            let end = new.l1_offset.saturating_add(u64::from(new.l1_entries) * 8);
            meta.map
                .move_l1(new.l1_offset..end)
                .map_err(|e| corrupt(&e))?;
            meta.moved = true;
        }
        if new.reftable_offset != meta.header.reftable_offset {
            meta.overlay.forget(meta.map.reftable());
            let len = new.reftable_entries().saturating_mul(8);
            let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
            Medium::read(self, &mut table, new.reftable_offset)?;
            meta.map
                .move_reftable(
                    new.reftable_offset..new.reftable_offset.saturating_add(len),
                    &table,
                )
                .map_err(|e| corrupt(&e))?;
            meta.moved = true;
        }
        meta.header = new;
        for at in [AT_SIZE..AT_SIZE + 8, AT_L1_ENTRIES..MUTABLE_END] {
            let bytes = shown.get(at.clone()).unwrap_or_default();
            meta.overlay.write(self, bytes, at.start as u64, None)?;
        }
        Ok(())
    }

    /// A write by the driver. False: it is no metadata.
    fn metadata_written(&self, bytes: &[u8], offset: u64) -> io::Result<bool> {
        let Some(mut meta) = self.meta() else {
            return Ok(false);
        };
        let meta = &mut *meta;
        let end = offset.saturating_add(bytes.len() as u64);
        let Some((_, kind)) = meta.map.first_in(&(offset..end)) else {
            return Ok(false);
        };
        let cluster = meta.header.cluster_size();
        if kind != Kind::L1 && kind != Kind::Reftable && offset / cluster != (end - 1) / cluster {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut order = None;
        match kind {
            Kind::Header => {
                if offset == 0 {
                    self.header_written(meta, bytes)?;
                }
                return Ok(true);
            }
            Kind::L1 => meta
                .map
                .l1_written(offset, bytes)
                .map_err(|e| corrupt(&e))?,
            Kind::Reftable => meta
                .map
                .reftable_written(offset, bytes)
                .map_err(|e| corrupt(&e))?,
            Kind::Refblock(_) => order = Some(meta.header.refcount_order),
            Kind::L2 => {}
        }
        meta.overlay.write(self, bytes, offset, order)?;
        Ok(true)
    }

    /// A refcount block comes into the driver's hands: it must count all metadata, or the
    /// driver would allocate what is in use.
    fn refblock_read(&self, block: &[u8], offset: u64) -> io::Result<()> {
        let Some(meta) = self.meta() else {
            return Ok(());
        };
        let Some(Kind::Refblock(index)) = meta.map.kind(offset) else {
            return Ok(());
        };
        if block.len() as u64 != meta.header.cluster_size() {
            return Ok(());
        }
        let first = u64::from(index) << meta.header.refblock_bits();
        let clusters = first..first.saturating_add(1 << meta.header.refblock_bits());
        let order = meta.header.refcount_order;
        for cluster in meta.map.clusters_in(clusters) {
            let n = (cluster - first) as usize;
            let uncounted = if order >= 3 {
                let width = 1 << (order - 3);
                block
                    .get(n * width..(n + 1) * width)
                    .is_none_or(|count| count.iter().all(|&b| b == 0))
            } else {
                let bit = n << order;
                let mask = (1u8 << (1 << order)) - 1;
                block
                    .get(bit / 8)
                    .is_none_or(|byte| byte >> (bit % 8) & mask == 0)
            };
            if uncounted {
                log::error!(
                    "the image is corrupt: metadata at {:#x} are counted as free; repair it \
                     (qemu-img check -r all)",
                    cluster << meta.header.cluster_bits
                );
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        Ok(())
    }
}

/// A file has no reason to become larger: its own data, all of the virtual disk once more,
/// their metadata, and something over.
fn growth_limit(len: u64, size: u64) -> u64 {
    len.saturating_add(size)
        .saturating_add(size / 32)
        .saturating_add(SLACK)
}

impl Medium for Store {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.0.memory_align == 1 && self.0.align == 1 {
            return image_io::read(self.file(), buffer, offset);
        }
        let mask = self.0.align - 1;
        let start = offset & !mask;
        let skip = (offset - start) as usize;
        let len = (skip + buffer.len()).next_multiple_of(self.0.align as usize);
        let mut bounce = Buffer::new(len, self.0.memory_align);
        image_io::read(self.file(), bounce.bytes(), start)?;
        let from = bounce.bytes().get(skip..).unwrap_or_default();
        for (to, from) in buffer.iter_mut().zip(from) {
            *to = *from;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(bytes.len() as u64);
        if self.0.memory_align == 1 && self.0.align == 1 {
            image_io::write(self.file(), bytes, offset)?;
            self.wrote_to(end);
            return Ok(());
        }
        let mask = self.0.align - 1;
        let start = offset & !mask;
        let skip = (offset - start) as usize;
        let len = (skip + bytes.len()).next_multiple_of(self.0.align as usize);
        let mut bounce = Buffer::new(len, self.0.memory_align);
        if !self.is_aligned(offset, bytes.len()) {
            image_io::read(self.file(), bounce.bytes(), start)?;
        }
        if let Some(place) = bounce.bytes().get_mut(skip..skip + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        image_io::write(self.file(), bounce.bytes(), start)?;
        self.wrote_to(start.saturating_add(len as u64));
        Ok(())
    }

    fn barrier(&self) -> io::Result<()> {
        if self.0.backend.durable {
            image_io::sync(self.file())
        } else {
            Ok(())
        }
    }
}

impl Storage for Store {
    fn mem_align(&self) -> usize {
        self.0.memory_align
    }

    fn req_align(&self) -> usize {
        self.0.align as usize
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len.load(Ordering::Relaxed))
    }

    // SAFETY: the buffers are borrowed for the call and only safe calls touch them; unsafe is the trait's word.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut offset = offset;
        for mut part in bufv.into_inner() {
            let len = part.len() as u64;
            match &self.0.header {
                Some((cluster, header)) if offset < *cluster => {
                    let from = usize::try_from(offset).ok().and_then(|at| header.get(at..));
                    let from = from.unwrap_or_default();
                    part.fill(0);
                    for (to, from) in part.iter_mut().zip(from) {
                        *to = *from;
                    }
                }
                _ => image_io::read(self.file(), &mut part, offset)?,
            }
            if let Some(meta) = self.meta()
                && self.0.header.as_ref().is_some_and(|(c, _)| offset >= *c)
            {
                meta.overlay.patch(&mut part, offset);
            }
            self.refblock_read(&part, offset)?;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    // SAFETY: as above: nothing in it needs the caller's promise.
    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut offset = offset;
        for part in bufv.into_inner() {
            let end = offset.saturating_add(part.len() as u64);
            if !part.is_empty() && !self.metadata_written(&part, offset)? {
                self.check_data(&(offset..end))?;
                image_io::write(self.file(), &part, offset)?;
                self.wrote_to(end);
            }
            offset = end;
        }
        Ok(())
    }

    // SAFETY: as above.
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let range = offset..offset.saturating_add(length);
        self.check_data(&range)?;
        // Beyond the end of the file there are zeros already, and what is written next to
        // them makes the file long enough.
        let len = self.0.len.load(Ordering::Relaxed);
        let within = range.end.min(len).saturating_sub(offset);
        if within == 0 {
            return Ok(());
        }
        match image_io::punch(self.file(), offset, within) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            other => other,
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.barrier()
    }

    // SAFETY: it does nothing.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}
