//! Hot-plug while something else stands still or ends: devices of every kind in a guest that is
//! paused and pulled out of one that uses them, clients that hang up in the middle, a process that
//! is killed while its device is being given up.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, patience};

use super::disk::{LIMIT, sparse};
use super::hotplug::{device, holdings, settled};
use super::hotplug_beside::events;
use super::hotplug_memory::{memory, pid_of};
use super::hotplug_order::{until_gone, until_ok};
use super::net_bad::until_event;
use super::recovery::kill;
use super::shell::{Shell, guest};

const MIB: u64 = 1 << 20;
/// The host's port that a guest's stream goes to.
const SINK: u32 = 4321;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "network, socket, entropy and console devices come to a paused guest, leave one, and are pulled out while they are used",
            every_kind,
        ),
        test(
            "a console and a network device are pulled out while the guest waits for what they answer, on its only vCPU",
            spoken_to,
        ),
        test(
            "a console that is given up takes what its guest sends, on its only vCPU, and is removed as any other",
            given_up,
        ),
        test(
            "a client that hangs up in the middle of a removal or a resize changes nothing of it",
            hung_up,
        ),
        test(
            "a disk's process is killed while the guest gives the disk up, which goes",
            killed,
        ),
    ]
}

/// What is added, and how a guest uses it: `uses` ends when the device does.
struct Kind<'a> {
    command: &'a str,
    id: &'a str,
    device: String,
    driver: &'a str,
    uses: String,
}

/// How long the guest may take to let go of a device, in seconds.
const SECONDS: &str = "600";

fn every_kind() -> Verdict {
    let scratch = Scratch::new("paused")?;
    let network = Namespace::new("paused")?;
    network.tap("hot0", "10.8.0.1/24", "user root")?;
    let enter = network.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let (socket, vsock, late) = (
        scratch.path("api"),
        scratch.path("vsock"),
        scratch.path("late"),
    );
    let mut sink = Command::new("socat");
    sink.args([
        "-u",
        &format!("UNIX-LISTEN:{vsock}_{SINK},fork"),
        "OPEN:/dev/null",
    ]);
    let _sink = Vmm::spawn(sink)?;
    let kinds = [
        Kind {
            command: "add-net",
            id: "lan",
            device: "tap=hot0,id=lan,backend=user".to_owned(),
            driver: "virtio_net",
            uses: "n=$(ls /sys/class/net | grep -v lo); ip addr add 10.8.0.2/24 dev $n; ip link set $n up; ping -q -c 1 -w 60 10.8.0.1 >/dev/null; (while [ -e /sys/class/net/$n ]; do ping -q -c 100 -i 0.01 -W 1 10.8.0.1; done >/dev/null 2>&1; echo ENDED-'lan') & true".to_owned(),
        },
        Kind {
            command: "add-vsock",
            id: "vsock",
            device: format!("socket={vsock},id=vsock"),
            driver: "vmw_vsock_virtio_transport",
            uses: format!("(socat -u OPEN:/dev/zero VSOCK-CONNECT:2:{SINK} 2>/dev/null; echo ENDED-'vsock') & sleep 1; kill -0 $!"),
        },
        Kind {
            command: "add-rng",
            id: "dice",
            device: "id=dice".to_owned(),
            driver: "virtio_rng",
            uses: "[ $(dd if=/dev/hwrng bs=64 count=1 status=none | wc -c) = 64 ]; (dd if=/dev/hwrng of=/dev/null bs=16 2>/dev/null; echo ENDED-'dice') & true".to_owned(),
        },
        Kind {
            command: "add-console",
            id: "more",
            device: format!("id=more,socket={late},name=late"),
            driver: "virtio_console",
            uses: "until p=$(grep -lx late /sys/class/virtio-ports/*/name); do sleep 0.1; done; p=/dev/$(basename $(dirname $p)); until [ -c $p ]; do sleep 0.1; done; (cat $p >/dev/null 2>&1; echo ENDED-'more') & true".to_owned(),
        },
    ];
    let args = ["--api-socket", &socket, "--hotplug-ports", "3"];
    let mut guest = guest(&by, &scratch, &[], &args)?;
    guest
        .run("modprobe -a virtio_net vmw_vsock_virtio_transport virtio_rng virtio_console; true")?;
    // What is loaded with the first of its kind stays.
    for kind in &kinds {
        ctl(&socket, &[kind.command, &kind.device])?;
        there(&mut guest, kind.driver)?;
        ctl(&socket, &["remove-device", kind.id, "--timeout", SECONDS])?;
    }
    let before = holdings(guest.vmm.pid())?;
    for kind in &kinds {
        let failed = |e| format!("{}: {e}", kind.id);
        paused(&mut guest, &socket, kind).map_err(failed)?;
    }
    for left in [&vsock, &late] {
        check(!Path::new(left).exists(), || format!("{left} is left"))?;
    }
    settled(guest.vmm.pid(), &before)?;
    guest.ends()
}

