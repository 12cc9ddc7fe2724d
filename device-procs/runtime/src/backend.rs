//! The vhost-user back-end: its state, and how a change of it reaches the queues' workers. What each
//! message of the front-end does to it is in [`messages`].
//!
//! Runs on the main thread only. A message that changes a ring becomes an order to the
//! queue's worker; the answer is waited for with a deadline, and the control channel is
//! served meanwhile.
//!
//! What a *guest* can get wrong (ring size, ring addresses) is accepted here and found
//! when the ring starts, so that it costs that ring and not the connection; what only a
//! *front-end* can get wrong ends the connection.

mod messages;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Result};

use crate::backend_channel::BackendChannel;
use crate::clock;
use crate::device::{Device, F_EVENT_IDX, F_INDIRECT_DESC, F_PROTOCOL_FEATURES};
use crate::inflight::{InflightFile, InflightRegion};
use crate::mailbox::{Answer, Order, RingSetup, WorkerHandle};
use crate::memory::Memory;
use crate::ring::{RingFeatures, RingLayout};
use crate::sys::{self, PollFd};

/// How long a worker may take to finish what is in flight. Longer than a disk's own
/// time-outs; past it the process gives up and exits, because it can neither unmap the
/// memory nor say where the ring stands.
const DRAIN_DEADLINE: Duration = Duration::from_secs(120);

/// How long the main thread waits for a worker before it looks at its control channel.
const ANSWER_MS: u16 = 10;

/// Served while the main thread waits for a worker, so that Health is answered.
pub(crate) trait Meanwhile {
    /// What to wait for, if anything.
    fn poll_fd(&self) -> PollFd;
    /// Called when it is readable.
    fn serve(&mut self);
    /// Whether the configuration space has changed since the last call.
    fn take_config_changed(&mut self) -> bool;
}

fn refuse(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(std::io::Error::other(why))
}

/// What the front-end has said about one ring.
#[derive(Debug, Default)]
struct RingConfig {
    layout: RingLayout,
    base: u16,
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    enabled: bool,
    /// The worker has it.
    serving: bool,
}

/// State of the one vhost-user connection, and of the device behind it.
pub(crate) struct Backend<M> {
    device: Arc<dyn Device>,
    workers: Vec<WorkerHandle>,
    rings: Vec<RingConfig>,
    memory: Arc<Memory>,
    acked: u64,
    acked_protocol: VhostUserProtocolFeatures,
    channel: BackendChannel,
    /// What this process offers as in-flight region, and what the front-end handed over.
    inflight_file: InflightFile,
    inflight: Option<InflightRegion>,
    meanwhile: M,
    gave_up: bool,
}

impl<M: Meanwhile> Backend<M> {
    pub(crate) fn new(
        device: Arc<dyn Device>,
        workers: Vec<WorkerHandle>,
        meanwhile: M,
        inflight_file: InflightFile,
    ) -> Self {
        let rings = workers.iter().map(|_| RingConfig::default()).collect();
        Self {
            device,
            workers,
            rings,
            memory: Arc::default(),
            acked: 0,
            acked_protocol: VhostUserProtocolFeatures::empty(),
            channel: BackendChannel::default(),
            inflight_file,
            inflight: None,
            meanwhile,
            gave_up: false,
        }
    }

    /// Serves the control channel, and does what came of it.
    pub(crate) fn serve_control(&mut self) {
        self.meanwhile.serve();
        let told = VhostUserProtocolFeatures::CONFIG;
        if self.meanwhile.take_config_changed() && self.acked_protocol.contains(told) {
            self.channel.config_changed();
        }
        self.tell_config();
    }

    /// Tells the front-end that the configuration space has changed, if it has. Not while
    /// all rings are stopped: then a back-end sends nothing ("Suspended device state").
    fn tell_config(&mut self) {
        if self.rings.iter().any(|r| r.serving) {
            self.channel.flush();
        }
    }

    pub(crate) fn meanwhile(&mut self) -> &mut M {
        &mut self.meanwhile
    }

    /// A worker missed the deadline: nothing is certain any more, the process must end.
    pub(crate) fn gave_up(&self) -> bool {
        self.gave_up
    }

    /// Stops all rings, in parallel, and forgets everything about the driver. False if a
    /// worker did not finish in time.
    pub(crate) fn reset(&mut self) -> bool {
        let stopped = self.stop_all();
        for ring in &mut self.rings {
            *ring = RingConfig::default();
        }
        if stopped {
            self.accept(0);
        }
        stopped
    }

