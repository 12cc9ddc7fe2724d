//! Which processes a VM has: by the API's account, held against the kernel's own parentage, or by
//! that alone from a pid. Called by the audit only.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use bulkhead_proto::{
    BlockingClient, ClientError, MACHINE_SERVICE,
    machine::{self, State},
    sys::peer_credentials,
};

use super::Role;
use super::asked::Asked;
use super::grade::Told;
use super::limits::Said;
use super::process::{self, Tree};
use crate::launcher::{self, printable};

/// A process to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// What it is meant to be.
    pub role: Role,
    /// Device id, or the role's name.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// What the API tells of it.
    pub told: Told,
    /// What is wrong with its place among the processes.
    pub misplaced: Vec<String>,
}

/// Largest reply of the API.
const MAX_FRAME: u32 = 4 * 1024 * 1024;
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// How often a process that is just being started may be met, and the pause before another look.
const LOOKS: u32 = 20;
/// See [`LOOKS`].
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What was found of a VM.
#[derive(Debug, Default)]
pub struct Found {
    /// Its processes.
    pub targets: Vec<Target>,
    /// Deviations of the VM as a whole.
    pub deviations: Vec<String>,
    /// Its cgroup by the API's account, empty: none. `None`: there is no API to tell.
    pub cgroup: Option<String>,
}

/// A device by the API's account.
#[derive(Clone, Debug)]
struct Named {
    id: String,
    kind: String,
    landlock: Option<u32>,
    pid: i32,
    granted: Vec<String>,
    asked: Asked,
    said: Said,
}

/// The processes that the API names, held against the kernel's own view.
pub fn from_api(path: &Path) -> Result<Found, String> {
    let name = printable(&path.to_string_lossy());
    let stream = launcher::packet::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "{name}: another user's, who does not let this one connect: run the audit as root, or as the user who started bulkhead"
        ),
        _ => format!("{name}: {error}; name the socket of a bulkhead that runs with --api-socket"),
    })?;
    let peer = peer_credentials(stream.as_fd()).map_err(|error| format!("{name}: {error}"))?;
    let mut client = BlockingClient::new(stream, MAX_FRAME);
    let said = |error: ClientError| format!("{name}: {}", unanswered(&error, peer.pid));
    let info: machine::InfoResponse = client
        .call(
            MACHINE_SERVICE,
            "Info",
            &machine::InfoRequest::new(),
            DEADLINE,
        )
        .map_err(said)?;
    let vmm = if peer.pid > 0 { peer.pid } else { info.vmm_pid };
    if info.vmm_pid != vmm {
        return Err(format!(
            "{name}: process {vmm} answers and says that it is {}: either it runs in another pid namespace, then run audit in there, or it lies",
            info.vmm_pid
        ));
    }
    for look in 1.. {
        let tree = Tree::read().map_err(|error| format!("/proc: {error}; mount /proc"))?;
        let named = named(&mut client).map_err(said)?;
        // One that is just being started, or has just ended, is in one list and not in the other.
        let starts = |pid: i32| named.iter().all(|device| device.pid != pid);
        if look < LOOKS && tree.children(info.launcher_pid).any(starts) {
            std::thread::sleep(LOOK_AGAIN);
            continue;
        }
        let mut found = place(&tree, vmm, Some(info.launcher_pid), Some(&named));
        let vmms = found.targets.iter_mut().filter(|t| t.role == Role::Vmm);
        for target in vmms {
            let state = info.state.enum_value_or_default();
            target.told.made = Some(state != State::STATE_NONE);
            target.told.booted = !matches!(state, State::STATE_NONE | State::STATE_CREATED);
            target.told.landlock = info.landlock_abi;
            let config = info.config.get_or_default();
            let boot = [&config.kernel, &config.initrd];
            target.told.boot = Some(boot.into_iter().map(|path| real(path)).collect());
        }
        found.cgroup = Some(printable(&info.cgroup));
        return Ok(found);
    }
    Err(format!("{name}: its devices could not be told"))
}

