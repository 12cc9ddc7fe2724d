//! The VMM's side of cgroup v2: finds the cgroup that the VM's own is to be made in, makes and
//! locks it, and hands the controllers down (Linux's Documentation/admin-guide/cgroup-v2.rst,
//! "Delegation" and "No Internal Process Constraint"). Runs on the main thread before the VMM
//! confines itself; the launcher goes on with the directory that comes out (`cgroup`).
//!
//! By default that is the VMM's own cgroup. Nothing is taken by force: where it may not be
//! written, or holds other processes so that it can hand no controllers down, devices do
//! without, and a note says why. A cgroup that is named by `--cgroup` must do.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::cgroup::{CONTROLLERS, Group, VMM_LEAF};
use super::cgroup_sys as sys;
use super::paths::reason;
use super::printable;

/// What the VM's own cgroup is called, before the pid and start time of its VMM.
pub const GROUP_PREFIX: &str = "bulkhead-vm-";
/// Attempts to make it, should `bulkhead reap` take it for left behind before it is locked.
const ATTEMPTS: usize = 3;

/// Where the VM's cgroup is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// In the VMM's own.
    #[default]
    Own,
    /// Nowhere.
    Off,
    /// In this one, a directory.
    At(PathBuf),
}

/// The VM's cgroup, if it has one, and what is missing.
#[derive(Debug, Default)]
pub struct Prepared {
    /// It.
    pub group: Option<Group>,
    /// Why there is none, or not every controller; empty: nothing is missing.
    pub note: String,
}

impl Prepared {
    /// Removes it, for a VM that did not come to be.
    pub fn undo(&self) {
        if let Some(group) = &self.group {
            let _ = sys::remove_directory(&group.directory, VMM_LEAF);
            let _ = sys::remove_directory(&group.directory, &format!("../{}", group.name));
        }
    }
}

/// Where cgroup v2 is mounted.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's place.
    pub place: PathBuf,
    /// What of the hierarchy is mounted there.
    root: PathBuf,
}

impl Mount {
    /// Of this process's mount namespace.
    pub fn find() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo").ok()?)
    }

    fn parse(mountinfo: &str) -> Option<Self> {
        mountinfo.lines().find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            if !kind.starts_with("cgroup2 ") {
                return None;
            }
            let mut fields = mount.split(' ').skip(3);
            let root = PathBuf::from(fields.next()?);
            // Octal escapes for blanks do not occur where systems mount it.
            let place = PathBuf::from(fields.next()?);
            Some(Self { place, root })
        })
    }

    /// The directory of a cgroup, by its path in /proc/PID/cgroup.
    pub fn directory(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let below = path.strip_prefix(&self.root).ok()?;
        Some(self.place.join(below))
    }

    /// The reverse.
    fn path(&self, directory: &Path) -> Option<String> {
        let below = directory.strip_prefix(&self.place).ok()?;
        self.root.join(below).to_str().map(str::to_owned)
    }
}

/// The path of a process's cgroup v2, from /proc/PID/cgroup.
pub fn path_of(pid: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(str::to_owned)
}

/// Makes the VM's cgroup.
///
/// # Errors
/// One line, if a cgroup that was named cannot be used.
pub fn prepare(choice: &Choice) -> Result<Prepared, String> {
    let nothing = |why: String| {
        Ok(Prepared {
            group: None,
            note: why,
        })
    };
    let Some(mount) = Mount::find() else {
        let why = "cgroup v2 is not mounted: mount it on /sys/fs/cgroup".to_owned();
        return match choice {
            Choice::At(path) => Err(format!("--cgroup {}: {why}", path.display())),
            _ => nothing(why),
        };
    };
    let parent = match choice {
        Choice::Off => return nothing("switched off by --cgroup off".into()),
        Choice::At(path) => path.canonicalize().map_err(|error| {
            format!(
                "--cgroup {}: {}: name a directory of cgroup v2",
                printable(&path.to_string_lossy()),
                reason(&error)
            )
        })?,
        Choice::Own => match path_of("self").and_then(|path| mount.directory(&path)) {
            Some(parent) => parent,
            None => {
                return nothing(
                    "the VMM's own cgroup is not mounted here: name one with --cgroup PATH".into(),
                );
            }
        },
    };
    match make(&mount, &parent) {
        Ok(prepared) => Ok(prepared),
        Err(why) => {
            let name = printable(&parent.to_string_lossy());
            match choice {
                Choice::At(_) => Err(format!("--cgroup {name}: {why}")),
                _ => nothing(format!("cgroup {name}: {why}")),
            }
        }
    }
}

/// Field 22 of /proc/self/stat, the time at which this process started, in clock ticks.
fn start_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// What tells this process from any other of this boot.
pub fn own_name() -> String {
    format!(
        "{}-{}",
        std::process::id(),
        start_time().unwrap_or_default()
    )
}

fn make(mount: &Mount, parent: &Path) -> Result<Prepared, String> {
    let path = mount
        .path(parent)
        .ok_or("is not in cgroup v2: name a directory of it")?;
    let parent_directory = File::open(parent)
        .map_err(|error| format!("{}: name a directory of cgroup v2", reason(&error)))?;
    let name = format!("{GROUP_PREFIX}{}", own_name());
    let directory = make_locked(&parent_directory, &name)?;
    let group = Group {
        directory,
        path: format!("{}/{name}", path.trim_end_matches('/')),
        name,
        controllers: Vec::new(),
    };
    let mut prepared = Prepared {
        group: Some(group),
        note: String::new(),
    };
    if let Err(why) = hand_down(&parent_directory, &mut prepared) {
        prepared.note = format!("cgroup {}: {why}", printable(&parent.to_string_lossy()));
    }
    Ok(prepared)
}

