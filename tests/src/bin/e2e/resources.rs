//! What device processes may use of the host, and what is left behind: cgroup leaves with their
//! limits and statistics, or resource limits where there are no controllers; `bulkhead reap`.
//! No guest is booted: `bulkhead serve` and a machine that is created are enough, so that the
//! same tests run natively.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// Everywhere.
pub fn native() -> Vec<Test> {
    vec![
        test("limits, usage, audit and an end without a trace", limits),
        test(
            "limits with which the next process could not start are refused, with the least that it starts with",
            least,
        ),
        test("reap takes what is dead and nothing else", reap),
        test("a cgroup that cannot do is refused or noted", choices),
    ]
}

/// Where cgroup v2 has its controllers.
pub fn tests() -> Vec<Test> {
    let mut tests = native();
    tests.push(test(
        "a delegated cgroup, alone, shared, and of a user",
        delegated,
    ));
    tests
}

/// One of this subject's.
pub fn test(name: &'static str, run: fn() -> Verdict) -> Test {
    Test {
        subject: "resources",
        name,
        long: false,
        run,
    }
}

/// Where cgroup v2 is mounted.
pub fn mount() -> Option<PathBuf> {
    let info = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = info.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// Nothing of any VM is left, where these tests have the host for themselves.
pub fn left() -> Verdict {
    match std::env::var_os("BULKHEAD_HOST") {
        Some(_) => nothing_left(Duration::from_secs(5)),
        None => Ok(()),
    }
}

struct Served {
    vmm: Vmm,
    socket: String,
    scratch: Scratch,
}

/// A VMM that serves the API, by a command in front.
fn serve(name: &str, by: &[&str], more: &[&str]) -> Result<Served, String> {
    let scratch = Scratch::new(name)?;
    let socket = scratch.path("api");
    let bulkhead = bin("bulkhead");
    let bulkhead = bulkhead.to_string_lossy();
    let mut all: Vec<&str> = by.to_vec();
    all.extend([bulkhead.as_ref(), "serve", "--api-socket", &socket]);
    all.extend(more);
    let mut command = Command::new(all.remove(0));
    command.args(all);
    let vmm = Vmm::spawn(command)?;
    let served = Served {
        vmm,
        socket,
        scratch,
    };
    let end = Instant::now() + LIMIT;
    while ctl(&served.socket, &["info"]).is_err() {
        check(Instant::now() < end, || {
            served.vmm.story("it does not serve")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(served)
}

impl Served {
    /// A machine with two disks, the first limited.
    fn create(&self, first: &str) -> Result<(), String> {
        let d0 = self.scratch.disk("d0", 1 << 20, 1)?;
        let d1 = self.scratch.disk("d1", 1 << 20, 2)?;
        let kernel = guest_file("vmlinux");
        let (first, second) = (
            format!("path={d0},id=d0{first}"),
            format!("path={d1},id=d1"),
        );
        let args = [
            "create", "--kernel", &kernel, "--memory", "128M", "--serial", "none", "--disk",
            &first, "--disk", &second,
        ];
        ctl(&self.socket, &args).map(|_| ())
    }

    fn info(&self, field: &str) -> Result<String, String> {
        let info = ctl(&self.socket, &["info"])?;
        let text = info[field].as_str().map(str::to_owned);
        Ok(text.unwrap_or_else(|| info[field].to_string()))
    }

    fn usage(&self, id: &str) -> Result<Value, String> {
        ctl(&self.socket, &["stats", id]).map(|mut stats| stats["usage"].take())
    }

    fn device(&self, id: &str) -> Result<Value, String> {
        let devices = ctl(&self.socket, &["devices"])?;
        let mut list = devices.as_array().into_iter().flatten();
        let found = list.find(|d| d["id"] == id).cloned();
        found.ok_or_else(|| devices.to_string())
    }
}

fn kill(pid: &Value) -> Verdict {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    check(status.is_ok_and(|s| s.success()), || format!("kill {pid}"))
}

/// Of a process, its cgroup v2.
fn cgroup_of(pid: &Value) -> Result<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|e| e.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(line.unwrap_or_default().to_owned())
}

fn gone(path: &Path) -> Verdict {
    let end = Instant::now() + Duration::from_secs(5);
    while path.exists() {
        check(Instant::now() < end, || {
            format!("{} is left", path.display())
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn limits() -> Verdict {
    let mut served = serve("limits", &[], &[])?;
    served.create(",cpu=50,memory=64M,pids=40")?;
    let Some(mount) = mount() else {
        let note = served.info("cgroup_note")?;
        return check(note.contains("not mounted"), || note.clone());
    };
    let group = mount.join(served.info("cgroup")?.trim_start_matches('/'));
    let leaf = group.join("dev-d0");
    let pid = served.device("d0")?["pid"].clone();
    check(cgroup_of(&pid)?.ends_with("/dev-d0"), || {
        "not in its leaf".into()
    })?;
    let other = served.device("d1")?["pid"].clone();
    check(cgroup_of(&other)?.ends_with("/dev-d1"), || {
        "not in its leaf".into()
    })?;
    let file = |name: &str| fs::read_to_string(leaf.join(name)).unwrap_or_default();
    let usage = served.usage("d0")?;
    check(usage["cpu_us"].as_u64() > Some(0), || usage.to_string())?;
    check(usage["limits"]["pids"] == 40, || usage.to_string())?;
    let rlimits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let rlimit = |name: &str, value: &str| {
        let mut lines = rlimits.lines().filter_map(|line| line.strip_prefix(name));
        lines.any(|line| line.split_whitespace().next() == Some(value))
    };
    let controllers = file("cgroup.controllers");
    let has = |name: &str| controllers.split_whitespace().any(|c| c == name);
    let (_, errors) = audit(&served.socket)?;
    if ["cpu", "memory", "pids"].into_iter().all(has) {
        check(
            usage["not_enforced"].as_array().is_some_and(Vec::is_empty),
            || usage.to_string(),
        )?;
        for (name, wanted) in [
            ("cpu.max", "50000 100000"),
            ("memory.max", "67108864"),
            ("pids.max", "40"),
        ] {
            check(file(name).trim() == wanted, || {
                format!("{name}: {}", file(name))
            })?;
        }
        check(usage["memory_bytes"].as_u64() > Some(0), || {
            usage.to_string()
        })?;
        check(usage["memory_peak_bytes"].as_u64() > Some(0), || {
            usage.to_string()
        })?;
        check(usage["pids"].as_u64() > Some(0), || usage.to_string())?;
        ctl(&served.socket, &["limit", "d0", "--cpu", "20"])?;
        check(file("cpu.max").trim() == "20000 100000", || file("cpu.max"))?;
        check(file("pids.max").trim() == "40", || "the others stay".into())?;
        check(errors.contains("memory.max 67108864"), || errors.clone())?;
        // More threads than it may have.
        ctl(
            &served.socket,
            &["limit", "d0", "--pids", "0", "--cpu", "0"],
        )?;
        check(file("cpu.max").starts_with("max"), || file("cpu.max"))?;
    } else {
        let lines = usage["not_enforced"].as_array().map_or(0, Vec::len);
        check(lines > 0, || usage.to_string())?;
        check(has("memory") || rlimit("Max data size", "67108864"), || {
            rlimits.clone()
        })?;
        check(has("pids") || rlimit("Max processes", "40"), || {
            rlimits.clone()
        })?;
        check(errors.contains("controller"), || errors.clone())?;
        check(errors.contains("DATA 67108864"), || errors.clone())?;
    }
    // Another process takes its place in the same leaf.
    kill(&pid)?;
    let end = Instant::now() + LIMIT;
    while served.device("d0")?["incarnation"] != 2 {
        check(Instant::now() < end, || "it is not replaced".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = served.device("d0")?["pid"].clone();
    check(cgroup_of(&pid)?.ends_with("/dev-d0"), || {
        "not in its leaf".into()
    })?;
    // The VMM dies.
    served.vmm.kill();
    left()?;
    gone(Path::new(&served.socket))?;
    gone(&group)
}

fn least() -> Verdict {
    let served = serve("least", &[], &[])?;
    let raw = served.scratch.disk("raw", 1 << 20, 1)?;
    let image = served.scratch.path("image");
    sh(&format!("qemu-img create -q -f qcow2 {image} 64M"))?;
    let kernel = guest_file("vmlinux");
    let create = |limits: &str| {
        let (raw, many, image) = (
            format!("path={raw},id=raw{limits}"),
            format!("path={raw},id=many,queues=8,lock=off"),
            format!("path={image},id=image,format=qcow2"),
        );
        let args = [
            "create", "--kernel", &kernel, "--memory", "128M", "--serial", "none", "--cpus", "8",
            "--disk", &raw, "--disk", &many, "--disk", &image, "--rng", "id=rng",
        ];
        ctl(&served.socket, &args)
    };
    let at_least = |result: Result<Value, String>| -> Result<String, String> {
        let line = match result {
            Ok(done) => return Err(format!("it was taken: {done}")),
            Err(line) => line,
        };
        let rest = line.split_once("give at least ").map(|(_, rest)| rest);
        let number = rest.and_then(|rest| rest.split_once(','));
        number.map(|(n, _)| n.to_owned()).ok_or(line)
    };
    // Nothing stays of a machine that could not be made.
    at_least(create(",queues=1,lock=off,pids=2"))?;
    create(",queues=1,lock=off")?;
    for id in ["raw", "many", "image", "rng"] {
        let limit = |option: &str, value: &str| ctl(&served.socket, &["limit", id, option, value]);
        let limits = || served.usage(id).map(|mut usage| usage["limits"].take());
        let before = limits()?;
        // Two threads are what the least of them has.
        let threads = match id {
            "rng" => "2".to_owned(),
            _ => at_least(limit("--pids", "2"))?,
        };
        let memory = at_least(limit("--memory", "8M"))?;
        check(limits()? == before, || format!("{id}: {before}"))?;
        limit("--pids", &threads)?;
        limit("--memory", &memory)?;
        // And the next process starts with it.
        for incarnation in 2..4 {
            kill(&served.device(id)?["pid"])?;
            let end = Instant::now() + LIMIT;
            loop {
                let device = served.device(id)?;
                if device["incarnation"] == incarnation && device["state"] == "ready" {
                    break;
                }
                check(Instant::now() < end, || {
                    served.vmm.story(&format!(
                        "{id}, {threads} threads, {memory} bytes: {device}"
                    ))
                })?;
                std::thread::sleep(Duration::from_millis(20));
            }
            ctl(&served.socket, &["stats", id])?;
        }
    }
    ctl(&served.socket, &["shutdown", "--force"])?;
    drop(served);
    left()
}

/// The audit, and whether all was as it should be.
pub fn audit(socket: &str) -> Result<(bool, String), String> {
    let output = bulkhead(&["audit", "--api-socket", socket])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output.status.success(), text))
}

fn reap() -> Verdict {
    let text = |args: &[&str]| -> Result<String, String> {
        let output = bulkhead(args)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        check(output.status.success(), || text.clone())?;
        Ok(text)
    };
    let live = serve("reap-live", &[], &[])?;
    live.create("")?;
    let mut dead = serve("reap-dead", &[], &[])?;
    dead.create("")?;
    let at = |served: &Served| -> Result<Option<PathBuf>, String> {
        let path = served.info("cgroup")?;
        let mount = mount().filter(|_| !path.is_empty());
        Ok(mount.map(|mount| mount.join(path.trim_start_matches('/'))))
    };
    let (dead_group, live_group) = (at(&dead)?, at(&live)?);
    // Strangers that look alike.
    let stranger = live_group
        .as_ref()
        .and_then(|group| Some(group.parent()?.join("bulkhead-vm-mine")));
    if let Some(stranger) = &stranger {
        let _ = fs::remove_dir(stranger);
        fs::create_dir(stranger).map_err(|e| e.to_string())?;
    }
    let other = dead.scratch.path("other.sock");
    drop(UnixListener::bind(&other).map_err(|e| e.to_string())?);

    let launcher = ctl(&dead.socket, &["info"])?["launcher_pid"].clone();
    kill(&launcher)?;
    dead.vmm.ends_with(5, LIMIT)?;
    check(Path::new(&dead.socket).exists(), || {
        "nothing is left to reap".into()
    })?;
    let dry = text(&["reap", "--dry-run"])?;
    check(
        dry.contains(&format!("would remove socket {}", dead.socket)),
        || dry.clone(),
    )?;
    check(Path::new(&dead.socket).exists(), || {
        "a dry run removes".into()
    })?;
    let done = text(&["reap"])?;
    check(
        done.contains(&format!("removed socket {}", dead.socket)),
        || done.clone(),
    )?;
    check(!done.contains(&live.socket), || done.clone())?;
    gone(Path::new(&dead.socket))?;
    if let Some(group) = &dead_group {
        gone(group)?;
    }
    check(Path::new(&other).exists(), || {
        "a stranger's socket is gone".into()
    })?;
    if let Some(stranger) = &stranger {
        let kept = stranger.exists();
        let _ = fs::remove_dir(stranger);
        check(kept, || "a stranger's cgroup is gone".into())?;
    }
    check(live_group.is_none_or(|group| group.exists()), || {
        "a live VM's cgroup is gone".into()
    })?;
    check(live.device("d0")?["state"] == "ready", || {
        "the other VM suffers".into()
    })?;
    let again = text(&["reap"])?;
    check(!again.contains(&dead.socket), || again.clone())?;
    ctl(&live.socket, &["shutdown", "--force"])?;
    Ok(())
}

fn choices() -> Verdict {
    let scratch = Scratch::new("choices")?;
    let socket = scratch.path("api");
    let wrong = scratch.path("");
    let output = bulkhead(&["serve", "--api-socket", &socket, "--cgroup", &wrong])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    check(output.status.code() == Some(1), || errors.to_string())?;
    check(
        errors.lines().count() == 1 && errors.contains("--cgroup"),
        || errors.to_string(),
    )?;
    let output = bulkhead(&["serve", "--api-socket", &socket, "--cgroup", "here"])?;
    check(output.status.code() == Some(2), || "a relative path".into())?;
    let served = serve("off", &[], &["--cgroup", "off"])?;
    served.create(",cpu=50")?;
    check(served.info("cgroup")?.is_empty(), || {
        "it has a cgroup".into()
    })?;
    let usage = served.usage("d0")?;
    check(
        usage["cgroup"] == "" && usage["not_enforced"][0].is_string(),
        || usage.to_string(),
    )?;
    let (good, text) = audit(&served.socket)?;
    check(good && text.contains("has no cgroup of its own"), || {
        text.clone()
    })?;
    ctl(&served.socket, &["shutdown", "--force"])?;
    Ok(())
}

fn delegated() -> Verdict {
    let mount = mount().ok_or("cgroup v2 is not mounted")?;
    let place = mount.join(format!("deleg-{}", std::process::id()));
    let name = place.to_string_lossy().into_owned();
    let io = |e: std::io::Error| e.to_string();
    fs::create_dir(&place).map_err(io)?;
    let enter = format!("echo $$ >{name}/cgroup.procs; exec \"$@\"");
    let by = ["sh", "-c", &enter, "sh"];
    // Alone in it: the VMM makes room.
    let served = serve("alone", &by, &[])?;
    served.create(",memory=64M")?;
    let note = served.info("cgroup_note")?;
    check(note.is_empty(), || note.clone())?;
    let vmm = Value::from(served.vmm.pid());
    check(cgroup_of(&vmm)?.ends_with("/vmm"), || {
        "the VMM is in the way".into()
    })?;
    check(
        served.usage("d0")?["memory_bytes"].as_u64() > Some(0),
        || "no usage".into(),
    )?;
    ctl(&served.socket, &["shutdown", "--force"])?;
    drop(served);
    left()?;
    let reaped = bulkhead(&["reap"])?;
    check(reaped.status.success(), || "reap fails".into())?;
    for controller in ["cpu", "memory", "io", "pids"] {
        // Reaped: nothing is in the way of taking them back.
        fs::write(
            place.join("cgroup.subtree_control"),
            format!("-{controller}"),
        )
        .map_err(io)?;
    }
    // With company it goes without controllers, and says so.
    let mut company = Command::new("sh")
        .args([
            "-c",
            &format!("echo $$ >{name}/cgroup.procs; exec sleep 600"),
        ])
        .spawn()
        .map_err(io)?;
    let served = serve("company", &by, &[])?;
    served.create("")?;
    let note = served.info("cgroup_note")?;
    let _ = company.kill();
    let _ = company.wait();
    check(note.contains("holds other processes"), || note.clone())?;
    ctl(&served.socket, &["shutdown", "--force"])?;
    drop(served);
    left()?;
    // A user to whom it is delegated.
    for file in [
        "",
        "cgroup.procs",
        "cgroup.subtree_control",
        "cgroup.threads",
    ] {
        let path = place.join(file);
        std::os::unix::fs::chown(&path, Some(1000), Some(1000)).map_err(io)?;
    }
    let by_user = [
        "sh",
        "-c",
        &enter,
        "sh",
        "setpriv",
        "--reuid=1000",
        "--regid=1000",
        "--clear-groups",
        "--no-new-privs",
    ];
    let scratch = std::env::temp_dir().join(format!("bh-user-{}", std::process::id()));
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch).map_err(io)?;
    std::os::unix::fs::chown(&scratch, Some(1000), Some(1000)).map_err(io)?;
    let socket = scratch.join("api").to_string_lossy().into_owned();
    let bulkhead_path = bin("bulkhead").to_string_lossy().into_owned();
    let mut all: Vec<&str> = by_user.to_vec();
    all.extend([bulkhead_path.as_str(), "serve", "--api-socket", &socket]);
    let mut command = Command::new(all.remove(0));
    command.args(all);
    let mut vmm = Vmm::spawn(command)?;
    let end = Instant::now() + LIMIT;
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("it does not serve"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let info = ctl(&socket, &["info"])?;
    check(info["cgroup_note"] == "", || info.to_string())?;
    let disk = scratch.join("d").to_string_lossy().into_owned();
    fs::write(&disk, vec![0; 1 << 20]).map_err(io)?;
    std::os::unix::fs::chown(&disk, Some(1000), Some(1000)).map_err(io)?;
    let (kernel, disk) = (guest_file("vmlinux"), format!("path={disk},id=d0,pids=40"));
    let args = [
        "create", "--kernel", &kernel, "--memory", "128M", "--serial", "none", "--disk", &disk,
    ];
    ctl(&socket, &args)?;
    let usage = ctl(&socket, &["stats", "d0"])?["usage"].clone();
    check(usage["pids"].as_u64() > Some(0), || usage.to_string())?;
    vmm.kill();
    left()?;
    let _ = bulkhead(&["reap"])?;
    let _ = fs::remove_dir_all(&scratch);
    fs::remove_dir(&place).map_err(|e| format!("{name}: {e}"))
}
