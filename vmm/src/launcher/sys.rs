#![allow(unsafe_code)] // Raw system calls that std has no name for; see the list below.
//! The system calls of the launcher that the standard library does not offer, each as a
//! safe function that takes owned or borrowed descriptors and returns `io::Result`: here
//! processes (clone3(2), execveat(2), pidfds, signals) and descriptors. What isolates a
//! process is in `isolate`, sockets that carry descriptors are in `packet`.
//!
//! Called by the VMM's main thread at start (`clone_and_exec`), by the launcher's only
//! thread, and by the device child between clone and exec.

use bulkhead_seccomp::notify::Violation;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::{Duration, Instant};

use super::isolate::{CAP_HEADER, CapabilitySets};

/// Turns the result of a libc call into `io::Result`.
pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for syscall(2), which returns a long.
pub(super) fn check_long(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Owns a descriptor number that a system call has just returned.
pub(super) fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: only called with a number that the kernel returned one line before as a new
    // descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

// ---------------------------------------------------------------- processes

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitOutcome {
    /// It called exit with this status.
    Status(i32),
    /// This signal ended it (SIGSYS: a system call outside its seccomp policy).
    Signal(i32),
    /// It made a system call outside its seccomp policy, and was killed at it.
    Violation(Violation),
}

impl ExitOutcome {
    /// How a program ended, with what it said last, less its name in front. One that was killed
    /// by another process said nothing of that.
    pub fn with_last_line(&self, program: &str, last_line: &str) -> String {
        if matches!(self, Self::Signal(libc::SIGKILL | libc::SIGTERM)) {
            return self.to_string();
        }
        let said = last_line
            .strip_prefix(program)
            .and_then(|rest| rest.strip_prefix(": "))
            .unwrap_or(last_line);
        match said {
            "" => self.to_string(),
            said => format!("{self}: {said}"),
        }
    }
}

impl std::fmt::Display for ExitOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Violation(call) => {
                write!(
                    f,
                    "the system call {}, which its policy does not allow",
                    call.name()
                )
            }
        }
    }
}

/// Which side of a clone this is.
pub enum Cloned {
    /// The new process.
    Child,
    /// The caller: the child's pid in the caller's pid namespace, and its pidfd.
    Parent {
        /// Process id.
        pid: i32,
        /// Descriptor of the process.
        pidfd: OwnedFd,
    },
}

/// CLONE_INTO_CGROUP of <linux/sched.h>.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let into = cgroup.map_or(0, |_| CLONE_INTO_CGROUP);
    let mut args = libc::clone_args {
        flags: flags | libc::CLONE_PIDFD as u64 | into,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
    };
    // SAFETY: `args` is a valid clone_args of the size told, and lives across the call; with
    // no CLONE_VM and no new stack the child returns here on its own copy of this stack.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::from_mut(&mut args),
            size_of::<libc::clone_args>(),
        )
    };
    match check_long(result)? {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent {
            pid: i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?,
            pidfd: own(pidfd.into())?,
        }),
    }
}

/// Clones a process that has one thread only, so that the child may run any code: no lock
/// can be held by a thread that the child lacks. Refused when there are more threads. The child
/// begins in `cgroup`, a directory of cgroup v2, else where its parent is.
pub fn clone_single_threaded(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let threads = std::os::linux::fs::MetadataExt::st_nlink(&std::fs::metadata("/proc/self/task")?);
    // Two links of the directory itself, one per thread.
    if threads != 3 {
        return Err(io::Error::other(
            "clone in a process that has several threads",
        ));
    }
    clone3(flags, cgroup)
}

