//! Machines that are given up: nothing of one stays, or who asked is told what does, and who watches
//! is told the end of each process and of the machine. One that has not booted is followed by
//! another as if that were the first.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::Code;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::VMState;
use bulkhead_tests::host::sh;
use bulkhead_tests::kata::{self, Client, QUIT};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{
    Scratch, Vmm, bin, bulkhead, bulkhead_processes, ctl, guest_file, nothing_left, patience,
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
            "a machine is given up whose launcher is stopped: who asked is told, and again until nothing is left",
            stopped_launcher,
        ),
        test(
            "a machine that has booted is given up whose launcher is stopped: who asked is told",
            stopped_launcher_booted,
        ),
        test(
            "a machine that has booted is given up: who watches is told the end of its processes, and its own",
            watched,
        ),
        test(
            "a machine that CreateVM made is given up by ctl delete, before it runs and when it does",
            of_vmservice,
        ),
    ]
}

/// A VMM with a machine of a disk and an entropy device, and its socket.
fn machine(scratch: &Scratch) -> Result<(Vmm, String), String> {
    let (socket, disk) = (scratch.path("api"), scratch.path("disk"));
    sh(&format!("truncate -s 4M {disk}"))?;
    let vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    create(&socket, &disk)?;
    Ok((vmm, socket))
}

fn create(socket: &str, disk: &str) -> Verdict {
    let (kernel, disk) = (guest_file("vmlinux"), format!("path={disk},id=root"));
    let create = ["create", "--kernel", &kernel, "--memory", "128M"];
    let more = ["--disk", &disk, "--rng", "--serial", "none"];
    ctl(socket, &[create.as_slice(), &more].concat()).map(drop)
}

/// The launcher's pid, and the pid of the disk's process.
fn pids(socket: &str) -> Result<(i64, i64), String> {
    let info = ctl(socket, &["info"])?;
    let devices = ctl(socket, &["devices"])?;
    let disk = devices.as_array().into_iter().flatten();
    let disk = disk
        .filter(|d| d["id"] == "root")
        .find_map(|d| d["pid"].as_i64());
    info["launcher_pid"]
        .as_i64()
        .zip(disk)
        .ok_or_else(|| format!("{info} {devices}"))
}

fn stopped_launcher() -> Verdict {
    let scratch = Scratch::new("delete-stopped")?;
    let (mut vmm, socket) = machine(&scratch)?;
    let (launcher, disk) = pids(&socket)?;
    sh(&format!("kill -STOP {launcher} {disk}"))?;
    let told = format!("its launcher (pid {launcher}) does not end what it keeps of it");
    let answer = ctl(&socket, &["delete"]);
    refused(answer.clone(), &told)?;
    let alive = format!("process {disk} of device root has not ended");
    refused(answer, &alive)?;
    // No other machine is made beside what is left.
    refused(
        create(&socket, &scratch.path("disk")).map(|()| serde_json::Value::Null),
        &told,
    )?;
    sh(&format!("kill -CONT {launcher}"))?;
    ctl(&socket, &["delete"])?;
    check(!Path::new(&format!("/proc/{disk}")).exists(), || {
        format!("process {disk} stays")
    })?;
    // Names and the lock on the disk's file are free.
    create(&socket, &scratch.path("disk"))?;
    ctl(&socket, &["delete"])?;
    let events = bulkhead(&["ctl", "--socket", &socket, "--json", "events"])?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    let count = |kind: &str| events.matches(&format!("\"kind\":\"{kind}\"")).count();
    let counts = (count("device.spawned"), count("device.exited"));
    check(counts == (4, 4), || format!("{counts:?}: {events}"))?;
    sh(&format!("kill {}", vmm.pid()))?;
    vmm.ends_with(128 + 15, LIMIT)?;
    nothing_left(LIMIT)
}

