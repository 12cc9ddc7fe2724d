//! Devices that come and go while the machine exists, on the manager thread.
//!
//! ```text
//!   AddDevice ──▶ a thread makes it (`machine::hotplug`) ──▶ the table, a note to the guest
//!
//!   RemoveDevice ──▶ asked ──────────── the guest ejects ──▶ ending ──▶ gone
//!        │ force                                               ▲
//!        └────────▶ draining ── off the bus, a note to the guest
//! ```
//!
//! Nothing here waits. Requests about one device take turns; different devices do not wait for
//! each other. An operation that has begun goes on when its client hangs up, and ends in an
//! event.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{
    AddDeviceRequest, AddDeviceResponse, PortInfo, RemoveDeviceResponse, add_device_request,
};
use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{Host, Source};
use crate::api::{ApiResponse, EventLog, ReplyHandle};
use crate::ged::GedEvents;
use crate::launcher::ExitOutcome;
use crate::machine::control::{Task, Turn};
use crate::machine::device::{Device, NO_PORT, Special};
use crate::machine::hotplug::{self, Addition, Mail, News, Workshop};
use crate::machine::life::Life;
use crate::machine::mem;
use crate::machine::state::MachineState;
use crate::machine::told;

/// Devices that are made at a time.
const MAX_ADDING: usize = 8;
/// Requests that wait for their turn.
const MAX_WAITING: usize = 32;
/// How long a device that is removed by force has to finish what is in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How long a process that was killed, and its I/O, may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(30);
/// When to wonder why no driver has taken a new device.
const USE_LIMIT: Duration = Duration::from_secs(30);
/// VIRTIO 1.2 section 2.1: the guest has a driver for the device.
const STATUS_DRIVER: u8 = 2;

/// A device that is being made.
struct Adding {
    operation: u64,
    id: String,
    reply: ReplyHandle,
    /// Processes of it that have ended meanwhile.
    exits: Vec<(u64, ExitOutcome, String)>,
}

/// Where a device is on its way out.
enum Step {
    /// The guest was asked.
    Asked { until: Instant, timeout: Duration },
    /// It finishes what is in flight.
    Draining { until: Instant },
    /// It is off the bus and out of the table; its process ends.
    Ending {
        /// Its memory and descriptors go when all of it has ended.
        _device: Box<Device>,
        incarnation: u64,
        /// The launcher has told its end: what comes later is another's of the same name.
        exited: bool,
        /// Readable when the process has ended; `None`: it has.
        pidfd: Option<OwnedFd>,
        /// Hangs up when its I/O has ended; `None`: it has.
        fence: Option<OwnedFd>,
        until: Instant,
        told: bool,
    },
}

/// A device on its way out.
struct Leaving {
    operation: u64,
    id: String,
    /// Who is told; `None`: the guest ejected it by itself.
    reply: Option<ReplyHandle>,
    step: Step,
}

/// A request whose device is busy.
enum Waiting {
    Add(Box<AddDeviceRequest>),
    Remove {
        id: String,
        force: bool,
        timeout: Duration,
    },
}

/// All that is under way.
pub(super) struct Hotplug {
    last_operation: u64,
    mail: Mail,
    adding: Vec<Adding>,
    /// Operations that began and have not ended, and what they are about.
    open: BTreeMap<u64, String>,
    leaving: Vec<Leaving>,
    waiting: VecDeque<(Waiting, ReplyHandle)>,
    /// New devices that no driver has taken yet, and when to wonder why.
    unused: Vec<(String, Instant)>,
}

impl Hotplug {
    pub(super) fn new() -> Result<Self, String> {
        Ok(Self {
            last_operation: 0,
            mail: Mail::new().map_err(|e| format!("hot-plug: {e}"))?,
            adding: Vec::new(),
            open: BTreeMap::new(),
            leaving: Vec::new(),
            waiting: VecDeque::new(),
            unused: Vec::new(),
        })
    }

    /// An end by which threads send news.
    pub(super) fn post(&self) -> hotplug::Post {
        self.mail.post()
    }

    pub(super) fn bell(&self) -> RawFd {
        self.mail.bell().as_raw_fd()
    }

    pub(super) fn next_operation(&mut self) -> u64 {
        self.last_operation = self.last_operation.saturating_add(1);
        self.last_operation
    }

