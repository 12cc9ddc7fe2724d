//! The vhost-user back-end: what each message of the front-end does (vhost-user protocol,
//! "Front-end message types").
//!
//! Runs on the main thread only. A message that changes a ring becomes an order to the
//! queue's worker; the answer is waited for with a deadline, and the control channel is
//! served meanwhile.
//!
//! What a *guest* can get wrong (ring size, ring addresses) is accepted here and found
//! when the ring starts, so that it costs that ring and not the connection; what only a
//! *front-end* can get wrong ends the connection.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::backend_channel::BackendChannel;
use crate::clock;
use crate::device::{Device, F_EVENT_IDX, F_INDIRECT_DESC, F_PROTOCOL_FEATURES, offered_features};
use crate::inflight::{Capacity, InflightFile, InflightRegion};
use crate::link::Intercepted;
use crate::mailbox::{Answer, Order, RingSetup, WorkerHandle};
use crate::memory::{MAX_REGIONS, Memory, Region};
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

impl<M: Meanwhile> VhostUserBackendReqHandlerMut for Backend<M> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated; ambiguous in the specification, which lets it be ignored.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        if self.reset() {
            Ok(())
        } else {
            Err(refuse("queues did not drain"))
        }
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(offered_features(&self.device))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !offered_features(&self.device) != 0 {
            return Err(refuse("feature bits acknowledged that were not offered"));
        }
        if features != self.acked {
            // A front-end with several queue pairs (QEMU's vhost-user-net) says the same
            // once for each; only a change concerns rings that run.
            if !self.stop_all() {
                return Err(refuse("queue did not drain"));
            }
            self.accept(features);
        }
        for i in 0..self.rings.len() {
            self.apply(i)?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        if ctx.len() != files.len() {
            return Err(Error::IncorrectFds);
        }
        let mut regions = Vec::with_capacity(ctx.len());
        for (r, file) in ctx.iter().zip(&files) {
            regions.push(map(r, file)?);
        }
        self.set_memory(Memory::new(regions).map_err(refuse)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index as usize)?.layout.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let ring = self.ring(index as usize)?;
        ring.layout = RingLayout {
            size: ring.layout.size,
            desc: descriptor,
            avail: available,
            used,
        };
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| refuse("ring base beyond 16 bits"))?;
        self.ring(index as usize)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let i = index as usize;
        if self.ring(i)?.serving {
            self.stop(i)?;
        }
        let ring = self.ring(i)?;
        ring.kick = None;
        let base = ring.base;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.ok_or_else(|| refuse("kicks by polling are not supported; pass an eventfd"))?;
        if self.ring(i)?.serving {
            self.stop(i)?;
        }
        self.ring(i)?.kick = Some(Arc::new(fd));
        self.apply(i)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.map(Arc::new);
        let ring = self.ring(i)?;
        ring.call = fd.clone();
        if ring.serving {
            self.order(i, Order::Call(fd))?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.map(Arc::new);
        let ring = self.ring(i)?;
        ring.err = fd.clone();
        if ring.serving {
            self.order(i, Order::Err(fd))?;
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // The request handler remembers them too and refuses messages that need others.
        self.acked_protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let i = index as usize;
        self.ring(i)?.enabled = enable;
        self.apply(i)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The request handler has bounded offset and size by 256.
        let config = self.device.config();
        let mut out = vec![0; size as usize];
        for (to, from) in out.iter_mut().zip(config.iter().skip(offset as usize)) {
            *to = *from;
        }
        Ok(out)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // A driver's write that the device does not take is dropped, as the guest's
        // affair; it is no fault of the connection.
        if !self.device.write_config(offset, buf) {
            log::debug!("driver wrote read-only configuration space at {offset}");
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU here"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("answered without the handler"))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let region = InflightRegion::map(
            &file,
            inflight.mmap_size,
            inflight.mmap_offset,
            inflight.num_queues,
            inflight.queue_size,
            Capacity {
                queues: self.device.queues(),
                kept: self.device.kept_bytes(),
            },
        )
        .map_err(refuse)?;
        if self.rings.iter().all(|r| !r.serving)
            && let Some(kept) = region.kept()
        {
            let before = self.device.config();
            self.device.keep(kept).map_err(refuse)?;
            // What was kept may show in it: a size, a driver that is to announce itself.
            if self.device.config() != before {
                self.channel.config_changed();
            }
        }
        self.inflight = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let table = self.memory.with(map(region, &fd)?).map_err(refuse)?;
        self.set_memory(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table = self
            .memory
            .without(region.guest_phys_addr, region.user_addr, region.memory_size)
            .map_err(refuse)?;
        self.set_memory(table)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}

impl<M: Meanwhile> Intercepted for Backend<M> {
    fn enable_ring(&mut self, index: u32, enable: bool) -> Result<()> {
        self.set_vring_enable(index, enable)
    }

    fn set_backend_channel(&mut self, socket: OwnedFd) -> Result<()> {
        if !self
            .acked_protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            return Err(Error::InactiveOperation(
                VhostUserProtocolFeatures::BACKEND_REQ,
            ));
        }
        self.channel = BackendChannel::new(socket);
        Ok(())
    }

    fn offer_inflight(&mut self, queues: u16, queue_size: u16) -> Result<(u64, &File)> {
        let feature = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        if !self.acked_protocol.contains(feature) {
            return Err(Error::InactiveOperation(feature));
        }
        if self.rings.iter().any(|r| r.serving) {
            return Err(refuse(
                "a new in-flight region was asked for while rings run; stop them first",
            ));
        }
        self.inflight_file.offer(queues, queue_size).map_err(refuse)
    }

    fn acknowledges(&self) -> bool {
        self.acked_protocol
            .contains(VhostUserProtocolFeatures::REPLY_ACK)
    }
}

fn map(r: &VhostUserMemoryRegion, file: &File) -> Result<Region> {
    Region::map(
        file,
        r.guest_phys_addr,
        r.memory_size,
        r.user_addr,
        r.mmap_offset,
    )
    .map_err(refuse)
}
