//! Files: by path, by descriptor, of /proc, /sys and another VM.

use super::told::Told;
use super::{Attempt, call, text, zeroes};

/// `struct open_how`, for any file.
static OPEN_HOW: [u64; 3] = [0; 3];

pub(super) fn attempts(told: &Told) -> Vec<Attempt> {
    const CWD: libc::c_long = libc::AT_FDCWD as libc::c_long;
    const PATH: libc::c_long = libc::O_PATH as libc::c_long;
    let mut all = vec![
        call(
            "open /etc/passwd",
            "open",
            libc::SYS_open,
            [text(c"/etc/passwd"), 0, 0, 0, 0, 0],
        ),
        call(
            "openat /",
            "openat",
            libc::SYS_openat,
            [CWD, text(c"/"), PATH, 0, 0, 0],
        ),
        call(
            "creat",
            "creat",
            libc::SYS_creat,
            [text(c"/x"), 0o600, 0, 0, 0, 0],
        ),
        call(
            "openat2 /",
            "openat2",
            libc::SYS_openat2,
            [CWD, text(c"/"), OPEN_HOW.as_ptr() as libc::c_long, 24, 0, 0],
        ),
        call(
            "open_by_handle_at",
            "open_by_handle_at",
            libc::SYS_open_by_handle_at,
            [0, zeroes(), 0, 0, 0, 0],
        ),
        call(
            "open /proc/1/mem",
            "open",
            libc::SYS_open,
            [text(c"/proc/1/mem"), 2, 0, 0, 0, 0],
        ),
        call(
            "open another VM's cgroup",
            "openat",
            libc::SYS_openat,
            [CWD, told.in_cgroup("cgroup.procs"), 1, 0, 0, 0],
        ),
        call(
            "mkdir in another VM's cgroup",
            "mkdir",
            libc::SYS_mkdir,
            [told.in_cgroup("x"), 0o700, 0, 0, 0, 0],
        ),
        call(
            "unlink",
            "unlink",
            libc::SYS_unlink,
            [text(c"/x"), 0, 0, 0, 0, 0],
        ),
        call(
            "chdir",
            "chdir",
            libc::SYS_chdir,
            [text(c"/proc"), 0, 0, 0, 0, 0],
        ),
        call(
            "chroot",
            "chroot",
            libc::SYS_chroot,
            [text(c"/"), 0, 0, 0, 0, 0],
        ),
        call(
            "readlink /proc/self/exe",
            "readlink",
            libc::SYS_readlink,
            [text(c"/proc/self/exe"), zeroes(), 0, 0, 0, 0],
        ),
    ];
    for fd in 0..8 {
        let name = format!("walk to /proc from descriptor {fd}");
        let up = text(c"../../../../../proc/self/root");
        all.push(call(
            name,
            "openat",
            libc::SYS_openat,
            [fd, up, PATH, 0, 0, 0],
        ));
    }
    all
}
