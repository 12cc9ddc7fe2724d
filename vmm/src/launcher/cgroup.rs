//! The launcher's side of cgroup v2 (Linux's Documentation/admin-guide/cgroup-v2.rst): a leaf
//! for each device, beneath the VM's own group, whose directory the launcher holds from its
//! start on. A leaf is made before the device's first process, its processes are cloned into it
//! (CLONE_INTO_CGROUP), and it goes with the device.
//!
//! ```text
//!   PARENT                            own cgroup of the VMM, or --cgroup PATH
//!     bulkhead-vm-PID-START           of this VM; locked (flock) while it lives
//!       dev-ID                        a leaf: cpu.max, memory.max, pids.max, io.max
//!       vmm                           the VMM itself, where PARENT had it and had to be empty
//! ```
//!
//! What cannot be had is no error: limits on memory and threads fall back to resource limits
//! (setrlimit(2)), and every limit that is not enforced is told. Runs on the launcher's only
//! thread; nothing here blocks.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_proto::common::{IoLimits, Resources};

use super::cgroup_sys as sys;
use super::paths::reason;
use super::{MAX_DEVICES, printable, valid_id};

/// Controllers that limits are for, in the order in which they are told.
pub const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
/// Name of the leaf that the VMM moves to where its own cgroup must be empty.
pub const VMM_LEAF: &str = "vmm";
/// What a device's leaf is called, before its id.
pub const LEAF_PREFIX: &str = "dev-";
/// Period of cpu.max, microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// Files of a leaf that the VMM reads for statistics.
pub const USAGE_FILES: [&str; 6] = [
    "cpu.stat",
    "memory.current",
    "memory.peak",
    "memory.events",
    "pids.current",
    "io.stat",
];

/// What is to be limited, as resource limits of the process itself, where controllers are
/// missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fallback {
    /// RLIMIT_DATA, bytes.
    pub memory: Option<u64>,
    /// RLIMIT_NPROC.
    pub pids: Option<u64>,
}

/// What a process of a device needs to start: with less, no other could take its place. 0: nothing
/// is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Least {
    /// Of memory.max, bytes.
    pub memory: u64,
    /// Of RLIMIT_DATA, which counts address space, used or not.
    pub data: u64,
    /// Threads, those that the kernel makes for its I/O among them.
    pub pids: u32,
}

impl Least {
    /// Whether a process can start with these limits. `bounded`: memory is limited by a cgroup, not
    /// by a resource limit.
    fn check(&self, resources: &Resources, bounded: bool) -> Result<(), String> {
        let (memory, pids) = (resources.memory_bytes, resources.pids);
        let (least, how) = match bounded {
            true => (self.memory, ""),
            false => (self.data, ", where RLIMIT_DATA limits it,"),
        };
        let mut wrong = Vec::new();
        if memory != 0 && memory < least {
            wrong.push(format!(
                "memory={memory}: its process needs {least} bytes{how} to start: give at least {least}, or 0 for no limit"
            ));
        }
        if pids != 0 && pids < self.pids {
            wrong.push(format!(
                "pids={pids}: its process needs {least} threads: give at least {least}, or 0 for no limit",
                least = self.pids
            ));
        }
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(wrong.join("; ")),
        }
    }
}

/// The VM's group, as the VMM prepared it.
#[derive(Debug)]
pub struct Group {
    /// Its directory.
    pub directory: File,
    /// Its name in its parent.
    pub name: String,
    /// Its path below the mount.
    pub path: String,
    /// Controllers that its leaves have.
    pub controllers: Vec<String>,
}

struct Leaf {
    directory: Option<File>,
    resources: Resources,
    block_device: String,
    least: Least,
    /// The device is gone; its process may not be.
    doomed: bool,
}

