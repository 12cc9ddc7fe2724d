//! What only `vmservice.VM` asks of the manager, and how a process that serves it ends: its
//! machine first, with all that is its own, and the process when the client says Quit or is
//! gone. Runs on the manager thread.
//!
//! ```text
//!   running ── guest halts ─────▶ torn down ── Quit, no client, or 2 s ──▶ the process ends
//!      │                             ▲      └─ after TeardownVM: 60 s
//!      └─────── TeardownVM ──────────┘
//! ```

use std::time::{Duration, Instant};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::vmservice::{
    CapabilitiesVMResponse, MemoryStats, ProcessorStats, PropertiesVMResponse, VMState,
    capabilities_vmresponse::{Resource, SupportedGuestOS, SupportedResource},
};

use super::Host;
use crate::api::{ApiRequest, ApiResponse, ReplyHandle};
use crate::machine::queue::RequestReceiver;
use crate::machine::state::MachineState;
use crate::machine::stop::StopReason;
use crate::signals::Signals;

/// Most calls that wait for the machine's end.
const MAX_WAITERS: usize = 16;
/// How long a guest has to give a vCPU up.
const CPU_TIME: Duration = Duration::from_secs(28);
/// How long clients may ask why the machine has halted: whoever started the process waits
/// for its end.
const AFTER_HALT: Duration = Duration::from_secs(2);
/// How long a client may take from TeardownVM to Quit.
const AFTER_TEARDOWN: Duration = Duration::from_secs(60);
/// How often to look whether clients are still there and ask for something.
const LOOK: Duration = Duration::from_millis(10);

/// Calls that wait for the machine's end.
#[derive(Default)]
pub(super) struct Calls {
    waiters: Vec<ReplyHandle>,
    teardown: Vec<ReplyHandle>,
    quit: Vec<ReplyHandle>,
}

impl Calls {
    /// Those that wait for the machine's end.
    pub(super) fn take_waiters(&mut self) -> Vec<ReplyHandle> {
        std::mem::take(&mut self.waiters)
    }
}

fn none() -> RpcStatus {
    RpcStatus::failed_precondition("no machine yet: call CreateVM first")
}

impl Host {
    /// Lets a machine go that was made, or paused.
    pub(super) fn go(&mut self) -> Result<(), RpcStatus> {
        match self.machine.as_ref().map(|machine| machine.state) {
            None => Err(none()),
            Some(MachineState::Created) => self.boot(),
            Some(_) => self.resume(),
        }
    }

    /// Keeps the call until the machine has ended.
    pub(super) fn wait_for_end(&mut self, reply: ReplyHandle) {
        let waiters = &mut self.calls.waiters;
        waiters.retain(|waiter| !waiter.is_abandoned());
        if self.machine.is_none() {
            return reply.complete(Err(none()));
        }
        if waiters.len() >= MAX_WAITERS {
            return reply.complete(Err(RpcStatus::new(
                bulkhead_proto::Code::ResourceExhausted,
                format!("{MAX_WAITERS} calls wait for the machine's end: that is enough"),
            )));
        }
        waiters.push(reply);
    }

    /// Ends the machine.
    pub(super) fn tear_down(&mut self, reply: ReplyHandle) {
        if self.machine.is_none() {
            return reply.complete(Err(none()));
        }
        self.calls.teardown.push(reply);
        self.end(StopReason::Forced);
    }

    /// Ends the process.
    pub(super) fn quit(&mut self, reply: ReplyHandle) {
        self.calls.quit.push(reply);
        self.end(StopReason::Forced);
    }

    /// What ModifyResource can change of this machine.
    pub(super) fn capabilities(&self) -> CapabilitiesVMResponse {
        let mut response = CapabilitiesVMResponse::new();
        response
            .supported_guest_os
            .push(SupportedGuestOS::LINUX.into());
        let Some(machine) = &self.machine else {
            return response;
        };
        if machine.config.memory_max_bytes != 0 {
            let mut memory = SupportedResource::new();
            memory.update = true;
            memory.resource = Resource::MEMORY_RESOURCE.into();
            response.supported_resources.push(memory);
        }
        let cpus = machine.config.cpus.clone().unwrap_or_default();
        if cpus.max > cpus.boot {
            let mut processor = SupportedResource::new();
            (processor.add, processor.remove) = (true, true);
            processor.resource = Resource::PROCESSOR_RESOURCE.into();
            response.supported_resources.push(processor);
        }
        response
    }

    /// What the machine is, and what it uses.
    pub(super) fn properties(&self, memory: bool, processor: bool) -> PropertiesVMResponse {
        let mut response = PropertiesVMResponse::new();
        let Some(machine) = &self.machine else {
            return response;
        };
        response.state = match machine.state {
            MachineState::Created | MachineState::Paused => VMState::PAUSED,
            MachineState::Running => VMState::RUNNING,
            MachineState::Stopped => VMState::HALTED,
        }
        .into();
        if memory {
            let mut stats = MemoryStats::new();
            let pluggable = self.memory_info();
            let size = machine.parts.ram.size();
            stats.assigned_memory = pluggable.as_ref().map_or(size, |m| m.present_bytes);
            let most = pluggable.as_ref().map_or(size, |m| m.max_bytes);
            stats.reserved_memory = most.saturating_sub(stats.assigned_memory);
            stats.working_set_bytes = machine.parts.ram.allocated();
            stats.available_memory = stats
                .assigned_memory
                .saturating_sub(stats.working_set_bytes);
            response.memory_stats = Some(stats).into();
        }
        if processor {
            let mut stats = ProcessorStats::new();
            let runtime = machine.parts.vcpus.runtime().as_nanos();
            stats.total_runtime_ns = u64::try_from(runtime).unwrap_or(u64::MAX);
            response.processor_stats = Some(stats).into();
        }
        response
    }

