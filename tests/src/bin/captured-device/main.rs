//! Device processes that attack what is around them: the hostile build of each device binary (feature
//! `hostile`, in the directory `BULKHEAD_HOSTILE`) under an ordinary VMM and launcher (`BULKHEAD_BIN`),
//! natively, with a VM of another tenant beside it. Each attempt is one device of one VM.
//!
//! Every attempt must end in an error, or in a kill and an event that names the system call; the
//! VMM and the other VM live on. Prints a line for each, and how many were made and blocked.

mod inside;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use bulkhead_tests::host::Namespace;
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, patience};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
/// Devices of one VM: one for each attempt.
const AT_ONCE: usize = 24;

/// One attempt, as the hostile binary lists it.
struct Attempt {
    number: usize,
    name: String,
    call: String,
}

/// What became of one.
enum End {
    /// The launcher stopped it, and the event names this call.
    Stopped(String),
    /// The kernel refused, in these words.
    Refused(String),
    /// It did what it may, and the VMM bore it.
    Borne(String),
    /// It was not blocked.
    Through(String),
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

fn hostile(name: &str) -> Result<std::path::PathBuf, String> {
    let directory = std::env::var_os("BULKHEAD_HOSTILE")
        .ok_or("BULKHEAD_HOSTILE: name the directory of the hostile builds")?;
    Ok(Path::new(&directory).join(name))
}

fn attempts(binary: &str) -> Result<Vec<Attempt>, String> {
    let output = Command::new(hostile(binary)?)
        .arg("--attempts")
        .output()
        .map_err(|e| format!("{binary}: {e}"))?;
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
        return Err(format!("{binary}: not a hostile build: {text:?}"));
    }
    Ok(attempts)
}

