//! Limits of a device that its cgroup enforces, with a guest at work: a disk of little memory, of the least
//! threads that its process starts with, and of a fifth of a CPU, under fio that verifies what it wrote,
//! also after its process was killed; what else is in its group is held to them, and an end for want of
//! memory is told. And a disk that may read and write so much.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Undo, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};
use crate::recovery::{field, kill};
use crate::resources::{audit, left, mount, test};

/// Where cgroup v2 has its controllers.
pub fn tests() -> Vec<Test> {
    vec![
        test(
            "io.max holds a disk's process back and is lifted while it runs, io.stat is told",
            io_max,
        ),
        test(
            "a disk with limits works under fio, is held to them and comes back within them; an OOM kill is told",
            enforced,
        ),
    ]
}

/// Percent of a CPU.
const CPU: u64 = 20;
/// Bytes.
const MEMORY: u64 = 64 << 20;

/// The least that a limit may be, as refusals of less say; it is set then.
fn least(socket: &str, option: &str, too_little: u64) -> Result<u64, String> {
    let mut tried = too_little;
    loop {
        match ctl(socket, &["limit", "d", option, &tried.to_string()]) {
            Ok(_) if tried > too_little => return Ok(tried),
            Ok(done) => return Err(format!("{option} {too_little} was taken: {done}")),
            Err(line) => {
                let rest = line.split_once("give at least ").map(|(_, rest)| rest);
                let number = rest.and_then(|rest| rest.split_once(',')?.0.parse().ok());
                tried = number.filter(|more| *more > tried).ok_or(line)?;
            }
        }
    }
}

fn number(path: &Path, name: &str) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.ok_or_else(|| format!("{}: no {name}: {text}", path.display()))
}

/// Where a device's processes are.
fn leaf(socket: &str, device: &str) -> Result<PathBuf, String> {
    let info = ctl(socket, &["info"])?;
    let group = info["cgroup"].as_str().unwrap_or_default().to_owned();
    let mount = mount().ok_or("cgroup v2 is not mounted")?;
    Ok(mount
        .join(group.trim_start_matches('/'))
        .join(format!("dev-{device}")))
}

fn enforced() -> Verdict {
    let scratch = Scratch::new("enforced")?;
    let disk = format!("path={},id=d,queues=1", sparse(&scratch, "d", 64 << 20)?);
    let script = "fio_() { fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=4k --rw=randwrite --size=32M --io_size=$1 \\
    --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1; }