    fn is_busy(&self, id: &str) -> bool {
        self.adding.iter().any(|a| a.id == id) || self.leaving.iter().any(|l| l.id == id)
    }
}

fn precondition(line: impl Into<String>) -> RpcStatus {
    RpcStatus::failed_precondition(line.into())
}

impl Host {
    /// Adds a device.
    pub(super) fn add_device(&mut self, request: AddDeviceRequest, reply: ReplyHandle) {
        let addition = match &request.device {
            Some(add_device_request::Device::Disk(disk)) => Addition::Disk(disk.clone()),
            Some(add_device_request::Device::Net(net)) => Addition::Net(net.clone()),
            Some(add_device_request::Device::VhostUser(device)) => {
                Addition::VhostUser(device.clone())
            }
            Some(add_device_request::Device::Rng(rng)) => Addition::Rng(rng.clone()),
            _ => {
                let line = "device is missing: give disk, net, vhost_user or rng";
                return reply.complete(Err(RpcStatus::invalid_argument(line)));
            }
        };
        if self.hotplug.is_busy(addition.id()) || self.hotplug.adding.len() >= MAX_ADDING {
            return self.queue(Waiting::Add(Box::new(request)), reply);
        }
        let id = addition.id().to_owned();
        let operation = match self.begin_add(addition, request.port) {
            Ok(operation) => operation,
            Err(status) => return reply.complete(Err(status)),
        };
        self.hotplug.adding.push(Adding {
            operation,
            id,
            reply,
            exits: Vec::new(),
        });
    }

    fn queue(&mut self, waiting: Waiting, reply: ReplyHandle) {
        if self.hotplug.waiting.len() >= MAX_WAITING {
            return reply.complete(Err(RpcStatus::new(
                Code::ResourceExhausted,
                "too many devices come and go: retry later",
            )));
        }
        self.hotplug.waiting.push_back((waiting, reply));
    }

    fn begin_add(&mut self, addition: Addition, port: String) -> Result<u64, RpcStatus> {
        let Some(machine) = &self.machine else {
            return Err(precondition("no machine yet: create one with the device"));
        };
        addition
            .validate(&machine.config)
            .map_err(RpcStatus::invalid_argument)?;
        // A wrong port should cost nothing else.
        let ports = machine.parts.pci.ports();
        match ports.iter().find(|p| p.name == port) {
            Some(port) if port.occupied => {
                return Err(precondition(format!(
                    "port {}: a device is behind it: name another, or none",
                    port.name
                )));
            }
            None if !port.is_empty() => {
                return Err(RpcStatus::new(
                    Code::NotFound,
                    format!("port {port}: there is none of this name: see Info"),
                ));
            }
            None if ports.iter().all(|p| p.occupied) => return Err(precondition(NO_PORT)),
            _ => {}
        }
        let workshop = Workshop {
            launcher: Arc::clone(&self.launcher),
            prepared: Arc::clone(&self.prepared),
            ram: machine.parts.ram.clone(),
            hypervisor: machine.parts.kvm.clone(),
            pci: Arc::clone(&machine.parts.pci),
            cpus: machine
                .config
                .cpus
                .as_ref()
                .map_or(1, |c| c.boot.max(c.max)),
            hook: Arc::clone(&self.hooks.helper),
        };
        let id = addition.id().to_owned();
        let operation = self.hotplug.next_operation();
        let post = self.hotplug.mail.post();
        hotplug::begin(operation, addition, port, workshop, post)
            .map_err(|e| RpcStatus::internal(format!("device {id}: a thread to make it: {e}")))?;
        self.began(operation, &id, "add");
        Ok(operation)
    }

    /// Says that an operation has begun.
    pub(super) fn began(&mut self, operation: u64, subject: &str, what: &str) {
        let detail = format!("{operation}: {what}");
        self.hotplug.open.insert(operation, subject.to_owned());
        self.log.publish("operation.began", subject, &detail);
    }

    /// The machine stops: so does all that was under way.
    pub(super) fn end_operations(&mut self) {
        for (operation, subject) in std::mem::take(&mut self.hotplug.open) {
            self.ended(operation, &subject, Err("the machine stopped"));
        }
    }

    /// Says how it ended.
    pub(super) fn ended(&mut self, operation: u64, subject: &str, result: Result<&str, &str>) {
        self.hotplug.open.remove(&operation);
        match result {
            Ok(how) => {
                let detail = format!("{operation}: {how}");
                self.log.publish("operation.done", subject, &detail);
            }
            Err(why) => {
                let detail = format!("{operation}: {why}");
                self.log.publish("operation.failed", subject, &detail);
            }
        }
    }

