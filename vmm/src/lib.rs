//! The privileged side of Bulkhead: one process that holds KVM and the guest's memory
//! map and never touches a device's data, and the launcher that starts every device in
//! a process of its own.

pub mod api;
pub mod arch;
pub mod audit;
pub mod bus;
pub mod cli;
pub mod confine;
pub mod events;
pub mod ged;
pub mod hotplug;
pub mod hypervisor;
pub mod kvm;
pub mod launcher;
pub mod line;
pub mod logger;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod power;
pub mod reap;
pub mod serial;
pub mod signals;
pub mod terminal;
pub mod threads;
pub mod vcpu;
pub mod vhost_user;
pub mod virtio;