fn run() -> Result<bool, String> {
    if std::fs::File::open("/dev/kvm").is_err() {
        println!("skipped: /dev/kvm cannot be opened\n0 passed, 0 failed");
        return Ok(true);
    }
    let scratch = Scratch::new("captured-device")?;
    // The launcher opens the programs of this directory alone.
    let libexec = scratch.path("libexec");
    std::fs::create_dir_all(&libexec).map_err(|e| e.to_string())?;
    for (from, name) in [
        (bin("bulkhead-launcher"), "bulkhead-launcher"),
        (hostile("bulkhead-blk")?, "bulkhead-blk"),
        (hostile("bulkhead-net")?, "bulkhead-net"),
        (hostile("bulkhead-mem")?, "bulkhead-mem"),
        (hostile("bulkhead-rng")?, "bulkhead-rng"),
        (hostile("bulkhead-vsock")?, "bulkhead-vsock"),
    ] {
        std::fs::copy(&from, format!("{libexec}/{name}"))
            .map_err(|e| format!("{}: {e}", from.display()))?;
    }
    let victim = Victim::start(&scratch, "victim")?;
    let namespace = Namespace::new("hostile")?;
    let (mut made, mut blocked, mut failed) = (0, 0, Vec::new());
    for kind in [
        "bulkhead-blk",
        "bulkhead-net",
        "bulkhead-mem",
        "bulkhead-rng",
        "bulkhead-vsock",
    ] {
        let attempts = attempts(kind)?;
        // A machine has one memory device, and one of sockets.
        let at_once = match kind {
            "bulkhead-mem" | "bulkhead-vsock" => 1,
            _ => AT_ONCE,
        };
        for some in attempts.chunks(at_once) {
            let ends = attack(kind, some, &scratch, &libexec, &namespace)?;
            for attempt in some {
                made += 1;
                let (verdict, what) = match ends.get(&attempt.number) {
                    Some(End::Stopped(call)) if *call == attempt.call => {
                        (true, format!("stopped at {call}"))
                    }
                    Some(End::Stopped(call)) => {
                        (false, format!("stopped at {call}, not at {}", attempt.call))
                    }
                    Some(End::Refused(why)) => (true, format!("refused: {why}")),
                    Some(End::Borne(what)) => (true, format!("borne: {what}")),
                    Some(End::Through(what)) => (false, format!("NOT BLOCKED: {what}")),
                    None => (false, "nothing was heard of it".to_owned()),
                };
                println!("{kind}: {}: {what}", attempt.name);
                if verdict {
                    blocked += 1;
                } else {
                    failed.push(format!("{kind}: {}: {what}", attempt.name));
                }
            }
            victim.unharmed()?;
        }
    }
    println!("{made} attempts made, {blocked} blocked");
    let mut passed = blocked;
    let neighbour = Victim::start(&scratch, "neighbour")?;
    let device = *neighbour.pids()?.last().ok_or("the VM has no processes")?;
    for (name, result) in inside::tests(&scratch, device, &victim.socket, &victim.pids()?) {
        match result {
            Ok(what) => {
                passed += 1;
                println!("{name}: {what}");
            }
            Err(what) => failed.push(format!("{name}: {what}")),
        }
    }
    victim.unharmed()?;
    for line in &failed {
        println!("failed: {line}");
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(failed.is_empty())
}

/// A VM with an ordinary disk process.
fn serve(socket: &str, arguments: &[&str]) -> Result<Vmm, String> {
    let mut all = vec!["serve", "--api-socket", socket];
    all.extend_from_slice(arguments);
    let mut command = Command::new(bin("bulkhead"));
    command.args(&all);
    up(Vmm::spawn(command)?, socket)
}

fn up(vmm: Vmm, socket: &str) -> Result<Vmm, String> {
    let end = Instant::now() + patience(LIMIT);
    while ctl(socket, &["info"]).is_err() {
        if Instant::now() > end || ended(&vmm) {
            return Err(vmm.story("the API does not answer"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(vmm)
}

fn ended(vmm: &Vmm) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", vmm.pid()));
    stat.map_or(true, |text| text.contains(") Z "))
}

/// The VM of another tenant.
struct Victim {
    _vmm: Vmm,
    socket: String,
}

impl Victim {
    fn start(scratch: &Scratch, name: &str) -> Result<Self, String> {
        let disk = scratch.disk(name, 1 << 20, 41)?;
        let socket = scratch.path(&format!("{name}.sock"));
        let vmm = serve(&socket, &[])?;
        let disk = format!("path={disk},id={name}");
        let kernel = guest_file("vmlinux");
        ctl(
            &socket,
            &[
                "create", "--kernel", &kernel, "--memory", "96M", "--disk", &disk,
            ],
        )?;
        Ok(Self { _vmm: vmm, socket })
    }

    /// Its VMM's, launcher's and device's processes.
    fn pids(&self) -> Result<Vec<i64>, String> {
        let info = ctl(&self.socket, &["info"])?;
        let devices = ctl(&self.socket, &["devices"])?;
        let of = |value: &Value| value.as_i64().filter(|pid| *pid > 0);
        let mut pids: Vec<_> = [&info["vmm_pid"], &info["launcher_pid"], &devices[0]["pid"]]
            .into_iter()
            .filter_map(of)
            .collect();
        pids.dedup();
        Ok(pids)
    }

    /// All of its processes are as they should be.
    fn unharmed(&self) -> Result<(), String> {
        let output = bulkhead(&["audit", "--api-socket", &self.socket])?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "the other VM was harmed: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// One VM with a device for each attempt; how each ended.
fn attack(
    kind: &str,
    attempts: &[Attempt],
    scratch: &Scratch,
    libexec: &str,
    namespace: &Namespace,
) -> Result<BTreeMap<usize, End>, String> {
    let socket = scratch.path("hostile.sock");
    let mut command = Command::new("nsenter");
    let [by, place] = namespace.enter();
    debug_assert_eq!(by, "nsenter");
    command.arg(place).arg(bin("bulkhead"));
    command.args(["serve", "--api-socket", &socket, "--libexec", libexec]);
    command.args(["--restarts", "0"]);
    let mut vmm = up(Vmm::spawn(command)?, &socket)?;
    let kernel = guest_file("vmlinux");
    let mut create = vec!["create".to_owned(), "--kernel".into(), kernel];
    if kind != "bulkhead-mem" {
        create.extend(["--memory".to_owned(), "96M".into()]);
    }
    for attempt in attempts {
        let number = attempt.number;
        if kind == "bulkhead-mem" {
            let max = number
                .saturating_add(1)
                .saturating_mul(128)
                .saturating_add(96);
            create.push("--memory".into());
            create.push(format!("96M,max={max}M"));
        } else if kind == "bulkhead-vsock" {
            let listen = scratch.path("vsock.sock");
            create.push("--vsock".into());
            create.push(format!("id=a{number},socket={listen},cid=1000000{number}"));
        } else if kind == "bulkhead-rng" {
            let burst = number.saturating_add(1).saturating_mul(128);
            create.push("--rng".into());
            create.push(format!("id=a{number},bps=1M:{burst}M"));
        } else if kind == "bulkhead-blk" {
            let disk = scratch.disk(&format!("d{number}"), 1 << 16, 7)?;
            create.push("--disk".into());
            create.push(format!(
                "path={disk},id=a{number},serial=hostile-{number},queues=1"
            ));
        } else {
            let tap = format!("bh{number}");
            if namespace.sh(&format!("ip link show {tap}")).is_err() {
                namespace.tap(&tap, "", "")?;
            }
            create.push("--net".into());
            create.push(format!(
                "tap={tap},id=a{number},mac=02:b0:b0:b0:b0:{number:02x},backend=user"
            ));
        }
    }
    let create: Vec<&str> = create.iter().map(String::as_str).collect();
    let info = ctl(&socket, &["info"])?;
    let vmm_pid = info["vmm_pid"].as_i64().ok_or("no vmm_pid")?;
    ctl(&socket, &create).map_err(|e| vmm.story(&e))?;
    let before = descriptors(vmm_pid);
    // This is what it waits for. What it does then, it may do to this very call.
    for attempt in attempts {
        let id = match kind {
            "bulkhead-mem" => "memory".to_owned(),
            _ => format!("a{}", attempt.number),
        };
        let _ = ctl(&socket, &["stats", &id]);
    }
    let end = Instant::now() + patience(LIMIT);
    let mut ends = BTreeMap::new();
    while ends.len() < attempts.len() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
        let events = events(&socket).map_err(|e| vmm.story(&e))?;
        collect(&mut ends, attempts, &events, &vmm.errors());
    }
    let after = descriptors(vmm_pid);
    // Connections of its clients come and go.
    if after > before.saturating_add(8) {
        return Err(format!(
            "the VMM holds {after} descriptors, before the attack {before}"
        ));
    }
    // A VMM that was brought down does not answer.
    ctl(&socket, &["info"]).map_err(|e| vmm.story(&e))?;
    vmm.kill();
    Ok(ends)
}

/// Every event so far.
fn events(socket: &str) -> Result<Vec<Value>, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|e| format!("{e} in {line:?}")))
        .collect()
}

fn descriptors(pid: i64) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Ends by events, and by what the devices say on standard error.
fn collect(ends: &mut BTreeMap<usize, End>, attempts: &[Attempt], events: &[Value], said: &str) {
    for event in events {
        let number = match event["subject"].as_str() {
            Some("memory") => attempts.first().map(|attempt| attempt.number),
            other => other.and_then(|id| id.strip_prefix('a')?.parse().ok()),
        };
        let Some(number) = number else { continue };
        if let Some(call) = event["what"]["violation"]
            .as_str()
            .filter(|call| !call.is_empty())
        {
            ends.entry(number)
                .or_insert_with(|| End::Stopped(call.to_owned()));
        }
    }
    for line in said.lines() {
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
        ends.entry(attempt.number).or_insert(end);
    }
    // Whoever floods the VMM is ended by it, before its last word is out at times.
    for event in events.iter().filter(|e| e["kind"] == "device.crashed") {
        let flooder = attempts.iter().find(|a| {
            let its = event["subject"] == "memory" || event["subject"] == format!("a{}", a.number);
            a.call == "sendmsg" && its
        });
        if let Some(attempt) = flooder {
            let why = format!("the VMM ended it: {}", event["detail"]);
            ends.entry(attempt.number).or_insert(End::Borne(why));
        }
    }
}
