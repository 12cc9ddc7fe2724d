//! The VMM's side of the launcher: one request at a time, each with a deadline for the
//! whole exchange; events (a device ended) are kept until `poll_events` takes them.
//!
//! Any thread of the VMM may call it: a mutex makes requests take turns. After `start` it
//! opens, connects and executes nothing: every descriptor comes from the launcher, or is
//! made by socketpair(2).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use beside::Beside;
use exchange::{Answer, receive, send, take};

use super::helper::Program;
use super::lock;
use super::packet::{MAX_FDS, PacketSocket};
use super::start::{Started, start};
use super::sys::{self};
use super::{MAX_ARG, MAX_ARGS, MAX_PATH, printable, valid_id};

/// How long opening or binding may take: the path may lie on a network file system.
const PATH_DEADLINE: Duration = Duration::from_secs(10);
/// How long the launcher may take for the rest.
const DEADLINE: Duration = Duration::from_secs(5);
/// Most events kept: one per spawn, and there are only so many devices.
const MAX_EVENTS: usize = 1024;
/// Longest last line of a process that is passed on, characters.
const MAX_LAST_LINE: usize = 300;

/// What the launcher is to be started with.
#[derive(Debug)]
pub struct LauncherConfig {
    /// Directory of `bulkhead-launcher` and of the device binaries.
    pub libexec: PathBuf,
    /// Device binaries that may be spawned, by file name.
    pub devices: Vec<String>,
    /// Prefixes that every path must lie under; none: no restriction.
    pub allow_paths: Vec<PathBuf>,
    /// External helpers that may be started.
    pub helpers: Vec<Program>,
    /// Directories under which programs for live updates may lie.
    pub device_dirs: Vec<PathBuf>,
    /// Where the devices' host ids are taken from; `None`: by the VMM's pid.
    pub ids: Option<super::IdRange>,
    /// Where the VM's cgroup is to be.
    pub cgroup: super::CgroupChoice,
}

impl LauncherConfig {
    /// The binaries lie where this program lies, and every path is allowed.
    pub fn new(devices: Vec<String>) -> io::Result<Self> {
        let exe = std::fs::read_link("/proc/self/exe")?;
        let libexec = exe.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Self {
            libexec,
            devices,
            allow_paths: Vec::new(),
            helpers: Vec::new(),
            device_dirs: Vec::new(),
            ids: None,
            cgroup: super::CgroupChoice::default(),
        })
    }
}

