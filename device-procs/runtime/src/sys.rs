//! The few system calls that the standard library does not wrap, as safe functions.
//!
//! Called by the main thread, except [`poll`], which the fallback engines' workers use too.

#![allow(unsafe_code)] // thin wrappers; each checks its result and owns what it returns

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use std::sync::atomic::AtomicU32;

use crate::waiter;
use vhost::vhost_user::{BackendReqHandler, VhostUserBackendReqHandler};

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// One descriptor to wait for.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct PollFd(libc::pollfd);

impl PollFd {
    /// Waits for `events` (`libc::POLLIN` …) on `fd`.
    pub fn new(fd: BorrowedFd<'_>, events: i16) -> Self {
        Self(libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        })
    }

    /// Waits for nothing.
    pub fn none() -> Self {
        Self(libc::pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        })
    }

    /// What happened on the descriptor during the last [`poll`].
    pub fn revents(&self) -> i16 {
        self.0.revents
    }

    /// Number and events, if anything is waited for.
    pub(crate) fn wanted(&self) -> Option<(RawFd, i16)> {
        (self.0.fd >= 0).then_some((self.0.fd, self.0.events))
    }

    pub(crate) fn happened(&mut self, events: i16) {
        self.0.revents = events;
    }
}

/// Waits until something happens on one of `fds`, or `timeout_ms` have passed (negative:
/// for ever). A signal counts as "nothing happened".
pub fn poll(fds: &mut [PollFd], timeout_ms: i32) -> io::Result<usize> {
    if let Some(done) = waiter::poll(fds, timeout_ms) {
        return done;
    }
    let timeout = u32::try_from(timeout_ms).ok().map(|ms| libc::timespec {
        tv_sec: libc::time_t::from(ms / 1000),
        tv_nsec: libc::c_long::from(ms % 1000) * 1_000_000,
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: PollFd is a transparent pollfd, the length is the slice's own, the time-out
    // is null or lives through the call. A stale descriptor number would be a wrong
    // answer, not a memory error.
    let n = unsafe {
        libc::ppoll(
            fds.as_mut_ptr().cast(),
            fds.len() as libc::nfds_t,
            timeout,
            std::ptr::null(),
        )
    };
    match check(n) {
        Ok(n) => Ok(n as usize),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => {
            for f in fds {
                f.0.revents = 0;
            }
            Ok(0)
        }
        Err(e) => Err(e),
    }
}

/// A new eventfd, close-on-exec and non-blocking: only for use within this process.
pub fn eventfd() -> io::Result<File> {
    // SAFETY: no pointers are involved.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the descriptor is fresh and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// An anonymous memory file.
pub fn memfd(name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a live C string.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })?;
    // SAFETY: the descriptor is fresh and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// An anonymous memory file of `len` bytes whose length is fixed.
pub fn sealed_memfd(name: &str, len: u64) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a live C string.
    let create = |flags| check(unsafe { libc::memfd_create(name.as_ptr(), flags) });
    // A host may insist on "not executable" (vm.memfd_noexec), which Linux knows from 6.3 on.
    let fd = match create(flags | libc::MFD_NOEXEC_SEAL) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => create(flags)?,
        other => other?,
    };
    // SAFETY: the descriptor is fresh and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// Takes ownership of an inherited descriptor, after checking that it is open, and makes
/// it close-on-exec. To be called once per number, before anything else opens files.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer; a number that is not open gives EBADF.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor is open (fcntl succeeded), and by this function's contract
    // nothing else in the process owns that number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The file status flags (O_DIRECT, O_RDWR, …) of an open file.
pub fn status_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// Makes writes to this descriptor fail rather than wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = status_flags(fd)?;
    // SAFETY: F_SETFL takes an integer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

fn socket_option(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are live, and len is value's size.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    })?;
    Ok(value)
}

/// Whether this is a unix stream socket; `listening` tells which kind is wanted.
pub fn is_unix_stream(fd: BorrowedFd<'_>, listening: bool) -> bool {
    socket_option(fd, libc::SO_DOMAIN).ok() == Some(libc::AF_UNIX)
        && socket_option(fd, libc::SO_TYPE).ok() == Some(libc::SOCK_STREAM)
        && socket_option(fd, libc::SO_ACCEPTCONN).ok() == Some(i32::from(listening))
}

/// Looks at the first bytes of a socket's receive queue without taking them, and without
/// waiting; descriptors that travel with them stay in the queue. None: nothing there yet.
pub fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Option<usize>> {
    take_bytes(fd, buf, libc::MSG_PEEK | libc::MSG_DONTWAIT)
}

fn take_bytes(fd: BorrowedFd<'_>, buf: &mut [u8], flags: libc::c_int) -> io::Result<Option<usize>> {
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: an all-zero msghdr is valid: no name, no buffers, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    // SAFETY: msg points at one iovec over the live buffer, and at nothing else.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) };
    match usize::try_from(n) {
        Ok(n) => Ok(Some(n)),
        Err(_) => match io::Error::last_os_error() {
            e if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
            {
                Ok(None)
            }
            e => Err(e),
        },
    }
}

/// Takes bytes off a socket without waiting; descriptors that travel with them are not taken, and
/// are closed by the kernel. None: nothing there yet.
pub fn receive_now(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Option<usize>> {
    take_bytes(fd, buf, libc::MSG_DONTWAIT)
}

/// Room for the descriptors of one message: as many as SET_MEM_TABLE carries, and one more.
const MAX_MESSAGE_FDS: usize = 33;

/// Takes bytes off a socket without waiting, and the descriptors that travel with them.
/// None: nothing there yet.
pub fn receive(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    const INT: usize = size_of::<libc::c_int>();
    // In units of u64, so that the headers in it are aligned.
    let mut control = [0u64; (MAX_MESSAGE_FDS * INT).div_ceil(8) + 4];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: an all-zero msghdr is valid: no name, no buffers, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control) as _;
    // SAFETY: msg points at one iovec over the live buffer and at the live control array,
    // and says how long they are.
    let n = unsafe {
        libc::recvmsg(
            fd.as_raw_fd(),
            &raw mut msg,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    let mut fds = Vec::new();
    if n >= 0 {
        // SAFETY: msg is as recvmsg left it; control is alive.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
        while !header.is_null() {
            // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR answer headers wholly inside control.
            let (level, kind, len) = unsafe {
                (
                    (*header).cmsg_level,
                    (*header).cmsg_type,
                    (*header).cmsg_len,
                )
            };
            if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
                // SAFETY: as above; the data begins right after the header.
                let data = unsafe { libc::CMSG_DATA(header) }.cast::<libc::c_int>();
                let bytes = len.saturating_sub(data as usize - header as usize);
                for i in 0..bytes / INT {
                    // SAFETY: the kernel wrote so many whole descriptors there, fresh ones
                    // that nobody else owns.
                    fds.push(unsafe { OwnedFd::from_raw_fd(data.add(i).read_unaligned()) });
                }
            }
            // SAFETY: as for CMSG_FIRSTHDR.
            header = unsafe { libc::CMSG_NXTHDR(&raw const msg, header) };
        }
    }
    match usize::try_from(n) {
        Ok(n) => Ok(Some((n, fds))),
        Err(_) => match io::Error::last_os_error() {
            e if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
            {
                Ok(None)
            }
            e => Err(e),
        },
    }
}

/// Sends what fits into a socket's buffer right now, with a copy of a descriptor if there is
/// one; the number of bytes.
pub fn send_now(to: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    const INT: u32 = size_of::<libc::c_int>() as u32;
    // In units of u64, so that the header in it is aligned; more than one needs.
    let mut control = [0u64; 8];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is valid: no name, no buffers, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if let Some(fd) = fd {
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE(INT) } as _;
        // SAFETY: control is longer than a header with one descriptor, so the header is not
        // null, lies in control, and its data has room for the number.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(INT) as _;
            libc::CMSG_DATA(header)
                .cast::<libc::c_int>()
                .write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: msg points at one iovec over the live bytes, and at the live control data;
    // sendmsg only reads them.
    let n = unsafe {
        libc::sendmsg(
            to.as_raw_fd(),
            &raw const msg,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Whether this is the write end of a pipe.
pub fn is_pipe_writer(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: an all-zero stat is valid, and only a place to write to.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: st is live.
    let r = unsafe { libc::fstat(fd.as_raw_fd(), &raw mut st) };
    r == 0
        && st.st_mode & libc::S_IFMT == libc::S_IFIFO
        && status_flags(fd).is_ok_and(|f| f & libc::O_ACCMODE == libc::O_WRONLY)
}

/// Size and preferred block size of an open file, by fstat(2) itself: the C library's
/// wrapper makes a call that takes a path, which no policy need allow.
pub fn file_size(file: &File) -> io::Result<(u64, u64)> {
    // SAFETY: an all-zero stat is valid, and only a place to write to.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: st is live and is the structure that the kernel fills on this architecture.
    let r = unsafe { libc::syscall(libc::SYS_fstat, file.as_raw_fd(), &raw mut st) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((
        u64::try_from(st.st_size).unwrap_or(0),
        u64::try_from(st.st_blksize).unwrap_or(0),
    ))
}

/// One malloc arena for all threads, and small blocks never by mmap: a device process
/// allocates at start and hardly afterwards, so arenas per thread are only memory.
pub fn frugal_malloc() {
    // SAFETY: mallopt takes integers; called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
    }
}

/// One malloc arena for all threads that are to come.
pub(crate) fn one_arena() {
    // SAFETY: mallopt takes integers; called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// As [`frugal_malloc`], and with a heap of `bytes` from the start, for a policy without
/// brk: the heap never grows and is never trimmed, large blocks come by mmap. What needs
/// more small blocks than that ends by the policy.
pub fn fixed_heap(bytes: usize) {
    // SAFETY: mallopt takes integers, and malloc's answer is only given back; called before
    // any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, libc::c_int::MAX);
        // Seen from outside, or the compiler leaves the pair out.
        libc::free(std::hint::black_box(libc::malloc(bytes)));
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
    }
}

/// Lets go of what this program's start has read of its own file: most of it is needed only
/// once. What is needed again is mapped again, from the page cache.
pub(crate) fn forget_start() {
    unsafe extern "C" {
        /// The first byte of the program's image, by the linker.
        static __executable_start: u8;
        /// The end of its code.
        static etext: u8;
    }
    let page = 4096;
    let start = (&raw const __executable_start) as usize & !(page - 1);
    let end = (&raw const etext) as usize & !(page - 1);
    // SAFETY: between these symbols lie constants and code, mapped privately from the
    // program's file and never written (a static program has no relocations there): the
    // kernel reads the same bytes again when they are touched. If it refuses, all stays.
    unsafe {
        libc::madvise(
            start as *mut libc::c_void,
            end.saturating_sub(start),
            libc::MADV_DONTNEED,
        );
    }
}

/// Adds one to an eventfd. Failure is not reported: the counter is full, which means that
/// the other side has been told already, or the other side gave something that is no
/// eventfd, which harms only itself. So does a front-end that fills a blocking call eventfd
/// of its own: its worker waits here, the main thread and other queues do not.
#[inline]
pub fn signal(eventfd: &File) {
    use std::io::Write;
    let _ = (&*eventfd).write(&1u64.to_ne_bytes());
}

/// Sleeps while `word` holds `value`, until somebody calls [`wake`] for it or the time is
/// over; may return early. The time is relative, so no clock is asked.
pub(crate) fn sleep_while(word: &AtomicU32, value: u32, milliseconds: u16) {
    let time = libc::timespec {
        tv_sec: libc::time_t::from(milliseconds / 1000),
        tv_nsec: libc::c_long::from(milliseconds % 1000) * 1_000_000,
    };
    // SAFETY: the word and the time live through the call, which reads them and writes
    // neither.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            value,
            &raw const time,
        );
    }
}

/// Wakes who sleeps for this word, which has been changed.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE takes the word's address and integers, and touches no memory.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        );
    }
}

/// CLOCK_MONOTONIC_COARSE, in nanoseconds: as exact as the timer tick, and read without a
/// system call whatever the host's clock source is.
pub(crate) fn coarse_time() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is live and exclusively borrowed.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// Empties a non-blocking eventfd of this process.
pub fn drain(eventfd: &File) {
    use std::io::Read;
    let mut buf = [0; 8];
    let _ = (&*eventfd).read(&mut buf);
}

/// Waits for input on one descriptor; true if there is some (or its end).
pub fn wait_readable(fd: &impl AsFd, timeout_ms: i32) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), libc::POLLIN)];
    poll(&mut fds, timeout_ms)?;
    Ok(fds.iter().any(|f| f.revents() != 0))
}

/// Sets the file mode creation mask; returns the one before.
pub fn umask(mask: u32) -> u32 {
    // SAFETY: umask takes an integer and cannot fail.
    unsafe { libc::umask(mask) }
}

/// The socket of a vhost-user request handler, which it lends only as a number.
pub(crate) fn handler_fd<S: VhostUserBackendReqHandler>(
    handler: &BackendReqHandler<S>,
) -> BorrowedFd<'_> {
    // SAFETY: the handler owns the socket and never closes it before it is dropped, which
    // the borrow prevents.
    unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) }
}

/// Ends the process at once, all threads included: the standard library's way out first
/// takes down signal stacks by calls that no policy admits. Nothing is buffered that could
/// be lost.
pub fn exit(code: u8) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(i32::from(code)) }
}
