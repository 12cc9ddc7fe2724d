#![allow(unsafe_code)] // A constructor, and raw system calls that are meant to fail.
//! The device of these tests is this program itself, so that no binary need be built beside
//! it: executed by the launcher its argv[0] is "bulkhead-blk", and a constructor (run by the
//! C library before main) then plays the device and never returns.
//!
//! It makes no system call that the outer filter kills, unless that is what is asked for.

use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

type Constructor =
    extern "C" fn(libc::c_int, *const *const libc::c_char, *const *const libc::c_char);

#[used]
#[unsafe(link_section = ".init_array")]
static PROBE: Constructor = probe;

extern "C" fn probe(
    argc: libc::c_int,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) {
    // SAFETY: the C library hands a constructor main's arguments: argc strings, and an
    // environment that ends with null.
    let (args, variables) = unsafe {
        let text =
            |string: *const libc::c_char| CStr::from_ptr(string).to_string_lossy().into_owned();
        let args: Vec<String> = (0..usize::try_from(argc).unwrap_or(0))
            .map(|i| text(*argv.add(i)))
            .collect();
        let variables: Vec<String> = (0..)
            .map(|i| *envp.add(i))
            .take_while(|variable| !variable.is_null())
            .map(text)
            .collect();
        (args, variables)
    };
    if args.first().map(String::as_str) != Some("bulkhead-blk") {
        let value = |name: &str| {
            variables
                .iter()
                .find_map(|v| v.strip_prefix(name)?.strip_prefix('='))
        };
        match (value("BULKHEAD_FAKE_VMM"), value("BULKHEAD_FAKE_BED")) {
            (Some("refused-namespaces"), _) => enter_closed_user_namespace(),
            (Some("facts-in-chroot"), Some(bed)) => enter_chroot(&format!("{bed}/root")),
            _ => {}
        }
        return;
    }
    match args.get(1).map(String::as_str) {
        Some("report") => report(&args, variables.len()),
        Some("exit") => exit(args.get(2).and_then(|a| a.parse().ok()).unwrap_or(99)),
        Some("say") => say(),
        // SAFETY: these are to be killed by the filter; should they not be, they take
        // integers and null pointers, which the kernel refuses.
        Some("socket") => unsafe {
            libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0);
        },
        // SAFETY: as above.
        Some("mount") => unsafe {
            libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0);
        },
        // SAFETY: meant to fault: the page at 0 is never mapped.
        Some("fault") => unsafe {
            std::arch::asm!("mov byte ptr [0], 0");
        },
        _ => wait(),
    }
    exit(98)
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process, nothing else.
    unsafe { libc::_exit(status) }
}

/// Not by fcntl, which the policy of block processes answers with an error.
fn is_open(fd: i32) -> bool {
    let mut entry = libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    };
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: one entry and a timeout that live; no signal mask.
    let result = unsafe { libc::ppoll(&raw mut entry, 1, &raw const now, std::ptr::null()) };
    result >= 0 && entry.revents & libc::POLLNVAL == 0
}

/// Until it is killed.
fn wait() -> ! {
    loop {
        let never = AtomicBool::new(true);
        while never.load(Ordering::Relaxed) {
            std::thread::park();
        }
    }
}

/// A file over an inherited number, which is never closed.
fn inherited(number: RawFd) -> std::mem::ManuallyDrop<File> {
    // SAFETY: the launcher gave this number; ManuallyDrop leaves it open.
    std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(number) })
}

fn say() -> ! {
    let mut log = inherited(2);
    let _ = log.write_all(b"hello\x1b[31m there\nlast words");
    exit(0)
}

fn report(args: &[String], variables: usize) -> ! {
    let last = || std::io::Error::last_os_error().to_string();
    let strip = |text: String| {
        text.split(" (os error")
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let mut lines = Vec::new();
    lines.push(format!("pid {}", std::process::id()));
    let open = (0..1024).filter(|fd| is_open(*fd));
    let open: Vec<String> = open.map(|fd| fd.to_string()).collect();
    lines.push(format!("fds {}", open.join(" ")));
    lines.push(format!("args {}", args.join(" ")));
    lines.push(format!("environment {variables}"));
    // SAFETY: these options take integers.
    let bounding =
        (0..41).filter(|cap| unsafe { libc::prctl(libc::PR_CAPBSET_READ, *cap, 0, 0, 0) } == 1);
    lines.push(format!("bounding {}", bounding.count()));
    // SAFETY: as above.
    let securebits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    lines.push(format!("securebits {securebits}"));
    for path in [c"/", c"/proc/self/status"] {
        // SAFETY: the path is a C string.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY) };
        let result = if fd < 0 {
            strip(last())
        } else {
            "opened".into()
        };
        lines.push(format!("open {} {result}", path.to_string_lossy()));
    }
    // SAFETY: a null structure of size zero, which no kernel accepts.
    let cloned = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
    lines.push(format!(
        "clone3 {}",
        if cloned < 0 {
            strip(last())
        } else {
            "cloned".into()
        }
    ));
    lines.push("end\n".into());
    let _ = inherited(3).write_all(lines.join("\n").as_bytes());
    if open.iter().any(|fd| fd == "5") {
        let _ = inherited(5).write_all(b"fd 5\n");
    }
    wait()
}

/// A user namespace, with this user as its root, in which no further one may be made. Here,
/// before main, the process has one thread, as unshare(2) wants it.
fn enter_closed_user_namespace() {
    use std::fs::write;
    // SAFETY: these calls take integers or nothing.
    let (uid, gid, result) = unsafe {
        (
            libc::geteuid(),
            libc::getegid(),
            libc::unshare(libc::CLONE_NEWUSER),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    write("/proc/self/setgroups", "deny").unwrap();
    write("/proc/self/uid_map", format!("0 {uid} 1")).unwrap();
    write("/proc/self/gid_map", format!("0 {gid} 1")).unwrap();
    write("/proc/sys/user/max_user_namespaces", "0").unwrap();
}

/// A chroot into this very file system, seen at `place`.
fn enter_chroot(place: &str) {
    let place = std::ffi::CString::new(place).unwrap();
    let flags = libc::MS_REC | libc::MS_BIND;
    let (from, null) = (c"/".as_ptr(), std::ptr::null());
    // SAFETY: every pointer is to a C string that lives across the calls, or null where
    // mount(2) wants none.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                null,
                from,
                null,
                libc::MS_REC | libc::MS_PRIVATE,
                null.cast(),
            ) == 0
            && libc::mount(from, place.as_ptr(), null, flags, null.cast()) == 0
            && libc::chroot(place.as_ptr()) == 0
            && libc::chdir(from) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}
