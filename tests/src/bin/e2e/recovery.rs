//! Device processes that die under load: another one takes over, and the guest notices a pause
//! and no error.

use std::time::{Duration, Instant};

use bulkhead_tests::chaos::{self, kills};
use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, nothing_left};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};
use crate::mapped::Mapped;

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("recovery");
    let long = Test::long("recovery");
    vec![
        test(
            "a disk's process is killed 8 times while fio verifies: no error, nothing lost",
            || killed_under_fio(8, "raw"),
        ),
        long(
            "a disk's process is killed 100 times (BULKHEAD_KILLS) while fio verifies: no error, nothing lost",
            || killed_under_fio(kills(100), "raw"),
        ),
        test(
            "the same on a qcow2 image, which qemu-img finds sound",
            || killed_under_fio(8, "qcow2"),
        ),
        test(
            "a process that dies too often is quarantined, another disk works on, and the operator or the guest's reset brings it back",
            quarantined,
        ),
        test(
            "a process that is stopped under load is replaced, a disk that is merely slow is left alone, and when that one is killed its successor makes exactly what was in flight again",
            hung,
        ),
        test("a quarantined disk can be pulled, another works on", pulled),
        test("a reset that the guest asks for is told", reset_told),
        test(
            "limits and a drain outlive the process they were told",
            remembered,
        ),
    ]
}

fn pid_of(socket: &str, device: &str) -> Result<i64, String> {
    field(socket, device, "pid").and_then(|pid| pid.as_i64().ok_or_else(|| pid.to_string()))
}

pub fn field(socket: &str, device: &str, name: &str) -> Result<serde_json::Value, String> {
    let devices = ctl(socket, &["devices"])?;
    let found = devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["id"] == device);
    found
        .map(|d| d[name].clone())
        .ok_or_else(|| format!("no {device} in {devices}"))
}

pub fn kill(socket: &str, device: &str) -> Verdict {
    let pid = pid_of(socket, device)?;
    check(pid > 0, || format!("{device} has no process"))?;
    sh(&format!("kill -9 {pid}")).map(drop)
}

