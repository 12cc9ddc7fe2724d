//! Hot-plug when somebody is late: a device process that holds memory and does not end, a guest
//! that gives a vCPU up long after it was asked, or not at all.

use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::{holdings, settled};
use super::hotplug_beside::events;
use super::hotplug_memory::{memory, memory_slots, pid_of, reaches};
use super::hotplug_order::{port, refused, until_gone, until_ok};
use super::mapped::Mapped;
use super::shell::guest;

/// Sectors of the disk whose I/O can be made to stand still.
const SECTORS: u64 = 16384;
/// MiB that the guest starts with, and may have.
const BASE: u64 = 384;
const MAX: u64 = BASE + 256;
/// The guest's registers of hot-plug: from byte 8 on, what ejects the devices behind root ports, a
/// bit for each device number.
const HOTPLUG: u64 = 0xfed0_1000;
/// Brings every vCPU up that there is, until there are so many.
const ALL_ONLINE: &str = "online() { until for f in /sys/devices/system/cpu/cpu[1-9]/online; do [ ! -e $f ] || [ $(cat $f) = 1 ] || echo 1 >$f; done; [ $(nproc) = $1 ]; do sleep 0.1; done; }";

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "memory comes and goes only when a process that no longer answers has ended, with its I/O",
            lost,
        ),
        test(
            "a vCPU that the guest keeps, or gives up late, is no other request's",
            late,
        ),
        test(
            "a disk that the guest ejects under its own driver, with a request in flight, is gone whole",
            torn,
        ),
    ]
}

