//! Naming the system call that a confined process was stopped at (seccomp_unotify(2)).
//!
//! A device's own filter does not kill: what it does not allow is reported to a listener, whose
//! descriptor the device hands to its launcher before it reads a byte from anyone, and keeps
//! no copy of. The calling thread then hangs in the kernel until the launcher, which has read
//! number, architecture and arguments there, has killed the process. A hostile process can
//! neither forge the report nor go on past the call: nothing but the listener can let it, and
//! the launcher only ever reads from it.
//!
//! Of a thread's filters the strictest action wins, and a kill is stricter than a report. So
//! the launcher's outer filter answers by [`apply_outer_filter`] with SECCOMP_RET_TRACE, which
//! is milder than a report and, where no tracer is, fails the call with ENOSYS.
//!
//! The device's main thread calls [`apply_filter_reported`]; the launcher calls [`receive`].
#![allow(unsafe_code)] // sendmsg(2) with a descriptor, and an ioctl that fills a structure.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::filter::{FilterError, install};
use crate::policy::{Policy, sock_filter};

/// BPF_RET | BPF_K: the instruction that ends a filter with a fixed action.
const RETURN: u16 = 0x06;
/// SECCOMP_FILTER_FLAG_TSYNC_ESRCH: with a listener, the number of a thread that cannot follow
/// has no place in the answer.
const TSYNC_ESRCH: libc::c_ulong = 1 << 4;
/// `struct seccomp_notif`: id, pid, flags, and seccomp_data (nr, arch, ip, six arguments).
const NOTIF_SIZE: usize = 80;
/// SECCOMP_IOCTL_NOTIF_RECV: _IOWR('!', 0, struct seccomp_notif).
pub const SECCOMP_IOCTL_NOTIF_RECV: u32 = 0xc050_2100;

/// A system call that a process was stopped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The thread, in the reader's pid namespace.
    pub pid: u32,
    /// Number of the call.
    pub nr: u32,
    /// Audit architecture of the call.
    pub arch: u32,
}

impl Violation {
    /// The call by its name, or what it was if it has none here.
    #[must_use]
    pub fn name(&self) -> String {
        let native = crate::filter::AUDIT_ARCH == Some(self.arch);
        match crate::policy::syscall_name(self.nr).filter(|_| native) {
            Some(name) => name.to_owned(),
            None => format!("call {} of architecture {:#x}", self.nr, self.arch),
        }
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

/// Installs the policy's steady filter on every thread of the process, at once; what it does
/// not allow is reported to the listener that is returned.
///
/// # Errors
/// The kernel refused; no thread is filtered then.
pub fn apply_filter_reported(policy: &Policy) -> Result<OwnedFd, FilterError> {
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_TSYNC | TSYNC_ESRCH;
    let filter = with_default(policy.steady, libc::SECCOMP_RET_USER_NOTIF);
    let failed = |source| FilterError::Seccomp {
        policy: policy.name,
        source,
    };
    let fd = install(&filter, flags).map_err(failed)?;
    let fd = RawFd::try_from(fd).map_err(|_| failed(io::Error::from_raw_os_error(libc::EBADF)))?;
    // SAFETY: with NEW_LISTENER the call answers with a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Installs the policy's steady filter on the calling thread as the launcher's outer one: what
/// it does not allow fails with ENOSYS, unless a filter installed later is stricter.
///
/// # Errors
/// The kernel refused.
pub fn apply_outer_filter(policy: &Policy) -> Result<(), FilterError> {
    let filter = with_default(policy.steady, libc::SECCOMP_RET_TRACE);
    match install(&filter, 0) {
        Ok(_) => Ok(()),
        Err(source) => Err(FilterError::Seccomp {
            policy: policy.name,
            source,
        }),
    }
}

/// Hands a descriptor over a stream socket, beside one line end.
///
/// # Errors
/// The socket failed or its buffer is full.
pub fn send_descriptor(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let byte = b"\n";
    let raw = fd.as_raw_fd();
    // Room and alignment for one cmsghdr with one descriptor.
    let mut control = [0u64; 4];
    let mut part = libc::iovec {
        iov_base: byte.as_ptr().cast_mut().cast(),
        iov_len: byte.len(),
    };
    // SAFETY: all zeroes is a msghdr; `control` is aligned for cmsghdr and larger than
    // CMSG_SPACE(4) = 24, so the first item lies in it; iovec and control outlive the call,
    // which only reads them.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
        let item = libc::CMSG_FIRSTHDR(&raw const header);
        if item.is_null() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        (*item).cmsg_level = libc::SOL_SOCKET;
        (*item).cmsg_type = libc::SCM_RIGHTS;
        (*item).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        std::ptr::write_unaligned(libc::CMSG_DATA(item).cast(), raw);
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const header,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes a report off a listener that poll(2) calls readable. `listener` may be any descriptor
/// that a hostile process sent in a listener's place: it is asked nothing but this.
///
/// # Errors
/// ENOENT when the caller of the system call is gone already; ENOTTY or EINVAL when it is no
/// listener.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Violation> {
    let mut notif = [0u64; NOTIF_SIZE / 8];
    // SAFETY: the ioctl reads and fills one seccomp_notif, which the array is large enough and
    // aligned for; the kernel wants it zeroed, and it is.
    let answer = unsafe {
        libc::ioctl(
            listener.as_fd().as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_RECV.into(),
            notif.as_mut_ptr(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // id; pid and flags; nr and arch; …
    let [_, pid, call, ..] = notif;
    let halves = |word: u64| {
        let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
        (
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
        )
    };
    let (nr, arch) = halves(call);
    Ok(Violation {
        pid: halves(pid).0,
        nr,
        arch,
    })
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
    fn what_is_no_listener_is_told_from_one() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(receive(a.as_fd()).is_err());
    }
}
