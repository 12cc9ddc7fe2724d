//! Which frames the driver wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3: receive mode, MAC
//! tables, VLAN table). Pure.
//!
//! The control queue's worker changes the one that all share ([`crate::state`]); each worker
//! of a pair judges frames by a copy of its own.

/// Addresses kept in each table; with more, the table counts as "all of this kind", as the
/// specification allows a device that runs out of room.
pub const TABLE: usize = 64;

/// VLAN ids: twelve bits.
pub const VLANS: usize = 4096;

/// A MAC address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
/// Ethertypes whose two next bytes hold a VLAN id.
const VLAN_TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// Whether an address names a group.
pub fn is_multicast(mac: &Mac) -> bool {
    matches!(mac, [first, ..] if first & 1 != 0)
}

/// A bounded table of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    entries: [Mac; TABLE],
    used: usize,
    /// The driver wanted more than there is room for.
    overflow: bool,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            entries: [[0; 6]; TABLE],
            used: 0,
            overflow: false,
        }
    }
}

impl Table {
    /// A table of these addresses, or of all there are if they do not fit.
    pub fn new(macs: impl Iterator<Item = Mac>) -> Self {
        let mut table = Self::default();
        for mac in macs {
            match table.entries.get_mut(table.used) {
                Some(entry) => {
                    *entry = mac;
                    table.used += 1;
                }
                None => {
                    table.overflow = true;
                    return table;
                }
            }
        }
        table
    }

    /// A table as it was: these addresses, and whether it stands for all of its kind.
    pub fn kept(macs: impl Iterator<Item = Mac>, overflow: bool) -> Self {
        let mut table = Self::new(macs);
        table.overflow |= overflow;
        table
    }

    /// The addresses that are kept.
    pub fn entries(&self) -> &[Mac] {
        self.entries.get(..self.used).unwrap_or_default()
    }

    /// Whether it stands for all addresses of its kind.
    pub fn is_overflown(&self) -> bool {
        self.overflow
    }

    fn has(&self, mac: &Mac) -> bool {
        self.overflow || self.entries().contains(mac)
    }
}

/// The whole filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The address in force.
    pub mac: Mac,
    /// Everything passes. So it is until the driver says otherwise.
    pub promiscuous: bool,
    /// All groups pass.
    pub all_multicast: bool,
    /// Single addresses besides `mac`.
    pub unicast: Table,
    /// Groups.
    pub multicast: Table,
    /// The driver tells which VLANs it wants; else all pass.
    pub by_vlan: bool,
    vlans: [u64; VLANS / 64],
}

