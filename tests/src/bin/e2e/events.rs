//! The stream of events, read from outside. No guest is booted.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::common::{DiskLimits, TokenBucket};
use bulkhead_proto::machine::{
    CpuConfig, CreateRequest, DiskConfig, MachineConfig, UpdateDiskRequest, UpdateDiskResponse,
};
use bulkhead_proto::{AsyncClient, AsyncLimits, BlockingClient, MACHINE_SERVICE};
use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};

const CALL: Duration = Duration::from_secs(30);
/// A reader may read nothing for so long; past twice that it is cut off.
const STOPPED: Duration = Duration::from_secs(15);
/// Events after which socket, server and log are full, and those that follow.
const FILL: u64 = 4000;
const MORE: u64 = 20_000;
/// An event of this test is longer.
const LEAST: u64 = 64;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("events");
    vec![
        test(
            "a reader that is stopped costs the VMM nothing, is told what it missed, and goes on",
            stopped_reader,
        ),
        test(
            "of a machine that could not be made and the next one, asked for at once, each process has its own end",
            two_machines,
        ),
    ]
}

/// A VMM without a machine, and its socket.
fn serve(scratch: &Scratch) -> Result<(Vmm, String), String> {
    let socket = scratch.path("api");
    let vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok((vmm, socket))
}

/// All events that are kept.
fn kept(socket: &str) -> Result<Vec<Value>, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    Ok(events(&String::from_utf8_lossy(&output.stdout)))
}

/// Resident bytes of a process.
fn resident(pid: u32) -> Result<u64, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| e.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number
        .map(|kilobytes| kilobytes * 1024)
        .ok_or_else(|| "no VmRSS".to_owned())
}

/// Events in lines of JSON; an incomplete last line is left out.
fn events(text: &str) -> Vec<Value> {
    let lines = text.lines().map(serde_json::from_str);
    lines.filter_map(Result::ok).collect()
}

