//! What ends a machine, and what leaves it: events from vCPU threads to the manager.
//!
//! Senders run on vCPU threads and never block; the manager thread polls the receiver's
//! eventfd and drains it. The queue is bounded: a guest that writes its reset register in
//! a loop fills it, and everything after the first few events says nothing new.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vcpu::VcpuFault;

/// Events that may wait for the manager.
const CAPACITY: usize = 64;

/// Something the manager must act on.
#[derive(Debug)]
pub enum MachineEvent {
    /// The guest entered S5.
    PowerOff,
    /// The guest wrote a reset register.
    Reset,
    /// The guest has ejected something: see the hot-plug registers.
    Ejected,
    /// A vCPU shut down: an exception while delivering a double fault.
    TripleFault {
        /// The vCPU's index.
        vcpu: u32,
    },
    /// A vCPU cannot go on: KVM, not the guest, gave up.
    VcpuFailed {
        /// The vCPU's index.
        vcpu: u32,
        /// What KVM said.
        fault: VcpuFault,
    },
}

struct Queue {
    events: Mutex<VecDeque<MachineEvent>>,
    bell: EventFd,
}

/// The sending end; cheap to clone.
#[derive(Clone)]
pub struct EventSender(Arc<Queue>);

/// The manager's end.
pub struct EventReceiver(Arc<Queue>);

/// A queue of machine events.
pub fn event_channel() -> io::Result<(EventSender, EventReceiver)> {
    let queue = Arc::new(Queue {
        events: Mutex::new(VecDeque::with_capacity(CAPACITY)),
        bell: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
    });
    Ok((EventSender(Arc::clone(&queue)), EventReceiver(queue)))
}

impl EventSender {
    /// Hands `event` to the manager; drops it when the queue is full.
    pub fn send(&self, event: MachineEvent) {
        let mut events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < CAPACITY {
            events.push_back(event);
            // The counter cannot overflow: at most CAPACITY writes lie between two drains.
            let _ = self.0.bell.write(1);
        }
    }
}

impl EventReceiver {
    /// The oldest event. The descriptor stops being readable once this has returned `None`.
    pub fn try_recv(&self) -> Option<MachineEvent> {
        let mut events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        let event = events.pop_front();
        if event.is_none() {
            let _ = self.0.bell.read();
        }
        event
    }
}

impl AsFd for EventReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        crate::kvm::borrow_fd(&self.0.bell, self.0.bell.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_bounded_and_order_is_kept() {
        let (sender, receiver) = event_channel().unwrap();
        sender.send(MachineEvent::TripleFault { vcpu: 3 });
        for _ in 0..1000 {
            sender.send(MachineEvent::Reset);
        }
        assert!(matches!(
            receiver.try_recv(),
            Some(MachineEvent::TripleFault { vcpu: 3 })
        ));
        let rest = std::iter::from_fn(|| receiver.try_recv()).count();
        assert_eq!(rest, CAPACITY - 1);
        assert!(receiver.try_recv().is_none());
        sender.send(MachineEvent::PowerOff);
        assert!(matches!(receiver.try_recv(), Some(MachineEvent::PowerOff)));
    }
}
