//! What a guest reaches of the function: BAR 0 with its structures (VIRTIO 1.2 section
//! 4.1.4), the PCI configuration space and the window through it into the BAR (4.1.4.9).
//!
//! vCPU threads enter here. An access waits for the device process only where the driver
//! asks something of it (DRIVER_OK, reset, a vector, a change of configuration), and never
//! past the deadline; while the process is gone nothing is waited for at all. Such an access
//! is made by the function's own thread ([`Service::make`](super::service::Service::make)):
//! vCPU threads have no system calls for it. Which it is, is decided under the function's
//! lock, under which alone a process can come to serve.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use super::backend::StartError;
use super::capabilities::window;
use super::common::Effect;
use super::events::FailReason;
use super::function::{Config, Device, VirtioPciFunction};
use super::registers::{NOTIFY_MULTIPLIER, bar, common, status};
use super::service::{Access, WIDEST};
use crate::bus::BusDevice;
use crate::pci::{BarKind, COMMAND_MEMORY, NO_VECTOR, PciFunction, Reset, reg};
use crate::vhost_user::VhostUserError;

/// Whose thread makes an access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// A vCPU's: it asks the device process nothing.
    Vcpu,
    /// The function's own.
    Service,
}

/// The access is not made: it is one for the function's own thread.
struct NotHere;

impl VirtioPciFunction {
    /// Makes an access that a vCPU thread has handed over. On the function's own thread.
    pub(super) fn make(&self, access: Access) -> [u8; WIDEST] {
        let mut bytes = [0; WIDEST];
        match access {
            Access::Read(offset, len) => {
                if let Some(data) = bytes.get_mut(..len) {
                    let _ = self.read_bar(By::Service, offset, data);
                }
            }
            Access::Write(offset, len, data) => {
                if let Some(data) = data.get(..len) {
                    let _ = self.write_bar(By::Service, offset, data);
                }
            }
            Access::BusReset => self.reset_device(&mut self.lock_device()),
            Access::PowerOn => {
                self.reset_device(&mut self.lock_device());
                self.reset_config();
            }
        }
        bytes
    }

    /// A guest reads BAR 0.
    fn guest_reads(&self, offset: u64, data: &mut [u8]) {
        if self.read_bar(By::Vcpu, offset, data).is_err() && data.len() <= WIDEST {
            let bytes = self.service.make(Access::Read(offset, data.len()));
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
    }

    /// A guest writes BAR 0.
    fn guest_writes(&self, offset: u64, data: &[u8]) {
        if self.write_bar(By::Vcpu, offset, data).is_err() && data.len() <= WIDEST {
            let mut bytes = [0; WIDEST];
            bytes
                .iter_mut()
                .zip(data)
                .for_each(|(to, from)| *to = *from);
            self.service.make(Access::Write(offset, data.len(), bytes));
        }
    }

    fn write_common(&self, by: By, offset: u64, data: &[u8]) -> Result<(), NotHere> {
        let mut device = self.lock_device();
        if self.resetting(&mut device).is_some() {
            // Nothing may be set up before the status reads as zero.
            return Ok(());
        }
        // Of the registers, these may have the process asked.
        let asks = matches!(offset, common::DEVICE_STATUS | common::QUEUE_VECTOR);
        if asks && by == By::Vcpu && self.link.serving() {
            return Err(NotHere);
        }
        // A process that is only being replaced will be there again.
        device.common.set_usable(!self.link.failed());
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
            Effect::QueueVector { queue, vector } if self.link.serving() => {
                let set = device.backend.set_vector(queue, vector, self.deadline());
                if let Err(error) = set {
                    self.on_backend_error(&error);
                }
            }
            Effect::QueueVector { .. } => {}
        }
        self.publish(&device);
        Ok(())
    }

    /// What the status register shows while a reset waits for the I/O of a lost process.
    fn resetting(&self, device: &mut Device) -> Option<u8> {
        if !self.signals.unquiet.load(Ordering::Acquire) {
            device.resetting = None;
        }
        device.resetting
    }

    /// Copies what `status()` and the manager look at.
    pub(super) fn publish(&self, device: &Device) {
        self.signals
            .status
            .store(device.common.status(), Ordering::Release);
        self.signals
            .features
            .store(device.common.accepted(), Ordering::Release);
        let pairs = device
            .control
            .as_ref()
            .map_or(0, |control| control.in_use());
        self.signals.pairs.store(pairs.into(), Ordering::Release);
    }

