//! One attempt to get out of confinement: `attempt KIND WHAT` confines itself as KIND says, tries
//! WHAT and prints the answer, if it lives to. `tests/confinement.rs` runs it; by hand it shows
//! what a policy does to a call.
#![allow(unsafe_code)] // Forbidden system calls, made bare.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test's other half.

use bulkhead_seccomp::confine::{self, Confinement};
use bulkhead_seccomp::policy::{self, Policy};
use bulkhead_seccomp::privileges::{self, Rlimits};
use bulkhead_seccomp::{filter, landlock_empty, notify};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Command;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, what] = arguments.as_slice() else {
        panic!("usage: attempt KIND WHAT");
    };
    let answer = match (kind.as_str(), what.as_str()) {
        ("call", call) => confined_call(&policy::BULKHEAD_BLK, call),
        ("watched", call) => {
            let _confined = lock_down().seal_watched(&policy::BULKHEAD_BLK).unwrap();
            call_by_name(call).to_string()
        }
        ("unsealed", call) => {
            // A program that does not confine itself; it may want a listener of its own.
            privileges::no_new_privs().unwrap();
            if call == "listener" {
                match notify::apply_filter_with_listener(&policy::BULKHEAD_BLK) {
                    Ok(_) => "a listener".to_owned(),
                    Err(_) => "no listener".to_owned(),
                }
            } else {
                call_by_name(call).to_string()
            }
        }
        ("socket-mode", call) => confined_call(&policy::BULKHEAD_BLK_SOCKET, call),
        ("vmm", call) => confined_call(&policy::BULKHEAD_VMM, call),
        ("vmm-setup", call) => {
            let _confined = lock_down().seal_for_setup(&policy::BULKHEAD_VMM).unwrap();
            call_by_name(call).to_string()
        }
        ("vmm-narrowed", call) => {
            let confined = lock_down().seal_for_setup(&policy::BULKHEAD_VMM).unwrap();
            confined.narrow().unwrap();
            call_by_name(call).to_string()
        }
        ("vcpu", call) => {
            // Stacked, as in the VMM.
            let _confined = lock_down().seal_for_setup(&policy::BULKHEAD_VMM).unwrap();
            let call = call.to_owned();
            let vcpu = move || {
                filter::apply_filter_this_thread(&policy::BULKHEAD_VCPU).unwrap();
                call_by_name(&call).to_string()
            };
            std::thread::spawn(vcpu).join().unwrap()
        }
        ("vmm-threads", count) => threads_that_allocate(count.parse().unwrap()),
        ("other-thread", call) => call_on_another_thread(call),
        ("landlock", "paths") => landlock_paths(),
        ("landlock", "network") => landlock_network(),
        ("landlock", "threads") => landlock_threads(),
        ("landlock-level", level) => landlock_level(level.parse().unwrap()),
        ("privileges", "status") => dropped_status(),
        ("privileges", "limits") => limits(),
        _ => panic!("unknown attempt {kind} {what}"),
    };
    let mut output = std::io::stdout();
    output.write_all(answer.as_bytes()).unwrap();
    output.flush().unwrap();
    confine::exit(0);
}

fn lock_down() -> confine::LockedDown {
    Confinement::new(Rlimits::new()).lock_down().unwrap()
}

fn confined_call(policy: &'static Policy, call: &str) -> String {
    let confined = lock_down().seal(policy).unwrap();
    assert_eq!(confined.report().policy, policy.name);
    call_by_name(call).to_string()
}

/// As many threads as a large machine has vCPUs, all of them in malloc at once.
fn threads_that_allocate(count: usize) -> String {
    let _confined = lock_down().seal_for_setup(&policy::BULKHEAD_VMM).unwrap();
    let together = std::sync::Barrier::new(count);
    std::thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                let held = std::hint::black_box(vec![1_u8; 4096]);
                together.wait();
                drop(held);
                // Many small blocks, which malloc gives back to the kernel when they are free.
                let blocks: Vec<_> = (0..128).map(|_| vec![1_u8; 64 << 10]).collect();
                drop(std::hint::black_box(blocks));
            });
        }
    });
    format!("{count} threads")
}

fn call_on_another_thread(call: &str) -> String {
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (tell, hear) = std::sync::mpsc::channel();
    let locked = lock_down();
    let call = call.to_owned();
    std::thread::spawn(move || {
        wait.recv().unwrap();
        tell.send(call_by_name(&call)).unwrap();
        std::thread::park();
    });
    let _ = locked.seal(&policy::BULKHEAD_BLK).unwrap();
    go.send(()).unwrap();
    hear.recv().unwrap().to_string()
}

