//! Other processes and programs.

use super::told::Told;
use super::{Attempt, call, text, zeroes};

pub(super) fn attempts(told: &Told) -> Vec<Attempt> {
    const KILL: libc::c_long = libc::SIGKILL as libc::c_long;
    let mut all = vec![
        call(
            "execve",
            "execve",
            libc::SYS_execve,
            [text(c"/bin/sh"), 0, 0, 0, 0, 0],
        ),
        call(
            "execveat of its disk or tap",
            "execveat",
            libc::SYS_execveat,
            [5, text(c""), 0, 0, 0x1000, 0],
        ),
        call("fork", "fork", libc::SYS_fork, [0; 6]),
        call(
            "clone a process",
            "clone",
            libc::SYS_clone,
            [libc::SIGCHLD.into(), 0, 0, 0, 0, 0],
        ),
        call(
            "clone3",
            "clone3",
            libc::SYS_clone3,
            [zeroes(), 88, 0, 0, 0, 0],
        ),
        call(
            "ptrace the parent",
            "ptrace",
            libc::SYS_ptrace,
            [16, 0, 0, 0, 0, 0],
        ),
        call(
            "process_vm_readv",
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [1, zeroes(), 1, zeroes(), 1, 0],
        ),
        call(
            "process_vm_writev",
            "process_vm_writev",
            libc::SYS_process_vm_writev,
            [1, zeroes(), 1, zeroes(), 1, 0],
        ),
        call(
            "kill everybody",
            "kill",
            libc::SYS_kill,
            [-1, KILL, 0, 0, 0, 0],
        ),
        call(
            "kill the parent's group",
            "kill",
            libc::SYS_kill,
            [0, KILL, 0, 0, 0, 0],
        ),
        call(
            "tgkill a sibling",
            "tgkill",
            libc::SYS_tgkill,
            [2, 2, KILL, 0, 0, 0],
        ),
        call(
            "pidfd_open",
            "pidfd_open",
            libc::SYS_pidfd_open,
            [1, 0, 0, 0, 0, 0],
        ),
        call(
            "pidfd_getfd",
            "pidfd_getfd",
            libc::SYS_pidfd_getfd,
            [3, 0, 0, 0, 0, 0],
        ),
        call(
            "prctl dumpable",
            "prctl",
            libc::SYS_prctl,
            [4, 1, 0, 0, 0, 0],
        ),
        call(
            "raise a limit",
            "prlimit64",
            libc::SYS_prlimit64,
            [0, 7, zeroes(), 0, 0, 0],
        ),
        call("setuid", "setuid", libc::SYS_setuid, [0; 6]),
        call(
            "capset",
            "capset",
            libc::SYS_capset,
            [zeroes(), zeroes(), 0, 0, 0, 0],
        ),
        call(
            "process_madvise",
            "process_madvise",
            libc::SYS_process_madvise,
            [3, zeroes(), 1, 4, 0, 0],
        ),
    ];
    // By the host's numbers of its VMM, its launcher and its device.
    let [vmm, launcher, device] = told.pids;
    all.extend([
        call(
            "kill another VM's VMM",
            "kill",
            libc::SYS_kill,
            [vmm, KILL, 0, 0, 0, 0],
        ),
        call(
            "trace another VM's launcher",
            "ptrace",
            libc::SYS_ptrace,
            [0x4206, launcher, 0, 0, 0, 0],
        ),
        call(
            "read another VM's device process",
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [device, zeroes(), 1, zeroes(), 1, 0],
        ),
        call(
            "a limit of another VM's device process",
            "prlimit64",
            libc::SYS_prlimit64,
            [device, 7, zeroes(), 0, 0, 0],
        ),
    ]);
    all
}
