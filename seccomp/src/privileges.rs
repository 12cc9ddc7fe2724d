//! Giving up privileges: capabilities(7), no_new_privs, dumpable, rlimits; and handlers of faults.
//!
//! Called by every process's main thread while it is alone: capabilities, securebits and
//! no_new_privs are attributes of a thread and are inherited by the threads made later.
#![allow(unsafe_code)] // prctl(2), capset(2), setrlimit(2) and signal(2).

use std::io;
use thiserror::Error;

/// Why a privilege is still held.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct PrivilegeError {
    /// What was attempted.
    pub what: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

/// What dropping capabilities came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityStatus {
    /// The bounding set is empty. An ordinary user outside a user namespace cannot empty it;
    /// with no_new_privs set it gives nothing either.
    pub bounding_empty: bool,
    /// The securebits are set and locked (the same holds).
    pub securebits_locked: bool,
}

// linux/securebits.h: NOROOT, NO_SETUID_FIXUP, KEEP_CAPS (off), NO_CAP_AMBIENT_RAISE, and the
// lock of each.
const SECUREBITS: libc::c_ulong = 0b1110_1111;

fn prctl(
    what: &'static str,
    option: libc::c_int,
    a: libc::c_ulong,
    b: libc::c_ulong,
) -> Result<libc::c_int, PrivilegeError> {
    // SAFETY: the options used here take integers only; the kernel reads and writes no memory
    // of ours.
    let answer = unsafe { libc::prctl(option, a, b, 0 as libc::c_ulong, 0 as libc::c_ulong) };
    if answer < 0 {
        return Err(PrivilegeError {
            what,
            source: io::Error::last_os_error(),
        });
    }
    Ok(answer)
}

/// Empties every capability set (ambient, bounding, inheritable, permitted, effective) and locks
/// the securebits. With `identity`, the process becomes that uid and gid in between, without
/// supplementary groups; it has one thread, and the right to (setresuid(2)).
///
/// # Errors
/// A set that could be used is not empty. The bounding set and the securebits are not to be
/// used and need CAP_SETPCAP to change: the status says whether they are.
pub fn drop_capabilities(identity: Option<u32>) -> Result<CapabilityStatus, PrivilegeError> {
    // While there is CAP_SETPCAP: first the securebits, then the bounding set.
    let _ = prctl("securebits", libc::PR_SET_SECUREBITS, SECUREBITS, 0);
    let mut bounding_empty = true;
    for capability in 0..64 {
        match prctl("bounding set", libc::PR_CAPBSET_READ, capability, 0) {
            Ok(0) => {}
            Ok(_) => {
                if prctl("bounding set", libc::PR_CAPBSET_DROP, capability, 0).is_err() {
                    bounding_empty = false;
                }
            }
            // The kernel has no more capabilities.
            Err(_) => break,
        }
    }
    prctl(
        "emptying the ambient capabilities",
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong,
        0,
    )?;
    if let Some(id) = identity {
        become_id(id)?;
    }
    set_no_capabilities()?;
    let now = prctl("reading the securebits", libc::PR_GET_SECUREBITS, 0, 0)?;
    Ok(CapabilityStatus {
        bounding_empty,
        securebits_locked: libc::c_ulong::from(now.unsigned_abs()) & SECUREBITS == SECUREBITS,
    })
}

