//! The hostile build of a device process (feature `hostile`, never shipped): once it is confined
//! and serves, it tries what a device that an attacker has taken over would try.
//!
//! Which attempt a process makes is told by its arguments (`serial=hostile-N` of a disk, the MAC
//! address 02:b0:b0:b0:b0:N of a network device, N and one times 128 MiB of memory, or of an entropy
//! device's burst, the guest's address 1000000N of a socket device), since most end it. It is made
//! once, when the VMM asks for its statistics the first time, or stand-alone when a front-end
//! connects, on the main thread or on the worker of the first queue ([`told`]); one on a ring by the
//! engine whose it is, and one on guest memory when that comes. What it came to is a log line `hostile: NAME: …`, unless it came to
//! an end.
#![allow(unsafe_code)] // Calls that must not work are made bare.

mod descriptors;
mod dial;
mod files;
mod kernel;
mod memory;
mod own;
mod processes;
mod sockets;
mod told;

use std::fs::File;
use std::io::Error;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::IoUring;

use crate::mailbox::Signals;
use told::Told;

/// What one attempt is.
struct Attempt {
    name: String,
    /// The system call at which the process is stopped, unless that fails.
    call: &'static str,
    /// Only the worker has what it needs.
    worker: bool,
    run: Run,
}

/// When it is made, and by what.
enum Run {
    /// In its thread's turn.
    Now(Box<dyn Fn() -> Outcome + Send + Sync>),
    /// By the engine's ring, which takes these operations.
    Ring(fn(&mut IoUring, &[u8]) -> Outcome),
    /// When memory of the guest's comes.
    Memory(fn(&File) -> Outcome),
}

fn now(run: impl Fn() -> Outcome + Send + Sync + 'static) -> Run {
    Run::Now(Box::new(run))
}

/// What became of it, if the process still is.
enum Outcome {
    /// The kernel's answer.
    Answer(libc::c_long),
    /// It was allowed, and is the VMM's or the launcher's to bear.
    Sent(usize),
    /// The launcher's answer is no.
    Refused(String),
    /// It led somewhere.
    Through(String),
}

static CHOSEN: OnceLock<Attempt> = OnceLock::new();
static STRUCK: AtomicBool = AtomicBool::new(false);
/// The worker's turn.
static DUE: AtomicBool = AtomicBool::new(false);
/// Its ring's turn.
static RING_DUE: AtomicBool = AtomicBool::new(false);

/// Prints the attempts, one a line: number, name and call, and is true, if the only argument is
/// `--attempts`.
pub fn listed() -> bool {
    let wanted = std::env::args().nth(1).as_deref() == Some("--attempts");
    if wanted {
        for (number, attempt) in attempts(&told::read()).iter().enumerate() {
            println!("{number}\t{}\t{}", attempt.name, attempt.call);
        }
    }
    wanted
}

/// Takes note of the attempt that the arguments ask for. Called before confinement.
pub(crate) fn choose() {
    let number = std::env::args().find_map(|argument| {
        let digits = |text: &str| -> Option<usize> {
            let end = text
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(text.len());
            text.get(..end)?.parse().ok()
        };
        if let Some((_, rest)) = argument.split_once("hostile-") {
            return digits(rest);
        }
        if let Some(octet) = argument.strip_prefix("02:b0:b0:b0:b0:") {
            return usize::from_str_radix(octet, 16).ok();
        }
        // --cid N
        if let Some(number) = argument.strip_prefix("1000000") {
            return number.parse().ok();
        }
        // --area START:SIZE, --bps N:BURST
        let (start, size) = argument.split_once(':')?;
        let _: u64 = start.parse().ok()?;
        let size: usize = size.parse().ok()?;
        (size >> 27).checked_sub(1)
    });
    let told = told::read();
    if let Some(mut attempt) = number.and_then(|number| attempts(&told).into_iter().nth(number)) {
        attempt.worker |= told.worker;
        let _ = CHOSEN.set(attempt);
    }
}

