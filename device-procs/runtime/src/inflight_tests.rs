//! Tests of the in-flight log: whenever a device process is killed, the next one does what
//! is left, in order, and nothing that is done; and a log that no device can have left is
//! refused. The random tests are seeded; BULKHEAD_FUZZ_CASES makes them longer.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::region_tests::region;
use super::*;
use crate::chain::Chain;
use crate::crash;
use crate::driver::{Desc, DriverRing, WRITE, guest};
use crate::ring::{Ring, RingError, RingFeatures};

const GPA: u64 = 0x10_0000;
const SIZE: u16 = 8;

/// A driver, its ring and the in-flight region: what outlives a device process.
struct World {
    memory: Arc<Memory>,
    driver: DriverRing,
    region: InflightRegion,
    features: RingFeatures,
    /// Offered and not seen in the used ring, in the order of offering.
    waiting: VecDeque<u16>,
    completed: u32,
}

impl World {
    fn new(features: RingFeatures) -> Self {
        let (_, memory) = guest(GPA, 0x1_0000).unwrap();
        let mut driver = DriverRing::new(Arc::clone(&memory), GPA, SIZE);
        driver.reset();
        for head in 0..SIZE {
            driver.desc(
                head,
                Desc {
                    addr: GPA + 0x8000,
                    len: 1,
                    flags: WRITE,
                    next: 0,
                },
            );
        }
        Self {
            memory,
            driver,
            region: region(1, SIZE),
            features,
            waiting: VecDeque::new(),
            completed: 0,
        }
    }

    fn log(&self) -> InflightRing {
        self.region.ring(0).unwrap()
    }

    /// Offers some head that is free.
    fn offer(&mut self, pick: u16) {
        let free: Vec<u16> = (0..SIZE).filter(|h| !self.waiting.contains(h)).collect();
        if let Some(head) = free.get(usize::from(pick) % free.len().max(1)) {
            self.driver.offer(*head);
            self.waiting.push_back(*head);
        }
    }

    /// Takes what the used ring shows: nothing that does not wait.
    fn reap(&mut self) {
        while let Some((head, len)) = self.driver.take_used() {
            let at = self.waiting.iter().position(|h| u32::from(*h) == head);
            let at = at.unwrap_or_else(|| panic!("descriptor {head} was completed twice"));
            self.waiting.remove(at);
            assert_eq!(len, 1);
            self.completed += 1;
        }
    }

    /// A process takes over. What the front-end says as base is right only if there is no
    /// log yet.
    fn take_over(&self) -> Ring {
        let fresh = self.log().load::<u16>(AT_VERSION).unwrap() == 0;
        let base = if fresh {
            self.driver.used_idx()
        } else {
            0xbeef
        };
        let layout = self.driver.layout();
        let mut ring = Ring::new(Arc::clone(&self.memory), layout, self.features, base).unwrap();
        assert_eq!(ring.keep_log(self.log()), Ok(!fresh));
        ring
    }
}

/// What happens, to the device's side or the driver's.
#[derive(Clone, Copy, Debug)]
enum Op {
    Offer(u16),
    Pop,
    Unpop,
    Complete(u16),
    Publish,
    EnableKicks,
    Reap,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..SIZE).prop_map(Op::Offer),
        3 => Just(Op::Pop),
        1 => Just(Op::Unpop),
        3 => any::<u16>().prop_map(Op::Complete),
        2 => Just(Op::Publish),
        1 => Just(Op::EnableKicks),
        2 => Just(Op::Reap),
    ]
}

/// One device process: its ring, and what it works on.
struct Process {
    ring: Ring,
    chain: Chain,
    in_flight: Vec<u16>,
    /// The last thing that it did was to pop.
    popping: bool,
}

impl Process {
    fn new(ring: Ring) -> Self {
        Self {
            ring,
            chain: Chain::new(),
            in_flight: Vec::new(),
            popping: false,
        }
    }

