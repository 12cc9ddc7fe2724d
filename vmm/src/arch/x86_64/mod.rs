//! The x86-64 machine: address map, CPU state, boot protocols, ACPI.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod reset_vector;
pub(crate) mod snapshot;
pub mod state;
