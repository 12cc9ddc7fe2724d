//! The audit as text: one table of processes, what each of them holds, may call and is bounded by,
//! and what is wrong, line by line.

use std::fmt::Write;

use super::capabilities::capability_names;
use super::grade::strongest;
use super::process::{Namespace, Process, Thread};
use super::trace::Filters;
use super::{Audit, Report, Role, Verdict};

/// The policies of a thread, each with how many system calls it lets through.
fn by_policy(filters: &Filters) -> String {
    let each = filters.policies.iter().zip(&filters.counts);
    let each = each.map(|(name, count)| format!("{name} ({count})"));
    each.collect::<Vec<_>>().join(", ")
}

/// Everything, ready to print.
pub fn render(audit: &Audit) -> String {
    let mut out = String::new();
    let head = [
        "PROCESS",
        "PID",
        "UID",
        "CAPABILITIES",
        "NNP",
        "SECCOMP",
        "NAMESPACES",
        "ROOT",
        "FDS",
        "THREADS",
        "VERDICT",
    ];
    let mut rows: Vec<Vec<String>> = vec![head.map(str::to_owned).into()];
    rows.extend(audit.processes.iter().map(row));
    columns(&mut out, "", &rows);
    for report in &audit.processes {
        if let Some(process) = &report.process {
            details(&mut out, report, process);
        }
    }
    out.push('\n');
    for report in &audit.processes {
        for (what, lines) in [
            ("deviation", &report.deviations),
            ("unknown", &report.unread),
            ("note", &report.notes),
        ] {
            for line in lines {
                let _ = writeln!(out, "{what}: {} (pid {}): {line}", report.name, report.pid);
            }
        }
    }
    for line in &audit.deviations {
        let _ = writeln!(out, "deviation: {line}");
    }
    let mut meant = audit.processes.iter();
    let said = match meant.all(|p| p.landlock.is_some() || !uses_landlock(p.role)) {
        true => "the VMM and its devices say which they use",
        false => "which a process uses it was not asked, or did not say",
    };
    let _ = match (audit.landlock.abi, audit.landlock.missing) {
        (0, _) => writeln!(out, "note: Landlock: this kernel has none"),
        (abi, "") => writeln!(
            out,
            "Landlock: ABI {abi} of this kernel's, all of it; {said}"
        ),
        (abi, missing) => writeln!(out, "note: Landlock: ABI {abi}, without {missing}"),
    };
    let cores = match (&audit.cores.pattern, audit.cores.piped) {
        (None, _) => "core pattern: unknown".to_owned(),
        (Some(pattern), true) => format!(
            "core pattern: {pattern}: a pipe, which RLIMIT_CORE does not hold; no process is dumpable"
        ),
        (Some(pattern), false) => format!("core pattern: {pattern}"),
    };
    let _ = writeln!(out, "{cores}");
    let _ = writeln!(out, "securebits: {}", audit.securebits);
    let count = audit.processes.len();
    let _ = match audit.verdict {
        Verdict::Ok => writeln!(out, "verdict: ok, {count} processes are as they should be"),
        Verdict::Unknown => writeln!(out, "verdict: unknown, not everything could be read"),
        Verdict::Deviation => writeln!(out, "verdict: deviation, see above"),
    };
    out
}

/// The launcher opens files for others, and a helper is another's program.
fn uses_landlock(role: Role) -> bool {
    matches!(role, Role::Vmm | Role::Device)
}

/// What one process holds, may call, has mapped and is bounded by.
fn details(out: &mut String, report: &Report, process: &Process) {
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "\nDescriptors of {} (pid {}):",
        title(report),
        report.pid
    );
    let rows: Vec<Vec<String>> = process
        .fds
        .iter()
        .map(|fd| {
            vec![
                fd.number.to_string(),
                fd.kind.label(),
                fd.access.clone(),
                fd.target.clone(),
            ]
        })
        .collect();
    columns(out, "  ", &rows);
    if rows.is_empty() {
        out.push_str("  none that may be read\n");
    }
    calls(out, process);
    for fd in &process.fds {
        if let Some(ring) = &fd.ring {
            let _ = writeln!(
                out,
                "  io_uring {}: files {}; {} buffers",
                fd.number,
                ring.files.join(" "),
                ring.buffers
            );
        }
    }
    if let Some(mappings) = &process.mappings {
        let _ = writeln!(
            out,
            "  mappings: {}, of which {} can be executed, {} of them written to",
            mappings.total,
            mappings.executable,
            mappings.writable_and_executable.len()
        );
    }
    if let Some(limits) = &process.limits {
        let bounds = match limits.text(&limits.limits) {
            text if text.is_empty() => String::new(),
            text => format!(": {text}"),
        };
        let cgroup = match limits.cgroup.as_str() {
            "" => "none",
            path => path,
        };
        let _ = writeln!(
            out,
            "  limits: {}; cgroup {cgroup}{bounds}",
            limits.text(&limits.rlimits),
        );
    }
    let _ = match report.landlock {
        Some(0) => writeln!(out, "  Landlock: none, as it says"),
        Some(abi) => writeln!(out, "  Landlock: ABI {abi}, as it says"),
        None => Ok(()),
    };
}

