//! The channel for requests that the back-end makes (vhost-user protocol, "Back-end
//! message types"): a change of the device's configuration space is taken note of,
//! everything else is refused.
//!
//! The manager thread drains it when it is readable. Nothing here blocks: an unfinished
//! message waits in a bounded buffer, the work per call and the messages per second are
//! bounded, and a back-end that leaves our replies unread breaks the protocol.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::BackendReq;

use super::error::{VhostUserError, Violation};
use super::transport::{Received, receive_some, send_some};
use super::wire::{HEADER_SIZE, Header};

/// The largest payload that any request of a back-end has is below this.
const MAX_PAYLOAD: u32 = 512;
const MESSAGES_PER_CALL: usize = 16;
const MESSAGES_PER_SECOND: u32 = 1000;
const RATE_WINDOW: Duration = Duration::from_secs(1);
const REFUSED: u64 = 1;

/// What was drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// The device's configuration space has changed.
    pub config_changed: bool,
}

/// Our end of the channel.
pub struct BackendChannel {
    socket: UnixStream,
    acks: bool,
    /// The message that is being received.
    partial: Vec<u8>,
    window_start: Instant,
    in_window: u32,
}

impl BackendChannel {
    pub(crate) fn new(socket: UnixStream, acks: bool) -> Self {
        Self {
            socket,
            acks,
            partial: Vec::new(),
            window_start: Instant::now(),
            in_window: 0,
        }
    }

    /// Another descriptor of the socket, for polling.
    pub fn clone_socket(&self) -> Result<UnixStream, VhostUserError> {
        Ok(self.socket.try_clone()?)
    }

    /// Handles what has arrived, a bounded number of messages; the socket stays readable
    /// when there is more.
    pub fn on_readable(&mut self) -> Result<Drained, VhostUserError> {
        let mut drained = Drained::default();
        for _ in 0..MESSAGES_PER_CALL {
            let Some(header) = self.next_message()? else {
                break;
            };
            self.count_message()?;
            let known = header.request == u32::from(BackendReq::CONFIG_CHANGE_MSG);
            drained.config_changed |= known;
            if self.acks && header.needs_reply() {
                self.answer(header.request, if known { 0 } else { REFUSED })?;
            }
        }
        Ok(drained)
    }

    /// The next whole message's header; None when there is none yet.
    fn next_message(&mut self) -> Result<Option<Header>, VhostUserError> {
        loop {
            let header = self.partial.first_chunk().map(Header::decode);
            let wanted = match header {
                None => HEADER_SIZE,
                Some(header) => {
                    header.check_request(MAX_PAYLOAD)?;
                    HEADER_SIZE.saturating_add(usize::try_from(header.size).unwrap_or_default())
                }
            };
            let missing = wanted.saturating_sub(self.partial.len());
            if let (Some(header), 0) = (header, missing) {
                self.partial.clear();
                return Ok(Some(header));
            }
            let mut buffer = [0; HEADER_SIZE + MAX_PAYLOAD as usize];
            let Some(room) = buffer.get_mut(..missing) else {
                return Err(Violation::Oversize(u32::MAX, MAX_PAYLOAD).into());
            };
            match receive_some(&self.socket, room)? {
                Received::WouldBlock => return Ok(None),
                Received::Bytes(count) => {
                    self.partial
                        .extend_from_slice(room.get(..count).unwrap_or_default());
                }
            }
        }
    }

    fn count_message(&mut self) -> Result<(), Violation> {
        let now = Instant::now();
        if now.duration_since(self.window_start) >= RATE_WINDOW {
            self.window_start = now;
            self.in_window = 0;
        }
        self.in_window = self.in_window.saturating_add(1);
        if self.in_window > MESSAGES_PER_SECOND {
            Err(Violation::Flood)
        } else {
            Ok(())
        }
    }

