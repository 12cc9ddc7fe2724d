//! The hostile build of a device process (feature `hostile`, never shipped): once it is confined
//! and serves, it tries what a device that an attacker has taken over would try.
//!
//! Which attempt a process makes is told by its arguments (`serial=hostile-N` of a disk, the MAC
//! address 02:b0:b0:b0:b0:N of a network device, N and one times 128 MiB of memory, or of an entropy
//! device's burst, the guest's address 1000000N of a socket device), since most end it. It is made once, on the main thread, when the VMM asks for its
//! statistics the first time; what it came to is a log line `hostile: NAME: …`, unless it came to an
//! end.
#![allow(unsafe_code)] // Calls that must not work are made bare.

use std::io::Error;
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What one attempt is.
struct Attempt {
    name: String,
    /// The system call at which the process is stopped, unless that fails.
    call: &'static str,
    run: Box<dyn Fn() -> Outcome + Send + Sync>,
}

/// What became of it, if the process still is.
enum Outcome {
    /// The kernel's answer.
    Answer(libc::c_long),
    /// It was allowed, and is the VMM's to bear.
    Sent(usize),
}

static CHOSEN: OnceLock<Attempt> = OnceLock::new();
static STRUCK: AtomicBool = AtomicBool::new(false);

/// Prints the attempts, one a line: number, name and call, and is true, if the only argument is
/// `--attempts`.
pub fn listed() -> bool {
    let wanted = std::env::args().nth(1).as_deref() == Some("--attempts");
    if wanted {
        for (number, attempt) in attempts().iter().enumerate() {
            println!("{number}\t{}\t{}", attempt.name, attempt.call);
        }
    }
    wanted
}

/// Takes note of the attempt that the arguments ask for. Called before confinement.
pub(crate) fn choose() {
    let number = std::env::args().find_map(|argument| {
        let digits = |text: &str| -> Option<usize> {
            let end = text
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(text.len());
            text.get(..end)?.parse().ok()
        };
        if let Some((_, rest)) = argument.split_once("hostile-") {
            return digits(rest);
        }
        if let Some(octet) = argument.strip_prefix("02:b0:b0:b0:b0:") {
            return usize::from_str_radix(octet, 16).ok();
        }
        // --cid N
        if let Some(number) = argument.strip_prefix("1000000") {
            return number.parse().ok();
        }
        // --area START:SIZE, --bps N:BURST
        let (start, size) = argument.split_once(':')?;
        let _: u64 = start.parse().ok()?;
        let size: usize = size.parse().ok()?;
        (size >> 27).checked_sub(1)
    });
    if let Some(attempt) = number.and_then(|number| attempts().into_iter().nth(number)) {
        let _ = CHOSEN.set(attempt);
    }
}

/// Makes the attempt, once.
pub(crate) fn strike() {
    let Some(attempt) = CHOSEN.get() else {
        return;
    };
    if STRUCK.swap(true, Ordering::Relaxed) {
        return;
    }
    let name = &attempt.name;
    match (attempt.run)() {
        Outcome::Answer(answer) if answer < 0 => {
            let error = Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(0));
            log::warn!("hostile: {name}: refused: {error}");
        }
        Outcome::Answer(answer) => log::error!("hostile: {name}: SUCCEEDED: {answer:#x}"),
        Outcome::Sent(count) => log::warn!("hostile: {name}: sent {count}"),
    }
}

type Arguments = [libc::c_long; 6];

/// The answer, or minus the errno.
fn raw(nr: libc::c_long, [a, b, c, d, e, f]: Arguments) -> libc::c_long {
    // SAFETY: pointers among the arguments of the calls below point to what lives forever; those
    // that would change this process's memory must not succeed, and it ends if one does.
    let answer = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if answer < 0 {
        -libc::c_long::from(Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    } else {
        answer
    }
}

fn text(of: &'static std::ffi::CStr) -> libc::c_long {
    of.as_ptr() as libc::c_long
}

fn call(name: impl Into<String>, call: &'static str, nr: libc::c_long, args: Arguments) -> Attempt {
    Attempt {
        name: name.into(),
        call,
        run: Box::new(move || Outcome::Answer(raw(nr, args))),
    }
}

/// What is needed where a structure is read: no attempt gets so far.
static ZEROES: [u64; 16] = [0; 16];

fn zeroes() -> libc::c_long {
    ZEROES.as_ptr() as libc::c_long
}

/// `struct open_how`, for any file.
static OPEN_HOW: [u64; 3] = [0; 3];
/// `struct io_uring_params`, all zero.
static mut RING_PARAMS: [u64; 32] = [0; 32];

fn attempts() -> Vec<Attempt> {
    let mut all = files();
    all.extend(sockets());
    all.extend(processes());
    all.extend(kernel());
    all.extend(memory());
    all.extend(descriptors());
    all
}

/// Files: by path, by descriptor, of /proc, /sys and another VM.
fn files() -> Vec<Attempt> {
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
            [CWD, text(c"/sys/fs/cgroup/cgroup.procs"), 1, 0, 0, 0],
        ),
        call(
            "mkdir in the cgroup file system",
            "mkdir",
            libc::SYS_mkdir,
            [text(c"/sys/fs/cgroup/x"), 0o700, 0, 0, 0, 0],
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

/// Sockets of each family, and another VM's.
fn sockets() -> Vec<Attempt> {
    // struct sockaddr_un with a path and with an abstract name.
    static PATH: [u8; 25] = *b"\x01\0/run/bulkhead/api.sock\0";
    static ABSTRACT: [u8; 12] = *b"\x01\0\0bulkhead\0";
    let address = |bytes: &'static [u8]| bytes.as_ptr() as libc::c_long;
    let families = [
        ("unix", libc::AF_UNIX, libc::SOCK_STREAM),
        ("inet", libc::AF_INET, libc::SOCK_STREAM),
        ("inet6", libc::AF_INET6, libc::SOCK_DGRAM),
        ("netlink", libc::AF_NETLINK, libc::SOCK_RAW),
        ("packet", libc::AF_PACKET, libc::SOCK_RAW),
        ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM),
        ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET),
        ("xdp", libc::AF_XDP, libc::SOCK_RAW),
        ("key", libc::AF_KEY, libc::SOCK_RAW),
    ];
    let mut all: Vec<_> = families
        .into_iter()
        .map(|(name, family, kind)| {
            let args = [family.into(), kind.into(), 0, 0, 0, 0];
            call(format!("socket {name}"), "socket", libc::SYS_socket, args)
        })
        .collect();
    all.extend([
        call(
            "socketpair",
            "socketpair",
            libc::SYS_socketpair,
            [1, 1, 0, zeroes(), 0, 0],
        ),
        call(
            "connect to another VM's API",
            "connect",
            libc::SYS_connect,
            [3, address(&PATH), 25, 0, 0, 0],
        ),
        call(
            "connect to an abstract socket",
            "connect",
            libc::SYS_connect,
            [4, address(&ABSTRACT), 11, 0, 0, 0],
        ),
        call(
            "bind",
            "bind",
            libc::SYS_bind,
            [3, address(&ABSTRACT), 11, 0, 0, 0],
        ),
        call("listen", "listen", libc::SYS_listen, [3, 1, 0, 0, 0, 0]),
        call("accept4", "accept4", libc::SYS_accept4, [3, 0, 0, 0, 0, 0]),
        call(
            "sendto an address",
            "sendto",
            libc::SYS_sendto,
            [3, zeroes(), 1, 0, address(&PATH), 25],
        ),
    ]);
    all
}

