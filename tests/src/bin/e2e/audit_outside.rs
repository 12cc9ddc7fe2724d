//! The audit of VMs that somebody has changed from outside: a process moved to another cgroup, limits
//! raised, the VMM stopped. And what holds the VMM beside its filters, tried in its place.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{AS_USER, sh};
use bulkhead_tests::inject::{self, Call};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{bulkhead, ctl, patience};
use serde_json::{Value, json};

use super::audit_native::{Served, told};
use super::disk::LIMIT;
use super::resources::mount;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("audit");
    vec![
        test(
            "a process that was moved to another cgroup than its own is found, and both are named",
            moved,
        ),
        test(
            "a stranger in a device's namespaces is found, and code that somebody has written to",
            changed,
        ),
        test(
            "text shows of the VMM and the launcher what it shows of devices",
            text,
        ),
        test(
            "a VMM that is stopped, another user's and none at all are told in one line with what to do",
            lines,
        ),
    ]
}

/// What a trace of all system calls would take for violations of the policies.
pub fn hostile() -> Vec<Test> {
    let test = Test::short("hostile-device");
    vec![
        test(
            "every thread of the VMM is under Landlock: it opens, executes and connects to nothing without its filters either",
            landlock,
        ),
        test(
            "every device process has its securebits locked and is under Landlock, without its filters too",
            locked,
        ),
    ]
}

/// Those that need what only the nested host has: root's right to raise limits.
pub fn tests() -> Vec<Test> {
    vec![Test::short("audit")(
        "limits that root has raised are found, of each kind of process",
        raised,
    )]
}

fn pid_of(served: &Served, id: &str) -> Result<Value, String> {
    let devices = ctl(&served.socket, &["devices"])?;
    let mut all = devices.as_array().into_iter().flatten();
    let device = all.find(|device| device["id"] == id);
    let pid = device.map(|device| device["pid"].clone());
    pid.ok_or_else(|| devices.to_string())
}

/// What root's audit finds wrong, of one process or of the VM.
fn wrong(how: &[&str], pid: &Value) -> Result<Vec<String>, String> {
    let mut args = vec!["audit", "--json"];
    args.extend_from_slice(how);
    let output = bulkhead(&args)?;
    let audit: Value = serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("{e}: {}", told(how, &output)))?;
    let processes = audit["processes"].as_array().into_iter().flatten();
    let mut lines: Vec<String> = Vec::new();
    for process in processes.filter(|process| process["pid"] == *pid) {
        let of_it = process["deviations"].as_array().into_iter().flatten();
        lines.extend(of_it.filter_map(|line| line.as_str().map(str::to_owned)));
    }
    let of_all = audit["deviations"].as_array().into_iter().flatten();
    lines.extend(of_all.filter_map(|line| line.as_str().map(str::to_owned)));
    let code = if lines.is_empty() { 0 } else { 1 };
    check(output.status.code() == Some(code), || told(how, &output))?;
    Ok(lines)
}

/// A directory that goes with the value.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

