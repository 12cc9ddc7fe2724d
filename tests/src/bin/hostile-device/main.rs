#![allow(unsafe_code)] // sendmsg(2) on descriptors by their numbers, which belong to others here.
//! A device binary that attacks the VMM, in the place of `bulkhead-blk`: the same process, from
//! the same library, with a thread more, which after some time sends what no device should. What
//! it does, the disk's serial number says: `evil-NAME`. With any other serial number it is an
//! honest disk. `e2e`'s subject `hostile-device` puts it there by `--libexec`.

mod trap;

use std::io::{IoSlice, Write};
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_blk::cli::{self, Command, Endpoint, Options};
use bulkhead_blk::device::{Block, EngineKind};
use bulkhead_blk::disk::Disk;
use bulkhead_blk::image_io;
use bulkhead_runtime::channels::Channels;
use bulkhead_runtime::device::Device;
use bulkhead_runtime::{ServeOptions, serve};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;
use trap::{TOLD, Trap, Trapped};

const CONTROL: RawFd = 3;
const VHOST: RawFd = 4;
/// How long it behaves.
const PATIENCE: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let evil = std::env::args().find_map(|argument| {
        let (_, rest) = argument.split_once("serial=evil-")?;
        rest.split(',').next().map(str::to_owned)
    });
    match evil.as_deref() {
        // Before anybody has asked for anything.
        Some("early-oversize") => send(CONTROL, &oversize_frame(), &[]),
        Some("early-vu-flood") => {
            for _ in 0..1000 {
                send(VHOST, &backend_message(0), &[]);
            }
        }
        Some("early-vu-large") => send(VHOST, &answer(u32::MAX), &[]),
        Some("early-vu-fds") => send(VHOST, &answer(8), &[0, 1, 0, 1]),
        Some("early-end") => return ExitCode::from(7),
        // Good until then, in seconds.
        Some(name) if name.starts_with("til-") => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = now.unwrap_or_default().as_secs();
            if name.strip_prefix("til-").and_then(|n| n.parse().ok()) < Some(now) {
                return ExitCode::from(7);
            }
        }
        // It reads on and will never answer.
        Some("early-half-ctl") => half_close(CONTROL),
        Some("early-half-vu") => half_close(VHOST),
        Some("early-silence") => loop {
            std::thread::park_timeout(Duration::from_secs(60));
        },
        Some(name) if name != "stuck" && name != "crash" => {
            let name = name.to_owned();
            let (here, begun) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                // Before the filter, which does not let a thread begin.
                let _ = here.send(());
                // Not while the VMM still makes the machine.
                while !TOLD.load(Ordering::Acquire) {
                    std::thread::park_timeout(Duration::from_millis(10));
                }
                // Again and again: on a busy machine a channel may not be there yet.
                loop {
                    attack(&name);
                }
            });
            let _ = begun.recv();
        }
        _ => {}
    }
    match run(evil.as_deref().and_then(Trap::named)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            let _ = writeln!(std::io::stderr(), "hostile-device: {line}");
            ExitCode::FAILURE
        }
    }
}

/// What `bulkhead-blk` does, less what a test needs not.
fn run(trap: Option<Trap>) -> Result<(), String> {
    let say = |e: &dyn std::error::Error| e.to_string();
    let options: Options = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Serve(options)) => options,
        Ok(_) => return Err("no disk is to be served".into()),
        Err(e) => return Err(say(&e)),
    };
    let Endpoint::Inherited {
        control,
        vhost,
        fence,
    } = &options.endpoint
    else {
        return Err("started by a launcher only".into());
    };
    let channels = Channels::inherited(*control, *vhost, *fence).map_err(|e| say(&e))?;
    let mut disk = Disk::open(&options.disk).map_err(|e| say(&e))?;
    let (engine, policy) = match options.engine {
        cli::EngineChoice::IoUring => (EngineKind::IoUring, &policy::BULKHEAD_BLK),
        _ => {
            disk.without_secure_erase();
            (EngineKind::Plain, &policy::BULKHEAD_BLK_PLAIN)
        }
    };
    image_io::prepare(64 << 20).map_err(|e| say(&e))?;
    let block = Block::new(disk, options.queues, engine);
    let device: Arc<dyn Device> = match trap {
        Some(trap) => Arc::new(Trapped {
            block,
            trap,
            pulled: Arc::default(),
        }),
        None => Arc::new(block),
    };
    let options = ServeOptions {
        channels,
        policy,
        rlimits: Rlimits::new().nofile(256),
    };
    serve(device, options).map_err(|e| say(&e))
}

