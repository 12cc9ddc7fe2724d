//! The VM as KVM sees it (Documentation/virt/kvm/api.rst): capabilities, the in-kernel
//! interrupt controllers, memory slots, interrupt routes, irqfds and ioeventfds.
//!
//! Made by the manager thread from a descriptor that was opened before the process locked
//! itself down; `Hypervisor` calls come from vCPU threads too (MSI-X tables, BAR moves).
//!
//! No PIT is created: the machine is ACPI hardware-reduced and its clocks are kvmclock and
//! the local APIC timer.

mod raw;
mod routing;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, kvm_irqchip,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};

use crate::arch::x86_64::layout;
use crate::ged::IrqLine;
use crate::hypervisor::{Gsi, Hypervisor, MsiMessage};
use crate::memory::{GuestRam, RamRegion};

pub use raw::borrow_fd;
pub(crate) use raw::{ImmediateExit, failure_code, port_exit, pre_fault_memory, set_xsave};
use routing::RouteTable;

/// KVM_CAP_PRE_FAULT_MEMORY; kvm-ioctls has no name for it.
const CAP_PRE_FAULT_MEMORY: u64 = 236;
/// The KVM API that has been stable since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Capabilities without which the machine cannot be built.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why a VM could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor answers KVM's first question wrongly.
    #[error(
        "/dev/kvm does not speak KVM API version 12 (answer {0}): give the KVM device of a Linux host"
    )]
    Version(i32),
    /// The host's KVM is too old or too limited.
    #[error("the host's KVM lacks {0}: use a newer Linux kernel (5.4 or later)")]
    Capability(&'static str),
    /// A KVM call failed.
    #[error("{call} failed: {source}: {remedy}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// What the kernel answered.
        source: io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
}

impl KvmError {
    pub(crate) fn call<E: Into<io::Error>>(
        call: &'static str,
        remedy: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |error| Self::Call {
            call,
            source: error.into(),
            remedy,
        }
    }
}

const REMEDY_HOST: &str = "check that the host's KVM works (dmesg, kvm-ok) and can run a guest";
const REMEDY_MEMORY: &str = "the host may be out of memory or memory slots";

/// Most times that a call is made again because a signal came.
const INTERRUPTIONS: u32 = 1000;

/// Makes a call that a pending signal interrupts: KVM_CREATE_VM takes all locks of the
/// address space, which gives up for one.
fn uninterrupted<T>(
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    for _ in 0..INTERRUPTIONS {
        match call() {
            Err(error) if error.errno() == libc::EINTR => continue,
            other => return other,
        }
    }
    call()
}

/// One virtual machine.
pub struct KvmVm {
    kvm: Kvm,
    vm: VmFd,
    routes: Mutex<RouteTable>,
    /// Keeps every mapping that KVM was told of for as long as `vm` exists.
    ram: Mutex<Vec<GuestRam>>,
    /// Memory slots that are in use.
    slots: Mutex<BTreeSet<u32>>,
    /// The interrupt controllers as they were made; `None`: KVM does not say.
    chips: Option<Vec<kvm_irqchip>>,
}

/// The interrupt controllers' state.
fn chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, KvmError> {
    [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ]
    .into_iter()
    .map(|chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(KvmError::call("KVM_GET_IRQCHIP", REMEDY_HOST))?;
        Ok(chip)
    })
    .collect()
}

impl KvmVm {
    /// Checks what `dev_kvm` can do and makes a VM with its interrupt controllers.
    pub fn create(dev_kvm: OwnedFd) -> Result<Self, KvmError> {
        let kvm = raw::kvm_from_fd(dev_kvm);
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        for (capability, name) in NEEDED {
            if !kvm.check_extension(*capability) {
                return Err(KvmError::Capability(name));
            }
        }
        let vm = uninterrupted(|| kvm.create_vm())
            .map_err(KvmError::call("KVM_CREATE_VM", REMEDY_HOST))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
            .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR", REMEDY_HOST))?;
        vm.set_tss_address(layout::KVM_TSS_START as usize)
            .map_err(KvmError::call("KVM_SET_TSS_ADDR", REMEDY_HOST))?;
        vm.create_irq_chip()
            .map_err(KvmError::call("KVM_CREATE_IRQCHIP", REMEDY_HOST))?;
        let routes = RouteTable::new();
        vm.set_gsi_routing(
            &routes
                .to_kvm()
                .map_err(KvmError::call("KVM_SET_GSI_ROUTING", REMEDY_HOST))?,
        )
        .map_err(KvmError::call("KVM_SET_GSI_ROUTING", REMEDY_HOST))?;
        let chips = chips(&vm)
            .inspect_err(|error| log::debug!("the machine cannot be reset: {error}"))
            .ok();
        Ok(Self {
            kvm,
            vm,
            chips,
            routes: Mutex::new(routes),
            ram: Mutex::new(Vec::new()),
            slots: Mutex::new(BTreeSet::new()),
        })
    }