fn moved() -> Verdict {
    let root = mount().ok_or("cgroup v2 is not mounted")?;
    let served = Served::new("audit-moved", &[])?;
    let info = ctl(&served.socket, &["info"])?;
    let own = info["cgroup"].as_str().unwrap_or_default();
    check(!own.is_empty(), || info.to_string())?;
    let group = root.join(own.trim_start_matches('/'));
    let pid = served.vmm.pid().to_string();
    let ways = [["--api-socket", &served.socket], ["--pid", &pid]];
    let put = |pid: &Value, to: &Path| {
        let file = to.join("cgroup.procs");
        fs::write(&file, pid.to_string()).map_err(|e| format!("{}: {e}", file.display()))
    };
    let foreign = Made(root.join("bulkhead-vm-1-1/dev-root"));
    fs::create_dir_all(&foreign.0).map_err(|e| e.to_string())?;
    let sibling = group.join("dev-dice");
    let (device, vmm) = (pid_of(&served, "root")?, json!(served.vmm.pid()));
    let launcher = &info["launcher_pid"];
    let leaf = format!("{own}/dev-root");
    for to in [&sibling, &foreign.0, &root] {
        put(&device, to)?;
        let path = to.strip_prefix(&root).map_err(|e| e.to_string())?;
        let path = format!("/{}", path.display());
        for way in &ways {
            let lines = wrong(way, &device)?;
            let [line] = lines.as_slice() else {
                return Err(format!("{way:?}, {path}: {lines:?}"));
            };
            // Without the API nobody says which leaf is whose.
            let names = line.contains(&path) && (way[0] == "--pid" || line.contains(&leaf));
            check(names, || format!("{way:?}, {path}: {line}"))?;
        }
    }
    put(&device, &group.join("dev-root"))?;
    // Somebody else's, which uses up what is the device's.
    let mut stranger = Command::new("sleep")
        .arg("600")
        .spawn()
        .map_err(|e| e.to_string())?;
    let found = put(&json!(stranger.id()), &group.join("dev-root")).and_then(|()| {
        let found = ways.iter().map(|way| wrong(way, &device));
        found.collect::<Result<Vec<_>, _>>()
    });
    let ended = stranger.kill().and_then(|()| stranger.wait());
    ended.map_err(|e| e.to_string())?;
    for lines in found? {
        let named = matches!(lines.as_slice(), [line] if line.contains(&stranger.id().to_string()));
        check(named, || format!("process {}: {lines:?}", stranger.id()))?;
    }
    for (pid, to) in [(&vmm, &sibling), (launcher, &foreign.0)] {
        let before =
            fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|e| e.to_string())?;
        let before = before.lines().find_map(|line| line.strip_prefix("0::/"));
        let before = root.join(before.ok_or("no cgroup v2")?);
        put(pid, to)?;
        for way in &ways {
            let lines = wrong(way, pid)?;
            check(lines.len() == 1, || format!("{way:?}, {to:?}: {lines:?}"))?;
        }
        put(pid, &before)?;
    }
    for way in &ways {
        let lines = wrong(way, &device)?;
        check(lines.is_empty(), || format!("{way:?}: {lines:?}"))?;
    }
    Ok(())
}

