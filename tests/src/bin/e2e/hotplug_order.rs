//! The order of hot-plug: what was pulled out is let go of before something else takes its place,
//! requests on one device take turns, a guest ejects when it likes, and a full bus.

use std::time::{Duration, Instant};

use bulkhead_tests::host::{debian_by, debian_told, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, bulkhead, ctl, nothing_left, patience};

use super::disk::{LIMIT, sparse};
use super::hotplug::{device, holdings, settled};
use super::hotplug_beside::events;
use super::mapped::Mapped;
use super::shell::{READER, Shell, guest};

const MIB: u64 = 1 << 20;
/// Words of the guest: `has SECTORS` waits for the disk of this size, which is `$n` then; `lacks
/// SECTORS` waits until there is none; `reads` reads it.
const WORDS: &str = "has() { until n=$(grep -lx $1 /sys/block/vd*/size) && n=${n#/sys/block/} && n=${n%/size} && [ -b /dev/$n ]; do sleep 0.1; done; }; lacks() { while grep -qx $1 /sys/block/vd*/size; do sleep 0.1; done; }; reads() { dd if=/dev/$n of=/dev/null bs=64k count=16 iflag=direct status=none; }";
/// Disks that the guest has from the start.
const OWN_DISKS: u32 = 2;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "what was pulled out is let go of first, requests take turns, a guest ejects when it likes",
            in_order,
        ),
        test(
            "a disk that is written to goes with its file system mounted, by the guest's leave and by force",
            mounted,
        ),
        test(
            "devices come and go by force at any moment of a guest's boot",
            booting,
        ),
        test(
            "a disk whose storage stands still goes by force, its id is refused until its I/O has ended",
            stuck,
        ),
        test("a guest has 31 devices behind 31 ports", full),
        test(
            "a guest goes to 8 vCPUs and back; one without ACPI is said not to look",
            processors,
        ),
    ]
}

/// What Info says of a port.
pub fn port(socket: &str, name: &str, field: &str) -> Result<serde_json::Value, String> {
    let info = ctl(socket, &["info"])?;
    let ports = info["ports"].as_array().cloned().unwrap_or_default();
    let found = ports.into_iter().find(|port| port["name"] == name);
    found
        .map(|port| port[field].clone())
        .ok_or_else(|| info.to_string())
}

