//! Where the metadata of a qcow2 image lie (QEMU's docs/interop/qcow2.rst, "Host cluster
//! management" and "Cluster mapping"): every cluster that holds the header, the L1 table, an
//! L2 table, the refcount table or a refcount block, and nothing else may lie there.
//!
//! Built from the two root tables when an image is opened for writing, and kept up to date
//! by [`crate::qcow2_store`] as tables are added. Pure: no I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::qcow2_header::Header;

/// Bits of a table entry that hold an offset.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// The table is referenced once, so that it can be written where it lies.
const COPIED: u64 = 1 << 63;
/// Bits of a refcount table entry that hold an offset.
const REFTABLE_OFFSET: u64 = !0x1ff;
/// Refcount blocks that may count clusters beyond the end of the file: a file can have been
/// cut since. More would make a search for a free cluster long.
const BLOCKS_BEYOND_END: usize = 64;

/// What a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The header.
    Header,
    /// Part of the table of L2 tables.
    L1,
    /// A table of guest clusters.
    L2,
    /// Part of the table of refcount blocks.
    Reftable,
    /// Reference counts; the index in the refcount table.
    Refblock(u32),
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1 => "the L1 table",
            Self::L2 => "an L2 table",
            Self::Reftable => "the refcount table",
            Self::Refblock(_) => "a refcount block",
        }
    }
}

/// Why the tables of an image are not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// An entry that makes no sense.
    #[error(
        "is corrupt: entry {index} of {table} is {value:#x}; repair it (qemu-img check -r all)"
    )]
    Entry {
        /// Which table.
        table: &'static str,
        /// Which entry.
        index: usize,
        /// What it says.
        value: u64,
    },
    /// Two tables in one place.
    #[error(
        "is corrupt: {0} and {1} share the cluster at {2:#x}; repair it (qemu-img check -r all)"
    )]
    Shared(&'static str, &'static str, u64),
    /// Nobody counts the header.
    #[error(
        "is corrupt: it has no refcount block for its header; repair it (qemu-img check -r all)"
    )]
    Uncounted,
    /// An absurd number of refcount blocks.
    #[error(
        "has refcount blocks far beyond its end; make a plain copy \
         (qemu-img convert -O qcow2 IMAGE COPY)"
    )]
    BeyondEnd,
}

/// The clusters that hold metadata.
#[derive(Debug)]
pub struct Map {
    cluster_bits: u32,
    kinds: BTreeMap<u64, Kind>,
    l1: Range<u64>,
    reftable: Range<u64>,
}

fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table
        .chunks_exact(8)
        .map(|e| e.try_into().map_or(0, u64::from_be_bytes))
}

impl Map {
    /// Reads the two root tables of an image in a file of `file_len` bytes.
    pub fn new(
        header: &Header,
        l1: &[u8],
        reftable: &[u8],
        file_len: u64,
    ) -> Result<Self, MapError> {
        let mut map = Self {
            cluster_bits: header.cluster_bits,
            kinds: BTreeMap::new(),
            l1: header.l1_offset..header.l1_offset.saturating_add(l1.len() as u64),
            reftable: header.reftable_offset
                ..header.reftable_offset.saturating_add(reftable.len() as u64),
        };
        map.claim(0..1, Kind::Header)?;
        map.claim(map.l1.clone(), Kind::L1)?;
        map.claim(map.reftable.clone(), Kind::Reftable)?;
        let clusters = file_len.div_ceil(header.cluster_size());
        let end = clusters << header.cluster_bits;
        for (index, value) in entries(l1).enumerate() {
            map.add_l2(index, value, Some(end))?;
        }
        let mut beyond = 0usize;
        for (index, value) in entries(reftable).enumerate() {
            if index == 0 && value == 0 {
                return Err(MapError::Uncounted);
            }
            map.add_refblock(index, value, Some(end))?;
            if value != 0 && (index as u64) << header.refblock_bits() >= clusters {
                beyond = beyond.saturating_add(1);
            }
        }
        if beyond > BLOCKS_BEYOND_END {
            return Err(MapError::BeyondEnd);
        }
        Ok(map)
    }

    /// What the cluster that holds this byte is.
    pub fn kind(&self, offset: u64) -> Option<Kind> {
        self.kinds.get(&(offset >> self.cluster_bits)).copied()
    }