fn changed() -> Verdict {
    let served = Served::new("audit-changed", &[])?;
    let pid = served.vmm.pid().to_string();
    let ways = [["--api-socket", &served.socket], ["--pid", &pid]];
    let device = pid_of(&served, "root")?;
    let mut stranger = Command::new("nsenter")
        .args(["--target", &device.to_string(), "--net", "sleep", "600"])
        .spawn()
        .map_err(|e| format!("nsenter: {e}"))?;
    let named = format!("process {}, which is none of this VM's", stranger.id());
    let end = Instant::now() + patience(LIMIT);
    let found = loop {
        let found =
            wrong(&ways[0], &device).and_then(|lines| Ok((lines, wrong(&ways[1], &device)?)));
        // Until it is in there.
        let there = found.as_ref().is_ok_and(|(lines, _)| !lines.is_empty());
        if there || found.is_err() || Instant::now() > end {
            break found;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let ended = stranger.kill().and_then(|()| stranger.wait());
    ended.map_err(|e| e.to_string())?;
    let (by_api, by_pid) = found?;
    for lines in [by_api, by_pid] {
        let said = matches!(lines.as_slice(), [line] if line.contains(&named));
        check(said, || format!("{named}: {lines:?}"))?;
    }
    // A byte of its code is written, and is what it was: that the page was written to is seen.
    let maps = fs::read_to_string(format!("/proc/{device}/maps")).map_err(|e| e.to_string())?;
    let code = maps
        .lines()
        .find(|line| line.contains(" r-xp ") && line.contains(" /"));
    let start = code.and_then(|line| line.split('-').next());
    let start = start.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let start = start.ok_or_else(|| format!("no code: {maps}"))?;
    let io = |e: std::io::Error| format!("/proc/{device}/mem: {e}");
    let memory = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{device}/mem"))
        .map_err(io)?;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, start).map_err(io)?;
    memory.write_all_at(&byte, start).map_err(io)?;
    for way in &ways {
        let lines = wrong(way, &device)?;
        let said = matches!(lines.as_slice(), [line] if line.contains("its code is not as the file has it"));
        check(said, || format!("{way:?}: {lines:?}"))?;
    }
    Ok(())
}

/// Limits of a cgroup that a client has asked for, and root has lifted behind the VMM's back.
fn lifted(served: &Served, info: &Value, how: &[&str]) -> Verdict {
    let root = mount().ok_or("cgroup v2 is not mounted")?;
    let own = info["cgroup"].as_str().unwrap_or_default();
    let leaf = root.join(own.trim_start_matches('/')).join("dev-root");
    let limits = [
        "limit", "root", "--cpu", "50", "--memory", "256M", "--pids", "40",
    ];
    ctl(&served.socket, &limits)?;
    let device = pid_of(served, "root")?;
    let lines = wrong(how, &device)?;
    check(lines.is_empty(), || format!("{lines:?}"))?;
    for (file, open) in [
        ("cpu.max", "max 100000"),
        ("memory.max", "max"),
        ("pids.max", "max"),
        ("memory.max", "268439552"),
    ] {
        let place = leaf.join(file);
        let named = |e: std::io::Error| format!("{}: {e}", place.display());
        let before = fs::read_to_string(&place).map_err(named)?;
        fs::write(&place, open).map_err(named)?;
        let lines = wrong(how, &device)?;
        check(lines.len() == 1 && lines[0].contains(file), || {
            format!("{file} {open}: {lines:?}")
        })?;
        fs::write(&place, before.trim()).map_err(named)?;
    }
    Ok(())
}

fn raised() -> Verdict {
    let served = Served::new("audit-raised", &[])?;
    let info = ctl(&served.socket, &["info"])?;
    let how = ["--api-socket", served.socket.as_str()];
    let devices = ctl(&served.socket, &["devices"])?;
    // What each says it needs is what it has.
    for device in devices.as_array().into_iter().flatten() {
        let limits = fs::read_to_string(format!("/proc/{}/limits", device["pid"]))
            .map_err(|e| e.to_string())?;
        let line = limits.lines().find(|l| l.starts_with("Max open files"));
        let most = line.and_then(|l| l.split_whitespace().nth(3)?.parse::<u64>().ok());
        let said = device["limits"]["descriptors"].as_u64();
        check(said.is_some() && most == said, || {
            format!("{line:?}: {device}")
        })?;
    }
    let (vmm, launcher) = (json!(served.vmm.pid()), &info["launcher_pid"]);
    let mut changes = vec![
        (vmm, "nofile", "1000000"),
        (launcher.clone(), "nofile", "1000000"),
        (launcher.clone(), "core", "unlimited"),
    ];
    for (id, name, value) in [
        ("root", "nofile", "1024"),
        ("dice", "nproc", "100000"),
        ("net", "core", "1"),
        ("dice", "msgqueue", "1"),
    ] {
        changes.push((pid_of(&served, id)?, name, value));
    }
    for (pid, name, value) in changes {
        let set = |value: &str| sh(&format!("prlimit --pid {pid} --{name}={value}"));
        let before = sh(&format!(
            "prlimit --pid {pid} --{name} --noheadings --raw --output SOFT,HARD"
        ))?;
        set(value)?;
        let lines = wrong(&how, &pid)?;
        let said = format!("RLIMIT_{}", name.to_uppercase());
        check(lines.len() == 1 && lines[0].contains(&said), || {
            format!("{pid} {name}={value}: {lines:?}")
        })?;
        set(&before.trim().replace(' ', ":"))?;
    }
    lifted(&served, &info, &how)?;
    let lines = wrong(&how, &Value::Null)?;
    check(lines.is_empty(), || format!("{lines:?}"))
}

/// What Landlock forbids and nothing else does.
fn attempts() -> Vec<Call> {
    let at = Some(i64::from(libc::AT_FDCWD));
    let open = |path: &[u8], flags: i32| Call {
        number: libc::SYS_openat,
        arguments: [at, None, Some(i64::from(flags))],
        bytes: path.to_vec(),
    };
    vec![
        open(b"/etc/passwd\0", libc::O_RDONLY),
        open(b"/\0", libc::O_RDONLY | libc::O_DIRECTORY),
        Call {
            number: libc::SYS_execve,
            arguments: [None, Some(0), Some(0)],
            bytes: b"/bin/true\0".to_vec(),
        },
    ]
}

/// A TCP socket of its own that connects to where nobody listens.
fn connect(tid: i32) -> Result<i64, String> {
    let socket = Call {
        number: libc::SYS_socket,
        arguments: [
            Some(i64::from(libc::AF_INET)),
            Some(i64::from(libc::SOCK_STREAM)),
            Some(0),
        ],
        bytes: Vec::new(),
    };
    let fd = *inject::calls(tid, &[socket])?.first().ok_or("no answer")?;
    check(fd >= 0, || format!("no socket: {fd}"))?;
    let mut address = u16::try_from(libc::AF_INET)
        .unwrap_or_default()
        .to_ne_bytes()
        .to_vec();
    address.extend(1_u16.to_be_bytes());
    address.extend([127, 0, 0, 1]);
    address.extend([0; 8]);
    let connect = Call {
        number: libc::SYS_connect,
        arguments: [Some(fd), None, Some(16)],
        bytes: address,
    };
    let close = Call {
        number: libc::SYS_close,
        arguments: [Some(fd), Some(0), Some(0)],
        bytes: Vec::new(),
    };
    let answers = inject::calls(tid, &[connect, close])?;
    check(answers.get(1) == Some(&0), || format!("{answers:?}"))?;
    answers.first().copied().ok_or_else(|| "no answer".into())
}

const REFUSED: i64 = -(libc::EACCES as i64);

fn landlock() -> Verdict {
    // Where nothing holds it, each can be done.
    let mut free = Command::new("sleep")
        .arg("600")
        .spawn()
        .map_err(|e| e.to_string())?;
    let pid = free.id().cast_signed();
    let end = Instant::now() + patience(LIMIT);
    // Until then it is this program's copy, which waits for other things.
    while fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name != "sleep\n")
        && Instant::now() < end
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut opens = attempts();
    opens.truncate(2);
    let answers = inject::calls(pid, &opens);
    let connected = connect(pid);
    let _ = free.kill();
    let _ = free.wait();
    let answers = answers?;
    check(answers.iter().all(|fd| *fd >= 0), || format!("{answers:?}"))?;
    let connected = connected?;
    check(connected != REFUSED, || format!("{connected}"))?;

    for by in [&[] as &[&str], &AS_USER] {
        let served = Served::new("audit-landlock", by)?;
        let info = ctl(&served.socket, &["info"])?;
        let abi = info["landlock_abi"].as_u64().unwrap_or_default();
        check(abi >= 4, || format!("Landlock of this kernel: {info}"))?;
        let pid = served.vmm.pid();
        let mut names = Vec::new();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
        for task in tasks.flatten() {
            let tid = task.file_name().to_string_lossy().into_owned();
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            // A thread of KVM's own runs none of the VMM's code.
            if name.starts_with("kvm-") {
                continue;
            }
            let tid: i32 = tid.parse().map_err(|_| tid)?;
            let answers = inject::calls(tid, &attempts())?;
            let refused = answers.iter().all(|answer| *answer == REFUSED);
            check(refused, || format!("{name} {tid}: {answers:?}"))?;
            let connected = connect(tid)?;
            check(connected == REFUSED, || {
                format!("{name} {tid}: {connected}")
            })?;
            names.push(name.trim().to_owned());
        }
        check(names.iter().any(|name| name == "vp-0"), || {
            format!("{names:?}")
        })?;
        // It serves on.
        ctl(&served.socket, &["devices"]).map_err(|e| served.vmm.story(&e))?;
        let output = bulkhead(&["audit", "--json", "--api-socket", &served.socket])?;
        let audit: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        let mut all = audit["processes"].as_array().into_iter().flatten();
        let said = all.find(|p| p["role"] == "vmm").map(|p| &p["landlock"]);
        let newest = &audit["landlock"]["abi"];
        check(said == Some(newest) && *newest == abi, || audit.to_string())?;
    }
    Ok(())
}

/// NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, and the locks of these and of KEEP_CAPS
/// (linux/securebits.h).
const LOCKED: i64 = 0b1110_1111;

fn locked() -> Verdict {
    for by in [&[] as &[&str], &AS_USER] {
        let served = Served::new("audit-locked", by)?;
        let devices = ctl(&served.socket, &["devices"])?;
        let mut looked_at = 0;
        for device in devices.as_array().into_iter().flatten() {
            let pid = device["pid"]
                .as_i64()
                .and_then(|pid| i32::try_from(pid).ok());
            let pid = pid.ok_or_else(|| device.to_string())?;
            let bits = Call {
                number: libc::SYS_prctl,
                arguments: [Some(i64::from(libc::PR_GET_SECUREBITS)), Some(0), Some(0)],
                bytes: Vec::new(),
            };
            // Its root is empty: there is but the root itself to be opened.
            let mut calls = attempts();
            let root = calls.swap_remove(1);
            let answers = inject::calls(pid, &[bits, root])?;
            check(answers == [LOCKED, REFUSED], || {
                format!("{answers:?}: {device}")
            })?;
            let connected = connect(pid)?;
            check(connected == REFUSED, || format!("{connected}: {device}"))?;
            looked_at += 1;
        }
        check(looked_at == 6, || devices.to_string())?;
        ctl(&served.socket, &["devices"]).map_err(|e| served.vmm.story(&e))?;
    }
    Ok(())
}

