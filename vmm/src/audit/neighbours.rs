//! Who else on the host is in a namespace that was made for one device alone. Called by the audit only.

use std::fs;
use std::time::Duration;

use super::{Report, Role, process};

/// Namespaces in which a stranger meets the device: processes, network, messages, mounts.
const KINDS: [&str; 4] = ["mnt", "pid", "net", "ipc"];

/// The pause before another look: a namespace's number may have been another's a moment ago.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Processes that are none of the VM's, each with the device whose namespace it is in: those that are
/// found twice, of devices that are still there.
pub fn strangers(reports: &[Report]) -> Vec<(i32, String)> {
    let mut found = look(reports);
    if !found.is_empty() {
        std::thread::sleep(LOOK_AGAIN);
        let again = look(reports);
        let same = |pid: i32| {
            let report = reports.iter().find(|report| report.pid == pid);
            let started = report.and_then(|report| report.process.as_ref()?.started);
            started.is_some() && started == process::started(pid)
        };
        found.retain(|line| again.contains(line) && same(line.0));
    }
    found
}

fn look(reports: &[Report]) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    let own = |pid: i32| reports.iter().any(|report| report.pid == pid);
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| !own(*pid)) {
        for kind in KINDS {
            let Ok(link) = fs::read_link(format!("/proc/{pid}/ns/{kind}")) else {
                continue;
            };
            let link = link.to_string_lossy();
            let device = reports.iter().find(|report| {
                let mut namespaces = report.process.iter().flat_map(|p| &p.namespaces);
                report.role == Role::Device && namespaces.any(|n| n.id == link && !n.shared)
            });
            // One that the launcher has just made has yet to come among the devices.
            if let Some(device) = device {
                let line = format!(
                    "process {pid}, which is none of this VM's, is in its namespace {link}"
                );
                found.push((device.pid, line));
                break;
            }
        }
    }
    found
}