/// A file as a descriptor of it is shown.
fn real(path: &str) -> String {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    printable(&real.to_string_lossy())
}

/// The devices, as the API names them.
fn named(client: &mut BlockingClient) -> Result<Vec<Named>, ClientError> {
    let request = machine::DevicesRequest::new();
    let devices = match client.call::<_, machine::DevicesResponse>(
        MACHINE_SERVICE,
        "Devices",
        &request,
        DEADLINE,
    ) {
        Ok(reply) => reply.devices,
        // No machine has been made yet.
        Err(ClientError::Status(_)) => Vec::new(),
        Err(error) => return Err(error),
    };
    let devices = devices.into_iter().map(|device| Named {
        pid: device.pid,
        asked: Asked::new(device.resources.unwrap_or_default(), &device.not_enforced),
        granted: device.granted_fds,
        landlock: device.helper.is_empty().then_some(device.landlock_abi),
        said: Said {
            descriptors: device.limits.descriptors,
            file_bytes: device.limits.file_bytes,
            threads: device.limits.threads,
        },
        kind: device.kind,
        id: device.id,
    });
    Ok(devices.collect())
}

/// Why the process behind an API socket does not say what it is asked.
fn unanswered(error: &ClientError, pid: i32) -> String {
    match error {
        ClientError::Timeout(_) if process::is_stopped(pid) => format!(
            "its process {pid} is stopped, by a signal (SIGSTOP) or a debugger: let it go on (kill -CONT {pid}), or audit it as it is by --pid {pid}"
        ),
        ClientError::Timeout(span) if pid > 0 => format!(
            "process {pid} gives no answer within {} s: see bulkhead's own output, or audit it by --pid {pid}",
            span.as_secs()
        ),
        ClientError::Closed => "closed the connection without an answer: this is no API socket, bulkhead has ended, or it does not hear this user: name its --api-socket, and run the audit as root or as the user who started it"
            .to_owned(),
        error => error.to_string(),
    }
}

/// The processes below a VMM that is named by its pid.
pub fn from_pid(pid: i32) -> Result<Found, String> {
    let tree = Tree::read().map_err(|error| format!("/proc: {error}; mount /proc"))?;
    if !tree.contains(pid) {
        return Err(format!(
            "--pid {pid}: no such process; give the pid of a running bulkhead (as root, if /proc hides processes)"
        ));
    }
    let launchers: Vec<i32> = tree
        .children(pid)
        .filter(|child| process::executes(*child, launcher::PROGRAM))
        .collect();
    // Nothing of what is another user's may be read.
    let own = i32::try_from(std::process::id())
        .ok()
        .and_then(process::uid);
    let foreign = process::uid(pid).filter(|uid| own != Some(0) && own != Some(*uid));
    match launchers.as_slice() {
        [] if foreign.is_some() => Err(format!(
            "--pid {pid}: is another user's (uid {}): run the audit as root, or as the user who started it",
            foreign.unwrap_or_default()
        )),
        [launcher] => Ok(place(&tree, pid, Some(*launcher), None)),
        _ => Err(format!(
            "--pid {pid}: has no {} below it; give the pid of a running bulkhead, and run audit as root or as its user",
            launcher::PROGRAM
        )),
    }
}

