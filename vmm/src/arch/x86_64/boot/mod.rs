//! Puts a kernel, its initrd and its command line into guest RAM, with the structures of
//! the boot protocol that fits the file.
//!
//! | file | protocol |
//! |---|---|
//! | ELF with a PVH note | PVH (xen/include/public/arch-x86/hvm/start_info.h) |
//! | ELF without | Linux 64-bit entry at the ELF entry point |
//! | bzImage | Linux 64-bit entry |
//!
//! Called by the manager thread before the first vCPU runs. The files were opened by whoever
//! may open files; they are the operator's input and may hold anything.

mod bzimage;
mod elf;
mod image;
mod working_set;

use std::fs::File;
use std::io;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{layout, state};
use crate::memory::GuestRam;
use image::Image;
use working_set::WorkingSet;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// The kernel file.
    pub kernel: &'a File,
    /// Its name, for messages.
    pub kernel_name: &'a str,
    /// The initial RAM disk and its name.
    pub initrd: Option<(&'a File, &'a str)>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// No bytes.
    #[error("is empty: give a whole file")]
    Empty,
    /// A directory, a pipe, a device.
    #[error("is not a regular file: give the path of a file")]
    NotAFile,
    /// Shorter than it says itself.
    #[error("is truncated: copy or build it anew")]
    Truncated,
    /// Neither ELF nor bzImage, or a broken one.
    #[error("is not a kernel: give an x86-64 vmlinux (ELF) or bzImage")]
    NotAKernel,
    /// A kernel of another machine or a 32-bit one.
    #[error("is not a 64-bit x86 kernel: give an x86-64 vmlinux (ELF) or bzImage")]
    NotX86_64,
    /// An ELF file whose entry point lies outside what it loads.
    #[error(
        "has no entry point that can be used (no PVH note): give a vmlinux built with CONFIG_PVH, or a bzImage"
    )]
    NoEntry,
    /// Not enough RAM.
    #[error(
        "needs {need} MiB of memory below 3 GiB where the guest has {have}: give it more --memory"
    )]
    DoesNotFit {
        /// MiB that it reaches up to.
        need: u64,
        /// MiB that there are.
        have: u64,
    },
    /// The file could not be read.
    #[error("cannot be read: {0}: check the file and its disk")]
    Read(io::Error),
}

/// Why nothing could be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file is unusable.
    #[error("{role} {name} {problem}")]
    File {
        /// "kernel" or "initrd".
        role: &'static str,
        /// The file's name.
        name: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The command line is too long.
    #[error(
        "the kernel command line has {len} bytes, but the kernel takes {max}: shorten the command line"
    )]
    CommandLineLength {
        /// Its length.
        len: usize,
        /// The most that the kernel takes.
        max: u64,
    },
    /// The command line holds a NUL.
    #[error("the kernel command line holds a NUL byte: remove it from the command line")]
    CommandLineNul,
    /// A structure did not fit into RAM.
    #[error("the boot structures do not fit into the guest's memory: give it more --memory")]
    Structures,
}

/// The state in which the boot processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 32-bit protected mode without paging; `ebx` points to `hvm_start_info`.
    Protected,
    /// 64-bit mode, the first 4 GiB mapped one to one; `rsi` points to `boot_params`.
    Long,
}

/// A kernel in RAM, ready to be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootEntry {
    mode: EntryMode,
    entry: u64,
    info: u64,
    touched: Vec<(u64, u64)>,
}

impl BootEntry {
    /// An entry that no file stands behind.
    #[cfg(test)]
    pub(crate) fn at(mode: EntryMode, entry: u64) -> Self {
        Self {
            mode,
            entry,
            info: 0,
            touched: Vec::new(),
        }
    }

    /// Protocol by which the kernel is entered.
    pub fn mode(&self) -> EntryMode {
        self.mode
    }

    /// The first instruction.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The protocol's structure.
    pub fn info(&self) -> u64 {
        self.info
    }

    /// Ranges (start, length) that the kernel is sure to touch while it comes up.
    pub fn touched(&self) -> &[(u64, u64)] {
        &self.touched
    }
}

/// A range of the guest's memory map, as e820 and PVH number them.
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

const PAGE: u64 = 4096;

/// What the protocols say of the address space: (start, length, type).
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::CONVENTIONAL_RAM_END, MAP_RAM),
        (
            layout::RSDP_START,
            layout::EXTENDED_RAM_START - layout::RSDP_START,
            MAP_RESERVED,
        ),
        (
            layout::EXTENDED_RAM_START,
            ram.low_end().saturating_sub(layout::EXTENDED_RAM_START),
            MAP_RAM,
        ),
        (layout::ECAM_START, layout::ECAM_SIZE, MAP_RESERVED),
    ];
    map.extend(
        ram.regions()
            .iter()
            .filter(|region| region.guest_base >= layout::HIGH_RAM_START)
            .map(|region| (region.guest_base, region.size, MAP_RAM)),
    );
    map
}

