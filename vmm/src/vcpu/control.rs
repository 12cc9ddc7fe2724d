//! What the manager wants of the vCPU threads and what each of them is doing: one lock, one
//! condition variable.
//!
//! ```text
//!   Starting ─▶ Parked ⇄ Running ─▶ Ended (KVM gave up, or the guest shut down)
//!                  └────────┴─────────┴──▶ Gone
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::kvm::ImmediateExit;

/// What the manager wants of all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Parked,
    Running,
    Gone,
}

/// What one thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Parked,
    Running,
    Ended,
    Gone,
}

/// What a thread shall do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Run,
    End,
}

struct Slot {
    phase: Phase,
    /// `None` once the thread may have dropped its run page.
    exit: Option<ImmediateExit>,
    /// The machine has this vCPU; else its thread stays parked.
    plugged: bool,
}

struct State {
    target: Target,
    slots: Vec<Slot>,
}

/// The shared state.
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    /// The first `boot` of them are plugged in.
    pub(super) fn new(exits: Vec<Option<ImmediateExit>>, boot: u32) -> Self {
        let slots = exits
            .into_iter()
            .zip(0..)
            .map(|(exit, index)| Slot {
                phase: Phase::Starting,
                exit,
                plugged: index < boot,
            })
            .collect();
        Self {
            state: Mutex::new(State {
                target: Target::Parked,
                slots,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by thread `index` whenever it is out of KVM_RUN: waits until it may run or must
    /// end.
    pub(super) fn next(&self, index: u32) -> Next {
        let mut state = self.lock();
        loop {
            let mut target = state.target;
            let Some(slot) = state.slots.get_mut(index as usize) else {
                return Next::End;
            };
            if target == Target::Running && !slot.plugged {
                target = Target::Parked;
            }
            match (target, slot.phase) {
                (Target::Gone, _) | (_, Phase::Gone) => {
                    slot.phase = Phase::Gone;
                    self.changed.notify_all();
                    return Next::End;
                }
                (_, Phase::Ended) | (Target::Parked, Phase::Parked) => {}
                (Target::Parked, _) => {
                    slot.phase = Phase::Parked;
                    self.changed.notify_all();
                }
                (Target::Running, before) => {
                    if before != Phase::Running {
                        slot.phase = Phase::Running;
                        self.changed.notify_all();
                    }
                    if let Some(exit) = &slot.exit {
                        exit.set(0);
                    }
                    return Next::Run;
                }
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Thread `index` will not run again.
    pub(super) fn ended(&self, index: u32) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.get_mut(index as usize) {
            slot.phase = Phase::Ended;
        }
        self.changed.notify_all();
    }

    /// Thread `index` is about to drop its run page, or never came to life: nothing may
    /// reach for it any more.
    pub(super) fn forget(&self, index: u32) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.get_mut(index as usize) {
            slot.phase = Phase::Gone;
            slot.exit = None;
        }
        self.changed.notify_all();
    }

    /// True while the manager wants the threads parked.
    pub(super) fn is_pausing(&self) -> bool {
        self.lock().target == Target::Parked
    }

    /// Plugs a vCPU in, or out; true: its thread must be kicked.
    pub(super) fn plug(&self, index: u32, plugged: bool) -> bool {
        let mut state = self.lock();
        let Some(slot) = state.slots.get_mut(index as usize) else {
            return false;
        };
        slot.plugged = plugged;
        let kick = !plugged && slot.phase == Phase::Running;
        if kick && let Some(exit) = &slot.exit {
            exit.set(1);
        }
        self.changed.notify_all();
        kick
    }

    /// Sets what is wanted; returns the threads that must be kicked for it.
    pub(super) fn ask(&self, target: Target) -> Vec<usize> {
        let mut state = self.lock();
        if state.target != Target::Gone {
            state.target = target;
        }
        let kicks = match target {
            Target::Running => Vec::new(),
            Target::Parked | Target::Gone => state
                .slots
                .iter()
                .enumerate()
                .filter(|(_, slot)| slot.phase == Phase::Running)
                .map(|(index, slot)| {
                    if let Some(exit) = &slot.exit {
                        exit.set(1);
                    }
                    index
                })
                .collect(),
        };
        self.changed.notify_all();
        kicks
    }

    /// Waits until no thread is in a phase that `busy` names; the first that still is, when
    /// the time is over.
    pub(super) fn wait_while(
        &self,
        timeout: Duration,
        busy: impl Fn(Phase) -> bool,
    ) -> Result<(), u32> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            let Some(index) = state.slots.iter().position(|slot| busy(slot.phase)) else {
                return Ok(());
            };
            let left = deadline.map_or(Duration::MAX, |d| {
                d.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(u32::try_from(index).unwrap_or(u32::MAX));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn threads_park_run_pause_and_end_as_asked() {
        let control = Arc::new(Control::new(vec![None, None], 2));
        let in_guest = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..2)
            .map(|index| {
                let control = Arc::clone(&control);
                let in_guest = Arc::clone(&in_guest);
                thread::spawn(move || {
                    let mut runs = 0;
                    while control.next(index) == Next::Run {
                        runs += 1;
                        // Stands for KVM_RUN, which lasts until the kick.
                        while in_guest.load(Ordering::SeqCst) {
                            thread::yield_now();
                        }
                    }
                    runs
                })
            })
            .collect();
        control.wait_while(LONG, |p| p != Phase::Parked).unwrap();
        assert!(control.ask(Target::Parked).is_empty(), "nobody runs yet");
        for _ in 0..50 {
            in_guest.store(true, Ordering::SeqCst);
            control.ask(Target::Running);
            control.wait_while(LONG, |p| p != Phase::Running).unwrap();
            assert_eq!(
                control.wait_while(Duration::ZERO, |p| p == Phase::Running),
                Err(0)
            );
            assert_eq!(control.ask(Target::Parked), [0, 1]);
            in_guest.store(false, Ordering::SeqCst);
            control.wait_while(LONG, |p| p == Phase::Running).unwrap();
        }
        control.ask(Target::Gone);
        control.wait_while(LONG, |p| p != Phase::Gone).unwrap();
        control.ask(Target::Running);
        assert!(threads.into_iter().all(|t| t.join().unwrap() == 50));
    }

    #[test]
    fn a_thread_that_has_ended_does_not_run_again() {
        let control = Arc::new(Control::new(vec![None], 1));
        control.ask(Target::Running);
        assert_eq!(control.next(0), Next::Run);
        control.ended(0);
        let waiter = {
            let control = Arc::clone(&control);
            thread::spawn(move || control.next(0))
        };
        control.ask(Target::Parked);
        control.wait_while(LONG, |p| p == Phase::Running).unwrap();
        control.ask(Target::Running);
        control.ask(Target::Gone);
        assert_eq!(waiter.join().unwrap(), Next::End);
        assert_eq!(control.next(7), Next::End, "an index that does not exist");
    }
}
