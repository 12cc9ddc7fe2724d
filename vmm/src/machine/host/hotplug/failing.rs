//! Devices that are pulled out without the guest's consent, of those kinds whose drivers wait for
//! answers without end. A disk's process answers all that is in the rings, and what comes, with an
//! error; those of consoles and network devices serve on, since Linux waits for the answer to what
//! it says to either, on a vCPU that does nothing else. The guest is asked for the device
//! meanwhile, and one that answers ejects it while there is somebody who answers it. What a guest
//! has in flight when a device has vanished nobody answers any more: so only a guest that does not
//! answer has it pulled from under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bulkhead_proto::device::BlkUpdate;

use super::leaving::Step;
use crate::api::ReplyHandle;
use crate::machine::control::{Task, Turn};
use crate::machine::device::Special;
use crate::machine::host::Host;
use crate::machine::state::MachineState;
use crate::pci::PciFunction;
use crate::virtio::Indices;

/// How long all of it may take: then the disk goes as it is.
const LIMIT: Duration = Duration::from_secs(15);
/// Between two looks at the rings.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a guest has, from its last sign of life, to eject a disk in whose rings nothing is: a
/// driver that is just setting the disk up will read from it, and wait for that without end.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same, where no driver holds the disk.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// Looks in a row that must find all rings empty.
const QUIET: u8 = 3;

/// What became of the word to a process.
const PENDING: u8 = 0;
const OBEYED: u8 = 1;
const REFUSED: u8 = 2;

/// The word to one process.
#[derive(Clone)]
struct Told {
    incarnation: u64,
    outcome: Arc<AtomicU8>,
}

impl Told {
    fn has(&self, outcome: u8) -> bool {
        self.outcome.load(Ordering::Acquire) == outcome
    }
}

/// What changes when a guest does something with a device.
#[derive(Default, PartialEq, Eq)]
struct Sign {
    status: u8,
    available: Vec<u16>,
}

/// Which rings hold what a driver waits for without end.
#[derive(Clone, Copy)]
enum Awaited {
    /// All of them.
    All,
    /// Those that the driver sends by: every second one.
    Sent,
    /// The control queue behind the pairs of receive and transmit queues, if there is one.
    Control,
}

impl Awaited {
    /// `None`: no driver of such a device waits.
    fn of(special: &Special) -> Option<Self> {
        match special {
            Special::Disk(_) => Some(Self::All),
            Special::Console(_) => Some(Self::Sent),
            Special::Net => Some(Self::Control),
            Special::Foreign(switch) => switch.is_net().then_some(Self::Control),
            Special::Rng | Special::Vsock(_) | Special::Memory(_) => None,
        }
    }

    /// Of the rings with these numbers, which are served in their order.
    fn has(self, index: u16, last: Option<u16>) -> bool {
        match self {
            Self::All => true,
            Self::Sent => !index.is_multiple_of(2),
            Self::Control => index.is_multiple_of(2) && last == Some(index),
        }
    }
}

/// A device that nobody's consent is needed for any more, and that answers still.
pub(super) struct Failing {
    look_at: Instant,
    until: Instant,
    /// The process that was told last.
    told: Option<Told>,
    /// When the guest was asked for the disk, or did something with it afterwards.
    alive: Option<Instant>,
    /// What it had done by then.
    sign: Sign,
    /// Looks in a row that found nothing in the rings.
    quiet: u8,
}

impl Failing {
    /// When it is to be looked at.
    pub(super) fn look_at(&self) -> Instant {
        self.look_at.min(self.until)
    }
}

impl Host {
    /// Has a disk's requests fail, and a console's be served, those of a quarantined one too: a new
    /// process does it. `None`: `wanted` is false, or no driver waits for such a device.
    pub(super) fn begin_failing(
        &mut self,
        index: usize,
        wanted: bool,
        now: Instant,
    ) -> Option<Failing> {
        let device = self.device(index)?;
        if !wanted || Awaited::of(&device.special).is_none() {
            return None;
        }
        match device.special {
            Special::Disk(_) => {
                // Every process from now on, should this one end.
                let mut update = BlkUpdate::new();
                update.pulled = true;
                device.process.as_mut()?.changes.disk(&update);
                self.revive(index);
            }
            Special::Console(_) => {
                self.revive(index);
            }
            // The function itself answers for a network device without a process.
            _ => {}
        }
        let until = now.checked_add(LIMIT).unwrap_or(now);
        Some(Failing {
            look_at: now,
            until,
            told: None,
            alive: None,
            sign: Sign::default(),
            quiet: 0,
        })
    }

