//! Resets of the machine in place, and reboots, on the manager thread.
//!
//! ```text
//!   Reset, Reboot's end ─▶ vCPUs park ─▶ checking ─▶ stopping ─▶ quieting ─▶ loading ─▶ vCPUs begin anew
//!                            │  ▲           │        (the thread `reset`)
//!   the guest's own ─▶ resting ◀┘           └─▶ nothing to boot: the guest goes on, or has ended
//! ```
//!
//! `resting`: a guest of its own accord begins anew once a second at most, and not before each of its
//! vCPUs has come out.
//!
//! Nothing here waits but for vCPUs to park, as a pause does, and to begin anew, and for a thread to
//! start, all with limits. Requests that would change the machine
//! are held meanwhile and carried out afterwards; what tells goes on, and so does its end.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{RebootResponse, machine_config::OnReset};
use bulkhead_proto::{Code, RpcStatus};

use super::{Host, VCPU_LIMIT};
use crate::api::{ApiRequest, ApiResponse, ReplyHandle};
use crate::arch::x86_64::boot::BootEntry;
use crate::events::MachineEvent;
use crate::machine::reset::{self, Cause, Job, Progress};
use crate::machine::state::MachineState;
use crate::machine::stop::StopReason;
use crate::machine::told;

/// A guest that resets itself again and again does so once in this time.
const PACE: Duration = Duration::from_secs(1);
/// How long vCPUs of a guest that is over are waited for, each time.
const OWN_LIMIT: Duration = Duration::from_millis(200);
/// How long who waits for a reset is left without an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most requests that are held while the machine is reset.
const MOST_HELD: usize = 32;
/// What a reboot is about, for events and operations.
const SUBJECT: &str = "machine";

/// How far a reset is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// What is to be booted is looked at.
    Checking,
    /// Processes give their rings back.
    Stopping,
    /// What is left of lost processes ends.
    Quieting,
    /// The kernel is loaded.
    Loading,
}

/// A reset.
struct UnderWay {
    cause: Cause,
    step: Step,
    /// The guest has come to its end: it cannot go on.
    over: bool,
    /// What it did before its vCPUs parked.
    early: Vec<MachineEvent>,
    /// The thread waits for this before each of its steps.
    go: Sender<()>,
    /// vCPUs that the next guest has.
    cpus: u32,
    replies: Vec<ReplyHandle>,
    /// When they are told how far it is.
    until: Option<Instant>,
}

/// A guest that is over and does not begin anew yet.
#[derive(Clone, Copy, Debug)]
struct Resting {
    cause: Cause,
    until: Instant,
    /// The log has been told of a vCPU that does not come out.
    told: bool,
}

/// A guest that is to switch itself off and to begin anew.
struct Reboot {
    operation: u64,
    deadline: Instant,
    replies: Vec<ReplyHandle>,
}

/// All that is known of resets.
#[derive(Default)]
pub(super) struct Resets {
    under_way: Option<UnderWay>,
    /// One that is not due yet.
    resting: Option<Resting>,
    reboot: Option<Reboot>,
    held: Vec<(ApiRequest, ReplyHandle)>,
    count: u64,
    /// When the guest last had one of its own.
    last: Option<Instant>,
}

impl Resets {
    fn is_resetting(&self) -> bool {
        self.under_way.is_some() || self.resting.is_some()
    }

    /// When something is to be looked at.
    pub(super) fn timer(&self) -> Option<Instant> {
        let resting = self.resting.map(|resting| resting.until);
        let told = self.under_way.as_ref().and_then(|reset| reset.until);
        let reboot = self.reboot.as_ref().map(|reboot| reboot.deadline);
        // Its deadline is of no interest any more.
        let reboot = reboot.filter(|_| !self.is_resetting());
        resting.into_iter().chain(told).chain(reboot).min()
    }
}

