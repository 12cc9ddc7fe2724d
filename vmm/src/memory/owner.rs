//! Who unmaps guest memory: the last one that can reach it. vm-memory unmaps only what it has mapped, at
//! addresses of the kernel's choice, where huge pages need others; so what it keeps beside a region
//! for a bitmap of dirty pages, which we have none of, keeps the mapping.
#![allow(unsafe_code)] // mmap and munmap have no safe wrapper in libc.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};

/// A range of addresses that is this process's until the value is dropped.
#[derive(Debug)]
struct Range {
    start: usize,
    len: usize,
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `reserve`, and what is mapped there since is reached only by
        // who has an `Owner`: vm-memory's region, which drops it last, and a `RamRegion`, whose address
        // KVM has too, for as long as `KvmVm` keeps the memory beside the VM's descriptor.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// Keeps a mapping; nothing, for memory that vm-memory has mapped itself. As a bitmap it marks nothing.
#[derive(Clone, Debug, Default)]
pub struct Owner(Option<Arc<Range>>);

impl Owner {
    /// `len` bytes of address space, of which nothing can be reached yet.
    pub(super) fn reserve(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start as usize;
        Ok(Self(Some(Arc::new(Range { start, len }))))
    }

    /// Its first address.
    pub(super) fn start(&self) -> *mut u8 {
        self.0.as_ref().map_or(0, |range| range.start) as *mut u8
    }
}

impl WithBitmapSlice<'_> for Owner {
    type S = ();
}

impl Bitmap for Owner {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
}

impl NewBitmap for Owner {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}
