//! A machine begins anew in place: for a client, for the guest itself, with all devices, again and
//! again, from any state.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, debian_told, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, guest_file, nothing_left, patience};

use super::disk::{LIMIT, sparse};
use super::hotplug::{device, holdings, settled};
use super::hotplug_memory::{pid_of, reaches};
use super::net_bad::until_event;
use super::recovery::kill;
use super::rng::refused;
use super::shell::{READER, Shell, guest};

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("reset");
    vec![
        test(
            "a guest with two vCPUs and devices of every kind is reset five times in place, and nothing grows",
            again_and_again,
        ),
        test(
            "a machine is reset while its disk is written to, and while its disk's process is being replaced",
            under_load,
        ),
        test(
            "a paused machine is reset and stays paused; a bzImage is entered again",
            paused,
        ),
        test(
            "a reset boots the kernel that was opened first, and ends a machine whose kernel is none any more",
            spoiled,
        ),
        test(
            "a reset takes devices and vCPUs from a guest that does not let go, and gives memory back",
            lets_go,
        ),
        test(
            "a guest is rebooted by its power button, and one that does not listen by force",
            reboots,
        ),
        test(
            "a guest that resets itself begins anew if so wanted, also after a triple fault, and the API is heard",
            own_resets,
        ),
        test(
            "a machine that runs is deleted: no process, socket or cgroup stays",
            deleted,
        ),
    ]
}

/// A guest that is reset: counts how often it has begun.
struct Again {
    shell: Shell,
    socket: String,
    begun: usize,
}

impl Again {
    fn new(shell: Shell, socket: &str) -> Self {
        Self {
            shell,
            socket: socket.to_owned(),
            begun: 1,
        }
    }

    /// Waits until the guest reads once more.
    fn begins(&mut self) -> Verdict {
        self.begun += 1;
        until(&self.shell.vmm, "GUEST-IS-READY", self.begun)
    }

    fn reset(&mut self) -> Verdict {
        ctl(&self.socket, &["reset"])?;
        self.begins()
    }
}

/// Waits until the console has said it so often.
fn until(vmm: &Vmm, word: &str, times: usize) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    while vmm.output().matches(word).count() < times {
        check(Instant::now() < end, || {
            vmm.story(&format!("no {word} for the {times}th time"))
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Descriptors of a device's process.
fn descriptors(pid: i64) -> Result<usize, String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
    entries
        .map(Iterator::count)
        .map_err(|e| format!("descriptors of {pid}: {e}"))
}

/// The disk that has this id, as the guest finds it.
fn by_serial(id: &str) -> String {
    format!("$(dirname $(grep -lx {id} /sys/block/vd*/serial) | xargs basename)")
}

/// What each guest says of itself, once.
const LOOKS: &str = "n=$(ls /sys/class/net | grep -v lo | head -n 1)
ip addr add 10.9.0.2/24 dev $n; ip link set $n up
ping -c 1 -W 60 10.9.0.1 >/dev/null && echo SAYS-NET
grep -qx org.example /sys/class/virtio-ports/*/name && echo SAYS-PORT
[ $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c) = 64 ] && echo SAYS-RNG
for d in /sys/block/vd*; do
  s=$(cat $d/serial); [ $s = script ] || echo SAYS-$s-$(sha256sum </dev/${d##*/})
done
echo SAYS-CPUS-$(grep -c ^processor /proc/cpuinfo)
dmesg | grep -E 'BUG:|Oops|WARNING: CPU|Call Trace' && echo SAYS-BAD
echo SAYS-ID-$(cat /proc/sys/kernel/random/boot_id)
while :; do sleep 1000; done";

