//! The manager thread: starts the launcher, confines the process, makes the machine, and
//! answers requests and events in one epoll loop until the machine has stopped.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::MachineConfig;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::build::{Hooks, Parts, Stdio};
use super::net_start::Prepared;
use super::queue::{self, RequestReceiver};
use super::state::{MachineState, Transition};
use super::stop::StopReason;
use super::supervise::Budget;
use super::told;
use super::trial::Ended;
use crate::api::{ApiResponse, ApiServer, EventLog, ReplyHandle, Services, note_end};
use crate::confine;
use crate::events::{self, EventReceiver, EventSender, MachineEvent};
use crate::kvm;
use crate::launcher::{CgroupChoice, IdRange, Launcher, LauncherConfig, LauncherEvent};
use crate::signals::{self, Signals};
use crate::terminal::{RawTerminal, Terminal};

mod consoles;
mod cpus;
mod delete;
mod devices;
mod doors;
mod foreign;
mod hotplug;
mod interrupt;
mod memory;
mod remnants;
mod requests;
mod reset;
mod resources;
mod source;
mod supervision;
mod updating;
mod vmservice;

pub use doors::ApiOptions;
use source::Source;

/// How long vCPUs may take to park or to end.
const VCPU_LIMIT: Duration = Duration::from_secs(5);
/// How long what the guest printed last may take to drain.
const SERIAL_LIMIT: Duration = Duration::from_secs(2);

/// At most one report of a malformed ring per device in this time.
const RING_ERROR_INTERVAL: Duration = Duration::from_secs(1);
/// A guest that has not left its vCPU once in so many seconds cannot run here: the kernel's
/// first steps alone touch ports and registers.
const BOOT_PATIENCE: u32 = 30;
/// How long clients may take to read their last replies.
const API_GRACE: Duration = Duration::from_secs(1);

/// How to start.
pub struct HostOptions {
    /// Directory of the launcher and the device binaries.
    pub libexec: Option<PathBuf>,
    /// passt, for user-mode networks.
    pub passt: Option<PathBuf>,
    /// virtiofsd, for directories.
    pub virtiofsd: Option<PathBuf>,
    /// Where the VM's cgroup is to be.
    pub cgroup: CgroupChoice,
    /// Where to serve the API, and to whom.
    pub api: ApiOptions,
    /// What to serve there.
    pub services: Services,
    /// The machine to create and boot at once.
    pub first: Option<MachineConfig>,
    /// How often a device's process may be replaced.
    pub restarts: Budget,
    /// Directories under which binaries for live updates may lie.
    pub device_dirs: Vec<PathBuf>,
    /// What every path that is named must lie under; none: anywhere.
    pub allow_paths: Vec<PathBuf>,
    /// Where the devices' host ids are taken from.
    pub ids: Option<IdRange>,
}

