//! The control channel: service bulkhead.device.v1.Device (proto/proto/device.proto).
//!
//! Runs on the main thread, from its poll loop or while that waits for a worker. Touches
//! only shared counters, flags and the device itself, and gives no worker an order, so it is
//! always answered.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_proto::common::{ProcessLimits, QueueStats};
use bulkhead_proto::device::{
    Confinement, DrainRequest, DrainResponse, FinishRequestRequest, FinishRequestResponse,
    HealthRequest, HealthResponse, HelloRequest, HelloResponse, ResumeRequest, ResumeResponse,
    RingHealth, ShutdownRequest, ShutdownResponse, StatsRequest, StatsResponse, TakeRequestRequest,
    UpdateRequest, UpdateResponse,
};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_proto::server::{CONTROL_MAX_FRAME, Closed, decode, encode};
use bulkhead_proto::{ControlServer, DEVICE_SERVICE, RpcStatus};

use crate::backend::Meanwhile;
use crate::device::{Device, Update};
use crate::mailbox::Signals;
use crate::sys::PollFd;

/// Version of the Device protocol that this runtime speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// What confined the process, for Hello.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfinementReport {
    pub(crate) landlock_abi: u32,
    pub(crate) policy: String,
    pub(crate) limits: ProcessLimits,
}

struct Service {
    device: Arc<dyn Device>,
    queues: Vec<Signals>,
    confinement: ConfinementReport,
    shutdown: bool,
    /// The driver is to be told that the configuration space has changed.
    config_changed: bool,
}

/// The control channel and the state of its service. Without a channel (stand-alone mode)
/// it does nothing.
pub(crate) struct Control {
    server: Option<ControlServer>,
    service: Service,
    closed: bool,
}

impl Control {
    pub(crate) fn new(
        channel: Option<OwnedFd>,
        device: Arc<dyn Device>,
        queues: Vec<Signals>,
        confinement: ConfinementReport,
    ) -> Self {
        Self {
            server: channel.map(|fd| ControlServer::new(fd, CONTROL_MAX_FRAME)),
            service: Service {
                device,
                queues,
                confinement,
                shutdown: false,
                config_changed: false,
            },
            closed: false,
        }
    }

    /// A stand-alone process has no VMM to ask for statistics: a front-end that connects does for that.
    #[cfg(feature = "hostile")]
    pub(crate) fn strike(&self) {
        crate::hostile::strike(&self.service.queues);
    }

    /// Shutdown was called, or the VMM is gone.
    pub(crate) fn wants_exit(&self) -> bool {
        self.closed || self.service.shutdown
    }
}

impl Meanwhile for Control {
    fn poll_fd(&self) -> PollFd {
        match &self.server {
            Some(server) => {
                let mut events = 0;
                if server.wants_read() {
                    events |= libc::POLLIN;
                }
                if server.wants_write() {
                    events |= libc::POLLOUT;
                }
                PollFd::new(server.as_fd(), events)
            }
            None => PollFd::none(),
        }
    }

    fn serve(&mut self) {
        let Some(server) = &mut self.server else {
            return;
        };
        let service = &mut self.service;
        if let Err(why) = server
            .on_readable(&mut |service_name, method, body| service.call(service_name, method, body))
        {
            if !matches!(why, Closed::Eof) {
                log::error!("control channel: {why}");
            }
            self.server = None;
            self.closed = true;
        }
    }

    fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.service.config_changed)
    }
}

