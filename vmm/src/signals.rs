//! Signals that end the VMM, as a file descriptor for the manager's epoll loop
//! (signalfd(2)). Blocked before any thread exists, so that every thread inherits it.

#![allow(unsafe_code)] // sigprocmask and signalfd have no safe wrapper among our crates.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// The signals that end a VM in an orderly way.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Pending signals, as a descriptor.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

/// From now on the kernel keeps nothing of a child that has ended. Not inherited by those that
/// were started before.
pub fn forget_children() {
    // SAFETY: SIG_IGN is a valid disposition and runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

impl Signals {
    /// Blocks the ending signals in this thread (and in those it will start) and opens a
    /// signalfd for them. SIGPIPE is ignored: a client that hangs up must not end a VM.
    ///
    /// # Errors
    /// What sigprocmask or signalfd say.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `set` is live and writable; sigemptyset initialises it, and each signal
        // number is valid, so sigaddset cannot fail.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        // SAFETY: SIG_IGN is a valid disposition and runs no code of ours.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        // SAFETY: `set` is live for the call; no old set is asked for.
        let rc =
            unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: -1 asks for a new descriptor; `set` is live for the call.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a fresh descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The next pending signal, if any. Never blocks.
    pub fn next(&self) -> Option<i32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        use std::os::fd::AsRawFd;
        // SAFETY: the buffer is `size` bytes, live and writable.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(n).ok() != Some(size) {
            return None;
        }
        // SAFETY: the kernel filled all of it; every byte pattern is valid.
        let info = unsafe { info.assume_init() };
        i32::try_from(info.ssi_signo).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
