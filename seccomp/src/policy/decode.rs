//! Reading a compiled filter back: which system calls does it let through?
//!
//! Classic BPF only jumps forward, so one pass over the instructions, with the set of values
//! that the accumulator can hold at each, tells every return that a system call can reach. The
//! number and the architecture are known in each pass; arguments and the instruction pointer
//! are not, so both sides of a test on them are followed. What comes out is exact for calls
//! that no argument decides, and "some arguments pass" for the others.
//!
//! The instructions are those of linux/bpf_common.h that seccomp(2) accepts. An untrusted
//! filter (one read from another process) costs a bounded number of steps: instructions times
//! accumulator values followed apart times numbers tried.

use libc::sock_filter;
use thiserror::Error;

/// The kernel's BPF_MAXINSNS.
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Numbers tried whatever the filter compares with; Linux's end far below.
const PLAIN_NUMBERS: u32 = 1024;

/// Accumulator values followed apart at one instruction before they are lumped together.
const MAX_STATES: usize = 8;

/// Why a filter cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Empty or longer than the kernel takes.
    #[error("a filter has 1 to {MAX_INSTRUCTIONS} instructions, this one has {0}")]
    Length(usize),
    /// No such instruction.
    #[error("instruction {at} ({code:#06x}) is none that seccomp knows")]
    Instruction {
        /// Its index.
        at: usize,
        /// Its operation code.
        code: u16,
    },
    /// A jump beyond the end.
    #[error("instruction {0} leads beyond the end of the filter")]
    Jump(usize),
    /// The machine has no audit value here.
    #[error("filters of this architecture cannot be read: add its audit value")]
    Architecture,
}

/// What can become of one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict(Vec<u32>);

impl Verdict {
    /// Every value that the filter can return, ascending.
    #[must_use]
    pub fn actions(&self) -> &[u32] {
        &self.0
    }

    /// At least for some arguments, the call is made.
    #[must_use]
    pub fn allows(&self) -> bool {
        self.0.iter().any(|action| {
            let action = action & libc::SECCOMP_RET_ACTION_FULL;
            action == libc::SECCOMP_RET_ALLOW || action == libc::SECCOMP_RET_LOG
        })
    }

    /// The arguments decide.
    #[must_use]
    pub fn is_conditional(&self) -> bool {
        self.0.len() > 1
    }
}

/// The accumulator: a known value, or any.
type Value = Option<u32>;

/// What the filter can answer to system call `nr` of the architecture with that audit value.
///
/// # Errors
/// The filter is not one that the kernel would take.
pub fn verdict(filter: &[sock_filter], arch: u32, nr: u32) -> Result<Verdict, DecodeError> {
    if filter.is_empty() || filter.len() > MAX_INSTRUCTIONS {
        return Err(DecodeError::Length(filter.len()));
    }
    let mut reached: Vec<Vec<Value>> = vec![Vec::new(); filter.len()];
    let mut returned: Vec<u32> = Vec::new();
    if let Some(first) = reached.first_mut() {
        first.push(Some(0));
    }
    for (at, instruction) in filter.iter().enumerate() {
        let states = reached.get_mut(at).map(std::mem::take).unwrap_or_default();
        for accumulator in states {
            match step(at, instruction, accumulator, arch, nr)? {
                Step::Return(value) => returned.push(value),
                Step::Goto(value, targets) => {
                    for offset in targets.into_iter().flatten() {
                        let to = usize::try_from(offset)
                            .ok()
                            .and_then(|o| at.checked_add(1)?.checked_add(o))
                            .ok_or(DecodeError::Jump(at))?;
                        let states = reached.get_mut(to).ok_or(DecodeError::Jump(at))?;
                        if states.len() >= MAX_STATES && !states.contains(&None) {
                            states.push(None);
                        } else if !states.contains(&value) && !states.contains(&None) {
                            states.push(value);
                        }
                    }
                }
            }
        }
    }
    returned.sort_unstable();
    returned.dedup();
    Ok(Verdict(returned))
}

enum Step {
    Return(u32),
    /// The accumulator afterwards, and the offsets to go on at.
    Goto(Value, [Option<u32>; 2]),
}

