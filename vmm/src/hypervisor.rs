//! What PCI and virtio code needs of the hypervisor, as a trait, so that it can be
//! tested without KVM. `kvm::KvmVm` implements it over kvm-ioctls; vCPU threads and the
//! manager thread call it.

use std::os::fd::BorrowedFd;

/// A global system interrupt number as KVM's routing table names it
/// (KVM_SET_GSI_ROUTING).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// An MSI message: where the interrupt write goes and what it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Interrupt routing and doorbells.
pub trait Hypervisor: Send + Sync {
    /// A GSI of its own for one MSI-X vector; errors when the table is full.
    fn alloc_gsi(&self) -> std::io::Result<Gsi>;
    /// Gives a GSI back and drops its route.
    fn free_gsi(&self, gsi: Gsi);
    /// Routes `gsi` to `message` (replacing what was there) and tells KVM.
    fn route_msi(&self, gsi: Gsi, message: MsiMessage) -> std::io::Result<()>;
    /// KVM_IRQFD: a signal on `eventfd` becomes an interrupt on `gsi`. KVM injects at once
    /// when the eventfd is already signalled.
    fn add_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> std::io::Result<()>;
    /// KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN.
    fn remove_irqfd(&self, eventfd: BorrowedFd<'_>, gsi: Gsi) -> std::io::Result<()>;
    /// KVM_IOEVENTFD on guest-physical `address`: any write of any width (length 0 when KVM
    /// allows it, else as the implementation finds best) signals `eventfd`.
    fn add_ioeventfd(&self, eventfd: BorrowedFd<'_>, address: u64) -> std::io::Result<()>;
    /// KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
    fn remove_ioeventfd(&self, eventfd: BorrowedFd<'_>, address: u64) -> std::io::Result<()>;
}
