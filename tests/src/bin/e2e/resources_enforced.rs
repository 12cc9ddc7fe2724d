//! Limits of a device that its cgroup enforces, with a guest at work: a disk of little memory, of the least
//! threads that its process starts with, and of a fifth of a CPU, under fio that verifies what it wrote,
//! also after its process was killed; and what else is in its group is held to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};
use crate::recovery::{field, kill};

/// Where cgroup v2 has its controllers.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "resources",
        name: "a disk with limits works under fio, is held to them and comes back within them",
        long: false,
        run: enforced,
    }]
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

/// Where the device's processes are.
fn leaf(socket: &str) -> Result<PathBuf, String> {
    let info = ctl(socket, &["info"])?;
    let group = info["cgroup"].as_str().unwrap_or_default().to_owned();
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    let mount = line.and_then(|line| line.split(' ').nth(4));
    let mount = mount.ok_or("cgroup v2 is not mounted")?;
    Ok(Path::new(mount)
        .join(group.trim_start_matches('/'))
        .join("dev-d"))
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
    let leaf = leaf(&socket)?;
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
    // The kernel holds whatever is in there to the limits: a program that makes processes.
    let place = leaf.display();
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