/// Other processes and programs.
fn processes() -> Vec<Attempt> {
    const KILL: libc::c_long = libc::SIGKILL as libc::c_long;
    vec![
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
    ]
}

/// Parts of the kernel that no device needs.
fn kernel() -> Vec<Attempt> {
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
        run: Box::new(|| Outcome::Answer(getpid_of_i386())),
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

/// Memory that is both written and executed.
fn memory() -> Vec<Attempt> {
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

/// What it holds, used as it should not be.
fn descriptors() -> Vec<Attempt> {
    const FIONREAD: libc::c_long = 0x541b;
    const TIOCSTI: libc::c_long = 0x5412;
    const FIBMAP: libc::c_long = 1;
    const BLKDISCARD: libc::c_long = 0x1277;
    const TUNSETIFF: libc::c_long = 0x4004_54ca;
    const VHOST_SET_OWNER: libc::c_long = 0xaf01;
    const KVM_CREATE_VM: libc::c_long = 0xae01;
    let mut all = Vec::new();
    for fd in 0..10 {
        let name = format!("ioctl on descriptor {fd}");
        all.push(call(
            name,
            "ioctl",
            libc::SYS_ioctl,
            [fd, FIONREAD, zeroes(), 0, 0, 0],
        ));
    }
    for (name, command) in [
        ("TIOCSTI", TIOCSTI),
        ("FIBMAP", FIBMAP),
        ("BLKDISCARD", BLKDISCARD),
        ("TUNSETIFF", TUNSETIFF),
        ("VHOST_SET_OWNER", VHOST_SET_OWNER),
        ("KVM_CREATE_VM", KVM_CREATE_VM),
    ] {
        let name = format!("ioctl {name} on its own descriptor");
        all.push(call(
            name,
            "ioctl",
            libc::SYS_ioctl,
            [5, command, zeroes(), 0, 0, 0],
        ));
    }
    all.extend([
        call(
            "fcntl F_SETFL",
            "fcntl",
            libc::SYS_fcntl,
            [3, 4, 0, 0, 0, 0],
        ),
        call(
            "fcntl F_DUPFD",
            "fcntl",
            libc::SYS_fcntl,
            [3, 0, 0, 0, 0, 0],
        ),
        call("dup", "dup", libc::SYS_dup, [3, 0, 0, 0, 0, 0]),
        call("splice", "splice", libc::SYS_splice, [3, 0, 4, 0, 1, 0]),
        call(
            "fchmod of its own file",
            "fchmod",
            libc::SYS_fchmod,
            [5, 0o777, 0, 0, 0, 0],
        ),
        call(
            "setsockopt",
            "setsockopt",
            libc::SYS_setsockopt,
            [3, 1, 16, zeroes(), 4, 0],
        ),
    ]);
    for fd in [3, 4] {
        all.push(Attempt {
            name: format!("flood of descriptors over channel {fd}"),
            call: "sendmsg",
            run: Box::new(move || Outcome::Sent(flood(fd))),
        });
    }
    all
}

/// Sends what it holds to the VMM, many times; how often that went.
fn flood(channel: RawFd) -> usize {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fds: [RawFd; 8],
    }
    let mut byte = [0xff_u8];
    let mut vector = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut control = Control {
        header: libc::cmsghdr {
            cmsg_len: size_of::<Control>(),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        },
        fds: [3, 4, 5, 3, 4, 5, 3, 4],
    };
    let mut sent = 0;
    for _ in 0..1000 {
        // SAFETY: msghdr is plain data, for which all zeroes is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message describes `byte` and `control`, which live across the call.
        if unsafe { libc::sendmsg(channel, &raw const message, flags) } >= 0 {
            sent += 1;
        }
    }
    sent
}
