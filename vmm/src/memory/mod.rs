//! Guest RAM: sealed memfds, one per region, mapped shared so that device processes can
//! map them too.
//!
//! Built by the manager thread before the machine starts and immutable from then on. RAM
//! has a hole below 4 GiB for the PCI window and the platform's registers
//! (`arch::x86_64::layout`), so it is one region or two. Memory that can be plugged lies above
//! them, in regions that come and go ([`Pluggable`]).

mod owner;
mod pluggable;
mod sys;

pub use owner::Owner;
pub use pluggable::Pluggable;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::x86_64::layout;

/// The least RAM that holds a kernel and its boot structures.
pub const MIN_MEMORY: u64 = 32 << 20;
const PAGE: u64 = 4096;
/// Sizes are whole MiB.
pub const MEMORY_STEP: u64 = 1 << 20;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a whole number of MiB.
    #[error("memory size of {0} bytes is not a whole number of MiB: give it as, say, 512M")]
    NotWholeMib(u64),
    /// Too little.
    #[error("memory size of {} MiB is too small: give at least {} MiB", .0 >> 20, MIN_MEMORY >> 20)]
    TooSmall(u64),
    /// More than there is.
    #[error(
        "memory size of {} MiB is more than the {} MiB that this host has: give less",
        .size >> 20, .host >> 20
    )]
    MoreThanHost {
        /// What was asked for.
        size: u64,
        /// What the host has.
        host: u64,
    },
    /// The guest could not address it.
    #[error(
        "memory size of {} MiB does not fit the guest's {bits} physical address bits with its PCI window: give less",
        .size >> 20
    )]
    BeyondAddressWidth {
        /// What was asked for.
        size: u64,
        /// Width of a guest-physical address.
        bits: u8,
    },
    /// What there may be is no more than there is, or cannot be had in whole pieces.
    #[error(
        "memory of at most {} MiB beside {} MiB from the start: give max= as that and a multiple of {} MiB",
        .max >> 20, .size >> 20, pluggable::step(.max.saturating_sub(*.size)) >> 20
    )]
    BadMaximum {
        /// What there is.
        size: u64,
        /// What there may be.
        max: u64,
    },
    /// The kernel refused.
    #[error("cannot make {} MiB of guest memory: {source}: give less, or free some", .size >> 20)]
    Map {
        /// What was asked for.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One region of RAM, as KVM and device processes are told of it.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// KVM memory slot.
    pub slot: u32,
    /// Guest-physical address of its first byte.
    pub guest_base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of its first byte in this process.
    pub host_base: u64,
    /// The memfd.
    pub file: Arc<File>,
    /// Where in the memfd the region begins.
    pub file_offset: u64,
    /// Keeps the mapping at `host_base`.
    pub mapping: Owner,
}

/// The guest's bytes: mapped for as long as anybody has a clone of it or of a region.
pub type MappedMemory = GuestMemoryMmap<Owner>;
/// A region of them.
type MappedRegion = GuestRegionMmap<Owner>;

/// The guest's RAM. Clones share it; it goes with the last of them.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: MappedMemory,
    regions: Arc<[RamRegion]>,
    size: u64,
    /// With what can be plugged.
    all: MappedMemory,
    pluggable: Option<Arc<Pluggable>>,
}

/// The host's RAM in bytes.
pub fn host_memory_total() -> io::Result<u64> {
    sys::total_ram()
}

/// Where `size` bytes of RAM lie: (base, length), below the 32-bit hole and above it.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::LOW_RAM_END);
    let high = size.saturating_sub(low);
    let mut ranges = vec![(0, low)];
    if high > 0 {
        ranges.push((layout::HIGH_RAM_START, high));
    }
    ranges
}

