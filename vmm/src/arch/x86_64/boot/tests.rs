//! Kernels made here, whole, cut and mangled; and what the protocols' structures say.

use super::*;
use crate::memory::MIN_MEMORY;
use proptest::prelude::*;
use std::io::Write;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

const RSDP: u64 = layout::RSDP_START;
const LOAD: u64 = 0x100_0000;

/// RAM for the tests that do not look at what was there before.
static RAM: LazyLock<GuestRam> = LazyLock::new(|| GuestRam::new(MIN_MEMORY).unwrap());

fn file(bytes: &[u8]) -> File {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("bulkhead-boot-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn source<'a>(kernel: &'a File, initrd: Option<&'a File>, cmdline: &'a str) -> BootSource<'a> {
    BootSource {
        kernel,
        kernel_name: "/boot/k",
        initrd: initrd.map(|file| (file, "/boot/i")),
        cmdline,
    }
}

fn boot(ram: &GuestRam, kernel: &[u8]) -> Result<BootEntry, BootError> {
    let kernel = file(kernel);
    load_checked(ram, &source(&kernel, None, "quiet"))
}

/// Loads, and checks before that the check says the same.
fn load_checked(ram: &GuestRam, source: &BootSource<'_>) -> Result<BootEntry, BootError> {
    let found = check(ram, source).map_err(|e| e.to_string());
    let loaded = load(ram, RSDP, source);
    let said = loaded.as_ref().map(drop).map_err(ToString::to_string);
    assert_eq!(found, said);
    loaded
}

/// An ELF kernel of one page of code and one of zeroes, with a PVH note if wanted.
fn elf(pvh: bool) -> Vec<u8> {
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01");
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes());
    image.extend(62u16.to_le_bytes());
    image.extend(1u32.to_le_bytes());
    image.extend((LOAD + 0x10).to_le_bytes()); // entry
    image.extend(64u64.to_le_bytes()); // program headers
    image.extend([0; 12]);
    image.extend(64u16.to_le_bytes());
    image.extend(56u16.to_le_bytes());
    image.extend(2u16.to_le_bytes());
    image.resize(64, 0);
    let mut header = |kind: u32, offset: u64, address: u64, size: u64, memory: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(5u32.to_le_bytes());
        for value in [offset, address, address, size, memory, 0x1000] {
            image.extend(value.to_le_bytes());
        }
    };
    header(1, 0x200, LOAD, 0x1000, 0x2000);
    header(4, 0x1000 + 0x200 - 20, 0, 20, 20);
    image.resize(0x200, 0);
    image.resize(0x1200 - 20, 0x90);
    for word in [4u32, 4, if pvh { 18 } else { 17 }] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(((LOAD + 0x20) as u32).to_le_bytes());
    image
}

