//! Which filters lie on which thread, told from its system calls alone, and which of their rules
//! each call used.
//!
//! A thread takes a filter by seccomp(2), whose unread fourth argument is the policy's mark; it has
//! those of the thread that made it from the beginning. Of a call that a filter ended the kernel
//! shows the end only: an end without a beginning that is the errno of a rule used that rule.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bulkhead_seccomp::notify::{SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND};
use bulkhead_seccomp::policy::{self, Policy, RuleInfo, Stage, syscall_name};

/// What the kernel told.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A call begins.
    Enter { nr: u32, args: [u64; 6] },
    /// It ends. The number is one that no call has after a signal handler.
    Exit { nr: u32, answer: i64 },
    /// A task is made.
    New { task: u32, thread: bool },
    /// SIGSYS.
    Killed,
    /// SIGKILL, to this task.
    Kills { task: u32 },
}

/// The same, of whom and when.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub time: u64,
    pub task: u32,
    pub what: What,
}

/// A filter on a thread.
#[derive(Clone, Copy)]
struct Layer {
    policy: &'static Policy,
    stage: Stage,
}

#[derive(Clone, Default)]
struct Task {
    process: u32,
    layers: Vec<Layer>,
    /// The policy whose violations the launcher is told of: of its rules, those that end in an
    /// errno hold before the process's own filter does.
    watched: Option<Layer>,
    /// The call that it is in.
    within: Option<(u32, [u64; 6])>,
    /// The call that it made last.
    last: Option<u32>,
    /// The launcher has been told of a call and has not answered yet.
    told: bool,
    /// And is sending a signal in that state.
    kills: bool,
}

/// How often a rule was used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// In all.
    pub all: u64,
    /// With the filter of the steady state in force.
    pub steady: u64,
    /// For each argument that the rule tests, the alternatives that calls had.
    pub alternatives: Vec<Vec<bool>>,
}

