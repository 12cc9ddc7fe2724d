//! Live updates: another binary takes a device over while it is in use, and one that is no good
//! leaves the process that serves where it is.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use bulkhead_tests::chaos;
use bulkhead_tests::host::{Namespace, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, guest_file, nothing_left};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};

const MIB: u64 = 1 << 20;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("update");
    let mut tests = native();
    tests.extend([
        test(
            "a disk is updated 6 times while fio verifies, two of them in vain: no error, nothing lost",
            || under_fio("raw"),
        ),
        Test {
            subject: "update",
            name: "the same on a qcow2 image, which qemu-img finds sound",
            long: true,
            run: || under_fio("qcow2"),
        },
        test(
            "a network device is updated under a flow, which goes on (user space)",
            || under_flow("user"),
        ),
        test(
            "a network device is updated under a flow, which goes on (vhost-net)",
            || under_flow("vhost-net"),
        ),
    ]);
    tests
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    let test = Test::short("update");
    vec![
        test(
            "a new binary must lie where one may, and be nobody else's",
            places,
        ),
        test(
            "a new binary that exits, hangs or speaks another version leaves the old one in service",
            false_ones,
        ),
        test(
            "every device is updated, and a process that dies afterwards is replaced by the new binary",
            every_one,
        ),
    ]
}

/// A directory of device binaries, in which each may be put.
pub struct Binaries {
    pub path: String,
}

