//! Bytes and file descriptors over the socket, never past a deadline. Each send or
//! receive covers a whole buffer under one deadline: a peer that drips single bytes gets
//! no more time than one that is silent.
//!
//! Every call passes MSG_DONTWAIT: the socket's own flags do not matter, and waiting is
//! done by poll with the time that is left. Descriptors that arrive are closed here
//! (close-on-exec from the start) and reported.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::Deadline;
use super::error::{VhostUserError, Violation};

/// The most descriptors that we send in one message (SCM_RIGHTS room, and the
/// protocol's own limit of memory regions is below it).
pub const MAX_SENT_FDS: usize = 32;

/// What one non-blocking receive brought.
pub enum Received {
    /// That many bytes, at least one.
    Bytes(usize),
    /// Nothing yet.
    WouldBlock,
}

/// Where a descriptor goes that belongs to a message.
pub type Slot<'a> = Option<&'a mut Option<OwnedFd>>;

/// Receives what is there, at most `buffer.len()` bytes. Any descriptor is a violation.
pub fn receive_some(socket: &UnixStream, buffer: &mut [u8]) -> Result<Received, VhostUserError> {
    receive_with(socket, buffer, &mut None)
}

/// The same, where one descriptor may come along: it goes to `slot`, and any other one is
/// a violation.
fn receive_with(
    socket: &UnixStream,
    buffer: &mut [u8],
    slot: &mut Slot<'_>,
) -> Result<Received, VhostUserError> {
    // Room for one descriptor: enough to notice that there was any. The kernel closes
    // those that do not fit and says so by the truncation flag.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let result = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
    let mut surplus = false;
    for message in control.drain() {
        let RecvAncillaryMessage::ScmRights(fds) = message else {
            surplus = true;
            continue;
        };
        // Alignment makes room for a second one: all that are not kept are closed here.
        for fd in fds {
            match slot.as_deref_mut() {
                Some(place @ None) => *place = Some(fd),
                _ => surplus = true,
            }
        }
    }
    match result {
        Ok(message) if surplus || message.flags.contains(ReturnFlags::CTRUNC) => {
            Err(Violation::SurplusFds.into())
        }
        Ok(message) if message.bytes == 0 => Err(VhostUserError::Closed),
        Ok(message) => Ok(Received::Bytes(message.bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Received::WouldBlock),
        Err(Errno::CONNRESET | Errno::PIPE) => Err(VhostUserError::Closed),
        Err(error) => Err(VhostUserError::Io(error.into())),
    }
}

/// Fills `buffer` or fails at the deadline. A descriptor may come along where there is a
/// slot for it.
pub fn receive_exact(
    socket: &UnixStream,
    mut buffer: &mut [u8],
    mut slot: Slot<'_>,
    deadline: Deadline,
    what: &'static str,
) -> Result<(), VhostUserError> {
    while !buffer.is_empty() {
        // Checked on every round: bytes that keep coming do not extend it.
        if deadline.remaining().is_none() {
            return Err(VhostUserError::Timeout(what));
        }
        match receive_with(socket, buffer, &mut slot)? {
            Received::Bytes(count) => {
                buffer = std::mem::take(&mut buffer)
                    .get_mut(count..)
                    .unwrap_or_default();
            }
            Received::WouldBlock => wait(socket, PollFlags::IN, deadline, what)?,
        }
    }
    Ok(())
}

/// Sends all of `bytes`, with `fds` on the first of them, or fails at the deadline.
pub fn send_all(
    socket: &UnixStream,
    mut bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Deadline,
    what: &'static str,
) -> Result<(), VhostUserError> {
    let mut fds_left = fds;
    while !bytes.is_empty() {
        match send_some(socket, bytes, fds_left)? {
            Some(count) => {
                fds_left = &[];
                bytes = bytes.get(count..).unwrap_or_default();
            }
            None => wait(socket, PollFlags::OUT, deadline, what)?,
        }
    }
    Ok(())
}

/// Sends what the socket takes now; None when that is nothing.
pub fn send_some(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<Option<usize>, VhostUserError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(VhostUserError::Unencodable("so many file descriptors"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
        Ok(count) => Ok(Some(count)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(VhostUserError::Closed),
        Err(error) => Err(VhostUserError::Io(error.into())),
    }
}

/// Waits until the socket is ready, at most until the deadline.
fn wait(
    socket: &UnixStream,
    flags: PollFlags,
    deadline: Deadline,
    what: &'static str,
) -> Result<(), VhostUserError> {
    let left = deadline.remaining().ok_or(VhostUserError::Timeout(what))?;
    let timeout = Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(
        &mut [PollFd::from_borrowed_fd(socket.as_fd(), flags)],
        Some(&timeout),
    ) {
        Ok(0) => Err(VhostUserError::Timeout(what)),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(VhostUserError::Io(error.into())),
    }
}
