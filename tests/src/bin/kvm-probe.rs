//! Says whether this machine's `/dev/kvm` runs real guests: exit status 0 and a line on
//! stdout if it does, 1 and a line that says why if it does not.
//!
//! That the device opens proves nothing: some back-ends emulate a few instructions and
//! know neither interrupts nor `iret` in 64-bit mode, and a kernel dies there at once.
//! So a payload runs in long mode behind the in-kernel interrupt controller (Intel SDM
//! volume 3, 6.14 "Exception and interrupt handling in 64-bit mode" and 11.6.1
//! "Interrupt command register"): it takes a software interrupt and one that it sends to
//! itself by its local APIC, returns from both by `iretq`, and reports by an output port.
//!
//! `tests/nested-host/probe` calls it. One thread runs the vCPU, the main thread watches
//! the clock.
#![allow(unsafe_code)] // Guest memory is mapped, and handed to KVM, by raw address.

use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

/// What the payload may take. It needs milliseconds, even in a nested machine.
const DEADLINE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let (sender, verdict) = mpsc::channel();
    std::thread::spawn(move || sender.send(probe::run()));
    match verdict.recv_timeout(DEADLINE) {
        Ok(Ok(())) => {
            println!("/dev/kvm delivers interrupts in 64-bit mode");
            ExitCode::SUCCESS
        }
        Ok(Err(why)) => {
            println!("{why}");
            ExitCode::FAILURE
        }
        // The vCPU thread ends with the process.
        Err(_) => {
            println!("/dev/kvm did not finish a payload of 20 instructions in {DEADLINE:?}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod probe {
    /// There is a payload for x86-64 only.
    pub fn run() -> Result<(), String> {
        Err("there is no probe for this architecture".into())
    }
}

#[cfg(target_arch = "x86_64")]
mod probe {
    use kvm_bindings::{
        KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    };
    use kvm_ioctls::{Kvm, VcpuExit};

    const MEMORY: usize = 0x20_0000;
    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const PD_LOW: u64 = 0x3000;
    const PD_HIGH: u64 = 0x4000;
    const IDT: u64 = 0x5000;
    const GDT: u64 = 0x6000;
    const CODE: u64 = 0x7000;
    const STACK_TOP: u64 = 0x1_0000;
    const APIC: u64 = 0xfee0_0000;
    /// Where KVM may keep the task state segment that old Intel CPUs need.
    const TSS: usize = 0xfffb_d000;

    const SOFTWARE_VECTOR: u64 = 0x20;
    const APIC_VECTOR: u64 = 0x30;
    const PORT: u16 = 0x501;
    const SUCCESS: u8 = 0x4b;

    core::arch::global_asm!(
        ".pushsection .rodata.kvm_probe",
        ".code64",
        "kvm_probe_start:",
        "    xor ebx, ebx",
        "    int 0x20", // SOFTWARE_VECTOR
        "    cmp ebx, 1",
        "    jne 2f",
        "    mov edi, 0xfee00000",
        "    mov dword ptr [rdi + 0xf0], 0x1ff", // spurious-interrupt vector: APIC on
        "    sti",
        "    mov dword ptr [rdi + 0x300], 0x40030", // fixed, to itself, APIC_VECTOR
        "3:  pause",
        "    cmp ebx, 0x101",
        "    jne 3b",
        "    movd xmm0, ebx",
        "    movd ecx, xmm0",
        "    cmp ecx, ebx",
        "    jne 2f",
        "    mov al, 0x4b", // SUCCESS
        "    jmp 4f",
        "2:  mov al, 0",
        "4:  mov dx, 0x501", // PORT
        "    out dx, al",
        "5:  hlt",
        "    jmp 5b",
        "kvm_probe_software:",
        "    inc ebx",
        "    iretq",
        "kvm_probe_apic:",
        "    add ebx, 0x100",
        "    mov dword ptr [rdi + 0xb0], 0", // end of interrupt
        "    iretq",
        "kvm_probe_end:",
        ".popsection",
    );
    unsafe extern "C" {
        static kvm_probe_start: u8;
        static kvm_probe_software: u8;
        static kvm_probe_apic: u8;
        static kvm_probe_end: u8;
    }

    /// The payload, and the offsets of its two interrupt handlers.
    fn payload() -> (&'static [u8], u64, u64) {
        let start = &raw const kvm_probe_start;
        let offset = |end: *const u8| end.addr().wrapping_sub(start.addr());
        let length = offset(&raw const kvm_probe_end);
        // SAFETY: the four labels are in this order in one read-only section, defined
        // above, which nothing writes to; the bytes between first and last are initialised.
        let code = unsafe { std::slice::from_raw_parts(start, length) };
        (
            code,
            offset(&raw const kvm_probe_software) as u64,
            offset(&raw const kvm_probe_apic) as u64,
        )
    }

    /// The guest's memory, as the payload is to find it.
    fn image() -> Vec<u8> {
        let mut memory = vec![0; MEMORY];
        let mut put = |address: u64, bytes: &[u8]| {
            let start = address as usize;
            if let Some(place) = memory.get_mut(start..start + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        // Present and writable; the last level with 2 MiB pages, the APIC's uncached.
        put(PML4, &(PDPT | 3).to_le_bytes());
        put(PDPT, &(PD_LOW | 3).to_le_bytes());
        put(PDPT + 8 * (APIC >> 30), &(PD_HIGH | 3).to_le_bytes());
        put(PD_LOW, &0x83_u64.to_le_bytes());
        put(
            PD_HIGH + 8 * ((APIC >> 21) & 511),
            &(APIC | 0x9b).to_le_bytes(),
        );
        put(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
        put(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        let (code, software, apic) = payload();
        put(CODE, code);
        for (vector, handler) in [
            (SOFTWARE_VECTOR, CODE + software),
            (APIC_VECTOR, CODE + apic),
        ] {
            // A 64-bit interrupt gate in segment 8; every handler lies below 64 KiB.
            put(
                IDT + 16 * vector,
                &(0x0000_8e00_0008_0000 | (handler & 0xffff)).to_le_bytes(),
            );
        }
        memory
    }

    fn long_mode(sregs: &mut kvm_sregs) {
        let segment = |selector, type_, l, db| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            dpl: 0,
            db,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(8, 11, 1, 0);
        let data = segment(16, 3, 0, 1);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: 23,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: IDT,
            limit: 0xfff,
            ..Default::default()
        };
        sregs.cr3 = PML4;
        sregs.cr4 |= 1 << 5 | 1 << 9; // PAE, OSFXSR
        sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1; // PG, NE, ET, MP, PE
        sregs.efer |= 1 << 8 | 1 << 10; // LME, LMA
    }

    /// Runs the payload.
    ///
    /// # Errors
    /// One line: what is missing.
    pub fn run() -> Result<(), String> {
        let kvm = Kvm::new().map_err(|e| format!("/dev/kvm cannot be opened: {e}"))?;
        let failed = |what: &'static str| move |e| format!("/dev/kvm cannot {what}: {e}");
        let vm = kvm.create_vm().map_err(failed("create a VM"))?;
        vm.set_tss_address(TSS)
            .map_err(failed("set the TSS address"))?;
        vm.create_irq_chip()
            .map_err(failed("create an interrupt controller"))?;

        // Leaked: KVM uses it until the process ends.
        let memory = page_aligned(&image());
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.addr() as u64,
        };
        // SAFETY: the region is MEMORY bytes that this process owns, page-aligned, never
        // freed and, from here on, never accessed but by the guest.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("map memory"))?;

        let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("tell its CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("read system registers"))?;
        long_mode(&mut sregs);
        vcpu.set_sregs(&sregs)
            .map_err(failed("enter 64-bit mode"))?;
        let mut regs = vcpu.get_regs().map_err(failed("read registers"))?;
        (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK_TOP, 2);
        vcpu.set_regs(&regs).map_err(failed("set registers"))?;

        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [SUCCESS, ..])) => Ok(()),
            Ok(VcpuExit::IoOut(PORT, _)) => Err("/dev/kvm loses interrupts in 64-bit mode".into()),
            Ok(VcpuExit::InternalError) => {
                Err("/dev/kvm cannot emulate an instruction of 64-bit mode (internal error)".into())
            }
            Ok(VcpuExit::Shutdown) => {
                Err("/dev/kvm: an interrupt in 64-bit mode ends in a triple fault".into())
            }
            Ok(exit) => Err(format!(
                "/dev/kvm: a payload in 64-bit mode ended with {exit:?}"
            )),
            Err(e) => Err(format!("/dev/kvm cannot run a payload in 64-bit mode: {e}")),
        }
    }

    /// Copies `image` into page-aligned memory that is never freed.
    fn page_aligned(image: &[u8]) -> *mut u8 {
        #[repr(C, align(4096))]
        #[derive(Clone, Copy)]
        struct Page([u8; 4096]);
        let mut pages = vec![Page([0; 4096]); image.len().div_ceil(4096)];
        for (page, bytes) in pages.iter_mut().zip(image.chunks_exact(4096)) {
            page.0.copy_from_slice(bytes);
        }
        Box::leak(pages.into_boxed_slice()).as_mut_ptr().cast()
    }
}