fn put<T: ByteValued>(ram: &GuestRam, address: u64, value: T) -> Result<u64, BootError> {
    ram.memory()
        .write_obj(value, GuestAddress(address))
        .map_err(|_| BootError::Structures)?;
    Ok(address.saturating_add(size_of::<T>() as u64))
}

/// Loads what `source` names; `rsdp` is where the ACPI tables begin.
pub fn load(ram: &GuestRam, rsdp: u64, source: &BootSource<'_>) -> Result<BootEntry, BootError> {
    load_into(ram, rsdp, source, WorkingSet::new(ram))
}

/// The same, into memory that a guest has used and that was cleared: pages stay as large as they
/// are.
pub fn load_again(
    ram: &GuestRam,
    rsdp: u64,
    source: &BootSource<'_>,
) -> Result<BootEntry, BootError> {
    load_into(ram, rsdp, source, WorkingSet::of_used(ram))
}

/// Whether [`load_again`] would find what it needs, by what the files say of themselves: nothing is
/// written to memory, and little is read.
///
/// # Errors
/// What `load_again` would say.
pub fn check(ram: &GuestRam, source: &BootSource<'_>) -> Result<(), BootError> {
    let images = Images::new(source)?;
    let images = Images {
        kernel: images.kernel.only_checked(),
        initrd: images.initrd.map(Image::only_checked),
    };
    place(ram, &images, source.cmdline, WorkingSet::of_used(ram)).map(drop)
}

/// The files of a [`BootSource`].
struct Images<'a> {
    kernel: Image<'a>,
    initrd: Option<Image<'a>>,
}

impl<'a> Images<'a> {
    fn new(source: &BootSource<'a>) -> Result<Self, BootError> {
        let kernel = Image::new("kernel", source.kernel, source.kernel_name)?;
        let initrd = source.initrd;
        let initrd = initrd.map(|(file, name)| Image::new("initrd", file, name));
        Ok(Self {
            kernel,
            initrd: initrd.transpose()?,
        })
    }
}

/// A kernel and its initrd in RAM.
struct Placed<'a> {
    mode: EntryMode,
    entry: u64,
    /// For the zero page, where the kernel is entered by it.
    header: setup_header,
    /// (address, length), or zeroes.
    initrd: (u64, u64),
    set: WorkingSet<'a>,
}

fn load_into(
    ram: &GuestRam,
    rsdp: u64,
    source: &BootSource<'_>,
    set: WorkingSet<'_>,
) -> Result<BootEntry, BootError> {
    let placed = place(ram, &Images::new(source)?, source.cmdline, set)?;
    let cmdline = put_cmdline(ram, source.cmdline)?;
    let info = match placed.mode {
        EntryMode::Protected => {
            put_start_info(ram, rsdp, cmdline, placed.initrd)?;
            layout::PVH_INFO_START
        }
        EntryMode::Long => {
            put_zero_page(ram, rsdp, placed.header, cmdline, placed.initrd)?;
            layout::ZERO_PAGE_START
        }
    };
    finish(placed.mode, placed.entry, info, ram, placed.set)
}

/// Copies the files to where they belong, and checks the command line.
fn place<'a>(
    ram: &GuestRam,
    images: &Images<'_>,
    cmdline: &str,
    mut set: WorkingSet<'a>,
) -> Result<Placed<'a>, BootError> {
    const MOST: u64 = layout::CMDLINE_SIZE - 1;
    let kernel = &images.kernel;
    if kernel.size() < 4 {
        return Err(kernel.error(Problem::Truncated));
    }
    if kernel.bytes::<4>(0)? == elf::MAGIC {
        let loaded = elf::load(kernel, ram, &mut set)?;
        set.add_early_allocations(loaded.end);
        let initrd = place_initrd(ram, images, loaded.end, u64::MAX, &mut set)?;
        check_cmdline(cmdline, MOST)?;
        let (mode, entry) = match loaded.pvh_entry {
            Some(entry) => (EntryMode::Protected, entry),
            None => (EntryMode::Long, loaded.entry),
        };
        let header = setup_header {
            boot_flag: 0xaa55,
            header: u32::from_le_bytes(*b"HdrS"),
            kernel_alignment: 0x20_0000,
            ..Default::default()
        };
        Ok(Placed {
            mode,
            entry,
            header,
            initrd,
            set,
        })
    } else if bzimage::matches(kernel) {
        let loaded = bzimage::load(kernel, ram, &mut set)?;
        set.add_early_allocations(loaded.end);
        let limit = match loaded.header.initrd_addr_max {
            0 => 0x37ff_ffff,
            max => u64::from(max),
        };
        let limit = limit.saturating_add(1);
        let initrd = place_initrd(ram, images, loaded.end, limit, &mut set)?;
        check_cmdline(cmdline, u64::from(loaded.header.cmdline_size).min(MOST))?;
        Ok(Placed {
            mode: EntryMode::Long,
            entry: loaded.entry,
            header: loaded.header,
            initrd,
            set,
        })
    } else {
        Err(kernel.error(Problem::NotAKernel))
    }
}

