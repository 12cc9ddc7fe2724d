//! Operations by their numbers: what became of one, waits for its end, and one that ends with the
//! machine.

use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, guest_file, nothing_left, patience};

use super::bad_input::appears;
use super::disk::LIMIT;
use super::rng::refused;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    vec![Test::short("operations")(
        "an operation is asked for and waited for by its number, as often as one likes, to the machine's end",
        by_number,
    )]
}

/// `ctl operation`: its exit code, and what it printed.
fn operation(socket: &str, args: &[&str]) -> Result<(Option<i32>, serde_json::Value), String> {
    let all = [&["ctl", "--socket", socket, "--json", "operation"], args].concat();
    let output = bulkhead(&all)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = serde_json::from_str(&text)
        .map_err(|e| format!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.status.code(), value))
}

fn by_number() -> Verdict {
    let scratch = Scratch::new("operations")?;
    let (socket, reading) = (scratch.path("api"), scratch.path("reading"));
    let options = ["--api-socket", &socket, "--api-read-only", &reading];
    let mut vmm = Vmm::start(&[["serve"].as_slice(), &options].concat())?;
    appears(&socket)?;
    refused(
        ctl(&socket, &["operation", "1"]),
        "there has been no operation 1: the last one is 0",
    )?;
    let kernel = sh(&format!("realpath {}", guest_file("vmlinux")))?;
    let create = [
        "create",
        "--kernel",
        kernel.trim(),
        "--memory",
        "size=128M,max=256M",
    ];
    let more = ["--serial", "none", "--hotplug-ports", "2"];
    ctl(&socket, &[create.as_slice(), &more].concat())?;
    ctl(&socket, &["add-rng", "id=more"])?;
    for _ in 0..2 {
        // Whether it is waited for or not, and by whom.
        for (socket, args) in [
            (&socket, ["1"].as_slice()),
            (&reading, &["1", "--wait", "600"]),
        ] {
            let (code, one) = operation(socket, args)?;
            check(
                code == Some(0)
                    && one["state"] == "done"
                    && one["subject"] == "more"
                    && one["detail"] == "added behind hp1",
                || one.to_string(),
            )?;
        }
    }
    // One that waits for a guest, and there is none.
    ctl(&socket, &["resize-memory", "192M", "--timeout", "600"])?;
    let running = ctl(
        &reading,
        &["operations", "--running", "--subject", "memory"],
    )?;
    check(running["operations"][0]["operation"] == 2, || {
        running.to_string()
    })?;
    let (code, one) = operation(&socket, &["2", "--wait", "1"])?;
    check(code == Some(1) && one["state"] == "running", || {
        one.to_string()
    })?;
    let all = ctl(&reading, &["operations"])?;
    let states = |n: usize| all["operations"][n]["state"].clone();
    check(states(0) == "done" && states(1) == "running", || {
        all.to_string()
    })?;
    // And one that waits for a switch, which does not come: its end is far enough for two calls.
    let late = format!("vhost-user={},server=on,id=late", scratch.path("switch"));
    let (add, wait) = std::thread::scope(|scope| {
        let wait = scope.spawn(|| operation(&socket, &["2", "--wait", "60"]));
        // Time to ask: where it has not, it finds nobody any more.
        std::thread::sleep(Duration::from_millis(500));
        let add = scope.spawn(|| ctl(&socket, &["add-net", &late]));
        let end = Instant::now() + patience(LIMIT);
        while ctl(&reading, &["operations", "--running"])?["operations"][1]["subject"] != "late" {
            check(Instant::now() < end && !add.is_finished(), || {
                vmm.story("it does not begin")
            })?;
        }
        check(!wait.is_finished(), || "it did not wait".to_owned())?;
        ctl(&socket, &["shutdown", "--force"])?;
        let add = add.join().map_err(|_| "the adder".to_owned())?;
        let wait = wait.join().map_err(|_| "who waits".to_owned())?;
        Ok::<_, String>((add, wait))
    })?;
    check(add.is_err(), || format!("{add:?}"))?;
    if let Ok((code, one)) = wait {
        check(
            code == Some(1) && one["state"] == "failed" && one["detail"] == "the machine stopped",
            || one.to_string(),
        )?;
    }
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}
