//! From root inside a process's namespaces to another VM: a process of the host's root enters what
//! namespaces a process of a VM's has of its own. Where that has a user namespace, it has every
//! capability over them there; where it has none (the VMM), it becomes that process's user and has none
//! at all. Then it tries to reach what belongs to another tenant.
#![allow(unsafe_code)] // setns(2), and what a process does that has entered.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, PipeWriter, Read, Write};
use std::net::{SocketAddr as Address, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use bulkhead_tests::vmm::Scratch;

type Results = Vec<(String, Result<String, String>)>;

/// Namespaces that are entered, the one first that gives the right to enter the others. That of
/// processes is for children only, and comes last.
const KINDS: [&str; 6] = ["user", "mnt", "net", "ipc", "uts", "cgroup"];

/// What belongs to the other tenant, and to the host.
struct Targets {
    secret: String,
    socket: String,
    pids: Vec<i64>,
    /// Files of its cgroup, from that file system's root.
    cgroup: Vec<CString>,
    name: SocketAddr,
    loopback: Address,
}

/// Where the attempts are made.
struct Place {
    namespaces: Vec<File>,
    processes: Option<File>,
    own: Vec<&'static str>,
    uid: u32,
    gid: u32,
}

/// Every attempt from inside the namespaces of each of `processes`, which were started in the network
/// namespace that `net` names. `socket` and `pids` are another VM's.
pub fn tests(
    scratch: &Scratch,
    processes: &[(String, i64)],
    net: &str,
    socket: &str,
    pids: &[i64],
) -> Results {
    let mut results = Vec::new();
    for (kind, pid) in processes {
        let name = format!("from inside the namespaces of {kind}");
        match attempts(scratch, *pid, net, socket, pids) {
            Ok(lines) => {
                for (what, answer) in lines {
                    let result = match answer {
                        Some(error) => Ok(error),
                        None => Err("NOT BLOCKED".to_owned()),
                    };
                    results.push((format!("{name}: {what}"), result));
                }
            }
            Err(why) => results.push((name, Err(why))),
        }
    }
    results
}

impl Place {
    fn new(pid: i64, net: &str) -> Result<Self, String> {
        let link = |path: &str| std::fs::read_link(path).map_err(|e| format!("{path}: {e}"));
        let open = |path: &str| File::open(path).map_err(|e| format!("{path}: {e}"));
        let (mut namespaces, mut own) = (Vec::new(), Vec::new());
        for kind in KINDS {
            let path = format!("/proc/{pid}/ns/{kind}");
            let same = match kind {
                "net" => inode(&path)? == inode(net)?,
                _ => link(&path)? == link(&format!("/proc/self/ns/{kind}"))?,
            };
            if !same {
                namespaces.push(open(&path)?);
                own.push(kind);
            }
        }
        let path = format!("/proc/{pid}/ns/pid");
        let processes = if link(&path)? == link("/proc/self/ns/pid")? {
            None
        } else {
            own.push("pid");
            Some(open(&path)?)
        };
        // passt leaves no id in the user namespace that it makes: who enters it can become nobody.
        let map = format!("/proc/{pid}/uid_map");
        let mapped = std::fs::read_to_string(&map).map_err(|e| format!("{map}: {e}"))?;
        let unmapped = mapped.trim().is_empty();
        if unmapped && own.first() == Some(&"user") {
            own.remove(0);
            namespaces.remove(0);
        }
        let id = |field: &str, map: &str| {
            let status = format!("/proc/{pid}/status");
            let text = std::fs::read_to_string(&status).map_err(|e| format!("{status}: {e}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(field));
            let outside = line.and_then(|ids| ids.split_whitespace().next()?.parse::<u32>().ok());
            let outside = outside.ok_or_else(|| format!("{status}: no {field}"))?;
            if unmapped {
                return Ok(outside);
            }
            let map = format!("/proc/{pid}/{map}");
            let text = std::fs::read_to_string(&map).map_err(|e| format!("{map}: {e}"))?;
            let mut lines = text.lines().filter_map(|line| {
                let mut numbers = line.split_whitespace().map(str::parse::<u32>);
                let (inner, outer) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
                let offset = outside.checked_sub(outer)?;
                (offset < numbers.next()?.ok()?).then(|| inner.checked_add(offset))?
            });
            lines
                .next()
                .ok_or_else(|| format!("{map}: {text:?}, and it is {outside}"))
        };
        Ok(Self {
            namespaces,
            processes,
            own,
            uid: id("Uid:", "uid_map")?,
            gid: id("Gid:", "gid_map")?,
        })
    }

    fn has(&self, kind: &str) -> bool {
        self.own.contains(&kind)
    }

    /// Goes in. Only system calls: this is the child of a process with threads.
    fn enter(&self) -> Result<(), Error> {
        for namespace in &self.namespaces {
            // SAFETY: setns(2) takes integers.
            answer(unsafe { libc::setns(namespace.as_raw_fd(), 0) }.into())?;
        }
        if let Some(processes) = &self.processes {
            // SAFETY: as above.
            answer(unsafe { libc::setns(processes.as_raw_fd(), 0) }.into())?;
        }
        if !self.has("user") {
            // The groups of the host's root.
            // SAFETY: a count of zero reads no memory.
            answer(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) })?;
        }
        // Who the process is. In a user namespace of its own every capability over that stays; of the
        // host's root none does.
        // SAFETY: setresgid(2) and setresuid(2) take integers.
        unsafe {
            answer(libc::syscall(
                libc::SYS_setresgid,
                self.gid,
                self.gid,
                self.gid,
            ))?;
            answer(libc::syscall(
                libc::SYS_setresuid,
                self.uid,
                self.uid,
                self.uid,
            ))
        }
    }
}

/// What moves processes into a VM's cgroup, and what kills those in it.
fn cgroup(pids: &[i64]) -> Result<Vec<CString>, String> {
    let pid = pids.last().ok_or("the other VM has no process")?;
    let path = format!("/proc/{pid}/cgroup");
    let groups = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.unwrap_or_default();
    ["cgroup.procs", "cgroup.kill", "memory.max"]
        .map(|file| {
            let relative = format!("{own}/{file}");
            CString::new(relative.trim_start_matches('/')).map_err(|e| e.to_string())
        })
        .into_iter()
        .collect()
}

fn inode(path: &str) -> Result<u64, String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|e| format!("{path}: {e}"))?;
    Ok(metadata.ino())
}