fn text() -> Verdict {
    let served = Served::new("audit-text", &[])?;
    let output = bulkhead(&["audit", "--api-socket", &served.socket])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    check(output.status.code() == Some(0), || text.clone())?;
    let info = ctl(&served.socket, &["info"])?;
    for (name, pid, policies) in [
        (
            "bulkhead",
            &json!(served.vmm.pid()),
            &["bulkhead-vmm (", "bulkhead-vcpu ("] as &[&str],
        ),
        (
            "bulkhead-launcher",
            &info["launcher_pid"],
            &["bulkhead-launcher"],
        ),
        (
            "bulkhead-rng dice",
            &pid_of(&served, "dice")?,
            &["bulkhead-rng ("],
        ),
    ] {
        let head = format!("\nDescriptors of {name} (pid {pid}):\n");
        let (_, part) = text.split_once(&head).ok_or(format!("{head}: {text}"))?;
        let part = part.split("\n\n").next().unwrap_or_default();
        let socket = part.lines().any(|line| line.contains("socket:["));
        check(socket, || format!("{name}: {part}"))?;
        for says in [
            "  system calls",
            "read from the kernel: ",
            "  mappings: ",
            "  limits: CORE 0, NOFILE ",
            "cgroup ",
        ] {
            check(part.contains(says), || format!("{name}: {says}: {part}"))?;
        }
        for policy in policies {
            check(part.contains(policy), || {
                format!("{name}: {policy}: {part}")
            })?;
        }
        let landlock = part.contains("  Landlock: ABI ");
        check(landlock == (name != "bulkhead-launcher"), || {
            format!("{name}: {part}")
        })?;
    }
    Ok(())
}

/// The one line of an audit that cannot be made.
fn line(output: &Output, code: i32) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let one = output.stdout.is_empty() && text.lines().count() == 1;
    check(one && output.status.code() == Some(code), || {
        told(&[], output)
    })?;
    Ok(text)
}

fn lines() -> Verdict {
    let nothing = line(&bulkhead(&["audit"])?, 2)?;
    let help = bulkhead(&["audit", "--help"])?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for option in ["--api-socket PATH", "--pid PID", "--policies"] {
        check(nothing.contains(option), || nothing.clone())?;
        check(help.contains(&format!("bulkhead audit {option}")), || {
            help.clone()
        })?;
    }
    let served = Served::new("audit-lines", &[])?;
    let pid = served.vmm.pid().to_string();
    // A program that this user may execute, wherever the VMM's own lies.
    sh(&format!("chmod -R a+rX $(dirname {})", served.program()))?;
    for how in [["--api-socket", &served.socket], ["--pid", &pid]] {
        let output = Command::new(AS_USER[0])
            .args(&AS_USER[1..])
            .args([served.program(), "audit"])
            .args(how)
            .output()
            .map_err(|e| e.to_string())?;
        let said = line(&output, 1)?;
        check(
            said.contains("another user's") && said.contains("run the audit as root"),
            || format!("{how:?}: {said}"),
        )?;
    }
    sh(&format!("kill -STOP {pid}"))?;
    let stopped = bulkhead(&["audit", "--api-socket", &served.socket]);
    let by_pid = bulkhead(&["audit", "--pid", &pid]);
    sh(&format!("kill -CONT {pid}"))?;
    let said = line(&stopped?, 1)?;
    let remedy = said.contains("is stopped") && said.contains(&format!("kill -CONT {pid}"));
    check(remedy, || said.clone())?;
    let by_pid = by_pid?;
    check(by_pid.status.code() == Some(0), || {
        told(&["--pid"], &by_pid)
    })?;
    ctl(&served.socket, &["devices"]).map(|_| ())
}
