//! What bounds a process's use of the host, read from the kernel: the cgroup v2 that it is in
//! (Linux's Documentation/admin-guide/cgroup-v2.rst) and its resource limits (getrlimit(2), as
//! /proc/PID/limits shows them). Called by the audit only.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::Role;
use super::grade::Told;
use crate::confine;
use crate::launcher::cgroup_parent::{GROUP_PREFIX, Mount, path_of};
use crate::launcher::{self, CONTROLLERS, LEAF_PREFIX, printable};

/// Files of a cgroup that hold limits.
const FILES: [&str; 4] = ["cpu.max", "memory.max", "pids.max", "io.max"];
/// Resource limits: what the kernel calls them there, their name and their number.
const RLIMITS: [(&str, &str, u32); 8] = [
    ("Max core file size", "CORE", libc::RLIMIT_CORE),
    ("Max open files", "NOFILE", libc::RLIMIT_NOFILE),
    ("Max processes", "NPROC", libc::RLIMIT_NPROC),
    ("Max data size", "DATA", libc::RLIMIT_DATA),
    ("Max file size", "FSIZE", libc::RLIMIT_FSIZE),
    ("Max msgqueue size", "MSGQUEUE", libc::RLIMIT_MSGQUEUE),
    ("Max realtime priority", "RTPRIO", libc::RLIMIT_RTPRIO),
    ("Max nice priority", "NICE", libc::RLIMIT_NICE),
];

/// Resource limits that a device process says it has set itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// RLIMIT_NOFILE.
    pub descriptors: Option<u64>,
    /// RLIMIT_FSIZE.
    pub file_bytes: Option<u64>,
    /// RLIMIT_NPROC.
    pub threads: Option<u64>,
}

impl Said {
    fn each(self) -> [(u32, Option<u64>); 3] {
        [
            (libc::RLIMIT_NOFILE, self.descriptors),
            (libc::RLIMIT_FSIZE, self.file_bytes),
            (libc::RLIMIT_NPROC, self.threads),
        ]
    }
}

/// What a process of that role may have at most: what is set where it is started, and confines
/// itself.
fn most(role: Role, told: &Told) -> Vec<(u32, u64)> {
    let serves = told.serves;
    match role {
        Role::Vmm => {
            let all = confine::rlimits(told.own_ids).each();
            all.iter().filter_map(|l| Some((l.1, l.2?))).collect()
        }
        Role::Launcher if serves => launcher::SHARING_LAUNCHER_LIMITS.into(),
        Role::Launcher => launcher::LAUNCHER_LIMITS.into(),
        Role::Device => launcher::DEVICE_LIMITS.into(),
        Role::Helper if serves => launcher::SHARE_LIMITS.into(),
        Role::Helper => launcher::HELPER_LIMITS.into(),
    }
}

/// What bounds a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Its cgroup v2; empty: this host has none.
    pub cgroup: String,
    /// That is a leaf that a launcher made, for one device alone.
    pub own_leaf: bool,
    /// Controllers that the leaf has not.
    pub missing: Vec<String>,
    /// Limits of the cgroup, as the kernel writes them.
    pub limits: Vec<(String, String)>,
    /// Resource limits: soft values.
    pub rlimits: Vec<(String, String)>,
    /// What it could raise them to.
    pub hard_rlimits: Vec<(String, String)>,
}

/// Reads what bounds a process. What may not be read is left out.
pub fn read(pid: i32) -> Limits {
    let path = path_of(&pid.to_string()).unwrap_or_default();
    let directory = Mount::find().and_then(|mount| mount.directory(&path));
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let mut limits = Limits {
        own_leaf: is_leaf(&path),
        cgroup: printable(&path),
        rlimits: rlimits(&text, 0),
        hard_rlimits: rlimits(&text, 1),
        ..Limits::default()
    };
    let has = directory.as_deref().map(controllers).unwrap_or_default();
    let missing = CONTROLLERS.iter().filter(|c| has.iter().all(|h| h != *c));
    limits.missing = missing.map(|c| (*c).to_owned()).collect();
    for file in FILES {
        let value = directory
            .as_ref()
            .and_then(|directory| fs::read_to_string(directory.join(file)).ok());
        if let Some(value) = value.map(|text| printable(text.trim())) {
            limits.limits.push((file.to_owned(), value));
        }
    }
    limits
}

