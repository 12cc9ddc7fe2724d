//! Operations by their numbers: what became of one, waits for its end, and one that ends with the
//! machine.

use std::time::Instant;

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
    let create = ["create", "--kernel", kernel.trim(), "--memory", "96M"];
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
    // One that goes on until a switch comes, which does not.
    let switch = scratch.path("switch");
    let late = format!("vhost-user={switch},server=on,id=late");
    let (add, wait) = std::thread::scope(|scope| {
        let add = scope.spawn(|| ctl(&socket, &["add-net", &late]));
        let end = Instant::now() + patience(LIMIT);
        loop {
            let running = ctl(&socket, &["operations", "--running", "--subject", "late"])?;
            match running["operations"][0]["operation"].as_u64() {
                Some(2) => break,
                Some(other) => return Err(format!("operation {other} is late")),
                None => check(Instant::now() < end, || vmm.story("it does not begin"))?,
            }
        }
        let (code, one) = operation(&socket, &["2", "--wait", "1"])?;
        check(code == Some(1) && one["state"] == "running", || {
            one.to_string()
        })?;
        let wait = scope.spawn(|| operation(&socket, &["2", "--wait", "600"]));
        let all = ctl(&reading, &["operations"])?;
        let states = |n: usize| all["operations"][n]["state"].clone();
        check(states(0) == "done" && states(1) == "running", || {
            all.to_string()
        })?;
        ctl(&socket, &["shutdown", "--force"])?;
        let add = add.join().map_err(|_| "the adder".to_owned())?;
        let wait = wait.join().map_err(|_| "who waits".to_owned())?;
        Ok((add, wait))
    })?;
    check(add.is_err(), || format!("{add:?}"))?;
    // Who came too late to wait found nobody any more.
    if let Ok((code, one)) = wait {
        check(
            code == Some(1) && one["state"] == "failed" && one["detail"] == "the machine stopped",
            || one.to_string(),
        )?;
    }
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}
