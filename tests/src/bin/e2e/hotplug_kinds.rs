//! Hot-plug of what is served by other programs, over and over, in guests that have no hot-plug,
//! and by processes that end at any moment of their own hot-add.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{debian_told, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, nothing_left, patience};

use super::disk::{LIMIT, sparse};
use super::hotplug::{created, device, holdings, settled};
use super::hotplug_beside::events;
use super::hotplug_order::until_ok;
use super::net_modes::tool;
use super::shell::{READER, Shell, guest};
use super::update::Binaries;

const MIB: u64 = 1 << 20;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    let long = Test::long("hotplug");
    vec![
        test(
            "virtiofsd's files, a network by passt and random bytes come and go; a disk does so over and over and leaves nothing",
            || kinds(8),
        ),
        long(
            "a disk comes to a guest and goes a thousand times and leaves nothing",
            || kinds(1000),
        ),
        test(
            "a guest without hot-plug is told so of, and loses its devices by force",
            deaf,
        ),
    ]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "a device process that hangs, lies or falls silent in its own hot-add leaves nothing",
            faults,
        ),
        test(
            "a device process that is killed at any moment of its own hot-add leaves nothing",
            killed,
        ),
        test(
            "a device is removed while its live update is under way, which ends",
            updated,
        ),
    ]
}

fn counter(socket: &str, name: &str) -> Result<u64, String> {
    let info = ctl(socket, &["info"])?;
    let count = info["counters"][name].as_u64();
    count.ok_or_else(|| info.to_string())
}