/// A rule by its place: policies are never unloaded.
type Key = (&'static str, usize);

/// Everything known.
#[derive(Default)]
pub struct Tracker {
    tasks: HashMap<u32, Task>,
    /// Uses of each policy's rules by their index.
    pub uses: BTreeMap<Key, Uses>,
    /// Calls that a filter stopped, or that passed one which should have: with how often.
    pub wrong: BTreeMap<String, u64>,
    /// Filters taken.
    pub filters: u64,
}

fn by_mark(mark: u64) -> Option<Layer> {
    policy::all().iter().find_map(|policy| {
        [Stage::Setup, Stage::Steady]
            .into_iter()
            .find(|stage| policy.mark(*stage) == mark)
            .map(|stage| Layer { policy, stage })
    })
}

fn is(nr: u32, call: libc::c_long) -> bool {
    i64::from(nr) == call
}

/// The lower half of a register, which is all that an `int` is.
fn int(register: u64) -> u32 {
    (register & u64::from(u32::MAX)) as u32
}

impl Tracker {
    /// Takes note of one event. They come in the order of their times.
    pub fn note(&mut self, seen: &Seen) {
        match seen.what {
            What::Enter { nr, args } => self.enter(seen.task, nr, args),
            What::Exit { nr, answer } => self.exit(seen.task, nr, answer),
            What::New { task, thread } => {
                let mut new = self.tasks.get(&seen.task).cloned().unwrap_or_default();
                if !thread {
                    new.process = task;
                }
                new.within = None;
                (new.told, new.kills, new.last) = (false, false, None);
                self.tasks.insert(task, new);
            }
            What::Killed => {
                let Some(task) = self.tasks.get(&seen.task) else {
                    return;
                };
                if let Some(layer) = task.layers.last() {
                    self.complain(format!("{}: a call ended in SIGSYS", layer.policy.name));
                }
            }
            What::Kills { task } => {
                if let Some(by) = self.tasks.get_mut(&seen.task)
                    && std::mem::take(&mut by.kills)
                {
                    let whom = self.whom(task);
                    self.complain(format!("{whom} was killed for a call that was reported"));
                }
            }
        }
    }

    /// A process by its policy, and what each of its threads did before it hung at the call: of a
    /// call that a filter stops the kernel shows nothing.
    fn whom(&self, process: u32) -> String {
        let threads = self.tasks.values().filter(|t| t.process == process);
        let calls: BTreeSet<_> = threads.clone().filter_map(|t| t.last).map(name).collect();
        let calls: Vec<String> = calls.into_iter().collect();
        let policy = threads.filter_map(|task| task.watched).next();
        let policy = policy.map_or("a device process", |layer| layer.policy.name);
        format!("{policy} (after {})", calls.join(", "))
    }

    fn complain(&mut self, what: String) {
        *self.wrong.entry(what).or_default() += 1;
    }

    fn enter(&mut self, id: u32, nr: u32, args: [u64; 6]) {
        let task = self.tasks.entry(id).or_default();
        (task.within, task.last) = (Some((nr, args)), Some(nr));
        let layers = task.layers.clone();
        if task.told {
            // Whom the launcher does not answer after a report, it kills.
            let by_ioctl = is(nr, libc::SYS_ioctl);
            if by_ioctl && int(args[1]) == SECCOMP_IOCTL_NOTIF_SEND {
                task.told = false;
            } else if is(nr, libc::SYS_pidfd_send_signal) {
                (task.told, task.kills) = (false, true);
            }
        }
        // A vCPU thread's own filter lies on the one that was in force while its machine was made.
        let steady = layers.last().is_some_and(|l| l.stage == Stage::Steady);
        for layer in layers {
            if !self.mark(layer, steady, nr, &args) {
                self.complain(format!(
                    "{}: {} passed, which no rule allows",
                    layer.policy.name,
                    name(nr)
                ));
            }
        }
    }

    /// Marks the rules of one layer that this call uses: those of the steady stage, else those of
    /// the set-up one. Whether there are any.
    fn mark(&mut self, layer: Layer, steady: bool, nr: u32, args: &[u64; 6]) -> bool {
        let mut any = false;
        for stage in [Stage::Steady, Stage::Setup] {
            if any || (stage == Stage::Setup && layer.stage == Stage::Steady) {
                break;
            }
            for (index, rule) in layer.policy.rules.iter().enumerate() {
                if rule.stage == stage && rule.errno.is_none() && rule.matches(nr, args) {
                    any = true;
                    self.used(layer, steady, index, rule, Some(args));
                }
            }
        }
        any
    }

    fn used(
        &mut self,
        layer: Layer,
        steady: bool,
        index: usize,
        rule: &RuleInfo,
        args: Option<&[u64; 6]>,
    ) {
        let uses = self.uses.entry((layer.policy.name, index)).or_default();
        uses.all += 1;
        if steady {
            uses.steady += 1;
        }
        uses.alternatives.resize_with(rule.tests.len(), Vec::new);
        for (test, seen) in rule.tests.iter().zip(&mut uses.alternatives) {
            seen.resize(test.alternatives.len(), false);
            let alternative = args.and_then(|args| test.alternative(args));
            if let Some(seen) = alternative.and_then(|at| seen.get_mut(at)) {
                *seen = true;
            }
        }
    }

    fn exit(&mut self, id: u32, nr: u32, answer: i64) {
        let Some(task) = self.tasks.get_mut(&id) else {
            return;
        };
        let within = task.within.take();
        let Some((entered, args)) = within.filter(|(entered, _)| *entered == nr) else {
            self.ended_by_a_filter(id, nr, answer);
            return;
        };
        if std::mem::take(&mut task.kills) {
            self.complain("a process that is gone: a call of its was reported".to_owned());
        } else if is(entered, libc::SYS_seccomp) && answer >= 0 {
            self.takes_a_filter(id, args);
        } else if is(entered, libc::SYS_ioctl)
            && int(args[1]) == SECCOMP_IOCTL_NOTIF_RECV
            && answer == 0
        {
            task.told = true;
        }
    }

    fn ended_by_a_filter(&mut self, id: u32, nr: u32, answer: i64) {
        let Some(task) = self.tasks.get(&id) else {
            return;
        };
        let Some(errno) = answer.checked_neg().and_then(|e| u32::try_from(e).ok()) else {
            return;
        };
        // A handler's return, and a call that was begun again after a signal.
        if syscall_name(nr).is_none() || errno == 0 || errno >= 512 {
            return;
        }
        let mut layers = task.layers.clone();
        let mut any = false;
        let watched = task.watched.is_some();
        let own = layers.last().map(|layer| layer.policy.name);
        layers.extend(task.watched.filter(|w| own != Some(w.policy.name)));
        for layer in &layers {
            for (index, rule) in layer.policy.rules.iter().enumerate() {
                if rule.nr == nr && rule.errno == Some(errno) {
                    any = true;
                    self.used(*layer, layer.stage == Stage::Steady, index, rule, None);
                }
            }
        }
        let enosys = u32::try_from(libc::ENOSYS).unwrap_or_default();
        // The launcher's own filter and that of a process which it watches refuse so; the others
        // kill. (A traced process that is killed at a call leaves it with ENOSYS, too.)
        let mild = watched || own.is_some_and(|own| own.starts_with("bulkhead-launcher"));
        if let Some(layer) = layers.last().filter(|_| mild && !any && errno == enosys) {
            self.complain(format!(
                "{}: {} was refused, which no rule speaks of",
                layer.policy.name,
                name(nr)
            ));
        }
    }

    fn takes_a_filter(&mut self, id: u32, args: [u64; 6]) {
        let Some(layer) = by_mark(args[3]) else {
            return;
        };
        self.filters += 1;
        let flags = args[1];
        let Some(task) = self.tasks.get_mut(&id) else {
            return;
        };
        if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
            // What the device's own policy stops is judged by the one that lies beneath it, until
            // the device's own filter is in force.
            let beneath = layer.policy.outer.and_then(policy::get);
            task.layers.extend(beneath.map(|policy| Layer {
                policy,
                stage: Stage::Steady,
            }));
            task.watched = Some(layer);
            return;
        }
        task.layers.push(layer);
        let (process, layers) = (task.process, task.layers.clone());
        if flags & libc::SECCOMP_FILTER_FLAG_TSYNC != 0 && process != 0 {
            for other in self.tasks.values_mut().filter(|t| t.process == process) {
                other.layers.clone_from(&layers);
            }
        }
    }
}

