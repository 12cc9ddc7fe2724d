//! The VMM's own confinement: no capabilities, no new privileges, nothing of the file
//! system within reach, and a system call filter in two stages. The set-up stage admits
//! what making a machine needs (threads, guest memory, vCPUs) and opens, connects and
//! executes nothing; the steady stage drops that too. vCPU threads take a narrower filter.

use std::sync::Arc;

use bulkhead_seccomp::confine::{Confinement, Report};
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_seccomp::{filter, policy};

use crate::threads::ThreadHook;

/// File descriptors that a VMM may hold: of each of 31 devices three for each of 65 queues and some
/// 30 more; KVM's, those of 64 vCPUs, of guest memory, the launcher and clients of the API.
const NOFILE: u64 = 8192;

/// Threads that a VMM with a uid of its own may have: those of 64 vCPUs, two for each of 31
/// devices, and as many again for the API and what is on its way.
const NPROC: u64 = 256;

/// Confines this process for good, in the set-up stage. Called by the manager thread before
/// any other thread exists. As root it becomes `identity`, a uid and gid of its own.
///
/// # Errors
/// One line that says which step the kernel refused.
pub fn vmm(identity: Option<u32>) -> Result<Report, String> {
    Confinement::new(rlimits(identity.is_some()))
        .identity(identity)
        .lock_down()
        .and_then(|locked| locked.seal_for_setup(&policy::BULKHEAD_VMM))
        .map(|confined| confined.report())
        .map_err(|e| format!("confining the VMM: {e}"))
}

/// The VMM's resource limits; `own_uid`: it has a uid that nothing else has.
pub(crate) fn rlimits(own_uid: bool) -> Rlimits {
    let rlimits = Rlimits::new().nofile(NOFILE).core(0);
    // The kernel counts by uid: another's would count others' processes, too.
    match own_uid {
        true => rlimits.nproc(NPROC),
        false => rlimits,
    }
}

/// Narrows the calling thread to the steady stage: the manager when its machine boots,
/// every other thread when it starts.
///
/// # Errors
/// What the kernel says.
pub fn steady() -> std::io::Result<()> {
    filter::apply_filter_this_thread(&policy::BULKHEAD_VMM).map_err(std::io::Error::other)
}

/// Runs first on the api and serial threads.
pub fn helper_hook() -> ThreadHook {
    Arc::new(steady)
}

/// Runs first on every vCPU thread: its own filter, on top of the inherited one.
pub fn vcpu_hook() -> ThreadHook {
    Arc::new(|| {
        filter::apply_filter_this_thread(&policy::BULKHEAD_VCPU).map_err(std::io::Error::other)
    })
}
