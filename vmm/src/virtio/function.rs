//! The PCI function: what it consists of, and what the manager thread asks of it.
//!
//! Locks: `config` (PCI configuration space) may be held while MSI-X and the BAR decoder
//! are called; `device` (virtio registers and the channel to the process) is held through
//! a whole activation, reset or replacement of the process, which a deadline bounds.
//! Neither is taken while the other is held. `space` (device-specific configuration) and
//! those inside [`Link`] are held for a few instructions only. The manager thread takes
//! neither of the first two: what it has to say travels by the others, by atomics and by
//! the VMM's own interrupt eventfd, so that no device process can hold it up.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use rustix::event::{EventfdFlags, eventfd};

use super::access::Bar0;
use super::backend::{Backend, Parts, Shape};
use super::capabilities::{Places, build};
use super::common::CommonConfig;
use super::control::NetControl;
use super::device_config::DeviceConfig;
use super::doorbell::Doorbells;
use super::events::{EventSource, FailReason, Outcome, PollFd};
use super::link::{Ends, Link, Presence};
use super::registers::{ISR_CONFIG, bar, status};
use super::ring::Indices;
use super::service::Service;
use super::{VirtioError, VirtioPciOptions};
use crate::hypervisor::Hypervisor;
use crate::pci::{BarClaim, BarDecoder, ConfigSpace, Msix};
use crate::vhost_user::{Deadline, Frontend, Geometry, MemoryMap, VhostUserError};

const EDGE: u32 = libc::EPOLLET as u32;

/// A function's state for the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionStatus {
    /// The device status register as the driver sees it.
    pub device_status: u8,
    /// The driver has taken the device into use.
    pub active: bool,
    /// The driver is told to reset the device.
    pub needs_reset: bool,
    /// Features that the driver accepted.
    pub features: u64,
    /// Why the device process was given up, if it was.
    pub failure: Option<FailReason>,
    /// Why a successor of the device process is waited for, if it is.
    pub awaiting: Option<FailReason>,
    /// A network device whose link the VMM keeps: whether it is up.
    pub link_up: Option<bool>,
    /// A network device whose control queue the VMM serves: queue pairs in use.
    pub queue_pairs: Option<u16>,
}

pub(super) struct Config {
    pub(super) space: ConfigSpace,
    pub(super) first: ConfigSpace,
    /// The function has left the bus: BARs stay off.
    pub(super) gone: bool,
}

pub(super) struct Device {
    pub(super) common: CommonConfig,
    pub(super) backend: Backend,
    pub(super) control: Option<NetControl>,
    /// Answers in the place of a process that was given up.
    pub(super) stand_in: Option<super::stand_in::StandIn>,
    /// What the status register shows of a reset until it is complete.
    pub(super) resetting: Option<u8>,
    /// Whether the link carries frames, as the back-end was told or will be.
    pub(super) carries: bool,
}

impl Device {
    /// Which queues the device process has.
    pub(super) fn shape(&self) -> Shape {
        match &self.control {
            Some(control) if self.carries => control.shape(self.common.accepted()),
            Some(control) => Shape {
                enabled: 0,
                served: match self.backend.can_disable() {
                    true => control.shape(self.common.accepted()).served,
                    false => 0,
                },
            },
            None => Shape {
                served: u16::MAX,
                enabled: u16::MAX,
            },
        }
    }
}

/// What is shared with the manager thread without a lock.
#[derive(Default)]
pub(super) struct Signals {
    pub(super) isr: AtomicU8,
    pub(super) generation: AtomicU8,
    /// The cached configuration is out of date.
    pub(super) stale: AtomicBool,
    /// The driver broke a ring, or the process refused one: only a reset repairs it.
    pub(super) broken: AtomicBool,
    /// What the last process had in flight may still write to guest memory.
    pub(super) unquiet: AtomicBool,
    /// The driver has reset the function after its process was given up.
    pub(super) reset_after_failure: AtomicBool,
    /// What the API wants of a network device's link.
    pub(super) link_down: AtomicBool,
    /// The rings carry frames, and nobody has asked for the link to go down since.
    pub(super) carried: AtomicBool,
    /// The driver is to announce itself once more after it has. Linux does it before it looks
    /// whether the link came up with the request, and then to no one.
    pub(super) announce_twice: AtomicBool,
    /// Copies for `status()`.
    pub(super) status: AtomicU8,
    pub(super) features: AtomicU64,
    pub(super) pairs: AtomicU64,
    /// Memory regions that the process takes one by one.
    pub(super) slots: AtomicU64,
}