    fn act(&mut self, op: Op) {
        let popping = std::mem::take(&mut self.popping);
        match op {
            Op::Pop => {
                if let Some(head) = self.ring.pop(&mut self.chain).unwrap() {
                    self.in_flight.push(head);
                    self.popping = true;
                }
            }
            Op::Unpop => {
                if popping && let Some(head) = self.in_flight.pop() {
                    self.ring.unpop(head).unwrap();
                }
            }
            Op::Complete(pick) => {
                if !self.in_flight.is_empty() {
                    let at = usize::from(pick) % self.in_flight.len();
                    let head = self.in_flight.swap_remove(at);
                    self.ring.complete(head, 1).unwrap();
                }
            }
            Op::Publish => {
                self.ring.publish().unwrap();
            }
            Op::EnableKicks => {
                self.ring.enable_kicks().unwrap();
            }
            Op::Offer(_) | Op::Reap => {}
        }
    }
}

/// Lives through `ops`; the number of them that were done if the process is killed.
fn live(world: &mut World, ops: &[Op]) -> Result<(), usize> {
    let taken_over = crash::live(|| world.take_over());
    let Some(mut process) = taken_over.map(Process::new) else {
        return Err(0);
    };
    for (done, op) in ops.iter().enumerate() {
        match *op {
            Op::Offer(pick) => world.offer(pick),
            Op::Reap => world.reap(),
            op => {
                if crash::live(|| process.act(op)).is_none() {
                    return Err(done + 1);
                }
            }
        }
    }
    Ok(())
}

/// The last process does everything that is left, and it is what waits, in order.
fn finish(world: &mut World) {
    crash::disarm();
    world.reap();
    let expected: Vec<u16> = world.waiting.iter().copied().collect();
    let mut process = Process::new(world.take_over());
    while let Some(head) = process.ring.pop(&mut process.chain).unwrap() {
        process.in_flight.push(head);
    }
    assert_eq!(process.in_flight, expected, "what is left, in order");
    assert_eq!(usize::from(process.ring.in_flight()), expected.len());
    for head in process.in_flight.iter().rev() {
        process.ring.complete(*head, 1).unwrap();
    }
    process.ring.publish().unwrap();
    world.reap();
    assert!(world.waiting.is_empty(), "nothing is lost");
    // And nothing is in flight for a process after it.
    let next = world.take_over();
    assert_eq!(next.to_resubmit(), 0);
    assert_eq!(next.next_avail(), world.driver.used_idx());
}

fn features(event_idx: bool) -> RingFeatures {
    RingFeatures {
        event_idx,
        indirect: false,
    }
}

/// Kills the process at each store that the script makes, one after another.
fn killed_everywhere(ops: &[Op], event_idx: bool, again: u32) {
    for stores in 1.. {
        let mut world = World::new(features(event_idx));
        crash::arm(stores);
        let Err(done) = live(&mut world, ops) else {
            // It made fewer stores than that: every one has had its turn.
            finish(&mut world);
            return;
        };
        // The second process is killed too, at a store of its own.
        crash::arm(again);
        let _ = live(&mut world, &ops[done..]);
        finish(&mut world);
    }
}

#[test]
fn a_process_may_be_killed_at_any_store() {
    use Op::{Complete, Offer, Pop, Publish, Reap};
    // Out of order, in batches of one, two and three, heads used again, and a rest.
    let ops = [
        Offer(0),
        Offer(1),
        Offer(2),
        Offer(3),
        Pop,
        Pop,
        Pop,
        Pop,
        Complete(2),
        Publish,
        Reap,
        Offer(5),
        Pop,
        Complete(3),
        Complete(0),
        Publish,
        Offer(2),
        Reap,
        Pop,
        Offer(0),
        Pop,
        Complete(1),
        Complete(1),
        Complete(1),
        Publish,
        Pop,
        Complete(0),
        Reap,
        Offer(1),
    ];
    for again in 1..60 {
        for event_idx in [false, true] {
            killed_everywhere(&ops, event_idx, again);
        }
    }
}

