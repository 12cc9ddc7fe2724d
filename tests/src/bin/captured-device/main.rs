//! Device processes that attack what is around them: the hostile build of each device binary (feature
//! `hostile`, in the directory `BULKHEAD_HOSTILE`) under an ordinary VMM and launcher (`BULKHEAD_BIN`),
//! natively, with a VM of another tenant beside it. Each attempt is one device of one VM.
//!
//! The main thread of each kind, under each of its policies, makes every attempt; then the thread that
//! serves a ring makes each system call of them once. Every attempt must end in an error, or in a kill
//! and an event that names the system call; the VMM and the other VM live on. Prints a line for each,
//! and how many were made and blocked.
//!
//! usage: captured-device [POLICY|inside]: what has that in its policy's name attacks, and nothing else;
//! or only what is tried from inside the namespaces of processes

mod alone;
mod attack;
mod hosts;
mod inside;
mod kernel_log;
mod told;
mod variants;
mod victim;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use attack::{Attempt, End, Ground, Seen, attack};
use bulkhead_seccomp::policy;
use bulkhead_tests::host::Namespace;
use bulkhead_tests::vmm::{Scratch, bin};
use kernel_log::KernelLog;
use variants::{ASKING, FAMILIES, MEMORY, RING, Variant};
use victim::Victim;

/// VMs at once, of those that make one attempt each.
const VMS: usize = 4;

/// The argument that asks for what [`inside`] tries, alone.
const INSIDE: &str = "inside";

/// Answers of a kernel that would have done it, had it been asked rightly: EBADF, EFAULT, EINVAL,
/// ENOTTY, ENOSYS.
const NO_REFUSAL: [&str; 5] = [
    "(os error 9)",
    "(os error 14)",
    "(os error 22)",
    "(os error 25)",
    "(os error 38)",
];

/// Of device processes.
const BINARIES: [&str; 6] = [
    "bulkhead-blk",
    "bulkhead-net",
    "bulkhead-mem",
    "bulkhead-rng",
    "bulkhead-vsock",
    "bulkhead-console",
];

/// Whose turn it is to attack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    Main,
    Worker,
}

/// What was made, and what of it did not end as it should.
#[derive(Default)]
struct Tally {
    made: usize,
    blocked: usize,
    passed: usize,
    failed: Vec<String>,
    /// Policies that the kernel had in force for whoever attacked.
    policies: BTreeSet<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "captured-device: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hostile(name: &str) -> Result<PathBuf, String> {
    let directory = std::env::var_os("BULKHEAD_HOSTILE")
        .ok_or("BULKHEAD_HOSTILE: name the directory of the hostile builds")?;
    Ok(Path::new(&directory).join(name))
}

impl Thread {
    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Worker => "worker",
        }
    }

    /// A directory of programs of which this thread attacks. The launcher opens the programs of it
    /// alone.
    fn libexec(self, scratch: &Scratch, victim: &Victim) -> Result<String, String> {
        let libexec = scratch.path(&format!("libexec-{}", self.name()));
        let io = |e: std::io::Error| format!("{libexec}: {e}");
        std::fs::create_dir_all(&libexec).map_err(io)?;
        let launcher = format!("{libexec}/bulkhead-launcher");
        std::fs::copy(bin("bulkhead-launcher"), launcher).map_err(io)?;
        for name in BINARIES {
            told::copy(
                &hostile(name)?,
                &format!("{libexec}/{name}"),
                self.name(),
                victim,
            )?;
        }
        Ok(libexec)
    }

    /// Those of the attempts that it makes: a filter is every thread's, so that the second thread
    /// makes each call once, and all of those on what it alone serves. `own`: what the process has
    /// that not every one has.
    fn share<'a>(self, own: &[&str], attempts: &'a [Attempt]) -> Vec<&'a Attempt> {
        let mut calls = BTreeSet::new();
        let attempts = attempts.iter();
        let special = |a: &Attempt| {
            let all = [
                (ASKING, Self::Worker),
                (RING, Self::Worker),
                (MEMORY, Self::Main),
                (FAMILIES, Self::Main),
            ];
            all.into_iter().find(|(what, _)| a.name.starts_with(what))
        };
        attempts
            .filter(|a| match (special(a), self) {
                (Some((what, whose)), _) => own.contains(&what) && self == whose,
                (None, Self::Main) => true,
                (None, Self::Worker) => calls.insert(a.call.as_str()),
            })
            .collect()
    }
}