/// Checks sizes before anything is made of them: of RAM, and of what there may be at most
/// (0: no more). `phys_bits` is the guest's address width.
pub fn check_size(size: u64, max: u64, host_total: u64, phys_bits: u8) -> Result<(), MemoryError> {
    if !size.is_multiple_of(MEMORY_STEP) {
        return Err(MemoryError::NotWholeMib(size));
    }
    if size < MIN_MEMORY {
        return Err(MemoryError::TooSmall(size));
    }
    if size.max(max) > host_total {
        return Err(MemoryError::MoreThanHost {
            size: size.max(max),
            host: host_total,
        });
    }
    let more = max.saturating_sub(size);
    if max != 0 && (more == 0 || !more.is_multiple_of(pluggable::step(more))) {
        return Err(MemoryError::BadMaximum { size, max });
    }
    let limit = 1u64.checked_shl(phys_bits.into()).unwrap_or(u64::MAX);
    let end = size.checked_add(layout::HIGH_RAM_START);
    let end = match more {
        0 => end,
        more => end
            .map(layout::pluggable_start)
            .and_then(|start| start.checked_add(more)),
    };
    let top = end
        .map(layout::pci_mem64_start)
        .and_then(|start| start.checked_add(layout::PCI_MEM64_SIZE));
    if top.is_none_or(|top| top > limit) {
        return Err(MemoryError::BeyondAddressWidth {
            size: size.max(max),
            bits: phys_bits,
        });
    }
    Ok(())
}

/// Makes and maps a region.
fn map_region(slot: u32, guest_base: u64, size: u64) -> io::Result<(RamRegion, MappedRegion)> {
    let file = sys::sealed_memfd(size)?;
    let copy = file.try_clone()?;
    let bytes = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mapping = sys::map(copy, bytes)?;
    // Best effort: without huge pages for shared memory the guest only faults more.
    let _ = sys::advise(mapping.as_ptr(), bytes, sys::Advice::HugePages);
    let _ = sys::advise(mapping.as_ptr(), bytes, sys::Advice::NotInCoreDumps);
    let region = RamRegion {
        slot,
        guest_base,
        size,
        host_base: mapping.as_ptr() as u64,
        file: Arc::new(file),
        file_offset: 0,
        mapping: mapping.bitmap().clone(),
    };
    let mapped = GuestRegionMmap::new(mapping, GuestAddress(guest_base))
        .ok_or(io::ErrorKind::OutOfMemory)?;
    Ok((region, mapped))
}

