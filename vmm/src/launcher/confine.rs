//! How the launcher confines itself, and the limits of a device process.
//!
//! No Landlock here: it forbids mount(2) and pivot_root(2) to the process and its children,
//! and a device's empty root is made with them. Each device applies its own after exec.
//! The seccomp filter is inherited by every device, so that it admits what devices need, and
//! it answers ENOSYS to the rest: a kill would come before a device's filter could report the
//! call.

use bulkhead_seccomp::{notify, policy};

use super::args::Args;
use super::cgroup::Fallback;
use super::helper::VIRTIOFSD;
use super::isolate;

/// Descriptors of the launcher: two or three per device, sockets, binaries.
const LAUNCHER_NOFILE: u64 = 4096;
/// Descriptors of a device: its own, eventfds of its queues, guest memory. A device lowers
/// it to what it needs; the most is a disk's, with 64 queues: ten for each.
const DEVICE_NOFILE: u64 = 1024;
/// Threads of a device, io_uring's workers included: the most is a disk's, with 64 queues, two for
/// each and its own (`machine::kinds`).
const DEVICE_NPROC: u64 = 160;

/// Limits of the launcher's (RLIMIT_* and the most).
pub const LAUNCHER_LIMITS: [(u32, u64); 2] = [
    (libc::RLIMIT_CORE, 0),
    (libc::RLIMIT_NOFILE, LAUNCHER_NOFILE),
];

/// Those of one that may start virtiofsd, which can have no more than its launcher.
pub const SHARING_LAUNCHER_LIMITS: [(u32, u64); 2] =
    [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, SHARE_NOFILE)];

/// Those that a device process starts with, at most.
pub const DEVICE_LIMITS: [(u32, u64); 6] = most(DEVICE_NOFILE, DEVICE_NPROC);

/// Descriptors of virtiofsd: one for each file that the guest knows of. As many as it takes by itself.
pub const SHARE_NOFILE: u64 = 1_000_000;

/// Those of passt: each connection of the guest is one or more descriptors of passt's,
/// which says no to the guest where they end.
pub const HELPER_LIMITS: [(u32, u64); 6] = most(LAUNCHER_NOFILE, DEVICE_NPROC);

/// Those of virtiofsd. Of the threads of root's no kernel counts any.
pub const SHARE_LIMITS: [(u32, u64); 6] = most(SHARE_NOFILE, DEVICE_NPROC);

const fn most(descriptors: u64, threads: u64) -> [(u32, u64); 6] {
    [
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_NOFILE, descriptors),
        (libc::RLIMIT_NPROC, threads),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_NICE, 0),
    ]
}

/// Confines the launcher: capabilities, limits, no_new_privs, not dumpable, filter.
pub fn launcher(args: &Args) -> Result<(), String> {
    let say =
        |what: &'static str| move |error: std::io::Error| format!("confinement: {what}: {error}");
    isolate::umask(0o077);
    let limits = match args.helpers.iter().any(|kind| kind == VIRTIOFSD) {
        true => SHARING_LAUNCHER_LIMITS,
        false => LAUNCHER_LIMITS,
    };
    for (resource, most) in limits {
        isolate::limit_at_most(resource, most).map_err(say("resource limits"))?;
    }
    isolate::bar_capabilities().map_err(say("bounding set"))?;
    isolate::keep_capabilities(&args.rights.launcher_capabilities(args.mapped()))
        .map_err(say("capabilities"))?;
    isolate::no_new_privs().map_err(say("no_new_privs"))?;
    isolate::dumpable(false).map_err(say("dumpable"))?;
    let policy = if args.helpers.is_empty() {
        &policy::BULKHEAD_LAUNCHER
    } else {
        &policy::BULKHEAD_LAUNCHER_HELPERS
    };
    notify::apply_mild_filter_this_thread(policy).map_err(|error| format!("confinement: {error}"))
}

/// Lowers the limits of what is about to become a device; `fallback`: what no cgroup limits.
pub fn device_limits(fallback: Fallback) -> std::io::Result<()> {
    limits(&DEVICE_LIMITS, fallback)
}

/// The same for virtiofsd.
pub fn share_limits(fallback: Fallback) -> std::io::Result<()> {
    limits(&SHARE_LIMITS, fallback)
}

/// The same for passt.
pub fn helper_limits(fallback: Fallback) -> std::io::Result<()> {
    limits(&HELPER_LIMITS, fallback)
}

fn limits(all: &[(u32, u64)], fallback: Fallback) -> std::io::Result<()> {
    if let Some(bytes) = fallback.memory {
        isolate::limit_at_most(libc::RLIMIT_DATA, bytes)?;
    }
    if let Some(threads) = fallback.pids {
        isolate::limit_at_most(libc::RLIMIT_NPROC, threads)?;
    }
    for (resource, most) in all {
        isolate::limit_at_most(*resource, *most)?;
    }
    Ok(())
}
