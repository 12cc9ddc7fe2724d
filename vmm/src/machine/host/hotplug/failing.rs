//! Disks that are pulled out without the guest's consent: their processes answer all that is in
//! the rings with an error before the disk leaves the bus. What a guest has in flight when it
//! learns that a device is gone nobody answers any more, and Linux waits for it without end.

use std::time::{Duration, Instant};

use bulkhead_proto::device::BlkUpdate;

use super::leaving::Step;
use crate::api::ReplyHandle;
use crate::machine::control::{Task, Turn};
use crate::machine::device::Special;
use crate::machine::host::Host;

/// How long all of it may take: then the disk goes as it is.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at the rings.
const PAUSE: Duration = Duration::from_millis(10);
/// Looks in a row that must find all rings empty.
const QUIET: u8 = 3;

/// A disk whose requests fail.
pub(super) struct Failing {
    look_at: Instant,
    until: Instant,
    /// The process that serves now has been told.
    told: Option<u64>,
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
            quiet: 0,
        })
    }

    pub(super) fn is_failing(&self, operation: u64) -> bool {
        let mut leaving = self.hotplug.leaving.iter();
        leaving.any(|l| l.operation == operation && matches!(l.step, Step::Failing(_)))
    }

    /// Pulls the disk once nothing is in its rings, or the time is over.
    pub(super) fn look_at_failing(&mut self, operation: u64, now: Instant) {
        let mut leaving = self.hotplug.leaving.iter();
        let Some((id, told)) = leaving.find_map(|l| match &l.step {
            Step::Failing(failing) if l.operation == operation => {
                Some((l.id.clone(), failing.told))
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
        if serving.is_some() && told != serving {
            self.tell_pulled(index);
        }
        let empty = serving.is_some() && told == serving && self.rings_are_empty(index);
        let mut leaving = self.hotplug.leaving.iter_mut();
        let Some(Step::Failing(failing)) = leaving
            .find(|l| l.operation == operation)
            .map(|l| &mut l.step)
        else {
            return;
        };
        failing.told = serving;
        failing.quiet = if empty {
            failing.quiet.saturating_add(1)
        } else {
            0
        };
        failing.look_at = now.checked_add(PAUSE).unwrap_or(now);
        let late = failing.until <= now;
        if late {
            log::warn!("device {id}: pulled out with requests in flight, which hang in the guest");
        }
        if late || failing.quiet >= QUIET {
            self.pull(operation);
        }
    }

    /// The process that serves the device and may be spoken to.
    fn serving_incarnation(&mut self, index: usize) -> Option<u64> {
        let process = self.process(index)?;
        let serving = process.life.serving() && process.newcomer.is_none();
        serving.then_some(process.incarnation)
    }

    fn tell_pulled(&mut self, index: usize) {
        let Some(device) = self.device(index) else {
            return;
        };
        let (size, drained) = match &device.special {
            Special::Disk(disk) => (disk.size, device.drained),
            _ => return,
        };
        let mut update = BlkUpdate::new();
        update.pulled = true;
        let pull = Task::UpdateDisk {
            grow_to: None,
            size,
            update,
        };
        let tasks = [Some(pull), drained.then_some(Task::Resume)];
        for task in tasks.into_iter().flatten() {
            // What comes of it is seen in the rings.
            let reply = ReplyHandle::new(Instant::now() + LIMIT, |_| {});
            self.with_control(index, |control, turn: &mut Turn<'_>| {
                control.submit(task, reply, turn)
            });
        }
    }

    /// Nothing is in the rings that the process serves, as memory has it: a driver may write there
    /// what it likes, and is only pulled from sooner or later.
    fn rings_are_empty(&mut self, index: usize) -> bool {
        let Some(device) = self.device(index) else {
            return false;
        };
        let progress = device.function.progress();
        progress.iter().all(|(_, at)| at.available == at.used)
    }
}