    fn activate(&self, device: &mut Device) {
        if self.link.failed() {
            return self.notify_config();
        }
        let checked = device.backend.check(&device.common);
        if checked.is_ok()
            && let Some(control) = &mut device.control
        {
            control.start(&device.common);
            self.service.wake();
        }
        let shape = device.shape();
        let started = match checked {
            // Whoever brings the successor in finds DRIVER_OK set and goes on here.
            Ok(()) if !self.link.serving() => return,
            Ok(()) => device
                .backend
                .start(&device.common, shape, &[], self.deadline()),
            Err(error) => Err(error),
        };
        self.on_started(started);
    }

    /// What became of handing the rings over.
    pub(super) fn on_started(&self, started: Result<(), StartError>) {
        let id = &self.options.id;
        match started {
            Ok(()) => log::debug!("device {id}: driver is up"),
            Err(StartError::Backend(error) | StartError::Lost(error)) => {
                self.on_backend_error(&error);
            }
            Err(error @ StartError::BadRing(_)) => {
                log::debug!("device {id}: {error}");
                self.require_reset();
            }
            Err(error @ StartError::Unknown(_)) => {
                log::warn!("device {id}: {error}: it needs a reset by its driver");
                self.require_reset();
            }
        }
    }

    fn reset_by_bus(&self) {
        let mut device = self.lock_device();
        if self.link.serving() {
            drop(device);
            self.service.make(Access::BusReset);
        } else {
            self.reset_device(&mut device);
        }
    }

    fn reset_device(&self, device: &mut Device) {
        let shown = device.common.status();
        if self.link.serving()
            && let Err(error) = device.backend.stop(self.deadline())
        {
            // Not known to be quiet: the process may still write to memory.
            self.lose(match error {
                VhostUserError::Refused(_) => FailReason::Unquiet,
                error => FailReason::from(&error),
            });
        }
        if !self.link.serving() {
            device.backend.shut_down();
        }
        device.backend.forget();
        device.common.reset();
        if shown != 0 && self.options.fenced && self.link.await_again() {
            // What the driver sets up from here on is kept, should there be another process.
            self.signals
                .reset_after_failure
                .store(true, Ordering::Release);
        }
        if shown != 0 && self.signals.unquiet.load(Ordering::Acquire) {
            device.resetting = Some(shown);
        }
        device.stand_in = None;
        if let Some(control) = &mut device.control {
            control.reset();
        }
        {
            let mut space = self.lock_space();
            space.forget_writes();
            if device.control.is_some() {
                space.set_announce(false);
                self.signals.announce_twice.store(false, Ordering::Release);
            }
        }
        self.publish(device);
        self.msix.set_own_vector(None);
        self.signals.isr.store(0, Ordering::Release);
        self.signals.broken.store(false, Ordering::Release);
    }

    fn read_device_config(&self, by: By, offset: u64, data: &mut [u8]) -> Result<(), NotHere> {
        if self.link.serving() && self.signals.stale.load(Ordering::Acquire) {
            if by == By::Vcpu {
                return Err(NotHere);
            }
            let mut device = self.lock_device();
            self.refresh_config(&mut device);
        }
        self.lock_space().read(offset, data);
        Ok(())
    }

    /// Fetches the configuration anew where it is out of date.
    fn refresh_config(&self, device: &mut Device) {
        let stale = self.signals.stale.swap(false, Ordering::AcqRel);
        let size = self.lock_space().served_size();
        if size == 0 || !stale {
            return;
        }
        let deadline = self.deadline();
        let bytes = device
            .backend
            .frontend()
            .and_then(|frontend| frontend.get_config(size, deadline));
        match bytes {
            Ok(bytes) => {
                self.lock_space().replace(bytes);
            }
            Err(error) => self.on_backend_error(&error),
        }
    }

    fn write_device_config(&self, by: By, offset: u64, data: &[u8]) -> Result<(), NotHere> {
        let (false, Ok(offset)) = (self.link.failed(), usize::try_from(offset)) else {
            return Ok(());
        };
        let mut device = self.lock_device();
        if by == By::Vcpu && self.link.serving() {
            return Err(NotHere);
        }
        // Kept first: a process that is lost over it has a successor that is told.
        if !self.lock_space().write(offset, data) || !self.link.serving() {
            return Ok(());
        }
        let deadline = self.deadline();
        let written = device.backend.frontend().and_then(|frontend| {
            let at = u32::try_from(offset).unwrap_or(u32::MAX);
            frontend.set_config(at, data, deadline)
        });
        match written {
            Err(error) if error.is_fatal() => self.lose(FailReason::from(&error)),
            // What the device makes of it is its own affair, and a refused write changes
            // nothing: read it back.
            _ => {
                self.signals.stale.store(true, Ordering::Release);
                self.refresh_config(&mut device);
            }
        }
        Ok(())
    }

