//! The arguments that a policy may look at: their names (as in the manual pages), their
//! positions, and how much of the register the kernel reads.
//!
//! The width decides what is compared. Of an `int` the kernel reads 32 bits and the upper half
//! of the register is whatever the caller left there, so comparing 64 would kill a good call;
//! of a `long` it reads all, so comparing 32 would let a bad one pass. A pointer may only be
//! compared with NULL: what it points to can change after the check.

/// How much of the register the kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// `int`, `unsigned int`: the lower 32 bits.
    Int,
    /// `long`, `size_t`, a pointer: all 64 bits.
    Long,
}

use Width::{Int, Long};

type Argument = (&'static str, u8, Width);

const ARGUMENTS: &[(&str, &[Argument])] = &[
    ("accept4", &[("flags", 3, Int)]),
    ("arch_prctl", &[("code", 0, Int)]),
    // glibc and the kernel's x86-64 entry: clone(flags, stack, parent_tid, child_tid, tls).
    ("clone", &[("flags", 0, Long)]),
    ("close_range", &[("flags", 2, Int)]),
    ("epoll_create1", &[("flags", 0, Int)]),
    ("epoll_ctl", &[("op", 1, Int)]),
    ("eventfd2", &[("flags", 1, Int)]),
    ("execveat", &[("dirfd", 0, Int), ("flags", 4, Int)]),
    ("fallocate", &[("mode", 1, Int)]),
    ("fcntl", &[("cmd", 1, Int), ("arg", 2, Long)]),
    ("fstat", &[("fd", 0, Int)]),
    ("futex", &[("op", 1, Int)]),
    ("getrandom", &[("flags", 2, Int)]),
    ("getsockopt", &[("level", 1, Int), ("optname", 2, Int)]),
    ("io_uring_enter", &[("flags", 3, Int)]),
    ("io_uring_register", &[("opcode", 1, Int)]),
    ("ioctl", &[("fd", 0, Int), ("cmd", 1, Int)]),
    ("kill", &[("pid", 0, Int), ("sig", 1, Int)]),
    ("landlock_create_ruleset", &[("flags", 2, Int)]),
    ("landlock_restrict_self", &[("flags", 1, Int)]),
    ("madvise", &[("advice", 2, Int)]),
    ("memfd_create", &[("flags", 1, Int)]),
    (
        "mmap",
        &[("prot", 2, Long), ("flags", 3, Long), ("fd", 4, Int)],
    ),
    ("mount", &[("flags", 3, Long)]),
    ("mprotect", &[("prot", 2, Long)]),
    ("mremap", &[("flags", 3, Long)]),
    ("newfstatat", &[("dirfd", 0, Int), ("flags", 3, Int)]),
    ("openat", &[("dirfd", 0, Int), ("flags", 2, Int)]),
    ("pidfd_open", &[("flags", 1, Int)]),
    ("pidfd_send_signal", &[("sig", 1, Int), ("flags", 3, Int)]),
    ("pipe2", &[("flags", 1, Int)]),
    (
        "prctl",
        &[("option", 0, Int), ("arg2", 1, Long), ("arg3", 2, Long)],
    ),
    ("preadv2", &[("flags", 5, Int)]),
    (
        "prlimit64",
        &[("pid", 0, Int), ("resource", 1, Int), ("new", 2, Long)],
    ),
    ("pwritev2", &[("flags", 5, Int)]),
    ("recvfrom", &[("flags", 3, Int), ("addr", 4, Long)]),
    ("recvmsg", &[("flags", 2, Int)]),
    ("rt_sigaction", &[("signum", 0, Int)]),
    ("rt_sigprocmask", &[("how", 0, Int)]),
    ("seccomp", &[("operation", 0, Int), ("flags", 1, Int)]),
    ("sendmsg", &[("flags", 2, Int)]),
    ("sendto", &[("flags", 3, Int), ("addr", 4, Long)]),
    ("setsockopt", &[("level", 1, Int), ("optname", 2, Int)]),
    ("shutdown", &[("how", 1, Int)]),
    ("signalfd4", &[("flags", 3, Int)]),
    (
        "socket",
        &[("domain", 0, Int), ("type", 1, Int), ("protocol", 2, Int)],
    ),
    ("socketpair", &[("domain", 0, Int), ("type", 1, Int)]),
    ("statx", &[("flags", 2, Int)]),
    ("tgkill", &[("sig", 2, Int)]),
    ("timerfd_create", &[("clockid", 0, Int), ("flags", 1, Int)]),
    ("timerfd_settime", &[("flags", 1, Int)]),
    ("umount2", &[("flags", 1, Int)]),
    ("unlinkat", &[("flags", 2, Int)]),
    ("unshare", &[("flags", 0, Long)]),
    ("waitid", &[("idtype", 0, Int), ("options", 3, Int)]),
    ("wait4", &[("options", 2, Int)]),
];

/// Position and width of `argument` of `syscall`.
pub fn find(syscall: &str, argument: &str) -> Result<(u8, Width), String> {
    let known = ARGUMENTS
        .iter()
        .find(|(name, _)| *name == syscall)
        .map_or(&[][..], |(_, arguments)| arguments);
    known
        .iter()
        .find(|(name, _, _)| *name == argument)
        .map(|(_, index, width)| (*index, *width))
        .ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|(name, _, _)| *name).collect();
            format!(
                "no argument `{argument}` is known (known: {}): mend the name, or add it with its width to compiler/arguments.rs",
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            )
        })
}
