//! What the process has that comes and goes: the ring of a worker, asked for more than it is for, and
//! the guest's memory, asked to be executed. Each is attacked where it is at hand: the ring by the
//! engine that serves with it, the memory when the front-end hands it over.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue};

use super::{Attempt, Outcome, Run, raw};

/// How the names begin of attempts that only a process with a ring can make, on its worker.
const RING: &str = "its own ring: ";
/// And of those that take guest memory.
const MEMORY: &str = "guest memory: ";
/// Descriptors that are tried.
const DESCRIPTORS: RawFd = 64;
/// Operations that every kernel with restrictions knows: these must be refused as restricted.
const KNOWN: u8 = opcode::UnlinkAt::CODE;
/// What marks completions of these attempts.
const MARK: u64 = 0x0062_756c_6b68_6561;
/// Completions of the engine's that may come first.
const PATIENCE: usize = 1000;

pub(super) fn attempts() -> Vec<Attempt> {
    let ring = |name: &str, run| Attempt {
        name: format!("{RING}{name}"),
        call: "io_uring_enter",
        worker: true,
        run: Run::Ring(run),
    };
    let memory = |name: &str, call, run| Attempt {
        name: format!("{MEMORY}{name}"),
        call,
        worker: false,
        run: Run::Memory(run),
    };
    vec![
        ring("every operation that is not listed", operations),
        ring("descriptors that are not registered", descriptors),
        ring("flags that are not listed", flags),
        memory("mapped to execute", "mmap", mapped),
        memory("made executable where it is mapped", "mprotect", protected),
    ]
}

/// An entry of any opcode: `struct io_uring_sqe`, in which all else is zero but flags and descriptor.
fn bare(code: u8, flags: u8, fd: RawFd) -> squeue::Entry {
    let mut bytes = [0_u8; 64];
    let [first, second, ..] = &mut bytes;
    (*first, *second) = (code, flags);
    if let Some(place) = bytes.get_mut(4..8) {
        place.copy_from_slice(&fd.to_ne_bytes());
    }
    // SAFETY: an entry is 64 bytes of integers, any of which may have any value.
    let entry: squeue::Entry = unsafe { std::mem::transmute(bytes) };
    entry.user_data(MARK)
}

/// Submits one entry and waits for its result.
fn submit(ring: &mut IoUring, entry: &squeue::Entry) -> Result<i32, String> {
    // SAFETY: the entry names no buffer; one that is taken all the same is what is looked for.
    let pushed = unsafe { ring.submission().push(entry) };
    pushed.map_err(|e| e.to_string())?;
    for _ in 0..PATIENCE {
        ring.submit_and_wait(1).map_err(|e| e.to_string())?;
        let mut completions = ring.completion();
        if let Some(own) = completions.find(|c| c.user_data() == MARK) {
            return Ok(own.result());
        }
    }
    Err("it is not answered".into())
}

/// Submits them all; refused if each of them is, by an answer that `refused` takes.
fn all(
    ring: &mut IoUring,
    entries: impl Iterator<Item = (String, squeue::Entry)>,
    refused: impl Fn(i32) -> bool,
) -> Outcome {
    let mut tried = 0;
    for (what, entry) in entries {
        match submit(ring, &entry) {
            Ok(result) if refused(result) => tried += 1,
            Ok(result) => return Outcome::Through(format!("{what}: {result}")),
            Err(why) => return Outcome::Through(format!("{what}: {why}")),
        }
    }
    if tried == 0 {
        return Outcome::Through("nothing was tried".into());
    }
    Outcome::Refused(format!("each of {tried}"))
}

fn operations(ring: &mut IoUring, listed: &[u8]) -> Outcome {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let others: Vec<u8> = (0..=u8::MAX).filter(|c| !listed.contains(c)).collect();
    let (known, unknown): (Vec<u8>, Vec<u8>) = others.into_iter().partition(|c| *c <= KNOWN);
    let entry = |code: u8| (format!("operation {code}"), bare(code, fixed, 0));
    let first = all(ring, known.into_iter().map(entry), |r| r == -libc::EACCES);
    if matches!(first, Outcome::Through(_)) {
        return first;
    }
    // Codes that this kernel lacks are refused as such.
    all(ring, unknown.into_iter().map(entry), |r| {
        [-libc::EACCES, -libc::EINVAL].contains(&r)
    })
}

fn descriptors(ring: &mut IoUring, listed: &[u8]) -> Outcome {
    let entries = listed.iter().flat_map(|code| {
        (0..DESCRIPTORS).map(move |fd| {
            let what = format!("operation {code} on descriptor {fd}");
            (what, bare(*code, 0, fd))
        })
    });
    let entries: Vec<_> = entries.collect();
    all(ring, entries.into_iter(), |r| r == -libc::EACCES)
}

fn flags(ring: &mut IoUring, listed: &[u8]) -> Outcome {
    let entries = listed.iter().flat_map(|code| {
        let more = [
            squeue::Flags::ASYNC,
            squeue::Flags::IO_DRAIN,
            squeue::Flags::IO_LINK,
            squeue::Flags::IO_HARDLINK,
            squeue::Flags::BUFFER_SELECT,
        ];
        more.map(|flag| {
            let flags = (squeue::Flags::FIXED_FILE | flag).bits();
            (format!("operation {code}, {flag:?}"), bare(*code, flags, 0))
        })
    });
    let entries: Vec<_> = entries.collect();
    // What an operation cannot have at all is told before what it may not.
    all(ring, entries.into_iter(), |r| {
        [-libc::EACCES, -libc::EOPNOTSUPP].contains(&r)
    })
}

const READ_WRITE: libc::c_long = (libc::PROT_READ | libc::PROT_WRITE) as libc::c_long;
const EXECUTE: libc::c_long = (libc::PROT_READ | libc::PROT_EXEC) as libc::c_long;

fn map(file: &File, access: libc::c_long) -> libc::c_long {
    let shared = libc::c_long::from(libc::MAP_SHARED);
    let fd = file.as_raw_fd().into();
    raw(libc::SYS_mmap, [0, 4096, access, shared, fd, 0])
}

fn mapped(file: &File) -> Outcome {
    Outcome::Answer(map(file, EXECUTE))
}

fn protected(file: &File) -> Outcome {
    match map(file, READ_WRITE) {
        error if error < 0 => Outcome::Through(format!("it was not mapped at all: {error}")),
        place => Outcome::Answer(raw(libc::SYS_mprotect, [place, 4096, EXECUTE, 0, 0, 0])),
    }
}
