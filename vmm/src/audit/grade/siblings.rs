//! What no two processes of a VM may share: each device has namespaces, a uid, a gid and groups of
//! its own.

use super::DEVICE_NAMESPACES;
use crate::audit::Role;
use crate::audit::process::Process;

/// What two devices share, or one of them and the VMM or the launcher, though each should have its
/// own. Of an ordinary user's VM all is that user to the host (the VMM's uid).
pub fn siblings<'a>(
    processes: impl Iterator<Item = (Role, &'a str, &'a Process)> + Clone,
) -> Vec<String> {
    let mut shared = Vec::new();
    let vmm = processes.clone().find(|(role, ..)| *role == Role::Vmm);
    let user = vmm.and_then(|(_, _, vmm)| vmm.uid.first().copied());
    let devices = || {
        let of = processes.clone();
        of.filter(|(role, ..)| *role == Role::Device)
    };
    let (mut seen, mut uids, mut gids) = (Vec::new(), Vec::new(), Vec::new());
    for (_, name, process) in devices() {
        let own = process.uid.first().filter(|uid| Some(**uid) != user);
        if let Some(uid) = own {
            once(&mut shared, &mut uids, name, *uid, "the uid");
            if let Some(gid) = process.gid.first() {
                once(&mut shared, &mut gids, name, *gid, "the gid");
            }
            if !process.groups.is_empty() {
                shared.push(format!(
                    "device {name} is in groups beside its own: {}",
                    process
                        .groups
                        .iter()
                        .map(u32::to_string)
                        .collect::<Vec<_>>()
                        .join(", ")
                ));
            }
        }
        for namespace in &process.namespaces {
            let own = DEVICE_NAMESPACES.contains(&namespace.kind.as_str());
            // One of the host's is a deviation of that process already.
            if !own || namespace.shared {
                continue;
            }
            once(
                &mut shared,
                &mut seen,
                name,
                namespace.id.clone(),
                "namespace",
            );
            for (role, above, process) in processes.clone() {
                let manages = matches!(role, Role::Vmm | Role::Launcher);
                if manages && process.namespaces.iter().any(|n| n.id == namespace.id) {
                    shared.push(format!(
                        "device {name} shares namespace {} with the {above}",
                        namespace.id
                    ));
                }
            }
        }
    }
    shared
}

/// Notes who has it, or that another one has it already.
fn once<'a, T: PartialEq + std::fmt::Display>(
    shared: &mut Vec<String>,
    seen: &mut Vec<(T, &'a str)>,
    name: &'a str,
    what: T,
    called: &str,
) {
    match seen.iter().find(|(of, _)| *of == what) {
        Some((of, other)) => {
            shared.push(format!("devices {other} and {name} share {called} {of}"));
        }
        None => seen.push((what, name)),
    }
}
