//! The device's memory area: where it lies, what the guest is asked to have of it, and which
//! blocks are plugged, as the VMM has said. Shared by the main thread and the worker.

use std::ops::Range;

use bulkhead_proto::BlockMap;
use bulkhead_proto::block_map::{Blocks, MAX_BLOCKS};
use bulkhead_proto::device::{MemRequest, MemUpdate, mem_request::Kind};

use crate::request::Wish;

/// Bytes of `struct virtio_mem_config`.
const CONFIG: usize = 56;

/// VIRTIO_MEM_STATE_*.
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// Where the memory lies that can be plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
}

impl Area {
    /// An area that makes sense.
    ///
    /// # Errors
    /// What does not.
    pub fn new(start: u64, size: u64, block: u64) -> Result<Self, &'static str> {
        if !block.is_power_of_two() || block < 4096 {
            return Err("the block size must be a power of two from 4096 on");
        }
        if size == 0 || !size.is_multiple_of(block) || !start.is_multiple_of(block) {
            return Err("start and size must be multiples of the block size");
        }
        if start.checked_add(size).is_none() || size / block > MAX_BLOCKS {
            return Err("too large, or at the end of the address space");
        }
        Ok(Self { start, size, block })
    }

    fn blocks(&self) -> u64 {
        // A power of two: never zero.
        self.size.checked_div(self.block).unwrap_or(0)
    }
}

/// What is known of it.
#[derive(Clone, Debug)]
pub struct State {
    area: Area,
    requested: u64,
    map: BlockMap,
}

impl State {
    /// With nothing plugged, and nothing asked for.
    pub fn new(area: Area) -> Self {
        Self {
            area,
            requested: 0,
            map: BlockMap::new(area.blocks()),
        }
    }

    /// The configuration space (VIRTIO 1.2 section 5.15.4).
    pub fn config(&self) -> Vec<u8> {
        let plugged = self.map.plugged().saturating_mul(self.area.block);
        let mut bytes = Vec::with_capacity(CONFIG);
        let Area { start, size, block } = self.area;
        // node_id and padding stand between the block size and the address.
        for field in [block, 0, start, size, size, plugged, self.requested] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The VMM says how it is. False, and nothing is changed, if that makes no sense.
    pub fn update(&mut self, update: &MemUpdate) -> bool {
        let wanted = update.requested_bytes;
        if wanted > self.area.size || !wanted.is_multiple_of(self.area.block) {
            return false;
        }
        if !update.plugged.is_empty() && !self.map.replace(&update.plugged) {
            return false;
        }
        self.requested = wanted;
        true
    }

    /// The blocks from an address on, if they all are of this area.
    fn range(&self, address: u64, count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.area.start)?;
        if !offset.is_multiple_of(self.area.block) {
            return None;
        }
        let first = offset.checked_div(self.area.block)?;
        self.map.range(first, count.into())
    }

    /// What to ask of the VMM for a guest's wish; `None`: it makes no sense.
    pub fn ask(&self, wish: Wish) -> Option<MemRequest> {
        let mut request = MemRequest::new();
        let (kind, range) = match wish {
            Wish::Plug(address, count) => (Kind::PLUG, self.range(address, count)?),
            Wish::Unplug(address, count) => (Kind::UNPLUG, self.range(address, count)?),
            Wish::UnplugAll => (Kind::UNPLUG_ALL, 0..0),
        };
        request.kind = kind.into();
        request.first = range.start;
        request.count = range.end.saturating_sub(range.start);
        Some(request)
    }

    /// The VMM has done what was asked.
    pub fn done(&mut self, request: &MemRequest) {
        let range = request.first..request.first.saturating_add(request.count);
        match request.kind.enum_value() {
            Ok(Kind::PLUG) => self.map.set(range, true),
            Ok(Kind::UNPLUG) => self.map.set(range, false),
            Ok(Kind::UNPLUG_ALL) => self.map.set(0..self.map.len(), false),
            _ => {}
        }
    }

    /// VIRTIO_MEM_STATE_* of blocks; `None`: they are not of this area.
    pub fn look(&self, address: u64, count: u16) -> Option<u16> {
        let range = self.range(address, count)?;
        Some(match self.map.look(range) {
            Blocks::Plugged => STATE_PLUGGED,
            Blocks::Unplugged => STATE_UNPLUGGED,
            Blocks::Mixed => STATE_MIXED,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: u64 = 4 << 30;
    const BLOCK: u64 = 2 << 20;

    fn state(blocks: u64) -> State {
        State::new(Area::new(START, blocks * BLOCK, BLOCK).unwrap())
    }

    #[test]
    fn areas_that_make_no_sense_are_refused() {
        for (start, size, block) in [
            (START, BLOCK, 0),
            (START, BLOCK, 3 << 20),
            (START, BLOCK, 2048),
            (START, 0, BLOCK),
            (START, BLOCK + 1, BLOCK),
            (START + 1, BLOCK, BLOCK),
            (0, BLOCK * (MAX_BLOCKS + 1), BLOCK),
            (!(BLOCK - 1), BLOCK, BLOCK),
        ] {
            assert!(
                Area::new(start, size, block).is_err(),
                "{start} {size} {block}"
            );
        }
    }

    #[test]
    fn the_configuration_space_tells_what_the_vmm_said() {
        let mut state = state(16);
        let mut update = MemUpdate::new();
        update.requested_bytes = 4 * BLOCK;
        update.plugged = vec![0b11, 0];
        assert!(state.update(&update));
        let config = state.config();
        let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
        assert_eq!(config.len(), CONFIG);
        let fields: Vec<_> = (0..7).map(|n| field(n * 8)).collect();
        let size = 16 * BLOCK;
        assert_eq!(fields, [BLOCK, 0, START, size, size, 2 * BLOCK, 4 * BLOCK]);
        for (requested, plugged) in [(17 * BLOCK, vec![]), (1, vec![]), (0, vec![0])] {
            update.requested_bytes = requested;
            update.plugged = plugged;
            assert!(!state.update(&update));
        }
        assert_eq!(state.config(), config);
    }

    proptest! {
        #[test]
        fn only_blocks_of_the_area_are_asked_for(
            address in prop_oneof![any::<u64>(), START..START + 20 * BLOCK, (0u64..20).prop_map(|n| START + n * BLOCK)],
            count in any::<u16>(),
            small in 0u16..20,
            narrow in any::<bool>(),
        ) {
            let count = if narrow { small } else { count };
            let mut state = state(16);
            let end = u128::from(address) + u128::from(count) * u128::from(BLOCK);
            let sound = address >= START && (address - START).is_multiple_of(BLOCK) && count > 0
                && end <= u128::from(START + 16 * BLOCK);
            prop_assert_eq!(state.ask(Wish::Unplug(address, count)).is_some(), sound);
            prop_assert_eq!(state.look(address, count).is_some(), sound);
            if let Some(request) = state.ask(Wish::Plug(address, count)) {
                state.done(&request);
                prop_assert_eq!(state.look(address, count), Some(STATE_PLUGGED));
                prop_assert_eq!(state.map.plugged(), u64::from(count));
            }
            state.done(&state.ask(Wish::UnplugAll).unwrap());
            prop_assert_eq!(state.map.plugged(), 0);
        }
    }
}
