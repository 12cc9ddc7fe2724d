//! virtio over PCI (VIRTIO 1.2 section 4.1) in front of a device process, or of any other
//! back-end, that speaks vhost-user, for any virtio device type.
//!
//! [`VirtioPciFunction`] is the PCI function. `access` is what the guest reaches of it,
//! with `common` as its common configuration register file and `device_config` as its
//! device-specific one; `backend` drives the process through the driver's life cycle;
//! `link` is the tie to the process, and `succession` puts another one in its place;
//! `doorbell` wires notifications; `control` is the control queue of network back-ends that
//! do not serve it, and `carrier` their link; `stand_in` answers it where a process of ours
//! was given up, and has `sink` take what is sent by a console.
//!
//! # Threads
//!
//! vCPU threads enter by configuration space and BAR accesses. The manager thread calls
//! what this page names below, and none of it waits: [`new`](VirtioPciFunction::new) apart,
//! which asks the process for its configuration. Each function has a thread `doorbell` and a
//! thread `device`, which alone speaks to the back-end once the function is made: both are made
//! with the function, confined before they do anything, and run
//! [`hook`](VirtioPciOptions::hook) first.
//!
//! # A back-end that comes and goes
//!
//! | event | what the manager does |
//! |---|---|
//! | [`Outcome::Suspended`] | takes [`link_fds`](VirtioPciFunction::link_fds) out of its epoll set, ends a process of ours, and looks for another back-end |
//! | a connection to another back-end | [`adopt`](VirtioPciFunction::adopt) |
//! | [`Outcome::Reconnected`] | puts the new `link_fds` into its epoll set |
//! | [`Outcome::NotReconnected`] | reports it, and tries again later |
//! | no more attempts | [`fail`](VirtioPciFunction::fail): the driver is told to reset the device |
//! | a process that ends, or is known to have hung | [`suspend`](VirtioPciFunction::suspend), where the end of its socket does not say so |
//! | the end of all I/O of a lost process | [`quiesced`](VirtioPciFunction::quiesced), for [`fenced`](VirtioPciOptions::fenced) functions |
//!
//! A thread of its own that may wait can call [`reconnect`](VirtioPciFunction::reconnect)
//! instead of `adopt`; one back-end may be replaced by another while it serves.
//!
//! # Somebody else's back-ends
//!
//! [`VirtioPciOptions::external`] and [`VirtioPciOptions::external_net`] are the options for
//! them. The latter's function may be made before its back-end is there (`None` for the
//! front-end); [`set_link`](VirtioPciFunction::set_link) takes its link up and down.

mod access;
mod backend;
mod capabilities;
mod carrier;
mod common;
mod control;
mod device_config;
mod doorbell;
mod events;
mod function;
mod kinds;
mod link;
mod options;
mod registers;
mod ring;
mod service;
mod sink;
mod stand_in;
mod succession;

use std::io;
use std::time::Duration;

pub use events::{EventSource, FailReason, Outcome, PollFd};
pub use function::{FunctionStatus, VirtioPciFunction};
pub use options::{ConfigSource, MAX_NET_PAIRS, MAX_QUEUE_SIZE, MAX_QUEUES, VirtioPciOptions};
pub use ring::Indices;
pub use succession::{ReconnectError, Reconnected};

use crate::pci::PciError;
use crate::vhost_user::VhostUserError;

/// The queue size that is offered unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// How long the device process may take for all of an activation or a reset.
pub const DEFAULT_OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one message to a successor may take.
const DEFAULT_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// An option outside its limits.
    #[error("device {id}: {what} {value} is outside {allowed}")]
    BadOption {
        /// The device.
        id: String,
        /// Which option.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        allowed: &'static str,
    },
    /// The device process serves fewer queues than asked for.
    #[error("device {id}: its back-end {}", too_few(*limit, *asked))]
    TooManyQueues {
        /// The device.
        id: String,
        /// What was asked for.
        asked: u16,
        /// What there is.
        limit: u16,
    },
    /// Not a modern device.
    #[error("device {0}: its back-end does not offer VIRTIO_F_VERSION_1")]
    Legacy(String),
    /// Nobody serves a configuration space.
    #[error(
        "device {0}: its back-end serves no configuration space: give one by config=HEX, of a file system by tag=NAME"
    )]
    NoConfig(String),
    /// The features of a device are known only by its back-end.
    #[error("device {0}: its back-end is not there: start it first")]
    Absent(String),
    /// The PCI side refused.
    #[error("device {0}: {1}")]
    Pci(String, #[source] PciError),
    /// The device process failed while it was asked.
    #[error("device {0}: {1}")]
    Backend(String, #[source] VhostUserError),
    /// The kernel refused.
    #[error("device {0}: {1}{remedy}", remedy = remedy(.1))]
    Io(String, #[source] io::Error),
}

fn too_few(limit: u16, asked: u16) -> String {
    match limit {
        // A switch that was started and not told yet what its port is for.
        0 => format!("serves no queues yet, and {asked} are wanted; give it its port first"),
        _ => format!("serves {limit} queues, not {asked}; ask for fewer"),
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            ": the VMM may hold no more: give the devices fewer queues=, or raise the limit of open files (ulimit -n)"
        }
        Some(libc::ENFILE) => ": the host's file-max is reached",
        _ => "",
    }
}
