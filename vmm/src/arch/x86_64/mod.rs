//! The x86-64 machine: address map, CPU state, boot protocols, ACPI.

pub mod layout;