/// What is carried out while the machine is reset: what only tells, and what ends it.
fn goes_on(request: &ApiRequest) -> bool {
    matches!(
        request,
        ApiRequest::Delete
            | ApiRequest::Shutdown { .. }
            | ApiRequest::Reset
            | ApiRequest::Info
            | ApiRequest::Devices
            | ApiRequest::DeviceStats { .. }
            | ApiRequest::Operation { .. }
            | ApiRequest::Operations { .. }
            | ApiRequest::AttachConsole { .. }
            | ApiRequest::Wait
            | ApiRequest::Teardown
            | ApiRequest::Quit
            | ApiRequest::Capabilities
            | ApiRequest::Properties { .. }
    )
}

fn refused(line: impl Into<String>) -> RpcStatus {
    RpcStatus::failed_precondition(line.into())
}

impl Host {
    /// No guest runs, since the machine is reset.
    pub(super) fn is_resetting(&self) -> bool {
        self.resets.is_resetting()
    }

    /// A guest is over, and the next one is not due yet.
    pub(super) fn is_resting(&self) -> bool {
        self.resets.resting.is_some()
    }

    /// The request, unless it is held until the machine has been reset.
    pub(super) fn unless_resetting(
        &mut self,
        request: ApiRequest,
        reply: ReplyHandle,
    ) -> Option<(ApiRequest, ReplyHandle)> {
        let resets = &mut self.resets;
        let joins = matches!(request, ApiRequest::Reboot { .. }) && resets.reboot.is_some();
        if !resets.is_resetting() || joins || goes_on(&request) {
            return Some((request, reply));
        }
        resets.held.retain(|(_, reply)| !reply.is_abandoned());
        if resets.held.len() >= MOST_HELD {
            let line = format!("{MOST_HELD} calls wait for the end of a reset: retry after it");
            reply.complete(Err(RpcStatus::new(Code::ResourceExhausted, line)));
        } else {
            resets.held.push((request, reply));
        }
        None
    }

    /// Why a machine that has booted cannot be reset.
    fn check_reset(&self, what: &str) -> Result<MachineState, RpcStatus> {
        let Some(machine) = &self.machine else {
            return Err(refused(format!(
                "cannot {what}: no machine yet: create one"
            )));
        };
        if machine.state == MachineState::Created {
            return Err(refused(format!(
                "cannot {what} a machine that is created: boot it first"
            )));
        }
        if self.shutdown.is_some() {
            return Err(refused(format!(
                "cannot {what} a machine that is being shut down: start another when it has ended"
            )));
        }
        if !machine.parts.vcpus.can_reset() || !machine.parts.kvm.can_reset_chips() {
            return Err(refused(format!(
                "cannot {what}: the host's KVM does not tell what a vCPU or an interrupt controller is at first: start the machine anew"
            )));
        }
        Ok(machine.state)
    }

    /// Resets the machine for a client.
    pub(super) fn reset(&mut self, reply: ReplyHandle) {
        if let Some(reset) = &mut self.resets.under_way {
            reset.until = Instant::now().checked_add(PATIENCE);
            return reset.replies.push(reply);
        }
        if let Err(status) = self.check_reset("reset") {
            return reply.complete(Err(status));
        }
        self.begin_reset(Cause::Client, Some(reply));
    }

    /// Has the guest switch itself off and begin anew.
    pub(super) fn reboot(&mut self, timeout: Duration, reply: ReplyHandle) {
        let now = Instant::now();
        let deadline = now.checked_add(timeout).unwrap_or(now);
        if let Some(reboot) = &mut self.resets.reboot {
            reboot.deadline = reboot.deadline.min(deadline);
            return reboot.replies.push(reply);
        }
        match self.check_reset("reboot") {
            Ok(MachineState::Paused) => {
                return reply.complete(Err(refused(
                    "cannot reboot a machine that is paused: resume it first, or use Reset",
                )));
            }
            Ok(_) => {}
            Err(status) => return reply.complete(Err(status)),
        }
        let operation = self.hotplug.next_operation();
        self.began(operation, SUBJECT, "reboot");
        self.resets.reboot = Some(Reboot {
            operation,
            deadline,
            replies: vec![reply],
        });
        if let Some(machine) = &self.machine {
            machine.parts.ged.press_power_button();
        }
        self.log.publish("machine.power-button", "", "");
    }

