//! Processes die: what is left, who notices, what goes on.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{Namespace, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use rustix::fs::OFlags;

use crate::hotplug::{Site, created_on, device};
use crate::net_modes::tool;

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("death");
    vec![
        test("a killed VMM leaves no process and no socket", vmm_killed),
        test(
            "a killed launcher ends the VM with exit code 5",
            launcher_killed,
        ),
        test(
            "a killed disk process is replaced, and the guest reads on from both disks",
            disk_killed,
        ),
        test("SIGINT and SIGTERM end the VM and all of it", signals),
    ]
}

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("death");
    vec![
        test(
            "a killed VMM with passt, a switch's socket, a tap, a disk and ids of its own leaves nothing, and the next one has them all at once",
            all_at_once,
        ),
        test(
            "a disk process is replaced, and the VM ended, though nobody reads standard error, which is full",
            unread,
        ),
    ]
}

struct Running {
    vmm: Vmm,
    socket: String,
    _scratch: Scratch,
}

fn running(name: &str, disks: usize) -> Result<Running, String> {
    let scratch = Scratch::new(name)?;
    let socket = scratch.path("api");
    let mut args = vec!["--api-socket".to_string(), socket.clone()];
    for n in 0..disks {
        let disk = scratch.disk(&format!("disk{n}"), 1 << 20, n as u64 + 1)?;
        args.extend(["--disk".to_string(), format!("path={disk},id=d{n}")]);
    }
    let script = scratch.script(
        "s",
        "echo UP; while read -r line; do dd if=/dev/vdb of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null && echo READ-OK; done",
    )?;
    args.extend([
        "--disk".to_string(),
        format!("path={script},readonly=on,id=script"),
    ]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut vmm = Vmm::boot("bh.cmd=script", &args)?;
    vmm.wait_for("UP", LIMIT)?;
    Ok(Running {
        vmm,
        socket,
        _scratch: scratch,
    })
}

fn kill(pid: i64) -> Verdict {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .map_err(|e| e.to_string())?;
    check(status.success(), || format!("kill -9 {pid}: {status}"))
}

fn pid_of(socket: &str, device: &str) -> Result<i64, String> {
    let devices = ctl(socket, &["devices"])?;
    devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["id"] == device)
        .and_then(|d| d["pid"].as_i64())
        .ok_or_else(|| format!("no {device} in {devices}"))
}

fn vmm_killed() -> Verdict {
    let mut r = running("vmmkill", 2)?;
    r.vmm.kill();
    nothing_left(Duration::from_secs(5))?;
    check(!std::path::Path::new(&r.socket).exists(), || {
        format!("{} is left behind", r.socket)
    })
}

fn launcher_killed() -> Verdict {
    let mut r = running("lkill", 2)?;
    let info = ctl(&r.socket, &["info"])?;
    kill(
        info["launcher_pid"]
            .as_i64()
            .ok_or_else(|| info.to_string())?,
    )?;
    r.vmm.ends_with(5, LIMIT)?;
    let errors = r.vmm.errors();
    check(errors.contains("launcher"), || {
        r.vmm.story("it does not say why")
    })?;
    nothing_left(Duration::from_secs(5))
}

