//! The network device as the runtime sees it. Called by the main thread.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{NetState, NetUpdate, StatsResponse, UpdateRequest, update_request};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_runtime::device::{Device, Update, Worker};
use bulkhead_runtime::inflight::KeptMemory;
use bulkhead_runtime::limit::{Limiter, Rate};
use bulkhead_runtime::mailbox::{Signals, WorkerPort};

use crate::features;
use crate::kept;
use crate::kernel::Kernel;
use crate::pair::Pair;
use crate::state::{Limits, State};
use crate::vhost_ioctl::VhostNet;
use crate::{engine_plain, engine_uring};

/// Which engine moves the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    IoUring,
    /// read and write.
    Plain,
    /// vhost-net.
    Kernel,
}

/// One network device with its pairs.
pub struct Net {
    state: Arc<State>,
    engine: EngineKind,
    /// The kernel's end of each pair that has no thread yet.
    kernel: Mutex<VecDeque<VhostNet>>,
    wakeups: Mutex<Vec<Signals>>,
    wakeups_given: AtomicBool,
}

impl Net {
    /// A device in this state. With [`EngineKind::Kernel`], there is one of `kernel` for each
    /// pair.
    pub fn new(state: State, engine: EngineKind, kernel: Vec<VhostNet>) -> Self {
        Self {
            state: Arc::new(state),
            engine,
            kernel: Mutex::new(kernel.into()),
            wakeups: Mutex::default(),
            wakeups_given: AtomicBool::new(false),
        }
    }

    fn pairs(&self) -> u16 {
        self.state.traits().pairs
    }

    fn thread(&self, ports: Vec<WorkerPort>) -> io::Result<Worker> {
        let first = ports.first().ok_or(io::ErrorKind::InvalidInput)?;
        let number = usize::from(first.index() / 2);
        {
            let mut wakeups = self.wakeups.lock().unwrap_or_else(PoisonError::into_inner);
            wakeups.push(first.signals());
            // The control queue's thread comes last.
            if number >= usize::from(self.pairs())
                && !self.wakeups_given.swap(true, Ordering::Relaxed)
            {
                self.state.set_wakeups(std::mem::take(&mut wakeups));
            }
        }
        let state = Arc::clone(&self.state);
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = kernel.pop_front().map(Kernel::new).transpose()?;
        Ok(match self.engine {
            EngineKind::IoUring => Box::new(move |prepared| {
                match engine_uring::Engine::new(Pair::new(number, ports, state)) {
                    Ok(engine) => {
                        prepared.ready();
                        engine.run()
                    }
                    Err(why) => prepared.failed(why),
                }
            }),
            EngineKind::Plain | EngineKind::Kernel => Box::new(move |prepared| {
                let pair = Pair::new(number, ports, state).with_kernel(kernel);
                let engine = engine_plain::Engine::new(pair);
                prepared.ready();
                engine.run()
            }),
        })
    }

    fn update_net(&self, request: &NetUpdate) -> Result<Update, RpcStatus> {
        let to_guest = limits("to_guest", &request.to_guest)?;
        let from_guest = limits("from_guest", &request.from_guest)?;
        for (what, limits) in [("to_guest", to_guest), ("from_guest", from_guest)] {
            if self.state.traits().kernel && limits.is_some_and(|l| l != Limits::default()) {
                return Err(RpcStatus::invalid_argument(format!(
                    "{what}: the kernel moves the frames (vhost-net) and knows no limits: give backend=user"
                )));
            }
        }
        let link = match request.link.enum_value() {
            Ok(Link::UNCHANGED) => None,
            Ok(Link::UP) => Some(true),
            Ok(Link::DOWN) => Some(false),
            Err(n) => {
                return Err(RpcStatus::invalid_argument(format!(
                    "link: there is no state {n}"
                )));
            }
        };
        if link == Some(true) && self.state.look_at_tap() {
            return Err(RpcStatus::failed_precondition(format!(
                "link: tap {} was deleted: remove-device and add-net bring it back",
                self.state.tap().name()
            )));
        }
        if let Some(limits) = to_guest {
            State::limit(&self.state.to_guest, limits);
        }
        if let Some(limits) = from_guest {
            State::limit(&self.state.from_guest, limits);
        }
        Ok(Update {
            config_changed: link.is_some_and(|up| self.state.set_link(up)),
        })
    }
}

