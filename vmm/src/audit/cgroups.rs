//! In which cgroup each process of a VM is, graded against the leaf that was made for it
//! (`launcher::cgroup`): a process in another one is held to somebody else's limits, or to none.
//!
//! Whether the VM has a cgroup the API says, and the launcher's descriptor of its directory; what it
//! is called follows from the VMM's pid and start time, which are the kernel's. Called by the audit
//! only.

use std::fs;
use std::path::PathBuf;

use super::fds::Kind;
use super::process::{self, Tree};
use super::{Report, Role};
use crate::launcher::cgroup_parent::{GROUP_PREFIX, Mount};
use crate::launcher::{LEAF_PREFIX, VMM_LEAF, printable};

/// The VM's cgroup, which its leaves are in.
struct Group {
    /// Its last part.
    name: String,
    /// All of it, where it can be compared with what /proc shows here.
    path: Option<String>,
    /// Where it can be looked into.
    directory: Option<PathBuf>,
}

/// What the VM's devices are called, and where its cgroup is said to be.
pub enum Told<'a> {
    /// By the API: ids, and the path; empty: none.
    ByApi(&'a str),
    /// Nobody says.
    Nothing,
}

/// The cgroup above, and the last part.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// The last part.
fn last(path: &str) -> &str {
    split(path).1
}

fn cgroup(report: &Report) -> Option<&str> {
    let limits = report.process.as_ref()?.limits.as_ref()?;
    Some(limits.cgroup.as_str())
}

fn of_role(reports: &[Report], role: Role) -> Option<&Report> {
    reports.iter().find(|report| report.role == role)
}

fn is_device(report: &Report) -> bool {
    matches!(report.role, Role::Device | Role::Helper)
}

impl Group {
    /// What it is called, if there is one.
    fn name_of(reports: &[Report]) -> Option<String> {
        let vmm = of_role(reports, Role::Vmm)?.process.as_ref()?;
        let (pid, started) = (vmm.pids.last()?, vmm.started?);
        Some(format!("{GROUP_PREFIX}{pid}-{started}"))
    }

    fn find(told: &Told<'_>, name: String, reports: &[Report]) -> Option<Self> {
        let said = match told {
            Told::ByApi(path) => Some(*path).filter(|path| !path.is_empty()),
            Told::Nothing => None,
        };
        let launcher = of_role(reports, Role::Launcher);
        let held = launcher.and_then(|report| {
            let mut fds = report.process.as_ref()?.fds.iter();
            let fd = fds.find(|fd| fd.kind == Kind::Directory && last(&fd.target) == name)?;
            Some(format!("/proc/{}/fd/{}", report.pid, fd.number).into())
        });
        let inside = |report: &Report| {
            cgroup(report).is_some_and(|path| last(path) == name || last(split(path).0) == name)
        };
        if said.is_none() && held.is_none() && !reports.iter().any(inside) {
            return None;
        }
        // In a cgroup namespace of its own the VMM sees other paths than are seen here.
        let same = of_role(reports, Role::Vmm)
            .and_then(|report| report.process.as_ref())
            .is_some_and(|vmm| {
                let mut own = vmm.namespaces.iter();
                own.all(|n| n.kind != "cgroup" || n.shared) && !vmm.namespaces.is_empty()
            });
        let path = said.filter(|_| same).map(str::to_owned);
        let mounted = || Mount::find()?.directory(path.as_deref()?);
        Some(Self {
            directory: held.or_else(mounted),
            name,
            path,
        })
    }

    /// Whether that is it.
    fn is(&self, path: &str) -> bool {
        match &self.path {
            Some(own) => path == own,
            None => last(path) == self.name,
        }
    }

    /// Whether a leaf is there; `None`: that cannot be told.
    fn has(&self, leaf: &str) -> Option<bool> {
        let directory = self.directory.as_ref().filter(|group| group.is_dir())?;
        directory.join(leaf).try_exists().ok()
    }

