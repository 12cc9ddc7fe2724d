//! Hosts that this one is made to look like, for a process and all that it starts: by a seccomp filter
//! that changes the kernel's answer to one call.
#![allow(unsafe_code)] // A seccomp filter, set between fork and exec.

use std::io::Error;
use std::os::unix::process::CommandExt;
use std::process::Command;

use bulkhead_tests::host::{Undo, sh};
use bulkhead_tests::vmm::Scratch;

/// What a host has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// What this one has.
    This,
    /// No io_uring, as a container's runtime may have it.
    WithoutRings,
    /// Block devices that erase securely, to judge by what they answer to a range that is none.
    Erasing,
}

const BLKSECDISCARD: u32 = 0x127d;

impl Host {
    /// Lets what this command starts be on such a host.
    pub fn starts(self, command: &mut Command) {
        let filter = match self {
            Self::This => return,
            Self::WithoutRings => answers(libc::SYS_io_uring_setup, None, libc::EPERM),
            Self::Erasing => answers(libc::SYS_ioctl, Some(BLKSECDISCARD), libc::EINVAL),
        };
        // SAFETY: it makes system calls on memory of its own.
        unsafe { command.pre_exec(move || install(filter)) };
    }
}

/// A filter that answers this call, with this second argument, by an errno.
fn answers(call: libc::c_long, argument: Option<u32>, errno: i32) -> [libc::sock_filter; 6] {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// Where the number of the call lies, and the lower half of its second argument.
    const NUMBER: u32 = 0;
    const SECOND: u32 = 24;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let call = u32::try_from(call).unwrap_or(u32::MAX);
    // Where any will do, both ways lead to the errno.
    let otherwise = u8::from(argument.is_some());
    let errno = libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
    [
        instruction(LOAD, 0, 0, NUMBER),
        instruction(EQUAL, 0, 3, call),
        instruction(LOAD, 0, 0, SECOND),
        instruction(EQUAL, 0, otherwise, argument.unwrap_or_default()),
        instruction(RETURN, 0, 0, errno),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

fn install(mut filter: [libc::sock_filter; 6]) -> Result<(), Error> {
    let program = libc::sock_fprog {
        len: 6,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the first takes integers; the second a program of as many instructions as it says,
    // which lives across the call.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
    };
    if failed {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Whether a file can be made a block device here.
pub fn has_loops() -> bool {
    sh("losetup --find").is_ok()
}

/// A block device over a file of the scratch directory's, and what removes it.
///
/// # Errors
/// There is none to be had.
pub fn block_device(scratch: &Scratch, name: &str) -> Result<(String, Undo), String> {
    let file = scratch.disk(name, 1 << 16, 7)?;
    let device = sh(&format!("losetup --find --show {file}"))?
        .trim()
        .to_owned();
    let undo = Undo::new(format!("losetup --detach {device}"));
    Ok((device, undo))
}
