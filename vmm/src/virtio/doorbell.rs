//! Doorbells: each queue's kick eventfd is wired to its notify address by KVM (ioeventfd),
//! so that a guest's notification goes straight to the device process (VIRTIO 1.2 section
//! 4.1.5.2).
//!
//! The wiring follows BAR 0: [`BarListener`] is called by the decoder, under its lock, on
//! vCPU threads. Notifications that do come through the VMM (by the PCI configuration
//! access window, or where KVM refused the wiring) are written by a thread of their own,
//! started when first needed: the device process shares the eventfd, may fill it and make
//! it blocking between any check and the write, and no vCPU may wait for that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::registers::{NOTIFY_MULTIPLIER, bar};
use crate::hypervisor::Hypervisor;
use crate::pci::BarListener;

struct Bell {
    kick: OwnedFd,
    /// A notification that the slow thread has not written yet.
    due: AtomicBool,
}

/// The doorbells of one function.
pub struct Doorbells {
    hypervisor: Arc<dyn Hypervisor>,
    bells: Arc<[Bell]>,
    /// Addresses that KVM watches, by queue.
    wired: Mutex<Vec<Option<u64>>>,
    slow: OnceLock<Option<SyncSender<()>>>,
}

impl Doorbells {
    /// One doorbell per queue, wired nowhere.
    pub fn new(queues: u16, hypervisor: Arc<dyn Hypervisor>) -> std::io::Result<Self> {
        let bells = (0..queues)
            .map(|_| {
                let kick = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
                Ok(Bell {
                    kick,
                    due: AtomicBool::new(false),
                })
            })
            .collect::<std::io::Result<_>>()?;
        let wired = Mutex::new(vec![None; usize::from(queues)]);
        Ok(Self {
            hypervisor,
            bells,
            wired,
            slow: OnceLock::new(),
        })
    }

    /// The eventfd that a queue's notifications signal.
    pub fn kick(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.bells
            .get(usize::from(queue))
            .map(|bell| bell.kick.as_fd())
    }

    /// A notification that reached the VMM. Never blocks.
    pub fn ring(&self, queue: usize) {
        let Some(bell) = self.bells.get(queue) else {
            return;
        };
        bell.due.store(true, Ordering::Release);
        if let Some(wake) = self.slow.get_or_init(|| start_ringer(&self.bells)) {
            // Full means that the thread will look again anyway.
            let _ = wake.try_send(());
        }
    }
}

impl BarListener for Doorbells {
    fn mapped(&self, base: u64) {
        let mut wired = self.wired.lock().unwrap_or_else(PoisonError::into_inner);
        for ((queue, bell), place) in (0_u64..).zip(self.bells.iter()).zip(wired.iter_mut()) {
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
        for (bell, place) in self.bells.iter().zip(wired.iter_mut()) {
            if let Some(address) = place.take()
                && let Err(error) = self.hypervisor.remove_ioeventfd(bell.kick.as_fd(), address)
            {
                log::warn!("cannot unwire the doorbell at {address:#x}: {error}");
            }
        }
    }
}

fn start_ringer(bells: &Arc<[Bell]>) -> Option<SyncSender<()>> {
    let (wake, woken) = sync_channel(1);
    let bells = Arc::clone(bells);
    let thread = std::thread::Builder::new().name("doorbell".to_owned());
    match thread.spawn(move || ring_when_due(&bells, &woken)) {
        Ok(_) => Some(wake),
        Err(error) => {
            log::warn!("cannot start the doorbell thread: {error}");
            None
        }
    }
}

/// Runs until the function is gone.
fn ring_when_due(bells: &[Bell], woken: &Receiver<()>) {
    while woken.recv().is_ok() {
        for bell in bells {
            // A full eventfd is signalled already: nothing to add.
            if bell.due.swap(false, Ordering::AcqRel) && has_room(&bell.kick) {
                let _ = rustix::io::write(&bell.kick, &1_u64.to_ne_bytes());
            }
        }
    }
}

fn has_room(kick: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(kick, PollFlags::OUT)];
    poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .is_ok_and(|ready| ready > 0)
}
