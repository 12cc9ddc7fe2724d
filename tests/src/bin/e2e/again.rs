//! Requests that are made again, as by a client that has missed the first answer, and those that
//! there is nothing for. No guest need run.

use std::time::Duration;

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, guest_file, nothing_left};

use super::bad_input::appears;
use super::disk::LIMIT;
use super::rng::refused;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("again");
    vec![
        test(
            "what is asked for again is so already, and one machine is not taken for another",
            asked_again,
        ),
        test(
            "a VMM without a machine has none to shut down, and serves on",
            no_machine,
        ),
    ]
}

fn state(socket: &str) -> Result<String, String> {
    Ok(ctl(socket, &["info"])?["state"].to_string())
}

fn asked_again() -> Verdict {
    let scratch = Scratch::new("again")?;
    let (socket, kernel) = (scratch.path("api"), guest_file("vmlinux"));
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    let create = ["create", "--kernel", &kernel, "--serial", "none", "--rng"];
    let of = |memory| [create.as_slice(), &["--memory", memory]].concat();
    let other = "has a machine already, of another configuration";
    for _ in 0..2 {
        ctl(&socket, &of("128M"))?;
    }
    refused(ctl(&socket, &of("160M")), other)?;
    refused(ctl(&socket, &["pause"]), "created: boot it first")?;
    refused(ctl(&socket, &["resume"]), "created: boot it first")?;
    for _ in 0..2 {
        ctl(&socket, &["boot"])?;
    }
    for _ in 0..2 {
        ctl(&socket, &["pause"])?;
    }
    check(state(&socket)?.contains("paused"), || "it runs".to_owned())?;
    refused(ctl(&socket, &["boot"]), "it has booted already: resume it")?;
    for _ in 0..2 {
        ctl(&socket, &["resume"])?;
    }
    ctl(&socket, &["boot"])?;
    check(state(&socket)?.contains("running"), || {
        "it stands".to_owned()
    })?;
    // Also one that is on its way: the machine that it describes is there.
    ctl(&socket, &of("128M"))?;
    refused(ctl(&socket, &of("160M")), other)?;
    let events = bulkhead(&["ctl", "--socket", &socket, "--json", "events"])?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    // Nothing happened the second time.
    for (kind, times) in [("created", 1), ("running", 2), ("paused", 1)] {
        let told = events
            .matches(&format!("\"kind\":\"machine.{kind}\""))
            .count();
        check(told == times, || format!("{told} times {kind}: {events}"))?;
    }
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(20))
}

fn no_machine() -> Verdict {
    let scratch = Scratch::new("no-machine")?;
    let socket = scratch.path("api");
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    for command in [&["shutdown"][..], &["shutdown", "--force"]] {
        refused(ctl(&socket, command), "cannot shut down: no machine")?;
        refused(ctl(&socket, command), "ends by SIGTERM or Ctrl-C")?;
        check(state(&socket)?.contains("none"), || vmm.story("no state"))?;
    }
    sh(&format!("kill -TERM {}", vmm.pid()))?;
    vmm.ends_with(128 + 15, LIMIT)?;
    nothing_left(Duration::from_secs(20))
}
