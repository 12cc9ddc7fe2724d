//! What the driver has set by commands, in memory that outlives this process: another process
//! that takes its place goes on with the same filter, pairs and offloads, of which the driver
//! says nothing again.
//!
//! Two copies, of which the counter at the beginning names the valid one; the other is written
//! in full before the counter is, so that a process may end between any two stores. What is
//! found is judged like a command: nothing in it is trusted.
//!
//! ```text
//!   0    counter: 0 nothing, odd the first copy, even the second
//!   8    first copy    version u32, flags u32, features u64, offloads u64, pairs u16, mac 6,
//!        second copy   tables' lengths 2 × u16, VLANs 512, tables 2 × 64 × 6
//! ```

use bulkhead_runtime::inflight::KeptMemory;

use crate::features::GUEST_OFFLOADS;
use crate::filter::{Filter, Mac, TABLE, Table, VLANS, is_multicast};

/// Version of this layout. A successor that knows another takes nothing over.
const VERSION: u32 = 1;

const FLAG_PROMISCUOUS: u32 = 1;
const FLAG_ALL_MULTICAST: u32 = 1 << 1;
const FLAG_BY_VLAN: u32 = 1 << 2;
const FLAG_UNICAST_OVERFLOW: u32 = 1 << 3;
const FLAG_MULTICAST_OVERFLOW: u32 = 1 << 4;

const VLAN_BYTES: usize = VLANS / 8;
const TABLE_BYTES: usize = TABLE * 6;
/// Bytes of a copy.
const COPY: usize = 4 + 4 + 8 + 8 + 2 + 6 + 2 + 2 + VLAN_BYTES + 2 * TABLE_BYTES;
/// Bytes of a copy's place.
const PLACE: usize = COPY.next_multiple_of(8);
const FIRST: usize = 8;

/// Bytes in all.
pub const BYTES: u64 = (FIRST + 2 * PLACE) as u64;

/// What the driver has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// The features that it accepted; with others, nothing of this holds.
    pub features: u64,
    /// Which frames it wants.
    pub filter: Filter,
    /// Which offloads it takes.
    pub offloads: u64,
    /// How many pairs it uses.
    pub pairs: u16,
}

fn encode(wishes: &Wishes) -> Vec<u8> {
    let Wishes {
        features,
        filter,
        offloads,
        pairs,
    } = wishes;
    let mut flags = 0;
    for (set, flag) in [
        (filter.promiscuous, FLAG_PROMISCUOUS),
        (filter.all_multicast, FLAG_ALL_MULTICAST),
        (filter.by_vlan, FLAG_BY_VLAN),
        (filter.unicast.is_overflown(), FLAG_UNICAST_OVERFLOW),
        (filter.multicast.is_overflown(), FLAG_MULTICAST_OVERFLOW),
    ] {
        if set {
            flags |= flag;
        }
    }
    let mut copy = Vec::with_capacity(COPY);
    copy.extend(VERSION.to_le_bytes());
    copy.extend(flags.to_le_bytes());
    copy.extend(features.to_le_bytes());
    copy.extend(offloads.to_le_bytes());
    copy.extend(pairs.to_le_bytes());
    copy.extend(filter.mac);
    let tables = [&filter.unicast, &filter.multicast];
    for table in tables {
        let len = u16::try_from(table.entries().len()).unwrap_or(0);
        copy.extend(len.to_le_bytes());
    }
    copy.extend(
        filter
            .vlan_bits()
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    for table in tables {
        let end = copy.len().saturating_add(TABLE_BYTES);
        copy.extend(table.entries().iter().flatten());
        copy.resize(end, 0);
    }
    copy
}

/// Takes the next so many bytes.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (now, later) = rest.split_first_chunk::<N>()?;
    *rest = later;
    Some(*now)
}

fn table(bytes: &[u8], len: u16, overflow: bool) -> Option<Table> {
    let used = bytes.get(..usize::from(len).checked_mul(6)?)?;
    let macs = used.chunks_exact(6).filter_map(|m| Mac::try_from(m).ok());
    Some(Table::kept(macs, overflow))
}

