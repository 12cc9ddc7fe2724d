//! ioctl(2) on /dev/vhost-net (linux/vhost.h): the system calls behind [`crate::kernel`].
//!
//! Called by the worker thread of a pair: SET_OWNER and GET_FEATURES before confinement, the
//! others later on.

#![allow(unsafe_code)] // system calls on a descriptor, with arguments of fixed layout

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use bulkhead_runtime::memory::MAX_REGIONS;

const SET_OWNER: libc::Ioctl = 0xaf01;
const GET_FEATURES: libc::Ioctl = 0x8008_af00;
const SET_FEATURES: libc::Ioctl = 0x4008_af00;
const SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const GET_VRING_BASE: libc::Ioctl = 0xc008_af12;
const SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const SET_VRING_ERR: libc::Ioctl = 0x4008_af22;
const NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// struct vhost_vring_state
#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

/// struct vhost_vring_file, of which descriptor -1 means none.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

/// struct vhost_vring_addr
#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// struct vhost_memory_region
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelRegion {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where it is mapped in this process.
    pub address: u64,
    flags: u64,
}

impl KernelRegion {
    /// A region.
    pub fn new(guest: u64, size: u64, address: u64) -> Self {
        Self {
            guest,
            size,
            address,
            flags: 0,
        }
    }
}

/// struct vhost_memory, with room for all regions that there can be.
#[repr(C)]
struct KernelMemory {
    count: u32,
    padding: u32,
    regions: [KernelRegion; MAX_REGIONS],
}

/// Where a ring lies in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// One descriptor of /dev/vhost-net: the rings of one pair.
#[derive(Debug)]
pub struct VhostNet(File);

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl VhostNet {
    /// Takes the descriptor.
    pub fn new(file: File) -> Self {
        Self(file)
    }

    fn with<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request of this module reads or writes exactly the structure that its
        // callers, all in this module, pass; it is live and exclusively borrowed. What the
        // structures point to is not touched by the call itself: see the methods.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) })
    }

    /// The kernel serves this process, and no other, by this descriptor.
    pub fn set_owner(&self) -> io::Result<()> {
        // SAFETY: takes no argument.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_OWNER) })
    }

    /// What the kernel knows.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0u64;
        self.with(GET_FEATURES, &mut features)?;
        Ok(features)
    }

    /// What the driver accepted of it.
    pub fn set_features(&self, mut features: u64) -> io::Result<()> {
        self.with(SET_FEATURES, &mut features)
    }

    /// Where guest memory is. The kernel reads and writes it as this process could, at any
    /// time from when a back-end is set: the caller keeps it mapped until there is none.
    pub fn set_memory(&self, regions: impl Iterator<Item = KernelRegion>) -> io::Result<()> {
        let mut memory = KernelMemory {
            count: 0,
            padding: 0,
            regions: [KernelRegion::default(); MAX_REGIONS],
        };
        for (to, from) in memory.regions.iter_mut().zip(regions) {
            *to = from;
            memory.count += 1;
        }
        self.with(SET_MEM_TABLE, &mut memory)
    }

    /// Number of descriptors of a ring.
    pub fn set_size(&self, index: u32, num: u32) -> io::Result<()> {
        self.with(SET_VRING_NUM, &mut VringState { index, num })
    }

    /// Where a ring lies; it stays mapped as memory does.
    pub fn set_addresses(&self, index: u32, ring: RingAddresses) -> io::Result<()> {
        let mut argument = VringAddr {
            index,
            flags: 0,
            desc: ring.desc,
            used: ring.used,
            avail: ring.avail,
            log: 0,
        };
        self.with(SET_VRING_ADDR, &mut argument)
    }

    /// The available index to begin at.
    pub fn set_base(&self, index: u32, base: u16) -> io::Result<()> {
        let num = u32::from(base);
        self.with(SET_VRING_BASE, &mut VringState { index, num })
    }

    /// The available index at which a successor goes on.
    pub fn base(&self, index: u32) -> io::Result<u16> {
        let mut state = VringState { index, num: 0 };
        self.with(GET_VRING_BASE, &mut state)?;
        u16::try_from(state.num).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn set_file(&self, request: libc::Ioctl, index: u32, fd: Option<RawFd>) -> io::Result<()> {
        let fd = fd.unwrap_or(-1);
        self.with(request, &mut VringFile { index, fd })
    }

    /// Fires when the driver has made buffers available.
    pub fn set_kick(&self, index: u32, file: Option<&File>) -> io::Result<()> {
        self.set_file(SET_VRING_KICK, index, file.map(AsRawFd::as_raw_fd))
    }

    /// To be signalled for completions.
    pub fn set_call(&self, index: u32, file: Option<&File>) -> io::Result<()> {
        self.set_file(SET_VRING_CALL, index, file.map(AsRawFd::as_raw_fd))
    }

    /// To be signalled when the ring is malformed.
    pub fn set_err(&self, index: u32, file: Option<&File>) -> io::Result<()> {
        self.set_file(SET_VRING_ERR, index, file.map(AsRawFd::as_raw_fd))
    }

    /// Moves frames between a ring and a tap from now on; with none, no more.
    pub fn set_backend(&self, index: u32, tap: Option<&File>) -> io::Result<()> {
        self.set_file(NET_SET_BACKEND, index, tap.map(AsRawFd::as_raw_fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What _IOC makes of direction, number and size.
    fn numbered(direction: u64, number: u64, size: usize) -> u64 {
        direction << 30 | (size as u64) << 16 | 0xaf00 | number
    }

    #[test]
    fn numbers_are_those_of_the_structures() {
        const WRITE: u64 = 1;
        const READ: u64 = 2;
        for (request, expected) in [
            (SET_OWNER, numbered(0, 1, 0)),
            (GET_FEATURES, numbered(READ, 0, 8)),
            (SET_FEATURES, numbered(WRITE, 0, 8)),
            // The header of struct vhost_memory alone is in the number.
            (SET_MEM_TABLE, numbered(WRITE, 3, 8)),
            (
                SET_VRING_NUM,
                numbered(WRITE, 0x10, size_of::<VringState>()),
            ),
            (
                SET_VRING_ADDR,
                numbered(WRITE, 0x11, size_of::<VringAddr>()),
            ),
            (
                SET_VRING_BASE,
                numbered(WRITE, 0x12, size_of::<VringState>()),
            ),
            (
                GET_VRING_BASE,
                numbered(READ | WRITE, 0x12, size_of::<VringState>()),
            ),
            (
                SET_VRING_KICK,
                numbered(WRITE, 0x20, size_of::<VringFile>()),
            ),
            (
                SET_VRING_CALL,
                numbered(WRITE, 0x21, size_of::<VringFile>()),
            ),
            (SET_VRING_ERR, numbered(WRITE, 0x22, size_of::<VringFile>())),
            (
                NET_SET_BACKEND,
                numbered(WRITE, 0x30, size_of::<VringFile>()),
            ),
        ] {
            assert_eq!(request, expected);
        }
        assert_eq!(size_of::<KernelRegion>(), 32);
    }
}