    /// The most vCPUs that both KVM and 8-bit local APIC ids allow.
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus())
            .unwrap_or(u32::MAX)
            .min(layout::MAX_VCPUS)
    }

    /// KVM_GET_SUPPORTED_CPUID.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID", REMEDY_HOST))
    }

    /// KVM_GET_MSR_INDEX_LIST.
    pub(crate) fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST", REMEDY_HOST))?;
        Ok(list.as_slice().to_vec())
    }

    /// Whether [`reset_chips`](Self::reset_chips) can be done.
    pub fn can_reset_chips(&self) -> bool {
        self.chips.is_some()
    }

    /// Has the interrupt controllers be as they were made.
    ///
    /// # Errors
    /// KVM refused, or never said what they were.
    pub fn reset_chips(&self) -> Result<(), KvmError> {
        let chips = self
            .chips
            .as_ref()
            .ok_or(KvmError::Capability("KVM_GET_IRQCHIP"))?;
        for chip in chips {
            self.vm
                .set_irqchip(chip)
                .map_err(KvmError::call("KVM_SET_IRQCHIP", REMEDY_HOST))?;
        }
        Ok(())
    }

    /// Width of a guest-physical address.
    pub fn phys_bits(&self) -> Result<u8, KvmError> {
        let cpuid = self.supported_cpuid()?;
        let bits = cpuid
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == 0x8000_0008)
            .map_or(36, |leaf| (leaf.eax & 0xff) as u8);
        Ok(bits)
    }

    /// True when the in-kernel local APIC has the TSC-deadline timer.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// True when KVM_PRE_FAULT_MEMORY may be tried.
    pub fn has_pre_fault_memory(&self) -> bool {
        self.kvm.check_extension_raw(CAP_PRE_FAULT_MEMORY) > 0
    }

    /// Gives every region of `ram` a memory slot, and keeps the mappings.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), KvmError> {
        let mut kept = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(ram.clone());
        for region in ram.regions() {
            raw::set_user_memory_region(&self.vm, region)
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION", REMEDY_MEMORY))?;
            self.note_slot(region.slot, true);
        }
        Ok(())
    }

    fn note_slot(&self, slot: u32, used: bool) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if used {
            slots.insert(slot);
        } else {
            slots.remove(&slot);
        }
    }

    fn has_slot(&self, slot: u32) -> bool {
        let slots = self.slots.lock();
        slots
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&slot)
    }

    /// How many memory slots are in use.
    pub(crate) fn memory_slots(&self) -> usize {
        let slots = self.slots.lock();
        slots.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Gives the guest a region that can be plugged, or takes it away. It is of memory that
    /// [`map_ram`](Self::map_ram) was told of.
    pub fn set_region(&self, region: &RamRegion, present: bool) -> Result<(), KvmError> {
        let mut region = region.clone();
        if !present {
            // KVM takes the removal of a slot that is not there for an error.
            if !self.has_slot(region.slot) {
                return Ok(());
            }
            region.size = 0;
        }
        raw::set_user_memory_region(&self.vm, &region)
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION", REMEDY_MEMORY))?;
        self.note_slot(region.slot, present);
        Ok(())
    }

    /// The level-triggered line of IOAPIC pin `gsi`.
    pub fn irq_line(self: &Arc<Self>, gsi: Gsi) -> KvmIrqLine {
        KvmIrqLine {
            vm: Arc::clone(self),
            gsi,
        }
    }

    /// KVM_CREATE_VCPU.
    pub(crate) fn create_vcpu(&self, id: u32) -> Result<VcpuFd, KvmError> {
        self.vm
            .create_vcpu(u64::from(id))
            .map_err(KvmError::call("KVM_CREATE_VCPU", REMEDY_HOST))
    }

    /// GSIs that vectors of devices hold.
    pub(crate) fn gsis(&self) -> usize {
        self.routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .used()
    }

    /// KVM_GET_VCPU_MMAP_SIZE.
    pub(crate) fn run_size(&self) -> usize {
        self.vm.run_size()
    }
}

impl Hypervisor for KvmVm {
    fn alloc_gsi(&self) -> io::Result<Gsi> {
        self.routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .alloc()
            .ok_or_else(|| io::Error::other("KVM's interrupt routing table is full"))
    }