fn disk_killed() -> Verdict {
    let mut r = running("dkill", 2)?;
    for disk in ["d0", "d1"] {
        kill(pid_of(&r.socket, disk)?)?;
        let end = std::time::Instant::now() + LIMIT;
        loop {
            let devices = ctl(&r.socket, &["devices"])?;
            let serves = devices
                .as_array()
                .into_iter()
                .flatten()
                .any(|d| d["id"] == disk && d["incarnation"] == 2 && d["state"] == "running");
            if serves {
                break;
            }
            check(std::time::Instant::now() < end, || devices.to_string())?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // It reads vdb, which is d1.
    r.vmm.type_text("\n")?;
    r.vmm.wait_for("READ-OK", LIMIT)?;
    ctl(&r.socket, &["shutdown", "--force"])?;
    r.vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn signals() -> Verdict {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut r = running("sig", 1)?;
        let status = std::process::Command::new("kill")
            .args([format!("-{signal}"), r.vmm.pid().to_string()])
            .status()
            .map_err(|e| e.to_string())?;
        check(status.success(), || format!("kill: {status}"))?;
        r.vmm.ends_with(code, LIMIT)?;
        nothing_left(Duration::from_secs(5))?;
        check(!std::path::Path::new(&r.socket).exists(), || {
            format!("{} is left", r.socket)
        })?;
    }
    Ok(())
}

/// `bulkhead serve` in a namespace from which passt reaches a network.
fn serve(host: &Namespace, socket: &str, passt: &str) -> Result<Vmm, String> {
    let [first, second] = host.enter();
    let mut command = Command::new(first);
    command.arg(second).arg(bin("bulkhead"));
    command.args(["serve", "--api-socket", socket, "--passt", passt]);
    command.args(["--uid-range", ONE_VM]);
    let vmm = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(vmm)
}

/// Where its cgroup is, if cgroup v2 is mounted.
pub(super) fn group(socket: &str) -> Result<Option<PathBuf>, String> {
    let info = ctl(socket, &["info"])?;
    let path = info["cgroup"].as_str().unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    let mount = mount.and_then(|line| line.split(' ').nth(4));
    let beneath = path.trim_start_matches('/');
    Ok(mount
        .filter(|_| !path.is_empty())
        .map(|mount| Path::new(mount).join(beneath)))
}

/// Ids for one VM and no other.
const ONE_VM: &str = "700000:64";

/// No other VM has ids out of the range.
fn ids_in_use(host: &Namespace) -> Verdict {
    let scratch = Scratch::new("no-ids")?;
    let [by, place] = host.enter();
    let output = Command::new(by)
        .args([&place, "timeout", "60"])
        .arg(bin("bulkhead"))
        .args(["serve", "--api-socket", &scratch.path("api")])
        .args(["--uid-range", ONE_VM])
        .output()
        .map_err(|e| e.to_string())?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    check(
        !output.status.success() && errors.contains("other VMs have all of"),
        || format!("{}: {errors}", output.status),
    )
}

fn all_at_once() -> Verdict {
    let passt = tool("PASST")?;
    let scratch = Scratch::new("all-at-once")?;
    let host = Namespace::new("all")?;
    host.sh(
        "ip link add up0 type veth peer name down0; ip link set down0 up
ip addr add 192.0.2.2/24 dev up0; ip link set up0 up; ip route add default via 192.0.2.1",
    )?;
    // Of one queue: who attaches while another does is refused by the kernel.
    host.tap("all0", "", "user root")?;
    let (api, switch) = (scratch.path("api"), scratch.path("switch"));
    let image = scratch.disk("image", 1 << 20, 3)?;
    let kernel = guest_file("vmlinux");
    let (disk, net) = (
        format!("path={image},id=disk"),
        format!("vhost-user={switch},server=on,required=off,id=switch"),
    );
    let create = [
        "create",
        "--kernel",
        &kernel,
        "--memory",
        "96M",
        "--serial",
        "none",
        "--disk",
        &disk,
        "--net",
        "user,id=user",
        "--net",
        &net,
        "--net",
        "tap=all0,id=tap",
    ];
    for round in 0..3 {
        let mut vmm = serve(&host, &api, &passt)?;
        // What the one before had is to be had at the first try.
        ctl(&api, &create).map_err(|e| format!("round {round}: {e}"))?;
        let mut pids = Vec::new();
        for (id, state) in [
            ("disk", "ready"),
            ("user", "ready"),
            ("tap", "ready"),
            ("switch", "disconnected"),
        ] {
            let found = device(&api, id)?.unwrap_or_default();
            check(found["state"] == state, || found.to_string())?;
            pids.extend(found["pid"].as_i64().filter(|pid| *pid > 0));
        }
        check(pids.len() == 3, || format!("{pids:?}"))?;
        // It has all ids that there are, and the tap.
        ids_in_use(&host)?;
        let group = group(&api)?;
        if let Some(group) = &group {
            check(group.join("dev-disk").exists(), || {
                format!("no leaf in {}", group.display())
            })?;
        }
        let second = bulkhead(&["serve", "--api-socket", &api])?;
        check(!second.status.success(), || "two VMMs at one socket".into())?;
        // A switch that says nothing.
        let mut connection = None;
        if round > 0 {
            connection = Some(UnixStream::connect(&switch).map_err(|e| e.to_string())?);
        }
        vmm.kill();
        nothing_left(Duration::from_secs(5))?;
        let end = Instant::now() + Duration::from_secs(5);
        let left = || -> Vec<String> {
            let processes = pids.iter().map(|pid| format!("/proc/{pid}"));
            let places = [api.clone(), switch.clone()];
            let group = group.iter().map(|group| group.display().to_string());
            let all = processes.chain(places).chain(group);
            all.filter(|path| Path::new(path).exists()).collect()
        };
        while !left().is_empty() {
            check(Instant::now() < end, || {
                format!("left behind: {:?}", left())
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(connection);
        let reaped = bulkhead(&["reap", "--dry-run"])?;
        let text = String::from_utf8_lossy(&reaped.stdout).into_owned();
        check(!text.contains(&api) && !text.contains(&switch), || text)?;
    }
    Ok(())
}

/// A pipe that somebody holds open is never read, and full from the start.
fn unread() -> Verdict {
    let scratch = Scratch::new("unread")?;
    let pipe = scratch.path("stderr");
    sh(&format!("mkfifo -m 0666 {pipe}"))?;
    let mut held = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(&pipe)
        .map_err(|e| format!("{pipe}: {e}"))?;
    let script = format!("exec \"$@\" 2>{pipe}");
    let site = Site {
        wrapper: &["sh", "-c", &script, "sh"],
        ..Site::default()
    };
    let (mut vmm, socket) = created_on(&scratch, site, 1)?;
    let disk = scratch.disk("data", 1 << 20, 3)?;
    ctl(&socket, &["add-disk", &format!("path={disk},id=data")])?;
    while held.write(&[b'.'; 4096]).is_ok() {}
    while held.write(b".").is_ok() {}
    let kill = || -> Result<u64, String> {
        let shown = device(&socket, "data")?.ok_or("no disk")?;
        sh(&format!("kill -9 {}", shown["pid"]))?;
        shown["incarnation"]
            .as_u64()
            .ok_or_else(|| shown.to_string())
    };
    let back = |before: u64| -> Verdict {
        let end = Instant::now() + LIMIT;
        loop {
            let shown = device(&socket, "data")?.ok_or("no disk")?;
            if shown["incarnation"].as_u64() > Some(before) && shown["state"] == "ready" {
                return Ok(());
            }
            check(Instant::now() < end, || shown.to_string())?;
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    back(kill()?)?;
    // There is room again: how many are missing is said before what comes next.
    let mut bytes = vec![0; 1 << 20];
    while held.read(&mut bytes).is_ok() {}
    back(kill()?)?;
    let count = held.read(&mut bytes).map_err(|e| format!("{pipe}: {e}"))?;
    let said = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()).into_owned();
    check(said.contains(" lines are missing here"), || said.clone())?;
    while held.write(&[b'.'; 4096]).is_ok() {}
    sh(&format!("kill -TERM {}", vmm.pid()))?;
    vmm.ends_with(143, LIMIT)?;
    nothing_left(Duration::from_secs(20))
}