/// The system calls of its threads; those of threads with the same filters once.
fn calls(out: &mut String, process: &Process) {
    let mut sets: Vec<(Option<&Filters>, Vec<&Thread>)> = Vec::new();
    for thread in &process.threads {
        let filters = thread.filters.as_ref();
        match sets.iter_mut().find(|(of, _)| *of == filters) {
            Some((_, threads)) => threads.push(thread),
            None => sets.push((filters, vec![thread])),
        }
    }
    let several = sets.len() > 1;
    for (filters, threads) in &sets {
        let who = match several {
            true => {
                let names = threads.iter().map(|t| format!("{} {}", t.name, t.tid));
                format!(" of {}", names.collect::<Vec<_>>().join(", "))
            }
            false => String::new(),
        };
        let _ = match filters {
            Some(filters) => writeln!(
                out,
                "  system calls{who}, read from the kernel: {}: {}; by policy {}",
                filters.syscalls.len(),
                filters.syscalls.join(" "),
                by_policy(filters)
            ),
            None => writeln!(
                out,
                "  system calls{who}: the kernel does not show their filters to this user"
            ),
        };
    }
}

/// What the kernel says it executes, and the name by which the API knows it.
fn title(report: &Report) -> String {
    let program = report
        .process
        .as_ref()
        .and_then(|process| process.exe.as_deref())
        .and_then(|exe| exe.rsplit('/').next())
        .map(|name| name.trim_end_matches(" (deleted)"))
        .map(|name| name.trim_start_matches("memfd:"));
    match (program, report.role) {
        (Some(program), Role::Device | Role::Helper) => format!("{program} {}", report.name),
        (Some(program), _) => program.to_owned(),
        (None, _) => report.name.clone(),
    }
}

fn row(report: &Report) -> Vec<String> {
    let verdict = match report.verdict {
        Verdict::Ok => "ok",
        Verdict::Unknown => "unknown",
        Verdict::Deviation => "deviation",
    };
    let mut cells = vec![title(report), report.pid.to_string()];
    match &report.process {
        Some(process) => cells.extend(facts(process)),
        None => cells.extend(std::iter::repeat_n("-".to_owned(), 8)),
    }
    cells.push(verdict.to_owned());
    cells
}

fn facts(process: &Process) -> [String; 8] {
    let threads = &process.threads;
    let no_new_privs = threads.iter().all(|t| t.no_new_privs);
    // The thread with the least stands for the process.
    let seccomp = match threads
        .iter()
        .map(|t| (t.seccomp_mode, t.seccomp_filters))
        .min()
    {
        Some((2, Some(filters))) => format!("filter×{filters}"),
        Some((2, None)) => "filter".into(),
        Some((1, _)) => "strict".into(),
        _ => "off".into(),
    };
    let root = process.root.as_ref().map_or_else(
        || "?".to_owned(),
        |root| match (root.shared, root.entries.is_empty()) {
            (true, _) => "host".into(),
            (false, true) => "empty".into(),
            (false, false) => "own".into(),
        },
    );
    let unread = process.fds.is_empty() && !process.unread.is_empty();
    [
        process
            .uid
            .get(1)
            .map_or_else(|| "?".into(), u32::to_string),
        capability_names(strongest(process)),
        if no_new_privs { "yes" } else { "no" }.into(),
        seccomp,
        own_namespaces(&process.namespaces),
        root,
        if unread {
            "?".into()
        } else {
            process.fds.len().to_string()
        },
        threads.len().to_string(),
    ]
}

/// Which namespaces are the process's own.
fn own_namespaces(namespaces: &[Namespace]) -> String {
    let own: Vec<&str> = namespaces
        .iter()
        .filter(|n| !n.shared)
        .map(|n| n.kind.as_str())
        .collect();
    match (own.len(), namespaces.len()) {
        (_, 0) => "?".into(),
        (0, _) => "host".into(),
        (own, all) if own == all => "all own".into(),
        (count, all) if count > all / 2 => {
            let shared: Vec<&str> = namespaces
                .iter()
                .filter(|n| n.shared)
                .map(|n| n.kind.as_str())
                .collect();
            format!("own but {}", shared.join(","))
        }
        _ => format!("own {}", own.join(",")),
    }
}

/// Left-aligned columns, two spaces apart.
fn columns(out: &mut String, indent: &str, rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (index, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(index) {
                Some(known) => *known = width.max(*known),
                None => widths.push(width),
            }
        }
    }
    for row in rows {
        let mut line = indent.to_owned();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_do_not_end_in_blanks() {
        let mut out = String::new();
        let rows = [["a", "bb", "c"], ["aaa", "b", ""]].map(|r| r.map(str::to_owned).to_vec());
        columns(&mut out, " ", &rows);
        assert_eq!(out, " a    bb  c\n aaa  b\n");
    }

    #[test]
    fn namespaces_are_summed_up() {
        let of = |shared: [bool; 4]| {
            let all: Vec<Namespace> = ["user", "mnt", "pid", "net"]
                .iter()
                .zip(shared)
                .map(|(kind, shared)| Namespace {
                    kind: (*kind).into(),
                    id: String::new(),
                    shared,
                })
                .collect();
            own_namespaces(&all)
        };
        assert_eq!(of([false; 4]), "all own");
        assert_eq!(of([true; 4]), "host");
        assert_eq!(of([true, false, false, false]), "own but user");
        assert_eq!(of([false, true, true, true]), "own user");
        assert_eq!(own_namespaces(&[]), "?");
    }
}
