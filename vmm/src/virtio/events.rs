//! What the manager thread watches for a function and what comes of it.

use std::os::fd::BorrowedFd;

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
}

impl EventSource {
    const BACKEND: u32 = 0x1_0000;
    const HANGUP: u32 = 0x1_0001;

    /// As part of an epoll token.
    pub fn to_u32(self) -> u32 {
        match self {
            Self::RingError(queue) => queue.into(),
            Self::Backend => Self::BACKEND,
            Self::Hangup => Self::HANGUP,
        }
    }

    /// From part of an epoll token.
    pub fn from_u32(token: u32) -> Option<Self> {
        match token {
            Self::BACKEND => Some(Self::Backend),
            Self::HANGUP => Some(Self::Hangup),
            queue => u16::try_from(queue).ok().map(Self::RingError),
        }
    }
}

/// What to register with epoll. The flags matter: an error eventfd is shared with the
/// device process, which may change its flags, so it is watched edge-triggered and never
/// read.
#[derive(Clone, Copy, Debug)]
pub struct PollFd<'a> {
    /// The descriptor; valid as long as the function.
    pub fd: BorrowedFd<'a>,
    /// What to pass to `on_event`.
    pub source: EventSource,
    /// EPOLL flags.
    pub events: u32,
}

/// Why a function gave its device process up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailReason {
    /// The process closed its channel.
    #[error("its process closed the vhost-user channel")]
    Hangup,
    /// The process did not answer in time.
    #[error("its process did not answer {0} in time")]
    Timeout(&'static str),
    /// The process broke the protocol.
    #[error("its process broke the vhost-user protocol: {0}")]
    Violation(String),
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Handled; the device process goes on.
    Handled,
    /// The device process is given up: it must be ended (it may still write to guest
    /// memory), and all the function's descriptors must leave the epoll set.
    Failed(FailReason),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip() {
        let sources = [EventSource::Backend, EventSource::Hangup];
        for source in sources
            .into_iter()
            .chain([0, 255, u16::MAX].map(EventSource::RingError))
        {
            assert_eq!(EventSource::from_u32(source.to_u32()), Some(source));
        }
        assert_eq!(EventSource::from_u32(0x1_0002), None);
    }
}