/// Makes a directory that nobody takes for left behind.
fn make_locked(parent: &File, name: &str) -> Result<File, String> {
    for _ in 0..ATTEMPTS {
        match sys::make_directory(parent, name) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                let remedy = match error.raw_os_error() {
                    Some(libc::EROFS) => "mount it writable, or name another with --cgroup PATH",
                    Some(libc::EAGAIN) => {
                        "its cgroup.max.descendants or cgroup.max.depth is reached"
                    }
                    _ => {
                        "have it delegated (systemd-run --scope -p Delegate=yes), or name another with --cgroup PATH"
                    }
                };
                return Err(format!("{}: {remedy}", reason(&error)));
            }
        }
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let Ok(directory) = sys::open_beneath(parent, name, flags) else {
            continue;
        };
        match sys::try_lock(&directory) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => return Err(format!("its lock: {}", reason(&error))),
        }
        // It is there still, and the one that is locked.
        if sys::open_beneath(&directory, "cgroup.procs", libc::O_RDONLY).is_ok() {
            return Ok(directory);
        }
    }
    Err("its own directory in it is taken away again and again".into())
}

/// Lets the VM's leaves have controllers: those that the parent has, if it can hand them down.
fn hand_down(parent: &File, prepared: &mut Prepared) -> Result<(), String> {
    let Some(group) = &mut prepared.group else {
        return Ok(());
    };
    let has = words(parent, "cgroup.controllers")?;
    let wanted = CONTROLLERS.iter().any(|c| has.iter().any(|h| h == c));
    // No Internal Process Constraint: what holds processes hands nothing down, but for the root.
    // (Controllers that know threads it would hand down, and make its children useless by it.)
    let is_root = sys::open_beneath(parent, "cgroup.type", libc::O_RDONLY).is_err();
    if wanted && !is_root && !words(parent, "cgroup.procs")?.is_empty() {
        move_out(parent, group)?;
    }
    let mut missing = Vec::new();
    for controller in CONTROLLERS {
        if !has.iter().any(|c| c == controller) {
            missing.push(controller.to_owned());
            continue;
        }
        let change = format!("+{controller}");
        let handed = write(parent, "cgroup.subtree_control", &change)
            .and_then(|()| write(&group.directory, "cgroup.subtree_control", &change));
        match handed {
            Ok(()) => group.controllers.push(controller.to_owned()),
            Err(error) => missing.push(format!("{controller} ({})", reason(&error))),
        }
    }
    match missing.as_slice() {
        [] => Ok(()),
        missing => Err(format!(
            "hands down no {}: enable them in cgroup.subtree_control of each cgroup above, take them from cgroup v1, or name another with --cgroup PATH",
            missing.join(", "),
        )),
    }
}

/// Moves the VMM out of the parent, if it is the only one there.
fn move_out(parent: &File, group: &Group) -> Result<(), String> {
    let io = |what: &'static str| move |error: io::Error| format!("{what}: {}", reason(&error));
    let processes = words(parent, "cgroup.procs")?;
    let own = std::process::id().to_string();
    if processes.iter().any(|pid| *pid != own) {
        return Err(
            "holds other processes, so that it can hand no controllers down: start bulkhead in a cgroup of its own (systemd-run --scope -p Delegate=yes), or name one with --cgroup PATH"
                .into(),
        );
    }
    match sys::make_directory(&group.directory, VMM_LEAF) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io("a leaf for the VMM")(error));
        }
        _ => {}
    }
    write(&group.directory, &format!("{VMM_LEAF}/cgroup.procs"), "0")
        .inspect_err(|_| {
            let _ = sys::remove_directory(&group.directory, VMM_LEAF);
        })
        .map_err(io("moving the VMM to a leaf"))
}

fn words(directory: &File, file: &str) -> Result<Vec<String>, String> {
    let mut text = String::new();
    sys::open_beneath(directory, file, libc::O_RDONLY)
        .and_then(|mut file| io::Read::read_to_string(&mut file, &mut text))
        .map_err(|error| format!("{file}: {}", reason(&error)))?;
    Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
}

fn write(directory: &File, file: &str, value: &str) -> io::Result<()> {
    sys::open_beneath(directory, file, libc::O_WRONLY)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_and_paths_lead_there_and_back() {
        let info = "24 22 0:21 / /sys rw - sysfs sysfs rw\n\
                    30 24 0:26 /docker/ab /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n";
        let mount = Mount::parse(info).unwrap();
        assert_eq!(mount.place, Path::new("/sys/fs/cgroup"));
        let directory = mount.directory("/docker/ab/x").unwrap();
        assert_eq!(directory, Path::new("/sys/fs/cgroup/x"));
        assert_eq!(mount.path(&directory).as_deref(), Some("/docker/ab/x"));
        assert_eq!(mount.directory("/elsewhere"), None);
        assert_eq!(mount.path(Path::new("/tmp")), None);
        assert_eq!(Mount::parse("1 1 0:1 / / rw - ext4 /dev/vda rw\n"), None);
    }

    #[test]
    fn nothing_is_made_where_it_is_switched_off_or_named_wrongly() {
        let off = prepare(&Choice::Off).unwrap();
        assert!(off.group.is_none());
        for wrong in ["/proc", "/no/such/cgroup"] {
            let line = prepare(&Choice::At(wrong.into())).unwrap_err();
            assert!(line.starts_with(&format!("--cgroup {wrong}: ")), "{line}");
        }
    }

    #[test]
    fn a_process_has_a_name_of_its_own() {
        let (pid, time) = own_name()
            .split_once('-')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        assert_eq!(pid.parse(), Ok(std::process::id()));
        assert!(time.parse::<u64>().unwrap() > 0);
    }
}
