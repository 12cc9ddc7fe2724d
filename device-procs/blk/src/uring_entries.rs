//! What the io_uring engine asks of its ring: the registered files, the operations that the
//! ring takes, and the entries made of them.
//!
//! Used by [`crate::engine_uring`] on a queue's worker thread.

use io_uring::{opcode, squeue, types};

use crate::disk::RangeHow;
use crate::queue::RangeStep;
use crate::transfer::{Direction, Step};

// Registered files.
pub(crate) const DISK: types::Fixed = types::Fixed(0);
pub(crate) const WAKEUP: types::Fixed = types::Fixed(1);
pub(crate) const KICK: types::Fixed = types::Fixed(2);
pub(crate) const CALL: types::Fixed = types::Fixed(3);

/// Operations that the ring takes, and no others.
pub(crate) const OPCODES: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// What is written to an eventfd.
pub(crate) static ONE: u64 = 1;

/// What a completion belongs to, as the upper half of user_data; the lower half is a slot
/// or the kick's generation.
pub(crate) const TAG_IO: u32 = 0;
pub(crate) const TAG_KICK: u32 = 1;
pub(crate) const TAG_WAKEUP: u32 = 2;
pub(crate) const TAG_CANCEL: u32 = 3;
pub(crate) const TAG_SIGNAL: u32 = 4;

pub(crate) fn user_data(tag: u32, value: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

pub(crate) fn fallocate(step: &RangeStep) -> squeue::Entry {
    let mode = match step.how {
        RangeHow::Punch => libc::FALLOC_FL_PUNCH_HOLE,
        _ => libc::FALLOC_FL_ZERO_RANGE,
    };
    // Never makes the file larger, whatever has become of it.
    opcode::Fallocate::new(DISK, u64::from(step.range.len))
        .offset(step.range.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

pub(crate) fn transfer(direction: Direction, step: &Step, durable: bool) -> squeue::Entry {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    match (direction, step.single) {
        (Direction::Read, Some(s)) => {
            let len = u32::try_from(s.iov_len).unwrap_or(0);
            opcode::Read::new(DISK, s.iov_base.cast(), len)
                .offset(step.offset)
                .build()
        }
        (Direction::Write, Some(s)) => {
            let len = u32::try_from(s.iov_len).unwrap_or(0);
            opcode::Write::new(DISK, s.iov_base.cast(), len)
                .offset(step.offset)
                .rw_flags(flags)
                .build()
        }
        (Direction::Read, None) => opcode::Readv::new(DISK, step.segments, step.count)
            .offset(step.offset)
            .build(),
        (Direction::Write, None) => opcode::Writev::new(DISK, step.segments, step.count)
            .offset(step.offset)
            .rw_flags(flags)
            .build(),
    }
}
