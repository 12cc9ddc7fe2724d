//! Doorbells: each queue's kick eventfd is wired to its notify address by KVM (ioeventfd),
//! so that a guest's notification goes straight to the device process (VIRTIO 1.2 section
//! 4.1.5.2).
//!
//! The wiring follows BAR 0: [`BarListener`] is called by the decoder, under its lock, on
//! vCPU threads. Notifications that do come through the VMM (by the PCI configuration
//! access window, or where KVM refused the wiring), and those with which a successor of
//! the device process is greeted, are written by a thread of their own, as are interrupts
//! that the VMM raises for a queue: the device process shares the eventfds, may fill them
//! and make them blocking between any check and the write, and nobody may wait for that.
//! A successor that empties a full eventfd sets the thread free again. The thread is made
//! with the function, and confined before it does anything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::registers::{NOTIFY_MULTIPLIER, bar};
use crate::hypervisor::Hypervisor;
use crate::pci::{BarListener, Msix};
use crate::threads::{self, ThreadHook};

struct Bell {
    kick: OwnedFd,
    /// A notification that the slow thread has not written yet.
    due: AtomicBool,
}

/// All that the slow thread signals.
struct Bells {
    kicks: Vec<Bell>,
    /// Vectors that it has not signalled yet.
    calls: Vec<AtomicBool>,
    /// Not kept alive by a thread that may be stuck.
    msix: Weak<Msix>,
}

/// The doorbells of one function.
pub struct Doorbells {
    hypervisor: Arc<dyn Hypervisor>,
    bells: Arc<Bells>,
    /// Addresses that KVM watches, by queue.
    wired: Mutex<Vec<Option<u64>>>,
    wake: SyncSender<()>,
}

impl Doorbells {
    /// One doorbell per queue, wired nowhere, and the thread that runs `hook` first.
    pub fn new(
        queues: u16,
        msix: &Arc<Msix>,
        hypervisor: Arc<dyn Hypervisor>,
        hook: ThreadHook,
    ) -> std::io::Result<Self> {
        let kicks = (0..queues)
            .map(|_| {
                let kick = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
                Ok(Bell {
                    kick,
                    due: AtomicBool::new(false),
                })
            })
            .collect::<std::io::Result<_>>()?;
        let calls = (0..msix.vectors())
            .map(|_| AtomicBool::new(false))
            .collect();
        let msix = Arc::downgrade(msix);
        let bells = Arc::new(Bells { kicks, calls, msix });
        let (wake, woken) = sync_channel(1);
        let ours = Arc::clone(&bells);
        threads::spawn(
            "doorbell".to_owned(),
            hook,
            || Ok(()),
            move || ring_when_due(&ours, &woken),
        )?;
        Ok(Self {
            hypervisor,
            bells,
            wired: Mutex::new(vec![None; usize::from(queues)]),
            wake,
        })
    }

    /// The eventfd that a queue's notifications signal.
    pub fn kick(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.bells
            .kicks
            .get(usize::from(queue))
            .map(|bell| bell.kick.as_fd())
    }

    /// A notification that reached the VMM. Never blocks.
    pub fn ring(&self, queue: usize) {
        if let Some(bell) = self.bells.kicks.get(queue) {
            self.owe(&bell.due);
        }
    }

    /// Raises a queue's interrupt as its device would. Never blocks.
    pub fn call(&self, vector: u16) {
        if let Some(due) = self.bells.calls.get(usize::from(vector)) {
            self.owe(due);
        }
    }

    fn owe(&self, due: &AtomicBool) {
        due.store(true, Ordering::Release);
        // Full means that the thread will look again anyway.
        let _ = self.wake.try_send(());
    }
}

impl BarListener for Doorbells {
    fn mapped(&self, base: u64) {
        let mut wired = self.wired.lock().unwrap_or_else(PoisonError::into_inner);
        for ((queue, bell), place) in (0_u64..).zip(&self.bells.kicks).zip(wired.iter_mut()) {
            let offset = bar::NOTIFY.saturating_add(queue.saturating_mul(NOTIFY_MULTIPLIER.into()));
            let Some(address) = base.checked_add(offset) else {
                continue;
            };
            match self.hypervisor.add_ioeventfd(bell.kick.as_fd(), address) {
                Ok(()) => *place = Some(address),
                Err(error) => log::warn!("doorbell of queue {queue} stays slow: {error}"),
            }
        }
    }

    fn unmapped(&self, _base: u64) {
        let mut wired = self.wired.lock().unwrap_or_else(PoisonError::into_inner);
        for (bell, place) in self.bells.kicks.iter().zip(wired.iter_mut()) {
            if let Some(address) = place.take()
                && let Err(error) = self.hypervisor.remove_ioeventfd(bell.kick.as_fd(), address)
            {
                log::warn!("cannot unwire the doorbell at {address:#x}: {error}");
            }
        }
    }
}

/// Runs until the function is gone.
fn ring_when_due(bells: &Bells, woken: &Receiver<()>) {
    while woken.recv().is_ok() {
        for bell in &bells.kicks {
            if bell.due.swap(false, Ordering::AcqRel) {
                signal(bell.kick.as_fd());
            }
        }
        for (vector, due) in (0..).zip(&bells.calls) {
            if due.swap(false, Ordering::AcqRel)
                && let Some(msix) = bells.msix.upgrade()
                && let Some(event) = msix.event(vector)
            {
                signal(event);
            }
        }
    }
}

/// A full eventfd is signalled already: nothing to add.
fn signal(event: BorrowedFd<'_>) {
    if has_room(event) {
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
    }
}

fn has_room(event: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::OUT)];
    poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .is_ok_and(|ready| ready > 0)
}
