//! Running a compiled filter on one system call, as the kernel does: for a judge who must come
//! to the kernel's own answer, arguments included.
//!
//! Only our own filters are run: the instructions are those that the policy compiler makes, and
//! anything else, a step beyond the end or a load beyond the data is a kill, as is a filter
//! without an answer. Jumps only lead forward, so it ends.

use libc::sock_filter;

use crate::notify::Data;

const LD_W_ABS: u16 = 0x20;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGT_K: u16 = 0x25;
const JGE_K: u16 = 0x35;
const JSET_K: u16 = 0x45;
const AND_K: u16 = 0x54;
const OR_K: u16 = 0x44;
const RET_K: u16 = 0x06;

/// A word of `struct seccomp_data` at a byte offset.
fn word(data: &Data, offset: u32) -> Option<u32> {
    let half = |value: u64, high: bool| {
        let high = high != cfg!(target_endian = "big");
        (if high { value >> 32 } else { value } & u64::from(u32::MAX)) as u32
    };
    match offset {
        0 => Some(data.nr),
        4 => Some(data.arch),
        8 | 12 => Some(half(data.instruction_pointer, offset == 12)),
        16..=60 if offset.is_multiple_of(4) => {
            let index = usize::try_from((offset - 16) / 8).ok()?;
            let value = data.args.get(index)?;
            Some(half(*value, !offset.is_multiple_of(8)))
        }
        _ => None,
    }
}

/// The filter's answer: an action and its data, SECCOMP_RET_*.
#[must_use]
pub fn evaluate(filter: &[sock_filter], data: &Data) -> u32 {
    run(filter, data).unwrap_or(libc::SECCOMP_RET_KILL_PROCESS)
}

fn run(filter: &[sock_filter], data: &Data) -> Option<u32> {
    let mut accumulator = 0u32;
    let mut at = 0usize;
    loop {
        let i = filter.get(at)?;
        let branch = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
        let skip = match i.code {
            LD_W_ABS => {
                accumulator = word(data, i.k)?;
                0
            }
            AND_K => {
                accumulator &= i.k;
                0
            }
            OR_K => {
                accumulator |= i.k;
                0
            }
            JA => usize::try_from(i.k).ok()?,
            JEQ_K => branch(accumulator == i.k),
            JGT_K => branch(accumulator > i.k),
            JGE_K => branch(accumulator >= i.k),
            JSET_K => branch(accumulator & i.k != 0),
            RET_K => return Some(i.k),
            _ => return None,
        };
        at = at.checked_add(1)?.checked_add(skip)?;
    }
}