impl Filter {
    /// The filter after a reset: everything passes but, if the driver filters VLANs at all,
    /// tagged frames.
    pub fn new(mac: Mac, by_vlan: bool) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Table::default(),
            multicast: Table::default(),
            by_vlan,
            vlans: [0; VLANS / 64],
        }
    }

    /// Wants a VLAN, or no more; false if there is no such id.
    pub fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let bit = 1u64 << (id % 64);
        let Some(word) = self.vlans.get_mut(usize::from(id / 64)) else {
            return false;
        };
        if wanted {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        true
    }

    /// The VLANs that are wanted.
    pub fn vlans(&self) -> impl Iterator<Item = u16> + '_ {
        (0u16..).zip(&self.vlans).flat_map(|(i, word)| {
            (0..64u16).filter_map(move |bit| (word >> bit & 1 != 0).then_some(i * 64 + bit))
        })
    }

    /// The same, one bit each, from the lowest on.
    pub fn vlan_bits(&self) -> &[u64; VLANS / 64] {
        &self.vlans
    }

    fn has_vlan(&self, id: u16) -> bool {
        self.vlans
            .get(usize::from(id / 64))
            .is_some_and(|word| word >> (id % 64) & 1 != 0)
    }

    /// Whether the driver wants this Ethernet frame. What is too short to tell does not pass.
    #[inline]
    pub fn passes(&self, frame: &[u8]) -> bool {
        let Some((header, rest)) = frame.split_first_chunk::<14>() else {
            return false;
        };
        if self.promiscuous {
            return true;
        }
        let [d0, d1, d2, d3, d4, d5, _, _, _, _, _, _, t0, t1] = *header;
        if self.by_vlan
            && VLAN_TAGS.contains(&[t0, t1])
            && let [v0, v1, ..] = *rest
            && !self.has_vlan(u16::from_be_bytes([v0, v1]) & 0xfff)
        {
            return false;
        }
        let to = [d0, d1, d2, d3, d4, d5];
        if to == self.mac || to == BROADCAST {
            true
        } else if is_multicast(&to) {
            self.all_multicast || self.multicast.has(&to)
        } else {
            self.unicast.has(&to)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: Mac = [2, 0, 0, 0, 0, 1];

    fn frame(to: Mac, tag: Option<u16>) -> Vec<u8> {
        let mut f = to.to_vec();
        f.extend([2, 0, 0, 0, 0, 9]);
        if let Some(id) = tag {
            f.extend([0x81, 0]);
            f.extend((id | 0xe000).to_be_bytes());
        }
        f.extend([8, 0, 0x45]);
        f
    }

    fn quiet() -> Filter {
        let mut f = Filter::new(ME, false);
        f.promiscuous = false;
        f
    }

    #[test]
    fn until_the_driver_speaks_everything_passes() {
        let f = Filter::new(ME, true);
        assert!(f.passes(&frame([4; 6], Some(7))));
        assert!(!f.passes(&[0; 13]), "no Ethernet frame");
    }

    #[test]
    fn own_address_and_broadcast_pass_and_others_by_table() {
        let mut f = quiet();
        assert!(f.passes(&frame(ME, None)));
        assert!(f.passes(&frame([0xff; 6], None)));
        assert!(!f.passes(&frame([2, 0, 0, 0, 0, 2], None)));
        assert!(!f.passes(&frame([3, 0, 0, 0, 0, 2], None)));
        f.unicast = Table::new([[2, 0, 0, 0, 0, 2]].into_iter());
        f.multicast = Table::new([[3, 0, 0, 0, 0, 2]].into_iter());
        assert!(f.passes(&frame([2, 0, 0, 0, 0, 2], None)));
        assert!(f.passes(&frame([3, 0, 0, 0, 0, 2], None)));
        assert!(!f.passes(&frame([3, 0, 0, 0, 0, 3], None)));
        f.all_multicast = true;
        assert!(f.passes(&frame([3, 0, 0, 0, 0, 3], None)));
        assert!(!f.passes(&frame([2, 0, 0, 0, 0, 3], None)));
    }

    #[test]
    fn a_table_that_overflows_stands_for_all_of_its_kind() {
        let many = |first: u8| (0..=TABLE as u8).map(move |i| [first, 0, 0, 0, 1, i]);
        let mut f = quiet();
        f.unicast = Table::new(many(2));
        assert!(f.unicast.is_overflown());
        assert_eq!(f.unicast.entries().len(), TABLE);
        assert!(f.passes(&frame([2, 9, 9, 9, 9, 9], None)));
        assert!(!f.passes(&frame([3, 9, 9, 9, 9, 9], None)));
        f.unicast = Table::new(many(2).take(TABLE));
        assert!(!f.unicast.is_overflown());
        assert!(!f.passes(&frame([2, 9, 9, 9, 9, 9], None)));
    }

    #[test]
    fn tagged_frames_pass_by_their_vlan() {
        let mut f = Filter::new(ME, true);
        f.promiscuous = false;
        assert!(f.passes(&frame(ME, None)), "untagged");
        assert!(!f.passes(&frame(ME, Some(5))));
        assert!(f.set_vlan(5, true) && f.set_vlan(4095, true));
        assert!(!f.set_vlan(4096, true));
        assert!(f.passes(&frame(ME, Some(5))));
        assert!(f.passes(&frame(ME, Some(4095))));
        assert!(!f.passes(&frame(ME, Some(6))));
        assert!(!f.passes(&frame([4; 6], Some(5))), "another's address");
        assert_eq!(f.vlans().collect::<Vec<_>>(), [5, 4095]);
        assert!(f.set_vlan(5, false));
        assert_eq!(f.vlans().collect::<Vec<_>>(), [4095]);
        f.by_vlan = false;
        assert!(f.passes(&frame(ME, Some(6))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(frame in prop::collection::vec(any::<u8>(), 0..64), vlan: bool) {
            let mut f = Filter::new(ME, vlan);
            f.promiscuous = false;
            let _ = f.passes(&frame);
        }
    }
}
