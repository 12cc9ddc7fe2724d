//! ioctl(2) on a tap descriptor (linux/if_tun.h), and read(2) and write(2) of frames: the
//! system calls behind [`crate::tap`].
//!
//! At start on the main thread; TUNSETOFFLOAD, TUNSETQUEUE and TUNSETCARRIER later on, from
//! the main thread and from the worker of the control queue.

#![allow(unsafe_code)] // system calls on descriptors, with arguments of fixed size

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use bulkhead_taps::Links;

use crate::transmit::Segment;

/// struct ifreq of linux/if.h, as far as tap devices use it: name and flags.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ifreq {
    /// Name of the interface, ended by a zero byte.
    pub name: [u8; libc::IFNAMSIZ],
    /// IFF_TAP and its like; TUNGETIFF answers them too.
    pub flags: libc::c_short,
    rest: [u8; 22],
}

impl Ifreq {
    /// Flags for an interface.
    pub fn new(name: [u8; libc::IFNAMSIZ], flags: libc::c_int) -> Self {
        Self {
            name,
            flags: flags as libc::c_short,
            rest: [0; 22],
        }
    }
}

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

fn by_ifreq(file: &File, request: libc::Ioctl, ifreq: &mut Ifreq) -> io::Result<()> {
    // SAFETY: the requests used with this function read and write one struct ifreq, which
    // this one is as large as (checked below), and which is exclusively borrowed.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(ifreq)) })?;
    Ok(())
}

const _: () = assert!(size_of::<Ifreq>() == size_of::<libc::ifreq>());

fn by_int(file: &File, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the requests used with this function read one int, which lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) })?;
    Ok(())
}

/// Opens a character device for frames, without waiting in any later call.
pub fn open(path: &CStr) -> io::Result<File> {
    // SAFETY: the path is a C string.
    let fd = check(unsafe {
        libc::open(
            path.as_ptr(),
            libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: the descriptor is fresh and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Attaches the descriptor to an interface (TUNSETIFF).
pub fn set_interface(file: &File, ifreq: &mut Ifreq) -> io::Result<()> {
    by_ifreq(file, libc::TUNSETIFF, ifreq)
}

/// MTU of an interface by its name (SIOCSIFMTU), by any socket of its network namespace.
pub fn set_mtu(links: &Links, name: [u8; libc::IFNAMSIZ], mtu: u16) -> io::Result<()> {
    let mut ifreq = Ifreq::new(name, 0);
    // The MTU is an int where the flags are.
    let [a, b, c, d] = libc::c_int::from(mtu).to_ne_bytes();
    ifreq.flags = libc::c_short::from_ne_bytes([a, b]);
    ifreq.rest[..2].copy_from_slice(&[c, d]);
    // SAFETY: SIOCSIFMTU reads one struct ifreq, which this one is as large as (checked below),
    // and which lives through the call.
    check(unsafe { libc::ioctl(links.as_raw_fd(), libc::SIOCSIFMTU as _, &raw const ifreq) })?;
    Ok(())
}

/// Name and flags of the interface that the descriptor belongs to (TUNGETIFF).
pub fn interface(file: &File) -> io::Result<Ifreq> {
    let mut ifreq = Ifreq::new([0; libc::IFNAMSIZ], 0);
    by_ifreq(file, libc::TUNGETIFF, &mut ifreq)?;
    Ok(ifreq)
}

/// Attaches or detaches a queue of a multi-queue tap (TUNSETQUEUE).
pub fn set_queue(file: &File, attached: bool) -> io::Result<()> {
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let mut ifreq = Ifreq::new([0; libc::IFNAMSIZ], flag);
    by_ifreq(file, libc::TUNSETQUEUE, &mut ifreq)
}

/// Tells the kernel what frames it may hand over unfinished (TUNSETOFFLOAD), for the whole
/// interface.
pub fn set_offload(file: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes an integer.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    })?;
    Ok(())
}

/// Size of the header before each frame (TUNSETVNETHDRSZ).
pub fn set_header_size(file: &File, bytes: libc::c_int) -> io::Result<()> {
    by_int(file, libc::TUNSETVNETHDRSZ, bytes)
}

/// That header's fields are little-endian (TUNSETVNETLE).
pub fn set_little_endian(file: &File) -> io::Result<()> {
    by_int(file, libc::TUNSETVNETLE, 1)
}

/// What the host sees as the link of the interface (TUNSETCARRIER).
pub fn set_carrier(file: &File, on: bool) -> io::Result<()> {
    by_int(file, libc::TUNSETCARRIER, libc::c_int::from(on))
}

/// Reads one frame into private memory: the length, or a negative errno.
pub fn read(file: &File, buffer: &mut [u8]) -> i32 {
    // SAFETY: the buffer is live and exclusively borrowed, the length its own.
    outcome(unsafe { libc::read(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// Writes one frame from private memory: the length, or a negative errno.
pub fn write(file: &File, frame: &[u8]) -> i32 {
    // SAFETY: the frame is live, the length its own.
    outcome(unsafe { libc::write(file.as_raw_fd(), frame.as_ptr().cast(), frame.len()) })
}

/// Writes one frame that lies in one piece of guest memory.
pub fn write_segment(file: &File, segment: &Segment) -> i32 {
    // SAFETY: a segment is mapped while it is borrowed; the kernel only reads, and a guest
    // that writes there meanwhile changes its own frame.
    outcome(unsafe { libc::write(file.as_raw_fd(), segment.start().cast(), segment.len()) })
}

/// Copies as much of a segment of guest memory as `into` has room for; how much that was.
pub fn gather(segment: &Segment, into: &mut [u8]) -> usize {
    let len = segment.len().min(into.len());
    // SAFETY: a segment is mapped while it is borrowed; `into` has len bytes and is private,
    // so they do not overlap. The guest may write to the source meanwhile: the bytes are a
    // frame of its own, and nothing is concluded from them.
    unsafe {
        std::ptr::copy_nonoverlapping(segment.start(), into.as_mut_ptr(), len);
    }
    len
}

fn outcome(n: isize) -> i32 {
    if n >= 0 {
        return i32::try_from(n).unwrap_or(i32::MAX);
    }
    let errno = io::Error::last_os_error().raw_os_error();
    errno.unwrap_or(libc::EIO).wrapping_neg()
}
