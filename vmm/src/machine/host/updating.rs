//! The deeds of a live update (`ctl update-device`): a process of another binary is started
//! beside the one that serves, is greeted, waits until that has nothing in flight, and gets its
//! rings from the function by the same way as the successor of one that died. Until it has them
//! the other one stays, and goes on if anything fails. On the manager thread; nothing waits.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::UpdateDeviceResponse;
use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{Host, Source};
use crate::api::{ApiResponse, process_name};
use crate::launcher::{Linked, printable};
use crate::machine::newcomer::{Fault, Newcomer, Ready};
use crate::machine::supervise::CrashReason;
use crate::machine::told;
use crate::machine::trial::{Candidate, Ended, Stage, Trial};
use crate::virtio::Reconnected;

impl Host {
    fn trial(&mut self, index: usize) -> Option<&mut Trial> {
        self.process(index)?.trial.as_mut()
    }

    pub(super) fn forget_fd(&self, fd: RawFd) {
        // What has left already does not matter.
        let gone = EpollEvent::default();
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, gone);
    }

    /// A client's request has come to its turn: asks for the process.
    pub(super) fn begin_trial(&mut self, index: usize, binary: &str) {
        let Self {
            machine, launcher, ..
        } = self;
        let devices = machine.as_mut().map(|m| &mut m.parts.devices);
        let Some(device) = devices.and_then(|d| d.get_mut(index)) else {
            return;
        };
        let Some(process) = &mut device.process else {
            return;
        };
        let binary = match binary {
            "" => process.kind.binary,
            named => named,
        };
        let incarnation = process.last_incarnation.saturating_add(1);
        process.last_incarnation = incarnation;
        match launcher.begin_update(&device.id, incarnation, binary) {
            Ok((ticket, control, vhost)) => {
                let now = Instant::now();
                let newcomer = Newcomer::new(
                    (&device.id, process.kind),
                    (ticket, incarnation),
                    (control, vhost),
                    (&process.changes, device.drained),
                    now,
                );
                process.trial = Some(Trial::new(newcomer, binary, now));
            }
            Err(error) => {
                let status = RpcStatus::new(Code::Unavailable, error.to_string());
                self.with_control(index, |control, turn| {
                    control.end_replacement(status, false, turn)
                });
            }
        }
    }

    /// The launcher's answer to a start. False: it is not about a process on trial.
    pub(super) fn on_trial_started(&mut self, ticket: u64, result: &Result<(), String>) -> bool {
        let found = self.machine.as_ref().and_then(|machine| {
            machine.parts.devices.position(|device| {
                let trial = device.process.as_ref().and_then(|p| p.trial.as_ref());
                trial.is_some_and(|t| matches!(&t.stage, Stage::Starting(n) if n.ticket == ticket))
            })
        });
        let Some(index) = found else {
            return false;
        };
        let linked = result.clone().and_then(|()| {
            let linked = self.launcher.take_linked(ticket);
            linked.ok_or_else(|| "the launcher's answer was lost".to_owned())
        });
        let begun = linked.and_then(|linked| self.greet_trial(index, linked));
        if let Err(why) = begun {
            self.end_trial(index, &why);
        }
        true
    }

    fn greet_trial(&mut self, index: usize, linked: Linked) -> Result<(), String> {
        let Linked {
            fd,
            pid,
            second: fence,
        } = linked;
        let Some(trial) = self.trial(index) else {
            return Ok(());
        };
        let Stage::Starting(newcomer) = &mut trial.stage else {
            return Ok(());
        };
        let pid = pid.unwrap_or(0);
        let spawned = told::spawned(pid, newcomer.incarnation);
        newcomer.started = Some((pid, fd));
        let greeted = newcomer.greet();
        let control = newcomer.as_fd().as_raw_fd();
        let fence_fd = fence.as_ref().map(AsRawFd::as_raw_fd);
        trial.fence = fence;
        self.tell_typed(index, "device.spawned", "on trial", Some(spawned));
        greeted?;
        let fence_fd = fence_fd.ok_or("its fence is missing")?;
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        self.watch(fence_fd, Source::TrialFence { index }, EventSet::empty())?;
        self.watch(control, Source::Trial { index }, EventSet::IN)
    }

    /// The control channel of a process on trial is ready, or its deadline may have come.
    pub(super) fn on_trial(&mut self, index: usize) {
        let Some(trial) = self.trial(index) else {
            return;
        };
        match &mut trial.stage {
            Stage::Starting(newcomer) => match newcomer.on_event(Instant::now()) {
                Ok(false) => {}
                Ok(true) => self.on_candidate(index),
                Err(Fault::Wrong(why)) => self.end_trial(index, &why),
                // Its end says more, if that is what it was.
                Err(Fault::HungUp) => {
                    let fd = newcomer.as_fd().as_raw_fd();
                    trial.hung_up(Instant::now());
                    self.forget_fd(fd);
                }
            },
            // It was asked nothing more: it hung up, or speaks out of turn.
            Stage::Draining(_) => self.end_trial(index, "it did not keep quiet until its turn"),
            Stage::HandingOver(candidate) => {
                let fd = candidate.client.as_fd().as_raw_fd();
                self.forget_fd(fd);
            }
        }
    }

    /// A process on trial is ready: the one that serves is to finish.
    fn on_candidate(&mut self, index: usize) {
        let now = Instant::now();
        let Some(device) = self.device(index) else {
            return;
        };
        let drained = device.drained;
        let Some(process) = &mut device.process else {
            return;
        };
        let Some(mut trial) = process.trial.take() else {
            return;
        };
        let Stage::Starting(mut newcomer) = trial.stage else {
            return;
        };
        let ready_us = now.saturating_duration_since(newcomer.begun).as_micros();
        let started = newcomer.started.take();
        let Some(Ready {
            client,
            vhost,
            hello,
        }) = newcomer.into_ready()
        else {
            return;
        };
        trial.stage = Stage::Draining(Box::new(Candidate {
            client,
            vhost: Some(vhost),
            hello,
            ready_us: u64::try_from(ready_us).unwrap_or(u64::MAX),
            process: started,
        }));
        trial.quiet_since = Some(now);
        process.trial = Some(trial);
        if drained {
            return self.on_quiet(index);
        }
        self.with_control(index, |control, turn| control.make_quiet(turn.now));
    }

    /// The process that serves has nothing in flight: the function gives its rings away.
    pub(super) fn on_quiet(&mut self, index: usize) {
        let Some(device) = self.device(index) else {
            return;
        };
        let Some(process) = &mut device.process else {
            return;
        };
        let Some(mut trial) = process.trial.take() else {
            return;
        };
        let mut vhost = None;
        trial.stage = match trial.stage {
            Stage::Draining(mut candidate) => {
                vhost = candidate.vhost.take();
                Stage::HandingOver(candidate)
            }
            other => other,
        };
        process.trial = Some(trial);
        let Some(vhost) = vhost else {
            return;
        };
        if let Err(error) = device.function.adopt(vhost) {
            self.end_trial(index, &error.to_string());
        }
    }

    /// The function is just giving a device's rings to a process on trial.
    pub(super) fn hands_over(&mut self, index: usize) -> bool {
        self.trial(index).is_some_and(|trial| trial.hands_over())
    }

    /// The process on trial has the rings: it is the device's, and the other one goes.
    pub(super) fn finish_trial(&mut self, index: usize, done: &Reconnected) {
        let now = Instant::now();
        let Some(process) = self.process(index) else {
            return;
        };
        let Some(trial) = process.trial.take() else {
            return;
        };
        let Stage::HandingOver(candidate) = trial.stage else {
            return;
        };
        let Candidate {
            client,
            hello,
            ready_us,
            process: started,
            ..
        } = *candidate;
        let stall = trial
            .quiet_since
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let stall_us = u64::try_from(stall.as_micros()).unwrap_or(u64::MAX);
        let old = process.control.as_fd().as_raw_fd();
        let old_fence = process.fence.take();
        let (control, fence) = (client.as_fd().as_raw_fd(), trial.fence);
        let fence_fd = fence.as_ref().map(AsRawFd::as_raw_fd);
        process.incarnation = trial.incarnation;
        process.fence = fence;
        process.ready_us = ready_us;
        process.hello = hello;
        process.unsettled = true;
        process.interest = EventSet::IN;
        process.detectors.clear();
        process.life.replaced();
        if let Some((pid, pidfd)) = started {
            (process.pid, process.pidfd) = (pid, pidfd);
        }
        let mut response = UpdateDeviceResponse::new();
        response.incarnation = trial.incarnation;
        response.version = printable(&process.hello.version);
        response.stall_us = stall_us;
        // Out of the epoll set before they close.
        for fd in old_fence
            .iter()
            .map(AsRawFd::as_raw_fd)
            .chain([old, control])
        {
            self.forget_fd(fd);
        }
        if let Some(fd) = fence_fd {
            self.forget_fd(fd);
        }
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        if let Some(fd) = fence_fd
            && let Err(why) = self.watch(fd, Source::Fence { index: number }, EventSet::empty())
        {
            log::warn!("{why}");
        }
        if let Err(why) = self.watch(control, Source::Control { index: number }, EventSet::IN) {
            log::warn!("{why}");
        }
        let Some(process) = self.process(index) else {
            return;
        };
        let reply = process.control.succeed(client);
        let reset = if done.needs_reset {
            "; it waits for a reset by the guest"
        } else {
            ""
        };
        let detail = format!(
            "{} {} serves {} queues after {stall_us} us{reset}",
            printable(&trial.binary),
            response.version,
            done.queues
        );
        let pid = self.process(index).map_or(0, |process| process.pid);
        let what = told::updated(
            pid,
            response.incarnation,
            stall_us,
            &response.version,
            done.queues,
        );
        self.tell_typed(index, "device.updated", &detail, Some(what));
        self.settle_trials();
        if let (Some(ended), Some(device)) = (&trial.seen.exited, self.device(index)) {
            let id = device.id.clone();
            self.tell_exited(&id, ended);
        }
        if let Some(reply) = reply {
            reply.complete(Ok(ApiResponse::DeviceUpdated(response)));
        }
        self.with_control(index, |control, turn| control.go_on(turn));
        self.renew_memory(index);
        if trial.fence_fell {
            self.with_life(index, |life, now| life.fence_fell(now));
        }
        if let Some(ended) = trial.exited {
            self.bury(index, &ended);
        }
    }

    /// Nothing comes of a live update: the process on trial goes, the other one goes on. Of each
    /// process first the reason why it had to go is told and then its end: `device.not-updated` is
    /// the reason of the one on trial, as `device.crashed` is of one that served. So it comes first
    /// also where the process had ended before; where it is killed only now, its end is still to come.
    pub(in crate::machine::host) fn end_trial(&mut self, index: usize, why: &str) {
        let Self {
            machine, launcher, ..
        } = self;
        let devices = machine.as_mut().map(|m| &mut m.parts.devices);
        let Some(device) = devices.and_then(|d| d.get_mut(index)) else {
            return;
        };
        let (id, drained) = (device.id.clone(), device.drained);
        let Some(process) = &mut device.process else {
            return;
        };
        let Some(trial) = process.trial.take() else {
            return;
        };
        if trial.exited.is_none()
            && let Err(error) = launcher.begin_kill(&id, trial.incarnation)
        {
            log::warn!("device {id}: {error}");
        }
        let lost = trial.seen.lost.is_some() || trial.seen.exited.is_some();
        let other = match lost {
            false => "the process before it goes on",
            true => "it is replaced by another of its own binary: see events, and retry",
        };
        let binary = printable(&trial.binary);
        // The launcher's reasons begin with the device, and name the binary.
        let why = why.strip_prefix(&format!("device {id}: ")).unwrap_or(why);
        let line = match why.contains(&binary) {
            true => format!("device {id}: {why}; {other}"),
            false => format!("device {id}: {binary}: {why}; {other}"),
        };
        let status = RpcStatus::failed_precondition(line);
        let name = process_name(trial.pid(), trial.incarnation);
        self.tell(index, "device.not-updated", &format!("{why} ({name})"));
        // Also where it was not drained: what the other one did to what they share (a tap's
        // settings) is put right.
        let resume = !drained && !lost;
        self.with_control(index, |control, turn| {
            control.end_replacement(status, resume, turn)
        });
        if let Some(reason) = trial.seen.lost {
            self.with_life(index, |life, now| life.lost(reason, now));
        }
        if trial.seen.fence_fell {
            self.with_life(index, |life, now| life.fence_fell(now));
        }
        if let Some(ended) = trial.exited {
            self.tell_exited(&id, &ended);
        }
        if let Some(ended) = trial.seen.exited {
            self.bury(index, &ended);
        }
    }

    /// The process that serves is lost: noted while its rings are being given away, else the
    /// end of a live update. `None`: there is nothing more to do.
    #[expect(clippy::option_option, reason = "a reason may be unknown")]
    pub(super) fn lost_beside_trial(
        &mut self,
        index: usize,
        reason: Option<CrashReason>,
    ) -> Option<Option<CrashReason>> {
        let Some(trial) = self.trial(index) else {
            return Some(reason);
        };
        if trial.hands_over() {
            trial.seen.lost.get_or_insert(reason);
            return None;
        }
        trial.seen.lost = Some(reason);
        self.end_trial(index, "the process that serves was lost meanwhile");
        None
    }

    /// The fence of the process that serves has fallen. True: it is noted for later.
    pub(super) fn fell_beside_trial(&mut self, index: usize) -> bool {
        match self.trial(index) {
            Some(trial) if trial.hands_over() => {
                trial.seen.fence_fell = true;
                true
            }
            _ => false,
        }
    }

    /// A process has been reaped; comes back unless it belongs to a live update.
    pub(super) fn on_trial_exited(&mut self, id: &str, ended: Ended) -> Option<Ended> {
        let machine = self.machine.as_ref();
        let found = machine.and_then(|m| m.parts.devices.position(|d| d.id == id));
        let Some(index) = found else {
            return Some(ended);
        };
        let Some(process) = self.process(index) else {
            return Some(ended);
        };
        let serving = process.incarnation;
        let Some(trial) = &mut process.trial else {
            return Some(ended);
        };
        let handing_over = trial.hands_over();
        if ended.incarnation == trial.incarnation {
            let why = format!("it ended: {}", CrashReason::from_outcome(ended.outcome));
            trial.exited = Some(ended);
            if !handing_over {
                self.end_trial(index, &why);
            }
            return None;
        }
        if ended.incarnation != serving {
            return Some(ended);
        }
        trial.seen.exited = Some(ended);
        trial.seen.lost.get_or_insert(None);
        if !handing_over {
            self.end_trial(index, "the process that serves ended meanwhile");
        }
        None
    }

    /// The process has been replaced by a live update, or was on trial and is not any more:
    /// nothing follows from its end.
    pub(super) fn is_replaced(&self, id: &str, incarnation: u64) -> bool {
        let devices = self.machine.iter().flat_map(|m| m.parts.devices.iter());
        let mut processes = devices
            .filter(|d| d.id == id)
            .filter_map(|d| d.process.as_ref());
        processes.any(|process| {
            let newcomer = process.newcomer.as_ref().map(|n| n.incarnation);
            let trial = process.trial.as_ref().map(|t| t.incarnation);
            process.incarnation != incarnation
                && newcomer != Some(incarnation)
                && trial != Some(incarnation)
        })
    }

    /// The fence of a process on trial has fallen.
    pub(super) fn on_trial_fence(&mut self, index: usize) {
        let Some(trial) = self.trial(index) else {
            return;
        };
        trial.fence_fell = true;
        let fence = trial.fence.take();
        if let Some(fence) = fence {
            self.forget_fd(fence.as_raw_fd());
        }
    }

    /// Looks at what is due of a live update.
    pub(super) fn on_trial_timer(&mut self, index: usize, now: Instant) {
        let Some(trial) = self.trial(index) else {
            return;
        };
        if trial.next_timer().is_none_or(|at| at > now) {
            return;
        }
        if let Some(why) = trial.is_late(now) {
            self.end_trial(index, why);
        } else {
            self.on_trial(index);
        }
    }

    /// Tells the launcher which processes have taken others' places, until it has been told.
    pub(super) fn settle_trials(&mut self) {
        let Self {
            machine, launcher, ..
        } = self;
        let devices = machine.as_mut().map(|m| &mut m.parts.devices);
        for device in devices.into_iter().flat_map(|d| d.iter_mut()) {
            let Some(process) = &mut device.process else {
                continue;
            };
            if process.unsettled {
                match launcher.begin_settle(&device.id, process.incarnation) {
                    Ok(()) => process.unsettled = false,
                    // Asked again in a second.
                    Err(error) => log::warn!("device {}: {error}", device.id),
                }
            }
        }
    }

    /// Gives processes on trial the time in which the manager itself did not run.
    pub(super) fn forgive_trials(&mut self, late: Duration) {
        for index in 0..self.devices_count() {
            if let Some(trial) = self.trial(index) {
                trial.extend(late);
            }
        }
    }
}
