//! `bulkhead audit --policies`: every seccomp policy as it was built into this program, counted
//! and named from the compiled filter, never from its source.
//!
//! Runs in the command line's process and needs no VM.

use std::fmt::Write;

use bulkhead_seccomp::policy::{self, DecodeError, Policy, Stage, syscall_name};
use serde::Serialize;

/// One process's policy.
#[derive(Debug, Serialize)]
struct Entry {
    /// Name of the policy, which is the process's, with its variant.
    process: &'static str,
    /// System calls of the steady state.
    steady_syscalls: usize,
    /// System calls until set-up is over, by the filter that is in force until then.
    setup_syscalls: usize,
    /// The policy whose filter that is: another one for what runs on top of it. `None`: its own,
    /// which has one stage.
    setup_policy: Option<&'static str>,
    /// Those of the steady state, by name.
    syscalls: Vec<String>,
    /// Those that go when set-up is over.
    setup_only: Vec<String>,
    /// Whom it confines.
    about: &'static str,
}

/// All of them.
#[derive(Debug, Serialize)]
struct Policies {
    policies: Vec<Entry>,
}

fn names(numbers: &[u32]) -> Vec<String> {
    let name = |nr: &u32| syscall_name(*nr).map_or_else(|| nr.to_string(), str::to_owned);
    numbers.iter().map(name).collect()
}

/// The policy by which a process is held until its own is in force, or is so fully. Of a device the
/// launcher lets through what its outer one allows (`bulkhead_seccomp::notify`); a vCPU thread is
/// under the VMM's. What a launcher's child is under before exec is no other program's.
fn until_set_up(policy: &'static Policy) -> &'static Policy {
    let outer = policy.outer.and_then(policy::get);
    match outer {
        Some(outer) if !outer.name.starts_with("bulkhead-launcher") => outer,
        _ => policy,
    }
}

fn entry(policy: &'static Policy) -> Result<Entry, DecodeError> {
    let steady = policy.syscalls(Stage::Steady)?;
    let before = until_set_up(policy);
    let mut setup = before.syscalls(Stage::Setup)?;
    let setup_syscalls = setup.len();
    setup.retain(|nr| !steady.contains(nr));
    Ok(Entry {
        process: policy.name,
        steady_syscalls: steady.len(),
        setup_syscalls,
        setup_policy: (before.name != policy.name || !setup.is_empty()).then_some(before.name),
        syscalls: names(&steady),
        setup_only: names(&setup),
        about: policy.about,
    })
}

/// The policies as text or as one JSON object.
///
/// # Errors
/// One line: a filter could not be read back.
pub fn render(json: bool) -> Result<String, String> {
    let policies = policy::all()
        .iter()
        .map(|p| entry(p).map_err(|e| format!("policy {}: {e}", p.name)))
        .collect::<Result<Vec<_>, _>>()?;
    let all = Policies { policies };
    if json {
        return serde_json::to_string_pretty(&all).map_err(|e| e.to_string());
    }
    let mut text = String::new();
    for p in &all.policies {
        let _ = write!(
            text,
            "{}: {} system calls in the steady state",
            p.process, p.steady_syscalls
        );
        let _ = match p.setup_policy {
            Some(name) if name != p.process => {
                writeln!(text, ", {} until set-up is over ({name})", p.setup_syscalls)
            }
            Some(_) => writeln!(text, ", {} until set-up is over", p.setup_syscalls),
            None => writeln!(text, ", in one stage"),
        };
        let _ = writeln!(text, "    {}", p.about);
        let _ = writeln!(text, "    steady: {}", p.syscalls.join(" "));
        if !p.setup_only.is_empty() {
            let _ = writeln!(text, "    set-up: {}", p.setup_only.join(" "));
        }
    }
    Ok(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_counts_what_it_lists() {
        let json: serde_json::Value = serde_json::from_str(&render(true).unwrap()).unwrap();
        let policies = json["policies"].as_array().unwrap();
        assert!(policies.iter().any(|p| p["process"] == "bulkhead-blk"));
        for p in policies {
            let listed = p["syscalls"].as_array().unwrap().len() as u64;
            let extra = p["setup_only"].as_array().unwrap().len() as u64;
            assert_eq!(p["steady_syscalls"], listed);
            assert_eq!(p["setup_syscalls"], listed + extra);
            assert!(listed > 0);
        }
    }

    #[test]
    fn until_set_up_a_device_has_what_the_launcher_gave_it_and_a_vcpu_what_the_vmm_has() {
        let json: serde_json::Value = serde_json::from_str(&render(true).unwrap()).unwrap();
        let entry = |name: &str| {
            let mut policies = json["policies"].as_array().unwrap().iter();
            policies.find(|p| p["process"] == name).unwrap()
        };
        for policy in policy::all() {
            let setup = &entry(policy.name)["setup_syscalls"];
            match policy.outer {
                Some("device-outer") => {
                    assert_eq!(*setup, entry("device-outer")["steady_syscalls"]);
                }
                Some("bulkhead-vmm") => {
                    assert_eq!(*setup, entry("bulkhead-vmm")["setup_syscalls"]);
                }
                _ => assert_eq!(*setup, policy.syscalls(Stage::Setup).unwrap().len()),
            }
        }
        assert_eq!(entry("bulkhead-blk")["setup_policy"], "device-outer");
        assert_eq!(entry("bulkhead-vmm")["setup_policy"], "bulkhead-vmm");
        assert!(entry("device-outer")["setup_policy"].is_null());
        let text = render(false).unwrap();
        let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with(' ')).collect();
        assert!(
            lines.iter().any(|l| l.ends_with("(device-outer)")),
            "{text}"
        );
        assert!(lines.iter().any(|l| l.ends_with("in one stage")), "{text}");
    }

    #[test]
    fn no_steady_state_has_the_calls_that_open_or_execute() {
        let json: serde_json::Value = serde_json::from_str(&render(true).unwrap()).unwrap();
        for p in json["policies"].as_array().unwrap() {
            let process = p["process"].as_str().unwrap();
            if process.contains("launcher")
                || process.contains("outer")
                || process.contains("passt")
                || process.contains("virtiofsd")
            {
                continue;
            }
            for call in p["syscalls"].as_array().unwrap() {
                assert!(
                    !["execve", "execveat", "socket", "mount", "ptrace", "openat"]
                        .contains(&call.as_str().unwrap()),
                    "{process}: {call}"
                );
            }
        }
    }
}
