//! How many queues of a tap somebody is attached to, as the kernel itself counts them:
//! rtnetlink(7), RTM_GETLINK, IFLA_TUN_NUM_QUEUES and IFLA_TUN_NUM_DISABLED_QUEUES of
//! <linux/if_link.h> (Linux 4.17). Used by whoever attaches to a tap by its name: the VMM and
//! a stand-alone `bulkhead-net` before they confine themselves, and the launcher.
//!
//! A tap of several queues lets anybody who may use it attach once more, and then shares the
//! frames out between them. So who attaches asks before and after: when the kernel counts more
//! queues than one's own, somebody else is there. Of two that attach at the same time the later
//! one sees both, so that never both stay. Unlike the carrier, the number does not depend on
//! whether the interface is up or its link was set down; unlike a lock, it also knows of programs
//! that are no Bulkhead, and nobody can hold it who may not attach to the tap anyway.

mod message;

pub use message::Tun;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long somebody who is just ending may still be attached: the I/O that a killed process
/// had in flight holds its queues until it is over, about 40 ms.
pub const PATIENCE: Duration = Duration::from_millis(1000);
/// When to ask again meanwhile.
pub const PAUSE: Duration = Duration::from_millis(20);

/// Longest answer: one interface, which the kernel describes in about 2 KiB.
const MAX_ANSWER: usize = 32 << 10;
/// Answers to other questions that may lie before ours.
const MAX_STALE: usize = 16;

/// A socket by which the kernel is asked for interfaces of this network namespace.
#[derive(Debug)]
pub struct Links {
    socket: File,
    last: AtomicU32,
}

impl Links {
    /// Opens it. Nothing waits at it: the kernel answers while it is asked.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> io::Result<Self> {
        #[allow(unsafe_code)] // netlink sockets are none of std's
        // SAFETY: socket takes integers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        #[allow(unsafe_code)] // as above
        // SAFETY: the descriptor is fresh and owned by nobody else.
        let socket = unsafe { File::from_raw_fd(fd) };
        Ok(Self {
            socket,
            last: AtomicU32::new(0),
        })
    }

    /// What is known of the interface `name`; `None` where it is neither tun nor tap.
    ///
    /// # Errors
    /// `ENODEV` where there is no such interface, and others of the kernel's.
    pub fn look(&self, name: &str) -> io::Result<Option<Tun>> {
        let number = self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let question = message::question(name, number)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        (&self.socket).write_all(&question)?;
        let mut answer = vec![0; MAX_ANSWER];
        for _ in 0..MAX_STALE {
            let len = (&self.socket).read(&mut answer)?;
            let bytes = answer.get(..len).unwrap_or_default();
            if let Some(found) = message::answer(bytes, number) {
                return found;
            }
        }
        Err(io::Error::from_raw_os_error(libc::EPROTO))
    }
}

impl AsFd for Links {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Links {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test says so by panicking
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_known_from_what_is_absent() {
        let links = Links::open().unwrap();
        assert_eq!(links.look("lo").unwrap(), None);
        let absent = links.look("bh-absent").unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(libc::ENODEV));
        for bad in ["", "sixteen-letters!", "nul\0"] {
            assert!(links.look(bad).is_err());
        }
        // And it still answers.
        assert_eq!(links.look("lo").unwrap(), None);
    }
}