fn attempts(program: &str) -> Result<Vec<Attempt>, String> {
    let output = Command::new(program)
        .arg("--attempts")
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let attempts: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            Some(Attempt {
                number: fields.next()?.parse().ok()?,
                name: fields.next()?.to_owned(),
                call: fields.next()?.to_owned(),
            })
        })
        .collect();
    if attempts.len() < 50 {
        return Err(format!("{program}: not a hostile build: {text:?}"));
    }
    Ok(attempts)
}

fn run() -> Result<bool, String> {
    if std::fs::File::open("/dev/kvm").is_err() {
        println!("skipped: /dev/kvm cannot be opened\n0 passed, 0 failed");
        return Ok(true);
    }
    let scratch = Scratch::new("captured-device")?;
    for directory in ["api", "sockets"] {
        let directory = scratch.path(directory);
        std::fs::create_dir_all(&directory).map_err(|e| format!("{directory}: {e}"))?;
    }
    let victim = Victim::start(&scratch, "victim", None, &[], &[])?;
    let before = victim.processes()?;
    let namespace = Namespace::new("hostile")?;
    let wanted = std::env::args().nth(1);
    let is_wanted = |policy: &str| wanted.as_ref().is_none_or(|part| policy.contains(part));
    let (mut variants, absent) = variants::all();
    variants.retain(|variant| is_wanted(variant.policy));
    let mut tally = Tally::default();
    let log = KernelLog::open();
    for thread in [Thread::Main, Thread::Worker] {
        let libexec = thread.libexec(&scratch, &victim)?;
        let ground = Ground {
            scratch: &scratch,
            libexec: &libexec,
            namespace: &namespace,
            victim: &victim.socket,
        };
        for variant in &variants {
            let all = attempts(&format!("{libexec}/{}", variant.binary))?;
            let share = thread.share(variant.own(), &all);
            let from = format!("{}, {}", variant.policy, thread.name());
            let (started, made) = (Instant::now(), tally.made);
            for (turn, some) in share.chunks(variant.at_once().max(VMS)).enumerate() {
                let seen = wave(variant, some, &ground, turn == 0)?;
                tally.count(&from, some, &seen);
                victim.unharmed(&before)?;
            }
            let made = tally.made.saturating_sub(made);
            let seconds = started.elapsed().as_secs();
            println!("{from}: {made} attempts in {seconds} s");
        }
        for alone in alone::all().0.iter().filter(|a| is_wanted(a.policy)) {
            let all = attempts(&format!("{libexec}/{}", alone.binary))?;
            let share = thread.share(alone.own(), &all);
            let from = format!("{}, {}", alone.policy, thread.name());
            let started = Instant::now();
            let ends = all_alone(alone, &share, &ground, log.as_ref().ok())?;
            tally.count(&from, &share, &ends);
            victim.unharmed(&before)?;
            let seconds = started.elapsed().as_secs();
            println!("{from}: {} attempts in {seconds} s", share.len());
        }
    }
    if let Err(why) = &log {
        println!("skipped: which call ended a stand-alone process: {why}");
    }
    let alone_absent = alone::all().1;
    let names = variants.iter().map(|v| v.policy).collect::<Vec<_>>();
    tally.policies(&names, &absent, is_wanted);
    for (name, why) in alone_absent.iter().filter(|(name, _)| is_wanted(name)) {
        println!("skipped: {name}: {why}");
    }
    println!("{} attempts made, {} blocked", tally.made, tally.blocked);
    if wanted.as_deref().is_none_or(|wanted| wanted == INSIDE) {
        from_inside(&scratch, &victim, &mut tally)?;
    }
    victim.unharmed(&before)?;
    for line in &tally.failed {
        println!("failed: {line}");
    }
    let passed = tally.blocked.saturating_add(tally.passed);
    println!("{passed} passed, {} failed", tally.failed.len());
    Ok(tally.failed.is_empty())
}