    /// The machine is not rebooted after all.
    pub(super) fn give_up_reboot(&mut self, why: &str) {
        if let Some(reboot) = self.resets.reboot.take() {
            self.ended(reboot.operation, SUBJECT, Err(why));
            for reply in reboot.replies {
                reply.complete(Err(refused(format!("not rebooted: {why}"))));
            }
        }
    }

    /// What a guest did that leads to a reset is taken; all else comes back.
    pub(super) fn take_reset_event(&mut self, event: MachineEvent) -> Option<MachineEvent> {
        let cause = match &event {
            MachineEvent::PowerOff => None,
            MachineEvent::Reset => Some(Cause::Guest),
            MachineEvent::TripleFault { .. } => Some(Cause::TripleFault),
            MachineEvent::Ejected | MachineEvent::VcpuFailed { .. } => return Some(event),
        };
        if let Some(reset) = &mut self.resets.under_way {
            if reset.step == Step::Checking {
                reset.early.push(event);
            }
            // Else of a guest that is gone.
            return None;
        }
        if self.resets.resting.is_some() {
            return None;
        }
        if self.resets.reboot.is_some() {
            self.begin_reset(Cause::Reboot { forced: false }, None);
            return None;
        }
        let Some(cause) = cause.filter(|_| self.restarts_guests()) else {
            return Some(event);
        };
        if let Err(status) = self.check_reset("restart") {
            log::warn!("{}", status.message);
            return Some(event);
        }
        let now = Instant::now();
        let due = self.resets.last.and_then(|last| last.checked_add(PACE));
        match due.filter(|due| *due > now) {
            None => self.begin_reset(cause, None),
            Some(due) => {
                self.rest(cause, due);
                // Should a vCPU not come out, it is waited for then.
                if let Some(machine) = &self.machine {
                    let _ = machine.parts.vcpus.pause(Duration::ZERO);
                }
            }
        }
        None
    }

    /// The machine's configuration wants a guest that resets itself to begin anew. A client that
    /// waits for its end does not.
    fn restarts_guests(&self) -> bool {
        let machine = self.machine.as_ref();
        let wanted = machine.is_some_and(|m| m.config.on_reset == OnReset::RESTART.into());
        wanted && self.shutdown.is_none()
    }

    /// The guest is over, and begins anew then.
    fn rest(&mut self, cause: Cause, until: Instant) {
        let told = self.resets.resting.is_some_and(|resting| resting.told);
        self.resets.resting = Some(Resting { cause, until, told });
    }

    /// Parks the vCPUs and begins.
    fn begin_reset(&mut self, cause: Cause, reply: Option<ReplyHandle>) {
        if self.stop.is_some() {
            return;
        }
        let replies = Vec::from_iter(reply);
        let Some(machine) = &self.machine else { return };
        let rested = self.resets.resting.map(|resting| resting.cause);
        let over =
            rested.is_some() || !matches!(cause, Cause::Client | Cause::Reboot { forced: true });
        let limit = if over { OWN_LIMIT } else { VCPU_LIMIT };
        if let Err(error) = machine.parts.vcpus.pause(limit) {
            let line = error.to_string();
            for reply in replies {
                let status = RpcStatus::new(Code::DeadlineExceeded, line.clone());
                reply.complete(Err(status));
            }
            if over {
                // A client that waits for a reset is told; the guest's own waits itself.
                let now = Instant::now();
                self.rest(
                    rested.unwrap_or(cause),
                    now.checked_add(PACE).unwrap_or(now),
                );
                if let Some(resting) = self.resets.resting.as_mut().filter(|r| !r.told) {
                    resting.told = true;
                    log::warn!(
                        "the next guest waits: {line}: is the host's storage stuck? ctl shutdown --force ends the machine"
                    );
                }
            } else {
                self.guest_goes_on();
                self.give_up_reboot(&line);
            }
            return;
        }
        self.resets.resting = None;
        let cpus = self.cpus_of_next_guest();
        let go = match self.start_reset(cpus) {
            Ok(go) => go,
            Err(error) => {
                return self.not_reset(replies, over, Vec::new(), &format!("a thread: {error}"));
            }
        };
        if matches!(cause, Cause::Guest | Cause::TripleFault) {
            self.resets.last = Some(Instant::now());
        }
        // It waits for that.
        let _ = go.send(());
        self.resets.under_way = Some(UnderWay {
            cause,
            step: Step::Checking,
            over,
            early: Vec::new(),
            go,
            cpus,
            until: Instant::now().checked_add(PATIENCE),
            replies,
        });
    }