fn cases(default: u32) -> u32 {
    std::env::var("BULKHEAD_FUZZ_CASES")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

fn config(default: u32, seed: u64) -> ProptestConfig {
    ProptestConfig {
        cases: cases(default),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(48, 0x1f))]

    /// Whatever happens, and wherever in it processes are killed, twice in a row too: no
    /// request is lost, none is completed twice, and those left over keep their order.
    #[test]
    fn nothing_is_lost_and_nothing_done_twice(
        ops in prop::collection::vec(op(), 1..60),
        event_idx: bool,
        again in 1u32..120,
    ) {
        killed_everywhere(&ops, event_idx, again);
    }
}

proptest! {
    #![proptest_config(config(2000, 0x2f))]

    /// Any content of the region is refused, or means heads of the ring, each once; it never
    /// makes the device do anything else.
    #[test]
    fn no_content_of_a_region_is_obeyed_blindly(
        used_idx in prop_oneof![0u16..12, any::<u16>()],
        header in prop_oneof![
            (Just(0u64), Just(1u16), Just(SIZE), 0u16..12, 0u16..12),
            (any::<u64>(), any::<u16>(), any::<u16>(), any::<u16>(), any::<u16>()),
        ],
        states in prop::collection::vec(
            (prop_oneof![0u8..2, any::<u8>()], 0u16..10, prop_oneof![0u64..8, any::<u64>()]),
            usize::from(SIZE),
        ),
        regular: bool,
    ) {
        let region = region(1, SIZE);
        let ring = region.ring(0).unwrap();
        let (features, version, desc_num, last, used) = header;
        ring.store(AT_FEATURES, features).unwrap();
        ring.store(AT_VERSION, version).unwrap();
        ring.store(AT_DESC_NUM, desc_num).unwrap();
        ring.store(AT_LAST_BATCH_HEAD, last).unwrap();
        ring.store(AT_USED_IDX, used).unwrap();
        for (head, (inflight, next, counter)) in (0..).zip(states) {
            let inflight = if regular { inflight & 1 } else { inflight };
            ring.store(state(head, OF_INFLIGHT), inflight).unwrap();
            ring.store(state(head, OF_NEXT), next).unwrap();
            ring.store(state(head, OF_COUNTER), counter).unwrap();
        }
        match Log::open(ring.clone(), SIZE, used_idx) {
            Err(why) => prop_assert!(!why.to_string().contains('\n')),
            Ok((_, None)) => prop_assert_eq!(version, 0),
            Ok((_, Some(recovered))) => {
                let mut heads = recovered.resubmit.clone();
                heads.sort_unstable();
                heads.dedup();
                prop_assert_eq!(heads.len(), recovered.resubmit.len());
                prop_assert!(heads.iter().all(|h| *h < SIZE));
                // A process that is killed right now leaves the same to the next.
                let (_, again) = Log::open(ring, SIZE, used_idx).unwrap();
                prop_assert_eq!(again, Some(recovered));
            }
        }
    }
}

/// A region with three requests in flight, 4, 5 and 6, and one completed, 7.
fn left_behind() -> World {
    let mut world = World::new(features(false));
    let mut process = Process::new(world.take_over());
    for head in [7, 6, 5, 4] {
        world.driver.offer(head);
        world.waiting.push_back(head);
        process.act(Op::Pop);
    }
    process.ring.complete(7, 1).unwrap();
    process.ring.publish().unwrap();
    world
}

