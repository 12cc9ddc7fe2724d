//! Confinement: what a Bulkhead process gives up before it reads a byte from anyone.
//!
//! Every process of a VM calls this crate while it still has one thread, in the order that
//! [`confine`] enforces by its types: privileges (capabilities, securebits, no_new_privs,
//! dumpable, rlimits), Landlock, then the caller's io_uring rings and threads, then the seccomp
//! filter on all threads. The filters are compiled at build time from one readable file for
//! each process under `policies/`.
//!
//! | module | what it is |
//! |---|---|
//! | [`confine`] | the order of things, as types |
//! | [`policy`] | the compiled policies, and how to read a filter back as a list of calls |
//! | [`filter`] | installing a policy (seccomp(2)) |
//! | [`notify`] | the launcher as the judge of a device's system calls |
//! | [`privileges`] | capabilities(7), no_new_privs, dumpable, rlimits |
//! | [`landlock_empty`] | landlock(7) with no rule at all |
//! | [`uring`] | io_uring rings restricted by registration |

mod allocator;
pub mod confine;
pub mod filter;
pub mod landlock_empty;
pub mod notify;
pub mod policy;
pub mod privileges;
pub mod syscalls;
pub mod uring;