/// The answer to a Place request.
#[derive(Debug, Default)]
pub struct Placed {
    /// Path of the leaf below the mount; empty: there is none.
    pub path: String,
    /// Files of it to be read, if it is new.
    pub files: Vec<(&'static str, OwnedFd)>,
    /// What is not enforced and why.
    pub not_enforced: Vec<String>,
}

/// All leaves of the VM.
pub struct Cgroups {
    group: Option<Group>,
    /// Why there is no group, or not every controller.
    note: String,
    leaves: BTreeMap<String, Leaf>,
}

impl Cgroups {
    /// Over a group, or nothing and why.
    pub fn new(group: Option<Group>, note: String) -> Self {
        Self {
            group,
            note,
            leaves: BTreeMap::new(),
        }
    }

    /// Makes a leaf for a device, or changes the limits of one.
    pub fn place(
        &mut self,
        id: &str,
        resources: &Resources,
        block_device: &str,
        least: Least,
    ) -> Result<Placed, String> {
        let say = |why: String| format!("device {}: its cgroup: {why}", printable(id));
        let of_leaf = self.leaves.get(id).filter(|leaf| !leaf.doomed);
        let bounded = of_leaf.is_none_or(|leaf| leaf.directory.is_some()) && self.has("memory");
        of_leaf
            .map_or(least, |leaf| leaf.least)
            .check(resources, bounded)
            .map_err(|why| format!("device {}: {why}", printable(id)))?;
        if !valid_id(id) {
            return Err(say("no such id".into()));
        }
        let mut placed = Placed::default();
        let known = self.leaves.contains_key(id);
        if !known {
            if self.leaves.len() >= MAX_DEVICES {
                return Err(say(format!("there are {MAX_DEVICES} already")));
            }
            let directory = self.make(id).unwrap_or_else(|why| {
                // Without one it runs as it would on a host that has no cgroups.
                placed.not_enforced.push(why);
                None
            });
            placed.files = usage_files(directory.as_ref());
            let leaf = Leaf {
                directory,
                resources: Resources::new(),
                block_device: block_device.to_owned(),
                least,
                doomed: false,
            };
            self.leaves.insert(id.to_owned(), leaf);
        }
        let Some(leaf) = self.leaves.get_mut(id) else {
            return Err(say("it is lost".into()));
        };
        let new = leaf.doomed || !known;
        if leaf.doomed {
            // Another device of that name.
            (leaf.doomed, leaf.least) = (false, least);
            leaf.block_device = block_device.to_owned();
            placed.files = usage_files(leaf.directory.as_ref());
        }
        let before = std::mem::replace(&mut leaf.resources, resources.clone());
        let before = (!new).then_some(before);
        let controllers = self
            .group
            .as_ref()
            .filter(|_| leaf.directory.is_some())
            .map(|group| group.controllers.as_slice())
            .unwrap_or_default();
        placed
            .not_enforced
            .extend(leaf.apply(controllers, &self.note, before.as_ref()));
        if let (Some(group), true) = (&self.group, leaf.directory.is_some()) {
            placed.path = format!("{}/{LEAF_PREFIX}{id}", group.path);
        }
        Ok(placed)
    }

    fn make(&self, id: &str) -> Result<Option<File>, String> {
        let Some(group) = &self.group else {
            return Ok(None);
        };
        let name = format!("{LEAF_PREFIX}{id}");
        match sys::make_directory(&group.directory, &name) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(format!("a cgroup of its own: {}", reason(&error))),
        }
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        sys::open_beneath(&group.directory, &name, flags)
            .map(Some)
            .map_err(|error| format!("a cgroup of its own: {}", reason(&error)))
    }

