//! A vhost-user front-end's part of taking a device process into service, message by message, for tests
//! only: so that a test can end the process between any two of them. And what such tests are
//! told from outside: BULKHEAD_TAKEOVERS makes them longer, BULKHEAD_SEED makes them others, and
//! BULKHEAD_CHAOS has them print what they do.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::DriverRing;
use crate::memory::Memory;

/// One queue as the driver has it.
pub struct Vq {
    /// The ring.
    pub ring: DriverRing,
    /// What the driver rings.
    pub kick: EventFd,
    /// What the device rings.
    pub call: EventFd,
    /// What the device rings when the ring is malformed.
    pub err: EventFd,
}

impl Vq {
    /// A queue whose ring of `size` descriptors lies at guest address `base`.
    pub fn new(memory: &Arc<Memory>, base: u64, size: u16) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            ring: DriverRing::new(Arc::clone(memory), base, size),
            kick: event(),
            call: event(),
            err: event(),
        }
    }
}

/// An eventfd, to be polled.
pub fn fd(event: &EventFd) -> BorrowedFd<'_> {
    #[allow(unsafe_code)]
    // SAFETY: the eventfd is open as long as it is borrowed.
    unsafe {
        BorrowedFd::borrow_raw(event.as_raw_fd())
    }
}

/// Messages of a front-end before it says anything about memory or rings: SET_OWNER,
/// GET_FEATURES, SET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES.
pub const GREETINGS: usize = 5;

/// Says these messages, and what of the offered features was taken: what `choose` made of them.
pub fn negotiate(stream: UnixStream, queues: u16, choose: impl Fn(u64) -> u64) -> (Frontend, u64) {
    greet(stream, queues, choose, GREETINGS)
}

/// Says the first `count` of them.
pub fn greet(
    stream: UnixStream,
    queues: u16,
    choose: impl Fn(u64) -> u64,
    count: usize,
) -> (Frontend, u64) {
    let mut f = Frontend::from_stream(stream, u64::from(queues));
    let (mut features, mut protocol) = (0, VhostUserProtocolFeatures::empty());
    let needed = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    for message in 0..count {
        match message {
            0 => f.set_owner().unwrap(),
            1 => features = choose(f.get_features().unwrap()),
            2 => f.set_features(features).unwrap(),
            3 => {
                protocol = f.get_protocol_features().unwrap();
                assert!(protocol.contains(needed));
            }
            _ => f.set_protocol_features(protocol).unwrap(),
        }
    }
    f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    (f, features)
}

/// The region in which the device keeps what outlives its process.
pub type Region = Option<(VhostUserInflight, File)>;

/// A message of the setup: what it is about, and for which queue.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// The back-end's own channel.
    Channel,
    /// The region of requests in flight.
    Inflight,
    /// The memory table.
    Memory,
    /// A ring's size.
    Num(usize),
    /// Where a ring begins.
    Base(usize),
    /// Where a ring lies.
    Addr(usize),
    /// A ring's interrupt.
    Call(usize),
    /// A ring's complaint.
    Err(usize),
    /// A ring's doorbell.
    Kick(usize),
    /// A ring may be served.
    Enable(usize),
}

/// All messages of a setup of so many queues, in their order.
pub fn steps(queues: u16) -> Vec<Step> {
    let mut all = vec![Step::Channel, Step::Inflight, Step::Memory];
    for q in 0..usize::from(queues) {
        all.extend([
            Step::Num(q),
            Step::Base(q),
            Step::Addr(q),
            Step::Call(q),
            Step::Err(q),
            Step::Kick(q),
            Step::Enable(q),
        ]);
    }
    all
}

impl Step {
    /// Says it to the back-end. A region is asked for where there is none yet.
    pub fn say(
        self,
        f: &mut Frontend,
        memory: &VhostUserMemoryRegionInfo,
        region: &mut Region,
        queues: &[Vq],
    ) {
        let at = |q: usize| queues.get(q).unwrap();
        match self {
            Self::Channel => {
                let (_ours, theirs) = UnixStream::pair().unwrap();
                f.set_backend_request_fd(&theirs).unwrap();
            }
            Self::Inflight => {
                let (region, file) = region.get_or_insert_with(|| {
                    let count = u16::try_from(queues.len()).unwrap();
                    let wanted = VhostUserInflight::new(0, 0, count, at(0).ring.size());
                    f.get_inflight_fd(&wanted).unwrap()
                });
                f.set_inflight_fd(region, file.as_raw_fd()).unwrap();
            }
            Self::Memory => drop(f.set_mem_table(&[*memory]).unwrap()),
            Self::Num(q) => f.set_vring_num(q, at(q).ring.size()).unwrap(),
            // All that a front-end can know after a crash.
            Self::Base(q) => f.set_vring_base(q, at(q).ring.used_idx()).unwrap(),
            Self::Addr(q) => {
                let ring = &at(q).ring;
                let l = ring.layout();
                let config = VringConfigData {
                    queue_max_size: ring.size(),
                    queue_size: ring.size(),
                    flags: 0,
                    desc_table_addr: l.desc,
                    used_ring_addr: l.used,
                    avail_ring_addr: l.avail,
                    log_addr: None,
                };
                f.set_vring_addr(q, &config).unwrap();
            }
            Self::Call(q) => f.set_vring_call(q, &at(q).call).unwrap(),
            Self::Err(q) => f.set_vring_err(q, &at(q).err).unwrap(),
            Self::Kick(q) => f.set_vring_kick(q, &at(q).kick).unwrap(),
            Self::Enable(q) => f.set_vring_enable(q, true).unwrap(),
        }
    }
}

/// One message of a driver's reset of all rings: each is disabled, and says where it has
/// stopped. There are twice as many as queues.
pub fn say_reset(f: &mut Frontend, step: usize) {
    match step % 2 {
        0 => f.set_vring_enable(step / 2, false).unwrap(),
        _ => drop(f.get_vring_base(step / 2).unwrap()),
    }
}

/// A small generator of numbers; the same ones each time.
pub struct Numbers(u64);

impl Numbers {
    /// Numbers for one test, others with another seed.
    pub fn seeded(own: u64) -> Self {
        let seed = std::env::var("BULKHEAD_SEED").ok();
        let seed: u64 = seed.and_then(|s| s.parse().ok()).unwrap_or(0);
        Self((own ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).max(1))
    }

    /// The next number, less than `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// How often a process is to be killed at a random moment, unless BULKHEAD_TAKEOVERS says.
pub fn takeovers(default: u64) -> u64 {
    std::env::var("BULKHEAD_TAKEOVERS")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// Says what is injected, for whoever asked for that.
pub fn inject(what: impl FnOnce() -> String) {
    if std::env::var_os("BULKHEAD_CHAOS").is_some() {
        eprintln!("{}", what());
    }
}
