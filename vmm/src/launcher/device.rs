//! A device process, from the launcher's side: its clone into fresh namespaces, its id
//! map, and the wait for its exec. What the child does meanwhile is in `child`.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_seccomp::confine::UNCONFINED;

use super::args::Args;
use super::cgroup::Cgroups;
use super::child::{Child, Sandbox, inner_id};
use super::dial::Dial;
use super::helper;
use super::helper_fs::Share;
use super::identity::{IdMap, Maps, Rights, namespace_remedy};
use super::isolate;
use super::log::LogSource;
use super::packet::{self, MAX_FDS};
use super::paths::Paths;
use super::sys::{self, Cloned};
use super::watch::Watch;
use super::{FIRST_OWN_FD, MAX_ARG, MAX_ARGS, MAX_DEVICES, printable, valid_id};

/// How long clone, confinement and exec may take together.
const DEADLINE: Duration = Duration::from_secs(4);

/// A device to start: a Spawn request, and what came beside it.
pub struct Order {
    /// Its id.
    pub id: String,
    /// Tells it apart from others of the same id.
    pub incarnation: u64,
    /// Name of its binary.
    pub binary: String,
    /// What to execute, where that is not the binary of this name that was opened at the start.
    pub program: Option<Rc<OwnedFd>>,
    /// Name of its policy.
    pub policy: String,
    /// Arguments after argv[0].
    pub args: Vec<String>,
    /// Control end, vhost-user end, its own.
    pub fds: Vec<OwnedFd>,
    /// Its own socket, if it may ask for connections to the ports beside that.
    pub dial: Option<PathBuf>,
}

/// What a device process is to its device.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Its only one.
    Only,
    /// It may come to take the place of another one, and this program be that of later ones.
    OnTrial(Rc<OwnedFd>),
    /// Another one has taken its place.
    Replaced,
}

/// A helper to start: a SpawnHelper request, and what came beside it.
pub struct HelperOrder {
    /// Its device's id.
    pub id: String,
    /// Tells it apart from others of the same id.
    pub incarnation: u64,
    /// "passt" or "virtiofsd".
    pub kind: String,
    /// What it is to do.
    pub options: Vec<String>,
    /// passt's vhost-user end.
    pub fds: Vec<OwnedFd>,
}

/// A device process that runs or has not been reaped.
pub struct Device {
    /// Its id.
    pub id: String,
    /// And incarnation.
    pub incarnation: u64,
    /// Which of the VM's host ids is its.
    pub slot: usize,
    /// In the launcher's pid namespace.
    pub pid: i32,
    /// Its process.
    pub pidfd: OwnedFd,
    /// Its stderr.
    pub log: LogSource,
    /// Its system calls.
    pub watch: Watch,
    /// What it is to its device.
    pub standing: Standing,
    /// What it asks for.
    pub dial: Option<Dial>,
    /// The VMM's end of a channel that it has made itself, until that is passed on.
    pub channel: Option<OwnedFd>,
}

/// Starts a device process. `devices` are those that live; a free slot is chosen.
pub fn spawn(
    order: &Order,
    args: &Args,
    binaries: &[OwnedFd],
    devices: &[Device],
    cgroups: &mut Cgroups,
) -> Result<Device, String> {
    let fail = |why: String| format!("device {}: {why}", printable(&order.id));
    spawn_checked(order, args, binaries, devices, cgroups).map_err(fail)
}

