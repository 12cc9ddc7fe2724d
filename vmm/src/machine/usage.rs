//! What the processes of a device use of the host, read from their cgroup leaf by descriptors
//! that the launcher opened: nothing is opened here, and nothing waits. Called on the manager
//! thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use bulkhead_proto::common::{ResourceUsage, Resources};

use crate::launcher::Placed;

/// A leaf's file is shorter; what is longer is cut.
const MAX_FILE: usize = 4096;

/// A device's leaf, or what there is in its place.
#[derive(Debug, Default)]
pub struct Usage {
    cgroup: String,
    files: Vec<(String, File)>,
    limits: Mutex<(Resources, Vec<String>)>,
}

impl Usage {
    /// Of a leaf with these limits.
    pub fn new(placed: Placed, limits: Resources) -> Self {
        Self {
            cgroup: placed.cgroup,
            files: placed.files,
            limits: Mutex::new((limits, placed.not_enforced)),
        }
    }

    /// The limits are others.
    pub fn changed(&self, limits: Resources, not_enforced: Vec<String>) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = (limits, not_enforced);
    }

    /// What it is to be held to, and what of that this host cannot enforce.
    pub fn limits(&self) -> (Resources, Vec<String>) {
        let limits = self.limits.lock();
        limits.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads it.
    pub fn read(&self) -> ResourceUsage {
        let mut usage = ResourceUsage::new();
        usage.cgroup.clone_from(&self.cgroup);
        for (name, file) in &self.files {
            // The leaf may be gone.
            if let Ok(text) = text(file) {
                fill(&mut usage, name, &text);
            }
        }
        let (limits, not_enforced) = self.limits();
        usage.limits = Some(limits).into();
        usage.not_enforced = not_enforced;
        usage
    }
}

fn text(file: &File) -> io::Result<String> {
    let mut buffer = [0; MAX_FILE];
    let count = file.read_at(&mut buffer, 0)?;
    let bytes = buffer.get(..count).unwrap_or_default();
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// One of the files of a leaf, as Linux's Documentation/admin-guide/cgroup-v2.rst has them.
fn fill(usage: &mut ResourceUsage, name: &str, text: &str) {
    let number = || text.trim().parse().unwrap_or(0);
    // "KEY VALUE" in lines.
    let keyed = |key: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(key)?
                    .strip_prefix(' ')?
                    .trim()
                    .parse()
                    .ok()
            })
            .unwrap_or(0)
    };
    // "MAJ:MIN key=value …" in lines, summed up.
    let summed = |key: &str| {
        text.split_ascii_whitespace()
            .filter_map(|word| {
                word.strip_prefix(key)?
                    .strip_prefix('=')?
                    .parse::<u64>()
                    .ok()
            })
            .fold(0, u64::saturating_add)
    };
    match name {
        "cpu.stat" => {
            usage.cpu_us = keyed("usage_usec");
            usage.cpu_throttled_us = keyed("throttled_usec");
        }
        "memory.current" => usage.memory_bytes = number(),
        "memory.peak" => usage.memory_peak_bytes = number(),
        "memory.events" => usage.oom_kills = keyed("oom_kill"),
        "pids.current" => usage.pids = number(),
        "io.stat" => {
            usage.read_bytes = summed("rbytes");
            usage.written_bytes = summed("wbytes");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_leaf_are_read() {
        let mut usage = ResourceUsage::new();
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 1234\nuser_usec 5\nnr_throttled 2\nthrottled_usec 77\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.peak", "8192\n"),
            (
                "memory.events",
                "low 0\noom 3\noom_kill 1\noom_group_kill 0\n",
            ),
            ("pids.current", "3\n"),
            (
                "io.stat",
                "8:0 rbytes=10 wbytes=1 rios=2\n8:16 rbytes=5 wbytes=2 rios=1\n",
            ),
            ("another", "1\n"),
        ] {
            fill(&mut usage, name, text);
        }
        assert_eq!((usage.cpu_us, usage.cpu_throttled_us), (1234, 77));
        assert_eq!((usage.memory_bytes, usage.memory_peak_bytes), (4096, 8192));
        assert_eq!((usage.oom_kills, usage.pids), (1, 3));
        assert_eq!((usage.read_bytes, usage.written_bytes), (15, 3));
    }

    #[test]
    fn nonsense_counts_for_nothing() {
        let mut usage = ResourceUsage::new();
        for name in ["cpu.stat", "memory.current", "pids.current", "io.stat"] {
            fill(&mut usage, name, "usage_usec\n\nx y rbytes=-1 wbytes=\u{0}");
        }
        assert_eq!(usage, ResourceUsage::new());
    }
}
