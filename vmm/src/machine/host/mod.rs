//! The manager thread: starts the launcher, confines the process, makes the machine, and
//! answers requests and events in one epoll loop until the machine has stopped.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::machine::MachineConfig;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::build::{Hooks, Parts, Stdio};
use super::queue::{self, RequestReceiver};
use super::state::{MachineState, Transition};
use super::stop::StopReason;
use crate::api::{ApiResponse, ApiServer, EventLog, ReplyHandle};
use crate::confine;
use crate::events::{self, EventReceiver, EventSender, MachineEvent};
use crate::kvm;
use crate::launcher::{ExitOutcome, Launcher, LauncherConfig, LauncherEvent};
use crate::signals::Signals;
use crate::terminal::{RawTerminal, Terminal};
use crate::virtio::{EventSource, FailReason, Outcome};

mod requests;
mod source;

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
    /// Where to serve the API.
    pub api_socket: Option<PathBuf>,
    /// The machine to create and boot at once.
    pub first: Option<MachineConfig>,
}

/// Starts the VMM and stays until its machine has stopped.
///
/// # Errors
/// One line that says what failed and the remedy.
pub fn run(options: HostOptions) -> Result<StopReason, String> {
    let signals = Signals::block().map_err(|e| format!("signals: {e}"))?;
    let dev_kvm = kvm::open_dev_kvm().map_err(|e| no_kvm(&e))?;
    let stdio = Stdio {
        input: clone_stream(std::io::stdin())?,
        output: clone_stream(std::io::stdout())?,
    };
    let terminal = Terminal::on_stdin().map_err(|e| format!("terminal: {e}"))?;
    let mut config = LauncherConfig::new(
        super::kinds::ALL
            .iter()
            .map(|k| k.binary.to_string())
            .collect(),
    )
    .map_err(|e| format!("libexec: {e}: give --libexec DIR"))?;
    if let Some(dir) = options.libexec {
        config.libexec = dir;
    }
    let launcher = Launcher::start(&config).map_err(|e| e.to_string())?;
    let listener = match &options.api_socket {
        Some(path) => {
            let path = std::path::absolute(path).map_err(|e| format!("API socket: {e}"))?;
            let listener = launcher
                .bind_unix(&path, "API socket")
                .map_err(|e| e.to_string())?;
            Some(listener)
        }
        None => None,
    };
    let hooks = Hooks {
        vcpu: confine::vcpu_hook(),
        helper: confine::helper_hook(),
    };
    confine::vmm()?;

    let log = Arc::new(EventLog::new());
    let (sender, requests) = queue::channel().map_err(|e| format!("request queue: {e}"))?;
    let (events_in, vcpu_events) = events::event_channel().map_err(|e| format!("events: {e}"))?;
    let api = match listener {
        Some(listener) => Some(
            ApiServer::start(
                listener,
                Arc::new(sender),
                Arc::clone(&log),
                confine::helper_hook(),
            )
            .map_err(|e| format!("API server: {e}"))?,
        ),
        None => None,
    };
    let mut host = Host {
        launcher,
        dev_kvm: Some(dev_kvm),
        stdio,
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
        wakeups: 0,
    };
    let result = host.main(options.first);
    host.teardown();
    if let Some(api) = api {
        api.stop(API_GRACE);
    }
    result
}

/// What to do about a /dev/kvm that does not open.
fn no_kvm(error: &std::io::Error) -> String {
    let remedy = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "run as root or as a member of its group",
        _ => "enable virtualization in the firmware and load kvm_intel or kvm_amd",
    };
    format!("/dev/kvm: {error}: {remedy}")
}

/// A descriptor of our own for one of the standard streams.
fn clone_stream(stream: impl AsFd) -> Result<OwnedFd, String> {
    stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| format!("standard streams: {e}: start with all of 0, 1 and 2 open"))
}

