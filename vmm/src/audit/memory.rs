//! Whose memory a device's process has: its own VM's, or what nobody else on the host has. Called by
//! the audit only.
//!
//! A VM's memory, its in-flight regions and the like are files of the kernel's without a name, which
//! are told apart by their inodes. The VMM has all of its guest's; what a device has beside those it
//! has made itself, and shares with nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use super::fds::{self, Inode};
use super::mappings;
use super::{Report, Role};

/// How often memory may be met that is just being handed over, and the pause before another look.
const LOOKS: u32 = 5;
/// See [`LOOKS`].
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What a process has of the kernel's memory files.
fn held(pid: i32) -> Option<BTreeSet<Inode>> {
    let mut held = mappings::read(pid).ok()?.shared;
    // Mapped is what lies elsewhere, too: a ring of io_uring.
    held.retain(|inode| fds::memory_devices().contains(&inode.0));
    held.extend(fds::memory(pid).ok()?);
    Some(held)
}

/// Who holds any of these by a descriptor, of all processes of the host but `own`.
fn holders(wanted: &BTreeSet<Inode>, own: &BTreeSet<i32>) -> BTreeMap<Inode, BTreeSet<i32>> {
    let mut holders: BTreeMap<Inode, BTreeSet<i32>> = BTreeMap::new();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| !own.contains(pid)) {
        for inode in fds::memory(pid).unwrap_or_default() {
            if wanted.contains(&inode) {
                holders.entry(inode).or_default().insert(pid);
            }
        }
    }
    holders
}

/// Whether a process has a machine of KVM's.
fn has_a_machine(pid: i32) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut names = entries.into_iter().flatten().flatten();
    names.any(|entry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:kvm-vm")
    })
}

/// Devices that have memory which the VMM has not, and another process of this host has; a line each,
/// to follow the device's name.
fn look(reports: &[Report]) -> Vec<(i32, String)> {
    let vmm = reports.iter().find(|report| report.role == Role::Vmm);
    let Some(of_vmm) = vmm.and_then(|report| held(report.pid)) else {
        return Vec::new();
    };
    let devices = reports
        .iter()
        .filter(|report| matches!(report.role, Role::Device | Role::Helper));
    let beside: Vec<(i32, BTreeSet<Inode>)> = devices
        .filter_map(|report| {
            let held = held(report.pid)?;
            Some((report.pid, held.difference(&of_vmm).copied().collect()))
        })
        .collect();
    let mut all = of_vmm.clone();
    for (_, inodes) in &beside {
        all.extend(inodes.iter().copied());
    }
    let own = reports.iter().map(|report| report.pid).collect();
    let holders = holders(&all, &own);
    let mut found = Vec::new();
    // Its own guest's somebody else's switch has, too: that has no machine.
    let vmms = of_vmm.iter().filter_map(|inode| holders.get(inode));
    let pid = vmm.map_or(0, |report| report.pid);
    for other in vmms.flatten().collect::<BTreeSet<_>>() {
        if has_a_machine(*other) {
            found.push((
                pid,
                format!("shares memory with process {other}, which has a machine of its own"),
            ));
        }
    }
    for (device, inodes) in &beside {
        let others = inodes.iter().filter_map(|inode| holders.get(inode));
        for other in others.flatten().collect::<BTreeSet<_>>() {
            found.push((
                *device,
                format!("has memory of process {other}, which its own VMM has not"),
            ));
        }
        for (sibling, theirs) in &beside {
            if sibling > device && inodes.intersection(theirs).next().is_some() {
                found.push((
                    *device,
                    format!("shares memory with process {sibling}, and their VMM has not that"),
                ));
            }
        }
    }
    found
}

/// What is found at every look.
pub fn foreign(reports: &[Report]) -> Vec<(i32, String)> {
    let mut found = look(reports);
    for _ in 1..LOOKS {
        if found.is_empty() {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
        let again = look(reports);
        found.retain(|line| again.contains(line));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Verdict;

    fn report(role: Role, pid: i32) -> Report {
        Report {
            role,
            name: "x".into(),
            pid,
            verdict: Verdict::Ok,
            deviations: Vec::new(),
            notes: Vec::new(),
            unread: Vec::new(),
            landlock: None,
            process: None,
        }
    }

    /// A process that does nothing, and holds this memory where it is given any.
    fn sleeper(memory: Option<&fs::File>) -> std::process::Child {
        let mut command = std::process::Command::new("sleep");
        command.arg("60");
        if let Some(memory) = memory {
            command.stdin(memory.try_clone().unwrap());
        }
        command.spawn().unwrap()
    }

    #[test]
    fn memory_of_anothers_is_found_and_the_vmms_or_ones_own_is_not() {
        let file = || {
            let memory = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC);
            fs::File::from(memory.unwrap())
        };
        let (first, second) = (file(), file());
        let mut vm: Vec<std::process::Child> = [Some(&first), Some(&first), Some(&second)]
            .into_iter()
            .map(sleeper)
            .collect();
        let pid = |child: &std::process::Child| i32::try_from(child.id()).unwrap();
        let pids: Vec<i32> = vm.iter().map(pid).collect();
        let own = [report(Role::Vmm, pids[0]), report(Role::Device, pids[1])];
        // Another test may have a machine in this process, which has this memory, too.
        let of_device = |vm: &[Report], pid: i32| {
            let mut found = foreign(vm);
            found.retain(|(of, _)| *of == pid);
            found
        };
        assert_eq!(of_device(&own, pids[1]), []);
        // This process holds the second, too, and belongs to no VM.
        let mixed = [report(Role::Vmm, pids[0]), report(Role::Device, pids[2])];
        let found = of_device(&mixed, pids[2]);
        let us = std::process::id().to_string();
        assert!(
            matches!(found.as_slice(), [(pid, line)] if *pid == pids[2] && line.contains(&us)),
            "{found:?}"
        );
        drop(second);
        assert_eq!(of_device(&mixed, pids[2]), []);
        for child in &mut vm {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
