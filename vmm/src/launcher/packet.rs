#![allow(unsafe_code)] // sendmsg/recvmsg with ancillary data, which std does not offer.
//! One end of the SOCK_SEQPACKET socketpair between VMM and launcher (unix(7)): packets of
//! bounded size, descriptors beside them (SCM_RIGHTS), and a pid that the kernel vouches
//! for and translates between pid namespaces (SCM_CREDENTIALS). Neither direction blocks.
//!
//! Used by the VMM's callers under the client's lock and by the launcher's only thread.
//! Two calls for unix sockets on paths, which bind without blocking, are here too.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::ptr;

/// Largest packet; a longer one is an error on either side.
pub const MAX_PACKET: usize = 64 * 1024;
/// Most descriptors beside one packet.
pub const MAX_FDS: usize = 72;

/// Room for SCM_RIGHTS with MAX_FDS descriptors and SCM_CREDENTIALS, in words so that it
/// is aligned for cmsghdr.
const CONTROL_WORDS: usize = 48;

/// A packet received.
#[derive(Debug, Default)]
pub struct Packet {
    /// The message.
    pub bytes: Vec<u8>,
    /// Descriptors beside it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender's pid, or the pid it named and was allowed to name, in the receiver's pid
    /// namespace; only on an end that asked for it.
    pub pid: Option<i32>,
}

/// One end of the socketpair.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> Self {
        socket.0
    }
}

impl From<OwnedFd> for PacketSocket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

fn last_error() -> io::Error {
    io::Error::last_os_error()
}

impl PacketSocket {
    /// Two connected ends.
    pub fn plain_pair() -> io::Result<(Self, Self)> {
        let mut fds = [-1; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: `fds` holds the two integers that socketpair fills; on success both are
        // new descriptors that nothing else owns.
        let (here, there) = unsafe {
            if libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) < 0 {
                return Err(last_error());
            }
            (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
        };
        Ok((Self(here), Self(there)))
    }

    /// Two connected ends; the first one learns pids.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (here, there) = Self::plain_pair()?;
        let on: libc::c_int = 1;
        // SAFETY: SO_PASSCRED takes an int, whose size is told.
        let result = unsafe {
            libc::setsockopt(
                here.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PASSCRED,
                ptr::from_ref(&on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(last_error());
        }
        Ok((here, there))
    }

    /// Sends one packet, or none: `WouldBlock` when the peer does not read. `pid` (in this
    /// process's pid namespace) goes along as SCM_CREDENTIALS with `ids`, this process's
    /// effective uid and gid.
    pub fn send(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        credentials: Option<(i32, (u32, u32))>,
    ) -> io::Result<()> {
        Self::send_on(self.0.as_fd(), bytes, fds, credentials)
    }

    fn send_on(
        socket: BorrowedFd<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        credentials: Option<(i32, (u32, u32))>,
    ) -> io::Result<()> {
        // An empty packet would read as the end of the connection.
        if bytes.is_empty() || bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control = [0u64; CONTROL_WORDS];
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: msghdr is plain data for which all zeroes is a value. `control` is aligned
        // for cmsghdr and has room for both items (checked by the unit test at their
        // maximum), msg_controllen is set to what is filled, and iovec and control outlive
        // the call, which only reads them.
        let sent = unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &mut part;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(&control);
            let mut used = 0usize;
            let mut item = libc::CMSG_FIRSTHDR(&header);
            if !raw.is_empty() && !item.is_null() {
                let length = size_of_val(raw.as_slice());
                (*item).cmsg_level = libc::SOL_SOCKET;
                (*item).cmsg_type = libc::SCM_RIGHTS;
                (*item).cmsg_len = libc::CMSG_LEN(length as u32) as _;
                ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), libc::CMSG_DATA(item), length);
                used += libc::CMSG_SPACE(length as u32) as usize;
                item = libc::CMSG_NXTHDR(&header, item);
            }
            if let (Some((pid, (uid, gid))), false) = (credentials, item.is_null()) {
                let ucred = libc::ucred { pid, uid, gid };
                (*item).cmsg_level = libc::SOL_SOCKET;
                (*item).cmsg_type = libc::SCM_CREDENTIALS;
                (*item).cmsg_len = libc::CMSG_LEN(size_of::<libc::ucred>() as u32) as _;
                ptr::write_unaligned(libc::CMSG_DATA(item).cast(), ucred);
                used += libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) as usize;
            }
            if used == 0 {
                header.msg_control = ptr::null_mut();
            }
            header.msg_controllen = used;
            libc::sendmsg(
                socket.as_raw_fd(),
                &header,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 { Err(last_error()) } else { Ok(()) }
    }