fn name(nr: u32) -> String {
    syscall_name(nr).map_or_else(|| nr.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(call: libc::c_long) -> u32 {
        u32::try_from(call).unwrap()
    }

    fn enter(tracker: &mut Tracker, task: u32, call: libc::c_long, second: u32) {
        let args = [0, second.into(), 0, 0, 0, 0];
        tracker.enter(task, number(call), args);
    }

    fn note(tracker: &mut Tracker, task: u32, what: What) {
        tracker.note(&Seen {
            time: 0,
            task,
            what,
        });
    }

    /// Task 1 is told of a call of task 2's.
    fn told() -> Tracker {
        let mut tracker = Tracker::default();
        let new = What::New {
            task: 2,
            thread: false,
        };
        note(&mut tracker, 1, new);
        enter(&mut tracker, 2, libc::SYS_ppoll, 0);
        enter(&mut tracker, 1, libc::SYS_ioctl, SECCOMP_IOCTL_NOTIF_RECV);
        tracker.exit(1, number(libc::SYS_ioctl), 0);
        tracker
    }

    #[test]
    fn who_is_killed_for_a_report_is_named() {
        let mut tracker = told();
        enter(&mut tracker, 1, libc::SYS_pidfd_send_signal, 9);
        note(&mut tracker, 1, What::Kills { task: 2 });
        tracker.exit(1, number(libc::SYS_pidfd_send_signal), 0);
        let wrong: Vec<_> = tracker.wrong.into_keys().collect();
        assert_eq!(wrong.len(), 1);
        assert!(wrong[0].contains("(after ppoll) was killed"), "{wrong:?}");

        let mut tracker = told();
        enter(&mut tracker, 1, libc::SYS_pidfd_send_signal, 9);
        tracker.exit(1, number(libc::SYS_pidfd_send_signal), -3);
        assert_eq!(tracker.wrong.len(), 1);
    }

    #[test]
    fn who_is_killed_otherwise_is_nothing_wrong() {
        let mut tracker = told();
        enter(&mut tracker, 1, libc::SYS_ioctl, SECCOMP_IOCTL_NOTIF_SEND);
        tracker.exit(1, number(libc::SYS_ioctl), 0);
        enter(&mut tracker, 1, libc::SYS_pidfd_send_signal, 9);
        note(&mut tracker, 1, What::Kills { task: 2 });
        tracker.exit(1, number(libc::SYS_pidfd_send_signal), 0);
        assert!(tracker.wrong.is_empty(), "{:?}", tracker.wrong);
    }
}
