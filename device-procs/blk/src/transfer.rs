//! One read or write on its way between the disk and guest memory, in as many steps as it
//! takes: short transfers are continued, and buffers that O_DIRECT would refuse go through
//! a private bounce buffer, a piece at a time.
//!
//! Used by a queue's worker thread, whichever engine does the steps. The segments point
//! into the guest's memory, which the worker's ring keeps mapped while the transfer lives.

#![allow(unsafe_code)] // copies between bounce buffers and segments of guest memory

use libc::iovec;

/// Bytes that one bounced step carries.
pub const BOUNCE_CHUNK: usize = 64 * 1024;
/// Most segments of one step (the kernel's UIO_MAXIOV).
const MAX_SEGMENTS: usize = 1024;
/// Segment lists longer than this are not kept for the next request.
const KEEP_SEGMENTS: usize = 64;

/// Which way the data go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From the disk to the guest.
    #[default]
    Read,
    /// From the guest to the disk.
    Write,
}

/// What one step is to do: valid until the transfer is touched again.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// First segment.
    pub segments: *const iovec,
    /// Number of segments, at least one.
    pub count: u32,
    /// The only segment, if there is but one.
    pub single: Option<iovec>,
    /// Byte offset on the disk.
    pub offset: u64,
}

/// A private buffer, aligned for O_DIRECT.
#[derive(Debug)]
struct Bounce {
    store: Vec<u8>,
    skip: usize,
    segment: [iovec; 1],
}

impl Bounce {
    fn new(align: usize) -> Self {
        let store = vec![0; BOUNCE_CHUNK.saturating_add(align)];
        let skip = store.as_ptr().align_offset(align.max(1)).min(align);
        Self {
            store,
            skip,
            segment: [iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }],
        }
    }

    fn bytes(&mut self, len: usize) -> &mut [u8] {
        let end = self.skip.saturating_add(len.min(BOUNCE_CHUNK));
        self.store.get_mut(self.skip..end).unwrap_or_default()
    }
}

/// A transfer in progress.
#[derive(Debug, Default)]
pub struct Transfer {
    direction: Direction,
    segments: Vec<iovec>,
    /// First segment with something left; its base and length are what is left of it.
    at: usize,
    remaining: u32,
    offset: u64,
    bounce: Option<Box<Bounce>>,
    /// What is written is zeros, out of the bounce buffer; there are no segments.
    zeros: bool,
}

impl Transfer {
    /// Empties the transfer and lends its segment list to be filled.
    #[inline]
    pub fn segments_mut(&mut self) -> &mut Vec<iovec> {
        self.segments.clear();
        &mut self.segments
    }

    /// Starts over with the segments that were filled in, `len` bytes in all.
    #[inline]
    pub fn begin(&mut self, direction: Direction, offset: u64, len: u32) {
        self.direction = direction;
        self.at = 0;
        self.remaining = len;
        self.offset = offset;
        self.bounce = None;
        self.zeros = false;
    }

    /// Starts over as a write of `len` zeros, a piece at a time, from a private buffer.
    pub fn begin_zeros(&mut self, offset: u64, len: u32, align: usize) {
        self.segments.clear();
        self.begin(Direction::Write, offset, len);
        self.use_bounce(align);
        self.zeros = true;
    }

    /// Which way.
    #[inline]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Byte offset on the disk of what is still to be moved.
    #[inline]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are still to be moved.
    #[inline]
    pub fn remaining(&self) -> u32 {
        self.remaining
    }

    /// Whether every segment begins at a multiple of `memory` bytes and has a length that is
    /// a multiple of `length` (powers of two), as O_DIRECT wants.
    #[inline]
    pub fn is_aligned(&self, memory: usize, length: usize) -> bool {
        let bits = self.segments.iter().fold((0, 0), |(base, len), s| {
            (base | s.iov_base as usize, len | s.iov_len)
        });
        bits.0 & memory.saturating_sub(1) == 0 && bits.1 & length.saturating_sub(1) == 0
    }

    /// From now on, steps go through a private buffer at a multiple of `align` bytes.
    pub fn use_bounce(&mut self, align: usize) {
        self.bounce = Some(Box::new(Bounce::new(align)));
    }

    /// Whether this transfer holds a bounce buffer.
    #[inline]
    pub fn is_bounced(&self) -> bool {
        self.bounce.is_some()
    }

