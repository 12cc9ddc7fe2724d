//! The system calls of a disk image in a format: whole reads and writes of private buffers,
//! and what is done to guest memory that an image says is zero or compressed.
//!
//! preadv2(2), pwritev2(2), fallocate(2) and fdatasync(2): the policy `bulkhead-blk-image`
//! has no others for files. Called by queue workers and, while an image is opened or grown,
//! by the main thread.

#![allow(unsafe_code)] // system calls over private buffers; fills and copies of guest memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use bulkhead_runtime::sys;
use libc::iovec;

use crate::transfer::Step;

fn check(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Reads all of `buffer`; what lies beyond the end of the file is zeros. With O_DIRECT,
/// buffer, length and offset must be aligned.
pub fn read(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|r| !r.is_empty()) {
        let at = position(offset.saturating_add(done as u64))?;
        let segment = iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        // SAFETY: one segment over a live, exclusively borrowed slice.
        let call = || unsafe { libc::preadv2(file.as_raw_fd(), &raw const segment, 1, at, 0) };
        let n = retry(|| check(call()))?;
        done = done.saturating_add(n);
        // A short read of less than a sector is the end too: O_DIRECT cannot go on there.
        if n == 0 || n % 512 != 0 {
            buffer.get_mut(done..).unwrap_or_default().fill(0);
            break;
        }
    }
    Ok(())
}

/// Writes all of `bytes`, under the same conditions.
pub fn write(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|r| !r.is_empty()) {
        let at = position(offset.saturating_add(done as u64))?;
        let segment = iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        // SAFETY: one segment over a live slice, which the kernel only reads.
        let call = || unsafe { libc::pwritev2(file.as_raw_fd(), &raw const segment, 1, at, 0) };
        match retry(|| check(call()))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => done = done.saturating_add(n),
        }
    }
    Ok(())
}

/// Gives the blocks of a range back to the file system; it reads as zeros then.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (at, len) = (position(offset)?, position(len)?);
    retry(|| {
        // SAFETY: no memory is involved.
        check(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) } as isize)
    })
    .map(|_| ())
}

/// Makes what was written durable.
pub fn sync(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved.
    retry(|| check(unsafe { libc::fdatasync(file.as_raw_fd()) } as isize)).map(|_| ())
}

/// Does before confinement what the format driver would do by calls that the policy lacks:
/// no errno could refuse brk(2), because the C library takes -ENOMEM for an address. The heap
/// is address space, which costs nothing before it is used. To be called on the main thread
/// while there is no other.
///
/// # Errors
/// The kernel gave no address space.
pub fn prepare(heap: usize) -> io::Result<()> {
    // Keys for hash maps: the standard library asks the kernel once per thread, and only
    // the main thread, which opens images, makes any.
    std::hint::black_box(std::hash::RandomState::new());
    // SAFETY: sbrk(0) only asks.
    let before = unsafe { libc::sbrk(0) } as usize;
    sys::fixed_heap(heap);
    // SAFETY: as above.
    let after = unsafe { libc::sbrk(0) } as usize;
    if after.saturating_sub(before) < heap {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(())
}

/// A zeroed buffer at a multiple of `align` bytes.
#[derive(Debug)]
pub struct Buffer {
    store: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Buffer {
    /// Of `len` bytes.
    pub fn new(len: usize, align: usize) -> Self {
        let store = vec![0; len.saturating_add(align)];
        let skip = store.as_ptr().align_offset(align.max(1)).min(align);
        Self { store, skip, len }
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let end = self.skip.saturating_add(self.len);
        self.store.get_mut(self.skip..end).unwrap_or_default()
    }
}

/// The segments of a step.
fn segments(step: &Step) -> &[iovec] {
    // SAFETY: a Step's segment list is live until its transfer is touched again, which the
    // engine does only after the call that it passed the step to (transfer.rs).
    unsafe { std::slice::from_raw_parts(step.segments, step.count as usize) }
}

/// Bytes of a step.
pub fn step_len(step: &Step) -> u64 {
    segments(step).iter().map(|s| s.iov_len as u64).sum()
}

/// The first `len` bytes of a step, to be done at `offset` of a file. `scratch` holds the
/// segments and must stay as it is while the result is used.
pub fn part(step: &Step, len: u64, offset: u64, scratch: &mut Vec<iovec>) -> Step {
    scratch.clear();
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    for s in segments(step) {
        let take = s.iov_len.min(left);
        if take == 0 {
            continue;
        }
        left = left.saturating_sub(take);
        scratch.push(iovec {
            iov_base: s.iov_base,
            iov_len: take,
        });
    }
    Step {
        segments: scratch.as_ptr(),
        count: u32::try_from(scratch.len()).unwrap_or(0),
        single: match scratch.as_slice() {
            [one] => Some(*one),
            _ => None,
        },
        offset,
    }
}

/// What is left of a step after its first `done` bytes, in place.
pub fn skip(list: &mut Vec<iovec>, mut done: usize) {
    list.retain_mut(|s| {
        let take = s.iov_len.min(done);
        done = done.saturating_sub(take);
        s.iov_base = s.iov_base.cast::<u8>().wrapping_add(take).cast();
        s.iov_len = s.iov_len.saturating_sub(take);
        s.iov_len > 0
    });
}

/// Fills the first `len` bytes of a step with zeros.
pub fn zero(step: &Step, len: u64) {
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    for s in segments(step) {
        let take = s.iov_len.min(left);
        left = left.saturating_sub(take);
        // SAFETY: the segment lies in guest memory or in a bounce buffer, both of which
        // stay mapped while the step is valid; nobody holds a reference to either. The
        // guest may use the memory meanwhile, which is its own affair.
        unsafe { std::ptr::write_bytes(s.iov_base.cast::<u8>(), 0, take) };
    }
}

/// Copies `bytes` to the beginning of a step.
pub fn fill(step: &Step, mut bytes: &[u8]) {
    for s in segments(step) {
        let (now, rest) = bytes.split_at(s.iov_len.min(bytes.len()));
        // SAFETY: as in `zero`; `now` is a private slice of the length that is copied, and
        // cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), s.iov_base.cast(), now.len()) };
        bytes = rest;
    }
}
