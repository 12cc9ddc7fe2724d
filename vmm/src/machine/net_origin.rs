//! Where the back-end of a device comes from when it is somebody else's.

use std::fmt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::launcher::printable;

/// Where the back-end comes from.
#[derive(Debug)]
pub enum Origin {
    /// A socket that somebody listens on.
    Connect(PathBuf),
    /// A socket that we listen on.
    Listen(PathBuf, UnixListener),
    /// The external helper of this kind, which the launcher starts with these options.
    Helper(&'static str, Vec<String>),
    /// There is none and will be none, for this reason.
    Nothing(String),
}

impl Origin {
    /// The kind of its helper.
    pub(super) fn helper(&self) -> Option<&'static str> {
        match self {
            Self::Helper(kind, _) => Some(kind),
            _ => None,
        }
    }

    /// Whether another back-end can come when one is lost.
    pub(super) fn returns(&self) -> bool {
        !matches!(self, Self::Nothing(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(path) | Self::Listen(path, _) => {
                write!(f, "vhost-user {}", printable(&path.to_string_lossy()))
            }
            Self::Helper(kind, _) => f.write_str(kind),
            Self::Nothing(why) => f.write_str(why),
        }
    }
}
