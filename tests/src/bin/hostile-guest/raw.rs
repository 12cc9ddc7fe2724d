//! Memory that is shared with a device: its registers, mapped from sysfs, and pages of RAM
//! whose guest-physical address is known. The one module here that holds `unsafe`; what it
//! hands out checks every offset.
//!
//! The program has one thread; the other party is the device.
#![allow(unsafe_code)] // mmap, and volatile access to what the device reads and writes too.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

/// The size of a page.
pub const PAGE: usize = 4096;

/// A mapping, unmapped with the value.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

macro_rules! accessors {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads little-endian at `offset`.
        pub fn $read(&self, offset: usize) -> Result<$type, String> {
            let at = self.place(offset, size_of::<$type>())?;
            // SAFETY: `place` found it aligned and inside the mapping, which lives as long as
            // `self`; any bytes are a valid integer; volatile because the device writes too.
            Ok(<$type>::from_le(unsafe {
                at.cast::<$type>().read_volatile()
            }))
        }

        /// Writes little-endian at `offset`.
        pub fn $write(&self, offset: usize, value: $type) -> Result<(), String> {
            let at = self.place(offset, size_of::<$type>())?;
            // SAFETY: as for reading; no reference to the mapping's bytes exists anywhere.
            unsafe { at.cast::<$type>().write_volatile(value.to_le()) };
            Ok(())
        }
    };
}

impl Mapping {
    /// A file's first `len` bytes, shared: the registers of a PCI function (sysfs `resourceN`).
    pub fn registers(file: &File, len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(len: usize, flags: i32, fd: i32) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces no other.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, len })
    }

    fn place(&self, offset: usize, size: usize) -> Result<NonNull<u8>, String> {
        let inside = offset.checked_add(size).is_some_and(|end| end <= self.len);
        if !inside || !offset.is_multiple_of(size) {
            return Err(format!(
                "{size} bytes at {offset:#x} of a mapping of {:#x}",
                self.len
            ));
        }
        // SAFETY: the offset was just found to lie inside the mapping.
        Ok(unsafe { self.base.add(offset) })
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.len
    }

    accessors!(r8, w8, u8);
    accessors!(r16, w16, u16);
    accessors!(r32, w32, u32);
    accessors!(r64, w64, u64);
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Pages of RAM that stay where they are, each with its own guest-physical address.
pub struct Pages {
    memory: Mapping,
    frames: Vec<u64>,
}

impl Pages {
    /// Takes and locks `count` zeroed pages.
    pub fn new(count: usize) -> Result<Self, String> {
        let failed = |what: &str| format!("{what}: {}", io::Error::last_os_error());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = Mapping::map(count * PAGE, flags, -1).map_err(|e| format!("mmap: {e}"))?;
        let (base, len) = (memory.base.as_ptr().cast(), memory.len);
        // khugepaged would move them. A kernel without huge pages refuses, and need not be asked.
        // SAFETY: advice about, and a lock on, a mapping of our own changes no byte of it.
        let locked = unsafe {
            libc::madvise(base, len, libc::MADV_NOHUGEPAGE);
            libc::mlock(base, len)
        };
        if locked != 0 {
            return Err(failed("mlock"));
        }
        let mut pages = Self {
            memory,
            frames: Vec::new(),
        };
        for page in 0..count {
            pages.memory.w8(page * PAGE, 0)?;
        }
        pages.frames = pages.look_up(count)?;
        Ok(pages)
    }

    /// Reads the frame of every page from /proc/self/pagemap.
    fn look_up(&self, count: usize) -> Result<Vec<u64>, String> {
        let path = "/proc/self/pagemap";
        let file = File::open(path).map_err(|e| format!("{path}: {e}"))?;
        let first = self.memory.base.as_ptr().addr() / PAGE;
        let mut frames = Vec::with_capacity(count);
        for page in 0..count {
            let mut entry = [0; 8];
            file.read_exact_at(&mut entry, ((first + page) * 8) as u64)
                .map_err(|e| format!("{path}: {e}"))?;
            let entry = u64::from_le_bytes(entry);
            // Bit 63: present; bits 0 to 54: the frame, zero for those who may not know it.
            let frame = entry & ((1 << 55) - 1);
            if entry >> 63 == 0 || frame == 0 {
                return Err(format!(
                    "{path} hides the frame: {entry:#x}; run this as root"
                ));
            }
            frames.push(frame * PAGE as u64);
        }
        Ok(frames)
    }

    /// Fails if the kernel moved a page since: then the device was not told what we think.
    pub fn still_there(&self) -> Result<(), String> {
        let now = self.look_up(self.frames.len())?;
        if now == self.frames {
            Ok(())
        } else {
            Err("the kernel moved a locked page".into())
        }
    }

    /// Guest-physical address of `page`.
    pub fn address(&self, page: usize) -> Result<u64, String> {
        self.frames
            .get(page)
            .copied()
            .ok_or_else(|| format!("no page {page}"))
    }

    /// The pages' bytes: page N begins at N times [`PAGE`].
    pub fn bytes(&self) -> &Mapping {
        &self.memory
    }

    /// Zeroes everything.
    pub fn clear(&self) -> Result<(), String> {
        for offset in (0..self.memory.len()).step_by(8) {
            self.memory.w64(offset, 0)?;
        }
        Ok(())
    }
}

/// Orders all writes before it before all accesses after it, as the device sees them.
pub fn barrier() {
    fence(Ordering::SeqCst);
}
