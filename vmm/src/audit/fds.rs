//! Open descriptors of a process by kind, from /proc/PID/fd and fdinfo (proc(5)).

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::net::{AddressFamily, sockopt::socket_domain};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::Serialize;

use crate::launcher::printable;

/// Most descriptors that are read of one process.
pub const MAX_FDS: usize = 8192;

/// What a descriptor is. Decided by the inode's type and the kernel's own names of anonymous
/// inodes, never by a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A socket.
    Socket,
    /// A pipe or FIFO.
    Pipe,
    /// A directory.
    Directory,
    /// A regular file of a file system, unlinked or not.
    File,
    /// Memory: a file of the kernel's own, which never had a name (memfd_create(2)).
    Memfd,
    /// A block device.
    Block,
    /// /dev/null.
    Null,
    /// /dev/kvm.
    Kvm,
    /// Another character device.
    Character,
    /// An anonymous inode of the kernel: "eventfd", "io_uring", "kvm-vm" …
    Anonymous(String),
    /// It was closed while it was looked at, or is of no known kind.
    Other,
}

impl Kind {
    /// For the table.
    pub fn label(&self) -> String {
        match self {
            Self::Socket => "socket".into(),
            Self::Pipe => "pipe".into(),
            Self::Directory => "directory".into(),
            Self::File => "file".into(),
            Self::Memfd => "memfd".into(),
            Self::Block => "block device".into(),
            Self::Null => "null".into(),
            Self::Kvm => "kvm".into(),
            Self::Character => "char device".into(),
            Self::Anonymous(name) => name.clone(),
            Self::Other => "other".into(),
        }
    }
}

/// One descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fd {
    /// Its number.
    pub number: i32,
    /// What it is.
    pub kind: Kind,
    /// "r", "w" or "rw"; "path" for O_PATH; empty when unknown.
    pub access: String,
    /// The kernel's name of it, escaped.
    pub target: String,
    /// What the kernel says of it, if it is an io_uring.
    pub ring: Option<Ring>,
    /// Of a socket: "unix", "inet", …; `None` where it may not be asked.
    pub family: Option<String>,
}

/// Device and inode.
pub type Inode = (u64, u64);

/// An io_uring, as its fdinfo shows it. The kernel shows no restrictions: what they do is tried by
/// `cargo test -p bulkhead-seccomp --test uring`, and a device makes no ring without them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ring {
    /// What its registered files are, escaped; "none" for an empty place that older kernels show.
    pub files: Vec<String>,
    /// Registered buffers: guest memory would stay pinned, and reachable when it was taken back.
    pub buffers: u32,
    /// It has a thread of the kernel's that submits.
    pub polled: bool,
}

impl Ring {
    fn parse(info: &str) -> Self {
        let number = |key: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(key)?.trim().parse::<i64>().ok())
        };
        let mut files = Vec::new();
        let listed = info
            .lines()
            .skip_while(|line| !line.starts_with("UserFiles:"))
            .skip(1)
            .take_while(|line| line.starts_with(' '));
        for line in listed {
            if let Some((_, name)) = line.split_once(": ") {
                files.push(printable(name.trim()));
            }
        }
        Self {
            files,
            buffers: u32::try_from(number("UserBufs:").unwrap_or(0)).unwrap_or(u32::MAX),
            polled: number("SqThread:").is_some_and(|thread| thread > 0),
        }
    }
}