/// Repeats what a guest that has not noticed yet makes fail.
pub fn until_ok(mut what: impl FnMut() -> Result<serde_json::Value, String>) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    loop {
        match what() {
            Ok(_) => return Ok(()),
            Err(why) if Instant::now() > end => return Err(why),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Until the device is no longer in the table.
pub fn until_gone(socket: &str, id: &str) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    while let Some(there) = device(socket, id)? {
        check(Instant::now() < end, || format!("it stays: {there}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// It is an error that says so.
pub fn refused(result: &Result<serde_json::Value, String>, words: &str) -> Verdict {
    check(
        result.as_ref().is_err_and(|line| line.contains(words)),
        || format!("no {words:?} in {result:?}"),
    )
}

/// Each operation that began has ended, and once.
fn ends_once(socket: &str) -> Verdict {
    let told = events(socket)?;
    let count = |kind: &str| told.lines().filter(|line| line.contains(kind)).count();
    check(
        count("operation.began") == count("operation.done") + count("operation.failed"),
        || format!("operations that do not end once: {told}"),
    )
}

fn in_order() -> Verdict {
    let scratch = Scratch::new("order")?;
    let disk = |name: &str, size: u64| -> Result<String, String> {
        Ok(format!(
            "path={},id={name},queues=1",
            sparse(&scratch, name, size * MIB)?
        ))
    };
    let (large, small) = (disk("large", 32)?, disk("small", 8)?);
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket, "--hotplug-ports", "3"];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run(WORDS)?;
    let on = |disk: &str, port: &str| ctl(&socket, &["add-disk", disk, "--port", port]);

    // A guest that is paused cannot let go: another device in the same place would be taken for
    // the one that was there.
    on(&large, "hp2")?;
    guest.run("has 65536; reads")?;
    ctl(&socket, &["pause"])?;
    ctl(&socket, &["remove-device", "large", "--force"])?;
    refused(&on(&small, "hp2"), "port hp2: the guest has not let go")?;
    let shown = bulkhead(&["ctl", "--socket", &socket, "info"])?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    check(shown.contains("hp2 (vacating)"), || shown.clone())?;
    check(port(&socket, "hp2", "vacating")? == true, || "hp2".into())?;
    check(port(&socket, "hp1", "vacating")? == false, || "hp1".into())?;
    ctl(&socket, &["resume"])?;
    until_ok(|| on(&small, "hp2"))?;
    guest.run("lacks 65536; has 16384; reads")?;
    // Elsewhere there is room at once.
    ctl(&socket, &["pause"])?;
    ctl(&socket, &["remove-device", "small", "--force"])?;
    let elsewhere = ctl(&socket, &["add-disk", &large])?;
    check(elsewhere["port"] != "hp2", || elsewhere.to_string())?;
    ctl(&socket, &["resume"])?;
    guest.run("lacks 16384; has 65536; reads")?;

    // Requests on one device take turns, each with a number from the first.
    ctl(&socket, &["pause"])?;
    std::thread::scope(|scope| -> Verdict {
        let removed = scope.spawn(|| ctl(&socket, &["remove-device", "large", "--timeout", "300"]));
        until_ok(|| {
            let told = events(&socket)?;
            let asked = told
                .lines()
                .any(|l| l.contains("large") && l.contains(": remove\""));
            asked.then_some(().into()).ok_or(told)
        })?;
        let late = ctl(&socket, &["remove-device", "large", "--timeout", "1"]);
        refused(
            &late,
            "device large: what is under way has not ended in time",
        )?;
        let added = scope.spawn(|| ctl(&socket, &["add-disk", &large, "--port", "hp3"]));
        until_ok(|| {
            let told = events(&socket)?;
            let waits = told.contains(": add, when its turn comes");
            waits.then_some(().into()).ok_or(told)
        })?;
        ctl(&socket, &["resume"])?;
        let ended = |thread: std::thread::Result<Result<serde_json::Value, String>>| {
            thread.map_err(|_| "panic".to_owned())?.map(drop)
        };
        ended(removed.join())?;
        ended(added.join())
    })?;
    check(port(&socket, "hp3", "device")? == "large", || "hp3".into())?;
    guest.run("has 65536; reads")?;
    ctl(&socket, &["remove-device", "large", "--timeout", "300"])?;
    ends_once(&socket)?;

    // A guest that ejects whatever comes there, over and over: each device goes, whole.
    let slot = port(&socket, "hp1", "pci_address")?;
    let slot = slot.as_str().and_then(|address| address.get(8..10));
    let slot = slot.and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let slot = slot.ok_or("no address of hp1")?;
    guest.run(&format!("(while [ ! -e /tmp/stop ]; do echo 0 >/sys/bus/pci/slots/{slot}/power; done) 2>/dev/null & true"))?;
    let mut at_once = 0;
    for _ in 0..20 {
        // While the last one may not have left the table yet.
        until_ok(|| on(&small, "hp1"))?;
        if device(&socket, "small")?.is_none() {
            at_once += 1;
        }
        until_gone(&socket, "small")?;
    }
    println!("{at_once} of 20 had gone at the next look");
    guest.run("touch /tmp/stop")?;
    until_ok(|| on(&small, "hp1"))?;
    guest.run("has 16384; reads")?;
    ctl(&socket, &["remove-device", "small", "--timeout", "300"])?;
    guest.ends()
}

fn mounted() -> Verdict {
    let scratch = Scratch::new("mounted")?;
    let disk = format!("path={},id=data", sparse(&scratch, "data", 64 * MIB)?);
    let socket = scratch.path("api");
    let args = [
        "--api-socket",
        &socket,
        "--hotplug-ports",
        "2",
        "--cpus",
        "2",
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run(WORDS)?;
    ctl(&socket, &["add-disk", &disk])?;
    guest.run("has 131072; mkfs.ext4 -q /dev/$n && mount /dev/$n /mnt/data && echo kept >/mnt/data/kept && sync; umount /mnt/data")?;
    ctl(&socket, &["remove-device", "data", "--timeout", "300"])?;
    guest.run("lacks 131072")?;
    for (round, how) in [["--timeout", "300"].as_slice(), &["--force"]]
        .iter()
        .enumerate()
    {
        until_ok(|| ctl(&socket, &["add-disk", &disk]))?;
        guest.run("has 131072; e2fsck -fp /dev/$n >/dev/null; [ $? -lt 4 ] && mount /dev/$n /mnt/data && [ $(cat /mnt/data/kept) = kept ]")?;
        guest.run(&format!("(while dd if=/dev/zero of=/mnt/data/f bs=64k count=64 conv=fsync status=none; do :; done; echo WRITER-'{round}'-ENDED) 2>/dev/null & sleep 0.5"))?;
        let mut remove = vec!["remove-device", "data"];
        remove.extend_from_slice(how);
        ctl(&socket, &remove)?;
        guest
            .vmm
            .wait_for(&format!("WRITER-{round}-ENDED"), LIMIT)?;
        guest.run("lacks 131072; umount /mnt/data")?;
    }
    guest.ends()
}

fn stuck() -> Verdict {
    let scratch = Scratch::new("stuck")?;
    let beneath = sparse(&scratch, "beneath", 8 * MIB)?;
    let mapped = Mapped::new(&beneath, 16384)?;
    let disk = format!("path={},id=slow,lock=off,queues=1", mapped.path());
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket, "--hotplug-ports", "2"];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    ctl(&socket, &["add-disk", &disk])?;
    guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done")?;
    mapped.suspend()?;
    guest.run("dd if=/dev/vdc of=/dev/null bs=64k count=1 iflag=direct status=none & until read -r reads rest </sys/block/vdc/inflight && [ $reads = 1 ]; do sleep 0.1; done")?;
    let late = ctl(&socket, &["remove-device", "slow", "--force"]);
    refused(&late, "device slow: it has left the machine, but")?;
    check(device(&socket, "slow")?.is_none(), || "it is there".into())?;
    for again in [
        &["add-disk", disk.as_str()] as &[&str],
        &["remove-device", "slow"],
    ] {
        refused(&ctl(&socket, again), "is the host's storage stuck")?;
    }
    guest.run("echo alive")?;
    mapped.resume()?;
    until_ok(|| ctl(&socket, &["add-disk", &disk]))?;
    ends_once(&socket)?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(guest);
    nothing_left(Duration::from_secs(20))
}

fn booting() -> Verdict {
    let scratch = Scratch::new("booting")?;
    let disk = format!(
        "path={},id=early,queues=1",
        sparse(&scratch, "early", 3 * MIB)?
    );
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket, "--hotplug-ports", "4"];
    let vmm = debian_by(&[], &scratch, READER, &[] as &[&str], &args)?;
    let mut guest = Shell::booting(vmm);
    until_ok(|| ctl(&socket, &["info"]))?;
    let (mut rounds, mut full) = (0_u64, 0);
    while !guest.vmm.output().contains("GUEST-IS-READY") && rounds < 400 {
        match ctl(&socket, &["add-disk", &disk]) {
            Ok(_) => {
                std::thread::sleep(Duration::from_millis(rounds * 37 % 400));
                ctl(&socket, &["remove-device", "early", "--force"])?;
                rounds += 1;
            }
            // A guest that has not come so far cannot let go.
            Err(why) if why.contains("waits for the guest to let go") => {
                full += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(why) => return Err(guest.vmm.story(&why)),
        }
    }
    println!("{rounds} came and went, {full} times there was no port");
    guest.vmm.wait_for("GUEST-IS-READY", LIMIT)?;
    check(rounds > 4, || format!("only {rounds} rounds"))?;
    guest.run(WORDS)?;
    guest.run("lacks 6144")?;
    until_ok(|| ctl(&socket, &["add-disk", &disk]))?;
    guest.run("has 6144; reads")?;
    ctl(&socket, &["remove-device", "early", "--timeout", "300"])?;
    guest.ends()
}

fn full() -> Verdict {
    let scratch = Scratch::new("full")?;
    let socket = scratch.path("api");
    let more = 31 - OWN_DISKS;
    let ports = more.to_string();
    let args = ["--api-socket", &socket, "--hotplug-ports", &ports];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    let before = holdings(guest.vmm.pid())?;
    let disk = |number: u32| -> Result<String, String> {
        let path = sparse(&scratch, &format!("d{number}"), MIB)?;
        Ok(format!("path={path},id=d{number},queues=1"))
    };
    for number in 0..more {
        ctl(&socket, &["add-disk", &disk(number)?])?;
    }
    refused(
        &ctl(&socket, &["add-disk", &disk(more)?]),
        "every root port is taken",
    )?;
    guest.run("until [ $(ls -d /sys/block/vd* | wc -l) = 31 ] && [ $(ls -d /dev/vd? /dev/vda? | wc -l) -ge 31 ]; do sleep 0.2; done; for d in /sys/block/vd*; do dd if=/dev/${d##*/} of=/dev/null bs=64k count=4 iflag=direct status=none || exit 1; done")?;
    let told = sh(&format!(
        "pgrep -c -P $(pgrep -P {} -o) || true",
        guest.vmm.pid()
    ))?;
    check(told.trim() == "31", || {
        format!("{told} processes of devices")
    })?;
    for number in 0..more {
        ctl(
            &socket,
            &["remove-device", &format!("d{number}"), "--timeout", "300"],
        )?;
    }
    guest.run("until [ $(ls -d /sys/block/vd* | wc -l) = 2 ]; do sleep 0.2; done")?;
    settled(guest.vmm.pid(), &before)?;
    guest.ends()
}

fn processors() -> Verdict {
    let scratch = Scratch::new("processors")?;
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket, "--cpus", "1,max=8"];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    for (count, online) in [("8", 8), ("3", 3), ("8", 8), ("1", 1)] {
        ctl(&socket, &["resize-cpus", count, "--timeout", "300"])?;
        guest.run(&format!(
            "until for f in /sys/devices/system/cpu/cpu[1-9]/online; do [ ! -e $f ] || [ $(cat $f) = 1 ] || echo 1 >$f; done; [ $(nproc) = {online} ]; do sleep 0.1; done; taskset -c {} true",
            online - 1
        ))?;
    }
    // One goes by the guest's own will, from the middle: the rest can still be changed.
    ctl(&socket, &["resize-cpus", "4", "--timeout", "300"])?;
    guest.run("for c in 1 2 3; do until [ -e /sys/devices/system/cpu/cpu$c/online ]; do sleep 0.1; done; done; f=$(readlink -f /sys/devices/system/cpu/cpu1/firmware_node); echo 1 >$f/eject; until [ ! -d /sys/devices/system/cpu/cpu1 ]; do sleep 0.1; done")?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(&socket, &["info"])?["cpus"] != 3 {
        check(Instant::now() < end, || "an ejected vCPU stays".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    ctl(&socket, &["pause"])?;
    refused(
        &ctl(&socket, &["resize-cpus", "1", "--timeout", "1"]),
        "3 vCPUs, not 1",
    )?;
    ctl(&socket, &["resume"])?;
    ctl(&socket, &["resize-cpus", "1", "--timeout", "300"])?;
    guest.ends()?;

    // Nobody looks.
    let deaf = Scratch::new("processors-deaf")?;
    let socket = deaf.path("api");
    let args = ["--api-socket", &socket, "--cpus", "1,max=2"];
    let vmm = debian_told(&[], &deaf, "acpi=off", READER, &[] as &[&str], &args)?;
    until_ok(|| ctl(&socket, &["info"]))?;
    let grown = ctl(&socket, &["resize-cpus", "2", "--timeout", "2"]);
    refused(&grown, "1 vCPUs, not 2")?;
    refused(&grown, "ACPI CPU hot-plug")?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    Ok(())
}
