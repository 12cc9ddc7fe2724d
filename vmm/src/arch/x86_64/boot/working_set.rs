//! What a Linux kernel touches on its way to init, so that it can be given pages in one go
//! instead of one KVM fault for each 4 KiB.
//!
//! Shared guest memory is faulted in 4 KiB at a time unless the host allows huge pages for
//! it, which Debian does not by default: 12,000 of 16,000 exits to init were such faults. So
//! the working set is backed with huge pages before anything is loaded (MADV_COLLAPSE, which
//! works whatever the host's setting), and mapped by KVM_PRE_FAULT_MEMORY before the first
//! instruction, which helps even where there are only small pages.
//!
//! The cost in memory: what is loaded is there anyway. The allocations that are guessed here
//! (16 MiB behind the kernel; at the top of RAM 8 MiB and 1/64 of it for `struct page`; with
//! RAM above 4 GiB also 24 MiB where that begins and 64 MiB of bounce buffers below the hole)
//! are what Debian's kernels touched before init. A guest that does not need them is charged
//! for them all the same: measured with 256 MiB, 6 MiB more than it had touched.

use crate::arch::x86_64::layout;
use crate::memory::GuestRam;

const PAGE: u64 = 4096;
/// Page tables, slabs and the unpacked initrd, taken from behind the kernel.
const BEHIND_KERNEL: u64 = 16 << 20;
/// Per-CPU areas and hash tables, taken from the top of RAM.
const BELOW_TOP: u64 = 8 << 20;
/// The first pages of RAM above 4 GiB, which serve allocations before those behind the kernel.
const HIGH_RAM_BEGIN: u64 = 24 << 20;
/// SWIOTLB's bounce buffers, which Linux allocates when there is RAM above 4 GiB.
const BOUNCE_BUFFERS: u64 = 64 << 20;
/// Bytes of RAM for each byte of `struct page`.
const RAM_PER_STRUCT_PAGE: u64 = 64;
/// The most that is guessed for `struct page`.
const MAX_STRUCT_PAGES: u64 = 64 << 20;

/// Collects ranges and gives them huge pages as they come.
pub(super) struct WorkingSet<'a> {
    ram: &'a GuestRam,
    ranges: Vec<(u64, u64)>,
    /// False once the host had no huge page left: asking again would only cost time.
    huge: bool,
}

impl<'a> WorkingSet<'a> {
    /// Begins with the first MiB and the top of RAM.
    pub(super) fn new(ram: &'a GuestRam) -> Self {
        Self::begin(ram, true)
    }

    /// The same of memory that a guest has used: no page is made larger.
    pub(super) fn of_used(ram: &'a GuestRam) -> Self {
        Self::begin(ram, false)
    }

    fn begin(ram: &'a GuestRam, huge: bool) -> Self {
        let mut set = Self {
            ram,
            ranges: Vec::new(),
            huge,
        };
        set.add(0, layout::EXTENDED_RAM_START);
        let top = (ram.size() / RAM_PER_STRUCT_PAGE)
            .min(MAX_STRUCT_PAGES)
            .saturating_add(BELOW_TOP);
        if let Some(last) = ram.regions().last() {
            let top = top.min(last.size);
            set.add(ram.end().saturating_sub(top), top);
            if last.guest_base >= layout::HIGH_RAM_START {
                set.add(last.guest_base, HIGH_RAM_BEGIN.min(last.size));
                let bounce = BOUNCE_BUFFERS.min(ram.low_end());
                set.add(ram.low_end().saturating_sub(bounce), bounce);
            }
        }
        set
    }

    /// Adds `len` bytes at `start`, which are about to be filled.
    pub(super) fn add(&mut self, start: u64, len: u64) {
        if self.huge {
            self.huge = self.ram.back_with_huge_pages(start, len).is_ok();
        }
        let first = start & !(PAGE - 1);
        let last = start.saturating_add(len).checked_next_multiple_of(PAGE);
        if let Some(len) = last.and_then(|last| last.checked_sub(first)) {
            self.ranges.push((first, len));
        }
    }

    /// Adds what the kernel allocates first behind itself.
    pub(super) fn add_early_allocations(&mut self, kernel_end: u64) {
        let len = self
            .ram
            .low_end()
            .saturating_sub(kernel_end)
            .min(BEHIND_KERNEL);
        self.add(kernel_end, len);
    }

    /// The ranges in whole pages, sorted and without overlaps.
    pub(super) fn into_ranges(mut self) -> Vec<(u64, u64)> {
        self.ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, len) in self.ranges {
            let end = start.saturating_add(len);
            match merged.last_mut() {
                Some((first, size)) if start <= first.saturating_add(*size) => {
                    *size = (*size).max(end.saturating_sub(*first));
                }
                _ => merged.push((start, len)),
            }
        }
        merged.retain(|(_, len)| *len > 0);
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIN_MEMORY;

    #[test]
    fn ranges_are_whole_pages_in_ram_without_overlap() {
        for size in [MIN_MEMORY, 256 << 20, layout::LOW_RAM_END + (1 << 30)] {
            let ram = GuestRam::new(size).unwrap();
            let mut set = WorkingSet::new(&ram);
            set.huge = false;
            set.add(0x100_0123, 0x50_0001);
            set.add(0x120_0000, 5);
            set.add_early_allocations(0x150_0124);
            let ranges = set.into_ranges();
            let mut end = 0;
            for (start, len) in &ranges {
                assert!(start % PAGE == 0 && len % PAGE == 0 && *len > 0);
                assert!(*start > end || end == 0, "{ranges:?}");
                end = start + len;
                let inside = |r: &crate::memory::RamRegion| {
                    r.guest_base <= *start && end <= r.guest_base + r.size
                };
                assert!(ram.regions().iter().any(inside), "{ranges:x?}");
            }
            assert_eq!(end, ram.end(), "the top of RAM is part of it");
        }
    }
}
