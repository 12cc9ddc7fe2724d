//! The ACPI tables (ACPI 6.5, chapter 5): RSDP, XSDT, FADT, MADT, MCFG, DSDT, and SRAT where
//! memory can be plugged.
//!
//! The machine is hardware-reduced: no PM timer, no SCI, no PIC. Built once by the manager
//! thread before the guest starts.

mod dsdt;
mod hotplug;

use std::ops::Range;

use crate::memory::MappedMemory;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::layout;

const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGN: u64 = 64;

/// FADT IAPC_BOOT_ARCH: no VGA, no ASPM control, no CMOS clock; no 8042 and no legacy
/// devices by leaving their bits clear; MSI allowed likewise.
const BOOT_ARCH: u16 = (1 << 2) | (1 << 4) | (1 << 5);

/// What the tables describe besides the fixed address map.
#[derive(Clone, Debug)]
pub struct AcpiConfig<'a> {
    /// vCPUs that are there; APIC ids count from 0.
    pub cpus: u32,
    /// vCPUs that there may be.
    pub max_cpus: u32,
    /// The 64-bit PCI memory window.
    pub pci_mem64: Range<u64>,
    /// The highest bus number of the root complex.
    pub last_bus: u8,
    /// Device numbers of the root ports, all of which take hot-plug.
    pub ports: &'a [u8],
    /// Where RAM lies.
    pub ram: Vec<Range<u64>>,
    /// Where memory can be plugged.
    pub pluggable: Option<Range<u64>>,
}

/// Why the tables could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More than the BIOS area holds.
    #[error("the ACPI tables take {size} bytes but have room for {room}: use fewer CPUs or ports")]
    TooBig {
        /// Bytes needed.
        size: u64,
        /// Bytes there are.
        room: u64,
    },
    /// The guest's RAM ends below the BIOS area.
    #[error("the ACPI tables do not fit into the guest's memory: give it more --memory")]
    NoMemory,
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// One table after another from `layout::ACPI_START`.
struct Placer {
    bytes: Vec<u8>,
}

impl Placer {
    /// Where `table` went.
    fn put(&mut self, table: &[u8]) -> u64 {
        let len = self.bytes.len().next_multiple_of(ALIGN as usize);
        self.bytes.resize(len, 0);
        self.bytes.extend_from_slice(table);
        layout::ACPI_START.saturating_add(len as u64)
    }
}

/// Writes all tables into the guest's BIOS area and returns the RSDP's address.
pub fn write_tables(memory: &MappedMemory, config: &AcpiConfig<'_>) -> Result<u64, AcpiError> {
    let (rsdp, tables) = build(config);
    let room = layout::RESET_VECTOR - layout::ACPI_START;
    let size = tables.len() as u64;
    if size > room {
        return Err(AcpiError::TooBig { size, room });
    }
    for (address, bytes) in [(layout::RSDP_START, &rsdp), (layout::ACPI_START, &tables)] {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| AcpiError::NoMemory)?;
    }
    Ok(layout::RSDP_START)
}

/// The RSDP, and everything else from `layout::ACPI_START`.
fn build(config: &AcpiConfig<'_>) -> (Vec<u8>, Vec<u8>) {
    let mut placer = Placer { bytes: Vec::new() };
    let dsdt = placer.put(dsdt_table(config).as_slice());
    let fadt = placer.put(&bytes_of(&fadt(dsdt)));
    let madt = placer.put(&bytes_of(&madt(config.cpus, config.max_cpus)));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, config.last_bus);
    let mcfg = placer.put(&bytes_of(&mcfg));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    if let Some(table) = srat(config) {
        xsdt.add_entry(placer.put(table.as_slice()));
    }
    let xsdt = placer.put(&bytes_of(&xsdt));
    (bytes_of(&Rsdp::new(OEM_ID, xsdt)), placer.bytes)
}

fn dsdt_table(config: &AcpiConfig<'_>) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&dsdt::body(config));
    table
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |address| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_CONTROL_PORT + 1);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(cpus: u32, max: u32) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC_START as u32),
    );
    // layout::MAX_VCPUS keeps every id in 8 bits.
    for id in 0..u8::try_from(max.max(cpus)).unwrap_or(u8::MAX) {
        let status = if u32::from(id) < cpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_START as u32, 0));
    madt
}

/// Which memory there may be (ACPI 6.5 section 5.2.16): a guest sizes its tables by it. All of
/// it, and every CPU, is in one domain.
fn srat(config: &AcpiConfig<'_>) -> Option<Sdt> {
    const ENABLED: u32 = 1;
    const HOT_PLUGGABLE: u32 = 2;
    let pluggable = config.pluggable.as_ref()?;
    let mut table = Sdt::new(*b"SRAT", 48, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // Reserved to be 1, for those who know revision 1.
    table.write_u32(36, 1);
    // layout::MAX_VCPUS keeps every id in 8 bits.
    for id in 0..u8::try_from(config.max_cpus.max(config.cpus)).unwrap_or(u8::MAX) {
        let mut entry = [0; 16];
        let [kind, length, _, apic, flags, ..] = &mut entry;
        (*kind, *length, *apic, *flags) = (0, 16, id, 1);
        table.append_slice(&entry);
    }
    let ram = config.ram.iter().map(|range| (range, ENABLED));
    for (range, flags) in ram.chain([(pluggable, ENABLED | HOT_PLUGGABLE)]) {
        let length = range.end.saturating_sub(range.start);
        let mut entry = vec![1, 40, 0, 0, 0, 0, 0, 0];
        entry.extend_from_slice(&range.start.to_le_bytes());
        entry.extend_from_slice(&length.to_le_bytes());
        entry.extend_from_slice(&0_u32.to_le_bytes());
        entry.extend_from_slice(&flags.to_le_bytes());
        entry.extend_from_slice(&0_u64.to_le_bytes());
        table.append_slice(&entry);
    }
    Some(table)
}

/// AML that is bytes already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0);
    }
}

/// A four-letter name as an operand.
fn name(text: &str) -> aml::Path {
    aml::Path::new(text)
}

#[cfg(test)]
mod tests;