/// A virtio device on PCI whose device side is a process that speaks vhost-user.
pub struct VirtioPciFunction {
    pub(super) options: VirtioPciOptions,
    pub(super) places: Places,
    pub(super) config: Mutex<Config>,
    pub(super) device: Mutex<Device>,
    pub(super) space: Mutex<DeviceConfig>,
    pub(super) bar: OnceLock<BarClaim>,
    pub(super) msix: Arc<Msix>,
    pub(super) doorbells: Arc<Doorbells>,
    errors: Arc<[Arc<OwnedFd>]>,
    pub(super) signals: Signals,
    pub(super) link: Link,
    pub(super) service: Service,
}

impl VirtioPciFunction {
    /// A function in front of the process behind `frontend`, which may map `memory` once
    /// a driver is up. It asks the process for its configuration. Without a front-end
    /// (`None`) the function waits for its first process, if the options say what to offer
    /// until then.
    ///
    /// Starts the function's threads: to be called before the process is confined to what
    /// a running machine needs.
    pub fn new(
        options: VirtioPciOptions,
        frontend: impl Into<Option<Frontend>>,
        memory: Arc<dyn MemoryMap>,
        hypervisor: Arc<dyn Hypervisor>,
        decoder: &Arc<BarDecoder>,
    ) -> Result<Arc<Self>, VirtioError> {
        let mut frontend = frontend.into();
        options.check()?;
        let id = options.id.clone();
        let io = |error: std::io::Error| VirtioError::Io(id.clone(), error);
        let backend_error = |error| VirtioError::Backend(id.clone(), error);
        let offered = match (&frontend, options.assumed_features) {
            (Some(frontend), _) => {
                options.check_backend(frontend)?;
                frontend.features()
            }
            (None, Some(assumed)) => assumed,
            (None, None) => return Err(VirtioError::Absent(id)),
        };
        let offered = options.offer(offered);

        let vectors = options.queues.saturating_add(1);
        let msix = Msix::new(vectors, Arc::clone(&hypervisor));
        let msix = Arc::new(msix.map_err(|error| VirtioError::Pci(id.clone(), error))?);
        let (pci_space, places) = build(options.device_type, options.queues, &msix)
            .map_err(|error| VirtioError::Pci(id.clone(), error))?;
        let hook = Arc::clone(&options.hook);
        let doorbells = Doorbells::new(options.queues, &msix, hypervisor, hook).map_err(io)?;
        let doorbells = Arc::new(doorbells);
        let errors = (0..options.queues)
            .map(|_| {
                let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
                Ok(Arc::new(event))
            })
            .collect::<std::io::Result<Arc<[Arc<OwnedFd>]>>>()
            .map_err(io)?;
        let mut space = DeviceConfig::new(&options.config);
        if let Some(frontend) = &mut frontend
            && space.served_size() > 0
        {
            let deadline = Deadline::after(options.operation_timeout);
            let bytes = frontend.get_config(space.served_size(), deadline);
            space.replace(bytes.map_err(backend_error)?);
        }
        let slots = frontend.as_ref().map_or(0, Frontend::memory_slots);
        let ends = frontend.as_mut().map(Ends::of).transpose();
        let link = Link::new(ends.map_err(backend_error)?);
        let parts = Parts {
            memory,
            doorbells: Arc::clone(&doorbells),
            msix: Arc::clone(&msix),
            errors: Arc::clone(&errors),
            device_type: options.device_type,
            external: options.external,
            geometry: Geometry {
                queues: options.queues,
                queue_size: options.queue_size,
            },
        };
        let backend = Backend::new(frontend, parts).map_err(io)?;
        let common = CommonConfig::new(offered, options.queues, options.queue_size, vectors);
        let control = options.net_control.map(NetControl::new);
        let service = Service::new().map_err(io)?;
        let listener = Arc::clone(&doorbells);
        let function = Arc::new(Self {
            options,
            places,
            config: Mutex::new(Config {
                first: pci_space.clone(),
                space: pci_space,
                gone: false,
            }),
            device: Mutex::new(Device {
                common,
                backend,
                control,
                stand_in: None,
                resetting: None,
                carries: true,
            }),
            space: Mutex::new(space),
            bar: OnceLock::new(),
            msix,
            doorbells,
            errors,
            signals: Signals {
                slots: AtomicU64::new(slots),
                carried: AtomicBool::new(true),
                ..Signals::default()
            },
            link,
            service,
        });
        function.follow_link();
        function.service.start(&function).map_err(io)?;
        let registers = Arc::new(Bar0(Arc::downgrade(&function)));
        function
            .bar
            .get_or_init(|| decoder.claim(bar::SIZE, registers, listener));
        Ok(function)
    }