    /// The first metadata in a range of bytes.
    pub fn first_in(&self, range: &Range<u64>) -> Option<(u64, Kind)> {
        if range.is_empty() {
            return None;
        }
        let last = range.end.saturating_sub(1) >> self.cluster_bits;
        self.kinds
            .range(range.start >> self.cluster_bits..=last)
            .next()
            .map(|(&cluster, &kind)| (cluster << self.cluster_bits, kind))
    }

    /// The metadata among clusters, by cluster number.
    pub fn clusters_in(&self, clusters: Range<u64>) -> impl Iterator<Item = u64> {
        self.kinds.range(clusters).map(|(&cluster, _)| cluster)
    }

    /// Where the L1 table lies.
    pub fn l1(&self) -> &Range<u64> {
        &self.l1
    }

    /// Where the refcount table lies.
    pub fn reftable(&self) -> &Range<u64> {
        &self.reftable
    }

    /// Bytes of the L1 table at `offset` are about to be these: learns of new L2 tables.
    pub fn l1_written(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MapError> {
        let first = index_of(offset, &self.l1);
        for (i, value) in entries(bytes).enumerate() {
            self.add_l2(first.saturating_add(i), value, None)?;
        }
        Ok(())
    }

    /// Bytes of the refcount table are about to be these: learns of new refcount blocks.
    pub fn reftable_written(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MapError> {
        let first = index_of(offset, &self.reftable);
        for (i, value) in entries(bytes).enumerate() {
            self.add_refblock(first.saturating_add(i), value, None)?;
        }
        Ok(())
    }

    /// The L1 table lies elsewhere now.
    pub fn move_l1(&mut self, to: Range<u64>) -> Result<(), MapError> {
        self.kinds.retain(|_, kind| *kind != Kind::L1);
        self.l1 = to.clone();
        self.claim(to, Kind::L1)
    }

    /// The refcount table lies elsewhere now, with this content.
    pub fn move_reftable(&mut self, to: Range<u64>, table: &[u8]) -> Result<(), MapError> {
        self.kinds.retain(|_, kind| *kind != Kind::Reftable);
        self.reftable = to.clone();
        self.claim(to.clone(), Kind::Reftable)?;
        self.reftable_written(to.start, table)
    }

    /// With `end`, an existing image is read: its tables must lie within the file.
    fn add_l2(&mut self, index: usize, value: u64, end: Option<u64>) -> Result<(), MapError> {
        let offset = value & L1_OFFSET;
        let bad = MapError::Entry {
            table: "the L1 table",
            index,
            value,
        };
        if value == 0 {
            return Ok(());
        }
        if value & L1_RESERVED != 0 || value & COPIED == 0 {
            return Err(bad);
        }
        self.add_table(offset, Kind::L2, end, bad)
    }

    fn add_refblock(&mut self, index: usize, value: u64, end: Option<u64>) -> Result<(), MapError> {
        let bad = MapError::Entry {
            table: "the refcount table",
            index,
            value,
        };
        if value == 0 {
            return Ok(());
        }
        let Ok(number) = u32::try_from(index) else {
            return Err(bad);
        };
        if value & !REFTABLE_OFFSET != 0 {
            return Err(bad);
        }
        self.add_table(value, Kind::Refblock(number), end, bad)
    }

    fn add_table(
        &mut self,
        offset: u64,
        kind: Kind,
        end: Option<u64>,
        bad: MapError,
    ) -> Result<(), MapError> {
        let aligned = offset & ((1 << self.cluster_bits) - 1) == 0;
        if !aligned || offset == 0 || end.is_some_and(|end| offset >= end) {
            return Err(bad);
        }
        // A write repeats the entries around the one that changes.
        if end.is_none() && self.kind(offset) == Some(kind) {
            return Ok(());
        }
        self.claim(offset..offset.saturating_add(1), kind)
    }

    fn claim(&mut self, range: Range<u64>, kind: Kind) -> Result<(), MapError> {
        if let Some((at, other)) = self.first_in(&range) {
            return Err(MapError::Shared(kind.name(), other.name(), at));
        }
        let last = range.end.saturating_sub(1) >> self.cluster_bits;
        for cluster in range.start >> self.cluster_bits..=last {
            self.kinds.insert(cluster, kind);
        }
        Ok(())
    }
}

fn index_of(offset: u64, table: &Range<u64>) -> usize {
    usize::try_from(offset.saturating_sub(table.start) / 8).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 1 << 16;

    fn header() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 1 << 40,
            l1_entries: 2048,
            l1_offset: 3 * CLUSTER,
            reftable_offset: CLUSTER,
            reftable_clusters: 1,
            refcount_order: 4,
            snapshots: 0,
            autoclear: 0,
            backing: None,
        }
    }

