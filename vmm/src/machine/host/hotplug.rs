//! Devices that come and go while the machine exists, on the manager thread.
//!
//! ```text
//!   AddDevice ──▶ a thread makes it (`machine::hotplug`) ──▶ the table, a note to the guest
//!
//!   RemoveDevice ──▶ asked ──────────── the guest ejects ──▶ ending ──▶ gone
//!        │ force                                               ▲
//!        ├────────▶ draining ── off the bus, a note to the guest
//!        └─ disk ─▶ failing ───────────▲
//! ```
//!
//! Nothing here waits. Requests about one device take turns; different devices do not wait for
//! each other. An operation that has begun goes on when its client hangs up, and ends in an
//! event.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{AddDeviceRequest, AddDeviceResponse, PortInfo, add_device_request};
use bulkhead_proto::{Code, RpcStatus};

use leaving::{Leaving, Step};
use turns::{Place, Request, Waiting};

use super::devices::tell_spawned;
use super::{Host, resources};
use crate::api::config::BUS_IS_FULL;
use crate::api::{ApiResponse, EventLog, ReplyHandle};
use crate::ged::GedEvents;
use crate::launcher::Launcher;
use crate::machine::device::{Device, NO_PORT, Special};
use crate::machine::hotplug::{self, Addition, Mail, News, Workshop};
use crate::machine::life::Life;
use crate::machine::operations::Operations;
use crate::machine::plugger::{Listener, listener};
use crate::machine::state::MachineState;
use crate::machine::told;
use crate::machine::trial::Ended;
use crate::pci::{self, PciError, PciFunction, is_same};

/// Devices that are made at a time.
const MAX_ADDING: usize = 8;
/// When to wonder why no driver has taken a new device.
const USE_LIMIT: Duration = Duration::from_secs(30);
/// VIRTIO 1.2 section 2.1: the guest has a driver for the device.
const STATUS_DRIVER: u8 = 2;

/// A device that is being made.
struct Adding {
    operation: u64,
    id: String,
    reply: ReplyHandle,
    what: Addition,
    /// Processes of it that have ended meanwhile.
    exits: Vec<Ended>,
}

/// All that is under way.
pub(super) struct Hotplug {
    pub(super) operations: Operations,
    mail: Mail,
    adding: Vec<Adding>,
    leaving: Vec<Leaving>,
    waiting: VecDeque<Waiting>,
    /// What the guest has ejected before the table had it.
    ejected_early: Vec<Arc<dyn PciFunction>>,
    /// New devices that no driver has taken yet, and when to wonder why.
    unused: Vec<(String, Instant)>,
}

