//! Memory that is both written and executed.

use super::{Attempt, call, zeroes};

pub(super) fn attempts() -> Vec<Attempt> {
    const EXEC: libc::c_long = (libc::PROT_READ | libc::PROT_EXEC) as libc::c_long;
    const ALL: libc::c_long =
        (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as libc::c_long;
    const PRIVATE: libc::c_long = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as libc::c_long;
    const SHARED: libc::c_long = libc::MAP_SHARED as libc::c_long;
    let page = || zeroes() & !0xfff;
    vec![
        call(
            "mmap of executable memory",
            "mmap",
            libc::SYS_mmap,
            [0, 4096, ALL, PRIVATE, -1, 0],
        ),
        call(
            "mmap of a file to execute",
            "mmap",
            libc::SYS_mmap,
            [0, 4096, EXEC, SHARED, 5, 0],
        ),
        call(
            "mprotect to executable",
            "mprotect",
            libc::SYS_mprotect,
            [page(), 4096, ALL, 0, 0, 0],
        ),
        call(
            "pkey_mprotect to executable",
            "pkey_mprotect",
            libc::SYS_pkey_mprotect,
            [page(), 4096, ALL, -1, 0, 0],
        ),
        call(
            "personality READ_IMPLIES_EXEC",
            "personality",
            libc::SYS_personality,
            [0x0400_0000, 0, 0, 0, 0, 0],
        ),
        call(
            "remap_file_pages",
            "remap_file_pages",
            libc::SYS_remap_file_pages,
            [page(), 4096, 0, 0, 0, 0],
        ),
    ]
}
