//! Confinement, tried from inside: each attempt runs in a process of its own
//! (`examples/attempt.rs`), which confines itself and then tries something.
#![allow(unsafe_code)] // What a launcher's child does between fork and exec.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by panicking.

use bulkhead_seccomp::policy::{self, Policy, Stage};
use bulkhead_seccomp::{filter, privileges};
use std::ffi::CString;
use std::io::{Error, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// An example program: `cargo test` builds them beside the tests.
fn example(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{}: build the examples too", path.display());
    path
}

/// Runs `attempt KIND WHAT`.
fn attempt(name: &str) -> Output {
    let (kind, what) = name.split_once(' ').unwrap();
    Command::new(example("attempt"))
        .args([kind, what])
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What the attempt printed.
fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn killed(attempts: &[&str]) {
    for name in attempts {
        let output = attempt(name);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSYS),
            "{name}: {output:?}"
        );
    }
}

fn answered(name: &str, answer: i32) {
    let output = attempt(name);
    assert_eq!(said(&output), answer.to_string(), "{name}");
}

#[test]
fn threads_that_allocate_open_no_file_however_many_they_are() {
    let output = attempt("vmm-threads 64");
    assert_eq!(said(&output), "64 threads");
}

#[test]
fn a_device_that_tries_a_forbidden_call_is_killed() {
    killed(&[
        "call open",
        "call openat",
        "call openat2",
        "call socket unix",
        "call socket inet",
        "call socket netlink",
        "call connect",
        "call execve",
        "call execveat",
        "call fork",
        "call clone",
        "call clone3",
        "call ptrace",
        "call process_vm_readv",
        "call kill",
        "call mount",
        "call unshare",
        "call setns",
        "call bpf",
        "call perf_event_open",
        "call userfaultfd",
        "call io_uring_setup",
        "call io_uring restrictions",
        "call memfd_create",
        "call mmap exec",
        "call mprotect",
        "call mprotect exec",
        "call seccomp",
        "call ioctl tty",
        "call fcntl F_SETFL",
        "call accept4",
        "call x32 read",
        "other-thread open",
        "socket-mode socket unix",
        "socket-mode open",
        "socket-mode mmap exec",
    ]);
}

#[test]
fn the_vmm_and_its_vcpu_threads_are_killed_for_what_the_launcher_does_for_them() {
    killed(&[
        "vmm open",
        "vmm openat2",
        "vmm socket unix",
        "vmm connect",
        "vmm execve",
        "vmm execveat",
        "vmm mount",
        "vmm ptrace",
        "vmm fork",
        "vmm clone",
        "vmm memfd_create",
        "vmm mmap exec",
        "vmm mprotect exec",
        "vmm ioctl KVM_CREATE_VM",
        "vmm-setup open",
        "vmm-setup socket inet",
        "vmm-setup execveat",
        "vmm-setup clone",
        "vmm-narrowed memfd_create",
        "vmm-narrowed ioctl KVM_CREATE_VM",
        "vcpu socketpair",
        "vcpu read",
        "vcpu sendmsg",
        "vcpu recvmsg",
        "vcpu ppoll",
        "vcpu eventfd2",
        "vcpu openat",
        "vcpu mmap exec",
        "vcpu mprotect",
        "vcpu accept4",
        "vcpu ioctl KVM_CREATE_VM",
        "vcpu ioctl tty",
    ]);
}

#[test]
fn allowed_calls_reach_the_kernel() {
    // The kernel's own answers to nonsense arguments.
    answered("call clock_gettime", -libc::EINVAL);
    answered("socket-mode accept4", -libc::ENOTSOCK);
    answered("vmm ioctl KVM_RUN", -libc::ENOTTY);
    answered("vcpu ioctl KVM_RUN", -libc::ENOTTY);
    answered("vmm-setup ioctl KVM_CREATE_VM", -libc::ENOTTY);
    answered("vmm-narrowed ioctl KVM_RUN", -libc::ENOTTY);
    answered("vmm mprotect", 0);
    let output = attempt("call mmap");
    assert!(said(&output).parse::<i64>().unwrap() > 0);
}

#[test]
fn errno_rules_answer_and_do_not_kill() {
    answered("call mremap", -libc::ENOSYS);
    answered("call restart_syscall", -libc::EINTR);
    answered("vmm-setup clone3", -libc::ENOSYS);
}

#[test]
fn no_capability_is_left_in_any_set() {
    let said = said(&attempt("privileges status"));
    // An ordinary user has no right to empty the bounding set.
    // SAFETY: it takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        if set == "CapBnd" && !root {
            continue;
        }
        assert!(
            said.contains(&format!("{set}:\t0000000000000000")),
            "{said}"
        );
    }
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    if root {
        assert!(
            said.contains("bounding_empty: true, securebits_locked: true"),
            "{said}"
        );
    }
}

#[test]
fn limits_hold_for_soft_and_hard_and_only_go_down() {
    assert_eq!(
        said(&attempt("privileges limits")),
        "dumpable 0 20/20 1048576/1048576 0/0 1073741824/1073741824 0/0"
    );
}

#[test]
fn under_landlock_no_path_opens_and_open_files_stay() {
    let said = said(&attempt("landlock paths"));
    let Some(rest) = said.strip_prefix("0 ") else {
        let denied = ["permission denied"; 6].join(", ");
        assert!(said.ends_with(&format!("{denied} 0")), "{said}");
        return;
    };
    // A kernel without Landlock: reported as such, and nothing pretended.
    assert!(rest.starts_with("done"), "{said}");
}

