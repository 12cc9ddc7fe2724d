//! The guest's memory as a vhost-user front-end hands it over (vhost-user protocol,
//! "Memory region description").
//!
//! A [`Memory`] is an immutable snapshot of the memory table. The main thread builds a
//! new snapshot for each change and gives it to the workers; a worker swaps snapshots
//! only when none of its I/O is in flight, and a mapping goes away with the last
//! snapshot that holds it. So no thread ever sees half a table, and no request in the
//! kernel ever points into memory that was unmapped.
//!
//! All addresses and lengths come from the guest or the front-end and are checked here,
//! once; what leaves this module as a [`VolatileSlice`] lies within one live mapping.
//!
//! A region must be covered by its file when it is mapped. A front-end that shrinks its
//! own file afterwards (QEMU does not seal its memfds) ends this process by SIGBUS, and
//! nothing else: only that front-end's own guest is served here.

#![allow(unsafe_code)] // mmap of the front-end's files, and slices over those mappings

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vm_memory::VolatileSlice;

use crate::sys;

/// Most regions that a table may hold: what one SET_MEM_TABLE can carry.
pub const MAX_REGIONS: usize = 32;

/// Largest region accepted; far above any machine, far below an overflow.
const MAX_REGION_SIZE: u64 = 1 << 46;

const PAGE: u64 = 4096;

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The table would hold more regions than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// A region is empty, absurdly large, or its end overflows.
    #[error("memory region at {gpa:#x} has an impossible size of {size:#x}")]
    Size {
        /// Guest physical address of the region.
        gpa: u64,
        /// The size that was asked for.
        size: u64,
    },
    /// Two regions overlap in guest physical or front-end address space.
    #[error("memory region at {gpa:#x} overlaps another")]
    Overlap {
        /// Guest physical address of the region.
        gpa: u64,
    },
    /// The file is shorter than the region that it should back.
    #[error("memory region at {gpa:#x} needs {need:#x} bytes of a file that has {have:#x}")]
    ShortFile {
        /// Guest physical address of the region.
        gpa: u64,
        /// Offset plus size of the region.
        need: u64,
        /// Size of the file.
        have: u64,
    },
    /// The region to remove is not in the table.
    #[error("no memory region at {gpa:#x} to remove")]
    Unknown {
        /// Guest physical address of the region.
        gpa: u64,
    },
    /// The kernel refused to look at or to map the file.
    #[error("cannot map the memory region at {gpa:#x}: {source}")]
    Map {
        /// Guest physical address of the region.
        gpa: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// One live `mmap`; unmapped when the last snapshot that holds it is dropped.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: a Mapping is only an address range that stays mapped until it is dropped; all
// access goes through VolatileSlice, which assumes concurrent writers (the guest is one).
unsafe impl Send for Mapping {}
// SAFETY: as above; no method of Mapping changes it.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, offset: u64, len: usize) -> std::io::Result<Self> {
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| std::io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice replaces
        // nothing; the file descriptor is valid for the duration of the call.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self {
            base: base.cast(),
            len,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the range that mmap returned, and no slice of it can be alive:
        // slices borrow from the Memory that holds this mapping.
        unsafe {
            libc::munmap(self.base.cast(), self.len);
        }
    }
}

/// One region of the table.
#[derive(Clone, Debug)]
pub struct Region {
    gpa: u64,
    size: u64,
    user_addr: u64,
    /// Where the region starts within its mapping.
    skip: usize,
    mapping: Arc<Mapping>,
}

