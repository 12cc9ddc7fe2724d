//! Devices and vCPUs that come and go while a guest runs, and what is left of them: nothing.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, debian_by, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, guest_file, nothing_left};

use super::disk::{LIMIT, sparse};
use super::recovery::{field, kill};
use super::shell::{READER, Shell};

const MIB: u64 = 1 << 20;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hotplug");
    vec![test(
        "disks, a network device and vCPUs come and go in a guest that runs, early in its boot too",
        in_a_guest,
    )]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    let test = |name, long, run| Test {
        subject: "hotplug",
        name,
        long,
        run,
    };
    vec![
        test(
            "a device that is added and removed 30 times leaves nothing, nor does one that cannot be added",
            false,
            || leak(30),
        ),
        test(
            "a device that is added and removed a thousand times without a guest leaves nothing",
            true,
            || leak(1000),
        ),
        test(
            "31 devices are added behind 31 ports, several at once, and no more",
            false,
            full_bus,
        ),
        test(
            "a disk of as many queues as there may be is added, and replaced when it dies",
            false,
            widest,
        ),
        test(
            "a device process that ends in the middle of its own hot-add leaves nothing",
            false,
            stillborn,
        ),
        test(
            "a device process that cannot be executed leaves nothing, an image in use holds nobody up",
            false,
            unspawned,
        ),
        test(
            "sockets at which a switch and a back-end may call are added and removed",
            false,
            listened,
        ),
    ]
}

