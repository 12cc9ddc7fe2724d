//! Devices on their way out: asked for, drained, off the bus, ended.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use bulkhead_proto::machine::RemoveDeviceResponse;
use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::failing::Failing;
use super::turns::{Place, Request};
use super::{not_hotplug, precondition};
use crate::api::{ApiResponse, ReplyHandle};
use crate::ged::GedEvents;
use crate::machine::control::{Task, Turn};
use crate::machine::device::{Device, Special};
use crate::machine::host::{Host, Source};
use crate::machine::hotplug::{self, News};
use crate::machine::mem;
use crate::machine::state::MachineState;
use crate::machine::trial::Ended;
use crate::pci::is_same;

/// How long a device that is removed by force has to finish what is in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How long a process that was killed, and its I/O, may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(30);

/// Where a device is on its way out.
pub(super) enum Step {
    /// The guest was asked.
    Asked { until: Instant, timeout: Duration },
    /// It finishes what is in flight.
    Draining { until: Instant },
    /// A device whose driver waits for answers, which it is given.
    Failing(Failing),
    /// It is off the bus and out of the table; its process ends.
    Ending {
        /// Its memory and descriptors go when all of it has ended.
        device: Box<Device>,
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

/// What a request to remove has led to.
enum Begun {
    /// The device is busy.
    Waits,
    /// A number, and the device's place in the table.
    Operation(u64, usize),
}

/// A device on its way out.
pub(super) struct Leaving {
    pub(super) operation: u64,
    pub(super) id: String,
    /// Who is told; `None`: the guest ejected it by itself.
    pub(super) reply: Option<ReplyHandle>,
    pub(super) step: Step,
}

impl Leaving {
    /// Why nothing can be done with what has this id, and nobody knows when it can.
    pub(super) fn stuck(&self) -> Option<String> {
        match &self.step {
            Step::Ending {
                told: true,
                incarnation,
                ..
            } => Some(stuck(&self.id, *incarnation)),
            _ => None,
        }
    }
}

fn stuck(id: &str, incarnation: u64) -> String {
    format!(
        "device {id}: it has left the machine, but its process number {incarnation} or its I/O has not ended in {} s: is the host's storage stuck, or the launcher stopped?",
        END_LIMIT.as_secs()
    )
}

impl Host {
    /// Removes a device.
    pub(in crate::machine::host) fn remove_device(
        &mut self,
        id: String,
        force: bool,
        timeout: Duration,
        reply: ReplyHandle,
    ) {
        self.remove_in_turn(None, id, force, timeout, reply);
    }

    /// The same, perhaps by an operation that had to wait for its turn.
    pub(super) fn remove_in_turn(
        &mut self,
        place: Option<Place>,
        id: String,
        force: bool,
        timeout: Duration,
        reply: ReplyHandle,
    ) {
        let began = self.begin_remove(place, &id, force, timeout);
        match began {
            Ok(Begun::Waits) => {
                let request = Request::Remove { id, force, timeout };
                self.wait_for_turn(place, request, reply);
            }
            Ok(Begun::Operation(operation, index)) => {
                let mut leaving = self.hotplug.leaving.iter_mut();
                if let Some(leaver) = leaving.find(|l| l.operation == operation) {
                    leaver.reply = Some(reply);
                }
                self.take_first_step(operation, index);
                // Where nothing is to end first, it is over by now.
                if !self.hotplug.is_busy(&id) {
                    self.next_in_turn();
                }
            }
            Err(status) => self.refuse(place, &id, status, reply),
        }
    }

    fn begin_remove(
        &mut self,
        place: Option<Place>,
        id: &str,
        force: bool,
        timeout: Duration,
    ) -> Result<Begun, RpcStatus> {
        if id == mem::ID && self.has_memory() {
            return Err(precondition(format!(
                "device {id}: it is the machine's memory, which only goes as a whole: use resize-memory"
            )));
        }
        // Force overtakes a removal that waits for the guest.
        if force && let Some(at) = self.asked(id) {
            let asked = self.hotplug.leaving.swap_remove(at);
            self.ended(asked.operation, id, Err("overtaken by one with force"));
            if let Some(reply) = asked.reply {
                reply.complete(Err(precondition(format!(
                    "device {id}: is being removed by force: its end is told by an event"
                ))));
            }
        }
        if let Some(why) = self.hotplug.stuck(id) {
            return Err(precondition(why));
        }
        if self.hotplug.is_busy(id) {
            return Ok(Begun::Waits);
        }
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let Some(index) = devices.and_then(|d| d.position(|device| device.id == id)) else {
            let line = format!("there is no device {id}: see Devices");
            return Err(RpcStatus::new(Code::NotFound, line));
        };
        let port = self.device(index).map(|d| d.port.clone());
        if let Some(port) = port.filter(|port| !self.is_hotplug(port)) {
            return Err(not_hotplug(&port));
        }
        let what = if force { "remove by force" } else { "remove" };
        let operation = self.begin_operation(place, id, what);
        let now = Instant::now();
        let left = place.map(|place| place.until.saturating_duration_since(now));
        let timeout = left.map_or(timeout, |left| left.min(timeout));
        let created = self.is_created();
        let until = now + if force { DRAIN_LIMIT } else { timeout };
        let step = if let Some(failing) = self.begin_failing(index, force && !created, now) {
            Step::Failing(failing)
        } else if force || created {
            Step::Draining { until }
        } else {
            Step::Asked { until, timeout }
        };
        self.hotplug.leaving.push(Leaving {
            operation,
            id: id.to_owned(),
            reply: None,
            step,
        });
        Ok(Begun::Operation(operation, index))
    }

    fn take_first_step(&mut self, operation: u64, index: usize) {
        let leaving = &self.hotplug.leaving;
        match leaving
            .iter()
            .find(|l| l.operation == operation)
            .map(|l| &l.step)
        {
            Some(Step::Failing(_)) => self.look_at_failing(operation, Instant::now()),
            Some(Step::Draining { .. }) if self.is_created() => self.pull(operation),
            Some(Step::Draining { .. }) => self.begin_leaver_drain(operation, index),
            Some(Step::Asked { .. }) => self.ask_guest(index),
            Some(Step::Ending { .. }) | None => {}
        }
    }

    fn is_created(&self) -> bool {
        let machine = self.machine.as_ref();
        machine.is_some_and(|m| m.state == MachineState::Created)
    }

    fn is_hotplug(&self, port: &str) -> bool {
        let ports = self.machine.as_ref().map(|m| m.parts.pci.ports());
        let ports = ports.unwrap_or_default();
        ports.iter().any(|p| p.name == port && p.hotplug)
    }

    fn asked(&self, id: &str) -> Option<usize> {
        let leaving = &self.hotplug.leaving;
        leaving
            .iter()
            .position(|l| l.id == id && matches!(l.step, Step::Asked { .. }))
    }

    pub(super) fn ask_guest(&mut self, index: usize) {
        let Some(machine) = &self.machine else {
            return;
        };
        let Some(device) = machine.parts.devices.get(index) else {
            return;
        };
        // One that the guest has just ejected may have a successor there.
        let there = machine.parts.pci.has(&device.port, &device.function);
        if let Some(slot) = self.slot_of(&device.port).filter(|_| there) {
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

    pub(super) fn on_leaver_drained(&mut self, operation: u64) {
        let leaving = &self.hotplug.leaving;
        let draining = leaving
            .iter()
            .any(|l| l.operation == operation && matches!(l.step, Step::Draining { .. }));
        if draining {
            self.pull(operation);
        }
    }

    /// Takes a device off the bus without the guest's consent, and tells it afterwards.
    pub(super) fn pull(&mut self, operation: u64) {
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
        let Some(device) = machine.parts.devices.get(index) else {
            return;
        };
        let (port, pci) = (device.port.clone(), &machine.parts.pci);
        let pulled = if machine.state == MachineState::Created {
            pci.detach(&port, &device.function)
        } else {
            pci.detach_by_surprise(&port, &device.function)
        };
        if let Err(error) = pulled {
            // The guest was faster.
            log::debug!("device {id}: {error}");
        }
        self.depart(operation, index);
        self.note_slot(&port);
    }

    /// The guest has ejected devices: they have left the bus.
    pub(in crate::machine::host) fn on_ejected(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        let ejected = machine.parts.hotplug.take_ejected();
        if ejected.is_empty() {
            return;
        }
        for function in ejected {
            let devices = self.machine.as_ref().map(|m| &m.parts.devices);
            let found = devices.and_then(|d| d.position(|d| is_same(&d.function, &function)));
            match found {
                Some(index) => self.left_the_bus(index),
                // It is looked at when it is admitted. What was removed by force is gone already.
                None if self.hotplug.adding.is_empty() => {}
                None => self.hotplug.ejected_early.push(function),
            }
        }
        // Some have nothing that is to end first.
        self.next_in_turn();
    }

    /// The guest has ejected a device, whether or not it was asked to.
    pub(super) fn left_the_bus(&mut self, index: usize) {
        let Some(id) = self.device(index).map(|d| d.id.clone()) else {
            return;
        };
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

    /// Ends what serves a device that has left the bus.
    fn depart(&mut self, operation: u64, index: usize) {
        // A live update's process goes, too.
        self.end_trial(index, "the device is removed");
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
            device.function.dismiss();
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
        for path in device.special.sockets() {
            if let Err(e) = self.launcher.begin_forget_path(path) {
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
                device: Box::new(device),
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
    pub(in crate::machine::host) fn unwatch_and_take(&mut self, index: usize) -> Option<Device> {
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
    pub(in crate::machine::host) fn on_leaving(&mut self, number: u32, fence: bool) {
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
        if let Step::Ending { device, .. } = &leaver.step {
            device.function.quiesced();
        }
        // Its last descriptors close before anybody is told.
        drop(leaver.step);
        if let Some(reply) = leaver.reply {
            let mut response = RemoveDeviceResponse::new();
            response.operation = operation;
            reply.complete(Ok(ApiResponse::DeviceRemoved(response)));
        }
    }

    /// A process has ended whose device is coming or going. True: it was one.
    pub(in crate::machine::host) fn hotplug_exited(&mut self, id: &str, ended: &Ended) -> bool {
        if let Some(adding) = self.hotplug.adding.iter_mut().find(|a| a.id == id) {
            adding.exits.push(ended.clone());
            return true;
        }
        let mut leaving = self.hotplug.leaving.iter_mut();
        let gone = leaving.find_map(|leaver| match &mut leaver.step {
            Step::Ending {
                incarnation: of,
                exited,
                ..
            } if leaver.id == id && *of == ended.incarnation => {
                *exited = true;
                Some(leaver.operation)
            }
            _ => None,
        });
        if let Some(operation) = gone {
            self.tell_exited(id, ended);
            self.look_whether_gone(operation);
            self.next_in_turn();
        }
        gone.is_some()
    }

    pub(super) fn overdue(&mut self, operation: u64) {
        let leaving = &mut self.hotplug.leaving;
        let Some(at) = leaving.iter().position(|l| l.operation == operation) else {
            return;
        };
        let Some(leaver) = leaving.get_mut(at) else {
            return;
        };
        match &mut leaver.step {
            Step::Draining { .. } => self.pull(operation),
            Step::Failing(_) => self.look_at_failing(operation, Instant::now()),
            Step::Ending {
                told, incarnation, ..
            } => {
                *told = true;
                let id = leaver.id.clone();
                let why = stuck(&id, *incarnation);
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
                    "the guest has not looked at the request: it is busy with another, has not come so far in its boot, or has no ACPI hot-plug: wait, or use force"
                } else {
                    "the guest was asked and has not ejected it: it is in use there, or drained (resume-device), or the guest has no PCI hot-plug (Linux: CONFIG_HOTPLUG_PCI_ACPI): release it, or use force"
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
    pub(super) fn withdraw(&mut self, id: &str) -> bool {
        let Some(machine) = &self.machine else {
            return false;
        };
        let port = machine.parts.devices.iter().find(|d| d.id == id);
        let slot = port.and_then(|device| self.slot_of(&device.port));
        slot.is_some_and(|slot| machine.parts.hotplug.withdraw_slot(slot))
    }
}
