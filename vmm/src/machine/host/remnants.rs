//! What is left of a machine that was given up: processes that have not ended, and what a launcher
//! that did not answer may keep. Another Delete asks again; no machine is made beside it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_proto::{Code, RpcStatus};

use super::Host;
use crate::launcher::{Launcher, LauncherError, sys};
use crate::machine::device::{Device, END_LIMIT, Special};

/// A process by its pid and pidfd.
type Pid = (i32, OwnedFd);

/// What is left of a device.
struct Remnant {
    id: String,
    /// The last of its processes that the launcher was asked for; `None`: it had none.
    incarnation: Option<u64>,
    processes: Vec<Pid>,
    sockets: Vec<PathBuf>,
    /// The end of its process has been told.
    told: bool,
}

/// What is left of a machine.
#[derive(Default)]
pub(super) struct Remnants {
    devices: Vec<Remnant>,
    /// Removed by the launcher when it answers.
    serial: Option<PathBuf>,
    /// Why the launcher may not have done what it was asked.
    silent: Option<String>,
}

fn has_ended(pidfd: BorrowedFd<'_>, until: Instant) -> bool {
    let ready = sys::poll(&[(pidfd, libc::POLLIN)], Some(until)).unwrap_or_default();
    ready.iter().any(|events| *events != 0)
}

fn remnant(device: &Device) -> Remnant {
    let mut pids: Vec<(i32, BorrowedFd<'_>)> = Vec::new();
    let mut told = false;
    let incarnation = match (&device.process, &device.special) {
        (Some(process), _) => {
            told = process.newcomer.is_none() && process.life.has_exited();
            pids.push((process.pid, process.pidfd.as_fd()));
            let newcomer = process.newcomer.as_ref().and_then(|n| n.started.as_ref());
            pids.extend(newcomer.map(|(pid, fd)| (*pid, fd.as_fd())));
            Some(process.latest())
        }
        (None, Special::Foreign(switch)) => {
            pids.extend(switch.process().map(|p| (p.pid, p.pidfd.as_fd())));
            switch.running()
        }
        _ => None,
    };
    let own = |(pid, fd): (i32, BorrowedFd<'_>)| Some((pid, fd.try_clone_to_owned().ok()?));
    Remnant {
        id: device.id.clone(),
        incarnation,
        processes: pids.into_iter().filter_map(own).collect(),
        sockets: device.special.sockets().to_vec(),
        told,
    }
}

impl Remnants {
    /// Of these devices, whose end is to come, and the serial port's socket.
    pub(super) fn of<'a>(
        devices: impl Iterator<Item = &'a Device>,
        serial: Option<PathBuf>,
    ) -> Self {
        Self {
            devices: devices.map(remnant).collect(),
            serial,
            silent: None,
        }
    }

    /// The launcher did not answer when it was to end them.
    pub(super) fn unanswered(&mut self, launcher: &Launcher, why: &LauncherError) {
        let pid = launcher.pid();
        self.silent = Some(format!(
            "its launcher (pid {pid}) does not end what it keeps of it ({why})"
        ));
    }

    /// The end of a process has been told.
    pub(super) fn note_end(&mut self, id: &str, incarnation: u64) {
        for device in &mut self.devices {
            device.told |= device.id == id && device.incarnation == Some(incarnation);
        }
    }

    /// Forgets what has ended by now, or does within `limit` in all.
    pub(super) fn look(&mut self, limit: Duration) {
        let until = Instant::now().checked_add(limit);
        let until = until.unwrap_or_else(Instant::now);
        for device in &mut self.devices {
            device
                .processes
                .retain(|(_, pidfd)| !has_ended(pidfd.as_fd(), until));
        }
        if self.silent.is_none() {
            self.devices.retain(|device| !device.processes.is_empty());
            self.serial = None;
        }
    }

    /// Processes that live, as a client is told.
    pub(super) fn alive(&self) -> Vec<String> {
        let each = self.devices.iter().flat_map(|device| {
            let pids = device.processes.iter();
            pids.map(|(pid, _)| format!("process {pid} of device {} has not ended", device.id))
        });
        each.collect()
    }

    /// # Errors
    /// What is left, and how to be rid of it.
    pub(super) fn status(&self, launcher: &Launcher) -> Result<(), RpcStatus> {
        let left: Vec<String> = self.silent.iter().cloned().chain(self.alive()).collect();
        if left.is_empty() {
            return Ok(());
        }
        let pid = launcher.pid();
        let line = format!(
            "the machine is given up, but {}: what was stopped goes on with kill -CONT: then delete again, which says when nothing is left; kill -KILL {pid} ends this bulkhead with all of it",
            left.join(", ")
        );
        Err(RpcStatus::new(Code::DeadlineExceeded, line))
    }

    /// Asks the launcher again to end what is left.
    fn ask_again(&mut self, launcher: &Launcher) -> Result<(), LauncherError> {
        for device in &self.devices {
            let Some(incarnation) = device.incarnation else {
                continue;
            };
            launcher.kill_and_forget(&device.id, incarnation)?;
            if !device.told {
                launcher.take_end(&device.id, incarnation, END_LIMIT);
            }
        }
        let sockets = self.devices.iter().flat_map(|device| &device.sockets);
        for path in sockets.chain(&self.serial) {
            match launcher.forget(path) {
                // Removed at the first time.
                Err(LauncherError::Refused(why)) => log::debug!("{why}"),
                other => other?,
            }
        }
        Ok(())
    }
}

impl Host {
    /// Ends what is left of a machine that was given up, if anything is.
    ///
    /// # Errors
    /// What has not ended.
    pub(super) fn end_remnants(&mut self) -> Result<(), RpcStatus> {
        self.remnants.look(Duration::ZERO);
        if self.remnants.status(&self.launcher).is_ok() {
            return Ok(());
        }
        match self.remnants.ask_again(&self.launcher) {
            Ok(()) => self.remnants.silent = None,
            Err(why) => self.remnants.unanswered(&self.launcher, &why),
        }
        self.remnants.look(END_LIMIT);
        self.on_launcher();
        self.remnants.status(&self.launcher)
    }
}