fn decode(copy: &[u8], max_pairs: u16) -> Option<Wishes> {
    let mut rest = copy;
    if u32::from_le_bytes(take(&mut rest)?) != VERSION {
        return None;
    }
    let flags = u32::from_le_bytes(take(&mut rest)?);
    let features = u64::from_le_bytes(take(&mut rest)?);
    let offloads = u64::from_le_bytes(take(&mut rest)?);
    let pairs = u16::from_le_bytes(take(&mut rest)?);
    let mac: Mac = take(&mut rest)?;
    let lengths = [
        u16::from_le_bytes(take(&mut rest)?),
        u16::from_le_bytes(take(&mut rest)?),
    ];
    let vlans: [u8; VLAN_BYTES] = take(&mut rest)?;
    let (unicast, multicast) = rest.split_at_checked(TABLE_BYTES)?;
    let multicast = multicast.get(..TABLE_BYTES)?;
    let [unicast_len, multicast_len] = lengths;
    let sound = flags < FLAG_MULTICAST_OVERFLOW << 1
        && offloads & !(features & GUEST_OFFLOADS) == 0
        && (1..=max_pairs).contains(&pairs)
        && !is_multicast(&mac);
    if !sound {
        return None;
    }
    let mut filter = Filter::new(mac, flags & FLAG_BY_VLAN != 0);
    filter.promiscuous = flags & FLAG_PROMISCUOUS != 0;
    filter.all_multicast = flags & FLAG_ALL_MULTICAST != 0;
    filter.unicast = table(unicast, unicast_len, flags & FLAG_UNICAST_OVERFLOW != 0)?;
    filter.multicast = table(
        multicast,
        multicast_len,
        flags & FLAG_MULTICAST_OVERFLOW != 0,
    )?;
    for (id, bit) in (0u16..).zip((0..VLANS).map(|i| (i / 8, i % 8))) {
        if vlans.get(bit.0).is_some_and(|byte| byte >> bit.1 & 1 != 0) {
            filter.set_vlan(id, true);
        }
    }
    Some(Wishes {
        features,
        filter,
        offloads,
        pairs,
    })
}

/// The memory, and which copy in it is valid.
#[derive(Debug)]
pub struct Kept {
    memory: KeptMemory,
    counter: u64,
}

fn place(counter: u64) -> usize {
    FIRST + if counter & 1 != 0 { 0 } else { PLACE }
}

impl Kept {
    /// What is in the memory, as it was left.
    pub fn new(memory: KeptMemory) -> Self {
        let mut counter = [0; 8];
        memory.read(0, &mut counter);
        Self {
            counter: u64::from_le_bytes(counter),
            memory,
        }
    }

    /// What the driver had set under these features, if it can be used.
    pub fn load(&self, features: u64, max_pairs: u16) -> Option<Wishes> {
        if self.counter == 0 {
            return None;
        }
        let mut copy = vec![0; COPY];
        self.memory.read(place(self.counter), &mut copy);
        decode(&copy, max_pairs).filter(|wishes| wishes.features == features)
    }

    /// Keeps this from now on.
    pub fn save(&mut self, wishes: &Wishes) {
        let next = self.counter.checked_add(1).unwrap_or(1);
        self.memory.write(place(next), &encode(wishes));
        self.memory.store(0, next);
        self.counter = next;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::features as f;

    fn wishes() -> Wishes {
        let mut filter = Filter::new([2, 0, 0, 0, 0, 1], true);
        filter.promiscuous = false;
        filter.all_multicast = true;
        filter.unicast = Table::new((0..3).map(|i| [2, 0, 0, 0, 1, i]));
        filter.multicast = Table::new((0..100).map(|i| [3, 0, 0, 0, 1, i]));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true));
        Wishes {
            features: f::F_GUEST_CSUM | f::F_MQ,
            filter,
            offloads: f::F_GUEST_CSUM,
            pairs: 4,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let copy = encode(&wishes());
        assert_eq!(copy.len(), COPY);
        assert_eq!(decode(&copy, 4), Some(wishes()));
        assert_eq!(decode(&copy, 3), None, "fewer pairs than before");
        assert_eq!(decode(&copy[..COPY - 1], 4), None);
        // A layout that is not this one's.
        let mut other = copy;
        other[0] = 2;
        assert_eq!(decode(&other, 4), None);
    }

    /// The first bytes of version 1 as they have been since it was first written.
    #[test]
    fn version_one_stays_as_it_is() {
        let copy = encode(&wishes());
        let expected = [
            1, 0, 0, 0, 0x16, 0, 0, 0, 2, 0, 0x40, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 2,
            0, 0, 0, 0, 1, 3, 0, 64, 0, 0x20, 0,
        ];
        assert_eq!(copy[..expected.len()], expected);
    }

    proptest! {
        #[test]
        fn nonsense_is_refused_or_bounded(
            change in prop::collection::vec((0..COPY, any::<u8>()), 0..20),
        ) {
            let mut copy = encode(&wishes());
            for (at, byte) in change {
                copy[at] = byte;
            }
            if let Some(wishes) = decode(&copy, 8) {
                prop_assert!((1..=8).contains(&wishes.pairs));
                prop_assert!(!is_multicast(&wishes.filter.mac));
                prop_assert!(wishes.filter.unicast.entries().len() <= TABLE);
                prop_assert_eq!(wishes.offloads & !wishes.features, 0);
            }
        }
    }
}
