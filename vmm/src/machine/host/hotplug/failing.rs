//! Disks that are pulled out without the guest's consent: their processes answer all that is in
//! the rings, and what comes, with an error, and the guest is asked for the disk meanwhile. One that
//! answers ejects it while somebody still fails its requests. What a guest has in flight when a
//! device has vanished nobody answers any more, and Linux waits for it without end: so only a guest
//! that does not answer has it pulled from under it.

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

/// A disk whose requests fail.
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
    /// Has a disk's requests fail, those of a quarantined one too: a new process does it. `None`:
    /// `wanted` is false, or it is no disk of ours.
    pub(super) fn begin_failing(
        &mut self,
        index: usize,
        wanted: bool,
        now: Instant,
    ) -> Option<Failing> {
        let device = self.device(index)?;
        let disk = matches!(device.special, Special::Disk(_));
        if !wanted || !disk {
            return None;
        }
        // Every process from now on, should this one end.
        let mut update = BlkUpdate::new();
        update.pulled = true;
        device.process.as_mut()?.changes.disk(&update);
        self.revive(index);
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

    /// Pulls the disk once nothing is in its rings, or the time is over.
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
        let obeyed = told.as_ref().is_some_and(|told| told.has(OBEYED));
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
        if ask || (failing.alive.is_some() && failing.sign != sign) {
            failing.alive = Some(now);
            failing.sign = sign;
        }
        let patience = if held { PATIENCE } else { SHORT_PATIENCE };
        let until = failing.alive.and_then(|at| at.checked_add(patience));
        let deaf = failing.alive.is_some() && (paused || until.is_some_and(|until| until <= now));
        failing.quiet = if empty {
            failing.quiet.saturating_add(1)
        } else {
            0
        };
        failing.look_at = now.checked_add(PAUSE).unwrap_or(now);
        let (late, quiet) = (failing.until <= now, failing.quiet >= QUIET);
        if late && !quiet {
            log::warn!("device {id}: pulled out with requests in flight, which hang in the guest");
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
            Special::Disk(disk) => (disk.size, device.drained),
            _ => return told,
        };
        let until = Instant::now() + LIMIT;
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

    /// What the guest has done with the device, and whether a driver of it holds the device.
    fn sign_of_life(&mut self, index: usize) -> (Sign, bool) {
        let Some(device) = self.device(index) else {
            return (Sign::default(), false);
        };
        let function = &device.function;
        let rings = function.progress().unwrap_or_default();
        let sign = Sign {
            status: function.status().device_status,
            available: rings.iter().map(|(_, at)| at.available).collect(),
        };
        (sign, function.release_register().is_some())
    }

    /// Nothing is in the rings that the process serves, as memory has it: a driver may write there
    /// what it likes, and is only pulled from sooner or later.
    fn rings_are_empty(&mut self, index: usize) -> bool {
        let Some(device) = self.device(index) else {
            return false;
        };
        let progress = device.function.progress();
        progress.is_some_and(|rings| rings.iter().all(|(_, at)| at.available == at.used))
    }
}