impl Binaries {
    /// An empty one.
    pub fn new(scratch: &Scratch, name: &str) -> Result<Self, String> {
        let path = scratch.path(name);
        std::fs::create_dir_all(&path).map_err(|e| format!("{path}: {e}"))?;
        let binaries = Self { path };
        binaries.mode("", 0o755)?;
        Ok(binaries)
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    fn mode(&self, name: &str, mode: u32) -> Verdict {
        let path = self.path(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
            .map_err(|e| format!("{path}: {e}"))
    }

    fn put(&self, name: &str, content: &[u8]) -> Result<String, String> {
        let path = self.path(name);
        std::fs::write(&path, content).map_err(|e| format!("{path}: {e}"))?;
        self.mode(name, 0o755)?;
        Ok(path)
    }

    /// The binary of a kind under test, by another name.
    pub fn good(&self, kind: &str, name: &str) -> Result<String, String> {
        let from = bin(kind);
        let content = std::fs::read(&from).map_err(|e| format!("{}: {e}", from.display()))?;
        self.put(name, &content)
    }

    /// A binary with this fault.
    pub fn fault(&self, fault: &str) -> Result<String, String> {
        let from = std::env::current_exe().map_err(|e| e.to_string())?;
        let from = from.with_file_name("false-device");
        let mut content = std::fs::read(&from).map_err(|e| format!("{}: {e}", from.display()))?;
        let mark = b"BULKHEAD-FALSE-DEVICE:";
        let at = content
            .windows(mark.len())
            .position(|w| w == mark)
            .ok_or("false-device has no mark")?;
        let place = content
            .get_mut(at + mark.len()..at + 48)
            .ok_or("false-device ends at its mark")?;
        place.fill(b' ');
        place
            .get_mut(..fault.len())
            .ok_or("too long a fault")?
            .copy_from_slice(fault.as_bytes());
        self.put(fault, &content)
    }
}

fn field(socket: &str, device: &str, name: &str) -> Result<serde_json::Value, String> {
    let devices = ctl(socket, &["devices"])?;
    let found = devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["id"] == device);
    found
        .map(|d| d[name].clone())
        .ok_or_else(|| format!("no {device} in {devices}"))
}

/// The process of a device.
pub fn pid_of(socket: &str, device: &str) -> Result<i64, String> {
    field(socket, device, "pid").and_then(|pid| pid.as_i64().ok_or_else(|| pid.to_string()))
}

/// The program that a device's process executes.
pub fn program(socket: &str, device: &str) -> Result<String, String> {
    let exe = format!("/proc/{}/exe", pid_of(socket, device)?);
    let path = std::fs::read_link(&exe)
        .map_err(|e| format!("{exe}: {e}: {}", ctl_events(socket).unwrap_or_default()))?;
    Ok(path.to_string_lossy().into_owned())
}

/// Another binary takes a device over.
pub fn update(socket: &str, device: &str, binary: &str) -> Result<serde_json::Value, String> {
    ctl(socket, &["update-device", device, "--binary", binary])
}

/// An update that must fail for this reason, and change nothing.
pub fn refused(socket: &str, device: &str, binary: &str, why: &str) -> Verdict {
    let before = (
        pid_of(socket, device)?,
        field(socket, device, "incarnation")?,
    );
    match update(socket, device, binary) {
        Ok(done) => return Err(format!("{binary} was taken: {done}")),
        Err(line) => check(line.contains(why) && line.lines().count() == 1, || {
            format!("{binary}: no {why:?} in {line:?}")
        })?,
    }
    let after = (
        pid_of(socket, device)?,
        field(socket, device, "incarnation")?,
    );
    check(before == after, || format!("{before:?} became {after:?}"))?;
    ctl(socket, &["stats", device]).map(drop)
}

/// Waits until so many processes of device binaries are left.
fn processes(wanted: usize) -> Verdict {
    let end = Instant::now() + LIMIT;
    loop {
        let all = bulkhead_tests::vmm::bulkhead_processes();
        let devices = all
            .iter()
            .filter(|(_, comm)| comm != "bulkhead" && !comm.starts_with("bulkhead-launch"));
        if devices.count() == wanted {
            return Ok(());
        }
        check(Instant::now() < end, || format!("{all:?}"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A machine that was made and not booted, with these disks.
fn made(socket: &str, directories: &[&Binaries], disks: &[String]) -> Result<Vmm, String> {
    let mut args = vec!["serve", "--api-socket", socket];
    for directory in directories {
        args.extend(["--device-dir", &directory.path]);
    }
    let vmm = Vmm::start(&args)?;
    let end = Instant::now() + LIMIT;
    while !std::path::Path::new(socket).exists() {
        check(Instant::now() < end, || vmm.story("no API socket"))?;
        std::thread::sleep(Duration::from_millis(10));
    }
    let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initrd.img"));
    let mut create = vec![
        "create", "--kernel", &kernel, "--initrd", &initrd, "--memory", "128M", "--serial", "none",
    ];
    for disk in disks {
        create.extend(["--disk", disk]);
    }
    ctl(socket, &create)?;
    Ok(vmm)
}

fn places() -> Verdict {
    let scratch = Scratch::new("places")?;
    let (one, two) = (
        Binaries::new(&scratch, "one")?,
        Binaries::new(&scratch, "two")?,
    );
    let outside = Binaries::new(&scratch, "outside")?;
    let disk = sparse(&scratch, "disk", MIB)?;
    let socket = scratch.path("api");
    let vmm = made(&socket, &[&one, &two], &[format!("path={disk},id=d")])?;
    let good = outside.good("bulkhead-blk", "blk")?;
    refused(&socket, "d", &good, "--device-dir")?;
    refused(&socket, "d", "/bin/true", "--device-dir")?;
    refused(&socket, "d", "../outside/blk", "leads out")?;
    refused(&socket, "d", "none", "not found")?;
    refused(&socket, "d", "", "give a file")?;
    sh(&format!(
        "cd {}; ln -s {good} link; ln -s ../outside up; mkdir sub fifos; mkfifo fifos/x; chmod 777 sub",
        one.path
    ))?;
    refused(&socket, "d", "link", "symbolic link")?;
    refused(&socket, "d", "up/blk", "")?;
    refused(&socket, "d", "fifos/x", "no regular file")?;
    refused(&socket, "d", "fifos", "no regular file")?;
    one.good("bulkhead-blk", "sub/blk")?;
    refused(&socket, "d", "sub/blk", "may write it")?;
    let plain = one.good("bulkhead-blk", "blk")?;
    one.mode("blk", 0o775)?;
    refused(&socket, "d", &plain, "may write it")?;
    one.mode("blk", 0o644)?;
    refused(&socket, "d", &plain, "chmod +x")?;
    one.mode("blk", 0o755)?;
    sh(&format!("chown 12345 {plain}"))?;
    refused(&socket, "d", &plain, "another user")?;
    refused(&socket, "d", &one.put("text", b"no program")?, "it ")?;
    let unknown = update(&socket, "e", "blk").map_or_else(|e| e, |v| v.to_string());
    check(unknown.contains("no device e"), || unknown)?;
    // The second directory has one that is as it must be.
    let best = two.good("bulkhead-blk", "best")?;
    let done = update(&socket, "d", "best")?;
    check(program(&socket, "d")? == best, || done.to_string())?;
    drop(vmm);
    // A directory that others may write is refused at the start.
    one.mode("", 0o777)?;
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket, "--device-dir", &one.path])?;
    vmm.ends_with(1, LIMIT)?;
    check(vmm.errors().contains("go-w"), || vmm.errors())?;
    nothing_left(Duration::from_secs(5))
}

fn false_ones() -> Verdict {
    let scratch = Scratch::new("false")?;
    let binaries = Binaries::new(&scratch, "new")?;
    let disk = sparse(&scratch, "disk", MIB)?;
    let socket = scratch.path("api");
    let _vmm = made(&socket, &[&binaries], &[format!("path={disk},id=d")])?;
    let first = program(&socket, "d")?;
    for (incarnation, (fault, why)) in (2..).zip([
        ("exit", "the process before it goes on"),
        ("hang", "did not answer within"),
        ("version", "9.9.9 speaks control protocol 99, this VMM 1"),
        ("kind", "says that it is \"tap\""),
        ("rings", "the process before it goes on"),
    ]) {
        refused(&socket, "d", &binaries.fault(fault)?, why)?;
        // Why it had to go is told before its end, which the next one must wait for.
        let wanted = ["device.spawned", "device.not-updated", "device.exited"];
        let end = Instant::now() + LIMIT;
        loop {
            let told = told_of(&socket, incarnation)?;
            if told == wanted {
                break;
            }
            check(Instant::now() < end && told.len() < 3, || {
                format!("{fault}: {told:?}")
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        check(program(&socket, "d")? == first, || fault.into())?;
        // It takes requests again: a drain can be asked for and taken back.
        ctl(&socket, &["drain", "d"])?;
        ctl(&socket, &["resume-device", "d"])?;
        processes(1)?;
    }
    let events = ctl_events(&socket)?;
    let told = events.matches("device.not-updated").count();
    check(told == 5, || events.clone())?;
    check(!events.contains("crashed"), || events)?;
    // And a good one after all of these, which outlives its predecessor's numbers.
    let good = binaries.good("bulkhead-blk", "bulkhead-good")?;
    update(&socket, "d", &good)?;
    check(program(&socket, "d")? == good, || "not the good one".into())?;
    processes(1)
}

/// The kinds of the events of a process.
fn told_of(socket: &str, incarnation: u64) -> Result<Vec<String>, String> {
    let name = format!("incarnation {incarnation}");
    let events = ctl_events(socket)?;
    let events = events.lines().map(serde_json::from_str::<Value>);
    let of = events.filter_map(Result::ok).filter(|event| {
        let detail = event["detail"].as_str().unwrap_or_default();
        detail.trim_end_matches(')').ends_with(&name)
    });
    let kinds = of.map(|event| event["kind"].as_str().unwrap_or_default().to_owned());
    Ok(kinds.collect())
}

/// All events as lines of JSON.
pub fn ctl_events(socket: &str) -> Result<String, String> {
    let output = bulkhead_tests::vmm::bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn every_one() -> Verdict {
    let scratch = Scratch::new("every")?;
    let binaries = Binaries::new(&scratch, "new")?;
    let socket = scratch.path("api");
    let mut disks = Vec::new();
    for name in ["a", "b", "c"] {
        disks.push(format!("path={},id={name}", sparse(&scratch, name, MIB)?));
    }
    let _vmm = made(&socket, &[&binaries], &disks)?;
    ctl(&socket, &["update-disk", "b", "--iops", "100"])?;
    ctl(&socket, &["drain", "c"])?;
    let good = binaries.good("bulkhead-blk", "bulkhead-blk")?;
    sh(&format!(
        "{} ctl --socket {socket} update-device --all",
        bin("bulkhead").display()
    ))?;
    for device in ["a", "b", "c"] {
        check(program(&socket, device)? == good, || device.into())?;
        check(field(&socket, device, "incarnation")? == 2, || {
            device.into()
        })?;
    }
    let state = field(&socket, "c", "state")?;
    check(state == "drained", || format!("c is {state}"))?;
    processes(3)?;
    let events = ctl_events(&socket)?;
    check(events.matches("device.updated").count() == 3, || events)?;
    // It dies: the new binary is started again.
    sh(&format!("kill -9 {}", pid_of(&socket, "a")?))?;
    let end = Instant::now() + LIMIT;
    while field(&socket, "a", "incarnation")? != 3 {
        check(Instant::now() < end, || "a is not started again".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    check(program(&socket, "a")? == good, || "the old binary".into())?;
    // One that does not come up does not keep the others from it.
    let bad = Binaries::new(&scratch, "new/bad")?;
    bad.put("bulkhead-blk", b"no program")?;
    let line = ctl(&socket, &["update-device", "--all", "--binary", "bad"])
        .map_or_else(|e| e, |v| v.to_string());
    check(line.contains("3 of 3 devices were not updated"), || line)?;
    processes(3)
}

fn under_fio(format: &str) -> Verdict {
    let scratch = Scratch::new("updfio")?;
    let binaries = Binaries::new(&scratch, "new")?;
    let size = 32 * MIB;
    let disk = if format == "raw" {
        sparse(&scratch, "disk", size)?
    } else {
        let path = scratch.path("disk");
        sh(&format!("qemu-img create -q -f {format} {path} {size}"))?;
        path
    };
    let socket = scratch.path("api");
    // It writes and verifies again and again until told to stop.
    let script = "cd /tmp; echo READY; read -r line
while :; do
  fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=16k --rw=randwrite --size=32M --ioengine=libaio \\
    --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1 || { echo BAD; tail -5 /tmp/out; break; }
  echo ROUND
  read -r -t 1 line && break
done
dmesg | grep -i 'i/o error' | head -3
echo OVER";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data,queues=2,format={format}")],
        &[
            "--cpus",
            "2",
            "--api-socket",
            &socket,
            "--device-dir",
            &binaries.path,
        ],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    vmm.type_text("go\n")?;
    let bad = [binaries.fault("version")?, binaries.fault("rings")?];
    for round in 0..6_u64 {
        let pause = chaos::pause("update", round, Duration::from_millis(700));
        chaos::injected(&format!("live update of a disk under fio after {pause:?}"));
        match bad.get(usize::try_from(round / 2).unwrap_or(0)) {
            Some(bad) if round % 2 == 1 => refused(&socket, "data", bad, "goes on")?,
            _ => {
                let good = binaries.good("bulkhead-blk", &format!("bulkhead-blk{round}"))?;
                let done = update(&socket, "data", &good).map_err(|e| vmm.story(&e))?;
                check(done["stall_us"].as_u64().is_some_and(|us| us > 0), || {
                    done.to_string()
                })?;
                check(program(&socket, "data")? == good, || good.clone())?;
            }
        }
    }
    vmm.type_text("stop\n")?;
    vmm.wait_for("OVER", LIMIT)?;
    let output = vmm.output();
    check(
        !output.contains("BAD") && !output.to_lowercase().contains("i/o error"),
        || vmm.story("the guest saw an error"),
    )?;
    check(output.contains("ROUND"), || vmm.story("not one round"))?;
    let events = ctl_events(&socket).unwrap_or_default();
    check(!events.contains("crashed"), || events)?;
    vmm.ends_with(0, LIMIT)?;
    if format != "raw" {
        sh(&format!(
            "qemu-img check -f {format} {}",
            scratch.path("disk")
        ))?;
    }
    nothing_left(Duration::from_secs(5))
}

fn under_flow(datapath: &str) -> Verdict {
    let scratch = Scratch::new("updnet")?;
    let binaries = Binaries::new(&scratch, "new")?;
    let host = Namespace::new("updnet")?;
    host.tap("tap0", "10.5.0.1/24", "")?;
    let socket = scratch.path("api");
    // One connection that carries data both ways until it is ended: an error would end it.
    let script = "ip link set lo up; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0
echo READY; read -r line
iperf3 -c 10.5.0.1 --bidir -t 3600 >/tmp/client 2>&1 & client=$!
echo BEGUN; read -r line
kill -0 $client && echo ALIVE; tail -3 /tmp/client; kill $client";
    let mut vmm = host.debian(
        &scratch,
        script,
        &[
            "--net",
            &format!("tap=tap0,id=net,backend={datapath}"),
            "--api-socket",
            &socket,
            "--device-dir",
            &binaries.path,
        ],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    let server = host.spawn("iperf3 -s -1")?;
    // A client that comes too early is refused, and ends.
    host.sh("for n in $(seq 600); do ss -Hltn | grep -q :5201 && exit; sleep 0.1; done; exit 1")?;
    vmm.type_text("go\n")?;
    vmm.wait_for("BEGUN", LIMIT)?;
    let flows = |vmm: &Vmm, when: &str| -> Verdict {
        let carried = || -> Result<(u64, u64), String> {
            let text = host.sh("ip -j -s link show tap0")?;
            let link: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
            let of = |way: &str| {
                link[0]["stats64"][way]["bytes"]
                    .as_u64()
                    .ok_or(text.clone())
            };
            Ok((of("rx")?, of("tx")?))
        };
        let (before, end) = (carried()?, Instant::now() + LIMIT);
        loop {
            let now = carried()?;
            if now.0 > before.0 + MIB && now.1 > before.1 + MIB {
                return Ok(());
            }
            check(Instant::now() < end, || {
                vmm.story(&format!("nothing flows {when}: {before:?}, {now:?}"))
            })?;
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    flows(&vmm, "at first")?;
    let exits = binaries.fault("exit")?;
    for round in 0..3 {
        let good = binaries.good("bulkhead-net", &format!("bulkhead-net{round}"))?;
        update(&socket, "net", &good).map_err(|e| vmm.story(&e))?;
        check(program(&socket, "net")? == good, || good.clone())?;
        flows(&vmm, "after an update")?;
        refused(&socket, "net", &exits, "goes on")?;
        flows(&vmm, "after an update in vain")?;
    }
    sh(&format!("kill -9 {}", pid_of(&socket, "net")?))?;
    flows(&vmm, "after its process was killed")?;
    vmm.type_text("stop\n")?;
    vmm.wait_for("ALIVE", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    drop(server);
    nothing_left(Duration::from_secs(5))
}
