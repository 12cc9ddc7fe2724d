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
    /// A channel over a connected stream socket.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        // Nothing is sent by this, but only to a connected socket. To ask for the socket's
        // options would be a system call more in the filter.
        sys::send_now(socket.as_fd(), &[], None).map_err(|e| {
            io::Error::other(format!("the back-end channel is no connected socket: {e}"))
        })?;
        Ok(Self {
            socket: Some(socket),
            ..Self::default()
        })
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
        let mut channel = BackendChannel::new(ours.into()).unwrap();
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
    fn a_channel_that_is_no_socket_is_refused_and_a_closed_one_is_dropped() {
        assert!(BackendChannel::new(sys::eventfd().unwrap().into()).is_err());
        let (theirs, ours) = UnixStream::pair().unwrap();
        let mut channel = BackendChannel::new(ours.into()).unwrap();
        drop(theirs);
        channel.config_changed();
        channel.flush();
        assert!(channel.socket.is_none());
        channel.config_changed();
        channel.flush();
        assert!(!channel.config_changed);
    }
}
