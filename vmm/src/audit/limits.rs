//! What bounds a process's use of the host, read from the kernel: the cgroup v2 that it is in
//! (Linux's Documentation/admin-guide/cgroup-v2.rst) and its resource limits (getrlimit(2), as
//! /proc/PID/limits shows them). Called by the audit only.

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::launcher::cgroup_parent::{GROUP_PREFIX, Mount, path_of};
use crate::launcher::{CONTROLLERS, LEAF_PREFIX, printable};

/// Files of a cgroup that hold limits.
const FILES: [&str; 4] = ["cpu.max", "memory.max", "pids.max", "io.max"];
/// Resource limits that a device's start sets.
const RLIMITS: [(&str, &str); 5] = [
    ("Max core file size", "CORE"),
    ("Max open files", "NOFILE"),
    ("Max processes", "NPROC"),
    ("Max data size", "DATA"),
    ("Max file size", "FSIZE"),
];

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
}

/// Reads what bounds a process. What may not be read is left out.
pub fn read(pid: i32) -> Limits {
    let path = path_of(&pid.to_string()).unwrap_or_default();
    let directory = Mount::find().and_then(|mount| mount.directory(&path));
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let mut limits = Limits {
        own_leaf: is_leaf(&path),
        cgroup: printable(&path),
        rlimits: rlimits(&text),
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
fn is_leaf(path: &str) -> bool {
    let mut parts = path.rsplit('/');
    parts
        .next()
        .is_some_and(|leaf| leaf.starts_with(LEAF_PREFIX))
        && parts
            .next()
            .is_some_and(|group| group.starts_with(GROUP_PREFIX))
}

fn rlimits(text: &str) -> Vec<(String, String)> {
    let mut limits = Vec::new();
    for (line, name) in RLIMITS {
        let soft = text
            .lines()
            .find_map(|l| l.strip_prefix(line)?.split_ascii_whitespace().next());
        if let Some(soft) = soft {
            limits.push((name.to_owned(), soft.to_owned()));
        }
    }
    limits
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

    /// It may leave a core file, with guest memory in it.
    pub fn leaves_a_core(&self) -> bool {
        self.rlimits
            .iter()
            .any(|(name, soft)| name == "CORE" && soft != "0")
    }

    /// More descriptors than a device of the most queues needs, or as many as it likes.
    pub fn holds_many(&self) -> bool {
        const MOST: u64 = 1024;
        self.rlimits.iter().any(|(name, soft)| {
            name == "NOFILE" && (soft == "unlimited" || soft.parse().is_ok_and(|n: u64| n > MOST))
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
            rlimits: rlimits(text),
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
    }
}