/// Writes what the first instructions need and gathers the result.
fn finish(
    mode: EntryMode,
    entry: u64,
    info: u64,
    ram: &GuestRam,
    set: WorkingSet<'_>,
) -> Result<BootEntry, BootError> {
    let mut address = layout::GDT_START;
    for entry in state::gdt(mode) {
        address = put(ram, address, entry)?;
    }
    if mode == EntryMode::Long {
        put_page_tables(ram)?;
    }
    Ok(BootEntry {
        mode,
        entry,
        info,
        touched: set.into_ranges(),
    })
}

/// Identity-maps the first 4 GiB with 2 MiB pages (SDM volume 3, 4.5).
fn put_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pml4 = layout::PAGE_TABLES_START;
    let pdpt = pml4 + PAGE;
    put(ram, pml4, pdpt | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let directory = pdpt + (1 + gib) * PAGE;
        put(ram, pdpt + gib * 8, directory | PRESENT_WRITABLE)?;
        for entry in 0..512 {
            let page = (gib << 30) | (entry << 21);
            put(ram, directory + entry * 8, page | PRESENT_WRITABLE | LARGE)?;
        }
    }
    Ok(())
}

fn check_cmdline(cmdline: &str, max: u64) -> Result<(), BootError> {
    if cmdline.len() as u64 > max {
        return Err(BootError::CommandLineLength {
            len: cmdline.len(),
            max,
        });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    Ok(())
}

fn put_cmdline(ram: &GuestRam, cmdline: &str) -> Result<u64, BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    ram.memory()
        .write_slice(&bytes, GuestAddress(layout::CMDLINE_START))
        .map_err(|_| BootError::Structures)?;
    Ok(layout::CMDLINE_START)
}

/// Copies the initrd to the top of low RAM, below `limit` and above the kernel's end.
/// Returns (address, length), or zeroes.
fn place_initrd(
    ram: &GuestRam,
    images: &Images<'_>,
    kernel_end: u64,
    limit: u64,
    set: &mut WorkingSet<'_>,
) -> Result<(u64, u64), BootError> {
    let Some(initrd) = &images.initrd else {
        return Ok((0, 0));
    };
    let len = initrd.size();
    let address = ram
        .low_end()
        .min(limit)
        .checked_sub(len)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| initrd.too_big(ram, kernel_end.saturating_add(len)))?;
    set.add(address, len);
    initrd.copy(0, len, ram, address)?;
    Ok((address, len))
}

/// PVH: `hvm_start_info`, the module list and the memory map, one behind the other.
fn put_start_info(
    ram: &GuestRam,
    rsdp: u64,
    cmdline: u64,
    initrd: (u64, u64),
) -> Result<(), BootError> {
    const MAGIC: u32 = 0x336e_c578;
    let mut address = layout::PVH_INFO_START + size_of::<hvm_start_info>() as u64;
    let modules = address;
    if initrd.1 > 0 {
        let module = hvm_modlist_entry {
            paddr: initrd.0,
            size: initrd.1,
            ..Default::default()
        };
        address = put(ram, address, module)?;
    }
    let map_start = address;
    let map = memory_map(ram);
    for (addr, size, type_) in &map {
        let entry = hvm_memmap_table_entry {
            addr: *addr,
            size: *size,
            type_: *type_,
            reserved: 0,
        };
        address = put(ram, address, entry)?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.1 > 0),
        modlist_paddr: modules,
        cmdline_paddr: cmdline,
        rsdp_paddr: rsdp,
        memmap_paddr: map_start,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    put(ram, layout::PVH_INFO_START, info).map(drop)
}

/// Linux: `boot_params` with `header`, the memory map and where everything lies.
fn put_zero_page(
    ram: &GuestRam,
    rsdp: u64,
    header: setup_header,
    cmdline: u64,
    initrd: (u64, u64),
) -> Result<(), BootError> {
    const LOADER_UNDEFINED: u8 = 0xff;
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // Both lie below 4 GiB by the address map; the upper halves have fields of their own.
    params.hdr.cmd_line_ptr = cmdline as u32;
    params.hdr.cmdline_size = (layout::CMDLINE_SIZE - 1) as u32;
    params.hdr.ramdisk_image = initrd.0 as u32;
    params.ext_ramdisk_image = (initrd.0 >> 32) as u32;
    params.hdr.ramdisk_size = initrd.1 as u32;
    params.ext_ramdisk_size = (initrd.1 >> 32) as u32;
    params.hdr.setup_data = 0;
    let map = memory_map(ram);
    let mut table = params.e820_table;
    for (slot, (addr, size, type_)) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *type_,
        };
    }
    params.e820_table = table;
    params.e820_entries = map.len().min(params.e820_table.len()) as u8;
    put(ram, layout::ZERO_PAGE_START, params).map(drop)
}

#[cfg(test)]
mod tests;
