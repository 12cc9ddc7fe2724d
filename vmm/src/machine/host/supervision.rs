//! The deeds of supervision: what [`Life`] decides about a device's process is carried out
//! here, on the manager thread. Nothing waits: the launcher is asked and answers by an event,
//! a new process is greeted by the event loop, and the function hands its rings over on a
//! thread of its own.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::event::What;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{Host, Source};
use crate::launcher::Linked;
use crate::machine::control::Breach;
use crate::machine::device::Process;
use crate::machine::life::{Action, Life};
use crate::machine::newcomer::{Fault, Newcomer, Ready};
use crate::machine::state::MachineState;
use crate::machine::supervise::{CrashReason, HangDetector, RingLook};
use crate::machine::told;
use crate::machine::trial::{Ended, Trial};
use crate::virtio::{FailReason, Indices, ReconnectError, Reconnected};

/// Why a process was given up, as the supervisor has it; `None`: its end will tell.
pub(super) fn reason(breach: &Breach) -> Option<CrashReason> {
    match breach {
        Breach::HungUp => None,
        Breach::Deadline(what) => Some(CrashReason::Deadline(what.clone())),
        Breach::Protocol(what) => Some(CrashReason::Protocol(what.clone())),
    }
}

/// The same, of what the function saw on the vhost-user channel.
fn function_reason(why: &FailReason) -> Option<CrashReason> {
    match why {
        FailReason::Hangup | FailReason::Absent => None,
        FailReason::Timeout(what) => Some(CrashReason::Deadline(format!("no answer to {what}"))),
        FailReason::Unquiet => Some(CrashReason::Protocol("it refused to stop its rings".into())),
        FailReason::Keeps => {
            let why = "it refused to let go of memory that is taken back";
            Some(CrashReason::Protocol(why.into()))
        }
        FailReason::Violation(what) | FailReason::Channel(what) | FailReason::Stopped(what) => {
            Some(CrashReason::Protocol(what.clone()))
        }
    }
}

/// What programs need of what a device's life tells.
fn what(kind: &str, detail: &str, process: &Process) -> Option<What> {
    let told = process.life.told();
    let restarts = process.life.restarts();
    match kind {
        "device.crashed" => {
            let reason = told.crash.as_ref()?;
            Some(told::crashed(process.latest(), reason))
        }
        "device.restarted" => Some(told::restarted(
            (process.pid, process.incarnation),
            u64::try_from(told.stall.as_micros()).unwrap_or(u64::MAX),
            told.found,
            restarts,
        )),
        "device.quarantined" => Some(told::quarantined(detail, restarts)),
        _ => None,
    }
}

impl Host {
    pub(super) fn process(&mut self, index: usize) -> Option<&mut Process> {
        self.device(index)?.process.as_mut()
    }

    /// The device has processes of ours, which are supervised.
    pub(super) fn is_supervised(&mut self, index: usize) -> bool {
        self.process(index).is_some()
    }

    /// Lets the device's life go on, and does what it says.
    pub(super) fn with_life(
        &mut self,
        index: usize,
        step: impl FnOnce(&mut Life, Instant) -> Vec<Action>,
    ) {
        let Some(process) = self.process(index) else {
            return;
        };
        let actions = step(&mut process.life, Instant::now());
        for action in actions {
            self.carry_out(index, action);
        }
    }

