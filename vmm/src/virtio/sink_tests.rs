//! What a console's driver sends where nobody serves it, by a driver that keeps to the rules and by
//! any other.

use vm_memory::{Bytes, GuestAddress, Le16, Le32, Le64};

use super::*;
use crate::virtio::registers::{F_VERSION_1, common as reg};

const SIZE: u16 = 16;
/// Descriptors, available and used ring of queue 1, and where those of queue 3 are.
const RING: [u64; 3] = [0x1000, 0x2000, 0x3000];
const NEXT_RING: u64 = 0x8000;

fn memory() -> MappedMemory {
    MappedMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// A console with four queues, all of which the driver uses.
fn console() -> CommonConfig {
    let mut common = CommonConfig::new(F_VERSION_1, 4, 256, 5);
    common.write(reg::DRIVER_FEATURE_SELECT, &1_u32.to_le_bytes());
    common.write(reg::DRIVER_FEATURE, &1_u32.to_le_bytes());
    for index in 0..4_u16 {
        let offset = u64::from(index / 2) * NEXT_RING + u64::from(index % 2 == 0) * 0x4_0000;
        common.write(reg::QUEUE_SELECT, &index.to_le_bytes());
        common.write(reg::QUEUE_SIZE, &SIZE.to_le_bytes());
        let [table, available, used] = RING.map(|at| at + offset);
        common.write(reg::QUEUE_DESC, &table.to_le_bytes());
        common.write(reg::QUEUE_DRIVER, &available.to_le_bytes());
        common.write(reg::QUEUE_DEVICE, &used.to_le_bytes());
        common.write(reg::QUEUE_ENABLE, &1_u16.to_le_bytes());
    }
    for status in [1_u8, 3, 11, 15] {
        common.write(reg::DEVICE_STATUS, &[status]);
    }
    assert!(common.driver_ok());
    common
}

/// Makes the chain that begins at `head` available as the one with this number.
fn send(memory: &MappedMemory, ring: u64, number: u16, head: u16) {
    let table = GuestAddress(RING[0] + ring + u64::from(head) * 16);
    memory.write_obj(Le64::from(0x9_0000), table).unwrap();
    let len = GuestAddress(table.0 + 8);
    memory.write_obj(Le32::from(64), len).unwrap();
    let slot = GuestAddress(RING[1] + ring + 4 + u64::from(number % SIZE) * 2);
    memory.write_obj(Le16::from(head), slot).unwrap();
    let index = Le16::from(number.wrapping_add(1));
    memory
        .write_obj(index, GuestAddress(RING[1] + ring + 2))
        .unwrap();
}

fn used(memory: &MappedMemory, ring: u64) -> u16 {
    let index: Le16 = memory.read_obj(GuestAddress(RING[2] + ring + 2)).unwrap();
    index.into()
}

#[test]
fn what_is_sent_by_each_port_is_given_back_and_what_waits_for_input_is_not() {
    let (memory, common) = (memory(), console());
    // The process had taken two of them.
    for number in 0..2 {
        send(&memory, 0, number, number);
    }
    memory
        .write_obj(Le16::from(2), GuestAddress(RING[2] + 2))
        .unwrap();
    let mut sinks = Sinks::new(&common, &memory);
    assert_eq!(sinks.queues().collect::<Vec<_>>(), [1, 3]);
    for number in 2..9 {
        send(&memory, 0, number, number);
    }
    send(&memory, NEXT_RING, 0, 5);
    for (index, served) in sinks.serve(&memory) {
        let served = served.unwrap();
        assert!(served.signal && !served.more, "{index}: {served:?}");
    }
    assert_eq!((used(&memory, 0), used(&memory, NEXT_RING)), (9, 1));
    let head: Le32 = memory
        .read_obj(GuestAddress(RING[2] + NEXT_RING + 4))
        .unwrap();
    let len: Le32 = memory
        .read_obj(GuestAddress(RING[2] + NEXT_RING + 8))
        .unwrap();
    assert_eq!((u32::from(head), u32::from(len)), (5, 0));
    // What the driver has put there to be filled stays.
    assert_eq!(used(&memory, 0x4_0000), 0);
    for (_, served) in sinks.serve(&memory) {
        assert!(!served.unwrap().signal);
    }
}

#[test]
fn a_ring_that_breaks_the_rules_stops_alone() {
    let (memory, common) = (memory(), console());
    let mut sinks = Sinks::new(&common, &memory);
    // More than the ring has room for.
    memory
        .write_obj(Le16::from(SIZE + 1), GuestAddress(RING[1] + 2))
        .unwrap();
    send(&memory, NEXT_RING, 0, 3);
    let served = sinks.serve(&memory);
    assert_eq!(served[0], (1, Err(Malformed)));
    assert!(served[1].1.is_ok());
    assert_eq!((used(&memory, 0), used(&memory, NEXT_RING)), (0, 1));
    assert_eq!(sinks.queues().collect::<Vec<_>>(), [3]);
}
