//! preadv2(2) and pwritev2(2): how the plain engine moves data, and how disks in memory are
//! read and written.

#![allow(unsafe_code)] // system calls over segments of guest memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::iovec;

use crate::transfer::{Direction, Step};

fn result(n: isize) -> io::Result<u32> {
    usize::try_from(n)
        .map(|n| u32::try_from(n).unwrap_or(u32::MAX))
        .map_err(|_| io::Error::last_os_error())
}

/// Does one step of a transfer, as far as the kernel goes in one call. With `durable`, what
/// was written is on stable storage afterwards.
pub fn perform(file: &File, direction: Direction, step: &Step, durable: bool) -> io::Result<u32> {
    let fd = file.as_raw_fd();
    let count = libc::c_int::try_from(step.count).unwrap_or(0);
    let offset = libc::off_t::try_from(step.offset)
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: a Step's segments are live until its transfer is touched again, which the
    // caller does only with the result of this call; they lie in guest memory that the
    // worker's ring keeps mapped, or in a private bounce buffer.
    result(unsafe {
        match direction {
            Direction::Read => libc::preadv2(fd, step.segments, count, offset, 0),
            Direction::Write => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, step.segments, count, offset, flags)
            }
        }
    })
}

/// A result as io_uring gives it: bytes, or a negated errno.
#[inline]
pub fn negated(result: io::Result<u32>) -> i32 {
    match result {
        Ok(n) => i32::try_from(n).unwrap_or(i32::MAX),
        Err(e) => e.raw_os_error().map_or(-libc::EIO, i32::wrapping_neg),
    }
}

/// Reads into a private buffer.
pub fn read(file: &File, buffer: &mut [u8], offset: i64) -> io::Result<u32> {
    let segment = iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: one segment over a live, exclusively borrowed slice.
    result(unsafe { libc::preadv2(file.as_raw_fd(), &raw const segment, 1, offset, 0) })
}