    /// Says no more: the peer hears the end of the connection, and is still heard.
    pub fn say_no_more(&self) -> io::Result<()> {
        // SAFETY: shutdown takes a descriptor, which is open, and a number.
        let result = unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) };
        if result < 0 {
            Err(last_error())
        } else {
            Ok(())
        }
    }

    /// Receives one packet; `None` at the end of the connection, `WouldBlock` when none is
    /// there. A packet or its descriptors beyond the bounds are an error, and nothing leaks.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut packet = Packet {
            bytes: vec![0; MAX_PACKET],
            ..Packet::default()
        };
        let mut control = [0u64; CONTROL_WORDS];
        let mut part = libc::iovec {
            iov_base: packet.bytes.as_mut_ptr().cast(),
            iov_len: packet.bytes.len(),
        };
        // SAFETY: all zeroes is a msghdr; iovec and control describe live, writable memory of
        // the lengths told and outlive the call.
        let (got, header) = unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &mut part;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(&control);
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            (
                libc::recvmsg(self.0.as_raw_fd(), &mut header, flags),
                header,
            )
        };
        let got = usize::try_from(got).map_err(|_| last_error())?;
        packet.bytes.truncate(got);
        // SAFETY: the kernel filled msg_controllen bytes of `control` with well-formed items;
        // the CMSG_* walk stays within them. Each descriptor in SCM_RIGHTS is new and ours.
        unsafe {
            let mut item = libc::CMSG_FIRSTHDR(&header);
            while !item.is_null() {
                let data = libc::CMSG_DATA(item);
                let length = ((*item).cmsg_len).saturating_sub(libc::CMSG_LEN(0) as usize);
                match ((*item).cmsg_level, (*item).cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                        for index in 0..length / size_of::<RawFd>() {
                            let fd = ptr::read_unaligned(data.cast::<RawFd>().add(index));
                            packet.fds.push(OwnedFd::from_raw_fd(fd));
                        }
                    }
                    (libc::SOL_SOCKET, libc::SCM_CREDENTIALS)
                        if length >= size_of::<libc::ucred>() =>
                    {
                        packet.pid = Some(ptr::read_unaligned(data.cast::<libc::ucred>()).pid);
                    }
                    _ => {}
                }
                item = libc::CMSG_NXTHDR(&header, item);
            }
        }
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        if got == 0 {
            return Ok(None);
        }
        Ok(Some(packet))
    }
}

/// Sends a descriptor over a stream socket, beside one byte.
pub fn send_descriptor(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    PacketSocket::send_on(socket, &[0], &[fd], None)
}

