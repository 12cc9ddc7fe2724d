//! A device's only request of its own: a socket device asks for a connection to what listens for
//! the guest at one of the host's ports, `<its socket>_<port>`. It names the port and nothing
//! else; the path is that of a socket which was bound for the device. Never blocks, and a device
//! that breaks the rules, or does not take its answers, is not listened to any more.
//!
//! ```text
//!   device ── ticket, port ──▶ launcher ── connect(2) ──▶ "<socket>_<port>"
//!          ◀── ticket, 0 and the connection, or 1 ──
//! ```
//!
//! Runs on the launcher's only thread: one request at a turn of its loop.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::packet::{self, PacketSocket};
use super::paths::{Paths, refuse};

/// Bytes of a request, and of an answer: two numbers of 32 bits, little-endian.
const LEN: usize = 8;
/// There is a connection beside the answer.
const JOINED: u32 = 0;
/// Nobody listens, or nobody may be reached.
const REFUSED: u32 = 1;
/// What the path is for, in refusals.
const ROLE: &str = "vsock";

/// The launcher's end of one process's channel.
pub struct Dial {
    socket: Option<PacketSocket>,
    path: PathBuf,
}

impl Dial {
    /// A channel for a device whose own socket is at `path`, and its end.
    ///
    /// # Errors
    /// One line: no socket was bound there for this VM, or the host has no descriptor left.
    pub fn new(path: &Path, paths: &Paths) -> Result<(Self, OwnedFd), String> {
        if !paths.has_bound(path) {
            return refuse(ROLE, path, "was not bound by this VM");
        }
        let pair = PacketSocket::plain_pair();
        let (ours, theirs) =
            pair.or_else(|error| refuse(ROLE, path, &format!("socketpair: {error}")))?;
        let dial = Self {
            socket: Some(ours),
            path: path.to_owned(),
        };
        Ok((dial, theirs.into()))
    }

    /// What to wait for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Answers one request.
    pub fn on_readable(&mut self, paths: &Paths) {
        if self.answer(paths).is_none() {
            self.socket = None;
        }
    }

