//! Whether one policy admits all that another does.
//!
//! Filters stack: a call must pass every filter of its thread. What a device's own policy
//! allows is worth nothing if the filter that the launcher set before exec kills it, and the
//! vCPU threads run under the VMM's filter too. So the outer policy must cover the inner one,
//! rule by rule, and the build says where it does not.

use super::{Error, Masked, Policy, Rule, Stage, Test};

/// Checks every policy against the one that it names as `outer`, in its steady stage.
///
/// # Errors
/// There is no such policy, or it would kill what the inner one allows.
pub fn check_outers(policies: &[Policy]) -> Result<(), Error> {
    for inner in policies {
        let Some(name) = &inner.outer else { continue };
        let outer = policies.iter().find(|p| p.name == *name).ok_or_else(|| {
            Error(format!(
                "policies/{}.toml: there is no policies/{name}.toml",
                inner.name
            ))
        })?;
        if let Some(rule) = inner.rules.iter().find(|rule| !admits(outer, rule)) {
            return Err(Error(format!(
                "policies/{}.toml: `{}` {} would be killed by the filter beneath it: allow as much in policies/{name}.toml",
                inner.name, rule.syscall, rule.shown
            )));
        }
    }
    Ok(())
}

fn admits(outer: &Policy, rule: &Rule) -> bool {
    rule.errno.is_some()
        || outer
            .rules
            .iter()
            .any(|o| o.errno.is_none() && o.stage == Stage::Steady && implies(rule, o))
}

/// Everything that matches `narrow` matches `wide`.
pub(super) fn implies(narrow: &Rule, wide: &Rule) -> bool {
    narrow.nr == wide.nr
        && wide
            .tests
            .iter()
            .all(|test| narrow.tests.iter().any(|n| within(n, test)))
}

fn within(narrow: &Test, wide: &Test) -> bool {
    narrow.index == wide.index
        && narrow
            .alternatives
            .iter()
            .all(|n| wide.alternatives.iter().any(|w| contains(*w, *n)))
}

fn contains(wide: Masked, narrow: Masked) -> bool {
    wide.mask & !narrow.mask == 0 && narrow.value & wide.mask == wide.value
}