    fn table(entries: &[(usize, u64)], len: usize) -> Vec<u8> {
        let mut table = vec![0; len];
        for &(i, value) in entries {
            table[i * 8..i * 8 + 8].copy_from_slice(&value.to_be_bytes());
        }
        table
    }

    fn map(l1: &[(usize, u64)], reftable: &[(usize, u64)]) -> Result<Map, MapError> {
        Map::new(
            &header(),
            &table(l1, 2048 * 8),
            &table(reftable, CLUSTER as usize),
            100 * CLUSTER - 5,
        )
    }

    #[test]
    fn every_table_has_a_place_of_its_own() {
        let counted = [(0, 2 * CLUSTER)];
        let good = map(&[(7, COPIED | (5 * CLUSTER))], &counted).unwrap();
        assert_eq!(good.kind(5 * CLUSTER + 9), Some(Kind::L2));
        assert_eq!(good.kind(2 * CLUSTER), Some(Kind::Refblock(0)));
        assert_eq!(good.kind(4 * CLUSTER), None);
        let hit = good.first_in(&(4 * CLUSTER..5 * CLUSTER + 1));
        assert_eq!(hit, Some((5 * CLUSTER, Kind::L2)));
        assert_eq!(good.first_in(&(4 * CLUSTER..5 * CLUSTER)), None);

        for (l1, reftable) in [
            (vec![(0, COPIED)], vec![(0, 2 * CLUSTER)]),
            (vec![(0, COPIED | (3 * CLUSTER))], vec![(0, 2 * CLUSTER)]),
            (vec![(0, COPIED | (2 * CLUSTER))], vec![(0, 2 * CLUSTER)]),
            (vec![(0, COPIED | (100 * CLUSTER))], vec![(0, 2 * CLUSTER)]),
            (
                vec![(0, COPIED | (5 * CLUSTER + 512))],
                vec![(0, 2 * CLUSTER)],
            ),
            (vec![(0, 5 * CLUSTER)], vec![(0, 2 * CLUSTER)]),
            (
                vec![(0, COPIED | (5 * CLUSTER)), (1, COPIED | (5 * CLUSTER))],
                vec![(0, 2 * CLUSTER)],
            ),
            (vec![], vec![]),
            (vec![], vec![(0, 2 * CLUSTER), (1, 2 * CLUSTER)]),
            (vec![], vec![(0, u64::MAX)]),
            (vec![], vec![(0, 1 << 63)]),
        ] {
            assert!(map(&l1, &reftable).is_err(), "{l1:x?} {reftable:x?}");
        }
        // Many blocks that count what no file has.
        let blocks: Vec<_> = (0..80).map(|i| (i, (10 + i as u64) * CLUSTER)).collect();
        assert_eq!(map(&[], &blocks).map(|_| ()), Err(MapError::BeyondEnd));
    }

    #[test]
    fn new_tables_are_learnt_and_clashes_are_not() {
        let mut m = map(&[(7, COPIED | (5 * CLUSTER))], &[(0, 2 * CLUSTER)]).unwrap();
        let at = m.l1().start + 6 * 8;
        let block = table(
            &[(0, COPIED | (90 * CLUSTER)), (1, COPIED | (5 * CLUSTER))],
            16,
        );
        m.l1_written(at, &block).unwrap();
        assert_eq!(m.kind(90 * CLUSTER), Some(Kind::L2));
        assert!(
            m.l1_written(at, &table(&[(0, COPIED | (2 * CLUSTER))], 8))
                .is_err()
        );

        m.move_reftable(
            200 * CLUSTER..202 * CLUSTER,
            &table(&[(0, 2 * CLUSTER), (9, 91 * CLUSTER)], 128),
        )
        .unwrap();
        assert_eq!(m.kind(CLUSTER), None);
        assert_eq!(m.kind(201 * CLUSTER), Some(Kind::Reftable));
        assert_eq!(m.kind(91 * CLUSTER), Some(Kind::Refblock(9)));
        m.move_l1(300 * CLUSTER..300 * CLUSTER + 8).unwrap();
        assert_eq!(m.kind(3 * CLUSTER), None);
    }
}
