//! From bytes to a request that the manager can carry out: the methods of
//! `bulkhead.v1.Machine`. Called on the `api` thread.

use std::time::Duration;

use bulkhead_proto::common::Resources;
use bulkhead_proto::machine::{
    AddDeviceRequest, BootRequest, ConsoleInput, CreateRequest, DeleteRequest, DeviceStatsRequest,
    DevicesRequest, DrainDeviceRequest, EventsRequest, InfoRequest, MachineConfig,
    OperationRequest, OperationsRequest, PauseRequest, RebootRequest, ResetRequest,
    ResumeDeviceRequest, ResumeRequest, ShutdownRequest, UpdateConsoleRequest, UpdateDeviceRequest,
    UpdateDiskRequest, UpdateNetRequest, UpdateResourcesRequest, update_net_request,
};
use bulkhead_proto::payload::{decode, decode_beside};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{MACHINE_SERVICE, RpcStatus, VM_SERVICE};

use super::{
    config, config_console, config_disk, config_net, config_resources, request_hotplug, vmservice,
};
use crate::cli::machine_args::check_id;

/// How long a guest has to switch itself off, or a device to drain, when the client does not
/// say.
pub(super) const WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// Longest path of a binary, bytes.
const MAX_BINARY: usize = 4095;
/// How long it may have at most.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(600);

/// A request of a client, its form checked.
#[derive(Clone, Debug, PartialEq)]
pub enum ApiRequest {
    /// Build the machine; there may be just this one already.
    Create(Box<MachineConfig>),
    /// Build the machine, for a client of `vmservice.VM`: there must be none.
    CreateVm(Box<MachineConfig>),
    /// Give up the machine.
    Delete,
    /// created → running.
    Boot,
    /// running → paused.
    Pause,
    /// paused → running.
    Resume,
    /// End the machine.
    Shutdown {
        /// Do not ask the guest.
        force: bool,
        /// How long the guest has.
        timeout: Duration,
    },
    /// Begin anew, in place.
    Reset,
    /// Have the guest switch itself off, and begin anew.
    Reboot {
        /// How long the guest has.
        timeout: Duration,
    },
    /// What is the machine?
    Info,
    /// What are its devices?
    Devices,
    /// What has a device counted?
    DeviceStats {
        /// The device.
        id: String,
    },
    /// Grow or limit a disk.
    UpdateDisk(Box<UpdateDiskRequest>),
    /// Change a network device's link or limits.
    UpdateNet(Box<UpdateNetRequest>),
    /// Tell the guest how large its consoles are.
    UpdateConsole(Box<UpdateConsoleRequest>),
    /// Change what a device's process may use of the host.
    UpdateResources {
        /// The device.
        id: String,
        /// All limits.
        resources: Box<Resources>,
    },
    /// Let a device finish what is in flight and take nothing new.
    DrainDevice {
        /// The device.
        id: String,
        /// How long it may take.
        timeout: Duration,
    },
    /// Put a process of another binary in a device's place.
    UpdateDevice {
        /// The device.
        id: String,
        /// The binary; empty: the kind's own name.
        binary: String,
        /// How long what is in flight may take.
        timeout: Duration,
    },
    /// Let it take requests again.
    ResumeDevice {
        /// The device.
        id: String,
    },
    /// Start a device and put it behind a root port.
    AddDevice(Box<AddDeviceRequest>),
    /// Have the guest give a device up, and end it.
    RemoveDevice {
        /// The device.
        id: String,
        /// Do not ask the guest.
        force: bool,
        /// How long the guest has.
        timeout: Duration,
    },
    /// Ask the guest to have so much memory.
    ResizeMemory {
        /// Bytes, all of it.
        size: u64,
        /// How long it has before it is told to have stopped short.
        timeout: Duration,
    },
    /// Change the number of vCPUs.
    ResizeCpus {
        /// How many there shall be.
        count: u32,
        /// How long the guest has.
        timeout: Duration,
    },
    /// What became of an operation?
    Operation {
        /// Its number.
        operation: u64,
        /// How long it is waited for.
        wait: Duration,
    },
    /// Which operations are there?
    Operations {
        /// What they are about; empty: all.
        subject: String,
        /// Only those that have not ended.
        running: bool,
    },
    /// Let a client read and type at a console.
    AttachConsole {
        /// Its device; empty: the serial port.
        device: String,
        /// Which port of the device.
        port: u32,
        /// How many bytes that were printed before come first.
        history: usize,
    },
    /// created or paused → running.
    Go,
    /// Answered when the machine has ended.
    Wait,
    /// End the machine and all that is its own; the process stays for [`Quit`](Self::Quit).
    Teardown,
    /// End the process.
    Quit,
    /// What can be changed of the machine?
    Capabilities,
    /// What is the machine, and what does it use?
    Properties {
        /// Of memory.
        memory: bool,
        /// Of processors.
        processor: bool,
    },
    /// Remove what is behind a root port.
    RemoveBehind {
        /// The port.
        port: String,
        /// How long the guest has.
        timeout: Duration,
    },
    /// Add the vCPU of this number, or have the guest give it up.
    PlugCpu {
        /// The next one, or the last.
        index: u32,
        /// Or have it given up.
        add: bool,
    },
}

