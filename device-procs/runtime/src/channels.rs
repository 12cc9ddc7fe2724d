//! How a device process meets the rest of the world: over descriptors that it inherited
//! from the launcher at fixed numbers, or over a listener of its own (stand-alone, for a
//! third-party front-end).
//!
//! Called by the main thread at start, before confinement.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;

/// What `sun_path` holds with its zero.
const MAX_PATH: usize = 107;

/// What is wrong with a channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// An inherited descriptor is not there.
    #[error(
        "inherited fd {fd} ({what}) is not open: {source}; start this program through bulkhead, or use --socket"
    )]
    Missing {
        /// Its number.
        fd: RawFd,
        /// What it should be.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// An inherited descriptor is something else.
    #[error("inherited fd {fd} ({what}) is not a connected unix stream socket")]
    Kind {
        /// Its number.
        fd: RawFd,
        /// What it should be.
        what: &'static str,
    },
    /// What is inherited as fence is something else.
    #[error("inherited fd {fd} (fence) is not the write end of a pipe")]
    Fence {
        /// Its number.
        fd: RawFd,
    },
    /// A stand-alone process has nobody who waits for its fence.
    #[error("--fence-fd goes with inherited channels, not with --socket")]
    FenceAlone,
    /// No path to listen at.
    #[error("--socket: the path is empty: give one")]
    NoPath,
    /// The path does not fit into a socket's address (unix(7)).
    #[error("{}: a socket's path may have at most {MAX_PATH} bytes: choose a shorter one", path.display())]
    LongPath {
        /// It.
        path: PathBuf,
    },
    /// Somebody serves on that path already.
    #[error("{path}: already in use; stop the process that listens there, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at that path.
    #[error("{path}: exists and is not a socket; choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("{path}: cannot listen: {source}; the directory must exist and be writable")]
    Listen {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// The channels of a device process.
#[derive(Debug)]
pub enum Channels {
    /// Under the launcher.
    Inherited {
        /// ttrpc, service bulkhead.device.v1.Device.
        control: OwnedFd,
        /// vhost-user.
        vhost: UnixStream,
        /// The only write end of a pipe: its reader sees the end of it when this process's
        /// last operation on the host has ended.
        fence: Option<OwnedFd>,
    },
    /// Stand-alone: vhost-user connections, one after another.
    Listener(UnixListener),
}

fn inherited(fd: RawFd, what: &'static str) -> Result<OwnedFd, ChannelError> {
    let owned =
        sys::take_inherited(fd).map_err(|source| ChannelError::Missing { fd, what, source })?;
    if sys::is_unix_stream(owned.as_fd(), false) {
        Ok(owned)
    } else {
        Err(ChannelError::Kind { fd, what })
    }
}

impl Channels {
    /// Takes the descriptors that the launcher passed. Once per process, before anything
    /// else is opened.
    pub fn inherit(control: RawFd, vhost: RawFd) -> Result<Self, ChannelError> {
        let channels = Self::Inherited {
            control: inherited(control, "control channel")?,
            vhost: inherited(vhost, "vhost-user channel")?.into(),
            fence: None,
        };
        // A reader of the log that does not read must not stop a worker.
        let _ = sys::set_nonblocking(std::io::stderr().as_fd());
        Ok(channels)
    }

    /// Those, and the fence where there is one.
    ///
    /// # Errors
    /// As [`inherit`](Self::inherit) and [`with_fence`](Self::with_fence).
    pub fn inherited(
        control: RawFd,
        vhost: RawFd,
        fence: Option<RawFd>,
    ) -> Result<Self, ChannelError> {
        let channels = Self::inherit(control, vhost)?;
        match fence {
            Some(fence) => channels.with_fence(fence),
            None => Ok(channels),
        }
    }

    /// The same channels, and the fence at the inherited descriptor `fd` (--fence-fd), of
    /// which every worker gets a copy ([`WorkerPort::take_fence`]). Once per process, before
    /// anything else is opened.
    ///
    /// # Errors
    /// It is not the write end of a pipe, or these channels are not inherited ones.
    ///
    /// [`WorkerPort::take_fence`]: crate::mailbox::WorkerPort::take_fence
    fn with_fence(mut self, fd: RawFd) -> Result<Self, ChannelError> {
        let Self::Inherited { fence, .. } = &mut self else {
            return Err(ChannelError::FenceAlone);
        };
        let owned = sys::take_inherited(fd).map_err(|source| ChannelError::Missing {
            fd,
            what: "fence",
            source,
        })?;
        if !sys::is_pipe_writer(owned.as_fd()) {
            return Err(ChannelError::Fence { fd });
        }
        *fence = Some(owned);
        Ok(self)
    }

    /// Listens at `path`, which only the same user may then connect to. A socket that a
    /// dead process left there is removed; one that is served is not.
    pub fn listen(path: &Path) -> Result<Self, ChannelError> {
        let fail = |source| ChannelError::Listen {
            path: path.into(),
            source,
        };
        // The kernel would choose a name of its own, which no file mode guards.
        if path.as_os_str().is_empty() {
            return Err(ChannelError::NoPath);
        }
        if path.as_os_str().len() > MAX_PATH {
            return Err(ChannelError::LongPath { path: path.into() });
        }
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(ChannelError::NotASocket { path: path.into() });
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(fail)?;
                }
                // Connected, or it is there and busy, or not ours to judge.
                _ => return Err(ChannelError::InUse { path: path.into() }),
            },
            Err(_) => {}
        }
        let mask = sys::umask(0o177);
        let listener = UnixListener::bind(path);
        sys::umask(mask);
        let listener = listener.map_err(fail)?;
        // So that accept does not wait for a peer that has gone again.
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Self::Listener(listener))
    }

    /// The descriptor on which the first byte of vhost-user, or a connection, comes in.
    pub fn vhost_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Inherited { vhost, .. } => vhost.as_fd(),
            Self::Listener(listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("bh-channels-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = scratch("stale");
        let path = dir.join("s");
        let first = Channels::listen(&path).unwrap();
        assert!(matches!(
            Channels::listen(&path),
            Err(ChannelError::InUse { .. })
        ));
        drop(first);
        assert!(path.exists());
        Channels::listen(&path).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_path_that_is_none_is_refused() {
        assert!(matches!(
            Channels::listen(Path::new("")),
            Err(ChannelError::NoPath)
        ));
        let long = PathBuf::from("/tmp/".to_owned() + &"x".repeat(103));
        let error = Channels::listen(&long).unwrap_err().to_string();
        assert!(error.contains("at most 107 bytes"), "{error}");
    }

    #[test]
    fn a_file_in_the_way_is_kept() {
        let dir = scratch("file");
        let path = dir.join("f");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Channels::listen(&path),
            Err(ChannelError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            Channels::listen(&dir.join("no/such")),
            Err(ChannelError::Listen { .. })
        ));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
