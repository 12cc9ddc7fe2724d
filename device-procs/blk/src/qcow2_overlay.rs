//! Metadata of a qcow2 image that were changed and are not in the file yet, and the order in
//! which they get there.
//!
//! A format driver that writes its tables as it goes leaves an image that a crash between
//! two of them makes inconsistent: a table is referenced before its reference is counted.
//! So nothing that the file's other metadata depend on is written in place at once. It is
//! kept here, sector by sector, and [`Overlay::apply`] writes it so that after a crash at any
//! point, of this process or of the host, every reference in the file is counted. What is
//! counted but not referenced is a leak, which `qemu-img check` finds and which harms nobody.
//!
//! 1. Reference counts, none of them lower than in the file, and the table of their blocks;
//!    then a barrier, which makes the data durable too.
//! 2. Guest mappings, the table of their tables and the header; then a barrier.
//! 3. Reference counts that have fallen.
//!
//! Called under the image's lock by whichever thread flushes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use crate::qcow2_journal::{Journal, Record};
use crate::qcow2_map::{Kind, Map};

/// Granularity.
pub const SECTOR: usize = 512;
/// Tables whose content is remembered, so that it need not be read to see what changed.
const REMEMBERED: usize = 8;
/// Longest table that is remembered.
const MEMORABLE: usize = 64 * 1024;
/// Longest single write.
const RUN: usize = 64 * 1024;

/// The file, as the overlay needs it. Any offset, any length; what lies beyond the end reads
/// as zeros.
pub trait Medium {
    /// Reads.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything written so far durable.
    fn barrier(&self) -> io::Result<()>;
}

type Sector = [u8; SECTOR];

/// Sectors that differ from the file's.
#[derive(Debug, Default)]
pub struct Overlay {
    sectors: BTreeMap<u64, Box<Sector>>,
    /// A reference count in it fell to zero since the last [`Self::take_freed`].
    freed: bool,
    /// Where what outlives this process is put, if anywhere.
    journal: Option<Journal>,
    /// Sectors that are not in the journal yet.
    unlogged: BTreeSet<u64>,
    /// Whole tables as they were written last.
    recent: VecDeque<(u64, Vec<u8>)>,
}

fn place(sector: u64) -> u64 {
    sector.saturating_mul(SECTOR as u64)
}

impl Overlay {
    /// Whether the file is up to date.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Number of sectors held.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// An overlay that another process left.
    pub fn recovered(records: Vec<Record>) -> Self {
        let sectors = records.into_iter().map(|(n, bytes)| (n, Box::new(bytes)));
        Self {
            sectors: sectors.collect(),
            ..Self::default()
        }
    }

    /// Whether everything in it lies before `end`.
    pub fn fits(&self, end: u64) -> bool {
        self.sectors
            .last_key_value()
            .is_none_or(|(&last, _)| last < end / SECTOR as u64)
    }

    /// From now on, what changes is logged; the overlay is empty.
    pub fn set_journal(&mut self, journal: Option<Journal>) {
        self.journal = journal;
        self.unlogged.clear();
    }

    /// Whether there is a journal.
    pub fn is_logged(&self) -> bool {
        self.journal.is_some()
    }

    /// Puts what has changed into the journal. False: there is no room, apply instead.
    pub fn log(&mut self) -> bool {
        let Some(journal) = &mut self.journal else {
            return true;
        };
        let unlogged = std::mem::take(&mut self.unlogged);
        let mut changed = Vec::with_capacity(unlogged.len());
        for sector in unlogged {
            if let Some(bytes) = self.sectors.get(&sector) {
                changed.push((sector, &**bytes));
            }
        }
        changed.is_empty() || journal.append(changed.into_iter())
    }