    /// No leaf of a device's is there.
    fn has_none(&self) -> bool {
        let entries = self.directory.as_ref().map(fs::read_dir);
        entries.is_some_and(|entries| {
            entries.is_ok_and(|mut entries| {
                entries.all(|entry| {
                    let name = entry.map(|entry| entry.file_name());
                    name.is_ok_and(|n| !n.to_string_lossy().starts_with(LEAF_PREFIX))
                })
            })
        })
    }

    fn label(&self) -> &str {
        self.path.as_deref().unwrap_or(&self.name)
    }
}

/// What is wrong with where a device's process is. `leaf`: what its leaf is called, if that is known;
/// `launcher`: where a device without a leaf is.
fn device(
    group: Option<&Group>,
    leaf: Option<&str>,
    path: &str,
    launcher: Option<&str>,
) -> Option<String> {
    let (parent, own) = split(path);
    let Some(group) = group else {
        let taken = last(parent).starts_with(GROUP_PREFIX) || own.starts_with(GROUP_PREFIX);
        return taken.then(|| format!("is in the cgroup {path} of another VM; this VM has none"));
    };
    let named = leaf.map_or(own.starts_with(LEAF_PREFIX), |leaf| own == leaf);
    if named && group.is(parent) {
        return None;
    }
    let wanted = leaf.map_or_else(|| format!("{LEAF_PREFIX}ID"), str::to_owned);
    // It could not be started in it: a weakness that is noted.
    let without = leaf.map_or_else(|| group.has_none(), |leaf| group.has(leaf) == Some(false));
    if without && launcher == Some(path) {
        return None;
    }
    Some(format!(
        "is in the cgroup {path}, and {}/{wanted} is the one that was made for it",
        group.label()
    ))
}

/// The same of the VMM and the launcher, which are in the VM's cgroup by a leaf of their own or not
/// at all.
fn manager(group: Option<&Group>, path: &str) -> Option<String> {
    let (parent, own) = split(path);
    let in_leaf = own == VMM_LEAF && group.is_some_and(|group| group.is(parent));
    let elsewhere = [own, last(parent)]
        .iter()
        .any(|part| part.starts_with(GROUP_PREFIX));
    let made = group.filter(|group| group.has(VMM_LEAF) == Some(true));
    match (in_leaf, made) {
        (true, _) => None,
        (false, Some(group)) => Some(format!(
            "is in the cgroup {path}, and {}/{VMM_LEAF} is the one that was made for it",
            group.label()
        )),
        (false, None) => {
            elsewhere.then(|| format!("is in the cgroup {path}, which is not its own to be in"))
        }
    }
}

/// What a leaf lists beside its device's process: a successor of that is the launcher's child, too.
fn strangers(text: &str, own: i32, of_launcher: &dyn Fn(i32) -> bool) -> Vec<String> {
    let pids = text.lines().filter(|line| {
        let pid = line.trim().parse::<i32>().ok();
        // 0 is one that cannot be named from here.
        pid.is_none_or(|pid| pid != own && (pid == 0 || !of_launcher(pid)))
    });
    pids.map(printable).collect()
}

/// Processes that use what a device's leaf allows to it, and are none of its own.
fn intruders(path: &str, own: i32, launcher: Option<i32>) -> Option<String> {
    let directory = Mount::find()?.directory(path)?;
    let look = || {
        let text = fs::read_to_string(directory.join("cgroup.procs")).ok()?;
        let tree = Tree::read().ok()?;
        // One that has ended meanwhile is in no tree.
        let of_launcher = |pid: i32| {
            // vhost-net's thread, with kernels before 6.4.
            let threads = process::is_kernels(pid);
            threads || !tree.contains(pid) || launcher.is_some() && tree.parent(pid) == launcher
        };
        let found = strangers(&text, own, &of_launcher);
        (!found.is_empty()).then(|| found.join(", "))
    };
    look().map(|pids| {
        format!("its cgroup {path} has processes in it that are none of its own: {pids}")
    })
}

