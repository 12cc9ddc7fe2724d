#![allow(unsafe_code)] // ioctl(2) of taps and interfaces, which std does not offer.
//! The ioctls of a tap (Linux's Documentation/networking/tuntap.rst) and of an interface by
//! its name (netdevice(7)), as safe functions. Called by the VMM's main thread before it
//! confines itself, and by the launcher's only thread; `tap` is their one user.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

use bulkhead_taps::{Links, Tun};

/// <linux/if_tun.h>: _IOW('T', 202, int) and _IOR('T', 210, unsigned int).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
/// _IOW('T', 213, struct sock_fprog) and 214 of the same.
const TUNATTACHFILTER: libc::c_ulong = 0x4010_54d5;
const TUNDETACHFILTER: libc::c_ulong = 0x4010_54d6;

/// IFF_* of <linux/if_tun.h> that matter here.
pub mod flag {
    /// Layer 3 packets.
    #[cfg(test)]
    pub const TUN: i16 = 0x0001;
    /// Ethernet frames.
    pub const TAP: i16 = 0x0002;
    /// Several queues.
    pub const MULTI_QUEUE: i16 = 0x0100;
    /// No packet information before each frame.
    pub const NO_PI: i16 = 0x1000;
    /// A virtio_net_hdr before each frame.
    pub const VNET_HDR: i16 = 0x4000;
}

/// An ifreq for the interface `name`, everything else zero.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero and ends the name.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// One of the ioctls below, all of which take an ifreq.
fn ioctl(fd: BorrowedFd<'_>, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    const { assert!(size_of::<libc::ifreq>() == 40) };
    // SAFETY: every number that this module passes takes a pointer to an ifreq, which the
    // kernel reads or fills within its size; the structure lives across the call. The
    // request's type differs between C libraries, hence the inferred cast.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, ptr::from_mut(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// TUNSETIFF: makes an open /dev/net/tun a queue of the interface `name`, which is made if
/// it is absent.
pub fn attach(tun: BorrowedFd<'_>, name: &str, flags: i16) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags;
    ioctl(tun, TUNSETIFF, &mut request)
}

/// TUNGETIFF: the interface that a descriptor is a queue of, and its flags; `None` when it is
/// nothing of the kind.
pub fn describe(fd: BorrowedFd<'_>) -> Option<(String, i16)> {
    // SAFETY: all zeroes is an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ioctl(fd, TUNGETIFF, &mut request).ok()?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|c| c.to_ne_bytes()[0])
        .take_while(|c| *c != 0)
        .collect();
    // SAFETY: the kernel has filled the flags; any bits are an i16.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Some((String::from_utf8(name).ok()?, flags))
}

/// The flags of a tap's queue, IFF_NO_PI among them as it is. TUNGETIFF says IFF_NOFILTER by the
/// same bit where the tap has no socket filter: one that lets everything pass is there meanwhile.
pub fn exact_flags(fd: BorrowedFd<'_>, flags: i16) -> i16 {
    if flags & flag::TAP == 0 || flags & flag::NO_PI == 0 {
        return flags;
    }
    let mut pass = libc::sock_filter {
        // BPF_RET | BPF_K
        code: 0x06,
        jt: 0,
        jf: 0,
        k: u32::MAX,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: ptr::from_mut(&mut pass),
    };
    let filter = |number: libc::c_ulong| {
        // SAFETY: both numbers take a pointer to a sock_fprog, which the kernel reads, with the
        // one instruction that it points to; both live across the call.
        unsafe { libc::ioctl(fd.as_raw_fd(), number as _, ptr::from_ref(&program)) == 0 }
    };
    if !filter(TUNATTACHFILTER) {
        return flags;
    }
    let exact = describe(fd).map_or(flags, |(_, exact)| exact);
    filter(TUNDETACHFILTER);
    exact
}

/// SIOCGIFHWADDR of a tap's own descriptor: the host's address of the interface.
pub fn hardware_address(fd: BorrowedFd<'_>) -> Option<[u8; 6]> {
    // SAFETY: all zeroes is an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ioctl(fd, libc::SIOCGIFHWADDR as libc::c_ulong, &mut request).ok()?;
    // SAFETY: the kernel has filled the address; any bits are one.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let (address, _) = data.split_first_chunk::<6>()?;
    Some(address.map(|byte| byte.to_ne_bytes()[0]))
}

/// A socket by which interfaces of this network namespace are asked for; the kernel does not
/// mind of which family it is.
#[derive(Debug)]
pub struct Interfaces(Links);

impl Interfaces {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        Links::open().map(Self)
    }

    fn call(&self, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        ioctl(self.0.as_fd(), number, request)
    }

    /// SIOCGIFMTU; `ENODEV` where there is no such interface.
    pub fn mtu(&self, name: &str) -> io::Result<u32> {
        let mut request = request(name)?;
        self.call(libc::SIOCGIFMTU as libc::c_ulong, &mut request)?;
        // SAFETY: the kernel has filled the MTU; any bits are an int.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u32::try_from(mtu).map_err(io::Error::other)
    }

    /// What is known of a tap or tun by this name; `None` for what is neither, or absent.
    pub fn tun(&self, name: &str) -> Option<Tun> {
        self.0.look(name).ok().flatten()
    }

    /// SIOCSIFMTU.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).map_err(io::Error::other)?;
        self.call(libc::SIOCSIFMTU as libc::c_ulong, &mut request)
    }

    /// SIOCSIFFLAGS with IFF_UP added.
    pub fn bring_up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name)?;
        self.call(libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
        // SAFETY: the kernel has filled the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
        self.call(libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)
    }
}
