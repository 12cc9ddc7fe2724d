//! A worker on a thread, with a driver on one side and the VMM played on the other.

use std::sync::atomic::Ordering;

use bulkhead_proto::device::finish_request_request::Outcome;
use bulkhead_proto::device::{FinishRequestRequest, mem_request::Kind};
use bulkhead_runtime::driver::{Desc, DriverRing, NEXT, WRITE, guest};
use bulkhead_runtime::mailbox::{Answer, Order, WorkerHandle, mailbox};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::worker_bed;
use proptest::prelude::*;

use super::*;
use crate::request::{REQUEST, RESPONSE};
use crate::state::{Area, State};

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x1_0000;
const RING: u16 = 16;
const REQUESTS: u64 = GPA + 0x4000;
const RESPONSES: u64 = GPA + 0x8000;
const START: u64 = 4 << 30;
const BLOCK: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

struct Bed {
    handle: WorkerHandle,
    desk: Arc<Desk>,
    bell: Arc<File>,
    err: Arc<File>,
    kick: Arc<File>,
    memory: Arc<Memory>,
    ring: DriverRing,
    next: u16,
}

impl Bed {
    fn new() -> Self {
        let (_, memory) = guest(GPA, RAM).unwrap();
        let mut ring = DriverRing::new(Arc::clone(&memory), GPA, RING);
        ring.reset();
        let (handle, port) = mailbox(0).unwrap();
        let state = State::new(Area::new(START, 16 * BLOCK, BLOCK).unwrap());
        let desk = Arc::new(Desk::new(state));
        let event = || Arc::new(sys::eventfd().unwrap());
        let (bell, err, kick) = (event(), event(), event());
        let worker = Worker::new(port, Arc::clone(&desk), Arc::clone(&bell));
        std::thread::spawn(move || worker.run());
        let bed = Self {
            handle,
            desk,
            bell,
            err,
            kick,
            memory,
            ring,
            next: 0,
        };
        assert_eq!(bed.start(0), Answer::Done);
        bed
    }

    fn start(&self, base: u16) -> Answer {
        let start = worker_bed::start(&self.memory, &self.ring, base, &self.kick, &self.err);
        self.order(start)
    }

    fn order(&self, order: Order) -> Answer {
        worker_bed::order(&self.handle, order)
    }

    /// Offers a request; its number.
    fn offer(&mut self, bytes: &[u8], room: u32) -> u64 {
        let slot = self.next % (RING / 2);
        self.next = self.next.wrapping_add(1);
        let (from, to) = (
            REQUESTS + 64 * u64::from(slot),
            RESPONSES + 64 * u64::from(slot),
        );
        assert!(self.memory.write(from, bytes) && self.memory.write(to, &[0xee; RESPONSE]));
        let head = slot * 2;
        let desc = |addr, len, flags, next| Desc {
            addr,
            len,
            flags,
            next,
        };
        self.ring
            .desc(head, desc(from, bytes.len() as u32, NEXT, head + 1));
        self.ring.desc(head + 1, desc(to, room, WRITE, 0));
        self.ring.offer(head);
        sys::signal(&self.kick);
        u64::from(slot)
    }

    fn request(&mut self, kind: u16, address: u64, count: u16) -> u64 {
        let mut bytes = [0; REQUEST];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        self.offer(&bytes, RESPONSE as u32)
    }

    /// The completion that comes next: code and state.
    fn completed(&mut self, slot: u64) -> (u8, u8) {
        let (head, written) = worker_bed::completion(&mut self.ring);
        assert_eq!((u64::from(head), written), (2 * slot, RESPONSE as u32));
        let mut bytes = [0; RESPONSE];
        assert!(self.memory.read(RESPONSES + 64 * slot, &mut bytes));
        (bytes[0], bytes[8])
    }

    /// It comes to say that it waits for the VMM, or not.
    fn waits(&self, wanted: bool) {
        let begun = Instant::now();
        while self.handle.status().waits_for_host.load(Ordering::Relaxed) != wanted {
            assert!(begun.elapsed() < PATIENCE, "it waits: {}", !wanted);
            std::thread::yield_now();
        }
    }

    /// What is wanted of the VMM, once it is.
    fn wanted(&self) -> (u64, Kind, u64, u64) {
        assert!(sys::wait_readable(&*self.bell, 20_000).unwrap(), "no bell");
        sys::drain(&self.bell);
        let taken = self.desk.take();
        let mem = taken.mem();
        (taken.id, mem.kind.unwrap(), mem.first, mem.count)
    }

    fn finish(&self, id: u64, outcome: Outcome) {
        let mut request = FinishRequestRequest::new();
        (request.id, request.outcome) = (id, outcome.into());
        self.desk.finish(&request).unwrap();
        self.handle.refresh();
    }
}