/// What the API says of a device, if it is there.
pub fn device(socket: &str, id: &str) -> Result<Option<serde_json::Value>, String> {
    let devices = ctl(socket, &["devices"])?;
    let devices = devices
        .as_array()
        .or_else(|| devices["devices"].as_array())
        .cloned()
        .unwrap_or_default();
    Ok(devices.into_iter().find(|d| d["id"] == id))
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("hotplug")?;
    let disk = sparse(&scratch, "disk", 32 * MIB)?;
    let other = sparse(&scratch, "other", 8 * MIB)?;
    let socket = scratch.path("api");
    let data = format!("path={disk},id=data");
    let network = Namespace::new("hotplug")?;
    network.tap("hot0", "10.1.0.1/24", "user root")?;
    let enter = network.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let args = [
        "--api-socket",
        &socket,
        "--cpus",
        "2,max=4",
        "--hotplug-ports",
        "3",
    ];
    let vmm = debian_by(&by, &scratch, READER, &[] as &[&str], &args)?;
    let mut guest = Shell::booting(vmm);
    let end = Instant::now() + LIMIT;
    while ctl(&socket, &["info"]).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    // Before the guest's kernel can have looked: the note waits for it.
    ctl(&socket, &["add-disk", &format!("path={other},id=early")])?;
    ctl(&socket, &["remove-device", "early", "--timeout", "600"])?;
    guest.vmm.wait_for("GUEST-IS-READY", LIMIT)?;
    guest.run("[ ! -b /dev/vdc ]")?;

    let added = ctl(&socket, &["add-disk", &data, "--port", "hp2"])?;
    check(added["port"] == "hp2", || format!("{added}"))?;
    guest.run(
        "until [ -b /dev/vdc ]; do sleep 0.1; done; mkfs.ext4 -q /dev/vdc && mount /dev/vdc /mnt/data && echo kept >/mnt/data/f && umount /mnt/data",
    )?;
    let taken = ctl(
        &socket,
        &["add-disk", &format!("path={other},id=b"), "--port", "hp2"],
    );
    check(
        taken.as_ref().is_err_and(|line| line.contains("port hp2")),
        || format!("an occupied port: {taken:?}"),
    )?;
    ctl(&socket, &["remove-device", "data", "--timeout", "300"])?;
    guest.run("until [ ! -b /dev/vdc ]; do sleep 0.1; done")?;
    check(device(&socket, "data")?.is_none(), || {
        "it is still there".into()
    })?;

    // Again, in another port, and removed under I/O.
    ctl(&socket, &["add-disk", &data, "--port", "hp3"])?;
    guest.run(
        "until [ -b /dev/vdc ]; do sleep 0.1; done; mount -o ro /dev/vdc /mnt/data && [ $(cat /mnt/data/f) = kept ] && umount /mnt/data",
    )?;
    guest.run("(while dd if=/dev/vdc of=/dev/null bs=64k iflag=direct status=none; do :; done; echo READER-'ENDED') 2>/dev/null & true")?;
    ctl(&socket, &["remove-device", "data", "--timeout", "300"])?;
    guest.vmm.wait_for("READER-ENDED", LIMIT)?;

    // Pulled out, and two clients for one port.
    ctl(&socket, &["add-disk", &data])?;
    guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done; (while [ -b /dev/vdc ]; do dd if=/dev/vdc of=/dev/null bs=512 iflag=direct conv=noerror count=2000 status=none 2>/dev/null; done; echo PULLED-'READER') 2>/dev/null & sleep 0.5")?;
    ctl(&socket, &["remove-device", "data", "--force"])?;
    guest.vmm.wait_for("PULLED-READER", LIMIT)?;
    guest.run("until [ ! -b /dev/vdc ]; do sleep 0.1; done")?;
    let one = format!("path={other},id=one");
    let race = |disk: &str| ctl(&socket, &["add-disk", disk, "--port", "hp1"]).is_ok();
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| race(&data));
        let b = scope.spawn(|| race(&one));
        (a.join().unwrap_or(false), b.join().unwrap_or(false))
    });
    check(a != b, || format!("two clients had one port: {a} {b}"))?;
    let winner = if a { "data" } else { "one" };
    let loser = device(&socket, if a { "one" } else { "data" })?;
    check(loser.is_none(), || format!("the loser is there: {loser:?}"))?;
    guest.run("until [ -b /dev/vdc ]; do sleep 0.1; done")?;
    // The guest ejects by itself, too.
    guest.run("a=$(basename $(dirname $(readlink -f /sys/block/vdc/device))); for s in /sys/bus/pci/slots/*; do if [ $(cat $s/address) = ${a%.*} ]; then echo 0 >$s/power; fi; done; until [ ! -b /dev/vdc ]; do sleep 0.1; done")?;
    let end = Instant::now() + LIMIT;
    while device(&socket, winner)?.is_some() {
        check(Instant::now() < end, || "an ejected device stays".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }

    // A network device.
    ctl(&socket, &["add-net", "tap=hot0,id=lan,backend=user"])?;
    guest.run("until n=$(ls /sys/class/net | grep -v lo | head -1) && [ -n \"$n\" ]; do sleep 0.1; done; ip addr add 10.1.0.2/24 dev $n && ip link set $n up && ping -c 1 -w 60 10.1.0.1 >/dev/null")?;
    ctl(&socket, &["remove-device", "lan", "--timeout", "300"])?;
    guest.run("until [ -z \"$(ls /sys/class/net | grep -v lo)\" ]; do sleep 0.1; done")?;

    // vCPUs under load.
    guest.run("[ $(nproc) = 2 ]; (while :; do :; done) & (while :; do :; done) & true")?;
    ctl(&socket, &["resize-cpus", "4", "--timeout", "300"])?;
    guest.run("until [ -d /sys/devices/system/cpu/cpu3 ]; do sleep 0.1; done; for c in 2 3; do f=/sys/devices/system/cpu/cpu$c/online; [ $(cat $f) = 1 ] || echo 1 >$f; done; [ $(nproc) = 4 ] && taskset -c 3 true")?;
    ctl(&socket, &["resize-cpus", "1", "--timeout", "300"])?;
    guest.run("[ $(nproc) = 1 ]")?;
    ctl(&socket, &["resize-cpus", "2", "--timeout", "300"])?;
    guest.run("f=/sys/devices/system/cpu/cpu1/online; [ $(cat $f) = 1 ] || echo 1 >$f; taskset -c 1 true; kill %2 %3 2>/dev/null; true")?;
    let beyond = ctl(&socket, &["resize-cpus", "5"]);
    check(
        beyond
            .as_ref()
            .is_err_and(|line| line.contains("more than the 4")),
        || format!("{beyond:?}"),
    )?;
    guest.ends()
}