/// Makes the attempt, once, here or on the worker of the first queue.
pub(crate) fn strike(queues: &[Signals]) {
    let Some(attempt) = CHOSEN.get() else {
        return;
    };
    if matches!(attempt.run, Run::Memory(_)) {
        return;
    }
    if STRUCK.swap(true, Ordering::Relaxed) {
        return;
    }
    match queues.first() {
        Some(first) if attempt.worker => {
            DUE.store(true, Ordering::Release);
            first.refresh();
        }
        _ => attempt.make(),
    }
}

/// Makes the attempt if it is a worker's, on the one that calls.
pub(crate) fn strike_as_worker() {
    if let Some(attempt) = CHOSEN.get()
        && DUE.swap(false, Ordering::AcqRel)
    {
        match attempt.run {
            Run::Ring(_) => RING_DUE.store(true, Ordering::Release),
            _ => attempt.make(),
        }
    }
}

/// Makes the attempt if it is one on the engine's own ring, which takes the `listed` operations.
pub fn strike_ring(ring: &mut IoUring, listed: &[u8]) {
    if let Some(attempt) = CHOSEN.get()
        && let Run::Ring(run) = attempt.run
        && RING_DUE.swap(false, Ordering::AcqRel)
    {
        attempt.tell(run(ring, listed));
    }
}

/// Makes the attempt if it is one on guest memory, of which this is.
pub(crate) fn strike_memory(file: &File) {
    if let Some(attempt) = CHOSEN.get()
        && let Run::Memory(run) = attempt.run
        && !STRUCK.swap(true, Ordering::Relaxed)
    {
        attempt.tell(run(file));
    }
}

impl Attempt {
    fn make(&self) {
        let name = &self.name;
        let thread = std::thread::current();
        let of_a_queue = thread.name().is_some_and(|name| name.starts_with("queue-"));
        if of_a_queue != self.worker {
            log::error!("hostile: {name}: SUCCEEDED: not made, since {thread:?} was to make it");
            return;
        }
        if let Run::Now(run) = &self.run {
            self.tell(run());
        }
    }

    fn tell(&self, outcome: Outcome) {
        let name = &self.name;
        match outcome {
            Outcome::Answer(answer) if answer < 0 => {
                let error = Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(0));
                log::warn!("hostile: {name}: refused: {error}");
            }
            Outcome::Answer(answer) => log::error!("hostile: {name}: SUCCEEDED: {answer:#x}"),
            Outcome::Sent(count) => log::warn!("hostile: {name}: sent {count}"),
            Outcome::Refused(why) => log::warn!("hostile: {name}: refused: {why}"),
            Outcome::Through(what) => log::error!("hostile: {name}: SUCCEEDED: {what}"),
        }
    }
}

type Arguments = [libc::c_long; 6];

/// The answer, or minus the errno.
fn raw(nr: libc::c_long, [a, b, c, d, e, f]: Arguments) -> libc::c_long {
    // SAFETY: pointers among the arguments of the calls below point to what lives forever; those
    // that would change this process's memory must not succeed, and it ends if one does.
    let answer = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if answer < 0 {
        -libc::c_long::from(Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    } else {
        answer
    }
}

fn text(of: &'static std::ffi::CStr) -> libc::c_long {
    of.as_ptr() as libc::c_long
}

/// The address of bytes that are kept for good.
fn kept(bytes: Vec<u8>) -> libc::c_long {
    bytes.leak().as_ptr() as libc::c_long
}

fn call(name: impl Into<String>, call: &'static str, nr: libc::c_long, args: Arguments) -> Attempt {
    Attempt {
        name: name.into(),
        call,
        worker: false,
        run: now(move || Outcome::Answer(raw(nr, args))),
    }
}

/// What is needed where a structure is read: no attempt gets so far.
static ZEROES: [u64; 16] = [0; 16];

fn zeroes() -> libc::c_long {
    ZEROES.as_ptr() as libc::c_long
}

fn attempts(told: &Told) -> Vec<Attempt> {
    let mut all = files::attempts(told);
    all.extend(sockets::attempts(told));
    all.extend(processes::attempts(told));
    all.extend(kernel::attempts());
    all.extend(memory::attempts());
    all.extend(descriptors::attempts(told));
    all.extend(dial::attempts(told));
    all.extend(own::attempts());
    // Last: not every kind of process makes these, and some choose by a size of memory.
    all.extend(sockets::families());
    all
}
