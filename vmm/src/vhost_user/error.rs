//! What can go wrong on a vhost-user connection.

use std::io;

/// How a back-end broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message larger than its kind allows.
    #[error("a message of {0} bytes where at most {1} are allowed")]
    Oversize(u32, u32),
    /// A message whose size does not fit its kind.
    #[error("a message of {0} bytes where {1} were expected")]
    WrongSize(u32, u32),
    /// File descriptors where none belong.
    #[error("file descriptors that were not asked for")]
    SurplusFds,
    /// A header with a wrong version or without the reply flag.
    #[error("a header with flags {0:#x}")]
    BadFlags(u32),
    /// A reply to another request than the one that was sent.
    #[error("a reply to request {got} where request {expected} was sent")]
    WrongReply {
        /// The request that the reply names.
        got: u32,
        /// The request that was sent.
        expected: u32,
    },
    /// A value that the protocol does not allow there.
    #[error("a wrong {0}")]
    BadValue(&'static str),
    /// Too many messages in a second.
    #[error("a flood of messages")]
    Flood,
    /// Replies that are never read.
    #[error("replies left unread")]
    Unread,
}

/// Why a vhost-user request failed. All but [`Refused`](Self::Refused) and
/// [`Unsupported`](Self::Unsupported) end the connection.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// The whole message was not there in time.
    #[error("the back-end did not answer {0} in time")]
    Timeout(&'static str),
    /// The other end is gone.
    #[error("the back-end closed its vhost-user channel")]
    Closed,
    /// The connection failed before; nothing is sent any more.
    #[error("the vhost-user channel has failed before")]
    Broken,
    /// The back-end broke the protocol.
    #[error("the back-end broke the vhost-user protocol: {0}")]
    Violation(#[from] Violation),
    /// The back-end understood and answered with an error.
    #[error("the back-end refused {0}")]
    Refused(&'static str),
    /// The back-end lacks something that is needed.
    #[error("the back-end does not offer {0}")]
    Unsupported(&'static str),
    /// What the VMM was asked to send does not fit the protocol.
    #[error("cannot express {0} in vhost-user")]
    Unencodable(&'static str),
    /// The kernel refused.
    #[error("vhost-user channel: {0}")]
    Io(#[from] io::Error),
}

impl VhostUserError {
    /// Whether the connection can be used on.
    pub fn is_fatal(&self) -> bool {
        !matches!(
            self,
            Self::Refused(_) | Self::Unsupported(_) | Self::Unencodable(_)
        )
    }
}