    fn free_gsi(&self, gsi: Gsi) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.free(gsi)
            && let Ok(table) = routes.to_kvm()
        {
            // A table that shrinks is refused only when the kernel is out of memory; the
            // old route then stays and points at a GSI that nothing signals.
            let _ = self.vm.set_gsi_routing(&table);
        }
    }

    fn route_msi(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if !routes.set(gsi, message)? {
            return Ok(());
        }
        self.vm
            .set_gsi_routing(&routes.to_kvm()?)
            .map_err(io::Error::from)
    }

    fn add_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> io::Result<()> {
        raw::as_eventfd(eventfd, |fd| self.vm.register_irqfd(fd, gsi.0)).map_err(io::Error::from)
    }

    fn remove_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> io::Result<()> {
        raw::as_eventfd(eventfd, |fd| self.vm.unregister_irqfd(fd, gsi.0)).map_err(io::Error::from)
    }

    fn add_ioeventfd(&self, eventfd: BorrowedFd<'_>, address: u64) -> io::Result<()> {
        // Length 0 also puts the address on KVM's fast bus, which decodes no instruction.
        raw::as_eventfd(eventfd, |fd| {
            self.vm
                .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
        })
        .map_err(io::Error::from)
    }

    fn remove_ioeventfd(&self, eventfd: BorrowedFd<'_>, address: u64) -> io::Result<()> {
        raw::as_eventfd(eventfd, |fd| {
            self.vm
                .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
        })
        .map_err(io::Error::from)
    }
}

/// An IOAPIC pin driven by KVM_IRQ_LINE.
pub struct KvmIrqLine {
    vm: Arc<KvmVm>,
    gsi: Gsi,
}

impl IrqLine for KvmIrqLine {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.vm.set_irq_line(self.gsi.0, asserted) {
            log::error!("KVM_IRQ_LINE on GSI {}: {error}", self.gsi.0);
        }
    }
}

/// Opens /dev/kvm, for the process that may still open things.
pub fn open_dev_kvm() -> io::Result<OwnedFd> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn a_file_that_is_not_kvm_is_refused_in_one_line() {
        let null = File::open("/dev/null").unwrap();
        let error = KvmVm::create(null.into()).err().unwrap().to_string();
        assert!(
            error.contains("/dev/kvm") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn an_interrupted_call_is_made_again_but_not_for_ever() {
        let fails = |times: u32, errno| {
            let mut made = 0;
            let result = uninterrupted(|| {
                made += 1;
                if made <= times {
                    Err(kvm_ioctls::Error::new(errno))
                } else {
                    Ok(made)
                }
            });
            (result.map_err(|e| e.errno()), made)
        };
        assert_eq!(fails(3, libc::EINTR), (Ok(4), 4));
        assert_eq!(fails(3, libc::EBUSY), (Err(libc::EBUSY), 1));
        assert_eq!(fails(u32::MAX, libc::EINTR), (Err(libc::EINTR), 1001));
    }

    #[test]
    fn doorbells_and_interrupts_come_and_go() {
        let Ok(dev_kvm) = open_dev_kvm() else {
            eprintln!("skipped: /dev/kvm cannot be opened");
            return;
        };
        let vm = KvmVm::create(dev_kvm).unwrap();
        let fd = EventFd::new(0).unwrap();
        let fd = borrow_fd(&fd, std::os::fd::AsRawFd::as_raw_fd(&fd));
        let gsi = vm.alloc_gsi().unwrap();
        assert!(gsi.0 >= layout::FIRST_MSI_GSI);
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        vm.route_msi(gsi, message).unwrap();
        vm.route_msi(gsi, message).unwrap();
        vm.add_irqfd(fd.as_fd(), gsi).unwrap();
        assert!(
            vm.add_irqfd(fd.as_fd(), gsi).is_err(),
            "twice the same irqfd"
        );
        vm.remove_irqfd(fd.as_fd(), gsi).unwrap();
        vm.add_ioeventfd(fd.as_fd(), 0xc000_0000).unwrap();
        vm.remove_ioeventfd(fd.as_fd(), 0xc000_0000).unwrap();
        assert!(vm.remove_ioeventfd(fd.as_fd(), 0xc000_0000).is_err());
        vm.free_gsi(gsi);
        assert!(
            vm.route_msi(gsi, message).is_err(),
            "a freed GSI has no route"
        );
        assert_eq!(vm.alloc_gsi().unwrap(), gsi);
    }
}
