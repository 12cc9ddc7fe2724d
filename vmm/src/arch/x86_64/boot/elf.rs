//! An uncompressed kernel: a 64-bit ELF file (System V gABI; AMD64 psABI), entered by PVH
//! where it carries the note XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h), else by
//! the 64-bit Linux protocol at its entry point.
//!
//! The parser is our own: linux-loader 0.14 adds unchecked offsets while it walks notes.

use vm_memory::{Bytes, GuestAddress};

use super::image::Image;
use super::working_set::WorkingSet;
use super::{BootError, Problem};
use crate::arch::x86_64::layout;
use crate::memory::GuestRam;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const CLASS_64_LITTLE: [u8; 2] = [2, 1];
const EM_X86_64: u16 = 62;
const EHDR_SIZE: u64 = 64;
const PHDR_SIZE: usize = 56;
/// Kernels have about five; more than this is no kernel.
const MAX_PHDRS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Notes of a kernel take some hundred bytes.
const MAX_NOTES: u64 = 1 << 20;
const PHYS32_ENTRY: u32 = 18;

/// Where an ELF kernel lies and begins.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ElfKernel {
    /// The PVH entry point, if there is one.
    pub(super) pvh_entry: Option<u64>,
    /// The ELF entry point.
    pub(super) entry: u64,
    /// The first address above everything that was loaded.
    pub(super) end: u64,
    /// What was loaded: (start, length), the zero-filled rest included.
    segments: Vec<(u64, u64)>,
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(bytes, 0)?,
            offset: u64_at(bytes, 8)?,
            address: u64_at(bytes, 24)?,
            file_size: u64_at(bytes, 32)?,
            memory_size: u64_at(bytes, 40)?,
        })
    }
}

/// Copies the kernel's segments into `ram`.
pub(super) fn load(
    image: &Image<'_>,
    ram: &GuestRam,
    set: &mut WorkingSet<'_>,
) -> Result<ElfKernel, BootError> {
    let truncated = || image.error(Problem::Truncated);
    let ehdr = image.bytes::<{ EHDR_SIZE as usize }>(0)?;
    if ehdr.get(4..6) != Some(&CLASS_64_LITTLE) || u16_at(&ehdr, 18) != Some(EM_X86_64) {
        return Err(image.error(Problem::NotX86_64));
    }
    let entry = u64_at(&ehdr, 24).ok_or_else(truncated)?;
    let table = u64_at(&ehdr, 32).ok_or_else(truncated)?;
    let entry_size = u16_at(&ehdr, 54).ok_or_else(truncated)?;
    let entries = u16_at(&ehdr, 56).ok_or_else(truncated)?;
    if usize::from(entry_size) != PHDR_SIZE || entries == 0 || entries > MAX_PHDRS {
        return Err(image.error(Problem::NotAKernel));
    }
    let headers = image.vec(table, usize::from(entries).saturating_mul(PHDR_SIZE))?;

    let mut kernel = ElfKernel {
        pvh_entry: None,
        entry,
        end: 0,
        segments: Vec::new(),
    };
    for header in headers.chunks_exact(PHDR_SIZE) {
        let segment = Segment::parse(header).ok_or_else(truncated)?;
        match segment.kind {
            PT_LOAD => load_segment(image, ram, set, &segment, &mut kernel)?,
            PT_NOTE if kernel.pvh_entry.is_none() => {
                if segment.file_size > MAX_NOTES {
                    return Err(image.error(Problem::NotAKernel));
                }
                let notes = image.vec(segment.offset, segment.file_size as usize)?;
                kernel.pvh_entry = pvh_entry(&notes);
            }
            _ => {}
        }
    }
    let begin = kernel.pvh_entry.unwrap_or(kernel.entry);
    let inside = |(start, len): &(u64, u64)| (*start..start.saturating_add(*len)).contains(&begin);
    if !kernel.segments.iter().any(inside) {
        return Err(image.error(Problem::NoEntry));
    }
    Ok(kernel)
}