/// Waits until interrupt routes are as many as they were.
fn routes(socket: &str, wanted: u64) -> Verdict {
    let end = Instant::now() + patience(Duration::from_secs(20));
    loop {
        let now = counter(socket, "msi_gsis")?;
        if now == wanted {
            return Ok(());
        }
        check(Instant::now() < end, || {
            format!("{now} interrupt routes, not {wanted} as before")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn kinds(rounds: u32) -> Verdict {
    let scratch = Scratch::new("kinds")?;
    let share = scratch.path("share");
    sh(&format!("mkdir {share} && echo shared >{share}/file"))?;
    let (api, fs) = (scratch.path("api"), scratch.path("fs"));
    let mut command = Command::new(tool("VIRTIOFSD")?);
    command.args(["--socket-path", &fs, "--shared-dir", &share]);
    command.args(["--sandbox", "none", "--seccomp", "none"]);
    let virtiofsd = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while !std::path::Path::new(&fs).exists() {
        check(Instant::now() < end, || virtiofsd.story("no socket"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let passt = tool("PASST")?;
    let args = [
        "--api-socket",
        &api,
        "--passt",
        &passt,
        "--hotplug-ports",
        "3",
        "--cpus",
        "2",
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    let pid = guest.vmm.pid();

    // A disk, over and over: added, taken by its driver, read, given up.
    let disk = format!("path={},id=data,queues=2", sparse(&scratch, "disk", MIB)?);
    let round = |guest: &mut Shell| -> Verdict {
        ctl(&api, &["add-disk", &disk])?;
        guest.run("until [ -b /dev/vdc ]; do sleep 0.02; done; dd if=/dev/vdc of=/dev/null bs=64k iflag=direct status=none")?;
        let removed = ctl(&api, &["remove-device", "data", "--timeout", "300"]);
        removed.map(drop)
    };
    round(&mut guest)?;
    let (before, gsis) = (holdings(pid)?, counter(&api, "msi_gsis")?);
    let slots = counter(&api, "memory_slots")?;
    for _ in 0..rounds {
        round(&mut guest)?;
    }
    settled(pid, &before)?;
    routes(&api, gsis)?;
    check(counter(&api, "memory_slots")? == slots, || {
        "memory slots".into()
    })?;

    // Files of virtiofsd's, which goes when its only client does.
    ctl(
        &api,
        &[
            "add-vhost-user",
            &format!("socket={fs},kind=fs,tag=home,id=home"),
        ],
    )?;
    check(counter(&api, "msi_gsis")? >= gsis, || "fewer routes".into())?;
    guest.run("modprobe virtiofs; until mount -t virtiofs home /mnt/data 2>/dev/null; do sleep 0.1; done; [ $(cat /mnt/data/file) = shared ] && echo back >/mnt/data/back && umount /mnt/data")?;
    overtaken(&api)?;
    guest.run("! mount -t virtiofs home /mnt/data 2>/dev/null")?;
    let back = sh(&format!("cat {share}/back"))?;
    check(back.trim() == "back", || format!("virtiofsd has {back:?}"))?;

    // A network by a helper, which ends with it.
    ctl(&api, &["add-net", "user,id=out"])?;
    guest.run("until n=$(ls /sys/class/net | grep -v lo) && [ -n \"$n\" ]; do sleep 0.1; done; ip link set $n up; until [ $(cat /sys/class/net/$n/carrier) = 1 ]; do sleep 0.1; done")?;
    ctl(&api, &["remove-device", "out", "--timeout", "300"])?;
    guest.run("until [ -z \"$(ls /sys/class/net | grep -v lo)\" ]; do sleep 0.1; done")?;

    // Random bytes.
    ctl(&api, &["add-rng", "id=dice"])?;
    guest.run("until grep -q virtio_rng /sys/class/misc/hw_random/rng_available; do sleep 0.1; done; [ $(dd if=/dev/hwrng bs=64 count=1 status=none | wc -c) = 64 ]")?;
    ctl(&api, &["remove-device", "dice", "--timeout", "300"])?;

    settled(pid, &before)?;
    routes(&api, gsis)?;
    guest.ends()?;
    drop(virtiofsd);
    Ok(())
}

/// One removal waits for a guest that is paused, another for its turn; one by force ends both.
fn overtaken(api: &str) -> Verdict {
    let told = |words: &str| {
        until_ok(|| {
            let told = events(api)?;
            let mut lines = told.lines();
            let found = lines.any(|line| line.contains("\"home\"") && line.contains(words));
            found.then_some(().into()).ok_or(told.clone())
        })
    };
    let remove = || ctl(api, &["remove-device", "home", "--timeout", "300"]);
    ctl(api, &["pause"])?;
    std::thread::scope(|scope| {
        let first = scope.spawn(remove);
        told(": remove\"")?;
        let second = scope.spawn(remove);
        told(": remove, when its turn comes")?;
        ctl(api, &["remove-device", "home", "--force"])?;
        let (first, second) = (first.join(), second.join());
        for (thread, words) in [
            (first, "device home: is being removed by force"),
            (second, "there is no device home"),
        ] {
            let refused = thread.map_err(|_| "panic".to_owned())?;
            check(
                refused.as_ref().is_err_and(|line| line.contains(words)),
                || format!("no {words:?} in {refused:?}"),
            )?;
        }
        ctl(api, &["resume"]).map(drop)
    })
}

fn deaf() -> Verdict {
    let scratch = Scratch::new("nohotplug")?;
    let api = scratch.path("api");
    let args = ["--api-socket", &api, "--hotplug-ports", "2"];
    let data = format!("path={},id=data", sparse(&scratch, "data", MIB)?);
    let vmm = debian_told(&[], &scratch, "acpiphp.disable=1", READER, &[&data], &args)?;
    let mut guest = Shell::new(vmm)?;
    let late = format!("path={},id=late", sparse(&scratch, "late", MIB)?);
    ctl(&api, &["add-disk", &late])?;

    let kept = ctl(&api, &["remove-device", "data", "--timeout", "1"]);
    check(
        kept.as_ref().is_err_and(|line| {
            line.contains("device data: not removed in 1000 ms") && line.contains("hot-plug")
        }),
        || format!("{kept:?}"),
    )?;
    check(device(&api, "data")?.is_some(), || "it is gone".into())?;
    guest.run("dd if=/dev/vdb of=/dev/null bs=64k iflag=direct status=none")?;

    // The new one is there, and nobody has taken it: an event says so.
    let end = Instant::now() + patience(LIMIT);
    loop {
        let told = events(&api)?;
        let unused = |line: &&str| line.contains("device.unused") && line.contains("\"late\"");
        if told
            .lines()
            .find(unused)
            .is_some_and(|line| line.contains("no PCI hot-plug"))
        {
            break;
        }
        check(Instant::now() < end, || format!("no word of it: {told}"))?;
        std::thread::sleep(Duration::from_millis(200));
    }
    guest.run("[ ! -b /dev/vdd ]")?;
    ctl(&api, &["remove-device", "late", "--force"])?;
    ctl(&api, &["remove-device", "data", "--force"])?;
    check(device(&api, "data")?.is_none(), || "it stays".into())?;
    guest.run("echo alive")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}

fn faults() -> Verdict {
    for fault in ["exit", "hang", "version", "kind", "rings"] {
        faulty(fault).map_err(|e| format!("{fault}: {e}"))?;
    }
    nothing_left(Duration::from_secs(20))
}

/// A disk whose binary has this fault.
fn faulty(fault: &str) -> Verdict {
    let scratch = Scratch::new("hotplug-fault")?;
    let binaries = Binaries::new(&scratch, "libexec")?;
    for name in ["bulkhead-launcher", "bulkhead-net"] {
        binaries.good(name, name)?;
    }
    let place = binaries.fault(fault)?;
    sh(&format!("mv {place} {}/bulkhead-blk", binaries.path))?;
    let (vmm, api) = created(&scratch, Some(&binaries.path), 1)?;
    let disk = format!("path={},id=data,queues=1", sparse(&scratch, "disk", MIB)?);
    let before = holdings(vmm.pid())?;
    let failed = ctl(&api, &["add-disk", &disk]);
    check(
        failed
            .as_ref()
            .is_err_and(|line| line.contains("data") && line.trim().lines().count() == 1),
        || format!("{failed:?}"),
    )?;
    check(device(&api, "data")?.is_none(), || "it is there".into())?;
    settled(vmm.pid(), &before)?;
    ctl(&api, &["shutdown", "--force"])?;
    drop(vmm);
    Ok(())
}

fn updated() -> Verdict {
    let scratch = Scratch::new("hotplug-updated")?;
    let binaries = Binaries::new(&scratch, "libexec")?;
    for name in ["bulkhead-launcher", "bulkhead-net", "bulkhead-blk"] {
        binaries.good(name, name)?;
    }
    let deaf = binaries.fault("hang")?;
    let (vmm, api) = created(&scratch, Some(&binaries.path), 1)?;
    let disk = format!("path={},id=data,queues=1", sparse(&scratch, "disk", MIB)?);
    let before = holdings(vmm.pid())?;
    let launcher = ctl(&api, &["info"])?["launcher_pid"].to_string();
    for force in [false, true] {
        ctl(&api, &["add-disk", &disk])?;
        std::thread::scope(|scope| -> Verdict {
            let update = scope.spawn(|| {
                ctl(
                    &api,
                    &[
                        "update-device",
                        "data",
                        "--binary",
                        &deaf,
                        "--timeout",
                        "120",
                    ],
                )
            });
            let end = Instant::now() + patience(LIMIT);
            while sh(&format!("pgrep -c -P {launcher} || true"))?.trim() != "2" {
                check(Instant::now() < end && !update.is_finished(), || {
                    vmm.story("no second process")
                })?;
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut remove = vec!["remove-device", "data"];
            if force {
                remove.push("--force");
            }
            ctl(&api, &remove)?;
            let updated = update.join().map_err(|_| "panic")?;
            check(
                updated.as_ref().is_err_and(|line| line.contains("removed")),
                || format!("{updated:?}"),
            )
        })?;
        check(device(&api, "data")?.is_none(), || "it is there".into())?;
        settled(vmm.pid(), &before)?;
    }
    ctl(&api, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn killed() -> Verdict {
    let scratch = Scratch::new("hotplug-killed")?;
    let (vmm, api) = created(&scratch, None, 2)?;
    let pid = vmm.pid();
    let disk = format!("path={},id=data,queues=1", sparse(&scratch, "disk", MIB)?);
    ctl(&api, &["add-disk", &disk])?;
    ctl(&api, &["remove-device", "data"])?;
    let before = holdings(pid)?;
    let launcher = ctl(&api, &["info"])?["launcher_pid"].to_string();
    let mut died = 0;
    for step in 0..24u64 {
        let mut client = Command::new(bin("bulkhead"))
            .args(["ctl", "--socket", &api, "add-disk", &disk])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        // From the moment that it is there, a little later each time.
        let end = Instant::now() + patience(Duration::from_secs(10));
        let mut child = String::new();
        while child.trim().is_empty() && Instant::now() < end {
            child = sh(&format!("pgrep -P {launcher} || true"))?;
            if client.try_wait().map_err(|e| e.to_string())?.is_some() {
                break;
            }
        }
        std::thread::sleep(Duration::from_micros(step * 400));
        let killed = sh(&format!(
            "for p in $(pgrep -P {launcher} || true); do kill -9 $p && echo killed; done; true"
        ))?;
        if killed.contains("killed") {
            died += 1;
        }
        let status = client.wait().map_err(|e| e.to_string())?;
        let there = device(&api, "data")?.is_some();
        // Too late to fail: then another process takes its place.
        check(there == status.success(), || {
            format!("the client was told {status}, and the device is there: {there}")
        })?;
        if there {
            ctl(&api, &["remove-device", "data"])?;
        }
    }
    check(died > 12, || format!("only {died} of 24 were killed"))?;
    settled(pid, &before)?;
    ctl(&api, &["add-disk", &disk])?;
    ctl(&api, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
