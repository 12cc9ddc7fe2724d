//! For tests: a device kind made for the purpose, a runtime that serves it in a thread of the
//! test's process, unconfined, and a guest with a front-end to drive it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_proto::device::{
    BlkUpdate, DrainRequest, DrainResponse, HealthRequest, HealthResponse, ShutdownRequest,
    ShutdownResponse, UpdateRequest, UpdateResponse,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, ClientError, DEVICE_SERVICE, RpcStatus};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::super::{ServeError, run, start_workers};
use crate::active::ActiveRing;
use crate::backend::Backend;
use crate::chain::Chain;
use crate::control::{ConfinementReport, Control};
use crate::device::{Device, F_EVENT_IDX, F_PROTOCOL_FEATURES, F_VERSION_1, Update, Worker};
use crate::driver::{Desc, DriverRing, USER_BASE, WRITE, guest};
use crate::inflight::InflightFile;
use crate::link::Link;
use crate::mailbox::{Answer, Order, WorkerHandle, WorkerPort};
use crate::memory::Memory;
use crate::sys::{self, PollFd};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const GPA: u64 = 0x10_0000;
pub(super) const RAM: u64 = 0x1_0000;
pub(super) const SIZE: u16 = 8;
pub(super) const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL_FEATURES;

pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the test and the workers of a device share.
#[derive(Default)]
pub(super) struct Knobs {
    /// Requests are completed; otherwise they stay in flight.
    pub(super) completes: AtomicBool,
    /// Workers end where they are, as if the process had been killed; how many did.
    pub(super) killed: AtomicBool,
    pub(super) dead: AtomicU64,
    pub(super) accepted: Mutex<Vec<u64>>,
    pub(super) size: AtomicU64,
    /// Refreshes that workers have seen.
    pub(super) refreshed: AtomicU64,
    /// Take the fence and hold it here, as a ring would.
    pub(super) fences: Mutex<Vec<OwnedFd>>,
    pub(super) takes_fence: bool,
}

/// A device kind that completes every request with 1 byte written, when it is let.
struct Echo {
    queues: u16,
    knobs: Arc<Knobs>,
}

impl Device for Echo {
    fn kind(&self) -> &'static str {
        "echo"
    }
    fn version(&self) -> &'static str {
        "1"
    }
    fn io_engine(&self) -> &'static str {
        "none"
    }
    fn features(&self) -> u64 {
        1
    }
    fn queues(&self) -> u16 {
        self.queues
    }
    fn config(&self) -> Vec<u8> {
        self.knobs.size.load(Ordering::Relaxed).to_le_bytes().into()
    }
    fn accepted(&self, features: u64) {
        self.knobs.accepted.lock().unwrap().push(features);
    }
    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        if !request.has_blk() {
            return Err(RpcStatus::invalid_argument("kind: must be blk"));
        }
        let size = request.blk().size_bytes;
        let old = self.knobs.size.swap(size, Ordering::Relaxed);
        Ok(Update {
            config_changed: old != size,
        })
    }
    fn worker(&self, mut port: WorkerPort) -> std::io::Result<Worker> {
        let knobs = Arc::clone(&self.knobs);
        Ok(Box::new(move |prepared| {
            if knobs.takes_fence
                && let Some(fence) = port.take_fence()
            {
                knobs.fences.lock().unwrap().push(fence);
            }
            prepared.ready();
            EchoWorker {
                port,
                knobs,
                ring: None,
                in_flight: Vec::new(),
                draining: None,
            }
            .run();
        }))
    }
}

struct EchoWorker {
    port: WorkerPort,
    knobs: Arc<Knobs>,
    ring: Option<ActiveRing>,
    in_flight: Vec<u16>,
    draining: Option<Order>,
}

