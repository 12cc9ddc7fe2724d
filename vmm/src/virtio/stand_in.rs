//! Who answers in the place of a process of ours that has been given up, where Linux waits for ever:
//! for the answer to a command to a network device with its lock of all network configuration held,
//! so that it could not even give the device back; for what it sent by a console to be taken, on a
//! vCPU that does nothing else. Every command is answered with an error (VIRTIO 1.2 section
//! 5.1.6.5), and what goes to a console is lost; all other queues stay as they are.
//!
//! Nobody stands in before the last process has ended, and a successor finds the rings at their used
//! indices, and no log of what was in flight.

use std::sync::Arc;

use super::control::NetControl;
use super::function::{Device, VirtioPciFunction};
use super::kinds;
use super::sink::Sinks;

/// What stands in.
pub(super) enum StandIn {
    /// For a network device.
    Net(NetControl),
    /// For a console.
    Console(Sinks),
}

impl StandIn {
    /// What it serves.
    pub(super) fn queues(&self) -> Vec<u16> {
        match self {
            Self::Net(control) => control.queue().into_iter().collect(),
            Self::Console(sinks) => sinks.queues().collect(),
        }
    }
}

impl VirtioPciFunction {
    /// Begins or ceases to answer. On the function's own thread.
    pub(super) fn follow_stand_in(&self) {
        let kind = self.options.device_type;
        let waits = [kinds::NET, kinds::CONSOLE].contains(&kind);
        if !waits || self.options.net_control.is_some() || self.options.external {
            return;
        }
        let mut guard = self.lock_device();
        let device = &mut *guard;
        let wanted = self.link.failed() && self.is_quiet() && device.common.driver_ok();
        match (wanted, device.stand_in.is_some()) {
            (true, false) => {
                device.stand_in = self.stand_in(device);
                if device.stand_in.is_some() {
                    device.backend.drop_log();
                }
            }
            (false, true) => device.stand_in = None,
            _ => {}
        }
    }

    fn stand_in(&self, device: &Device) -> Option<StandIn> {
        device.backend.check(&device.common).ok()?;
        let memory = Arc::clone(device.backend.memory());
        if self.options.device_type == kinds::CONSOLE {
            let sinks = Sinks::new(&device.common, memory.memory());
            return Some(StandIn::Console(sinks));
        }
        let pairs = self.options.queues.saturating_sub(1) / 2;
        let mut control = NetControl::new(pairs);
        control.start(&device.common);
        control.go_on(memory.memory());
        // One whose driver uses no control queue stands in for nothing, once.
        Some(StandIn::Net(control))
    }

    /// A turn at the queues; true when there may be more.
    pub(super) fn serve_stand_in(&self) -> bool {
        let mut guard = self.lock_device();
        let device = &mut *guard;
        let memory = Arc::clone(device.backend.memory());
        let served = match &mut device.stand_in {
            Some(StandIn::Net(control)) => {
                let index = control.queue();
                let serve = |index| (index, control.serve(memory.memory(), &mut |_| false));
                index.map(serve).into_iter().collect()
            }
            Some(StandIn::Console(sinks)) => sinks.serve(memory.memory()),
            None => Vec::new(),
        };
        let mut more = false;
        for (index, served) in served {
            more |= self.conclude(device, index, served);
        }
        more
    }
}
