//! The audit: what the kernel says of each process, and that deviations are noticed.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::fault::fault;
use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl};

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("audit");
    vec![
        test(
            "the kernel says that the disk process is confined",
            confined,
        ),
        test(
            "a core pattern that is a pipe gets nothing of device processes that die of a fault",
            cores,
        ),
        test(
            "each kind of process may hold as many descriptors as it needs at most, by vhost-net too",
            held,
        ),
    ]
}

fn held() -> Verdict {
    let here = bin("bulkhead");
    let here = here.parent().ok_or("the binaries lie nowhere")?;
    let output = Command::new("tests/native/inherited")
        .arg("held")
        .env("BULKHEAD_BIN", here)
        .output()
        .map_err(|e| format!("tests/native/inherited: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // It notes what is not here.
    let whole = text.contains("1 passed, 0 failed") && !text.contains("note ");
    check(output.status.success() && whole, || {
        format!("{text}{}", String::from_utf8_lossy(&output.stderr))
    })
}

fn confined() -> Verdict {
    let scratch = Scratch::new("audit")?;
    let disk = scratch.disk("disk", 1 << 20, 37)?;
    let socket = scratch.path("api");
    let mut vmm = Vmm::boot(
        "bh.cmd=hang",
        &[
            "--disk",
            &format!("path={disk},id=root"),
            "--api-socket",
            &socket,
        ],
    )?;
    vmm.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    for how in [
        vec!["audit", "--api-socket", &socket],
        vec!["audit", "--pid", &vmm.pid().to_string()],
    ] {
        let output = bulkhead(&how)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        check(output.status.success(), || {
            format!("{how:?}: {}\n{text}\n{errors}", output.status)
        })?;
        check(text.contains("bulkhead-blk"), || format!("{how:?}: {text}"))?;
    }
    // Started by root, it is not root.
    let own = std::fs::read_to_string(format!("/proc/{}/status", vmm.pid()))
        .map_err(|e| e.to_string())?;
    for line in own
        .lines()
        .filter(|l| l.starts_with("Uid:") || l.starts_with("Gid:"))
    {
        check(!line.split_whitespace().any(|id| id == "0"), || {
            format!("the VMM: {line}")
        })?;
    }
    // What the kernel says, read here once more, independently of the audit.
    let devices = ctl(&socket, &["devices"])?;
    let pid = devices[0]["pid"]
        .as_i64()
        .ok_or_else(|| devices.to_string())?;
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| e.to_string())?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .map(str::trim)
            .unwrap_or("absent")
            .to_string()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        check(field(set) == "0000000000000000", || {
            format!("{set} {}", field(set))
        })?;
    }
    check(field("NoNewPrivs:") == "1", || {
        format!("NoNewPrivs {}", field("NoNewPrivs:"))
    })?;
    check(field("Seccomp:") == "2", || {
        format!("Seccomp {}", field("Seccomp:"))
    })?;
    check(!field("Uid:").split_whitespace().any(|u| u == "0"), || {
        format!("Uid {}", field("Uid:"))
    })?;
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        let (host, device) = (of("self"), of(&pid.to_string()));
        check(matches!((&host, &device), (Ok(h), Ok(d)) if h != d), || {
            format!("{namespace}: {host:?} {device:?}")
        })?;
    }
    let root: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/root/"))
        .map_err(|e| e.to_string())?
        .flatten()
        .collect();
    check(root.is_empty(), || format!("its root holds {root:?}"))?;
    let mut files = Vec::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|e| e.to_string())?
        .flatten()
    {
        let target = std::fs::read_link(fd.path()).map_err(|e| e.to_string())?;
        let target = target.to_string_lossy().into_owned();
        if target.starts_with('/') && !target.starts_with("/memfd:") {
            files.push(target);
        }
    }
    files.sort();
    files.dedup();
    check(
        files
            .iter()
            .all(|f| f == "/dev/null" || f.ends_with("/disk")),
        || format!("it holds {files:?}"),
    )?;
    vmm.kill();
    Ok(())
}

/// The host's core pattern, put back in the end.
struct Pattern(String);

impl Pattern {
    const FILE: &str = "/proc/sys/kernel/core_pattern";

    fn set(program: &str) -> Result<Self, String> {
        let before = std::fs::read_to_string(Self::FILE).map_err(|e| e.to_string())?;
        std::fs::write(Self::FILE, format!("|{program}")).map_err(|e| e.to_string())?;
        Ok(Self(before))
    }
}

impl Drop for Pattern {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, self.0.trim());
    }
}

fn cores() -> Verdict {
    let scratch = Scratch::new("cores")?;
    let got = scratch.path("core");
    let program = scratch.path("take");
    // RLIMIT_CORE does not hold a pipe back.
    sh(&format!(
        "printf '#!/bin/sh\\nexec head -c 1 >>{got}\\n' >{program} && chmod 755 {program}"
    ))?;
    let _pattern = Pattern::set(&program)?;
    // It works where nothing stands against it.
    sh("sh -c 'kill -SEGV $$' || true")?;
    let end = Instant::now() + LIMIT;
    while std::fs::metadata(&got).map_or(0, |m| m.len()) == 0 {
        check(Instant::now() < end, || "no core of a plain process".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let (disk, api) = (scratch.disk("disk", 1 << 20, 41)?, scratch.path("api"));
    let disk = format!("path={disk},id=root");
    let args = [
        "--disk",
        &disk,
        "--rng",
        "id=dice",
        "--memory",
        "size=256M,max=384M",
        "--api-socket",
        &api,
    ];
    let mut vmm = Vmm::boot("bh.cmd=hang", &args)?;
    vmm.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    let devices = ctl(&api, &["devices"])?;
    let devices = devices.as_array().cloned().unwrap_or_default();
    let pids: Vec<String> = devices.iter().map(|d| d["pid"].to_string()).collect();
    check(pids.len() == 3, || format!("{pids:?}"))?;
    std::fs::write(&got, "").map_err(|e| e.to_string())?;
    for pid in &pids {
        fault(pid.parse().map_err(|_| pid.clone())?)?;
    }
    for device in &devices {
        // It returns from its wait.
        let _ = ctl(&api, &["stats", device["id"].as_str().unwrap_or_default()]);
    }
    let end = Instant::now() + LIMIT;
    let alive = |pid: &String| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|s| !s.contains("State:\tZ"))
    };
    while pids.iter().any(alive) {
        check(Instant::now() < end, || format!("{pids:?} live on"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    let len = std::fs::metadata(&got).map_err(|e| e.to_string())?.len();
    check(len == 0, || format!("{len} cores were given away"))?;
    vmm.kill();
    Ok(())
}
