//! The control queue under a driver that keeps to the rules, and under any other.

use crate::memory::MappedMemory;
use proptest::prelude::*;
use vm_memory::{Le16, Le32, Le64};

use super::*;
use crate::virtio::registers::{F_VERSION_1, common as reg};

const RAM: usize = 1 << 20;
const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE_FLAG: u16 = 4;
const ALL: u64 = F_VERSION_1 | net::F_CTRL_VQ | net::F_MQ | net::F_GUEST_ANNOUNCE;

struct Bed {
    memory: MappedMemory,
    control: NetControl,
    next: u16,
    acted: Vec<Command>,
}

/// A control queue for four pairs whose driver accepted `features`.
fn bed(features: u64) -> Bed {
    let memory = MappedMemory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let mut common = CommonConfig::new(ALL | 1 << 28, 9, 256, 10);
    for (which, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
        common.write(reg::DRIVER_FEATURE_SELECT, &which.to_le_bytes());
        common.write(reg::DRIVER_FEATURE, &half.to_le_bytes());
    }
    let index: u16 = if features & net::F_MQ != 0 { 8 } else { 2 };
    common.write(reg::QUEUE_SELECT, &index.to_le_bytes());
    common.write(reg::QUEUE_SIZE, &SIZE.to_le_bytes());
    for (at, value) in [
        (reg::QUEUE_DESC, TABLE),
        (reg::QUEUE_DRIVER, AVAILABLE),
        (reg::QUEUE_DEVICE, USED),
    ] {
        common.write(at, &value.to_le_bytes());
    }
    common.write(reg::QUEUE_ENABLE, &1_u16.to_le_bytes());
    for status in [1_u8, 3, 11, 15] {
        common.write(reg::DEVICE_STATUS, &[status]);
    }
    assert!(common.driver_ok());
    let mut control = NetControl::new(4);
    control.start(&common);
    assert_eq!(control.queue(), Some(index));
    Bed {
        memory,
        control,
        next: 0,
        acted: Vec::new(),
    }
}

