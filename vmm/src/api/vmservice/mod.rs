//! The second front door: service `vmservice.VM` (proto/proto/vmservice.proto), which Kata
//! Containers' Rust runtime calls on the socket of `bulkhead --ttrpc`. Its messages become the
//! same requests that `bulkhead.v1.Machine` makes; the manager carries both out. Called on the
//! `api` thread; nothing is opened here.
//!
//! Whatever a message carries that is not offered is refused by the name of its field: code
//! UNIMPLEMENTED for what Bulkhead has not, INVALID_ARGUMENT for what is wrong.
//!
//! | module | what it reads |
//! |---|---|
//! | `create` | CreateVMRequest, but for its devices |
//! | `topology` | root complexes and root ports |
//! | `device` | one device behind a root port |
//! | `modify` | ModifyResourceRequest |
//! | `remedy` | nothing: it puts the manager's remedies in this service's words |
//! | `unknown` | fields that no message here has |

use std::time::Duration;

use bulkhead_proto::payload::decode;
use bulkhead_proto::protobuf::MessageFull;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::{
    AddPcieDeviceRequest, CreateVMRequest, PropertiesType, PropertiesVMRequest,
    RemovePcieDeviceRequest,
};
use bulkhead_proto::{Code, RpcStatus, VM_SERVICE};

use super::request::ApiRequest;
use crate::cli::machine_args::check_id;

mod create;
mod device;
mod modify;
pub(super) mod remedy;
mod topology;
mod unknown;

#[cfg(test)]
mod tests;

/// How long a guest has to give a device up: Kata's calls have 30 s, and the answer is to
/// come before that.
const REMOVE_TIME: Duration = Duration::from_secs(28);

/// Reads a call.
pub(super) fn parse(method: &str, payload: &[u8]) -> Result<ApiRequest, RpcStatus> {
    let empty = |request| message::<Empty>(payload).map(|_| request);
    match method {
        "CreateVM" => create::machine(message::<CreateVMRequest>(payload)?)
            .map(|config| ApiRequest::CreateVm(Box::new(config))),
        "TeardownVM" => empty(ApiRequest::Teardown),
        "PauseVM" => empty(ApiRequest::Pause),
        "ResumeVM" => empty(ApiRequest::Go),
        "WaitVM" => empty(ApiRequest::Wait),
        "Quit" => empty(ApiRequest::Quit),
        "CapabilitiesVM" => empty(ApiRequest::Capabilities),
        "PropertiesVM" => properties(&message(payload)?),
        "ModifyResource" => modify::request(message(payload)?),
        "AddPcieDevice" => add(message(payload)?),
        "RemovePcieDevice" => {
            let request: RemovePcieDeviceRequest = message(payload)?;
            Ok(ApiRequest::RemoveBehind {
                port: port_name("port_name", request.port_name)?,
                timeout: REMOVE_TIME,
            })
        }
        _ => Err(RpcStatus::unimplemented(
            VM_SERVICE,
            &super::request::short(method),
        )),
    }
}

/// A message all of whose fields, at any depth, are known.
fn message<M: MessageFull>(payload: &[u8]) -> Result<M, RpcStatus> {
    let message: M = decode(payload)?;
    match unknown::field(&message) {
        None => Ok(message),
        Some(field) => Err(not_offered(
            &field,
            "this version of bulkhead does not know it: leave it out, or use a newer bulkhead",
        )),
    }
}

/// What Bulkhead has not.
fn not_offered(field: &str, remedy: &str) -> RpcStatus {
    let line = format!("{field} is not offered: {remedy}");
    RpcStatus::new(Code::Unimplemented, line)
}

/// A field's value is wrong.
fn wrong(line: impl Into<String>) -> RpcStatus {
    RpcStatus::invalid_argument(line)
}

/// The name of a root port; it is also the id of the device behind it.
fn port_name(field: &str, name: String) -> Result<String, RpcStatus> {
    match check_id(&name) {
        Ok(()) => Ok(name),
        Err(why) => Err(wrong(format!("{field}: {why}"))),
    }
}

fn add(request: AddPcieDeviceRequest) -> Result<ApiRequest, RpcStatus> {
    use bulkhead_proto::machine::add_device_request::Device;
    let port = port_name("port_name", request.port_name)?;
    let kind = request
        .device
        .into_option()
        .ok_or_else(|| wrong("device is missing: give virtio"))?;
    // The manager knows how many queues fit the machine.
    let part = device::part("device", &port, kind, u32::MAX)?;
    let mut add = bulkhead_proto::machine::AddDeviceRequest::new();
    add.device = Some(match part {
        device::Part::Disk(disk) => Device::Disk(disk),
        device::Part::Net(net) => Device::Net(net),
        device::Part::VhostUser(device) => Device::VhostUser(device),
        device::Part::Rng(rng) => Device::Rng(rng),
        device::Part::Vsock(vsock) => Device::Vsock(vsock),
        device::Part::Console(console) => Device::Console(console),
    });
    add.port = port;
    Ok(ApiRequest::AddDevice(Box::new(add)))
}

fn properties(request: &PropertiesVMRequest) -> Result<ApiRequest, RpcStatus> {
    let (mut memory, mut processor) = (false, false);
    for wanted in &request.types {
        match wanted.enum_value() {
            Ok(PropertiesType::MEMORY) => memory = true,
            Ok(PropertiesType::PROCESSOR) => processor = true,
            Err(number) => return Err(wrong(format!("types has {number}: give 0 or 1"))),
        }
    }
    Ok(ApiRequest::Properties { memory, processor })
}