/// The guest has a device of this driver.
fn there(guest: &mut Shell, driver: &str) -> Verdict {
    guest.run(&format!(
        "until ls /sys/bus/virtio/drivers/{driver} | grep -q '^virtio'; do sleep 0.1; done"
    ))
}

/// It has none.
fn away(guest: &mut Shell, driver: &str) -> Verdict {
    guest.run(&format!(
        "while ls /sys/bus/virtio/drivers/{driver} | grep -q '^virtio'; do sleep 0.1; done"
    ))
}

fn paused(guest: &mut Shell, socket: &str, kind: &Kind<'_>) -> Verdict {
    let add = || ctl(socket, &[kind.command, &kind.device]);
    let ended = format!("ENDED-{}", kind.id);
    // It comes, and is asked for again.
    ctl(socket, &["pause"])?;
    add()?;
    check(device(socket, kind.id)?.is_some(), || "is not there".into())?;
    ctl(socket, &["resume"])?;
    there(guest, kind.driver)?;
    guest.run(&kind.uses)?;
    ctl(socket, &["pause"])?;
    std::thread::scope(|scope| {
        let remove = ["remove-device", kind.id, "--timeout", SECONDS];
        let removed = scope.spawn(move || ctl(socket, &remove));
        let asked = began(socket, kind.id, "remove");
        let (early, still) = (removed.is_finished(), device(socket, kind.id));
        let resumed = ctl(socket, &["resume"]);
        asked?;
        check(!early && still?.is_some(), || {
            "a paused guest has given it up".into()
        })?;
        resumed?;
        removed.join().map_err(|_| "panic")?.map(drop)
    })?;
    away(guest, kind.driver)?;
    guest.vmm.wait_for(&ended, LIMIT)?;

    // It comes and goes while nobody can look.
    ctl(socket, &["pause"])?;
    add()?;
    ctl(socket, &["remove-device", kind.id, "--force"])?;
    ctl(socket, &["resume"])?;
    check(device(socket, kind.id)?.is_none(), || "it stays".into())?;

    // It is pulled out, in use.
    until_ok(add)?;
    there(guest, kind.driver)?;
    guest.run(&kind.uses)?;
    ctl(socket, &["remove-device", kind.id, "--force"])?;
    away(guest, kind.driver)?;
    let end = Instant::now() + patience(LIMIT);
    while guest.vmm.output().matches(&ended).count() < 2 {
        check(Instant::now() < end, || {
            guest.vmm.story("who used it does not end")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{}: came, left, was pulled out", kind.id);
    Ok(())
}

/// Linux waits for the answer to what it tells a console or a network device without letting go of
/// the vCPU.
fn spoken_to() -> Verdict {
    let scratch = Scratch::new("spoken-to")?;
    let network = Namespace::new("spoken-to")?;
    network.tap("hot0", "10.8.0.1/24", "user root")?;
    let enter = network.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let (socket, late) = (scratch.path("api"), scratch.path("late"));
    let args = ["--api-socket", &socket, "--hotplug-ports", "2"];
    let mut guest = guest(&by, &scratch, &[], &args)?;
    guest.run("modprobe -a virtio_net virtio_console; true")?;
    let console = format!("id=more,socket={late},name=late");
    for (command, device, id, driver, speaks) in [
        (
            "add-console",
            console.as_str(),
            "more",
            "virtio_console",
            "until p=$(grep -lx late /sys/class/virtio-ports/*/name); do sleep 0.1; done; p=/dev/$(basename $(dirname $p)); until [ -c $p ]; do sleep 0.1; done; (while [ -c $p ]; do 3<$p true; done) 2>/dev/null & true",
        ),
        (
            "add-net",
            "tap=hot0,id=lan,backend=user",
            "lan",
            "virtio_net",
            "n=$(ls /sys/class/net | grep -v lo); ip link set $n up; (while [ -e /sys/class/net/$n ]; do ip link set $n allmulticast on; ip link set $n allmulticast off; done) >/dev/null 2>&1 & true",
        ),
    ] {
        for round in 0..6_u64 {
            until_ok(|| ctl(&socket, &[command, device]))?;
            there(&mut guest, driver)?;
            guest.run(speaks)?;
            std::thread::sleep(Duration::from_millis(round * 7));
            // Some of it is in the rings of a guest that stands still, too.
            let paused = round % 3 == 2;
            let remove = || ctl(&socket, &["remove-device", id, "--force"]);
            if paused {
                ctl(&socket, &["pause"])?;
                std::thread::scope(|scope| {
                    let removed = scope.spawn(remove);
                    let asked = began(&socket, id, "remove by force");
                    ctl(&socket, &["resume"])?;
                    asked?;
                    removed.join().map_err(|_| "panic")?
                })?;
            } else {
                remove()?;
            }
            away(&mut guest, driver).map_err(|e| format!("{id}, round {round}: {e}"))?;
        }
    }
    guest.ends()
}

fn given_up() -> Verdict {
    let scratch = Scratch::new("given-up-console")?;
    let (socket, late) = (scratch.path("api"), scratch.path("late"));
    let args = ["--api-socket", &socket, "--hotplug-ports", "1"];
    let mut guest = guest(
        &[],
        &scratch,
        &[],
        &[args.as_slice(), &["--restarts", "0"]].concat(),
    )?;
    guest.run("modprobe -a virtio_console; true")?;
    let console = format!("id=more,socket={late},name=late");
    ctl(&socket, &["add-console", &console])?;
    guest.run("until p=$(grep -lx late /sys/class/virtio-ports/*/name); do sleep 0.1; done; p=/dev/$(basename $(dirname $p)); until [ -c $p ]; do sleep 0.1; done; (while [ -c $p ]; do 3<$p true; done) 2>/dev/null & true")?;
    // It is told something all the time, then too.
    kill(&socket, "more")?;
    until_event(&socket, "device.quarantined", "more")?;
    let speaks = "i=0; while [ $i -lt 300 ]; do 3<$p true; i=$((i + 1)); done";
    guest.run(speaks)?;
    guest.is_well("")?;
    // A process that takes over knows nothing of what was in flight long before, nor what came of it.
    ctl(&socket, &["resume-device", "more"])?;
    guest.run(speaks)?;
    guest.run("(while [ -c $p ]; do 3<$p true; done) 2>/dev/null & true")?;
    kill(&socket, "more")?;
    guest.run(speaks)?;
    let info = device(&socket, "more")?.map(|info| info["state"].clone());
    check(info == Some("quarantined".into()), || format!("{info:?}"))?;
    ctl(&socket, &["remove-device", "more", "--timeout", SECONDS])?;
    away(&mut guest, "virtio_console")?;
    guest.ends()
}

/// Waits until an operation on `id` has begun, and returns its number.
fn began(socket: &str, id: &str, what: &str) -> Result<String, String> {
    let mut number = String::new();
    until_ok(|| {
        let told = events(socket)?;
        let event = told.lines().rev().find(|line| {
            line.contains("operation.began")
                && line.contains(&format!("\"{id}\""))
                && line.contains(&format!(": {what}"))
        });
        let event = event.ok_or_else(|| told.clone())?;
        let event: serde_json::Value = serde_json::from_str(event).map_err(|e| e.to_string())?;
        let detail = event["detail"].as_str().and_then(|d| d.split_once(':'));
        number = detail.ok_or_else(|| event.to_string())?.0.to_owned();
        // One that began before has ended since.
        let over = |line: &str| {
            (line.contains("operation.done") || line.contains("operation.failed"))
                && line.contains(&format!("\"{number}:"))
        };
        match told.lines().any(over) {
            true => Err(format!("operation {number} has ended: {told}")),
            false => Ok(event),
        }
    })?;
    Ok(number)
}

/// A client that is on its way.
fn client(socket: &str, args: &[&str]) -> Result<Child, String> {
    Command::new(bin("bulkhead"))
        .args(["ctl", "--socket", socket])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("a client: {e}"))
}

fn hung_up() -> Verdict {
    let scratch = Scratch::new("hung-up")?;
    let socket = scratch.path("api");
    let disk = format!("path={},id=data,queues=1", sparse(&scratch, "data", MIB)?);
    let args = [
        "--api-socket",
        &socket,
        "--hotplug-ports",
        "1",
        "--cpus",
        "1,max=2",
        "--memory",
        "size=384M,max=512M",
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    ctl(&socket, &["add-disk", &disk])?;
    guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done")?;
    for (args, id, what) in [
        (["remove-device", "data"], "data", "remove"),
        (["resize-cpus", "2"], "vcpus", "2 vCPUs"),
        (["resize-memory", "512M"], "memory", "512 MiB"),
    ] {
        // The guest does nothing of it meanwhile.
        ctl(&socket, &["pause"])?;
        let args = [args[0], args[1], "--timeout", SECONDS];
        let mut asks = client(&socket, &args)?;
        let number = began(&socket, id, what);
        let waits = asks.try_wait().is_ok_and(|status| status.is_none());
        let hangs_up = asks.kill().and_then(|()| asks.wait());
        let resumed = ctl(&socket, &["resume"]);
        let number = number?;
        hangs_up.map_err(|e| format!("kill: {e}"))?;
        // What is asked of memory is noted, and answered at once.
        check(waits || id == "memory", || {
            format!("{args:?}: has ended in a paused guest")
        })?;
        resumed?;
        until_ok(|| {
            let told = events(&socket)?;
            let done = format!("\"{number}:");
            let found = told
                .lines()
                .any(|line| line.contains("operation.done") && line.contains(&done));
            found.then_some(().into()).ok_or(told)
        })?;
    }
    check(device(&socket, "data")?.is_none(), || "it stays".into())?;
    guest.run("until [ ! -b /dev/vdc ]; do sleep 0.1; done")?;
    let info = ctl(&socket, &["info"])?;
    check(info["cpus"] == 2, || info.to_string())?;
    check(memory(&socket, "present_bytes")? == 512, || {
        info.to_string()
    })?;
    guest.run("until [ -d /sys/devices/system/cpu/cpu1 ] && [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 410000 ]; do sleep 0.1; done")?;
    guest.ends()
}

fn killed() -> Verdict {
    let scratch = Scratch::new("killed-eject")?;
    let socket = scratch.path("api");
    let disk = format!(
        "path={},id=data,queues=1",
        sparse(&scratch, "data", 8 * MIB)?
    );
    // More deaths than its budget may come of it: then the guest gives up one that is quarantined.
    let args = ["--api-socket", &socket, "--hotplug-ports", "2"];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    let add_and_use = |guest: &mut Shell| {
        until_ok(|| ctl(&socket, &["add-disk", &disk]))?;
        guest.run("until [ -b /dev/vdc ]; do sleep 0.02; done; (while dd if=/dev/vdc of=/dev/null bs=64k iflag=direct status=none; do :; done) 2>/dev/null & true")
    };
    let kill = || -> Result<bool, String> {
        // It may have gone by now, with its process.
        let Ok(pid) = pid_of(&socket, "data") else {
            return Ok(false);
        };
        let killed = sh(&format!("kill -9 {pid} 2>/dev/null && echo killed; true"))?;
        Ok(killed.contains("killed"))
    };
    add_and_use(&mut guest)?;
    ctl(&socket, &["remove-device", "data", "--timeout", SECONDS])?;
    let before = holdings(guest.vmm.pid())?;
    let mut died = 0;
    for round in 0..12_u64 {
        add_and_use(&mut guest)?;
        // Asked while it is paused, so that the first are killed for certain before it answers.
        if round < 3 {
            ctl(&socket, &["pause"])?;
        }
        std::thread::scope(|scope| -> Verdict {
            let removed =
                scope.spawn(|| ctl(&socket, &["remove-device", "data", "--timeout", SECONDS]));
            let asked = match round {
                0..3 => began(&socket, "data", "remove").map(drop),
                _ => {
                    std::thread::sleep(Duration::from_millis(round * 25));
                    Ok(())
                }
            };
            let killed = kill();
            let resumed = match round {
                0 => ctl(&socket, &["resume"]),
                // The next one is there, or nearly.
                1 | 2 => {
                    std::thread::sleep(Duration::from_millis(round * 500 - 400));
                    ctl(&socket, &["resume"])
                }
                _ => Ok(().into()),
            };
            asked?;
            resumed?;
            let killed = killed?;
            died += u32::from(killed);
            let removed = removed.join().map_err(|_| "panic")?;
            removed.map_err(|e| format!("round {round}, killed {killed}: {e}"))?;
            until_gone(&socket, "data")
        })?;
        guest.run("until [ ! -b /dev/vdc ]; do sleep 0.02; done")?;
    }
    check(died >= 3, || format!("only {died} of 12 were killed"))?;
    println!("[{died} of 12 processes were killed while their disk went]");
    settled(guest.vmm.pid(), &before)?;
    guest.is_well("")?;
    add_and_use(&mut guest)?;
    ctl(&socket, &["remove-device", "data", "--timeout", SECONDS])?;
    guest.ends()
}