impl Bed {
    fn descriptor(&self, table: u64, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        let base = table + 16 * u64::from(at);
        let put = |offset| GuestAddress(base + offset);
        self.memory.write_obj(Le64::from(address), put(0)).unwrap();
        self.memory.write_obj(Le32::from(length), put(8)).unwrap();
        self.memory.write_obj(Le16::from(flags), put(12)).unwrap();
        self.memory.write_obj(Le16::from(next), put(14)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + 2 * u64::from(self.next % SIZE);
        self.memory
            .write_obj(Le16::from(head), GuestAddress(entry))
            .unwrap();
        self.next = self.next.wrapping_add(1);
        let index = Le16::from(self.next);
        self.memory
            .write_obj(index, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    fn serve(&mut self) -> Result<Served, Malformed> {
        let acted = &mut self.acted;
        self.control.serve(&self.memory, &mut |command| {
            acted.push(command);
            true
        })
    }

    fn used(&self) -> u16 {
        let index: Le16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        index.into()
    }

    /// A command as Linux sends it: header, data, status. What became of it.
    fn command(&mut self, command: &[u8]) -> u8 {
        let (header, data) = command.split_at(2);
        self.memory.write_slice(header, GuestAddress(DATA)).unwrap();
        let rest = GuestAddress(DATA + 0x100);
        self.memory.write_slice(data, rest).unwrap();
        self.memory
            .write_obj(0xee_u8, GuestAddress(STATUS))
            .unwrap();
        self.descriptor(TABLE, 0, DATA, 2, NEXT, 1);
        self.descriptor(TABLE, 1, DATA + 0x100, data.len() as u32, NEXT, 2);
        self.descriptor(TABLE, 2, STATUS, 1, WRITE, 0);
        self.offer(0);
        let before = self.used();
        let served = self.serve().unwrap();
        assert!(served.signal);
        if served.more {
            assert_eq!(self.serve(), Ok(Served::default()), "there was no more");
        }
        assert_eq!(self.used(), before + 1);
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }
}

#[test]
fn pairs_are_set_within_bounds_and_announcements_acknowledged() {
    let mut bed = bed(ALL);
    assert_eq!(bed.control.in_use(), 1);
    let whole = Shape {
        served: 8,
        enabled: 2,
    };
    assert_eq!(bed.control.shape(ALL), whole);
    assert_eq!(bed.command(&[4, 0, 3, 0]), OK);
    assert_eq!(bed.control.in_use(), 3);
    assert_eq!(bed.control.shape(ALL).enabled, 6);
    for bad in [[0, 0], [5, 0], [0, 0x80], [0xff, 0xff]] {
        assert_eq!(bed.command(&[4, 0, bad[0], bad[1]]), ERR, "{bad:?}");
    }
    assert_eq!(bed.control.in_use(), 3);
    assert_eq!(bed.command(&[4, 0, 1]), ERR, "half a number");
    assert_eq!(bed.command(&[4, 1, 1, 0]), ERR, "RSS is not offered");
    assert_eq!(bed.command(&[3, 0]), OK);
    assert_eq!(bed.acted, [Command::Pairs(3), Command::Announced]);
    bed.control.reset();
    assert_eq!((bed.control.in_use(), bed.control.queue()), (1, None));
    assert_eq!(bed.serve(), Ok(Served::default()), "nothing to serve");
}

#[test]
fn commands_of_features_that_are_not_offered_or_accepted_are_refused() {
    let mut bed = bed(ALL);
    let table = [&[1_u8, 0, 0xff, 0xff, 0xff, 0xff][..], &[0; 100]].concat();
    for command in [
        &[0_u8, 0, 1][..], // promiscuous
        &[1, 1, 2, 2, 3, 4, 5, 6],
        &table,
        &[2, 0, 7, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0],
        &[255, 255],
    ] {
        assert_eq!(bed.command(command), ERR, "{command:?}");
    }
    assert!(bed.acted.is_empty());
    let mut bed = super::tests::bed(F_VERSION_1 | net::F_CTRL_VQ);
    assert_eq!(bed.command(&[4, 0, 1, 0]), ERR);
    assert_eq!(bed.command(&[3, 0]), ERR);
    let one = Shape {
        served: 2,
        enabled: 2,
    };
    assert_eq!(bed.control.shape(F_VERSION_1), one);
}

#[test]
fn a_command_may_be_cut_up_and_lie_in_an_indirect_table() {
    let mut bed = bed(ALL | 1 << 28);
    bed.memory
        .write_slice(&[4, 0, 2, 0], GuestAddress(DATA))
        .unwrap();
    for at in 0..4 {
        bed.descriptor(INDIRECT, at, DATA + u64::from(at), 1, NEXT, at + 1);
    }
    bed.descriptor(INDIRECT, 4, STATUS + 8, 0, NEXT | WRITE, 5);
    bed.descriptor(INDIRECT, 5, STATUS, 4, WRITE, 0);
    bed.descriptor(TABLE, 7, INDIRECT, 6 * 16, TABLE_FLAG, 0);
    bed.offer(7);
    bed.serve().unwrap();
    assert_eq!(bed.acted, [Command::Pairs(2)]);
    let used: Le32 = bed.memory.read_obj(GuestAddress(USED + 4)).unwrap();
    assert_eq!(u32::from(used), 7);
}

#[test]
fn a_chain_that_breaks_the_rules_stops_the_queue_until_a_reset() {
    type Spoil = fn(&Bed);
    let spoils: [(&str, Spoil); 9] = [
        ("no status", |b| {
            b.descriptor(TABLE, 2, STATUS, 1, 0, 0);
        }),
        ("an empty status", |b| {
            b.descriptor(TABLE, 2, STATUS, 0, WRITE, 0);
        }),
        ("a status outside memory", |b| {
            b.descriptor(TABLE, 2, RAM as u64, 1, WRITE, 0);
        }),
        ("a request outside memory", |b| {
            b.descriptor(TABLE, 1, u64::MAX - 1, 2, NEXT, 2);
        }),
        ("too many bytes", |b| {
            b.descriptor(TABLE, 1, DATA, (MAX_BYTES + 1) as u32, NEXT, 2);
        }),
        ("a loop", |b| {
            b.descriptor(TABLE, 2, DATA, 1, NEXT, 0);
        }),
        ("a chain that leads out of the table", |b| {
            b.descriptor(TABLE, 2, STATUS, 1, WRITE | NEXT, SIZE);
        }),
        ("something to read behind the status", |b| {
            b.descriptor(TABLE, 2, STATUS, 1, WRITE | NEXT, 3);
            b.descriptor(TABLE, 3, DATA, 1, 0, 0);
        }),
        ("a table in memory that is not there", |b| {
            b.descriptor(TABLE, 0, RAM as u64, 32, TABLE_FLAG, 0);
        }),
    ];
    for (what, spoil) in spoils {
        let mut bed = bed(ALL);
        bed.memory
            .write_slice(&[4, 0, 2, 0], GuestAddress(DATA))
            .unwrap();
        bed.descriptor(TABLE, 0, DATA, 2, NEXT, 1);
        bed.descriptor(TABLE, 1, DATA + 2, 2, NEXT, 2);
        bed.descriptor(TABLE, 2, STATUS, 1, WRITE, 0);
        spoil(&bed);
        bed.offer(0);
        assert_eq!(bed.serve(), Err(Malformed), "{what}");
        assert_eq!(bed.serve(), Ok(Served::default()), "{what}");
        assert!(bed.acted.is_empty() && bed.used() == 0, "{what}");
        assert_eq!(bed.control.queue(), None, "{what}");
    }
    let mut bed = bed(ALL);
    bed.next = SIZE;
    bed.offer(0);
    assert_eq!(bed.serve(), Err(Malformed), "more entries than there are");
    let mut bed = super::tests::bed(ALL);
    bed.offer(SIZE);
    assert_eq!(bed.serve(), Err(Malformed), "a head outside the table");
}

#[test]
fn a_turn_is_bounded_and_interrupts_follow_the_drivers_wish() {
    let mut bed = bed(ALL);
    bed.command(&[3, 0]);
    for _ in 0..SIZE {
        bed.offer(0);
    }
    // No interrupt wanted.
    let flags = GuestAddress(AVAILABLE);
    bed.memory.write_obj(Le16::from(1), flags).unwrap();
    let served = bed.serve().unwrap();
    assert!(!served.signal && !served.more);
    assert_eq!(bed.used(), SIZE + 1);
    // One for which the back-end is waited for ends its turn.
    bed.memory
        .write_slice(&[4, 0, 3, 0], GuestAddress(DATA))
        .unwrap();
    bed.descriptor(TABLE, 0, DATA, 4, NEXT, 2);
    bed.offer(0);
    bed.offer(0);
    assert!(bed.serve().unwrap().more);
    assert_eq!(bed.used(), SIZE + 2);
    assert!(!bed.serve().unwrap().more);
    assert_eq!(bed.used(), SIZE + 3);
}

proptest! {
    /// Whatever lies in the ring: an answer or an error, and no status where none belongs.
    #[test]
    fn any_ring_ends_in_answers_or_an_error(
        descriptors in proptest::collection::vec(
            (
                prop_oneof![Just(DATA), Just(STATUS), Just(INDIRECT), 0_u64..RAM as u64, any::<u64>()],
                prop_oneof![0_u32..5, Just(16), Just(64), any::<u32>()],
                prop_oneof![0_u16..8, any::<u16>()],
                prop_oneof![0_u16..SIZE, any::<u16>()],
            ),
            0..32,
        ),
        heads in proptest::collection::vec(prop_oneof![0_u16..SIZE, any::<u16>()], 0..20),
        available in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
        request in any::<[u8; 4]>(),
    ) {
        let mut bed = bed(ALL | 1 << 28);
        bed.memory.write_slice(&request, GuestAddress(DATA)).unwrap();
        for (at, (address, length, flags, next)) in (0..).zip(descriptors) {
            let table = if at < SIZE { TABLE } else { INDIRECT };
            bed.descriptor(table, at % SIZE, address, length, flags, next);
        }
        for head in heads {
            bed.offer(head);
        }
        if let Some(available) = available {
            let index = Le16::from(available);
            bed.memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
        }
        for _ in 0..4 {
            if bed.serve().is_err() {
                prop_assert_eq!(bed.control.queue(), None);
            }
        }
        prop_assert!((1..=4).contains(&bed.control.in_use()));
    }
}