    /// Ends the connection: as reset, and lets all go that the front-end has given.
    pub(crate) fn disconnect(&mut self) -> bool {
        self.device.let_go();
        let stopped = self.reset();
        if stopped {
            self.memory = Arc::default();
            self.inflight = None;
        }
        self.channel = BackendChannel::default();
        self.acked_protocol = VhostUserProtocolFeatures::empty();
        stopped
    }

    /// The driver accepted these features; no ring is being served.
    fn accept(&mut self, features: u64) {
        if self.acked != features {
            self.acked = features;
            self.device.accepted(features);
        }
    }

    fn stop_all(&mut self) -> bool {
        let serving: Vec<usize> = (0..self.rings.len())
            .filter(|i| self.rings.get(*i).is_some_and(|r| r.serving))
            .collect();
        for i in &serving {
            if let Some(w) = self.workers.get(*i) {
                w.order(Order::Stop);
            }
        }
        let mut all = true;
        for i in serving {
            all &= self.finish_stop(i).is_ok();
        }
        all
    }

    fn finish_stop(&mut self, index: usize) -> Result<()> {
        let answer = self.wait(index)?;
        if let Some(ring) = self.rings.get_mut(index) {
            ring.serving = false;
            if let Answer::Stopped {
                next_avail: Some(next),
            } = answer
            {
                ring.base = next;
            }
        }
        Ok(())
    }

    /// Waits for a worker's answer, serving the control channel meanwhile.
    fn wait(&mut self, index: usize) -> Result<Answer> {
        let deadline = clock::now() + DRAIN_DEADLINE;
        loop {
            let Some(worker) = self.workers.get(index) else {
                return Err(Error::InvalidParam);
            };
            if let Some(answer) = worker.take_answer() {
                return Ok(answer);
            }
            if clock::now() >= deadline {
                self.gave_up = true;
                log::error!(
                    "queue {index}: requests still wait for the host after {} s; giving up",
                    DRAIN_DEADLINE.as_secs()
                );
                return Err(refuse("queue did not drain"));
            }
            worker.wait_answer(ANSWER_MS);
            let mut fds = [self.meanwhile.poll_fd()];
            if !worker.has_answer() && sys::poll(&mut fds, 0).map_err(Error::ReqHandlerError)? > 0 {
                self.serve_control();
            }
        }
    }

    fn order(&mut self, index: usize, order: Order) -> Result<Answer> {
        self.workers
            .get(index)
            .ok_or(Error::InvalidParam)?
            .order(order);
        self.wait(index)
    }

    fn ring(&mut self, index: usize) -> Result<&mut RingConfig> {
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts or stops a ring if what was said about it asks for that.
    fn apply(&mut self, index: usize) -> Result<()> {
        let negotiated = self.acked & F_PROTOCOL_FEATURES != 0;
        let (features, acked) = (
            RingFeatures {
                event_idx: self.acked & F_EVENT_IDX != 0,
                indirect: self.acked & F_INDIRECT_DESC != 0,
            },
            self.acked,
        );
        let memory = Arc::clone(&self.memory);
        let inflight = self.inflight.as_ref().and_then(|i| i.ring(index));
        let ring = self.ring(index)?;
        // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
        let wanted = ring.enabled || !negotiated;
        match (&ring.kick, wanted, ring.serving) {
            (Some(kick), true, false) => {
                let setup = RingSetup {
                    memory,
                    layout: ring.layout,
                    ring_features: features,
                    features: acked,
                    base: ring.base,
                    kick: Arc::clone(kick),
                    call: ring.call.clone(),
                    err: ring.err.clone(),
                    inflight,
                };
                match self.order(index, Order::Start(Box::new(setup)))? {
                    Answer::Refused(why) => {
                        log::warn!("queue {index}: ring not served: {why}");
                    }
                    _ => self.ring(index)?.serving = true,
                }
                self.tell_config();
                Ok(())
            }
            (None, _, true) | (_, false, true) => self.stop(index),
            _ => Ok(()),
        }
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        self.workers
            .get(index)
            .ok_or(Error::InvalidParam)?
            .order(Order::Stop);
        self.finish_stop(index)
    }

    /// Gives all workers a new memory table; returns when none uses the old one.
    fn set_memory(&mut self, memory: Memory) -> Result<()> {
        let memory = Arc::new(memory);
        let serving: Vec<usize> = (0..self.rings.len())
            .filter(|i| self.rings.get(*i).is_some_and(|r| r.serving))
            .collect();
        for i in &serving {
            if let Some(w) = self.workers.get(*i) {
                w.order(Order::Memory(Arc::clone(&memory)));
            }
        }
        for i in serving {
            if let Answer::Refused(why) = self.wait(i)? {
                log::warn!("queue {i}: ring is not in the new memory table: {why}");
            }
        }
        self.memory = memory;
        Ok(())
    }
}