    /// News of threads that make devices, and of drains.
    pub(super) fn on_hotplug_news(&mut self) {
        // An end that was told before is older than the news.
        self.on_launcher();
        for news in self.hotplug.mail.take() {
            match news {
                News::Made(operation, addition, made) => self.on_made(operation, &addition, made),
                News::Drained(operation) => self.on_leaver_drained(operation),
                News::Plugged(result) => self.on_plugged(result),
                News::MemoryAsked(told) => self.on_memory_asked(told),
            }
        }
        self.next_in_turn();
    }

    fn on_made(&mut self, operation: u64, what: &Addition, made: Result<Box<Device>, String>) {
        let adding = &mut self.hotplug.adding;
        let Some(at) = adding.iter().position(|a| a.operation == operation) else {
            return;
        };
        let adding = adding.swap_remove(at);
        match made.and_then(|device| self.admit(*device, what)) {
            Ok(index) => {
                let mut response = AddDeviceResponse::new();
                response.operation = operation;
                let device = self.device(index).map(|device| device.info());
                response.device = device.into();
                let port = response.device.port.clone();
                self.ended(operation, &adding.id, Ok(&format!("added behind {port}")));
                adding
                    .reply
                    .complete(Ok(ApiResponse::DeviceAdded(Box::new(response))));
                for (incarnation, outcome, last_line) in adding.exits {
                    self.on_exited(&adding.id, incarnation, outcome, &last_line);
                }
            }
            Err(why) => {
                self.ended(operation, &adding.id, Err(&why));
                adding.reply.complete(Err(precondition(why)));
            }
        }
    }

    /// Takes a device that was made into the machine, and tells the guest.
    fn admit(&mut self, mut device: Device, what: &Addition) -> Result<usize, String> {
        let Some(machine) = &mut self.machine else {
            return Err("the machine is gone".to_owned());
        };
        if let Some(process) = &mut device.process {
            process.life = Life::new(self.restarts);
        }
        let (id, port) = (device.id.clone(), device.port.clone());
        let index = machine.parts.devices.push(device);
        if let Err(why) = self.watch_device(index) {
            if let Some(machine) = &self.machine {
                let _ = machine.parts.pci.detach(&port);
            }
            if let Some(device) = self.unwatch_and_take(index) {
                let _ = device.forget(&self.launcher);
            }
            return Err(why);
        }
        if let Some(device) = self
            .machine
            .as_ref()
            .and_then(|m| m.parts.devices.get(index))
        {
            announce(&self.log, device);
        }
        if let Some(machine) = &mut self.machine {
            what.enter(&mut machine.config);
        }
        self.note_slot(&port);
        self.hotplug.unused.push((id, Instant::now() + USE_LIMIT));
        Ok(index)
    }

    /// Has the guest look at a slot. One that has not begun will see it anyway.
    fn note_slot(&self, port: &str) {
        if let Some(machine) = &self.machine
            && machine.state != MachineState::Created
            && let Some(slot) = self.slot_of(port)
        {
            machine.parts.hotplug.slot_changed(slot);
            machine.parts.ged.raise(GedEvents::SLOTS);
        }
    }

    fn slot_of(&self, port: &str) -> Option<u8> {
        let ports = self.machine.as_ref()?.parts.pci.ports();
        ports.iter().find(|p| p.name == port).map(|p| p.device)
    }