/// What `clone_and_exec` needs; everything is prepared beforehand, because the child may
/// be a copy of one thread of many and must not allocate.
pub struct RawExec<'a> {
    /// CLONE_NEW* flags.
    pub flags: u64,
    /// The program.
    pub program: BorrowedFd<'a>,
    /// Descriptors that become 0, 1, 2, … in the program; at most 64.
    pub fds: &'a [RawFd],
    /// argv, without an environment.
    pub argv: &'a [CString],
    /// Capabilities (numbers) to keep across the exec where the kernel lets us.
    pub ambient: &'a [u32],
    /// The child's end of a stream socketpair: it waits for one byte on it, then runs; on
    /// failure it writes the stage (one byte) and errno (four bytes, native order).
    pub sync_child: RawFd,
    /// The parent's end, which the child closes.
    pub sync_parent: RawFd,
}

/// Stages of `RawExec`'s child, as told in its failure report.
pub const RAW_EXEC_STAGES: [&str; 5] = [
    "a new session",
    "its descriptors",
    "closing descriptors",
    "its program",
    "waiting",
];

/// Clones and executes; returns pid and pidfd at once. The caller writes the byte that
/// lets the child go.
pub fn clone_and_exec(exec: &RawExec<'_>) -> io::Result<(i32, OwnedFd)> {
    let mut argv: Vec<*const libc::c_char> = exec.argv.iter().map(|a| a.as_ptr()).collect();
    argv.push(ptr::null());
    let envp: [*const libc::c_char; 1] = [ptr::null()];
    let mut moved = [-1; 64];
    match clone3(exec.flags, None)? {
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Cloned::Child => {
            let mut report_fd = exec.sync_child;
            let (stage, errno) = raw_child(exec, &argv, &envp, &mut moved, &mut report_fd);
            let mut report = [stage, 0, 0, 0, 0];
            for (to, from) in report.iter_mut().skip(1).zip(errno.to_ne_bytes()) {
                *to = from;
            }
            // SAFETY: writes from a live array of that length; _exit ends the child without
            // running anything of the parent's.
            unsafe {
                libc::write(report_fd, report.as_ptr().cast(), report.len());
                libc::_exit(127)
            }
        }
    }
}

/// The child's part: only system calls, no allocation, no locks. Returns on failure only.
fn raw_child(
    exec: &RawExec<'_>,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char; 1],
    moved: &mut [RawFd; 64],
    report_fd: &mut RawFd,
) -> (u8, i32) {
    fn errno() -> i32 {
        // SAFETY: __errno_location is always a valid pointer to this thread's errno.
        unsafe { *libc::__errno_location() }
    }
    // SAFETY: plain system calls on integers and on memory that the caller prepared:
    // `argv` and `envp` end with null and their strings outlive the call, the one-byte and
    // capability structures are locals. Descriptors that are closed or replaced here
    // belong to the child's own table, and the child never returns to code that owns them.
    unsafe {
        libc::close(exec.sync_parent);
        let mut go = 0u8;
        if libc::read(exec.sync_child, ptr::from_mut(&mut go).cast(), 1) != 1 {
            return (4, libc::EPIPE);
        }
        if libc::setsid() < 0 {
            return (0, errno());
        }
        let program = libc::fcntl(exec.program.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 128);
        let sync = libc::fcntl(exec.sync_child, libc::F_DUPFD_CLOEXEC, 128);
        if program < 0 || sync < 0 {
            return (1, errno());
        }
        // The numbers below are about to be replaced.
        *report_fd = sync;
        for (to, from) in moved.iter_mut().zip(exec.fds) {
            *to = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 128);
            if *to < 0 {
                return (1, errno());
            }
        }
        let mut number: RawFd = 0;
        for (from, _) in moved.iter().zip(exec.fds) {
            if libc::dup2(*from, number) < 0 {
                return (1, errno());
            }
            number = number.wrapping_add(1);
        }
        if libc::syscall(
            libc::SYS_close_range,
            number,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        ) < 0
        {
            return (2, errno());
        }
        // Best effort: as root of a namespace exec grants everything anyway, and the launcher
        // drops what it does not need as its first act.
        let mut caps = CapabilitySets::default();
        if libc::syscall(
            libc::SYS_capget,
            &mut CAP_HEADER.clone(),
            caps.0.as_mut_ptr(),
        ) == 0
        {
            for cap in exec.ambient {
                if let Some(word) = caps.0.get_mut((cap / 32) as usize) {
                    word.inheritable |= (1 << (cap % 32)) & word.permitted;
                }
            }
            libc::syscall(libc::SYS_capset, &mut CAP_HEADER.clone(), caps.0.as_ptr());
            for cap in exec.ambient {
                libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, *cap, 0, 0);
            }
        }
        libc::syscall(
            libc::SYS_execveat,
            program,
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        (3, errno())
    }
}

