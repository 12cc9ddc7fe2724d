//! One attack: a VM whose devices make one attempt each, and how each of those ended.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::Namespace;
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, patience};
use serde_json::Value;

use crate::variants::Variant;
use crate::victim::{LIMIT, events, up};

/// One attempt, as the hostile binary lists it.
pub struct Attempt {
    /// By which it is chosen.
    pub number: usize,
    /// What it is.
    pub name: String,
    /// The system call that it ends at, unless that fails.
    pub call: String,
}

/// What became of one.
pub enum End {
    /// The launcher stopped it, and the event names this call.
    Stopped(String),
    /// The kernel, or the launcher, refused, in these words.
    Refused(String),
    /// It did what it may, and the VMM bore it.
    Borne(String),
    /// It was not blocked.
    Through(String),
}

/// Where the attacks are made.
pub struct Ground<'a> {
    /// For files.
    pub scratch: &'a Scratch,
    /// The directory of the programs whose main threads, or workers, attack.
    pub libexec: &'a str,
    /// For taps.
    pub namespace: &'a Namespace,
    /// The API socket of the other tenant's VM.
    pub victim: &'a str,
}

/// What an attack has shown.
pub struct Seen {
    /// How each attempt ended, by its number.
    pub ends: BTreeMap<usize, End>,
    /// The policies that the kernel had in force for the devices, innermost first of each; empty where
    /// it does not tell.
    pub policies: Vec<String>,
}

/// Descriptors that come and go: connections of clients.
const COME_AND_GO: usize = 8;
/// Between two looks at what has become of the attempts.
const LOOK_AGAIN: Duration = Duration::from_millis(30);
/// Looks for the last words of a process that is gone: they come by another way than the event.
const LAST_WORDS: usize = 10;

