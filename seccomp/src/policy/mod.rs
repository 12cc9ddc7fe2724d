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

/// What a rule asks of one argument.
#[derive(Clone, Copy, Debug)]
pub struct ArgumentTest {
    /// Position, from 0.
    pub index: usize,
    /// Masks and values, any one of which it must have: `argument & mask == value`.
    pub alternatives: &'static [(u64, u64)],
}

/// One rule of a policy's source, for people and tests.
#[derive(Clone, Copy, Debug)]
pub struct RuleInfo {
    /// Name of the system call.
    pub syscall: &'static str,
    /// Its number.
    pub nr: u32,
    /// What is asked of the arguments; empty when nothing is.
    pub args: &'static str,
    /// The same for programs: all must hold.
    pub tests: &'static [ArgumentTest],
    /// When it is in force.
    pub stage: Stage,
    /// `None` when the call is allowed, else the errno it fails with.
    pub errno: Option<u32>,
    /// The reason.
    pub why: &'static str,
    /// Why no test uses it; `None`: one must (`tests/rules`).
    pub unused: Option<&'static str>,
    /// The policy in whose file it stands: another one's where policies are extended.
    pub file: &'static str,
}

impl ArgumentTest {
    /// Which of the alternatives this argument has.
    #[must_use]
    pub fn alternative(&self, args: &[u64; 6]) -> Option<usize> {
        let argument = args.get(self.index)?;
        self.alternatives
            .iter()
            .position(|(mask, value)| argument & mask == *value)
    }
}

impl RuleInfo {
    /// Whether it speaks of this call, arguments and all.
    #[must_use]
    pub fn matches(&self, nr: u32, args: &[u64; 6]) -> bool {
        self.nr == nr
            && self
                .tests
                .iter()
                .all(|test| test.alternative(args).is_some())
    }
}

/// A compiled policy.
#[derive(Debug)]
pub struct Policy {
    /// Name of the policy's file, without `.toml`.
    pub name: &'static str,
    /// Whom it confines, in one line.
    pub about: &'static str,
    /// The policy beneath it in the same process.
    pub outer: Option<&'static str>,
    /// The filter for the steady state.
    pub steady: &'static [sock_filter],
    /// The filter with the set-up rules too.
    pub setup: &'static [sock_filter],
    /// The rules it was made from.
    pub rules: &'static [RuleInfo],
}

impl Policy {
    /// What tells this policy's filter of a stage from others in a trace of seccomp(2), whose
    /// fourth argument it is: see [`crate::filter`].
    #[must_use]
    pub fn mark(&self, stage: Stage) -> u64 {
        // FNV-1a.
        let name = self.name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        let stage = match stage {
            Stage::Setup => 1,
            Stage::Steady => 2,
        };
        stage << 32 | u64::from(name)
    }

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
    fn marks_tell_policies_and_stages_apart() {
        let marks: BTreeSet<u64> = all()
            .iter()
            .flat_map(|policy| [Stage::Setup, Stage::Steady].map(|stage| policy.mark(stage)))
            .collect();
        assert_eq!(marks.len(), all().len() * 2);
    }

    #[test]
    fn a_rule_matches_what_its_policy_lets_through() {
        let arch = crate::filter::AUDIT_ARCH.unwrap();
        for policy in all() {
            for nr in 0..600 {
                for arg in [0, 1, 2, 3, 5, 8, 0x5411, 0xae80, 1 << 32, u64::MAX] {
                    let args = [arg; 6];
                    let data = crate::notify::Data {
                        nr,
                        arch,
                        instruction_pointer: 0,
                        args,
                    };
                    let mut rules = policy.rules.iter().filter(|r| r.stage == Stage::Steady);
                    let matched = rules.any(|r| r.matches(nr, &args));
                    let forbidden =
                        evaluate(policy.steady, &data) == libc::SECCOMP_RET_KILL_PROCESS;
                    assert_eq!(matched, !forbidden, "{} {nr} {arg:#x}", policy.name);
                }
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