    /// The next step. The caller performs it and says by [`Self::advance`] how far it came.
    #[inline]
    pub fn step(&mut self) -> Step {
        if let Some(mut bounce) = self.bounce.take() {
            let len = (self.remaining as usize).min(BOUNCE_CHUNK);
            let bytes = bounce.bytes(len);
            let segment = iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            };
            if self.direction == Direction::Write && !self.zeros {
                self.copy(bytes, Direction::Write);
            }
            bounce.segment = [segment];
            let step = Step {
                segments: bounce.segment.as_ptr(),
                count: 1,
                single: Some(segment),
                offset: self.offset,
            };
            self.bounce = Some(bounce);
            return step;
        }
        let left = self.segments.get(self.at..).unwrap_or_default();
        let left = left.get(..MAX_SEGMENTS).unwrap_or(left);
        Step {
            segments: left.as_ptr(),
            count: u32::try_from(left.len()).unwrap_or(0),
            single: match left {
                [one] => Some(*one),
                _ => None,
            },
            offset: self.offset,
        }
    }

    /// The last step moved `done` bytes. What is left then is [`Self::remaining`].
    #[inline]
    pub fn advance(&mut self, done: u32) {
        let done = done.min(self.remaining);
        if self.direction == Direction::Read
            && let Some(mut bounce) = self.bounce.take()
        {
            self.copy(bounce.bytes(done as usize), Direction::Read);
            self.bounce = Some(bounce);
        }
        self.remaining = self.remaining.saturating_sub(done);
        self.offset = self.offset.saturating_add(u64::from(done));
        if self.remaining > 0 {
            self.skip(done as usize);
        }
    }

    /// Lets go of the bounce buffer, and of a segment list that grew beyond the ordinary.
    #[inline]
    pub fn finish(&mut self) {
        self.bounce = None;
        self.segments.clear();
        if self.segments.capacity() > KEEP_SEGMENTS {
            self.segments = Vec::new();
        }
    }

    fn skip(&mut self, mut len: usize) {
        while let Some(segment) = self.segments.get_mut(self.at) {
            if len < segment.iov_len {
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(len).cast();
                segment.iov_len = segment.iov_len.saturating_sub(len);
                return;
            }
            len = len.saturating_sub(segment.iov_len);
            self.at = self.at.saturating_add(1);
        }
    }

    /// Copies the next `bytes.len()` bytes of the segments to or from `bytes`.
    fn copy(&self, bytes: &mut [u8], direction: Direction) {
        let mut bytes = bytes;
        for segment in self.segments.get(self.at..).unwrap_or_default() {
            let len = segment.iov_len.min(bytes.len());
            let (now, rest) = bytes.split_at_mut(len);
            let guest = segment.iov_base.cast::<u8>();
            // SAFETY: the segment lies in guest memory that stays mapped while this
            // transfer lives (module comment), now is a private slice of the same length,
            // and the two cannot overlap. The guest may write meanwhile: what is copied is
            // then a mixture, which is the guest's affair; nothing is derived from it.
            unsafe {
                match direction {
                    Direction::Read => std::ptr::copy_nonoverlapping(now.as_ptr(), guest, len),
                    Direction::Write => {
                        std::ptr::copy_nonoverlapping(guest, now.as_mut_ptr(), len);
                    }
                }
            }
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(parts: &mut [Vec<u8>]) -> Transfer {
        let mut t = Transfer::default();
        let list = t.segments_mut();
        for p in parts {
            list.push(iovec {
                iov_base: p.as_mut_ptr().cast(),
                iov_len: p.len(),
            });
        }
        t
    }

    /// A disk that moves at most `most` bytes at a time.
    fn run(t: &mut Transfer, disk: &mut [u8], most: usize) {
        while t.remaining() > 0 {
            let step = t.step();
            let mut done = 0;
            for i in 0..step.count as usize {
                // SAFETY: the segments lie in the test's own vectors or a live bounce buffer.
                let part = unsafe {
                    let s = *step.segments.add(i);
                    std::slice::from_raw_parts_mut(s.iov_base.cast::<u8>(), s.iov_len)
                };
                let n = part.len().min(most - done);
                let at = step.offset as usize + done;
                match t.direction() {
                    Direction::Read => part[..n].copy_from_slice(&disk[at..at + n]),
                    Direction::Write => disk[at..at + n].copy_from_slice(&part[..n]),
                }
                done += n;
            }
            t.advance(done as u32);
        }
    }

    #[test]
    fn short_steps_and_bounces_move_the_same_bytes() {
        let len = 3 * BOUNCE_CHUNK + 700;
        for bounced in [false, true] {
            for most in [1000, 65536, usize::MAX / 2] {
                let mut disk: Vec<u8> = (0..len + 512).map(|i| (i * 7 % 251) as u8).collect();
                let mut parts = vec![vec![0; 300], vec![0; 0], vec![0; 100_000]];
                parts.push(vec![0; len - 100_300]);
                let mut t = over(&mut parts);
                t.begin(Direction::Read, 512, len as u32);
                if bounced {
                    t.use_bounce(4096);
                }
                run(&mut t, &mut disk, most);
                assert_eq!(parts.concat(), disk[512..]);

                let mut copy = vec![0; len + 512];
                let mut t = over(&mut parts);
                t.begin(Direction::Write, 512, len as u32);
                if bounced {
                    t.use_bounce(4096);
                }
                run(&mut t, &mut copy, most);
                assert_eq!(copy[512..], disk[512..]);
            }
        }
    }

    #[test]
    fn a_bounce_buffer_is_aligned() {
        let mut part = vec![vec![0; 512]];
        let mut t = over(&mut part);
        t.begin(Direction::Read, 0, 512);
        t.use_bounce(4096);
        let one = t.step().single.map(|s| s.iov_base as usize % 4096);
        assert_eq!(one, Some(0));
    }
}
