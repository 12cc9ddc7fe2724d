//! What the manager thread watches for a function and what comes of it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::succession::{ReconnectError, Reconnected};
use crate::vhost_user::VhostUserError;

/// A descriptor of a function that the manager watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventSource {
    /// The error eventfd of a queue: the device process found its ring malformed.
    RingError(u16),
    /// The back-end's own requests.
    Backend,
    /// The vhost-user socket: only its end is of interest.
    Hangup,
    /// A successor that was handed to `adopt` serves, or will not.
    Successor,
}

impl EventSource {
    const BACKEND: u32 = 0x1_0000;
    const HANGUP: u32 = 0x1_0001;
    const SUCCESSOR: u32 = 0x1_0002;

    /// As part of an epoll token.
    pub fn to_u32(self) -> u32 {
        match self {
            Self::RingError(queue) => queue.into(),
            Self::Backend => Self::BACKEND,
            Self::Hangup => Self::HANGUP,
            Self::Successor => Self::SUCCESSOR,
        }
    }

    /// From part of an epoll token.
    pub fn from_u32(token: u32) -> Option<Self> {
        match token {
            Self::BACKEND => Some(Self::Backend),
            Self::HANGUP => Some(Self::Hangup),
            Self::SUCCESSOR => Some(Self::Successor),
            queue => u16::try_from(queue).ok().map(Self::RingError),
        }
    }
}

/// What to register with epoll. The flags matter: an error eventfd is shared with the
/// device process, which may change its flags, so it is watched edge-triggered and never
/// read.
#[derive(Clone, Debug)]
pub struct PollFd {
    /// The descriptor.
    pub fd: Arc<OwnedFd>,
    /// What to pass to `on_event`.
    pub source: EventSource,
    /// EPOLL flags.
    pub events: u32,
}

/// Why a function has no back-end, or gave it up: one of our processes or of somebody else's, which is not known here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailReason {
    /// It has not been there yet.
    #[error("its back-end has not been there yet")]
    Absent,
    /// It closed its channel.
    #[error("its back-end closed the vhost-user channel")]
    Hangup,
    /// It did not answer in time.
    #[error("its back-end did not answer {0} in time")]
    Timeout(&'static str),
    /// It broke the protocol.
    #[error("its back-end broke the vhost-user protocol: {0}")]
    Violation(String),
    /// It refused to stop: it may write to memory that the driver has taken back.
    #[error("its back-end refused to stop its rings")]
    Unquiet,
    /// It refused to let go of memory that is taken from the guest.
    #[error("its back-end keeps memory that is taken back")]
    Keeps,
    /// Another failure of the channel.
    #[error("{0}")]
    Channel(String),
    /// Ended from outside.
    #[error("{0}")]
    Stopped(String),
}

impl From<&VhostUserError> for FailReason {
    fn from(error: &VhostUserError) -> Self {
        match error {
            VhostUserError::Closed => Self::Hangup,
            VhostUserError::Timeout(what) => Self::Timeout(what),
            VhostUserError::Violation(violation) => Self::Violation(violation.to_string()),
            other => Self::Channel(other.to_string()),
        }
    }
}

/// What became of an event.
#[derive(Debug)]
pub enum Outcome {
    /// Handled; the device process goes on.
    Handled,
    /// The device process is lost and a successor expected. It must be ended (it may still
    /// write to guest memory), and the descriptors of `link_fds` must leave the epoll set.
    /// Said once for each process that is lost.
    Suspended(FailReason),
    /// A successor serves: the descriptors of `link_fds`, which are new, are to be watched.
    Reconnected(Reconnected),
    /// A successor could not take over and was hung up on. The function is as it was
    /// before, or failed where it was a process of ours that can never serve this driver.
    NotReconnected(ReconnectError),
    /// The device process is given up: it must be ended (it may still write to guest
    /// memory), and all the function's descriptors must leave the epoll set.
    Failed(FailReason),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip() {
        let sources = [
            EventSource::Backend,
            EventSource::Hangup,
            EventSource::Successor,
        ];
        for source in sources
            .into_iter()
            .chain([0, 255, u16::MAX].map(EventSource::RingError))
        {
            assert_eq!(EventSource::from_u32(source.to_u32()), Some(source));
        }
        assert_eq!(EventSource::from_u32(0x1_0003), None);
    }
}