    fn answer(&self, request: u32, value: u64) -> Result<(), VhostUserError> {
        let mut message = Header::reply(request, 8).encode().to_vec();
        message.extend_from_slice(&value.to_ne_bytes());
        match send_some(&self.socket, &message, &[])? {
            Some(count) if count == message.len() => Ok(()),
            _ => Err(Violation::Unread.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    const CONFIG_CHANGE: u32 = 2;

    fn pair() -> (BackendChannel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (BackendChannel::new(ours, true), theirs)
    }

    #[test]
    fn a_config_change_is_noted_and_acknowledged_others_are_refused() {
        let (mut channel, mut peer) = pair();
        assert_eq!(channel.on_readable().unwrap(), Drained::default());
        peer.write_all(&Header::request(CONFIG_CHANGE, 0, true).encode())
            .unwrap();
        assert!(channel.on_readable().unwrap().config_changed);
        let mut reply = [0; HEADER_SIZE + 8];
        peer.read_exact(&mut reply).unwrap();
        assert_eq!(
            reply[..HEADER_SIZE],
            Header::reply(CONFIG_CHANGE, 8).encode()
        );
        assert_eq!(reply[HEADER_SIZE..], [0; 8]);
        peer.write_all(&Header::request(3, 4, true).encode())
            .unwrap();
        assert!(!channel.on_readable().unwrap().config_changed);
        peer.write_all(&[0; 4]).unwrap();
        assert!(!channel.on_readable().unwrap().config_changed);
        peer.read_exact(&mut reply).unwrap();
        assert_eq!(reply[HEADER_SIZE..], 1_u64.to_ne_bytes());
    }

    #[test]
    fn oversize_replies_floods_fds_and_hang_ups_are_errors() {
        let (mut channel, mut peer) = pair();
        peer.write_all(&Header::request(CONFIG_CHANGE, MAX_PAYLOAD + 1, false).encode())
            .unwrap();
        let error = channel.on_readable().unwrap_err();
        assert!(
            matches!(error, VhostUserError::Violation(Violation::Oversize(..))),
            "{error}"
        );

        let (mut channel, mut peer) = pair();
        peer.write_all(&Header::reply(CONFIG_CHANGE, 0).encode())
            .unwrap();
        let error = channel.on_readable().unwrap_err();
        assert!(
            matches!(error, VhostUserError::Violation(Violation::BadFlags(_))),
            "{error}"
        );

        let (mut channel, peer) = pair();
        let message = Header::request(CONFIG_CHANGE, 0, false).encode();
        send_some(&peer, &message, &[peer.as_fd(), peer.as_fd(), peer.as_fd()]).unwrap();
        let error = channel.on_readable().unwrap_err();
        assert!(
            matches!(error, VhostUserError::Violation(Violation::SurplusFds)),
            "{error}"
        );

        let (mut channel, peer) = pair();
        drop(peer);
        assert!(matches!(channel.on_readable(), Err(VhostUserError::Closed)));
    }

    #[test]
    fn the_work_of_one_call_is_bounded_and_a_flood_is_a_violation() {
        let (mut channel, mut peer) = pair();
        let message = Header::request(CONFIG_CHANGE, 0, false).encode();
        for _ in 0..MESSAGES_PER_CALL + 1 {
            peer.write_all(&message).unwrap();
        }
        assert!(channel.on_readable().unwrap().config_changed);
        assert!(
            channel.on_readable().unwrap().config_changed,
            "the rest comes next time"
        );
        assert!(!channel.on_readable().unwrap().config_changed);
        // The window is pinned to the future, so that the clock plays no part.
        channel.window_start = Instant::now() + Duration::from_secs(3600);
        channel.in_window = MESSAGES_PER_SECOND;
        peer.write_all(&message).unwrap();
        let error = channel.on_readable().unwrap_err();
        assert!(
            matches!(error, VhostUserError::Violation(Violation::Flood)),
            "{error}"
        );
    }

    #[test]
    fn replies_left_unread_are_a_violation_not_a_wait() {
        let (mut channel, mut peer) = pair();
        let message = Header::request(CONFIG_CHANGE, 0, true).encode();
        let error = loop {
            channel.in_window = 0;
            peer.write_all(&message).unwrap();
            match channel.on_readable() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error, VhostUserError::Violation(Violation::Unread)),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_messages_or_an_error(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..30)
        ) {
            let (mut channel, mut peer) = pair();
            for chunk in chunks {
                peer.write_all(&chunk).unwrap();
                if channel.on_readable().is_err() {
                    break;
                }
                prop_assert!(channel.partial.len() < HEADER_SIZE + MAX_PAYLOAD as usize);
            }
        }
    }
}