    /// What the manager thread shall watch as long as the function exists, and beside it
    /// what [`link_fds`](Self::link_fds) says at that time.
    pub fn poll_fds(&self) -> Vec<PollFd> {
        let readable = libc::EPOLLIN as u32;
        let mut fds: Vec<_> = (0..)
            .zip(self.errors.iter())
            .map(|(queue, fd)| PollFd {
                fd: Arc::clone(fd),
                source: EventSource::RingError(queue),
                events: readable | EDGE,
            })
            .collect();
        if self.has_successors() {
            fds.push(PollFd {
                fd: self.service.done(),
                source: EventSource::Successor,
                events: readable | EDGE,
            });
        }
        fds.extend(self.link_fds());
        fds
    }

    /// The descriptors of the process that serves now, which its successor has none of.
    pub fn link_fds(&self) -> Vec<PollFd> {
        let (socket, channel) = self.link.sockets();
        let hangup = socket.map(|fd| PollFd {
            fd,
            source: EventSource::Hangup,
            events: libc::EPOLLRDHUP as u32 | EDGE,
        });
        let requests = channel.map(|fd| PollFd {
            fd,
            source: EventSource::Backend,
            events: libc::EPOLLIN as u32,
        });
        hangup.into_iter().chain(requests).collect()
    }

    /// Handles an event of a descriptor from [`poll_fds`](Self::poll_fds). Never blocks.
    pub fn on_event(&self, source: EventSource) -> Outcome {
        match source {
            EventSource::RingError(queue) => self.on_ring_error(queue),
            // An event of a predecessor's socket may come late.
            EventSource::Hangup if self.link.hung_up() => self.lose(FailReason::Hangup),
            EventSource::Hangup => {}
            EventSource::Backend => self.on_backend_request(),
            EventSource::Successor => match self.service.take() {
                Some(Ok(reconnected)) => return Outcome::Reconnected(reconnected),
                Some(Err(error)) => return Outcome::NotReconnected(error),
                None => return Outcome::Handled,
            },
        }
        match self.link.presence() {
            Presence::Failed(reason) => Outcome::Failed(reason),
            Presence::Serving | Presence::Awaiting(_) => {
                let lost = self.link.loss();
                lost.map_or(Outcome::Handled, Outcome::Suspended)
            }
        }
    }

    /// Gives the device process up: the driver is told that the device needs a reset, and
    /// nothing waits for the process any more. The first reason stays. Never blocks.
    pub fn fail(&self, reason: FailReason) {
        let text = reason.to_string();
        self.expect_fence();
        if self.link.fail(reason) {
            // Of one that could have had a successor, whoever brings those in tells.
            let told = self.options.successor;
            let level = if told {
                log::Level::Info
            } else {
                log::Level::Warn
            };
            log::log!(level, "device {}: {text}", self.options.id);
            self.follow_link();
            self.take_link_down();
            self.notify_config();
            self.service.wake();
        }
    }

