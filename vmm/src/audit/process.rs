//! One process as proc(5) shows it, and the tree of all of them. Called by the audit only.
//!
//! A process may end, and its pid be taken by another, between two reads: its start time is
//! read first and last, and a process that differs is reported as ended.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::fds::{self, Fd};
use super::limits::{self, Limits};
use super::mappings::{self, Mappings};
use super::trace::{self, Filters};
use crate::launcher::printable;

/// Most threads, root entries and descriptors that are read of one process.
const MAX_THREADS: usize = 4096;
const MAX_ROOT_ENTRIES: usize = 32;

/// Every process and its parent.
pub struct Tree(BTreeMap<i32, i32>);

impl Tree {
    /// Reads /proc.
    pub fn read() -> io::Result<Self> {
        let mut parents = BTreeMap::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            // One that has ended meanwhile has no place in the tree.
            if let Some(parent) = stat_field(pid, PPID).and_then(|f| f.parse().ok()) {
                parents.insert(pid, parent);
            }
        }
        Ok(Self(parents))
    }

    /// From pairs of pid and parent.
    #[cfg(test)]
    pub fn from_parents(pairs: impl IntoIterator<Item = (i32, i32)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// Whether the process exists.
    pub fn contains(&self, pid: i32) -> bool {
        self.0.contains_key(&pid)
    }

    /// Its parent.
    pub fn parent(&self, pid: i32) -> Option<i32> {
        self.0.get(&pid).copied()
    }

    /// Its children.
    pub fn children(&self, pid: i32) -> impl Iterator<Item = i32> + '_ {
        self.0
            .iter()
            .filter(move |(_, parent)| **parent == pid)
            .map(|(child, _)| *child)
    }
}

/// Fields of /proc/PID/stat after the command's name, from 0.
const STATE: usize = 0;
const PPID: usize = 1;
const FLAGS: usize = 6;
const START_TIME: usize = 19;

/// A field of /proc/PID/stat. The name may hold spaces and parentheses: fields are counted
/// from the last parenthesis.
fn stat_field(pid: i32, index: usize) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let (_, fields) = text.rsplit_once(')')?;
    fields
        .split_ascii_whitespace()
        .nth(index)
        .map(str::to_owned)
}

/// Whether the process executes a file of this name.
pub fn executes(pid: i32, program: &str) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| is_called(&exe, program))
}

/// A file of that name, unlinked or not, or a copy of it in memory.
fn is_called(path: &Path, name: &str) -> bool {
    let last = path.file_name().and_then(|last| last.to_str());
    last.is_some_and(|last| {
        let last = last.strip_suffix(" (deleted)").unwrap_or(last);
        last.strip_prefix("memfd:").unwrap_or(last) == name
    })
}

/// Whether it has a file of this name open.
pub fn holds(pid: i32, name: &str) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut entries = entries.into_iter().flatten().flatten();
    entries.any(|entry| fs::read_link(entry.path()).is_ok_and(|target| is_called(&target, name)))
}

/// Whether it is stopped by a signal or by a tracer.
pub fn is_stopped(pid: i32) -> bool {
    stat_field(pid, STATE).is_some_and(|state| matches!(state.as_str(), "T" | "t"))
}

/// When it started, in clock ticks after boot.
pub fn started(pid: i32) -> Option<u64> {
    stat_field(pid, START_TIME)?.parse().ok()
}

/// Whether it is the kernel's own, with no program.
pub fn is_kernels(pid: i32) -> bool {
    /// PF_KTHREAD of the kernel's <linux/sched.h>.
    const KTHREAD: u32 = 0x0020_0000;
    let flags = stat_field(pid, FLAGS).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & KTHREAD != 0)
}

/// Its real uid.
pub fn uid(pid: i32) -> Option<u32> {
    let status = Status::read(&format!("/proc/{pid}/status")).ok()?;
    status.numbers("Uid").first().copied()
}

