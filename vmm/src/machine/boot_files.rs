//! What a guest is booted from: files that the launcher opened when the machine was made, and that
//! stay open, since a reset reads them again and the VMM opens nothing. Who writes to them changes
//! what the next reset boots; who replaces them by others of the same name does not.
//!
//! Called by the manager thread when the machine is made, and by the thread of a reset.

use std::fs::File;
use std::ops::Range;

use super::device;
use crate::arch::x86_64::boot::{self, BootEntry, BootSource};
use crate::arch::x86_64::{acpi, layout, reset_vector};
use crate::memory::GuestRam;
use crate::pci::RootComplex;

/// Kernel, initial RAM disk, each with its name for messages, and command line.
pub struct BootFiles {
    /// The kernel.
    pub kernel: (File, String),
    /// The initial RAM disk.
    pub initrd: Option<(File, String)>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Where 64-bit BARs lie.
pub fn pci_mem64(ram: &GuestRam) -> Range<u64> {
    let start = layout::pci_mem64_start(ram.last_end());
    start..start.saturating_add(layout::PCI_MEM64_SIZE)
}

impl BootFiles {
    /// Fills memory that nobody has used: ACPI's tables with so many vCPUs of so many that there may
    /// be, the reset vector, the kernel with what its boot protocol wants.
    ///
    /// # Errors
    /// One line that names what failed and the remedy.
    pub fn load(
        &self,
        ram: &GuestRam,
        pci: &RootComplex,
        cpus: (u32, u32),
    ) -> Result<BootEntry, String> {
        self.load_by(ram, pci, cpus, boot::load)
    }

    /// The same for a guest that begins anew, in memory that was cleared.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_again(
        &self,
        ram: &GuestRam,
        pci: &RootComplex,
        cpus: (u32, u32),
    ) -> Result<BootEntry, String> {
        self.load_by(ram, pci, cpus, boot::load_again)
    }

    fn load_by(
        &self,
        ram: &GuestRam,
        pci: &RootComplex,
        cpus: (u32, u32),
        load: fn(&GuestRam, u64, &BootSource<'_>) -> Result<BootEntry, boot::BootError>,
    ) -> Result<BootEntry, String> {
        let ports: Vec<u8> = pci.ports().iter().map(|port| port.device).collect();
        let tables = device::acpi_config(pci, cpus, pci_mem64(ram), &ports, ram);
        let rsdp = acpi::write_tables(ram.memory(), &tables).map_err(|e| e.to_string())?;
        reset_vector::write(ram.memory()).map_err(|e| format!("reset vector: {e}"))?;
        load(ram, rsdp, &self.source()).map_err(|e| e.to_string())
    }

    /// Whether [`load_again`](Self::load_again) would find files that it can use, by what they say
    /// of themselves; memory stays as it is.
    ///
    /// # Errors
    /// One line that names what failed and the remedy.
    pub fn check(&self, ram: &GuestRam) -> Result<(), String> {
        boot::check(ram, &self.source()).map_err(|e| e.to_string())
    }

    fn source(&self) -> BootSource<'_> {
        let initrd = self.initrd.as_ref();
        BootSource {
            kernel: &self.kernel.0,
            kernel_name: &self.kernel.1,
            initrd: initrd.map(|(file, name)| (file, name.as_str())),
            cmdline: &self.cmdline,
        }
    }
}
