//! A hypervisor for tests that does with eventfds what KVM does: an irqfd consumes its
//! eventfd and injects, at once when it is signalled already; a doorbell signals one.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::hypervisor::{Gsi, Hypervisor, MsiMessage};

struct Irqfd {
    identity: RawFd,
    event: OwnedFd,
    gsi: Gsi,
}

#[derive(Default)]
struct State {
    next: u32,
    routes: BTreeMap<Gsi, Option<MsiMessage>>,
    irqfds: Vec<Irqfd>,
    injected: Vec<MsiMessage>,
    doorbells: BTreeMap<u64, OwnedFd>,
    gsi_limit: Option<usize>,
}

/// The hypervisor.
#[derive(Default)]
pub struct MockHypervisor(Mutex<State>);

impl MockHypervisor {
    /// Refuses to give out more GSIs than this.
    pub fn limit_gsis(&self, limit: usize) {
        self.lock().gsi_limit = Some(limit);
    }

    /// Interrupts since the last call, after letting all irqfds work.
    pub fn injected(&self) -> Vec<MsiMessage> {
        let mut state = self.lock();
        for index in 0..state.irqfds.len() {
            let gsi = state.irqfds[index].gsi;
            if consume(&state.irqfds[index].event) {
                state.inject(gsi);
            }
        }
        std::mem::take(&mut state.injected)
    }

    /// A guest write that KVM sees first; true when a doorbell took it.
    pub fn write(&self, address: u64) -> bool {
        match self.lock().doorbells.get(&address) {
            Some(event) => rustix::io::write(event, &1_u64.to_ne_bytes()).is_ok(),
            None => false,
        }
    }

    /// GSIs that are given out.
    pub fn gsis(&self) -> usize {
        self.lock().routes.len()
    }

    /// Wired irqfds.
    pub fn irqfds(&self) -> usize {
        self.lock().irqfds.len()
    }

    /// Addresses of wired doorbells.
    pub fn doorbells(&self) -> Vec<u64> {
        self.lock().doorbells.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    fn inject(&mut self, gsi: Gsi) {
        let message = self.routes.get(&gsi).copied().flatten();
        self.injected
            .push(message.expect("an interrupt on an unrouted GSI"));
    }
}

/// Whether an eventfd has a count; takes nothing.
pub fn is_signalled(event: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&event, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).unwrap() == 1
}

/// Takes an eventfd's count; false when there was none.
pub fn consume(event: impl AsFd) -> bool {
    is_signalled(event.as_fd()) && rustix::io::read(event, &mut [0; 8]).is_ok()
}

impl Hypervisor for MockHypervisor {
    fn alloc_gsi(&self) -> Result<Gsi> {
        let mut state = self.lock();
        if state
            .gsi_limit
            .is_some_and(|limit| state.routes.len() >= limit)
        {
            return Err(Error::from(ErrorKind::OutOfMemory));
        }
        let gsi = Gsi(24 + state.next);
        state.next += 1;
        state.routes.insert(gsi, None);
        Ok(gsi)
    }

    fn free_gsi(&self, gsi: Gsi) {
        let mut state = self.lock();
        assert!(state.irqfds.iter().all(|irqfd| irqfd.gsi != gsi));
        assert!(state.routes.remove(&gsi).is_some());
    }

    fn route_msi(&self, gsi: Gsi, message: MsiMessage) -> Result<()> {
        *self.lock().routes.get_mut(&gsi).unwrap() = Some(message);
        Ok(())
    }

    fn add_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> Result<()> {
        let mut state = self.lock();
        let identity = eventfd.as_raw_fd();
        assert!(state.irqfds.iter().all(|irqfd| irqfd.identity != identity));
        let event = eventfd.try_clone_to_owned()?;
        if consume(&event) {
            state.inject(gsi);
        }
        state.irqfds.push(Irqfd {
            identity,
            event,
            gsi,
        });
        Ok(())
    }

    fn remove_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> Result<()> {
        let mut state = self.lock();
        let identity = eventfd.as_raw_fd();
        let before = state.irqfds.len();
        // What was signalled before is injected by KVM before it lets go.
        let at = (identity, gsi);
        let found = state.irqfds.iter().find(|i| (i.identity, i.gsi) == at);
        if found.is_some_and(|irqfd| consume(&irqfd.event)) {
            state.inject(gsi);
        }
        state.irqfds.retain(|i| (i.identity, i.gsi) != at);
        assert_eq!(state.irqfds.len() + 1, before);
        Ok(())
    }

    fn add_ioeventfd(&self, eventfd: BorrowedFd<'_>, address: u64) -> Result<()> {
        let event = eventfd.try_clone_to_owned()?;
        assert!(self.lock().doorbells.insert(address, event).is_none());
        Ok(())
    }

    fn remove_ioeventfd(&self, _eventfd: BorrowedFd<'_>, address: u64) -> Result<()> {
        assert!(self.lock().doorbells.remove(&address).is_some());
        Ok(())
    }
}