fn spawn_checked(
    order: &Order,
    args: &Args,
    binaries: &[OwnedFd],
    devices: &[Device],
    cgroups: &mut Cgroups,
) -> Result<Device, String> {
    let named = args
        .binaries
        .iter()
        .position(|name| *name == order.binary)
        .and_then(|index| binaries.get(index));
    let program = order.program.as_deref().or(named).ok_or_else(|| {
        format!(
            "{}: not a device binary of this VM",
            printable(&order.binary)
        )
    })?;
    // The policy's name is the binary's, with a variant; none of those for stand-alone use.
    let policy = bulkhead_seccomp::policy::get(&order.policy)
        .filter(|p| p.name.starts_with(&order.binary) && !p.name.ends_with("-socket"))
        .ok_or_else(|| {
            format!(
                "{}: not a policy of {}",
                printable(&order.policy),
                printable(&order.binary)
            )
        })?;
    if order.fds.len() < 2 || order.fds.len() > MAX_FDS {
        return Err(format!(
            "a spawn needs its two channels and at most {} descriptors more",
            MAX_FDS - 2
        ));
    }
    if order.args.len() > MAX_ARGS || order.args.iter().any(|a| a.len() > MAX_ARG) {
        return Err("too many or too long arguments".into());
    }
    let argv = std::iter::once(&order.binary)
        .chain(&order.args)
        .map(|arg| CString::new(arg.as_str()).map_err(|_| "a zero byte in an argument".to_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    let start = Start {
        id: &order.id,
        incarnation: order.incarnation,
        program: program.as_fd(),
        argv: &argv,
        fds: &order.fds,
        sandbox: Sandbox::Device(policy),
    };
    debug_assert!(order.fds.len().saturating_add(3) >= FIRST_OWN_FD);
    start.run(args, devices, cgroups)
}

/// Starts an external helper: see `helper`. Its own descriptors are from 3 on.
pub fn spawn_helper(
    order: &HelperOrder,
    args: &Args,
    programs: &[OwnedFd],
    devices: &[Device],
    cgroups: &mut Cgroups,
    paths: &Paths,
) -> Result<Device, String> {
    let fail = |why: String| format!("device {}: {why}", printable(&order.id));
    let program = args
        .helpers
        .iter()
        .position(|kind| *kind == order.kind)
        .and_then(|index| programs.get(index))
        .ok_or_else(|| fail(helper::not_given(&order.kind)))?;
    if args.rights == Rights::Root {
        return Err(fail(format!(
            "{} {}: {}",
            order.kind,
            helper::NO_NAMESPACE,
            namespace_remedy(true)
        )));
    }
    let share = match order.kind == helper::VIRTIOFSD {
        true => Some(Share::open(&order.options, paths).map_err(fail)?),
        false => None,
    };
    if order.fds.len() != usize::from(share.is_none()) {
        return Err(fail(
            "a helper has one descriptor: its vhost-user channel, if it does not make that".into(),
        ));
    }
    let argv = match &share {
        Some(share) => share.arguments(helper::FIRST_FD, args.rights),
        None => helper::arguments(&order.kind, &order.options).map_err(fail)?,
    };
    let start = Start {
        id: &order.id,
        incarnation: order.incarnation,
        program: program.as_fd(),
        argv: &argv,
        fds: &order.fds,
        sandbox: Sandbox::Helper(helper::Root {
            libraries: &args.helper_libraries,
            share: share.as_ref(),
        }),
    };
    debug_assert_eq!(helper::FIRST_FD, 3);
    start.run(args, devices, cgroups).map_err(fail)
}

/// A process to start, its request checked.
struct Start<'a> {
    id: &'a str,
    incarnation: u64,
    program: BorrowedFd<'a>,
    argv: &'a [CString],
    /// From 3 on.
    fds: &'a [OwnedFd],
    sandbox: Sandbox<'a>,
}

impl Start<'_> {
    fn run(self, args: &Args, devices: &[Device], cgroups: &mut Cgroups) -> Result<Device, String> {
        if !valid_id(self.id) {
            return Err("an id is 1 to 64 of letters, digits, '.', '_' and '-'".into());
        }
        if devices
            .iter()
            .any(|d| d.id == self.id && d.incarnation == self.incarnation)
        {
            return Err(format!("incarnation {} is running", self.incarnation));
        }
        // The last one's id is the VMM's.
        let slot = (0..MAX_DEVICES - 1)
            .find(|slot| devices.iter().all(|d| d.slot != *slot))
            .ok_or_else(|| format!("there are {MAX_DEVICES} device processes already"))?;
        let io = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");

        let (log, log_end) = sys::pipe().map_err(io("log pipe"))?;
        let mut log = LogSource::new(self.id, log).map_err(io("log pipe"))?;
        if matches!(self.sandbox, Sandbox::Helper(_)) {
            log = log.holding();
        }
        let (mut sync, child_sync) = UnixStream::pair().map_err(io("socketpair"))?;
        // /dev/null, opened by the VMM: nothing is opened for a device.
        let null = sys::standard_fd(0).as_raw_fd();
        let log_fd = log_end.as_raw_fd();
        // Who may change any file's owner and mode has none of the host's.
        let mut fds: Vec<RawFd> = match self.sandbox.shares() {
            true => vec![log_fd; 3],
            false => vec![null, null, log_fd],
        };
        fds.extend(self.fds.iter().map(AsRawFd::as_raw_fd));

        let host_id = u32::try_from(slot)
            .ok()
            .and_then(|slot| args.host_ids?.checked_add(slot));
        let child = Child {
            rights: args.rights,
            // It has every id.
            id: match self.serves_every_owner(args) {
                true => 0,
                false => inner_id(args.rights, host_id.unwrap_or_default()),
            },
            drop_groups: host_id.is_some() || self.serves_every_owner(args),
            program: self.program,
            argv: self.argv,
            fds: &fds,
            sync: child_sync.as_fd(),
            sandbox: &self.sandbox,
            fallback: cgroups.fallback(self.id),
        };
        // The child's entries in /proc must be ours to write its maps, and it has this flag of
        // ours at its clone. It turns it off itself.
        isolate::dumpable(true).map_err(io("dumpable"))?;
        let flags = self.sandbox.flags(args.rights);
        let leaf = cgroups.leaf(self.id);
        let mut cloned = sys::clone_single_threaded(flags, leaf);
        let outside = leaf.is_some() && cloned.is_err();
        if outside {
            // It runs as it would on a host without cgroups, if the cause was its leaf.
            cloned = sys::clone_single_threaded(flags, None);
        }
        if let Ok(Cloned::Child) = cloned {
            // Else the end of the launcher would not end the wait for its byte.
            drop(sync);
            child.run();
        }
        if outside && cloned.is_ok() {
            cgroups.give_up(self.id);
        }
        isolate::dumpable(false).map_err(io("dumpable"))?;
        let (pid, pidfd) = match cloned {
            Ok(Cloned::Parent { pid, pidfd }) => (pid, pidfd),
            Ok(Cloned::Child) => sys::exit_now(126),
            Err(error) => {
                return Err(format!(
                    "namespaces are not permitted (clone: {error}): {}",
                    namespace_remedy(args.rights != Rights::User)
                ));
            }
        };
        drop(child_sync);
        drop(log_end);
        let mut device = Device {
            id: self.id.to_owned(),
            incarnation: self.incarnation,
            slot,
            pid,
            pidfd,
            log,
            watch: Watch::none(),
            standing: Standing::Only,
            dial: None,
            channel: None,
        };
        let mapped = match self.serves_every_owner(args) {
            true => device.map_every_id(),
            false => device.map_ids(args, host_id),
        };
        let shares = self.sandbox.shares();
        let started = mapped.and_then(|()| await_exec(&mut sync, &mut device, shares));
        match started {
            Ok(()) => Ok(device),
            Err(why) => {
                device.end_and_reap();
                let hint = match args.rights {
                    Rights::User if why.contains("denied") || why.contains("permitted") => {
                        format!(" ({})", namespace_remedy(false))
                    }
                    _ => String::new(),
                };
                Err(format!("{why}{hint}"))
            }
        }
    }
}

