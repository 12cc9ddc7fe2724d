//! Tests of the in-flight region: where each queue's log lies in it, what is refused of a
//! description, what is offered to a front-end, and the device's own part behind the logs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use crate::sys::memfd;

/// A device with so many queues and nothing else to keep.
fn of(queues: u16) -> Capacity {
    Capacity { queues, kept: 0 }
}

pub(super) fn region(queues: u16, queue_size: u16) -> InflightRegion {
    let bytes = region_bytes(queues, queue_size);
    let file = memfd("region").unwrap();
    file.set_len(bytes).unwrap();
    InflightRegion::map(&file, bytes, 0, queues, queue_size, of(queues)).unwrap()
}

#[test]
fn each_queue_has_its_own_part() {
    // As libvhost-user and DPDK lay them out.
    assert_eq!(region_bytes(1, 128), 2112);
    assert_eq!(region_bytes(3, 1), 192);
    let region = region(2, 4);
    assert!(region.ring(2).is_none());
    let (first, second) = (region.ring(0).unwrap(), region.ring(1).unwrap());
    let (mut log, _) = Log::open(first.clone(), 4, 0).unwrap();
    log.taken(3).unwrap();
    assert_eq!(Log::open(second, 4, 0).unwrap().1, None);
    let recovered = Log::open(first, 4, 0).unwrap().1.unwrap();
    assert_eq!(recovered.resubmit, [3]);
}

#[test]
fn a_region_that_does_not_fit_its_description_is_refused() {
    let file = memfd("region").unwrap();
    file.set_len(4096).unwrap();
    let map = |size, offset, queues, queue_size| {
        InflightRegion::map(&file, size, offset, queues, queue_size, of(2)).map(drop)
    };
    assert!(map(2112, 0, 1, 128).is_ok());
    assert!(map(2112, 1984, 1, 128).is_ok());
    assert!(matches!(
        map(2111, 0, 1, 128),
        Err(RegionError::Size { .. })
    ));
    assert!(matches!(
        map(2112, 0, 3, 128),
        Err(RegionError::Queues { asked: 3, have: 2 })
    ));
    assert!(matches!(map(1, 0, 0, 1), Err(RegionError::Queues { .. })));
    assert!(matches!(map(1, 0, 1, 0), Err(RegionError::QueueSize(0))));
    assert!(matches!(
        map(u64::MAX, 0, 1, 2048),
        Err(RegionError::QueueSize(2048))
    ));
    assert!(matches!(map(2112, 1, 1, 128), Err(RegionError::Offset(1))));
    assert!(matches!(
        map(u64::MAX, 2048, 1, 128),
        Err(RegionError::Map(_))
    ));
    assert!(matches!(
        map(u64::MAX, u64::MAX - 7, 1, 128),
        Err(RegionError::Map(_))
    ));
}

#[test]
fn the_region_on_offer_is_empty_each_time_and_keeps_its_size() {
    let mut offer = InflightFile::new(of(2)).unwrap();
    for queue_size in [128, 1024, 128] {
        let (bytes, file) = offer.offer(2, queue_size).unwrap();
        assert_eq!(bytes, region_bytes(2, queue_size));
        let region = InflightRegion::map(file, bytes, 0, 2, queue_size, of(2)).unwrap();
        for queue in 0..2 {
            let ring = region.ring(queue).unwrap();
            let (mut log, recovered) = Log::open(ring, queue_size, 9).unwrap();
            assert_eq!(recovered, None);
            log.taken(5).unwrap();
        }
        assert!(file.set_len(1).is_err());
    }
    assert!(offer.offer(3, 128).is_err());
    assert!(offer.offer(2, 2048).is_err());
}

#[test]
fn behind_the_queues_there_is_memory_for_the_device() {
    let capacity = Capacity {
        queues: 2,
        kept: 10_000,
    };
    let mut offer = InflightFile::new(capacity).unwrap();
    for queue_size in [1024, 128] {
        let (bytes, file) = offer.offer(2, queue_size).unwrap();
        let begin = region_bytes(2, queue_size).next_multiple_of(4096);
        assert_eq!(bytes, begin + 10_000);
        let map = |bytes| InflightRegion::map(file, bytes, 0, 2, queue_size, capacity).unwrap();
        let (one, two) = (map(bytes).kept().unwrap(), map(bytes).kept().unwrap());
        assert_eq!(one.len(), 10_000);
        // Empty each time, and whoever comes next finds what was written.
        let mut found = [9; 16];
        one.read(0, &mut found);
        assert_eq!(found, [0; 16]);
        one.write(3, b"left");
        one.store(8, 0x0102);
        two.read(0, &mut found);
        assert_eq!(&found, b"\0\0\0left\0\x02\x01\0\0\0\0\0\0");
        // Nothing goes beyond the end, and nothing into the queues' regions.
        one.write(9_998, &[7; 64]);
        one.store(9_999, 1);
        two.read(20_000, &mut found);
        two.read(9_996, &mut found[..4]);
        assert_eq!(found[..4], [0, 0, 7, 7]);
        assert_eq!(map(begin).kept().map(|k| k.len()), None);
        assert_eq!(map(begin + 5).kept().map(|k| k.len()), Some(5));
    }
}