fn load_segment(
    image: &Image<'_>,
    ram: &GuestRam,
    set: &mut WorkingSet<'_>,
    segment: &Segment,
    kernel: &mut ElfKernel,
) -> Result<(), BootError> {
    if segment.memory_size == 0 {
        return Ok(());
    }
    if segment.file_size > segment.memory_size || segment.address < layout::EXTENDED_RAM_START {
        return Err(image.error(Problem::NotAKernel));
    }
    let end = segment.address.saturating_add(segment.memory_size);
    if end > ram.low_end() {
        return Err(image.too_big(ram, end));
    }
    if !image.holds(segment.offset, segment.file_size) {
        return Err(image.error(Problem::Truncated));
    }
    set.add(segment.address, segment.memory_size);
    image.copy(segment.offset, segment.file_size, ram, segment.address)?;
    // RAM begins as zeroes, so only an overlap with an earlier segment needs clearing.
    let zeroes = (
        segment.address.saturating_add(segment.file_size),
        segment.memory_size.saturating_sub(segment.file_size),
    );
    let overlaps = |(start, len): &(u64, u64)| {
        *start < zeroes.0.saturating_add(zeroes.1) && zeroes.0 < start.saturating_add(*len)
    };
    if kernel.segments.iter().any(overlaps) && !image.is_only_checked() {
        clear(image, ram, zeroes)?;
    }
    kernel.segments.push((segment.address, segment.memory_size));
    kernel.end = kernel.end.max(end);
    Ok(())
}

fn clear(image: &Image<'_>, ram: &GuestRam, (start, len): (u64, u64)) -> Result<(), BootError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut done = 0u64;
    while done < len {
        let step = (len - done).min(ZEROES.len() as u64);
        ram.memory()
            .write_slice(
                ZEROES.get(..step as usize).unwrap_or_default(),
                GuestAddress(start.saturating_add(done)),
            )
            .map_err(|_| image.too_big(ram, start.saturating_add(len)))?;
        done = done.saturating_add(step);
    }
    Ok(())
}

/// The descriptor of the first note ("Xen", XEN_ELFNOTE_PHYS32_ENTRY).
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let name_size = usize::try_from(u32_at(notes, 0)?).ok()?;
        let desc_size = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let rest = notes.get(12..)?;
        let name = rest.get(..name_size)?;
        let rest = rest.get(name_size.checked_next_multiple_of(4)?..)?;
        let desc = rest.get(..desc_size)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            return match desc_size {
                8.. => u64_at(desc, 0),
                _ => u32_at(desc, 0).map(u64::from),
            };
        }
        notes = rest.get(desc_size.checked_next_multiple_of(4)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend((name.len() as u32).to_le_bytes());
        note.extend((desc.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        let mut notes = note(b"Linux\0", PHYS32_ENTRY, &[9; 3]);
        notes.extend(note(b"Xen\0", 6, b"linux\0"));
        assert_eq!(pvh_entry(&notes), None);
        let mut narrow = notes.clone();
        narrow.extend(note(b"Xen\0", PHYS32_ENTRY, &0x0100_0c00u32.to_le_bytes()));
        assert_eq!(pvh_entry(&narrow), Some(0x0100_0c00));
        notes.extend(note(b"Xen\0", PHYS32_ENTRY, &0x0100_0c00u64.to_le_bytes()));
        assert_eq!(pvh_entry(&notes), Some(0x0100_0c00));
    }

    proptest! {
        #[test]
        fn notes_of_any_bytes_are_read_in_bounds(notes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = pvh_entry(&notes);
        }

        #[test]
        fn sizes_near_the_end_of_the_address_space_are_survived(name in any::<u32>(), desc in any::<u32>()) {
            let mut notes = name.to_le_bytes().to_vec();
            notes.extend(desc.to_le_bytes());
            notes.extend([18, 0, 0, 0, b'X', b'e', b'n', 0, 1, 2, 3, 4]);
            let found = pvh_entry(&notes);
            prop_assert!(found.is_none() || (name, desc) == (4, 4));
        }
    }
}