fn refusal(world: &World) -> InflightError {
    let layout = world.driver.layout();
    let memory = Arc::clone(&world.memory);
    let mut ring = Ring::new(memory, layout, world.features, 0).unwrap();
    match ring.keep_log(world.log()) {
        Err(RingError::Inflight(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_of_damage_is_named() {
    use InflightError as E;
    type Damage = fn(&InflightRing) -> Result<(), E>;
    let cases: [(Damage, E); 8] = [
        (
            |r| r.store(AT_VERSION, 2u16),
            E::Version {
                version: 2,
                features: 0,
            },
        ),
        (
            |r| r.store(AT_FEATURES, 1u64),
            E::Version {
                version: 1,
                features: 1,
            },
        ),
        (
            |r| r.store(AT_DESC_NUM, 16u16),
            E::Descriptors { found: 16, said: 8 },
        ),
        (|r| r.store(state(2, OF_INFLIGHT), 2u8), E::State(2)),
        (|r| r.store(AT_USED_IDX, 2u16), E::Batch(u16::MAX)),
        (
            |r| {
                r.store(AT_USED_IDX, 0u16)?;
                r.store(AT_LAST_BATCH_HEAD, 8u16)
            },
            E::List(8),
        ),
        (
            |r| {
                r.store(AT_USED_IDX, u16::MAX)?;
                r.store(state(7, OF_NEXT), 7u16)
            },
            E::List(7),
        ),
        (
            |r| {
                let first = r.load::<u64>(state(6, OF_COUNTER))?;
                r.store(state(4, OF_COUNTER), first)
            },
            E::Order,
        ),
    ];
    for (damage, expected) in cases {
        let world = left_behind();
        damage(&world.log()).unwrap();
        assert_eq!(refusal(&world), expected);
        assert!(!expected.to_string().contains('\n'));
    }
    // The last place in the order leaves none for the next request.
    let world = left_behind();
    world.log().store(state(4, OF_COUNTER), u64::MAX).unwrap();
    assert_eq!(refusal(&world), E::Order);
    let mut world = left_behind();
    finish(&mut world);
}

#[test]
fn a_region_for_smaller_rings_is_refused_and_one_for_larger_ones_serves() {
    let world = World::new(features(false));
    let small = region(1, SIZE / 2);
    let layout = world.driver.layout();
    let ring = || Ring::new(Arc::clone(&world.memory), layout, world.features, 0).unwrap();
    assert_eq!(
        ring().keep_log(small.ring(0).unwrap()),
        Err(RingError::Inflight(InflightError::Small {
            have: 4,
            need: 8
        }))
    );
    let large = region(1, 256);
    assert_eq!(ring().keep_log(large.ring(0).unwrap()), Ok(false));
    // A head that only the larger ring would have.
    let log = large.ring(0).unwrap();
    log.store(state(8, OF_INFLIGHT), 1u8).unwrap();
    assert_eq!(
        ring().keep_log(log),
        Err(RingError::Inflight(InflightError::State(8)))
    );
}

#[test]
fn an_idle_ring_s_log_says_nothing_about_the_ring_that_the_next_driver_sets_up() {
    let mut world = left_behind();
    finish(&mut world);
    // Reset, without a new region.
    world.driver.reset();
    world.offer(3);
    finish(&mut world);
}

#[test]
fn a_log_that_was_discarded_is_begun_anew() {
    let world = left_behind();
    let mut ring = world.take_over();
    assert_eq!(ring.to_resubmit(), 3);
    ring.discard_log();
    drop(ring);
    let ring = world.take_over();
    assert_eq!((ring.to_resubmit(), ring.next_avail()), (0, 1));
}

#[test]
fn what_is_submitted_again_may_be_put_back_and_is_not_offered_twice() {
    let world = left_behind();
    let mut ring = world.take_over();
    let mut chain = Chain::new();
    assert_eq!(ring.pop(&mut chain), Ok(Some(6)));
    assert_eq!(ring.pop(&mut chain), Ok(Some(5)));
    ring.unpop(5).unwrap();
    ring.unpop(6).unwrap();
    assert_eq!((ring.in_flight(), ring.to_resubmit()), (0, 3));
    for head in [6, 5, 4] {
        assert_eq!(ring.pop(&mut chain), Ok(Some(head)));
    }
    assert_eq!(ring.pop(&mut chain), Ok(None));
    assert_eq!(ring.unpop(7), Err(RingError::Head(7)));
    // A new one that was put back is not in flight for anyone.
    let mut fresh = World::new(features(false));
    fresh.offer(2);
    let mut process = Process::new(fresh.take_over());
    process.act(Op::Pop);
    assert_eq!(fresh.take_over().to_resubmit(), 1);
    process.act(Op::Unpop);
    assert_eq!(fresh.take_over().to_resubmit(), 0);
    // A driver that offers one of them meanwhile breaks the rules.
    let mut ring = world.take_over();
    let mut driver = world.driver;
    driver.offer(5);
    for _ in 0..3 {
        ring.pop(&mut chain).unwrap();
    }
    assert_eq!(ring.pop(&mut chain), Err(RingError::Duplicate(5)));
}
