//! poll(2) on borrowed descriptors, regular files and terminals included (which epoll
//! refuses). Used by the `serial` thread, and those of consoles' ports.
#![allow(unsafe_code)] // poll has no safe wrapper in libc.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// What to wait for on one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Readable,
    Writable,
}

/// Waits until one of `fds` is ready or failed, or the time is over (`None`: no limit). Says
/// which are.
pub(crate) fn poll<const N: usize>(
    fds: [Option<(BorrowedFd<'_>, Interest)>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut entries = fds.map(|fd| match fd {
        Some((fd, interest)) => libc::pollfd {
            fd: fd.as_raw_fd(),
            events: match interest {
                Interest::Readable => libc::POLLIN,
                Interest::Writable => libc::POLLOUT,
            },
            revents: 0,
        },
        // A negative descriptor is left out.
        None => libc::pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        },
    });
    let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: the pointer and the length are those of `entries`.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), N as libc::nfds_t, timeout) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok([false; N]),
            _ => Err(error),
        };
    }
    Ok(entries.map(|entry| entry.revents != 0))
}