/// The five capability sets, as 64-bit masks in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Kept across exec of a file that has them inheritable.
    pub inheritable: String,
    /// May be made effective.
    pub permitted: String,
    /// In force.
    pub effective: String,
    /// The most that an exec can give.
    pub bounding: String,
    /// Kept across exec.
    pub ambient: String,
}

/// A thread: threads may differ in capabilities and filters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Thread {
    /// Thread id.
    pub tid: i32,
    /// Its name, escaped.
    pub name: String,
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// no_new_privs.
    pub no_new_privs: bool,
    /// 0 off, 1 strict, 2 filter.
    pub seccomp_mode: u32,
    /// How many filters lie on each other; old kernels do not say.
    pub seccomp_filters: Option<u32>,
    /// It is the kernel's own (of KVM's or io_uring's) and runs no code of the process.
    pub worker: bool,
    /// Its descriptors, or its root and current directory, are not those of the process, which are what
    /// is read here.
    pub apart: bool,
    /// Who traces it; 0: nobody.
    pub tracer: i32,
    /// What they are, read from the kernel; `None` where it does not show them all to us.
    pub filters: Option<Filters>,
}

/// One namespace of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// "user", "mnt", …
    pub kind: String,
    /// As the kernel names it: kind and inode.
    pub id: String,
    /// It is the one that the audit itself runs in.
    pub shared: bool,
}

/// The root directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Root {
    /// It is the directory that the audit sees as "/".
    pub shared: bool,
    /// Names in it (the first few), escaped.
    pub entries: Vec<String>,
    /// Mounts that the process sees.
    pub mounts: Option<usize>,
    /// Permission bits.
    pub mode: String,
    /// It is mounted read-only.
    pub read_only: Option<bool>,
}

/// What the kernel says of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its program, escaped.
    pub exe: Option<String>,
    /// Real, effective, saved and file system uid, as the audit sees them.
    pub uid: Vec<u32>,
    /// The same for gid.
    pub gid: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its pid in each pid namespace from the audit's inwards.
    pub pids: Vec<i32>,
    /// Who traces it, 0 for nobody: such a one may change what it does, and lift its filters.
    pub tracer: i32,
    /// When it started, in clock ticks after boot.
    pub started: Option<u64>,
    /// Its threads.
    pub threads: Vec<Thread>,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
    /// Its root directory.
    pub root: Option<Root>,
    /// Its current directory, escaped.
    pub cwd: Option<String>,
    /// Its open descriptors.
    pub fds: Vec<Fd>,
    /// What it has mapped.
    pub mappings: Option<Mappings>,
    /// Others of its user may trace it, and it may leave a core: for a process of root's, which
    /// the kernel shows no otherwise, nothing is known.
    pub dumpable: Option<bool>,
    /// What bounds its use of the host.
    pub limits: Option<Limits>,
    /// What may not be read, one line each.
    pub unread: Vec<String>,
}

