//! Which blocks of memory are plugged, and what may be done to them next: the VMM's books, which
//! are the ones that count. The guest's wishes come by a device process, and both may be
//! hostile. Owned by the manager thread; touches nothing.

use std::ops::Range;

use bulkhead_proto::BlockMap;
use bulkhead_proto::block_map::Blocks;
use bulkhead_proto::device::finish_request_request::Outcome;
use bulkhead_proto::device::{MemRequest, MemUpdate, mem_request::Kind};
use bulkhead_proto::machine::MemoryInfo;

/// What is to be done before a wish is granted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// Regions, by number, that must be there first.
    pub add: Vec<usize>,
    /// Blocks whose pages go.
    pub punch: Vec<Range<u64>>,
    /// Regions that nothing is plugged in any more.
    pub remove: Vec<usize>,
}

/// What is to become of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is answered so at once.
    Answer(Outcome),
    /// It is done when this has been.
    Do(Job),
    /// No honest process says this.
    Lie,
}

/// The books.
#[derive(Clone, Debug)]
pub struct Plugging {
    /// Guest-physical address of the first block.
    start: u64,
    block: u64,
    /// Bytes that the machine has beside these.
    base: u64,
    /// The blocks of each region.
    regions: Vec<Range<u64>>,
    map: BlockMap,
    /// Blocks that the guest is asked to have.
    requested: u64,
    /// What was done last, and for which incarnation of the process: its successor may ask for
    /// it again, since nobody knows whether the guest was told.
    last: Option<(MemRequest, u64)>,
}

/// Why a size cannot be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Less than there is from the start.
    #[error("memory from the start cannot be unplugged: give at least {} MiB", .0 >> 20)]
    TooSmall(u64),
    /// More than there may be.
    #[error(
        "the machine was made with at most {} MiB: give no more, or create it with a larger max=",
        .0 >> 20
    )]
    TooLarge(u64),
    /// Not a whole number of blocks.
    #[error(
        "memory is plugged in blocks of {} MiB: give {} or {} MiB",
        .block >> 20, .below >> 20, .above >> 20
    )]
    NotWhole {
        /// Bytes of a block.
        block: u64,
        /// The next sizes that are.
        below: u64,
        /// The other.
        above: u64,
    },
}

impl Plugging {
    /// Of an area of blocks at `start`, whose regions have these; nothing is plugged yet.
    pub fn new(start: u64, block: u64, base: u64, regions: Vec<Range<u64>>) -> Self {
        let blocks = regions.last().map_or(0, |last| last.end);
        Self {
            start,
            block,
            base,
            regions,
            map: BlockMap::new(blocks),
            requested: 0,
            last: None,
        }
    }

    fn bytes(&self, blocks: u64) -> u64 {
        blocks.saturating_mul(self.block)
    }

    /// Checks a size of the whole machine's memory; gives the blocks of it.
    ///
    /// # Errors
    /// Why it cannot be asked for, and the remedy.
    pub fn blocks_of(&self, size: u64) -> Result<u64, SizeError> {
        let all = self.bytes(self.map.len());
        let more = size
            .checked_sub(self.base)
            .ok_or(SizeError::TooSmall(self.base))?;
        if more > all {
            return Err(SizeError::TooLarge(self.base.saturating_add(all)));
        }
        let blocks = more.checked_div(self.block).unwrap_or(0);
        let below = self.base.saturating_add(self.bytes(blocks));
        if below != size {
            return Err(SizeError::NotWhole {
                block: self.block,
                below,
                above: below.saturating_add(self.block),
            });
        }
        Ok(blocks)
    }

    /// Blocks that the guest is asked to have.
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// The guest is asked to have so many.
    pub fn set_requested(&mut self, blocks: u64) {
        self.requested = blocks.min(self.map.len());
    }

    /// Blocks that are plugged.
    pub fn plugged(&self) -> u64 {
        self.map.plugged()
    }

    /// What a process is told that asks the guest for so many blocks; one that has just begun
    /// also which there are.
    pub fn update(&self, requested: u64, new: bool) -> MemUpdate {
        let mut update = MemUpdate::new();
        update.requested_bytes = self.bytes(requested);
        if new {
            update.plugged = self.map.as_bytes().to_vec();
        }
        update
    }