/// Why something that the launcher was to do did not happen. One line each.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// It could not be started.
    #[error("{0}")]
    Start(String),
    /// It refused, or what it tried failed: the launcher's own line.
    #[error("{0}")]
    Refused(String),
    /// It has ended, and every device process with it.
    #[error(
        "the launcher has ended, and every device process with it; its last lines on stderr say why"
    )]
    Gone,
    /// It did not answer in time.
    #[error("launcher: no answer to {0} in time; is the host overloaded or its file system stuck?")]
    Deadline(&'static str),
    /// It said something that makes no sense.
    #[error("launcher: {0}")]
    Protocol(&'static str),
    /// A system call on this side failed.
    #[error("launcher: {0}: {1}")]
    Io(&'static str, io::Error),
}

impl LauncherError {
    /// Whether the launcher is lost, so that the VM must stop.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone | Self::Protocol(_))
    }
}

/// What has arrived and nobody waits for.
#[derive(Default)]
struct Inbox {
    events: VecDeque<LauncherEvent>,
    /// Requests whose answers are events.
    begun: BTreeSet<u64>,
    /// Those of them that ask for a connection or a helper.
    links: BTreeSet<u64>,
    /// Those of them that change limits.
    places: BTreeSet<u64>,
    /// What came with their answers.
    linked: BTreeMap<u64, Linked>,
    /// Other threads that wait for an answer.
    beside: Beside,
}

struct Inner {
    /// None once the launcher is given up.
    socket: Option<PacketSocket>,
    last_id: u64,
    inbox: Inbox,
}

/// The launcher, seen from the VMM. Dropping it ends the launcher and every device process.
pub struct Launcher {
    inner: Mutex<Inner>,
    pid: i32,
    pidfd: OwnedFd,
    cgroup: (String, String),
    vmm_id: Option<u32>,
    io_uring: bool,
    /// See [`Self::helper_data`].
    helper_data: BTreeMap<&'static str, u64>,
    /// The thread that takes the events, once it does.
    attendant: OnceLock<ThreadId>,
    /// Of `socket` and `pending`.
    epoll: Epoll,
    /// Readable while events are kept that arrived beside a reply.
    pending: EventFd,
    /// Processes that [`Self::spawn`] and [`Self::spawn_helper`] have started and nobody has told of.
    untold: Mutex<BTreeMap<(String, u64), i32>>,
    /// It was waited for at its end.
    seen_out: AtomicBool,
}

impl Launcher {
    /// Starts the launcher. To be called before this process confines itself and before it
    /// has threads that take part in anything (the clone itself is safe with threads).
    pub fn start(config: &LauncherConfig) -> Result<Self, LauncherError> {
        let io = |what| move |error| LauncherError::Io(what, error);
        let epoll = Epoll::new().map_err(io("epoll_create1"))?;
        let pending = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(io("eventfd"))?;
        let Started {
            socket,
            pid,
            pidfd,
            cgroup,
            vmm_id,
        } = start(config)?;
        let launcher = Self {
            inner: Mutex::new(Inner {
                socket: Some(socket),
                last_id: 0,
                inbox: Inbox::default(),
            }),
            pid,
            pidfd,
            cgroup,
            vmm_id,
            io_uring: bulkhead_seccomp::uring::available().is_ok(),
            helper_data: config.helpers.iter().map(|h| (h.kind, h.data)).collect(),
            attendant: OnceLock::new(),
            epoll,
            pending,
            untold: Mutex::default(),
            seen_out: AtomicBool::new(false),
        };
        launcher.greet()?;
        Ok(launcher)
    }

    /// Waits until the launcher has confined itself, and begins to watch it.
    fn greet(&self) -> Result<(), LauncherError> {
        use std::os::fd::AsRawFd;
        let io = |what| move |error| LauncherError::Io(what, error);
        let mut inner = self.lock();
        let Inner { socket, inbox, .. } = &mut *inner;
        let socket = socket.as_ref().ok_or(LauncherError::Gone)?;
        for fd in [socket.as_fd().as_raw_fd(), self.pending.as_raw_fd()] {
            let event = EpollEvent::new(EventSet::IN, 0);
            self.epoll
                .ctl(ControlOperation::Add, fd, event)
                .map_err(io("epoll_ctl"))?;
        }
        let hello = receive(socket, inbox, 0, Instant::now() + DEADLINE, "its start")?.0;
        match hello.error.as_str() {
            "" => Ok(()),
            error => Err(LauncherError::Start(format!(
                "launcher: {}",
                printable(error)
            ))),
        }
    }

    /// Opens a path. `role` says in an error what it is ("disk", "kernel").
    pub fn open_path(
        &self,
        path: &Path,
        role: &str,
        access: Access,
        direct: bool,
    ) -> Result<(File, OpenedInfo), LauncherError> {
        self.open(path, role, access, direct, false)
    }

    fn open(
        &self,
        path: &Path,
        role: &str,
        access: Access,
        direct: bool,
        lock: bool,
    ) -> Result<(File, OpenedInfo), LauncherError> {
        let access = match access {
            Access::Read => wire::open_path::Access::READ,
            Access::ReadWrite => wire::open_path::Access::READ_WRITE,
            Access::Append => wire::open_path::Access::APPEND,
        };
        let op = wire::OpenPath {
            path: path_text(path, role)?,
            role: role.to_owned(),
            access: access.into(),
            direct,
            lock,
            ..Default::default()
        };
        let until = Instant::now() + lock::PATIENCE;
        let (reply, mut fds, _) = loop {
            let op = wire::request::Op::OpenPath(op.clone());
            match self.call(op, &[], PATH_DEADLINE, "open") {
                Err(LauncherError::Refused(why))
                    if why.ends_with(lock::HELD) && Instant::now() < until =>
                {
                    // Others' requests come in between.
                    let _ = sys::poll(&[], Some(Instant::now() + lock::PAUSE));
                }
                other => break other?,
            }
        };
        match (reply.result, fds.pop(), fds.pop()) {
            (Some(wire::reply::Result::Opened(opened)), Some(fd), None) => {
                let info = OpenedInfo {
                    direct: opened.direct,
                    size: opened.size,
                    block_device: opened.block_device,
                    secure_erase: opened.secure_erase,
                };
                Ok((fd.into(), info))
            }
            _ => Err(LauncherError::Protocol(
                "an open was answered with something else",
            )),
        }
    }

    /// Whether device processes may have restricted io_uring rings, as tried at the start.
    pub fn io_uring(&self) -> bool {
        self.io_uring
    }

    /// Address space of the data of the helper of this kind.
    pub fn helper_data(&self, kind: &str) -> u64 {
        self.helper_data.get(kind).copied().unwrap_or(0)
    }

    fn untold(&self) -> MutexGuard<'_, BTreeMap<(String, u64), i32>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pid of a process that [`Self::spawn`] or [`Self::spawn_helper`] has started, the first time that this is asked:
    /// its start is to be told.
    pub fn take_untold(&self, device_id: &str, incarnation: u64) -> Option<i32> {
        self.untold().remove(&(device_id.to_owned(), incarnation))
    }

    /// Starts a device process and returns once its program runs.
    pub fn spawn(&self, spec: SpawnSpec) -> Result<SpawnedDevice, LauncherError> {
        let SpawnSpec {
            device_id,
            binary,
            policy,
            args,
            incarnation,
            fds,
            dial,
            fence,
        } = spec;
        let refused = |why: &str| {
            Err(LauncherError::Refused(format!(
                "device {}: {why}",
                printable(&device_id)
            )))
        };
        if !valid_id(&device_id) {
            return refused("an id is 1 to 64 of letters, digits, '.', '_' and '-'");
        }
        if args.len() > MAX_ARGS || args.iter().any(|a| a.len() > MAX_ARG) {
            return refused("too many or too long arguments");
        }
        if fds.len().saturating_add(2) > MAX_FDS {
            return refused("too many descriptors");
        }
        let dial = dial.map(|path| path_text(&path, "vsock")).transpose()?;
        let dial = dial.unwrap_or_default();
        let pair = || UnixStream::pair().map_err(|e| LauncherError::Io("socketpair", e));
        let (control, control_end) = pair()?;
        let (vhost, vhost_end) = pair()?;
        let mut passed = vec![control_end.as_fd(), vhost_end.as_fd()];
        passed.extend(fds.iter().map(AsFd::as_fd));
        let op = wire::Spawn {
            device_id: device_id.clone(),
            binary,
            args,
            incarnation,
            policy,
            fence,
            dial,
            ..Default::default()
        };
        let called = self.call(wire::request::Op::Spawn(op), &passed, DEADLINE, "spawn");
        let (reply, fds, pid) = match called {
            Err(error @ LauncherError::Deadline(_)) => {
                // Should it come up later, nobody would know it.
                let _ = self.kill(&device_id, incarnation);
                return Err(error);
            }
            other => other?,
        };
        let mut fds = fds.into_iter();
        match (reply.result, fds.next(), fds.next(), fds.next(), pid) {
            (Some(wire::reply::Result::Spawned(spawned)), Some(pidfd), read, None, Some(pid))
                if read.is_some() == fence =>
            {
                self.untold().insert((device_id, incarnation), pid);
                Ok(SpawnedDevice {
                    pid,
                    pidfd,
                    control,
                    vhost,
                    spawn_us: spawned.spawn_us,
                    fence: read,
                })
            }
            _ => Err(LauncherError::Protocol(
                "a spawn was answered with something else",
            )),
        }
    }

    /// Kills a device process; no error when it has ended already. `Exited` follows.
    pub fn kill(&self, device_id: &str, incarnation: u64) -> Result<(), LauncherError> {
        let op = wire::Kill {
            device_id: device_id.to_owned(),
            incarnation,
            ..Default::default()
        };
        self.call(wire::request::Op::Kill(op), &[], DEADLINE, "kill")
            .map(|_| ())
    }

    /// Events that have arrived; never blocks. To be called when `as_fd` is readable.
    /// `Gone` once the launcher has ended and every event has been taken.
    pub fn poll_events(&self) -> Result<Vec<LauncherEvent>, LauncherError> {
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Other threads hold it for a few instructions once there is an attendant; to return
            // would only be to be woken again until they are done.
            Err(TryLockError::WouldBlock) if self.attendant.get().is_some() => self.lock(),
            // A request is under way; what it finds beside its reply it keeps and signals.
            Err(TryLockError::WouldBlock) => return Ok(Vec::new()),
        };
        // WouldBlock only says that nothing was pending.
        let _ = self.pending.read();
        let mut lost = inner.socket.is_none().then_some(LauncherError::Gone);
        if let Inner {
            socket: Some(socket),
            inbox,
            ..
        } = &mut *inner
        {
            loop {
                match socket.receive() {
                    Ok(Some(packet)) => {
                        // A reply here answers a request that was given up; its descriptors close.
                        if let Err(error) = take(packet, inbox, 0) {
                            lost = Some(error);
                            break;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Ok(None) | Err(_) => {
                        lost = Some(LauncherError::Gone);
                        break;
                    }
                }
            }
        }
        if lost.is_some() {
            inner.socket = None;
            inner.inbox.beside.lose();
        }
        match lost {
            Some(error) if inner.inbox.events.is_empty() => {
                // The socket has left the epoll: stay readable.
                let _ = self.pending.write(1);
                Err(error)
            }
            lost => {
                if lost.is_some() {
                    let _ = self.pending.write(1);
                }
                Ok(inner.inbox.events.drain(..).collect())
            }
        }
    }

    /// Path of the cgroup that devices' leaves are in, below the mount of cgroup v2, and what
    /// is missing of it; empty: there is none, and nothing.
    pub fn cgroup(&self) -> (&str, &str) {
        (&self.cgroup.0, &self.cgroup.1)
    }

    /// Uid and gid that the VMM is to take, of those that are this VM's alone; `None`: it is not
    /// root, or the ids do not exist here.
    pub fn vmm_id(&self) -> Option<u32> {
        self.vmm_id
    }

    /// The launcher's pid as this process sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable when the launcher has died.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Ends the launcher and every device process and waits for it; so does dropping.
    pub fn shutdown(self) {
        drop(self);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request and its reply.
    fn call(
        &self,
        op: wire::request::Op,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
        what: &'static str,
    ) -> Result<(wire::Reply, Vec<OwnedFd>, Option<i32>), LauncherError> {
        if self.is_beside() {
            return self.call_beside(op, fds, limit, what);
        }
        let deadline = Instant::now() + limit;
        let mut inner = self.lock();
        inner.last_id = inner.last_id.wrapping_add(1).max(1);
        let request = wire::Request {
            id: inner.last_id,
            op: Some(op),
            ..Default::default()
        };
        let bytes = request
            .write_to_bytes()
            .map_err(|_| LauncherError::Protocol("a request that cannot be encoded"))?;
        let Inner { socket, inbox, .. } = &mut *inner;
        let result = match socket {
            Some(socket) => send(socket, &bytes, fds, deadline, what)
                .and_then(|()| receive(socket, inbox, request.id, deadline, what)),
            None => Err(LauncherError::Gone),
        };
        if !inner.inbox.events.is_empty() {
            let _ = self.pending.write(1);
        }
        match result {
            Ok((reply, ..)) if !reply.error.is_empty() => {
                Err(LauncherError::Refused(printable(&reply.error)))
            }
            Err(error) if error.is_gone() => {
                inner.socket = None;
                inner.inbox.beside.lose();
                let _ = self.pending.write(1);
                Err(error)
            }
            other => other,
        }
    }
}

impl AsFd for Launcher {
    /// For the VMM's epoll: readable while `poll_events` has something to say.
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::epoll_fd(&self.epoll)
    }
}

/// A path as it goes into a request.
fn path_text(path: &Path, role: &str) -> Result<String, LauncherError> {
    let refused = |why: &str| {
        LauncherError::Refused(format!(
            "{role} {}: {why}",
            printable(&path.to_string_lossy())
        ))
    };
    match path.to_str() {
        Some("") => Err(LauncherError::Refused(format!(
            "{role}: an empty path; name a file"
        ))),
        Some(text) if text.len() > MAX_PATH => Err(refused("longer than 4095 bytes")),
        Some(text) => Ok(text.to_owned()),
        None => Err(refused("not UTF-8; rename it or use a link")),
    }
}

mod beside;
mod disks;
mod ending;
mod exchange;
mod nets;
mod resources;
mod sockets;
mod types;

pub use ending::Outlives;
pub use nets::{Linked, SpawnedHelper};
pub use resources::Placed;
pub use types::{Access, LauncherEvent, OpenedInfo, SpawnSpec, SpawnedDevice};
#[cfg(test)]
mod tests;