    fn carry_out(&mut self, index: usize, action: Action) {
        match action {
            Action::Suspend(why) => {
                let Some(device) = self.device(index) else {
                    return;
                };
                device.function.suspend(FailReason::Stopped(why.clone()));
                if let Some(process) = &mut device.process {
                    let why = format!("{why}; its process is being replaced: retry");
                    process.control.give_up(&why);
                }
                self.unwatch_link(index);
            }
            Action::HangUp(why) => {
                let Some(process) = self.process(index) else {
                    return;
                };
                let why = format!("{why}; its process is being replaced: retry");
                process.control.give_up(&why);
                process.interest = EventSet::empty();
                let fd = process.control.as_fd().as_raw_fd();
                self.forget_fd(fd);
            }
            Action::Fail(why) => {
                let Some(device) = self.device(index) else {
                    return;
                };
                device.function.fail(FailReason::Stopped(why.clone()));
                if let Some(process) = &mut device.process {
                    process.control.give_up(&why);
                }
                device.failed = Some(why);
                self.unwatch_link(index);
            }
            Action::Kill => self.kill_process(index),
            Action::Quiesced => {
                if let Some(device) = self.device(index) {
                    device.function.quiesced();
                }
            }
            Action::Start => self.start_process(index),
            Action::Tell(kind, detail) => {
                let what = self.process(index).and_then(|p| what(kind, &detail, p));
                self.tell_typed(index, kind, &detail, what);
            }
        }
    }

