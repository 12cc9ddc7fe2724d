//! Files of what rules were used, and the verdict on them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use bulkhead_seccomp::policy::{self, Policy, RuleInfo, Stage};

use crate::track::{Tracker, Uses};

/// A rule as its file has it, which stays the same when others come and go.
fn key(rule: &RuleInfo) -> String {
    format!(
        "{}\t{}\t{}\t{:?}\t{}",
        rule.file,
        rule.syscall,
        rule.args,
        rule.stage,
        rule.errno.unwrap_or_default()
    )
}

/// For people.
fn show(rule: &RuleInfo) -> String {
    let mut line = format!("{}: {}", rule.file, rule.syscall);
    if !rule.args.is_empty() {
        let _ = write!(line, " ({})", rule.args);
    }
    if rule.errno.is_some() {
        line.push_str(" (refused)");
    }
    line
}

fn add(uses: &mut Uses, more: &Uses) {
    uses.all += more.all;
    uses.steady += more.steady;
    uses.alternatives
        .resize_with(more.alternatives.len(), Vec::new);
    for (seen, new) in uses.alternatives.iter_mut().zip(&more.alternatives) {
        seen.resize(new.len(), false);
        for (seen, new) in seen.iter_mut().zip(new) {
            *seen |= new;
        }
    }
}

fn bits(alternatives: &[Vec<bool>]) -> String {
    let one = |seen: &Vec<bool>| seen.iter().map(|b| if *b { '1' } else { '0' }).collect();
    alternatives
        .iter()
        .map(one)
        .collect::<Vec<String>>()
        .join(",")
}

fn from_bits(text: &str) -> Vec<Vec<bool>> {
    text.split(',')
        .filter(|one| !one.is_empty())
        .map(|one| one.chars().map(|c| c == '1').collect())
        .collect()
}

/// Writes what was seen.
pub fn write(file: &Path, tracker: &Tracker, lost: u64) -> io::Result<()> {
    let mut rules: BTreeMap<String, Uses> = BTreeMap::new();
    for ((name, index), uses) in &tracker.uses {
        let rule = policy::get(name).and_then(|policy| policy.rules.get(*index));
        if let Some(rule) = rule {
            add(rules.entry(key(rule)).or_default(), uses);
        }
    }
    let mut text = format!("filters\t{}\nlost\t{lost}\n", tracker.filters);
    for (what, count) in &tracker.wrong {
        let _ = writeln!(text, "wrong\t{count}\t{what}");
    }
    for (key, uses) in rules {
        let alternatives = bits(&uses.alternatives);
        let _ = writeln!(
            text,
            "rule\t{}\t{}\t{alternatives}\t{key}",
            uses.all, uses.steady
        );
    }
    std::fs::write(file, text)
}

/// Several files in one.
#[derive(Default)]
struct Sum {
    filters: u64,
    lost: u64,
    wrong: BTreeMap<String, u64>,
    rules: BTreeMap<String, Uses>,
}

impl Sum {
    fn read(&mut self, text: &str) -> Option<()> {
        for line in text.lines() {
            let (kind, rest) = line.split_once('\t')?;
            match kind {
                "filters" => self.filters += rest.parse::<u64>().ok()?,
                "lost" => self.lost += rest.parse::<u64>().ok()?,
                "wrong" => {
                    let (count, what) = rest.split_once('\t')?;
                    *self.wrong.entry(what.to_owned()).or_default() += count.parse::<u64>().ok()?;
                }
                "rule" => {
                    let mut parts = rest.splitn(4, '\t');
                    let more = Uses {
                        all: parts.next()?.parse().ok()?,
                        steady: parts.next()?.parse().ok()?,
                        alternatives: from_bits(parts.next()?),
                    };
                    add(
                        self.rules.entry(parts.next()?.to_owned()).or_default(),
                        &more,
                    );
                }
                _ => return None,
            }
        }
        Some(())
    }
}

/// Whether another policy, which lies on this rule's, has a rule that was used and needs this one:
/// the build demands of each policy that it admits what is stacked on it.
fn needed(rule: &RuleInfo, policy: &Policy, rules: &BTreeMap<String, Uses>) -> bool {
    let admitted = |inner: &RuleInfo| {
        rule.tests.iter().all(|test| {
            let same = inner.tests.iter().find(|t| t.index == test.index);
            same.is_some_and(|inner| {
                inner.alternatives.iter().any(|(_, value)| {
                    let mut alternatives = test.alternatives.iter();
                    alternatives.any(|(mask, wanted)| value & mask == *wanted)
                })
            })
        })
    };
    rule.errno.is_none()
        && policy::all()
            .iter()
            .filter(|inner| inner.outer == Some(policy.name))
            .any(|inner| {
                inner.rules.iter().any(|inner| {
                    inner.nr == rule.nr
                        && inner.errno.is_none()
                        && rules.get(&key(inner)).is_some_and(|uses| uses.all > 0)
                        && admitted(inner)
                })
            })
}