/// One VM with all of these attempts, or one for each where that has a single device of the kind.
fn wave(
    variant: &Variant,
    attempts: &[&Attempt],
    ground: &Ground<'_>,
    look: bool,
) -> Result<Vec<Seen>, String> {
    std::thread::scope(|scope| {
        let running: Vec<_> = attempts
            .chunks(variant.at_once())
            .map(|some| scope.spawn(move || attack(variant, some, ground, look)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "an attack panicked".to_owned())?)
            .collect()
    })
}

/// Stand-alone processes, several at a time.
fn all_alone(
    alone: &alone::Alone,
    attempts: &[&Attempt],
    ground: &Ground<'_>,
    log: Option<&KernelLog>,
) -> Result<Vec<Seen>, String> {
    std::thread::scope(|scope| {
        let running: Vec<_> = attempts
            .chunks(attempts.len().div_ceil(VMS).max(1))
            .map(|some| scope.spawn(move || alone.attack(some, ground, log)))
            .collect();
        let ends = running.into_iter().map(|thread| {
            let ends = thread.join();
            let ends = ends.map_err(|_| "an attack panicked".to_owned())??;
            Ok(Seen {
                ends,
                policies: Vec::new(),
            })
        });
        ends.collect()
    })
}

/// From inside the namespaces of every process of a VM that has devices of each kind.
fn from_inside(scratch: &Scratch, victim: &Victim, tally: &mut Tally) -> Result<(), String> {
    let namespace = Namespace::new("neighbour")?;
    namespace.tap("bhtap", "", "user root")?;
    let passt = std::env::var("PASST").ok().filter(|path| !path.is_empty());
    let mut host = Vec::new();
    let mut more = vec!["--net", "tap=bhtap,id=tap", "--rng", "id=rng"];
    more.extend(["--memory", "96M,max=224M"]);
    match &passt {
        Some(path) => {
            host.extend(["--passt", path.as_str()]);
            more.extend(["--net", "user,id=passt"]);
        }
        None => println!("skipped: passt's namespaces: PASST names none"),
    }
    let neighbour = Victim::start(scratch, "neighbour", Some(&namespace), &host, &more)?;
    // The launcher may open what its user may, which of root's is everything: SECURITY.md says so.
    let without = ["bulkhead-launcher"];
    tally.inside("", scratch, (&neighbour, &without), &namespace, victim)?;
    // Two VMs of one ordinary user, each with a tap of its own. What is no device's may do what the
    // user may: SECURITY.md says that, too.
    let mut of_user = Vec::new();
    for name in ["first", "second"] {
        namespace.tap(name, "", "user 65534")?;
        let net = format!("tap={name},id=tap");
        let more = ["--net", &net, "--rng", "id=rng", "--memory", "96M,max=224M"];
        of_user.push(Victim::of_user(scratch, name, &namespace, &more)?);
    }
    let without = ["bulkhead-launcher", "bulkhead"];
    if let [first, second] = of_user.as_slice() {
        let whose = "an ordinary user's, another of the same user's: ";
        tally.inside(whose, scratch, (first, &without), &namespace, second)?;
        let whose = "an ordinary user's, one of root's: ";
        tally.inside(whose, scratch, (first, &without), &namespace, victim)?;
    }
    Ok(())
}