impl Hotplug {
    pub(super) fn new() -> Result<Self, String> {
        Ok(Self {
            operations: Operations::default(),
            mail: Mail::new().map_err(|e| format!("hot-plug: {e}"))?,
            adding: Vec::new(),
            leaving: Vec::new(),
            waiting: VecDeque::new(),
            ejected_early: Vec::new(),
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
        self.operations.new_number()
    }

    fn is_busy(&self, id: &str) -> bool {
        self.adding.iter().any(|a| a.id == id) || self.leaving.iter().any(|l| l.id == id)
    }

    /// Why nothing can be done with this id, and nobody knows when it can.
    fn stuck(&self, id: &str) -> Option<String> {
        let mut leaving = self.leaving.iter();
        leaving.find(|l| l.id == id).and_then(Leaving::stuck)
    }

    /// What has begun and not ended.
    pub(super) fn under_way(&self) -> Option<String> {
        if let Some((operation, subject)) = self.operations.open().first() {
            return Some(format!("operation {operation} ({subject})"));
        }
        let leaver = self.leaving.first();
        leaver.map(|leaver| format!("the end of device {}", leaver.id))
    }

    /// There is no machine any more, and nothing under way.
    pub(super) fn forget_machine(&mut self) {
        self.ejected_early.clear();
        self.unused.clear();
    }

    /// Devices are being made, of which the table knows nothing.
    pub(super) fn is_adding(&self) -> bool {
        !self.adding.is_empty()
    }
}

fn precondition(line: impl Into<String>) -> RpcStatus {
    RpcStatus::failed_precondition(line.into())
}

fn not_hotplug(port: &str) -> RpcStatus {
    precondition(format!(
        "port {port}: it was made without hotplug, for what is behind it from the start: use one that was made with it"
    ))
}

impl Host {
    /// Devices that have left the machine and whose processes, or their I/O, have not ended.
    pub(super) fn functions_that_leave(&self) -> Vec<Listener> {
        let leaving = self.hotplug.leaving.iter();
        leaving
            .filter_map(|leaver| match &leaver.step {
                Step::Ending { device, .. } => Some(listener(&leaver.id, &device.function)),
                _ => None,
            })
            .collect()
    }

    /// The guest is gone that had the devices which are on their way out: they leave the bus.
    pub(super) fn let_leavers_go(&mut self) {
        let leaving = self.hotplug.leaving.iter();
        let on_bus = leaving.filter(|leaver| !matches!(leaver.step, Step::Ending { .. }));
        let ids: Vec<String> = on_bus.map(|leaver| leaver.id.clone()).collect();
        for id in ids {
            let Some(machine) = &self.machine else {
                return;
            };
            let devices = &machine.parts.devices;
            let Some(index) = devices.position(|device| device.id == id) else {
                continue;
            };
            if let Some(device) = devices.get(index)
                && let Err(error) = machine.parts.pci.detach(&device.port, &device.function)
            {
                log::debug!("device {id}: {error}");
            }
            self.left_the_bus(index);
        }
        self.next_in_turn();
    }

    /// Another guest begins, and has as long to take new devices as the one before it had.
    pub(super) fn wait_for_drivers_anew(&mut self, now: Instant) {
        for (_, at) in &mut self.hotplug.unused {
            *at = now.checked_add(USE_LIMIT).unwrap_or(now);
        }
    }

    /// Adds a device.
    pub(super) fn add_device(&mut self, request: AddDeviceRequest, reply: ReplyHandle) {
        self.add_in_turn(None, request, reply);
    }

    /// The same, perhaps by an operation that had to wait for its turn.
    fn add_in_turn(&mut self, place: Option<Place>, request: AddDeviceRequest, reply: ReplyHandle) {
        let addition = match &request.device {
            Some(add_device_request::Device::Disk(disk)) => Addition::Disk(disk.clone()),
            Some(add_device_request::Device::Net(net)) => Addition::Net(net.clone()),
            Some(add_device_request::Device::VhostUser(device)) => {
                Addition::VhostUser(device.clone())
            }
            Some(add_device_request::Device::Rng(rng)) => Addition::Rng(rng.clone()),
            Some(add_device_request::Device::Vsock(vsock)) => Addition::Vsock(vsock.clone()),
            Some(add_device_request::Device::Console(console)) => {
                Addition::Console(console.clone())
            }
            Some(add_device_request::Device::Fs(fs)) => Addition::Fs(fs.clone()),
            _ => {
                let line =
                    "device is missing: give disk, net, vhost_user, rng, vsock, console or fs";
                return reply.complete(Err(RpcStatus::invalid_argument(line)));
            }
        };
        let id = addition.id().to_owned();
        let stuck = self.hotplug.stuck(&id);
        // A device that is being made would not learn of memory that comes and goes.
        let busy = self.hotplug.is_busy(&id)
            || self.hotplug.adding.len() >= MAX_ADDING
            || self.is_plugging_memory();
        if busy && stuck.is_none() {
            let request = Box::new(request);
            return self.wait_for_turn(place, Request::Add { id, request }, reply);
        }
        let what = addition.clone();
        let began = match stuck {
            Some(why) => Err(precondition(why)),
            None => self.begin_add(place, addition, request.port),
        };
        match began {
            Ok(operation) => self.hotplug.adding.push(Adding {
                operation,
                id,
                reply,
                what,
                exits: Vec::new(),
            }),
            Err(status) => self.refuse(place, &id, status, reply),
        }
    }

    fn begin_add(
        &mut self,
        place: Option<Place>,
        addition: Addition,
        port: String,
    ) -> Result<u64, RpcStatus> {
        let Some(machine) = &self.machine else {
            return Err(precondition("no machine yet: create one with the device"));
        };
        // First, so that a client that names devices after their ports is told of the port.
        let ports = machine.parts.pci.ports();
        match ports.iter().find(|p| p.name == port) {
            Some(port) if port.occupied => {
                return Err(precondition(format!(
                    "port {}: a device is behind it: name another, or none",
                    port.name
                )));
            }
            Some(port) if !port.hotplug => return Err(not_hotplug(&port.name)),
            Some(port) if port.vacating => {
                let why = PciError::Vacating(port.name.clone());
                return Err(precondition(why.to_string()));
            }
            None if !port.is_empty() => {
                return Err(RpcStatus::new(
                    Code::NotFound,
                    format!("port {port}: there is none of this name: see Info"),
                ));
            }
            None if !ports.iter().any(pci::PortInfo::is_free) => {
                return Err(precondition(NO_PORT));
            }
            _ => {}
        }
        // Beside what is there and what is on its way.
        let mut beside = machine.config.clone();
        for adding in &self.hotplug.adding {
            adding.what.enter(&mut beside, "");
        }
        let devices = &machine.parts.devices;
        let taken = devices.position(|d| d.id == addition.id()).is_some();
        addition.validate(&beside).map_err(|why| {
            // Those that are on their way may take the last ports.
            match why.ends_with(BUS_IS_FULL) {
                true => precondition(NO_PORT),
                false if taken => RpcStatus::new(Code::AlreadyExists, why),
                false => RpcStatus::invalid_argument(why),
            }
        })?;
        if matches!(addition, Addition::Net(_)) {
            addition.enter(&mut beside, "");
            let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
            prepared
                .check(&beside.nets)
                .map_err(RpcStatus::invalid_argument)?;
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
        let operation = self.begin_operation(place, &id, "add");
        let post = self.hotplug.mail.post();
        if let Err(e) = hotplug::begin(operation, addition, port, workshop, post) {
            let why = format!("device {id}: a thread to make it: {e}");
            if place.is_none() {
                self.ended(operation, &id, Err(&why));
            }
            return Err(RpcStatus::internal(why));
        }
        Ok(operation)
    }

    /// Says that an operation has begun.
    pub(super) fn began(&mut self, operation: u64, subject: &str, what: &str) {
        let detail = format!("{operation}: {what}");
        self.hotplug.operations.begin(operation, subject, what);
        self.log.publish("operation.began", subject, &detail);
    }

    /// The machine stops: so does all that was under way.
    pub(super) fn end_operations(&mut self) {
        for (operation, subject) in self.hotplug.operations.open() {
            self.ended(operation, &subject, Err("the machine stopped"));
        }
    }

    /// Says how it ended.
    pub(super) fn ended(&mut self, operation: u64, subject: &str, result: Result<&str, &str>) {
        // One that was told to be late has ended already.
        if !self.hotplug.operations.is_open(operation) {
            return;
        }
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
        // After the event: who is told of the end may look for it there.
        self.hotplug.operations.end(operation, result);
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
                News::Reset(progress) => self.on_reset_progress(progress),
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
        let admitted = made.and_then(|device| self.admit(*device, what));
        let index = admitted.as_ref().ok().copied();
        match admitted {
            Ok(index) => {
                let mut response = AddDeviceResponse::new();
                response.operation = operation;
                let device = self.device(index).map(|device| resources::info(device));
                response.device = device.into();
                let port = response.device.port.clone();
                self.ended(operation, &adding.id, Ok(&format!("added behind {port}")));
                adding
                    .reply
                    .complete(Ok(ApiResponse::DeviceAdded(Box::new(response))));
                for ended in adding.exits {
                    self.on_exited(&adding.id, ended);
                }
            }
            Err(why) => {
                for ended in adding.exits {
                    self.on_exited(&adding.id, ended);
                }
                self.ended(operation, &adding.id, Err(&why));
                adding.reply.complete(Err(precondition(why)));
            }
        }
        self.look_for_early_eject(index);
        self.begin_held_memory();
    }

    /// A guest may eject a device before it is in the table.
    fn look_for_early_eject(&mut self, index: Option<usize>) {
        let function = index.and_then(|index| self.device(index));
        let function = function.map(|device| Arc::clone(&device.function));
        let early = &mut self.hotplug.ejected_early;
        let gone = function.and_then(|f| early.iter().position(|early| is_same(early, &f)));
        if let Some(at) = gone {
            early.swap_remove(at);
        }
        if self.hotplug.adding.is_empty() {
            self.hotplug.ejected_early.clear();
        }
        if let (Some(index), Some(_)) = (index, gone) {
            self.left_the_bus(index);
        }
    }

    /// Takes a device that was made into the machine, and tells the guest.
    fn admit(&mut self, mut device: Device, what: &Addition) -> Result<usize, String> {
        let Some(machine) = &mut self.machine else {
            return Err("the machine was given up meanwhile: create another".to_owned());
        };
        if let Some(process) = &mut device.process {
            process.life = Life::new(self.restarts);
        }
        let (id, port) = (device.id.clone(), device.port.clone());
        let function = Arc::clone(&device.function);
        let index = machine.parts.devices.push(device);
        if let Err(why) = self.watch_device(index) {
            if let Some(machine) = &self.machine {
                let _ = machine.parts.pci.detach(&port, &function);
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
            announce(&self.log, &self.launcher, device);
        }
        if let Some(machine) = &mut self.machine {
            what.enter(&mut machine.config, &port);
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

    /// When something is to be looked at.
    pub(super) fn hotplug_timer(&self) -> Option<Instant> {
        let leaving = self.hotplug.leaving.iter().filter_map(|l| match &l.step {
            Step::Asked { until, .. } | Step::Draining { until } => Some(*until),
            Step::Failing(failing) => Some(failing.look_at()),
            Step::Ending { until, told, .. } => (!told).then_some(*until),
        });
        let unused = self.hotplug.unused.iter().map(|(_, at)| *at);
        let waiting = self
            .hotplug
            .waiting
            .iter()
            .map(|waiting| waiting.place.until);
        leaving.chain(unused).chain(waiting).min()
    }

    /// Looks at what is due. True: nothing was.
    pub(super) fn on_hotplug_timers(&mut self, now: Instant) -> bool {
        if self.hotplug_timer().is_none_or(|at| at > now) {
            return true;
        }
        let due = self.hotplug.leaving.iter().filter(|l| match &l.step {
            Step::Asked { until, .. } | Step::Draining { until } => *until <= now,
            Step::Failing(failing) => failing.look_at() <= now,
            Step::Ending { until, told, .. } => !told && *until <= now,
        });
        let due: Vec<u64> = due.map(|l| l.operation).collect();
        for operation in due {
            self.overdue(operation);
        }
        self.look_for_unused(now);
        self.next_in_turn();
        self.end_late_turns(now);
        false
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
                info.vacating = port.vacating;
                info.name = port.name;
                info
            })
            .collect()
    }
}

/// Says that a device is new.
pub(super) fn announce(log: &EventLog, launcher: &Launcher, device: &Device) {
    if let Special::Foreign(switch) = &device.special {
        let (kind, detail) = switch.announcement();
        let what = switch.serving().map(|(process, incarnation)| {
            let _ = launcher.take_untold(&device.id, incarnation);
            tell_spawned(log, &device.id, (process.pid, incarnation));
            told::ready(process.pid, incarnation, process.ready_us())
        });
        log.publish_typed(kind, &device.id, &detail, what);
        return;
    }
    let how = match &device.process {
        Some(process) => format!("in {} us", process.ready_us),
        None => "its back-end is somebody else's".to_owned(),
    };
    let detail = format!("{} {how}", device.kind);
    let what = device.process.as_ref().map(|process| {
        let (pid, incarnation) = (process.pid, process.incarnation);
        let _ = launcher.take_untold(&device.id, incarnation);
        tell_spawned(log, &device.id, (pid, incarnation));
        told::ready(pid, incarnation, process.ready_us)
    });
    log.publish_typed("device.ready", &device.id, &detail, what);
}

mod failing;
mod leaving;
mod turns;
