#![allow(unsafe_code)] // ptrace(2) and waitpid(2).
//! System calls made in the place of a thread of another process, with its seccomp filters suspended
//! (ptrace(2), PTRACE_O_SUSPEND_SECCOMP): what confines it beside them answers. Needs root.

use std::fs;
use std::io::Error;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::vmm::patience;

/// Bytes below the stack pointer that are the thread's own (the ABI's red zone), and some.
const BELOW: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(60);

/// A call, by number and arguments.
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its arguments; `None` stands for the address of `bytes`.
    pub arguments: [Option<i64>; 3],
    /// What lies there.
    pub bytes: Vec<u8>,
}

fn request(what: libc::c_uint, tid: i32, addr: usize, data: usize) -> Result<(), String> {
    // SAFETY: of the requests made here PTRACE_GETREGS alone writes here, to a structure of that kind
    // that `data` is the address of.
    match unsafe { libc::ptrace(what, tid, addr, data) } {
        -1 => Err(format!(
            "ptrace({what:#x}) of {tid}: {}",
            Error::last_os_error()
        )),
        _ => Ok(()),
    }
}

fn registers(tid: i32) -> Result<libc::user_regs_struct, String> {
    // SAFETY: a structure of numbers, for which zero is a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let place = std::ptr::from_mut(&mut registers) as usize;
    request(libc::PTRACE_GETREGS, tid, 0, place)?;
    Ok(registers)
}

fn set(tid: i32, registers: &libc::user_regs_struct) -> Result<(), String> {
    let place = std::ptr::from_ref(registers) as usize;
    request(libc::PTRACE_SETREGS, tid, 0, place)
}

fn stopped(tid: i32) -> Result<(), String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let mut status = 0;
        // SAFETY: waitpid(2) writes one int, and `status` is one.
        let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if found == tid && libc::WIFSTOPPED(status) {
            return Ok(());
        }
        if found != 0 || Instant::now() > end {
            return Err(format!("{tid} does not stop: {found}, {status:#x}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Detaches, with the registers as they were.
struct Held(i32, Option<libc::user_regs_struct>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(registers) = &self.1 {
            let _ = set(self.0, registers);
        }
        let _ = request(libc::PTRACE_DETACH, self.0, 0, 0);
    }
}

/// Until it waits in a system call: of a thread that runs the kernel tells nothing.
fn waits(tid: i32) -> Result<(), String> {
    let file = format!("/proc/{tid}/syscall");
    let end = Instant::now() + patience(LIMIT);
    loop {
        let text = fs::read_to_string(&file).map_err(|e| format!("{file}: {e}"))?;
        // Its number, six arguments, the stack pointer and where it returns to.
        let waits = text.split_whitespace().count() == 9 && !text.starts_with('-');
        if waits {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("{tid} waits in no call: {text}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Stops it in the call that it waits in: where that is, and its memory. `None`: it had gone on.
fn hold(tid: i32) -> Result<Option<(Held, u64, fs::File)>, String> {
    waits(tid)?;
    let options = libc::PTRACE_O_SUSPEND_SECCOMP as usize;
    request(libc::PTRACE_SEIZE, tid, 0, options)?;
    let mut held = Held(tid, None);
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
    stopped(tid)?;
    let before = registers(tid)?;
    held.1 = Some(before);
    let file = format!("/proc/{tid}/mem");
    let memory = fs::OpenOptions::new().read(true).write(true).open(&file);
    let memory = memory.map_err(|e| format!("{file}: {e}"))?;
    // The instruction is behind it.
    let place = before.rip.wrapping_sub(2);
    let mut code = [0; 2];
    memory
        .read_exact_at(&mut code, place)
        .map_err(|e| format!("{file}: {e}"))?;
    Ok((code == [0x0f, 0x05]).then_some((held, place, memory)))
}

/// Makes the calls in a thread that waits in a system call, which goes on waiting afterwards. What each
/// answers: a result, or an error as a negative number.
///
/// # Errors
/// It is gone, waits in no call, or may not be traced.
pub fn calls(tid: i32, calls: &[Call]) -> Result<Vec<i64>, String> {
    let end = Instant::now() + patience(LIMIT);
    let (held, place, memory) = loop {
        if let Some(found) = hold(tid)? {
            break found;
        }
        if Instant::now() > end {
            return Err(format!("{tid} waits in no call"));
        }
    };
    let file = format!("/proc/{tid}/mem");
    let before = held.1.ok_or("no registers")?;
    let room = before.rsp.wrapping_sub(BELOW);
    let mut answers = Vec::new();
    for call in calls {
        memory
            .write_all_at(&call.bytes, room)
            .map_err(|e| format!("{file}: {e}"))?;
        let argument = |index: usize| {
            let value = call.arguments.get(index).copied().flatten();
            value.map_or(room, i64::cast_unsigned)
        };
        let mut registers = before;
        registers.rip = place;
        registers.rax = call.number.cast_unsigned();
        // Nothing of the call that it waits in is begun anew meanwhile.
        registers.orig_rax = u64::MAX;
        (registers.rdi, registers.rsi, registers.rdx) = (argument(0), argument(1), argument(2));
        (registers.r10, registers.r8, registers.r9) = (0, 0, 0);
        set(tid, &registers)?;
        request(libc::PTRACE_SINGLESTEP, tid, 0, 0)?;
        stopped(tid)?;
        let after = self::registers(tid)?;
        if after.rip != before.rip {
            return Err(format!(
                "{tid} is at {:#x}, not {:#x}",
                after.rip, before.rip
            ));
        }
        answers.push(after.rax.cast_signed());
    }
    Ok(answers)
}