/// Reads them all.
pub fn read(pid: i32) -> io::Result<Vec<Fd>> {
    let mut fds = Vec::new();
    let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.take(MAX_FDS) {
        let entry = entry?;
        let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let kind = fs::metadata(entry.path()).map_or(Kind::Other, |m| kind_of(&m, &target));
        let family = match (&kind, &process) {
            (Kind::Socket, Some(process)) => family(process, number),
            _ => None,
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        let is_ring = kind == Kind::Anonymous("io_uring".into());
        fds.push(Fd {
            number,
            kind,
            ring: is_ring.then(|| Ring::parse(&info)),
            access: access(&info),
            target: printable(&target),
            family,
        });
    }
    fds.sort_by_key(|fd| fd.number);
    Ok(fds)
}

/// The devices that the kernel's memory files are on: no file of a file system is there.
pub fn memory_devices() -> &'static [u64] {
    static DEVICES: OnceLock<Vec<u64>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let of = |flags| {
            let file = memfd_create("audit", flags).ok()?;
            fstat(&file).ok().map(|stat| stat.st_dev)
        };
        let huge = MemfdFlags::HUGETLB;
        let kinds = [MemfdFlags::empty(), huge, huge | MemfdFlags::HUGE_2MB];
        kinds.into_iter().filter_map(of).collect()
    })
}

/// The family of a socket of another process, asked of a copy, which is closed at once.
fn family(process: &impl AsFd, number: i32) -> Option<String> {
    let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()?;
    Some(match socket_domain(&socket).ok()? {
        AddressFamily::UNIX => "unix".to_owned(),
        AddressFamily::INET => "inet".to_owned(),
        AddressFamily::INET6 => "inet6".to_owned(),
        AddressFamily::NETLINK => "netlink".to_owned(),
        AddressFamily::PACKET => "packet".to_owned(),
        AddressFamily::VSOCK => "vsock".to_owned(),
        other => other.as_raw().to_string(),
    })
}

/// Device and inode of all memory that a process holds by a descriptor.
pub fn memory(pid: i32) -> io::Result<Vec<Inode>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.take(MAX_FDS);
    let found = entries.flatten().filter_map(|entry| {
        // Its name says that it has none. What lies on a network that does not answer is not asked.
        let name = fs::read_link(entry.path()).ok()?;
        if !name.to_string_lossy().ends_with(" (deleted)") {
            return None;
        }
        let metadata = fs::metadata(entry.path()).ok()?;
        let memory = metadata.is_file() && memory_devices().contains(&metadata.dev());
        memory.then(|| (metadata.dev(), metadata.ino()))
    });
    Ok(found.collect())
}

fn kind_of(metadata: &fs::Metadata, target: &str) -> Kind {
    let kind = metadata.file_type();
    if kind.is_socket() {
        Kind::Socket
    } else if kind.is_fifo() {
        Kind::Pipe
    } else if kind.is_dir() {
        Kind::Directory
    } else if kind.is_block_device() {
        Kind::Block
    } else if kind.is_char_device() {
        // Numbers of Documentation/admin-guide/devices.txt.
        match (metadata.rdev() >> 8, metadata.rdev() & 0xff) {
            (1, 3) => Kind::Null,
            (10, 232) => Kind::Kvm,
            _ => Kind::Character,
        }
    } else if kind.is_file() && target.starts_with('/') {
        if metadata.nlink() == 0 && memory_devices().contains(&metadata.dev()) {
            Kind::Memfd
        } else {
            Kind::File
        }
    } else {
        anonymous(target)
    }
}

/// An inode without a path: "anon_inode:[eventfd]", "anon_inode:kvm-vm", "pidfd:[12]",
/// "net:[4026531833]". A path begins with '/'.
fn anonymous(target: &str) -> Kind {
    match target.split_once(':') {
        Some(("anon_inode", name)) => Kind::Anonymous(printable(
            name.trim_start_matches('[').trim_end_matches(']'),
        )),
        Some((name, _)) if !name.starts_with('/') => Kind::Anonymous(printable(name)),
        _ => Kind::Other,
    }
}

