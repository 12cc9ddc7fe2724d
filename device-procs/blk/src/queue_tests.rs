//! Random requests through parser, slots and a real engine: whatever a driver offers, the
//! process neither panics nor touches anything but the disk and the guest's memory. Seeded;
//! BULKHEAD_FUZZ_CASES makes it longer.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;

use bulkhead_runtime::driver::{Desc, DriverRing, INDIRECT, NEXT, USER_BASE, WRITE};
use bulkhead_runtime::mailbox::RingSetup;
use bulkhead_runtime::memory::{Memory, Region};
use bulkhead_runtime::ring::RingFeatures;
use bulkhead_runtime::sys;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::config::{F_DISCARD, F_FLUSH, F_SECURE_ERASE, F_WRITE_ZEROES};
use crate::disk::{Alignment, Geometry, Topology};
use crate::engine_plain;

const PAGE: u64 = 0x1000;
const GPA: u64 = 0x10_0000;
const LEN: u64 = 0x1_0000;
const RING: u64 = GPA + 0xe000;
const SIZE: u16 = 16;
const SECTORS: u64 = 64;

/// A guest whose memory lies between two pages of its file that are none of its memory.
struct Fixture {
    file: File,
    memory: Arc<Memory>,
    disk: Arc<Disk>,
}

impl Fixture {
    fn new(readonly: bool, direct: bool, punch: bool) -> Self {
        let file = sys::memfd("fuzz").unwrap();
        file.write_all_at(&vec![0x5a; (LEN + 2 * PAGE) as usize], 0)
            .unwrap();
        let region = Region::map(&file, GPA, LEN, USER_BASE + GPA, PAGE).unwrap();
        let content = sys::memfd("disk").unwrap();
        content
            .write_all_at(&vec![0xd1; (SECTORS * 512) as usize], 0)
            .unwrap();
        let geometry = Geometry {
            block_size: 512,
            readonly,
            serial: *b"fuzzfuzzfuzzfuzzfuzz",
            topology: Topology::default(),
        };
        let mut disk = Disk::new(Backing::Raw(content), geometry, SECTORS);
        // The file takes any alignment; the bounce buffers are used all the same.
        disk.direct = direct.then_some(Alignment {
            memory: 512,
            offset: 512,
        });
        Self {
            file,
            memory: Arc::new(Memory::new(vec![region]).unwrap()),
            disk: Arc::new(if punch { disk.with_discard() } else { disk }),
        }
    }

    fn check(&self) {
        let mut page = [0; PAGE as usize];
        for at in [0, PAGE + LEN] {
            self.file.read_exact_at(&mut page, at).unwrap();
            assert!(page.iter().all(|b| *b == 0x5a), "wrote beside guest memory");
        }
        let Backing::Raw(content) = &self.disk.backing else {
            return;
        };
        assert_eq!(
            content.metadata().unwrap().len(),
            SECTORS * 512,
            "the disk has grown"
        );
        if self.disk.geometry.readonly {
            let mut all = vec![0; (SECTORS * 512) as usize];
            content.read_exact_at(&mut all, 0).unwrap();
            assert!(all.iter().all(|b| *b == 0xd1), "a read-only disk changed");
        }
    }
}

fn headers() -> impl Strategy<Value = (u32, u64)> {
    let kind = prop_oneof![
        4 => Just(0u32), 4 => Just(1u32), 1 => Just(4u32), 1 => Just(8u32), 3 => Just(11u32),
        3 => Just(13u32), 1 => Just(14u32), 1 => any::<u32>()
    ];
    let sector = prop_oneof![
        6 => 0..SECTORS, 1 => SECTORS - 2..SECTORS + 2, 1 => any::<u64>()
    ];
    (kind, sector)
}

fn descs() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        8 => GPA..GPA + 0xd000,
        4 => (0u64..64).prop_map(|i| GPA + 16 * i),
        1 => GPA + LEN - 600..GPA + LEN + 16,
        1 => RING..RING + 0x300,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        3 => Just(16u32), 3 => Just(1u32), 4 => (0u32..20).prop_map(|n| 512 * n),
        2 => 0u32..3000, 1 => (0u32..10).prop_map(|n| 512 * n + 1), 1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT), 4 => Just(NEXT | WRITE), 2 => Just(WRITE), 1 => Just(0),
        1 => Just(INDIRECT), 1 => any::<u16>(),
    ];
    let next = prop_oneof![9 => 0u16..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

fn cases() -> u32 {
    std::env::var("BULKHEAD_FUZZ_CASES")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(512)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        rng_seed: RngSeed::Fixed(0xb10c),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_request_harms_the_process_or_its_neighbours(
        headers in prop::collection::vec(headers(), 64),
        table in prop::collection::vec(descs(), SIZE as usize),
        // Most chains are of the right shape, with anything in their fields.
        shaped: bool,
        heads in prop::collection::vec(0u16..SIZE + 1, 0..SIZE as usize),
        (readonly, direct, event_idx, flush) in any::<(bool, bool, bool, bool)>(),
        (ranges, punch) in any::<(bool, bool)>(),
    ) {
        let fixture = Fixture::new(readonly, direct, punch);
        for (i, (kind, sector)) in (0u64..).zip(&headers) {
            fixture.memory.write(GPA + 16 * i, &kind.to_le_bytes());
            fixture.memory.write(GPA + 16 * i + 8, &sector.to_le_bytes());
        }
        let mut driver = DriverRing::new(Arc::clone(&fixture.memory), RING, SIZE);
        driver.reset();
        for (i, mut desc) in (0u16..).zip(table) {
            if shaped {
                desc.next = i + 1;
                desc.flags = match i % 3 {
                    0 => NEXT,
                    1 => NEXT | (desc.flags & WRITE),
                    _ => WRITE,
                };
                if i % 3 == 0 {
                    (desc.addr, desc.len) = (GPA + 16 * (desc.addr % 64), 16);
                }
            }
            driver.desc(i, desc);
        }
        for head in heads {
            driver.offer(if shaped { head / 3 * 3 } else { head });
        }

        let mut accepted = if flush { F_FLUSH } else { 0 };
        // As they are offered.
        if ranges && !readonly {
            accepted |= F_DISCARD | F_WRITE_ZEROES | F_SECURE_ERASE;
        }
        let status = Arc::new(QueueStatus::default());
        let setup = RingSetup {
            memory: Arc::clone(&fixture.memory),
            layout: driver.layout(),
            ring_features: RingFeatures { event_idx, indirect: true },
            features: accepted,
            base: 0,
            kick: Arc::new(sys::eventfd().unwrap()),
            call: Some(Arc::new(sys::eventfd().unwrap())),
            err: Some(Arc::new(sys::eventfd().unwrap())),
            inflight: None,
        };
        let ring = ActiveRing::start(setup, 0, &status).unwrap();
        let mut queue = Queue::new(ring, Arc::clone(&status), Arc::clone(&fixture.disk));
        let mut worker = engine_plain::Worker::default();
        while worker.serve(&mut queue, &fixture.disk) == engine_plain::Next::More {}
        prop_assert!(queue.is_idle());
        prop_assert_eq!(queue.ring().in_flight(), 0);
        prop_assert!(queue.stop() <= SIZE);
        fixture.check();
    }
}