/// A machine that was made and has not begun: all but the guest's part.
pub fn created(
    scratch: &Scratch,
    libexec: Option<&str>,
    ports: u32,
) -> Result<(Vmm, String), String> {
    let site = Site {
        libexec,
        ..Site::default()
    };
    created_on(scratch, site, ports)
}

/// Where a machine is made.
#[derive(Clone, Copy, Default)]
pub struct Site<'a> {
    /// The directory of the device processes' programs; None: the usual one.
    pub libexec: Option<&'a str>,
    /// A command that runs the VMM's.
    pub wrapper: &'a [&'a str],
}

/// The same, elsewhere.
pub fn created_on(scratch: &Scratch, site: Site<'_>, ports: u32) -> Result<(Vmm, String), String> {
    let socket = scratch.path("api");
    let program = bin("bulkhead");
    let mut command = match site.wrapper.split_first() {
        Some((wrapper, args)) => {
            let mut command = Command::new(wrapper);
            command.args(args).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.args(["serve", "--api-socket", &socket]);
    if let Some(libexec) = site.libexec {
        command.args(["--libexec", libexec, "--device-dir", libexec]);
    }
    let vmm = Vmm::spawn(command)?;
    let end = Instant::now() + LIMIT;
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let kernel = guest_file("vmlinux");
    let ports = ports.to_string();
    let machine = [
        "create", "--kernel", &kernel, "--memory", "256M", "--serial", "none",
    ];
    let mut all = machine.to_vec();
    all.extend_from_slice(&["--hotplug-ports", &ports]);
    ctl(&socket, &all)?;
    Ok((vmm, socket))
}

/// What a process and all of its descendants hold: descriptors, threads, memory maps that
/// matter, children.
pub fn holdings(pid: u32) -> Result<String, String> {
    sh(&format!(
        "for p in {pid} $(pgrep -P {pid} || true); do
           echo fds=$(ls /proc/$p/fd | wc -l) threads=$(ls /proc/$p/task | wc -l) children=$(pgrep -P $p | wc -l)
           cat /proc/$p/cgroup | head -1
         done
         find /sys/fs/cgroup -path '*bulkhead-vm-{pid}-*' -type d 2>/dev/null | wc -l"
    ))
}

/// Waits until threads that are over have ended.
pub fn settled(pid: u32, wanted: &str) -> Verdict {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let now = holdings(pid)?;
        if now == wanted {
            return Ok(());
        }
        check(Instant::now() < end, || {
            format!("before:\n{wanted}\nnow:\n{now}")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn leak(rounds: u32) -> Verdict {
    let scratch = Scratch::new("hotplug-leak")?;
    let disk = format!("path={},id=data,queues=2", sparse(&scratch, "disk", MIB)?);
    let (vmm, socket) = created(&scratch, None, 3)?;
    let pid = vmm.pid();
    let round = |force: bool| -> Verdict {
        ctl(&socket, &["add-disk", &disk])?;
        let mut remove = vec!["remove-device", "data"];
        if force {
            remove.push("--force");
        }
        ctl(&socket, &remove).map(drop)
    };
    round(false)?;
    let before = holdings(pid)?;
    for number in 0..rounds {
        round(number % 2 == 1)?;
    }
    for (bad, words) in [
        ("path=/nonexistent/x,id=data", "no such file"),
        ("path=/dev/null,id=data", "/dev/null"),
    ] {
        let refused = ctl(&socket, &["add-disk", bad]);
        check(
            refused.as_ref().is_err_and(|line| line.contains(words)),
            || format!("{bad}: {refused:?}"),
        )?;
    }
    let nowhere = ctl(&socket, &["add-disk", &disk, "--port", "hp9"]);
    check(
        nowhere
            .as_ref()
            .is_err_and(|line| line.contains("port hp9")),
        || format!("{nowhere:?}"),
    )?;
    let unknown = ctl(&socket, &["remove-device", "data"]);
    check(
        unknown
            .as_ref()
            .is_err_and(|line| line.contains("no device data")),
        || format!("{unknown:?}"),
    )?;
    settled(pid, &before)?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn full_bus() -> Verdict {
    let scratch = Scratch::new("hotplug-full")?;
    let (vmm, socket) = created(&scratch, None, 31)?;
    let mut disks = Vec::new();
    for number in 0..32 {
        let path = sparse(&scratch, &format!("d{number}"), MIB)?;
        disks.push(format!("path={path},id=d{number},queues=1"));
    }
    let (last, rest) = disks.split_last().ok_or("no disks")?;
    // Four clients at once.
    let failures: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let socket = &socket;
                scope.spawn(move || {
                    let mine = rest.iter().skip(client).step_by(4);
                    mine.filter_map(|disk| ctl(socket, &["add-disk", disk]).err())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let joined = clients.into_iter().filter_map(|client| client.join().ok());
        joined.flatten().collect()
    });
    check(failures.is_empty(), || format!("{failures:?}"))?;
    let info = ctl(&socket, &["info"])?;
    let one_more = ctl(&socket, &["add-disk", last]);
    check(
        one_more.as_ref().is_err_and(|line| {
            line.contains("every root port is taken") || line.contains("at most 31")
        }),
        || format!("a 32nd device: {one_more:?} in {info}"),
    )?;
    for number in 0..31 {
        ctl(&socket, &["remove-device", &format!("d{number}")])?;
    }
    ctl(&socket, &["add-disk", last])?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn stillborn() -> Verdict {
    let scratch = Scratch::new("hotplug-stillborn")?;
    let libexec = scratch.path("libexec");
    let (launcher, blk) = (bin("bulkhead-launcher"), bin("bulkhead-net"));
    // A program that ends at once: it knows none of a disk's options.
    sh(&format!(
        "mkdir {libexec} && cp {} {libexec}/bulkhead-launcher && cp {blk} {libexec}/bulkhead-net && cp {blk} {libexec}/bulkhead-blk",
        launcher.display(),
        blk = blk.display()
    ))?;
    let (vmm, socket) = created(&scratch, Some(&libexec), 1)?;
    let disk = format!("path={},id=data,queues=1", sparse(&scratch, "disk", MIB)?);
    let before = holdings(vmm.pid())?;
    for _ in 0..3 {
        let failed = ctl(&socket, &["add-disk", &disk]);
        check(
            failed.as_ref().is_err_and(|line| {
                line.contains("bulkhead-blk ended at its start") && line.trim().lines().count() == 1
            }),
            || format!("{failed:?}"),
        )?;
    }
    check(device(&socket, "data")?.is_none(), || "it is there".into())?;
    settled(vmm.pid(), &before)?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

/// What the launcher has open, and the cgroup leaves of devices.
pub fn launchers(socket: &str) -> Result<String, String> {
    let info = ctl(socket, &["info"])?;
    let pid = &info["launcher_pid"];
    let cgroup = info["cgroup"].as_str().unwrap_or_default();
    sh(&format!(
        "ls /proc/{pid}/fd | wc -l; [ -z '{cgroup}' ] || ls -d /sys/fs/cgroup{cgroup}/dev-* '{cgroup}'/dev-* 2>/dev/null || true"
    ))
}

fn unspawned() -> Verdict {
    let scratch = Scratch::new("hotplug-unspawned")?;
    let libexec = scratch.path("libexec");
    let (launcher, net) = (bin("bulkhead-launcher"), bin("bulkhead-net"));
    sh(&format!(
        "mkdir {libexec} && cp {} {} {libexec}/ && echo no program >{libexec}/bulkhead-blk && chmod 755 {libexec}/bulkhead-blk",
        launcher.display(),
        net.display()
    ))?;
    let (vmm, socket) = created(&scratch, Some(&libexec), 2)?;
    let disk = sparse(&scratch, "disk", MIB)?;
    let add = |id: &str| ctl(&socket, &["add-disk", &format!("path={disk},id={id}")]);
    let before = (holdings(vmm.pid())?, launchers(&socket)?);
    for id in ["x1", "x2", "x3"] {
        let failed = add(id);
        check(
            failed.as_ref().is_err_and(|line| line.contains("format")),
            || format!("{failed:?}"),
        )?;
    }
    settled(vmm.pid(), &before.0)?;
    let end = Instant::now() + LIMIT;
    while launchers(&socket)? != before.1 {
        check(Instant::now() < end, || {
            format!("{:?} was {:?}", launchers(&socket), before.1)
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    // Somebody else's lock is waited for by the one who asked.
    let holder = sh(&format!(
        "(exec 9<>{disk}; python3 -c 'import fcntl, struct; fcntl.fcntl(9, 37, struct.pack(\"hhqqi4x\", 1, 0, 0, 0, 0))' && touch {disk}.held && exec sleep 600) >/dev/null 2>&1 & echo $!"
    ))?;
    let _undo = bulkhead_tests::host::Undo::new(format!("kill {}", holder.trim()));
    let held = format!("{disk}.held");
    while !std::path::Path::new(&held).exists() {
        check(Instant::now() < end + LIMIT, || "no lock".into())?;
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| add("held"));
        let begun = Instant::now();
        let mut answers = 0;
        while !waits.is_finished() {
            check(
                ctl(&socket, &["add-disk", "path=/nowhere/x,id=y"]).is_err(),
                || "a disk that is none".into(),
            )?;
            answers += 1;
        }
        let held = waits.join().map_err(|_| "panic")?;
        check(
            held.as_ref()
                .is_err_and(|line| line.contains("in use by another process")),
            || format!("{held:?}"),
        )?;
        check(answers >= 2, || {
            format!(
                "{answers} answers in {:?} beside one who waits",
                begun.elapsed()
            )
        })
    })?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn widest() -> Verdict {
    let scratch = Scratch::new("hotplug-widest")?;
    let disk = format!("path={},id=wide,queues=64", sparse(&scratch, "disk", MIB)?);
    let (vmm, socket) = created(&scratch, None, 1)?;
    ctl(&socket, &["add-disk", &disk])?;
    kill(&socket, "wide")?;
    let end = Instant::now() + LIMIT;
    while field(&socket, "wide", "incarnation")? != 2 || field(&socket, "wide", "state")? != "ready"
    {
        check(Instant::now() < end, || vmm.story("it does not come back"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}

fn listened() -> Verdict {
    let scratch = Scratch::new("hotplug-listened")?;
    let (vmm, socket) = created(&scratch, None, 2)?;
    let place = scratch.path("place");
    for round in 0..2 {
        let (command, device_text) = if round == 0 {
            (
                "add-vhost-user",
                format!("socket={place},kind=fs,tag=x,id=other,queues=1,server=on"),
            )
        } else {
            (
                "add-net",
                format!("vhost-user={place},id=other,server=on,required=off"),
            )
        };
        let added = ctl(&socket, &[command, &device_text]);
        // Who does not call may be told so, by an error of one line; the machine goes on.
        if let Err(line) = &added {
            check(
                line.contains("nobody connected") || line.contains("other"),
                || vmm.story(line),
            )?;
        }
        check(ctl(&socket, &["info"]).is_ok(), || {
            vmm.story("the VMM has ended")
        })?;
        if device(&socket, "other")?.is_some() {
            ctl(&socket, &["remove-device", "other"])?;
        }
        check(device(&socket, "other")?.is_none(), || "it stays".into())?;
    }
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
