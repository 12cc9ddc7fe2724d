//! Memory that can be plugged while the machine runs: an area above RAM, in a few regions of a
//! memfd each. A region is there, for KVM and for device processes, while any block of it is
//! plugged, and longer beside a back-end that cannot let go of it; blocks that are not plugged have
//! no pages but those that the guest touches against the rules.
//!
//! The regions are mapped here from the start. The manager thread says which are present; the
//! thread that plugs and those of functions look.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::block_map::MAX_BLOCKS;

use super::{MappedRegion, RamRegion, map_region, sys};

/// Linux makes memory usable in pieces of this size, or of more.
const STEP: u64 = 128 << 20;
/// Least size of a block: a huge page.
const MIN_BLOCK: u64 = 2 << 20;
/// Most regions. With those of RAM they are eight, as many as every back-end can map.
const MAX_REGIONS: u64 = 6;

/// The area.
#[derive(Debug)]
pub struct Pluggable {
    start: u64,
    size: u64,
    block: u64,
    regions: Vec<RamRegion>,
    present: Mutex<Vec<bool>>,
}

/// How large the regions of an area are, and its blocks.
fn divide(size: u64) -> (u64, u64) {
    let region = size.div_ceil(MAX_REGIONS).next_multiple_of(STEP);
    let block = size.div_ceil(MAX_BLOCKS).next_power_of_two().max(MIN_BLOCK);
    // Regions begin at the first block of something.
    (region.next_multiple_of(block), block)
}

/// What an area of about `size` bytes is a multiple of.
pub(super) fn step(size: u64) -> u64 {
    divide(size).1.max(STEP)
}

impl Pluggable {
    /// Makes and maps an area of `size` bytes at `start`, whose first KVM slot is `slot`. Costs
    /// address space only.
    pub(super) fn new(
        slot: u32,
        start: u64,
        size: u64,
    ) -> io::Result<(Self, Vec<Arc<MappedRegion>>)> {
        let (each, block) = divide(size);
        let (mut regions, mut mapped) = (Vec::new(), Vec::new());
        let mut offset = 0;
        while offset < size {
            let len = each.min(size.saturating_sub(offset));
            let slot = slot.saturating_add(u32::try_from(regions.len()).unwrap_or(u32::MAX));
            let (region, mapping) = map_region(slot, start.saturating_add(offset), len)?;
            regions.push(region);
            mapped.push(Arc::new(mapping));
            offset = offset.saturating_add(len);
        }
        let present = Mutex::new(vec![false; regions.len()]);
        let area = Self {
            start,
            size,
            block,
            regions,
            present,
        };
        Ok((area, mapped))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<bool>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest-physical address of the first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Bytes of a block.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Blocks that there are.
    pub fn blocks(&self) -> u64 {
        self.size.checked_div(self.block).unwrap_or(0)
    }

    /// A region by its number.
    pub fn region(&self, number: usize) -> Option<&RamRegion> {
        self.regions.get(number)
    }

    /// The blocks of each region, by its number.
    pub fn blocks_of_regions(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let block = move |bytes: u64| bytes.checked_div(self.block).unwrap_or(0);
        self.regions.iter().map(move |region| {
            let first = region.guest_base.saturating_sub(self.start);
            block(first)..block(first.saturating_add(region.size))
        })
    }

    /// Says whether a region is there.
    pub fn set_present(&self, number: usize, present: bool) {
        if let Some(place) = self.lock().get_mut(number) {
            *place = present;
        }
    }

    /// Whether it is.
    pub fn is_present(&self, number: usize) -> bool {
        self.lock().get(number).copied().unwrap_or(false)
    }

    /// The regions that are there, lowest first.
    pub fn present(&self) -> Vec<RamRegion> {
        let present = self.lock();
        let regions = self.regions.iter().zip(present.iter());
        regions
            .filter(|(_, present)| **present)
            .map(|(region, _)| region.clone())
            .collect()
    }

    /// Gives the pages of blocks back to the host: they read as zeroes from now on.
    #[allow(unsafe_code)] // MADV_REMOVE on our own mapping
    pub fn punch(&self, blocks: Range<u64>) -> io::Result<()> {
        for (region, own) in self.regions.iter().zip(self.blocks_of_regions()) {
            let (first, end) = (blocks.start.max(own.start), blocks.end.min(own.end));
            let Some(count) = end.checked_sub(first).filter(|count| *count > 0) else {
                continue;
            };
            let bytes = |blocks: u64| usize::try_from(blocks.saturating_mul(self.block));
            let (Ok(offset), Ok(len)) = (bytes(first.saturating_sub(own.start)), bytes(count))
            else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let base = region.host_base as *mut u8;
            // SAFETY: `own` has the region's blocks, so that offset and length lie in its
            // mapping, which is shared and which the region keeps; all access to it is by
            // volatile slices.
            unsafe { sys::remove(base.wrapping_add(offset), len) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_MEMORY};
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    proptest! {
        #[test]
        fn regions_are_few_and_hold_whole_blocks(steps in 1u64..100_000_000) {
            let size = steps.saturating_mul(STEP);
            let (region, block) = divide(size);
            prop_assert!(block.is_power_of_two() && size.div_ceil(block) <= MAX_BLOCKS);
            prop_assert!(size.div_ceil(region) <= MAX_REGIONS && region.is_multiple_of(block));
        }
    }

    #[test]
    fn regions_come_and_go_and_what_is_punched_has_no_pages() {
        let ram = GuestRam::with_pluggable(MIN_MEMORY, MIN_MEMORY + (1 << 30)).unwrap();
        let area = ram.pluggable().unwrap();
        assert_eq!((area.start(), area.size()), (4 << 30, 1 << 30));
        assert_eq!(ram.last_end(), 5 << 30);
        assert_eq!(ram.end(), MIN_MEMORY);
        assert_eq!(
            area.blocks_of_regions()
                .map(|b| b.end - b.start)
                .sum::<u64>(),
            area.blocks()
        );
        assert_eq!(ram.present_regions().len(), 1);
        area.set_present(1, true);
        area.set_present(9, true);
        let present = ram.present_regions();
        assert_eq!(present.len(), 2);
        assert!(area.is_present(1) && !area.is_present(0) && !area.is_present(9));
        let second = &present[1];
        let address = GuestAddress(second.guest_base + area.block());
        ram.all().write_obj(7_u32, address).unwrap();
        assert!(
            ram.memory().write_obj(7_u32, address).is_err(),
            "not from the start"
        );
        assert!(second.file.metadata().unwrap().blocks() > 0);
        let first = area.blocks_of_regions().nth(1).unwrap().start;
        area.punch(first..first + 1).unwrap();
        assert_eq!(ram.all().read_obj::<u32>(address).unwrap(), 7);
        // Across the end of a region.
        area.punch(first - 1..first + 2).unwrap();
        assert_eq!(ram.all().read_obj::<u32>(address).unwrap(), 0);
        let read = second.file.metadata().unwrap().blocks();
        area.punch(0..area.blocks()).unwrap();
        assert!(second.file.metadata().unwrap().blocks() <= read);
        assert!(ram.all().num_regions() > 2);
    }
}