impl EchoWorker {
    fn run(mut self) {
        let mut chain = Chain::new();
        loop {
            if self.knobs.killed.load(Ordering::Relaxed) {
                self.knobs.dead.fetch_add(1, Ordering::Relaxed);
                std::mem::forget(self);
                return;
            }
            self.serve(&mut chain);
            self.finish_draining();
            let kick = self.ring.as_ref().map(|r| Arc::clone(r.kick()));
            let mut fds = [
                PollFd::new(self.port.wakeup().as_fd(), libc::POLLIN),
                kick.as_ref()
                    .map_or_else(PollFd::none, |k| PollFd::new(k.as_fd(), libc::POLLIN)),
            ];
            // The knobs are looked at every now and then, too.
            sys::poll(&mut fds, 5).unwrap();
            let [ordered, kicked] = fds;
            if kicked.revents() != 0
                && let Some(kick) = kick
            {
                sys::drain(&kick);
            }
            if ordered.revents() != 0 {
                if let Some(order) = self.port.take() {
                    self.obey(order);
                }
                if self.port.take_refresh() {
                    self.knobs.refreshed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn serve(&mut self, chain: &mut Chain) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        loop {
            while self.draining.is_none()
                && let Some(head) = ring.pop(chain)
            {
                self.in_flight.push(head);
            }
            if self.knobs.completes.load(Ordering::Relaxed) {
                for head in self.in_flight.drain(..) {
                    ring.complete(head, 1);
                    self.port.status().requests.add(1);
                    self.port.status().record_latency(Duration::from_micros(5));
                }
            }
            ring.flush();
            if self.draining.is_some() || !ring.enable_kicks() {
                return;
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(setup) => {
                let started = ActiveRing::start(*setup, self.port.index(), self.port.status());
                self.port.answer(match started {
                    Ok(ring) => {
                        self.ring = Some(ring);
                        Answer::Done
                    }
                    Err(why) => Answer::Refused(why.to_string()),
                });
            }
            Order::Stop | Order::Memory(_) => self.draining = Some(order),
            Order::Call(call) => {
                if let Some(ring) = &mut self.ring {
                    ring.set_call(call);
                }
                self.port.answer(Answer::Done);
            }
            Order::Err(err) => {
                if let Some(ring) = &mut self.ring {
                    ring.set_err(err);
                }
                self.port.answer(Answer::Done);
            }
        }
    }

    fn finish_draining(&mut self) {
        if !self.in_flight.is_empty() {
            return;
        }
        match self.draining.take() {
            None => {}
            Some(Order::Memory(memory)) => {
                if let Some(ring) = &mut self.ring {
                    ring.swap_memory(memory).unwrap();
                }
                self.port.answer(Answer::Done);
            }
            Some(_) => self.port.answer(Answer::Stopped {
                next_avail: self.ring.take().map(ActiveRing::stop),
            }),
        }
    }
}

/// A runtime in a thread of this process.
pub(super) struct Runtime {
    pub(super) knobs: Arc<Knobs>,
    pub(super) control: BlockingClient,
    pub(super) main: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Runtime {
    pub(super) fn start(queues: u16) -> (Self, UnixStream) {
        let knobs = Knobs {
            completes: AtomicBool::new(true),
            ..Knobs::default()
        };
        Self::start_with(queues, knobs, None)
    }

    pub(super) fn start_with(
        queues: u16,
        knobs: Knobs,
        fence: Option<OwnedFd>,
    ) -> (Self, UnixStream) {
        let (control, control_theirs) = UnixStream::pair().unwrap();
        let (vhost, vhost_theirs) = UnixStream::pair().unwrap();
        let knobs = Arc::new(knobs);
        let device: Arc<dyn Device> = Arc::new(Echo {
            queues,
            knobs: Arc::clone(&knobs),
        });
        let inflight = InflightFile::new(crate::inflight::Capacity { queues, kept: 0 }).unwrap();
        let workers = start_workers(&device, fence.as_ref()).unwrap();
        drop(fence);
        let signals = workers.iter().map(WorkerHandle::signals).collect();
        let control_theirs = Some(control_theirs.into());
        let report = ConfinementReport::default();
        let control_theirs = Control::new(control_theirs, Arc::clone(&device), signals, report);
        let backend = Backend::new(device, workers, control_theirs, inflight);
        let main = std::thread::spawn(move || {
            let backend = Arc::new(Mutex::new(backend));
            let link = Link::new(vhost_theirs, Arc::clone(&backend));
            let ended = run(&backend, Some(link), None);
            assert!(backend.lock().unwrap().disconnect());
            ended
        });
        let client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let runtime = Self {
            knobs,
            control: client,
            main: Some(main),
        };
        (runtime, vhost)
    }

    pub(super) fn call<Req: Message, Resp: Message>(
        &mut self,
        method: &str,
        request: &Req,
    ) -> Resp {
        self.try_call(method, request).unwrap()
    }

    pub(super) fn try_call<Req: Message, Resp: Message>(
        &mut self,
        method: &str,
        request: &Req,
    ) -> Result<Resp, ClientError> {
        self.control.call(DEVICE_SERVICE, method, request, PATIENCE)
    }

    pub(super) fn resize(&mut self, bytes: u64) {
        let mut blk = BlkUpdate::new();
        blk.size_bytes = bytes;
        let mut request = UpdateRequest::new();
        request.set_blk(blk);
        let _: UpdateResponse = self.call("Update", &request);
    }

    pub(super) fn drain(&mut self) -> bool {
        let reply: DrainResponse = self.call("Drain", &DrainRequest::new());
        reply.drained
    }

    pub(super) fn health(&mut self) -> HealthResponse {
        self.call("Health", &HealthRequest::new())
    }

    pub(super) fn shut_down(mut self) {
        let _: ShutdownResponse = self.call("Shutdown", &ShutdownRequest::new());
        self.main.take().unwrap().join().unwrap().unwrap();
    }

    /// Why it ended by itself.
    pub(super) fn end(mut self) -> Result<(), ServeError> {
        self.main.take().unwrap().join().unwrap()
    }
}

/// A guest's memory, and a driver's rings in it.
pub(super) struct Guest {
    pub(super) memory: Arc<Memory>,
    pub(super) file: File,
    pub(super) rings: Vec<DriverRing>,
    pub(super) kicks: Vec<File>,
    pub(super) calls: Vec<File>,
    pub(super) errs: Vec<File>,
}

impl Guest {
    pub(super) fn new(queues: u16) -> Self {
        let (file, memory) = guest(GPA, RAM).unwrap();
        let eventfds = || (0..queues).map(|_| sys::eventfd().unwrap()).collect();
        let mut rings: Vec<DriverRing> = (0..u64::from(queues))
            .map(|i| DriverRing::new(Arc::clone(&memory), GPA + 0x1000 * i, SIZE))
            .collect();
        rings.iter_mut().for_each(reset);
        Self {
            memory,
            file,
            rings,
            kicks: eventfds(),
            calls: eventfds(),
            errs: eventfds(),
        }
    }

    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        self.rings[queue].offer(head);
        sys::signal(&self.kicks[queue]);
    }

    pub(super) fn completed(&mut self, queue: usize) -> u32 {
        let mut head = None;
        wait_for("a completion", || {
            head = self.rings[queue].take_used();
            head.is_some()
        });
        head.unwrap().0
    }

    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: RAM,
            userspace_addr: USER_BASE + GPA,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// A front-end by the `vhost` crate, up to but without memory and rings.
pub(super) fn front_end(socket: UnixStream, queues: u16) -> Frontend {
    let mut f = Frontend::from_stream(socket, u64::from(queues));
    f.set_owner().unwrap();
    f.get_features().unwrap();
    f.set_features(FEATURES).unwrap();
    let protocol = f.get_protocol_features().unwrap();
    f.set_protocol_features(protocol).unwrap();
    f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    f
}

pub(super) fn start_ring(f: &mut Frontend, guest: &Guest, index: usize, base: u16) {
    let layout = guest.rings[index].layout();
    f.set_vring_num(index, SIZE).unwrap();
    f.set_vring_base(index, base).unwrap();
    let config = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: layout.desc,
        used_ring_addr: layout.used,
        avail_ring_addr: layout.avail,
        log_addr: None,
    };
    f.set_vring_addr(index, &config).unwrap();
    let event = |file: &File| {
        let copy = file.try_clone().unwrap().into_raw_fd();
        #[allow(unsafe_code)]
        // SAFETY: the descriptor is a fresh copy that nobody else owns.
        unsafe {
            EventFd::from_raw_fd(copy)
        }
    };
    f.set_vring_call(index, &event(&guest.calls[index]))
        .unwrap();
    f.set_vring_err(index, &event(&guest.errs[index])).unwrap();
    f.set_vring_kick(index, &event(&guest.kicks[index]))
        .unwrap();
    f.set_vring_enable(index, true).unwrap();
}

pub(super) fn started(f: &mut Frontend, queues: u16) -> Guest {
    let guest = Guest::new(queues);
    f.set_mem_table(&[guest.region()]).unwrap();
    for i in 0..usize::from(queues) {
        start_ring(f, &guest, i, 0);
    }
    guest
}

/// A new ring, with a buffer of one byte at each descriptor.
pub(super) fn reset(ring: &mut DriverRing) {
    ring.reset();
    for head in 0..SIZE {
        ring.desc(
            head,
            Desc {
                addr: GPA + 0x8000,
                len: 1,
                flags: WRITE,
                next: 0,
            },
        );
    }
}

pub(super) fn fired(eventfd: &File) -> bool {
    let mut count = [0; 8];
    matches!(std::io::Read::read(&mut &*eventfd, &mut count), Ok(8))
}
