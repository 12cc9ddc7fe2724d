//! The link of a network device whose back-end is somebody else's: what the driver is told of it
//! (VIRTIO 1.2 section 5.1.4), and what the back-end is, so that a link that is down carries
//! nothing, whatever the driver makes of it (vhost-user protocol, "Ring states").
//!
//! Any thread may take the link up or down, and none waits: the driver reads at once that it is
//! down. The rings are disabled and enabled by the function's own thread, which may wait for
//! the back-end; only then the driver reads that the link is up. A back-end that comes while it
//! is down is given its rings disabled.

use std::sync::atomic::Ordering;

use super::events::FailReason;
use super::function::{Device, VirtioPciFunction};
use super::registers::net;
use crate::vhost_user::VhostUserError;

impl VirtioPciFunction {
    /// Takes a network device's link up or down, where the VMM keeps it (a configuration
    /// space of the VMM's own). It is up only while there is a back-end, too. False for
    /// any other device. Never blocks: the back-end is told a moment later.
    pub fn set_link(&self, up: bool) -> bool {
        if self.options.net_control.is_none() {
            return false;
        }
        self.signals.link_down.store(!up, Ordering::Release);
        if !up {
            self.signals.carried.store(false, Ordering::Release);
            self.follow_link();
        }
        self.service.wake();
        true
    }

    /// Tells the back-end whether the link carries frames, if that has changed. On the function's
    /// own thread.
    pub(super) fn follow_carrier(&self) {
        if self.options.net_control.is_none() {
            return;
        }
        {
            let mut device = self.lock_device();
            let up = !self.signals.link_down.load(Ordering::Acquire);
            if device.carries != up {
                // First: should the back-end be lost over it, its successor is told.
                device.carries = up;
                if self.link.serving() {
                    self.carry(&mut device);
                }
            }
            self.signals
                .carried
                .store(device.carries, Ordering::Release);
        }
        self.follow_link();
    }

    /// Has the back-end begin or cease to carry frames.
    fn carry(&self, device: &mut Device) {
        let deadline = self.deadline();
        let done = match &device.control {
            // A back-end without protocol features has no disabled rings, but stopped ones.
            _ if !device.backend.can_disable() && !device.carries => {
                device.backend.stop(deadline).map(drop)
            }
            _ if !device.backend.can_disable() => return self.start_again(device),
            // Those that are enabled while the link is up.
            Some(control) => {
                let rings = control.shape(device.common.accepted()).enabled;
                device.backend.enable_below(rings, device.carries, deadline)
            }
            None => Ok(()),
        };
        match done {
            // Frames that were sent before or meanwhile wait in the rings.
            Ok(()) if device.carries => device.backend.greet(&device.common),
            Ok(()) => {}
            Err(VhostUserError::Refused(_)) if !device.carries => self.lose(FailReason::Unquiet),
            Err(error) => self.lose(FailReason::from(&error)),
        }
    }

    /// Rings that were stopped go on where they are.
    fn start_again(&self, device: &mut Device) {
        if !device.common.driver_ok() || !device.backend.started().is_empty() {
            return;
        }
        let (shape, deadline) = (device.shape(), self.deadline());
        let started = device.backend.start(&device.common, shape, &[], deadline);
        if started.is_ok() {
            device.backend.greet(&device.common);
        }
        self.on_started(started);
    }

    /// Whether the driver reads that the link is up: not before the rings are enabled.
    pub(super) fn link_up(&self) -> bool {
        let wanted = !self.signals.link_down.load(Ordering::Acquire);
        self.link.serving() && wanted && self.signals.carried.load(Ordering::Acquire)
    }

    /// Nobody serves a network device any more: whoever keeps its link, it is down, until a
    /// successor's configuration is fetched.
    pub(super) fn take_link_down(&self) {
        let ours = self.options.net_control.is_some();
        let net = self.options.device_type == super::kinds::NET;
        if net && !ours && self.lock_space().set_link(false) {
            self.signals.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// A network device's link status follows the back-end and the API.
    pub(super) fn follow_link(&self) {
        if self.options.net_control.is_none() {
            return;
        }
        let changed = {
            let mut space = self.lock_space();
            let up = self.link_up();
            let went = space.set_link(up);
            // Whoever is behind the link now must learn where the guest is.
            let announce = self.signals.features.load(Ordering::Acquire) & net::F_GUEST_ANNOUNCE;
            if went && up && announce != 0 && self.in_use() {
                space.set_announce(true);
                self.signals.announce_twice.store(true, Ordering::Release);
            }
            went
        };
        if changed {
            self.config_changed();
        }
    }
}