    /// `None`: that was the last one.
    fn answer(&self, paths: &Paths) -> Option<()> {
        let socket = self.socket.as_ref()?;
        // One byte more, to see what is too long.
        let mut request = [0; LEN + 1];
        // A descriptor beside it is nobody's: it is closed.
        let request = match packet::receive_stream(socket.as_fd(), &mut request) {
            Ok((LEN, _)) => request,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(()),
            _ => return None,
        };
        let (ticket, rest) = request.split_first_chunk::<4>()?;
        let port = u32::from_le_bytes(*rest.first_chunk::<4>()?);
        let mut place = self.path.clone().into_os_string();
        place.push(format!("_{port}"));
        let stream = paths.connect(Path::new(&place), ROLE).ok();
        let status = if stream.is_some() { JOINED } else { REFUSED };
        let mut answer = [0; LEN];
        answer.first_chunk_mut::<4>()?.clone_from(ticket);
        answer
            .last_chunk_mut::<4>()?
            .clone_from(&status.to_le_bytes());
        let fds: Vec<BorrowedFd<'_>> = stream.iter().map(AsFd::as_fd).collect();
        match socket.send(&answer, &fds, None) {
            Ok(()) => Some(()),
            // Too many descriptors of this user's are under way (unix(7)): this one cannot be had.
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                answer
                    .last_chunk_mut::<4>()?
                    .clone_from(&REFUSED.to_le_bytes());
                socket.send(&answer, &[], None).ok()
            }
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    struct Scratch(PathBuf);

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn scratch(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("bh-dial-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn ask(device: &PacketSocket, ticket: u32, port: u32) {
        let request = [ticket.to_le_bytes(), port.to_le_bytes()].concat();
        device.send(&request, &[], None).unwrap();
    }

    #[test]
    fn a_device_is_joined_to_whoever_listens_at_a_port_of_its_own_socket_and_nowhere_else() {
        let dir = scratch("ports");
        let own = dir.0.join("v.sock");
        let mut paths = Paths::new(Vec::new());
        assert!(Dial::new(&own, &paths).is_err());
        let _listener = paths.bind(&own, ROLE).unwrap();
        let (mut dial, device) = Dial::new(&own, &paths).unwrap();
        let device = PacketSocket::from(device);
        let port = UnixListener::bind(dir.0.join("v.sock_1234")).unwrap();
        std::fs::write(dir.0.join("v.sock_7"), "a file").unwrap();

        ask(&device, 9, 1234);
        dial.on_readable(&paths);
        let mut answer = device.receive().unwrap().unwrap();
        assert_eq!(answer.bytes, [9, 0, 0, 0, 0, 0, 0, 0]);
        let mut stream = UnixStream::from(answer.fds.pop().unwrap());
        let (mut theirs, _) = port.accept().unwrap();
        stream.write_all(b"x").unwrap();
        theirs.read_exact(&mut [0]).unwrap();

        for nobody in [1235, 7, u32::MAX] {
            ask(&device, nobody, nobody);
            dial.on_readable(&paths);
            let answer = device.receive().unwrap().unwrap();
            assert_eq!(answer.bytes[..4], nobody.to_le_bytes());
            assert_eq!(answer.bytes[4..], REFUSED.to_le_bytes());
            assert!(answer.fds.is_empty());
        }
        // Nothing there: nothing happens.
        dial.on_readable(&paths);
        assert!(dial.fd().is_some());
    }

    #[test]
    fn a_device_that_breaks_the_rules_is_not_listened_to_any_more() {
        let dir = scratch("rules");
        let own = dir.0.join("v.sock");
        let mut paths = Paths::new(Vec::new());
        let _listener = paths.bind(&own, ROLE).unwrap();
        for wrong in [vec![0; LEN - 1], vec![0; LEN + 1], vec![0; 4096]] {
            let (mut dial, device) = Dial::new(&own, &paths).unwrap();
            PacketSocket::from(device).send(&wrong, &[], None).unwrap();
            dial.on_readable(&paths);
            assert!(dial.fd().is_none());
        }
        // One that asks and asks, and takes no answer.
        let (mut dial, device) = Dial::new(&own, &paths).unwrap();
        let device = PacketSocket::from(device);
        for ticket in 0..10_000 {
            let request = [0_u32.to_le_bytes(), 5_u32.to_le_bytes()].concat();
            if device.send(&request, &[], None).is_err() {
                assert!(ticket > 10);
                break;
            }
            dial.on_readable(&paths);
        }
        assert!(dial.fd().is_none());
        // One that ends.
        let (mut dial, device) = Dial::new(&own, &paths).unwrap();
        drop(device);
        dial.on_readable(&paths);
        assert!(dial.fd().is_none());
    }

    #[test]
    fn where_paths_are_restricted_ports_are_too() {
        let dir = scratch("allowed");
        std::fs::create_dir_all(dir.0.join("in")).unwrap();
        std::fs::create_dir_all(dir.0.join("out")).unwrap();
        let own = dir.0.join("in/v.sock");
        let allowed = std::fs::canonicalize(dir.0.join("in")).unwrap();
        let mut paths = Paths::new(vec![allowed]);
        let _listener = paths.bind(&own, ROLE).unwrap();
        let (mut dial, device) = Dial::new(&own, &paths).unwrap();
        let device = PacketSocket::from(device);
        let _there = UnixListener::bind(dir.0.join("out/there")).unwrap();
        std::os::unix::fs::symlink("../out/there", dir.0.join("in/v.sock_1")).unwrap();
        ask(&device, 0, 1);
        dial.on_readable(&paths);
        assert!(device.receive().unwrap().unwrap().fds.is_empty());
    }
}
