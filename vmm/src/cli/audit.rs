//! `bulkhead audit`: the audit itself is in [`crate::audit`].

use std::process::ExitCode;

pub use crate::audit::AuditArgs;

/// Reads, grades and prints; exit code 1 on any deviation.
pub fn run(args: &AuditArgs) -> ExitCode {
    ExitCode::from(u8::try_from(crate::audit::run(args)).unwrap_or(1))
}