/// Waits for a device's state.
fn state(socket: &str, device: &str, wanted: &str) -> Verdict {
    let end = Instant::now() + LIMIT;
    loop {
        let state = field(socket, device, "state")?;
        if state == wanted {
            return Ok(());
        }
        check(Instant::now() < end, || {
            let events = ctl(socket, &["events"]).map_or_else(|e| e, |e| e.to_string());
            format!("{device} stays {state}, {wanted} was due: {events}")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn killed_under_fio(kills: u32, format: &str) -> Verdict {
    let scratch = Scratch::new("recover")?;
    let size = 32 * MIB;
    let disk = if format == "raw" {
        sparse(&scratch, "disk", size)?
    } else {
        let path = scratch.path("disk");
        sh(&format!("qemu-img create -q -f {format} {path} {size}"))?;
        path
    };
    let socket = scratch.path("api");
    // It writes and verifies again and again until told to stop.
    let script = "cd /tmp; echo READY; read -r line
while :; do
  fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=16k --rw=randwrite --size=32M --ioengine=libaio \\
    --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1 || { echo BAD; tail -5 /tmp/out; break; }
  echo ROUND
  read -r -t 1 line && break
done
dmesg | grep -i 'i/o error' | head -3
echo OVER";
    let disk = format!("path={disk},id=data,queues=2,format={format}");
    let mut vmm = debian(
        &scratch,
        script,
        &[disk],
        &[
            "--cpus",
            "2",
            "--api-socket",
            &socket,
            "--restarts",
            "100000:3600",
        ],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    vmm.type_text("go\n")?;
    for round in 0..u64::from(kills) {
        // At moments that differ: 0 to 1 s after the last one serves.
        let pause = chaos::pause(format, round, Duration::from_secs(1));
        kill(&socket, "data")?;
        chaos::injected(&format!(
            "SIGKILL of a {format} disk {pause:?} after it served"
        ));
        let wanted = round + 2;
        let end = Instant::now() + LIMIT;
        while field(&socket, "data", "incarnation")? != wanted
            || field(&socket, "data", "state")? != "running"
        {
            check(Instant::now() < end, || {
                let events = ctl(&socket, &["events"]).map_or_else(|e| e, |e| e.to_string());
                vmm.story(&format!("process {wanted} does not serve: {events}"))
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    vmm.type_text("stop\n")?;
    vmm.wait_for("OVER", LIMIT)?;
    let output = vmm.output();
    check(
        !output.contains("BAD") && !output.to_lowercase().contains("i/o error"),
        || vmm.story("the guest saw an error"),
    )?;
    check(output.contains("ROUND"), || vmm.story("not one round"))?;
    vmm.ends_with(0, LIMIT)?;
    if format != "raw" {
        sh(&format!(
            "qemu-img check -f {format} {}",
            scratch.path("disk")
        ))?;
    }
    nothing_left(Duration::from_secs(5))
}

fn quarantined() -> Verdict {
    let scratch = Scratch::new("quarantine")?;
    let (bad, good) = (
        sparse(&scratch, "bad", 8 * MIB)?,
        sparse(&scratch, "good", 8 * MIB)?,
    );
    let socket = scratch.path("api");
    let read = |device: &str| {
        format!("dd if=/dev/{device} of=/dev/null bs=64k count=16 iflag=direct status=none")
    };
    let script = format!(
        "{} && {} && echo READY; read -r line
{} && echo GOOD; read -r line
{} && echo BACK; read -r line
device=$(basename $(readlink -f /sys/block/vdb/device)); cd /sys/bus/virtio/drivers/virtio_blk
echo $device >unbind; echo $device >bind; cd /; while ! [ -b /dev/vdb ]; do sleep 0.1; done
{} && echo RESET-BACK",
        read("vdb"),
        read("vdc"),
        read("vdc"),
        read("vdb"),
        read("vdb")
    );
    let mut vmm = debian(
        &scratch,
        &script,
        &[format!("path={bad},id=bad"), format!("path={good},id=good")],
        &["--api-socket", &socket, "--restarts", "2:600"],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    for _ in 0..2 {
        kill(&socket, "bad")?;
        // Before the state is looked at, the death must have been seen.
        std::thread::sleep(Duration::from_millis(300));
        state(&socket, "bad", "running")?;
    }
    kill(&socket, "bad")?;
    state(&socket, "bad", "quarantined")?;
    vmm.type_text("go\n")?;
    vmm.wait_for("GOOD", LIMIT)?;
    let refused = ctl(&socket, &["stats", "bad"]).map_or_else(|e| e, |v| v.to_string());
    check(refused.contains("quarantined"), || refused)?;
    ctl(&socket, &["resume-device", "bad"])?;
    let end = Instant::now() + LIMIT;
    while field(&socket, "bad", "incarnation")? != 4 {
        check(Instant::now() < end, || "it is not started again".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    vmm.type_text("go\n")?;
    vmm.wait_for("BACK", LIMIT)?;
    // Once more, and this time the guest's driver resets it.
    for incarnation in 4_u64.. {
        check(incarnation < 12, || "it is never quarantined again".into())?;
        kill(&socket, "bad")?;
        std::thread::sleep(Duration::from_millis(300));
        let end = Instant::now() + LIMIT;
        let now = loop {
            let now = field(&socket, "bad", "state")?;
            if now == "running" || now == "quarantined" {
                break now;
            }
            check(Instant::now() < end, || format!("it stays {now}"))?;
            std::thread::sleep(Duration::from_millis(20));
        };
        if now == "quarantined" {
            break;
        }
    }
    vmm.type_text("go\n")?;
    vmm.wait_for("RESET-BACK", LIMIT)?;
    state(&socket, "bad", "running")?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn pulled() -> Verdict {
    let scratch = Scratch::new("pulled")?;
    let (bad, good) = (
        sparse(&scratch, "bad", 8 * MIB)?,
        sparse(&scratch, "good", 8 * MIB)?,
    );
    let socket = scratch.path("api");
    let script = "get() { dd if=/dev/$1 of=/dev/null bs=64k count=16 iflag=direct status=none 2>/dev/null; }
get vdb && echo READY
while [ -e /sys/block/vdb ]; do sleep 0.1; done; echo GONE; get vdb || echo ENDED; get vdc && echo GOOD";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={bad},id=bad"), format!("path={good},id=good")],
        &["--api-socket", &socket, "--restarts", "0"],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    kill(&socket, "bad")?;
    state(&socket, "bad", "quarantined")?;
    ctl(&socket, &["remove-device", "bad", "--force"])?;
    for word in ["GONE", "ENDED", "GOOD"] {
        vmm.wait_for(word, LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn reset_told() -> Verdict {
    let scratch = Scratch::new("reset")?;
    let socket = scratch.path("api");
    let script = "echo READY; read -r line; echo b >/proc/sysrq-trigger; sleep 600";
    let options = ["--api-socket", &socket];
    let mut vmm = debian(&scratch, script, &[] as &[&str], &options)?;
    vmm.wait_for("READY", LIMIT)?;
    let mut follow = std::process::Command::new(bin("bulkhead"));
    follow.args(["ctl", "--socket", &socket, "--json", "events", "--follow"]);
    let mut follower = Vmm::spawn(follow)?;
    follower.wait_for("machine.running", LIMIT)?;
    vmm.type_text("go\n")?;
    vmm.ends_with(3, LIMIT)?;
    follower.wait_for("machine.guest-reset", LIMIT)?;
    follower.wait_for("machine.stopped", LIMIT)?;
    follower.wait(LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn hung() -> Verdict {
    let scratch = Scratch::new("hung")?;
    let stopped = sparse(&scratch, "stopped", 8 * MIB)?;
    let beneath = scratch.disk("beneath", 8 << 20, 7)?;
    let mapped = Mapped::new(&beneath, 16384)?;
    let socket = scratch.path("api");
    let script = "echo READY; read -r line
(for i in 0 1 2 3 4 5 6 7; do
  dd if=/dev/vdc of=/tmp/$i bs=64k count=16 skip=$((i * 16)) iflag=direct status=none || echo BAD &
done
wait; echo SLOW-OK $(cat /tmp/[0-7] | md5sum)) &
until read -r reads rest </sys/block/vdc/inflight && [ $reads = 8 ]; do sleep 0.1; done; echo FLYING
i=0; while [ $i -lt 400 ]; do dd if=/dev/vdb of=/dev/null bs=64k iflag=direct status=none || echo BAD; i=$((i + 1)); read -r -t 0.01 line && break; done
echo STOPPED-OK; wait";
    let mut vmm = debian(
        &scratch,
        script,
        &[
            format!("path={stopped},id=stopped"),
            format!("path={},id=slow,lock=off", mapped.path()),
        ],
        &["--cpus", "2", "--api-socket", &socket],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    let slow = pid_of(&socket, "slow")?;
    mapped.suspend()?;
    let begun = Instant::now();
    vmm.type_text("go\n")?;
    sh(&format!("kill -STOP {}", pid_of(&socket, "stopped")?))?;
    chaos::injected("SIGSTOP of a disk's process; the block device beneath another suspended");
    let end = Instant::now() + LIMIT;
    while field(&socket, "stopped", "incarnation")? != 2 {
        check(Instant::now() < end, || vmm.story("it is not replaced"))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let events = bulkhead(&["ctl", "--socket", &socket, "--json", "events"])?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    check(events.contains("no answer within"), || events.clone())?;
    // Longer than a ring without an excuse has.
    std::thread::sleep(Duration::from_secs(14).saturating_sub(begun.elapsed()));
    check(pid_of(&socket, "slow")? == slow, || {
        vmm.story("slow was killed")
    })?;
    check(!vmm.output().contains("SLOW-OK"), || {
        vmm.story("the slow disk was not slow")
    })?;
    check(field(&socket, "slow", "incarnation")? == 1, || {
        "slow was replaced".into()
    })?;
    // What it has in flight can neither end nor grow: a request of each reader.
    vmm.wait_for("FLYING", LIMIT)?;
    kill(&socket, "slow")?;
    chaos::injected("SIGKILL of a disk's process with 8 requests in flight");
    state(&socket, "slow", "restarting")?;
    let pid = pid_of(&socket, "slow")?;
    check(pid == 0, || {
        format!("{pid} is named while there is no process")
    })?;
    mapped.resume()?;
    state(&socket, "slow", "running")?;
    let told = restarts(&socket, "slow")?;
    let made_again: Vec<&Value> = told.iter().map(|what| &what["resubmitted"]).collect();
    check(made_again == [&Value::from(8)], || {
        format!("8 requests were in flight: {told:?}")
    })?;
    vmm.type_text("stop\n")?;
    vmm.wait_for("STOPPED-OK", LIMIT)?;
    vmm.wait_for("SLOW-OK", LIMIT)?;
    check(!vmm.output().contains("BAD"), || vmm.story("an error"))?;
    let sum = sh(&format!("md5sum {beneath}"))?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    vmm.wait_for(&format!("SLOW-OK {sum}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

/// What programs are told of each restart of a device.
fn restarts(socket: &str, device: &str) -> Result<Vec<Value>, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let events = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(events
        .filter(|e| e["kind"] == "device.restarted" && e["subject"] == device)
        .map(|mut e| e["what"].take())
        .collect())
}

fn remembered() -> Verdict {
    let scratch = Scratch::new("remember")?;
    let disk = sparse(&scratch, "disk", 8 * MIB)?;
    let socket = scratch.path("api");
    let script = "echo READY; read -r line
dd if=/dev/vdb of=/dev/null bs=4k count=40 iflag=direct status=none && echo FORTY";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data,queues=1")],
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    ctl(&socket, &["update-disk", "data", "--iops", "10:1"])?;
    ctl(&socket, &["drain", "data"])?;
    kill(&socket, "data")?;
    std::thread::sleep(Duration::from_millis(300));
    state(&socket, "data", "drained")?;
    vmm.type_text("go\n")?;
    std::thread::sleep(Duration::from_secs(2));
    check(!vmm.output().contains("FORTY"), || {
        vmm.story("a drained disk read")
    })?;
    let begun = Instant::now();
    ctl(&socket, &["resume-device", "data"])?;
    vmm.wait_for("FORTY", LIMIT)?;
    check(begun.elapsed() >= Duration::from_secs(3), || {
        format!("40 reads at 10 a second took {:?}", begun.elapsed())
    })?;
    vmm.ends_with(0, LIMIT)
}