    /// Removes what is behind a root port. Done when nothing is: a client may ask again that
    /// has missed the first answer.
    pub(super) fn remove_behind(&mut self, port: &str, timeout: Duration, reply: ReplyHandle) {
        let Some(machine) = &self.machine else {
            return reply.complete(Err(none()));
        };
        let ports = machine.parts.pci.ports();
        let id = {
            let mut devices = machine.parts.devices.iter();
            let found = devices.find(|device| device.port == port);
            found.map(|device| device.id.clone())
        };
        match id {
            Some(id) => self.remove_device(id, false, timeout, reply),
            None if ports.iter().any(|p| p.name == port) => reply.complete(Ok(ApiResponse::Done)),
            None => reply.complete(Err(RpcStatus::new(
                bulkhead_proto::Code::NotFound,
                format!("port_name: there is no port {port}: give one of CreateVM's"),
            ))),
        }
    }

    /// Adds the next vCPU, or has the guest give the last one up.
    pub(super) fn plug_cpu(&mut self, index: u32, add: bool, reply: ReplyHandle) {
        let Some(machine) = &self.machine else {
            return reply.complete(Err(none()));
        };
        let present = machine.parts.hotplug.present_cpus();
        let (fits, count) = match add {
            true => (present, present.saturating_add(1)),
            false => (present.saturating_sub(1), present.saturating_sub(1)),
        };
        if index != fits || count == 0 {
            let line = format!(
                "processor.processor_index is {index}: the machine has {present}; add number \
                 {present}, or remove the last one that is not number 0"
            );
            return reply.complete(Err(RpcStatus::invalid_argument(line)));
        }
        self.resize_cpus(count, CPU_TIME, reply);
    }

    /// Ends the machine and all that is its own, tells who waits for that, and stays for
    /// clients as long as is drawn above. `clients` counts them.
    pub(super) fn see_out(mut self, clients: impl Fn() -> usize) {
        // While its vCPUs still have threads.
        let mut last = self.properties(true, true);
        last.state = VMState::HALTED.into();
        last.halt_reason = self.stop.as_ref().map(ToString::to_string);
        let had_machine = self.machine.is_some();
        self.teardown();
        // Device processes, sockets, cgroups.
        let outcome = self.leave_nothing();
        let Self {
            requests,
            signals,
            stop,
            calls,
            deleted,
            hotplug,
            resize,
            memory,
            placements,
            attached,
            ..
        } = self;
        // Whose call is under way is told at once that the machine has ended.
        drop((hotplug, resize, memory, placements, attached));
        let leaves = matches!(
            stop,
            None | Some(StopReason::Signal(_) | StopReason::LauncherDied(_))
        );
        let quit = calls.quit.is_empty() && deleted.is_empty();
        let stay = match (quit, calls.teardown.is_empty()) {
            _ if leaves || !had_machine => None,
            (false, _) => None,
            (true, true) => Some(AFTER_HALT),
            (true, false) => Some(AFTER_TEARDOWN),
        };
        let all = calls.teardown.into_iter().chain(calls.waiters);
        for reply in all.chain(calls.quit) {
            reply.complete(Ok(ApiResponse::Done));
        }
        for reply in deleted {
            reply.complete(outcome.clone().map(|()| ApiResponse::Done));
        }
        if let Some(stay) = stay {
            linger(&requests, &signals, &last, stay, clients);
        }
    }
}

/// Answers what can be answered when there is no machine any more.
fn linger(
    requests: &RequestReceiver,
    signals: &Signals,
    last: &PropertiesVMResponse,
    stay: Duration,
    clients: impl Fn() -> usize,
) {
    let until = Instant::now() + stay;
    loop {
        requests.clear();
        while let Some((request, reply)) = requests.try_next() {
            let quits = request == ApiRequest::Quit;
            reply.complete(answer(&request, last));
            if quits {
                return;
            }
        }
        if Instant::now() >= until || clients() == 0 || signals.next().is_some() {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

fn answer(request: &ApiRequest, last: &PropertiesVMResponse) -> Result<ApiResponse, RpcStatus> {
    match request {
        ApiRequest::Quit | ApiRequest::Wait | ApiRequest::Teardown => Ok(ApiResponse::Done),
        ApiRequest::Properties { memory, processor } => {
            let mut properties = last.clone();
            if !memory {
                properties.memory_stats.take();
            }
            if !processor {
                properties.processor_stats.take();
            }
            Ok(ApiResponse::VmProperties(Box::new(properties)))
        }
        _ => Err(RpcStatus::failed_precondition(
            "the machine has ended: call Quit, and start another process for another machine",
        )),
    }
}
