//! Which blocks of hot-pluggable memory are plugged, as `MemUpdate.plugged` carries it: one bit
//! each, the first block the lowest bit of the first byte. The VMM's copy is the one that
//! counts; the device process has another to answer its guest from.

use std::ops::Range;

/// Most blocks of a machine: their bits fit into one message with room to spare.
pub const MAX_BLOCKS: u64 = 1 << 17;

/// A bit for each block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    bytes: Vec<u8>,
    blocks: u64,
    plugged: u64,
}

/// What is true of the blocks of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Every one is plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

impl BlockMap {
    /// So many blocks, at most [`MAX_BLOCKS`], none of them plugged.
    pub fn new(blocks: u64) -> Self {
        let blocks = blocks.min(MAX_BLOCKS);
        // Fits: it was just bounded.
        let bytes = usize::try_from(blocks.div_ceil(8)).unwrap_or(0);
        Self {
            bytes: vec![0; bytes],
            blocks,
            plugged: 0,
        }
    }

    /// Takes over what a message carries; false, and nothing is changed, where it is not of as
    /// many blocks.
    pub fn replace(&mut self, bytes: &[u8]) -> bool {
        let mut new = Self::new(self.blocks);
        if bytes.len() != new.bytes.len() {
            return false;
        }
        new.bytes.copy_from_slice(bytes);
        if (new.blocks..new.bits()).any(|block| new.is_plugged(block)) {
            return false;
        }
        new.recount();
        *self = new;
        true
    }

    /// As a message carries it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All blocks.
    pub fn len(&self) -> u64 {
        self.blocks
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Those that are plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Whether a block is; those that do not exist are not.
    pub fn is_plugged(&self, block: u64) -> bool {
        place(block).is_some_and(|(at, bit)| self.bytes.get(at).is_some_and(|b| b & bit != 0))
    }

    /// The blocks from `first` on, if all of them exist and there is at least one.
    pub fn range(&self, first: u64, count: u64) -> Option<Range<u64>> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= self.blocks).then_some(first..end)
    }

    /// What is true of the blocks of a range.
    pub fn look(&self, range: Range<u64>) -> Blocks {
        let (mut some, mut all) = (false, true);
        for block in range {
            let plugged = self.is_plugged(block);
            some |= plugged;
            all &= plugged;
        }
        match (some, all) {
            (_, true) => Blocks::Plugged,
            (false, false) => Blocks::Unplugged,
            (true, false) => Blocks::Mixed,
        }
    }

    /// Plugs or unplugs all blocks of a range.
    pub fn set(&mut self, range: Range<u64>, plugged: bool) {
        for (at, bit) in range.filter(|block| *block < self.blocks).filter_map(place) {
            if let Some(byte) = self.bytes.get_mut(at) {
                *byte = if plugged { *byte | bit } else { *byte & !bit };
            }
        }
        self.recount();
    }

    /// Runs of plugged blocks within a range.
    pub fn runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in range.filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end = block.saturating_add(1),
                _ => runs.push(block..block.saturating_add(1)),
            }
        }
        runs
    }

    fn bits(&self) -> u64 {
        (self.bytes.len() as u64).saturating_mul(8)
    }

    fn recount(&mut self) {
        self.plugged = self.bytes.iter().map(|b| u64::from(b.count_ones())).sum();
    }
}

fn place(block: u64) -> Option<(usize, u8)> {
    let bit = 1_u8.checked_shl(u32::try_from(block % 8).ok()?)?;
    Some((usize::try_from(block / 8).ok()?, bit))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_that_leave_the_map_are_none() {
        let map = BlockMap::new(10);
        assert_eq!(map.range(0, 10), Some(0..10));
        for (first, count) in [(0, 0), (0, 11), (10, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(map.range(first, count), None, "{first} {count}");
        }
        assert_eq!(BlockMap::new(u64::MAX).len(), MAX_BLOCKS);
        assert!(BlockMap::new(0).is_empty());
    }

    #[test]
    fn a_message_of_another_size_or_with_blocks_too_many_changes_nothing() {
        let mut map = BlockMap::new(10);
        map.set(3..5, true);
        let before = map.clone();
        assert!(!map.replace(&[1]) && !map.replace(&[0, 0, 0]) && !map.replace(&[0, 4]));
        assert_eq!(map, before);
        assert!(map.replace(&[1, 2]));
        assert_eq!((map.plugged(), map.runs(0..10)), (2, vec![0..1, 9..10]));
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(
            blocks in 1u64..300,
            steps in prop::collection::vec((0u64..320, 0u64..320, any::<bool>()), 0..40),
        ) {
            let mut map = BlockMap::new(blocks);
            let mut model = std::collections::BTreeSet::new();
            for (first, count, plug) in steps {
                let Some(range) = map.range(first, count) else {
                    prop_assert!(count == 0 || first + count > blocks);
                    continue;
                };
                map.set(range.clone(), plug);
                for block in range.clone() {
                    if plug { model.insert(block); } else { model.remove(&block); }
                }
                let wanted = if plug { Blocks::Plugged } else { Blocks::Unplugged };
                prop_assert_eq!(map.look(range), wanted);
            }
            prop_assert_eq!(map.plugged(), model.len() as u64);
            let runs = map.runs(0..blocks);
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
            prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
            let mut copy = BlockMap::new(blocks);
            prop_assert!(copy.replace(map.as_bytes()));
            prop_assert_eq!(copy, map);
        }
    }
}
