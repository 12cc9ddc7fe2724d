//! Whether one policy admits all that another does.
//!
//! Filters stack: a call must pass every filter of its thread. What a device's own policy
//! allows is worth nothing if the filter that the launcher set before exec kills it, and the
//! vCPU threads run under the VMM's filter too. So the outer policy must cover the inner one,
//! rule by rule, and the build says where it does not.

use super::{Masked, Policy, Rule, Stage, Test};

/// Rules of `inner` that `outer`, in its steady stage, does not admit whole.
#[must_use]
pub fn uncovered<'a>(inner: &'a Policy, outer: &Policy) -> Vec<&'a Rule> {
    inner
        .rules
        .iter()
        .filter(|rule| rule.errno.is_none())
        .filter(|rule| {
            !outer
                .rules
                .iter()
                .any(|o| o.errno.is_none() && o.stage == Stage::Steady && implies(rule, o))
        })
        .collect()
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
