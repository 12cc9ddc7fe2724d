//! Memory faults in each process of a VM: what is told of them. No guest is booted.

use std::time::{Duration, Instant};

use bulkhead_tests::fault::fault;
use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{bulkhead, ctl, nothing_left, patience};
use serde_json::Value;

use crate::audit_native::Served;
use crate::disk::LIMIT;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    vec![Test {
        subject: "death",
        name: "a memory fault is told as its signal, of each kind of device process, and ends the VMM by it",
        long: false,
        run: told_as_what_they_are,
    }]
}

/// What the first crash of a device was told as.
fn crash(socket: &str, device: &str) -> Result<Value, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut events = text.lines().filter_map(|l| serde_json::from_str(l).ok());
        let found =
            events.find(|e: &Value| e["kind"] == "device.crashed" && e["subject"] == device);
        if let Some(found) = found {
            return Ok(found["what"].clone());
        }
        check(Instant::now() < end, || {
            format!("{device} did not crash: {text}")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn told_as_what_they_are() -> Verdict {
    let mut served = Served::new("faults", &[])?;
    let devices = ctl(&served.socket, &["devices"])?;
    let devices = devices.as_array().cloned().unwrap_or_default();
    check(devices.len() == 6, || format!("{devices:?}"))?;
    for device in &devices {
        let id = device["id"].as_str().unwrap_or_default();
        fault(device["pid"].as_i64().unwrap_or_default())?;
        // It is asked something, and returns from its wait.
        let _ = ctl(&served.socket, &["stats", id]);
        let what = crash(&served.socket, id)?;
        check(
            what["why"] == "signal" && what["signal"] == libc::SIGSEGV,
            || format!("{id}: {what}"),
        )?;
    }
    fault(served.vmm.pid().into())?;
    let _ = ctl(&served.socket, &["info"]);
    served.vmm.ends_with(128 + libc::SIGSEGV, LIMIT)?;
    nothing_left(Duration::from_secs(20))?;
    // The launcher is the first process of a namespace, too.
    let mut served = Served::new("faults", &[])?;
    let info = ctl(&served.socket, &["info"])?;
    fault(info["launcher_pid"].as_i64().unwrap_or_default())?;
    // It has something to reap, if it lives.
    let device = &ctl(&served.socket, &["devices"])?[0]["pid"];
    sh(&format!("kill -9 {device}"))?;
    served.vmm.ends_with(5, LIMIT)?;
    nothing_left(Duration::from_secs(20))
}
