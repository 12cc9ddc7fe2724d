#![allow(unsafe_code)] // openat2(2), mkdirat(2), unlinkat(2) and flock(2), which std does not offer.
//! System calls on a directory that is held by descriptor, as safe functions: what lies beneath
//! it is opened, made and removed, and nothing else can be reached by the names that are given.
//! For cgroups (`cgroup`, `cgroup_parent`) and for the notes of what a VM made (`leftovers`).
//!
//! Called by the VMM's main thread at start, by the launcher's only thread, and by
//! `bulkhead reap`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::sys::{check, check_long, own};

/// <linux/openat2.h>, struct open_how.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS and RESOLVE_BENEATH.
const RESOLVE: u64 = 0x01 | 0x02 | 0x04 | 0x08;

/// Opens what lies beneath a directory; no link is followed.
pub fn open_beneath(directory: &File, name: &str, flags: i32) -> io::Result<File> {
    let name = CString::new(name)?;
    let how = OpenHow {
        flags: u64::from((flags | libc::O_CLOEXEC).unsigned_abs()),
        mode: 0,
        resolve: RESOLVE,
    };
    // SAFETY: the name is a C string and `how` an open_how of the size told; both live across
    // the call, which only reads them.
    let fd = check_long(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<OpenHow>(),
        )
    })?;
    Ok(own(fd)?.into())
}

/// Makes a directory in a directory.
pub fn make_directory(directory: &File, name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that lives across the call.
    check(unsafe { libc::mkdirat(directory.as_raw_fd(), name.as_ptr(), 0o755) }).map(|_| ())
}

/// Removes an empty directory from a directory.
pub fn remove_directory(directory: &File, name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that lives across the call.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), libc::AT_REMOVEDIR) })
        .map(|_| ())
}

/// Locks a file or directory for this opening alone (flock(2)); false: somebody else has. The
/// lock ends with the last descriptor of the opening, in whatever process.
pub fn try_lock(file: impl AsFd) -> io::Result<bool> {
    // SAFETY: no memory is passed.
    let result = unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    match check(result) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