/// Another uid, gid, and no groups, for the calling thread. What should signal it when its parent
/// ends (PR_SET_PDEATHSIG) stays, which the kernel forgets at a change of ids.
fn become_id(id: u32) -> Result<(), PrivilegeError> {
    let mut signal: libc::c_int = 0;
    prctl(
        "reading the parent's signal",
        libc::PR_GET_PDEATHSIG,
        std::ptr::from_mut(&mut signal) as libc::c_ulong,
        0,
    )?;
    let steps: [(&'static str, libc::c_long, [libc::c_ulong; 3]); 3] = [
        ("leaving its groups", libc::SYS_setgroups, [0; 3]),
        ("changing its gid", libc::SYS_setresgid, [id.into(); 3]),
        ("changing its uid", libc::SYS_setresuid, [id.into(); 3]),
    ];
    for (what, number, [a, b, c]) in steps {
        // SAFETY: setresgid(2) and setresuid(2) take three numbers and no memory; setgroups(2)
        // takes a count, which is 0 here, and then reads nothing of the null pointer behind it.
        if unsafe { libc::syscall(number, a, b, c) } != 0 {
            return Err(PrivilegeError {
                what,
                source: io::Error::last_os_error(),
            });
        }
    }
    let signal = libc::c_ulong::from(signal.unsigned_abs());
    prctl(
        "keeping the parent's signal",
        libc::PR_SET_PDEATHSIG,
        signal,
        0,
    )
    .map(drop)
}

fn set_no_capabilities() -> Result<(), PrivilegeError> {
    // linux/capability.h: _LINUX_CAPABILITY_VERSION_3 takes two sets of 32 each.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Set {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let none = [Set {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    }; 2];
    // SAFETY: version 3 of capset(2) reads one header and two sets; both are as the kernel
    // lays them out and outlive the call. The header is written only when the version is not
    // known, and version 3 has been known since Linux 2.6.26.
    let answer =
        unsafe { libc::syscall(libc::SYS_capset, std::ptr::from_ref(&header), none.as_ptr()) };
    if answer != 0 {
        return Err(PrivilegeError {
            what: "emptying the capability sets",
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// No exec gives more rights than there are now.
///
/// # Errors
/// The kernel refused.
pub fn no_new_privs() -> Result<(), PrivilegeError> {
    prctl("no_new_privs", libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// No core dump, no ptrace by others of the same user, /proc entries owned by root.
///
/// # Errors
/// The kernel refused.
pub fn not_dumpable() -> Result<(), PrivilegeError> {
    prctl("dumpable off", libc::PR_SET_DUMPABLE, 0, 0).map(drop)
}

/// A fault ends this process by its signal, with the kernel's own action for it. Rust's start sets a
/// handler that tells of a stack that overflowed and resets itself to have the fault once more: by a
/// call that no policy has, so that the fault would end as a violation, and be told as one.
///
/// # Errors
/// The kernel refused.
pub fn no_fault_handlers() -> Result<(), PrivilegeError> {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default action is no code of this process.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(PrivilegeError {
                what: "giving up the handlers of faults",
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

/// Resource limits to set, soft and hard alike. A limit already lower stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Rlimits {
    nofile: Option<u64>,
    core: Option<u64>,
    fsize: Option<u64>,
    nproc: Option<u64>,
    address_space: Option<u64>,
    memlock: Option<u64>,
}

impl Rlimits {
    /// No core files, and nothing else yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            core: Some(0),
            ..Self::default()
        }
    }

    /// One more than the highest descriptor number.
    #[must_use]
    pub fn nofile(mut self, limit: u64) -> Self {
        self.nofile = Some(limit);
        self
    }

    /// Size of a core file, in bytes.
    #[must_use]
    pub fn core(mut self, limit: u64) -> Self {
        self.core = Some(limit);
        self
    }

    /// How far a file may grow, in bytes. A process that serves a disk needs the disk's size:
    /// a write beyond ends it with SIGXFSZ.
    #[must_use]
    pub fn fsize(mut self, limit: u64) -> Self {
        self.fsize = Some(limit);
        self
    }

    /// Processes and threads of this user. They are counted for all processes of the user (in
    /// the user namespace), so it says something only where the uid is the process's own. The
    /// kernel's worker threads of io_uring count too.
    #[must_use]
    pub fn nproc(mut self, limit: u64) -> Self {
        self.nproc = Some(limit);
        self
    }

    /// Bytes of address space, guest memory included.
    #[must_use]
    pub fn address_space(mut self, limit: u64) -> Self {
        self.address_space = Some(limit);
        self
    }

    /// Bytes of locked memory.
    #[must_use]
    pub fn memlock(mut self, limit: u64) -> Self {
        self.memlock = Some(limit);
        self
    }

    /// Each by its name and number; `None`: left as it is.
    #[must_use]
    pub fn each(&self) -> [(&'static str, u32, Option<u64>); 6] {
        [
            ("RLIMIT_NOFILE", libc::RLIMIT_NOFILE, self.nofile),
            ("RLIMIT_CORE", libc::RLIMIT_CORE, self.core),
            ("RLIMIT_FSIZE", libc::RLIMIT_FSIZE, self.fsize),
            ("RLIMIT_NPROC", libc::RLIMIT_NPROC, self.nproc),
            ("RLIMIT_AS", libc::RLIMIT_AS, self.address_space),
            ("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK, self.memlock),
        ]
    }

    /// Sets them.
    ///
    /// # Errors
    /// The kernel refused one.
    pub fn apply(&self) -> Result<(), PrivilegeError> {
        for (what, resource, limit) in self.each() {
            if let Some(limit) = limit {
                lower(resource, limit).map_err(|source| PrivilegeError { what, source })?;
            }
        }
        Ok(())
    }
}

fn lower(resource: libc::__rlimit_resource_t, limit: u64) -> io::Result<()> {
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit(2) writes one rlimit structure, and `now` is one.
    if unsafe { libc::getrlimit(resource, &raw mut now) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let limit = limit.min(now.rlim_max);
    let wanted = libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit,
    };
    // SAFETY: setrlimit(2) reads one rlimit structure, and `wanted` is one.
    if unsafe { libc::setrlimit(resource, &raw const wanted) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