    /// Stops watching what led to the process that served: it is of no interest any more.
    fn unwatch_link(&mut self, index: usize) {
        let Some(device) = self.device(index) else {
            return;
        };
        let mut fds: Vec<_> = device.function.link_fds();
        let mut gone: Vec<_> = fds.drain(..).map(|poll| poll.fd.as_raw_fd()).collect();
        if let Some(process) = &mut device.process {
            gone.push(process.control.as_fd().as_raw_fd());
            process.interest = EventSet::empty();
        }
        for fd in gone {
            // What has left already does not matter.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Ends the process that serves, or the one that is on its way in.
    fn kill_process(&mut self, index: usize) {
        self.abandon_newcomer(index);
        let Self {
            machine, launcher, ..
        } = self;
        let devices = machine.as_ref().map(|m| &m.parts.devices);
        let Some(device) = devices.and_then(|d| d.get(index)) else {
            return;
        };
        let Some(process) = &device.process else {
            return;
        };
        if let Err(e) = launcher.begin_kill(&device.id, process.incarnation) {
            // It is asked again when the process has not ended in time.
            log::warn!("device {}: {e}", device.id);
        }
    }

    /// The newcomer, if there is one, will not serve: from now on it is the process whose end
    /// is waited for.
    fn abandon_newcomer(&mut self, index: usize) {
        let Some(process) = self.process(index) else {
            return;
        };
        let Some(newcomer) = &mut process.newcomer else {
            return;
        };
        process.incarnation = newcomer.incarnation;
        let Some((pid, pidfd)) = newcomer.started.take() else {
            // The launcher's answer brings its number and the fence.
            process.pid = 0;
            newcomer.abandoned = true;
            return;
        };
        (process.pid, process.pidfd) = (pid, pidfd);
        let fd = newcomer.as_fd().as_raw_fd();
        process.fence = newcomer.fence.take().or(process.fence.take());
        process.newcomer = None;
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn start_process(&mut self, index: usize) {
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
        let incarnation = process.last_incarnation.saturating_add(1);
        process.last_incarnation = incarnation;
        match launcher.begin_respawn(&device.id, incarnation) {
            Ok((ticket, control, vhost)) => {
                process.newcomer = Some(Newcomer::new(
                    (&device.id, process.kind),
                    (ticket, incarnation),
                    (control, vhost),
                    (&process.changes, device.drained),
                    Instant::now(),
                ));
            }
            Err(e) => {
                let why = e.to_string();
                self.with_life(index, |life, now| life.not_started(why, now));
            }
        }
    }

    /// The launcher's answer to a start. False: it is not about a device process.
    pub(super) fn on_respawned(&mut self, ticket: u64, result: &Result<(), String>) -> bool {
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let found = devices.and_then(|devices| {
            devices.position(|device| {
                let newcomer = device.process.as_ref().and_then(|p| p.newcomer.as_ref());
                newcomer.is_some_and(|n| n.ticket == ticket)
            })
        });
        let Some(index) = found else {
            return self.on_trial_started(ticket, result);
        };
        let linked = result.clone().and_then(|()| {
            self.launcher
                .take_linked(ticket)
                .ok_or_else(|| "the launcher's answer was lost".to_owned())
        });
        match linked {
            Ok(linked) => self.on_started(index, linked),
            Err(why) => {
                let abandoned = self.process(index).is_some_and(|process| {
                    let newcomer = process.newcomer.take();
                    // What is told from here on is told of this one, which there never was.
                    if let Some(newcomer) = &newcomer {
                        process.incarnation = newcomer.incarnation;
                    }
                    newcomer.is_some_and(|n| n.abandoned)
                });
                if abandoned {
                    // There is no process, and so nothing of it is left.
                    self.with_life(index, |life, now| life.fence_fell(now));
                    let why = CrashReason::Start(why);
                    self.with_life(index, |life, now| life.exited(why, now));
                } else {
                    self.with_life(index, |life, now| life.not_started(why, now));
                }
            }
        }
        true
    }

    fn on_started(&mut self, index: usize, linked: Linked) {
        let Linked {
            fd,
            pid,
            second: fence,
        } = linked;
        let Some(newcomer) = self.process(index).and_then(|p| p.newcomer.as_mut()) else {
            return;
        };
        let pid = pid.unwrap_or(0);
        let spawned = told::spawned(pid, newcomer.incarnation);
        newcomer.started = Some((pid, fd));
        newcomer.fence = fence;
        let abandoned = newcomer.abandoned;
        let fence = newcomer.fence.as_ref().map(|fd| fd.as_raw_fd());
        let control = newcomer.as_fd().as_raw_fd();
        let greeted = newcomer.greet();
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        let watched = fence
            .ok_or_else(|| "its fence is missing".to_owned())
            .and_then(|fd| self.watch(fd, Source::Fence { index: number }, EventSet::empty()));
        if let Some(device) = self.device(index) {
            let id = device.id.clone();
            self.log
                .publish_typed("device.spawned", &id, "", Some(spawned));
        }
        if abandoned {
            return self.abandon_newcomer(index);
        }
        let ready = watched
            .and(greeted)
            .and_then(|()| self.watch(control, Source::Control { index: number }, EventSet::IN));
        if let Err(why) = ready {
            self.with_life(index, |life, now| {
                life.lost(Some(CrashReason::Start(why)), now)
            });
        }
    }

    /// A newcomer's control channel is ready, or its deadline may have come.
    pub(super) fn on_newcomer(&mut self, index: usize) {
        let now = Instant::now();
        let Some(newcomer) = self.process(index).and_then(|p| p.newcomer.as_mut()) else {
            return;
        };
        match newcomer.on_event(now) {
            Ok(false) => {}
            Ok(true) => self.hand_over(index, now),
            Err(fault) => {
                // Its channel is of no more use, and would wake us for ever.
                self.abandon_newcomer(index);
                let reason = match fault {
                    Fault::HungUp => None,
                    Fault::Wrong(why) => Some(CrashReason::Start(why)),
                };
                self.with_life(index, |life, now| life.lost(reason, now));
            }
        }
    }

    /// A newcomer is ready: it becomes the device's process, and the function hands its rings
    /// to it.
    fn hand_over(&mut self, index: usize, now: Instant) {
        let Some(device) = self.device(index) else {
            return;
        };
        let Some(process) = &mut device.process else {
            return;
        };
        let Some(mut newcomer) = process.newcomer.take() else {
            return;
        };
        process.incarnation = newcomer.incarnation;
        process.fence = newcomer.fence.take();
        if let Some((pid, pidfd)) = newcomer.started.take() {
            (process.pid, process.pidfd) = (pid, pidfd);
        }
        let took = now.saturating_duration_since(newcomer.begun);
        process.ready_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let Some(Ready {
            client,
            vhost,
            hello,
        }) = newcomer.into_ready()
        else {
            return;
        };
        process.hello = hello;
        process.control = process.control.successor(client);
        process.interest = EventSet::IN;
        process.detectors.clear();
        if !process.life.answered(now) {
            return;
        }
        if let Err(error) = device.function.adopt(vhost) {
            let why = CrashReason::Start(error.to_string());
            self.with_life(index, |life, now| life.lost(Some(why), now));
        }
    }

    /// The function has given its rings to another process.
    pub(super) fn on_taken_over(&mut self, index: usize, done: &Reconnected) {
        if self.hands_over(index) {
            return self.finish_trial(index, done);
        }
        let Some(device) = self.device(index) else {
            return;
        };
        device.failed = None;
        let log = if done.logged {
            ", with the log of requests in flight"
        } else {
            ""
        };
        let reset = if done.needs_reset {
            "; it waits for a reset by the guest"
        } else {
            ""
        };
        let again = match done.resubmitted {
            0 => String::new(),
            n => format!(" ({n}, made again)"),
        };
        let detail = format!("{} queues{log}{again}{reset}", done.queues);
        self.with_life(index, |life, now| {
            life.found(done.queues, done.resubmitted);
            life.took_over(&detail, now)
        });
        self.renew_memory(index);
    }

    /// The function could not give its rings to the process that was to have them.
    pub(super) fn on_not_taken_over(&mut self, index: usize, error: &ReconnectError) {
        if self.hands_over(index) {
            return self.end_trial(index, &error.to_string());
        }
        let reason = CrashReason::from_takeover(error);
        self.with_life(index, |life, now| life.lost(reason, now));
    }

    /// The device's process must go, for this reason; `None`: it hung up.
    pub(super) fn lose_process(&mut self, index: usize, reason: Option<CrashReason>) {
        let Some(reason) = self.lost_beside_trial(index, reason) else {
            return;
        };
        self.with_life(index, |life, now| life.lost(reason, now));
    }

    /// The function saw that its process is lost. It says so again as long as there is none.
    pub(super) fn on_function_lost(&mut self, index: usize, why: &FailReason) {
        if self.process(index).is_some_and(|p| p.life.serving()) {
            self.lose_process(index, function_reason(why));
        }
    }

    /// A device's process has been reaped, or one that was to be.
    pub(super) fn on_process_exited(&mut self, id: &str, ended: Ended) {
        let Some(ended) = self.on_trial_exited(id, ended) else {
            return;
        };
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let found = devices.and_then(|devices| {
            devices.position(|device| {
                device.id == id
                    && device.process.as_ref().is_some_and(|p| {
                        let newcomer = p.newcomer.as_ref().map(|n| n.incarnation);
                        newcomer.unwrap_or(p.incarnation) == ended.incarnation
                    })
            })
        });
        match found {
            Some(index) => self.bury(index, &ended),
            None => self.tell_exited(id, &ended),
        }
    }

    /// The process that served a device, or was to, has ended: tells why it had to go, then its
    /// end, then what follows from that.
    pub(super) fn bury(&mut self, index: usize, ended: &Ended) {
        self.abandon_newcomer(index);
        let reason = CrashReason::from_outcome(ended.outcome);
        self.with_life(index, |life, now| life.ends(reason, now));
        if let Some(id) = self.device(index).map(|device| device.id.clone()) {
            self.tell_exited(&id, ended);
        }
        self.with_life(index, |life, now| life.is_reaped(now));
    }

    /// A fence has fallen: nothing holds its other end any more.
    pub(super) fn on_fence(&mut self, index: u16) {
        let index = usize::from(index);
        let Some(process) = self.process(index) else {
            return;
        };
        let newcomer = process.newcomer.as_mut().and_then(|n| n.fence.take());
        let Some(fence) = newcomer.or_else(|| process.fence.take()) else {
            return;
        };
        let _ = self.epoll.ctl(
            ControlOperation::Delete,
            fence.as_raw_fd(),
            EpollEvent::default(),
        );
        drop(fence);
        if self.fell_beside_trial(index) {
            return;
        }
        self.with_life(index, |life, now| life.fence_fell(now));
    }

    /// When a device's life is next to be looked at.
    pub(super) fn life_timer(&self) -> Option<Instant> {
        let devices = self.machine.as_ref()?.parts.devices.iter();
        let processes = devices.filter_map(|d| d.process.as_ref());
        processes
            .flat_map(|p| {
                let newcomer = p.newcomer.as_ref().filter(|n| n.started.is_some());
                let newcomer = newcomer.and_then(Newcomer::next_timer);
                let trial = p.trial.as_ref().and_then(Trial::next_timer);
                p.life.next_timer().into_iter().chain(newcomer).chain(trial)
            })
            .min()
    }

    /// Looks at what is due. True: nothing was.
    pub(super) fn on_life_timers(&mut self, now: Instant) -> bool {
        if self.life_timer().is_none_or(|at| at > now) {
            return true;
        }
        for index in 0..self.devices_count() {
            let Some(process) = self.process(index) else {
                continue;
            };
            let newcomer = process.newcomer.as_ref().filter(|n| n.started.is_some());
            let due = newcomer
                .and_then(Newcomer::next_timer)
                .is_some_and(|at| at <= now);
            if due {
                self.on_newcomer(index);
            }
            self.on_trial_timer(index, now);
            self.with_life(index, |life, now| life.on_timer(now));
        }
        false
    }

    /// A quarantined device whose driver has reset it gets another chance.
    pub(super) fn look_for_resets(&mut self) {
        for index in 0..self.devices_count() {
            let Some(device) = self.device(index) else {
                continue;
            };
            // One of an earlier time is of no interest.
            let reset = device.function.take_reset();
            let life = device.process.as_ref().map(|process| &process.life);
            if reset && life.is_some_and(|life| life.state() == Some("quarantined")) {
                self.revive(index);
            }
        }
    }

    /// Looks whether the rings of a device make progress, beside what its process says of them.
    pub(super) fn look_for_hangs(&mut self, index: usize, excused: &[bool]) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        // Between an entry in the ring and the kick for it, a vCPU may have been stopped.
        let paused = machine.state == MachineState::Paused;
        let Some(device) = machine.parts.devices.get_mut(index) else {
            return;
        };
        let Some(process) = &mut device.process else {
            return;
        };
        if !process.life.serving() {
            return;
        }
        let all_excused = paused || device.drained || !process.control.only_heartbeat();
        let mut hung = None;
        for (queue, Indices { available, used }) in device.function.progress().unwrap_or_default() {
            let at = usize::from(queue);
            if process.detectors.len() <= at {
                process.detectors.resize_with(at + 1, HangDetector::default);
            }
            let look = RingLook {
                avail: available,
                used,
                excused: all_excused || excused.get(at).copied().unwrap_or(false),
            };
            if process.detectors.get_mut(at).is_some_and(|d| d.look(look)) {
                hung = Some(queue);
            }
        }
        if let Some(queue) = hung {
            process.detectors.clear();
            self.lose_process(index, Some(CrashReason::Hung { queue }));
        }
    }

    /// Brings a quarantined device back. False: it is not quarantined.
    pub(super) fn revive(&mut self, index: usize) -> bool {
        let mut taken = false;
        self.with_life(index, |life, now| {
            let (revived, actions) = life.revive(now);
            taken = revived;
            actions
        });
        taken
    }

    /// Gives newcomers the time in which the manager itself did not run.
    pub(super) fn forgive_newcomers(&mut self, late: Duration) {
        for index in 0..self.devices_count() {
            if let Some(newcomer) = self.process(index).and_then(|p| p.newcomer.as_mut()) {
                newcomer.extend_deadlines(late);
            }
        }
    }
}