    /// Whether clusters were freed since the last call: they must not be used anew before
    /// the overlay is applied.
    pub fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }

    /// Puts what is held here over what was read from the file at `offset`.
    pub fn patch(&self, buffer: &mut [u8], offset: u64) {
        let end = offset.saturating_add(buffer.len() as u64);
        let first = offset / SECTOR as u64;
        let last = end.div_ceil(SECTOR as u64);
        for (&sector, bytes) in self.sectors.range(first..last) {
            let start = place(sector);
            let (skip, at) = (offset.saturating_sub(start), start.saturating_sub(offset));
            let (Ok(skip), Ok(at)) = (usize::try_from(skip), usize::try_from(at)) else {
                continue;
            };
            let from = bytes.get(skip..).unwrap_or_default();
            let to = buffer.get_mut(at..).unwrap_or_default();
            for (to, from) in to.iter_mut().zip(from) {
                *to = *from;
            }
        }
    }

    /// Takes a write of metadata. `refcount_order` is given for reference counts.
    pub fn write(
        &mut self,
        medium: &dyn Medium,
        bytes: &[u8],
        offset: u64,
        refcount_order: Option<u32>,
    ) -> io::Result<()> {
        let start = offset - offset % SECTOR as u64;
        let skip = (offset - start) as usize;
        let len = (skip + bytes.len()).next_multiple_of(SECTOR);
        let old = self.old(medium, start, len)?;
        let mut new = old.clone();
        if let Some(place) = new.get_mut(skip..skip + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let first = start / SECTOR as u64;
        let pairs = old.chunks_exact(SECTOR).zip(new.chunks_exact(SECTOR));
        for (sector, (old, new)) in (first..).zip(pairs) {
            if old == new {
                continue;
            }
            if let Some(order) = refcount_order {
                self.freed |= counts(new, order)
                    .zip(counts(old, order))
                    .any(|(new, old)| new == 0 && old != 0);
            }
            if let Ok(new) = <Sector>::try_from(new) {
                self.sectors.insert(sector, Box::new(new));
                if self.journal.is_some() {
                    self.unlogged.insert(sector);
                }
            }
        }
        self.remember(start, new);
        Ok(())
    }

    /// What is there now.
    fn old(&mut self, medium: &dyn Medium, start: u64, len: usize) -> io::Result<Vec<u8>> {
        let known = |(at, table): &(u64, Vec<u8>)| *at == start && table.len() == len;
        if let Some(index) = self.recent.iter().position(known)
            && let Some((_, table)) = self.recent.remove(index)
        {
            return Ok(table);
        }
        let mut old = vec![0; len];
        medium.read(&mut old, start)?;
        self.patch(&mut old, start);
        Ok(old)
    }

    fn remember(&mut self, start: u64, table: Vec<u8>) {
        // Nothing else may have written to it meanwhile: only whole tables are written whole.
        let end = start.saturating_add(table.len() as u64);
        self.recent
            .retain(|(at, t)| *at >= end || at.saturating_add(t.len() as u64) <= start);
        if (4096..=MEMORABLE).contains(&table.len()) {
            if self.recent.len() >= REMEMBERED {
                self.recent.pop_front();
            }
            self.recent.push_back((start, table));
        }
    }

    /// Forgets what is held of a range that means nothing any more.
    pub fn forget(&mut self, range: &std::ops::Range<u64>) {
        let first = range.start.div_ceil(SECTOR as u64);
        let last = range.end / SECTOR as u64;
        self.sectors
            .retain(|&sector, _| !(first..last).contains(&sector));
        self.recent.clear();
    }

    /// Writes everything to the file, in the order of the module comment. On an error,
    /// everything is still held and can be applied anew.
    pub fn apply(&mut self, medium: &dyn Medium, map: &Map, order: u32) -> io::Result<()> {
        let mut fallen = Vec::new();
        let mut run = Run::default();
        for (&sector, new) in &self.sectors {
            match map.kind(place(sector)) {
                Some(Kind::Refblock(_)) => {
                    let mut old = [0; SECTOR];
                    medium.read(&mut old, place(sector))?;
                    let high = highest(&old, new, order);
                    if high != **new {
                        fallen.push(sector);
                    }
                    if high != old {
                        run.add(medium, sector, &high)?;
                    }
                }
                Some(Kind::Reftable) => run.add(medium, sector, new)?,
                _ => {}
            }
        }
        run.end(medium)?;
        medium.barrier()?;
        let mut written = false;
        for (&sector, new) in &self.sectors {
            if let Some(Kind::L2 | Kind::L1 | Kind::Header) = map.kind(place(sector)) {
                run.add(medium, sector, new)?;
                written = true;
            }
        }
        run.end(medium)?;
        if written {
            medium.barrier()?;
        }
        for sector in fallen {
            if let Some(new) = self.sectors.get(&sector) {
                run.add(medium, sector, new)?;
            }
        }
        run.end(medium)?;
        self.sectors.clear();
        self.unlogged.clear();
        if let Some(journal) = &mut self.journal {
            journal.clear();
        }
        Ok(())
    }
}

/// Neighbouring sectors, written together.
#[derive(Default)]
struct Run {
    start: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn add(&mut self, medium: &dyn Medium, sector: u64, bytes: &Sector) -> io::Result<()> {
        let next = place(self.start).saturating_add(self.bytes.len() as u64);
        if next != place(sector) || self.bytes.len() >= RUN {
            self.end(medium)?;
        }
        if self.bytes.is_empty() {
            self.start = sector;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn end(&mut self, medium: &dyn Medium) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        medium.write(&bytes, place(self.start))
    }
}

/// The counts in some bytes of a refcount block; each is `1 << order` bits wide. Below eight
/// bits, the first count of a byte is in its lowest bits.
fn counts(bytes: &[u8], order: u32) -> impl Iterator<Item = u64> {
    let per_byte = 8usize >> order.min(3);
    let width = 8 / per_byte;
    let step = 1usize << order.saturating_sub(3);
    bytes.chunks_exact(step).flat_map(move |chunk| {
        let whole = chunk.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        (0..per_byte).map(move |i| {
            if order >= 3 {
                whole
            } else {
                whole >> (i * width) & ((1 << width) - 1)
            }
        })
    })
}

/// Each count as high as it is in either.
fn highest(a: &Sector, b: &Sector, order: u32) -> Sector {
    let mut out = [0; SECTOR];
    let step = 1usize << order.saturating_sub(3);
    let chunks = a.chunks_exact(step).zip(b.chunks_exact(step));
    for (out, (a, b)) in out.chunks_exact_mut(step).zip(chunks) {
        if order >= 3 {
            // Big-endian numbers of one length compare as their bytes do.
            out.copy_from_slice(a.max(b));
            continue;
        }
        let per_byte = 8usize >> order;
        let width = 8 / per_byte;
        let merged = counts(a, order).zip(counts(b, order)).enumerate();
        let byte = merged.fold(0, |byte, (i, (a, b))| byte | a.max(b) << (i * width));
        if let [out] = out {
            *out = byte as u8;
        }
    }
    out
}

#[cfg(test)]
#[path = "qcow2_overlay_tests.rs"]
mod tests;
