//! The stream of events, read from outside. No guest is booted.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::common::{DiskLimits, TokenBucket};
use bulkhead_proto::machine::{UpdateDiskRequest, UpdateDiskResponse};
use bulkhead_proto::{BlockingClient, MACHINE_SERVICE};
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
    vec![Test {
        subject: "events",
        name: "a reader that is stopped costs the VMM nothing, is told what it missed, and goes on",
        long: false,
        run: stopped_reader,
    }]
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
    let socket = scratch.path("api");
    let disk = format!("path={},id=d", sparse(&scratch, "disk", 1 << 20)?);
    let vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
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

    let output = bulkhead(&["ctl", "--socket", &socket, "--json", "events"])?;
    let kept = events(&String::from_utf8_lossy(&output.stdout));
    let last = kept.last().map(|e| e["sequence"].clone());
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
