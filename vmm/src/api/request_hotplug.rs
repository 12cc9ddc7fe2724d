//! Requests that add and remove devices and vCPUs, from their messages. Called on the `api`
//! thread.

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::{
    AddDeviceRequest, RemoveDeviceRequest, ResizeCpusRequest, ResizeMemoryRequest,
    add_device_request,
};

use super::config::check_device_id;
use super::request::{ApiRequest, device_id, wait};
use crate::cli::machine_args::{MAX_CPUS, check_id};

/// Which device, and where. Its configuration is checked beside the machine's.
pub(super) fn add(request: AddDeviceRequest) -> Result<ApiRequest, RpcStatus> {
    let invalid = |line: &str| Err(RpcStatus::invalid_argument(line));
    let id = match &request.device {
        Some(add_device_request::Device::Disk(disk)) => &disk.id,
        Some(add_device_request::Device::Net(net)) => &net.id,
        Some(add_device_request::Device::VhostUser(device)) => &device.id,
        Some(add_device_request::Device::Rng(rng)) => &rng.id,
        Some(add_device_request::Device::Fs(fs)) => &fs.id,
        Some(add_device_request::Device::Vsock(vsock)) => &vsock.id,
        Some(add_device_request::Device::Console(console)) => &console.id,
        _ => {
            return invalid(
                "device is missing: give disk, net, vhost_user, rng, vsock, console or fs",
            );
        }
    };
    if let Err(why) = check_device_id(id) {
        return invalid(&format!("the device's id: {why}"));
    }
    if !request.port.is_empty()
        && let Err(why) = check_id(&request.port)
    {
        return invalid(&format!("port: {why}"));
    }
    Ok(ApiRequest::AddDevice(Box::new(request)))
}

pub(super) fn remove(request: RemoveDeviceRequest) -> Result<ApiRequest, RpcStatus> {
    Ok(ApiRequest::RemoveDevice {
        force: request.force,
        timeout: wait(request.timeout_ms)?,
        id: device_id(request.id)?,
    })
}

pub(super) fn resize_memory(request: &ResizeMemoryRequest) -> Result<ApiRequest, RpcStatus> {
    if request.size_bytes == 0 {
        let line = "size_bytes is missing: give all of the guest's memory in bytes";
        return Err(RpcStatus::invalid_argument(line));
    }
    Ok(ApiRequest::ResizeMemory {
        size: request.size_bytes,
        timeout: wait(request.timeout_ms)?,
    })
}

pub(super) fn resize_cpus(request: &ResizeCpusRequest) -> Result<ApiRequest, RpcStatus> {
    if request.count == 0 || request.count > MAX_CPUS {
        return Err(RpcStatus::invalid_argument(format!(
            "count is {}: give 1 to the machine's cpus.max",
            request.count
        )));
    }
    Ok(ApiRequest::ResizeCpus {
        count: request.count,
        timeout: wait(request.timeout_ms)?,
    })
}
