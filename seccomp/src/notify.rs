//! The launcher as the judge of a device's system calls (seccomp_unotify(2)): the call that a
//! process is stopped at is known by its name, and a device binary need not be trusted to
//! confine itself.
//!
//! Between clone and exec the launcher's child installs the device's *steady* policy with a
//! listener that the launcher keeps ([`apply_filter_with_listener`]). What the policy does not
//! allow is not killed but reported: the calling thread hangs in the kernel until the launcher
//! has read architecture, number and arguments ([`receive`]). Until the device says that its set-up
//! is over, which it does by installing its own filter ([`Report::seals`]), the launcher lets
//! through what the outer policy allows ([`judge`], [`answer`]); from then on it records and
//! kills. A hostile process can neither forge a report nor go on past a call, and has no way to a
//! listener of its own: a thread's filters can have one only.
//!
//! Of a thread's filters the strictest answer wins, and a kill is stricter than a report. So the
//! launcher's own filter, which its children inherit, and the device's own
//! ([`apply_inner_filter_all_threads`]) answer by SECCOMP_RET_TRACE, which is milder and, where no
//! tracer is, fails the call with ENOSYS.
#![allow(unsafe_code)] // ioctls that read and fill structures.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::filter::{self, FilterError, install};
use crate::policy::{Policy, Stage, evaluate, sock_filter};

/// BPF_RET | BPF_K: the instruction that ends a filter with a fixed action.
const RETURN: u16 = 0x06;
/// SECCOMP_IOCTL_NOTIF_RECV: _IOWR('!', 0, struct seccomp_notif).
pub const SECCOMP_IOCTL_NOTIF_RECV: u32 = 0xc050_2100;
/// SECCOMP_IOCTL_NOTIF_SEND: _IOWR('!', 1, struct seccomp_notif_resp).
pub const SECCOMP_IOCTL_NOTIF_SEND: u32 = 0xc018_2101;
/// SECCOMP_USER_NOTIF_FLAG_CONTINUE
const CONTINUE: u32 = 1;

/// In the environment of a device whose launcher holds its listener.
pub const WATCHED: &std::ffi::CStr = c"BULKHEAD_WATCHED=1";

/// Whether this process's launcher holds a listener of it. A process that was told so wrongly is
/// confined all the same: what its filter does not allow fails instead of killing it.
#[must_use]
pub fn is_watched() -> bool {
    std::env::var_os("BULKHEAD_WATCHED").is_some()
}

/// `struct seccomp_data`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Data {
    /// Number of the call.
    pub nr: u32,
    /// Audit architecture.
    pub arch: u32,
    /// Where the call was made.
    pub instruction_pointer: u64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// `struct seccomp_notif`: a system call that a process hangs at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    id: u64,
    /// The thread, in the reader's pid namespace.
    pub pid: u32,
    flags: u32,
    /// The call.
    pub data: Data,
}

/// `struct seccomp_notif_resp`
#[repr(C)]
#[derive(Default)]
struct Response {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}

/// What a call was, for those who were not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the call.
    pub nr: u32,
    /// Its audit architecture.
    pub arch: u32,
}

impl Violation {
    /// The call by its name, or what it was if it has none here.
    #[must_use]
    pub fn name(&self) -> String {
        let native = filter::AUDIT_ARCH == Some(self.arch);
        match crate::policy::syscall_name(self.nr).filter(|_| native) {
            Some(name) => name.to_owned(),
            None => format!("{} of architecture {:#x}", self.nr, self.arch),
        }
    }
}

impl Report {
    /// The call as an event carries it.
    #[must_use]
    pub fn violation(&self) -> Violation {
        Violation {
            nr: self.data.nr,
            arch: self.data.arch,
        }
    }

    /// Whether this call ends the set-up: the process installs its own filter.
    #[must_use]
    pub fn seals(&self) -> bool {
        filter::AUDIT_ARCH == Some(self.data.arch)
            && i64::from(self.data.nr) == libc::SYS_seccomp
            && self.data.args[0] == u64::from(libc::SECCOMP_SET_MODE_FILTER)
    }
}

/// What is to become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is made.
    Proceed,
    /// It fails with this errno.
    Fail(i32),
    /// It is outside the policy.
    Forbidden,
}

/// What a policy's steady filter says to a call, arguments and all.
#[must_use]
pub fn judge(policy: &Policy, data: &Data) -> Judgement {
    let action = evaluate(policy.steady, data);
    match action & libc::SECCOMP_RET_ACTION_FULL {
        libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG => Judgement::Proceed,
        libc::SECCOMP_RET_ERRNO => {
            let errno = action & libc::SECCOMP_RET_DATA;
            Judgement::Fail(i32::try_from(errno).unwrap_or(libc::EPERM))
        }
        _ => Judgement::Forbidden,
    }
}

/// The same filter with another answer to what it does not allow.
fn with_default(filter: &[sock_filter], action: u32) -> Vec<sock_filter> {
    let change = |f: &sock_filter| {
        let mut f = *f;
        if f.code == RETURN && f.k == libc::SECCOMP_RET_KILL_PROCESS {
            f.k = action;
        }
        f
    };
    filter.iter().map(change).collect()
}

fn mark(policy: &Policy) -> u64 {
    policy.mark(Stage::Steady)
}

fn failed(policy: &Policy) -> impl FnOnce(io::Error) -> FilterError {
    let policy = policy.name;
    move |source| FilterError::Seccomp { policy, source }
}