fn controllers(directory: &Path) -> Vec<String> {
    let text = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// …/bulkhead-vm-PID-START/dev-ID
pub fn is_leaf(path: &str) -> bool {
    let mut parts = path.rsplit('/');
    parts
        .next()
        .is_some_and(|leaf| leaf.starts_with(LEAF_PREFIX))
        && parts
            .next()
            .is_some_and(|group| group.starts_with(GROUP_PREFIX))
}

/// The soft ones are in column 0, the hard ones in column 1.
fn rlimits(text: &str, column: usize) -> Vec<(String, String)> {
    let mut limits = Vec::new();
    for (line, name, _) in RLIMITS {
        let value = text
            .lines()
            .find_map(|l| l.strip_prefix(line)?.split_ascii_whitespace().nth(column));
        if let Some(value) = value {
            limits.push((name.to_owned(), printable(value)));
        }
    }
    limits
}

fn value(limits: &[(String, String)], name: &str) -> Option<u64> {
    let (_, text) = limits.iter().find(|(is, _)| is == name)?;
    // What is no number bounds nothing.
    Some(text.parse().unwrap_or(u64::MAX))
}

impl Limits {
    /// What is weaker than it could be, in one line.
    pub fn note(&self) -> Option<String> {
        let rlimits = self.text(&self.rlimits);
        if !self.own_leaf {
            return Some(format!(
                "has no cgroup of its own: nothing bounds its use of the host but resource limits ({rlimits}); `ctl info` says why"
            ));
        }
        (!self.missing.is_empty()).then(|| {
            format!(
                "its cgroup has no {} controller: what is bounded of that is by resource limits ({rlimits}); `ctl info` says why",
                self.missing.join(", ")
            )
        })
    }

    /// Resource limits that are wider than what was set, by the launcher or as the process says.
    pub fn wider(&self, role: Role, told: &Told) -> Vec<String> {
        let (mut wrong, by_role, said) = (Vec::new(), most(role, told), told.said);
        for (_, name, number) in RLIMITS {
            let said = said.each().into_iter().find(|(of, _)| *of == number);
            let said = said.and_then(|(_, most)| most);
            let set = by_role.iter().find(|(of, _)| *of == number);
            let set = set.map(|(_, most)| *most);
            let Some(most) = said.into_iter().chain(set).min() else {
                continue;
            };
            let soft = value(&self.rlimits, name);
            let hard = value(&self.hard_rlimits, name);
            let Some(is) = soft.into_iter().chain(hard).max().filter(|is| *is > most) else {
                continue;
            };
            let is = match is {
                u64::MAX => "unlimited".to_owned(),
                is => is.to_string(),
            };
            let by = match said == Some(most) {
                true => "the process says that it set",
                false => "was set at its start",
            };
            wrong.push(match name {
                "CORE" => format!("may leave a core file: RLIMIT_CORE is {is}"),
                _ => format!("its RLIMIT_{name} is {is}, and {most} is what {by}"),
            });
        }
        wrong
    }

    /// Resource limits below what a process says that it needs, in one line.
    pub fn short(&self, said: Said) -> Option<String> {
        let below = RLIMITS.iter().filter_map(|(_, name, number)| {
            let said = said.each().into_iter().find(|(of, _)| of == number)?.1?;
            let soft = value(&self.rlimits, name).filter(|soft| *soft < said)?;
            Some(format!("RLIMIT_{name} {soft} of {said}"))
        });
        let below: Vec<String> = below.collect();
        (!below.is_empty()).then(|| {
            format!(
                "has less than it asked for, since the host allows no more: {}",
                below.join(", ")
            )
        })
    }

    /// Names and values in one line.
    pub fn text(&self, pairs: &[(String, String)]) -> String {
        let words: Vec<String> = pairs
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        words.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_known_by_its_place() {
        assert!(is_leaf("/a/bulkhead-vm-1-2/dev-root"));
        for other in [
            "/",
            "",
            "/dev-root",
            "/user.slice/dev-x",
            "/bulkhead-vm-1-2/vmm",
        ] {
            assert!(!is_leaf(other), "{other}");
        }
    }

    #[test]
    fn resource_limits_are_read_and_a_weakness_names_them() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max data size             67108864             67108864             bytes\n\
                    Max open files            12                   12                   files\n";
        let mut limits = Limits {
            rlimits: rlimits(text, 0),
            ..Limits::default()
        };
        let note = limits.note().unwrap();
        assert!(note.contains("NOFILE 12, DATA 67108864"), "{note}");
        limits.own_leaf = true;
        assert_eq!(limits.note(), None);
        limits.missing = vec!["io".into()];
        assert!(limits.note().unwrap().contains("no io controller"));
    }

    #[test]
    fn this_process_has_limits() {
        let own = read(i32::try_from(std::process::id()).unwrap());
        assert!(!own.own_leaf);
        assert_eq!(own.rlimits.len(), RLIMITS.len());
        assert_eq!(own.hard_rlimits.len(), RLIMITS.len());
    }

    #[test]
    fn every_limit_that_is_set_is_one_that_is_read() {
        for role in [Role::Vmm, Role::Launcher, Role::Device, Role::Helper] {
            let most = most(role, &Told::default());
            assert!(most.len() >= 2);
            for (number, _) in most {
                assert!(
                    RLIMITS.iter().any(|(_, _, read)| *read == number),
                    "{number}"
                );
            }
        }
    }

    #[test]
    fn a_limit_is_held_against_what_was_set_and_what_was_said() {
        let of = |soft: &str, hard: &str| Limits {
            rlimits: vec![("NOFILE".into(), soft.into())],
            hard_rlimits: vec![("NOFILE".into(), hard.into())],
            ..Limits::default()
        };
        let said = Said {
            descriptors: Some(40),
            ..Said::default()
        };
        let of_said = |said| Told {
            said,
            ..Told::default()
        };
        let wider = |limits: &Limits| limits.wider(Role::Device, &of_said(said)).len();
        assert_eq!(wider(&of("40", "40")), 0);
        assert_eq!(wider(&of("41", "41")), 1);
        assert_eq!(wider(&of("40", "41")), 1);
        assert_eq!(wider(&of("40", "unlimited")), 1);
        // Who says too much is held to what the launcher sets.
        let lies = Said {
            descriptors: Some(1 << 20),
            ..Said::default()
        };
        assert_eq!(
            of("1048576", "1048576")
                .wider(Role::Device, &of_said(lies))
                .len(),
            1
        );
        assert_eq!(
            of("1024", "1024").wider(Role::Device, &Told::default()),
            [""; 0]
        );
        assert_eq!(of("40", "40").short(said), None);
        assert!(
            of("39", "39")
                .short(said)
                .unwrap()
                .contains("NOFILE 39 of 40")
        );
    }
}
