//! `bulkhead audit`: what each process of a VM really is, read from the kernel (proc(5)),
//! and graded against what the design promises.
//!
//! It runs in the command line's process, outside every confinement: a confined VMM cannot
//! read its devices' /proc entries. Which processes there are comes from the API (and is
//! held against the kernel's own parentage) or from a pid. Nothing that a process can choose
//! itself (its name, names of its files) decides a grade, and all of it is escaped.
//!
//! `process` reads one process, `fds` its descriptors, `mappings` its memory, `trace` its seccomp
//! filters, `limits` what bounds it; `grade` judges, `table` prints.

mod fds;
mod grade;
mod limits;
mod mappings;
mod policies;
mod process;
mod table;
mod trace;

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::{
    BlockingClient, ClientError, MACHINE_SERVICE, machine, sys::peer_credentials,
};
use bulkhead_seccomp::landlock_empty;
use serde::Serialize;

use crate::launcher::{self, printable};
use process::{Process, Tree};

/// Options of `bulkhead audit`.
#[derive(clap::Args, Debug, Clone)]
pub struct AuditArgs {
    /// The VM that serves this API socket
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present_any = ["pid", "policies"],
        conflicts_with_all = ["pid", "policies"]
    )]
    pub api_socket: Option<PathBuf>,
    /// The VM whose VMM (`bulkhead`) has this process id
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Print the seccomp policy of every process, as built into this program
    #[arg(long, conflicts_with = "pid")]
    pub policies: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What a process is meant to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `bulkhead`.
    Vmm,
    /// `bulkhead-launcher`.
    Launcher,
    /// A device process.
    Device,
    /// An external helper, with its named exceptions.
    Helper,
}

/// A process to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    role: Role,
    /// Device id, or the role's name.
    name: String,
    pid: i32,
    /// Number of descriptors granted at exec (from 3 on), where the API tells.
    granted: Option<usize>,
    /// Kind of a device ("blk"), where the API tells.
    kind: Option<String>,
    /// Landlock's ABI that is in force in it, as a device says.
    landlock: Option<u32>,
    /// What is wrong with its place among the processes.
    misplaced: Vec<String>,
}

/// The judgement of one process or of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It ended, or its entries may not be read.
    Unknown,
    /// Not as it should be.
    Deviation,
}

/// One process, read and graded.
#[derive(Debug, Serialize)]
struct Report {
    role: Role,
    name: String,
    pid: i32,
    verdict: Verdict,
    /// What differs from what it should be.
    deviations: Vec<String>,
    /// What is weaker than it could be, and allowed.
    notes: Vec<String>,
    /// Why it could not be judged.
    unread: Vec<String>,
    process: Option<Process>,
}

/// Landlock, of which the kernel shows nothing for a process: what this kernel has, all of which
/// every process but the launcher uses.
#[derive(Debug, Serialize)]
struct Landlock {
    /// The newest ABI; 0: none.
    abi: u32,
    /// What that does not stop yet, in words.
    missing: &'static str,
}

/// What the host does with a core. RLIMIT_CORE does not hold back a pattern that is a pipe; that
/// a process is not dumpable does, so it is that which is graded.
#[derive(Debug, Serialize)]
struct Cores {
    /// kernel.core_pattern, escaped; `None`: it cannot be read.
    pattern: Option<String>,
    /// It hands cores to a program.
    piped: bool,
}

impl Cores {
    fn read() -> Self {
        Self::of(std::fs::read_to_string("/proc/sys/kernel/core_pattern").ok())
    }

    fn of(pattern: Option<String>) -> Self {
        let pattern = pattern.map(|text| printable(text.trim()));
        Self {
            piped: pattern.as_ref().is_some_and(|text| text.starts_with('|')),
            pattern,
        }
    }
}

/// No kernel shows a process's securebits to another one.
const SECUREBITS: &str = "not shown by the kernel; the launcher locks them before exec, and executes nothing where it cannot";

impl Landlock {
    fn of_this_kernel() -> Self {
        let status = landlock_empty::of_this_kernel();
        Self {
            abi: status.abi,
            missing: status.missing(),
        }
    }
}

