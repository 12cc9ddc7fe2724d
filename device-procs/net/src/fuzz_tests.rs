//! Rings full of nonsense against the two halves of a pair and the control queue, without a
//! tap: nothing panics, nothing is completed twice, what the rules allow still works after.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::driver::{Desc, DriverRing, guest};
use bulkhead_runtime::mailbox::RingSetup;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::ring::RingFeatures;
use bulkhead_runtime::status::QueueStatus;
use bulkhead_runtime::sys;
use proptest::prelude::*;

use crate::control::Control;
use crate::features as f;
use crate::receive::{Delivery, Receive};
use crate::state::{Settings, State};
use crate::tap::{HEADER, Tap};
use crate::transmit::Transmit;

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x2_0000;
const SIZE: u16 = 16;
const DATA: u64 = GPA + 0x1000;

fn state(features: u64) -> Arc<State> {
    let settings = Settings {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        link_up: true,
        to_guest: crate::state::Limits::default(),
        from_guest: crate::state::Limits::default(),
        kernel: false,
    };
    let state = State::new(Tap::none(), &settings);
    state.accept(features);
    Arc::new(state)
}

struct Bed {
    memory: Arc<Memory>,
    driver: DriverRing,
    status: Arc<QueueStatus>,
}

fn bed(features: u64) -> (Bed, ActiveRing) {
    let (_file, memory) = guest(GPA, RAM).unwrap();
    let mut driver = DriverRing::new(Arc::clone(&memory), GPA, SIZE);
    driver.reset();
    let status = Arc::new(QueueStatus::default());
    let setup = RingSetup {
        memory: Arc::clone(&memory),
        layout: driver.layout(),
        ring_features: RingFeatures {
            event_idx: true,
            indirect: true,
        },
        features,
        base: 0,
        kick: Arc::new(sys::eventfd().unwrap()),
        call: None,
        err: None,
        inflight: None,
    };
    let ring = ActiveRing::start(setup, 0, &status).unwrap();
    let bed = Bed {
        memory,
        driver,
        status,
    };
    (bed, ring)
}

