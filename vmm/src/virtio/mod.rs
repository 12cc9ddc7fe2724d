//! virtio over PCI (VIRTIO 1.2 section 4.1) in front of a device process that speaks
//! vhost-user, for any virtio device type.
//!
//! [`VirtioPciFunction`] is the PCI function; `common` is its common configuration
//! register file, `backend` drives the device process through the driver's life cycle,
//! `doorbell` wires notifications. vCPU threads enter by configuration space and BAR
//! accesses, the manager thread by [`VirtioPciFunction::on_event`].

mod backend;
mod capabilities;
mod common;
mod doorbell;
mod events;
mod function;
mod kinds;
mod registers;

use std::io;
use std::time::Duration;

pub use events::{EventSource, FailReason, Outcome, PollFd};
pub use function::{FunctionStatus, VirtioPciFunction};

use crate::pci::PciError;
use crate::vhost_user::{Frontend, VhostUserError};
use registers::F_VERSION_1;

/// The most queues of a function: one MSI-X vector each and one for configuration.
pub const MAX_QUEUES: u16 = 255;
/// The largest queue that may be offered.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The queue size that is offered unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// How long the device process may take for all of an activation or a reset.
pub const DEFAULT_OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_DEVICE_TYPE: u16 = 63;
const MAX_CONFIG: usize = 256;

/// Where the device-specific configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// The device process serves this many bytes by GET_CONFIG and SET_CONFIG.
    Backend(usize),
    /// These bytes; the driver cannot change them.
    Fixed(Vec<u8>),
}

/// What to make a function of.
#[derive(Clone, Debug)]
pub struct VirtioPciOptions {
    /// The device's name, for the API and for messages.
    pub id: String,
    /// Virtio device ID (VIRTIO 1.2 section 5), 1 to 63.
    pub device_type: u16,
    /// How many queues to offer, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Their size, a power of two up to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// The device-specific configuration.
    pub config: ConfigSource,
    /// Limit on a whole activation or reset.
    pub operation_timeout: Duration,
}

impl VirtioPciOptions {
    /// The usual options for a device type; its configuration comes from the device
    /// process.
    pub fn new(id: &str, device_type: u16, queues: u16) -> Self {
        Self {
            id: id.to_owned(),
            device_type,
            queues,
            queue_size: DEFAULT_QUEUE_SIZE,
            config: ConfigSource::Backend(kinds::config_size(device_type)),
            operation_timeout: DEFAULT_OPERATION_TIMEOUT,
        }
    }

    /// Checks the options against their limits and what the device process offers.
    fn check(&self, frontend: &Frontend) -> Result<(), VirtioError> {
        let bad = |what, value: u64, allowed| {
            Err(VirtioError::BadOption {
                id: self.id.clone(),
                what,
                value,
                allowed,
            })
        };
        if !(1..=MAX_DEVICE_TYPE).contains(&self.device_type) {
            return bad("device type", self.device_type.into(), "1 to 63");
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return bad("the number of queues", self.queues.into(), "1 to 255");
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > MAX_QUEUE_SIZE {
            return bad(
                "queue size",
                self.queue_size.into(),
                "the powers of two up to 1024",
            );
        }
        let config_size = match &self.config {
            ConfigSource::Backend(size) => *size,
            ConfigSource::Fixed(bytes) => bytes.len(),
        };
        if config_size > MAX_CONFIG {
            return bad("configuration size", config_size as u64, "0 to 256");
        }
        if let Some(limit) = frontend.queue_limit()
            && limit < self.queues
        {
            let (id, asked) = (self.id.clone(), self.queues);
            return Err(VirtioError::TooManyQueues { id, asked, limit });
        }
        if frontend.features() & F_VERSION_1 == 0 {
            return Err(VirtioError::Legacy(self.id.clone()));
        }
        Ok(())
    }
}

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
    #[error("device {id}: its process serves {limit} queues, not {asked}; ask for fewer")]
    TooManyQueues {
        /// The device.
        id: String,
        /// What was asked for.
        asked: u16,
        /// What there is.
        limit: u16,
    },
    /// Not a modern device.
    #[error("device {0}: its process does not offer VIRTIO_F_VERSION_1")]
    Legacy(String),
    /// The PCI side refused.
    #[error("device {0}: {1}")]
    Pci(String, #[source] PciError),
    /// The device process failed while it was asked.
    #[error("device {0}: {1}")]
    Backend(String, #[source] VhostUserError),
    /// The kernel refused.
    #[error("device {0}: {1}")]
    Io(String, #[source] io::Error),
}
