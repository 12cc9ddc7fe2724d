//! The four system calls on sockets that the standard library does not offer in this form:
//! non-blocking recv and send that do not depend on the descriptor's O_NONBLOCK flag (the
//! flag would need an ioctl or fcntl that the seccomp policies do not allow), poll with a
//! deadline, and a peer's credentials. Called by every user of the frames, on its thread.
#![allow(unsafe_code)] // system calls without a safe wrapper

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Bytes to read, or the peer's end.
    Readable,
    /// Room to write.
    Writable,
}

/// Receives what is there: `None` when nothing is, `Some(0)` when the peer has ended.
/// File descriptors that a peer attaches are discarded by the kernel, and are an error: nobody
/// asks for any on these sockets.
///
/// # Errors
///
/// The system call's; `InvalidData` for descriptors.
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        let (mut iov, mut message) = (vector(buffer.as_mut_ptr(), buffer.len()), header());
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        // recvmsg and not recv, so that a device process's policy, which needs recvmsg for
        // vhost-user, can do without recvfrom.
        // SAFETY: the message names one vector, over a live, exclusively borrowed slice;
        // the descriptor is borrowed for the whole call.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if got > 0 && message.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "descriptors that nobody asked for",
            ));
        }
        if let Some(done) = outcome(got)? {
            return Ok(done);
        }
    }
}

/// Sends as much as there is room for: `None` when there is none. Never raises SIGPIPE.
///
/// # Errors
///
/// The system call's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<Option<usize>> {
    loop {
        let (mut iov, mut message) = (vector(bytes.as_ptr().cast_mut(), bytes.len()), header());
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        // SAFETY: the message names one vector, over a live slice that the kernel only
        // reads; the descriptor is borrowed for the whole call.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if let Some(done) = outcome(sent)? {
            return Ok(done);
        }
    }
}

fn vector(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

/// A message without a name, without control data.
fn header() -> libc::msghdr {
    // SAFETY: all fields are integers and pointers, for which zero is a valid value.
    unsafe { std::mem::zeroed() }
}

/// `None`: interrupted, try again. `Some(None)`: it would block.
fn outcome(result: isize) -> io::Result<Option<Option<usize>>> {
    if let Ok(count) = usize::try_from(result) {
        return Ok(Some(Some(count)));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(None),
        io::ErrorKind::WouldBlock => Ok(Some(None)),
        _ => Err(error),
    }
}

/// Waits until the socket is ready, has failed or hung up, a signal came, or `timeout` is
/// over (`None`: no limit). The caller tries again and looks at its own deadline.
///
/// # Errors
///
/// The system call's, except EINTR.
pub fn wait(
    socket: BorrowedFd<'_>,
    interest: Interest,
    timeout: Option<Duration>,
) -> io::Result<()> {
    let millis = match timeout {
        None => -1,
        // Rounded up, so that a caller with less than a millisecond left does not spin.
        Some(left) => i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
    };
    let events = match interest {
        Interest::Readable => libc::POLLIN,
        Interest::Writable => libc::POLLOUT,
    };
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid entry, exclusively borrowed for the call.
    let result = unsafe { libc::poll(&raw mut entry, 1, millis) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

/// Who connected a unix socket, as the kernel recorded it then (SO_PEERCRED).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id in our pid namespace.
    pub pid: i32,
    /// Effective user id in our user namespace.
    pub uid: u32,
    /// Effective group id in our user namespace.
    pub gid: u32,
}

/// Reads the peer's credentials.
///
/// # Errors
///
/// The system call's: the descriptor is not a connected unix socket.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<PeerCredentials> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `credentials`, which is that
    // long, and the length written to `length`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if length as usize != size_of::<libc::ucred>() {
        return Err(io::Error::other(
            "the kernel gave no whole peer credentials",
        ));
    }
    Ok(PeerCredentials {
        pid: credentials.pid,
        uid: credentials.uid,
        gid: credentials.gid,
    })
}

/// This process's effective user id.
pub fn effective_uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}