/// Executes the program behind `program` with an empty environment; returns on failure.
pub fn execveat(program: BorrowedFd<'_>, argv: &[CString]) -> io::Error {
    let mut pointers: Vec<*const libc::c_char> = argv.iter().map(|a| a.as_ptr()).collect();
    pointers.push(ptr::null());
    let envp = [bulkhead_seccomp::notify::WATCHED.as_ptr(), ptr::null()];
    // SAFETY: both arrays end with null and, like their strings, live across the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Ends this process without running destructors or exit handlers.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// A pidfd of this process.
pub fn own_pidfd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    own(check_long(unsafe {
        libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0)
    })?)
}

/// Sends `signal` to the process behind a pidfd.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed; no other memory is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check_long(result).map(|_| ())
}

/// Reaps one dead child, if there is one: any child, or the one behind a pidfd.
pub fn reap(pidfd: Option<BorrowedFd<'_>>) -> io::Result<Option<(i32, ExitOutcome)>> {
    let (kind, id) = match pidfd {
        Some(fd) => (libc::P_PIDFD, fd.as_raw_fd().unsigned_abs()),
        None => (libc::P_ALL, 0),
    };
    // SAFETY: siginfo_t is plain data for which all zeroes is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid siginfo_t that the kernel fills.
    check(unsafe { libc::waitid(kind, id, &mut info, libc::WEXITED | libc::WNOHANG) })?;
    // SAFETY: waitid succeeded, so that the SIGCHLD fields are the valid ones; they are zero
    // when nothing was there to reap.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let outcome = if info.si_code == libc::CLD_EXITED {
        ExitOutcome::Status(status)
    } else {
        ExitOutcome::Signal(status)
    };
    Ok(Some((pid, outcome)))
}

/// Blocks SIGCHLD and returns a non-blocking descriptor that is readable when it is pending.
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: `set` is a local that sigemptyset initialises before it is read.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut()))?;
        own(check(libc::signalfd(
            -1,
            &set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))?
        .into())
    }
}

/// Undoes what a program inherits of its parent's signal state: nothing blocked, nothing
/// ignored.
pub fn reset_signals() -> io::Result<()> {
    // SAFETY: as above; SIG_DFL is a disposition, no handler runs.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        check(libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut())).map(|_| ())
    }
}

// ---------------------------------------------------------------- descriptors

/// CLOSE_RANGE_CLOEXEC of <linux/close_range.h>.
const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;

/// Gives the program after exec exactly `fds`, as 0, 1, 2, …; everything else is closed by
/// the exec. `keep` (close-on-exec) stay usable until then: their numbers come back.
pub fn arrange_fds(fds: &[RawFd], keep: &[BorrowedFd<'_>]) -> io::Result<Vec<RawFd>> {
    let first_free = RawFd::try_from(fds.len()).map_err(io::Error::other)?;
    let high = first_free.saturating_add(64);
    let moved: Vec<OwnedFd> = fds
        .iter()
        .map(|fd| duplicate_from(*fd, high))
        .collect::<io::Result<_>>()?;
    let mut kept = Vec::new();
    for fd in keep {
        kept.push(duplicate_from(fd.as_raw_fd(), high)?);
    }
    for (number, fd) in (0..first_free).zip(&moved) {
        // SAFETY: overwrites a number of this process's own table, which is about to be
        // replaced by exec; dup2 leaves close-on-exec off.
        check(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
    }
    // SAFETY: marks descriptors close-on-exec, closes none.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first_free,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(kept
        .into_iter()
        .map(std::os::fd::IntoRawFd::into_raw_fd)
        .collect())
}

fn duplicate_from(fd: RawFd, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes integers and returns a new descriptor.
    own(check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) })?.into())
}