fn stopped_launcher_booted() -> Verdict {
    let scratch = Scratch::new("delete-booted")?;
    let (mut vmm, socket) = machine(&scratch)?;
    let (launcher, disk) = pids(&socket)?;
    ctl(&socket, &["boot"])?;
    sh(&format!("kill -STOP {launcher} {disk}"))?;
    let answer = ctl(&socket, &["delete"]);
    let told = format!("the launcher (pid {launcher}) has not ended within");
    refused(answer.clone(), &told)?;
    refused(
        answer.clone(),
        &format!("process {disk} of device root has not ended"),
    )?;
    refused(answer, &format!("kill -KILL {launcher} "))?;
    vmm.ends_with(0, LIMIT)?;
    check(vmm.errors().contains(&told), || vmm.story("not said"))?;
    sh(&format!("kill -KILL {launcher}"))?;
    nothing_left(LIMIT)?;
    bulkhead(&["reap"]).map(drop)
}

fn watched() -> Verdict {
    let scratch = Scratch::new("delete-watched")?;
    let (mut vmm, socket) = machine(&scratch)?;
    ctl(&socket, &["boot"])?;
    let mut follow = Command::new(bin("bulkhead"));
    follow.args(["ctl", "--socket", &socket, "--json", "events", "--follow"]);
    let mut watcher = Vmm::spawn(follow)?;
    watcher.wait_for("machine.running", LIMIT)?;
    ctl(&socket, &["delete"])?;
    vmm.ends_with(0, LIMIT)?;
    watcher.ends_with(0, LIMIT)?;
    let lines = watcher.output();
    let events: Vec<serde_json::Value> = lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let told: Vec<(&str, &str)> = events
        .iter()
        .filter_map(|e| Some((e["kind"].as_str()?, e["subject"].as_str()?)))
        .collect();
    let after = told
        .iter()
        .skip_while(|(kind, _)| *kind != "machine.stopped");
    let mut after: Vec<&(&str, &str)> = after.skip(1).collect();
    check(after.last() == Some(&&("machine.deleted", "")), || {
        lines.clone()
    })?;
    after.pop();
    after.sort_unstable();
    let ends = [("device.exited", "rng0"), ("device.exited", "root")];
    check(after.iter().copied().eq(&ends), || {
        format!("{after:?}: {lines}")
    })?;
    let pids = |kind: &str| {
        let of = events.iter().filter(|e| e["kind"] == kind);
        let mut pids: Vec<i64> = of.filter_map(|e| e["what"]["pid"].as_i64()).collect();
        pids.sort_unstable();
        pids
    };
    let (began, ended) = (pids("device.spawned"), pids("device.exited"));
    check(began == ended && began.len() == 2, || lines.clone())?;
    nothing_left(LIMIT)
}

/// There is no process but a VMM and its launcher.
fn no_device_process() -> Verdict {
    let left = bulkhead_processes();
    let serves = |name: &str| !matches!(name, "bulkhead" | "bulkhead-launch");
    check(!left.iter().any(|(_, name)| serves(name)), || {
        format!("{left:?}")
    })
}

/// No memory of a guest is mapped in this process, once threads that had it have ended.
pub fn no_memory(pid: u32) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"));
        let maps = maps.map_err(|e| e.to_string())?;
        let Some(stays) = maps.lines().find(|line| line.contains("guest-ram")) else {
            return Ok(());
        };
        check(Instant::now() < end, || format!("{stays} stays"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
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
        let other = [create.as_slice(), &["--cpus", "2"]].concat();
        refused(ctl(&socket, &other), "has a machine already")?;
        let made = ctl(&socket, &["devices"])?.to_string();
        check(made.contains("late") && Path::new(&port).exists(), || made)?;
        ctl(&socket, &["delete"])?;
        let info = ctl(&socket, &["info"])?;
        check(info["state"] == "none", || info["state"].to_string())?;
        for path in [&port, &vsock, &serial] {
            check(!Path::new(path).exists(), || format!("{path} stays"))?;
        }
        no_device_process()?;
        no_memory(vmm.pid())?;
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
        no_device_process()?;
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