/// Makes the attempts. `look`: at the policies too.
///
/// # Errors
/// The VM could not be started, or was harmed by its devices.
pub fn attack(
    variant: &Variant,
    attempts: &[&Attempt],
    ground: &Ground<'_>,
    look: bool,
) -> Result<Seen, String> {
    let first = attempts.first().map_or(0, |attempt| attempt.number);
    let socket = ground.scratch.path(&format!("api/{first}"));
    let mut command = Command::new("nsenter");
    let [_, place] = ground.namespace.enter();
    command.arg(place).arg(bin("bulkhead"));
    command.args(["serve", "--api-socket", &socket, "--restarts", "0"]);
    command.args(["--libexec", ground.libexec]);
    let kernel = guest_file("vmlinux");
    let kernel = std::fs::canonicalize(&kernel).map_err(|e| format!("{kernel}: {e}"))?;
    let kernel = kernel.to_string_lossy().into_owned();
    let mut create = vec!["create".to_owned(), "--kernel".into(), kernel.clone()];
    if !variant.is_memory() {
        create.extend(["--memory".to_owned(), "96M".into()]);
    }
    let (mut listeners, mut made) = (Vec::new(), Vec::new());
    for attempt in attempts {
        let option = variant.option(attempt.number, ground.scratch, ground.namespace, &mut made)?;
        create.extend(option);
        if let Some(own) = variant.asks_beside(attempt.number, ground.scratch) {
            listeners.push(ports(&own, ground.victim)?);
            // It may ask for what lies there and nowhere else.
            let (sockets, api) = (ground.scratch.path("sockets"), ground.scratch.path("api"));
            for path in [&kernel, &sockets, &api] {
                command.args(["--allow-path", path]);
            }
        }
    }
    variant.host.starts(&mut command);
    let mut vmm = up(Vmm::spawn(command)?, &socket)?;
    let info = ctl(&socket, &["info"])?;
    let watched: Vec<i64> = ["vmm_pid", "launcher_pid"]
        .iter()
        .filter_map(|name| info[name].as_i64())
        .collect();
    let create: Vec<&str> = create.iter().map(String::as_str).collect();
    ctl(&socket, &create).map_err(|e| vmm.story(&e))?;
    let before: Vec<usize> = watched.iter().map(|pid| descriptors(*pid)).collect();
    let policies = if look { policies(&socket)? } else { Vec::new() };
    // This is what they wait for. What one does then, it may do to this very call.
    for attempt in attempts {
        let _ = ctl(&socket, &["stats", &variant.id(attempt.number)]);
    }
    let end = Instant::now() + patience(LIMIT);
    let mut ends = BTreeMap::new();
    while ends.len() < attempts.len() && Instant::now() < end {
        std::thread::sleep(LOOK_AGAIN);
        let events = events(&socket).map_err(|e| vmm.story(&e))?;
        collect(&mut ends, variant, attempts, &events, &vmm.errors());
    }
    // One that led somewhere may be ended for it before its word is out.
    for _ in 0..LAST_WORDS {
        if !ends.values().any(|end| matches!(end, End::Borne(_))) {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
        hear(&mut ends, attempts, &vmm.errors());
    }
    for (pid, before) in watched.iter().zip(before) {
        let after = descriptors(*pid);
        if after > before.saturating_add(COME_AND_GO) {
            return Err(format!(
                "process {pid} holds {after} descriptors, before the attack {before}"
            ));
        }
    }
    // A VMM that was brought down does not answer, and one whose launcher was cannot.
    let now = ctl(&socket, &["info"]).map_err(|e| vmm.story(&e))?;
    if now["launcher_pid"] != info["launcher_pid"] {
        return Err(vmm.story("its launcher is not what it was"));
    }
    vmm.kill();
    drop(listeners);
    Ok(Seen { ends, policies })
}

/// Somebody who listens at port 1024 beside a device's socket, and a link to another VM's at port 7.
fn ports(own: &str, victim: &str) -> Result<UnixListener, String> {
    let (listened, linked) = (format!("{own}_1024"), format!("{own}_7"));
    for path in [&listened, &linked] {
        let _ = std::fs::remove_file(path);
    }
    symlink(victim, &linked).map_err(|e| format!("{linked}: {e}"))?;
    UnixListener::bind(&listened).map_err(|e| format!("{listened}: {e}"))
}

fn descriptors(pid: i64) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The policy of each device process, by the filter that the kernel has for every thread of it.
fn policies(socket: &str) -> Result<Vec<String>, String> {
    let output = bulkhead(&["audit", "--json", "--api-socket", socket])?;
    let audit: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
    let mut found = Vec::new();
    for process in audit["processes"].as_array().into_iter().flatten() {
        if process["role"] != "device" {
            continue;
        }
        for thread in process["process"]["threads"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let filters = thread["filters"]["policies"].as_array();
            let newest = filters.and_then(|all| all.last()?.as_str());
            found.extend(newest.map(str::to_owned));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Ends by events, and by what the devices say on standard error.
fn collect(
    ends: &mut BTreeMap<usize, End>,
    variant: &Variant,
    attempts: &[&Attempt],
    events: &[Value],
    errors: &str,
) {
    let whose = |event: &Value| {
        let subject = event["subject"].as_str().unwrap_or_default();
        attempts.iter().find(|a| variant.id(a.number) == subject)
    };
    for event in events {
        let violation = event["what"]["violation"].as_str();
        if let Some(attempt) = whose(event)
            && let Some(call) = violation.filter(|call| !call.is_empty())
        {
            ends.entry(attempt.number)
                .or_insert_with(|| End::Stopped(call.to_owned()));
        }
    }
    hear(ends, attempts, errors);
    // Whoever floods the VMM is ended by it, before its last word is out at times.
    for event in events.iter().filter(|e| e["kind"] == "device.crashed") {
        if let Some(attempt) = whose(event).filter(|a| a.call == "sendmsg") {
            let why = format!("the VMM ended it: {}", event["detail"]);
            ends.entry(attempt.number).or_insert(End::Borne(why));
        }
    }
}

/// What processes said themselves; that an attempt led somewhere weighs more than how it ended.
fn hear(ends: &mut BTreeMap<usize, End>, attempts: &[&Attempt], errors: &str) {
    for (number, end) in said(attempts, errors) {
        if matches!(end, End::Through(_)) {
            ends.insert(number, end);
        } else {
            ends.entry(number).or_insert(end);
        }
    }
}

/// How those ended that lived to say so.
pub fn said(attempts: &[&Attempt], text: &str) -> Vec<(usize, End)> {
    let mut ends = Vec::new();
    for line in text.lines() {
        let Some((_, told)) = line.split_once("hostile: ") else {
            continue;
        };
        // A name that begins as another one does is the longer of them.
        let whose = attempts
            .iter()
            .filter_map(|a| Some((a, told.strip_prefix(a.name.as_str())?.strip_prefix(": ")?)))
            .max_by_key(|(a, _)| a.name.len());
        let Some((attempt, what)) = whose else {
            continue;
        };
        let end = match what.split_once(": ") {
            Some(("refused", why)) => End::Refused(why.to_owned()),
            _ if what.starts_with("sent ") => End::Borne(what.to_owned()),
            _ => End::Through(what.to_owned()),
        };
        ends.push((attempt.number, end));
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_an_attempt_led_somewhere_is_not_lost_behind_a_crash() {
        let attempt = Attempt {
            number: 3,
            name: "an address".into(),
            call: "sendmsg".into(),
        };
        let crashed = || BTreeMap::from([(3, End::Borne("the VMM ended it".into()))]);
        let heard = |what: &str| {
            let mut ends = crashed();
            hear(
                &mut ends,
                &[&attempt],
                &format!("a3: hostile: an address: {what}\n"),
            );
            ends.remove(&3)
        };
        assert!(matches!(heard("SUCCEEDED: 0x1"), Some(End::Through(_))));
        assert!(matches!(heard("refused: EISCONN"), Some(End::Borne(_))));
        assert!(matches!(heard("sent 7"), Some(End::Borne(_))));
    }
}
