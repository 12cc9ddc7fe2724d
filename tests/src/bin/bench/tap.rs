//! Taps and packet sockets for the network benchmark: the bare loops that are its limit, and
//! the sender that feeds a tap. Each runs as a process of its own (`bench tap-write …`), so
//! that it can be placed and its CPU time be read.
#![allow(unsafe_code)] // ioctl(2), socket(2), bind(2) and sendmmsg(2) of a tap have no safe wrapper here.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// struct virtio_net_hdr_mrg_rxbuf, which a tap with IFF_VNET_HDR of this size carries.
const HEADER: usize = 12;
const BATCH: usize = 64;

/// struct ifreq, as far as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Opens one queue of a tap.
fn open(name: &str, many: bool) -> Result<File, String> {
    let fail = |e: std::io::Error| format!("{name}: {e}");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(fail)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if many {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: flags as libc::c_short,
        rest: [0; 22],
    };
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let size = HEADER as libc::c_int;
    // SAFETY: both calls read the value that they are given a pointer to, which outlives them.
    let done = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) == 0
            && libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) == 0
    };
    if !done {
        return Err(fail(std::io::Error::last_os_error()));
    }
    Ok(file)
}

/// A UDP frame like testpmd's, of another port for each `flow`.
fn frame(size: usize, flow: u8) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 8, 0];
    let length = (size - 14) as u16;
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2]);
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]))
        .sum();
    let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&[0x10, flow, 0, 9]);
    frame.extend_from_slice(&(length - 20).to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.resize(size, 0);
    frame
}

/// What a loop did: packets, seconds, CPU seconds of its threads.
fn report(packets: u64, elapsed: Duration, cpu: Duration) {
    println!("{packets} {} {}", elapsed.as_secs_f64(), cpu.as_secs_f64());
}

/// Writes ready frames to every queue (`write`) or reads what comes (`read`) for so long.
///
/// # Errors
/// Why the tap could not be had.
pub fn bare_loop(arguments: &[String], write: bool) -> Result<(), String> {
    let [name, size, pairs, seconds] = arguments else {
        return Err("give TAP SIZE PAIRS SECONDS".into());
    };
    let number = |text: &String| text.parse::<usize>().map_err(|e| format!("{text}: {e}"));
    let (size, pairs, seconds) = (number(size)?, number(pairs)?, number(seconds)?);
    if !(60..=9000).contains(&size) {
        return Err(format!("{size}: frames have 60 to 9000 bytes"));
    }
    let (stop, packets) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let mut queues = Vec::new();
    for _ in 0..pairs {
        queues.push(open(name, pairs > 1)?);
    }
    // Readers block: their threads are left to end with the process.
    for (index, mut queue) in queues.into_iter().enumerate() {
        let (stop, packets) = (Arc::clone(&stop), Arc::clone(&packets));
        let mut ready = vec![0; HEADER];
        ready.extend(frame(size, index as u8));
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while !stop.load(Ordering::Relaxed) {
                let done = if write {
                    queue.write(&ready).is_ok()
                } else {
                    queue.read(&mut buffer).is_ok()
                };
                if done {
                    packets.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    std::thread::sleep(Duration::from_millis(300));
    let cpu = || crate::process::cpu(std::process::id());
    let (first, cpu_first, start) = (packets.load(Ordering::Relaxed), cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(seconds as u64));
    let count = packets.load(Ordering::Relaxed) - first;
    report(count, start.elapsed(), cpu().saturating_sub(cpu_first));
    stop.store(true, Ordering::Relaxed);
    Ok(())
}

/// Sends frames of 16 flows to an interface, as fast as it can, until it is killed.
///
/// # Errors
/// Why the interface could not be had.
pub fn feed(arguments: &[String]) -> Result<(), String> {
    let [name, size] = arguments else {
        return Err("give INTERFACE SIZE".into());
    };
    let size: usize = size.parse().map_err(|e| format!("{size}: {e}"))?;
    let text = std::ffi::CString::new(name.as_str()).map_err(|e| e.to_string())?;
    // SAFETY: the name ends with NUL and outlives the call.
    let index = unsafe { libc::if_nametoindex(text.as_ptr()) };
    if index == 0 {
        return Err(format!("no interface {name}"));
    }
    // SAFETY: no pointer is passed; a new descriptor is ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let on: libc::c_int = 1;
    // SAFETY: the address and the option live across the calls, and their sizes are given.
    let bound = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            20, // PACKET_QDISC_BYPASS
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        );
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(format!("{name}: {}", std::io::Error::last_os_error()));
    }
    let mut frames: Vec<Vec<u8>> = (0..BATCH).map(|n| frame(size, n as u8 % 16)).collect();
    let mut vectors: Vec<libc::iovec> = frames
        .iter_mut()
        .map(|f| libc::iovec {
            iov_base: f.as_mut_ptr().cast(),
            iov_len: f.len(),
        })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = vectors
        .iter_mut()
        .map(|vector| {
            // SAFETY: all zeroes is a message without address and control data.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    loop {
        // SAFETY: `messages` point to `vectors` and these to `frames`, none of which moves or
        // goes while this loop runs; the count is theirs. A full queue drops: no error of ours.
        unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as libc::c_uint,
                0,
            );
        }
    }
}

/// Uses a CPU, as testpmd's polling does beside the back-ends.
pub fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}
