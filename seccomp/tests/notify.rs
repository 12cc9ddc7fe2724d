//! The launcher's listener around a device: set-up is let through, every forbidden call after it
//! is named and goes no further, and a program that does not confine itself is held by the outer
//! policy and gets no listener of its own. The test plays the launcher; `examples/attempt.rs` is the
//! device.
#![allow(unsafe_code)] // recvmsg(2) with a descriptor; what a child does between fork and exec.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by panicking.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;

use bulkhead_seccomp::notify::{self, Judgement, Report};
use bulkhead_seccomp::{policy, privileges};

fn example(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{}: build the examples too", path.display());
    path
}

/// The calls that were let through, and the one that was not.
#[derive(Debug, Default)]
struct Seen {
    setup: Vec<String>,
    violation: Option<String>,
    sealed: bool,
}

/// Judges as the launcher does, until the process ends or breaks its policy; then it is killed.
fn judge(listener: &OwnedFd) -> Seen {
    let mut seen = Seen::default();
    let kill = |report: &Report| {
        // SAFETY: kill takes integers; the process hangs at its call, so that its pid is its own.
        unsafe { libc::kill(i32::try_from(report.pid).unwrap(), libc::SIGKILL) };
    };
    loop {
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd that outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, 60_000) };
        if poll.revents & libc::POLLIN == 0 {
            return seen;
        }
        let Ok(report) = notify::receive(listener.as_fd()) else {
            continue;
        };
        let name = report.violation().name();
        // std executes by path; a launcher does so by descriptor.
        let exec = name == "execve" && seen.setup.iter().all(|n| n != "execve");
        let judgement = match notify::judge(&policy::DEVICE_OUTER, &report.data) {
            _ if seen.sealed => Judgement::Forbidden,
            _ if exec => Judgement::Proceed,
            judgement => judgement,
        };
        let errno = match judgement {
            Judgement::Proceed => None,
            Judgement::Fail(errno) => Some(errno),
            Judgement::Forbidden => {
                seen.violation.get_or_insert(name);
                kill(&report);
                continue;
            }
        };
        seen.sealed |= report.seals();
        seen.setup.push(name);
        notify::answer(listener.as_fd(), &report, errno).unwrap();
    }
}

/// Runs `attempt KIND CALL` under a filter whose listener a thread of ours holds.
fn run(kind: &str, call: &str) -> (Output, Seen) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let judge = thread::spawn(move || {
        let listener = take_descriptor(&File::from(OwnedFd::from(ours)));
        judge(&listener)
    });
    let mut command = Command::new(example("attempt"));
    command
        .args([kind, call])
        .env("BULKHEAD_WATCHED", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let socket = theirs.as_raw_fd();
    // SAFETY: the closure makes system calls and allocates a little, in a child of one thread
    // whose C library's fork handlers have put malloc in order.
    unsafe {
        command.pre_exec(move || {
            privileges::no_new_privs().map_err(std::io::Error::other)?;
            let listener = notify::apply_filter_with_listener(&policy::BULKHEAD_BLK)
                .map_err(std::io::Error::other)?;
            give_descriptor(socket, &listener)
        });
    }
    let child = command.spawn().unwrap();
    drop(theirs);
    let output = child.wait_with_output().unwrap();
    (output, judge.join().unwrap())
}

fn give_descriptor(socket: RawFd, fd: &OwnedFd) -> std::io::Result<()> {
    let mut control = [0u64; 4];
    let mut part = libc::iovec {
        iov_base: c"x".as_ptr().cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: `control` has room for one aligned item with one descriptor; all outlives the call.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(4) as _;
        let item = libc::CMSG_FIRSTHDR(&raw const header);
        (*item).cmsg_level = libc::SOL_SOCKET;
        (*item).cmsg_type = libc::SCM_RIGHTS;
        (*item).cmsg_len = libc::CMSG_LEN(4) as _;
        std::ptr::write_unaligned(libc::CMSG_DATA(item).cast(), fd.as_raw_fd());
        libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL)
    };
    if sent == 1 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

fn take_descriptor(socket: &File) -> OwnedFd {
    let mut byte = [0u8; 1];
    let mut control = [0u64; 4];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: iovec and control describe live memory of the lengths told; the one descriptor
    // that arrives is new and ours.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        let got = libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC);
        assert_eq!(got, 1, "{}", std::io::Error::last_os_error());
        let item = libc::CMSG_FIRSTHDR(&raw const header);
        assert!(!item.is_null(), "no descriptor came");
        OwnedFd::from_raw_fd(std::ptr::read_unaligned(libc::CMSG_DATA(item).cast()))
    }
}

#[test]
fn every_forbidden_call_is_named_and_goes_no_further() {
    for (call, name) in [
        ("open", "open"),
        ("openat", "openat"),
        ("openat2", "openat2"),
        ("socket unix", "socket"),
        ("socket inet", "socket"),
        ("connect", "connect"),
        ("execve", "execve"),
        ("execveat", "execveat"),
        ("fork", "fork"),
        ("clone", "clone"),
        ("ptrace", "ptrace"),
        ("process_vm_readv", "process_vm_readv"),
        ("kill", "kill"),
        ("mount", "mount"),
        ("unshare", "unshare"),
        ("setns", "setns"),
        ("bpf", "bpf"),
        ("perf_event_open", "perf_event_open"),
        ("userfaultfd", "userfaultfd"),
        ("io_uring_setup", "io_uring_setup"),
        ("memfd_create", "memfd_create"),
        ("mmap exec", "mmap"),
        ("mprotect exec", "mprotect"),
        ("seccomp", "seccomp"),
        ("ioctl KVM_RUN", "ioctl"),
    ] {
        let (output, seen) = run("watched", call);
        assert!(seen.sealed, "{call}: {seen:?} {output:?}");
        assert_eq!(seen.violation.as_deref(), Some(name), "{call}");
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{call}");
        assert!(output.stdout.is_empty(), "{call}: it had an answer");
    }
}

#[test]
fn an_honest_process_is_let_through() {
    let (output, seen) = run("watched", "mmap");
    assert!(output.status.success(), "{output:?} {seen:?}");
    assert_eq!(seen.violation, None);
    assert!(seen.sealed);
    assert!(seen.setup.iter().any(|n| n == "landlock_restrict_self"));
}

#[test]
fn a_program_that_does_not_confine_itself_is_held_by_the_outer_policy() {
    for (call, name) in [
        ("socket inet", "socket"),
        ("mount", "mount"),
        ("ptrace", "ptrace"),
        ("bpf", "bpf"),
        ("unshare", "unshare"),
        ("execve", "execve"),
        ("kill", "kill"),
    ] {
        let (output, seen) = run("unsealed", call);
        assert_eq!(seen.violation.as_deref(), Some(name), "{call}");
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{call}");
    }
}

#[test]
fn nobody_gets_a_listener_of_his_own() {
    // The outer policy forbids the flag; and were it allowed, there is a listener already.
    let (output, seen) = run("unsealed", "listener");
    assert_eq!(seen.violation.as_deref(), Some("seccomp"), "{output:?}");
    let mut said = String::new();
    output.stdout.as_slice().read_to_string(&mut said).unwrap();
    assert!(!said.contains("a listener"), "{said}");
    std::io::stdout().flush().unwrap();
}