/// Makes a system call; its result, or minus its errno.
fn call(nr: i64, args: [i64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the calls below read strings that live forever, write nothing of ours, and those
    // that would change this process's memory are the ones that must not happen.
    let answer = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if answer < 0 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        answer
    }
}

fn address(of: &'static std::ffi::CStr) -> i64 {
    of.as_ptr() as i64
}

fn call_by_name(name: &str) -> i64 {
    const AT_FDCWD: i64 = libc::AT_FDCWD as i64;
    let exec = i64::from(libc::PROT_EXEC | libc::PROT_READ);
    let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (nr, args) = match name {
        "open" => (libc::SYS_open, [address(c"/etc/passwd"), 0, 0, 0, 0, 0]),
        "openat" => (libc::SYS_openat, [AT_FDCWD, address(c"/"), 0, 0, 0, 0]),
        "openat2" => (libc::SYS_openat2, [AT_FDCWD, address(c"/"), 0, 0, 0, 0]),
        "socket unix" => (libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
        "socket inet" => (libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        "socket netlink" => (libc::SYS_socket, [16, 3, 0, 0, 0, 0]),
        "connect" => (libc::SYS_connect, [0; 6]),
        "execve" => (libc::SYS_execve, [address(c"/bin/true"), 0, 0, 0, 0, 0]),
        "execveat" => (libc::SYS_execveat, [0, address(c""), 0, 0, 0x1000, 0]),
        "fork" => (libc::SYS_fork, [0; 6]),
        "clone" => (libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0, 0, 0]),
        "clone3" => (libc::SYS_clone3, [0; 6]),
        "ptrace" => (libc::SYS_ptrace, [0; 6]),
        "process_vm_readv" => (libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0]),
        "kill" => (libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
        "mount" => (libc::SYS_mount, [0; 6]),
        "unshare" => (libc::SYS_unshare, [0; 6]),
        "setns" => (libc::SYS_setns, [0; 6]),
        "bpf" => (libc::SYS_bpf, [0; 6]),
        "perf_event_open" => (libc::SYS_perf_event_open, [0; 6]),
        "userfaultfd" => (libc::SYS_userfaultfd, [0; 6]),
        "io_uring_setup" => (libc::SYS_io_uring_setup, [0; 6]),
        "io_uring restrictions" => (libc::SYS_io_uring_register, [0, 11, 0, 0, 0, 0]),
        "memfd_create" => (libc::SYS_memfd_create, [address(c"x"), 1, 0, 0, 0, 0]),
        "mmap exec" => (libc::SYS_mmap, [0, 4096, exec, private, -1, 0]),
        "mmap" => (libc::SYS_mmap, [0, 4096, 3, private, -1, 0]),
        "mprotect" => (libc::SYS_mprotect, [0, 0, 1, 0, 0, 0]),
        "mprotect exec" => (libc::SYS_mprotect, [0, 0, exec, 0, 0, 0]),
        "seccomp" => (libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]),
        "ioctl tty" => (libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]),
        "ioctl KVM_CREATE_VM" => (libc::SYS_ioctl, [0, 0xae01, 0, 0, 0, 0]),
        "ioctl KVM_RUN" => (libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0]),
        "fcntl F_SETFL" => (libc::SYS_fcntl, [0, 4, 0, 0, 0, 0]),
        "accept4" => (libc::SYS_accept4, [0, 0, 0, 0o2_000_000, 0, 0]),
        "read" => (libc::SYS_read, [0, 0, 0, 0, 0, 0]),
        "sendmsg" => (libc::SYS_sendmsg, [-1, 0, 0, 0, 0, 0]),
        "recvmsg" => (libc::SYS_recvmsg, [-1, 0, 0, 0, 0, 0]),
        "ppoll" => (libc::SYS_ppoll, [0; 6]),
        "eventfd2" => (libc::SYS_eventfd2, [0; 6]),
        "socketpair" => (libc::SYS_socketpair, [1, 1, 0, 0, 0, 0]),
        "x32 read" => (0x4000_0000, [0; 6]),
        "restart_syscall" => (libc::SYS_restart_syscall, [0; 6]),
        "mremap" => (libc::SYS_mremap, [0; 6]),
        "clock_gettime" => (libc::SYS_clock_gettime, [-1, 0, 0, 0, 0, 0]),
        _ => panic!("unknown call {name}"),
    };
    call(nr, args)
}