impl ApiRequest {
    /// It may take as long as the machine lives, unless the client says otherwise.
    pub(super) fn is_endless(&self) -> bool {
        *self == Self::Wait
    }
}

/// Which services a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Services {
    /// `bulkhead.v1.Machine`.
    Machine,
    /// `vmservice.VM`, and `bulkhead.v1.Machine` beside it.
    Vm,
}

/// A subscription to the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EventsFrom {
    /// First number wanted; 0: the oldest.
    pub(super) from: u64,
    /// End after the newest.
    pub(super) backlog_only: bool,
    /// Tell of events that are no longer kept, instead of an error.
    pub(super) gaps: bool,
}

/// What a call asks for.
#[derive(Debug, PartialEq)]
pub(super) enum Call {
    Unary(ApiRequest),
    /// Of `vmservice.VM`, most of whose responses are empty.
    Vm(ApiRequest),
    Events(EventsFrom),
    /// The first message, where it came with the request.
    Console(Option<ConsoleInput>),
}

/// Reads a call.
pub(super) fn parse(
    services: Services,
    service: &str,
    method: &str,
    payload: &[u8],
) -> Result<Call, RpcStatus> {
    if services == Services::Vm && service == VM_SERVICE {
        return vmservice::parse(method, payload).map(Call::Vm);
    }
    if service != MACHINE_SERVICE {
        return Err(RpcStatus::unimplemented(&short(service), &short(method)));
    }
    let request = match method {
        "Create" => {
            let mut request: CreateRequest = message(payload)?;
            let config = request.config.take().ok_or_else(|| {
                RpcStatus::invalid_argument("config is missing: describe the machine")
            })?;
            config::validate(&config).map_err(RpcStatus::invalid_argument)?;
            ApiRequest::Create(Box::new(config))
        }
        "Delete" => message::<DeleteRequest>(payload).map(|_| ApiRequest::Delete)?,
        "Boot" => message::<BootRequest>(payload).map(|_| ApiRequest::Boot)?,
        "Pause" => message::<PauseRequest>(payload).map(|_| ApiRequest::Pause)?,
        "Resume" => message::<ResumeRequest>(payload).map(|_| ApiRequest::Resume)?,
        "Shutdown" => shutdown(&message(payload)?)?,
        "Reset" => message::<ResetRequest>(payload).map(|_| ApiRequest::Reset)?,
        "Reboot" => ApiRequest::Reboot {
            timeout: wait(message::<RebootRequest>(payload)?.timeout_ms)?,
        },
        "Info" => message::<InfoRequest>(payload).map(|_| ApiRequest::Info)?,
        "Devices" => message::<DevicesRequest>(payload).map(|_| ApiRequest::Devices)?,
        "DeviceStats" => {
            let request: DeviceStatsRequest = message(payload)?;
            ApiRequest::DeviceStats {
                id: device_id(request.id)?,
            }
        }
        "UpdateDisk" => update_disk(message(payload)?)?,
        "UpdateNet" => update_net(message(payload)?)?,
        "UpdateConsole" => {
            let request: UpdateConsoleRequest = message(payload)?;
            device_id(request.id.clone())?;
            config_console::check_sizes(&request.sizes).map_err(RpcStatus::invalid_argument)?;
            ApiRequest::UpdateConsole(Box::new(request))
        }
        "UpdateResources" => {
            let request: UpdateResourcesRequest = message(payload)?;
            let resources = request.resources.into_option().unwrap_or_default();
            // Whether it is a disk is seen by the manager.
            config_resources::check("resources", Some(&resources), true)
                .map_err(RpcStatus::invalid_argument)?;
            ApiRequest::UpdateResources {
                id: device_id(request.id)?,
                resources: Box::new(resources),
            }
        }
        "DrainDevice" => {
            let request: DrainDeviceRequest = message(payload)?;
            ApiRequest::DrainDevice {
                timeout: wait(request.timeout_ms)?,
                id: device_id(request.id)?,
            }
        }
        "UpdateDevice" => {
            let request: UpdateDeviceRequest = message(payload)?;
            if request.binary.len() > MAX_BINARY || request.binary.contains('\0') {
                return Err(RpcStatus::invalid_argument(format!(
                    "binary is no path: give one of at most {MAX_BINARY} bytes"
                )));
            }
            ApiRequest::UpdateDevice {
                timeout: wait(request.timeout_ms)?,
                id: device_id(request.id)?,
                binary: request.binary,
            }
        }
        "ResumeDevice" => {
            let request: ResumeDeviceRequest = message(payload)?;
            ApiRequest::ResumeDevice {
                id: device_id(request.id)?,
            }
        }
        "AddDevice" => request_hotplug::add(message(payload)?)?,
        "RemoveDevice" => request_hotplug::remove(message(payload)?)?,
        "ResizeCpus" => request_hotplug::resize_cpus(&message(payload)?)?,
        "ResizeMemory" => request_hotplug::resize_memory(&message(payload)?)?,
        "Operation" => operation(&message(payload)?)?,
        "Operations" => {
            let request: OperationsRequest = message(payload)?;
            ApiRequest::Operations {
                subject: match request.subject {
                    all if all.is_empty() => all,
                    subject => device_id(subject)?,
                },
                running: request.running,
            }
        }
        "Events" => {
            let request: EventsRequest = message(payload)?;
            return Ok(Call::Events(EventsFrom {
                from: request.from,
                backlog_only: request.backlog_only,
                gaps: request.gaps,
            }));
        }
        "AttachConsole" => {
            let first = (!payload.is_empty()).then(|| console_input(payload));
            return first.transpose().map(Call::Console);
        }
        _ => return Err(RpcStatus::unimplemented(service, &short(method))),
    };
    Ok(Call::Unary(request))
}

