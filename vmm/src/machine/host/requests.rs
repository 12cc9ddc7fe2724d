//! The API's requests, carried out on the manager thread.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{
    DevicesResponse, InfoResponse, MachineConfig, State, VmmCounters, serial_config,
};
use bulkhead_proto::{Code, RpcStatus};

use super::hotplug::announce;
use super::interrupt::interruptible;
use super::{Host, Machine, PendingShutdown, VCPU_LIMIT, resources};
use crate::api::{self, ApiRequest, ApiResponse, ReplyHandle};
use crate::confine;
use crate::machine::build;
use crate::machine::life::Life;
use crate::machine::state::{IllegalTransition, MachineState, Transition};
use crate::machine::stop::StopReason;

impl Host {
    /// Carries out a request of a client.
    pub(super) fn on_request(&mut self, request: ApiRequest, reply: ReplyHandle) {
        if reply.is_abandoned() {
            return;
        }
        let Some((request, reply)) = self.unless_resetting(request, reply) else {
            return;
        };
        let result = match request {
            ApiRequest::Create(config) => self.create_once(*config).map(|()| ApiResponse::Done),
            ApiRequest::CreateVm(config) => self.create(*config).map(|()| ApiResponse::Done),
            ApiRequest::Delete => return self.delete(reply),
            ApiRequest::Boot => self.lead_to(MachineState::Running, Self::boot),
            ApiRequest::Pause => self.lead_to(MachineState::Paused, Self::pause),
            ApiRequest::Resume => self.lead_to(MachineState::Running, Self::resume),
            ApiRequest::Shutdown { force, timeout } => return self.shutdown(force, timeout, reply),
            ApiRequest::Reset => return self.reset(reply),
            ApiRequest::Reboot { timeout } => return self.reboot(timeout, reply),
            ApiRequest::Info => Ok(ApiResponse::Info(Box::new(self.info()))),
            ApiRequest::Devices => Ok(ApiResponse::Devices(Box::new(self.devices()))),
            ApiRequest::DeviceStats { id } => return self.device_stats(&id, reply),
            ApiRequest::UpdateDisk(request) => return self.update_disk(&request, reply),
            ApiRequest::UpdateNet(request) => return self.update_net(&request, reply),
            ApiRequest::UpdateConsole(request) => return self.update_console(*request, reply),
            ApiRequest::UpdateResources { id, resources } => {
                return self.update_resources(&id, *resources, reply);
            }
            ApiRequest::DrainDevice { id, timeout } => {
                return self.drain_device(&id, timeout, reply);
            }
            ApiRequest::UpdateDevice {
                id,
                binary,
                timeout,
            } => return self.update_device(&id, binary, timeout, reply),
            ApiRequest::ResumeDevice { id } => return self.resume_device(&id, reply),
            ApiRequest::AddDevice(request) => return self.add_device(*request, reply),
            ApiRequest::RemoveDevice { id, force, timeout } => {
                return self.remove_device(id, force, timeout, reply);
            }
            ApiRequest::ResizeCpus { count, timeout } => {
                return self.resize_cpus(count, timeout, reply);
            }
            ApiRequest::ResizeMemory { size, timeout } => {
                return self.resize_memory(size, timeout, reply);
            }
            ApiRequest::Operation { operation, wait } => {
                let until = (!wait.is_zero()).then(|| Instant::now() + wait);
                return self.hotplug.operations.ask(operation, until, reply);
            }
            ApiRequest::Operations { subject, running } => {
                let all = self.hotplug.operations.list(&subject, running);
                Ok(ApiResponse::Operations(Box::new(all)))
            }
            ApiRequest::AttachConsole {
                device,
                port,
                history,
            } => return self.attach_console(&device, port, history, reply),
            ApiRequest::Go => self.go().map(|()| ApiResponse::Done),
            ApiRequest::Wait => return self.wait_for_end(reply),
            ApiRequest::Teardown => return self.tear_down(reply),
            ApiRequest::Quit => return self.quit(reply),
            ApiRequest::Capabilities => Ok(ApiResponse::VmCapabilities(self.capabilities())),
            ApiRequest::Properties { memory, processor } => {
                let properties = self.properties(memory, processor);
                Ok(ApiResponse::VmProperties(Box::new(properties)))
            }
            ApiRequest::RemoveBehind { port, timeout } => {
                return self.remove_behind(&port, timeout, reply);
            }
            ApiRequest::PlugCpu { index, add } => return self.plug_cpu(index, add, reply),
        };
        reply.complete(result);
    }

    /// Makes the machine, unless it is the one that is there: a client may ask again that has
    /// missed the first answer.
    fn create_once(&mut self, config: MachineConfig) -> Result<(), RpcStatus> {
        match &self.machine {
            Some(machine) if machine.asked == config => Ok(()),
            Some(_) => Err(RpcStatus::new(
                Code::AlreadyExists,
                "this VMM has a machine already, of another configuration (see Info): delete that first, or start another VMM for another machine",
            )),
            None => self.create(config),
        }
    }