    /// Removes a device.
    pub(super) fn remove_device(
        &mut self,
        id: String,
        force: bool,
        timeout: Duration,
        reply: ReplyHandle,
    ) {
        if id == mem::ID && self.has_memory() {
            return reply.complete(Err(precondition(format!(
                "device {id}: it is the machine's memory, which only goes as a whole: use resize-memory"
            ))));
        }
        // Force overtakes a removal that waits for the guest.
        if force && let Some(at) = self.asked(&id) {
            let asked = self.hotplug.leaving.swap_remove(at);
            self.ended(asked.operation, &id, Err("overtaken by one with force"));
            if let Some(reply) = asked.reply {
                reply.complete(Err(precondition(format!(
                    "device {id}: is being removed by force"
                ))));
            }
        }
        if self.hotplug.is_busy(&id) {
            return self.queue(Waiting::Remove { id, force, timeout }, reply);
        }
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let Some(index) = devices.and_then(|d| d.position(|device| device.id == id)) else {
            return reply.complete(Err(RpcStatus::new(
                Code::NotFound,
                format!("there is no device {id}: see Devices"),
            )));
        };
        let created = self
            .machine
            .as_ref()
            .is_some_and(|m| m.state == MachineState::Created);
        let operation = self.hotplug.next_operation();
        let now = Instant::now();
        let what = if force { "remove by force" } else { "remove" };
        self.began(operation, &id, what);
        let until = now + if force { DRAIN_LIMIT } else { timeout };
        let step = if force || created {
            Step::Draining { until }
        } else {
            Step::Asked { until, timeout }
        };
        self.hotplug.leaving.push(Leaving {
            operation,
            id,
            reply: Some(reply),
            step,
        });
        if created {
            self.pull(operation);
        } else if force {
            self.begin_leaver_drain(operation, index);
        } else {
            self.ask_guest(index);
        }
    }

    fn asked(&self, id: &str) -> Option<usize> {
        let leaving = &self.hotplug.leaving;
        leaving
            .iter()
            .position(|l| l.id == id && matches!(l.step, Step::Asked { .. }))
    }

    fn ask_guest(&mut self, index: usize) {
        let Some(port) = self.device(index).map(|d| d.port.clone()) else {
            return;
        };
        if let (Some(slot), Some(machine)) = (self.slot_of(&port), &self.machine) {
            machine.parts.hotplug.ask_for_slot(slot);
            machine.parts.ged.raise(GedEvents::SLOTS);
        }
    }