fn step(at: usize, i: &sock_filter, a: Value, arch: u32, nr: u32) -> Result<Step, DecodeError> {
    const LD_W_ABS: u16 = 0x20;
    const LD_IMM: u16 = 0x00;
    const LDX_IMM: u16 = 0x01;
    const LD_W_LEN: u16 = 0x80;
    const LDX_W_LEN: u16 = 0x81;
    const LD_MEM: u16 = 0x60;
    const LDX_MEM: u16 = 0x61;
    const ST: u16 = 0x02;
    const STX: u16 = 0x03;
    const TAX: u16 = 0x07;
    const TXA: u16 = 0x87;
    const JA: u16 = 0x05;
    const RET_K: u16 = 0x06;
    const RET_A: u16 = 0x16;

    let wrong = || DecodeError::Instruction { at, code: i.code };
    let next = |a: Value| Ok(Step::Goto(a, [Some(0), None]));
    match i.code {
        // struct seccomp_data: nr, arch, instruction_pointer, args[6].
        LD_W_ABS => next(match i.k {
            0 => Some(nr),
            4 => Some(arch),
            k if k < 64 && k % 4 == 0 => None,
            _ => return Err(wrong()),
        }),
        LD_IMM => next(Some(i.k)),
        LD_W_LEN => next(Some(64)),
        // The index register and the scratch memory are not followed: any value.
        LD_MEM | TXA => next(None),
        LDX_IMM | LDX_W_LEN | LDX_MEM | ST | STX | TAX => next(a),
        JA => Ok(Step::Goto(a, [Some(i.k), None])),
        RET_K => Ok(Step::Return(i.k)),
        // Whatever the accumulator says; unknown counts as allowed.
        RET_A => Ok(Step::Return(a.unwrap_or(libc::SECCOMP_RET_ALLOW))),
        code => match code & 0x07 {
            // BPF_ALU
            0x04 => next(alu(code, a, i.k).ok_or_else(wrong)?),
            // BPF_JMP
            0x05 => {
                let (yes, no) = (Some(u32::from(i.jt)), Some(u32::from(i.jf)));
                let holds = jump(code, a, i.k).ok_or_else(wrong)?;
                Ok(Step::Goto(
                    a,
                    match holds {
                        Some(true) => [yes, None],
                        Some(false) => [None, no],
                        None => [yes, no],
                    },
                ))
            }
            _ => Err(wrong()),
        },
    }
}

/// `None`: no such instruction. `Some(None)`: any value.
fn alu(code: u16, a: Value, k: u32) -> Option<Value> {
    let operation = code & 0xf0;
    if operation > 0xa0 || code & !0xff != 0 {
        return None;
    }
    // BPF_X: the index register is not followed.
    if code & 0x08 != 0 && operation != 0x80 {
        return Some(None);
    }
    let Some(a) = a else { return Some(None) };
    Some(match operation {
        0x00 => Some(a.wrapping_add(k)),
        0x10 => Some(a.wrapping_sub(k)),
        0x20 => Some(a.wrapping_mul(k)),
        0x30 => a.checked_div(k),
        0x40 => Some(a | k),
        0x50 => Some(a & k),
        0x60 => a.checked_shl(k),
        0x70 => a.checked_shr(k),
        0x80 => Some(a.wrapping_neg()),
        0x90 => a.checked_rem(k),
        0xa0 => Some(a ^ k),
        _ => return None,
    })
}

/// `None`: no such instruction. `Some(None)`: both ways.
fn jump(code: u16, a: Value, k: u32) -> Option<Option<bool>> {
    let operation = code & 0xf0;
    if !matches!(operation, 0x10 | 0x20 | 0x30 | 0x40) || code & !0xff != 0 {
        return None;
    }
    if code & 0x08 != 0 {
        return Some(None);
    }
    Some(a.map(|a| match operation {
        0x10 => a == k,
        0x20 => a > k,
        0x30 => a >= k,
        _ => a & k != 0,
    }))
}

/// Numbers of the system calls of this machine's architecture that the filter lets through, at
/// least for some arguments, ascending.
///
/// Tried are all numbers that Linux has and the neighbours of every constant in the filter, so
/// that a range far outside (x32's, for one) is seen by its edges.
///
/// # Errors
/// The filter is not one that the kernel would take.
pub fn allowed_syscalls(filter: &[sock_filter]) -> Result<Vec<u32>, DecodeError> {
    let arch = crate::filter::AUDIT_ARCH.ok_or(DecodeError::Architecture)?;
    let mut candidates: Vec<u32> = (0..PLAIN_NUMBERS).collect();
    for instruction in filter {
        let k = instruction.k;
        candidates.extend([k.saturating_sub(1), k, k.saturating_add(1)]);
    }
    candidates.sort_unstable();
    candidates.dedup();
    let mut allowed = Vec::new();
    for nr in candidates {
        if verdict(filter, arch, nr)?.allows() {
            allowed.push(nr);
        }
    }
    Ok(allowed)
}