    /// Pulls the device once nothing that is waited for is in its rings, or the time is over.
    pub(super) fn look_at_failing(&mut self, operation: u64, now: Instant) {
        let mut leaving = self.hotplug.leaving.iter();
        let Some((id, told)) = leaving.find_map(|l| match &l.step {
            Step::Failing(failing) if l.operation == operation => {
                Some((l.id.clone(), failing.told.clone()))
            }
            _ => None,
        }) else {
            return;
        };
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let Some(index) = devices.and_then(|d| d.position(|device| device.id == id)) else {
            return;
        };
        let serving = self.serving_incarnation(index);
        let told = match (serving, told) {
            (Some(serving), Some(told)) if told.incarnation == serving && !told.has(REFUSED) => {
                Some(told)
            }
            (Some(serving), _) => Some(self.tell_pulled(index, serving)),
            (None, _) => None,
        };
        let obeyed =
            told.as_ref().is_some_and(|told| told.has(OBEYED)) || self.answers_by_itself(index);
        let empty = obeyed && self.rings_are_empty(index);
        let (sign, held) = self.sign_of_life(index);
        let paused = self.machine.as_ref().map(|m| m.state) == Some(MachineState::Paused);
        let mut leaving = self.hotplug.leaving.iter_mut();
        let Some(Step::Failing(failing)) = leaving
            .find(|l| l.operation == operation)
            .map(|l| &mut l.step)
        else {
            return;
        };
        failing.told = told;
        let ask = obeyed && failing.alive.is_none();
        // A guest that stands still has all of its time yet.
        if ask || (failing.alive.is_some() && (paused || failing.sign != sign)) {
            failing.alive = Some(now);
            failing.sign = sign;
        }
        let patience = if held { PATIENCE } else { SHORT_PATIENCE };
        let until = failing.alive.and_then(|at| at.checked_add(patience));
        // A driver in a paused guest may be just about to say something: it is waited for.
        let deaf = failing.alive.is_some()
            && if paused {
                !held
            } else {
                until.is_some_and(|until| until <= now)
            };
        failing.quiet = if empty {
            failing.quiet.saturating_add(1)
        } else {
            0
        };
        failing.look_at = now.checked_add(PAUSE).unwrap_or(now);
        let (late, quiet) = (failing.until <= now, failing.quiet >= QUIET);
        if late && !quiet {
            log::warn!(
                "device {id}: pulled out with what the guest waits for in its rings, perhaps: that hangs in the guest"
            );
        } else if late && paused && held {
            log::warn!(
                "device {id}: pulled out of a paused guest, which may wait for it without end: resume the machine while a device that it uses is removed"
            );
        }
        if late || (quiet && deaf) {
            self.withdraw(&id);
            self.pull(operation);
        } else if ask {
            self.ask_guest(index);
        }
    }

    /// The process that serves the device and may be spoken to: no live update is under way.
    fn serving_incarnation(&mut self, index: usize) -> Option<u64> {
        let process = self.process(index)?;
        let serving =
            process.life.serving() && process.newcomer.is_none() && process.trial.is_none();
        serving.then_some(process.incarnation)
    }

    fn tell_pulled(&mut self, index: usize, incarnation: u64) -> Told {
        let outcome = Arc::new(AtomicU8::new(PENDING));
        let told = Told {
            incarnation,
            outcome: Arc::clone(&outcome),
        };
        let Some(device) = self.device(index) else {
            return told;
        };
        let (size, drained) = match &device.special {
            Special::Disk(disk) => (Some(disk.size), device.drained),
            _ => (None, device.drained),
        };
        let until = Instant::now() + LIMIT;
        let Some(size) = size else {
            if !drained {
                outcome.store(OBEYED, Ordering::Release);
                return told;
            }
            let reply = ReplyHandle::new(until, move |result| {
                let became = if result.is_ok() { OBEYED } else { REFUSED };
                outcome.store(became, Ordering::Release);
            });
            self.with_control(index, |control, turn: &mut Turn<'_>| {
                control.submit(Task::Resume, reply, turn)
            });
            return told;
        };
        if drained {
            let reply = ReplyHandle::new(until, |_| {});
            self.with_control(index, |control, turn: &mut Turn<'_>| {
                control.submit(Task::Resume, reply, turn)
            });
        }
        let mut update = BlkUpdate::new();
        update.pulled = true;
        let pull = Task::UpdateDisk {
            grow_to: None,
            size,
            update,
        };
        let reply = ReplyHandle::new(until, move |result| {
            let became = if result.is_ok() { OBEYED } else { REFUSED };
            outcome.store(became, Ordering::Release);
        });
        self.with_control(index, |control, turn: &mut Turn<'_>| {
            control.submit(pull, reply, turn)
        });
        told
    }

    /// No process answers what the driver waits for, but this one.
    fn answers_by_itself(&mut self, index: usize) -> bool {
        self.device(index).is_some_and(|d| match d.special {
            Special::Foreign(_) => true,
            Special::Net | Special::Console(_) => d.function.status().failure.is_some(),
            _ => false,
        })
    }

    /// How far those rings have come that the driver waits for, as memory has it: a driver may write
    /// there what it likes, and is only pulled from sooner or later. `None`: not to be had just now.
    fn awaited(&mut self, index: usize) -> Option<Vec<Indices>> {
        let device = self.device(index)?;
        let awaited = Awaited::of(&device.special)?;
        let rings = device.function.progress()?;
        let last = rings.iter().map(|(ring, _)| *ring).max();
        let those = rings.iter().filter(|(ring, _)| awaited.has(*ring, last));
        Some(those.map(|(_, at)| *at).collect())
    }

    /// What the guest has done with the device, and whether a driver of it holds the device.
    fn sign_of_life(&mut self, index: usize) -> (Sign, bool) {
        let rings = self.awaited(index).unwrap_or_default();
        let Some(device) = self.device(index) else {
            return (Sign::default(), false);
        };
        let function = &device.function;
        let sign = Sign {
            status: function.status().device_status,
            available: rings.iter().map(|at| at.available).collect(),
        };
        (sign, function.release_register().is_some())
    }

    /// Nothing that the driver waits for is in the rings.
    fn rings_are_empty(&mut self, index: usize) -> bool {
        let rings = self.awaited(index);
        rings.is_some_and(|rings| rings.iter().all(|at| at.available == at.used))
    }
}
