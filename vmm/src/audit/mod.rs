//! `bulkhead audit`: what each process of a VM really is, read from the kernel (proc(5)),
//! and graded against what the design promises.
//!
//! It runs in the command line's process, outside every confinement: a confined VMM cannot
//! read its devices' /proc entries. Which processes there are comes from the API (and is
//! held against the kernel's own parentage) or from a pid. What a process can choose itself (its
//! name, names of its files) makes no grade better, but that a thread of the VMM's which is called
//! other than a vCPU's is not held to the vCPUs' filter; all of it is escaped.
//!
//! `targets` finds the processes; `process` reads one, `fds` its descriptors, `mappings` its memory,
//! `trace` its seccomp filters, `limits` what bounds it; `grade` judges, `asked` limits that clients
//! have asked for, `cgroups` where each is, `memory` whose memory it has, `neighbours` who is in its
//! namespaces; `table` prints.

mod asked;
mod capabilities;
mod cgroups;
mod fds;
mod grade;
mod limits;
mod mappings;
mod memory;
mod neighbours;
mod policies;
mod process;
mod table;
mod targets;
mod trace;
mod user_namespaces;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_seccomp::landlock_empty;
use serde::Serialize;

use crate::launcher::helper::VIRTIOFSD;
use crate::launcher::printable;
use process::Process;
use targets::{Found, Target};

/// What to give it.
const USAGE: &str = "give --api-socket PATH or --pid PID of a VM, or --policies, which needs none (see `bulkhead audit --help`)";
/// Exit code of a command line that says nothing to do.
const EXIT_USAGE: i32 = 2;

