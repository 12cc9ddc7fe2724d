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
}

/// How often a change looks whether the guest has seen it.
const LOOK: Duration = Duration::from_millis(20);

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
        self.began(operation, "", &format!("{count} vCPUs"));
        let now = Instant::now();
        self.resize = Some(Resize {
            operation,
            count,
            until: now + timeout,
            timeout,
            reply,
        });
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
        // From the highest down, as they were added.
        for _ in count..present {
            if let Some(index) = registers.last_cpu() {
                registers.ask_for_cpu(index);
            }
        }
        if present != count {
            machine.parts.ged.raise(GedEvents::CPUS);
        }
        self.look_at_resize(now);
    }

    /// vCPUs that the guest has given up stop.
    pub(super) fn on_ejected_cpus(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        for index in machine.parts.hotplug.take_ejected_cpus() {
            machine.parts.vcpus.unplug(index);
            self.log
                .publish("cpu.removed", "", &format!("vCPU {index}"));
        }
        self.look_at_resize(Instant::now());
    }

    /// When the change is to be looked at.
    pub(super) fn resize_timer(&self) -> Option<Instant> {
        let resize = self.resize.as_ref()?;
        // The guest's look at what was added makes no event of its own.
        Some(resize.until.min(Instant::now() + LOOK))
    }

    /// Looks whether the change has come to an end. True: there is none.
    pub(super) fn look_at_resize(&mut self, now: Instant) -> bool {
        let (Some(resize), Some(machine)) = (&self.resize, &self.machine) else {
            return true;
        };
        let registers = &machine.parts.hotplug;
        let present = registers.present_cpus();
        // A guest gives up which it likes: those that are left need not be the first ones.
        let unseen: Vec<u32> = (0..registers.possible_cpus())
            .filter(|index| registers.cpu_unseen(*index))
            .collect();
        let done = present == resize.count && unseen.is_empty();
        if !done && now < resize.until {
            return false;
        }
        let Some(resize) = self.resize.take() else {
            return true;
        };
        if done {
            let mut response = ResizeCpusResponse::new();
            (response.operation, response.count) = (resize.operation, present);
            self.ended(resize.operation, "", Ok(&format!("{present} vCPUs")));
            resize
                .reply
                .complete(Ok(ApiResponse::CpusResized(response)));
            return false;
        }
        let why = self.undo_resize(&resize, &unseen);
        self.ended(resize.operation, "", Err(&why));
        resize
            .reply
            .complete(Err(RpcStatus::new(Code::DeadlineExceeded, why)));
        false
    }

    /// The guest has not carried the change out: what it has not seen is taken back.
    fn undo_resize(&self, resize: &Resize, unseen: &[u32]) -> String {
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
        let limit = resize.timeout.as_millis();
        let why = if machine.state == MachineState::Paused {
            "the machine is paused: resume it"
        } else if asked || !unseen.is_empty() {
            "the guest has not looked at the request: it has not come so far in its boot, or has no ACPI CPU hot-plug (Linux: CONFIG_ACPI_HOTPLUG_CPU)"
        } else {
            "the guest was asked and keeps some: it has pinned work to them, or does not let them go"
        };
        format!("{present} vCPUs, not {wanted}, after {limit} ms: {why}")
    }
}
