//! vCPUs that come and go, on the manager thread. All that there may be exist in KVM from the
//! start; those that are not plugged in have a thread that is parked. Adding one lets its thread
//! go and tells the guest, which brings it up; one is taken back when the guest has ejected it.

use std::time::{Duration, Instant};

use bulkhead_proto::machine::ResizeCpusResponse;
use bulkhead_proto::{Code, RpcStatus};

use super::Host;
use crate::api::{ApiResponse, ReplyHandle};
use crate::ged::GedEvents;
use crate::machine::state::MachineState;

/// A change of the number of vCPUs that the guest has not carried out yet.
pub(super) struct Resize {
    operation: u64,
    count: u32,
    until: Instant,
    timeout: Duration,
    reply: ReplyHandle,
    /// By then a guest is through with what it has ejected, or does not say so.
    answer_by: Option<Instant>,
    /// How often vCPUs may still be added in the place of some that the guest gave up meanwhile.
    again: u32,
}

/// More would be a guest that plays.
const AGAIN: u32 = 16;

/// How long a guest may take to be through with a vCPU that it has ejected.
const ANSWER: Duration = Duration::from_secs(2);

/// What a vCPU's operation is about, for events.
const SUBJECT: &str = "vcpus";

fn listed(cpus: &[u32]) -> String {
    let numbers: Vec<String> = cpus.iter().map(u32::to_string).collect();
    match cpus {
        [_] => format!("vCPU {}", numbers.join(", ")),
        _ => format!("vCPUs {}", numbers.join(", ")),
    }
}

impl Host {
    /// Changes the number of vCPUs.
    pub(super) fn resize_cpus(&mut self, count: u32, timeout: Duration, reply: ReplyHandle) {
        let refused = |line: String| Err(RpcStatus::failed_precondition(line));
        let Some(machine) = &self.machine else {
            return reply.complete(refused("no machine yet: create one".to_owned()));
        };
        let cpus = machine.config.cpus.clone().unwrap_or_default();
        let max = cpus.max.max(cpus.boot);
        if count > max {
            return reply.complete(refused(format!(
                "{count} vCPUs are more than the {max} that the machine may have: create it with a larger max="
            )));
        }
        if machine.state == MachineState::Created {
            return reply.complete(refused(
                "the machine has not begun: create it with as many vCPUs as are wanted".to_owned(),
            ));
        }
        if self.resize.is_some() {
            return reply.complete(refused(
                "another change of the number of vCPUs is under way: retry when it has ended"
                    .to_owned(),
            ));
        }
        let operation = self.hotplug.next_operation();
        self.began(operation, SUBJECT, &format!("{count} vCPUs"));
        let now = Instant::now();
        self.resize = Some(Resize {
            operation,
            count,
            until: now + timeout,
            timeout,
            reply,
            answer_by: now.checked_add(ANSWER),
            again: AGAIN,
        });
        self.stop_ejected_cpus();
        self.add_cpus(count);
        let Some(machine) = &self.machine else {
            return;
        };
        let registers = &machine.parts.hotplug;
        let present = registers.present_cpus();
        // From the highest down, as they were added.
        for _ in count..present {
            if let Some(index) = registers.last_cpu() {
                registers.ask_for_cpu(index);
            }
        }
        if present > count {
            machine.parts.ged.raise(GedEvents::CPUS);
        }
        self.look_at_resize(now);
    }

    /// Plugs vCPUs in until there are so many.
    fn add_cpus(&mut self, count: u32) {
        let Some(machine) = &self.machine else {
            return;
        };
        let registers = &machine.parts.hotplug;
        let present = registers.present_cpus();
        for _ in present..count {
            if let Some(index) = registers.add_cpu() {
                machine.parts.vcpus.plug(index);
                let line = format!("vCPU {index}: the guest brings it up");
                self.log.publish("cpu.added", "", &line);
            }
        }
        if present < count {
            machine.parts.ged.raise(GedEvents::CPUS);
        }
    }

    /// vCPUs that the guest has given up stop; what it has seen or answered is looked at.
    pub(super) fn on_ejected_cpus(&mut self) {
        self.stop_ejected_cpus();
        let now = Instant::now();
        if let Some(resize) = &mut self.resize {
            resize.answer_by = now.checked_add(ANSWER);
        }
        self.look_at_resize(now);
    }

    fn stop_ejected_cpus(&self) {
        let Some(machine) = &self.machine else {
            return;
        };
        for index in machine.parts.hotplug.take_ejected_cpus() {
            machine.parts.vcpus.unplug(index);
            self.log
                .publish("cpu.removed", "", &format!("vCPU {index}"));
        }
    }