/// Each older kernel's Landlock, by asking for no more than it has: what it stops is stopped, what
/// it does not is reported.
#[test]
fn each_level_of_landlock_stops_what_it_knows_and_says_what_it_does_not() {
    use bulkhead_seccomp::landlock_empty::{self, LandlockStatus};
    let newest = landlock_empty::of_this_kernel().abi;
    for level in 0..=landlock_empty::NEWEST {
        let said = said(&attempt(&format!("landlock-level {level}")));
        let abi = level.min(newest);
        let stopped = |from: u32, word: &str| {
            let answer = said.split(' ').find_map(|w| w.strip_prefix(word)).unwrap();
            let denied = ["permission", "-1"].iter().any(|d| answer.starts_with(d));
            assert_eq!(denied, abi >= from, "level {level}: {said}");
        };
        assert!(said.starts_with(&format!("{abi} ")), "{said}");
        stopped(1, "open:");
        stopped(3, "truncate:");
        stopped(4, "bind:");
        stopped(6, "abstract:");
        stopped(6, "signal:");
        let missing = LandlockStatus { abi }.missing();
        assert_eq!(missing.contains("truncation"), (1..3).contains(&abi));
        assert_eq!(missing.contains("TCP"), (1..4).contains(&abi));
        assert_eq!(missing.contains("signals"), (1..6).contains(&abi));
        assert_eq!(missing.is_empty(), abi >= 6);
    }
}

#[test]
fn under_landlock_no_tcp_port_is_reached_or_bound() {
    let said = said(&attempt("landlock network"));
    let (abi, answers) = said.split_once(' ').unwrap();
    if abi.parse::<u32>().unwrap() >= 4 {
        assert_eq!(answers, "permission denied, permission denied");
    } else {
        assert_eq!(answers, "done, done");
    }
}

#[test]
fn signals_reach_own_threads_and_not_the_parent() {
    let said = said(&attempt("landlock threads"));
    let (abi, answers) = said.split_once(' ').unwrap();
    if abi.parse::<u32>().unwrap() >= 6 {
        assert_eq!(answers, format!("0 {}", -libc::EPERM));
    } else {
        assert_eq!(answers, "0 0");
    }
}

/// A device process from exec to its last byte under the filters that the launcher has and sets:
/// the example program, whose steps are every device's.
#[test]
fn a_device_runs_under_the_launchers_filters() {
    for engine in ["uring", "plain"] {
        let output = run_device(engine);
        let errors = String::from_utf8_lossy(&output.stderr);
        if engine == "uring" && errors.contains("io_uring:") {
            // A host without io_uring: the plain engine serves.
            continue;
        }
        assert!(output.status.success(), "{engine}: {output:?}");
        let file = std::fs::read("Cargo.toml").unwrap();
        let expected = &file[..file.len().min(4096)];
        assert_eq!(output.stdout, [expected, expected].concat(), "{engine}");
        assert!(errors.contains("seccomp bulkhead-blk"), "{errors}");
    }
}

fn run_device(engine: &str) -> Output {
    const DISK: i32 = 100;
    const BINARY: i32 = 101;
    let binary = std::fs::File::open(example("device")).unwrap();
    let disk = std::fs::File::open("Cargo.toml").unwrap();
    let (disk_fd, binary_fd) = (disk.as_raw_fd(), binary.as_raw_fd());
    let arguments = [
        c"device".to_owned(),
        CString::new(engine).unwrap(),
        c"100".to_owned(),
    ];
    let mut command = Command::new("never executed");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = move || {
        let mut argv = [std::ptr::null(); 4];
        for (place, argument) in argv.iter_mut().zip(&arguments) {
            *place = argument.as_ptr();
        }
        let environment = [std::ptr::null::<libc::c_char>()];
        let failed = |_| Error::last_os_error();
        for (from, to, flags) in [(disk_fd, DISK, 0), (binary_fd, BINARY, libc::O_CLOEXEC)] {
            // SAFETY: dup3(2) takes integers.
            if unsafe { libc::dup3(from, to, flags) } < 0 {
                return Err(Error::last_os_error());
            }
        }
        privileges::no_new_privs().map_err(|e| e.source)?;
        filter::apply_filter_this_thread(&policy::BULKHEAD_LAUNCHER).map_err(failed)?;
        filter::apply_filter_this_thread(&policy::DEVICE_OUTER).map_err(failed)?;
        // SAFETY: both arrays end with NULL and hold strings that live until the exec.
        unsafe {
            libc::execveat(
                BINARY,
                c"".as_ptr(),
                argv.as_ptr().cast(),
                environment.as_ptr().cast(),
                libc::AT_EMPTY_PATH,
            )
        };
        Err(Error::last_os_error())
    };
    // SAFETY: between fork and exec only system calls are made, none of which allocates.
    unsafe { command.pre_exec(child) };
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"xy").unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn steady_state_is_small() {
    let count = |policy: &Policy| policy.syscalls(Stage::Steady).unwrap().len();
    assert!(count(&policy::BULKHEAD_BLK) <= 16);
    assert!(count(&policy::BULKHEAD_BLK_ERASE) <= 16);
    assert!(count(&policy::BULKHEAD_BLK_PLAIN) <= 16);
    for net in [
        &policy::BULKHEAD_NET,
        &policy::BULKHEAD_NET_PLAIN,
        &policy::BULKHEAD_NET_VHOST,
    ] {
        assert!(count(net) <= 12, "{}: {}", net.name, count(net));
    }
    assert!(count(&policy::BULKHEAD_BLK_IMAGE) <= 16);
}