impl Service {
    fn call(&mut self, service: &str, method: &str, body: &[u8]) -> Result<Vec<u8>, RpcStatus> {
        match (service, method) {
            (DEVICE_SERVICE, "Hello") => encode(&self.hello(&decode::<HelloRequest>(body)?)),
            (DEVICE_SERVICE, "Health") => {
                decode::<HealthRequest>(body)?;
                self.config_changed |= self.device.take_changed();
                encode(&self.health())
            }
            (DEVICE_SERVICE, "Stats") => {
                decode::<StatsRequest>(body)?;
                #[cfg(feature = "hostile")]
                crate::hostile::strike(&self.queues);
                encode(&self.stats())
            }
            (DEVICE_SERVICE, "Update") => {
                self.update(&decode::<UpdateRequest>(body)?)?;
                encode(&UpdateResponse::new())
            }
            (DEVICE_SERVICE, "Drain") => {
                decode::<DrainRequest>(body)?;
                encode(&self.drain())
            }
            (DEVICE_SERVICE, "Resume") => {
                decode::<ResumeRequest>(body)?;
                self.device.resumed();
                self.queues.iter().for_each(Signals::resume);
                encode(&ResumeResponse::new())
            }
            (DEVICE_SERVICE, "TakeRequest") => {
                decode::<TakeRequestRequest>(body)?;
                encode(&self.device.take_request()?)
            }
            (DEVICE_SERVICE, "FinishRequest") => {
                self.device
                    .finish_request(&decode::<FinishRequestRequest>(body)?)?;
                self.queues.iter().for_each(Signals::refresh);
                encode(&FinishRequestResponse::new())
            }
            (DEVICE_SERVICE, "Shutdown") => {
                decode::<ShutdownRequest>(body)?;
                self.shutdown = true;
                encode(&ShutdownResponse::new())
            }
            _ => Err(RpcStatus::unimplemented(service, method)),
        }
    }

    fn hello(&self, request: &HelloRequest) -> HelloResponse {
        let mut confinement = Confinement::new();
        confinement.landlock_abi = self.confinement.landlock_abi;
        confinement.policy.clone_from(&self.confinement.policy);
        confinement.io_engine = self.device.io_engine().into();
        confinement.limits = MessageField::some(self.confinement.limits.clone());
        let mut reply = HelloResponse::new();
        reply.kind = self.device.kind().into();
        reply.version = self.device.version().into();
        reply.protocol = PROTOCOL_VERSION;
        reply.incarnation = request.incarnation;
        reply.confinement = MessageField::some(confinement);
        reply
    }

    fn update(&mut self, request: &UpdateRequest) -> Result<(), RpcStatus> {
        let Update { config_changed } = self.device.update(request)?;
        self.queues.iter().for_each(Signals::refresh);
        self.config_changed |= config_changed;
        Ok(())
    }

    fn drain(&self) -> DrainResponse {
        self.queues.iter().for_each(Signals::pause);
        let mut reply = DrainResponse::new();
        reply.drained = self.queues.iter().all(|q| q.status().is_drained());
        reply
    }

    fn health(&self) -> HealthResponse {
        let mut reply = HealthResponse::new();
        reply.asks = self.device.asks();
        reply.host_gone = self.device.host_gone();
        reply.rings = (0..)
            .zip(&self.queues)
            .map(|(index, q)| {
                let q = q.status();
                let (host_errors, last_errno, last_sector) = q.host_errors();
                let mut ring = RingHealth::new();
                ring.index = index;
                ring.started = q.started.load(Ordering::Relaxed);
                ring.broken = q.broken.load(Ordering::Relaxed);
                ring.in_flight = q.in_flight.get();
                ring.completed = q.requests.get();
                ring.waits_for_host = q.waits_for_host.load(Ordering::Relaxed);
                ring.host_errors = host_errors;
                ring.last_errno = last_errno;
                ring.last_sector = last_sector;
                ring.held = q.held.load(Ordering::Relaxed);
                ring
            })
            .collect();
        reply
    }

    fn stats(&self) -> StatsResponse {
        let mut reply = StatsResponse::new();
        reply.queues = (0..)
            .zip(&self.queues)
            .map(|(index, q)| {
                let q = q.status();
                let mut stats = QueueStats::new();
                stats.index = index;
                stats.requests = q.requests.get();
                stats.read_bytes = q.read_bytes.get();
                stats.written_bytes = q.written_bytes.get();
                stats.flushes = q.flushes.get();
                stats.errors = q.errors.get();
                stats.kicks = q.kicks.get();
                stats.interrupts = q.interrupts.get();
                stats.syscalls = q.syscalls.get();
                stats.latency_us_log2 = q.latency();
                stats.discards = q.discards.get();
                stats.write_zeroes = q.write_zeroes.get();
                stats.dropped = q.dropped.get();
                stats.throttled = q.throttled.get();
                stats
            })
            .collect();
        self.device.stats(&mut reply);
        reply
    }
}
