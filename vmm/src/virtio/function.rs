//! The PCI function: configuration space, BAR 0 and what ties the parts together.
//!
//! Locks: `config` (configuration space) may be held while MSI-X and the BAR decoder are
//! called; `device` (virtio registers and the channel to the process) is held through a
//! whole activation or reset, which a deadline bounds. Neither is taken while the other
//! is held. The manager thread takes neither: what it has to say travels by atomics and
//! the VMM's own interrupt eventfd, so that no device process can hold it up.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::backend::{Backend, StartError, offered};
use super::capabilities::{Places, build, window};
use super::common::{CommonConfig, Effect};
use super::doorbell::Doorbells;
use super::events::{EventSource, FailReason, Outcome, PollFd};
use super::registers::{ISR_CONFIG, NOTIFY_MULTIPLIER, bar, status};
use super::{VirtioError, VirtioPciOptions};
use crate::bus::BusDevice;
use crate::hypervisor::Hypervisor;
use crate::pci::{
    BarClaim, BarDecoder, BarKind, COMMAND_MEMORY, ConfigSpace, Msix, NO_VECTOR, PciFunction, reg,
};
use crate::vhost_user::{BackendChannel, Deadline, Frontend, MemoryMap, VhostUserError};

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
}

struct Config {
    space: ConfigSpace,
    /// The function has left the bus: BARs stay off.
    gone: bool,
}

struct Device {
    common: CommonConfig,
    backend: Backend,
}

/// What is shared with the manager thread without a lock.
#[derive(Default)]
struct Signals {
    isr: AtomicU8,
    generation: AtomicU8,
    /// The cached configuration is out of date.
    stale: AtomicBool,
    needs_reset: AtomicBool,
    dead: AtomicBool,
    /// Copies for `status()`.
    status: AtomicU8,
    features: AtomicU64,
}

/// A virtio device on PCI whose device side is a process that speaks vhost-user.
pub struct VirtioPciFunction {
    id: String,
    operation_timeout: Duration,
    places: Places,
    config: Mutex<Config>,
    device: Mutex<Device>,
    bar: OnceLock<BarClaim>,
    msix: Arc<Msix>,
    doorbells: Arc<Doorbells>,
    errors: Arc<[OwnedFd]>,
    signals: Signals,
    failure: Mutex<Option<FailReason>>,
    socket: UnixStream,
    channel: Mutex<Option<BackendChannel>>,
    channel_socket: Option<UnixStream>,
}

impl VirtioPciFunction {
    /// A function in front of the process behind `frontend`, which may map `memory` once
    /// a driver is up. It asks the process for its configuration.
    pub fn new(
        options: VirtioPciOptions,
        mut frontend: Frontend,
        memory: Arc<dyn MemoryMap>,
        hypervisor: Arc<dyn Hypervisor>,
        decoder: &Arc<BarDecoder>,
    ) -> Result<Arc<Self>, VirtioError> {
        options.check(&frontend)?;
        let id = options.id;
        let io = |error: std::io::Error| VirtioError::Io(id.clone(), error);
        let backend_error = |error| VirtioError::Backend(id.clone(), error);

        let vectors = options.queues.saturating_add(1);
        let msix = Msix::new(vectors, Arc::clone(&hypervisor))
            .map_err(|error| VirtioError::Pci(id.clone(), error))?;
        let msix = Arc::new(msix);
        let (space, places) = build(options.device_type, options.queues, &msix)
            .map_err(|error| VirtioError::Pci(id.clone(), error))?;
        let doorbells = Arc::new(Doorbells::new(options.queues, hypervisor).map_err(io)?);
        let errors = (0..options.queues)
            .map(|_| Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
            .collect::<std::io::Result<Arc<[OwnedFd]>>>()
            .map_err(io)?;
        let features = offered(frontend.features());
        let socket = frontend.clone_socket().map_err(backend_error)?;
        let channel = frontend.take_backend_channel();
        let channel_socket = channel
            .as_ref()
            .map(BackendChannel::clone_socket)
            .transpose()
            .map_err(backend_error)?;
        let mut backend = Backend::new(
            frontend,
            memory,
            Arc::clone(&doorbells),
            Arc::clone(&msix),
            Arc::clone(&errors),
            &options.config,
        )
        .map_err(io)?;
        backend
            .refresh_config(Deadline::after(options.operation_timeout))
            .map_err(backend_error)?;
        let common = CommonConfig::new(features, options.queues, options.queue_size, vectors);
        let listener = Arc::clone(&doorbells);
        let function = Arc::new(Self {
            id,
            operation_timeout: options.operation_timeout,
            places,
            config: Mutex::new(Config { space, gone: false }),
            device: Mutex::new(Device { common, backend }),
            bar: OnceLock::new(),
            msix,
            doorbells,
            errors,
            signals: Signals::default(),
            failure: Mutex::new(None),
            socket,
            channel: Mutex::new(channel),
            channel_socket,
        });
        let registers = Arc::new(Bar0(Arc::downgrade(&function)));
        function
            .bar
            .get_or_init(|| decoder.claim(bar::SIZE, registers, listener));
        Ok(function)
    }

    /// What the manager thread shall watch.
    pub fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let readable = libc::EPOLLIN as u32;
        let mut fds: Vec<_> = (0..)
            .zip(self.errors.iter())
            .map(|(queue, fd)| PollFd {
                fd: fd.as_fd(),
                source: EventSource::RingError(queue),
                events: readable | EDGE,
            })
            .collect();
        let hangup = libc::EPOLLRDHUP as u32 | EDGE;
        fds.push(PollFd {
            fd: self.socket.as_fd(),
            source: EventSource::Hangup,
            events: hangup,
        });
        if let Some(channel) = &self.channel_socket {
            let source = EventSource::Backend;
            fds.push(PollFd {
                fd: channel.as_fd(),
                source,
                events: readable,
            });
        }
        fds
    }

