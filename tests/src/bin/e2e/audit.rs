//! The audit: what the kernel says of each process, and that deviations are noticed.

use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl};

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = |name, run| Test {
        subject: "audit",
        name,
        long: false,
        run,
    };
    vec![test(
        "the kernel says that the disk process is confined",
        confined,
    )]
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
