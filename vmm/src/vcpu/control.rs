//! What the manager wants of the vCPU threads and what each of them is doing: one lock, one
//! condition variable.
//!
//! ```text
//!   Starting ─▶ Parked ⇄ Running ─▶ Ended (KVM gave up, or the guest shut down)
//!                  ▲        │         ├──▶ Gone
//!                  └────────┴─────────┘ (a reset brings one back that has ended)
//! ```

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::arch::x86_64::boot::BootEntry;
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
    /// Become what the vCPU was at first, and say so ([`Control::was_reset`]). The boot processor
    /// is pointed at this kernel.
    Reset(Arc<BootEntry>),
    End,
}

struct Slot {
    phase: Phase,
    /// `None` once the thread may have dropped its run page.
    exit: Option<ImmediateExit>,
    /// The machine has this vCPU; else its thread stays parked.
    plugged: bool,
    /// It shall become what it was at first.
    reset: Option<Arc<BootEntry>>,
}

struct State {
    target: Target,
    slots: Vec<Slot>,
    /// Why a vCPU could not be reset, the first that could not.
    not_reset: Option<(u32, String)>,
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
                reset: None,
            })
            .collect();
        Self {
            state: Mutex::new(State {
                target: Target::Parked,
                slots,
                not_reset: None,
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
            let (asked, mut target) = (state.target, state.target);
            let Some(slot) = state.slots.get_mut(index as usize) else {
                return Next::End;
            };
            if target == Target::Running && !slot.plugged {
                target = Target::Parked;
            }
            if let (Target::Parked, Some(entry)) = (asked, &slot.reset)
                && slot.phase != Phase::Gone
            {
                return Next::Reset(Arc::clone(entry));
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

    /// Has every thread reset its vCPU; the first `present` are plugged in afterwards. They are to
    /// be parked.
    pub(super) fn ask_reset(&self, entry: &Arc<BootEntry>, present: u32) {
        let mut state = self.lock();
        state.not_reset = None;
        for (slot, index) in state.slots.iter_mut().zip(0..) {
            slot.plugged = index < present;
            slot.reset = (slot.phase != Phase::Gone).then(|| Arc::clone(entry));
        }
        self.changed.notify_all();
    }

    /// Thread `index` has reset its vCPU, or could not.
    pub(super) fn was_reset(&self, index: u32, result: Result<(), String>) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.get_mut(index as usize) {
            slot.reset = None;
            slot.phase = Phase::Parked;
        }
        if let (Err(why), None) = (result, &state.not_reset) {
            state.not_reset = Some((index, why));
        }
        self.changed.notify_all();
    }

    /// Waits until every thread has reset its vCPU; else which has not, and why, if it said.
    pub(super) fn wait_reset(&self, timeout: Duration) -> Result<(), (u32, Option<String>)> {
        self.wait_for(timeout, |slot| slot.reset.is_some())
            .map_err(|index| (index, None))?;
        match self.lock().not_reset.take() {
            Some((index, why)) => Err((index, Some(why))),
            None => Ok(()),
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
        self.wait_for(timeout, |slot| busy(slot.phase))
    }

    fn wait_for(&self, timeout: Duration, busy: impl Fn(&Slot) -> bool) -> Result<(), u32> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            let Some(index) = state.slots.iter().position(&busy) else {
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
    use crate::arch::x86_64::boot::EntryMode;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    fn a_reset_is_made_by_parked_threads_and_revives_one_that_has_ended() {
        let control = Arc::new(Control::new(vec![None, None, None], 3));
        let entry = Arc::new(BootEntry::at(EntryMode::Long, 0x1000));
        let resets = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|index| {
                let (control, resets) = (Arc::clone(&control), Arc::clone(&resets));
                thread::spawn(move || {
                    let mut ended = false;
                    loop {
                        match control.next(index) {
                            Next::Run if index == 1 && !ended => {
                                ended = true;
                                control.ended(index);
                            }
                            Next::Run => thread::yield_now(),
                            Next::Reset(entry) => {
                                assert_eq!(entry.entry(), 0x1000);
                                resets.fetch_add(1, Ordering::SeqCst);
                                control.was_reset(index, Ok(()));
                            }
                            Next::End => return,
                        }
                    }
                })
            })
            .collect();
        control.wait_while(LONG, |p| p != Phase::Parked).unwrap();
        control.ask(Target::Running);
        control.wait_while(LONG, |p| p == Phase::Parked).unwrap();
        let ended = |p| p == Phase::Ended;
        while control.wait_while(Duration::ZERO, ended).is_ok() {
            thread::yield_now();
        }
        control.ask(Target::Parked);
        control.wait_while(LONG, |p| p == Phase::Running).unwrap();
        // The last one is not there any more.
        control.ask_reset(&entry, 2);
        control.wait_reset(LONG).unwrap();
        assert_eq!(resets.load(Ordering::SeqCst), 3);
        control.wait_while(LONG, |p| p != Phase::Parked).unwrap();
        control.ask(Target::Running);
        while control.wait_while(Duration::ZERO, |p| p == Phase::Parked) != Err(2) {
            thread::yield_now();
        }
        control.ask(Target::Gone);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn which_vcpu_could_not_be_reset_is_said() {
        let control = Control::new(vec![None, None], 2);
        let entry = Arc::new(BootEntry::at(EntryMode::Long, 0));
        control.ask_reset(&entry, 2);
        control.was_reset(0, Ok(()));
        assert_eq!(control.wait_reset(Duration::ZERO), Err((1, None)));
        control.was_reset(1, Err("KVM".to_owned()));
        assert_eq!(
            control.wait_reset(Duration::ZERO),
            Err((1, Some("KVM".to_owned())))
        );
        assert_eq!(control.wait_reset(Duration::ZERO), Ok(()));
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
