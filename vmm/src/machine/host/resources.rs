//! Limits on what a device's process may use of the host, changed while it runs: the launcher
//! writes them into the device's cgroup leaf and answers by an event. Manager thread only.

use std::sync::Arc;

use bulkhead_proto::common::Resources;
use bulkhead_proto::machine::{DeviceInfo, UpdateResourcesResponse};
use bulkhead_proto::{Code, RpcStatus};

use super::Host;
use crate::api::{ApiResponse, ReplyHandle};
use crate::machine::device::{Device, Special};
use crate::machine::usage::Usage;

/// A change that the launcher has not answered.
pub(super) struct Placement {
    ticket: u64,
    id: String,
    resources: Resources,
    reply: ReplyHandle,
}

impl Host {
    /// A client wants other limits for a device.
    pub(super) fn update_resources(&mut self, id: &str, resources: Resources, reply: ReplyHandle) {
        match self.begin_placement(id, &resources) {
            Ok(ticket) => self.placements.push(Placement {
                ticket,
                id: id.to_owned(),
                resources,
                reply,
            }),
            Err(status) => reply.complete(Err(status)),
        }
    }

    fn begin_placement(&self, id: &str, resources: &Resources) -> Result<u64, RpcStatus> {
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let found = devices.and_then(|devices| devices.iter().find(|d| d.id == id));
        let device = found.ok_or_else(|| {
            RpcStatus::new(
                Code::NotFound,
                format!("there is no device {id}: see Devices"),
            )
        })?;
        if let Special::Foreign(switch) = &device.special
            && let Some(why) = switch.absence()
        {
            return Err(RpcStatus::failed_precondition(format!(
                "device {id}: {why}"
            )));
        }
        if usage(device).is_none() {
            return Err(RpcStatus::failed_precondition(format!(
                "device {id}: its back-end is somebody else's process: limit it where it was started"
            )));
        }
        if resources.io.is_some() && !matches!(device.special, Special::Disk(_)) {
            return Err(RpcStatus::invalid_argument(format!(
                "device {id}: resources.io is set, and only disks lie on block devices: leave it out"
            )));
        }
        self.launcher
            .begin_place(id, resources)
            .map_err(|e| RpcStatus::new(Code::Unavailable, e.to_string()))
    }

    /// The launcher has set limits, or not.
    pub(super) fn on_placed(&mut self, ticket: u64, result: Result<Vec<String>, String>) {
        let found = self.placements.iter().position(|p| p.ticket == ticket);
        let Some(index) = found else {
            return;
        };
        let Placement {
            id,
            resources,
            reply,
            ..
        } = self.placements.swap_remove(index);
        let not_enforced = match result {
            Ok(lines) => lines,
            Err(why) => return reply.complete(Err(RpcStatus::failed_precondition(why))),
        };
        if let Some(usage) = self.usage(&id) {
            usage.changed(resources.clone(), not_enforced.clone());
        }
        if let Some(machine) = &mut self.machine {
            let config = &mut machine.config;
            if let Some(disk) = config.disks.iter_mut().find(|d| d.id == id) {
                disk.resources = Some(resources).into();
            } else if let Some(net) = config.nets.iter_mut().find(|n| n.id == id) {
                net.resources = Some(resources).into();
            } else if let Some(rng) = config.rngs.iter_mut().find(|r| r.id == id) {
                rng.resources = Some(resources).into();
            } else if let Some(vsock) = config.vsock.as_mut().filter(|v| v.id == id) {
                vsock.resources = Some(resources).into();
            } else if let Some(console) = config.consoles.iter_mut().find(|c| c.id == id) {
                console.resources = Some(resources).into();
            }
        }
        self.log
            .publish("device.changed", &id, "new limits on its process");
        let mut response = UpdateResourcesResponse::new();
        response.not_enforced = not_enforced;
        reply.complete(Ok(ApiResponse::ResourcesUpdated(response)));
    }

    fn usage(&self, id: &str) -> Option<Arc<Usage>> {
        let devices = &self.machine.as_ref()?.parts.devices;
        devices.iter().find(|d| d.id == id).and_then(usage)
    }
}

/// What the API says of a device.
pub(super) fn info(device: &Device) -> DeviceInfo {
    let mut info = device.info();
    if let Some(usage) = usage(device) {
        let (limits, not_enforced) = usage.limits();
        (info.resources, info.not_enforced) = (Some(limits).into(), not_enforced);
    }
    info
}

/// What a device's process uses of the host, be it ours or a helper; `None`: it is somebody
/// else's.
fn usage(device: &Device) -> Option<Arc<Usage>> {
    match (&device.process, &device.special) {
        (Some(process), _) => process.control.about().usage.clone(),
        (None, Special::Foreign(foreign)) => foreign.usage().cloned(),
        (None, _) => None,
    }
}