    fn start_reset(&self, cpus: u32) -> std::io::Result<Sender<()>> {
        let Some(machine) = &self.machine else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let (post, hook) = (self.hotplug.post(), Arc::clone(&self.hooks.helper));
        let parts = &machine.parts;
        let job = Job {
            boot: Arc::clone(&parts.boot),
            ram: parts.ram.clone(),
            pci: Arc::clone(&parts.pci),
            kvm: Arc::clone(&parts.kvm),
            last: Arc::clone(&parts.entry),
            cpus: (cpus, parts.hotplug.possible_cpus()),
        };
        reset::start(job, post, hook)
    }

    /// vCPUs that were parked for a reset run on, unless a client paused the machine.
    fn guest_goes_on(&self) {
        if let Some(machine) = &self.machine
            && machine.state == MachineState::Running
        {
            machine.parts.vcpus.resume();
        }
    }

    /// Nothing has changed: the guest goes on where it was, unless it is over.
    fn not_reset(
        &mut self,
        replies: Vec<ReplyHandle>,
        over: bool,
        early: Vec<MachineEvent>,
        why: &str,
    ) {
        let line = format!("the machine cannot begin anew: {why}");
        if over {
            let reboot = self.resets.reboot.take();
            let reboot = reboot.into_iter().flat_map(|reboot| reboot.replies);
            for reply in replies.into_iter().chain(reboot) {
                reply.complete(Err(RpcStatus::new(Code::Aborted, line.clone())));
            }
            return self.end(StopReason::HostError(line));
        }
        for reply in replies {
            reply.complete(Err(refused(line.clone())));
        }
        self.give_up_reboot(&line);
        self.guest_goes_on();
        for event in early {
            self.on_machine_event(event);
        }
        self.take_held();
    }

    /// Carries out what was held.
    fn take_held(&mut self) {
        for (request, reply) in std::mem::take(&mut self.resets.held) {
            self.on_request(request, reply);
        }
    }

    /// There is something to boot: the guest's time is over.
    fn begin_stopping(&mut self) {
        // What the guest that is gone asked for; a vCPU that KVM gave up on counts.
        while let Some(event) = self.vcpu_events.try_recv() {
            if let MachineEvent::VcpuFailed { vcpu, fault } = event {
                return self.end(StopReason::HostError(format!("vCPU {vcpu}: {fault}")));
            }
        }
        self.on_ejected();
        self.let_leavers_go();
        if let Some(reset) = &mut self.resets.under_way {
            reset.early.clear();
            reset.step = Step::Stopping;
            // It waits for that.
            let _ = reset.go.send(());
        }
    }

    /// The thread has come further.
    pub(super) fn on_reset_progress(&mut self, progress: Progress) {
        if self.stop.is_some() {
            return;
        }
        match progress {
            Progress::Checked(Ok(())) => self.begin_stopping(),
            Progress::Checked(Err(why)) => {
                if let Some(reset) = self.resets.under_way.take() {
                    self.not_reset(reset.replies, reset.over, reset.early, &why);
                }
            }
            Progress::Stopped => {
                if let Some(reset) = &mut self.resets.under_way {
                    reset.step = Step::Quieting;
                }
                self.look_at_reset(Instant::now());
            }
            Progress::Loaded(Ok(entry)) => self.begin_anew(entry),
            Progress::Loaded(Err(why)) => {
                self.end(StopReason::HostError(format!(
                    "the machine cannot begin anew: {why}"
                )));
            }
        }
    }

    /// Which devices may still write to memory, by processes that were lost.
    fn unquiet(&self) -> Vec<String> {
        let devices = self.machine.iter().flat_map(|m| m.parts.devices.iter());
        let there = devices.filter(|device| !device.function.is_quiet());
        let leaving = self.functions_that_leave();
        let gone = leaving.into_iter().filter(|(_, mapper)| !mapper.is_quiet());
        there
            .map(|device| device.id.clone())
            .chain(gone.map(|(id, _)| id))
            .collect()
    }

