//! The policies as built, and the names of what they allow.
//!
//! Each policy is a `static` of its own, so that a binary carries only the one it installs.
//! [`all`] and [`get`] are for the audit and the tests. What a filter allows is never told from
//! the source: [`allowed_syscalls`] reads it back from the compiled instructions.

mod decode;
mod evaluate;

pub use decode::{DecodeError, Verdict, allowed_syscalls, verdict};
pub use evaluate::evaluate;
pub use libc::sock_filter;

/// When a rule is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Until the process is set up.
    Setup,
    /// From start to end.
    Steady,
}

/// One rule of a policy's source, for people.
#[derive(Clone, Copy, Debug)]
pub struct RuleInfo {
    /// Name of the system call.
    pub syscall: &'static str,
    /// Its number.
    pub nr: u32,
    /// What is asked of the arguments; empty when nothing is.
    pub args: &'static str,
    /// When it is in force.
    pub stage: Stage,
    /// `None` when the call is allowed, else the errno it fails with.
    pub errno: Option<u32>,
    /// The reason.
    pub why: &'static str,
}

/// A compiled policy.
#[derive(Debug)]
pub struct Policy {
    /// Name of the policy's file, without `.toml`.
    pub name: &'static str,
    /// Whom it confines, in one line.
    pub about: &'static str,
    /// The filter for the steady state.
    pub steady: &'static [sock_filter],
    /// The filter with the set-up rules too.
    pub setup: &'static [sock_filter],
    /// The rules it was made from.
    pub rules: &'static [RuleInfo],
}

impl Policy {
    /// Numbers of the system calls that the compiled filter of `stage` lets through, ascending.
    ///
    /// # Errors
    /// The filter uses an instruction that [`allowed_syscalls`] does not follow.
    pub fn syscalls(&self, stage: Stage) -> Result<Vec<u32>, DecodeError> {
        allowed_syscalls(match stage {
            Stage::Setup => self.setup,
            Stage::Steady => self.steady,
        })
    }
}

/// Every policy, by name.
#[must_use]
pub fn all() -> &'static [&'static Policy] {
    &ALL
}

/// The policy of that name.
#[must_use]
pub fn get(name: &str) -> Option<&'static Policy> {
    ALL.iter().copied().find(|p| p.name == name)
}

/// Name of a system call of this machine's architecture.
#[must_use]
pub fn syscall_name(nr: u32) -> Option<&'static str> {
    let table = crate::syscalls::table(std::env::consts::ARCH)?;
    let at = table.binary_search_by_key(&nr, |(nr, _)| *nr).ok()?;
    table.get(at).map(|(_, name)| *name)
}

const fn f(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

include!(concat!(env!("OUT_DIR"), "/policies.rs"));

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_filter_allows_exactly_the_calls_that_its_source_names() {
        for policy in all() {
            for stage in [Stage::Setup, Stage::Steady] {
                let named: BTreeSet<u32> = policy
                    .rules
                    .iter()
                    .filter(|r| r.errno.is_none())
                    .filter(|r| stage == Stage::Setup || r.stage == Stage::Steady)
                    .map(|r| r.nr)
                    .collect();
                let decoded: BTreeSet<u32> = policy.syscalls(stage).unwrap().into_iter().collect();
                assert_eq!(named, decoded, "{} {stage:?}", policy.name);
            }
        }
    }

    #[test]
    fn every_policy_kills_what_comes_by_another_architecture() {
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        for policy in all() {
            for (nr, _) in crate::syscalls::X86_64 {
                let verdict = verdict(policy.setup, AUDIT_ARCH_I386, *nr).unwrap();
                assert_eq!(verdict.actions(), [libc::SECCOMP_RET_KILL_PROCESS]);
            }
        }
    }

    #[test]
    fn names_and_numbers_agree_with_libc() {
        for (nr, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_io_uring_enter, "io_uring_enter"),
            (libc::SYS_landlock_restrict_self, "landlock_restrict_self"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(syscall_name(u32::try_from(nr).unwrap()), Some(name));
        }
        assert_eq!(syscall_name(1 << 20), None);
    }
}
