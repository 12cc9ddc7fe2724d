//! Drives a device process through the life of a driver: activation at DRIVER_OK, reset,
//! interrupt vectors, device-specific configuration (vhost-user protocol, "Ring states";
//! VIRTIO 1.2 sections 3.1 and 2.4).
//!
//! vCPU threads call this under the function's lock; every call is over by its deadline.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::common::{CommonConfig, Queue};
use super::doorbell::Doorbells;
use super::{ConfigSource, registers};
use crate::pci::{Msix, NO_VECTOR};
use crate::vhost_user::{
    Deadline, Frontend, MemoryMap, MemoryRegion, RingAddresses, VhostUserError,
};

const DESCRIPTOR_SIZE: u64 = 16;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
/// Flags, index and event index around the entries of a ring.
const RING_OVERHEAD: u64 = 6;

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The driver put a ring where it cannot be.
    #[error("queue {0} is misaligned or outside memory")]
    BadRing(u16),
    /// The device process refused or failed.
    #[error(transparent)]
    Backend(#[from] VhostUserError),
}

/// The descriptors that a queue's device shares.
struct QueueEvents<'a> {
    kick: BorrowedFd<'a>,
    call: BorrowedFd<'a>,
    error: BorrowedFd<'a>,
}

/// The device process as the function sees it.
pub struct Backend {
    frontend: Frontend,
    memory: Arc<dyn MemoryMap>,
    doorbells: Arc<Doorbells>,
    msix: Arc<Msix>,
    errors: Arc<[OwnedFd]>,
    /// Signalled in vain by queues without a vector.
    nowhere: OwnedFd,
    /// Queues that were handed to the device process.
    started: Vec<u16>,
    config: Vec<u8>,
    config_writable: bool,
}

impl Backend {
    pub fn new(
        frontend: Frontend,
        memory: Arc<dyn MemoryMap>,
        doorbells: Arc<Doorbells>,
        msix: Arc<Msix>,
        errors: Arc<[OwnedFd]>,
        config: &ConfigSource,
    ) -> std::io::Result<Self> {
        let (config, config_writable) = match config {
            ConfigSource::Fixed(bytes) => (bytes.clone(), false),
            ConfigSource::Backend(size) => (vec![0; *size], frontend.has_config()),
        };
        Ok(Self {
            frontend,
            memory,
            doorbells,
            msix,
            errors,
            nowhere: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            started: Vec::new(),
            config,
            config_writable,
        })
    }

    /// The device-specific configuration as last fetched.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Fetches the device-specific configuration anew.
    pub fn refresh_config(&mut self, deadline: Deadline) -> Result<(), VhostUserError> {
        if self.config_writable && !self.config.is_empty() {
            self.config = self.frontend.get_config(self.config.len(), deadline)?;
        }
        Ok(())
    }

    /// The driver wrote to the device-specific configuration. Writes past its end and to
    /// a fixed one are ignored.
    pub fn write_config(
        &mut self,
        offset: usize,
        data: &[u8],
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        let end = offset.saturating_add(data.len());
        let (true, Ok(at)) = (self.config_writable, u32::try_from(offset)) else {
            return Ok(());
        };
        if self.config.get(offset..end).is_none() {
            return Ok(());
        }
        self.frontend.set_config(at, data, deadline)?;
        // What the device makes of it is its own affair: read it back.
        self.refresh_config(deadline)
    }

    /// Hands memory and the enabled queues to the device process.
    pub fn start(&mut self, common: &CommonConfig, deadline: Deadline) -> Result<(), StartError> {
        let regions = self.memory.regions();
        let mut rings = Vec::new();
        for (index, queue) in common.queues().filter(|(_, queue)| queue.enabled) {
            let ring = place(queue, &regions).ok_or(StartError::BadRing(index))?;
            rings.push((index, queue.size, queue.vector, ring));
        }
        self.frontend.set_features(common.accepted(), deadline)?;
        self.frontend.set_mem_table(&regions, deadline)?;
        for (index, size, vector, ring) in rings {
            // Before the first message, so that a failure half way is cleaned up too.
            self.started.push(index);
            self.start_queue(index, size, vector, ring, deadline)?;
        }
        self.frontend.barrier(deadline)?;
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: u16,
        size: u16,
        vector: u16,
        ring: RingAddresses,
        deadline: Deadline,
    ) -> Result<(), StartError> {
        let missing = VhostUserError::Unencodable("a queue without eventfds");
        let kick = self.doorbells.kick(index);
        let error = self.errors.get(usize::from(index)).map(AsFd::as_fd);
        let (Some(kick), Some(error)) = (kick, error) else {
            return Err(missing.into());
        };
        let call = call_event(&self.msix, &self.nowhere, vector);
        let events = QueueEvents { kick, call, error };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, size, deadline)?;
        frontend.set_vring_addr(index, ring, deadline)?;
        frontend.set_vring_base(index, 0, deadline)?;
        frontend.set_vring_err(index, events.error, deadline)?;
        frontend.set_vring_call(index, events.call, deadline)?;
        frontend.set_vring_kick(index, events.kick, deadline)?;
        frontend.set_vring_enable(index, true, deadline)?;
        Ok(())
    }

    /// Takes every queue back; on success the device process no longer touches memory.
    pub fn stop(&mut self, deadline: Deadline) -> Result<(), VhostUserError> {
        for index in std::mem::take(&mut self.started) {
            self.frontend.set_vring_enable(index, false, deadline)?;
            self.frontend.get_vring_base(index, deadline)?;
        }
        Ok(())
    }

    /// A running queue has another interrupt vector.
    pub fn set_vector(
        &mut self,
        queue: u16,
        vector: u16,
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        if !self.started.contains(&queue) {
            return Ok(());
        }
        let call = call_event(&self.msix, &self.nowhere, vector);
        self.frontend.set_vring_call(queue, call, deadline)?;
        self.frontend.barrier(deadline)
    }

    /// Ends the connection.
    pub fn shut_down(&mut self) {
        self.started.clear();
        self.frontend.shut_down();
    }
}

fn call_event<'a>(msix: &'a Msix, nowhere: &'a OwnedFd, vector: u16) -> BorrowedFd<'a> {
    let vector = (vector != NO_VECTOR).then_some(vector);
    vector
        .and_then(|vector| msix.event(vector))
        .unwrap_or_else(|| nowhere.as_fd())
}

/// Checks a queue's three parts: aligned (VIRTIO 1.2 section 2.7) and each within one
/// memory region, as the device process maps them one by one.
fn place(queue: &Queue, regions: &[MemoryRegion]) -> Option<RingAddresses> {
    let size = u64::from(queue.size);
    let inside = |start: u64, align: u64, length: Option<u64>| {
        let length = length?;
        let fits = |region: &MemoryRegion| {
            start
                .checked_sub(region.guest_base)
                .and_then(|offset| offset.checked_add(length))
                .is_some_and(|end| end <= region.size)
        };
        (start.is_multiple_of(align) && regions.iter().any(fits)).then_some(start)
    };
    let length = |entry: u64, extra: u64| size.checked_mul(entry)?.checked_add(extra);
    Some(RingAddresses {
        descriptor: inside(queue.descriptor, 16, length(DESCRIPTOR_SIZE, 0))?,
        available: inside(queue.driver, 2, length(AVAILABLE_ENTRY, RING_OVERHEAD))?,
        used: inside(queue.device, 4, length(USED_ENTRY, RING_OVERHEAD))?,
    })
}

/// The features to offer of what a device process offers.
pub fn offered(features: u64) -> u64 {
    features & registers::PASSED_ON
}