fn message<M: Message>(payload: &[u8]) -> Result<M, RpcStatus> {
    known(decode(payload)?)
}

/// What a client at a console sends: bytes of any kind.
pub(super) fn console_input(payload: &[u8]) -> Result<ConsoleInput, RpcStatus> {
    use bulkhead_proto::machine::console_input::What;
    /// `typed`.
    const TYPED: u64 = 2;
    let input: ConsoleInput = known(decode_beside(payload, TYPED)?)?;
    if let Some(What::Attach(attach)) = &input.what {
        config::known("attach", attach).map_err(RpcStatus::invalid_argument)?;
    }
    Ok(input)
}

fn known<M: Message>(message: M) -> Result<M, RpcStatus> {
    config::known(M::NAME, &message).map_err(RpcStatus::invalid_argument)?;
    Ok(message)
}

fn shutdown(request: &ShutdownRequest) -> Result<ApiRequest, RpcStatus> {
    Ok(ApiRequest::Shutdown {
        force: request.force,
        timeout: wait(request.timeout_ms)?,
    })
}

fn operation(request: &OperationRequest) -> Result<ApiRequest, RpcStatus> {
    if request.operation == 0 {
        return Err(RpcStatus::invalid_argument(
            "operation is missing: give its number (see Operations)",
        ));
    }
    let wait = Duration::from_millis(u64::from(request.wait_ms));
    if wait > WAIT_MAX {
        return Err(RpcStatus::invalid_argument(format!(
            "wait_ms is {}: at most {} are allowed",
            request.wait_ms,
            WAIT_MAX.as_millis()
        )));
    }
    Ok(ApiRequest::Operation {
        operation: request.operation,
        wait,
    })
}

/// A time to wait, from its field `timeout_ms`.
pub(super) fn wait(millis: u32) -> Result<Duration, RpcStatus> {
    let timeout = match millis {
        0 => WAIT_DEFAULT,
        millis => Duration::from_millis(u64::from(millis)),
    };
    if timeout > WAIT_MAX {
        return Err(RpcStatus::invalid_argument(format!(
            "timeout_ms is {millis}: at most {} are allowed",
            WAIT_MAX.as_millis()
        )));
    }
    Ok(timeout)
}

