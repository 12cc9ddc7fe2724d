//! Parts of the kernel that no device needs.

use super::{Attempt, Outcome, call, now, text, zeroes};

/// `struct io_uring_params`, all zero.
static mut RING_PARAMS: [u64; 32] = [0; 32];

pub(super) fn attempts() -> Vec<Attempt> {
    let mut all = vec![
        call(
            "mount",
            "mount",
            libc::SYS_mount,
            [text(c"proc"), text(c"/"), text(c"proc"), 0, 0, 0],
        ),
        call(
            "fsopen",
            "fsopen",
            libc::SYS_fsopen,
            [text(c"proc"), 0, 0, 0, 0, 0],
        ),
        call(
            "open_tree",
            "open_tree",
            libc::SYS_open_tree,
            [-100, text(c"/"), 1, 0, 0, 0],
        ),
        call(
            "unshare",
            "unshare",
            libc::SYS_unshare,
            [0x1000_0000, 0, 0, 0, 0, 0],
        ),
        call("setns", "setns", libc::SYS_setns, [3, 0, 0, 0, 0, 0]),
        call("bpf", "bpf", libc::SYS_bpf, [0, zeroes(), 64, 0, 0, 0]),
        call(
            "perf_event_open",
            "perf_event_open",
            libc::SYS_perf_event_open,
            [zeroes(), 0, -1, -1, 0, 0],
        ),
        call(
            "userfaultfd",
            "userfaultfd",
            libc::SYS_userfaultfd,
            [1, 0, 0, 0, 0, 0],
        ),
        call(
            "io_uring_setup",
            "io_uring_setup",
            libc::SYS_io_uring_setup,
            [1, &raw mut RING_PARAMS as libc::c_long, 0, 0, 0, 0],
        ),
        call(
            "io_uring_register restrictions",
            "io_uring_register",
            libc::SYS_io_uring_register,
            [7, 11, zeroes(), 1, 0, 0],
        ),
        call(
            "io_uring_register buffers",
            "io_uring_register",
            libc::SYS_io_uring_register,
            [7, 0, zeroes(), 1, 0, 0],
        ),
        call(
            "a seccomp filter of its own",
            "seccomp",
            libc::SYS_seccomp,
            [1, 8, zeroes(), 0, 0, 0],
        ),
        call(
            "landlock_create_ruleset",
            "landlock_create_ruleset",
            libc::SYS_landlock_create_ruleset,
            [0, 0, 1, 0, 0, 0],
        ),
        call(
            "add_key",
            "add_key",
            libc::SYS_add_key,
            [text(c"user"), text(c"x"), text(c"y"), 1, -3, 0],
        ),
        call(
            "init_module",
            "init_module",
            libc::SYS_init_module,
            [zeroes(), 1, text(c""), 0, 0, 0],
        ),
        call("modify_ldt", "modify_ldt", libc::SYS_modify_ldt, [0; 6]),
        call(
            "memfd_create and execute",
            "memfd_create",
            libc::SYS_memfd_create,
            [text(c"x"), 1, 0, 0, 0, 0],
        ),
        call("eventfd2", "eventfd2", libc::SYS_eventfd2, [0; 6]),
        call(
            "a call by x32's numbers",
            "1073741824 of architecture 0xc000003e",
            0x4000_0000,
            [0, zeroes(), 0, 0, 0, 0],
        ),
    ];
    #[cfg(target_arch = "x86_64")]
    all.push(Attempt {
        name: "a call by i386's numbers".into(),
        call: "20 of architecture 0x40000003",
        worker: false,
        run: now(|| Outcome::Answer(getpid_of_i386())),
    });
    all
}

#[cfg(target_arch = "x86_64")]
fn getpid_of_i386() -> libc::c_long {
    let answer: i32;
    // SAFETY: the i386 call number 20 is getpid, which takes nothing and touches no memory; the
    // gate clobbers what is declared.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("eax") 20 => answer,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    answer.into()
}