/// A ttrpc header that announces 16 MiB.
fn oversize_frame() -> Vec<u8> {
    let mut frame = (16u32 << 20).to_be_bytes().to_vec();
    frame.extend(1u32.to_be_bytes());
    frame.extend([2, 0]);
    frame
}

/// A header of vhost-user: CONFIG_CHANGE_MSG, version 1, with a size.
fn backend_message(size: u32) -> Vec<u8> {
    [2u32, 1, size]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect()
}

/// A header of vhost-user: the answer to GET_FEATURES, version 1, with a size.
fn answer(size: u32) -> Vec<u8> {
    [1u32, 5, size]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect()
}

fn attack(name: &str) {
    std::thread::park_timeout(PATIENCE);
    match name {
        "oversize" => send(CONTROL, &oversize_frame(), &[]),
        "unasked" => {
            // An answer to a call that nobody made.
            send(CONTROL, &[0, 0, 0, 0, 0, 0, 0, 99, 2, 0], &[]);
        }
        "drip" => {
            // An answer that never comes to its end, whatever is asked.
            for byte in [0, 0, 1, 0, 0, 0, 0, 1] {
                send(CONTROL, &[byte], &[]);
                std::thread::park_timeout(Duration::from_millis(50));
            }
        }
        "control-fds" => send(CONTROL, &[0], &[0, 1]),
        "be-flood" => loop {
            everywhere(&backend_message(0), &[]);
        },
        "vu-flood" => loop {
            send(VHOST, &backend_message(0), &[]);
        },
        "vu-oversize" => send(VHOST, &backend_message(u32::MAX), &[]),
        "vu-fds" => send(VHOST, &backend_message(0), &[0, 1, 0, 1]),
        "be-oversize" => everywhere(&backend_message(u32::MAX), &[]),
        "half-ctl" => half_close(CONTROL),
        "half-vu" => half_close(VHOST),
        "be-fds" => everywhere(&backend_message(0), &[0, 1, 0, 1]),
        _ => {}
    }
}

fn half_close(fd: RawFd) {
    // SAFETY: the call takes two integers; the socket stays open, with its writing half closed.
    unsafe { libc::shutdown(fd, libc::SHUT_WR) };
}

/// Sends on every socket but the channels: one of them is for requests of back-ends.
fn everywhere(bytes: &[u8], fds: &[RawFd]) {
    for fd in 5..64 {
        send(fd, bytes, fds);
    }
}

/// Sends, if the number is a socket's.
fn send(fd: RawFd, bytes: &[u8], fds: &[RawFd]) {
    let slice = IoSlice::new(bytes);
    let mut control = [0u64; 8];
    // SAFETY: msghdr is plain data for which all zeroes is a value. It names one vector over
    // live bytes, and for descriptors a control buffer that is aligned for cmsghdr and has room
    // for CMSG_SPACE of at most eight integers; the kernel only reads both. A number that is no
    // socket's is an error of the call and nothing else.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        let mut vector = libc::iovec {
            iov_base: slice.as_ptr().cast_mut().cast(),
            iov_len: slice.len(),
        };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            let bytes = u32::try_from(size_of_val(fds)).unwrap_or(0);
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(header).cast(), fds.len());
        }
        libc::sendmsg(
            fd,
            &raw const message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        );
    }
}
