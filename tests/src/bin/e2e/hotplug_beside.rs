//! Hot-plug while something else is going on: a flow, a restart of another device's process, a
//! pause, a client that vanishes, a guest that does not answer, `stress-ng`.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl};

use super::disk::{LIMIT, sparse};
use super::hotplug::device;
use super::shell::guest;

const MIB: u64 = 1 << 20;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![
        test(
            "devices come beside a flow, a restart, a pause and a client that vanishes",
            beside,
        ),
        test(
            "vCPUs and memory come and go under stress-ng; a guest that does not answer is said so",
            stressed,
        ),
    ]
}

/// Waits until a tap carried something more, both ways.
fn flows(network: &Namespace, tap: &str, vmm: &Vmm, when: &str) -> Verdict {
    let carried = || -> Result<[u64; 2], String> {
        let text = network.sh(&format!("ip -j -s link show {tap}"))?;
        let link: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let of = |way: &str| link[0]["stats64"][way]["bytes"].as_u64().unwrap_or(0);
        Ok([of("rx"), of("tx")])
    };
    let ([rx, tx], end) = (carried()?, Instant::now() + LIMIT);
    loop {
        let now = carried()?;
        if now[0] > rx + MIB && now[1] > tx + MIB {
            return Ok(());
        }
        check(Instant::now() < end, || {
            vmm.story(&format!("nothing flows {when}"))
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn events(socket: &str) -> Result<String, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn beside() -> Verdict {
    let scratch = Scratch::new("beside")?;
    let network = Namespace::new("beside")?;
    network.tap("tap0", "10.6.0.1/24", "")?;
    network.tap("hot0", "10.7.0.1/24", "user root")?;
    let server = network.spawn("iperf3 -s -1")?;
    let disk = |name: &str| -> Result<String, String> {
        Ok(format!(
            "path={},id={name}",
            sparse(&scratch, name, 16 * MIB)?
        ))
    };
    let (first, one, two, three) = (disk("first")?, disk("one")?, disk("two")?, disk("three")?);
    let socket = scratch.path("api");
    let enter = network.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let args = [
        "--net",
        "tap=tap0,id=net",
        "--api-socket",
        &socket,
        "--cpus",
        "2",
        "--hotplug-ports",
        "6",
    ];
    let mut guest = guest(&by, &scratch, &[&first], &args)?;
    guest.run("ip link set eth0 up; ip addr add 10.6.0.2/24 dev eth0; iperf3 -c 10.6.0.1 --bidir -t 3600 >/tmp/client 2>&1 & true")?;
    flows(&network, "tap0", &guest.vmm, "at first")?;

    // A second network device, beside the first one's flow.
    ctl(&socket, &["add-net", "tap=hot0,id=lan"])?;
    guest.run("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done; ip link set eth1 up; ip addr add 10.7.0.2/24 dev eth1; ping -c 2 -w 60 10.7.0.1 >/dev/null")?;
    flows(&network, "tap0", &guest.vmm, "beside the second device")?;
    // It goes while frames come and go on it.
    let pings = network.spawn("ping -q -i 0.01 10.7.0.2")?;
    guest.run(
        "(while ping -q -i 0.01 -c 50 -w 60 10.7.0.1; do :; done) >/dev/null 2>&1 & sleep 0.5",
    )?;
    ctl(&socket, &["remove-device", "lan", "--timeout", "300"])?;
    guest.run("until [ ! -e /sys/class/net/eth1 ]; do sleep 0.1; done")?;
    drop(pings);
    flows(
        &network,
        "tap0",
        &guest.vmm,
        "when the second device has gone",
    )?;

    // Partitioned, in one port; its content is there in another one.
    let new_disk = "new() { until n=$(ls /sys/block | grep -E '^vd[d-z]$' | head -1) && [ -n \"$n\" ]; do sleep 0.1; done; until [ -b /dev/$n ]; do sleep 0.1; done; }; gone() { until ! ls /sys/block | grep -qE '^vd[d-z]$'; do sleep 0.1; done; }";
    guest.run(new_disk)?;
    ctl(&socket, &["add-disk", &one, "--port", "hp5"])?;
    guest.run("new; printf 'label: dos\\n,,83\\n' | sfdisk -q /dev/$n && until [ -b /dev/${n}1 ]; do sleep 0.1; done; mkfs.ext4 -q /dev/${n}1 && mount /dev/${n}1 /mnt/data && seq 100000 >/mnt/data/f && umount /mnt/data")?;
    ctl(&socket, &["remove-device", "one", "--timeout", "300"])?;
    guest.run("gone")?;

    // While the processes of two others are being replaced.
    for id in ["net", "first"] {
        let pid = device(&socket, id)?
            .and_then(|d| d["pid"].as_i64())
            .ok_or("no pid")?;
        sh(&format!("kill -9 {pid}"))?;
    }
    ctl(&socket, &["add-disk", &one, "--port", "hp6"])?;
    guest.run("new; mount -o ro /dev/${n}1 /mnt/data && seq 100000 | cmp - /mnt/data/f && umount /mnt/data")?;
    guest.run("dd if=/dev/vdb of=/dev/null bs=64k count=16 iflag=direct status=none")?;
    flows(&network, "tap0", &guest.vmm, "after its process was killed")?;
    ctl(&socket, &["remove-device", "one", "--timeout", "300"])?;
    guest.run("gone")?;

    // A guest that is paused sees it when it goes on.
    ctl(&socket, &["pause"])?;
    ctl(&socket, &["add-disk", &two])?;
    ctl(&socket, &["resume"])?;
    guest.run("new; dd if=/dev/$n of=/dev/null bs=64k count=16 iflag=direct status=none")?;
    ctl(&socket, &["remove-device", "two", "--timeout", "300"])?;
    guest.run("gone")?;

    // Its process dies before the guest's driver has found it, or while it does.
    for pause in [0, 100] {
        ctl(&socket, &["add-disk", &two])?;
        std::thread::sleep(Duration::from_millis(pause));
        let pid = device(&socket, "two")?
            .and_then(|d| d["pid"].as_i64())
            .ok_or("no pid")?;
        sh(&format!("kill -9 {pid}"))?;
        guest.run("new; dd if=/dev/$n of=/dev/null bs=64k count=16 iflag=direct status=none")?;
        ctl(&socket, &["remove-device", "two", "--timeout", "300"])?;
        guest.run("gone")?;
    }

    // Clients that vanish, each a moment later: what has begun ends, and an event says how.
    for pause in [0, 2, 5, 10, 20] {
        let mut client = Command::new(bin("bulkhead"))
            .args(["ctl", "--socket", &socket, "add-disk", &three])
            .spawn()
            .map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_millis(pause));
        let _ = client.kill();
        let _ = client.wait();
        let end = Instant::now() + LIMIT;
        loop {
            let told = events(&socket)?;
            let of = |kind: &str| {
                let lines = told.lines();
                lines
                    .filter(|l| l.contains(kind) && l.contains("\"three\""))
                    .count()
            };
            if of("operation.began") == of("operation.done") + of("operation.failed") {
                break;
            }
            check(Instant::now() < end, || format!("no end of it: {told}"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        if device(&socket, "three")?.is_some() {
            ctl(&socket, &["remove-device", "three", "--timeout", "300"])?;
        }
    }
    guest.run("gone")?;
    flows(&network, "tap0", &guest.vmm, "at last")?;
    guest.is_well("I/O error")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)?;
    drop(server);
    Ok(())
}

fn stressed() -> Verdict {
    let scratch = Scratch::new("stressed")?;
    let socket = scratch.path("api");
    let args = [
        "--api-socket",
        &socket,
        "--cpus",
        "1,max=3",
        "--hotplug-ports",
        "1",
        "--memory",
        "size=384M,max=512M",
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run("cd /tmp; stress-ng --quiet --cpu 2 --switch 2 --vm 1 --vm-bytes 32M --timeout 3600 & sleep 1; kill -0 $!")?;
    // Memory.
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    let total = "awk '/MemTotal/ { print $2 }' /proc/meminfo";
    for (size, present) in [("512M", "-gt 410000"), ("384M", "-lt 380000")] {
        ctl(&socket, &["resize-memory", size, "--timeout", "600"])?;
        guest.run(&format!(
            "until [ $({total}) {present} ]; do sleep 0.2; done"
        ))?;
    }
    for (count, online) in [("3", 3), ("1", 1), ("2", 2)] {
        ctl(&socket, &["resize-cpus", count, "--timeout", "300"])?;
        guest.run(&format!(
            "until for f in /sys/devices/system/cpu/cpu[1-9]/online; do [ ! -e $f ] || [ $(cat $f) = 1 ] || echo 1 >$f; done; [ $(nproc) = {online} ]; do sleep 0.1; done"
        ))?;
    }
    guest.run("kill -0 %1")?;
    guest.is_well("")?;
    // A guest that stands still does not answer: that is said, and nothing is lost.
    let disk = format!("path={},id=late", sparse(&scratch, "late", 8 * MIB)?);
    ctl(&socket, &["add-disk", &disk])?;
    guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done")?;
    ctl(&socket, &["pause"])?;
    let late = ctl(&socket, &["remove-device", "late", "--timeout", "1"]);
    check(
        late.as_ref().is_err_and(|line| line.contains("paused")),
        || format!("{late:?}"),
    )?;
    check(device(&socket, "late")?.is_some(), || "it is gone".into())?;
    ctl(&socket, &["resume"])?;
    // It may answer now, or be asked again.
    let end = Instant::now() + LIMIT;
    while device(&socket, "late")?.is_some() {
        check(Instant::now() < end, || "it stays".into())?;
        let _ = ctl(&socket, &["remove-device", "late", "--timeout", "60"]);
    }
    guest.run("until [ ! -b /dev/vdc ]; do sleep 0.1; done; kill %1")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}