    /// The device process is gone and a successor expected: the driver is told nothing
    /// (but that a network device's link is down), its accesses are answered from what is
    /// known, what it sets up is kept for the successor, and a reset is done at once.
    /// Ends in [`reconnect`](Self::reconnect), [`adopt`](Self::adopt) or
    /// [`fail`](Self::fail). Never blocks.
    pub fn suspend(&self, reason: FailReason) {
        let text = reason.to_string();
        let ended = reason == FailReason::Hangup;
        self.expect_fence();
        if self.link.suspend(reason) {
            if ended {
                self.note_idle();
            }
            log::info!(
                "device {}: {text}; waiting for a successor",
                self.options.id
            );
            self.follow_link();
        }
    }

    /// The device has left the machine and its process is to end: until
    /// [`quiesced`](Self::quiesced) is told, it may still reach guest memory. Never blocks.
    pub fn dismiss(&self) {
        self.expect_fence();
        self.link
            .fail(FailReason::Stopped("it was removed".to_owned()));
    }

    /// The device process is lost: suspended or failed, as the options say.
    pub(super) fn lose(&self, reason: FailReason) {
        if self.options.successor {
            self.suspend(reason);
        } else {
            self.fail(reason);
        }
    }

    /// The process that was lost has ended, and so has all of its I/O: a reset that waited
    /// for this is complete. For functions whose options say `fenced`.
    pub fn quiesced(&self) {
        self.signals.unquiet.store(false, Ordering::Release);
        self.service.wake();
    }

    /// Nothing that a process which was lost had in flight can still reach guest memory. Always so
    /// where the options do not say `fenced`: the end of somebody else's process is not known.
    pub fn is_quiet(&self) -> bool {
        !self.signals.unquiet.load(Ordering::Acquire)
    }

    /// Whether the driver has reset the function after its process was given up: it sets it up
    /// again, and a successor may find everything. Once for each time. Never blocks.
    pub fn take_reset(&self) -> bool {
        self.signals
            .reset_after_failure
            .swap(false, Ordering::AcqRel)
    }

    /// A process that serves is about to be lost.
    fn expect_fence(&self) {
        if self.options.fenced && self.link.serving() {
            self.signals.unquiet.store(true, Ordering::Release);
        }
    }

    /// Whether the process can be told of more memory, up to so many regions, while it serves.
    /// Never blocks.
    pub fn takes_regions(&self, count: u64) -> bool {
        !self.link.serving() || self.signals.slots.load(Ordering::Acquire) >= count
    }

    /// Tells the process of memory that has come and gone; returns when it has acknowledged all
    /// of it, or there is none that serves: its successor is told of everything. One that does not
    /// let go of what is gone is lost, and [`is_quiet`](Self::is_quiet) says when nothing is left
    /// of it. May take as long as `operation_timeout`: not for the manager thread.
    ///
    /// # Errors
    /// The process serves on without what has come.
    pub fn sync_memory(&self) -> Result<(), VhostUserError> {
        let mut device = self.lock_device();
        if !self.link.serving() {
            return Ok(());
        }
        match device.backend.take_back_memory(self.deadline()) {
            Ok(()) => {}
            Err(error) if error.is_fatal() => {
                self.lose(FailReason::from(&error));
                return Ok(());
            }
            // A process that may still write there cannot stay.
            Err(error) => {
                log::warn!("device {}: {error}", self.options.id);
                self.lose(FailReason::Keeps);
                return Ok(());
            }
        }
        match device.backend.hand_over_memory(self.deadline()) {
            Err(error) if error.is_fatal() => {
                self.lose(FailReason::from(&error));
                Ok(())
            }
            done => done,
        }
    }

    /// Tells the driver once more that the configuration has changed: it looks again.
    pub fn remind(&self) {
        self.signals.generation.fetch_add(1, Ordering::AcqRel);
        self.notify_config();
    }

    /// Sets the configuration space, where it is the VMM's own ([`ConfigSource::Fixed`]); the
    /// driver is told of it if `notify`. Never blocks.
    ///
    /// [`ConfigSource::Fixed`]: super::ConfigSource::Fixed
    pub fn set_config(&self, bytes: Vec<u8>, notify: bool) {
        if self.lock_space().replace(bytes) {
            self.signals.generation.fetch_add(1, Ordering::AcqRel);
            if notify {
                self.notify_config();
            }
        }
    }