/// The namespaces that are compared; a time namespace is nobody's concern here.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Reads a process; a line when it is not there (any more).
pub fn read(pid: i32) -> Result<Process, String> {
    let ended = || format!("process {pid} ended while it was read; run the audit again");
    let began = stat_field(pid, START_TIME).ok_or_else(|| {
        format!("process {pid} is gone, or hidden by /proc's hidepid (then run the audit as root)")
    })?;
    let mut process = Process::default();
    let status = Status::read(&format!("/proc/{pid}/status")).map_err(|_| ended())?;
    process.started = began.parse().ok();
    process.uid = status.numbers("Uid");
    process.gid = status.numbers("Gid");
    process.groups = status.numbers("Groups");
    process.pids = status.numbers("NSpid");
    process.threads = threads(pid).map_err(|_| ended())?;
    let tracers = process.threads.iter().map(|thread| thread.tracer);
    process.tracer = tracers.max().unwrap_or(0);
    let mut denied = Vec::new();
    match fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(exe) => process.exe = Some(printable(&exe.to_string_lossy())),
        Err(error) => denied.push(("its program", error)),
    }
    match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(cwd) => process.cwd = Some(printable(&cwd.to_string_lossy())),
        Err(error) => denied.push(("its current directory", error)),
    }
    match namespaces(pid) {
        Ok(namespaces) => process.namespaces = namespaces,
        Err(error) => denied.push(("its namespaces", error)),
    }
    match root(pid) {
        Ok(root) => process.root = Some(root),
        Err(error) => denied.push(("its root directory", error)),
    }
    match fds::read(pid) {
        Ok(fds) => {
            if fds.len() >= fds::MAX_FDS {
                process.unread.push(format!(
                    "only {} of its descriptors were read",
                    fds::MAX_FDS
                ));
            }
            process.fds = fds;
        }
        Err(error) => denied.push(("its descriptors", error)),
    }
    match mappings::read(pid) {
        Ok(mappings) => process.mappings = Some(mappings),
        Err(error) => denied.push(("its mappings", error)),
    }
    process.dumpable = dumpable(pid, &process.uid);
    process.limits = Some(limits::read(pid));
    for thread in &mut process.threads {
        // Some kernels show the oldest alone: part of them says nothing.
        let all = thread.seccomp_filters.and_then(|n| usize::try_from(n).ok());
        thread.filters = trace::read(thread.tid).filter(|f| Some(f.policies.len()) == all);
    }
    // One that has ended meanwhile has none to be read.
    process.threads.retain(|thread| {
        thread.filters.is_some() || Path::new(&format!("/proc/{pid}/task/{}", thread.tid)).exists()
    });
    if stat_field(pid, START_TIME).as_ref() != Some(&began) || status.text("State").starts_with('Z')
    {
        return Err(ended());
    }
    if !denied.is_empty() {
        let what: Vec<&str> = denied.iter().map(|(what, _)| *what).collect();
        let why = denied
            .first()
            .map(|(_, error)| error.to_string())
            .unwrap_or_default();
        process.unread.push(format!(
            "{} may not be read ({why}); run the audit as root",
            what.join(", ")
        ));
    }
    Ok(process)
}

/// What is dumpable belongs to its user in /proc, what is not to root (proc(5)).
fn dumpable(pid: i32, uid: &[u32]) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    let effective = *uid.get(1)?;
    let owner = fs::metadata(format!("/proc/{pid}/environ")).ok()?.uid();
    (effective != 0).then_some(owner == effective)
}

/// PF_IO_WORKER and PF_USER_WORKER of the kernel's <linux/sched.h>.
const WORKER: u32 = 0x10 | 0x4000;

fn is_worker(tid: i32) -> bool {
    let flags = stat_field(tid, FLAGS).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & WORKER != 0)
}

fn threads(pid: i32) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.take(MAX_THREADS) {
        let Some(tid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(status) = Status::read(&format!("/proc/{pid}/task/{tid}/status")) else {
            // The thread has ended.
            continue;
        };
        threads.push(Thread {
            tid,
            name: printable(&status.text("Name")),
            capabilities: Capabilities {
                inheritable: status.text("CapInh"),
                permitted: status.text("CapPrm"),
                effective: status.text("CapEff"),
                bounding: status.text("CapBnd"),
                ambient: status.text("CapAmb"),
            },
            no_new_privs: status.text("NoNewPrivs") == "1",
            seccomp_mode: status.text("Seccomp").parse().unwrap_or(0),
            seccomp_filters: status.text("Seccomp_filters").parse().ok(),
            worker: is_worker(tid),
            apart: tid != pid && trace::apart(pid, tid),
            tracer: status.numbers("TracerPid").first().copied().unwrap_or(0),
            filters: None,
        });
    }
    threads.sort_by_key(|thread| thread.tid);
    if threads.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(threads)
}

/// /proc/PID/status. Its first line is the name, whose newline the kernel escapes; a key is
/// what stands before the first colon of a line.
struct Status(Vec<(String, String)>);

impl Status {
    fn read(path: &str) -> io::Result<Self> {
        Ok(Self::parse(&String::from_utf8_lossy(&fs::read(path)?)))
    }

    fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
                .collect(),
        )
    }

    fn text(&self, key: &str) -> String {
        self.0
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value.clone())
            .unwrap_or_default()
    }

    fn numbers<T: std::str::FromStr>(&self, key: &str) -> Vec<T> {
        self.text(key)
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect()
    }
}