/// The whole audit.
#[derive(Debug, Serialize)]
struct Audit {
    verdict: Verdict,
    processes: Vec<Report>,
    landlock: Landlock,
    cores: Cores,
    securebits: &'static str,
    /// Deviations of the VM as a whole.
    deviations: Vec<String>,
}

/// Reads, grades and prints. 0: everything is as it should be; 1: something is not, or nothing
/// could be audited; 3: not everything could be read, and what could is as it should be.
pub fn run(args: &AuditArgs) -> i32 {
    if args.policies {
        return match policies::render(args.json) {
            Ok(text) => {
                if let Err(line) = say(&(text + "\n")) {
                    return fail(&line);
                }
                0
            }
            Err(line) => fail(&line),
        };
    }
    let (targets, deviations) = match (&args.api_socket, args.pid) {
        (Some(path), _) => match from_api(path) {
            Ok(found) => found,
            Err(line) => return fail(&line),
        },
        (None, Some(pid)) => match from_pid(pid) {
            Ok(found) => found,
            Err(line) => return fail(&line),
        },
        (None, None) => return fail("give --api-socket PATH or --pid PID"),
    };
    let processes: Vec<Report> = targets.into_iter().map(recognise).map(report).collect();
    let worst = processes
        .iter()
        .map(|p| p.verdict)
        .max()
        .unwrap_or(Verdict::Unknown);
    let mut deviations = deviations;
    let vmm_uid = processes
        .iter()
        .filter(|report| report.role == Role::Vmm)
        .find_map(|report| report.process.as_ref()?.uid.first().copied());
    deviations.extend(grade::siblings(
        vmm_uid,
        processes
            .iter()
            .filter(|report| report.role == Role::Device)
            .filter_map(|report| Some((report.name.as_str(), report.process.as_ref()?))),
    ));
    let cores = Cores::read();
    let verdict = if deviations.is_empty() {
        worst
    } else {
        Verdict::Deviation
    };
    let audit = Audit {
        verdict,
        processes,
        landlock: Landlock::of_this_kernel(),
        cores,
        securebits: SECUREBITS,
        deviations,
    };
    let text = if args.json {
        match serde_json::to_string_pretty(&audit) {
            Ok(text) => text + "\n",
            Err(error) => return fail(&format!("audit: {error}")),
        }
    } else {
        table::render(&audit)
    };
    if let Err(line) = say(&text) {
        return fail(&line);
    }
    match verdict {
        Verdict::Ok => 0,
        Verdict::Deviation => 1,
        Verdict::Unknown => 3,
    }
}

/// Prints; a reader that has closed the pipe has what it wanted.
fn say(text: &str) -> Result<(), String> {
    let mut output = std::io::stdout();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(format!(
            "standard output: {error}: the audit is not all there"
        )),
        _ => Ok(()),
    }
}

fn fail(line: &str) -> i32 {
    let _ = writeln!(std::io::stderr(), "bulkhead: {}", printable(line));
    1
}

/// A child of the launcher that executes an external helper is one. The kernel says what it
/// executes, and only the launcher could have it execute that: no device process has an exec.
fn recognise(mut target: Target) -> Target {
    let helper = |program| process::executes(target.pid, program);
    if target.role == Role::Device && ["passt", "passt.avx2"].into_iter().any(helper) {
        target.role = Role::Helper;
    }
    target
}

fn report(target: Target) -> Report {
    let read = process::read(target.pid);
    let Target {
        role,
        name,
        pid,
        granted,
        kind,
        landlock,
        mut misplaced,
    } = target;
    let newest = landlock_empty::of_this_kernel().abi;
    if role == Role::Device && landlock.is_some_and(|abi| abi < newest) {
        misplaced.push(format!(
            "says that Landlock is in force by ABI {}, and this kernel has {newest}",
            landlock.unwrap_or(0)
        ));
    }
    let name = printable(&name);
    match read {
        Ok(process) => {
            let judged = grade::grade(role, &process, granted, kind.as_deref());
            let mut deviations = misplaced;
            deviations.extend(judged.deviations);
            let unread = process.unread.clone();
            let verdict = match (deviations.is_empty(), unread.is_empty()) {
                (false, _) => Verdict::Deviation,
                (true, false) => Verdict::Unknown,
                (true, true) => Verdict::Ok,
            };
            Report {
                role,
                name,
                pid,
                verdict,
                deviations,
                notes: judged.notes,
                unread,
                process: Some(process),
            }
        }
        Err(line) => Report {
            role,
            name,
            pid,
            verdict: if misplaced.is_empty() {
                Verdict::Unknown
            } else {
                Verdict::Deviation
            },
            deviations: misplaced,
            notes: Vec::new(),
            unread: vec![line],
            process: None,
        },
    }
}

