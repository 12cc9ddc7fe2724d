//! A machine is given up: its device processes, sockets, threads and memory go. Where it has not
//! booted, another one may be made in this process. Where it has, the process has narrowed its
//! confinement for good by then, and ends with the machine.

use std::time::Duration;

use bulkhead_proto::{Code, RpcStatus};

use super::interrupt::interruptible;
use super::remnants::Remnants;
use super::{Host, Machine, SERIAL_LIMIT, VCPU_LIMIT, memory};
use crate::api::{ApiRequest, ApiResponse, ReplyHandle};
use crate::machine::build;
use crate::machine::device::END_LIMIT;
use crate::machine::state::MachineState;
use crate::machine::stop::StopReason;

impl Host {
    /// Gives the machine up. There may be none: a client may ask again that has missed the first
    /// answer.
    pub(super) fn delete(&mut self, reply: ReplyHandle) {
        let booted = self.machine.as_ref().map(|machine| machine.state);
        if booted.is_none_or(|state| state == MachineState::Created) {
            return reply.complete(self.delete_created().map(|()| ApiResponse::Done));
        }
        // Answered when nothing of it is left, by `answer_deleted` or `see_out`.
        self.deleted.push(reply);
        self.end(StopReason::Forced);
    }

    /// The machine has ended. Where a client wanted that to be the end of all that is its own, it
    /// is, and who asked is told; one that asked again just now among them.
    pub(super) fn answer_deleted(&mut self) {
        if self.deleted.is_empty() {
            return;
        }
        let outcome = self.leave_nothing();
        self.requests.clear();
        while let Some((request, reply)) = self.requests.try_next() {
            if request == ApiRequest::Delete {
                self.deleted.push(reply);
            }
        }
        for reply in self.deleted.drain(..) {
            reply.complete(outcome.clone().map(|()| ApiResponse::Done));
        }
    }

    /// Ends what is left of a machine that has stopped, with the launcher, and tells it.
    ///
    /// # Errors
    /// What has not ended.
    pub(super) fn leave_nothing(&mut self) -> Result<(), RpcStatus> {
        let had_machine = self.machine.is_some();
        let devices = self.machine.iter().flat_map(|m| m.parts.devices.iter());
        let mut remnants = Remnants::of(devices, None);
        self.machine = None;
        // Device processes, sockets, cgroups.
        let ended = self.launcher.end();
        self.on_launcher();
        remnants.look(Duration::ZERO);
        let outcome = ended.map_err(|outlives| {
            let alive: Vec<String> = remnants.alive();
            let alive = match alive.is_empty() {
                true => String::new(),
                false => format!(" ({})", alive.join(", ")),
            };
            let line =
                format!("the machine has ended, but not all that is its own{alive}: {outlives}");
            RpcStatus::new(Code::DeadlineExceeded, line)
        });
        if let Err(status) = &outcome {
            log::warn!("{}", status.message);
        }
        if had_machine {
            let left = outcome.as_ref().err().map(|status| status.message.as_str());
            self.log
                .publish("machine.deleted", "", left.unwrap_or_default());
        }
        outcome
    }

    pub(super) fn delete_created(&mut self) -> Result<(), RpcStatus> {
        let Some(machine) = &self.machine else {
            return self.end_remnants();
        };
        // What is under way would find another machine at its end.
        if let Some(what) = self.hotplug.under_way() {
            return Err(RpcStatus::failed_precondition(format!(
                "cannot delete the machine now: {what} is under way: wait for its end (see Operations)"
            )));
        }
        let slots = machine.parts.devices.slots();
        let serial = build::serial_socket(&machine.config);
        for index in 0..slots {
            self.end_trial(index, "the machine is given up");
        }
        let devices: Vec<_> = (0..slots)
            .filter_map(|index| self.unwatch_and_take(index))
            .collect();
        let Some(Machine { mut parts, .. }) = self.machine.take() else {
            return Ok(());
        };
        let mut remnants = Remnants::of(devices.iter(), serial.clone());
        let launcher = &self.launcher;
        let mut answered = Ok(());
        let mut end = || {
            answered = build::end_all(&devices, launcher);
            if let Err(e) = parts.vcpus.stop(VCPU_LIMIT) {
                log::error!("{e}");
            }
            // Nothing has been printed.
            parts.serial.stop(SERIAL_LIMIT);
            parts.pci.dismantle();
        };
        // Signals are not heeded meanwhile where there is no thread to be had for them.
        if let Err(why) = interruptible(&self.signals, launcher, &self.hooks.helper, &mut end) {
            log::warn!("{why}");
            end();
        }
        if let (Some(path), Ok(())) = (serial, &answered) {
            answered = launcher.forget(&path);
        }
        if let Err(why) = &answered {
            remnants.unanswered(launcher, why);
        }
        drop((devices, parts));
        remnants.look(END_LIMIT);
        self.hotplug.forget_machine();
        self.placements.clear();
        self.memory = memory::Progress::default();
        self.unseen = None;
        self.heartbeat = None;
        self.remnants = remnants;
        self.on_launcher();
        let outcome = self.remnants.status(&self.launcher);
        let left = outcome.as_ref().err().map(|status| status.message.as_str());
        self.log
            .publish("machine.deleted", "", left.unwrap_or_default());
        for waiter in self.calls.take_waiters() {
            let line = "the machine was given up before it booted: create another";
            waiter.complete(Err(RpcStatus::failed_precondition(line)));
        }
        outcome
    }
}
