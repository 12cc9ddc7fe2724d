//! Landlock with no rule at all: landlock(7), Documentation/userspace-api/landlock.rst.
//!
//! Everything that the kernel's Landlock handles is handled and nothing is granted: no path can
//! be opened, executed or changed, no TCP port bound or connected, no device ioctl made on what
//! is opened later, no abstract socket reached and no signal sent outside the process's own
//! domain. Descriptors held before keep working. Threads of the process share its domain as
//! long as they are made after [`deny_everything`], so it is called while the main thread is
//! alone; signals among them stay possible.

#![allow(unsafe_code)] // landlock_create_ruleset(2), asked for its version.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use std::fmt;
use thiserror::Error;

/// Landlock refused what it offers.
#[derive(Debug, Error)]
#[error("Landlock: {0}")]
pub struct LandlockError(#[from] landlock::RulesetError);

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LandlockStatus {
    /// The ABI in force; 0 when the kernel has no Landlock or it is off.
    pub abi: u32,
}

impl LandlockStatus {
    /// What this ABI does not yet stop, in words; empty when it stops everything asked for.
    #[must_use]
    pub fn missing(self) -> &'static str {
        match self.abi {
            0 => "everything: no Landlock in this kernel",
            1 => {
                "renames between directories, truncation, TCP, device ioctls, abstract sockets and signals"
            }
            2 => "truncation, TCP, device ioctls, abstract sockets and signals",
            3 => "TCP, device ioctls, abstract sockets and signals",
            4 => "device ioctls, abstract sockets and signals",
            5 => "abstract sockets and signals",
            _ => "",
        }
    }
}

impl fmt::Display for LandlockStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.abi, self.missing()) {
            (0, _) => f.write_str("none"),
            (abi, "") => write!(f, "ABI {abi}"),
            (abi, missing) => write!(f, "ABI {abi}, without {missing}"),
        }
    }
}

/// The levels known here, oldest first.
const LEVELS: [ABI; 9] = [
    ABI::V1,
    ABI::V2,
    ABI::V3,
    ABI::V4,
    ABI::V5,
    ABI::V6,
    ABI::V7,
    ABI::V8,
    ABI::V9,
];

/// The newest level known here.
pub const NEWEST: u32 = LEVELS.len() as u32;

/// What this kernel has, for the audit.
#[must_use]
pub fn of_this_kernel() -> LandlockStatus {
    const VERSION: libc::c_int = 1;
    // SAFETY: with this flag the call reads no ruleset: it takes none, and answers with a number.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION,
        )
    };
    LandlockStatus {
        abi: u32::try_from(abi).unwrap_or(0).min(NEWEST),
    }
}

/// Puts the calling thread, and every thread made after, into a domain that grants nothing.
///
/// A kernel that lacks some or all of it is no error: what it has is used, and the status says
/// what that is.
///
/// # Errors
/// The kernel has Landlock and refused.
pub fn deny_everything() -> Result<LandlockStatus, LandlockError> {
    deny_what_is_known_to(NEWEST)
}

/// As [`deny_everything`], using no more than an ABI of that level has: what becomes of this
/// process on an older kernel.
///
/// # Errors
/// The kernel has Landlock and refused.
pub fn deny_what_is_known_to(level: u32) -> Result<LandlockStatus, LandlockError> {
    let known = usize::try_from(level).unwrap_or(usize::MAX);
    let Some(abi) = LEVELS.iter().take(known).next_back().copied() else {
        return Ok(LandlockStatus { abi: 0 });
    };
    let (network, scope) = (AccessNet::from_all(abi), Scope::from_all(abi));
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?;
    if !network.is_empty() {
        ruleset = ruleset.handle_access(network)?;
    }
    if !scope.is_empty() {
        ruleset = ruleset.scope(scope)?;
    }
    let status = ruleset.create()?.no_new_privs(true).restrict_self()?;
    let abi = match status.landlock {
        landlock::LandlockStatus::Available { effective_abi, .. }
            if status.ruleset != landlock::RulesetStatus::NotEnforced =>
        {
            (effective_abi as u32).min(level)
        }
        _ => 0,
    };
    Ok(LandlockStatus { abi })
}