impl Tally {
    /// From inside the namespaces of the processes of one VM, `without` some, to another one.
    fn inside(
        &mut self,
        whose: &str,
        scratch: &Scratch,
        (from, without): (&Victim, &[&str]),
        namespace: &Namespace,
        to: &Victim,
    ) -> Result<(), String> {
        let (processes, before) = (from.processes()?, to.processes()?);
        let mut others = processes.clone();
        others.retain(|(name, _)| !without.contains(&name.as_str()));
        let pids: Vec<i64> = before.iter().map(|(_, pid)| *pid).collect();
        let net = format!("/run/netns/{}", namespace.name());
        for (name, result) in inside::tests(scratch, &others, &net, &to.socket, &pids) {
            match result {
                Ok(what) => {
                    self.passed = self.passed.saturating_add(1);
                    println!("{whose}{name}: {what}");
                }
                Err(what) => self.failed.push(format!("{whose}{name}: {what}")),
            }
        }
        for harmed in [from.unharmed(&processes), to.unharmed(&before)] {
            self.failed.extend(harmed.err());
        }
        Ok(())
    }

    fn count(&mut self, from: &str, attempts: &[&Attempt], seen: &[Seen]) {
        for one in seen {
            self.policies.extend(one.policies.iter().cloned());
        }
        for attempt in attempts {
            self.made = self.made.saturating_add(1);
            let end = seen.iter().find_map(|one| one.ends.get(&attempt.number));
            let (blocked, what) = match end {
                Some(End::Stopped(call)) if *call == attempt.call => {
                    (true, format!("stopped at {call}"))
                }
                Some(End::Stopped(call)) => {
                    (false, format!("stopped at {call}, not at {}", attempt.call))
                }
                Some(End::Refused(why)) if NO_REFUSAL.iter().any(|no| why.contains(no)) => (
                    false,
                    format!("not refused, but asked for in a way that has no meaning: {why}"),
                ),
                Some(End::Refused(why)) => (true, format!("refused: {why}")),
                Some(End::Borne(what)) => (true, format!("borne: {what}")),
                Some(End::Through(what)) => (false, format!("NOT BLOCKED: {what}")),
                None => (false, "nothing was heard of it".to_owned()),
            };
            println!("{from}: {}: {what}", attempt.name);
            if blocked {
                self.blocked = self.blocked.saturating_add(1);
            } else {
                self.failed
                    .push(format!("{from}: {}: {what}", attempt.name));
            }
        }
    }

    /// Every policy of a device under the launcher was in force for somebody who attacked.
    fn policies(
        &mut self,
        attacked: &[&str],
        absent: &[(&str, &str)],
        is_wanted: impl Fn(&str) -> bool,
    ) {
        if self.policies.is_empty() {
            println!("skipped: this kernel does not show the filters of a process");
            return;
        }
        for built in policy::all() {
            if built.outer != Some("device-outer") || !is_wanted(built.name) {
                continue;
            }
            if let Some((_, why)) = absent.iter().find(|(name, _)| *name == built.name) {
                println!("skipped: {}: {why}", built.name);
                continue;
            }
            // Policies that are alike are one to the kernel.
            let shown = self
                .policies
                .iter()
                .any(|name| policy::get(name).is_some_and(|seen| same(seen, built)));
            if shown && attacked.contains(&built.name) {
                println!("{}: was in force for some of these", built.name);
                self.passed = self.passed.saturating_add(1);
            } else {
                let seen = &self.policies;
                self.failed.push(format!(
                    "{}: nobody attacked under it, but under {seen:?}",
                    built.name
                ));
            }
        }
    }
}

fn same(a: &policy::Policy, b: &policy::Policy) -> bool {
    let code = |policy: &policy::Policy| -> Vec<_> {
        let steady = policy.steady.iter();
        steady.map(|i| (i.code, i.jt, i.jf, i.k)).collect()
    };
    code(a) == code(b)
}