/// Largest reply of the API.
const MAX_FRAME: u32 = 4 * 1024 * 1024;
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// How often a process that is just being started may be met, and the pause before another look.
const LOOKS: u32 = 20;
/// See [`LOOKS`].
const LOOK_AGAIN: Duration = Duration::from_millis(100);

type Found = (Vec<Target>, Vec<String>);

/// A device by the API's account.
#[derive(Clone, Debug)]
struct Named {
    id: String,
    kind: String,
    landlock: Option<u32>,
    pid: i32,
    granted: usize,
}

/// The processes that the API names, held against the kernel's own view.
fn from_api(path: &Path) -> Result<Found, String> {
    let name = printable(&path.to_string_lossy());
    let stream = launcher::packet::connect(path).map_err(|error| {
        format!("{name}: {error}; name the socket of a bulkhead that runs with --api-socket")
    })?;
    let peer = peer_credentials(stream.as_fd()).map_err(|error| format!("{name}: {error}"))?;
    let mut client = BlockingClient::new(stream, MAX_FRAME);
    let said = |error: ClientError| format!("{name}: {error}");
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
        return Ok(place(&tree, vmm, Some(info.launcher_pid), Some(&named)));
    }
    Err(format!("{name}: its devices could not be told"))
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
        granted: device.granted_fds.len(),
        landlock: device.helper.is_empty().then_some(device.landlock_abi),
        kind: device.kind,
        id: device.id,
    });
    Ok(devices.collect())
}

/// The processes below a VMM that is named by its pid.
fn from_pid(pid: i32) -> Result<Found, String> {
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
    match launchers.as_slice() {
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
        granted: None,
        kind: None,
        landlock: None,
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
                entry.granted = (device.granted > 0).then_some(device.granted);
                entry.kind = Some(device.kind.clone());
                entry.landlock = device.landlock;
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
    (targets, deviations)
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
            granted: 3,
        });
        named.collect()
    }

    #[test]
    fn a_core_pattern_that_is_a_pipe_is_known() {
        let piped = Cores::of(Some("|/usr/lib/dump %p\n".into()));
        assert!(piped.piped && piped.pattern.as_deref() == Some("|/usr/lib/dump %p"));
        assert!(!Cores::of(Some("core\n".into())).piped);
        assert!(!Cores::of(None).piped);
    }

    #[test]
    fn processes_in_their_places_are_no_deviation() {
        let (targets, deviations) = place(&tree(), 10, Some(11), Some(&named(&[12, 13])));
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
        let (targets, _) = place(&tree(), 10, Some(11), None);
        assert_eq!(targets.len(), 4);
    }

    #[test]
    fn what_the_api_hides_or_invents_is_found() {
        let (_, deviations) = place(&tree(), 10, Some(11), Some(&named(&[12])));
        assert!(
            deviations.iter().any(|d| d.contains("process 13")),
            "{deviations:?}"
        );
        let (targets, _) = place(&tree(), 10, Some(11), Some(&named(&[12, 13, 99])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 99 && !t.misplaced.is_empty())
        );
        let (targets, deviations) = place(&tree(), 10, Some(99), Some(&named(&[])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 99 && !t.misplaced.is_empty())
        );
        assert!(deviations.iter().any(|d| d.contains("process 11")));
        let grown = Tree::from_parents([(10, 1), (11, 10), (12, 11), (20, 12)]);
        let (targets, _) = place(&grown, 10, Some(11), Some(&named(&[12])));
        assert!(
            targets
                .iter()
                .any(|t| t.pid == 12 && t.misplaced == ["has child processes"])
        );
    }
}