impl Region {
    /// Maps `size` bytes of `file` from `offset` as guest memory at `gpa`, which the
    /// front-end sees at `user_addr`.
    pub fn map(
        file: &File,
        gpa: u64,
        size: u64,
        user_addr: u64,
        offset: u64,
    ) -> Result<Self, MemoryError> {
        let impossible = || MemoryError::Size { gpa, size };
        if size == 0 || size > MAX_REGION_SIZE {
            return Err(impossible());
        }
        gpa.checked_add(size).ok_or_else(impossible)?;
        user_addr.checked_add(size).ok_or_else(impossible)?;
        let end = offset.checked_add(size).ok_or_else(impossible)?;

        let (have, block) = match sys::file_size(file) {
            // Under a policy that believes the front-end: a file that is shorter is a bus error,
            // and the end of this process.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => (u64::MAX, PAGE),
            size => size.map_err(|source| MemoryError::Map { gpa, source })?,
        };
        if have < end {
            return Err(MemoryError::ShortFile {
                gpa,
                need: end,
                have,
            });
        }
        // hugetlbfs wants offset and length in its own page size, which is its st_blksize.
        let align = match block {
            b if b.is_power_of_two() && (PAGE..=1 << 30).contains(&b) => b,
            _ => PAGE,
        };
        let start = offset & !(align - 1);
        let len = end
            .checked_next_multiple_of(align)
            .and_then(|e| e.checked_sub(start))
            .and_then(|l| usize::try_from(l).ok())
            .ok_or_else(impossible)?;
        let skip = usize::try_from(offset - start).map_err(|_| impossible())?;
        let mapping =
            Mapping::new(file, start, len).map_err(|source| MemoryError::Map { gpa, source })?;
        Ok(Self {
            gpa,
            size,
            user_addr,
            skip,
            mapping: Arc::new(mapping),
        })
    }

    /// The `len` bytes from `offset` on, if the region has them.
    #[inline]
    pub fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(len as u64)?;
        if end > self.size {
            return None;
        }
        // SAFETY: skip + size <= mapping.len by construction and end <= size, so the range
        // lies in the mapping, which lives as long as the borrow of self.
        Some(unsafe {
            VolatileSlice::new(self.mapping.base.add(self.skip).add(offset as usize), len)
        })
    }

    #[inline]
    fn gpa_end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }

    fn user_end(&self) -> u64 {
        self.user_addr.saturating_add(self.size)
    }

    fn overlaps(&self, other: &Self) -> bool {
        (self.gpa < other.gpa_end() && other.gpa < self.gpa_end())
            || (self.user_addr < other.user_end() && other.user_addr < self.user_end())
    }
}

/// A contiguous piece of one region that keeps its mapping alive: where a ring lies.
#[derive(Clone, Debug)]
pub struct Area {
    region: Region,
    offset: u64,
    len: usize,
}

impl Area {
    /// The area's bytes.
    #[inline]
    pub fn slice(&self) -> Option<VolatileSlice<'_>> {
        self.region.slice(self.offset, self.len)
    }

    /// The area as words that others may change at any time; None if it does not consist of
    /// whole, aligned ones.
    #[inline]
    pub fn words(&self) -> Option<&[AtomicU64]> {
        let slice = self.slice()?;
        let base = slice.ptr_guard_mut().as_ptr();
        if !(base as usize).is_multiple_of(8) || !self.len.is_multiple_of(8) {
            return None;
        }
        // SAFETY: the range lies in the mapping (slice), which is readable and writable and
        // lives as long as the borrow of self; base is aligned. Atomics may be changed
        // through a shared reference, by other processes too.
        Some(unsafe { std::slice::from_raw_parts(base.cast::<AtomicU64>(), self.len / 8) })
    }

    /// Whether the area starts at a multiple of `align` bytes in this process.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.slice()
            .is_some_and(|s| (s.ptr_guard().as_ptr() as usize).is_multiple_of(align))
    }
}

/// An immutable snapshot of the memory table, ordered by guest physical address.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    regions: Vec<Region>,
}

impl Memory {
    /// A table of these regions.
    pub fn new(regions: Vec<Region>) -> Result<Self, MemoryError> {
        let mut table = Self::default();
        for region in regions {
            table = table.with(region)?;
        }
        Ok(table)
    }

