//! Drives a device process through the life of a driver: activation at DRIVER_OK, reset,
//! interrupt vectors, and the same again for a successor that goes on where the process
//! before it ended (vhost-user protocol, "Ring states", "Inflight I/O tracking"; VIRTIO 1.2
//! section 3.1).
//!
//! vCPU threads and the thread that brings a successor in call this under the function's
//! lock; every call is over by its deadline.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::common::{CommonConfig, Queue};
use super::doorbell::Doorbells;
use super::ring::{self, Indices};
use crate::pci::{Msix, NO_VECTOR};
use crate::vhost_user::{
    Deadline, Frontend, Geometry, InflightRegion, MemoryMap, MemoryRegion, RingAddresses,
    VhostUserError,
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
    /// Requests were in flight when the process before this one ended, and there is no log
    /// that says which.
    #[error("nobody knows which requests of queue {0} the last back-end had in flight")]
    Unknown(u16),
    /// The device process refused or failed.
    #[error(transparent)]
    Backend(#[from] VhostUserError),
    /// It did after the first ring had been let go: it may have served requests.
    #[error(transparent)]
    Lost(VhostUserError),
}

/// Which of the driver's queues the device process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Those below this one.
    pub served: u16,
    /// Those below this one are enabled.
    pub enabled: u16,
}

/// A ring, checked and ready to be handed over.
#[derive(Clone, Copy, Debug)]
struct Ring {
    index: u16,
    size: u16,
    vector: u16,
    base: u16,
    addresses: RingAddresses,
    enabled: bool,
}

/// The device process as the function sees it.
pub struct Backend {
    frontend: Option<Frontend>,
    memory: Arc<dyn MemoryMap>,
    doorbells: Arc<Doorbells>,
    msix: Arc<Msix>,
    errors: Arc<[Arc<OwnedFd>]>,
    /// Signalled in vain by queues without a vector.
    nowhere: OwnedFd,
    device_type: u16,
    /// Unsealed in-flight regions are accepted.
    external: bool,
    geometry: Geometry,
    /// Queues that were handed to the device process.
    started: Vec<u16>,
    /// Rings of this driver have been handed to some process: they may have moved on.
    touched: bool,
    inflight: Option<InflightRegion>,
    /// Rings that had nothing in flight when the process before hung up, and their used index
    /// then: what became available since, no process has seen.
    idle: Vec<(u16, u16)>,
    /// Memory regions that the present process was told of, by address.
    told: Vec<MemoryRegion>,
    /// Requests that it had in flight when the present process took it over.
    resubmitted: u64,
}

/// What a [`Backend`] is made of beside its process.
pub struct Parts {
    pub memory: Arc<dyn MemoryMap>,
    pub doorbells: Arc<Doorbells>,
    pub msix: Arc<Msix>,
    pub errors: Arc<[Arc<OwnedFd>]>,
    pub device_type: u16,
    pub external: bool,
    pub geometry: Geometry,
}

impl Backend {
    pub fn new(frontend: Option<Frontend>, parts: Parts) -> std::io::Result<Self> {
        Ok(Self {
            frontend,
            memory: parts.memory,
            doorbells: parts.doorbells,
            msix: parts.msix,
            errors: parts.errors,
            nowhere: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            device_type: parts.device_type,
            external: parts.external,
            geometry: parts.geometry,
            started: Vec::new(),
            touched: false,
            inflight: None,
            idle: Vec::new(),
            told: Vec::new(),
            resubmitted: 0,
        })
    }

