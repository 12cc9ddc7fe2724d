//! Random bytes of the host's for a guest: from the start and added later, with a limit and without,
//! and while the process that gives them dies.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::shell::guest;
use super::update::Binaries;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "rng",
        name: "a guest reads random bytes while their process is killed and updated, and devices come and go",
        long: false,
        run: in_a_guest,
    }]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![Test {
        subject: "rng",
        name: "entropy devices are made, added and removed, and a process of one that dies is replaced",
        long: false,
        run: without_a_guest,
    }]
}

fn pid_of(socket: &str, id: &str) -> Result<i64, String> {
    let found = device(socket, id)?;
    let pid = found.as_ref().and_then(|d| d["pid"].as_i64());
    pid.ok_or_else(|| format!("no {id}: {found:?}"))
}

/// Kills a device's process, and waits for another one.
pub fn kill_process(socket: &str, id: &str) -> Verdict {
    let pid = pid_of(socket, id)?;
    sh(&format!("kill -9 {pid}"))?;
    let end = Instant::now() + patience(LIMIT);
    while pid_of(socket, id).map_or(true, |now| now == pid || now <= 0) {
        check(Instant::now() < end, || "no other process comes".to_owned())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Bytes that its present process has given.
pub fn given(socket: &str, id: &str) -> Result<u64, String> {
    let stats = ctl(socket, &["stats", id])?;
    let bytes = stats["queues"][0]["read_bytes"].as_u64();
    bytes.ok_or_else(|| stats.to_string())
}

/// Nothing deviates, and a process of this policy is among what was looked at.
pub fn audited(socket: &str, policy: &str) -> Verdict {
    let output = bulkhead(&["audit", "--api-socket", socket])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let named = text.contains(policy);
    check(output.status.success() && named, || text)
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("rng")?;
    let socket = scratch.path("api");
    let binaries = Binaries::new(&scratch, "new")?;
    binaries.good("bulkhead-rng", "bulkhead-rng")?;
    let args = [
        "--api-socket",
        &socket,
        "--cpus",
        "2",
        "--hotplug-ports",
        "2",
        "--rng",
        "id=dice",
        "--device-dir",
        &binaries.path,
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run("cd /sys/class/misc/hw_random")?;
    guest.run("case $(cat rng_current) in virtio_rng.*) ;; *) cat rng_current; false ;; esac; first=$(cat rng_current)")?;
    // Not the same twice, nor few values; gzip finds nothing in them.
    guest.run("head -c 64 /dev/hwrng >/tmp/a; head -c 64 /dev/hwrng >/tmp/b; [ $(stat -c %s /tmp/b) = 64 ]; ! cmp -s /tmp/a /tmp/b")?;
    guest.run("head -c 300000 /dev/hwrng >/tmp/c; [ $(gzip -c /tmp/c | wc -c) -gt 300000 ] && [ $(od -An -v -tx8 -w8 /tmp/c | sort -u | wc -l) = 37500 ]")?;
    let bytes = given(&socket, "dice")?;
    check(bytes >= 300_128, || format!("{bytes} bytes given"))?;
    audited(&socket, "bulkhead-rng")?;

    // The process dies under a reader, three times, and is updated.
    guest.run("(while head -c 20000 /dev/hwrng >/tmp/r && [ $(stat -c %s /tmp/r) = 20000 ]; do echo >>/tmp/rounds; done; echo READER-'ENDED') & reader=$!")?;
    for round in 0..4 {
        let before = "n=$(stat -c %s /tmp/rounds 2>/dev/null || echo 0)";
        let goes_on = "until [ $(stat -c %s /tmp/rounds) -gt $((n + 5)) ]; do sleep 0.1; done";
        guest.run(before)?;
        if round < 3 {
            kill_process(&socket, "dice")?;
        } else {
            ctl(&socket, &["update-device", "dice"])?;
        }
        guest.run(goes_on)?;
        let bytes = given(&socket, "dice")?;
        check(bytes > 0, || "the new process gives nothing".to_owned())?;
    }
    guest.run("kill -0 $reader && kill $reader; wait $reader; true")?;

    // Another one, with a limit.
    let added = ctl(
        &socket,
        &["add-rng", "id=slow,bps=2000:2000", "--port", "hp2"],
    )?;
    check(added["port"] == "hp2", || added.to_string())?;
    guest.run("until [ $(grep -o virtio_rng rng_available | wc -l) = 2 ]; do sleep 0.1; done; for n in $(cat rng_available); do case $n in $first) ;; virtio_rng.*) second=$n ;; esac; done; echo $second >rng_current && [ $(cat rng_current) = $second ]")?;
    // A second's worth is saved up at most.
    guest.run("read -r t _ </proc/uptime; head -c 8000 /dev/hwrng >/tmp/d; read -r u _ </proc/uptime; [ $(stat -c %s /tmp/d) = 8000 ]; took=$(( ${u%.*} - ${t%.*} )); echo TOOK $took; [ $took -ge 2 ]")?;
    let stats = ctl(&socket, &["stats", "slow"])?;
    let throttled = stats["queues"][0]["throttled"].as_u64();
    check(throttled.unwrap_or(0) > 0, || stats.to_string())?;
    ctl(&socket, &["remove-device", "slow", "--timeout", "300"])?;
    guest.run("until [ $(grep -o virtio_rng rng_available | wc -l) = 1 ]; do sleep 0.1; done; head -c 64 /dev/hwrng >/tmp/a && [ $(stat -c %s /tmp/a) = 64 ]")?;
    check(device(&socket, "slow")?.is_none(), || "it is there".into())?;

    // The last one is pulled under a reader.
    guest.run("(while head -c 20000 /dev/hwrng >/tmp/r && [ $(stat -c %s /tmp/r) = 20000 ]; do :; done; echo READER-'ENDED') 2>/dev/null & true")?;
    ctl(&socket, &["remove-device", "dice", "--force"])?;
    guest.vmm.wait_for("READER-ENDED", LIMIT)?;
    guest.run("! grep virtio_rng rng_available")?;
    guest.is_well("")?;
    ctl(&socket, &["add-rng", "id=again"])?;
    guest.run("until grep -q virtio_rng rng_current; do sleep 0.1; done; head -c 64 /dev/hwrng >/tmp/b && ! cmp -s /tmp/a /tmp/b")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)
}

/// It fails, with these words.
pub fn refused(result: Result<serde_json::Value, String>, words: &str) -> Verdict {
    check(
        result.as_ref().is_err_and(|line| line.contains(words)),
        || format!("no {words:?} in {result:?}"),
    )
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("rng-native")?;
    let socket = scratch.path("api");
    let mut command = Command::new(bin("bulkhead"));
    command.args(["serve", "--api-socket", &socket]);
    // What it may open is elsewhere: the host's generator is not among that.
    let kernel = guest_file("vmlinux");
    let kernel = sh(&format!("realpath {kernel}"))?;
    let (own, _) = socket.rsplit_once('/').ok_or("a path")?;
    command.args(["--allow-path", kernel.trim(), "--allow-path", own]);
    let vmm = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let create = |rng: &[&str]| {
        let mut args = vec!["create", "--kernel", kernel.trim(), "--memory", "96M"];
        args.extend(["--serial", "none", "--hotplug-ports", "1"]);
        args.extend(rng);
        ctl(&socket, &args)
    };
    refused(create(&["--rng", "bps=0"]), "bps=0: give")?;
    refused(create(&["--rng", "source=/dev/zero"]), "is unknown")?;
    refused(create(&["--rng", "id=a", "--rng", "id=a"]), "is taken")?;
    // Without a value, too.
    create(&["--rng", "--rng", "bps=1M:64K,cpu=50"])?;
    let config = ctl(&socket, &["info"])?["config"]["rngs"].clone();
    check(
        config[0]["id"] == "rng0" && config[1]["bytes"]["burst"] == 65536,
        || config.to_string(),
    )?;
    kill_process(&socket, "rng1")?;
    refused(
        ctl(&socket, &["add-rng", "id=rng0"]),
        "rng.id rng0 is taken",
    )?;
    let added = ctl(&socket, &["add-rng", "id=more"])?;
    check(added["port"] == "hp1", || added.to_string())?;
    kill_process(&socket, "more")?;
    audited(&socket, "bulkhead-rng")?;
    ctl(&socket, &["limit", "more", "--memory", "64M"])?;
    let held = device(&socket, "more")?.unwrap_or_default()["granted_fds"].clone();
    check(held[2] == "/dev/random", || held.to_string())?;
    ctl(&socket, &["remove-device", "more"])?;
    let left = ctl(&socket, &["info"])?["config"]["rngs"].clone();
    check(left.as_array().map(Vec::len) == Some(2), || {
        left.to_string()
    })?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