    fn read_bar(&self, by: By, offset: u64, data: &mut [u8]) -> Result<(), NotHere> {
        data.fill(0);
        let inside = offset % bar::STEP;
        match offset - inside {
            bar::COMMON => {
                let needs_reset = self.needs_reset();
                let generation = self.signals.generation.load(Ordering::Acquire);
                let mut device = self.lock_device();
                device.common.read(inside, data, needs_reset, generation);
                let status = common::DEVICE_STATUS
                    .checked_sub(inside)
                    .and_then(|at| data.get_mut(usize::try_from(at).ok()?));
                if let (Some(byte), Some(shown)) = (status, self.resetting(&mut device)) {
                    *byte = shown;
                }
            }
            bar::ISR if inside == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.isr.swap(0, Ordering::AcqRel);
                }
            }
            bar::DEVICE => return self.read_device_config(by, inside, data),
            bar::MSIX_TABLE => self.msix.read_table(inside, data),
            // The pending bits are in eventfds, which are polled.
            bar::MSIX_PBA if by == By::Vcpu => return Err(NotHere),
            bar::MSIX_PBA => self.msix.read_pba(inside, data),
            _ => {}
        }
        Ok(())
    }

    fn write_bar(&self, by: By, offset: u64, data: &[u8]) -> Result<(), NotHere> {
        let inside = offset % bar::STEP;
        match offset - inside {
            bar::COMMON => return self.write_common(by, inside, data),
            bar::DEVICE => return self.write_device_config(by, inside, data),
            bar::MSIX_TABLE => self.msix.write_table(inside, data),
            bar::NOTIFY if inside.is_multiple_of(NOTIFY_MULTIPLIER.into()) => {
                let queue = inside / u64::from(NOTIFY_MULTIPLIER);
                self.doorbells
                    .ring(usize::try_from(queue).unwrap_or(usize::MAX));
            }
            _ => {}
        }
        Ok(())
    }

    /// The configuration space as after power-on: nothing decoded, MSI-X disabled.
    fn reset_config(&self) {
        let mut config = self.lock_config();
        config.space = config.first.clone();
        self.decode_bar(&config);
        self.msix.reset();
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
        &self.options.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let target = self.window_target(&self.lock_config(), offset, data.len());
        let mut value = [0; 4];
        if let Some((at, width)) = target
            && let Some(value) = value.get_mut(..width)
        {
            self.guest_reads(at, value);
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
            self.guest_writes(at, value);
        }
    }

    fn place_bars(&self, place: &mut dyn FnMut(BarKind, u64) -> Option<u64>) {
        let base = place(BarKind::Memory32, bar::SIZE);
        if let Some(base) = base.and_then(|base| u32::try_from(base).ok()) {
            self.lock_config().space.set(reg::BAR0, &base.to_le_bytes());
        }
    }

    fn bus_reset(&self) {
        self.reset_by_bus();
        self.reset_config();
    }

    fn begin_reset(&self) -> Reset {
        let made = self.service.begin(Access::PowerOn);
        Box::new(move || {
            made();
        })
    }

    fn unplug(&self) {
        {
            let mut config = self.lock_config();
            config.gone = true;
            self.decode_bar(&config);
        }
        self.msix.reset();
    }

    fn release_register(&self) -> Option<u64> {
        let now = self.status().device_status;
        // One that failed is reset no more.
        let held = now & status::DRIVER != 0 && now & status::FAILED == 0;
        let base = u64::from(self.lock_config().space.read_u32(reg::BAR0) & !0xf);
        held.then(|| base.saturating_add(bar::COMMON + common::DEVICE_STATUS))
    }
}

/// BAR 0 on the memory bus. Holds the function weakly: the bus must not keep a removed
/// device alive.
pub(super) struct Bar0(pub(super) Weak<VirtioPciFunction>);

impl BusDevice for Bar0 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.0.upgrade() {
            function.guest_reads(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.0.upgrade() {
            function.guest_writes(offset, data);
        }
    }
}