    /// Handles an event of a descriptor from [`poll_fds`](Self::poll_fds). Never blocks.
    pub fn on_event(&self, source: EventSource) -> Outcome {
        match source {
            EventSource::RingError(queue) => self.on_ring_error(queue),
            EventSource::Hangup => self.fail(FailReason::Hangup),
            EventSource::Backend => self.on_backend_request(),
        }
        match self.failure() {
            Some(reason) => Outcome::Failed(reason),
            None => Outcome::Handled,
        }
    }

    /// Gives the device process up: the driver is told that the device needs a reset, and
    /// nothing waits for the process any more. The first reason stays. Never blocks.
    pub fn fail(&self, reason: FailReason) {
        {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if failure.is_some() {
                return;
            }
            log::warn!("device {}: {reason}", self.id);
            *failure = Some(reason);
        }
        self.signals.dead.store(true, Ordering::Release);
        // Wakes a vCPU that waits for an answer, and the manager by the hang-up.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.require_reset();
    }

    /// The function's state.
    pub fn status(&self) -> FunctionStatus {
        let needs_reset = self.signals.needs_reset.load(Ordering::Acquire);
        let written = self.signals.status.load(Ordering::Acquire);
        let shown = if needs_reset && written != 0 {
            status::NEEDS_RESET
        } else {
            0
        };
        FunctionStatus {
            device_status: written | shown,
            active: self.in_use(),
            needs_reset,
            features: self.signals.features.load(Ordering::Acquire),
            failure: self.failure(),
        }
    }

    /// Where BAR 0 answers now.
    pub fn bar_address(&self) -> Option<u64> {
        self.bar.get().and_then(BarClaim::mapped_at)
    }

    fn failure(&self) -> Option<FailReason> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn on_ring_error(&self, queue: u16) {
        if self.in_use() && !self.signals.needs_reset.load(Ordering::Acquire) {
            log::info!("device {}: the ring of queue {queue} is malformed", self.id);
            self.require_reset();
        }
    }

    fn on_backend_request(&self) {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = channel.as_mut() else { return };
        match open.on_readable() {
            Ok(drained) if drained.config_changed => {
                self.signals.stale.store(true, Ordering::Release);
                self.signals.generation.fetch_add(1, Ordering::AcqRel);
                self.notify_config();
            }
            Ok(_) => {}
            Err(error) => {
                *channel = None;
                self.fail(FailReason::from(&error));
            }
        }
    }

    fn in_use(&self) -> bool {
        self.signals.status.load(Ordering::Acquire) & status::DRIVER_OK != 0
    }

