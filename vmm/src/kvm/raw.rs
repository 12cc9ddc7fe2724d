//! The KVM calls that kvm-ioctls leaves unsafe or does not have, each made safe by what
//! its wrapper takes. Called by `kvm` on the manager thread and by `vcpu` on vCPU threads.
#![allow(unsafe_code)] // Raw ioctls, descriptors and the shared kvm_run page end here.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVMIO,
    kvm_pre_fault_memory, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::memory::RamRegion;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Takes over a descriptor of /dev/kvm.
pub(super) fn kvm_from_fd(fd: OwnedFd) -> Kvm {
    // SAFETY: `into_raw_fd` hands over sole ownership of an open descriptor. When it is not
    // /dev/kvm its ioctls fail, which the caller checks first.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// A descriptor that lives as long as `_owner`.
pub fn borrow_fd<T: AsRawFd>(owner: &T, fd: RawFd) -> BorrowedFd<'_> {
    debug_assert_eq!(owner.as_raw_fd(), fd);
    // SAFETY: `owner` keeps its descriptor open for as long as it is borrowed, and the
    // result borrows it.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// Sees a borrowed descriptor as the `EventFd` that kvm-ioctls asks for.
pub(super) fn as_eventfd<R>(fd: BorrowedFd<'_>, call: impl FnOnce(&EventFd) -> R) -> R {
    // SAFETY: the descriptor stays open during the borrow and ManuallyDrop keeps this alias
    // from closing it.
    let alias = ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd.as_raw_fd()) });
    call(&alias)
}

/// KVM_SET_USER_MEMORY_REGION for one RAM region. The caller keeps the mapping alive for as
/// long as the VM.
pub(super) fn set_user_memory_region(vm: &VmFd, region: &RamRegion) -> io::Result<()> {
    let request = kvm_userspace_memory_region {
        slot: region.slot,
        flags: 0,
        guest_phys_addr: region.guest_base,
        memory_size: region.size,
        userspace_addr: region.host_base,
    };
    // SAFETY: a `RamRegion` is only made by `GuestRam` for a mapping of exactly this address
    // and size, and `KvmVm` stores the `GuestRam` beside the VM descriptor.
    unsafe { vm.set_user_memory_region(request) }.map_err(io::Error::from)
}

/// KVM_PRE_FAULT_MEMORY: maps `len` bytes at guest-physical `start` into the second-level
/// page tables before the guest touches them. EOPNOTSUPP or EINVAL where KVM cannot.
pub(crate) fn pre_fault_memory(vcpu: &mut VcpuFd, start: u64, len: u64) -> io::Result<()> {
    let mut request = kvm_pre_fault_memory {
        gpa: start,
        size: len,
        ..Default::default()
    };
    while request.size > 0 {
        // SAFETY: the ioctl reads and writes one `kvm_pre_fault_memory`, which `request` is.
        let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut request) };
        if result != 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // The kernel moved gpa and size past what it has done.
                Some(libc::EINTR | libc::EAGAIN) => continue,
                _ => return Err(error),
            }
        }
    }
    Ok(())
}

/// KVM_SET_XSAVE: x87, SSE and what else of the extended state fits its 4 KiB. No feature that needs
/// more is enabled in this process (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM).
pub(crate) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: the kernel reads as much as this process has enabled for guests, which by default
    // is no more than one `kvm_xsave`.
    unsafe { vcpu.set_xsave(xsave) }.map_err(io::Error::from)
}

/// A port access that ended KVM_RUN: the element size is what tells `rep outsb` from
/// one wide access.
pub(crate) struct PortExit<'a> {
    /// The port.
    pub port: u16,
    /// True for `in`: `data` is to be filled.
    pub is_in: bool,
    /// Bytes per access: 1, 2 or 4.
    pub width: usize,
    /// All accesses, one after another.
    pub data: &'a mut [u8],
}

/// What the kvm_run page says of a port exit; `None` when it says something else or its
/// offsets leave the mapping (`run_size` bytes, KVM_GET_VCPU_MMAP_SIZE).
pub(crate) fn port_exit(vcpu: &mut VcpuFd, run_size: usize) -> Option<PortExit<'_>> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return None;
    }
    // SAFETY: the exit reason says that the kernel filled this member of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size);
    let len = width.checked_mul(usize::try_from(io.count).ok()?)?;
    let offset = usize::try_from(io.data_offset).ok()?;
    if !matches!(width, 1 | 2 | 4) || offset.checked_add(len)? > run_size {
        return None;
    }
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: kvm-ioctls maps `run_size` bytes from `base`; offset + len was checked to lie
    // inside. The slice borrows `vcpu` mutably, so nothing else reaches the page meanwhile.
    let data = unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) };
    Some(PortExit {
        port: io.port,
        is_in: u32::from(io.direction) == KVM_EXIT_IO_IN,
        width,
        data,
    })
}

/// KVM_EXIT_INTERNAL_ERROR's suberror or KVM_EXIT_FAIL_ENTRY's reason.
pub(crate) fn failure_code(vcpu: &mut VcpuFd) -> u64 {
    let run = vcpu.get_kvm_run();
    match run.exit_reason {
        // SAFETY: the exit reason says that the kernel filled this member of the union.
        KVM_EXIT_INTERNAL_ERROR => unsafe { run.__bindgen_anon_1.internal.suberror }.into(),
        // SAFETY: as above.
        KVM_EXIT_FAIL_ENTRY => unsafe {
            run.__bindgen_anon_1
                .fail_entry
                .hardware_entry_failure_reason
        },
        _ => 0,
    }
}

/// `kvm_run.immediate_exit` of a vCPU that another thread runs.
pub(crate) struct ImmediateExit(*mut u8);

// SAFETY: the byte is only accessed atomically by us, and the kernel reads it once per
// KVM_RUN by design (Documentation/virt/kvm/api.rst, immediate_exit).
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// Points at the byte in `vcpu`'s run page.
    ///
    /// # Safety
    /// The result must not be used once `vcpu` has been dropped.
    pub(crate) unsafe fn of(vcpu: &mut VcpuFd) -> Self {
        Self(std::ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit))
    }

    /// Makes this KVM_RUN, or the next, return EINTR (1), or lets it run (0).
    pub(crate) fn set(&self, value: u8) {
        // SAFETY: `of`'s contract keeps the page mapped; the pointer is to one byte, so it is
        // aligned.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}
