//! Devices whose back-end is somebody else's, as the manager sees them while the machine
//! runs: back-ends that go, that come back, and that the launcher connects or starts.

use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::devices::tell_spawned;
use super::{Host, Source};
use crate::launcher::ExitOutcome;
use crate::machine::device::{Device, Special};
use crate::machine::net_switch::{Came, EXITED, Switch};
use crate::machine::told;
use crate::vhost_user::VhostUserError;
use crate::virtio::{FailReason, ReconnectError};

/// A device's tie to its back-end, if that is somebody else's.
fn switch(device: &mut Device) -> Option<&mut Switch> {
    match &mut device.special {
        Special::Foreign(switch) => Some(switch),
        _ => None,
    }
}

impl Host {
    /// Watches the socket that a device's back-end comes by.
    pub(super) fn watch_listener(&mut self, index: usize) -> Result<(), String> {
        let Some(fd) = self
            .device(index)
            .and_then(switch)
            .and_then(|s| s.listener())
        else {
            return Ok(());
        };
        let index = u16::try_from(index).map_err(|_| "too many devices")?;
        self.watch(fd, Source::Listener { index }, EventSet::IN)
    }

    /// Somebody connects to a device's socket.
    pub(super) fn on_listener(&mut self, index: u16) {
        let Some(device) = self.device(usize::from(index)) else {
            return;
        };
        if let Special::Foreign(switch) = &mut device.special {
            let function = &device.function;
            switch.on_listener(&|stream| function.adopt(stream), Instant::now());
        }
    }

    /// A back-end is gone. The kind of the event that says so, and whether it is to be logged.
    pub(super) fn foreign_lost(
        &mut self,
        index: usize,
        why: &FailReason,
    ) -> Option<(&'static str, bool)> {
        let Self {
            machine, launcher, ..
        } = self;
        let device = machine.as_mut()?.parts.devices.get_mut(index)?;
        let hung_up = matches!(why, FailReason::Hangup);
        let why = (&*why.to_string(), hung_up);
        let news = switch(device)?.lost(&**launcher, why, Instant::now());
        Some(("device.disconnected", news))
    }

    /// A back-end has come. Where from, and whether that is to be logged. Only now is it told that
    /// a helper was started: attempts that fail may be without number.
    pub(super) fn foreign_came(&mut self, index: usize) -> Option<(String, bool)> {
        let device = self.device(index)?;
        let id = device.id.clone();
        let switch = switch(device)?;
        let news = switch.reconnected(Instant::now());
        let came = (switch.origin().to_string(), news);
        let helper = switch.serving();
        if let Some(process) = helper.map(|(process, incarnation)| (process.pid, incarnation)) {
            tell_spawned(&self.log, &id, process);
        }
        Some(came)
    }

    /// A back-end that came did not take over.
    pub(super) fn foreign_failed(&mut self, index: usize, error: &ReconnectError) {
        let Self {
            machine, launcher, ..
        } = self;
        let device = machine
            .as_mut()
            .and_then(|m| m.parts.devices.get_mut(index));
        let hung_up = matches!(error, ReconnectError::Backend(_, VhostUserError::Closed));
        let why = (&*error.to_string(), hung_up);
        let news = device
            .and_then(switch)
            .and_then(|s| s.not_reconnected(&**launcher, why, Instant::now()));
        if let Some(line) = news {
            self.tell(index, "device.not-reconnected", &line);
        }
    }

    /// A helper's process has ended. True: it was one.
    pub(super) fn foreign_exited(
        &mut self,
        id: &str,
        incarnation: u64,
        outcome: &ExitOutcome,
        last_line: &str,
    ) -> bool {
        let devices = self.machine.as_mut().map(|m| &mut m.parts.devices);
        let found = devices.and_then(|d| d.iter_mut().find(|d| d.id == id));
        let given_up = found.as_ref().is_some_and(|d| d.failed.is_some());
        let Some(switch) = found.and_then(switch) else {
            return false;
        };
        let how = outcome.with_last_line("", last_line);
        if let Some((kind, line, news)) = switch.exited(incarnation, &how, Instant::now()) {
            let ended = kind == EXITED;
            let what = ended.then(|| told::exited(incarnation, outcome));
            self.log.publish_typed(kind, id, &line, what);
            if news {
                let next = if given_up {
                    ""
                } else {
                    "; it is started again"
                };
                log::warn!("device {id}: {line}{next}");
            }
        }
        true
    }

    /// When a device is next to be connected.
    pub(super) fn foreign_timer(&self) -> Option<Instant> {
        let devices = self.machine.as_ref()?.parts.devices.iter();
        devices
            .filter_map(|device| match &device.special {
                Special::Foreign(switch) => switch.next_timer(),
                _ => None,
            })
            .min()
    }

    /// Begins the connections that are due. True: there were none.
    pub(super) fn on_foreign_timers(&mut self, now: Instant) -> bool {
        if self.foreign_timer().is_none_or(|at| at > now) {
            return true;
        }
        let Self {
            machine, launcher, ..
        } = self;
        let devices = machine.as_mut().map(|m| &mut m.parts.devices);
        let mut news = Vec::new();
        for (index, device) in devices.into_iter().flat_map(|d| d.numbered_mut()) {
            let function = std::sync::Arc::clone(&device.function);
            let adopt = |stream| function.adopt(stream);
            let line = switch(device).and_then(|s| s.on_timer(&**launcher, &adopt, now));
            news.extend(line.map(|line| (index, line)));
        }
        for (index, line) in news {
            self.tell(index, "device.not-reconnected", &line);
        }
        false
    }

    /// The launcher has connected to a back-end or started a helper, or not.
    pub(super) fn on_linked(&mut self, ticket: u64, result: Result<(), String>) {
        if self.on_respawned(ticket, &result) {
            return;
        }
        let linked = result.and_then(|()| {
            let linked = self.launcher.take_linked(ticket);
            linked
                .map(|linked| Came {
                    fd: linked.fd,
                    pid: linked.pid,
                    channel: linked.second,
                })
                .ok_or_else(|| "the launcher's answer was lost".to_owned())
        });
        let devices = self.machine.as_mut().map(|m| &mut m.parts.devices);
        let found = devices
            .into_iter()
            .flat_map(|d| d.numbered_mut())
            .find(|(_, d)| matches!(&d.special, Special::Foreign(s) if s.awaits(ticket)));
        // Nobody waits any more: a connection closes, and a helper ends with its channel.
        let Some((index, device)) = found else {
            return;
        };
        let function = std::sync::Arc::clone(&device.function);
        let adopt = |stream| function.adopt(stream);
        let news = switch(device).and_then(|s| s.on_linked(linked, &adopt, Instant::now()));
        if let Some(line) = news {
            self.tell(index, "device.not-reconnected", &line);
        }
    }
}
