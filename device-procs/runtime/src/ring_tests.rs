//! Tests of the ring and the chain walker: what a good driver does works, and what a bad
//! one does is found. The random tests are seeded; BULKHEAD_FUZZ_CASES makes them longer.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::driver::{Desc, DriverRing, INDIRECT, NEXT, WRITE, guest};

const GPA: u64 = 0x10_0000;
const LEN: u64 = 0x2_0000;
const RING: u64 = GPA + 0x1_0000;
const INDIRECT_OK: RingFeatures = RingFeatures {
    event_idx: false,
    indirect: true,
};

fn setup(size: u16, features: RingFeatures) -> (Arc<Memory>, DriverRing, Ring) {
    let (_, memory) = guest(GPA, LEN).unwrap();
    let driver = DriverRing::new(Arc::clone(&memory), RING, size);
    let ring = Ring::new(Arc::clone(&memory), driver.layout(), features, 0).unwrap();
    (memory, driver, ring)
}

fn desc(addr: u64, len: u32, flags: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next: 0,
    }
}

#[test]
fn chains_come_in_order_and_go_back_in_one_batch() {
    let (_, mut driver, mut ring) = setup(8, RingFeatures::default());
    driver.chain(0, &[desc(GPA, 16, 0), desc(GPA + 64, 32, WRITE)]);
    driver.chain(5, &[desc(GPA + 128, 1, WRITE)]);
    driver.offer(5);
    driver.offer(0);
    let mut chain = Chain::new();
    assert_eq!(ring.pop(&mut chain), Ok(Some(5)));
    assert_eq!((chain.readable_len(), chain.writable_len()), (0, 1));
    assert_eq!(ring.pop(&mut chain), Ok(Some(0)));
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 32));
    assert_eq!(chain.readable()[0].addr, GPA);
    assert_eq!(chain.writable()[0].addr, GPA + 64);
    assert_eq!(ring.pop(&mut chain), Ok(None));
    assert_eq!(ring.in_flight(), 2);

    ring.complete(0, 32).unwrap();
    ring.complete(5, 1).unwrap();
    assert_eq!(driver.take_used(), None, "not before it is published");
    assert_eq!(ring.publish(), Ok(true));
    assert_eq!(driver.take_used(), Some((0, 32)));
    assert_eq!(driver.take_used(), Some((5, 1)));
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(ring.publish(), Ok(false), "nothing new, no interrupt");
}

#[test]
fn a_ring_goes_round_and_its_indices_wrap() {
    let (memory, mut driver, _) = setup(4, RingFeatures::default());
    driver.set_avail_idx(u16::MAX - 1);
    memory.write(driver.used() + 2, &(u16::MAX - 1).to_le_bytes());
    let mut ring = Ring::new(
        memory,
        driver.layout(),
        RingFeatures::default(),
        u16::MAX - 1,
    )
    .unwrap();
    let mut chain = Chain::new();
    for i in 0..10u16 {
        driver.desc(i % 4, desc(GPA, 1, WRITE));
        driver.offer(i % 4);
        assert_eq!(ring.pop(&mut chain), Ok(Some(i % 4)));
        ring.complete(i % 4, 1).unwrap();
        ring.publish().unwrap();
    }
    assert_eq!(driver.used_idx(), 8);
    assert_eq!(ring.next_avail(), 8);
}

#[test]
fn every_kind_of_malformed_chain_is_found() {
    use ChainError as E;
    let end = GPA + LEN;
    let cases: Vec<(Vec<Desc>, E)> = vec![
        (
            vec![desc(end - 4, 8, 0)],
            E::Buffer {
                addr: end - 4,
                len: 8,
            },
        ),
        (
            vec![desc(u64::MAX - 3, 8, 0)],
            E::Buffer {
                addr: u64::MAX - 3,
                len: 8,
            },
        ),
        (vec![desc(0, 1, 0)], E::Buffer { addr: 0, len: 1 }),
        (vec![desc(GPA, 4, WRITE), desc(GPA, 4, 0)], E::Order),
        (
            vec![Desc {
                next: 8,
                ..desc(GPA, 4, NEXT)
            }],
            E::Next(8),
        ),
        (
            vec![Desc {
                next: 0,
                ..desc(GPA, 4, NEXT)
            }],
            E::Loop,
        ),
        (
            vec![Desc {
                next: 1,
                ..desc(GPA, 16, INDIRECT | NEXT)
            }],
            E::Indirect,
        ),
        (vec![desc(GPA, 0, INDIRECT)], E::IndirectLength(0)),
        (vec![desc(GPA, 15, INDIRECT)], E::IndirectLength(15)),
        (
            vec![desc(GPA, 16 * 1025, INDIRECT)],
            E::IndirectLength(16 * 1025),
        ),
        (
            vec![desc(end - 16, 32, INDIRECT)],
            E::Buffer {
                addr: end - 16,
                len: 32,
            },
        ),
    ];
    for (descs, expected) in cases {
        let (_, mut driver, mut ring) = setup(8, INDIRECT_OK);
        match descs.as_slice() {
            [one] => driver.desc(0, *one),
            many => driver.chain(0, many),
        }
        driver.offer(0);
        let found = ring.pop(&mut Chain::new());
        assert_eq!(
            found,
            Err(RingError::Chain {
                head: 0,
                source: expected
            })
        );
    }
}