impl Start<'_> {
    /// Whether it serves files as whoever owns them.
    fn serves_every_owner(&self, args: &Args) -> bool {
        self.sandbox.shares() && args.rights == Rights::RootNamespace
    }
}

impl Device {
    /// Every id stands for itself.
    fn map_every_id(&self) -> Result<(), String> {
        let map = |file| {
            let own = IdMap::own(file).map_err(|error| format!("id map: {error}"))?;
            Ok::<_, String>(own.identity())
        };
        let maps = Maps {
            uid: map("uid_map")?,
            gid: map("gid_map")?,
            deny_setgroups: false,
        };
        if UNCONFINED {
            return Ok(());
        }
        maps.write(self.pidfd.as_fd())
            .map_err(|error| format!("id map: {error}"))
    }

    fn map_ids(&self, args: &Args, host_id: Option<u32>) -> Result<(), String> {
        if UNCONFINED {
            return Ok(());
        }
        let inner = inner_id(args.rights, 0);
        let maps = match (args.rights, host_id) {
            (Rights::Root, _) => return Ok(()),
            (Rights::RootNamespace, Some(id)) => Maps::single((inner, inner), (id, id), false),
            // The launcher's own ids are the only ones it may hand on.
            (Rights::RootNamespace | Rights::User, _) => {
                let own = isolate::effective_ids();
                // setgroups is denied already where the launcher is a user's.
                Maps::single((inner, inner), own, false)
            }
        };
        maps.write(self.pidfd.as_fd())
            .map_err(|error| format!("id map: {error}"))
    }