fn stopped_reader() -> Verdict {
    let scratch = Scratch::new("events")?;
    let disk = format!("path={},id=d", sparse(&scratch, "disk", 1 << 20)?);
    let (vmm, socket) = serve(&scratch)?;
    let kernel = guest_file("vmlinux");
    let args = [
        "create", "--kernel", &kernel, "--memory", "96M", "--serial", "none", "--disk", &disk,
    ];
    ctl(&socket, &args)?;
    let mut follow = Command::new(bin("bulkhead"));
    follow.args(["ctl", "--socket", &socket, "--json", "events", "--follow"]);
    let mut reader = Vmm::spawn(follow)?;
    reader.wait_for("device.ready", LIMIT)?;

    let stream = UnixStream::connect(&socket).map_err(|e| e.to_string())?;
    let mut client = BlockingClient::new(stream, 1 << 20);
    let mut publish = |number: u64| -> Verdict {
        let mut bucket = TokenBucket::new();
        bucket.per_second = 1000 + number;
        let mut limits = DiskLimits::new();
        limits.operations = Some(bucket).into();
        let mut request = UpdateDiskRequest::new();
        (request.id, request.limits) = ("d".to_owned(), Some(limits).into());
        client
            .call::<_, UpdateDiskResponse>(MACHINE_SERVICE, "UpdateDisk", &request, CALL)
            .map(drop)
            .map_err(|e| e.to_string())
    };
    sh(&format!("kill -STOP {}", reader.pid()))?;
    let stopped = Instant::now();
    for number in 0..FILL {
        publish(number)?;
    }
    let before = resident(vmm.pid())?;
    let mut more = 0;
    while more < MORE && stopped.elapsed() < STOPPED {
        publish(more)?;
        more += 1;
    }
    let grown = resident(vmm.pid())?.saturating_sub(before);
    sh(&format!("kill -CONT {}", reader.pid()))?;
    // Half of what they would take if they were kept for it.
    check(grown < (more * LEAST / 2).max(1 << 20), || {
        format!("the VMM has grown by {grown} bytes with {more} events")
    })?;

    let last = kept(&socket)?;
    let last = last.last().map(|e| e["sequence"].clone());
    let last = last.as_ref().and_then(Value::as_u64).unwrap_or(0);
    check(last >= FILL + more, || format!("{last} events in all"))?;
    reader.wait_for(&format!("\"sequence\":{last},"), LIMIT)?;
    // And what comes now.
    publish(0)?;
    reader.wait_for(&format!("\"sequence\":{},", last + 1), LIMIT)?;
    let read = events(&reader.output());
    let (mut next, mut gaps) = (1, 0);
    for event in &read {
        if event["kind"] == "events.gap" {
            let what = &event["what"];
            check(what["first"] == next, || format!("{next}: {event}"))?;
            next = what["last"].as_u64().unwrap_or(0) + 1;
            gaps += 1;
        } else {
            check(event["sequence"] == next, || format!("{next}: {event}"))?;
            next += 1;
        }
    }
    check(gaps > 0, || format!("{} events and no gap", read.len()))?;
    ctl(&socket, &["shutdown", "--force"])?;
    // The stream ends with the machine.
    reader.ends_with(0, LIMIT)?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn two_machines() -> Verdict {
    let scratch = Scratch::new("events-two")?;
    let (vmm, socket) = serve(&scratch)?;
    let disk = |id: &str, path: String| {
        let mut disk = DiskConfig::new();
        (disk.id, disk.path) = (id.to_owned(), path);
        disk
    };
    let mut config = MachineConfig::new();
    (config.kernel, config.memory_bytes) = (guest_file("vmlinux"), 96 << 20);
    let mut cpus = CpuConfig::new();
    cpus.boot = 1;
    config.cpus = Some(cpus).into();
    config.disks = vec![
        disk("d", sparse(&scratch, "disk", 1 << 20)?),
        disk("e", scratch.path("no-such-disk")),
    ];
    let mut good = config.clone();
    good.disks.truncate(1);
    // Both requests are there before either is answered.
    let stream = UnixStream::connect(&socket).map_err(|e| e.to_string())?;
    let mut client = AsyncClient::new(stream, AsyncLimits::default());
    for (token, config) in [config, good].into_iter().enumerate() {
        let mut request = CreateRequest::new();
        request.config = Some(config).into();
        client
            .call(MACHINE_SERVICE, "Create", &request, CALL, token as u64)
            .map_err(|e| e.to_string())?;
    }
    let (mut answers, end) = (Vec::new(), Instant::now() + patience(LIMIT));
    while answers.len() < 2 {
        check(Instant::now() < end, || vmm.story("no answers"))?;
        std::thread::sleep(Duration::from_millis(20));
        let read = client.on_readable(Instant::now(), &mut answers);
        read.map_err(|e| e.to_string())?;
    }
    answers.sort_by_key(|(token, _)| *token);
    check(answers[0].1.is_err() && answers[1].1.is_ok(), || {
        format!("{answers:?}")
    })?;
    // What the manager was told meanwhile it has told by then.
    ctl(&socket, &["info"])?;
    let of_d = |event: &Value| {
        let kind = event["kind"].as_str()?.strip_prefix("device.")?;
        let pid = event["what"]["pid"].as_i64()?;
        (event["subject"] == "d").then(|| (kind.to_owned(), pid))
    };
    let told: Vec<(String, i64)> = kept(&socket)?.iter().filter_map(of_d).collect();
    let kinds: Vec<&str> = told.iter().map(|(kind, _)| kind.as_str()).collect();
    let pids: Vec<i64> = told.iter().map(|(_, pid)| *pid).collect();
    let apart = matches!(pids[..], [a, b, c, d] if a == b && c == d && a != c);
    check(
        kinds == ["spawned", "exited", "spawned", "ready"] && apart,
        || format!("{told:?}"),
    )?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