    /// Looks what is due. True: nothing was.
    pub(super) fn look_at_reset(&mut self, now: Instant) -> bool {
        if self.stop.is_some() {
            return true;
        }
        if let Some(resting) = self.resets.resting.filter(|r| r.until <= now) {
            self.begin_reset(resting.cause, None);
            return false;
        }
        let reboot = self.resets.reboot.as_ref();
        if !self.resets.is_resetting() && reboot.is_some_and(|r| r.deadline <= now) {
            let line = "the guest did not switch itself off";
            self.log.publish("machine.reboot-deadline", "", line);
            self.begin_reset(Cause::Reboot { forced: true }, None);
            return false;
        }
        let Some(step) = self.resets.under_way.as_ref().map(|reset| reset.step) else {
            return true;
        };
        let unquiet = self.unquiet();
        let ready = step == Step::Quieting && unquiet.is_empty() && !self.is_plugging_memory();
        let Some(reset) = &mut self.resets.under_way else {
            return true;
        };
        if ready {
            reset.step = Step::Loading;
            // It waits for that.
            let _ = reset.go.send(());
            return false;
        }
        if reset.until.take_if(|at| *at <= now).is_none() {
            return true;
        }
        let why = match (step, unquiet.as_slice()) {
            (Step::Stopping, _) => "device processes have not answered".to_owned(),
            (Step::Checking | Step::Loading, _) => "the kernel is being read".to_owned(),
            (Step::Quieting, []) => "memory is being plugged".to_owned(),
            (Step::Quieting, [first, ..]) => format!(
                "device {first}: the I/O of its last process has not ended: is the host's storage stuck?"
            ),
        };
        let line = format!(
            "not reset in {} s: {why}: the machine stands still until it has, or is ended by force",
            PATIENCE.as_secs()
        );
        let mut replies = std::mem::take(&mut reset.replies);
        if let Some(reboot) = &mut self.resets.reboot {
            replies.append(&mut reboot.replies);
        }
        for reply in replies {
            let status = RpcStatus::new(Code::DeadlineExceeded, line.clone());
            reply.complete(Err(status));
        }
        false
    }

    /// Everything is in place: the next guest begins.
    fn begin_anew(&mut self, entry: BootEntry) {
        let Some(reset) = self.resets.under_way.take() else {
            return;
        };
        let Some(machine) = &mut self.machine else {
            return;
        };
        let parts = &mut machine.parts;
        parts.entry = Arc::new(entry);
        parts.hotplug.reset(reset.cpus);
        parts.ged.reset();
        parts.serial.reset();
        // What was asked to leave meanwhile was told to a guest that is gone.
        self.let_leavers_go();
        let Some(machine) = &mut self.machine else {
            return;
        };
        let parts = &mut machine.parts;
        let begun = parts.vcpus.reset(&parts.entry, reset.cpus, VCPU_LIMIT);
        if let Err(error) = begun {
            return self.end(StopReason::HostError(error.to_string()));
        }
        if machine.state == MachineState::Running {
            parts.vcpus.start();
            if self.shutdown.is_some() {
                // Who waits for the machine's end asked the guest that is gone.
                parts.ged.press_power_button();
            }
        }
        self.wait_for_drivers_anew(Instant::now());
        self.resets.count = self.resets.count.saturating_add(1);
        let (cause, count) = (reset.cause, self.resets.count);
        let what = told::reset(cause, count);
        self.log
            .publish_typed("machine.reset", "", &cause.to_string(), Some(what));
        for reply in reset.replies {
            reply.complete(Ok(ApiResponse::Done));
        }
        if let Some(reboot) = self.resets.reboot.take() {
            self.ended(reboot.operation, SUBJECT, Ok(&cause.to_string()));
            let mut response = RebootResponse::new();
            response.operation = reboot.operation;
            response.forced = cause == Cause::Reboot { forced: true };
            for reply in reboot.replies {
                reply.complete(Ok(ApiResponse::Rebooted(response.clone())));
            }
        }
        self.take_held();
    }
}