#[test]
fn a_guest_has_its_answer_when_the_vmm_has_given_one() {
    let mut bed = Bed::new();
    let plug = bed.request(0, START, 4);
    assert_eq!(bed.wanted(), (1, Kind::PLUG, 0, 4));
    assert!(bed.ring.take_used().is_none());
    // Another request, and a kick, change nothing.
    let state = bed.request(3, START + 3 * BLOCK, 2);
    std::thread::sleep(Duration::from_millis(20));
    bed.waits(true);
    assert!(bed.ring.take_used().is_none() && bed.desk.take().id == 1);
    bed.finish(1, Outcome::ACK);
    assert_eq!(bed.completed(plug), (0, 0));
    assert_eq!(bed.completed(state), (0, 2), "mixed");
    bed.waits(false);
    let unplug = bed.request(1, START, 1);
    assert_eq!(bed.wanted(), (2, Kind::UNPLUG, 0, 1));
    bed.finish(2, Outcome::BUSY);
    assert_eq!(bed.completed(unplug), (2, 0));
    let all = bed.request(2, 77, 99);
    assert_eq!(bed.wanted(), (3, Kind::UNPLUG_ALL, 0, 0));
    bed.finish(3, Outcome::ACK);
    assert_eq!(bed.completed(all), (0, 0));
    let state = bed.request(3, START, 16);
    assert_eq!(bed.completed(state), (0, 1), "unplugged");
}

#[test]
fn nonsense_is_answered_without_the_vmm() {
    let mut bed = Bed::new();
    for (kind, address, count) in [
        (0, START + 1, 1),
        (0, START - BLOCK, 1),
        (1, START, 17),
        (1, START, 0),
        (3, u64::MAX, 1),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        let slot = bed.request(kind, address, count);
        assert_eq!(bed.completed(slot), (3, 0), "{kind} {address:#x} {count}");
    }
    assert_eq!(bed.desk.take().id, 0);
    assert_eq!(bed.handle.status().errors.get(), 7);
}

#[test]
fn memory_changes_and_the_ring_stops_while_the_vmm_is_at_a_request() {
    let mut bed = Bed::new();
    let plug = bed.request(0, START, 4);
    assert_eq!(bed.wanted().0, 1);
    let same = Arc::new(bed.memory.as_ref().clone());
    assert_eq!(bed.order(Order::Memory(same)), Answer::Done);
    // It looks at the request once more after an order.
    bed.waits(true);
    assert_eq!(bed.handle.status().in_flight.get(), 0);
    let stopped = Answer::Stopped {
        next_avail: Some(0),
    };
    assert_eq!(bed.order(Order::Stop), stopped);
    // The VMM comes to its end with it; the next driver's worker asks anew.
    bed.finish(1, Outcome::ACK);
    assert_eq!(bed.start(0), Answer::Done);
    assert_eq!(bed.wanted(), (2, Kind::PLUG, 0, 4));
    bed.finish(2, Outcome::ACK);
    assert_eq!(bed.completed(plug), (0, 0));
}

#[test]
fn what_is_no_request_breaks_the_ring_and_nothing_else() {
    for (len, room) in [
        (REQUEST - 1, RESPONSE as u32),
        (REQUEST, RESPONSE as u32 - 1),
    ] {
        let mut bed = Bed::new();
        bed.offer(&[0; REQUEST][..len], room);
        assert!(sys::wait_readable(&*bed.err, 20_000).unwrap());
        assert!(bed.handle.status().broken.load(Ordering::Relaxed));
        assert!(bed.ring.take_used().is_none());
        assert!(matches!(bed.order(Order::Stop), Answer::Stopped { .. }));
        bed.ring.reset();
        assert_eq!(bed.start(0), Answer::Done);
        let slot = bed.request(3, START, 1);
        assert_eq!(bed.completed(slot), (0, 1));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn every_request_has_one_answer(
        requests in prop::collection::vec((0u16..5, (0u64..20).prop_map(|n| START + n * BLOCK), 0u16..20, any::<bool>()), 1..12),
    ) {
        let mut bed = Bed::new();
        for (kind, address, count, grant) in requests {
            let slot = bed.request(kind, address, count);
            let begun = Instant::now();
            while bed.ring.used_idx() != bed.next {
                if bed.desk.asks() {
                    let outcome = if grant { Outcome::ACK } else { Outcome::NACK };
                    bed.finish(bed.desk.take().id, outcome);
                }
                prop_assert!(begun.elapsed() < PATIENCE);
                std::thread::yield_now();
            }
            let (code, _) = bed.completed(slot);
            let within = count > 0 && address + u64::from(count) * BLOCK <= START + 16 * BLOCK;
            let wanted = match (kind, within) {
                (2, _) | (0 | 1, true) => if grant { 0 } else { 1 },
                (3, true) => 0,
                _ => 3,
            };
            prop_assert_eq!(code, wanted);
        }
    }
}
