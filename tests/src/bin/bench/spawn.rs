//! Spawn of a device process to ready, as the VMM reports it, and the size of the process.
//! No guest runs: a machine is created, looked at and ended.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::vmm::{Scratch, bin, ctl, guest_file};

use crate::process;
use crate::table::{Table, judged, share, spread};

/// What one device process looked like.
pub struct Seen {
    pub spawn_ms: f64,
    rss_mib: f64,
    anonymous_mib: f64,
    pss_mib: f64,
}

/// Creates machine after machine and prints the table.
pub fn measure(runs: usize) -> crate::Report {
    let scratch = Scratch::new("bench-spawn")?;
    let disk = scratch.disk("disk.img", 1 << 20, 3)?;
    let mut all = Vec::new();
    // The first is a warm-up.
    for run in 0..=runs {
        let seen = once(&bin("bulkhead"), &scratch, &disk)?;
        if run > 0 {
            all.push(seen);
        }
    }
    let mut table = Table::new(&["bulkhead-blk", "median (least–most)", "aim"]);
    let mut row = |what: &str, field: fn(&Seen) -> f64, aim: Option<f64>| {
        let values: Vec<f64> = all.iter().map(field).collect();
        let aim = aim.map(|most| judged("median", share(&values, 0.5), most));
        table.row(vec![
            what.into(),
            spread(&values, 2),
            aim.unwrap_or_default(),
        ]);
    };
    row("spawn → ready, ms", |s| s.spawn_ms, Some(5.0));
    row("RSS, MiB", |s| s.rss_mib, Some(1.5));
    row("of it anonymous, MiB", |s| s.anonymous_mib, None);
    row("PSS, MiB", |s| s.pss_mib, None);
    Ok(format!(
        "## spawn: a device process, {runs} times\n\n{}\n",
        table.text()
    ))
}

/// One machine of this VMM's, made and ended.
pub fn once(vmm: &Path, scratch: &Scratch, disk: &str) -> Result<Seen, String> {
    let socket = scratch.path("api");
    let mut child = Command::new(vmm)
        .args(["serve", "--api-socket", &socket])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| format!("bulkhead serve: {e}"))?;
    let seen =
        process::appears(&socket, Duration::from_secs(10)).and_then(|()| look(&socket, disk));
    if ctl(&socket, &["shutdown", "--force"]).is_ok() {
        // It ends by itself; the kill is for one that does not.
        let end = Instant::now() + Duration::from_secs(2);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    let _ = std::fs::remove_file(&socket);
    seen
}

fn look(socket: &str, disk: &str) -> Result<Seen, String> {
    let (kernel, disk) = (guest_file("vmlinux"), format!("path={disk}"));
    ctl(
        socket,
        &[
            "create", "--kernel", &kernel, "--memory", "256M", "--serial", "none", "--disk", &disk,
        ],
    )?;
    let answer = ctl(socket, &["devices"])?;
    let devices = answer.get("devices").unwrap_or(&answer);
    let device = devices
        .get(0)
        .ok_or_else(|| format!("no device in {answer}"))?;
    let number = |field: &str| {
        let value = device.get(field).and_then(serde_json::Value::as_f64);
        value.ok_or_else(|| format!("no {field} in {device}"))
    };
    let pid = number("pid")? as u32;
    let kib = |field| {
        process::status_kib(pid, field).ok_or_else(|| format!("no {field} of process {pid}"))
    };
    Ok(Seen {
        spawn_ms: number("spawn_us")? / 1000.0,
        rss_mib: kib("VmRSS")? / 1024.0,
        anonymous_mib: kib("RssAnon")? / 1024.0,
        pss_mib: process::pss(pid, "guest-ram")?.total / 1024.0,
    })
}