fn again_and_again() -> Verdict {
    const ROUNDS: usize = 5;
    let scratch = Scratch::new("reset")?;
    let network = Namespace::new("reset")?;
    network.tap("rst0", "10.9.0.1/24", "user root")?;
    let enter = network.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let (socket, port) = (scratch.path("api"), scratch.path("port"));
    let data = scratch.disk("data", (4 * MIB) as usize, 3)?;
    let hot = scratch.disk("hot", (2 * MIB) as usize, 4)?;
    let script = format!(
        "path={},readonly=on,id=script,queues=1",
        scratch.script("s", LOOKS)?
    );
    let disk = format!("path={data},id=data");
    let console = format!("id=con,socket={port},name=org.example");
    let vsock = format!("socket={}", scratch.path("vsock"));
    let options = [
        "--api-socket",
        &socket,
        "--hotplug-ports",
        "2",
        "--cpus",
        "2",
    ];
    let devices = [
        "--disk",
        &script,
        "--disk",
        &disk,
        "--net",
        "tap=rst0,id=lan",
        "--console",
        &console,
    ];
    let more = ["--rng", "--vsock", &vsock];
    let all = [options.as_slice(), &devices, &more].concat();
    let mut vmm = Vmm::boot_by(&by, "bh.cmd=script", &all)?;
    until(&vmm, "SAYS-ID-", 1)?;
    ctl(&socket, &["add-disk", &format!("path={hot},id=hot")])?;
    let pids = || -> Result<Vec<i64>, String> {
        let all = ["script", "data", "lan", "con", "hot"];
        all.iter().map(|id| pid_of(&socket, id)).collect()
    };
    let before = pids()?;
    let mut held = None;
    for round in 1..=ROUNDS {
        ctl(&socket, &["reset"])?;
        until(&vmm, "SAYS-ID-", round + 1)?;
        if round == 1 {
            // Whatever is made once only has been made by then.
            let of_devices: Result<Vec<usize>, String> =
                before.iter().map(|pid| descriptors(*pid)).collect();
            held = Some((holdings(vmm.pid())?, of_devices?));
        }
    }
    let (held, of_devices) = held.unwrap_or_default();
    check(pids()? == before, || {
        format!("{:?}, not {before:?}", pids())
    })?;
    for (pid, had) in before.iter().zip(of_devices) {
        let has = descriptors(*pid)?;
        check(has <= had, || {
            format!("process {pid}: {has} descriptors, not {had}")
        })?;
    }
    settled(vmm.pid(), &held)?;
    let output = vmm.output();
    let sum = |path: &str| -> Result<String, String> {
        let sum = sh(&format!("sha256sum <{path}"))?;
        Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
    };
    let said = |word: &str| output.matches(word).count();
    for (word, times) in [
        ("SAYS-NET".to_owned(), ROUNDS + 1),
        ("SAYS-PORT".to_owned(), ROUNDS + 1),
        ("SAYS-RNG".to_owned(), ROUNDS + 1),
        ("SAYS-CPUS-2".to_owned(), ROUNDS + 1),
        (format!("SAYS-data-{}", sum(&data)?), ROUNDS + 1),
        // It came while the first guest ran.
        (format!("SAYS-hot-{}", sum(&hot)?), ROUNDS),
        ("SAYS-BAD".to_owned(), 0),
    ] {
        check(said(&word) == times, || {
            vmm.story(&format!("{word} {} times", said(&word)))
        })?;
    }
    let ids = output
        .lines()
        .filter_map(|line| line.split("SAYS-ID-").nth(1));
    let ids: BTreeSet<&str> = ids.collect();
    check(ids.len() == ROUNDS + 1, || format!("{ids:?}"))?;
    let told = until_event(&socket, "machine.reset", &format!("\"count\":{ROUNDS}"))?;
    check(told.contains("\"cause\":\"client\""), || told)?;
    check(vmm.errors().is_empty(), || vmm.story("it complained"))?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

fn under_load() -> Verdict {
    let scratch = Scratch::new("reset-load")?;
    let socket = scratch.path("api");
    let disk = format!(
        "path={},id=data,queues=2",
        sparse(&scratch, "data", 64 * MIB)?
    );
    let options = ["--api-socket", &socket, "--cpus", "2"];
    let shell = guest(&[], &scratch, &[&disk], &options)?;
    let mut again = Again::new(shell, &socket);
    let load = "fio --name=w --filename=/dev/vdb --direct=1 --bs=16k --rw=randwrite --size=64M --ioengine=libaio --iodepth=32 --numjobs=2 --time_based --runtime=600 >/dev/null 2>&1 & sleep 1; kill -0 $!";
    for _ in 0..2 {
        again.shell.run(load)?;
        again.reset()?;
    }
    // Nothing of a guest that is gone reaches the disk.
    let verified = "fio --name=v --filename=/dev/vdb --direct=1 --bs=16k --rw=randwrite --size=16M --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/dev/null";
    again.shell.run(verified)?;
    for _ in 0..2 {
        again.shell.run(load)?;
        let before = pid_of(&socket, "data")?;
        kill(&socket, "data")?;
        again.reset()?;
        again.shell.run(verified)?;
        let after = pid_of(&socket, "data")?;
        check(after != before, || format!("process {before} serves on"))?;
    }
    again.shell.ends()?;
    nothing_left(LIMIT)
}

fn paused() -> Verdict {
    let scratch = Scratch::new("reset-paused")?;
    let (socket, reading) = (scratch.path("api"), scratch.path("reading"));
    let (kernel, initrd) = (guest_file("vmlinuz"), guest_file("initrd.img"));
    let cmdline = "console=ttyS0 quiet panic=-1 bh.cmd=hang";
    let mut vmm = Vmm::start(&[
        "serve",
        "--api-socket",
        &socket,
        "--api-read-only",
        &reading,
    ])?;
    super::bad_input::appears(&socket)?;
    refused(ctl(&socket, &["reset"]), "no machine yet")?;
    refused(ctl(&socket, &["reboot"]), "no machine yet")?;
    let machine = [
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        cmdline,
    ];
    let machine = [["create"].as_slice(), &machine, &["--memory", "256M"]].concat();
    ctl(&socket, &machine)?;
    refused(ctl(&socket, &["reset"]), "created: boot it first")?;
    for command in ["reset", "reboot", "delete"] {
        refused(ctl(&reading, &[command]), "is not for this socket")?;
    }
    ctl(&socket, &["boot"])?;
    vmm.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    ctl(&socket, &["pause"])?;
    refused(ctl(&socket, &["reboot"]), "resume it first, or use Reset")?;
    for _ in 0..2 {
        ctl(&socket, &["reset"])?;
        let state = ctl(&socket, &["info"])?["state"].clone();
        check(state == "paused", || state.to_string())?;
    }
    let said = vmm.output().matches("GUEST-INIT").count();
    std::thread::sleep(Duration::from_secs(2));
    check(vmm.output().matches("GUEST-INIT").count() == said, || {
        vmm.story("it runs")
    })?;
    ctl(&socket, &["resume"])?;
    until(&vmm, "BULKHEAD-GUEST-READY", 2)?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

fn spoiled() -> Verdict {
    let scratch = Scratch::new("reset-spoiled")?;
    let (socket, kernel) = (scratch.path("api"), scratch.path("kernel"));
    let (good, initrd) = (guest_file("vmlinuz"), guest_file("initrd.img"));
    sh(&format!("cp {good} {kernel}"))?;
    let options = ["--kernel", &kernel, "--initrd", &initrd, "--memory", "256M"];
    let cmdline = "console=ttyS0 quiet panic=-1 bh.cmd=hang";
    let more = ["--api-socket", &socket, "--cmdline", cmdline];
    let mut vmm = Vmm::start(&[["run"].as_slice(), &options, &more].concat())?;
    vmm.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    // Another one in its place is not looked at.
    sh(&format!("mv {kernel} {kernel}.first; echo none >{kernel}"))?;
    ctl(&socket, &["reset"])?;
    until(&vmm, "BULKHEAD-GUEST-READY", 2)?;
    // What is written to it is.
    sh(&format!("echo none >{kernel}.first"))?;
    refused(ctl(&socket, &["reset"]), "the machine is gone: ")?;
    vmm.ends_with(1, LIMIT)?;
    check(vmm.errors().contains("is not a kernel"), || {
        vmm.story("it does not say why")
    })?;
    nothing_left(LIMIT)
}

fn lets_go() -> Verdict {
    let scratch = Scratch::new("reset-lets-go")?;
    let socket = scratch.path("api");
    let hot = sparse(&scratch, "hot", 8 * MIB)?;
    let options = [
        "--api-socket",
        &socket,
        "--hotplug-ports",
        "2",
        "--cpus",
        "1,max=3",
        "--memory",
        "size=384M,max=640M",
    ];
    // What is plugged is used, before anything can be typed.
    let words = "memhp_default_state=online";
    let none: [&str; 0] = [];
    let vmm = debian_told(&[], &scratch, words, READER, &none, &options)?;
    let mut again = Again::new(Shell::new(vmm)?, &socket);
    ctl(&socket, &["add-disk", &format!("path={hot},id=hot")])?;
    let disk = by_serial("hot");
    again.shell.run(&format!(
        "until [ -e /dev/{disk} ]; do sleep 0.1; done 2>/dev/null"
    ))?;
    ctl(&socket, &["resize-cpus", "2"])?;
    ctl(&socket, &["resize-memory", "512M", "--timeout", "600"])?;
    reaches(&socket, 512, &again.shell.vmm)?;
    // A guest that is paused answers nothing.
    ctl(&socket, &["pause"])?;
    let removal = std::thread::scope(|scope| {
        let removal = scope.spawn(|| ctl(&socket, &["remove-device", "hot", "--timeout", "600"]));
        until_event(&socket, "operation.began", "remove")?;
        let resize = scope.spawn(|| ctl(&socket, &["resize-cpus", "1", "--timeout", "600"]));
        until_event(&socket, "operation.began", "1 vCPUs")?;
        ctl(&socket, &["reset"])?;
        let ends = [removal.join(), resize.join()];
        ends.into_iter()
            .try_for_each(|end| end.map_err(|_| "a client".to_owned())?.map(drop))
    });
    removal?;
    check(device(&socket, "hot")?.is_none(), || "it stays".to_owned())?;
    ctl(&socket, &["resume"])?;
    again.begins()?;
    again.shell.run("[ $(nproc) = 1 ]")?;
    // The next guest unplugs all that it did not plug, and asks for as much again.
    let plugged =
        "until [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 380000 ]; do sleep 0.2; done";
    again.shell.run(plugged)?;
    reaches(&socket, 512, &again.shell.vmm)?;
    ctl(&socket, &["add-disk", &format!("path={hot},id=hot")])?;
    ctl(&socket, &["resize-cpus", "3"])?;
    again.reset()?;
    again.shell.run("[ $(nproc) = 3 ]")?;
    again
        .shell
        .run(&format!("[ -e /dev/{} ]", by_serial("hot")))?;
    again.shell.ends()?;
    nothing_left(LIMIT)
}

/// A script that switches itself off when its power button is pressed.
const LISTENS: &str = "node=
while [ -z \"$node\" ]; do
  for e in /sys/class/input/event*; do
    grep -q 'Power Button' $e/device/name 2>/dev/null && node=/dev/input/${e##*/}
  done
  usleep 50000
done
dd if=$node bs=24 count=1 >/dev/null 2>&1 &
until ls -l /proc/$!/fd 2>/dev/null | grep -q $node; do usleep 50000; done
echo WAITING
wait
echo OBEYS";

fn reboots() -> Verdict {
    let scratch = Scratch::new("reboot")?;
    let socket = scratch.path("api");
    let script = scratch.script("s", LISTENS)?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot("bh.cmd=script", &["--disk", &disk, "--api-socket", &socket])?;
    vmm.wait_for("WAITING", LIMIT)?;
    let done = ctl(&socket, &["reboot", "--timeout", "600"])?;
    check(done["forced"] == false, || done.to_string())?;
    until(&vmm, "WAITING", 2)?;
    let operation = done["operation"].to_string();
    let told = ctl(&socket, &["operation", &operation])?;
    check(
        told["state"] == "done" && told["subject"] == "machine",
        || told.to_string(),
    )?;
    let told = until_event(&socket, "machine.reset", "reboot")?;
    check(told.contains("\"count\":1"), || told)?;
    // A shutdown is the end.
    ctl(&socket, &["shutdown", "--timeout", "600"])?;
    vmm.ends_with(0, LIMIT)?;
    check(vmm.output().matches("OBEYS").count() == 2, || {
        vmm.story("it obeys")
    })?;

    let mut deaf = Vmm::boot("bh.cmd=hang", &["--api-socket", &socket])?;
    deaf.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    // Whoever asks again waits for the same one, and the shorter time counts.
    let both = std::thread::scope(|scope| {
        let first = scope.spawn(|| ctl(&socket, &["reboot", "--timeout", "600"]));
        until_event(&socket, "operation.began", "reboot")?;
        let second = ctl(&socket, &["reboot", "--timeout", "1"])?;
        let first = first.join().map_err(|_| "a client".to_owned())??;
        Ok::<_, String>([first, second])
    })?;
    let same = both
        .iter()
        .all(|one| one["operation"] == 1 && one["forced"] == true);
    check(same, || format!("{both:?}"))?;
    until(&deaf, "BULKHEAD-GUEST-READY", 2)?;
    // A reset that comes first is one, too.
    let reboot = std::thread::scope(|scope| {
        let reboot = scope.spawn(|| ctl(&socket, &["reboot", "--timeout", "600"]));
        until_event(&socket, "operation.began", "2: reboot")?;
        ctl(&socket, &["reset"])?;
        reboot.join().map_err(|_| "a client".to_owned())?
    })?;
    check(reboot["forced"] == false, || reboot.to_string())?;
    until(&deaf, "BULKHEAD-GUEST-READY", 3)?;
    ctl(&socket, &["shutdown", "--force"])?;
    deaf.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

fn own_resets() -> Verdict {
    let scratch = Scratch::new("reset-own")?;
    let socket = scratch.path("api");
    let disk = format!("path={},id=data", sparse(&scratch, "data", 4 * MIB)?);
    let options = [
        "--api-socket",
        &socket,
        "--disk",
        &disk,
        "--on-reset",
        "restart",
    ];
    for (command, cause) in [
        ("bh.cmd=reboot", "guest"),
        ("bh.cmd=triplefault reboot=t", "triple-fault"),
    ] {
        let mut vmm = Vmm::boot(command, &options)?;
        until_event(&socket, "machine.reset", "\"count\":2")?;
        let held = holdings(vmm.pid())?;
        for _ in 0..20 {
            ctl(&socket, &["info"])?;
        }
        let told = until_event(&socket, "machine.reset", "\"count\":4")?;
        check(told.contains(&format!("\"cause\":\"{cause}\"")), || told)?;
        // A reset is under way at times, for which there is a thread.
        settled(vmm.pid(), &held)?;
        // Neither has to wait for the guest.
        ctl(&socket, &["reset"])?;
        ctl(&socket, &["pause"])?;
        ctl(&socket, &["delete"])?;
        vmm.ends_with(0, LIMIT)?;
        nothing_left(LIMIT)?;
    }
    Ok(())
}

fn deleted() -> Verdict {
    let scratch = Scratch::new("reset-delete")?;
    let (socket, port, serial) = (
        scratch.path("api"),
        scratch.path("port"),
        scratch.path("serial"),
    );
    let disk = format!("path={},id=data", sparse(&scratch, "data", 4 * MIB)?);
    let (console, serial_option) = (format!("id=con,socket={port}"), format!("socket={serial}"));
    let devices = [
        "--disk",
        &disk,
        "--console",
        &console,
        "--rng",
        "--hotplug-ports",
        "1",
    ];
    let options = ["--api-socket", &socket, "--serial", &serial_option];
    for paused in [false, true] {
        let mut vmm = Vmm::boot("bh.cmd=hang", &[devices.as_slice(), &options].concat())?;
        until_event(&socket, "machine.running", "")?;
        if paused {
            ctl(&socket, &["pause"])?;
        }
        let group = ctl(&socket, &["info"])?["cgroup"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let pids: Vec<i64> = ["data", "con"]
            .iter()
            .map(|id| pid_of(&socket, id))
            .collect::<Result<_, _>>()?;
        ctl(&socket, &["delete"])?;
        // The answer comes when it is so.
        for pid in pids {
            check(!Path::new(&format!("/proc/{pid}")).exists(), || {
                format!("process {pid} stays")
            })?;
        }
        for path in [&port, &serial] {
            check(!Path::new(path).exists(), || format!("{path} stays"))?;
        }
        vmm.ends_with(0, LIMIT)?;
        check(!Path::new(&socket).exists(), || format!("{socket} stays"))?;
        check(group.is_empty() || !Path::new(&group).exists(), || {
            format!("{group} stays")
        })?;
        nothing_left(LIMIT)?;
    }
    Ok(())
}
