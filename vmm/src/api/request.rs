//! From bytes to a request that the manager can carry out: the methods of
//! `bulkhead.v1.Machine`. Called on the `api` thread.

use std::time::Duration;

use bulkhead_proto::machine::{
    BootRequest, CreateRequest, DevicesRequest, EventsRequest, InfoRequest, MachineConfig,
    PauseRequest, ResumeRequest, ShutdownRequest,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::server::decode;
use bulkhead_proto::{MACHINE_SERVICE, RpcStatus};

use super::config;

/// How long a guest has to switch itself off when the client does not say.
const SHUTDOWN_DEFAULT: Duration = Duration::from_secs(30);
/// How long it may have at most.
pub(super) const SHUTDOWN_MAX: Duration = Duration::from_secs(600);

/// A request of a client, its form checked.
#[derive(Clone, Debug, PartialEq)]
pub enum ApiRequest {
    /// Build the machine.
    Create(Box<MachineConfig>),
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
    /// What is the machine?
    Info,
    /// What are its devices?
    Devices,
}

/// A subscription to the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EventsFrom {
    /// First number wanted; 0: the oldest.
    pub(super) from: u64,
    /// End after the newest.
    pub(super) backlog_only: bool,
}

/// What a call asks for.
#[derive(Debug, PartialEq)]
pub(super) enum Call {
    Unary(ApiRequest),
    Events(EventsFrom),
}

/// Reads a call.
pub(super) fn parse(service: &str, method: &str, payload: &[u8]) -> Result<Call, RpcStatus> {
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
        "Boot" => message::<BootRequest>(payload).map(|_| ApiRequest::Boot)?,
        "Pause" => message::<PauseRequest>(payload).map(|_| ApiRequest::Pause)?,
        "Resume" => message::<ResumeRequest>(payload).map(|_| ApiRequest::Resume)?,
        "Shutdown" => shutdown(&message(payload)?)?,
        "Info" => message::<InfoRequest>(payload).map(|_| ApiRequest::Info)?,
        "Devices" => message::<DevicesRequest>(payload).map(|_| ApiRequest::Devices)?,
        "Events" => {
            let request: EventsRequest = message(payload)?;
            return Ok(Call::Events(EventsFrom {
                from: request.from,
                backlog_only: request.backlog_only,
            }));
        }
        _ => return Err(RpcStatus::unimplemented(service, &short(method))),
    };
    Ok(Call::Unary(request))
}

fn message<M: Message>(payload: &[u8]) -> Result<M, RpcStatus> {
    let message: M = decode(payload)?;
    config::known(M::NAME, &message).map_err(RpcStatus::invalid_argument)?;
    Ok(message)
}

fn shutdown(request: &ShutdownRequest) -> Result<ApiRequest, RpcStatus> {
    let timeout = match request.timeout_ms {
        0 => SHUTDOWN_DEFAULT,
        millis => Duration::from_millis(u64::from(millis)),
    };
    if timeout > SHUTDOWN_MAX {
        return Err(RpcStatus::invalid_argument(format!(
            "timeout_ms is {}: at most {} are allowed",
            request.timeout_ms,
            SHUTDOWN_MAX.as_millis()
        )));
    }
    Ok(ApiRequest::Shutdown {
        force: request.force,
        timeout,
    })
}

/// A name from the wire, fit for one line of an answer.
fn short(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::Code;
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
        assert_eq!(of(0), Ok(call(SHUTDOWN_DEFAULT)));
        assert_eq!(of(5), Ok(call(Duration::from_millis(5))));
        assert_eq!(of(600_000), Ok(call(SHUTDOWN_MAX)));
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