/// Starts the VMM and stays until its machine has stopped.
///
/// # Errors
/// One line that says what failed and the remedy.
pub fn run(options: HostOptions) -> Result<StopReason, String> {
    // First: what is open now beyond the standard streams was inherited.
    if let Some(first) = &options.first {
        crate::api::config::validate(first)?;
    }
    let mut prepared = Prepared::new(options.first.as_ref());
    if options.services == Services::Vm {
        prepared = prepared.with_taps_of_the_pod();
    }
    let signals = Signals::block().map_err(|e| format!("signals: {e}"))?;
    let dev_kvm = kvm::open_dev_kvm().map_err(|e| no_kvm(&e))?;
    let stdio = Stdio {
        input: clone_stream(std::io::stdin())?,
        output: clone_stream(std::io::stdout())?,
    };
    let terminal = Terminal::on_stdin().map_err(|e| format!("terminal: {e}"))?;
    let mut config =
        LauncherConfig::new(Vec::new()).map_err(|e| format!("libexec: {e}: give --libexec DIR"))?;
    if let Some(dir) = options.libexec {
        config.libexec = dir;
    }
    // A machine that somebody can speak to can be given more devices.
    let grows = options.api.socket.is_some();
    config.devices = super::kinds::binaries(options.first.as_ref(), &config.libexec, grows);
    config.cgroup = options.cgroup;
    config.device_dirs = options.device_dirs;
    config.allow_paths = options.allow_paths;
    config.ids = options.ids;
    config.helpers =
        super::net_external::helpers(options.first.as_ref(), options.passt, options.virtiofsd)?;
    let places = options.api.prepare()?;
    let launcher = Launcher::start(&config).map_err(|e| e.to_string())?;
    // Helpers' programs are the launcher's from now on.
    drop(config);
    // A confined VMM cannot reap it.
    signals::forget_children();
    let doors = places.bind(&launcher)?;
    let hooks = Hooks {
        vcpu: confine::vcpu_hook(),
        helper: confine::helper_hook(),
    };
    let confinement = confine::vmm(launcher.vmm_id())?;

    let log = Arc::new(EventLog::new());
    let (sender, requests) = queue::channel().map_err(|e| format!("request queue: {e}"))?;
    let (events_in, vcpu_events) = events::event_channel().map_err(|e| format!("events: {e}"))?;
    let api = match doors.is_empty() {
        false => Some(
            ApiServer::start(
                doors,
                Arc::new(sender),
                Arc::clone(&log),
                options.services,
                confine::helper_hook(),
            )
            .map_err(|e| format!("API server: {e}"))?,
        ),
        true => None,
    };
    let mut host = Host {
        launcher: Arc::new(launcher),
        dev_kvm: Some(dev_kvm),
        stdio,
        prepared: Arc::new(Mutex::new(prepared)),
        hooks,
        log,
        epoll: Epoll::new().map_err(|e| format!("epoll: {e}"))?,
        requests,
        vcpu_events,
        events_in,
        signals,
        machine: None,
        terminal,
        raw: None,
        stop: None,
        shutdown: None,
        unseen: None,
        landlock_abi: confinement.landlock.abi,
        restarts: options.restarts,
        placements: Vec::new(),
        hotplug: hotplug::Hotplug::new()?,
        resize: None,
        memory: memory::Progress::default(),
        attached: Vec::new(),
        calls: vmservice::Calls::default(),
        resets: reset::Resets::default(),
        deleted: Vec::new(),
        remnants: remnants::Remnants::default(),
        heartbeat: None,
        wakeups: 0,
        heartbeat_wakeups: 0,
    };
    let result = host.main(options.first);
    match (options.services, api) {
        (Services::Vm, Some(api)) => {
            host.see_out(|| api.clients());
            api.stop(API_GRACE);
        }
        (_, api) => {
            host.teardown();
            host.answer_deleted();
            if let Some(api) = api {
                api.stop(API_GRACE);
            }
        }
    }
    result
}

/// What to do about a /dev/kvm that does not open.
fn no_kvm(error: &std::io::Error) -> String {
    let remedy = match error.kind() {
        std::io::ErrorKind::PermissionDenied if groups_may_open() => {
            "run as root or as a member of its group"
        }
        std::io::ErrorKind::PermissionDenied => {
            "run as root, or give its group the right (chmod g+rw /dev/kvm) and run as a member of it"
        }
        _ => "enable virtualization in the firmware and load kvm_intel or kvm_amd",
    };
    format!("/dev/kvm: {error}: {remedy}")
}

/// Whether a member of /dev/kvm's group may open it.
fn groups_may_open() -> bool {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata("/dev/kvm").map(|found| found.permissions().mode());
    mode.is_ok_and(|mode| mode & 0o060 == 0o060)
}

/// A descriptor of our own for one of the standard streams.
fn clone_stream(stream: impl AsFd) -> Result<OwnedFd, String> {
    stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| format!("standard streams: {e}: start with all of 0, 1 and 2 open"))
}

/// epoll_wait's timeout, rounded up so as not to wake a moment too early and spin.
fn millis_until(deadline: Option<Instant>, now: Instant) -> i32 {
    deadline.map_or(-1, |at| {
        let left = at.saturating_duration_since(now).as_micros().div_ceil(1000);
        i32::try_from(left).unwrap_or(i32::MAX)
    })
}

/// A machine and its state.
struct Machine {
    /// As it was asked for.
    asked: MachineConfig,
    /// As it is.
    config: MachineConfig,
    state: MachineState,
    parts: Parts,
}

/// A shutdown that waits for the guest.
struct PendingShutdown {
    deadline: Instant,
    replies: Vec<ReplyHandle>,
}

/// All that the manager thread owns. `machine` drops before `launcher`.
struct Host {
    machine: Option<Machine>,
    launcher: Arc<Launcher>,
    dev_kvm: Option<OwnedFd>,
    stdio: Stdio,
    /// Taps; also for threads that make devices.
    prepared: Arc<Mutex<Prepared>>,
    hooks: Hooks,
    log: Arc<EventLog>,
    epoll: Epoll,
    requests: RequestReceiver,
    vcpu_events: EventReceiver,
    events_in: EventSender,
    signals: Signals,
    terminal: Option<Terminal>,
    raw: Option<RawTerminal>,
    stop: Option<StopReason>,
    shutdown: Option<PendingShutdown>,
    /// Seconds that a booted guest has not been seen to do anything; `None` once it has.
    unseen: Option<u32>,
    /// How often a device's process may be replaced.
    restarts: Budget,
    /// ABI of Landlock that is in force in this process.
    landlock_abi: u32,
    /// Changes of limits that the launcher has not answered.
    placements: Vec<resources::Placement>,
    /// Devices that come and go.
    hotplug: hotplug::Hotplug,
    /// A change of the number of vCPUs.
    resize: Option<cpus::Resize>,
    /// A change of the guest's memory.
    memory: memory::Progress,
    /// Clients of the API at ports of consoles.
    attached: Vec<consoles::Attached>,
    /// Calls that wait for the machine's end.
    calls: vmservice::Calls,
    /// Resets of the machine.
    resets: reset::Resets,
    /// Who is told when nothing of the machine is left.
    deleted: Vec<ReplyHandle>,
    /// What is left of a machine that was given up before it booted.
    remnants: remnants::Remnants,
    /// When devices are next asked for their health; `None` while the machine does not run.
    heartbeat: Option<Instant>,
    /// Wake-ups of the manager, and those for nothing but devices' health.
    wakeups: u64,
    heartbeat_wakeups: u64,
}