/// The name of a device, from the field `id`. Whether it exists is seen by the manager.
pub(super) fn device_id(id: String) -> Result<String, RpcStatus> {
    match check_id(&id) {
        Ok(()) => Ok(id),
        Err(_) if id.is_empty() => Err(RpcStatus::invalid_argument(
            "id is missing: name a device (see Devices)",
        )),
        Err(_) => Err(RpcStatus::invalid_argument(format!(
            "id is {:?}: no device has such a name (see Devices)",
            short(&id)
        ))),
    }
}

fn update_disk(request: UpdateDiskRequest) -> Result<ApiRequest, RpcStatus> {
    device_id(request.id.clone())?;
    config_disk::check_size("size_bytes", request.size_bytes)
        .and_then(|()| config_disk::check_limits("limits", request.limits.as_ref()))
        .map_err(RpcStatus::invalid_argument)?;
    if request.size_bytes == 0 && request.limits.is_none() {
        return Err(RpcStatus::invalid_argument(
            "nothing to change: give size_bytes or limits",
        ));
    }
    Ok(ApiRequest::UpdateDisk(Box::new(request)))
}

fn update_net(request: UpdateNetRequest) -> Result<ApiRequest, RpcStatus> {
    use update_net_request::Link;
    device_id(request.id.clone())?;
    for (field, limits) in [
        ("to_guest", &request.to_guest),
        ("from_guest", &request.from_guest),
    ] {
        if let Some(limits) = limits.as_ref() {
            config_net::check_limits(field, limits).map_err(RpcStatus::invalid_argument)?;
        }
    }
    match request.link.enum_value() {
        Ok(Link::UNCHANGED) if request.to_guest.is_none() && request.from_guest.is_none() => Err(
            RpcStatus::invalid_argument("nothing to change: give link, to_guest or from_guest"),
        ),
        Ok(_) => Ok(ApiRequest::UpdateNet(Box::new(request))),
        Err(number) => Err(RpcStatus::invalid_argument(format!(
            "link is {number}: give 0 to 2"
        ))),
    }
}

/// A name from the wire, fit for one line of an answer.
pub(super) fn short(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::Code;

    fn parse(service: &str, method: &str, payload: &[u8]) -> Result<Call, RpcStatus> {
        super::parse(Services::Machine, service, method, payload)
    }
    use proptest::prelude::*;

    #[test]
    fn a_shutdown_has_a_bounded_time() {
        let of = |timeout_ms| {
            let mut request = ShutdownRequest::new();
            request.timeout_ms = timeout_ms;
            parse(
                MACHINE_SERVICE,
                "Shutdown",
                &request.write_to_bytes().unwrap(),
            )
        };
        let call = |timeout| {
            Call::Unary(ApiRequest::Shutdown {
                force: false,
                timeout,
            })
        };
        assert_eq!(of(0), Ok(call(WAIT_DEFAULT)));
        assert_eq!(of(5), Ok(call(Duration::from_millis(5))));
        assert_eq!(of(600_000), Ok(call(WAIT_MAX)));
        assert_eq!(of(600_001).unwrap_err().code, Code::InvalidArgument);
    }

    #[test]
    fn strangers_are_refused() {
        let code =
            |service, method, payload: &[u8]| parse(service, method, payload).unwrap_err().code;
        assert_eq!(code("vmservice.VM", "Boot", &[]), Code::Unimplemented);
        assert_eq!(code(MACHINE_SERVICE, "boot", &[]), Code::Unimplemented);
        assert_eq!(
            code(MACHINE_SERVICE, "Boot", &[0xff]),
            Code::InvalidArgument
        );
        assert_eq!(
            code(MACHINE_SERVICE, "Boot", &[0x08, 1]),
            Code::InvalidArgument
        );
        assert_eq!(code(MACHINE_SERVICE, "Create", &[]), Code::InvalidArgument);
        assert_eq!(
            code(MACHINE_SERVICE, "Create", &[0x0a, 0]),
            Code::InvalidArgument
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(
            method in prop::sample::select(vec!["Create", "Boot", "Shutdown", "Events", "Info"]),
            payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = parse(MACHINE_SERVICE, method, &payload);
        }
    }
}
