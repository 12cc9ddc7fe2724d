//! Machines that are given up before they boot: nothing of one stays, and the next is made as if it
//! were the first.

use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_proto::Code;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::VMState;
use bulkhead_tests::host::sh;
use bulkhead_tests::kata::{self, Client, QUIT};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{
    Scratch, Vmm, bulkhead_processes, ctl, guest_file, nothing_left, patience,
};

use super::bad_input::appears;
use super::disk::LIMIT;
use super::rng::refused;

/// Machines that are made and given up.
const MACHINES: usize = 12;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("delete");
    vec![
        test(
            "machines are given up before they boot, one after another, and leave nothing",
            one_after_another,
        ),
        test(
            "a machine that CreateVM made is given up by ctl delete, before it runs and when it does",
            of_vmservice,
        ),
    ]
}

/// Descriptors and threads of a process.
fn held(pid: u32) -> Result<(usize, usize), String> {
    let count = |what: &str| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/{what}"));
        entries
            .map(Iterator::count)
            .map_err(|e| format!("{what} of {pid}: {e}"))
    };
    Ok((count("fd")?, count("task")?))
}

fn one_after_another() -> Verdict {
    let scratch = Scratch::new("delete")?;
    let (socket, port) = (scratch.path("api"), scratch.path("port"));
    let (vsock, disk) = (scratch.path("vsock"), scratch.path("disk"));
    sh(&format!("truncate -s 4M {disk}"))?;
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    // Nothing to do, as for a client that has missed an answer.
    ctl(&socket, &["delete"])?;
    let (kernel, disk) = (guest_file("vmlinux"), format!("path={disk},id=root"));
    let console = format!("id=con,socket={port}");
    let vsock_option = format!("socket={vsock}");
    let create = [
        "create",
        "--kernel",
        &kernel,
        "--memory",
        "size=128M,max=256M",
    ];
    let devices = [
        "--disk",
        &disk,
        "--console",
        &console,
        "--vsock",
        &vsock_option,
    ];
    let serial = scratch.path("serial");
    let serial_option = format!("socket={serial}");
    let more = ["--rng", "--hotplug-ports", "2", "--serial", &serial_option];
    let create = [create.as_slice(), &devices, &more].concat();
    let first = held(vmm.pid())?;
    // One that cannot be made leaves nothing either.
    let pinned = [create.as_slice(), &["--cpus", "1,pin=999"]].concat();
    for machine in 0..MACHINES {
        refused(ctl(&socket, &pinned), "host CPUs of pin= exist")?;
        ctl(&socket, &create)?;
        ctl(&socket, &["add-rng", "id=late"])?;
        refused(ctl(&socket, &create), "has a machine already")?;
        let made = ctl(&socket, &["devices"])?.to_string();
        check(made.contains("late") && Path::new(&port).exists(), || made)?;
        ctl(&socket, &["delete"])?;
        let info = ctl(&socket, &["info"])?;
        check(info["state"] == "none", || info["state"].to_string())?;
        for path in [&port, &vsock, &serial] {
            check(!Path::new(path).exists(), || format!("{path} stays"))?;
        }
        let left = bulkhead_processes();
        let serves = |name: &str| !matches!(name, "bulkhead" | "bulkhead-launch");
        check(!left.iter().any(|(_, name)| serves(name)), || {
            format!("{left:?}")
        })?;
        // Threads end by themselves when nothing needs them.
        let end = Instant::now() + patience(LIMIT);
        loop {
            let now = held(vmm.pid())?;
            // A client of before may not have been let go of when they were counted first.
            if now.0 <= first.0 && now.1 <= first.1 {
                break;
            }
            check(Instant::now() < end, || {
                format!("machine {machine}: {now:?} descriptors and threads, not {first:?}")
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // What waits for a guest is under way; the end of the machine ends it.
    ctl(&socket, &create)?;
    ctl(&socket, &["resize-memory", "192M", "--timeout", "600"])?;
    refused(ctl(&socket, &["delete"]), "is under way: wait for its end")?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

/// By the other service of the socket that `vmservice.VM` is on.
fn of_vmservice() -> Verdict {
    let scratch = Scratch::new("delete-kata")?;
    let (socket, serial) = (scratch.path("vm.sock"), scratch.path("serial"));
    let (vsock, disk) = (scratch.path("vsock"), scratch.path("disk"));
    sh(&format!("truncate -s 4M {disk}"))?;
    let create = kata::create(
        (&guest_file("vmlinux"), "", "console=ttyS0"),
        (128, 2),
        &serial,
        vec![
            ("rootfs", 1, kata::disk(&disk, false)),
            ("vsock", 3, kata::vsock(&vsock)),
        ],
    );
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    // Nothing to do.
    ctl(&socket, &["delete"])?;
    for _ in 0..3 {
        client.tell("CreateVM", &create)?;
        client.add("hp0", kata::rng())?;
        ctl(&socket, &["delete"])?;
        let state = client.properties()?.state;
        check(state == VMState::UNINITIALIZED.into(), || {
            format!("{state:?}")
        })?;
        let none = Empty::new();
        client.refused("ResumeVM", &none, Code::FailedPrecondition, "no machine")?;
        for path in [&serial, &vsock] {
            check(!Path::new(path).exists(), || format!("{path} stays"))?;
        }
        let left = bulkhead_processes();
        let serves = |name: &str| !matches!(name, "bulkhead" | "bulkhead-launch");
        check(!left.iter().any(|(_, name)| serves(name)), || {
            format!("{left:?}")
        })?;
    }
    // One that runs: who waits for its end is told of it, and the process does not stay for a client.
    client.tell("CreateVM", &create)?;
    client.plain("ResumeVM")?;
    let other = socket.clone();
    let waiter = std::thread::spawn(move || Client::connect(&other)?.plain("WaitVM"));
    std::thread::sleep(Duration::from_millis(300));
    check(!waiter.is_finished(), || "WaitVM did not wait".into())?;
    ctl(&socket, &["delete"])?;
    waiter.join().map_err(|_| "WaitVM panicked")??;
    vmm.ends_with(0, QUIT)?;
    nothing_left(QUIT)?;
    for path in [&serial, &vsock, &socket] {
        check(!Path::new(path).exists(), || format!("{path} stays"))?;
    }
    Ok(())
}