fn dropped_status() -> String {
    let status = privileges::drop_capabilities(None).unwrap();
    privileges::no_new_privs().unwrap();
    let root = std::fs::read_to_string("/proc/self/status").unwrap();
    // After this, /proc/self belongs to root; here it may be read still.
    let kept: Vec<&str> = root
        .lines()
        .filter(|l| l.starts_with("Cap") || l.starts_with("NoNewPrivs"))
        .collect();
    format!("{status:?}\n{}", kept.join("\n"))
}

fn limits() -> String {
    Rlimits::new()
        .nofile(20)
        .fsize(1 << 20)
        .memlock(0)
        .address_space(1 << 30)
        .apply()
        .unwrap();
    // A second time, higher: what is lower stays.
    Rlimits::new().nofile(30).apply().unwrap();
    privileges::not_dumpable().unwrap();
    // SAFETY: the option takes no arguments.
    let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE) };
    let mut limits = format!("dumpable {dumpable}");
    for resource in [
        libc::RLIMIT_NOFILE,
        libc::RLIMIT_FSIZE,
        libc::RLIMIT_MEMLOCK,
        libc::RLIMIT_AS,
        libc::RLIMIT_CORE,
    ] {
        let mut now = libc::rlimit {
            rlim_cur: 1,
            rlim_max: 1,
        };
        // SAFETY: getrlimit(2) writes one rlimit structure.
        assert_eq!(unsafe { libc::getrlimit(resource, &raw mut now) }, 0);
        limits += &format!(" {}/{}", now.rlim_cur, now.rlim_max);
    }
    limits
}

fn errno<T>(result: std::io::Result<T>) -> String {
    match result {
        Ok(_) => "done".to_owned(),
        Err(e) => e.kind().to_string(),
    }
}

fn landlock_paths() -> String {
    let directory = std::env::temp_dir();
    let open = std::fs::File::open("/proc/self/status").unwrap();
    let status = landlock_empty::deny_everything().unwrap();
    let tried = [
        errno(std::fs::File::open("/proc/self/status")),
        errno(std::fs::File::open("/dev/null")),
        errno(std::fs::read_dir("/")),
        errno(std::fs::write(directory.join("bulkhead-landlock"), "x")),
        errno(std::fs::create_dir(directory.join("bulkhead-landlock"))),
        errno(Command::new("/proc/self/exe").spawn()),
    ];
    // What was open stays open.
    let kept = call(
        libc::SYS_lseek,
        [i64::from(open.as_raw_fd()), 0, 0, 0, 0, 0],
    );
    format!("{} {} {kept}", status.abi, tried.join(", "))
}

/// What a kernel whose Landlock ends at that level leaves open.
fn landlock_level(level: u32) -> String {
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    let file = std::env::temp_dir().join(format!("bulkhead-level-{}", std::process::id()));
    std::fs::write(&file, "text").unwrap();
    let path = std::ffi::CString::new(file.as_os_str().as_encoded_bytes()).unwrap();
    let name = SocketAddr::from_abstract_name(format!("bh-level-{}", std::process::id())).unwrap();
    // A socket of one's own domain can be reached: this one is made before.
    let _listener = UnixListener::bind_addr(&name).unwrap();
    let status = landlock_empty::deny_what_is_known_to(level).unwrap();
    // SAFETY: the path is a C string that lives across the call.
    let truncated = unsafe { libc::truncate(path.as_ptr(), 1) };
    // SAFETY: it takes nothing and cannot fail.
    let parent = i64::from(unsafe { libc::getppid() });
    format!(
        "{} open:{} truncate:{truncated} bind:{} abstract:{} signal:{}",
        status.abi,
        errno(std::fs::File::open(&file)),
        errno(TcpListener::bind("127.0.0.1:0")),
        errno(UnixStream::connect_addr(&name)),
        call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
    )
}

fn landlock_network() -> String {
    use std::net::{TcpListener, TcpStream};
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = open.local_addr().unwrap();
    let status = landlock_empty::deny_everything().unwrap();
    format!(
        "{} {}, {}",
        status.abi,
        errno(TcpStream::connect(address)),
        errno(TcpListener::bind("127.0.0.1:0"))
    )
}

fn landlock_threads() -> String {
    let status = landlock_empty::deny_everything().unwrap();
    let (tell, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: it takes nothing and cannot fail.
        tell.send(unsafe { libc::gettid() }).unwrap();
        std::thread::park();
    });
    let pid = i64::from(std::process::id());
    let thread = i64::from(hear.recv().unwrap());
    // SAFETY: it takes nothing and cannot fail.
    let parent = i64::from(unsafe { libc::getppid() });
    format!(
        "{} {} {}",
        status.abi,
        call(libc::SYS_tgkill, [pid, thread, 0, 0, 0, 0]),
        call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
    )
}