    fn is_dead(&self) -> bool {
        self.signals.dead.load(Ordering::Acquire)
    }

    fn require_reset(&self) {
        self.signals.needs_reset.store(true, Ordering::Release);
        self.notify_config();
    }

    /// The configuration change interrupt, once the driver is up.
    fn notify_config(&self) {
        if self.in_use() {
            self.signals.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.msix.signal_own();
        }
    }

    fn lock_config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.operation_timeout)
    }

    /// A request to the process failed: fatal errors give it up, a refusal asks the
    /// driver for a reset.
    fn on_backend_error(&self, error: &VhostUserError) {
        if error.is_fatal() {
            self.fail(FailReason::from(error));
        } else {
            log::info!("device {}: {error}", self.id);
            self.require_reset();
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut device = self.lock_device();
        device.common.set_usable(!self.is_dead());
        match device.common.write(offset, data) {
            Effect::None => {}
            Effect::Reset => self.reset_device(&mut device),
            Effect::Activate => {
                self.publish(&device);
                self.activate(&mut device);
            }
            Effect::ConfigVector(vector) => {
                self.msix
                    .set_own_vector((vector != NO_VECTOR).then_some(vector));
            }
            Effect::QueueVector { queue, vector } => {
                let set = device.backend.set_vector(queue, vector, self.deadline());
                if let Err(error) = set {
                    self.on_backend_error(&error);
                }
            }
        }
        self.publish(&device);
    }

    /// Copies what `status()` and the manager look at.
    fn publish(&self, device: &Device) {
        self.signals
            .status
            .store(device.common.status(), Ordering::Release);
        self.signals
            .features
            .store(device.common.accepted(), Ordering::Release);
    }

    fn activate(&self, device: &mut Device) {
        if self.is_dead() {
            return self.require_reset();
        }
        match device.backend.start(&device.common, self.deadline()) {
            Ok(()) => log::debug!("device {}: driver is up", self.id),
            Err(StartError::Backend(error)) => self.on_backend_error(&error),
            Err(error @ StartError::BadRing(_)) => {
                log::debug!("device {}: {error}", self.id);
                self.require_reset();
            }
        }
    }

    fn reset_device(&self, device: &mut Device) {
        if self.is_dead() {
            device.backend.shut_down();
        } else if let Err(error) = device.backend.stop(self.deadline()) {
            // Not known to be quiet: the process may still write to memory.
            self.fail(FailReason::from(&error));
            device.backend.shut_down();
        }
        device.common.reset();
        self.publish(device);
        self.msix.set_own_vector(None);
        self.signals.isr.store(0, Ordering::Release);
        self.signals
            .needs_reset
            .store(self.is_dead(), Ordering::Release);
    }

    fn read_device_config(&self, offset: u64, data: &mut [u8]) {
        let mut device = self.lock_device();
        if !self.is_dead()
            && self.signals.stale.swap(false, Ordering::AcqRel)
            && let Err(error) = device.backend.refresh_config(self.deadline())
        {
            self.on_backend_error(&error);
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data
            .iter_mut()
            .zip(device.backend.config().iter().skip(start))
        {
            *to = *from;
        }
    }

    fn write_device_config(&self, offset: u64, data: &[u8]) {
        let (false, Ok(offset)) = (self.is_dead(), usize::try_from(offset)) else {
            return;
        };
        let mut device = self.lock_device();
        if let Err(error) = device.backend.write_config(offset, data, self.deadline()) {
            // A refused write changes nothing; the driver sees that when it reads back.
            if error.is_fatal() {
                self.fail(FailReason::from(&error));
            }
        }
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inside = offset % bar::STEP;
        match offset - inside {
            bar::COMMON => {
                let needs_reset = self.signals.needs_reset.load(Ordering::Acquire);
                let generation = self.signals.generation.load(Ordering::Acquire);
                self.lock_device()
                    .common
                    .read(inside, data, needs_reset, generation);
            }
            bar::ISR if inside == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.isr.swap(0, Ordering::AcqRel);
                }
            }
            bar::DEVICE => self.read_device_config(inside, data),
            bar::MSIX_TABLE => self.msix.read_table(inside, data),
            bar::MSIX_PBA => self.msix.read_pba(inside, data),
            _ => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let inside = offset % bar::STEP;
        match offset - inside {
            bar::COMMON => self.write_common(inside, data),
            bar::DEVICE => self.write_device_config(inside, data),
            bar::MSIX_TABLE => self.msix.write_table(inside, data),
            bar::NOTIFY if inside.is_multiple_of(NOTIFY_MULTIPLIER.into()) => {
                let queue = inside / u64::from(NOTIFY_MULTIPLIER);
                self.doorbells
                    .ring(usize::try_from(queue).unwrap_or(usize::MAX));
            }
            _ => {}
        }
    }

    /// BAR 0 follows its register and the command register.
    fn decode_bar(&self, config: &Config) {
        let on = config.space.read_u16(reg::COMMAND) & COMMAND_MEMORY != 0 && !config.gone;
        let base = u64::from(config.space.read_u32(reg::BAR0) & !0xf);
        if let Some(claim) = self.bar.get() {
            claim.decode(on.then_some(base));
        }
    }

    /// What an access to the data field of the PCI configuration access capability
    /// reaches in BAR 0: nothing unless width, alignment and range are right.
    fn window_target(&self, config: &Config, offset: u16, len: usize) -> Option<(u64, usize)> {
        let data = self.places.window.checked_add(window::DATA)?;
        let touched = usize::from(offset) < usize::from(data) + 4
            && usize::from(offset).saturating_add(len) > usize::from(data);
        let [bar, _] = config
            .space
            .read_u16(self.places.window + window::BAR)
            .to_le_bytes();
        let at = config.space.read_u32(self.places.window + window::OFFSET);
        let width = config.space.read_u32(self.places.window + window::LENGTH);
        let allowed = bar == 0
            && matches!(width, 1 | 2 | 4)
            && at.is_multiple_of(width)
            && u64::from(at).saturating_add(width.into()) <= bar::SIZE;
        (touched && allowed).then_some((at.into(), usize::try_from(width).ok()?))
    }
}