    /// The device's configuration space (VIRTIO 1.2 section 5.15.4).
    pub fn config(&self) -> Vec<u8> {
        let all = self.bytes(self.map.len());
        let (plugged, requested) = (self.bytes(self.map.plugged()), self.bytes(self.requested));
        // node_id, which is not offered, stands between the block size and the address.
        let fields = [self.block, 0, self.start, all, all, plugged, requested];
        fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    /// For the API.
    pub fn info(&self) -> MemoryInfo {
        let with_base = |blocks| self.base.saturating_add(self.bytes(blocks));
        let mut info = MemoryInfo::new();
        info.requested_bytes = with_base(self.requested);
        info.present_bytes = with_base(self.map.plugged());
        info.max_bytes = with_base(self.map.len());
        info.block_bytes = self.block;
        info
    }

    /// What is to become of a wish that an incarnation of the process hands on.
    pub fn judge(&mut self, wish: &MemRequest, incarnation: u64) -> Verdict {
        let Some((plug, range)) = self.meaning(wish) else {
            return Verdict::Lie;
        };
        if let Some((_, before)) = &self.last
            && *before != incarnation
            && let Some((done, _)) = self.last.take()
            && done == *wish
        {
            return Verdict::Answer(Outcome::ACK);
        }
        let blocks = range.end.saturating_sub(range.start);
        let all = wish.kind.enum_value() == Ok(Kind::UNPLUG_ALL);
        match (plug, self.map.look(range.clone())) {
            _ if all => Verdict::Do(self.job(false, range)),
            (true, Blocks::Unplugged) => {
                if self.map.plugged().saturating_add(blocks) > self.requested {
                    return Verdict::Answer(Outcome::NACK);
                }
                Verdict::Do(self.job(true, range))
            }
            (false, Blocks::Plugged) => Verdict::Do(self.job(false, range)),
            _ => Verdict::Answer(Outcome::ERROR),
        }
    }

    /// Whether a wish is to plug, and which blocks; `None`: it cannot be.
    fn meaning(&self, wish: &MemRequest) -> Option<(bool, Range<u64>)> {
        match wish.kind.enum_value() {
            Ok(Kind::PLUG) => Some((true, self.map.range(wish.first, wish.count)?)),
            Ok(Kind::UNPLUG) => Some((false, self.map.range(wish.first, wish.count)?)),
            Ok(Kind::UNPLUG_ALL) if (wish.first, wish.count) == (0, 0) => {
                Some((false, 0..self.map.len()))
            }
            _ => None,
        }
    }

    fn job(&self, plug: bool, range: Range<u64>) -> Job {
        let mut after = self.map.clone();
        after.set(range.clone(), plug);
        let empty = |map: &BlockMap, at: &Range<u64>| map.look(at.clone()) == Blocks::Unplugged;
        // Regions that were empty, or not, and are the other now.
        let numbers = |was: bool| -> Vec<usize> {
            let regions = self.regions.iter().enumerate();
            let were = regions.filter(|(_, at)| empty(&self.map, at) == was);
            let changed = were.filter(|(_, at)| empty(&after, at) != was);
            changed.map(|(number, _)| number).collect()
        };
        Job {
            add: numbers(true),
            remove: numbers(false),
            punch: if plug {
                Vec::new()
            } else {
                self.map.runs(range)
            },
        }
    }

    /// A wish has been done for this incarnation.
    pub fn commit(&mut self, wish: &MemRequest, incarnation: u64) {
        if let Some((plug, range)) = self.meaning(wish) {
            self.map.set(range, plug);
            self.last = Some((wish.clone(), incarnation));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u64 = 2 << 20;
    const BASE: u64 = 512 << 20;

    /// Two regions of eight blocks.
    fn books() -> Plugging {
        let mut books = Plugging::new(4 << 30, BLOCK, BASE, vec![0..8, 8..16]);
        books.set_requested(16);
        books
    }

    fn wish(kind: Kind, first: u64, count: u64) -> MemRequest {
        let mut wish = MemRequest::new();
        (wish.kind, wish.first, wish.count) = (kind.into(), first, count);
        wish
    }

    fn carry_out(books: &mut Plugging, wish: &MemRequest, incarnation: u64) -> Job {
        match books.judge(wish, incarnation) {
            Verdict::Do(job) => {
                books.commit(wish, incarnation);
                job
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn regions_come_with_their_first_block_and_go_with_their_last() {
        let mut books = books();
        let job = carry_out(&mut books, &wish(Kind::PLUG, 6, 4), 1);
        assert_eq!((job.add, job.remove), (vec![0, 1], vec![]));
        assert!(job.punch.is_empty());
        let job = carry_out(&mut books, &wish(Kind::PLUG, 10, 1), 1);
        assert_eq!(job, Job::default());
        let job = carry_out(&mut books, &wish(Kind::UNPLUG, 6, 2), 1);
        assert_eq!((job.add, job.remove), (vec![], vec![0]));
        assert_eq!(job.punch, vec![6..8; 1]);
        let job = carry_out(&mut books, &wish(Kind::UNPLUG_ALL, 0, 0), 1);
        assert_eq!((job.remove, job.punch), (vec![1], vec![8..11; 1]));
        assert_eq!(books.plugged(), 0);
    }

    #[test]
    fn nonsense_is_an_error_and_too_much_is_not_now() {
        let mut books = books();
        books.set_requested(4);
        carry_out(&mut books, &wish(Kind::PLUG, 0, 3), 1);
        let judge =
            |books: &mut Plugging, kind, first, count| books.judge(&wish(kind, first, count), 1);
        let error = Verdict::Answer(Outcome::ERROR);
        assert_eq!(judge(&mut books, Kind::PLUG, 2, 2), error);
        assert_eq!(judge(&mut books, Kind::PLUG, 0, 1), error);
        assert_eq!(judge(&mut books, Kind::UNPLUG, 2, 2), error);
        assert_eq!(judge(&mut books, Kind::UNPLUG, 8, 1), error);
        let nack = Verdict::Answer(Outcome::NACK);
        assert_eq!(judge(&mut books, Kind::PLUG, 8, 2), nack);
        for (kind, first, count) in [
            (Kind::PLUG, 16, 1),
            (Kind::PLUG, 0, 0),
            (Kind::UNPLUG, u64::MAX, 2),
            (Kind::UNPLUG_ALL, 0, 1),
            (Kind::UNKNOWN, 0, 1),
        ] {
            assert_eq!(judge(&mut books, kind, first, count), Verdict::Lie);
        }
    }

    #[test]
    fn a_successor_that_asks_again_is_told_that_it_is_done() {
        let mut books = books();
        let plug = wish(Kind::PLUG, 0, 4);
        carry_out(&mut books, &plug, 1);
        assert_eq!(books.judge(&plug, 1), Verdict::Answer(Outcome::ERROR));
        assert_eq!(books.judge(&plug, 2), Verdict::Answer(Outcome::ACK));
        assert_eq!(
            books.judge(&plug, 2),
            Verdict::Answer(Outcome::ERROR),
            "once"
        );
        // One that asks for something else has told the guest.
        carry_out(&mut books, &wish(Kind::PLUG, 4, 1), 2);
        carry_out(&mut books, &wish(Kind::UNPLUG, 0, 1), 3);
        assert_eq!(
            books.judge(&wish(Kind::PLUG, 4, 1), 3),
            Verdict::Answer(Outcome::ERROR)
        );
    }

    #[test]
    fn sizes_are_of_the_whole_machine_in_blocks() {
        let books = books();
        assert_eq!(books.blocks_of(BASE), Ok(0));
        assert_eq!(books.blocks_of(BASE + 16 * BLOCK), Ok(16));
        for (size, word) in [
            (BASE - BLOCK, "at least 512 MiB"),
            (BASE + 17 * BLOCK, "at most 544 MiB"),
            (BASE + BLOCK + (1 << 20), "give 514 or 516 MiB"),
        ] {
            let error = books.blocks_of(size).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
        let info = books.info();
        assert_eq!(
            (info.requested_bytes, info.present_bytes),
            (BASE + 16 * BLOCK, BASE)
        );
        assert_eq!(books.config().len(), 56);
    }

    proptest! {
        #[test]
        fn whatever_is_asked_the_books_stay_within_bounds(
            requested in 0u64..17,
            wishes in prop::collection::vec((0i32..5, prop_oneof![0u64..20, any::<u64>()], prop_oneof![0u64..20, any::<u64>()], 1u64..3), 0..60),
        ) {
            let mut books = books();
            books.set_requested(requested);
            let mut present = [false; 2];
            for (kind, first, count, incarnation) in wishes {
                let mut wish = wish(Kind::UNKNOWN, first, count);
                wish.kind = bulkhead_proto::protobuf::EnumOrUnknown::from_i32(kind);
                let before = books.map.clone();
                if let Verdict::Do(job) = books.judge(&wish, incarnation) {
                    for number in job.add {
                        prop_assert!(!std::mem::replace(&mut present[number], true));
                    }
                    for number in job.remove {
                        prop_assert!(std::mem::replace(&mut present[number], false));
                    }
                    prop_assert!(job.punch.into_iter().flatten().all(|b| before.is_plugged(b)));
                    books.commit(&wish, incarnation);
                } else {
                    prop_assert_eq!(&before, &books.map);
                }
                prop_assert!(books.plugged() <= requested);
                for (number, region) in books.regions.iter().enumerate() {
                    let any = region.clone().any(|block| books.map.is_plugged(block));
                    prop_assert_eq!(any, present[number]);
                }
            }
        }
    }
}
