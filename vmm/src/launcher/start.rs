//! Starting the launcher: runs in the VMM, before it confines itself. Opens the launcher
//! and every device binary (nothing is opened or executed afterwards), clones into a new
//! pid namespace, and where possible a new user namespace, and executes the launcher by
//! descriptor with nothing but its socket, the VMM's pidfd, the binaries and stderr.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_seccomp::confine::UNCONFINED;

use super::args::{Args, CgroupArgs, FIRST_BINARY_FD};
use super::cgroup_parent;
use super::client::{LauncherConfig, LauncherError};
use super::identity::{self, IdMap, Maps, Rights};
use super::ids;
use super::leftovers::{self, Note};
use super::packet::PacketSocket;
use super::programs;
use super::{MAX_DEVICES, PROGRAM, isolate, printable, sys};

/// A launcher that has been executed.
pub struct Started {
    /// The VMM's end of the control socket.
    pub socket: PacketSocket,
    /// The launcher's pid as the VMM sees it.
    pub pid: i32,
    /// And its pidfd.
    pub pidfd: OwnedFd,
    /// Path of the VM's cgroup, and what is missing of it; empty: there is none, and nothing.
    pub cgroup: (String, String),
    /// Uid and gid that the VMM is to have; `None`: what it has.
    pub vmm_id: Option<u32>,
}

/// The VMM's own among the ids of a VM: the last.
const VMM_SLOT: u32 = MAX_DEVICES as u32 - 1;
/// Most device binaries: `clone_and_exec` carries 64 descriptors.
const MAX_BINARIES: usize = 32;
/// Longest note on the cgroup, characters.
const MAX_CGROUP_NOTE: usize = 1024;
/// Most directories of programs for live updates.
const MAX_DEVICE_DIRS: usize = 8;
/// How long clone, id maps and exec may take together.
const DEADLINE: Duration = Duration::from_secs(5);

fn failed(text: impl Into<String>) -> LauncherError {
    LauncherError::Start(text.into())
}

fn open_program(directory: &Path, name: &str) -> Result<File, LauncherError> {
    let path = directory.join(name);
    File::open(&path).map_err(|error| {
        failed(format!(
            "{}: {error}; install it beside bulkhead or name its directory with --libexec",
            printable(&path.to_string_lossy())
        ))
    })
}

/// Why one way of cloning did not work.
enum Attempt {
    /// Namespaces or maps are not permitted: another way may be.
    NotPermitted(String),
    /// Something else, final.
    Failed(LauncherError),
}

/// Starts the launcher.
pub fn start(config: &LauncherConfig) -> Result<Started, LauncherError> {
    let cgroup = cgroup_parent::prepare(&config.cgroup).map_err(failed)?;
    let note = Note::begin();
    start_with(config, &cgroup, note.as_ref()).inspect_err(|_| {
        // No launcher has taken them over; one that has ends as its socket does, and does this.
        cgroup.undo();
        if let Some(note) = &note {
            note.remove();
        }
    })
}

