//! The memory system calls behind `GuestRam`: sealed memfds, advice, populating.
//! Called by the manager thread while the machine is being built, and by those that reset it and
//! plug memory.
#![allow(unsafe_code)] // memfd_create, fcntl seals and madvise have no safe wrapper in libc.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::owner::Owner;

/// memfd_create(2) of `size` bytes, sealed against a change of size by anyone who is later
/// given the descriptor, and never executable where the kernel can promise it.
pub(super) fn sealed_memfd(size: u64) -> io::Result<File> {
    const NOEXEC_SEAL: libc::c_uint = 8; // MFD_NOEXEC_SEAL, Linux 6.3
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let create = |flags| {
        // SAFETY: the name is a NUL-terminated constant.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(unsafe { File::from_raw_fd(fd) })
    };
    let file = create(flags | NOEXEC_SEAL).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => create(flags),
        _ => Err(error),
    })?;
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer; the descriptor is open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// The size and alignment of a huge page.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// Maps all `len` bytes of `file`, shared, at an address that huge pages can start at.
pub(super) fn map(file: File, len: usize) -> io::Result<MmapRegion<Owner>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let reserved = len
        .checked_add(HUGE_PAGE)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let owner = Owner::reserve(reserved)?;
    let room = owner.start();
    let start = room.wrapping_byte_add(room.align_offset(HUGE_PAGE) % HUGE_PAGE);
    // SAFETY: start is less than HUGE_PAGE above `room`, so start + len lies inside what was
    // reserved just above and is used by nobody; MAP_FIXED replaces only that.
    let mapped = unsafe {
        libc::mmap(
            start.cast(),
            len,
            protection,
            flags | libc::MAP_FIXED,
            file.as_raw_fd(),
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let region = MmapRegionBuilder::new_with_bitmap(len, owner)
        .with_mmap_prot(protection)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::new(file, 0));
    // SAFETY: `len` bytes are mapped at `mapped`, and are until the region, and `owner` in it, is
    // dropped; the region itself unmaps nothing that it has not mapped.
    unsafe { region.with_raw_mmap_pointer(mapped.cast()) }
        .build()
        .map_err(io::Error::other)
}

/// Advice that changes no contents.
#[derive(Clone, Copy, Debug)]
pub(super) enum Advice {
    /// MADV_HUGEPAGE.
    HugePages,
    /// MADV_DONTDUMP.
    NotInCoreDumps,
    /// MADV_POPULATE_WRITE (Linux 5.14).
    PopulateWrite,
    /// MADV_COLLAPSE (Linux 6.1).
    Collapse,
}

/// madvise(2) on `len` bytes at `start`, an address inside a mapping of guest RAM.
pub(super) fn advise(start: *mut u8, len: usize, advice: Advice) -> io::Result<()> {
    let advice = match advice {
        Advice::HugePages => libc::MADV_HUGEPAGE,
        Advice::NotInCoreDumps => libc::MADV_DONTDUMP,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
        Advice::Collapse => libc::MADV_COLLAPSE,
    };
    // SAFETY: none of these changes or drops a page's contents, whatever the range: a
    // wrong one fails (ENOMEM) or touches memory that stays as it was.
    if unsafe { libc::madvise(start.cast(), len, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// madvise(2) MADV_REMOVE: the pages of `len` bytes go, here and in every other mapping of the
/// file, and read as zeroes from now on.
///
/// # Safety
/// The range lies in a shared mapping of guest RAM, in which nobody holds a reference: as with
/// everything there, the guest may change it at any time.
pub(super) unsafe fn remove(start: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: by this function's contract it is like a write of zeroes by the guest.
    if unsafe { libc::madvise(start.cast(), len, libc::MADV_REMOVE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// sysinfo(2)'s total RAM in bytes.
pub(super) fn total_ram() -> io::Result<u64> {
    // SAFETY: sysinfo is plain data, for which all zeroes is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a whole `sysinfo`, which the call fills.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.totalram.saturating_mul(u64::from(info.mem_unit)))
}
