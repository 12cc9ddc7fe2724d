//! The guest-physical address map of the x86-64 machine.
//!
//! | range | what |
//! |---|---|
//! | 0 – 640 KiB | RAM: boot structures, ACPI's RSDP just below 1 MiB |
//! | 1 MiB – 3 GiB | RAM |
//! | 3 GiB – 3.5 GiB | PCI memory window (32-bit BARs) |
//! | 3.5 GiB – 3.75 GiB | ECAM, 1 MiB per bus |
//! | 0xfec0_0000 | IOAPIC |
//! | 0xfed0_0000 | platform registers (GED, hot-plug) |
//! | 0xfee0_0000 | local APIC |
//! | 4 GiB – | RAM above the hole, then memory that can be plugged, then the 64-bit PCI window |

/// Where RAM below 4 GiB ends and the 32-bit hole begins.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM continues above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// PCI memory window for 32-bit BARs.
pub const PCI_MEM32_START: u64 = 0xc000_0000;
/// Length of the 32-bit window in bytes.
pub const PCI_MEM32_SIZE: u64 = 0x2000_0000;
/// ECAM base (MCFG).
pub const ECAM_START: u64 = 0xe000_0000;
/// ECAM length: 256 buses of 1 MiB.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// Length of the 64-bit PCI window, which starts at the first GiB boundary above RAM.
pub const PCI_MEM64_SIZE: u64 = 16 << 30;

/// Where the 64-bit PCI window starts when RAM ends at `ram_end`.
pub const fn pci_mem64_start(ram_end: u64) -> u64 {
    let above = if ram_end < HIGH_RAM_START {
        HIGH_RAM_START
    } else {
        ram_end
    };
    above.saturating_add((1 << 30) - 1) & !((1 << 30) - 1)
}

/// Memory that can be plugged starts at a multiple of this: the largest piece in which Linux
/// makes memory usable.
const PLUGGABLE_ALIGN: u64 = 2 << 30;

/// Where memory that can be plugged starts when RAM ends at `ram_end`.
pub const fn pluggable_start(ram_end: u64) -> u64 {
    let above = if ram_end < HIGH_RAM_START {
        HIGH_RAM_START
    } else {
        ram_end
    };
    above.saturating_add(PLUGGABLE_ALIGN - 1) & !(PLUGGABLE_ALIGN - 1)
}

/// IOAPIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Generic event device registers.
pub const GED_START: u64 = 0xfed0_0000;
/// Length of the generic event device's registers.
pub const GED_SIZE: u64 = 0x1000;
/// Hot-plug registers.
pub const HOTPLUG_START: u64 = 0xfed0_1000;
/// Length of the hot-plug registers.
pub const HOTPLUG_SIZE: u64 = 0x1000;
/// The most vCPUs: local APIC ids are 8 bits wide and 0xff is broadcast.
pub const MAX_VCPUS: u32 = 254;
/// KVM's TSS pages (KVM_SET_TSS_ADDR), three of them.
pub const KVM_TSS_START: u64 = 0xfffb_d000;
/// KVM's identity map page (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// COM1's first port.
pub const COM1_PORT: u64 = 0x3f8;
/// COM1's interrupt.
pub const COM1_GSI: u32 = 4;
/// The generic event device's interrupt.
pub const GED_GSI: u32 = 9;
/// GSIs below this belong to the IOAPIC's pins; MSI routes are numbered from here.
pub const FIRST_MSI_GSI: u32 = 24;

/// Sleep control register port (FADT SLEEP_CONTROL_REG); the status register follows.
pub const SLEEP_CONTROL_PORT: u64 = 0x600;
/// Reset register port (FADT RESET_REG).
pub const RESET_PORT: u64 = 0x604;
/// Value that resets when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// PCI configuration mechanism #1 (CONFIG_ADDRESS, CONFIG_DATA): 8 ports.
pub const PCI_CF8_PORT: u64 = 0xcf8;

/// Global descriptor table of the boot processor's first instructions.
pub const GDT_START: u64 = 0x500;
/// PVH's `hvm_start_info`, followed by its module list and memory map.
pub const PVH_INFO_START: u64 = 0x6000;
/// Linux's `boot_params` ("zero page").
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Page tables of the 64-bit entry: one PML4, one PDPT, four page directories that map the
/// first 4 GiB one to one.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the command line with its NUL (Linux's COMMAND_LINE_SIZE).
pub const CMDLINE_SIZE: u64 = 2048;
/// Where conventional memory ends: above lie the video hole and the BIOS area.
pub const CONVENTIONAL_RAM_END: u64 = 0xa_0000;
/// Where extended memory begins, and the lowest address that a kernel may be loaded to.
pub const EXTENDED_RAM_START: u64 = 0x10_0000;

/// The RSDP, inside the BIOS area that Linux scans.
pub const RSDP_START: u64 = 0x000e_0000;
/// ACPI tables: room up to the reset vector.
pub const ACPI_START: u64 = 0x000e_1000;
/// Where a real-mode guest that restarts itself jumps to (F000:FFF0).
pub const RESET_VECTOR: u64 = 0x000f_fff0;
