//! What clients ask of one device that exists.

use std::time::Duration;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::{ConsoleUpdate, NetUpdate};
use bulkhead_proto::machine::{UpdateConsoleRequest, UpdateDiskRequest, UpdateNetRequest};

use crate::api::{ApiResponse, ReplyHandle};
use crate::machine::control::Task;
use crate::machine::device::{Device, Special};
use crate::machine::host::Host;

/// What to ask of a device's process.
type Asked = Result<Task, RpcStatus>;

impl Host {
    /// Asks something of a device that a client named.
    pub(in crate::machine::host) fn ask(
        &mut self,
        id: &str,
        reply: ReplyHandle,
        task: impl FnOnce(&Device) -> Asked,
    ) {
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let found = devices.and_then(|d| d.numbered().find(|(_, device)| device.id == id));
        let Some((index, device)) = found else {
            return reply.complete(Err(RpcStatus::new(
                bulkhead_proto::Code::NotFound,
                format!("there is no device {id}: see Devices"),
            )));
        };
        match task(device) {
            Err(status) => reply.complete(Err(status)),
            Ok(_) if device.process.is_none() => {
                let why = match &device.special {
                    Special::Foreign(switch) => switch.takes_none(),
                    _ => "it has no process".to_owned(),
                };
                reply.complete(Err(RpcStatus::failed_precondition(format!(
                    "device {id}: {why}"
                ))));
            }
            Ok(task) => {
                self.with_control(index, |control, turn| control.submit(task, reply, turn));
            }
        }
    }

    pub(in crate::machine::host) fn device_stats(&mut self, id: &str, reply: ReplyHandle) {
        if let Some(device) = self.foreign(id) {
            if let Special::Foreign(foreign) = &device.special {
                let stats = foreign.stats(&device.function);
                reply.complete(stats.map(|s| ApiResponse::DeviceStats(Box::new(s))));
            }
            return;
        }
        self.ask(id, reply, |_| Ok(Task::Stats));
    }

    pub(in crate::machine::host) fn update_disk(
        &mut self,
        request: &UpdateDiskRequest,
        reply: ReplyHandle,
    ) {
        self.ask(&request.id, reply, |device| match &device.special {
            Special::Disk(disk) => disk.update(&device.id, request),
            _ => Err(RpcStatus::failed_precondition(format!(
                "device {}: is no disk but {}: see Devices",
                device.id, device.kind
            ))),
        });
    }

    pub(in crate::machine::host) fn update_net(
        &mut self,
        request: &UpdateNetRequest,
        reply: ReplyHandle,
    ) {
        let mut update = NetUpdate::new();
        update.link = bulkhead_proto::protobuf::EnumOrUnknown::from_i32(request.link.value());
        update.to_guest = request.to_guest.clone();
        update.from_guest = request.from_guest.clone();
        if let Some(device) = self.foreign(&request.id) {
            let Special::Foreign(foreign) = &mut device.special else {
                return;
            };
            let done = foreign.update_net(&device.function, &update);
            if done.is_ok() {
                let id = device.id.clone();
                self.log
                    .publish("device.changed", &id, &net_detail(&update));
            }
            return reply.complete(done.map(|()| ApiResponse::Done));
        }
        self.ask(&request.id, reply, |device| match &device.special {
            Special::Net => Ok(Task::UpdateNet(update)),
            _ => Err(RpcStatus::failed_precondition(format!(
                "device {}: is no network device but {}: see Devices",
                device.id, device.kind
            ))),
        });
    }

    pub(in crate::machine::host) fn update_console(
        &mut self,
        request: UpdateConsoleRequest,
        reply: ReplyHandle,
    ) {
        let consoles = self.machine.as_ref().map(|m| m.config.consoles.as_slice());
        let console = consoles.and_then(|all| all.iter().find(|c| c.id == request.id));
        // Not left to its process, which may say yes to what no other one takes.
        for size in console.iter().flat_map(|_| &request.sizes) {
            let ports = console.map(|c| c.ports.as_slice()).unwrap_or_default();
            let port = usize::try_from(size.port).ok();
            let why = match port.and_then(|port| ports.get(port)) {
                Some(port) if port.name.is_empty() => continue,
                Some(_) => format!("port {} has a name and no size: give another", size.port),
                None => format!(
                    "there is no port {}: it has {}, from 0",
                    size.port,
                    ports.len()
                ),
            };
            let line = format!("device {}: {why}", request.id);
            return reply.complete(Err(RpcStatus::invalid_argument(line)));
        }
        let mut update = ConsoleUpdate::new();
        update.sizes = request.sizes;
        self.ask(&request.id, reply, |device| match &device.special {
            Special::Console(_) => Ok(Task::UpdateConsole(update)),
            _ => Err(RpcStatus::failed_precondition(format!(
                "device {}: is no console but {}: see Devices",
                device.id, device.kind
            ))),
        });
    }

    pub(in crate::machine::host) fn drain_device(
        &mut self,
        id: &str,
        limit: Duration,
        reply: ReplyHandle,
    ) {
        self.ask(id, reply, |_| Ok(Task::Drain { limit }));
    }

    pub(in crate::machine::host) fn update_device(
        &mut self,
        id: &str,
        binary: String,
        limit: Duration,
        reply: ReplyHandle,
    ) {
        self.ask(id, reply, |_| Ok(Task::Replace { binary, limit }));
    }

    /// Also brings a quarantined device back.
    pub(in crate::machine::host) fn resume_device(&mut self, id: &str, reply: ReplyHandle) {
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let index = devices.and_then(|devices| devices.position(|d| d.id == id));
        let process = index.and_then(|index| self.process(index));
        if let Some(process) = process.filter(|process| process.control.host_gone()) {
            let tap = crate::launcher::printable(&process.control.about().tap);
            return reply.complete(Err(RpcStatus::failed_precondition(format!(
                "device {id}: tap {tap} was deleted: remove-device and add-net bring it back"
            ))));
        }
        if index.is_some_and(|index| self.revive(index)) {
            return reply.complete(Ok(ApiResponse::Done));
        }
        self.ask(id, reply, |_| Ok(Task::Resume));
    }

    /// The device of this name, if its back-end is somebody else's.
    fn foreign(&mut self, id: &str) -> Option<&mut Device> {
        let devices = &mut self.machine.as_mut()?.parts.devices;
        devices
            .iter_mut()
            .find(|d| d.id == id && matches!(d.special, Special::Foreign(_)))
    }
}

pub(super) fn net_detail(update: &NetUpdate) -> String {
    use bulkhead_proto::device::net_update::Link;
    let mut done = Vec::new();
    match update.link.enum_value() {
        Ok(Link::UP) => done.push("link up"),
        Ok(Link::DOWN) => done.push("link down"),
        Ok(Link::UNCHANGED) | Err(_) => {}
    }
    if update.to_guest.is_some() || update.from_guest.is_some() {
        done.push("new limits");
    }
    done.join(", ")
}