    /// The leaf that a process of a device is to be cloned into.
    pub fn leaf(&self, id: &str) -> Option<BorrowedFd<'_>> {
        Some(self.leaves.get(id)?.directory.as_ref()?.as_fd())
    }

    /// What is to be limited otherwise.
    pub fn fallback(&self, id: &str) -> Fallback {
        let Some(leaf) = self.leaves.get(id) else {
            return Fallback::default();
        };
        let has = |controller: &str| leaf.directory.is_some() && self.has(controller);
        let memory = leaf.resources.memory_bytes;
        let pids = u64::from(leaf.resources.pids);
        Fallback {
            memory: (memory != 0 && !has("memory")).then_some(memory),
            pids: (pids != 0 && !has("pids")).then_some(pids),
        }
    }

    fn has(&self, controller: &str) -> bool {
        let group = self.group.as_ref();
        group.is_some_and(|group| group.controllers.iter().any(|c| c == controller))
    }

    /// A process could not be cloned into its leaf: the device does without.
    pub fn give_up(&mut self, id: &str) {
        if let Some(leaf) = self.leaves.get_mut(id) {
            leaf.directory = None;
            self.remove(id);
        }
    }

    /// A device is gone; its leaf goes as soon as its process has.
    pub fn forget(&mut self, id: &str) {
        if let Some(leaf) = self.leaves.get_mut(id) {
            leaf.doomed = true;
        }
        self.prune();
    }

    /// Removes the leaves of devices that are gone. To be called when a process has ended.
    pub fn prune(&mut self) {
        let doomed: Vec<String> = self
            .leaves
            .iter()
            .filter(|(_, leaf)| leaf.doomed)
            .map(|(id, _)| id.clone())
            .collect();
        for id in doomed {
            if self.remove(&id) {
                self.leaves.remove(&id);
            }
        }
    }

    fn remove(&self, id: &str) -> bool {
        let Some(group) = &self.group else {
            return true;
        };
        match sys::remove_directory(&group.directory, &format!("{LEAF_PREFIX}{id}")) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        }
    }

    /// The VM ends: removes all leaves, and the VM's group. Where the VMM itself is in it, or
    /// a process does not end, it stays for `bulkhead reap`.
    pub fn remove_all(&mut self) {
        for id in self.leaves.keys() {
            self.remove(id);
        }
        self.leaves.clear();
        if let Some(group) = self.group.take() {
            let _ = sys::remove_directory(&group.directory, VMM_LEAF);
            let _ = sys::remove_directory(&group.directory, &format!("../{}", group.name));
        }
    }
}

impl Leaf {
    /// Writes the limits; says what is not enforced. `before`: those that a process may run with
    /// already.
    fn apply(&self, controllers: &[String], note: &str, before: Option<&Resources>) -> Vec<String> {
        let mut not_enforced = Vec::new();
        let missing = |controller: &str| match self.directory {
            Some(_) => format!("the VM's cgroup has no {controller} controller"),
            None if note.is_empty() => "it has no cgroup of its own".to_owned(),
            None => format!("no cgroup: {note}"),
        };
        let Resources {
            cpu_percent,
            memory_bytes,
            pids,
            ..
        } = self.resources;
        let cpu = match u64::from(cpu_percent) {
            0 => format!("max {PERIOD_US}"),
            percent => format!("{} {PERIOD_US}", percent.saturating_mul(PERIOD_US / 100)),
        };
        let number = |limit: u64| match limit {
            0 => "max".to_owned(),
            limit => limit.to_string(),
        };
        let by_rlimit = |name: &str, same: fn(&Resources, &Resources) -> bool| match before {
            Some(before) if !same(before, &self.resources) => format!(
                "{name} is a resource limit of the process: in force from its next start on"
            ),
            _ => format!("a resource limit of the process ({name}) instead"),
        };
        for (controller, file, wanted, value, otherwise) in [
            ("cpu", "cpu.max", cpu_percent != 0, cpu, None),
            (
                "memory",
                "memory.max",
                memory_bytes != 0,
                number(memory_bytes),
                Some(by_rlimit("RLIMIT_DATA", |a, b| {
                    a.memory_bytes == b.memory_bytes
                })),
            ),
            (
                "pids",
                "pids.max",
                pids != 0,
                number(pids.into()),
                Some(by_rlimit("RLIMIT_NPROC", |a, b| a.pids == b.pids)),
            ),
        ] {
            let why = if controllers.iter().any(|c| c == controller) {
                match self.write(file, &value) {
                    Ok(()) => continue,
                    Err(error) => reason(&error),
                }
            } else {
                missing(controller)
            };
            if wanted {
                let otherwise = otherwise
                    .map(|text| format!("; {text}"))
                    .unwrap_or_default();
                not_enforced.push(format!("{controller}: {why}{otherwise}"));
            }
        }
        let io = self.resources.io.as_ref();
        let wanted = io.is_some_and(|io| *io != IoLimits::new());
        let has = controllers.iter().any(|c| c == "io");
        let why = match (has, whole_device(&self.block_device)) {
            (false, _) => Some(missing("io")),
            (true, None) => Some("its file lies on no block device".to_owned()),
            (true, Some(device)) => {
                let line = io_line(&device, io);
                self.write("io.max", &line).err().map(|e| reason(&e))
            }
        };
        if let (true, Some(why)) = (wanted, why) {
            not_enforced.push(format!("io: {why}"));
        }
        not_enforced
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        let Some(directory) = &self.directory else {
            return Err(io::ErrorKind::NotFound.into());
        };
        sys::open_beneath(directory, file, libc::O_WRONLY)?.write_all(value.as_bytes())
    }
}