    /// This table and one more region (ADD_MEM_REG).
    pub fn with(&self, region: Region) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        if self.regions.iter().any(|r| r.overlaps(&region)) {
            return Err(MemoryError::Overlap { gpa: region.gpa });
        }
        let mut regions = self.regions.clone();
        regions.push(region);
        regions.sort_by_key(|r| r.gpa);
        Ok(Self { regions })
    }

    /// This table without one region (REM_MEM_REG: address, user address and size name it).
    pub fn without(&self, gpa: u64, user_addr: u64, size: u64) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.retain(|r| (r.gpa, r.user_addr, r.size) != (gpa, user_addr, size));
        if regions.len() == self.regions.len() {
            return Err(MemoryError::Unknown { gpa });
        }
        Ok(Self { regions })
    }

    /// Whether every region of the other table is in this one, mapped where it was: whatever
    /// points into that memory stays valid.
    pub fn extends(&self, other: &Self) -> bool {
        let same = |a: &Region, b: &Region| {
            (a.gpa, a.size, a.user_addr, a.skip) == (b.gpa, b.size, b.user_addr, b.skip)
                && Arc::ptr_eq(&a.mapping, &b.mapping)
        };
        let mut others = other.regions.iter();
        others.all(|b| self.regions.iter().any(|a| same(a, b)))
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether the table holds nothing.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The ring area at an address of the front-end's own address space.
    pub fn area_at_user_addr(&self, user_addr: u64, len: usize) -> Option<Area> {
        let region = self
            .regions
            .iter()
            .find(|r| r.user_addr <= user_addr && user_addr < r.user_end())?;
        let offset = user_addr.checked_sub(region.user_addr)?;
        region.slice(offset, len)?;
        Some(Area {
            region: region.clone(),
            offset,
            len,
        })
    }

    #[inline]
    fn find(&self, gpa: u64) -> Option<&Region> {
        // Tables are short (two or three regions as a rule): a scan beats a search.
        self.regions
            .iter()
            .find(|r| r.gpa <= gpa && gpa < r.gpa_end())
    }

    /// Calls `each` with the pieces that the guest range consists of, in order; a range
    /// may cross from one region into an adjacent one. False if any part of it is not
    /// guest memory (pieces before the hole have been seen by then).
    #[inline]
    pub fn for_each_slice<'a>(
        &'a self,
        gpa: u64,
        len: u64,
        mut each: impl FnMut(VolatileSlice<'a>),
    ) -> bool {
        if gpa.checked_add(len).is_none() {
            return false;
        }
        let (mut at, mut left) = (gpa, len);
        while left > 0 {
            let Some(region) = self.find(at) else {
                return false;
            };
            let piece = left.min(region.gpa_end().saturating_sub(at));
            let Ok(count) = usize::try_from(piece) else {
                return false;
            };
            let Some(slice) = region.slice(at.wrapping_sub(region.gpa), count) else {
                return false;
            };
            each(slice);
            left = left.saturating_sub(piece);
            at = at.saturating_add(piece);
        }
        true
    }

    /// The regions, each as its guest address and where it is mapped.
    pub fn regions(&self) -> impl Iterator<Item = (u64, VolatileSlice<'_>)> {
        self.regions.iter().filter_map(|region| {
            let len = usize::try_from(region.size).ok()?;
            Some((region.gpa, region.slice(0, len)?))
        })
    }

    /// Whether the whole range is guest memory.
    #[inline]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.for_each_slice(gpa, len, |_| {})
    }

    /// Copies guest memory out; false if the range is not all guest memory.
    #[inline]
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let mut at = 0;
        self.for_each_slice(gpa, into.len() as u64, |s| {
            if let Some(rest) = into.get_mut(at..) {
                at += s.copy_to(rest);
            }
        })
    }

    /// Copies into guest memory; false if the range is not all guest memory.
    #[inline]
    pub fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let mut at = 0;
        self.for_each_slice(gpa, from.len() as u64, |s| {
            if let Some(rest) = from.get(at..) {
                s.copy_from(rest);
                at += s.len().min(rest.len());
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::memfd;

    fn file(len: u64) -> File {
        let f = memfd("test").unwrap();
        f.set_len(len).unwrap();
        f
    }

    #[test]
    fn a_range_may_cross_adjacent_regions_but_not_a_hole() {
        let f = file(0x4000);
        let mem = Memory::new(vec![
            Region::map(&f, 0x1000, 0x1000, 0x71000, 0).unwrap(),
            Region::map(&f, 0x2000, 0x1000, 0x72000, 0x2000).unwrap(),
            Region::map(&f, 0x8000, 0x1000, 0x78000, 0x3000).unwrap(),
        ])
        .unwrap();
        assert!(mem.write(0x1ffe, &[1, 2, 3, 4]));
        let mut back = [0; 4];
        assert!(mem.read(0x1ffe, &mut back));
        assert_eq!(back, [1, 2, 3, 4]);
        assert!(!mem.contains(0x2ffe, 4));
        assert!(!mem.contains(u64::MAX, 1));
        assert!(!mem.contains(0x1000, u64::MAX));
        assert!(mem.contains(0x1000, 0));
        assert!(!mem.contains(0x0, 1));
    }

    #[test]
    fn a_table_that_grew_extends_the_one_before_and_no_other_does() {
        let f = file(0x4000);
        let region = |gpa| Region::map(&f, gpa, 0x1000, gpa, 0).unwrap();
        let old = Memory::new(vec![region(0x1000)]).unwrap();
        let grown = old.with(region(0x8000)).unwrap();
        assert!(grown.extends(&old) && old.extends(&old) && old.extends(&Memory::default()));
        assert!(!old.extends(&grown));
        let shrunk = grown.without(0x1000, 0x1000, 0x1000).unwrap();
        assert!(!shrunk.extends(&grown) && grown.extends(&shrunk));
        // The same place, mapped anew.
        assert!(!Memory::new(vec![region(0x1000)]).unwrap().extends(&old));
    }

    #[test]
    fn a_file_shorter_than_its_region_is_refused() {
        let f = file(0x1000);
        assert!(matches!(
            Region::map(&f, 0, 0x1000, 0, 1),
            Err(MemoryError::ShortFile { .. })
        ));
        assert!(matches!(
            Region::map(&f, 0, 0x1000, 0, u64::MAX),
            Err(MemoryError::Size { .. })
        ));
        assert!(matches!(
            Region::map(&f, 0, 0, 0, 0),
            Err(MemoryError::Size { .. })
        ));
    }

    #[test]
    fn overlapping_and_surplus_regions_are_refused() {
        let f = file(0x1000 * 40);
        let at = |i: u64| Region::map(&f, i * 0x1000, 0x1000, i * 0x1000, i * 0x1000).unwrap();
        let mut mem = Memory::default();
        for i in 0..MAX_REGIONS as u64 {
            mem = mem.with(at(i)).unwrap();
        }
        assert!(matches!(mem.with(at(33)), Err(MemoryError::TooMany)));
        let one = Memory::new(vec![at(1)]).unwrap();
        assert!(matches!(one.with(at(1)), Err(MemoryError::Overlap { .. })));
        assert!(one.without(0x1000, 0x1000, 0x1000).unwrap().is_empty());
        assert!(one.without(0x1000, 0x1000, 0x2000).is_err());
    }

    #[test]
    fn ring_areas_lie_in_one_region() {
        let f = file(0x2000);
        let mem = Memory::new(vec![
            Region::map(&f, 0x1000, 0x1000, 0x71000, 0).unwrap(),
            Region::map(&f, 0x2000, 0x1000, 0x72000, 0x1000).unwrap(),
        ])
        .unwrap();
        assert!(mem.area_at_user_addr(0x71000, 0x1000).is_some());
        assert!(mem.area_at_user_addr(0x71000, 0x1001).is_none());
        assert!(mem.area_at_user_addr(0x1000, 1).is_none());
        assert!(mem.area_at_user_addr(u64::MAX, 1).is_none());
    }

    #[test]
    fn an_offset_within_a_page_maps_the_right_bytes() {
        use std::os::unix::fs::FileExt;
        let f = file(0x3000);
        f.write_all_at(&[7], 0x1234).unwrap();
        let mem = Memory::new(vec![Region::map(&f, 0, 0x100, 0, 0x1234).unwrap()]).unwrap();
        let mut b = [0];
        assert!(mem.read(0, &mut b));
        assert_eq!(b, [7]);
    }
}
