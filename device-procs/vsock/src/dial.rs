//! Connections that the guest asks for: the process makes no socket, so the launcher connects to
//! `<socket>_<port>` for it and hands over what comes of it. One packet each way, with a ticket:
//!
//! ```text
//!   Dialer ── ticket, port ──▶ launcher
//!          ◀── ticket, 0 and a connection, or 1 ──
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_runtime::sys;

/// Bytes of a packet: two numbers of 32 bits, little-endian.
const LEN: usize = 8;
/// There is a connection.
const JOINED: u32 = 0;

/// What the launcher has answered.
#[derive(Debug)]
pub struct Answer {
    /// To which request.
    pub ticket: u32,
    /// The connection; `None`: nobody listens there.
    pub stream: Option<UnixStream>,
}

/// The launcher says no more.
#[derive(Debug, thiserror::Error)]
#[error("the launcher answers no requests any more")]
pub struct Gone;

/// The channel to the launcher.
#[derive(Debug)]
pub struct Dialer(Option<OwnedFd>);

impl Dialer {
    /// Over this end.
    pub fn new(channel: OwnedFd) -> Self {
        Self(Some(channel))
    }

    /// Asks for a connection to a port; false: it cannot be asked for.
    pub fn ask(&self, ticket: u32, port: u32) -> bool {
        let [a, b, c, d] = ticket.to_le_bytes();
        let [e, f, g, h] = port.to_le_bytes();
        let bytes: [u8; LEN] = [a, b, c, d, e, f, g, h];
        let sent = self.0.as_ref().map(|channel| {
            let sent = sys::send_now(channel.as_fd(), &bytes, None);
            matches!(sent, Ok(LEN))
        });
        sent.unwrap_or(false)
    }

    /// What is readable when there is an answer, or will never be one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// The next answer.
    ///
    /// # Errors
    /// There will be none any more.
    pub fn answer(&mut self) -> Result<Option<Answer>, Gone> {
        let Some(channel) = &self.0 else {
            return Err(Gone);
        };
        let mut bytes = [0; LEN];
        match sys::receive(channel.as_fd(), &mut bytes) {
            Ok(None) => Ok(None),
            Ok(Some((LEN, fds))) => {
                let [a, b, c, d, e, f, g, h] = bytes;
                let stream = fds.into_iter().next().map(UnixStream::from);
                let joined = u32::from_le_bytes([e, f, g, h]) == JOINED;
                Ok(Some(Answer {
                    ticket: u32::from_le_bytes([a, b, c, d]),
                    stream: stream.filter(|_| joined),
                }))
            }
            Ok(Some(_)) | Err(_) => {
                self.0 = None;
                Err(Gone)
            }
        }
    }
}
