//! What is asked of the launcher and what it reports.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::launcher::sys::ExitOutcome;

/// How a path is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading.
    Read,
    /// For reading and writing.
    ReadWrite,
    /// For appending; created where it is absent.
    Append,
}

/// What was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedInfo {
    /// O_DIRECT is in force.
    pub direct: bool,
    /// Size in bytes, of a block device too; 0 for other devices.
    pub size: u64,
    /// It is a block device.
    pub block_device: bool,
    /// One that is open for writing and can erase securely.
    pub secure_erase: bool,
}

/// A device process to start.
#[derive(Debug)]
pub struct SpawnSpec {
    /// Its id: 1 to 64 of letters, digits, '.', '_', '-'.
    pub device_id: String,
    /// File name of its binary, one of `LauncherConfig::devices`.
    pub binary: String,
    /// Name of the seccomp policy of its steady state: the binary's, with a variant.
    pub policy: String,
    /// Arguments after argv[0].
    pub args: Vec<String>,
    /// Tells it apart from its predecessors of the same id.
    pub incarnation: u64,
    /// Descriptors of its own, which it finds from 5 on.
    pub fds: Vec<OwnedFd>,
    /// Path of its own socket: give it a channel behind them, by which it asks for connections
    /// to the listeners at `<path>_<port>`.
    pub dial: Option<PathBuf>,
    /// Give it the write end of a pipe behind that, to learn when all of its I/O has ended.
    pub fence: bool,
}

/// A device process that has been executed. It ends when it is killed or the launcher
/// ends; dropping this closes its channels only.
#[derive(Debug)]
pub struct SpawnedDevice {
    /// Its pid as the VMM sees it.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Our end of its fd 3 (blocking).
    pub control: UnixStream,
    /// Our end of its fd 4 (blocking).
    pub vhost: UnixStream,
    /// From request to exec in the launcher, microseconds.
    pub spawn_us: u64,
    /// If asked for: hangs up when nothing of it is left, nor of the I/O that it began.
    pub fence: Option<OwnedFd>,
}

/// What the launcher reports unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LauncherEvent {
    /// A device process has ended.
    Exited {
        /// Its id.
        device_id: String,
        /// Its incarnation.
        incarnation: u64,
        /// How.
        outcome: ExitOutcome,
        /// What it said last on stderr, if anything: one line, escaped, as hostile as it is.
        last_line: String,
        /// Whoever started it knows, and nothing follows.
        buried: bool,
    },
    /// An answer to [`Launcher::begin_grow`].
    Grown {
        /// What that returned.
        ticket: u64,
        /// The size in bytes that the file has, or why it could not be grown.
        result: Result<u64, String>,
    },
    /// An answer to [`Launcher::begin_place`].
    Placed {
        /// What that returned.
        ticket: u64,
        /// Limits that are not enforced and why, or why nothing was changed.
        result: Result<Vec<String>, String>,
    },
    /// An answer to [`Launcher::begin_connect`] or [`Launcher::begin_helper`]: what came
    /// along is at [`Launcher::take_linked`].
    Linked {
        /// What that returned.
        ticket: u64,
        /// Why not.
        result: Result<(), String>,
    },
}