/// Limits in force, as a message.
fn told(limiter: &Limiter) -> NetLimits {
    let (bytes, packets) = limiter.rates();
    let bucket = |rate: Option<Rate>| {
        let mut bucket = TokenBucket::new();
        (bucket.per_second, bucket.burst) = rate.map(|r| (r.per_second(), r.burst()))?;
        Some(bucket)
    };
    let mut limits = NetLimits::new();
    limits.bytes = bucket(bytes).into();
    limits.packets = bucket(packets).into();
    limits
}

fn limits(what: &str, limits: &MessageField<NetLimits>) -> Result<Option<Limits>, RpcStatus> {
    let Some(limits) = limits.as_ref() else {
        return Ok(None);
    };
    Ok(Some(Limits {
        bytes: Rate::from_message(&format!("{what}.bytes"), limits.bytes.as_ref())?,
        packets: Rate::from_message(&format!("{what}.packets"), limits.packets.as_ref())?,
    }))
}

impl Device for Net {
    fn kind(&self) -> &'static str {
        "net"
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn io_engine(&self) -> &'static str {
        match self.engine {
            EngineKind::IoUring => "io_uring",
            EngineKind::Plain => "read/write",
            EngineKind::Kernel => "vhost-net",
        }
    }

    fn features(&self) -> u64 {
        features::offered(self.state.traits())
    }

    fn queues(&self) -> u16 {
        self.pairs().saturating_mul(2).saturating_add(1)
    }

    fn config(&self) -> Vec<u8> {
        self.state.config()
    }

    fn kept_bytes(&self) -> u64 {
        kept::BYTES
    }

    fn keep(&self, memory: KeptMemory) -> Result<(), String> {
        self.state.keep(memory);
        Ok(())
    }

    fn let_go(&self) {
        self.state.let_go();
    }

    fn accepted(&self, features: u64) {
        self.state.accept(features);
    }

    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        match &request.kind {
            Some(update_request::Kind::Net(update)) => self.update_net(update),
            _ => Err(RpcStatus::invalid_argument(
                "kind: this is a network device",
            )),
        }
    }

    fn take_changed(&self) -> bool {
        self.state.watch();
        self.state.take_changed()
    }

    fn host_gone(&self) -> bool {
        self.state.is_tap_gone()
    }

    fn resumed(&self) {
        self.state.set_tap_again();
    }

    fn stats(&self, stats: &mut StatsResponse) {
        let filter = self.state.filter();
        let macs = |table: &[crate::filter::Mac]| table.iter().map(|m| m.to_vec()).collect();
        let mut net = NetState::new();
        net.link_up = self.state.is_link_up();
        net.queue_pairs = u32::from(self.state.pairs());
        net.mac = filter.mac.to_vec();
        net.promiscuous = filter.promiscuous || filter.unicast.is_overflown();
        net.all_multicast = filter.all_multicast || filter.multicast.is_overflown();
        net.unicast_filter = macs(filter.unicast.entries());
        net.multicast_filter = macs(filter.multicast.entries());
        net.vlan_filter = filter.vlans().map(u32::from).collect();
        net.datapath = match self.engine {
            EngineKind::Kernel => "vhost-net".into(),
            EngineKind::IoUring | EngineKind::Plain => "tap".into(),
        };
        net.to_guest = MessageField::some(told(&self.state.to_guest));
        net.from_guest = MessageField::some(told(&self.state.from_guest));
        stats.net = MessageField::some(net);
        if self.engine == EngineKind::Kernel {
            // Its own rings, and of the kernel's none: nobody counts by ring.
            let control = match self.state.features() & features::F_MQ {
                0 => 2,
                _ => self.pairs().saturating_mul(2),
            };
            stats
                .queues
                .retain(|queue| queue.index == u32::from(control));
        }
    }

    fn worker(&self, port: WorkerPort) -> io::Result<Worker> {
        self.thread(vec![port])
    }

    fn sharing(&self, queue: u16) -> u16 {
        if queue < self.pairs().saturating_mul(2) {
            2
        } else {
            1
        }
    }

    fn shared_worker(&self, ports: Vec<WorkerPort>) -> io::Result<Worker> {
        self.thread(ports)
    }
}