#[test]
fn every_kind_of_malformed_indirect_table_is_found() {
    use ChainError as E;
    for (table, expected) in [
        (vec![desc(GPA, 16, INDIRECT)], E::Indirect),
        (
            vec![Desc {
                next: 2,
                ..desc(GPA, 1, NEXT)
            }],
            E::Next(2),
        ),
        (
            vec![Desc {
                next: 0,
                ..desc(GPA, 1, NEXT)
            }],
            E::Loop,
        ),
        (vec![desc(1, 1, 0)], E::Buffer { addr: 1, len: 1 }),
    ] {
        let (memory, mut driver, mut ring) = setup(8, INDIRECT_OK);
        for (i, d) in table.iter().enumerate() {
            memory.write(GPA + 0x100 + 16 * i as u64, &d.bytes());
        }
        driver.desc(3, desc(GPA + 0x100, 32, INDIRECT));
        driver.offer(3);
        let found = ring.pop(&mut Chain::new());
        assert_eq!(
            found,
            Err(RingError::Chain {
                head: 3,
                source: expected
            })
        );
    }
}

#[test]
fn an_indirect_table_is_followed_only_when_negotiated() {
    for indirect in [false, true] {
        let features = RingFeatures {
            event_idx: false,
            indirect,
        };
        let (memory, mut driver, mut ring) = setup(2, features);
        // Longer than the ring, after an ordinary descriptor.
        for i in 0..5u16 {
            let flags = if i == 4 { WRITE } else { NEXT };
            let d = Desc {
                next: i + 1,
                ..desc(GPA + 8 * u64::from(i), 8, flags)
            };
            memory.write(GPA + 0x100 + 16 * u64::from(i), &d.bytes());
        }
        driver.chain(0, &[desc(GPA, 16, 0), desc(GPA + 0x100, 80, INDIRECT)]);
        driver.offer(0);
        let mut chain = Chain::new();
        let popped = ring.pop(&mut chain);
        if indirect {
            assert_eq!(popped, Ok(Some(0)));
            assert_eq!((chain.readable_len(), chain.writable_len()), (48, 8));
        } else {
            assert!(popped.is_err());
        }
    }
}

#[test]
fn the_available_ring_is_not_believed() {
    let (_, mut driver, mut ring) = setup(8, RingFeatures::default());
    driver.set_avail_idx(9);
    assert_eq!(
        ring.pop(&mut Chain::new()),
        Err(RingError::AvailIndex { idx: 9, next: 0 })
    );

    let (_, mut driver, mut ring) = setup(8, RingFeatures::default());
    driver.offer(8);
    assert_eq!(ring.pop(&mut Chain::new()), Err(RingError::Head(8)));

    let (_, mut driver, mut ring) = setup(8, RingFeatures::default());
    driver.desc(1, desc(GPA, 1, WRITE));
    driver.offer(1);
    driver.offer(1);
    let mut chain = Chain::new();
    assert_eq!(ring.pop(&mut chain), Ok(Some(1)));
    assert_eq!(ring.pop(&mut chain), Err(RingError::Duplicate(1)));
    assert_eq!(ring.complete(2, 0), Err(RingError::Head(2)));
}

#[test]
fn a_ring_outside_memory_or_of_an_odd_size_is_refused() {
    let (_, memory) = guest(GPA, LEN).unwrap();
    let good = DriverRing::new(Arc::clone(&memory), RING, 8).layout();
    let new = |l| Ring::new(Arc::clone(&memory), l, RingFeatures::default(), 0).map(|_| ());
    assert_eq!(new(good), Ok(()));
    for size in [0, 3, 2048, 65536, u32::MAX] {
        assert_eq!(new(RingLayout { size, ..good }), Err(RingError::Size(size)));
    }
    for delta in [LEN, u64::MAX / 2, 1] {
        for part in 0..3 {
            let mut l = good;
            let field = match part {
                0 => &mut l.desc,
                1 => &mut l.avail,
                _ => &mut l.used,
            };
            *field = field.wrapping_add(delta);
            assert!(matches!(new(l), Err(RingError::Address(_))), "{l:?}");
        }
    }
}