fn start_with(
    config: &LauncherConfig,
    cgroup: &cgroup_parent::Prepared,
    note: Option<&Note>,
) -> Result<Started, LauncherError> {
    if config.devices.len() > MAX_BINARIES {
        return Err(failed(format!("more than {MAX_BINARIES} device binaries")));
    }
    let program = open_program(&config.libexec, PROGRAM)?;
    let binaries = config
        .devices
        .iter()
        .map(|name| open_program(&config.libexec, name))
        .collect::<Result<Vec<_>, _>>()?;
    if config.device_dirs.len() > MAX_DEVICE_DIRS {
        return Err(failed(format!(
            "--device-dir: at most {MAX_DEVICE_DIRS} directories can be named"
        )));
    }
    let device_dirs = config
        .device_dirs
        .iter()
        .map(|path| programs::open_directory(path).map_err(failed))
        .collect::<Result<Vec<_>, _>>()?;
    let helpers: Vec<&File> = config.helpers.iter().map(|h| &h.file).collect();
    let mut helper_libraries: Vec<_> = config
        .helpers
        .iter()
        .flat_map(|helper| helper.libraries.clone())
        .collect();
    helper_libraries.dedup();
    let allow_paths = config
        .allow_paths
        .iter()
        .map(|path| {
            path.canonicalize().map_err(|error| {
                failed(format!(
                    "--allow-path {}: {error}; name an existing directory or file",
                    printable(&path.to_string_lossy())
                ))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;

    let (uid, gid) = isolate::effective_ids();
    let vmm_pid = i32::try_from(std::process::id()).map_err(|e| failed(e.to_string()))?;
    let id_map =
        |file| IdMap::own(file).map_err(|e| failed(format!("/proc/self/{file}: {e}; mount /proc")));
    let (uids, gids) = (id_map("uid_map")?, id_map("gid_map")?);
    let slots = u32::try_from(MAX_DEVICES).unwrap_or(u32::MAX);
    let exist = |base: u32| uids.covers(base, slots) && gids.covers(base, slots);
    let reserved = match config.ids {
        None if uid == 0 => ids::reserve_by_pid(vmm_pid, exist),
        None => None,
        Some(_) if uid != 0 => {
            return Err(failed(
                "--uid-range: only root may give device processes ids: leave it out, or run as root",
            ));
        }
        Some(range) => {
            let directory = leftovers::directory().unwrap_or_default();
            Some(range.reserve(&directory).map_err(failed)?)
        }
    };
    let host_ids = match &reserved {
        Some(reserved) if exist(reserved.first) => Some(reserved.first),
        Some(reserved) => {
            return Err(failed(format!(
                "--uid-range: ids {} and on do not exist in this user namespace: name those of /proc/self/uid_map and gid_map",
                reserved.first
            )));
        }
        None => identity::host_id_base(vmm_pid).filter(|base| uid == 0 && exist(*base)),
    };

    let ways: &[Rights] = match (uid, host_ids) {
        (0, Some(_)) => &[Rights::RootNamespace, Rights::Root],
        (0, None) => &[Rights::RootNamespace],
        _ => &[Rights::User],
    };
    let mut reason = String::new();
    for rights in ways {
        let maps = match rights {
            Rights::RootNamespace => Some(Maps {
                uid: uids.identity(),
                gid: gids.identity(),
                deny_setgroups: false,
            }),
            Rights::User => Some(Maps::single((uid, gid), (uid, gid), true)),
            Rights::Root => None,
        };
        let args = Args {
            rights: *rights,
            host_ids,
            ids_held: reserved.is_some(),
            binaries: config.devices.clone(),
            allow_paths: allow_paths.clone(),
            helpers: config.helpers.iter().map(|h| h.kind.to_owned()).collect(),
            helper_libraries: helper_libraries.clone(),
            device_dirs: device_dirs
                .iter()
                .map(|directory| (directory.path.clone(), directory.roots))
                .collect(),
            cgroup: cgroup.group.as_ref().map(|group| CgroupArgs {
                controllers: group.controllers.clone(),
                path: group.path.clone(),
            }),
            cgroup_note: cgroup.note.chars().take(MAX_CGROUP_NOTE).collect(),
            note: note.map(|note| note.path.clone()),
        };
        let programs: Vec<&File> = binaries
            .iter()
            .chain(helpers.iter().copied())
            .chain(device_dirs.iter().map(|directory| &directory.file))
            .chain(cgroup.group.as_ref().map(|group| &group.directory))
            .chain(note.map(|note| &note.file))
            .chain(reserved.as_ref().map(|reserved| &reserved.lock))
            .collect();
        match attempt(&program, &programs, &args, maps.as_ref()) {
            Ok(started) => return Ok(started),
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::NotPermitted(why)) => reason = why,
        }
    }
    Err(failed(format!(
        "namespaces for device processes are not permitted ({reason}): {}",
        identity::namespace_remedy(uid == 0)
    )))
}

fn attempt(
    program: &File,
    binaries: &[&File],
    args: &Args,
    maps: Option<&Maps>,
) -> Result<Started, Attempt> {
    let fatal = |what: &'static str| {
        move |error: io::Error| Attempt::Failed(failed(format!("launcher: {what}: {error}")))
    };
    let argv = args
        .to_argv()
        .ok_or_else(|| Attempt::Failed(failed("launcher: a zero byte in an argument")))?;
    let (socket, launcher_end) = PacketSocket::pair().map_err(fatal("socketpair"))?;
    let vmm = sys::own_pidfd().map_err(fatal("pidfd_open"))?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(fatal("/dev/null"))?;
    let (mut sync, child_sync) = UnixStream::pair().map_err(fatal("socketpair"))?;

    let mut fds = vec![
        null.as_raw_fd(),
        null.as_raw_fd(),
        libc::STDERR_FILENO,
        launcher_end.as_fd().as_raw_fd(),
        vmm.as_raw_fd(),
    ];
    debug_assert_eq!(fds.len(), FIRST_BINARY_FD.unsigned_abs() as usize);
    fds.extend(binaries.iter().map(|file| file.as_raw_fd()));
    let exec = sys::RawExec {
        flags: args.rights.launcher_flags(),
        program: program.as_fd(),
        fds: &fds,
        argv: &argv,
        ambient: &args.rights.exec_capabilities(args.mapped()),
        sync_child: child_sync.as_raw_fd(),
        sync_parent: sync.as_raw_fd(),
    };
    let (pid, pidfd) = sys::clone_and_exec(&exec)
        .map_err(|error| Attempt::NotPermitted(format!("clone: {error}")))?;
    drop(child_sync);

    // From here on a child exists, waiting: every failure ends and reaps it.
    let end = || {
        let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        let deadline = Instant::now() + DEADLINE;
        let _ = sys::poll(&[(pidfd.as_fd(), libc::POLLIN)], Some(deadline));
        let _ = sys::reap(Some(pidfd.as_fd()));
    };
    if let Some(error) = maps.and_then(|maps| maps.write(pidfd.as_fd()).err()) {
        end();
        return Err(Attempt::NotPermitted(format!("id map: {error}")));
    }
    match go(&mut sync) {
        Ok(()) => Ok(Started {
            vmm_id: args
                .host_ids
                .and_then(|first| first.checked_add(VMM_SLOT))
                .filter(|_| !UNCONFINED),
            socket,
            pid,
            pidfd,
            cgroup: (
                args.cgroup
                    .as_ref()
                    .map(|c| c.path.clone())
                    .unwrap_or_default(),
                args.cgroup_note.clone(),
            ),
        }),
        Err(error) => {
            end();
            Err(Attempt::Failed(error))
        }
    }
}

/// Lets the child run and waits for the exec, which closes its end, or for its report.
fn go(sync: &mut UnixStream) -> Result<(), LauncherError> {
    use std::io::{Read, Write};
    let lost = |error: io::Error| failed(format!("launcher: while it starts: {error}"));
    sync.set_read_timeout(Some(DEADLINE)).map_err(lost)?;
    sync.write_all(&[1]).map_err(lost)?;
    let mut report = [0; 5];
    match sync.read_exact(&mut report) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        Err(error) => Err(lost(error)),
        Ok(()) => {
            let [stage, errno @ ..] = report;
            let stage = sys::RAW_EXEC_STAGES
                .get(usize::from(stage))
                .copied()
                .unwrap_or("start");
            let error = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
            let remedy = match error.raw_os_error().unwrap_or(0) {
                // fcntl(F_DUPFD) beyond RLIMIT_NOFILE.
                libc::EINVAL | libc::EMFILE if stage == "its descriptors" => {
                    "raise the limit of open files (ulimit -n 1024)"
                }
                _ => "is bulkhead-launcher a static program of this machine, executable by you?",
            };
            Err(failed(format!("launcher: {stage}: {error}; {remedy}")))
        }
    }
}