type Line = (String, Option<String>);

fn attempts(
    scratch: &Scratch,
    pid: i64,
    net: &str,
    socket: &str,
    pids: &[i64],
) -> Result<Vec<Line>, String> {
    let text = |e: Error| e.to_string();
    let tcp = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let name = format!("bh-{}", std::process::id());
    let name = SocketAddr::from_abstract_name(name.as_bytes()).map_err(text)?;
    let _listener = UnixListener::bind_addr(&name).map_err(text)?;
    let secret = scratch.file("secret", b"of another tenant")?;
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).map_err(text)?;
    let targets = Targets {
        secret,
        socket: socket.to_owned(),
        pids: pids.to_vec(),
        cgroup: cgroup(pids)?,
        name,
        loopback: tcp.local_addr().map_err(text)?,
    };
    let place = Place::new(pid, net)?;
    let own = match place.own.as_slice() {
        [] => "none of its own: as its user, without a capability".to_owned(),
        own if place.has("user") => format!("{}; as root in there", own.join(", ")),
        own => format!("{}; as its user, without a capability", own.join(", ")),
    };
    let mut lines = vec![("which are".to_owned(), Some(own))];
    // Its output is the only way out of there, made before it goes in.
    let (mut results, told) = std::io::pipe().map_err(text)?;
    let mut told = Some(told);
    let mut command = Command::new("/nothing/is/executed");
    let enter = move || {
        place.enter()?;
        match told.take() {
            // Who enters a namespace of processes has not entered it: its children have.
            Some(told) => match place.processes {
                Some(_) => in_a_child(|| try_all(&place, &targets, told)),
                None => try_all(&place, &targets, told),
            },
            None => Ok(()),
        }
    };
    // SAFETY: the parent's other threads only read pipes; glibc's malloc works after fork.
    unsafe { command.pre_exec(enter) };
    // It ends with an error, since there is nothing to execute.
    let started = command.spawn();
    drop(command);
    let mut all = String::new();
    results.read_to_string(&mut all).map_err(text)?;
    let told = all.lines().filter_map(|line| line.split_once('\t'));
    lines.extend(told.map(|(what, error)| {
        (
            what.to_owned(),
            (!error.is_empty()).then(|| error.to_owned()),
        )
    }));
    match (lines.iter().any(|(what, _)| what == LAST), started) {
        (false, Err(error)) => Err(format!("entering the namespaces: {error}; {all}")),
        (false, Ok(_)) => Err(format!("not all was heard from inside: {all}")),
        (true, _) => Ok(lines),
    }
}

/// What is tried last: all before it has been.
const LAST: &str = "open another VM's memory";

