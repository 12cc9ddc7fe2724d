//! The order of confinement, as types: what is not yet locked down cannot be sealed, and only
//! what is sealed may read.
//!
//! Called once by each process's main thread:
//!
//! ```no_run
//! use bulkhead_seccomp::{confine::Confinement, policy, privileges::Rlimits};
//! # fn main() -> Result<(), bulkhead_seccomp::confine::ConfineError> {
//! let locked = Confinement::new(Rlimits::new().nofile(64)).lock_down()?;
//! // Here: create rings and threads; read nothing yet.
//! let confined = locked.seal(&policy::BULKHEAD_BLK)?;
//! // From here on: read.
//! println!("{}", confined.report());
//! # Ok(())
//! # }
//! ```

use crate::allocator;
use crate::filter::{self, FilterError};
use crate::landlock_empty::{self, LandlockError, LandlockStatus};
use crate::notify;
use crate::policy::Policy;
use crate::privileges::{self, CapabilityStatus, PrivilegeError, Rlimits};
use std::fmt;
use thiserror::Error;

/// Whether this was built to confine nothing, for the measurement of what confinement costs. A
/// feature of tests; no build that ships has it.
pub const UNCONFINED: bool = cfg!(feature = "unconfined");

/// Why a process is not confined. It must end.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// A privilege is still held.
    #[error("confinement: {0}")]
    Privilege(#[from] PrivilegeError),
    /// The kernel has Landlock and refused it.
    #[error("confinement: {0}")]
    Landlock(#[from] LandlockError),
    /// No filter.
    #[error("confinement: {0}")]
    Filter(#[from] FilterError),
    /// malloc would open files.
    #[error("confinement: mallopt: the C library does not take M_ARENA_MAX")]
    Allocator,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Confinement {
    rlimits: Rlimits,
    landlock: bool,
    identity: Option<u32>,
}

impl Confinement {
    /// Everything, with these limits.
    #[must_use]
    pub fn new(rlimits: Rlimits) -> Self {
        Self {
            rlimits,
            landlock: true,
            identity: None,
        }
    }

    /// Step one makes the process this uid and gid: it has the right to, and one thread.
    #[must_use]
    pub fn identity(mut self, id: Option<u32>) -> Self {
        self.identity = id;
        self
    }

    /// For the launcher, which opens files for others: no Landlock.
    #[must_use]
    pub fn without_landlock(mut self) -> Self {
        self.landlock = false;
        self
    }

    /// Step one, while the process has one thread: capabilities, securebits, no_new_privs,
    /// dumpable off, rlimits, Landlock; malloc has one arena, and a fault no handler.
    ///
    /// # Errors
    /// Something is still open; end the process.
    pub fn lock_down(&self) -> Result<LockedDown, ConfineError> {
        if !allocator::bind_arenas() {
            return Err(ConfineError::Allocator);
        }
        if UNCONFINED {
            eprintln!("built without confinement: for measurements alone");
            return Ok(LockedDown {
                capabilities: CapabilityStatus {
                    bounding_empty: false,
                    securebits_locked: false,
                },
                landlock: LandlockStatus { abi: 0 },
            });
        }
        let capabilities = privileges::drop_capabilities(self.identity)?;
        privileges::no_new_privs()?;
        privileges::not_dumpable()?;
        privileges::no_fault_handlers()?;
        let landlock = if self.landlock {
            landlock_empty::deny_everything()?
        } else {
            LandlockStatus { abi: 0 }
        };
        self.rlimits.apply()?;
        Ok(LockedDown {
            capabilities,
            landlock,
        })
    }
}

/// Between the steps: make rings and threads now, read nothing yet.
#[derive(Debug)]
#[must_use = "the filter is not in force yet: call seal()"]
pub struct LockedDown {
    capabilities: CapabilityStatus,
    landlock: LandlockStatus,
}

impl LockedDown {
    /// Landlock as it is in force.
    #[must_use]
    pub fn landlock(&self) -> LandlockStatus {
        self.landlock
    }

    /// Step two, when every ring and thread is there: the filter, on all threads.
    ///
    /// # Errors
    /// No filter is in force; end the process.
    pub fn seal(self, policy: &'static Policy) -> Result<Confined, ConfineError> {
        filter::apply_filter_all_threads(policy)?;
        Ok(self.confined(policy))
    }

    /// Step two for a device under a launcher that holds a listener ([`crate::notify`]): as
    /// [`Self::seal`], but milder than the launcher's filter, so that it can report what it
    /// stops. Tells the launcher that set-up is over.
    ///
    /// # Errors
    /// No filter is in force; end the process.
    pub fn seal_watched(self, policy: &'static Policy) -> Result<Confined, ConfineError> {
        notify::apply_inner_filter_all_threads(policy)?;
        Ok(self.confined(policy))
    }

    /// Step two for a process that is told what to set up only after it is confined (`bulkhead
    /// serve`): the filter of the set-up stage, on all threads. [`Confined::narrow`] follows when
    /// set-up is over.
    ///
    /// # Errors
    /// No filter is in force; end the process.
    pub fn seal_for_setup(self, policy: &'static Policy) -> Result<Confined, ConfineError> {
        filter::apply_setup_filter_all_threads(policy)?;
        Ok(self.confined(policy))
    }

    fn confined(self, policy: &'static Policy) -> Confined {
        Confined {
            policy,
            report: Report {
                policy: policy.name,
                capabilities: self.capabilities,
                landlock: self.landlock,
            },
        }
    }
}

/// Proof that this process is confined. What reads from a channel takes one by reference.
#[derive(Debug)]
pub struct Confined {
    policy: &'static Policy,
    report: Report,
}

impl Confined {
    /// From the set-up stage to the steady one, on all threads, before any of them takes a
    /// filter of its own.
    ///
    /// # Errors
    /// The set-up filter is still in force alone.
    pub fn narrow(&self) -> Result<(), FilterError> {
        filter::apply_filter_all_threads(self.policy)
    }

    /// What confinement came to.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report
    }
}

/// Ends the process at once: no destructors, no handlers, no flushing. A confined device ends
/// this way, because Rust's own exit gives back the main thread's signal stack first, by a call
/// that no device policy has.
pub fn exit(code: i32) -> ! {
    filter::exit_group(code)
}

/// What confinement came to, for the log and for the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Name of the seccomp policy.
    pub policy: &'static str,
    /// Capabilities.
    pub capabilities: CapabilityStatus,
    /// Landlock.
    pub landlock: LandlockStatus,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seccomp {}, Landlock {}, capabilities none{}{}",
            self.policy,
            self.landlock,
            if self.capabilities.bounding_empty {
                ""
            } else {
                " (bounding set not empty)"
            },
            if self.capabilities.securebits_locked {
                ""
            } else {
                " (securebits not locked)"
            },
        )
    }
}