/// A descriptor that is often nearly right.
fn descriptor() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        6 => DATA..GPA + RAM,
        1 => any::<u64>(),
        1 => Just(GPA),
    ];
    let len = prop_oneof![4 => 0u32..4096, 2 => 0u32..70_000, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Desc(u16, Desc),
    Offer(u16),
    AvailIdx(u16),
    Bytes(u64, Vec<u8>),
    /// The engine's turn: how the tap answers, or how long the frame is.
    Turn(i32, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let answer = prop_oneof![
        3 => Just(100),
        2 => Just(-libc::EAGAIN),
        1 => Just(-libc::EIO),
        1 => any::<i32>(),
    ];
    let frame = prop_oneof![4 => 0usize..3000, 1 => 0usize..66_000];
    prop_oneof![
        6 => (0..SIZE, descriptor()).prop_map(|(i, d)| Step::Desc(i, d)),
        6 => prop_oneof![8 => 0..SIZE, 1 => any::<u16>()].prop_map(Step::Offer),
        1 => any::<u16>().prop_map(Step::AvailIdx),
        3 => (GPA..GPA + RAM - 64, prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(at, bytes)| Step::Bytes(at, bytes)),
        6 => (answer, frame).prop_map(|(a, f)| Step::Turn(a, f)),
    ]
}

impl Bed {
    fn take(&mut self, step: &Step) -> Option<(i32, usize)> {
        match step {
            Step::Desc(i, d) => self.driver.desc(*i, *d),
            Step::Offer(head) => self.driver.offer(*head),
            Step::AvailIdx(idx) => self.driver.set_avail_idx(*idx),
            Step::Bytes(at, bytes) => assert!(self.memory.write(*at, bytes)),
            Step::Turn(answer, len) => return Some((*answer, *len)),
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400)
    ))]

    #[test]
    fn transmit_survives_any_ring(steps in prop::collection::vec(step(), 1..60)) {
        let (mut bed, ring) = bed(0);
        let state = state(0);
        let mut half = Transmit::new(ring, Arc::clone(&bed.status), state);
        for step in &steps {
            let Some((answer, _)) = bed.take(step) else {
                continue;
            };
            half.fill(Instant::now);
            let mut given = HashSet::new();
            for number in 0..half.count() {
                let Some(segments) = half.waiting(number) else {
                    continue;
                };
                let bytes: usize = segments.iter().map(|s| s.len()).sum();
                prop_assert!((HEADER..=crate::tap::MAX_FRAME).contains(&bytes));
                prop_assert!(segments.len() <= 1024);
                prop_assert!(given.insert(number));
                half.answered(number, answer);
            }
            let blocked = half.settle();
            prop_assert_eq!(blocked, half.is_blocked());
            prop_assert!(!blocked || answer == -libc::EAGAIN);
            half.ring().flush();
        }
        let status = Arc::clone(&bed.status);
        half.stop();
        let done = status.requests.get() + status.dropped.get();
        // Unless the guest wrote there itself.
        if !steps.iter().any(|step| matches!(step, Step::Bytes(..))) {
            prop_assert_eq!(u64::from(bed.driver.used_idx()), done & 0xffff);
        }
    }

    #[test]
    fn receive_survives_any_ring(
        steps in prop::collection::vec(step(), 1..60),
        mergeable: bool,
    ) {
        let features = if mergeable { f::F_MRG_RXBUF } else { 0 };
        let (mut bed, ring) = bed(features);
        let mut half = Receive::new(ring, Arc::clone(&bed.status), state(features));
        for step in &steps {
            let Some((_, len)) = bed.take(step) else {
                continue;
            };
            let mut frame = vec![0x55; len];
            let before = bed.driver.used_idx();
            let delivery = half.deliver(&mut frame, Instant::now);
            half.ring().flush();
            prop_assert!(delivery != Delivery::NoBuffers || !half.ring().is_broken());
            if delivery != Delivery::Done {
                prop_assert_eq!(bed.driver.used_idx(), before);
            }
            prop_assert_eq!(half.ring().in_flight(), 0);
        }
    }

    #[test]
    fn commands_survive_any_ring(steps in prop::collection::vec(step(), 1..60)) {
        let all = u64::MAX;
        let (mut bed, ring) = bed(all);
        let state = state(all);
        let mut control = Control::new(ring, Arc::clone(&bed.status), Arc::clone(&state));
        for step in &steps {
            if bed.take(step).is_some() {
                while control.serve() {}
            }
        }
        let filter = state.filter();
        prop_assert!(filter.unicast.entries().len() <= 64);
        prop_assert!(filter.multicast.entries().len() <= 64);
        prop_assert_eq!(state.pairs(), 1);
    }
}

#[test]
fn a_chain_of_empty_buffers_costs_nothing() {
    let (mut bed, ring) = bed(f::F_MRG_RXBUF);
    let mut half = Receive::new(ring, Arc::clone(&bed.status), state(f::F_MRG_RXBUF));
    // An indirect table: twelve bytes, and a thousand buffers of none.
    let table = DATA;
    for i in 0..1000u16 {
        let desc = Desc {
            addr: DATA + 0x8000,
            len: if i == 0 { 12 } else { 0 },
            flags: if i == 999 { 2 } else { 3 },
            next: i + 1,
        };
        assert!(bed.memory.write(table + 16 * u64::from(i), &desc.bytes()));
    }
    bed.driver.desc(
        0,
        Desc {
            addr: table,
            len: 16_000,
            flags: 4,
            next: 0,
        },
    );
    bed.driver.offer(0);
    let mut frame = vec![1; 1000];
    assert_eq!(half.deliver(&mut frame, Instant::now), Delivery::NoBuffers);
    assert!(!half.ring().is_broken());
}
