//! Memory that comes and goes: a guest grows, uses it, shrinks; what is unplugged costs the host
//! nothing; the process that asks for it may die at any time.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::hotplug_order::refused;
use super::net_modes::tool;
use super::shell::{READER, Shell};

const MIB: u64 = 1 << 20;
/// What the guest starts with, and what it may have.
const BASE: u64 = 384;
const MAX: u64 = BASE + 1024;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "a guest's memory grows and shrinks under load, and its process is killed meanwhile",
            in_a_guest,
        ),
        test(
            "memory does not grow beside a back-end that cannot be told of it, which is named, and shrinks without a word to it",
            deaf,
        ),
        test(
            "vhost-net reaches memory that came while it carried a flow",
            by_vhost_net,
        ),
    ]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![Test {
        subject: "hotplug",
        name: "sizes of memory that cannot be are refused, and a process of it that dies is replaced",
        long: false,
        run: without_a_guest,
    }]
}

/// Memory slots that KVM has.
pub fn memory_slots(socket: &str) -> Result<u64, String> {
    let info = ctl(socket, &["info"])?;
    let slots = info["counters"]["memory_slots"].as_u64();
    slots.ok_or_else(|| info.to_string())
}

/// `ctl info`'s word on memory, in MiB.
pub fn memory(socket: &str, field: &str) -> Result<u64, String> {
    let info = ctl(socket, &["info"])?;
    let bytes = info["memory"][field].as_u64();
    bytes
        .map(|bytes| bytes / MIB)
        .ok_or_else(|| info.to_string())
}

fn resize(socket: &str, mib: u64) -> Result<serde_json::Value, String> {
    ctl(
        socket,
        &["resize-memory", &format!("{mib}M"), "--timeout", "600"],
    )
}