fn namespaces(pid: i32) -> io::Result<Vec<Namespace>> {
    let name = |owner: &str, kind: &str| {
        fs::read_link(format!("/proc/{owner}/ns/{kind}"))
            .map(|link| link.to_string_lossy().into_owned())
    };
    let mut namespaces = Vec::new();
    for kind in NAMESPACES {
        // A kernel built without this kind has no entry, for us either.
        let Ok(ours) = name("self", kind) else {
            continue;
        };
        let id = name(&pid.to_string(), kind)?;
        namespaces.push(Namespace {
            kind: kind.to_owned(),
            shared: id == ours,
            id,
        });
    }
    Ok(namespaces)
}

/// Whether a process has a namespace of this kind that is not the audit's.
pub fn has_own_namespace(pid: i32, kind: &str) -> bool {
    let of = |owner: &str| fs::read_link(format!("/proc/{owner}/ns/{kind}"));
    matches!((of("self"), of(&pid.to_string())), (Ok(ours), Ok(its)) if ours != its)
}

fn root(pid: i32) -> io::Result<Root> {
    use std::os::unix::fs::MetadataExt;
    let place = format!("/proc/{pid}/root/");
    let metadata = fs::metadata(&place)?;
    let ours = fs::metadata("/")?;
    let mut entries = Vec::new();
    for entry in fs::read_dir(Path::new(&place))?.take(MAX_ROOT_ENTRIES) {
        entries.push(printable(&entry?.file_name().to_string_lossy()));
    }
    entries.sort();
    let mounts = fs::read(format!("/proc/{pid}/mountinfo")).ok();
    let mounts = mounts.map(|text| String::from_utf8_lossy(&text).into_owned());
    Ok(Root {
        shared: (metadata.dev(), metadata.ino()) == (ours.dev(), ours.ino()),
        entries,
        mounts: mounts.as_ref().map(|text| text.lines().count()),
        mode: format!("{:04o}", metadata.mode() & 0o7777),
        read_only: mounts.as_deref().and_then(root_is_read_only),
    })
}

/// Whether the mount at "/" in a mountinfo is read-only: the last one there lies on top.
fn root_is_read_only(mountinfo: &str) -> Option<bool> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(4);
            (fields.next()? == "/").then(|| fields.next())?
        })
        .next_back()
        .map(|options| options.split(',').any(|option| option == "ro"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_read_with_its_threads_and_shares_every_namespace_with_itself() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = read(pid).unwrap();
        assert_eq!(process.unread, Vec::<String>::new());
        assert_eq!(process.uid.len(), 4);
        assert!(!process.threads.is_empty());
        assert!(process.namespaces.iter().all(|n| n.shared));
        assert!(
            process
                .root
                .as_ref()
                .is_some_and(|r| r.shared && !r.entries.is_empty())
        );
        let tree = Tree::read().unwrap();
        assert!(tree.contains(pid) && tree.parent(pid).is_some());
    }

    #[test]
    fn a_process_that_is_not_there_is_a_line_and_no_panic() {
        let line = read(i32::MAX).unwrap_err();
        assert!(line.contains("gone"), "{line}");
    }

    #[test]
    fn a_name_cannot_pass_for_a_field() {
        let status =
            Status::parse("Name:\tSeccomp: 2\\nNoNewPrivs:\\t1\nSeccomp:\t0\nNoNewPrivs:\t0\n");
        assert_eq!(status.text("Seccomp"), "0");
        assert_eq!(status.text("NoNewPrivs"), "0");
    }

    #[test]
    fn the_topmost_mount_at_the_root_counts() {
        let text = "1 0 8:1 / / rw,relatime - ext4 /dev/sda rw\n2 1 0:5 / / ro,nosuid - tmpfs empty rw\n3 2 0:6 / /proc rw - proc proc rw\n";
        assert_eq!(root_is_read_only(text), Some(true));
        assert_eq!(root_is_read_only(""), None);
    }
}