/// Grades where each is; returns what is wrong with the VM as a whole.
pub fn grade(told: &Told<'_>, reports: &mut [Report]) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some(name) = Group::name_of(reports) else {
        return wrong;
    };
    if let Told::ByApi(path) = told
        && !path.is_empty()
        && last(path) != name
    {
        wrong.push(format!(
            "the VMM says that its cgroup is {path}, and {name} is what it would be called"
        ));
    }
    let group = Group::find(told, name, reports);
    let ids = matches!(told, Told::ByApi(_));
    let of = |role| of_role(reports, role).and_then(cgroup).map(str::to_owned);
    let (vmm, launcher) = (of(Role::Vmm), of(Role::Launcher));
    let launcher_pid = of_role(reports, Role::Launcher).map_or(0, |report| report.pid);
    let manager_at = launcher.clone().unwrap_or_default();
    let mut taken: Vec<(String, String)> = Vec::new();
    for report in reports {
        let Some(path) = cgroup(report).map(str::to_owned) else {
            continue;
        };
        let line = if is_device(report) {
            let leaf = ids.then(|| format!("{LEAF_PREFIX}{}", report.name));
            let line = device(group.as_ref(), leaf.as_deref(), &path, launcher.as_deref());
            // With ids, two in one leaf are one in the wrong leaf.
            if line.is_none() && !ids && group.is_some() {
                match taken.iter().find(|(other, _)| *other == path) {
                    Some((_, other)) => wrong.push(format!(
                        "{other} and {} are in one cgroup, {path}",
                        report.name
                    )),
                    None => taken.push((path.clone(), report.name.clone())),
                }
            }
            line
        } else {
            let line = manager(group.as_ref(), &path);
            if report.role == Role::Launcher
                && line.is_none()
                && let Some(vmm) = vmm.as_ref().filter(|vmm| **vmm != path)
            {
                report
                    .notes
                    .push(format!("is in the cgroup {path}, and the VMM in {vmm}"));
            }
            line
        };
        if line.is_none() && is_device(report) && group.is_some() && path != manager_at {
            let launcher = Some(launcher_pid).filter(|pid| *pid > 0);
            if let Some(line) = intruders(&path, report.pid, launcher) {
                report.deviation(line);
            }
        }
        if let Some(line) = line {
            report.deviation(line);
        }
    }
    wrong
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::audit::Verdict;
    use crate::audit::fds::Fd;
    use crate::audit::limits::Limits;
    use crate::audit::process::{Namespace, Process};

    const PARENT: &str = "/a";
    const GROUP: &str = "/a/bulkhead-vm-10-77";

    fn report(role: Role, name: &str, path: &str) -> Report {
        Report {
            role,
            name: name.into(),
            pid: 10,
            verdict: Verdict::Ok,
            deviations: Vec::new(),
            notes: Vec::new(),
            unread: Vec::new(),
            landlock: None,
            process: Some(Process {
                pids: vec![10],
                started: Some(77),
                namespaces: vec![Namespace {
                    kind: "cgroup".into(),
                    id: "cgroup:[1]".into(),
                    shared: true,
                }],
                limits: Some(Limits {
                    cgroup: path.into(),
                    ..Limits::default()
                }),
                ..Process::default()
            }),
        }
    }

    /// A VM whose processes are where they belong.
    pub fn vm() -> Vec<Report> {
        vec![
            report(Role::Vmm, "vmm", PARENT),
            report(Role::Launcher, "launcher", PARENT),
            report(Role::Device, "root", &format!("{GROUP}/dev-root")),
            report(Role::Device, "data", &format!("{GROUP}/dev-data")),
            report(Role::Helper, "net", &format!("{GROUP}/dev-net")),
        ]
    }

    /// What is found of one that is moved, by the API's account and without.
    fn moved(index: usize, to: &str) -> [Vec<String>; 2] {
        [Told::ByApi(GROUP), Told::Nothing].map(|told| {
            let mut reports = vm();
            if let Some(process) = &mut reports[index].process {
                process.limits.as_mut().unwrap().cgroup = to.into();
            }
            let mut wrong = grade(&told, &mut reports);
            for report in reports {
                assert_eq!(
                    report.verdict == Verdict::Deviation,
                    !report.deviations.is_empty()
                );
                wrong.extend(report.deviations);
            }
            wrong
        })
    }

    #[test]
    fn processes_in_their_leaves_are_no_deviation() {
        for at in [PARENT, &format!("{GROUP}/vmm")] {
            assert_eq!(moved(0, at), [const { Vec::<String>::new() }; 2], "{at}");
            assert_eq!(moved(1, at), [const { Vec::<String>::new() }; 2], "{at}");
        }
    }

    #[test]
    fn a_process_in_another_cgroup_is_found_and_both_are_named() {
        for to in [
            "/",
            "",
            PARENT,
            GROUP,
            "/a/bulkhead-vm-11-78/dev-root",
            "/a/bulkhead-vm-10-77/dev-root/below",
            "/a/bulkhead-vm-10-77/vmm",
            "/a/bulkhead-vm-10-77/dev-data",
            "/a/bulkhead-vm-10-77/dev-net",
        ] {
            let [by_api, by_pid] = moved(2, to);
            assert_eq!((by_api.len(), by_pid.len()), (1, 1), "{to}: {by_pid:?}");
            let both = by_api[0].contains(to) && by_api[0].contains(&format!("{GROUP}/dev-root"));
            assert!(both, "{by_api:?}");
        }
        // Its own, of another group of that name.
        let [by_api, _] = moved(2, "/b/bulkhead-vm-10-77/dev-root");
        assert_eq!(by_api.len(), 1);
        for manager in [0, 1] {
            for to in [
                "/a/bulkhead-vm-10-77",
                "/a/bulkhead-vm-10-77/dev-root",
                "/a/bulkhead-vm-11-78/vmm",
            ] {
                for wrong in moved(manager, to) {
                    assert_eq!(wrong.len(), 1, "{to}: {wrong:?}");
                }
            }
        }
    }

    #[test]
    fn a_stranger_in_a_leaf_is_found_and_a_successor_is_not() {
        let of_launcher = |pid| pid == 12 || pid == 13;
        assert_eq!(strangers("12\n13\n", 12, &of_launcher), [""; 0]);
        assert_eq!(strangers("12\n99\n0\n", 12, &of_launcher), ["99", "0"]);
        assert_eq!(strangers("x\n", 12, &of_launcher), ["x"]);
    }

    #[test]
    fn a_launcher_elsewhere_than_the_vmm_is_noted() {
        let mut reports = vm();
        reports[1] = report(Role::Launcher, "launcher", "/b");
        assert_eq!(grade(&Told::ByApi(GROUP), &mut reports), [] as [&str; 0]);
        assert_eq!(reports[1].notes.len(), 1);
    }

    #[test]
    fn a_vm_without_a_cgroup_is_in_no_vms() {
        let all = |paths: [&str; 2]| {
            let mut reports = vec![
                report(Role::Vmm, "vmm", "/"),
                report(Role::Device, "root", paths[0]),
                report(Role::Device, "data", paths[1]),
            ];
            let mut wrong = grade(&Told::ByApi(""), &mut reports);
            wrong.extend(reports.into_iter().flat_map(|report| report.deviations));
            wrong.len()
        };
        assert_eq!(all(["/", "/"]), 0);
        assert_eq!(all(["/bulkhead-vm-11-78/dev-x", "/"]), 1);
    }

    #[test]
    fn the_launchers_descriptor_says_that_there_is_one_and_the_api_cannot_name_another() {
        let mut reports = vec![
            report(Role::Vmm, "vmm", "/"),
            report(Role::Launcher, "launcher", "/"),
            report(Role::Device, "root", "/"),
        ];
        if let Some(launcher) = &mut reports[1].process {
            launcher.fds.push(Fd {
                number: 9,
                kind: Kind::Directory,
                access: "r".into(),
                target: "/sys/fs/cgroup/bulkhead-vm-10-77".into(),
                ring: None,
                family: None,
            });
        }
        assert_eq!(grade(&Told::Nothing, &mut reports), [] as [&str; 0]);
        assert_eq!(reports[2].deviations.len(), 1, "{reports:?}");
        let other = "/a/bulkhead-vm-99-1";
        assert_eq!(grade(&Told::ByApi(other), &mut vm()).len(), 1);
    }
}