    /// Takes the step that leads to a state, unless the machine is in it: the same.
    fn lead_to(
        &mut self,
        state: MachineState,
        step: fn(&mut Self) -> Result<(), RpcStatus>,
    ) -> Result<ApiResponse, RpcStatus> {
        if self
            .machine
            .as_ref()
            .is_none_or(|machine| machine.state != state)
        {
            step(self)?;
        }
        Ok(ApiResponse::Done)
    }

    /// Makes the machine.
    pub(super) fn create(&mut self, mut config: MachineConfig) -> Result<(), RpcStatus> {
        if self.machine.is_some() {
            return Err(RpcStatus::failed_precondition(
                "this VMM has a machine already: start another VMM for another machine",
            ));
        }
        api::config::validate(&config).map_err(RpcStatus::invalid_argument)?;
        // Its devices may have the names of those that have not ended.
        self.end_remnants()?;
        // Processes of a machine that could not be made have ended: that is told before there are
        // others with the same names.
        self.on_launcher();
        let asked = config.clone();
        build::fill_defaults(&mut config);
        let prepared = Arc::clone(&self.prepared);
        let mut prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner);
        prepared
            .check(&config.nets)
            .map_err(RpcStatus::invalid_argument)?;
        prepared.fill_defaults(&mut config);
        let dev_kvm = self
            .dev_kvm
            .as_ref()
            .ok_or_else(|| RpcStatus::internal("/dev/kvm is closed"))?
            .try_clone()
            .map_err(|e| RpcStatus::internal(format!("/dev/kvm: {e}")))?;
        let events = self.events_in.clone();
        let built = interruptible(&self.signals, &self.launcher, &self.hooks.helper, || {
            build::build(
                &config,
                dev_kvm,
                &self.launcher,
                &mut prepared,
                &self.stdio,
                events,
                &self.hooks,
            )
        });
        let mut parts = match built.and_then(|parts| parts) {
            Ok(parts) => parts,
            Err(why) => {
                // It may not have come so far.
                if let Some(path) = build::serial_socket(&config) {
                    let _ = self.launcher.forget(&path);
                }
                return Err(RpcStatus::failed_precondition(why));
            }
        };
        prepared.let_go();
        for device in parts.devices.iter() {
            announce(&self.log, &self.launcher, device);
        }
        for (id, why) in parts.absent.drain(..) {
            self.log.publish("device.absent", &id, &why);
        }
        for process in parts.devices.iter_mut().filter_map(|d| d.process.as_mut()) {
            process.life = Life::new(self.restarts);
        }
        let devices = parts.devices.slots();
        self.machine = Some(Machine {
            asked,
            config,
            state: MachineState::Created,
            parts,
        });
        let watched = (0..devices).try_for_each(|index| self.watch_device(index));
        if let Err(why) = watched.and_then(|()| self.start_plugger()) {
            // Half of a machine is none, for whoever asks again.
            if let Err(left) = self.delete_created() {
                log::warn!("{}", left.message);
            }
            return Err(RpcStatus::internal(why));
        }
        self.log.publish("machine.created", "", "");
        Ok(())
    }

    /// The machine, if `transition` is legal, and the state it leads to.
    fn prepare(
        &mut self,
        transition: Transition,
    ) -> Result<(&mut Machine, MachineState), RpcStatus> {
        let machine = self.machine.as_mut().ok_or_else(|| {
            RpcStatus::failed_precondition(format!(
                "cannot {transition}: no machine yet: create one"
            ))
        })?;
        let next = machine
            .state
            .apply(transition)
            .map_err(|e: IllegalTransition| RpcStatus::failed_precondition(e.to_string()))?;
        Ok((machine, next))
    }

    /// Lets the machine go.
    pub(super) fn boot(&mut self) -> Result<(), RpcStatus> {
        let (machine, next) = self.prepare(Transition::Boot)?;
        // Before the guest's first instruction what only making a machine needs goes, for good.
        confine::steady()
            .map_err(|e| RpcStatus::internal(format!("confining the manager: {e}")))?;
        let stdio = machine
            .config
            .serial
            .as_ref()
            .is_some_and(|s| s.mode == serial_config::Mode::STDIO.into());
        machine.parts.vcpus.start();
        machine.state = next;
        self.unseen = Some(0);
        if stdio {
            self.raw = self.terminal.and_then(|terminal| {
                terminal
                    .raw()
                    .inspect_err(|e| log::warn!("the terminal stays as it is: {e}"))
                    .ok()
            });
        }
        self.log.publish("machine.running", "", "");
        Ok(())
    }

    fn pause(&mut self) -> Result<(), RpcStatus> {
        let (machine, next) = self.prepare(Transition::Pause)?;
        if let Err(error) = machine.parts.vcpus.pause(VCPU_LIMIT) {
            // It is not paused: the others go on, and this one when it can.
            machine.parts.vcpus.resume();
            return Err(RpcStatus::new(Code::DeadlineExceeded, error.to_string()));
        }
        machine.state = next;
        self.log.publish("machine.paused", "", "");
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), RpcStatus> {
        let (machine, next) = self.prepare(Transition::Resume)?;
        machine.parts.vcpus.resume();
        machine.state = next;
        self.log.publish("machine.running", "", "");
        Ok(())
    }

    fn shutdown(&mut self, force: bool, timeout: Duration, reply: ReplyHandle) {
        let state = self.machine.as_ref().map(|m| m.state);
        if state.is_none() {
            return reply.complete(Err(RpcStatus::failed_precondition(
                "cannot shut down: no machine: create one; a bulkhead without one ends by SIGTERM or Ctrl-C",
            )));
        }
        if force || state != Some(MachineState::Paused) {
            self.give_up_reboot("overtaken by a shutdown");
        }
        if force || !matches!(state, Some(MachineState::Running | MachineState::Paused)) {
            self.shutdown
                .get_or_insert_with(|| PendingShutdown {
                    deadline: Instant::now(),
                    replies: Vec::new(),
                })
                .replies
                .push(reply);
            return self.end(StopReason::Forced);
        }
        if state == Some(MachineState::Paused) {
            return reply.complete(Err(RpcStatus::failed_precondition(
                "cannot shut down a machine that is paused: resume it first, or use force",
            )));
        }
        if let Some(machine) = &self.machine {
            machine.parts.ged.press_power_button();
        }
        self.log.publish("machine.power-button", "", "");
        let deadline = Instant::now() + timeout;
        let pending = self.shutdown.get_or_insert_with(|| PendingShutdown {
            deadline,
            replies: Vec::new(),
        });
        pending.deadline = pending.deadline.min(deadline);
        pending.replies.push(reply);
        if self.is_resting() {
            // The guest has come to its end by itself.
            self.end(StopReason::Forced);
        }
    }

    /// Ends a machine whose guest did not heed the power button in time. True: there was
    /// nothing to do.
    pub(super) fn check_shutdown(&mut self) -> bool {
        let late = self
            .shutdown
            .as_ref()
            .is_some_and(|s| Instant::now() >= s.deadline);
        if late && self.stop.is_none() {
            self.log.publish(
                "machine.shutdown-deadline",
                "",
                "the guest did not switch itself off",
            );
            self.end(StopReason::Forced);
        }
        !late
    }

    fn info(&self) -> InfoResponse {
        let mut info = InfoResponse::new();
        info.version = env!("CARGO_PKG_VERSION").to_string();
        info.vmm_pid = i32::try_from(std::process::id()).unwrap_or(0);
        info.launcher_pid = self.launcher.pid();
        info.stop_reason = self
            .stop
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let (cgroup, note) = self.launcher.cgroup();
        info.cgroup = cgroup.to_owned();
        info.cgroup_note = note.to_owned();
        info.landlock_abi = Some(self.landlock_abi);
        let mut counters = VmmCounters::new();
        counters.manager_wakeups = self.wakeups;
        counters.heartbeat_wakeups = self.heartbeat_wakeups;
        match &self.machine {
            None => info.state = State::STATE_NONE.into(),
            Some(machine) => {
                info.state = machine.state.to_wire().into();
                info.config = Some(machine.config.clone()).into();
                for vcpu in machine.parts.vcpus.counters() {
                    counters.vcpu_exits = counters.vcpu_exits.saturating_add(vcpu.exits);
                    counters.mmio_exits = counters.mmio_exits.saturating_add(vcpu.mmio);
                    counters.pio_exits = counters.pio_exits.saturating_add(vcpu.pio);
                }
                counters.msi_gsis = u64::try_from(machine.parts.kvm.gsis()).unwrap_or(u64::MAX);
                let slots = machine.parts.kvm.memory_slots();
                counters.memory_slots = u64::try_from(slots).unwrap_or(u64::MAX);
                info.ports = self.ports();
                info.cpus = machine.parts.hotplug.present_cpus();
                info.memory = self.memory_info().into();
                counters.serial_bytes = machine.parts.serial.stats().bytes_out;
            }
        }
        info.counters = Some(counters).into();
        info
    }

    fn devices(&self) -> DevicesResponse {
        let mut response = DevicesResponse::new();
        if let Some(machine) = &self.machine {
            response.devices = machine.parts.devices.iter().map(resources::info).collect();
        }
        response
    }
}