    /// SIGKILL; no error when it has ended.
    pub fn kill(&self) -> Result<(), String> {
        match sys::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(format!("device {}: kill: {error}", self.id))
            }
            _ => Ok(()),
        }
    }

    /// Ends a child that did not become a device.
    fn end_and_reap(&self) {
        let _ = self.kill();
        let deadline = Instant::now() + DEADLINE;
        let _ = sys::poll(&[(self.pidfd.as_fd(), libc::POLLIN)], Some(deadline));
        let _ = sys::reap(Some(self.pidfd.as_fd()));
    }
}

/// Lets the child go and waits until its end closes (by exec) or says why not.
/// `shares`: the descriptor that it sends is the VMM's end of its channel, not the listener of its
/// filter.
fn await_exec(sync: &mut UnixStream, device: &mut Device, shares: bool) -> Result<(), String> {
    let Device { watch, channel, .. } = device;
    let lost = |error: std::io::Error| format!("while it starts: {error}");
    sync.write_all(&[1]).map_err(lost)?;
    let deadline = Instant::now() + DEADLINE;
    let mut line = Vec::new();
    // The child is our own code and writes one line at most; after exec nobody holds it.
    while line.len() < 512 {
        let mut fds = vec![(sync.as_fd(), libc::POLLIN)];
        fds.extend(watch.fd().map(|fd| (fd, libc::POLLIN)));
        let revents = sys::poll(&fds, Some(deadline)).map_err(lost)?;
        if revents.iter().all(|r| *r == 0) {
            return Err("it was not executed in time; is the host overloaded?".into());
        }
        if revents.get(1).is_some_and(|r| *r != 0) && watch.on_readable() {
            return Err("its start makes system calls that no device may make".into());
        }
        if revents.first().is_none_or(|r| *r == 0) {
            continue;
        }
        let mut buffer = [0; 512];
        match packet::receive_stream(sync.as_fd(), &mut buffer).map_err(lost)? {
            (0, _) => break,
            (_, Some(ours)) if shares => *channel = Some(ours),
            (_, Some(listener)) => *watch = Watch::new(listener),
            (count, None) => line.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
    if line.is_empty() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&line).into_owned())
    }
}

/// Takes over the binaries that the launcher inherited.
pub fn inherited_binaries(count: usize, first: RawFd) -> std::io::Result<Vec<OwnedFd>> {
    (first..).take(count).map(sys::take_inherited).collect()
}