impl GuestRam {
    /// Makes and maps `size` bytes, which [`check_size`] must have passed.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        Self::with_pluggable(size, 0)
    }

    /// The same, with room for up to `max` bytes that can be plugged later; 0: none.
    pub fn with_pluggable(size: u64, max: u64) -> Result<Self, MemoryError> {
        let failed = |source: io::Error| MemoryError::Map { size, source };
        let mut mapped = Vec::new();
        let mut regions = Vec::new();
        for (slot, (guest_base, len)) in (0u32..).zip(ranges(size)) {
            let (region, mapping) = map_region(slot, guest_base, len).map_err(failed)?;
            regions.push(region);
            mapped.push(Arc::new(mapping));
        }
        let join = |mapped: Vec<Arc<MappedRegion>>| {
            MappedMemory::from_arc_regions(mapped).map_err(|error| failed(io::Error::other(error)))
        };
        let memory = join(mapped.clone())?;
        let end = regions
            .last()
            .map_or(0, |last| last.guest_base.saturating_add(last.size));
        let pluggable = match max.saturating_sub(size) {
            0 => None,
            more => {
                let first = u32::try_from(regions.len()).unwrap_or(u32::MAX);
                let start = layout::pluggable_start(end);
                let (pluggable, more) = Pluggable::new(first, start, more)
                    .map_err(|source| MemoryError::Map { size: max, source })?;
                mapped.extend(more);
                Some(Arc::new(pluggable))
            }
        };
        Ok(Self {
            memory,
            regions: regions.into(),
            size,
            all: join(mapped)?,
            pluggable,
        })
    }

    /// Bytes of it that the host has given pages for.
    pub fn allocated(&self) -> u64 {
        let mut files = BTreeMap::new();
        for region in self.present_regions() {
            if let Ok(stat) = rustix::fs::fstat(&region.file) {
                // Regions may be parts of one file. Blocks are of 512 bytes, whatever its own.
                let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
                files.insert(stat.st_ino, blocks.saturating_mul(512));
            }
        }
        files
            .values()
            .fold(0, |all, bytes| all.saturating_add(*bytes))
    }

    /// What can be plugged.
    pub fn pluggable(&self) -> Option<&Arc<Pluggable>> {
        self.pluggable.as_ref()
    }

    /// Access to the guest's bytes, those of memory that can be plugged among them.
    pub fn all(&self) -> &MappedMemory {
        &self.all
    }

    /// The regions that there are at this time, lowest first.
    pub fn present_regions(&self) -> Vec<RamRegion> {
        let more = self.pluggable.iter().flat_map(|area| area.present());
        self.regions.iter().cloned().chain(more).collect()
    }

    /// The first address above everything that is memory, or may be.
    pub fn last_end(&self) -> u64 {
        self.pluggable
            .as_ref()
            .map_or_else(|| self.end(), |area| area.end())
    }

    /// Access to the guest's bytes that are there from the start.
    pub fn memory(&self) -> &MappedMemory {
        &self.memory
    }

    /// The regions that are there from the start, lowest first.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Bytes of RAM at the start.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The first address above all RAM of the start.
    pub fn end(&self) -> u64 {
        self.regions
            .last()
            .map_or(0, |region| region.guest_base.saturating_add(region.size))
    }

    /// The first address above the RAM that lies below the 32-bit hole.
    pub fn low_end(&self) -> u64 {
        self.size.min(layout::LOW_RAM_END)
    }

    /// The part of each region that lies in `start..start + len`, as host address and
    /// length, rounded outwards to `unit` as far as the region goes.
    fn parts(&self, start: u64, len: u64, unit: u64) -> impl Iterator<Item = (*mut u8, usize)> {
        let end = start.saturating_add(len);
        self.memory.iter().filter_map(move |region| {
            let base = region.start_addr().0;
            let size = region.len();
            let first = start
                .saturating_sub(base)
                .checked_div(unit)?
                .checked_mul(unit)?;
            let last = end
                .checked_sub(base)?
                .div_ceil(unit)
                .saturating_mul(unit)
                .min(size);
            let len = last.checked_sub(first).filter(|len| *len > 0)?;
            let offset = usize::try_from(first).ok()?;
            Some((
                region.as_ptr().wrapping_add(offset),
                usize::try_from(len).ok()?,
            ))
        })
    }

    /// Gives host pages to `len` bytes at guest-physical `start` (MADV_POPULATE_WRITE). What
    /// of the range is not RAM is left out. Costs that memory at once; saves a host page
    /// fault per page.
    pub fn populate(&self, start: u64, len: u64) -> io::Result<()> {
        self.parts(start, len, PAGE)
            .try_for_each(|(at, len)| sys::advise(at, len, sys::Advice::PopulateWrite))
    }

    /// Everything reads as zeroes from now on, memory that can be plugged among it. The pages of
    /// `keep` (ranges, sorted) stay and are written, since they are about to be used again; all
    /// others go back to the host. Nobody may be using the memory: no vCPU, no device's process.
    #[allow(unsafe_code)] // MADV_REMOVE on our own mappings
    pub fn clear(&self, keep: &[(u64, u64)]) -> io::Result<()> {
        const ZEROES: &[u8] = &[0; 1 << 18];
        for region in self.memory.iter() {
            let (base, end) = (
                region.start_addr().0,
                region.last_addr().0.saturating_add(1),
            );
            let mut at = base;
            let inside = keep.iter().map(|(start, len)| {
                let to = |address: u64| address.clamp(base, end);
                (to(*start), to(start.saturating_add(*len)))
            });
            for (first, last) in inside.chain([(end, end)]) {
                let first = first.max(at).next_multiple_of(PAGE).min(end);
                let last = (last & !(PAGE - 1)).max(first);
                for (pages, len) in self.parts(at, first.saturating_sub(at), 1) {
                    // SAFETY: `parts` are of RAM's own mappings, which are shared and live as long
                    // as `self.memory`; all access to them is by volatile slices.
                    unsafe { sys::remove(pages, len) }?;
                }
                at = first;
                while at < last {
                    let len = last.saturating_sub(at).min(ZEROES.len() as u64);
                    let zeroes = usize::try_from(len).ok().and_then(|len| ZEROES.get(..len));
                    self.memory
                        .write_slice(zeroes.unwrap_or_default(), GuestAddress(at))
                        .map_err(io::Error::other)?;
                    at = at.saturating_add(len);
                }
            }
        }
        match &self.pluggable {
            Some(area) => area.punch(0..area.blocks()),
            None => Ok(()),
        }
    }

    /// Puts huge pages behind `len` bytes at guest-physical `start`, whole ones where the
    /// range touches part of one, whatever the host's setting for shared memory says
    /// (MADV_COLLAPSE). Costs that memory at once; saves KVM a fault for each 4 KiB. An error
    /// means that some are still small pages, which changes nothing but speed.
    pub fn back_with_huge_pages(&self, start: u64, len: u64) -> io::Result<()> {
        for (at, len) in self.parts(start, len, sys::HUGE_PAGE as u64) {
            // There must be something to collapse: one page of each.
            for offset in (0..len).step_by(sys::HUGE_PAGE) {
                sys::advise(
                    at.wrapping_add(offset),
                    PAGE as usize,
                    sys::Advice::PopulateWrite,
                )?;
            }
            sys::advise(at, len, sys::Advice::Collapse)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::os::unix::fs::MetadataExt;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_stays_mapped_for_as_long_as_anybody_has_it_and_no_longer() {
        let ram = GuestRam::with_pluggable(MIN_MEMORY, MIN_MEMORY + GIB).unwrap();
        let inodes: Vec<String> = ram
            .regions()
            .iter()
            .chain(ram.pluggable().unwrap().region(0))
            .map(|region| format!(" {} ", region.file.metadata().unwrap().ino()))
            .collect();
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let ours = |line: &&str| inodes.iter().any(|inode| line.contains(inode));
            maps.lines().filter(ours).count()
        };
        assert_eq!(mapped(), inodes.len());
        let memory = ram.memory().clone();
        memory.write_obj(7u8, GuestAddress(5)).unwrap();
        drop(ram);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5)).unwrap(), 7);
        assert_eq!(mapped(), 1);
        drop(memory);
        assert_eq!(mapped(), 0);
    }

    proptest! {
        #[test]
        fn ram_never_covers_the_hole_and_adds_up(mib in 32u64..4_000_000) {
            let size = mib << 20;
            let ranges = ranges(size);
            prop_assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), size);
            let mut end = 0;
            for (base, len) in ranges {
                prop_assert!(base >= end && len > 0);
                end = base + len;
                prop_assert!(end <= layout::LOW_RAM_END || base >= layout::HIGH_RAM_START);
            }
            let window = layout::pci_mem64_start(end);
            prop_assert!(window >= end && window.is_multiple_of(GIB) && window >= layout::HIGH_RAM_START);
        }
    }

    #[test]
    fn sizes_are_checked_and_the_message_says_what_to_do() {
        assert!(check_size(512 << 20, 0, 2 * GIB, 40).is_ok());
        assert!(check_size(512 << 20, 2 * GIB, 2 * GIB, 40).is_ok());
        for (size, max, host, bits, word) in [
            (1 << 20, 0, 2 * GIB, 40, "at least"),
            ((512 << 20) + 1, 0, 2 * GIB, 40, "MiB"),
            (4 * GIB, 0, 2 * GIB, 40, "host"),
            (64 * GIB, 0, 128 * GIB, 36, "address bits"),
            (!0xf_ffff, 0, u64::MAX, 52, "address bits"),
            (GIB, 4 * GIB, 2 * GIB, 40, "host"),
            (GIB, 64 * GIB, 128 * GIB, 36, "address bits"),
            (GIB, GIB, 2 * GIB, 40, "multiple of 128 MiB"),
            (GIB, GIB / 2, 2 * GIB, 40, "multiple of 128 MiB"),
            (GIB, GIB + (64 << 20), 2 * GIB, 40, "multiple of 128 MiB"),
        ] {
            let error = check_size(size, max, host, bits).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_memfd_is_the_memory_and_its_size_is_sealed() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        ram.populate(0x10_0000, 0x2001).unwrap();
        ram.populate(MIN_MEMORY - 1, u64::MAX).unwrap();
        ram.memory()
            .write_slice(b"bulkhead", GuestAddress(0x1234))
            .unwrap();
        let region = &ram.regions()[0];
        let mut seen = [0; 8];
        region.file.read_exact_at(&mut seen, 0x1234).unwrap();
        assert_eq!(&seen, b"bulkhead");
        assert!(region.file.set_len(0).is_err());
        assert!(region.file.set_len(2 * MIN_MEMORY).is_err());
        assert_eq!((ram.end(), ram.low_end()), (MIN_MEMORY, MIN_MEMORY));
        assert_eq!(region.host_base % sys::HUGE_PAGE as u64, 0);
    }

    #[test]
    fn cleared_memory_is_zero_and_only_what_is_kept_has_pages() {
        let ram = GuestRam::with_pluggable(MIN_MEMORY, MIN_MEMORY + (1 << 30)).unwrap();
        let file = Arc::clone(&ram.regions()[0].file);
        let pages = |ram: &GuestRam| ram.regions()[0].file.metadata().unwrap().blocks() / 8;
        for keep in [
            vec![],
            vec![(0, 1 << 20), (4 << 20, 3 * PAGE), (MIN_MEMORY - PAGE, PAGE)],
            vec![(0, u64::MAX)],
            // Not of whole pages, not of RAM, over each other.
            vec![
                (5, 10),
                (1 << 20, 1 << 20),
                (1 << 20, 10),
                (1 << 40, 1 << 20),
            ],
        ] {
            ram.populate(0, MIN_MEMORY).unwrap();
            let all = vec![0xa5; MIN_MEMORY as usize];
            ram.memory().write_slice(&all, GuestAddress(0)).unwrap();
            let plugged = GuestAddress(ram.pluggable().unwrap().start());
            ram.all().write_obj(7_u64, plugged).unwrap();
            ram.clear(&keep).unwrap();
            let mut seen = vec![1; MIN_MEMORY as usize];
            file.read_exact_at(&mut seen, 0).unwrap();
            assert!(seen.iter().all(|byte| *byte == 0), "{keep:?}");
            assert_eq!(ram.all().read_obj::<u64>(plugged).unwrap(), 0);
            let kept: u64 = match keep.len() {
                0 => 0,
                1 => MIN_MEMORY / PAGE,
                3 => 256 + 3 + 1,
                _ => 256,
            };
            // Huge pages come and go as a whole.
            assert!(pages(&ram) <= kept + 512 * keep.len() as u64, "{keep:?}");
            assert!(pages(&ram) >= kept, "{keep:?}");
        }
    }

    #[test]
    fn huge_pages_cover_the_range_and_change_nothing() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        ram.memory()
            .write_slice(b"kept", GuestAddress(5 << 20))
            .unwrap();
        let parts = |start, len| -> Vec<_> {
            let base = ram.regions()[0].host_base;
            ram.parts(start, len, sys::HUGE_PAGE as u64)
                .map(|(at, len)| ((at as u64 - base) >> 20, len >> 20))
                .collect()
        };
        assert_eq!(parts(5 << 20, 1), [(4, 2)]);
        assert_eq!(parts(3 << 20, 2 << 20), [(2, 4)]);
        assert_eq!(parts(31 << 20, u64::MAX), [(30, 2)]);
        assert_eq!(parts(MIN_MEMORY, 1), []);
        assert_eq!(parts(0, 0), []);
        // May fail where the host has none: it is best effort.
        let _ = ram.back_with_huge_pages(4 << 20, 3 << 20);
        let mut kept = [0; 4];
        ram.memory()
            .read_slice(&mut kept, GuestAddress(5 << 20))
            .unwrap();
        assert_eq!(&kept, b"kept");
    }

    #[test]
    fn ram_above_the_hole_is_a_region_of_its_own() {
        // Only reserved, not touched: nothing is allocated.
        let ram = GuestRam::new(layout::LOW_RAM_END + GIB).unwrap();
        let bases: Vec<_> = ram
            .regions()
            .iter()
            .map(|r| (r.slot, r.guest_base, r.size))
            .collect();
        assert_eq!(
            bases,
            [
                (0, 0, layout::LOW_RAM_END),
                (1, layout::HIGH_RAM_START, GIB)
            ]
        );
        assert_eq!(ram.end(), layout::HIGH_RAM_START + GIB);
        ram.memory()
            .write_obj(7u32, GuestAddress(layout::HIGH_RAM_START))
            .unwrap();
        assert!(
            ram.memory()
                .write_obj(7u32, GuestAddress(layout::LOW_RAM_END))
                .is_err()
        );
    }
}
