//! The launcher: the one process of a VM that may open paths and start programs, and its
//! client in the VMM.
//!
//! ```text
//!  VMM ──clone3, execveat──▶ bulkhead-launcher (PID 1 of a pid namespace)
//!   │  SOCK_SEQPACKET: launcher.proto     │ clone3 into fresh namespaces, empty root,
//!   │  ◀── fds, pidfds, exits             ▼ no capabilities, outer filter, execveat
//!   └── control, vhost-user socketpairs ─▶ bulkhead-blk …
//! ```
//!
//! - In the VMM: [`Launcher`] (module `client`) over `start` (the clone and exec). Any
//!   thread may call it; calls take turns.
//! - In the launcher process, all on its only thread: `args` (its command line), `server`
//!   (the loop), `paths` and `lock` (what it opens and binds), `device` (starting one), `kept`
//!   (what stays of one that has died), `made` (directories of sockets), `dial` (what one may ask for), `programs` (what may be executed beside the binaries that
//!   were opened at the start), `cgroup` (what its processes may use), `log` (what
//!   devices say), `leftovers` (what is to be removed should all of this be killed).
//! - Between clone and exec, in the process that becomes a device: `child`.
//! - `sys`, `cgroup_sys`, `isolate` and `packet` hold the system calls and all the `unsafe` there is.
//!
//! The launcher holds no guest memory, no KVM handle and no API connection; it trusts the
//! VMM's requests no further than its allowed paths and its table of binaries go.

mod args;
mod cgroup;
pub(crate) mod cgroup_parent;
pub(crate) mod cgroup_sys;
mod child;
mod client;
mod confine;
mod connect;
mod device;
mod dial;
pub(crate) mod helper;
mod helper_fs;
mod identity;
mod ids;
mod isolate;
mod kept;
pub(crate) mod leftovers;
mod lock;
mod log;
mod made;
pub(crate) mod packet;
mod paths;
mod programs;
mod server;
mod start;
pub(crate) mod sys;
pub mod tap;
mod tap_sys;
mod watch;

pub use cgroup::{CONTROLLERS, LEAF_PREFIX, Least, USAGE_FILES, VMM_LEAF};
pub use cgroup_parent::Choice as CgroupChoice;
pub use client::{
    Access, Launcher, LauncherConfig, LauncherError, LauncherEvent, Linked, OpenedInfo, Outlives,
    Placed, SpawnSpec, SpawnedDevice, SpawnedHelper,
};
pub(crate) use confine::{
    DEVICE_LIMITS, HELPER_LIMITS, LAUNCHER_LIMITS, SHARE_LIMITS, SHARING_LAUNCHER_LIMITS,
};
pub use helper::Program;
pub(crate) use helper_fs::CAPABILITIES as SHARE_CAPABILITIES;
pub use identity::ids_of_vms_exist;
pub use ids::IdRange;
pub use server::main as launcher_main;
pub use sys::ExitOutcome;

/// File name of the launcher's program.
pub(crate) const PROGRAM: &str = "bulkhead-launcher";
/// The role of what an entropy device reads.
pub const ENTROPY_ROLE: &str = "entropy source";
/// Most device processes of one VM at a time; each has a slot, and with it a uid.
pub const MAX_DEVICES: usize = 64;
/// Most queue pairs of a network device: with its control queue, their descriptors and
/// eventfds are what a device process may hold (`confine`) and one packet carries (`packet`).
pub const MAX_QUEUE_PAIRS: u32 = 32;
/// Most arguments of a device process.
const MAX_ARGS: usize = 64;
/// Longest argument of a device process, bytes.
const MAX_ARG: usize = 4096;
/// Longest path of a request, bytes (PATH_MAX without its end).
const MAX_PATH: usize = 4095;
/// Descriptors of a device below its own: stdin, stdout, log, control, vhost-user.
const FIRST_OWN_FD: usize = 5;

/// A device id as it may stand in a request, a log line and a uid table: 1 to 64 of
/// letters, digits, '.', '_' and '-'.
fn valid_id(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Text that is not ours (a path, a name) as it may stand in a line for the user: control
/// characters are escaped.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = !c.is_control();
            let escaped = (!plain).then(|| c.escape_default());
            plain
                .then_some(c)
                .into_iter()
                .chain(escaped.into_iter().flatten())
        })
        .collect()
}
