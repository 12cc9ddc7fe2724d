//! The smallest device process: what every one does between exec and its first byte.
//!
//! `device uring|plain FD`: confines itself, then for each byte on standard input reads the
//! first bytes of the file it inherited as FD through the engine and writes them to standard output. The tests run it
//! under the launcher's outer filter; `strace -f` on it shows what a static Rust program calls.
#![allow(unsafe_code)] // ppoll(2), mallopt(3), an inherited fd, and the ring's submission.
#![allow(missing_docs)]

use bulkhead_seccomp::confine::{self, Confinement};
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use bulkhead_seccomp::{policy, uring::UringError};
use io_uring::{opcode, squeue, types};
use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::mpsc;

enum Engine {
    Uring(Box<RestrictedRing>),
    Plain(RawFd),
}

const LENGTH: u32 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // SAFETY: mallopt(3) takes two integers; no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let mut args = std::env::args().skip(1);
    let (Some(engine), Some(fd)) = (args.next(), args.next()) else {
        return Err("usage: device uring|plain FD".into());
    };
    let uring = engine == "uring";
    let fd: RawFd = fd.parse()?;
    // SAFETY: the parent passed the descriptor to this process, which uses it nowhere else.
    let file = unsafe { File::from_raw_fd(fd) };
    let size = file.metadata()?.len();

    let locked = Confinement::new(Rlimits::new().nofile(64).fsize(size)).lock_down()?;
    let (commands, orders) = mpsc::channel::<()>();
    let (answers, replies) = mpsc::channel::<Result<Vec<u8>, String>>();
    std::thread::Builder::new()
        .name("queue-0".into())
        .stack_size(256 << 10)
        .spawn(move || worker(uring, fd, &orders, &answers))?;
    replies.recv()??;
    let confined = locked.seal(if uring {
        &policy::BULKHEAD_BLK
    } else {
        &policy::BULKHEAD_BLK_PLAIN
    })?;
    eprintln!("{}", confined.report());

    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    let mut byte = [0];
    loop {
        poll(&input)?;
        if input.read(&mut byte)? == 0 {
            confine::exit(0);
        }
        commands.send(())?;
        output.write_all(&replies.recv()??)?;
        output.flush()?;
    }
}

fn poll(input: &impl AsRawFd) -> std::io::Result<()> {
    let mut fds = libc::pollfd {
        fd: input.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, no timeout, no signal mask: ppoll(2) touches nothing else.
    if unsafe { libc::ppoll(&raw mut fds, 1, std::ptr::null(), std::ptr::null()) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn worker(
    uring: bool,
    fd: RawFd,
    orders: &mpsc::Receiver<()>,
    answers: &mpsc::Sender<Result<Vec<u8>, String>>,
) {
    let engine = if uring {
        ring(fd).map(|ring| Engine::Uring(Box::new(ring)))
    } else {
        Ok(Engine::Plain(fd))
    };
    let mut engine = match engine {
        Ok(engine) => engine,
        Err(e) => {
            let _ = answers.send(Err(e.to_string()));
            return;
        }
    };
    let _ = answers.send(Ok(Vec::new()));
    while orders.recv().is_ok() {
        let answer = read(&mut engine).map_err(|e| e.to_string());
        if answers.send(answer).is_err() {
            break;
        }
    }
    // Threads of a device never end: the policy has no exit(2).
    loop {
        std::thread::park();
    }
}

fn ring(fd: RawFd) -> Result<RestrictedRing, UringError> {
    uring::restricted(&RingSpec {
        entries: 8,
        opcodes: &[opcode::Read::CODE],
        files: &[fd],
        spare_files: 7,
    })
}

fn read(engine: &mut Engine) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; LENGTH as usize];
    let got = match engine {
        Engine::Plain(fd) => {
            let vector = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            // SAFETY: one vector, which describes `buffer`; the descriptor is the file's.
            let got = unsafe { libc::preadv2(*fd, &raw const vector, 1, 0, 0) };
            if got < 0 {
                return Err(std::io::Error::last_os_error());
            }
            got.unsigned_abs()
        }
        Engine::Uring(ring) => {
            let entry = opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), LENGTH)
                .build()
                .flags(squeue::Flags::FIXED_FILE);
            // SAFETY: `buffer` lives until the completion has been seen, below.
            unsafe { ring.ring.submission().push(&entry) }.map_err(std::io::Error::other)?;
            ring.ring.submit_and_wait(1)?;
            let completion = ring.ring.completion().next();
            let result = completion.map_or(-libc::EIO, |c| c.result());
            usize::try_from(result).map_err(|_| std::io::Error::from_raw_os_error(-result))?
        }
    };
    buffer.truncate(got);
    Ok(buffer)
}
