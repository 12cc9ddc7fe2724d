//! Installing a policy: seccomp(2), SECCOMP_SET_MODE_FILTER.
//!
//! Called last of all confinement, by a process's main thread for all its threads
//! ([`apply_filter_all_threads`]) or by a vCPU thread for itself on top of the process's
//! filter ([`apply_filter_this_thread`]); by the launcher between clone and exec.
//!
//! seccomp(2) has three arguments. The register of a fourth one holds [`Policy::mark`], which the
//! kernel does not read: who traces a process (`tests/rules`) learns from it which filter that was.
#![allow(unsafe_code)] // seccomp(2), which libc does not wrap, and _exit(2).

use crate::confine::UNCONFINED;
use crate::policy::{Policy, Stage, sock_filter};
use std::io;
use thiserror::Error;

/// The audit value (linux/audit.h) by which a filter knows this machine's system calls.
pub const AUDIT_ARCH: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else {
    None
};

/// Why a filter is not in force.
#[derive(Debug, Error)]
pub enum FilterError {
    /// seccomp(2) failed.
    #[error(
        "seccomp policy `{policy}`: {source} (the kernel needs CONFIG_SECCOMP_FILTER, the process no_new_privs)"
    )]
    Seccomp {
        /// Name of the policy.
        policy: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread has a filter of its own that this one cannot follow.
    #[error(
        "seccomp policy `{policy}`: thread {thread} cannot take it: install it before threads set filters of their own"
    )]
    Thread {
        /// Name of the policy.
        policy: &'static str,
        /// Its id.
        thread: libc::c_long,
    },
}

/// Installs the policy's steady filter on every thread of the process, at once.
///
/// no_new_privs must be set ([`crate::privileges::no_new_privs`]).
///
/// # Errors
/// The kernel refused; no thread is filtered then.
pub fn apply_filter_all_threads(policy: &Policy) -> Result<(), FilterError> {
    apply(policy, Stage::Steady, libc::SECCOMP_FILTER_FLAG_TSYNC)
}

/// Installs the policy's steady filter on the calling thread, and on what it clones or execs.
///
/// # Errors
/// The kernel refused.
pub fn apply_filter_this_thread(policy: &Policy) -> Result<(), FilterError> {
    apply(policy, Stage::Steady, 0)
}

/// Installs the filter of the policy's set-up stage on the calling thread: the steady one
/// follows it when set-up is over.
///
/// # Errors
/// The kernel refused.
pub fn apply_setup_filter_this_thread(policy: &Policy) -> Result<(), FilterError> {
    apply(policy, Stage::Setup, 0)
}

/// Installs the filter of the policy's set-up stage on every thread of the process.
///
/// # Errors
/// The kernel refused; no thread is filtered then.
pub fn apply_setup_filter_all_threads(policy: &Policy) -> Result<(), FilterError> {
    apply(policy, Stage::Setup, libc::SECCOMP_FILTER_FLAG_TSYNC)
}

/// `_exit(2)`.
pub(crate) fn exit_group(code: i32) -> ! {
    // SAFETY: it takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

fn apply(policy: &Policy, stage: Stage, flags: libc::c_ulong) -> Result<(), FilterError> {
    let failed = |source| FilterError::Seccomp {
        policy: policy.name,
        source,
    };
    let filter = match stage {
        Stage::Setup => policy.setup,
        Stage::Steady => policy.steady,
    };
    match install(filter, flags, policy.mark(stage)) {
        Ok(0) => Ok(()),
        Ok(thread) => Err(FilterError::Thread {
            policy: policy.name,
            thread,
        }),
        Err(e) => Err(failed(e)),
    }
}

/// The bare call. It allocates nothing and takes no lock, so that the launcher's child may
/// make it between clone and exec. The number of a thread that could not follow, a listener's
/// descriptor where one was asked for, or 0.
pub(crate) fn install(
    filter: &[sock_filter],
    flags: libc::c_ulong,
    mark: u64,
) -> io::Result<libc::c_long> {
    if UNCONFINED {
        let listens = flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0;
        if !listens {
            return Ok(0);
        }
        // As a listener it has nothing to tell.
        // SAFETY: it takes integers.
        return Ok(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }.into());
    }
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the operation reads `len` instructions from `filter`, both of the slice above,
    // which outlives the call, and writes nothing. It does not read the
    // integer behind them.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(&program),
            mark,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}
