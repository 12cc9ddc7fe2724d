//! From TOML text to checked rules. Everything a policy's author can get wrong is found here.

use super::arguments::{self, Width};
use super::constants;
use super::{Masked, Policy, Rule, Stage, Test};

use serde::Deserialize;
use std::collections::BTreeMap;

use super::syscalls;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    about: String,
    outer: Option<String>,
    extends: Option<String>,
    #[serde(default)]
    rule: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    syscall: String,
    #[serde(default)]
    args: BTreeMap<String, RawTest>,
    #[serde(default)]
    stage: RawStage,
    errno: Option<String>,
    why: Option<String>,
    unused: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawStage {
    Setup,
    #[default]
    Steady,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTest {
    eq: Option<RawValue>,
    one_of: Option<Vec<RawValue>>,
    mask: Option<RawValue>,
    clear: Option<RawValue>,
    set: Option<RawValue>,
    only: Option<RawValue>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawValue {
    Number(i64),
    Text(String),
}

impl RawValue {
    fn shown(&self) -> String {
        match self {
            Self::Number(n) => n.to_string(),
            Self::Text(t) => t.clone(),
        }
    }

    fn resolve(&self, width: Width) -> Result<u64, String> {
        let value = match self {
            // A negative number is what the kernel sees in a register: two's complement.
            Self::Number(n) if *n < 0 && width == Width::Int => {
                let n = i32::try_from(*n).map_err(|_| format!("{n} does not fit into an int"))?;
                u64::from(n.cast_unsigned())
            }
            Self::Number(n) => n.cast_unsigned(),
            Self::Text(text) => constants::resolve(text)?,
        };
        if width == Width::Int && value > u64::from(u32::MAX) {
            return Err(format!(
                "`{}` does not fit into 32 bits, and of this argument the kernel reads no more",
                self.shown()
            ));
        }
        Ok(value)
    }
}

pub(super) fn parse(name: &str, text: &str, arch: &str) -> Result<Policy, String> {
    let raw: RawPolicy = toml::from_str(text).map_err(|e| e.to_string())?;
    one_line("about", &raw.about)?;
    let table = syscalls::table(arch).ok_or_else(|| {
        format!("no table of system calls for `{arch}`: add one to src/syscalls.rs")
    })?;
    let mut rules = Vec::with_capacity(raw.rule.len());
    for (at, rule) in raw.rule.iter().enumerate() {
        let rule = check(name, rule, table)
            .map_err(|e| format!("rule {} (`{}`): {e}", at + 1, rule.syscall))?;
        rules.push(rule);
    }
    if rules.is_empty() {
        return Err("no [[rule]]: a process that may do nothing cannot even exit".into());
    }
    redundant(&rules)?;
    Ok(Policy {
        name: name.to_owned(),
        about: raw.about,
        outer: raw.outer,
        extends: raw.extends,
        rules,
    })
}

fn check(file: &str, raw: &RawRule, table: &[(u32, &str)]) -> Result<Rule, String> {
    let nr = table
        .iter()
        .find(|(_, n)| *n == raw.syscall)
        .map(|(nr, _)| *nr)
        .ok_or("there is no such system call on this architecture: mend the name")?;
    let why = raw
        .why
        .as_deref()
        .ok_or("`why` is missing: say in one line what the process needs it for")?;
    one_line("why", why)?;
    if let Some(unused) = &raw.unused {
        one_line("unused", unused)?;
    }
    let mut tests = Vec::with_capacity(raw.args.len());
    let mut shown = Vec::with_capacity(raw.args.len());
    for (argument, test) in &raw.args {
        let (index, width) = arguments::find(&raw.syscall, argument)?;
        let (alternatives, text) =
            alternatives(test, width).map_err(|e| format!("argument `{argument}`: {e}"))?;
        shown.push(format!("{argument} {text}"));
        tests.push(Test {
            index,
            width,
            alternatives,
        });
    }
    tests.sort_by_key(|t| t.index);
    let errno = raw.errno.as_deref().map(constants::errno).transpose()?;
    Ok(Rule {
        syscall: raw.syscall.clone(),
        nr,
        tests,
        stage: match raw.stage {
            RawStage::Setup => Stage::Setup,
            RawStage::Steady => Stage::Steady,
        },
        errno,
        why: why.to_owned(),
        unused: raw.unused.clone(),
        file: file.to_owned(),
        shown: shown.join(", "),
    })
}

/// What the test accepts, and how to show it.
fn alternatives(test: &RawTest, width: Width) -> Result<(Vec<Masked>, String), String> {
    let whole = match width {
        Width::Int => u64::from(u32::MAX),
        Width::Long => u64::MAX,
    };
    let exactly = |mask: u64, value: u64| -> Result<Vec<Masked>, String> {
        if value & !mask != 0 {
            return Err(format!(
                "value {value:#x} has bits outside the mask {mask:#x}: the rule can never match"
            ));
        }
        Ok(vec![Masked { mask, value }])
    };
    match test {
        RawTest {
            eq: Some(value),
            mask,
            one_of: None,
            clear: None,
            set: None,
            only: None,
        } => {
            let wanted = value.resolve(width)?;
            match mask {
                None => Ok((exactly(whole, wanted)?, format!("= {}", value.shown()))),
                Some(mask) => Ok((
                    exactly(mask.resolve(width)?, wanted)?,
                    format!("& {} = {}", mask.shown(), value.shown()),
                )),
            }
        }
        RawTest {
            one_of: Some(values),
            eq: None,
            mask: None,
            clear: None,
            set: None,
            only: None,
        } => {
            if values.is_empty() {
                return Err("`one_of` is empty: the rule can never match".into());
            }
            let mut alternatives: Vec<Masked> = Vec::with_capacity(values.len());
            for value in values {
                let wanted = Masked {
                    mask: whole,
                    value: value.resolve(width)?,
                };
                if alternatives.contains(&wanted) {
                    return Err(format!("`{}` is listed twice", value.shown()));
                }
                alternatives.push(wanted);
            }
            let shown: Vec<String> = values.iter().map(RawValue::shown).collect();
            Ok((alternatives, format!("in {}", shown.join(", "))))
        }
        RawTest {
            eq: None,
            one_of: None,
            mask: None,
            clear,
            set,
            only,
        } if clear.is_some() || set.is_some() || only.is_some() => {
            let get = |v: &Option<RawValue>| v.as_ref().map_or(Ok(0), |v| v.resolve(width));
            let (clear_bits, set_bits) = (get(clear)?, get(set)?);
            let foreign = match only {
                None => 0,
                Some(v) => whole & !(v.resolve(width)? | set_bits),
            };
            let mut shown = Vec::new();
            for (word, value) in [("without", clear), ("with", set), ("only", only)] {
                if let Some(value) = value {
                    shown.push(format!("{word} {}", value.shown()));
                }
            }
            if clear_bits & set_bits != 0 {
                return Err("a bit is both `set` and `clear`: the rule can never match".into());
            }
            Ok((
                exactly(clear_bits | set_bits | foreign, set_bits)?,
                shown.join(" "),
            ))
        }
        _ => Err(
            "give `eq` (with or without `mask`), or `one_of`, or any of `clear`, `set`, `only`"
                .into(),
        ),
    }
}

/// Puts the rules of the policy that each one extends before its own. A rule of the former
/// that one of the latter widens is left out.
pub(super) fn extend(policies: &mut [Policy]) -> Result<(), String> {
    let bases = policies.to_vec();
    for policy in policies {
        let Some(name) = &policy.extends else {
            continue;
        };
        let said = |why: String| Err(format!("policies/{}.toml: {why}", policy.name));
        let Some(base) = bases.iter().find(|p| p.name == *name) else {
            return said(format!("there is no policies/{name}.toml"));
        };
        if base.extends.is_some() {
            return said(format!(
                "{name} extends another policy itself: extend that one"
            ));
        }
        let widened = |rule: &Rule| {
            policy.rules.iter().any(|own| {
                own.errno == rule.errno
                    && super::coverage::implies(rule, own)
                    && !super::coverage::implies(own, rule)
            })
        };
        let kept: Vec<Rule> = base.rules.iter().filter(|r| !widened(r)).cloned().collect();
        policy.rules.splice(..0, kept);
        if let Err(why) = redundant(&policy.rules) {
            return said(format!("with the rules of {name} before its own, {why}"));
        }
    }
    Ok(())
}

/// A rule that another rule already says hides what the policy is.
fn redundant(rules: &[Rule]) -> Result<(), String> {
    for (at, rule) in rules.iter().enumerate() {
        for (other_at, other) in rules.iter().enumerate() {
            let earlier_twin = other_at < at;
            if at != other_at
                && rule.errno == other.errno
                && (other.stage == Stage::Steady || rule.stage == Stage::Setup)
                && super::coverage::implies(rule, other)
                && (earlier_twin
                    || !super::coverage::implies(other, rule)
                    || rule.stage != other.stage)
            {
                return Err(format!(
                    "rule {} (`{}`) allows nothing that rule {} does not: drop it",
                    at + 1,
                    rule.syscall,
                    other_at + 1
                ));
            }
        }
    }
    Ok(())
}

fn one_line(field: &str, text: &str) -> Result<(), String> {
    if text.contains('\n') || text.trim().len() < 8 {
        return Err(format!("`{field}` must be one line that says something"));
    }
    Ok(())
}
