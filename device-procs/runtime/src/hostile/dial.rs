//! The channel by which a socket device asks the launcher for connections, and nothing but ports:
//! asked for more than that, against its rules, and without an end. On the worker alone, which is
//! who reads the answers; processes of other kinds do not have it.

use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::descriptors::flood;
use super::told::Told;
use super::{Attempt, Outcome, now};
use crate::sys;

/// Where the test listens, beside the device's own socket.
const LISTENED: u32 = 1024;
/// Where the test has put a symbolic link to another VM's socket.
const LINKED: u32 = 7;
/// There is a connection.
const JOINED: u32 = 0;
/// How long the launcher may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the launcher says to a request.
enum Said {
    /// A status, and how many descriptors beside it.
    Status(u32, Vec<OwnedFd>),
    /// No more from it.
    Ended,
    /// Not in time.
    Nothing,
}

/// The process's end.
#[derive(Clone, Copy)]
struct Channel(BorrowedFd<'static>);

impl Channel {
    /// The descriptor of that number.
    fn new(fd: RawFd) -> Self {
        // SAFETY: the device holds its end for as long as it lives, unless the launcher ends it;
        // then calls on the number fail, or reach what the same thread has opened since.
        Self(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn send(self, bytes: &[u8]) -> std::io::Result<usize> {
        sys::send_now(self.0, bytes, None)
    }

    fn hear(self) -> Said {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let mut bytes = [0; 8];
            match sys::receive(self.0, &mut bytes) {
                Ok(Some((8, fds))) => {
                    let [_, _, _, _, status @ ..] = bytes;
                    return Said::Status(u32::from_le_bytes(status), fds);
                }
                Ok(None) => {
                    let _ = sys::wait_readable(&self.0, 100);
                }
                Ok(Some(_)) | Err(_) => return Said::Ended,
            }
        }
        Said::Nothing
    }

    /// Whether the launcher hears this process and joins it to who listens: else an attempt
    /// would show nothing.
    fn is_heard(self) -> bool {
        let asked = self.send(&request(LISTENED)).is_ok();
        asked && matches!(self.hear(), Said::Status(JOINED, fds) if fds.len() == 1)
    }

    /// A packet, and what comes of it.
    fn say(self, bytes: &[u8]) -> Outcome {
        if let Err(error) = self.send(bytes) {
            return Outcome::Refused(error.to_string());
        }
        match self.hear() {
            Said::Status(status, fds) if status != JOINED && fds.is_empty() => {
                Outcome::Refused("the launcher says no".into())
            }
            Said::Status(status, fds) => {
                Outcome::Through(format!("status {status}, {} descriptors", fds.len()))
            }
            Said::Ended => Outcome::Refused("the launcher listens no more".into()),
            Said::Nothing => Outcome::Through("nothing was answered".into()),
        }
    }
}

fn request(port: u32) -> [u8; 8] {
    let [a, b, c, d] = port.to_le_bytes();
    [1, 2, 3, 4, a, b, c, d]
}

pub(super) fn attempts(told: &Told) -> Vec<Attempt> {
    let channel = told.dial.map(Channel::new);
    let attempt = move |name: &str, run: Box<dyn Fn(Channel) -> Outcome + Send + Sync>| Attempt {
        name: format!("asking for connections: {name}"),
        call: "sendmsg",
        worker: true,
        run: now(move || match channel {
            Some(channel) if channel.is_heard() => run(channel),
            Some(_) => Outcome::Through("the launcher does not join it to who listens".into()),
            None => Outcome::Through("this process has no such channel".into()),
        }),
    };
    let packet = move |name: &str, bytes: Vec<u8>| {
        attempt(name, Box::new(move |channel| channel.say(&bytes)))
    };
    let port = |port: u32| request(port).to_vec();
    let path = CString::as_bytes(&told.socket).to_vec();
    let mut with_path = port(LISTENED);
    with_path.extend_from_slice(b"/../");
    with_path.extend_from_slice(&path);
    vec![
        packet("a port where nobody listens", port(1025)),
        packet("no port at all", port(u32::MAX)),
        packet("a port that spells a path", b"\0\0\0\0/../".to_vec()),
        packet("a link to another VM's socket", port(LINKED)),
        packet("another VM's socket by its path", path),
        packet("another VM's socket behind a port", with_path),
        packet("an empty packet", Vec::new()),
        packet("a packet that is too short", vec![0; 7]),
        packet("a packet that is too long", vec![0; 9]),
        packet("a packet of 64 KiB", vec![0; 1 << 16]),
        packet("a packet of 1 MiB", vec![0; 1 << 20]),
        attempt("descriptors beside requests", Box::new(with_descriptors)),
        attempt("without taking the answers", Box::new(without_end)),
        attempt("as many as it likes, and all kept", Box::new(hoard)),
    ]
}

/// Descriptors beside requests that are in order: they are nobody's.
fn with_descriptors(Channel(fd): Channel) -> Outcome {
    use std::os::fd::AsRawFd;
    Outcome::Sent(flood(fd.as_raw_fd(), &request(1025)))
}

/// Asks and takes no answers, until the launcher listens no more.
fn without_end(channel: Channel) -> Outcome {
    let end = Instant::now() + PATIENCE;
    let mut asked = 0_u64;
    while Instant::now() < end {
        match channel.send(&request(1025)) {
            Ok(_) => asked = asked.saturating_add(1),
            // It has not got so far yet.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Outcome::Refused(format!("{error}, after {asked} requests")),
        }
    }
    Outcome::Through(format!("{asked} requests, and the launcher listens on"))
}

/// Keeps every connection: as many as its own limit allows, or the listener.
fn hoard(channel: Channel) -> Outcome {
    let mut kept = Vec::new();
    for _ in 0..5000 {
        let Ok(_) = channel.send(&request(LISTENED)) else {
            break;
        };
        match channel.hear() {
            Said::Status(_, fds) => kept.extend(fds),
            Said::Ended | Said::Nothing => break,
        }
    }
    // They are closed when this ends.
    Outcome::Sent(kept.len())
}