    fn begin_leaver_drain(&mut self, operation: u64, index: usize) {
        let serving = self
            .process(index)
            .is_some_and(|p| p.life.serving() && p.newcomer.is_none());
        if !serving {
            return self.pull(operation);
        }
        let post = self.hotplug.mail.post();
        let reply = ReplyHandle::new(Instant::now() + DRAIN_LIMIT, move |_| {
            post.send(News::Drained(operation));
        });
        let limit = DRAIN_LIMIT / 2;
        self.with_control(index, |control, turn: &mut Turn<'_>| {
            control.submit(Task::Drain { limit }, reply, turn)
        });
    }

    fn on_leaver_drained(&mut self, operation: u64) {
        let leaving = &self.hotplug.leaving;
        let draining = leaving
            .iter()
            .any(|l| l.operation == operation && matches!(l.step, Step::Draining { .. }));
        if draining {
            self.pull(operation);
        }
    }

    /// Takes a device off the bus without the guest's consent, and tells it afterwards.
    fn pull(&mut self, operation: u64) {
        let leaving = &self.hotplug.leaving;
        let Some(id) = leaving.iter().find(|l| l.operation == operation) else {
            return;
        };
        let id = id.id.clone();
        let Some(machine) = &self.machine else {
            return;
        };
        let Some(index) = machine.parts.devices.position(|d| d.id == id) else {
            return;
        };
        let port = machine.parts.devices.get(index).map(|d| d.port.clone());
        let port = port.unwrap_or_default();
        let pulled = if machine.state == MachineState::Created {
            machine.parts.pci.detach(&port)
        } else {
            machine.parts.pci.detach_by_surprise(&port)
        };
        if let Err(error) = pulled {
            // The guest was faster.
            log::debug!("device {id}: {error}");
        }
        self.depart(operation, index);
        self.note_slot(&port);
    }

    /// The guest has ejected devices: they have left the bus.
    pub(super) fn on_ejected(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        let slots = machine.parts.hotplug.take_ejected_slots();
        if slots == 0 {
            return;
        }
        let ports = machine.parts.pci.ports();
        let gone = ports
            .iter()
            .filter(|p| slots >> (p.device & 31) & 1 != 0 && !p.occupied);
        let devices = &machine.parts.devices;
        let gone: Vec<(usize, String)> = gone
            .filter_map(|port| {
                let index = devices.position(|d| d.port == port.name)?;
                Some((index, devices.get(index)?.id.clone()))
            })
            .collect();
        for (index, id) in gone {
            let under_way = self.hotplug.leaving.iter().find(|l| l.id == id);
            let operation = match under_way {
                Some(leaving) => leaving.operation,
                None => {
                    let operation = self.hotplug.next_operation();
                    self.began(operation, &id, "ejected by the guest");
                    self.hotplug.leaving.push(Leaving {
                        operation,
                        id,
                        reply: None,
                        step: Step::Draining {
                            until: Instant::now(),
                        },
                    });
                    operation
                }
            };
            self.depart(operation, index);
        }
    }

    /// Ends what serves a device that has left the bus.
    fn depart(&mut self, operation: u64, index: usize) {
        let Some(mut device) = self.unwatch_and_take(index) else {
            return;
        };
        let id = device.id.clone();
        if let Some(machine) = &mut self.machine {
            hotplug::leave(&mut machine.config, &id);
        }
        self.hotplug.unused.retain(|(unused, _)| *unused != id);
        let why = "it was removed";
        let mut ending = (0, None, None);
        let mut exited = true;
        if let Some(process) = &mut device.process {
            process.control.give_up(why);
            exited = process.newcomer.is_none() && process.life.has_exited();
            ending = match process.newcomer.take() {
                // Should it not be started yet, its start comes before its end.
                Some(newcomer) => {
                    let pidfd = newcomer.started.map(|(_, pidfd)| pidfd);
                    (newcomer.incarnation, pidfd, newcomer.fence)
                }
                None => {
                    let pidfd = process.pidfd.try_clone().ok();
                    (process.incarnation, pidfd, process.fence.take())
                }
            };
        }
        if let Special::Foreign(switch) = &mut device.special {
            let (incarnation, pidfd, path) = switch.dismiss();
            exited = pidfd.is_none();
            ending = (incarnation, pidfd, None);
            if let Some(path) = path
                && let Err(e) = self.launcher.begin_forget_path(&path)
            {
                log::warn!("device {id}: its socket stays: {e}");
            }
        }
        let (incarnation, pidfd, fence) = ending;
        if let Err(e) = self.launcher.begin_forget(&id, incarnation) {
            log::warn!("device {id}: {e}");
        }
        let number = operation as u32;
        for (fd, events, fence) in [
            (pidfd.as_ref(), EventSet::IN, false),
            (fence.as_ref(), EventSet::empty(), true),
        ] {
            let source = Source::Leaving {
                operation: number,
                fence,
            };
            if let Some(fd) = fd
                && let Err(why) = self.watch(fd.as_raw_fd(), source, events)
            {
                log::warn!("device {id}: {why}");
            }
        }
        let leaving = &mut self.hotplug.leaving;
        if let Some(leaving) = leaving.iter_mut().find(|l| l.operation == operation) {
            leaving.step = Step::Ending {
                _device: Box::new(device),
                incarnation,
                exited,
                pidfd,
                fence,
                until: Instant::now() + END_LIMIT,
                told: false,
            };
        }
        self.look_whether_gone(operation);
    }

    /// Stops watching all that is a device's, and takes it out of the table.
    fn unwatch_and_take(&mut self, index: usize) -> Option<Device> {
        let device = self.machine.as_mut()?.parts.devices.take(index)?;
        let mut fds: Vec<RawFd> = device
            .function
            .poll_fds()
            .iter()
            .map(|p| p.fd.as_raw_fd())
            .collect();
        if let Some(process) = &device.process {
            fds.push(process.control.as_fd().as_raw_fd());
            fds.extend(process.fence.as_ref().map(|fd| fd.as_raw_fd()));
            if let Some(newcomer) = &process.newcomer {
                fds.push(newcomer.as_fd().as_raw_fd());
                fds.extend(newcomer.fence.as_ref().map(|fd| fd.as_raw_fd()));
            }
        }
        if let Special::Foreign(switch) = &device.special {
            fds.extend(switch.listener());
        }
        for fd in fds {
            // What was not watched does not matter.
            let gone = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, gone);
        }
        Some(device)
    }

    /// The process of a device that leaves has ended, or its I/O has.
    pub(super) fn on_leaving(&mut self, number: u32, fence: bool) {
        let leaving = &mut self.hotplug.leaving;
        let Some(leaver) = leaving.iter_mut().find(|l| l.operation as u32 == number) else {
            return;
        };
        let operation = leaver.operation;
        let Step::Ending {
            pidfd, fence: held, ..
        } = &mut leaver.step
        else {
            return;
        };
        let fd = if fence { held.take() } else { pidfd.take() };
        if let Some(fd) = fd {
            let gone = EpollEvent::default();
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd.as_raw_fd(), gone);
        }
        self.look_whether_gone(operation);
        self.next_in_turn();
    }

    fn look_whether_gone(&mut self, operation: u64) {
        let leaving = &mut self.hotplug.leaving;
        let gone = leaving.iter().position(|l| {
            l.operation == operation
                && matches!(
                    l.step,
                    Step::Ending {
                        exited: true,
                        pidfd: None,
                        fence: None,
                        ..
                    }
                )
        });
        let Some(at) = gone else {
            return;
        };
        let leaver = leaving.swap_remove(at);
        self.log.publish("device.removed", &leaver.id, "");
        self.ended(operation, &leaver.id, Ok("removed"));
        // Its last descriptors close before anybody is told.
        drop(leaver.step);
        if let Some(reply) = leaver.reply {
            let mut response = RemoveDeviceResponse::new();
            response.operation = operation;
            reply.complete(Ok(ApiResponse::DeviceRemoved(response)));
        }
    }

    /// A process has ended whose device is coming or going. True: it was one.
    pub(super) fn hotplug_exited(
        &mut self,
        id: &str,
        incarnation: u64,
        outcome: &ExitOutcome,
        last_line: &str,
    ) -> bool {
        if let Some(adding) = self.hotplug.adding.iter_mut().find(|a| a.id == id) {
            let exit = (incarnation, *outcome, last_line.to_owned());
            adding.exits.push(exit);
            return true;
        }
        let mut leaving = self.hotplug.leaving.iter_mut();
        let ended = leaving.find_map(|leaver| match &mut leaver.step {
            Step::Ending {
                incarnation: of,
                exited,
                ..
            } if leaver.id == id && *of == incarnation => {
                *exited = true;
                Some(leaver.operation)
            }
            _ => None,
        });
        if let Some(operation) = ended {
            self.look_whether_gone(operation);
            self.next_in_turn();
        }
        ended.is_some()
    }

    /// Begins what waited for its turn.
    fn next_in_turn(&mut self) {
        for _ in 0..self.hotplug.waiting.len() {
            let Some((request, reply)) = self.hotplug.waiting.pop_front() else {
                return;
            };
            // Whether or not its client still waits: it was told nothing else.
            match request {
                Waiting::Add(request) => self.add_device(*request, reply),
                Waiting::Remove { id, force, timeout } => {
                    self.remove_device(id, force, timeout, reply);
                }
            }
        }
    }

    /// When something is to be looked at.
    pub(super) fn hotplug_timer(&self) -> Option<Instant> {
        let leaving = self.hotplug.leaving.iter().filter_map(|l| match &l.step {
            Step::Asked { until, .. } | Step::Draining { until } => Some(*until),
            Step::Ending { until, told, .. } => (!told).then_some(*until),
        });
        let unused = self.hotplug.unused.iter().map(|(_, at)| *at);
        leaving.chain(unused).min()
    }

    /// Looks at what is due. True: nothing was.
    pub(super) fn on_hotplug_timers(&mut self, now: Instant) -> bool {
        if self.hotplug_timer().is_none_or(|at| at > now) {
            return true;
        }
        let due = self.hotplug.leaving.iter().filter(|l| match &l.step {
            Step::Asked { until, .. } | Step::Draining { until } => *until <= now,
            Step::Ending { until, told, .. } => !told && *until <= now,
        });
        let due: Vec<u64> = due.map(|l| l.operation).collect();
        for operation in due {
            self.overdue(operation);
        }
        self.look_for_unused(now);
        self.next_in_turn();
        false
    }

    fn overdue(&mut self, operation: u64) {
        let leaving = &mut self.hotplug.leaving;
        let Some(at) = leaving.iter().position(|l| l.operation == operation) else {
            return;
        };
        let Some(leaver) = leaving.get_mut(at) else {
            return;
        };
        match &mut leaver.step {
            Step::Draining { .. } => self.pull(operation),
            Step::Ending {
                told, incarnation, ..
            } => {
                *told = true;
                let id = leaver.id.clone();
                let why = format!(
                    "device {id}: it has left the machine, but its process number {incarnation} or its I/O has not ended in {} s: is the host's storage stuck?",
                    END_LIMIT.as_secs()
                );
                let reply = leaver.reply.take();
                self.ended(operation, &id, Err(&why));
                if let Some(reply) = reply {
                    reply.complete(Err(RpcStatus::new(Code::DeadlineExceeded, why)));
                }
            }
            Step::Asked { timeout, .. } => {
                let timeout = *timeout;
                let leaver = leaving.swap_remove(at);
                let unseen = self.withdraw(&leaver.id);
                let id = &leaver.id;
                let state = self.machine.as_ref().map(|m| m.state);
                let why = if state == Some(MachineState::Paused) {
                    "the machine is paused: resume it, or use force"
                } else if unseen {
                    "the guest has not looked at the request: it has not come so far in its boot, or has no ACPI hot-plug: wait, or use force"
                } else {
                    "the guest was asked and has not ejected it: it is in use there, or the guest has no PCI hot-plug (Linux: CONFIG_HOTPLUG_PCI_ACPI): release it, or use force"
                };
                let why = format!(
                    "device {id}: not removed in {} ms: {why}",
                    timeout.as_millis()
                );
                self.ended(operation, id, Err(&why));
                if let Some(reply) = leaver.reply {
                    reply.complete(Err(RpcStatus::new(Code::DeadlineExceeded, why)));
                }
            }
        }
    }

    /// The guest is no longer asked for a device. True: it never saw that it was.
    fn withdraw(&mut self, id: &str) -> bool {
        let Some(machine) = &self.machine else {
            return false;
        };
        let port = machine.parts.devices.iter().find(|d| d.id == id);
        let slot = port.and_then(|device| self.slot_of(&device.port));
        slot.is_some_and(|slot| machine.parts.hotplug.withdraw_slot(slot))
    }

    /// Says which new devices no driver has taken.
    fn look_for_unused(&mut self, now: Instant) {
        let due: Vec<String> = self
            .hotplug
            .unused
            .extract_if(.., |(_, at)| *at <= now)
            .map(|(id, _)| id)
            .collect();
        for id in due {
            let Some(machine) = &self.machine else {
                return;
            };
            let found = machine.parts.devices.position(|d| d.id == id);
            let device = found.and_then(|index| machine.parts.devices.get(index));
            let status = device.map(|d| d.function.status().device_status);
            let unused = status.is_some_and(|status| status & STATUS_DRIVER == 0);
            if let Some(index) = found
                && unused
                && machine.state == MachineState::Running
            {
                let detail = format!(
                    "no driver of the guest has taken it in {} s: the guest still boots, has no driver, or has no PCI hot-plug by ACPI",
                    USE_LIMIT.as_secs()
                );
                self.tell(index, "device.unused", &detail);
            }
        }
    }

    /// Gives the guest the time in which the manager itself did not run.
    pub(super) fn forgive_hotplug(&mut self, late: Duration) {
        for leaver in &mut self.hotplug.leaving {
            if let Step::Asked { until, .. } = &mut leaver.step {
                *until = until.checked_add(late).unwrap_or(*until);
            }
        }
    }

    /// The root ports, for Info.
    pub(super) fn ports(&self) -> Vec<PortInfo> {
        let Some(machine) = &self.machine else {
            return Vec::new();
        };
        let behind = |name: &str| {
            let device = machine.parts.devices.iter().find(|d| d.port == name);
            device.map(|d| d.id.clone()).unwrap_or_default()
        };
        let ports = machine.parts.pci.ports();
        ports
            .into_iter()
            .map(|port| {
                let mut info = PortInfo::new();
                info.pci_address = format!("0000:00:{:02x}.0", port.device);
                info.device = behind(&port.name);
                info.name = port.name;
                info
            })
            .collect()
    }
}

/// Says that a device is new.
pub(super) fn announce(log: &EventLog, device: &Device) {
    if let Special::Foreign(switch) = &device.special {
        let (kind, detail) = switch.announcement();
        log.publish(kind, &device.id, &detail);
        return;
    }
    let how = match &device.process {
        Some(process) => format!("pid {} in {} us", process.pid, process.ready_us),
        None => "its back-end is somebody else's".to_owned(),
    };
    let detail = format!("{} {how}", device.kind);
    let what = device.process.as_ref().map(|process| {
        let (pid, incarnation) = (process.pid, process.incarnation);
        let spawned = told::spawned(pid, incarnation);
        let detail = format!("pid {pid}");
        log.publish_typed("device.spawned", &device.id, &detail, Some(spawned));
        told::ready(pid, incarnation, process.ready_us)
    });
    log.publish_typed("device.ready", &device.id, &detail, what);
}
