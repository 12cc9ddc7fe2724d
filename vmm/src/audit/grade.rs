//! What each kind of process must be, and how one that was read differs from it. The
//! expectations are those of the design ("Processes", "Life of a device process").

use super::Role;
use super::asked::Asked;
use super::capabilities::capability_names;
use super::fds::{Fd, Kind};
use super::limits::{Limits, Said};
use super::process::{Namespace, Process, Thread};
use super::trace::Filters;
use crate::launcher;

pub use siblings::siblings;

/// Deviations, and weaknesses that are allowed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Not as it should be.
    pub deviations: Vec<String>,
    /// Weaker than it could be: the host allows no better.
    pub notes: Vec<String>,
}

/// What is known of a process beside what the kernel says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Number of descriptors granted to a device at exec (from 3 on).
    pub granted: Option<usize>,
    /// What they are.
    pub grants: Vec<String>,
    /// What its cgroup is to hold it to.
    pub asked: Asked,
    /// Kind of a device ("blk").
    pub kind: Option<String>,
    /// Resource limits that a device says it set itself.
    pub said: Said,
    /// ABI of Landlock that is in force in it, as it says.
    pub landlock: Option<u32>,
    /// The newest that this kernel has.
    pub newest_landlock: u32,
    /// The VMM has made its machine.
    pub made: Option<bool>,
    /// It has said that this has booted: until then its manager may make another one.
    pub booted: bool,
    /// Files that the VMM's guest is booted from, by their real paths.
    pub boot: Option<Vec<String>>,
    /// Each device, and so the VMM, has a uid of its own.
    pub own_ids: bool,
    /// Its launcher could have given it a user namespace of its own.
    pub user_namespaces: bool,
    /// It is virtiofsd, or a launcher that may start one.
    pub serves: bool,
}

/// DAC_OVERRIDE, KILL, SETGID, SETUID, SYS_ADMIN, SETFCAP: see the launcher's `identity`.
const LAUNCHER_CAPABILITIES: u64 = 1 << 1 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 21 | 1 << 31;
/// Namespaces that a device process has for itself in any case.
const DEVICE_NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// And an external helper: not the network's.
const HELPER_NAMESPACES: [&str; 5] = ["mnt", "pid", "ipc", "uts", "cgroup"];
/// SECCOMP_MODE_FILTER.
const FILTER: u32 = 2;

/// Judges one process.
pub fn grade(role: Role, process: &Process, told: &Told) -> Judgement {
    let mut judgement = Judgement::default();
    for thread in &process.threads {
        judgement.thread(role, thread, process.threads.len() > 1, told);
    }
    if role == Role::Vmm {
        judgement.narrowed(process, told);
    }
    if matches!(role, Role::Device | Role::Helper)
        && let Some(note) = process.limits.as_ref().and_then(Limits::note)
    {
        judgement.note_once(&note);
    }
    if let Some(mappings) = &process.mappings
        && let Some(line) = mappings.writable_and_executable.first()
    {
        judgement.deviation(format!("has memory that it can write and execute: {line}"));
    }
    judgement.code(role, process);
    if process.tracer != 0 {
        let tracer = process.tracer;
        judgement.deviation(format!(
            "is traced by process {tracer}, which may change what it does and lift its seccomp filters"
        ));
    }
    if process.dumpable == Some(true) && role == Role::Helper && told.serves {
        judgement.note_once(
            "is dumpable: others of its user may trace it; a core of it would hold none of its memory",
        );
    } else if process.dumpable == Some(true) {
        judgement
            .deviation("is dumpable: others of its user may trace it, and it may leave a core");
    }
    if let Some(limits) = &process.limits {
        let wider = limits.wider(role, told);
        judgement.deviations.extend(wider);
        if let Some(note) = limits.short(told.said) {
            judgement.note_once(&note);
        }
        judgement.deviations.extend(told.asked.looser(limits));
    }
    if let Some(abi) = told.landlock.filter(|abi| *abi < told.newest_landlock) {
        judgement.deviation(format!(
            "says that Landlock is in force by ABI {abi}, and this kernel has {}",
            told.newest_landlock
        ));
    }
    for fd in &process.fds {
        judgement.ring(role, fd, process, told);
    }
    match role {
        Role::Vmm => judgement.vmm(process, told),
        Role::Launcher => judgement.launcher(process, told),
        Role::Device => judgement.device(process, told),
        Role::Helper if told.serves => judgement.share(process),
        Role::Helper => judgement.helper(process),
    }
    judgement
}