/// Gives each process its role. `named`: the devices by the API's account.
fn place(tree: &Tree, vmm: i32, launcher: Option<i32>, named: Option<&[Named]>) -> Found {
    let mut deviations = Vec::new();
    let target = |role, name: &str, pid| Target {
        role,
        name: name.to_owned(),
        pid,
        told: Told::default(),
        misplaced: Vec::new(),
    };
    let mut targets = vec![target(Role::Vmm, "vmm", vmm)];
    let launcher = launcher.filter(|pid| *pid > 0);
    if let Some(pid) = launcher {
        let mut entry = target(Role::Launcher, "launcher", pid);
        if tree.contains(pid) && tree.parent(pid) != Some(vmm) {
            entry.misplaced.push("is not a child of the VMM".into());
        }
        targets.push(entry);
    } else {
        deviations.push("the VMM names no launcher".into());
    }
    for pid in tree.children(vmm).filter(|pid| Some(*pid) != launcher) {
        deviations.push(format!(
            "process {pid} is a child of the VMM beside its launcher"
        ));
    }
    let below: Vec<i32> = launcher
        .map(|pid| tree.children(pid).collect())
        .unwrap_or_default();
    match named {
        Some(named) => {
            for device in named {
                // A device that has failed or is about to start has no process.
                if device.pid <= 0 {
                    continue;
                }
                let mut entry = target(Role::Device, &device.id, device.pid);
                let count = device.granted.len();
                entry.told.granted = (count > 0).then_some(count);
                entry.told.grants.clone_from(&device.granted);
                entry.told.asked = device.asked.clone();
                entry.told.kind = Some(device.kind.clone());
                entry.told.said = device.said;
                entry.told.landlock = device.landlock;
                if tree.contains(device.pid) && tree.parent(device.pid) != launcher {
                    entry
                        .misplaced
                        .push("is not a child of the launcher".into());
                }
                targets.push(entry);
            }
            for pid in below
                .iter()
                .filter(|pid| named.iter().all(|device| device.pid != **pid))
            {
                deviations.push(format!(
                    "process {pid} is a child of the launcher that the API does not name"
                ));
            }
        }
        None => {
            for pid in &below {
                targets.push(target(Role::Device, &format!("device {pid}"), *pid));
            }
        }
    }
    for entry in targets.iter_mut().filter(|t| t.role == Role::Device) {
        if tree.children(entry.pid).next().is_some() {
            entry.misplaced.push("has child processes".into());
        }
    }
    Found {
        targets,
        deviations,
        cgroup: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        // VMM 10, launcher 11, devices 12 and 13; 99 is somebody else.
        Tree::from_parents([(10, 1), (11, 10), (12, 11), (13, 11), (99, 1)])
    }

    fn named(pids: &[i32]) -> Vec<Named> {
        let named = pids.iter().map(|pid| Named {
            id: format!("d{pid}"),
            kind: "blk".to_owned(),
            landlock: None,
            pid: *pid,
            granted: vec![String::new(); 3],
            asked: Asked::default(),
            said: Said::default(),
        });
        named.collect()
    }

    #[test]
    fn processes_in_their_places_are_no_deviation() {
        let Found {
            targets,
            deviations,
            ..
        } = place(&tree(), 10, Some(11), Some(&named(&[12, 13])));
        assert_eq!(deviations, Vec::<String>::new());
        let pids: Vec<_> = targets
            .iter()
            .map(|t| (t.role, t.pid, t.misplaced.len()))
            .collect();
        assert_eq!(
            pids,
            [
                (Role::Vmm, 10, 0),
                (Role::Launcher, 11, 0),
                (Role::Device, 12, 0),
                (Role::Device, 13, 0)
            ]
        );
        let Found { targets, .. } = place(&tree(), 10, Some(11), None);
        assert_eq!(targets.len(), 4);
    }

    #[test]
    fn what_the_api_hides_or_invents_is_found() {
        let Found { deviations, .. } = place(&tree(), 10, Some(11), Some(&named(&[12])));
        assert!(
            deviations.iter().any(|d| d.contains("process 13")),
            "{deviations:?}"
        );
        let Found { targets, .. } = place(&tree(), 10, Some(11), Some(&named(&[12, 13, 99])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 99 && !t.misplaced.is_empty())
        );
        let Found {
            targets,
            deviations,
            ..
        } = place(&tree(), 10, Some(99), Some(&named(&[])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 99 && !t.misplaced.is_empty())
        );
        assert!(deviations.iter().any(|d| d.contains("process 11")));
        let grown = Tree::from_parents([(10, 1), (11, 10), (12, 11), (20, 12)]);
        let Found { targets, .. } = place(&grown, 10, Some(11), Some(&named(&[12])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 12 && t.misplaced == ["has child processes"])
        );
    }
}