/// Options of `bulkhead audit`.
#[derive(clap::Args, Debug, Clone)]
#[command(
    override_usage = "bulkhead audit --api-socket PATH [--json]\n       bulkhead audit --pid PID [--json]\n       bulkhead audit --policies [--json]",
    after_help = "By --api-socket the VMM names its devices, and what it says of them is held against what the \
kernel says. By --pid (of the bulkhead process itself, not of its launcher or a device) nobody is asked: \
that serves a VM without an API, or one that does not answer, and tells devices by their pids alone. \
--policies prints what each seccomp policy of this program allows, without any VM.\n\n\
Run it as root to see everything: of what an ordinary user's VM does, that user may read a part.\n\n\
Exit codes: 0 all is as it should be, 1 something is not or nothing could be audited, 2 wrong command line, \
3 not everything could be read and what could is as it should be."
)]
pub struct AuditArgs {
    /// The VM that serves this API socket
    #[arg(
        long,
        value_name = "PATH",
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
    /// ABI of Landlock in force in it, as it says itself.
    landlock: Option<u32>,
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
const SECUREBITS: &str = "not shown by the kernel; the launcher locks a device's before exec, and executes none where it cannot; an external helper's are not";

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
    let found = match (&args.api_socket, args.pid) {
        (Some(path), _) => targets::from_api(path),
        (None, Some(pid)) => targets::from_pid(pid),
        (None, None) => {
            fail(USAGE);
            return EXIT_USAGE;
        }
    };
    let Found {
        mut targets,
        mut deviations,
        cgroup,
    } = match found {
        Ok(found) => found,
        Err(line) => return fail(&line),
    };
    let landlock = Landlock::of_this_kernel();
    let possible = user_namespaces::expected(&targets);
    let vmm = targets.iter().find(|target| target.role == Role::Vmm);
    let user = vmm.and_then(|vmm| process::uid(vmm.pid));
    let own_ids = targets.iter().any(|target| {
        target.role == Role::Device && process::uid(target.pid).is_some_and(|uid| Some(uid) != user)
    });
    for target in &mut targets {
        target.told.user_namespaces = possible;
        target.told.own_ids = own_ids;
        target.told.newest_landlock = landlock.abi;
    }
    let mut processes: Vec<Report> = targets.into_iter().map(recognise).map(report).collect();
    let told = match &cgroup {
        Some(path) => cgroups::Told::ByApi(path),
        None => cgroups::Told::Nothing,
    };
    deviations.extend(cgroups::grade(&told, &mut processes));
    let strange = memory::foreign(&processes).into_iter();
    for (pid, line) in strange.chain(neighbours::strangers(&processes)) {
        if let Some(report) = processes.iter_mut().find(|report| report.pid == pid) {
            report.deviation(line);
        }
    }
    filters_of_all(&mut processes);
    let worst = processes
        .iter()
        .map(|p| p.verdict)
        .max()
        .unwrap_or(Verdict::Unknown);
    let read = processes.iter().filter_map(|report| {
        let process = report.process.as_ref()?;
        Some((report.role, report.name.as_str(), process))
    });
    deviations.extend(grade::siblings(read));
    let cores = Cores::read();
    let verdict = if deviations.is_empty() {
        worst
    } else {
        Verdict::Deviation
    };
    let audit = Audit {
        verdict,
        processes,
        landlock,
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

/// Where this kernel has shown the filters of one thread to us, those of another that it has not
/// shown are unknown: somebody else may have traced it meanwhile.
fn filters_of_all(processes: &mut [Report]) {
    let shown = |thread: &process::Thread| thread.filters.is_some();
    let threads = |report: &Report, which: &dyn Fn(&process::Thread) -> bool| {
        let mut threads = report.process.iter().flat_map(|process| &process.threads);
        threads.any(which)
    };
    if !processes.iter().any(|report| threads(report, &shown)) {
        return;
    }
    for report in processes {
        let hidden =
            |thread: &process::Thread| !shown(thread) && thread.seccomp_mode == 2 && !thread.worker;
        if threads(report, &hidden) {
            report
                .unread
                .push("its seccomp filters could not all be read; run the audit again".to_owned());
            report.verdict = report.verdict.max(Verdict::Unknown);
        }
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
///
/// Its filters say which, whatever the program is called; where they may not be read, its name does.
fn recognise(mut target: Target) -> Target {
    let filters = match target.role {
        Role::Device => trace::read(target.pid),
        _ => None,
    };
    let is = |policy: &str, programs: &[&str]| match &filters {
        Some(filters) => filters.policies.iter().any(|name| name == policy),
        None => programs
            .iter()
            .any(|program| process::executes(target.pid, program)),
    };
    if target.role == Role::Device && is("passt", &["passt", "passt.avx2"]) {
        target.role = Role::Helper;
    } else if target.role == Role::Device && is(VIRTIOFSD, &[VIRTIOFSD]) {
        target.role = Role::Helper;
        target.told.serves = true;
    }
    let may_start = || process::holds(target.pid, VIRTIOFSD);
    target.told.serves |= target.role == Role::Launcher && may_start();
    target
}

impl Report {
    fn deviation(&mut self, line: String) {
        self.deviations.push(line);
        self.verdict = Verdict::Deviation;
    }
}

/// How often threads of the VMM may be met that have only just begun, or another audit, and the pause
/// before another look.
const LOOKS: u32 = 20;
/// See [`LOOKS`].
const LOOK_AGAIN: Duration = Duration::from_millis(100);

fn read(target: &Target) -> Result<Process, String> {
    let mut read = process::read(target.pid);
    for _ in 0..LOOKS {
        let begins = |p: &Process| {
            target.role == Role::Vmm && grade::still_in_setup(p, &target.told).next().is_some()
        };
        // An audit that runs beside this one traces it for a moment.
        // A helper that has just been started has yet to confine itself.
        let own = |thread: &process::Thread| thread.seccomp_filters.is_none_or(|n| n >= 3);
        let confines = |p: &Process| target.role == Role::Helper && !p.threads.iter().all(own);
        let passes = |p: &Process| p.tracer != 0 || begins(p) || confines(p);
        if !read.as_ref().is_ok_and(passes) {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
        read = process::read(target.pid);
    }
    read
}

fn report(target: Target) -> Report {
    let read = read(&target);
    let Target {
        role,
        name,
        pid,
        told,
        misplaced,
    } = target;
    let landlock = told.landlock;
    let name = printable(&name);
    match read {
        Ok(process) => {
            let judged = grade::grade(role, &process, &told);
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
                landlock,
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
            landlock,
            process: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_pattern_that_is_a_pipe_is_known() {
        let piped = Cores::of(Some("|/usr/lib/dump %p\n".into()));
        assert!(piped.piped && piped.pattern.as_deref() == Some("|/usr/lib/dump %p"));
        assert!(!Cores::of(Some("core\n".into())).piped);
        assert!(!Cores::of(None).piped);
    }
}