echo READY; read -r line; fio_ 32M && echo FIRST; read -r line; echo STARTED; fio_ 32M && echo SECOND; tail -5 /tmp/out; read -r line";
    let socket = scratch.path("api");
    let mut vmm = debian(&scratch, script, &[disk], &["--api-socket", &socket])?;
    vmm.wait_for("READY", LIMIT)?;
    let leaf = leaf(&socket, "d")?;
    // What it starts with is not what it works with: pages of files and of the guest count, too.
    let memory = least(&socket, "--memory", 8 << 20)?.max(MEMORY);
    let pids = least(&socket, "--pids", 2)?;
    let (cpu, memory_text, pids_text) = (CPU.to_string(), memory.to_string(), pids.to_string());
    let limits = [
        "--cpu",
        &cpu,
        "--memory",
        &memory_text,
        "--pids",
        &pids_text,
    ];
    ctl(&socket, &[&["limit", "d"], limits.as_slice()].concat())?;
    let usage = || ctl(&socket, &["stats", "d"]).map(|mut stats| stats["usage"].take());
    let within = |usage: &Value| -> Verdict {
        let at_most = |name: &str, most: u64| usage[name].as_u64().is_some_and(|n| n <= most);
        let all = at_most("pids", pids) && at_most("memory_bytes", memory);
        let enforced = usage["not_enforced"].as_array().is_some_and(Vec::is_empty);
        check(all && enforced, || usage.to_string())
    };
    let before = usage()?;
    within(&before)?;
    vmm.type_text("go\n")?;
    vmm.wait_for("FIRST", LIMIT)?;
    let after = usage()?;
    within(&after)?;
    // It was stopped for having had its share, and what it had is told.
    let throttled = number(&leaf.join("cpu.stat"), "nr_throttled ")?;
    check(throttled > 0, || format!("never held back: {after}"))?;
    let grew = |name: &str| after[name].as_u64() > before[name].as_u64();
    check(grew("cpu_us") && grew("cpu_throttled_us"), || {
        format!("{before}, then {after}")
    })?;
    // Its process dies under load: the next one has the same limits and loses nothing.
    vmm.type_text("go\n")?;
    vmm.wait_for("STARTED", LIMIT)?;
    std::thread::sleep(Duration::from_millis(500));
    kill(&socket, "d")?;
    vmm.wait_for("SECOND", LIMIT)?;
    check(field(&socket, "d", "incarnation")? == 2, || {
        vmm.story("it was not replaced once")
    })?;
    within(&usage()?)?;
    // The kernel holds whatever is in there to the limits: a program that takes all memory, and
    // goes before the disk's process does.
    let place = leaf.display();
    check(usage()?["oom_kills"] == 0, || "an OOM kill before".into())?;
    sh(&format!(
        "sh -c 'echo 1000 >/proc/$$/oom_score_adj; echo $$ >{place}/cgroup.procs; exec tail /dev/zero' || true"
    ))?;
    let told = usage()?;
    check(told["oom_kills"] == 1, || told.to_string())?;
    check(field(&socket, "d", "incarnation")? == 2, || {
        vmm.story("the disk's process was ended for another's greed")
    })?;
    // A program that makes processes.
    let many = sh(&format!(
        "sh -c 'echo $$ >{place}/cgroup.procs; for i in $(seq {}); do sleep 20 >/dev/null 2>&1 & done' 2>&1 || true",
        pids + 8
    ))?;
    check(number(&leaf.join("pids.events"), "max ")? > 0, || {
        format!("as many as there may be, and more: {many}")
    })?;
    check(usage()?["pids"].as_u64() <= Some(pids), || {
        "more threads than there may be".into()
    })?;
    sh(&format!(
        "for pid in $(cat {place}/cgroup.procs); do [ \"$(cat /proc/$pid/comm)\" != sleep ] || kill $pid; done"
    ))?;
    vmm.type_text("go\n")?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn io_max() -> Verdict {
    let scratch = Scratch::new("iomax")?;
    let beneath = sparse(&scratch, "beneath", 8 << 20)?;
    let plain = sparse(&scratch, "plain", 1 << 20)?;
    let device = sh(&format!("losetup --find --show {beneath}"))?;
    let device = device.trim().to_owned();
    let _undo = Undo::new(format!("losetup --detach {device}"));
    let number = sh(&format!(
        "lsblk -dno MAJ:MIN {device} || cat /sys/class/block/$(basename {device})/dev"
    ))?;
    let number = number.trim().to_owned();
    let socket = scratch.path("api");
    let script = "get() { dd if=/dev/vdb of=/dev/null bs=64k count=64 iflag=direct status=none; }
echo READY; read -r line; get && echo SLOW; read -r line; get && echo FAST; read -r line";
    let disks = [
        format!("path={device},id=limited,lock=off,io=rbps=1M:wiops=500"),
        // In memory, which is no block device.
        format!("path={plain},id=plain,io=rbps=1M"),
    ];
    let mut vmm = debian(&scratch, script, &disks, &["--api-socket", &socket])?;
    vmm.wait_for("READY", LIMIT)?;
    let leaf = leaf(&socket, "limited")?;
    let file = |name: &str| fs::read_to_string(leaf.join(name)).unwrap_or_default();
    let usage = |id: &str| ctl(&socket, &["stats", id]).map(|mut stats| stats["usage"].take());
    let has_io = file("cgroup.controllers")
        .split_whitespace()
        .any(|c| c == "io");
    check(has_io, || {
        format!("no io controller: {}", file("cgroup.controllers"))
    })?;
    let line = format!("{number} rbps=1048576 wbps=max riops=max wiops=500");
    check(file("io.max").trim() == line, || file("io.max"))?;
    let told = usage("limited")?["not_enforced"].clone();
    check(told.as_array().is_some_and(Vec::is_empty), || {
        told.to_string()
    })?;
    let told = usage("plain")?["not_enforced"].to_string();
    check(
        told.contains("io: its file lies on no block device"),
        || told,
    )?;
    let (_, text) = audit(&socket)?;
    check(text.contains(&format!("io.max {line}")), || text.clone())?;
    let before = usage("limited")?["read_bytes"].as_u64().unwrap_or(0);
    let begun = Instant::now();
    vmm.type_text("go\n")?;
    vmm.wait_for("SLOW", LIMIT)?;
    check(begun.elapsed() >= Duration::from_secs(3), || {
        format!("4 MiB at 1 MiB/s took {:?}", begun.elapsed())
    })?;
    let read = usage("limited")?["read_bytes"].as_u64().unwrap_or(0) - before;
    check((4 << 20..6 << 20).contains(&read), || {
        format!("{read} bytes in io.stat")
    })?;
    ctl(&socket, &["limit", "limited", "--io", "0"])?;
    check(!file("io.max").contains("rbps=1048576"), || file("io.max"))?;
    vmm.type_text("go\n")?;
    vmm.wait_for("FAST", LIMIT)?;
    check(field(&socket, "limited", "incarnation")? == 1, || {
        "it was replaced".into()
    })?;
    vmm.type_text("go\n")?;
    vmm.ends_with(0, LIMIT)?;
    left()
}