/// Until the events hold this in one line.
pub fn until_told(socket: &str, words: &[&str], more_than: usize) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let told = events(socket)?;
        let lines = told.lines();
        let found = lines.filter(|line| words.iter().all(|word| line.contains(word)));
        if found.count() > more_than {
            return Ok(());
        }
        check(Instant::now() < end, || format!("no {words:?} in {told}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The disk's process has a request in flight on storage that stands still, and no longer answers.
fn falls_silent(socket: &str, mapped: &Mapped, guest: &mut super::shell::Shell) -> Verdict {
    let pid = pid_of(socket, "slow")?;
    mapped.suspend()?;
    guest.run("(dd if=/dev/vdb of=/dev/null bs=64k count=1 iflag=direct status=none; echo READ-'IT') & until read -r reads rest </sys/block/vdb/inflight && [ $reads = 1 ]; do sleep 0.1; done")?;
    // From the ring to the host's storage, where nothing shows it.
    std::thread::sleep(Duration::from_secs(2));
    sh(&format!("kill -STOP {pid}")).map(drop)
}

fn lost() -> Verdict {
    let scratch = Scratch::new("late-memory")?;
    let beneath = scratch.disk("slow", (SECTORS * 512) as usize, 3)?;
    let mapped = Mapped::new(&beneath, SECTORS)?;
    let slow = format!("path={},id=slow,lock=off,queues=1", mapped.path());
    let socket = scratch.path("api");
    let size = format!("size={BASE}M,max={MAX}M");
    let args = ["--api-socket", &socket, "--memory", &size];
    let mut guest = guest(&[], &scratch, &[slow.as_str()], &args)?;
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks; dd if=/dev/vdb of=/dev/null bs=64k count=1 iflag=direct status=none")?;
    let at_first = memory_slots(&socket)?;
    let refusal = ["memory.refused", "device slow"];

    for (round, wanted) in [MAX, BASE].into_iter().enumerate() {
        let before = memory(&socket, "present_bytes")?;
        falls_silent(&socket, &mapped, &mut guest)?;
        let size = format!("{wanted}M");
        ctl(&socket, &["resize-memory", &size, "--timeout", "600"])?;
        until_told(&socket, &refusal, round)?;
        until_told(&socket, &["device.crashed", "\"slow\"", "deadline"], round)?;
        let now = memory(&socket, "present_bytes")?;
        if wanted == MAX {
            check(now == before, || format!("{now} MiB beside a lost process"))?;
        } else {
            // The last block of a region stays.
            check(now > BASE, || "all is gone beside a lost process".into())?;
            check(memory_slots(&socket)? > at_first, || {
                "slots are gone".into()
            })?;
        }
        mapped.resume()?;
        reaches(&socket, wanted, &guest.vmm)?;
        // Past its budget or not, the disk comes back and the request with it.
        let _ = ctl(&socket, &["resume-device", "slow"]);
        let end = Instant::now() + patience(LIMIT);
        while guest.vmm.output().matches("READ-IT").count() <= round {
            check(Instant::now() < end, || guest.vmm.story("the read is lost"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    check(memory_slots(&socket)? == at_first, || "slots stay".into())?;
    guest.ends()
}

fn late() -> Verdict {
    let scratch = Scratch::new("late-cpus")?;
    let beneath = scratch.disk("slow", (SECTORS * 512) as usize, 3)?;
    let mapped = Mapped::new(&beneath, SECTORS)?;
    let socket = scratch.path("api");
    let args = [
        "--api-socket",
        &socket,
        "--cpus",
        "2,max=3",
        "--hotplug-ports",
        "1",
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run(ALL_ONLINE)?;
    let resize =
        |count: &str, seconds: &str| ctl(&socket, &["resize-cpus", count, "--timeout", seconds]);

    // Linux takes no processor offline whose time it has promised.
    guest.run("for n in 1 2; do chrt -d --sched-runtime 800000000 --sched-period 1000000000 0 sleep 100000 & echo $! >>/tmp/promised; done; sleep 0.5; true")?;
    let kept = resize("1", "300");
    refused(&kept, "2 vCPUs, not 1: the guest says that it keeps some")?;
    guest.run("[ $(cat /sys/devices/system/cpu/online) = 0-1 ] && kill $(cat /tmp/promised)")?;
    // It keeps the promise to the end of a period.
    until_ok(|| resize("1", "300"))?;
    resize("2", "300")?;
    guest.run("online 2")?;

    // Its hot-plug worker waits for a request that does not end, so that what it has seen of a
    // vCPU comes to pass only later.
    let slow = format!("path={},id=slow,lock=off,queues=1", mapped.path());
    ctl(&socket, &["add-disk", &slow])?;
    guest.run(&format!("until n=$(grep -lx {SECTORS} /sys/block/vd*/size); do sleep 0.1; done; n=${{n#/sys/block/}}; n=${{n%/size}}; until [ -b /dev/$n ]; do sleep 0.1; done"))?;
    mapped.suspend()?;
    guest.run(
        "dd if=/dev/$n of=/dev/null bs=64k count=1 iflag=direct status=none & sleep 0.5; true",
    )?;
    std::thread::scope(|scope| -> Verdict {
        let removed = scope.spawn(|| ctl(&socket, &["remove-device", "slow", "--timeout", "500"]));
        // The worker has taken it up when the name is gone.
        let begun = guest.run("until [ ! -e /sys/block/$n/size ]; do sleep 0.1; done");
        let short = resize("1", "3");
        let again = scope.spawn(|| resize("3", "500"));
        std::thread::sleep(Duration::from_secs(2));
        let early = again.is_finished();
        let resumed = mapped.resume();
        begun?;
        refused(&short, "has not answered: it may still let go")?;
        check(!early, || "a vCPU that may still go counts as one".into())?;
        resumed?;
        let removed = removed.join().map_err(|_| "a thread".to_owned())?;
        removed?;
        let again = again.join().map_err(|_| "a thread".to_owned())?;
        again.map(drop)
    })?;
    guest.run("online 3")?;
    until_ok(|| match ctl(&socket, &["info"])? {
        info if info["cpus"] == 3 => Ok(info),
        info => Err(info.to_string()),
    })?;
    let told = events(&socket)?;
    let went = told.lines().filter(|l| l.contains("cpu.removed")).count();
    check(went == 2, || format!("{went} vCPUs went: {told}"))?;
    guest.ends()
}

/// Nothing resets the device: the guest's driver does not know, and its request never ends.
fn torn() -> Verdict {
    let scratch = Scratch::new("torn")?;
    let file = scratch.path("data");
    let socket = scratch.path("api");
    let args = ["--api-socket", &socket, "--hotplug-ports", "3"];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    let before = holdings(guest.vmm.pid())?;
    for round in 1..=3_u64 {
        // Its size names it.
        let sectors = 8192 * round;
        sh(&format!("truncate -s {} {file}", sectors * 512))?;
        let (disk, name) = (
            format!("path={file},id=data,queues=1"),
            format!("hp{round}"),
        );
        ctl(&socket, &["add-disk", &disk, "--port", &name])?;
        // Without a throttle it would have ended by the time of the eject.
        ctl(&socket, &["update-disk", "data", "--bps", "65536:65536"])?;
        let address = port(&socket, &name, "pci_address")?;
        let slot = address.as_str().and_then(|address| address.get(8..10));
        let slot = slot.and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let bit = 1_u32 << slot.ok_or_else(|| address.to_string())?;
        guest.run(&format!("until n=$(grep -lx {sectors} /sys/block/vd*/size); do sleep 0.1; done; n=${{n#/sys/block/}}; n=${{n%/size}}; until [ -b /dev/$n ]; do sleep 0.1; done; dd if=/dev/$n of=/dev/null bs=1M iflag=direct status=none & until read -r reads rest </sys/block/$n/inflight && [ $reads != 0 ]; do sleep 0.1; done; python3 -c 'import mmap, os; mmap.mmap(os.open(\"/dev/mem\", os.O_RDWR), 4096, offset={HOTPLUG:#x})[8:12] = ({bit}).to_bytes(4, \"little\")'"))?;
        until_gone(&socket, "data")?;
        settled(guest.vmm.pid(), &before)?;
    }
    guest.run("echo alive")?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(guest);
    nothing_left(Duration::from_secs(20))
}