/// Waits until the guest has so much.
pub fn reaches(socket: &str, mib: u64, vmm: &Vmm) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let present = memory(socket, "present_bytes")?;
        if present == mib {
            return Ok(());
        }
        check(Instant::now() < end, || {
            let events = events(socket).unwrap_or_default();
            vmm.story(&format!("{present} MiB, not {mib}: {events}"))
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn events(socket: &str) -> Result<String, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn pid_of(socket: &str, id: &str) -> Result<i64, String> {
    let found = device(socket, id)?;
    let pid = found.as_ref().and_then(|d| d["pid"].as_i64());
    pid.ok_or_else(|| format!("no {id}: {found:?}"))
}

/// Kills the memory's process, and waits for another one.
fn kill_process(socket: &str) -> Verdict {
    let pid = pid_of(socket, "memory")?;
    sh(&format!("kill -9 {pid}"))?;
    let end = Instant::now() + patience(LIMIT);
    // Between the two there is none.
    while pid_of(socket, "memory").map_or(true, |now| now == pid || now <= 0) {
        check(Instant::now() < end, || "no other process comes".to_owned())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Pages that the host holds for memory that was plugged, in KiB: of the VMM's memory files that
/// are not the one of the start.
fn held(vmm: &Vmm) -> Result<u64, String> {
    let pid = vmm.pid();
    let base = BASE * MIB;
    let sum = sh(&format!(
        "sum=0; for fd in /proc/{pid}/fd/*; do
           case $(readlink $fd) in '/memfd:guest-ram'*) ;; *) continue ;; esac
           read -r size blocks < <(stat -L -c '%s %b' $fd)
           [ $size = {base} ] || sum=$((sum + blocks / 2))
         done; echo $sum"
    ))?;
    sum.trim().parse().map_err(|e| format!("{e}: {sum}"))
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("hotplug-memory")?;
    let disk = scratch.disk("data", (64 * MIB) as usize, 5)?;
    let sum = sh(&format!("sha256sum <{disk}"))?;
    let sum = sum.split_whitespace().next().unwrap_or_default().to_owned();
    let socket = scratch.path("api");
    let data = format!("path={disk},id=data");
    let size = format!("size={BASE}M,max={MAX}M");
    let args = ["--api-socket", &socket, "--memory", &size];
    let vmm = debian(&scratch, READER, &[data.as_str()], &args)?;
    let mut guest = Shell::new(vmm)?;
    check(memory(&socket, "present_bytes")? == BASE, || {
        "at first".into()
    })?;
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks; mount -o remount,size=90% /dev/shm; [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -lt 400000 ]")?;
    // Written before, read after: nothing that was there is disturbed.
    guest.run("dd if=/dev/urandom of=/dev/shm/old bs=1M count=40 status=none; sha256sum /dev/shm/old >/tmp/old")?;

    let at_first = memory_slots(&socket)?;

    // Grow, with the process killed in the middle of it.
    let asked = resize(&socket, MAX)?;
    check(asked["requested_bytes"] == MAX * MIB, || asked.to_string())?;
    kill_process(&socket)?;
    reaches(&socket, MAX, &guest.vmm)?;
    guest.run("until [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 1300000 ]; do sleep 0.2; done; mount -o remount,size=90% /dev/shm; sha256sum -c --status /tmp/old")?;
    // More than there was, and what the disk's process writes lies there, too.
    guest.run(&format!(
        "for n in 1 2 3 4 5 6 7; do dd if=/dev/vdb of=/dev/shm/$n bs=1M iflag=direct status=none || exit 1; done; cat /dev/shm/[1-7] >/dev/null; [ $(sha256sum </dev/shm/7 | cut -c1-64) = {sum} ] && cmp /dev/shm/1 /dev/shm/6"
    ))?;
    let full = held(&guest.vmm)?;
    check(full > 300 * 1024, || format!("{full} KiB are held"))?;
    let output = bulkhead(&["audit", "--api-socket", &socket])?;
    check(output.status.success(), || {
        String::from_utf8_lossy(&output.stdout).into_owned()
    })?;

    refused(&resize(&socket, MAX + 2), &format!("at most {MAX} MiB"))?;
    refused(&resize(&socket, BASE - 2), "at least")?;
    refused(&resize(&socket, BASE + 1), "blocks of 2 MiB")?;
    refused(&ctl(&socket, &["remove-device", "memory"]), "resize-memory")?;

    // Shrink, and again a process that dies; the host has its pages back.
    guest.run("rm /dev/shm/[1-7]; sync; echo 3 >/proc/sys/vm/drop_caches")?;
    resize(&socket, BASE)?;
    kill_process(&socket)?;
    reaches(&socket, BASE, &guest.vmm)?;
    let left = held(&guest.vmm)?;
    check(left == 0, || format!("{left} KiB of {full} are still held"))?;
    let now = memory_slots(&socket)?;
    check(now == at_first, || {
        format!("{now} memory slots, {at_first} before")
    })?;
    guest.run("sha256sum -c --status /tmp/old; [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -lt 400000 ]")?;

    // Half of it again, over the same places.
    resize(&socket, BASE + 512)?;
    reaches(&socket, BASE + 512, &guest.vmm)?;
    guest.run(&format!("for n in 1 2 3 4 5 6; do cat /dev/vdb >/dev/shm/$n || exit 1; done; [ $(sha256sum </dev/shm/6 | cut -c1-64) = {sum} ]; rm /dev/shm/[1-6]"))?;
    let told = events(&socket)?;
    for kind in ["memory.resized", "operation.done", "device.restarted"] {
        check(told.contains(kind), || format!("no {kind} in {told}"))?;
    }
    guest.is_well("virtio_mem.*(error|fail)")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}

/// The guest's kernel takes its buffers from above 4 GiB first, where what has come lies.
fn by_vhost_net() -> Verdict {
    let scratch = Scratch::new("hotplug-vhost")?;
    let network = Namespace::new("memory")?;
    network.tap("hot0", "10.7.0.1/24", "user root")?;
    let socket = scratch.path("api");
    let size = format!("size={BASE}M,max={MAX}M");
    let args = ["--api-socket", &socket, "--memory", &size];
    let net = ["--net", "tap=hot0,id=lan,backend=vhost-net"];
    let args: Vec<&str> = args.into_iter().chain(net).collect();
    let mut guest = Shell::new(network.debian(&scratch, READER, &args)?)?;
    let _server = network.spawn("iperf3 -s")?;
    guest.run("echo online >/sys/devices/system/memory/auto_online_blocks; n=$(ls /sys/class/net | grep -v lo); ip addr add 10.7.0.2/24 dev $n && ip link set $n up && ping -q -c 1 -w 60 10.7.0.1 >/dev/null")?;
    guest.run("iperf3 -c 10.7.0.1 --bidir -t 3600 >/tmp/flow 2>&1 & until read -r frames </sys/class/net/$n/statistics/rx_packets && [ $frames -gt 2000 ]; do sleep 0.1; done")?;
    resize(&socket, MAX)?;
    reaches(&socket, MAX, &guest.vmm)?;
    // The flow goes on, and another one, all of whose buffers are new.
    guest.run("kill -0 $! && [ $(awk '/Normal/ { n = 1 } n && /present/ { print $2; exit }' /proc/zoneinfo) -gt 200000 ] && before=$(cat /sys/class/net/$n/statistics/rx_packets) && until [ $(cat /sys/class/net/$n/statistics/rx_packets) -gt $((before + 2000)) ]; do sleep 0.1; done; kill $!; wait $!; sleep 1; iperf3 -c 10.7.0.1 -t 2 >/dev/null && iperf3 -c 10.7.0.1 -R -t 2 >/dev/null && ping -q -c 20 -i 0.01 -s 1400 -w 60 10.7.0.1 >/dev/null")?;
    guest.is_well("virtio_mem.*(error|fail)")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}

/// passt takes a whole memory table and no single region: it is not told of memory that comes,
/// and is not disturbed by memory that goes.
fn deaf() -> Verdict {
    let scratch = Scratch::new("hotplug-deaf")?;
    let socket = scratch.path("api");
    let passt = tool("PASST")?;
    let args = [
        "--memory",
        "size=384M,max=640M",
        "--hotplug-ports",
        "1",
        "--passt",
        &passt,
        "--api-socket",
        &socket,
    ];
    let mut guest = Shell::new(debian(&scratch, READER, &[] as &[&str], &args)?)?;
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    let at_first = memory_slots(&socket)?;
    resize(&socket, 512)?;
    reaches(&socket, 512, &guest.vmm)?;
    ctl(&socket, &["add-net", "user,id=user0"])?;
    guest.run("until n=$(ls /sys/class/net | grep -v lo) && ip link set $n up && [ $(cat /sys/class/net/$n/carrier) = 1 ]; do sleep 0.1; done; cat /sys/class/net/$n/carrier_changes >/tmp/before")?;
    let slots = memory_slots(&socket)?;
    resize(&socket, BASE)?;
    reaches(&socket, BASE, &guest.vmm)?;
    let now = memory_slots(&socket)?;
    check(now == slots, || format!("{now} slots, {slots} before"))?;
    let left = held(&guest.vmm)?;
    check(left == 0, || format!("{left} KiB are still held"))?;
    refused(
        &resize(&socket, 512),
        "device user0: its back-end cannot be told",
    )?;
    check(memory(&socket, "present_bytes")? == BASE, || {
        "it grew".into()
    })?;
    guest.run("cmp /tmp/before /sys/class/net/$n/carrier_changes")?;
    let told = events(&socket)?;
    check(!told.contains("disconnected"), || told)?;
    // Without it, as before.
    ctl(&socket, &["remove-device", "user0", "--timeout", "300"])?;
    resize(&socket, 512)?;
    reaches(&socket, 512, &guest.vmm)?;
    resize(&socket, BASE)?;
    reaches(&socket, BASE, &guest.vmm)?;
    let now = memory_slots(&socket)?;
    check(now == at_first, || {
        format!("{now} slots, {at_first} before")
    })?;
    guest.is_well("virtio_mem.*(error|fail)")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("hotplug-nomemory")?;
    for (size, max) in [("256M", "0"), ("size=256M,max=512M", "512")] {
        let socket = scratch.path(&format!("api{max}"));
        let mut command = Command::new(bin("bulkhead"));
        command.args(["serve", "--api-socket", &socket]);
        let vmm = Vmm::spawn(command)?;
        let end = Instant::now() + LIMIT;
        while ctl(&socket, &["info"]).is_err() {
            check(Instant::now() < end, || vmm.story("no API"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let kernel = guest_file("vmlinux");
        let create = |size: &str| {
            ctl(
                &socket,
                &[
                    "create", "--kernel", &kernel, "--serial", "none", "--memory", size,
                ],
            )
        };
        refused(&create("size=256M,max=257M"), "multiple of 128 MiB")?;
        refused(&create("size=256M,max=100M"), "more than the size")?;
        create(size)?;
        if max == "0" {
            check(ctl(&socket, &["info"])?["memory"].is_null(), || {
                "memory".into()
            })?;
            refused(&resize(&socket, 512), "max=SIZE")?;
        } else {
            check(memory(&socket, "max_bytes")? == 512, || "max".into())?;
            let asked = ctl(&socket, &["resize-memory", "512M", "--timeout", "1"])?;
            check(asked["present_bytes"] == 256 * MIB, || asked.to_string())?;
            kill_process(&socket)?;
            // Asked once more of the new one.
            resize(&socket, 384)?;
            ctl(&socket, &["resize-memory", "512M", "--timeout", "1"])?;
            let end = Instant::now() + LIMIT;
            while !events(&socket)?.contains("memory.short") {
                check(Instant::now() < end, || events(&socket).unwrap_or_default())?;
                std::thread::sleep(Duration::from_millis(50));
            }
            check(events(&socket)?.contains("boot it"), || "why".into())?;
            while device(&socket, "memory")?.is_none_or(|d| d["state"] != "ready") {
                check(Instant::now() < end, || events(&socket).unwrap_or_default())?;
                std::thread::sleep(Duration::from_millis(50));
            }
            let output = bulkhead(&["audit", "--api-socket", &socket])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            check(
                output.status.success() && text.contains("bulkhead-mem"),
                || text,
            )?;
            // What is under way when the machine stops is said to have failed.
            let mut follow = Command::new(bin("bulkhead"));
            follow.args(["ctl", "--socket", &socket, "--json", "events", "--follow"]);
            let mut follower = Vmm::spawn(follow)?;
            follower.wait_for("machine.created", LIMIT)?;
            ctl(&socket, &["resize-memory", "384M", "--timeout", "300"])?;
            ctl(&socket, &["shutdown", "--force"])?;
            follower.wait_for("the machine stopped", LIMIT)?;
            follower.wait(LIMIT)?;
            drop(vmm);
            continue;
        }
        ctl(&socket, &["shutdown", "--force"])?;
        drop(vmm);
    }
    nothing_left(Duration::from_secs(20))
}