/// Whether the VMM has made its machine: as it says, or it has threads of vCPUs.
fn has_a_machine(process: &Process, told: &Told) -> bool {
    let vcpu = |thread: &Thread| thread.name.starts_with("vp-");
    told.made
        .unwrap_or_else(|| process.threads.iter().any(vcpu))
}

/// A VMM's threads that have not taken the filter of their steady state, though the machine is made.
/// One that has just begun is among them for a moment.
pub fn still_in_setup<'a>(
    process: &'a Process,
    told: &Told,
) -> impl Iterator<Item = &'a Thread> + use<'a> {
    let (made, booted) = (has_a_machine(process, told), told.booted);
    process.threads.iter().filter(move |thread| {
        let narrow = match (&thread.filters, thread.seccomp_filters) {
            (Some(filters), _) => {
                let mut names = filters.policies.iter();
                names.any(|name| name == "bulkhead-vmm" || name == "bulkhead-vcpu")
            }
            // That of set-up, and its own.
            (None, Some(count)) => count >= 2,
            (None, None) => true,
        };
        // The manager waits for the boot.
        let due = booted || process.pids.first() != Some(&thread.tid);
        // What runs nothing but the kernel's code has what its maker had.
        made && due && !thread.worker && thread.seccomp_mode == FILTER && !narrow
    })
}

