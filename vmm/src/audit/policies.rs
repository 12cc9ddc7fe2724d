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
    /// System calls until set-up is over.
    setup_syscalls: usize,
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

fn entry(policy: &Policy) -> Result<Entry, DecodeError> {
    let steady = policy.syscalls(Stage::Steady)?;
    let mut setup = policy.syscalls(Stage::Setup)?;
    let setup_syscalls = setup.len();
    setup.retain(|nr| !steady.contains(nr));
    Ok(Entry {
        process: policy.name,
        steady_syscalls: steady.len(),
        setup_syscalls,
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
        let _ = writeln!(
            text,
            "{}: {} system calls in the steady state, {} until set-up is over\n    {}",
            p.process, p.steady_syscalls, p.setup_syscalls, p.about
        );
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
    fn no_steady_state_has_the_calls_that_open_or_execute() {
        let json: serde_json::Value = serde_json::from_str(&render(true).unwrap()).unwrap();
        for p in json["policies"].as_array().unwrap() {
            let process = p["process"].as_str().unwrap();
            if process.contains("launcher")
                || process.contains("outer")
                || process.contains("passt")
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
