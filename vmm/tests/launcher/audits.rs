//! `bulkhead audit` on processes that are only half of what they should be: the fake VMM is
//! not confined at all, and the probe sets no filter of its own.

use std::process::{Command, Output};

use serde_json::Value;

use crate::bed::{Bed, FakeVmm, alive, kill, soon};

fn audit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .arg("audit")
        .args(args)
        .output()
        .unwrap()
}

/// The pids of a fake VMM that stays: its own, the launcher's, two devices'.
fn pids(vmm: &mut FakeVmm) -> [i32; 4] {
    let mut next = || {
        vmm.until("pid ")
            .strip_prefix("pid ")
            .unwrap()
            .parse()
            .unwrap()
    };
    let [launcher, one, two] = [next(), next(), next()];
    [vmm.pid(), launcher, one, two]
}

fn deviations(audit: &Value, pid: i32) -> Vec<String> {
    let processes = audit["processes"].as_array().unwrap();
    let process = processes.iter().find(|p| p["pid"] == pid).unwrap();
    let lines = process["deviations"].as_array().unwrap();
    lines
        .iter()
        .map(|l| l.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn given_processes_that_lack_something_then_the_audit_says_what_and_fails() {
    let bed = Bed::new("audit");
    let mut vmm = bed.fake_vmm("stay");
    let [vmm_pid, launcher, one, two] = pids(&mut vmm);
    let output = audit(&["--pid", &vmm_pid.to_string(), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(read["verdict"], "deviation");
    assert_eq!(deviations(&read, launcher), [] as [&str; 0]);
    for device in [one, two] {
        // The launcher's filter alone is in force, and nobody has made it undumpable.
        let lines = deviations(&read, device);
        for says in [
            "seccomp filter of its own",
            "lack the device's policy",
            "dumpable",
        ] {
            let said = lines.iter().filter(|line| line.contains(says)).count();
            assert_eq!(said, 1, "{says}: {lines:?}");
        }
        assert_eq!(lines.len(), 3, "{lines:?}");
    }
    let vmm_lines = deviations(&read, vmm_pid).join("\n");
    for says in ["no_new_privs is not set", "has no seccomp filter"] {
        assert!(vmm_lines.contains(says), "{vmm_lines}");
    }

    let output = audit(&["--pid", &vmm_pid.to_string()]);
    let table = String::from_utf8(output.stdout).unwrap();
    for says in [
        "PROCESS",
        "launcher",
        "filter×2",
        "all own",
        "empty",
        "verdict: deviation",
    ] {
        assert!(table.contains(says), "{says}: {table}");
    }
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn given_processes_that_end_meanwhile_then_the_audit_still_reports() {
    let bed = Bed::new("audit-race");
    for _ in 0..5 {
        let mut vmm = bed.fake_vmm("stay");
        let [vmm_pid, launcher, one, _] = pids(&mut vmm);
        let child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["audit", "--pid", &vmm_pid.to_string(), "--json"])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        kill(one);
        kill(launcher);
        let output = child.wait_with_output().unwrap();
        // Wherever the ends fell: an answer or a line, never a crash.
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.is_empty() || line.starts_with("bulkhead: "), "{line}");
        soon("its end", || !alive(one));
    }
}

#[test]
fn given_nothing_to_look_at_then_the_audit_is_one_line() {
    for (args, code) in [
        (&["--pid", "2147483647"][..], 1),
        (&["--api-socket", "/nonexistent/socket"], 1),
        (&["--pid", "0"], 2),
        (&[], 2),
        (&["--pid", "1", "--api-socket", "x"], 2),
    ] {
        let output = audit(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(output.stdout.is_empty());
    }
}