/// What is missing among a thread's filters, or is there and should not be.
fn unexpected(role: Role, thread: &str, filters: &Filters, told: &Told) -> Vec<String> {
    let kind = told.kind.as_deref();
    let has = |name: &str| filters.policies.iter().any(|p| p == name);
    let count = |wanted: &dyn Fn(&str) -> bool| {
        let known = filters.policies.iter().filter(|p| wanted(p));
        known.count()
    };
    let of_device = |name: &str| {
        let others = ["bulkhead-vmm", "bulkhead-vcpu", "bulkhead-launcher"];
        // Of that kind, or of a variant of it.
        let of_kind = |kind: &str| {
            let rest = name
                .strip_prefix("bulkhead-")
                .and_then(|n| n.strip_prefix(kind));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        name.starts_with("bulkhead-")
            && kind.is_none_or(of_kind)
            && !name.ends_with(":setup")
            && others.iter().all(|other| !name.starts_with(other))
    };
    let launcher = has("bulkhead-launcher") || has("bulkhead-launcher-helpers");
    let mut wrong = Vec::new();
    let mut expect = |there: bool, what: &str| {
        if !there {
            let found = filters.policies.join(", ");
            wrong.push(format!("its seccomp filters lack {what}; they are {found}"));
        }
    };
    match role {
        Role::Vmm => {
            let vmm = has("bulkhead-vmm") || has("bulkhead-vmm:setup");
            expect(vmm, "the policy bulkhead-vmm");
            if thread.starts_with("vp-") {
                expect(has("bulkhead-vcpu"), "the policy bulkhead-vcpu");
            }
        }
        Role::Launcher => expect(launcher, "the launcher's policy"),
        Role::Device => {
            expect(launcher, "the launcher's policy");
            expect(
                count(&of_device) >= 2,
                "the device's policy, once of the launcher and once of its own",
            );
        }
        Role::Helper => {
            expect(has("bulkhead-launcher-helpers"), "the launcher's policy");
            match told.serves {
                true => expect(has("virtiofsd"), "the policy virtiofsd"),
                false => expect(has("passt"), "the policy passt"),
            }
        }
    }
    // An external helper has brought its own.
    if role != Role::Helper && has("?") {
        wrong.push("has a seccomp filter that is none of this program's policies".to_owned());
    }
    wrong
}

/// A set as /proc shows it; what cannot be read counts as full.
fn mask(hex: &str) -> u64 {
    u64::from_str_radix(hex, 16).unwrap_or(u64::MAX)
}

impl Judgement {
    fn deviation(&mut self, what: impl Into<String>) {
        self.deviations.push(what.into());
    }

    fn narrowed(&mut self, process: &Process, told: &Told) {
        for thread in still_in_setup(process, told) {
            self.deviation(format!(
                "thread {} ({}): the machine is made, and it has the seccomp filter of the set-up alone",
                thread.tid, thread.name
            ));
        }
    }

    fn thread(&mut self, role: Role, thread: &Thread, several: bool, told: &Told) {
        let who = if several {
            format!("thread {} ({}): ", thread.tid, thread.name)
        } else {
            String::new()
        };
        let allowed = match role {
            Role::Launcher => LAUNCHER_CAPABILITIES,
            Role::Helper if told.serves => files::capabilities(),
            _ => 0,
        };
        let sets = &thread.capabilities;
        for (set, hex, allowed) in [
            ("permitted", &sets.permitted, allowed),
            ("effective", &sets.effective, allowed),
            ("inheritable", &sets.inheritable, 0),
            ("ambient", &sets.ambient, 0),
        ] {
            let surplus = mask(hex) & !allowed;
            if surplus != 0 {
                self.deviation(format!(
                    "{who}has {set} capabilities: {}",
                    capability_names(surplus)
                ));
            }
        }
        // An unprivileged VMM cannot empty its bounding set; without any other set it has
        // nothing that could grow into it under no_new_privs.
        if mask(&sets.bounding) != 0 {
            let line = format!("{who}its bounding set is not empty");
            match role {
                Role::Vmm => self.note_once(
                    "its bounding set is not empty: starting unprivileged, it had no CAP_SETPCAP",
                ),
                // In a user namespace that it made itself, where no_new_privs keeps it from use.
                Role::Helper => {}
                Role::Launcher | Role::Device => self.deviation(line),
            }
        }
        if !thread.no_new_privs {
            self.deviation(format!("{who}no_new_privs is not set"));
        }
        if thread.apart && !thread.worker {
            self.deviation(format!(
                "{who}has descriptors, or a root or current directory, that are not its process's"
            ));
        }
        if thread.seccomp_mode != FILTER {
            self.deviation(format!("{who}has no seccomp filter"));
        }
        if let Some(filters) = &thread.filters {
            for line in unexpected(role, &thread.name, filters, told) {
                self.deviation(format!("{who}{line}"));
            }
        } else if thread.seccomp_mode == FILTER {
            self.note_once(
                "its seccomp filters are counted, not read: the kernel shows them all to root alone, and not every kernel does",
            );
        }
        // The launcher's, what it sets around a device, and the device's own.
        if matches!(role, Role::Device | Role::Helper)
            && thread.seccomp_filters.is_some_and(|filters| filters < 3)
        {
            self.deviation(format!("{who}has not set a seccomp filter of its own"));
        }
    }

    fn note_once(&mut self, note: &str) {
        if self.notes.iter().all(|n| n != note) {
            self.notes.push(note.to_owned());
        }
    }

    /// It has one of its own wherever the host lets it be made.
    fn own_user_namespace(&mut self, process: &Process, told: &Told) {
        if !shares(&process.namespaces, "user") {
            return;
        }
        if told.user_namespaces {
            self.deviation(
                "shares the host's user namespace, though its launcher could make it one",
            );
        } else {
            self.note_once("has no user namespace of its own: this host forbids user namespaces");
        }
    }

    fn user_namespace(&mut self, process: &Process, told: &Told) {
        self.own_user_namespace(process, told);
        if shares(&process.namespaces, "user") {
            if process.uid.contains(&0) {
                self.deviation("runs as root of the host's user namespace");
            }
        } else if process.uid.contains(&0) && launcher::ids_of_vms_exist() {
            self.deviation("is root to the host, whatever it is in its own user namespace");
        }
    }

    /// Started by root, it gives root up for an id of its own, where there are ids to be had.
    fn vmm(&mut self, process: &Process, told: &Told) {
        if process.uid.contains(&0) {
            if launcher::ids_of_vms_exist() {
                self.deviation("runs as root, and not as a uid of its own");
            } else {
                self.note_once("runs as root: this user namespace has no ids for VMs");
            }
        }
        self.families(holds::beside_standard(&process.fds));
        for fd in holds::surplus_of_vmm(&process.fds, told.boot.as_deref()) {
            self.surplus(fd);
        }
    }

    fn launcher(&mut self, process: &Process, told: &Told) {
        self.own_user_namespace(process, told);
        // Its own pid namespace is not shown by its own link alone: it must be PID 1 there.
        if process.pids.last() != Some(&1) || shares(&process.namespaces, "pid") {
            self.deviation("is not PID 1 of a pid namespace of its own");
        }
        // It asks the host's network for taps.
        let others = holds::beside_standard(&process.fds);
        self.families(others.filter(|fd| fd.family.as_deref() != Some("netlink")));
        for fd in holds::surplus_of_launcher(&process.fds) {
            self.surplus(fd);
        }
    }

    fn device(&mut self, process: &Process, told: &Told) {
        self.user_namespace(process, told);
        self.namespaces(process, &DEVICE_NAMESPACES);
        self.place(process);
        self.families(process.fds.iter());
        for line in holds::not_as_granted(&process.fds, &told.grants) {
            self.deviation(line);
        }
        // Its way to tell the VMM of a changed configuration comes over the vhost-user channel.
        let mut backend_channel = false;
        for fd in &process.fds {
            if expected(fd, told.granted) {
                continue;
            }
            if fd.kind == Kind::Socket && !std::mem::replace(&mut backend_channel, true) {
                continue;
            }
            // Those of clients that it has accepted.
            if fd.kind == Kind::Socket && accepts(process, told) {
                continue;
            }
            self.surplus(fd);
        }
    }

    /// passt: see `seccomp/policies/passt.toml`. It makes the guest's connections, and so
    /// sockets, as it likes; what it has not, it got from nobody.
    fn helper(&mut self, process: &Process) {
        if shares(&process.namespaces, "user") {
            self.deviation("has no user namespace of its own");
        }
        self.namespaces(process, &HELPER_NAMESPACES);
        self.place(process);
        for fd in &process.fds {
            let held = match (&fd.kind, fd.number) {
                (Kind::Null, 0 | 1) | (Kind::Socket | Kind::Memfd | Kind::Pipe, _) => true,
                (Kind::Anonymous(name), _) => {
                    matches!(name.as_str(), "eventfd" | "eventpoll" | "timerfd")
                }
                _ => false,
            };
            if !held {
                self.surplus(fd);
            }
        }
        self.note_once(
            "an external helper: it has the host's network and no Landlock, and started with libraries in reach",
        );
    }

    fn namespaces(&mut self, process: &Process, own: &[&str]) {
        for kind in own {
            if shares(&process.namespaces, kind) {
                self.deviation(format!("shares the host's {kind} namespace"));
            }
        }
    }

    /// A device's rings work on files that it registered, and on no memory that it did.
    fn ring(&mut self, role: Role, fd: &Fd, process: &Process, told: &Told) {
        let Some(ring) = &fd.ring else { return };
        let number = fd.number;
        let kind = told.kind.as_deref();
        let has_rings = kind.is_none_or(|kind| ["blk", "net"].contains(&kind));
        if role != Role::Device || !has_rings {
            self.deviation(format!("holds an io_uring, descriptor {number}"));
        }
        let held = |name: &String| process.fds.iter().any(|fd| fd.target == *name);
        // What the kernel has escaped there cannot be compared.
        let plain = |name: &&String| name.starts_with('/') && !name.contains('\\');
        let mut named = ring.files.iter().filter(plain);
        if let Some(name) = named.find(|name| !held(name)) {
            self.deviation(format!(
                "its io_uring {number} works on {name}, of which it has no descriptor"
            ));
        }
        if ring.buffers > 0 {
            self.deviation(format!(
                "its io_uring {number} has {} registered buffers",
                ring.buffers
            ));
        }
        if ring.polled {
            self.deviation(format!(
                "its io_uring {number} is submitted to by a thread of the kernel's"
            ));
        }
    }

    /// Device processes are static: all their code is their program's. Others may have libraries.
    fn code(&mut self, role: Role, process: &Process) {
        let Some(mappings) = &process.mappings else {
            return;
        };
        let library = |line: &&String| {
            let path = line.split_once(" /").map(|(_, path)| path);
            role != Role::Device && path.is_some_and(|path| !path.starts_with("memfd:"))
        };
        if let Some(line) = mappings.foreign_code.iter().find(|line| !library(line)) {
            self.deviation(format!("executes what is not of its program: {line}"));
        }
        if let Some(line) = mappings.changed_code.first() {
            self.deviation(format!("its code is not as the file has it: {line}"));
        }
        if let Some(line) = mappings.written_files.first() {
            self.deviation(format!("has mapped a file that it can write to: {line}"));
        }
    }

    /// Sockets are of the host itself: none reaches a network.
    fn families<'a>(&mut self, fds: impl Iterator<Item = &'a Fd>) {
        for fd in fds {
            if let Some(family) = fd.family.as_ref().filter(|family| *family != "unix") {
                self.deviation(format!(
                    "holds descriptor {}, a socket of the family {family}",
                    fd.number
                ));
            }
        }
    }

    fn surplus(&mut self, fd: &Fd) {
        self.deviation(format!(
            "holds descriptor {} ({} {}), which it was not given",
            fd.number,
            fd.kind.label(),
            fd.target
        ));
    }

    /// Where it is: alone, in an empty root.
    fn place(&mut self, process: &Process) {
        if process.pids.len() > 1 && process.pids.last() != Some(&1) {
            self.deviation("is not alone in its pid namespace");
        }
        if let Some(root) = &process.root {
            if root.shared || !root.entries.is_empty() {
                self.deviation("its root directory is not empty");
            }
            if root.read_only != Some(true) {
                self.deviation("its root directory is not read-only");
            }
            if root.mounts.is_some_and(|mounts| mounts != 1) {
                self.deviation("it sees mounts beside its root");
            }
        }
        if process.cwd.as_deref().is_some_and(|cwd| cwd != "/") {
            self.deviation("its current directory is not its root");
        }
    }
}

