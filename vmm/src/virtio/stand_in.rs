//! Who answers the control queue of a network device of ours that has been given up: Linux waits
//! for the answer to a command for ever, with its lock of all network configuration held, so that
//! it could not even give the device back. Every command is answered with an error (VIRTIO 1.2
//! section 5.1.6.5); receive and transmit queues stay as they are.
//!
//! Nobody stands in before the last process has ended, and a successor finds the ring at its used
//! index, as after any other process.

use std::sync::Arc;

use super::control::NetControl;
use super::function::{Device, VirtioPciFunction};
use super::kinds;

impl VirtioPciFunction {
    /// Begins or ceases to answer. On the function's own thread.
    pub(super) fn follow_stand_in(&self) {
        let ours = self.options.device_type == kinds::NET && self.options.net_control.is_none();
        if !ours || self.options.external {
            return;
        }
        let mut guard = self.lock_device();
        let device = &mut *guard;
        let wanted = self.link.failed() && self.is_quiet() && device.common.driver_ok();
        match (wanted, device.stand_in.is_some()) {
            (true, false) => device.stand_in = self.stand_in(device),
            (false, true) => device.stand_in = None,
            _ => {}
        }
    }

    fn stand_in(&self, device: &Device) -> Option<NetControl> {
        device.backend.check(&device.common).ok()?;
        let pairs = self.options.queues.saturating_sub(1) / 2;
        let memory = Arc::clone(device.backend.memory());
        let mut control = NetControl::new(pairs);
        control.start(&device.common);
        control.go_on(memory.memory());
        // One whose driver uses no control queue stands in for nothing, once.
        Some(control)
    }

    /// A turn at the queue; true when there may be more.
    pub(super) fn serve_stand_in(&self) -> bool {
        let mut guard = self.lock_device();
        let device = &mut *guard;
        let memory = Arc::clone(device.backend.memory());
        let Some(control) = &mut device.stand_in else {
            return false;
        };
        let Some(index) = control.queue() else {
            return false;
        };
        let served = control.serve(memory.memory(), &mut |_| false);
        self.conclude(device, index, served)
    }
}
