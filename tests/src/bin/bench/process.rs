//! What /proc says of processes: their tree, memory and CPU time.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Name of a process.
pub fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim()
        .to_string()
}

/// A process and all that descend from it.
pub fn tree(root: u32) -> Vec<u32> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name, in parentheses, may hold anything.
        let after = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest)
            .unwrap_or_default();
        if let Some(parent) = after
            .split_whitespace()
            .nth(1)
            .and_then(|p| p.parse::<u32>().ok())
        {
            all.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(
            all.iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found
}

/// A field of /proc/PID/status in KiB.
pub fn status_kib(pid: u32, field: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Proportional set size of a process, in KiB.
#[derive(Clone, Copy, Default)]
pub struct Pss {
    /// All of it but guest RAM.
    pub total: f64,
    /// Of that: anonymous.
    pub anonymous: f64,
    /// Guest RAM.
    pub guest: f64,
}

/// PSS by kind of mapping. Guest RAM is what a mapping of a memfd named `guest` holds.
///
/// # Errors
/// Why it could not be read.
pub fn pss(pid: u32, guest: &str) -> Result<Pss, String> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let mut sum = Pss::default();
    let (mut is_guest, marker) = (false, format!("/memfd:{guest}"));
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // The first line of a mapping: addresses, rights, offset, device, inode, name.
            is_guest = line.contains(&marker);
            continue;
        }
        let kib: f64 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0.0);
        match first {
            "Pss:" if is_guest => sum.guest += kib,
            "Pss:" => sum.total += kib,
            "Pss_Anon:" if !is_guest => sum.anonymous += kib,
            "Anonymous:" if !is_guest && !smaps.contains("Pss_Anon:") => sum.anonymous += kib,
            _ => {}
        }
    }
    Ok(sum)
}

/// CPU time that the threads of a process, and what descends from it, have used.
pub fn cpu(root: u32) -> Duration {
    let mut nanoseconds = 0u64;
    for pid in tree(root) {
        for task in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let used = text
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok());
            nanoseconds = nanoseconds.saturating_add(used.unwrap_or(0));
        }
    }
    Duration::from_nanos(nanoseconds)
}

/// Waits until a path exists.
///
/// # Errors
/// When it does not in time.
pub fn appears(path: &str, limit: Duration) -> Result<(), String> {
    let end = Instant::now() + limit;
    while !Path::new(path).exists() {
        if Instant::now() > end {
            return Err(format!("{path} does not appear"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
