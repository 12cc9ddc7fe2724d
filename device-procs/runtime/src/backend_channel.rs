//! The back-end channel: what this process says to the front-end without being asked
//! (vhost-user protocol, "Back-end message types").
//!
//! Only VHOST_USER_BACKEND_CONFIG_CHANGE_MSG is ever sent. Main thread; nothing here waits:
//! what does not fit into the socket's buffer is sent at a later occasion, and a change that
//! has not been told yet stands for all that follow it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::sys;

/// A message header: request VHOST_USER_BACKEND_CONFIG_CHANGE_MSG (2), flags version 1 and
/// no reply, size 0.
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// The channel, if the front-end has given one, and what is to be said on it.
#[derive(Debug, Default)]
pub(crate) struct BackendChannel {
    socket: Option<OwnedFd>,
    config_changed: bool,
    /// The rest of a message of which a part was sent.
    rest: &'static [u8],
}

impl BackendChannel {
    /// A channel over what the front-end says is a connected stream socket. No call is left
    /// to look at it: if it is something else, the first message says so.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            ..Self::default()
        }
    }

    /// The configuration space has changed.
    pub(crate) fn config_changed(&mut self) {
        self.config_changed = true;
    }

    /// Says what there is to say, as far as that goes without waiting.
    pub(crate) fn flush(&mut self) {
        let Some(socket) = &self.socket else {
            // Nobody to tell.
            self.config_changed = false;
            return;
        };
        loop {
            if self.rest.is_empty() {
                if !self.config_changed {
                    return;
                }
                self.config_changed = false;
                self.rest = &CONFIG_CHANGE;
            }
            match sys::send_now(socket.as_fd(), self.rest, None) {
                Ok(n) => self.rest = self.rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::warn!("back-end channel: {e}; changes of the configuration are not told");
                    self.socket = None;
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_change_is_told_once_and_a_full_socket_is_not_waited_for() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let mut channel = BackendChannel::new(ours.into());
        channel.flush();
        channel.config_changed();
        channel.config_changed();
        channel.flush();
        channel.flush();
        let mut said = [0; 12];
        theirs.read_exact(&mut said).unwrap();
        assert_eq!(said, CONFIG_CHANGE);
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut said).is_err());

        // Nobody reads: the test ends, so nothing has waited.
        for _ in 0..1_000_000 {
            channel.config_changed();
            channel.flush();
            if channel.config_changed || !channel.rest.is_empty() {
                break;
            }
        }
        assert!(!channel.rest.is_empty(), "the buffer is full");
        channel.config_changed();
        // All of them whole, and after room was made the last one too.
        let mut all = Vec::new();
        for _ in 0..2 {
            let _ = theirs.read_to_end(&mut all);
            channel.flush();
        }
        let _ = theirs.read_to_end(&mut all);
        assert!(all.len().is_multiple_of(12));
        assert!(all.chunks(12).all(|m| m == CONFIG_CHANGE));
        assert!(!channel.config_changed && channel.rest.is_empty());
    }

    #[test]
    fn a_channel_that_is_closed_or_no_socket_is_dropped() {
        let (theirs, closed) = UnixStream::pair().unwrap();
        drop(theirs);
        for fd in [closed.into(), sys::eventfd().unwrap().into()] {
            let mut channel = BackendChannel::new(fd);
            channel.config_changed();
            channel.flush();
            assert!(channel.socket.is_none());
            channel.config_changed();
            channel.flush();
            assert!(!channel.config_changed);
        }
    }
}