#[test]
fn without_event_idx_flags_decide() {
    let (_, mut driver, mut ring) = setup(8, RingFeatures::default());
    ring.disable_kicks().unwrap();
    assert_eq!(driver.used_flags(), 1);
    assert_eq!(ring.enable_kicks(), Ok(false));
    assert_eq!(driver.used_flags(), 0);
    driver.desc(0, desc(GPA, 1, WRITE));
    driver.offer(0);
    assert_eq!(ring.enable_kicks(), Ok(true), "came before kicks were on");
    driver.set_avail_flags(1);
    ring.pop(&mut Chain::new()).unwrap();
    ring.complete(0, 1).unwrap();
    assert_eq!(ring.publish(), Ok(false));
}

#[test]
fn with_event_idx_kicks_and_interrupts_are_asked_for_by_index() {
    let features = RingFeatures {
        event_idx: true,
        indirect: false,
    };
    let (_, mut driver, mut ring) = setup(8, features);
    for i in 0..4 {
        driver.desc(i, desc(GPA, 1, WRITE));
        driver.offer(i);
    }
    let mut chain = Chain::new();
    for _ in 0..4 {
        ring.pop(&mut chain).unwrap();
    }
    assert_eq!(ring.enable_kicks(), Ok(false));
    assert_eq!(driver.avail_event(), 4);
    // No kick for the next buffer: the driver has passed this index.
    ring.disable_kicks().unwrap();
    assert_eq!(driver.avail_event(), 3);
    assert_eq!(ring.enable_kicks(), Ok(false));
    driver.set_used_event(2);
    ring.complete(0, 1).unwrap();
    assert_eq!(ring.publish(), Ok(true), "the first time always");
    ring.complete(1, 1).unwrap();
    assert_eq!(ring.publish(), Ok(false));
    ring.complete(2, 1).unwrap();
    assert_eq!(ring.publish(), Ok(true), "passed used_event");
    ring.complete(3, 1).unwrap();
    assert_eq!(ring.publish(), Ok(false));
}

fn cases() -> u32 {
    std::env::var("BULKHEAD_FUZZ_CASES")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(512)
}

/// Addresses that matter: inside, at the edges, far outside.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => GPA..GPA + LEN,
        1 => GPA + LEN - 32..GPA + LEN + 32,
        1 => GPA - 32..GPA + 32,
        1 => RING..RING + 0x400,
        1 => any::<u64>(),
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..64,
        2 => (1u32..40).prop_map(|n| n * 16),
        1 => 0u32..0x3_0000,
        1 => any::<u32>(),
    ]
}

fn descs() -> impl Strategy<Value = Desc> {
    let flags = prop_oneof![9 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![9 => 0u16..17, 1 => any::<u16>()];
    (addresses(), lengths(), flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        rng_seed: RngSeed::Fixed(0xb10c),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever lies in the ring, the walk ends, stays inside guest memory, and hands out
    /// no head twice.
    #[test]
    fn no_ring_content_harms_the_walker(
        table in prop::collection::vec(descs(), 16),
        second in prop::collection::vec(descs(), 0..12),
        second_at in addresses(),
        heads in prop::collection::vec(prop_oneof![9 => 0u16..17, 1 => any::<u16>()], 16),
        idx in prop_oneof![9 => 0u16..20, 1 => any::<u16>()],
        event_idx: bool,
        indirect: bool,
    ) {
        let (memory, mut driver, mut ring) = setup(16, RingFeatures { event_idx, indirect });
        for (i, d) in (0u64..).zip(&second) {
            memory.write(second_at.wrapping_add(16 * i), &d.bytes());
        }
        for (i, d) in (0..).zip(&table) {
            driver.desc(i, *d);
        }
        for head in &heads {
            driver.offer(*head);
        }
        driver.set_avail_idx(idx);

        let mut chain = Chain::new();
        let mut popped = Vec::new();
        for turn in 0.. {
            prop_assert!(turn <= 17, "more chains than descriptors");
            match ring.pop(&mut chain) {
                Ok(Some(head)) => {
                    prop_assert!(head < 16 && !popped.contains(&head));
                    popped.push(head);
                    let count = chain.readable().len() + chain.writable().len();
                    prop_assert!(count <= 16 + 1024);
                    for b in chain.readable().iter().chain(chain.writable()) {
                        prop_assert!(memory.contains(b.addr, u64::from(b.len)));
                    }
                    let sum: u64 = chain.writable().iter().map(|b| u64::from(b.len)).sum();
                    prop_assert_eq!(sum, u64::from(chain.writable_len()));
                }
                Ok(None) | Err(_) => break,
            }
        }
        prop_assert_eq!(usize::from(ring.in_flight()), popped.len());
        for head in &popped {
            prop_assert!(ring.complete(*head, 1).is_ok());
        }
        prop_assert!(ring.publish().is_ok());
        prop_assert_eq!(ring.in_flight(), 0);
    }

    /// The arithmetic of event indices, against counting.
    #[test]
    fn crossed_means_passed(old: u16, steps in 0u16..1000, event: u16) {
        let new = old.wrapping_add(steps);
        let passed = (0..steps).any(|i| old.wrapping_add(i) == event);
        prop_assert_eq!(crossed(event, new, old), passed);
    }
}