impl PciFunction for VirtioPciFunction {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let target = self.window_target(&self.lock_config(), offset, data.len());
        let mut value = [0; 4];
        if let Some((at, width)) = target
            && let Some(value) = value.get_mut(..width)
        {
            self.read_bar(at, value);
            self.lock_config()
                .space
                .set(self.places.window + window::DATA, value);
        }
        self.lock_config().space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut value = [0; 4];
        let target = {
            let mut config = self.lock_config();
            config.space.write(offset, data);
            self.decode_bar(&config);
            if !config.gone {
                self.msix
                    .set_control(config.space.read_u16(self.places.msix + 2));
            }
            config
                .space
                .read(self.places.window + window::DATA, &mut value);
            self.window_target(&config, offset, data.len())
        };
        if let Some((at, width)) = target
            && let Some(value) = value.get(..width)
        {
            self.write_bar(at, value);
        }
    }

    fn place_bars(&self, place: &mut dyn FnMut(BarKind, u64) -> Option<u64>) {
        let base = place(BarKind::Memory32, bar::SIZE);
        if let Some(base) = base.and_then(|base| u32::try_from(base).ok()) {
            self.lock_config().space.set(reg::BAR0, &base.to_le_bytes());
        }
    }

    fn bus_reset(&self) {
        self.reset_device(&mut self.lock_device());
        let mut config = self.lock_config();
        config.space.set(reg::COMMAND, &[0; 2]);
        config.space.set(reg::BAR0, &[0; 4]);
        let control = self.msix.vectors().saturating_sub(1);
        config
            .space
            .set(self.places.msix + 2, &control.to_le_bytes());
        self.decode_bar(&config);
        self.msix.reset();
    }

    fn unplug(&self) {
        {
            let mut config = self.lock_config();
            config.gone = true;
            self.decode_bar(&config);
        }
        self.msix.reset();
    }
}

/// BAR 0 on the memory bus. Holds the function weakly: the bus must not keep a removed
/// device alive.
struct Bar0(Weak<VirtioPciFunction>);

impl BusDevice for Bar0 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.0.upgrade() {
            function.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.0.upgrade() {
            function.write_bar(offset, data);
        }
    }
}

#[cfg(test)]
#[path = "function_tests/mod.rs"]
mod tests;
