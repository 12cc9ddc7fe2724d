//! From root inside a device's namespaces to another VM: a process of the host's root enters the user,
//! mount, network, IPC and host name namespaces of a device process, where it has every
//! capability over them, and tries to reach what belongs to another tenant.
#![allow(unsafe_code)] // setns(2), and what a process does that has entered.

use std::ffi::CString;
use std::io::{Error, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use bulkhead_tests::vmm::Scratch;

type Results = Vec<(String, Result<String, String>)>;

/// Every attempt from inside the namespaces of the process `device`. `socket` and `pids` are another
/// VM's.
pub fn tests(scratch: &Scratch, device: i64, socket: &str, pids: &[i64]) -> Results {
    let name = "from root in a device's namespaces";
    match attempts(scratch, device, socket, pids) {
        Ok(lines) => lines
            .into_iter()
            .map(|(what, answer)| {
                let result = match answer {
                    Some(error) => Ok(error),
                    None => Err("NOT BLOCKED".to_owned()),
                };
                (format!("{name}: {what}"), result)
            })
            .collect(),
        Err(why) => vec![(name.to_owned(), Err(why))],
    }
}

fn attempts(
    scratch: &Scratch,
    device: i64,
    socket: &str,
    pids: &[i64],
) -> Result<Vec<(String, Option<String>)>, String> {
    let tcp = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    let address = tcp.local_addr().map_err(|e| e.to_string())?;
    let abstract_name = format!("bh-{}", std::process::id());
    let abstract_address =
        SocketAddr::from_abstract_name(abstract_name.as_bytes()).map_err(|e| e.to_string())?;
    let _listener = UnixListener::bind_addr(&abstract_address).map_err(|e| e.to_string())?;
    let secret = scratch.file("secret", b"of another tenant")?;
    let socket = socket.to_owned();
    let pids = pids.to_vec();
    // Its output is the only way out of there, made before it goes in.
    let (mut results, told) = std::io::pipe().map_err(|e| e.to_string())?;
    let mut told = Some(told);
    let namespaces: Vec<_> = ["user", "mnt", "net", "ipc", "uts"]
        .into_iter()
        .map(|kind| {
            let path = format!("/proc/{device}/ns/{kind}");
            std::fs::File::open(&path).map_err(|e| format!("{path}: {e}"))
        })
        .collect::<Result<_, _>>()?;
    let mut command = Command::new("/nothing/is/executed");
    let enter = move || {
        use std::os::fd::AsRawFd;
        for namespace in &namespaces {
            // SAFETY: setns(2) takes integers.
            if unsafe { libc::setns(namespace.as_raw_fd(), 0) } != 0 {
                return Err(Error::last_os_error());
            }
        }
        // The id that a device has there. Every capability over the namespaces stays.
        // SAFETY: setresuid(2) and setresgid(2) take integers.
        let become_device = unsafe {
            libc::syscall(libc::SYS_setresgid, 1000, 1000, 1000)
                | libc::syscall(libc::SYS_setresuid, 1000, 1000, 1000)
        };
        answer(become_device)?;
        let Some(mut told) = told.take() else {
            return Ok(());
        };
        let mut tell = |what: &str, answer: Result<(), Error>| {
            let line = match answer {
                Ok(()) => format!("{what}\t\n"),
                Err(error) => format!("{what}\t{error}\n"),
            };
            told.write_all(line.as_bytes())
        };
        let listed = std::fs::read_dir("/").map(Iterator::count);
        tell(
            "the root directory holds nothing",
            match listed {
                Ok(0) => Err(Error::other("empty")),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            },
        )?;
        tell(
            "read another tenant's file",
            std::fs::File::open(&secret).map(drop),
        )?;
        tell(
            "connect to another VM's API",
            UnixStream::connect(&socket).map(drop),
        )?;
        tell(
            "connect to an abstract socket of the host",
            UnixStream::connect_addr(&abstract_address).map(drop),
        )?;
        tell(
            "connect to the host's loopback",
            TcpStream::connect(address).map(drop),
        )?;
        tell("mount /proc", mount(c"proc"))?;
        tell("mount sysfs", mount(c"sysfs"))?;
        tell("mount the cgroup file system", mount(c"cgroup2"))?;
        tell("make a device node", node())?;
        for pid in &pids {
            let pid = i32::try_from(*pid).unwrap_or(i32::MAX);
            tell(
                "signal another VM's process",
                // SAFETY: signal 0 is sent to nobody; the call touches no memory of this process.
                answer(unsafe { libc::kill(pid, 0) }.into()),
            )?;
            // SAFETY: PTRACE_SEIZE takes no addresses of ours.
            let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
            tell("trace another VM's process", answer(seized))?;
            let path = CString::new(format!("/proc/{pid}/mem")).unwrap_or_default();
            // SAFETY: the path is a C string that lives across the call.
            let opened = unsafe { libc::open(path.as_ptr(), libc::O_RDWR) };
            tell("open another VM's memory", answer(opened.into()))?;
        }
        Ok(())
    };
    // SAFETY: the parent's other threads only read pipes; glibc's malloc works after fork.
    unsafe { command.pre_exec(enter) };
    // It ends with an error, since there is nothing to execute.
    let started = command.spawn();
    drop(command);
    let mut text = String::new();
    results
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    let lines: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(what, error)| {
            (
                what.to_owned(),
                (!error.is_empty()).then(|| error.to_owned()),
            )
        })
        .collect();
    match (lines.is_empty(), started) {
        (true, Err(error)) => Err(format!("entering the namespaces: {error}")),
        (true, Ok(_)) => Err("nothing was heard from inside".to_owned()),
        (false, _) => Ok(lines),
    }
}

fn answer(result: libc::c_long) -> Result<(), Error> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}

fn mount(kind: &std::ffi::CStr) -> Result<(), Error> {
    // SAFETY: all strings are C strings that live across the call; there is no data.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            c"/".as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    answer(result.into())
}

/// The host's memory, as a device node.
fn node() -> Result<(), Error> {
    // SAFETY: the path is a C literal.
    answer(
        unsafe { libc::mknod(c"/mem".as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) }.into(),
    )
}