/// A machine and its state.
struct Machine {
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
    launcher: Launcher,
    dev_kvm: Option<OwnedFd>,
    stdio: Stdio,
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
    wakeups: u64,
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
        if let Some(config) = first {
            self.create(config).map_err(|s| s.message)?;
            self.boot().map_err(|s| s.message)?;
        }
        let mut ready = [EpollEvent::default(); 32];
        while self.stop.is_none() {
            let n = match self.epoll.wait(self.timeout_ms(), &mut ready) {
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("epoll: {e}")),
            };
            self.wakeups = self.wakeups.saturating_add(1);
            for event in ready.iter().take(n) {
                if let Some(source) = Source::from_token(event.data()) {
                    self.on_event(source);
                }
            }
            self.check_shutdown();
            self.check_boot(n == 0);
        }
        let reason = self.stop.clone().unwrap_or(StopReason::Forced);
        match reason {
            StopReason::HostError(what) => Err(what),
            other => Ok(other),
        }
    }

    /// Milliseconds until the next deadline; -1 when there is none.
    fn timeout_ms(&self) -> i32 {
        let shutdown = self.shutdown.as_ref().map(|s| {
            let left = s.deadline.saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
        });
        let boot = self.unseen.map(|_| 1000);
        [shutdown, boot].into_iter().flatten().min().unwrap_or(-1)
    }

    /// Notices a host whose KVM takes the guest in and never lets it out: each whole second
    /// in which the manager itself ran and the guest did not.
    fn check_boot(&mut self, second_passed: bool) {
        let (Some(seconds), Some(machine)) = (self.unseen, &self.machine) else {
            return;
        };
        if machine.parts.vcpus.counters().iter().any(|c| c.exits > 0) {
            self.unseen = None;
        } else if second_passed && machine.state == MachineState::Running {
            self.unseen = Some(seconds.saturating_add(1));
            if seconds >= BOOT_PATIENCE {
                self.end(StopReason::HostError(format!(
                    "the guest has not made a single exit in {BOOT_PATIENCE} s: the host's KVM \
                     cannot run it: use a host whose /dev/kvm runs Linux guests"
                )));
            }
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

    fn on_event(&mut self, source: Source) {
        match source {
            Source::Requests => {
                self.requests.clear();
                while let Some((request, reply)) = self.requests.try_next() {
                    self.on_request(request, reply);
                }
            }
            Source::Vcpus => {
                while let Some(event) = self.vcpu_events.try_recv() {
                    self.on_machine_event(event);
                }
            }
            Source::Launcher => self.on_launcher(),
            Source::LauncherDeath => self.end(StopReason::LauncherDied("its process ended".into())),
            Source::Signals => {
                while let Some(signal) = self.signals.next() {
                    self.end(StopReason::Signal(signal));
                }
            }
            Source::Device { index, source } => self.on_device(index, source),
        }
    }

    fn on_machine_event(&mut self, event: MachineEvent) {
        let reason = match event {
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
        for LauncherEvent::Exited {
            device_id,
            incarnation,
            outcome,
        } in events
        {
            let how = match outcome {
                ExitOutcome::Status(status) => format!("exit status {status}"),
                ExitOutcome::Signal(signal) => format!("killed by signal {signal}"),
            };
            self.log.publish("device.exited", &device_id, &how);
            log::warn!(
                "device {device_id}: its process ended ({how}); the machine runs on without it"
            );
            let Some(machine) = &mut self.machine else {
                continue;
            };
            let device = machine
                .parts
                .devices
                .iter_mut()
                .find(|d| d.id == device_id && d.incarnation == incarnation);
            if let Some(device) = device {
                device
                    .function
                    .fail(FailReason::Stopped(format!("its process ended ({how})")));
                device.failed.get_or_insert(how);
            }
        }
    }

    fn on_device(&mut self, index: u16, source: EventSource) {
        let Some(device) = self
            .machine
            .as_mut()
            .and_then(|m| m.parts.devices.get_mut(usize::from(index)))
        else {
            return;
        };
        match device.function.on_event(source) {
            Outcome::Handled => {
                if let EventSource::RingError(queue) = source {
                    let (last, quiet) = &mut device.ring_errors;
                    if last.is_some_and(|at| at.elapsed() < RING_ERROR_INTERVAL) {
                        *quiet = quiet.saturating_add(1);
                        return;
                    }
                    *last = Some(Instant::now());
                    let more = match std::mem::take(quiet) {
                        0 => String::new(),
                        n => format!(" ({n} more were not reported)"),
                    };
                    let detail = format!(
                        "queue {queue} is malformed; it waits for a reset by the guest{more}"
                    );
                    self.log.publish("device.ring-error", &device.id, &detail);
                    log::warn!("device {}: {detail}", device.id);
                }
            }
            // No device has a successor yet.
            Outcome::Suspended(_) | Outcome::Reconnected(_) | Outcome::NotReconnected(_) => {}
            Outcome::Failed(why) => {
                let why = why.to_string();
                if device.failed.is_none() {
                    self.log.publish("device.failed", &device.id, &why);
                    log::warn!("device {}: {why}", device.id);
                    device.failed = Some(why);
                    for poll in device.function.poll_fds() {
                        // It may have left already; then there is nothing to do.
                        let _ = self.epoll.ctl(
                            ControlOperation::Delete,
                            poll.fd.as_raw_fd(),
                            EpollEvent::default(),
                        );
                    }
                    // A channel that broke its protocol is not listened to any more.
                    if let Err(e) = device.kill(&self.launcher) {
                        log::warn!("device {}: {e}", device.id);
                    }
                }
            }
        }
    }

    /// Notes why the machine ends; the first reason stands.
    fn end(&mut self, reason: StopReason) {
        if self.stop.is_none() {
            self.log.publish("machine.stopped", "", &reason.to_string());
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
        if let Some(pending) = self.shutdown.take() {
            for reply in pending.replies {
                reply.complete(Ok(ApiResponse::Done));
            }
        }
    }
}