    /// vCPUs that a guest which begins anew has: as many as there are, or shall be.
    pub(super) fn cpus_of_next_guest(&self) -> u32 {
        let present = self
            .machine
            .as_ref()
            .map_or(1, |machine| machine.parts.hotplug.present_cpus());
        self.resize.as_ref().map_or(present, |resize| resize.count)
    }

    /// When the change is to be looked at: what the guest does about it is an event.
    pub(super) fn resize_timer(&self) -> Option<Instant> {
        let resize = self.resize.as_ref().filter(|_| !self.is_resetting())?;
        let answer = resize.answer_by.unwrap_or(resize.until);
        Some(resize.until.min(answer))
    }

    /// Looks whether the change has come to an end, which it does with a reset. True: there is none.
    pub(super) fn look_at_resize(&mut self, now: Instant) -> bool {
        if self.is_resetting() {
            return true;
        }
        if self.resize.is_some() {
            self.stop_ejected_cpus();
        }
        let (Some(resize), Some(machine)) = (&mut self.resize, &self.machine) else {
            return true;
        };
        let registers = &machine.parts.hotplug;
        if resize.answer_by.take_if(|by| *by <= now).is_some() {
            registers.forget_leaving_cpus();
        }
        let present = registers.present_cpus();
        // A guest gives up which it likes: those that are left need not be the first ones.
        let unseen: Vec<u32> = (0..registers.possible_cpus())
            .filter(|index| registers.cpu_unseen(*index))
            .collect();
        // One that was asked for, now or before, may still go.
        let settled = unseen.is_empty()
            && registers.asked_cpus().is_empty()
            && registers.leaving_cpus().is_empty();
        let (count, late) = (resize.count, now >= resize.until);
        let mut done = present == count && settled;
        if late && present == count && unseen.is_empty() {
            // What was asked for before, nobody answers any more.
            registers.forget_asked_cpus();
            done = true;
        }
        if !done && !late {
            if settled && present < count && resize.again > 0 {
                resize.again = resize.again.saturating_sub(1);
                self.add_cpus(count);
                return false;
            }
            if !settled {
                return false;
            }
        }
        let Some(resize) = self.resize.take() else {
            return true;
        };
        if done {
            let mut response = ResizeCpusResponse::new();
            (response.operation, response.count) = (resize.operation, present);
            self.ended(resize.operation, SUBJECT, Ok(&format!("{present} vCPUs")));
            resize
                .reply
                .complete(Ok(ApiResponse::CpusResized(response)));
            return false;
        }
        let why = self.undo_resize(&resize, &unseen, late);
        self.ended(resize.operation, SUBJECT, Err(&why));
        let code = if late {
            Code::DeadlineExceeded
        } else {
            Code::FailedPrecondition
        };
        resize.reply.complete(Err(RpcStatus::new(code, why)));
        false
    }

    /// The guest has not carried the change out: what it has not seen is taken back.
    fn undo_resize(&self, resize: &Resize, unseen: &[u32], late: bool) -> String {
        let Some(machine) = &self.machine else {
            return String::new();
        };
        let registers = &machine.parts.hotplug;
        let mut asked = false;
        for index in unseen {
            if registers.withdraw_added(*index) {
                machine.parts.vcpus.unplug(*index);
                let line = format!("vCPU {index}: the guest never looked at it");
                self.log.publish("cpu.removed", "", &line);
            }
        }
        for index in 0..registers.possible_cpus() {
            asked |= registers.withdraw_cpu(index);
        }
        let present = registers.present_cpus();
        let wanted = resize.count;
        let may_go = registers.asked_cpus();
        let why = if present < wanted && unseen.is_empty() && may_go.is_empty() {
            "the guest gives up what it is given: resize again when it has stopped".to_owned()
        } else if !late {
            "the guest says that it keeps some, which it cannot take offline: see its kernel log"
                .to_owned()
        } else if machine.state == MachineState::Paused {
            "the machine is paused: resume it".to_owned()
        } else if asked || !unseen.is_empty() {
            "the guest has not looked at the request: it is busy with another, has not come so far in its boot, or has no ACPI CPU hot-plug (Linux: CONFIG_ACPI_HOTPLUG_CPU)".to_owned()
        } else {
            format!(
                "the guest was asked for {} and has not answered: it may still let go, so that another change waits for it",
                listed(&may_go)
            )
        };
        let after = match late {
            true => format!(", after {} ms", resize.timeout.as_millis()),
            false => String::new(),
        };
        format!("{present} vCPUs, not {wanted}{after}: {why}")
    }
}