/// What is wrong with a rule, of which this was seen.
fn verdict(rule: &RuleInfo, staged: bool, uses: Option<&Uses>) -> Option<&'static str> {
    let used = uses.is_some_and(|uses| uses.all > 0);
    let steady = uses.is_some_and(|uses| uses.steady > 0);
    match (used, rule.unused.is_some()) {
        (false, false) => Some("never used: drop it, or say why it stays (`unused`)"),
        // By chance now and then: a reason that is no longer one is not a fault of this run.
        (_, true) => None,
        (true, false) if staged && rule.stage == Stage::Steady && !steady => {
            Some("used during set-up only: give it `stage = \"setup\"`")
        }
        (true, false) => None,
    }
}

/// Adds the files up, prints the verdict.
pub fn judge(files: &[&str], all: bool) -> ExitCode {
    let mut sum = Sum::default();
    for file in files {
        let read = std::fs::read_to_string(file).map_err(|e| e.to_string());
        let read = read.and_then(|text| sum.read(&text).ok_or("not a record".to_owned()));
        if let Err(why) = read {
            eprintln!("rule-coverage: {file}: {why}");
            return ExitCode::from(2);
        }
    }
    let mut faults = 0_usize;
    for (what, count) in &sum.wrong {
        println!("WRONG   {what} ({count} times)");
        faults += 1;
    }
    if sum.filters == 0 {
        println!("WRONG   no process took a filter: nothing was seen");
        faults += 1;
    }
    if sum.lost > 0 {
        println!("note    {} pieces of the trace were lost", sum.lost);
    }
    let (mut rules, mut used, mut exempt) = (0_usize, 0_usize, 0_usize);
    let mut values = 0_usize;
    let mut judged = BTreeSet::new();
    for policy in policy::all() {
        let staged = policy.rules.iter().any(|rule| rule.stage == Stage::Setup);
        for rule in policy.rules {
            if !judged.insert(key(rule)) {
                continue;
            }
            rules += 1;
            let uses = sum.rules.get(&key(rule));
            used += usize::from(uses.is_some_and(|uses| uses.all > 0));
            if let Some(why) = rule.unused {
                exempt += 1;
                if all {
                    let seen = uses.map_or(0, |uses| uses.all);
                    println!("exempt  {}: {why} (used {seen} times)", show(rule));
                }
            }
            if !all {
                continue;
            }
            let fault = verdict(rule, staged, uses).filter(|_| !needed(rule, policy, &sum.rules));
            if let Some(fault) = fault {
                println!("FAILED  {}: {fault}", show(rule));
                faults += 1;
            }
            values += idle_values(rule, uses);
        }
    }
    println!(
        "{rules} rules, {used} used, {exempt} exempt with a reason, {values} values of arguments not seen, {} filters taken; {faults} faults",
        sum.filters
    );
    if faults == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Names the values of arguments that a used rule allows and nobody had.
fn idle_values(rule: &RuleInfo, uses: Option<&Uses>) -> usize {
    let Some(uses) = uses.filter(|uses| uses.all > 0 && rule.errno.is_none()) else {
        return 0;
    };
    let mut idle = 0;
    for (test, seen) in rule.tests.iter().zip(&uses.alternatives) {
        let values: Vec<String> = test
            .alternatives
            .iter()
            .zip(seen)
            .filter(|(_, seen)| !**seen)
            .map(|((_, value), _)| format!("{value:#x}"))
            .collect();
        if !values.is_empty() {
            idle += values.len();
            let values = values.join(" ");
            println!("values  {}: not seen: {values}", show(rule));
        }
    }
    idle
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(stage: Stage, unused: Option<&'static str>) -> RuleInfo {
        RuleInfo {
            syscall: "read",
            nr: 0,
            args: "",
            tests: &[],
            stage,
            errno: None,
            why: "a rule under test",
            unused,
            file: "test",
        }
    }

    #[test]
    fn a_rule_that_nobody_used_fails_unless_it_says_why() {
        let used = Uses {
            all: 2,
            steady: 1,
            alternatives: Vec::new(),
        };
        let early = Uses {
            steady: 0,
            ..used.clone()
        };
        let plain = rule(Stage::Steady, None);
        assert!(verdict(&plain, true, None).is_some());
        assert!(verdict(&plain, true, Some(&used)).is_none());
        assert!(verdict(&plain, true, Some(&early)).is_some());
        assert!(verdict(&plain, false, Some(&early)).is_none());
        assert!(verdict(&rule(Stage::Setup, None), true, Some(&early)).is_none());
        assert!(verdict(&rule(Stage::Steady, Some("rare")), true, None).is_none());
    }

    #[test]
    fn records_are_read_back_and_added() {
        let mut tracker = Tracker::default();
        tracker.wrong.insert("something".to_owned(), 2);
        let uses = Uses {
            all: 3,
            steady: 1,
            alternatives: vec![vec![true, false]],
        };
        tracker.uses.insert(("bulkhead-vmm", 0), uses.clone());
        let path = std::env::temp_dir().join(format!("rule-coverage-{}", std::process::id()));
        write(&path, &tracker, 4).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut sum = Sum::default();
        sum.read(&text).unwrap();
        sum.read(&text).unwrap();
        assert_eq!((sum.lost, sum.wrong["something"]), (8, 4));
        let read = sum.rules.values().next().unwrap();
        assert_eq!((read.all, read.steady), (6, 2));
        assert_eq!(read.alternatives, uses.alternatives);
        assert_eq!(sum.read("nonsense\t1"), None);
    }
}
