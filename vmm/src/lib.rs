//! The privileged side of Bulkhead: one process that holds KVM and the guest's memory
//! map and never touches a device's data, and the launcher that starts every device in
//! a process of its own.

pub mod arch;
pub mod bus;
pub mod hypervisor;
