//! What a function is made of, and what a back-end must offer to serve it. Checked when
//! the machine is made (manager thread) and again for each successor of a back-end.

use std::time::Duration;

use super::kinds;
use super::registers::{F_VERSION_1, PASSED_ON, net};
use super::{DEFAULT_OPERATION_TIMEOUT, DEFAULT_QUEUE_SIZE, VirtioError};
use crate::threads::{ThreadHook, no_hook};
use crate::vhost_user::Frontend;

/// The most queues of a function: one MSI-X vector each and one for configuration.
pub const MAX_QUEUES: u16 = 255;
/// The largest queue that may be offered.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The most queue pairs of a network device whose control queue the VMM serves.
pub const MAX_NET_PAIRS: u16 = 127;
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
#[derive(Clone)]
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
    /// Limit on a whole activation, reset or replacement of the back-end.
    pub operation_timeout: Duration,
    /// A back-end that is lost will have a successor: losing it suspends the function
    /// instead of failing it.
    pub successor: bool,
    /// The back-end is somebody else's program.
    pub external: bool,
    /// The I/O of a process can outlive it: a driver's reset after its loss is not seen as
    /// complete before [`quiesced`](super::VirtioPciFunction::quiesced) has been called, or
    /// a successor serves. Without it a reset after a loss is complete at once.
    pub fenced: bool,
    /// The VMM serves the control queue of this network device with so many queue pairs,
    /// as external back-ends do not; the control queue is the last one.
    pub net_control: Option<u16>,
    /// What to offer while no back-end has ever been there; one that comes must offer it
    /// all. `None`: the function cannot be made without its back-end.
    pub assumed_features: Option<u64>,
    /// Run first on each thread of the function's own: the thread's system call filter.
    pub hook: ThreadHook,
}

impl VirtioPciOptions {
    /// The usual options for a device process of ours; its configuration comes from it.
    pub fn new(id: &str, device_type: u16, queues: u16) -> Self {
        Self {
            id: id.to_owned(),
            device_type,
            queues,
            queue_size: DEFAULT_QUEUE_SIZE,
            config: ConfigSource::Backend(kinds::config_size(device_type)),
            operation_timeout: DEFAULT_OPERATION_TIMEOUT,
            successor: false,
            external: false,
            fenced: false,
            net_control: None,
            assumed_features: None,
            hook: no_hook(),
        }
    }

    /// The options for somebody else's back-end, which may be restarted at any time. With
    /// `config` it is the VMM that has the configuration space.
    pub fn external(id: &str, device_type: u16, queues: u16, config: Option<Vec<u8>>) -> Self {
        let mut options = Self::new(id, device_type, queues);
        options.successor = true;
        options.external = true;
        if let Some(bytes) = config {
            options.config = ConfigSource::Fixed(bytes);
        }
        options
    }

    /// The options for a switch, or any other network back-end of somebody else's, that
    /// serves up to `pairs` queue pairs: configuration space (`mtu` 0: not said) and
    /// control queue are the VMM's, and the link is up while the back-end is there.
    pub fn external_net(id: &str, mac: [u8; 6], pairs: u16, mtu: u16) -> Self {
        let mut config = mac.to_vec();
        for field in [0, pairs, mtu] {
            config.extend_from_slice(&field.to_le_bytes());
        }
        let mq = if pairs > 1 { net::F_MQ } else { 0 };
        let mut options = Self::external(id, kinds::NET, 0, Some(config)).net_control(pairs);
        // What every switch in use offers.
        options.assumed_features = Some(F_VERSION_1 | net::F_MRG_RXBUF | mq);
        options
    }

    /// Has the VMM serve the control queue of a network device with `pairs` queue pairs.
    #[must_use]
    pub fn net_control(mut self, pairs: u16) -> Self {
        self.queues = pairs.saturating_mul(2).saturating_add(1);
        self.net_control = Some(pairs);
        self
    }

    /// What to offer to the driver in front of a back-end with these features.
    pub(super) fn offer(&self, backend: u64) -> u64 {
        let passed = backend & PASSED_ON & !kinds::withheld(self.device_type, self.config_size());
        let Some(pairs) = self.net_control else {
            return passed;
        };
        let mut ours = net::F_MAC | net::F_STATUS | net::F_CTRL_VQ | net::F_GUEST_ANNOUNCE;
        if let ConfigSource::Fixed(bytes) = &self.config
            && bytes.get(10..12).is_some_and(|mtu| mtu != [0, 0])
        {
            ours |= net::F_MTU;
        }
        if pairs > 1 {
            ours |= backend & net::F_MQ;
        }
        passed & !net::CONTROLLED | ours
    }

    fn config_size(&self) -> usize {
        match &self.config {
            ConfigSource::Backend(size) => *size,
            ConfigSource::Fixed(bytes) => bytes.len(),
        }
    }

    /// Checks the options against their limits.
    pub(super) fn check(&self) -> Result<(), VirtioError> {
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
        if let Some(pairs) = self.net_control
            && !(1..=MAX_NET_PAIRS).contains(&pairs)
        {
            return bad("the number of queue pairs", pairs.into(), "1 to 127");
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
        let config_size = self.config_size();
        if config_size > MAX_CONFIG {
            return bad("configuration size", config_size as u64, "0 to 256");
        }
        Ok(())
    }

    /// Checks that a back-end can serve this function at all.
    pub(super) fn check_backend(&self, frontend: &Frontend) -> Result<(), VirtioError> {
        let too_many = |asked, limit| {
            let id = self.id.clone();
            Err(VirtioError::TooManyQueues { id, asked, limit })
        };
        let limit = frontend.queue_limit();
        let asked = match self.net_control {
            Some(pairs) if pairs > 1 && frontend.features() & net::F_MQ == 0 => {
                return too_many(pairs, 1);
            }
            // Network back-ends count pairs, not queues, as QEMU makes them; without the
            // protocol's MQ there is one.
            Some(pairs) => match limit {
                None if pairs > 1 => return too_many(pairs, 1),
                _ => pairs,
            },
            None if self.device_type == kinds::NET => self.queues / 2,
            None => self.queues,
        };
        if let Some(limit) = limit
            && limit < asked
        {
            return too_many(asked, limit);
        }
        if frontend.features() & F_VERSION_1 == 0 {
            return Err(VirtioError::Legacy(self.id.clone()));
        }
        if matches!(self.config, ConfigSource::Backend(1..)) && !frontend.has_config() {
            return Err(VirtioError::NoConfig(self.id.clone()));
        }
        Ok(())
    }
}
