//! The host's end: network namespaces, interfaces and packet sockets; and descriptors passed
//! to a child at fixed numbers.
#![allow(unsafe_code)] // system calls without a safe wrapper, in tests only

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use bulkhead_runtime::sys;

use super::PATIENCE;

/// Gives the calling thread, and the processes that it starts, a network of their own; false
/// without the privilege, in which case the test has nothing to say.
pub fn isolated() -> bool {
    // SAFETY: unshare takes an integer; a thread may leave its network namespace at any time.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        eprintln!("skipped: needs a network namespace of its own (run as root)");
        return false;
    }
    // The host's own chatter would come between the test's frames.
    for kind in ["default", "all"] {
        let path = format!("/proc/thread-self/net/../../../sys/net/ipv6/conf/{kind}/disable_ipv6");
        let plain = format!("/proc/sys/net/ipv6/conf/{kind}/disable_ipv6");
        let _ = std::fs::write(path, "1").or_else(|_| std::fs::write(plain, "1"));
    }
    ip(&["link", "set", "lo", "up"]);
    true
}

/// Runs ip(8).
pub fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {args:?}: {said}");
}

pub fn up(interface: &str) {
    ip(&["link", "set", interface, "up"]);
}

/// Whether the host sees a carrier.
pub fn has_carrier(interface: &str) -> bool {
    let done = Command::new("ip")
        .args(["-o", "link", "show", interface])
        .output()
        .unwrap();
    !String::from_utf8_lossy(&done.stdout).contains("NO-CARRIER")
}

/// A packet socket on an interface: sees what the guest sends, sends what the guest sees.
pub struct Wire(File);

impl Wire {
    /// With `headers`, frames carry struct virtio_net_hdr (ten bytes), so that those that are
    /// not cut up yet can be seen and sent.
    pub fn new(interface: &str, headers: bool) -> Self {
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: the name is a C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0, "{interface}");
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                i32::from(all),
            )
        };
        assert!(fd >= 0, "{}", Error::last_os_error());
        // SAFETY: fresh and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is live and as long as said.
        let bound = unsafe {
            libc::bind(
                fd,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        assert_eq!(bound, 0, "{}", Error::last_os_error());
        let one: libc::c_int = 1;
        if headers {
            const PACKET_VNET_HDR: libc::c_int = 15;
            // SAFETY: the option's value is one live int.
            let set = unsafe {
                libc::setsockopt(
                    fd,
                    libc::SOL_PACKET,
                    PACKET_VNET_HDR,
                    (&raw const one).cast(),
                    4,
                )
            };
            assert_eq!(set, 0, "{}", Error::last_os_error());
        }
        Self(file)
    }

    pub fn send(&self, frame: &[u8]) {
        use std::io::Write;
        (&self.0).write_all(frame).unwrap();
    }

    /// The next frame that the guest sent, which the host's own sends are not.
    pub fn receive(&self) -> Vec<u8> {
        self.receive_within(PATIENCE).expect("a frame on the wire")
    }

    pub fn receive_within(&self, time: Duration) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        loop {
            if !sys::wait_readable(&self.0, time.as_millis() as i32).unwrap() {
                return None;
            }
            // SAFETY: all zeros is a valid sockaddr_ll.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut len = size_of_val(&from) as libc::socklen_t;
            // SAFETY: buffer and address are live and as long as said.
            let n = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut len,
                )
            };
            assert!(n > 0, "{}", Error::last_os_error());
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                frame.truncate(n as usize);
                return Some(frame);
            }
        }
    }
}

/// A descriptor that lives as long as the test.
pub fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the callers keep what they lend open while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Puts descriptors at 3, 4, … of the child.
pub fn pass(command: &mut Command, numbers: Vec<RawFd>) {
    let mut high = vec![0; numbers.len()];
    let child = move || -> Result<()> {
        for (h, n) in high.iter_mut().zip(&numbers) {
            // SAFETY: duplicates a descriptor.
            *h = unsafe { libc::fcntl(*n, libc::F_DUPFD_CLOEXEC, 100) };
        }
        for (h, target) in high.iter().zip(3..) {
            // SAFETY: as above; the numbers from 3 on are the child's to give.
            if unsafe { libc::dup2(*h, target) } < 0 {
                return Err(Error::last_os_error());
            }
        }
        // Those of other tests are no concern of its limit.
        let first = 3 + high.len() as libc::c_uint;
        let cloexec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
        // SAFETY: closes descriptors when the program is executed, which knows none of them.
        unsafe { libc::close_range(first, libc::c_uint::MAX, cloexec) };
        Ok(())
    };
    // SAFETY: dup, dup2 and close_range are async-signal-safe and touch descriptors only.
    unsafe { command.pre_exec(child) };
}