/// Takes over a descriptor that this process inherited under a number told by its argv;
/// `Err` when it is not open. Each number must be taken once only.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes integers; a closed number answers EBADF.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    own(number.into())
}

/// Borrows a standard descriptor (0, 1, 2), which is never closed in this process.
pub fn standard_fd(number: u8) -> BorrowedFd<'static> {
    // SAFETY: 0 to 2 are open from the start (std sees to it) and nothing closes them.
    unsafe { BorrowedFd::borrow_raw(number.min(2).into()) }
}

/// Borrows one of the numbers that `arrange_fds` returned.
pub fn kept_fd(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: `arrange_fds` leaked these descriptors: nothing closes them before exec.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// A close-on-exec pipe: read end, write end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` holds two integers, as pipe2 fills.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((own(fds[0].into())?, own(fds[1].into())?))
}

/// Sets O_NONBLOCK on the open file description.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take integers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(
            fd.as_raw_fd(),
            libc::F_SETFL,
            flags | libc::O_NONBLOCK,
        ))
        .map(|_| ())
    }
}

/// read(2).
pub fn read(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `into.len()` bytes into a live slice.
    let n = unsafe { libc::read(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// write(2).
pub fn write(fd: BorrowedFd<'_>, from: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads at most `from.len()` bytes from a live slice.
    let n = unsafe { libc::write(fd.as_raw_fd(), from.as_ptr().cast(), from.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// poll(2) until `deadline` (None: for ever), restarted after signals; the revents.
pub fn poll(fds: &[(BorrowedFd<'_>, i16)], deadline: Option<Instant>) -> io::Result<Vec<i16>> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|(fd, events)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: *events,
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(polled.len()).map_err(io::Error::other)?;
    loop {
        let timeout = deadline.map_or(-1, |at| {
            // Rounded up, so that the last millisecond is not spent spinning.
            let left = at.saturating_duration_since(Instant::now());
            i32::try_from(left.saturating_add(Duration::from_micros(999)).as_millis())
                .unwrap_or(i32::MAX)
        });
        // SAFETY: `polled` holds `count` pollfds.
        match check(unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) }) {
            Ok(_) => return Ok(polled.iter().map(|p| p.revents).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Tries to lock the whole of a file for its open file description; false when another one
/// holds a lock that conflicts.
pub fn try_lock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    // To the end, wherever that will be.
    lock_part(fd, exclusive, 0, 0)
}

/// The same, exclusively, for a part of it, which need not be there.
pub fn try_lock_range(fd: BorrowedFd<'_>, start: i64, length: i64) -> io::Result<bool> {
    lock_part(fd, true, start, length)
}

fn lock_part(fd: BorrowedFd<'_>, exclusive: bool, start: i64, length: i64) -> io::Result<bool> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    let part = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        // Must be 0 for a lock of an open file description.
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads the one flock that it is given a pointer to, which lives.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const part) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            error => Err(error),
        },
    }
}

/// Whether what is open for writing here is a block device that can erase securely. Asked by a
/// BLKSECDISCARD of a range that begins within a sector: the kernel says EINVAL to that, but only
/// once it has seen that the device can, and erases nothing.
pub fn can_secure_erase(fd: BorrowedFd<'_>) -> bool {
    const BLKSECDISCARD: libc::Ioctl = 0x127d;
    let range = [1u64, 0];
    // SAFETY: BLKSECDISCARD reads two u64 and writes nothing; on anything but a block device it
    // fails.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKSECDISCARD, range.as_ptr()) };
    result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// The descriptor of an epoll instance, which vmm-sys-util's type does not lend.
pub fn epoll_fd(epoll: &vmm_sys_util::epoll::Epoll) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `epoll` lives, and the borrow lives no longer.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}