/// Installs the policy's steady filter on the calling thread and what it clones or executes;
/// what it does not allow is reported to the listener that is returned, close-on-exec.
///
/// # Errors
/// The kernel refused (it is older than 5.5, or there is a listener already).
pub fn apply_filter_with_listener(policy: &Policy) -> Result<OwnedFd, FilterError> {
    let filter = with_default(policy.steady, libc::SECCOMP_RET_USER_NOTIF);
    let fd = install(
        &filter,
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
        mark(policy),
    )
    .map_err(failed(policy))?;
    let fd = RawFd::try_from(fd)
        .map_err(|_| failed(policy)(io::Error::from_raw_os_error(libc::EBADF)))?;
    // SAFETY: with NEW_LISTENER the call answers with a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Installs the policy's steady filter on the calling thread as the launcher's own: what it does
/// not allow fails with ENOSYS, unless a filter installed later is stricter.
///
/// # Errors
/// The kernel refused.
pub fn apply_mild_filter_this_thread(policy: &Policy) -> Result<(), FilterError> {
    let filter = with_default(policy.steady, libc::SECCOMP_RET_TRACE);
    install(&filter, 0, mark(policy))
        .map(drop)
        .map_err(failed(policy))
}

/// Installs the policy's steady filter on every thread of a device whose launcher holds a
/// listener: what it does not allow fails with ENOSYS, after the launcher's filter has reported
/// what that does not allow.
///
/// # Errors
/// The kernel refused; no thread is filtered then.
pub fn apply_inner_filter_all_threads(policy: &Policy) -> Result<(), FilterError> {
    let filter = with_default(policy.steady, libc::SECCOMP_RET_TRACE);
    match install(&filter, libc::SECCOMP_FILTER_FLAG_TSYNC, mark(policy)).map_err(failed(policy))? {
        0 => Ok(()),
        thread => Err(FilterError::Thread {
            policy: policy.name,
            thread,
        }),
    }
}

/// Takes a report off a listener that poll(2) calls readable; on one that is not, it waits.
///
/// # Errors
/// ENOENT when the caller is gone already.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Report> {
    let mut report = Report::default();
    // SAFETY: the ioctl reads (it wants zeroes) and fills one seccomp_notif, which Report is,
    // and which outlives the call.
    let answer = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_RECV.into(),
            std::ptr::from_mut(&mut report),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(report)
}

/// Lets a reported call be made, or fail with an errno.
///
/// # Errors
/// ENOENT when the caller is gone already.
pub fn answer(listener: BorrowedFd<'_>, report: &Report, errno: Option<i32>) -> io::Result<()> {
    let response = Response {
        id: report.id,
        val: 0,
        error: errno.map_or(0, i32::wrapping_neg),
        flags: if errno.is_some() { 0 } else { CONTINUE },
    };
    // SAFETY: the ioctl reads one seccomp_notif_resp, which Response is, and which outlives it.
    let answer = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_SEND.into(),
            std::ptr::from_ref(&response),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy;

    #[test]
    fn only_the_default_answer_changes() {
        for policy in policy::all() {
            let reported = with_default(policy.steady, libc::SECCOMP_RET_USER_NOTIF);
            assert_eq!(reported.len(), policy.steady.len());
            let mut changed = 0;
            for (new, old) in reported.iter().zip(policy.steady) {
                assert_eq!((new.code, new.jt, new.jf), (old.code, old.jt, old.jf));
                if new.k != old.k {
                    assert_eq!(old.k, libc::SECCOMP_RET_KILL_PROCESS);
                    assert_eq!(old.code, RETURN);
                    changed += 1;
                }
            }
            assert!(changed > 0, "{}", policy.name);
            assert!(
                reported
                    .iter()
                    .all(|f| f.code != RETURN || f.k != libc::SECCOMP_RET_KILL_PROCESS)
            );
        }
    }

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<Data>(), 64);
        assert_eq!(size_of::<Report>(), 80);
        assert_eq!(size_of::<Response>(), 24);
    }

    #[test]
    fn arguments_decide_a_judgement() {
        let arch = filter::AUDIT_ARCH.unwrap();
        let call = |nr: libc::c_long, args: [u64; 6]| Data {
            nr: u32::try_from(nr).unwrap(),
            arch,
            instruction_pointer: 0,
            args,
        };
        let outer = |data| judge(&policy::DEVICE_OUTER, &data);
        let exec = u64::from(libc::PROT_EXEC.unsigned_abs());
        let private = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unsigned_abs());
        let mmap = |prot| call(libc::SYS_mmap, [0, 4096, prot, private, u64::MAX, 0]);
        assert_eq!(outer(mmap(3)), Judgement::Proceed);
        assert_eq!(outer(mmap(3 | exec)), Judgement::Forbidden);
        let open = call(libc::SYS_openat, [0; 6]);
        assert_eq!(outer(open), Judgement::Fail(libc::EACCES));
        let socket = call(libc::SYS_socket, [1, 1, 0, 0, 0, 0]);
        assert_eq!(outer(socket), Judgement::Forbidden);
        let other = Data {
            arch: 0x4000_0003,
            ..mmap(3)
        };
        assert_eq!(outer(other), Judgement::Forbidden);
    }

    #[test]
    fn a_judgement_is_among_what_the_filter_can_answer() {
        let arch = filter::AUDIT_ARCH.unwrap();
        for policy in policy::all() {
            for nr in 0..600 {
                let possible = policy::verdict(policy.steady, arch, nr).unwrap();
                for arg in [0, 1, 2, u64::MAX, 0x8912] {
                    let data = Data {
                        nr,
                        arch,
                        instruction_pointer: 1,
                        args: [arg; 6],
                    };
                    let action = evaluate(policy.steady, &data);
                    assert!(possible.actions().contains(&action), "{} {nr}", policy.name);
                }
            }
        }
    }
}