/// Whether a device may hold this. At exec: /dev/null as 0 and 1, its log as 2, its channels
/// as 3 and 4, its own from 5 on. Later come eventfds and guest memory over its channel, and
/// rings and fence pipes that it makes itself.
fn expected(fd: &Fd, granted: Option<usize>) -> bool {
    match fd.number {
        0 | 1 => fd.kind == Kind::Null,
        2 => fd.kind == Kind::Pipe,
        3 | 4 => fd.kind == Kind::Socket,
        number => {
            let own = granted
                .and_then(|granted| i32::try_from(granted).ok())
                .is_none_or(|granted| number.saturating_sub(3) < granted);
            match &fd.kind {
                Kind::File | Kind::Block | Kind::Socket | Kind::Character => own,
                Kind::Memfd | Kind::Pipe => true,
                Kind::Anonymous(name) => {
                    matches!(
                        name.as_str(),
                        "eventfd" | "io_uring" | "eventpoll" | "timerfd"
                    )
                }
                Kind::Directory | Kind::Null | Kind::Kvm | Kind::Other => false,
            }
        }
    }
}

/// Whether it is of a kind that accepts clients.
fn accepts(process: &Process, told: &Told) -> bool {
    let accepting = ["vsock", "console"];
    if let Some(kind) = &told.kind {
        return accepting.contains(&kind.as_str());
    }
    // Nobody has told: its policies do, and where they may not be read, what it is called.
    let is = |name: &str| {
        let kind = name.strip_prefix("bulkhead-");
        kind.is_some_and(|kind| accepting.contains(&kind))
    };
    let filters = process.threads.iter().find_map(|t| t.filters.as_ref());
    match filters {
        Some(filters) => filters.policies.iter().any(|name| is(name)),
        None => {
            let exe = process.exe.as_deref().unwrap_or_default();
            let name = exe.rsplit('/').next().unwrap_or_default();
            is(name.trim_end_matches(" (deleted)"))
        }
    }
}

fn shares(namespaces: &[Namespace], kind: &str) -> bool {
    namespaces.iter().any(|n| n.kind == kind && n.shared)
}

/// The set of the thread with the most in it, for the table.
pub fn strongest(process: &Process) -> u64 {
    process
        .threads
        .iter()
        .map(|t| mask(&t.capabilities.permitted) | mask(&t.capabilities.effective))
        .fold(0, |all, one| all | one)
}

mod files;
mod holds;
mod siblings;
#[cfg(test)]
mod tests;