/// A bzImage of one setup sector and one page.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    image.resize(1024 + 4096, 0xcc);
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]);
    put(0x1f4, &(4096u32 / 16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // LOADED_HIGH
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
    put(0x238, &100u32.to_le_bytes()); // cmdline_size
    put(0x258, &LOAD.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    image
}

fn read<T: ByteValued>(ram: &GuestRam, address: u64) -> T {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

fn line(result: Result<BootEntry, BootError>) -> String {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn a_pvh_kernel_gets_its_start_info() {
    let ram = GuestRam::new(64 << 20).unwrap();
    let initrd = file(&[7; 5000]);
    let kernel = file(&elf(true));
    let entry = load_checked(&ram, &source(&kernel, Some(&initrd), "console=ttyS0")).unwrap();
    assert_eq!(entry.mode(), EntryMode::Protected);
    assert_eq!(
        (entry.entry(), entry.info()),
        (LOAD + 0x20, layout::PVH_INFO_START)
    );
    let info: hvm_start_info = read(&ram, entry.info());
    assert_eq!(
        (info.magic, info.version, info.rsdp_paddr),
        (0x336e_c578, 1, RSDP)
    );
    let mut cmdline = [0; 14];
    ram.memory()
        .read_slice(&mut cmdline, GuestAddress(info.cmdline_paddr))
        .unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = read(&ram, info.modlist_paddr);
    assert_eq!((module.paddr % 4096, module.size), (0, 5000));
    assert!(module.paddr + module.size <= ram.low_end());
    assert_eq!(read::<u8>(&ram, module.paddr + 4999), 7);
    assert_eq!(read::<u8>(&ram, LOAD), 0x90);
    assert_eq!(read::<u64>(&ram, LOAD + 0x1000), 0, "the rest is zeroes");
    let usable: u64 = (0..u64::from(info.memmap_entries))
        .map(|i| read::<hvm_memmap_table_entry>(&ram, info.memmap_paddr + i * 24))
        .filter(|entry| entry.type_ == MAP_RAM)
        .map(|entry| entry.size)
        .sum();
    assert_eq!(
        usable,
        ram.size() - (0x10_0000 - layout::CONVENTIONAL_RAM_END)
    );
}

#[test]
fn an_elf_kernel_without_a_note_is_entered_in_64_bit_mode() {
    let ram = &*RAM;
    let entry = boot(ram, &elf(false)).unwrap();
    assert_eq!(entry.mode(), EntryMode::Long);
    assert_eq!(
        (entry.entry(), entry.info()),
        (LOAD + 0x10, layout::ZERO_PAGE_START)
    );
}

#[test]
fn a_bzimage_gets_its_zero_page_and_page_tables() {
    let ram = GuestRam::new(layout::LOW_RAM_END + (1 << 30)).unwrap();
    let initrd = file(b"initrd");
    let kernel = file(&bzimage());
    let entry = load_checked(&ram, &source(&kernel, Some(&initrd), "quiet")).unwrap();
    assert_eq!(entry.mode(), EntryMode::Long);
    assert_eq!(entry.entry(), LOAD + 0x200);
    let params: boot_params = read(&ram, entry.info());
    let header = params.hdr;
    let (loader, initrd, size) = (
        header.type_of_loader,
        header.ramdisk_image,
        header.ramdisk_size,
    );
    assert_eq!((loader, size), (0xff, 6));
    assert!(initrd <= 0x7fff_ffff, "initrd_addr_max is kept");
    let rsdp = params.acpi_rsdp_addr;
    assert_eq!(rsdp, RSDP);
    let table = params.e820_table;
    let last = table[usize::from(params.e820_entries) - 1];
    let (addr, size) = (last.addr, last.size);
    assert_eq!((addr, size), (layout::HIGH_RAM_START, 1 << 30));
    // An address in each of the four GiB is mapped to itself.
    for address in [LOAD, 0x4000_0000, 0xbfe0_0000, 0xfee0_0000u64] {
        let pdpt = read::<u64>(&ram, layout::PAGE_TABLES_START) & !0xfff;
        let directory = read::<u64>(&ram, pdpt + (address >> 30) * 8) & !0xfff;
        let page = read::<u64>(&ram, directory + ((address >> 21) & 511) * 8);
        assert_eq!(page & !0xfff, address & !0x1f_ffff);
        assert_eq!(page & 0x83, 0x83);
    }
}

#[test]
fn files_that_are_no_kernels_cost_one_line_that_names_them() {
    let ram = &*RAM;
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"\x7fEL", "truncated"),
        (b"#!/bin/sh\nexit 1\n", "not a kernel"),
        (&[0; 70_000], "not a kernel"),
        (b"\x7fELF", "truncated"),
    ] {
        let text = line(boot(ram, bytes));
        assert!(
            text.starts_with("kernel /boot/k ") && text.contains(word),
            "{text}"
        );
    }
    let directory = File::open(std::env::temp_dir()).unwrap();
    let text = line(load_checked(ram, &source(&directory, None, "")));
    assert!(text.contains("not a regular file"), "{text}");
    let (kernel, empty) = (file(&elf(true)), file(b""));
    let text = line(load_checked(ram, &source(&kernel, Some(&empty), "")));
    assert!(text.starts_with("initrd /boot/i is empty"), "{text}");
    let big = file(b"x");
    big.set_len(MIN_MEMORY).unwrap();
    let text = line(load_checked(ram, &source(&kernel, Some(&big), "")));
    assert!(
        text.contains("initrd") && text.contains("--memory"),
        "{text}"
    );
}

#[test]
fn other_machines_kernels_are_told_apart() {
    let mut arm = elf(true);
    arm[18] = 183;
    assert!(line(boot(&RAM, &arm)).contains("x86"));
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(line(boot(&RAM, &old)).contains("64-bit x86"));
    let mut stray = elf(false);
    stray[24..32].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
    assert!(line(boot(&RAM, &stray)).contains("PVH"));
    let mut low = elf(true);
    low[64 + 24..64 + 32].copy_from_slice(&0x8000u64.to_le_bytes());
    assert!(
        line(boot(&RAM, &low)).contains("not a kernel"),
        "it would overwrite the boot structures"
    );
}

#[test]
fn the_command_line_has_bounds() {
    let ram = &*RAM;
    let (vmlinux, bzimage) = (file(&elf(true)), file(&bzimage()));
    let longest = "x".repeat(2047);
    assert!(load_checked(ram, &source(&vmlinux, None, &longest)).is_ok());
    let text = line(load_checked(ram, &source(&vmlinux, None, &(longest + "y"))));
    assert!(
        text.contains("2048 bytes") && text.contains("shorten the command line"),
        "{text}"
    );
    assert!(load_checked(ram, &source(&bzimage, None, &"x".repeat(100))).is_ok());
    let text = line(load_checked(ram, &source(&bzimage, None, &"x".repeat(101))));
    assert!(text.contains("takes 100"), "{text}");
    let text = line(load_checked(ram, &source(&vmlinux, None, "a\0b")));
    assert!(text.contains("NUL"), "{text}");
}

#[test]
fn a_check_leaves_memory_as_it_is() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    for kernel in [file(&elf(true)), file(&bzimage())] {
        let initrd = file(&[7; 5000]);
        check(&ram, &source(&kernel, Some(&initrd), "quiet")).unwrap();
    }
    let mut all = vec![1; MIN_MEMORY as usize];
    ram.memory().read_slice(&mut all, GuestAddress(0)).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_kernel_cut_anywhere_is_refused(at in any::<prop::sample::Index>(), packed in any::<bool>()) {
        let whole = if packed { bzimage() } else { elf(true) };
        let cut = at.index(whole.len());
        // The padding that the last 15 bytes of a bzImage may be is not missed.
        if !(packed && whole.len() - cut < 16) {
            prop_assert!(boot(&RAM, &whole[..cut]).is_err(), "cut to {}", cut);
        }
        prop_assert!(boot(&RAM, &whole).is_ok());
    }

    #[test]
    fn mangled_headers_never_panic_and_load_nothing_outside_ram(
        packed in any::<bool>(),
        changes in proptest::collection::vec((0usize..0x270, any::<u8>()), 1..12),
        extreme in (0usize..0x260, prop::sample::select(vec![u64::MAX, 1 << 63, 0xffff_f000, 1 << 20])),
    ) {
        let mut image = if packed { bzimage() } else { elf(true) };
        image[extreme.0..extreme.0 + 8].copy_from_slice(&extreme.1.to_le_bytes());
        if packed {
            image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            image[0x202..0x206].copy_from_slice(b"HdrS");
        } else {
            image[..4].copy_from_slice(b"\x7fELF");
        }
        for (offset, value) in changes {
            image[offset] = value;
        }
        if let Ok(entry) = boot(&RAM, &image) {
            for (start, len) in entry.touched() {
                prop_assert!(start + len <= RAM.end());
            }
        }
    }
}