/// Reads from a socket without waiting, and takes the first descriptor that comes beside the
/// bytes; others are closed, and so is what of a packet does not fit. 0 bytes: the end.
pub fn receive_stream(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    // Room for one item with one descriptor; the kernel closes what does not fit.
    let mut control = [0u64; 3];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeroes is a msghdr; iovec and control describe live, writable memory of the
    // lengths told and outlive the call.
    let (got, header) = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        (
            libc::recvmsg(socket.as_raw_fd(), &mut header, flags),
            header,
        )
    };
    let got = usize::try_from(got).map_err(|_| last_error())?;
    let mut first = None;
    // SAFETY: the kernel filled msg_controllen bytes of `control` with well-formed items, and
    // the walk stays within them. Each descriptor in SCM_RIGHTS is new and ours; what is not
    // kept is closed by its drop.
    unsafe {
        let item = libc::CMSG_FIRSTHDR(&header);
        if !item.is_null()
            && (*item).cmsg_level == libc::SOL_SOCKET
            && (*item).cmsg_type == libc::SCM_RIGHTS
        {
            let data = libc::CMSG_DATA(item);
            let length = ((*item).cmsg_len).saturating_sub(libc::CMSG_LEN(0) as usize);
            for index in 0..length / size_of::<RawFd>() {
                let fd = ptr::read_unaligned(data.cast::<RawFd>().add(index));
                let fd = OwnedFd::from_raw_fd(fd);
                first.get_or_insert(fd);
            }
        }
    }
    Ok((got, first))
}

/// A unix address of `path`; `EINVAL` when it is empty or longer than sun_path.
fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is plain data for which all zeroes is a value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

/// Longest path that `bind_listen` and `somebody_listens` take.
pub const MAX_SOCKET_PATH: usize = 107;

fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes integers; the result is a new descriptor that nothing else owns.
    unsafe {
        match libc::socket(libc::AF_UNIX, kind, 0) {
            fd if fd < 0 => Err(last_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Binds and listens; the file's mode is what the umask leaves of 0777. Non-blocking.
pub fn bind_listen(path: &Path) -> io::Result<UnixListener> {
    let socket = stream_socket()?;
    let (address, length) = address(path)?;
    // SAFETY: the address is valid and of the length told.
    unsafe {
        if libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) < 0 {
            return Err(last_error());
        }
    }
    listen(socket.as_fd())?;
    Ok(socket.into())
}

/// listen(2). Listening again on a listening socket is allowed, and makes the caller the
/// process that SO_PEERCRED names to those who connect.
pub fn listen(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: listen takes integers.
    if unsafe { libc::listen(socket.as_raw_fd(), 128) } < 0 {
        return Err(last_error());
    }
    Ok(())
}

/// Connects to the listener at `path`; `WouldBlock` when its backlog is full.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    let (address, length) = address(path)?;
    // SAFETY: the address is valid and of the length told.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) };
    if result < 0 {
        return Err(last_error());
    }
    Ok(socket.into())
}

/// Whether a connection to the socket at `path` would be queued. Never blocks.
pub fn somebody_listens(path: &Path) -> io::Result<bool> {
    match connect(path) {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error() {
            // A full backlog is a listener too; EPROTOTYPE a live socket of another type.
            Some(libc::EAGAIN | libc::EPROTOTYPE) => Ok(true),
            Some(libc::ECONNREFUSED) => Ok(false),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::{isolate, sys};

    #[test]
    fn a_packet_carries_the_most_descriptors_and_the_pid_and_no_more() {
        let (here, there) = PacketSocket::pair().unwrap();
        let (read, _write) = sys::pipe().unwrap();
        let fds: Vec<BorrowedFd> = (0..MAX_FDS).map(|_| read.as_fd()).collect();
        let me = i32::try_from(std::process::id()).unwrap();
        there
            .send(b"spawned", &fds, Some((me, isolate::effective_ids())))
            .unwrap();
        let packet = here.receive().unwrap().unwrap();
        assert_eq!(packet.bytes, b"spawned");
        assert_eq!(packet.fds.len(), MAX_FDS);
        assert_eq!(packet.pid, Some(me));

        let surplus: Vec<BorrowedFd> = (0..=MAX_FDS).map(|_| read.as_fd()).collect();
        let error = there.send(b"x", &surplus, None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        let error = there.send(&vec![0; MAX_PACKET + 1], &[], None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!(
            here.receive().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );

        assert!(there.send(&[], &[], None).is_err());

        there.send(&vec![7; MAX_PACKET], &[], None).unwrap();
        assert_eq!(here.receive().unwrap().unwrap().bytes.len(), MAX_PACKET);
        drop(there);
        assert!(here.receive().unwrap().is_none());
    }
}