fn try_all(place: &Place, targets: &Targets, mut told: PipeWriter) -> Result<(), Error> {
    let mut tell = |what: &str, answer: Result<(), Error>| {
        let line = match answer {
            Ok(()) => format!("{what}\t\n"),
            Err(error) => format!("{what}\t{error}\n"),
        };
        told.write_all(line.as_bytes())
    };
    if place.has("mnt") {
        let listed = std::fs::read_dir("/").map(Iterator::count);
        tell(
            "the root directory holds nothing",
            match listed {
                Ok(0) => Err(Error::other("empty")),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            },
        )?;
    }
    tell(
        "read another tenant's file",
        File::open(&targets.secret).map(drop),
    )?;
    tell(
        "connect to another VM's API",
        UnixStream::connect(&targets.socket).map(drop),
    )?;
    if place.has("net") {
        tell(
            "connect to an abstract socket of the host",
            UnixStream::connect_addr(&targets.name).map(drop),
        )?;
        tell(
            "connect to the host's loopback",
            TcpStream::connect(targets.loopback).map(drop),
        )?;
    }
    tell("mount /proc", mount(c"proc").map(drop))?;
    tell("mount sysfs", mount(c"sysfs").map(drop))?;
    for file in &targets.cgroup {
        tell("write to another VM's cgroup", other_cgroup(file))?;
    }
    for file in OWN_LIMITS {
        let what = format!("write {} of its own cgroup", file.to_string_lossy());
        tell(&what, other_cgroup(file))?;
    }
    tell("make a device node", node())?;
    if place.processes.is_some() {
        tell("mount its own /proc", mount(c"proc").map(drop))?;
    }
    for pid in &targets.pids {
        let pid = i32::try_from(*pid).unwrap_or(i32::MAX);
        tell(
            "signal another VM's process",
            // SAFETY: signal 0 is sent to nobody; the call touches no memory of this process.
            answer(unsafe { libc::kill(pid, 0) }.into()),
        )?;
        // SAFETY: PTRACE_SEIZE takes no addresses of ours.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
        tell("trace another VM's process", answer(seized))?;
        // SAFETY: the call takes integers and null.
        let limit = unsafe {
            libc::syscall(
                libc::SYS_prlimit64,
                pid,
                libc::RLIMIT_NOFILE,
                std::ptr::null::<u64>(),
                std::ptr::null::<u64>(),
            )
        };
        tell("a limit of another VM's process", answer(limit))?;
        let path = CString::new(format!("/proc/{pid}/mem")).unwrap_or_default();
        // SAFETY: the path is a C string that lives across the call.
        let opened = unsafe { libc::open(path.as_ptr(), libc::O_RDWR) };
        tell(LAST, answer(opened.into()))?;
    }
    Ok(())
}

fn answer(result: libc::c_long) -> Result<(), Error> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A file system of that kind, mounted nowhere: the process whose namespaces these are is to stay
/// as it is.
fn mount(kind: &CStr) -> Result<OwnedFd, Error> {
    const FSCONFIG_CMD_CREATE: libc::c_long = 6;
    let own = |fd: libc::c_long| {
        answer(fd)?;
        let fd = i32::try_from(fd).map_err(Error::other)?;
        // SAFETY: the kernel has just made it for this process.
        Ok::<_, Error>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: the name is a C string that lives across the call; the others take integers and null.
    unsafe {
        let context = own(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 0))?;
        let number = context.as_raw_fd();
        answer(libc::syscall(
            libc::SYS_fsconfig,
            number,
            FSCONFIG_CMD_CREATE,
            std::ptr::null::<u8>(),
            std::ptr::null::<u8>(),
            0,
        ))?;
        own(libc::syscall(libc::SYS_fsmount, number, 0, 0))
    }
}

/// What would lift the limits of its own cgroup, or take it out of there.
const OWN_LIMITS: [&CStr; 5] = [
    c"memory.max",
    c"pids.max",
    c"cpu.max",
    c"cgroup.procs",
    c"cgroup.subtree_control",
];

/// Another VM's cgroup in a cgroup file system of its own. That there is one is no harm: it begins
/// at the process's own group, if that has one.
fn other_cgroup(place: &CStr) -> Result<(), Error> {
    let root = mount(c"cgroup2")?;
    // SAFETY: the path is a C string that lives across the call.
    let opened = unsafe { libc::openat(root.as_raw_fd(), place.as_ptr(), libc::O_WRONLY) };
    answer(opened.into())
}

/// Does it in a child, which is in the namespace of processes that was entered.
fn in_a_child(run: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    // SAFETY: this process has one thread, itself the child of one that had more (see `attempts`).
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = match run() {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        // SAFETY: it ends at once.
        unsafe { libc::_exit(status) }
    }
    answer(child.into())?;
    let mut status = 0;
    // SAFETY: waitpid(2) writes one int, and `status` is one.
    answer(unsafe { libc::waitpid(child, &raw mut status, 0) }.into())?;
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok(()),
        errno => Err(Error::from_raw_os_error(errno)),
    }
}

/// The host's memory, as a device node.
fn node() -> Result<(), Error> {
    // SAFETY: the path is a C literal.
    answer(
        unsafe { libc::mknod(c"/mem".as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) }.into(),
    )
}