    /// The process that is there now.
    pub fn frontend(&mut self) -> Result<&mut Frontend, VhostUserError> {
        self.frontend.as_mut().ok_or(VhostUserError::Broken)
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<dyn MemoryMap> {
        &self.memory
    }

    /// Puts another process in the place of the one that was there; no ring runs.
    pub fn replace(&mut self, frontend: Option<Frontend>) -> Option<Frontend> {
        self.started.clear();
        self.told.clear();
        std::mem::replace(&mut self.frontend, frontend)
    }

    /// Queues that the device process serves now.
    pub fn started(&self) -> &[u16] {
        &self.started
    }

    /// Requests in flight that the present process makes again.
    pub fn resubmitted(&self) -> u64 {
        self.resubmitted
    }

    /// Whether there is a log of requests in flight.
    pub fn logged(&self) -> bool {
        self.inflight.is_some()
    }

    /// Checks where the driver has put its rings, without asking anybody.
    pub fn check(&self, common: &CommonConfig) -> Result<(), StartError> {
        let regions = self.memory.regions();
        for (index, queue) in common.queues().filter(|(_, queue)| queue.enabled) {
            place(queue, &regions).ok_or(StartError::BadRing(index))?;
        }
        Ok(())
    }

    /// Hands memory and the enabled queues to the device process: each from where
    /// `stopped` says that the process before stopped, else from where the ring says that
    /// it ended, else from the start.
    pub fn start(
        &mut self,
        common: &CommonConfig,
        shape: Shape,
        stopped: &[(u16, u16)],
        deadline: Deadline,
    ) -> Result<(), StartError> {
        let regions = self.memory.regions();
        let rings = self.rings(common, shape, stopped, &regions)?;
        let (geometry, external) = (self.geometry, self.external);
        let frontend = self.frontend.as_mut().ok_or(VhostUserError::Broken)?;
        frontend.set_features(common.accepted(), deadline)?;
        if frontend.has_inflight() {
            self.resubmitted = 0;
            let region = match self.inflight.take() {
                Some(region) => {
                    self.resubmitted = region.in_flight();
                    region
                }
                None => frontend.get_inflight_fd(geometry, external, deadline)?,
            };
            // Kept from here on: a process that fails half way has a successor.
            let region = self.inflight.insert(region);
            frontend.set_inflight_fd(region, deadline)?;
        } else {
            self.inflight = None;
        }
        frontend.set_mem_table(&regions, deadline)?;
        self.told.clone_from(&regions);
        for ring in &rings {
            // Before the first message, so that a failure half way is cleaned up too.
            self.started.push(ring.index);
            self.touched = true;
            self.describe_ring(*ring, deadline)?;
        }
        self.frontend()?.barrier(deadline)?;
        // Up to here no request was taken, so that another process may yet be the one to do so.
        self.idle.clear();
        self.let_go(&rings, deadline).map_err(StartError::Lost)
    }

    /// Takes memory back that is gone since the process was told last, where rings of it run:
    /// once this returns, it does not touch that any more.
    pub fn take_back_memory(&mut self, deadline: Deadline) -> Result<(), VhostUserError> {
        if self.started.is_empty() {
            return Ok(());
        }
        let now = self.memory.regions();
        let before = self.told.clone();
        for region in before.iter().filter(|r| !now.iter().any(|n| same(r, n))) {
            let frontend = self.frontend.as_mut().ok_or(VhostUserError::Broken)?;
            frontend.remove_mem_region(region, deadline)?;
            self.told.retain(|told| !same(told, region));
        }
        Ok(())
    }

    /// Tells the process of memory that has come since it was told last, where rings of it
    /// run: one without is told of everything when they start.
    pub fn hand_over_memory(&mut self, deadline: Deadline) -> Result<(), VhostUserError> {
        if self.started.is_empty() {
            return Ok(());
        }
        for region in &self.memory.regions() {
            if self.told.iter().any(|told| same(told, region)) {
                continue;
            }
            let frontend = self.frontend.as_mut().ok_or(VhostUserError::Broken)?;
            if frontend.memory_slots() < self.told.len() as u64 + 1 {
                return Err(VhostUserError::Unsupported("memory regions one by one"));
            }
            frontend.add_mem_region(region, deadline)?;
            frontend.barrier(deadline)?;
            self.told.push(region.clone());
        }
        Ok(())
    }

    fn let_go(&mut self, rings: &[Ring], deadline: Deadline) -> Result<(), VhostUserError> {
        for ring in rings {
            let frontend = self.frontend()?;
            frontend.set_vring_enable(ring.index, ring.enabled, deadline)?;
        }
        self.frontend()?.barrier(deadline)
    }

    /// The rings to hand over, each with the index at which to go on.
    fn rings(
        &self,
        common: &CommonConfig,
        shape: Shape,
        stopped: &[(u16, u16)],
        regions: &[MemoryRegion],
    ) -> Result<Vec<Ring>, StartError> {
        // A log that the new process cannot read is none.
        let logged =
            self.inflight.is_some() && self.frontend.as_ref().is_some_and(Frontend::has_inflight);
        let mut rings = Vec::new();
        for (index, queue) in common.queues().filter(|(_, queue)| queue.enabled) {
            let addresses = place(queue, regions).ok_or(StartError::BadRing(index))?;
            if index >= shape.served {
                continue;
            }
            let base = match stopped.iter().find(|(at, _)| *at == index) {
                Some((_, base)) => *base,
                None if !self.touched => 0,
                None => {
                    let Indices { available, used } =
                        ring::indices(self.memory.memory(), &addresses)
                            .ok_or(StartError::BadRing(index))?;
                    let in_order = super::kinds::in_order(self.device_type, index);
                    let idle = self.idle.contains(&(index, used));
                    if !logged && !in_order && available != used && !idle {
                        return Err(StartError::Unknown(index));
                    }
                    used
                }
            };
            rings.push(Ring {
                index,
                size: queue.size,
                vector: queue.vector,
                base,
                addresses,
                enabled: index < shape.enabled,
            });
        }
        Ok(rings)
    }

    fn describe_ring(&mut self, ring: Ring, deadline: Deadline) -> Result<(), StartError> {
        let missing = VhostUserError::Unencodable("a queue without eventfds");
        let kick = self.doorbells.kick(ring.index);
        let error = self.errors.get(usize::from(ring.index)).map(AsFd::as_fd);
        let (Some(kick), Some(error)) = (kick, error) else {
            return Err(missing.into());
        };
        let call = call_event(&self.msix, &self.nowhere, ring.vector);
        let index = ring.index;
        let frontend = self.frontend.as_mut().ok_or(VhostUserError::Broken)?;
        frontend.set_vring_num(index, ring.size, deadline)?;
        frontend.set_vring_addr(index, ring.addresses, deadline)?;
        frontend.set_vring_base(index, ring.base, deadline)?;
        frontend.set_vring_err(index, error, deadline)?;
        frontend.set_vring_call(index, call, deadline)?;
        frontend.set_vring_kick(index, kick, deadline)?;
        Ok(())
    }

    /// How far the rings that the device process serves have come, as memory has it.
    pub fn progress(&self, common: &CommonConfig) -> Vec<(u16, Indices)> {
        let regions = self.memory.regions();
        common
            .queues()
            .filter(|(index, queue)| queue.enabled && self.started.contains(index))
            .filter_map(|(index, queue)| {
                let addresses = place(queue, &regions)?;
                Some((index, ring::indices(self.memory.memory(), &addresses)?))
            })
            .collect()
    }

    /// Takes every queue back and says where each has stopped; on success the device
    /// process no longer touches memory.
    pub fn stop(&mut self, deadline: Deadline) -> Result<Vec<(u16, u16)>, VhostUserError> {
        let mut bases = Vec::new();
        for index in std::mem::take(&mut self.started) {
            let frontend = self.frontend()?;
            frontend.set_vring_enable(index, false, deadline)?;
            bases.push((index, frontend.get_vring_base(index, deadline)?));
        }
        Ok(bases)
    }

    /// Somebody else has given requests back, of which the log of those in flight knows nothing: a
    /// successor is given a new one.
    pub fn drop_log(&mut self) {
        self.inflight = None;
    }

    /// The driver has reset the device: nothing of its rings counts any more.
    pub fn forget(&mut self) {
        self.started.clear();
        self.touched = false;
        self.inflight = None;
        self.idle.clear();
    }

    /// The process has hung up: remembers which of its rings have nothing in flight. To be
    /// called as soon as that is known, before the driver adds more.
    pub fn note_idle(&mut self, common: &CommonConfig) {
        self.idle = self
            .progress(common)
            .into_iter()
            .filter(|(_, at)| at.available == at.used)
            .map(|(index, at)| (index, at.used))
            .collect();
    }

    /// Enables or disables a queue that the device process has.
    pub fn enable(
        &mut self,
        queue: u16,
        on: bool,
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        if !self.started.contains(&queue) {
            return Ok(());
        }
        self.frontend()?.set_vring_enable(queue, on, deadline)
    }

    /// Whether a ring can be disabled; else it can be stopped.
    pub fn can_disable(&self) -> bool {
        self.frontend.as_ref().is_none_or(Frontend::can_disable)
    }

    /// Enables or disables those below this one. Once this returns, the device process touches
    /// no ring that is disabled.
    pub fn enable_below(
        &mut self,
        queues: u16,
        on: bool,
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        for queue in 0..queues {
            self.enable(queue, on, deadline)?;
        }
        self.frontend()?.barrier(deadline)
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
        let frontend = self.frontend.as_mut().ok_or(VhostUserError::Broken)?;
        frontend.set_vring_call(queue, call, deadline)?;
        frontend.barrier(deadline)
    }

    /// Greets a process that took over: what arrived meanwhile is looked at, and what was
    /// completed without an interrupt is seen.
    pub fn greet(&self, common: &CommonConfig) {
        for (index, queue) in common.queues().filter(|(at, _)| self.started.contains(at)) {
            self.doorbells.ring(usize::from(index));
            if queue.vector != NO_VECTOR {
                self.doorbells.call(queue.vector);
            }
        }
    }

    /// Ends the connection.
    pub fn shut_down(&mut self) {
        self.started.clear();
        if let Some(frontend) = &mut self.frontend {
            frontend.shut_down();
        }
    }
}

/// Regions never overlap: where one begins tells it from others.
fn same(a: &MemoryRegion, b: &MemoryRegion) -> bool {
    a.guest_base == b.guest_base
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