    /// How far each ring that a process serves has come: a look from the manager thread, now
    /// and then. `None` while the driver is just setting the device up, or another process takes
    /// it over. Never blocks.
    pub fn progress(&self) -> Option<Vec<(u16, Indices)>> {
        let device = match self.device.try_lock() {
            Ok(device) => device,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(device.backend.progress(&device.common))
    }

    /// The process has hung up: has the rings looked at before the driver adds requests that
    /// no process has seen. Where somebody holds the lock, the driver is just setting the
    /// device up. Never blocks.
    fn note_idle(&self) {
        let mut device = match self.device.try_lock() {
            Ok(device) => device,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let Device {
            backend, common, ..
        } = &mut *device;
        backend.note_idle(common);
    }

    /// The function's state.
    pub fn status(&self) -> FunctionStatus {
        let needs_reset = self.needs_reset();
        let written = self.signals.status.load(Ordering::Acquire);
        let broken = needs_reset && written != 0;
        let shown = if broken { status::NEEDS_RESET } else { 0 };
        let (failure, awaiting) = match self.link.presence() {
            Presence::Serving => (None, None),
            Presence::Awaiting(reason) => (None, Some(reason)),
            Presence::Failed(reason) => (Some(reason), None),
        };
        let ours = self.options.net_control.is_some();
        let pairs = self.signals.pairs.load(Ordering::Acquire);
        FunctionStatus {
            device_status: written | shown,
            active: self.in_use(),
            needs_reset,
            features: self.signals.features.load(Ordering::Acquire),
            failure,
            awaiting,
            link_up: ours.then(|| self.link_up()),
            queue_pairs: ours.then(|| u16::try_from(pairs).unwrap_or(u16::MAX).max(1)),
        }
    }

    /// Where BAR 0 answers now.
    pub fn bar_address(&self) -> Option<u64> {
        self.bar.get().and_then(BarClaim::mapped_at)
    }

    fn on_ring_error(&self, queue: u16) {
        if self.in_use() && !self.signals.broken.load(Ordering::Acquire) {
            let id = &self.options.id;
            log::info!("device {id}: the ring of queue {queue} is malformed");
            self.require_reset();
        }
    }

    fn on_backend_request(&self) {
        match self.link.drain_channel() {
            // Where the space is the VMM's own, what the process thinks of it does not matter.
            Ok(drained) if drained.config_changed && self.lock_space().served_size() > 0 => {
                self.signals.stale.store(true, Ordering::Release);
                self.config_changed();
            }
            Ok(_) => {}
            Err(error) => self.lose(FailReason::from(&error)),
        }
    }

    /// Its own thread brings successors in.
    pub(super) fn has_successors(&self) -> bool {
        self.options.successor || self.options.net_control.is_some()
    }

    pub(super) fn in_use(&self) -> bool {
        self.signals.status.load(Ordering::Acquire) & status::DRIVER_OK != 0
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.signals.broken.load(Ordering::Acquire) || self.link.failed()
    }

    pub(super) fn require_reset(&self) {
        self.signals.broken.store(true, Ordering::Release);
        self.notify_config();
    }

    /// The device-specific configuration is different from now on.
    pub(super) fn config_changed(&self) {
        self.signals.generation.fetch_add(1, Ordering::AcqRel);
        self.notify_config();
    }

    /// The configuration change interrupt, once the driver is up.
    pub(super) fn notify_config(&self) {
        if self.in_use() {
            self.signals.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.msix.signal_own();
        }
    }

    pub(super) fn lock_config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_space(&self) -> MutexGuard<'_, DeviceConfig> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.options.operation_timeout)
    }

    /// A request to the process failed: fatal errors end it, a refusal asks the driver for
    /// a reset.
    pub(super) fn on_backend_error(&self, error: &VhostUserError) {
        if error.is_fatal() {
            self.lose(FailReason::from(error));
        } else {
            log::info!("device {}: {error}", self.options.id);
            self.require_reset();
        }
    }
}

#[cfg(test)]
#[path = "function_tests/mod.rs"]
mod tests;