/// The access mode in fdinfo's "flags:" line, which is octal.
fn access(info: &str) -> String {
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    match flags {
        None => "",
        Some(flags) if flags & libc::O_PATH != 0 => "path",
        Some(flags) => match flags & libc::O_ACCMODE {
            libc::O_RDONLY => "r",
            libc::O_WRONLY => "w",
            _ => "rw",
        },
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn kinds_are_told_by_the_inode() {
        let directory = fs::File::open("/").unwrap();
        let null = fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let fds = read(i32::try_from(std::process::id()).unwrap()).unwrap();
        let of = |number: i32| fds.iter().find(|fd| fd.number == number).unwrap();
        assert_eq!(of(directory.as_raw_fd()).kind, Kind::Directory);
        assert_eq!(of(null.as_raw_fd()).kind, Kind::Null);
        assert_eq!(of(null.as_raw_fd()).access, "w");
        assert_eq!(of(socket.as_raw_fd()).kind, Kind::Socket);
        assert_eq!(of(socket.as_raw_fd()).family.as_deref(), Some("unix"));
        assert_eq!(
            of(event.as_raw_fd()).kind,
            Kind::Anonymous("eventfd".into())
        );
    }

    #[test]
    fn memory_is_told_from_an_unlinked_file_and_sockets_by_their_family() {
        let memory = memfd_create("x", MemfdFlags::empty()).unwrap();
        let place = std::env::temp_dir().join(format!("audit-unlinked-{}", std::process::id()));
        let unlinked = fs::File::create(&place).unwrap();
        fs::remove_file(&place).unwrap();
        let inet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let fds = read(i32::try_from(std::process::id()).unwrap()).unwrap();
        let of = |number: i32| fds.iter().find(|fd| fd.number == number).unwrap();
        let stat = fstat(&memory).unwrap();
        let memory = of(memory.as_raw_fd());
        assert_eq!(memory.kind, Kind::Memfd);
        let all = super::memory(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(all.contains(&(stat.st_dev, stat.st_ino)));
        assert_eq!(of(unlinked.as_raw_fd()).kind, Kind::File);
        assert_eq!(of(inet.as_raw_fd()).family.as_deref(), Some("inet"));
    }

    #[test]
    fn a_ring_is_what_its_fdinfo_says() {
        let info = "pos:\t0\nflags:\t02000002\nSqThread:\t-1\nSqThreadCpu:\t-1\nUserFiles:\t3\n    0: /dev/net/tun\n    1: anon_inode:[eventfd]\nUserBufs:\t0\nPollList:\n  op=22, task_works=0\n";
        assert_eq!(
            Ring::parse(info),
            Ring {
                files: vec!["/dev/net/tun".into(), "anon_inode:[eventfd]".into()],
                buffers: 0,
                polled: false,
            }
        );
        let bad = Ring::parse("SqThread:\t77\nUserBufs:\t2\n");
        assert!(bad.polled && bad.buffers == 2 && bad.files.is_empty());
    }

    #[test]
    fn a_ring_of_this_process_is_read() {
        let Ok(ring) = bulkhead_seccomp::uring::polling(2) else {
            return;
        };
        let fds = read(i32::try_from(std::process::id()).unwrap()).unwrap();
        let number = ring.as_raw_fd();
        let own = fds.iter().find(|fd| fd.number == number).unwrap();
        assert_eq!(own.ring, Some(Ring::default()));
    }

    #[test]
    fn names_of_anonymous_inodes_are_the_kernels() {
        assert_eq!(
            anonymous("anon_inode:[io_uring]"),
            Kind::Anonymous("io_uring".into())
        );
        assert_eq!(
            anonymous("anon_inode:kvm-vcpu:0"),
            Kind::Anonymous("kvm-vcpu:0".into())
        );
        assert_eq!(anonymous("pidfd:[12]"), Kind::Anonymous("pidfd".into()));
        assert_eq!(anonymous("/anon_inode:[eventfd]"), Kind::Other);
        assert_eq!(access("pos:\t0\nflags:\t0100002\n"), "rw");
        assert_eq!(access("flags:\t012000000\n"), "path");
        assert_eq!(access(""), "");
    }
}
