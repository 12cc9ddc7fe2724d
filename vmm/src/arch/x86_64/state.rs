//! The state in which a vCPU begins: MSRs and local APIC of every one, registers of the
//! boot processor. The others wait in KVM for the guest's start-up interrupt.
//!
//! Called by the manager thread while vCPUs are made.

use std::io;

use kvm_bindings::{
    CpuId, Msrs, kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::boot::{BootEntry, EntryMode};
use super::layout;
use crate::kvm::KvmError;

pub(super) const REMEDY: &str = "check that the host's KVM can run a guest";

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back; Linux makes device memory uncached by its page tables.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// CPUID, MSRs and local APIC: what every vCPU needs.
pub(crate) fn prepare(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    vcpu.set_cpuid2(cpuid)
        .map_err(KvmError::call("KVM_SET_CPUID2", REMEDY))?;
    let entries = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| KvmError::Capability("room for the initial MSRs"))?;
    let done = vcpu
        .set_msrs(&msrs)
        .map_err(KvmError::call("KVM_SET_MSRS", REMEDY))?;
    if done != entries.len() {
        return Err(KvmError::call("KVM_SET_MSRS", REMEDY)(io::Error::other(
            format!("only {done} of {} were taken", entries.len()),
        )));
    }
    let mut lapic = vcpu
        .get_lapic()
        .map_err(KvmError::call("KVM_GET_LAPIC", REMEDY))?;
    set_delivery(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, LAPIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::call("KVM_SET_LAPIC", REMEDY))
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    if let Some(bytes) = lapic
        .regs
        .get_mut(register..)
        .and_then(|rest| rest.first_chunk_mut::<4>())
    {
        let old = u32::from_le_bytes(bytes.map(|b| b as u8));
        let new = (old & !(7 << 8)) | mode;
        *bytes = new.to_le_bytes().map(|b| b as i8);
    }
}

/// Index of the flat code segment in the GDT: Linux's __BOOT_CS.
const CODE_INDEX: u16 = 2;
/// Index of the flat data segment: Linux's __BOOT_DS.
const DATA_INDEX: u16 = 3;
/// Index of the task state segment, which takes two entries in long mode.
const TSS_INDEX: u16 = 4;
/// Entries of the GDT.
const GDT_ENTRIES: usize = 6;

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// A flat 4 GiB segment of code or data.
fn flat(index: u16, type_: u8, mode: EntryMode) -> kvm_segment {
    let long_code = mode == EntryMode::Long && type_ == TYPE_CODE;
    kvm_segment {
        limit: u32::MAX,
        selector: index << 3,
        type_,
        present: 1,
        db: u8::from(!long_code),
        s: 1,
        l: u8::from(long_code),
        g: 1,
        ..Default::default()
    }
}

fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TSS_INDEX << 3,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..Default::default()
    }
}

/// The GDT entry that describes `segment` (SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = match segment.g {
        0 => segment.limit,
        _ => segment.limit >> 12,
    };
    let limit = u64::from(limit);
    let low = (limit & 0xffff) | ((segment.base & 0xff_ffff) << 16);
    let access = u64::from(segment.type_ & 0xf)
        | (u64::from(segment.s) << 4)
        | (u64::from(segment.dpl) << 5)
        | (u64::from(segment.present) << 7);
    let flags = u64::from(segment.avl)
        | (u64::from(segment.l) << 1)
        | (u64::from(segment.db) << 2)
        | (u64::from(segment.g) << 3);
    low | (access << 40)
        | (((limit >> 16) & 0xf) << 48)
        | (flags << 52)
        | (((segment.base >> 24) & 0xff) << 56)
}

/// The GDT that the registers of [`enter`] refer to, for [`layout::GDT_START`].
pub(crate) fn gdt(mode: EntryMode) -> [u64; GDT_ENTRIES] {
    [
        0,
        0,
        descriptor(&flat(CODE_INDEX, TYPE_CODE, mode)),
        descriptor(&flat(DATA_INDEX, TYPE_DATA, mode)),
        descriptor(&task()),
        0,
    ]
}

pub(super) fn system_registers(sregs: &mut kvm_sregs, mode: EntryMode) {
    let data = flat(DATA_INDEX, TYPE_DATA, mode);
    sregs.cs = flat(CODE_INDEX, TYPE_CODE, mode);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task();
    sregs.gdt = kvm_dtable {
        base: layout::GDT_START,
        limit: (GDT_ENTRIES * size_of::<u64>() - 1) as u16,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    match mode {
        // PVH: "cr0: bit 0 (PE) must be set; all other writeable bits cleared"; no paging.
        EntryMode::Protected => {
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0, 0);
        }
        EntryMode::Long => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES_START;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
}

/// Points the boot processor at the kernel.
pub(crate) fn enter(vcpu: &VcpuFd, boot: &BootEntry) -> Result<(), KvmError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(KvmError::call("KVM_GET_SREGS", REMEDY))?;
    system_registers(&mut sregs, boot.mode());
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::call("KVM_SET_SREGS", REMEDY))?;
    vcpu.set_regs(&entry_registers(boot))
        .map_err(KvmError::call("KVM_SET_REGS", REMEDY))
}

pub(super) fn entry_registers(boot: &BootEntry) -> kvm_regs {
    let mut regs = kvm_regs {
        rip: boot.entry(),
        rflags: 2,
        ..Default::default()
    };
    match boot.mode() {
        EntryMode::Protected => regs.rbx = boot.info(),
        EntryMode::Long => regs.rsi = boot.info(),
    }
    regs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gdt_is_what_linux_documents() {
        // Documentation/arch/x86/boot.rst: __BOOT_CS 0x10, __BOOT_DS 0x18, flat.
        let long = gdt(EntryMode::Long);
        assert_eq!(long[2], 0x00af_9b00_0000_ffff);
        assert_eq!(long[3], 0x00cf_9300_0000_ffff);
        let protected = gdt(EntryMode::Protected);
        assert_eq!(protected[2], 0x00cf_9b00_0000_ffff);
        assert_eq!(protected[4], 0x0000_8b00_0000_0067);
    }

    #[test]
    fn local_interrupt_pins_keep_their_mask() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LAPIC_LVT_LINT0 + 2] = 1; // masked
        set_delivery(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
        assert_eq!(lapic.regs[LAPIC_LVT_LINT0..][..4], [0, 7, 1, 0]);
        set_delivery(&mut lapic, usize::MAX, DELIVERY_NMI);
    }
}