impl Host {
    fn main(&mut self, first: Option<MachineConfig>) -> Result<StopReason, String> {
        self.watch(self.requests.raw_fd(), Source::Requests, EventSet::IN)?;
        self.watch(
            self.vcpu_events.as_fd().as_raw_fd(),
            Source::Vcpus,
            EventSet::IN,
        )?;
        self.watch(
            self.launcher.as_fd().as_raw_fd(),
            Source::Launcher,
            EventSet::IN,
        )?;
        self.watch(
            self.launcher.pidfd().as_raw_fd(),
            Source::LauncherDeath,
            EventSet::IN,
        )?;
        self.watch(
            self.signals.as_fd().as_raw_fd(),
            Source::Signals,
            EventSet::IN,
        )?;
        self.watch(self.hotplug.bell(), Source::Hotplug, EventSet::IN)?;
        // From now on other threads' calls need this loop to be answered.
        self.launcher.attend();
        if let Some(config) = first {
            self.create(config).map_err(|s| s.message)?;
            self.boot().map_err(|s| s.message)?;
            // Sets the heartbeat going: an idle machine may never wake this thread otherwise.
            self.on_device_timers(Instant::now());
        }
        let mut ready = [EpollEvent::default(); 32];
        while self.stop.is_none() {
            let (began, due) = (Instant::now(), self.next_timer());
            let n = match self.epoll.wait(millis_until(due, began), &mut ready) {
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("epoll: {e}")),
            };
            let now = Instant::now();
            if let Some(due) = due {
                self.forgive(now.saturating_duration_since(due.max(began)));
            }
            let mut heartbeat = true;
            for event in ready.iter().take(n) {
                if let Some(source) = Source::from_token(event.data()) {
                    heartbeat &= self.on_event(source);
                }
            }
            // Events first: what has arrived is not late.
            heartbeat &= self.on_device_timers(Instant::now());
            heartbeat &= self.on_foreign_timers(Instant::now());
            heartbeat &= self.on_hotplug_timers(Instant::now());
            heartbeat &= self.look_at_resize(Instant::now());
            heartbeat &= self.look_at_memory(Instant::now());
            heartbeat &= self.hotplug.operations.look(Instant::now());
            heartbeat &= self.check_shutdown();
            heartbeat &= self.look_at_reset(Instant::now());
            if let Some(machine) = &mut self.machine {
                machine.parts.devices.settle();
            }
            let counter = if heartbeat {
                &mut self.heartbeat_wakeups
            } else {
                &mut self.wakeups
            };
            *counter = counter.saturating_add(1);
        }
        let reason = self.stop.clone().unwrap_or(StopReason::Forced);
        match reason {
            StopReason::HostError(what) => Err(what),
            other => Ok(other),
        }
    }

    /// When something is to be looked at, if nothing happens before.
    fn next_timer(&self) -> Option<Instant> {
        let shutdown = self.shutdown.as_ref().map(|s| s.deadline);
        let devices = self.device_timer().into_iter().chain(self.foreign_timer());
        let hotplug = self.hotplug_timer().into_iter().chain(self.resize_timer());
        let hotplug = hotplug.chain(self.memory.timer());
        let hotplug = hotplug.chain(self.hotplug.operations.timer());
        let hotplug = hotplug.chain(self.resets.timer());
        shutdown.into_iter().chain(devices).chain(hotplug).min()
    }

    /// Notices a host whose KVM takes the guest in and never lets it out: each second in
    /// which the manager itself ran and the guest did not.
    fn check_boot(&mut self) {
        let (Some(seconds), Some(machine)) = (self.unseen, &self.machine) else {
            return;
        };
        if machine.parts.vcpus.counters().iter().any(|c| c.exits > 0) {
            self.unseen = None;
            return;
        }
        self.unseen = Some(seconds.saturating_add(1));
        if seconds >= BOOT_PATIENCE {
            self.end(StopReason::HostError(format!(
                "the guest has not made a single exit in {BOOT_PATIENCE} s: the host's KVM \
                 cannot run it: use a host whose /dev/kvm runs Linux guests"
            )));
        }
    }

    fn watch(&self, fd: RawFd, source: Source, events: EventSet) -> Result<(), String> {
        self.epoll
            .ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(events, source.token()),
            )
            .map_err(|e| format!("epoll: {e}"))
    }

    /// True: it was nothing but a device's heartbeat.
    fn on_event(&mut self, source: Source) -> bool {
        match source {
            Source::Requests => self.on_requests(),
            Source::Vcpus => {
                while let Some(event) = self.vcpu_events.try_recv() {
                    self.on_machine_event(event);
                }
                // Whether or not there was room for the event.
                self.on_ejected();
                self.on_ejected_cpus();
            }
            Source::Launcher => self.on_launcher(),
            Source::LauncherDeath => self.end(StopReason::LauncherDied("its process ended".into())),
            Source::Signals => {
                while let Some(signal) = self.signals.next() {
                    self.end(StopReason::Signal(signal));
                }
            }
            Source::Device { index, source } => self.on_device(index, source),
            Source::Control { index } => return self.on_control(index),
            Source::Fence { index } => self.on_fence(index),
            Source::Trial { index } => self.on_trial(usize::from(index)),
            Source::TrialFence { index } => self.on_trial_fence(usize::from(index)),
            Source::Listener { index } => self.on_listener(index),
            Source::Bell { index } => self.on_bell(usize::from(index)),
            Source::Hotplug => self.on_hotplug_news(),
            Source::Leaving { operation, fence } => self.on_leaving(operation, fence),
        }
        false
    }

    fn on_requests(&mut self) {
        self.requests.clear();
        for _ in 0..queue::TURN {
            let Some((request, reply)) = self.requests.try_next() else {
                return;
            };
            self.on_request(request, reply);
        }
        self.requests.look_again();
    }

    fn on_machine_event(&mut self, event: MachineEvent) {
        let event = match self.take_reset_event(event) {
            Some(event) => event,
            None => return,
        };
        let reason = match event {
            MachineEvent::Ejected => return,
            MachineEvent::PowerOff => StopReason::PowerOff,
            MachineEvent::Reset => StopReason::Reset,
            MachineEvent::TripleFault { .. } => StopReason::TripleFault,
            MachineEvent::VcpuFailed { vcpu, fault } => {
                StopReason::HostError(format!("vCPU {vcpu}: {fault}"))
            }
        };
        self.end(reason);
    }

    fn on_launcher(&mut self) {
        let events = match self.launcher.poll_events() {
            Ok(events) => events,
            Err(e) => return self.end(StopReason::LauncherDied(e.to_string())),
        };
        for event in events {
            match event {
                LauncherEvent::Exited {
                    device_id,
                    incarnation,
                    outcome,
                    last_line,
                    buried,
                } => {
                    let ended = Ended {
                        incarnation,
                        outcome,
                        last_line,
                    };
                    if buried {
                        self.tell_exited(&device_id, &ended);
                    } else {
                        self.on_exited(&device_id, ended);
                    }
                }
                LauncherEvent::Grown { ticket, result } => self.on_grown(ticket, &result),
                LauncherEvent::Placed { ticket, result } => self.on_placed(ticket, result),
                LauncherEvent::Linked { ticket, result } => self.on_linked(ticket, result),
            }
        }
    }

    /// Notes why the machine ends; the first reason stands.
    fn end(&mut self, reason: StopReason) {
        if self.stop.is_none() {
            if reason == StopReason::Reset {
                self.log
                    .publish("machine.guest-reset", "", "the guest asked for a reset");
            }
            self.end_operations();
            let what = told::stopped(&reason);
            note_end(&reason.to_string());
            self.log
                .publish_typed("machine.stopped", "", &reason.to_string(), Some(what));
            self.stop = Some(reason);
        }
    }

    /// Ends vCPUs, drains the console, puts the terminal back, answers who waits.
    fn teardown(&mut self) {
        if let Some(machine) = &mut self.machine {
            if let Err(e) = machine.parts.vcpus.stop(VCPU_LIMIT) {
                log::error!("{e}");
            }
            if !machine.parts.serial.stop(SERIAL_LIMIT) {
                log::warn!("serial: what the guest printed last was not all taken");
            }
            if let Ok(next) = machine.state.apply(Transition::Stop) {
                machine.state = next;
            }
        }
        self.raw = None;
        // Who waits for a reset is told that the machine is gone.
        self.resets = reset::Resets::default();
        if let Some(pending) = self.shutdown.take() {
            for reply in pending.replies {
                reply.complete(Ok(ApiResponse::Done));
            }
        }
    }
}