/// Files of a leaf that tell what its processes use.
fn usage_files(directory: Option<&File>) -> Vec<(&'static str, OwnedFd)> {
    let open = |name| {
        let file = sys::open_beneath(directory?, name, libc::O_RDONLY);
        Some((name, file.ok()?.into()))
    };
    USAGE_FILES.into_iter().filter_map(open).collect()
}

/// A line of io.max.
fn io_line(device: &str, io: Option<&IoLimits>) -> String {
    let number = |limit: u64| match limit {
        0 => "max".to_owned(),
        limit => limit.to_string(),
    };
    let of = |get: fn(&IoLimits) -> u64| number(io.map_or(0, get));
    format!(
        "{device} rbps={} wbps={} riops={} wiops={}",
        of(|io| io.read_bps),
        of(|io| io.write_bps),
        of(|io| io.read_iops),
        of(|io| io.write_iops),
    )
}

/// The whole block device that a partition is of: io.max takes no partitions.
fn whole_device(device: &str) -> Option<String> {
    let (major, minor) = device.split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    if major == 0 {
        // An anonymous one: of a file system in memory, or on a network.
        return None;
    }
    let place = format!("/sys/dev/block/{major}:{minor}");
    if !fs::exists(format!("{place}/partition")).unwrap_or(false) {
        return Some(format!("{major}:{minor}"));
    }
    let whole = fs::read_to_string(format!("{place}/../dev")).ok()?;
    Some(whole.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_limits_are_a_line_of_io_max() {
        let mut io = IoLimits::new();
        (io.read_bps, io.write_iops) = (1 << 20, 100);
        assert_eq!(
            io_line("8:16", Some(&io)),
            "8:16 rbps=1048576 wbps=max riops=max wiops=100"
        );
        assert_eq!(
            io_line("8:16", None),
            "8:16 rbps=max wbps=max riops=max wiops=max"
        );
        assert_eq!(whole_device("0:45"), None);
        assert_eq!(whole_device("8"), None);
        assert_eq!(whole_device("../8:1"), None);
    }

    #[test]
    fn without_a_group_limits_fall_back_to_resource_limits_and_say_so() {
        let mut cgroups = Cgroups::new(None, "this host has no cgroup v2".into());
        let mut resources = Resources::new();
        (resources.cpu_percent, resources.memory_bytes) = (50, 64 << 20);
        resources.pids = 9;
        resources.io.mut_or_insert_default().read_bps = 1;
        let placed = cgroups
            .place("d", &resources, "8:0", Least::default())
            .unwrap();
        assert!(placed.path.is_empty() && placed.files.is_empty());
        let told = &placed.not_enforced;
        assert_eq!(told.len(), 4, "{told:?}");
        assert!(told.iter().all(|line| line.contains("no cgroup v2")));
        assert!(told.iter().any(|line| line.contains("RLIMIT_DATA")));
        // A running process has the limits that are as before.
        resources.pids = 8;
        let placed = cgroups.place("d", &resources, "8:0", Least::default());
        let told = placed.unwrap().not_enforced;
        let says = |what: &str, how: &str| {
            let mut all = told.iter();
            all.any(|line| line.contains(what) && line.contains(how))
        };
        assert!(says("RLIMIT_DATA", "instead"), "{told:?}");
        assert!(says("RLIMIT_NPROC", "next start"), "{told:?}");
        resources.pids = 9;
        let _ = cgroups.place("d", &resources, "8:0", Least::default());
        let fallback = cgroups.fallback("d");
        assert_eq!(fallback.memory, Some(64 << 20));
        assert_eq!(fallback.pids, Some(9));
        assert_eq!(cgroups.fallback("e"), Fallback::default());
        // Nothing is asked for: nothing is missing.
        let placed = cgroups
            .place("d", &Resources::new(), "", Least::default())
            .unwrap();
        assert_eq!(placed.not_enforced, Vec::<String>::new());
        assert!(
            cgroups
                .place("../x", &resources, "", Least::default())
                .is_err()
        );
        cgroups.forget("d");
        assert_eq!(cgroups.fallback("d"), Fallback::default());
    }

    #[test]
    fn limits_with_which_no_process_could_start_are_refused_and_change_nothing() {
        let mut cgroups = Cgroups::new(None, String::new());
        let least = Least {
            memory: 8 << 20,
            data: 20 << 20,
            pids: 3,
        };
        let limits = |memory_bytes, pids| {
            let mut resources = Resources::new();
            (resources.memory_bytes, resources.pids) = (memory_bytes, pids);
            resources
        };
        let refused = cgroups.place("d", &limits(0, 2), "", least).unwrap_err();
        assert!(refused.contains("at least 3"), "{refused}");
        assert!(cgroups.leaf("d").is_none() && cgroups.leaves.is_empty());
        cgroups.place("d", &limits(20 << 20, 3), "", least).unwrap();
        // What it needs is known from then on.
        let unknown = Least::default();
        for (memory, pids, words) in [
            ((20 << 20) - 1, 3, "at least 20971520"),
            (8 << 20, 0, "RLIMIT_DATA"),
            (0, 2, "at least 3"),
            (1 << 20, 1, "at least 3"),
            (1 << 20, 1, "at least 20971520"),
        ] {
            let refused = cgroups.place("d", &limits(memory, pids), "", unknown);
            let refused = refused.unwrap_err();
            assert!(refused.contains(words), "{refused}");
            assert_eq!(cgroups.fallback("d").memory, Some(20 << 20));
            assert_eq!(cgroups.fallback("d").pids, Some(3));
        }
        cgroups.place("d", &limits(0, 0), "", unknown).unwrap();
        assert_eq!(cgroups.fallback("d"), Fallback::default());
        // By memory.max less is enough.
        assert_eq!(least.check(&limits(8 << 20, 0), true), Ok(()));
        assert!(least.check(&limits((8 << 20) - 1, 0), true).is_err());
        // Another device of that name, of which nothing is known.
        cgroups.forget("d");
        cgroups
            .place("d", &limits(8 << 20, 1), "", unknown)
            .unwrap();
    }

    #[test]
    fn no_more_leaves_than_devices() {
        let mut cgroups = Cgroups::new(None, String::new());
        for n in 0..MAX_DEVICES {
            cgroups
                .place(&format!("d{n}"), &Resources::new(), "", Least::default())
                .unwrap();
        }
        assert!(
            cgroups
                .place("one-more", &Resources::new(), "", Least::default())
                .is_err()
        );
        cgroups.forget("d3");
        assert!(
            cgroups
                .place("one-more", &Resources::new(), "", Least::default())
                .is_ok()
        );
    }
}
