//! The audit without a guest: of a VM of root's and of one of an ordinary user's, by root and by that
//! user, held against what the kernel says and against the policies as built.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{AS_USER, Namespace, Undo, for_user};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};
use serde_json::Value;

use super::disk::LIMIT;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("audit");
    vec![
        test(
            "an ordinary user's VM is as it should be, for root's audit and for the user's own",
            of_an_ordinary_user,
        ),
        test(
            "the kernel's filters of each thread count as many system calls as audit --policies says",
            counts,
        ),
        test(
            "no process of a VM is dumpable, the VMM and the launcher neither",
            not_dumpable,
        ),
        test(
            "what whoever started it had left open, no process of a VM holds",
            left_open,
        ),
        test(
            "no policy that ships makes more system calls than its ceiling, as audit --policies counts them",
            ceilings,
        ),
        test(
            "what ships was built without what tests alone need: nothing hostile, nothing unconfined",
            features,
        ),
    ]
}

const PROGRAMS: [&str; 8] = [
    "bulkhead",
    "bulkhead-launcher",
    "bulkhead-blk",
    "bulkhead-net",
    "bulkhead-mem",
    "bulkhead-rng",
    "bulkhead-vsock",
    "bulkhead-console",
];

/// A machine with a device of each kind, which boots no guest.
pub struct Served {
    pub socket: String,
    /// A copy of `bulkhead` that its user may read.
    program: String,
    pub vmm: Vmm,
    _scratch: Scratch,
    _namespace: Namespace,
    _undo: Option<Undo>,
}

impl Served {
    /// Made by a process that this command becomes, or by root.
    pub fn new(name: &str, by: &[&str]) -> Result<Self, String> {
        let scratch = Scratch::new(name)?;
        let disk = scratch.disk("disk", 1 << 20, 43)?;
        for program in PROGRAMS {
            std::fs::copy(bin(program), scratch.path(program))
                .map_err(|e| format!("{program}: {e}"))?;
        }
        let kernel = scratch.path("vmlinux");
        std::fs::copy(guest_file("vmlinux"), &kernel).map_err(|e| format!("vmlinux: {e}"))?;
        let mut undo = None;
        let by_root = by.first() != AS_USER.first();
        if !by_root {
            undo = Some(for_user(&scratch.path(""))?);
        }
        let namespace = Namespace::new("audit")?;
        namespace.tap(
            "audit0",
            "",
            if by_root { "user root" } else { "user 65534" },
        )?;
        let enter = namespace.enter();
        let socket = scratch.path("api");
        let program = scratch.path("bulkhead");
        let mut command = Command::new(&enter[0]);
        command.arg(&enter[1]).args(by);
        command.args([&program, "serve", "--api-socket", &socket]);
        let mut vmm = Vmm::spawn(command)?;
        let end = Instant::now() + patience(LIMIT);
        while ctl(&socket, &["info"]).is_err() {
            let late = vmm.ended().is_some() || Instant::now() > end;
            check(!late, || vmm.story("it does not serve"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let disk = format!("path={disk},id=root");
        let vsock = format!("socket={}", scratch.path("vsock"));
        let console = format!("socket={}", scratch.path("console"));
        let create = [
            "create",
            "--kernel",
            &kernel,
            "--memory",
            "96M,max=224M",
            "--serial",
            "none",
            "--rng",
            "id=dice",
            "--disk",
            &disk,
            "--vsock",
            &vsock,
            "--console",
            &console,
            "--net",
            "tap=audit0,id=net",
        ];
        ctl(&socket, &create).map_err(|e| vmm.story(&e))?;
        Ok(Self {
            socket,
            program,
            vmm,
            _scratch: scratch,
            _namespace: namespace,
            _undo: undo,
        })
    }

    /// The copy of `bulkhead` that it runs.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Root's audit, which finds no deviation and leaves nothing unread.
    fn audited(&self, how: &[&str]) -> Result<Value, String> {
        let mut args = vec!["audit", "--json"];
        args.extend_from_slice(how);
        let output = bulkhead(&args)?;
        check(output.status.code() == Some(0), || told(how, &output))?;
        serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}: {}", told(how, &output)))
    }
}

/// An audit that is not as it should be.
pub fn told(how: &[&str], output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    format!("{how:?}: {}\n{out}\n{err}", output.status)
}

/// The processes of an audit, one of the VMM, one of the launcher, six of devices.
fn processes(audit: &Value) -> Result<&Vec<Value>, String> {
    let all = audit["processes"].as_array();
    let all = all.ok_or_else(|| audit.to_string())?;
    let of = |role: &str| all.iter().filter(|p| p["role"] == role).count();
    let roles = [of("vmm"), of("launcher"), of("device")];
    check(roles == [1, 1, 6], || format!("{roles:?} {audit}"))?;
    Ok(all)
}

fn of_an_ordinary_user() -> Verdict {
    let served = Served::new("audit-user", &AS_USER)?;
    let pid = served.vmm.pid().to_string();
    // By root: everything is read, and nothing deviates.
    for how in [["--api-socket", &served.socket], ["--pid", &pid]] {
        let audit = served.audited(&how)?;
        check(audit["verdict"] == "ok", || audit["verdict"].to_string())?;
        for process in processes(&audit)? {
            check(
                process["verdict"] == "ok" && process["unread"] == serde_json::json!([]),
                || process.to_string(),
            )?;
            let uid = &process["process"]["uid"][0];
            check(*uid == 65534, || format!("uid {uid}: {process}"))?;
        }
    }
    // By the user: what it may read is as it should be, and it is told that this is not all.
    for how in [["--api-socket", &served.socket], ["--pid", &pid]] {
        let output = Command::new(AS_USER[0])
            .args(&AS_USER[1..])
            .arg(&served.program)
            .args(["audit", "--json"])
            .args(how)
            .output()
            .map_err(|e| e.to_string())?;
        check(output.status.code() == Some(3), || told(&how, &output))?;
        let audit: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        check(audit["verdict"] == "unknown", || told(&how, &output))?;
        check(audit["deviations"] == serde_json::json!([]), || {
            told(&how, &output)
        })?;
        for process in processes(&audit)? {
            let none = process["deviations"] == serde_json::json!([]);
            let said = process["unread"].to_string();
            check(none && said.contains("run the audit as root"), || {
                process.to_string()
            })?;
        }
    }
    drop(served);
    nothing_left(Duration::from_secs(5))
}

fn counts() -> Verdict {
    let output = bulkhead(&["audit", "--policies", "--json"])?;
    let built: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
    let number = |name: &str, which: &str| {
        let all = built["policies"].as_array().into_iter().flatten();
        let mut of_it = all.filter(|p| p["process"] == name);
        of_it.find_map(|p| p[which].as_u64())
    };
    for by in [&[] as &[&str], &AS_USER] {
        let served = Served::new("audit-counts", by)?;
        let audit = served.audited(&["--api-socket", &served.socket])?;
        let mut seen = Vec::new();
        for process in processes(&audit)? {
            let threads = process["process"]["threads"].as_array();
            for thread in threads.into_iter().flatten() {
                let filters = &thread["filters"];
                let (names, counts) =
                    (filters["policies"].as_array(), filters["counts"].as_array());
                let (Some(names), Some(counts)) = (names, counts) else {
                    return Err(format!("the kernel shows no filters: {process}"));
                };
                for (name, count) in names.iter().zip(counts) {
                    let name = name.as_str().unwrap_or_default();
                    let expected = match name.strip_suffix(":setup") {
                        Some(name) => number(name, "setup_syscalls"),
                        None => number(name, "steady_syscalls"),
                    };
                    check(expected.is_some() && count.as_u64() == expected, || {
                        format!("{name}: {count} in the kernel, {expected:?} as built: {process}")
                    })?;
                    seen.push(name.to_owned());
                }
                // The newest is the narrowest: what all let through is what that does.
                let newest = counts.last().and_then(Value::as_u64);
                let all = filters["syscalls"]
                    .as_array()
                    .map(|calls| calls.len() as u64);
                check(newest == all, || {
                    format!("{newest:?} and {all:?}: {thread}")
                })?;
            }
        }
        for name in [
            "bulkhead-vmm",
            "bulkhead-launcher",
            "bulkhead-blk",
            "bulkhead-rng",
            "bulkhead-mem",
            "bulkhead-vsock",
            "bulkhead-console",
            "bulkhead-net",
            "bulkhead-vcpu",
        ] {
            let there = |seen: &String| seen.trim_end_matches(":setup").starts_with(name);
            check(seen.iter().any(there), || format!("no {name}: {seen:?}"))?;
        }
    }
    nothing_left(Duration::from_secs(5))
}

fn not_dumpable() -> Verdict {
    for by in [&[] as &[&str], &AS_USER] {
        let served = Served::new("audit-dump", by)?;
        let audit = served.audited(&["--api-socket", &served.socket])?;
        for process in processes(&audit)? {
            let own = process["process"]["uid"][1].as_u64();
            // Of what is root the kernel does not tell: of root's VMs, the launcher. That of an
            // ordinary user's does the same.
            if by.is_empty() && process["role"] == "launcher" && own == Some(0) {
                continue;
            }
            let dumpable = &process["process"]["dumpable"];
            check(*dumpable == false, || process.to_string())?;
            // Read here once more: what is not dumpable belongs to root in /proc (proc(5)), and
            // core(5) writes no core of it.
            let pid = &process["pid"];
            let owner = |path: &str| {
                let path = format!("/proc/{pid}/{path}");
                std::fs::metadata(&path).map_err(|e| format!("{path}: {e}"))
            };
            let (uid, gid) = (owner("environ")?.uid(), owner("environ")?.gid());
            check(
                (uid, gid) == (0, 0) && own.is_some_and(|own| own != 0),
                || format!("{uid}:{gid}, and it is {own:?}: {process}"),
            )?;
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))
                .map_err(|e| e.to_string())?;
            let core = limits.lines().find(|l| l.starts_with("Max core file size"));
            let zero = core.is_some_and(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.ends_with(&["0", "0", "bytes"])
            });
            check(zero, || format!("{core:?}: {process}"))?;
        }
    }
    nothing_left(Duration::from_secs(5))
}

/// Under the launcher: stand-alone ones have more to do. The longest name that a policy begins with
/// counts.
const CEILINGS: [(&str, u64); 8] = [
    ("bulkhead-net", 12),
    ("bulkhead-blk", 16),
    ("bulkhead-rng", 10),
    ("bulkhead-vsock", 14),
    ("bulkhead-console", 13),
    ("bulkhead-mem", 11),
    ("bulkhead-vcpu", 12),
    ("bulkhead-vmm", 48),
];

fn ceilings() -> Verdict {
    let output = bulkhead(&["audit", "--policies", "--json"])?;
    let built: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
    let policies = built["policies"].as_array().ok_or("no policies")?;
    let mut seen = 0;
    for policy in policies {
        let name = policy["process"].as_str().unwrap_or_default();
        let ceiling = CEILINGS.iter().find(|(kind, _)| name.starts_with(kind));
        let Some((_, most)) = ceiling.filter(|_| !name.ends_with("-socket")) else {
            continue;
        };
        seen += 1;
        let calls = policy["syscalls"].as_array().ok_or("no calls")?;
        let count = policy["steady_syscalls"].as_u64().ok_or("no count")?;
        check(count == calls.len() as u64, || policy.to_string())?;
        check((1..=*most).contains(&count), || {
            format!("{name}: {count} system calls, {most} are its ceiling")
        })?;
        for never in [
            "execve", "execveat", "open", "openat", "socket", "connect", "mount", "ptrace",
        ] {
            check(!calls.iter().any(|call| call == never), || {
                format!("{name} has {never}")
            })?;
        }
    }
    // Each kind, and those of which a kind has several.
    check(seen >= CEILINGS.len() + 5, || {
        format!("{seen} policies: {built}")
    })
}

/// What the programs of no other feature contain.
const NEVER_SHIPPED: [(&str, &[u8]); 4] = [
    ("hostile", b"BULKHEAD-HOSTILE-IS-TOLD"),
    ("unconfined", b"built without confinement"),
    ("stubs", b"/ttrpc-0."),
    ("stubs", b"/tokio-1."),
];

fn features() -> Verdict {
    for program in PROGRAMS {
        let content = std::fs::read(bin(program)).map_err(|e| format!("{program}: {e}"))?;
        for (feature, mark) in NEVER_SHIPPED {
            let found = content.windows(mark.len()).any(|bytes| bytes == mark);
            check(!found, || format!("{program} was built with {feature}"))?;
        }
        let output = Command::new(bin(program)).arg("--attempts").output();
        let output = output.map_err(|e| format!("{program}: {e}"))?;
        let silent = output.stdout.is_empty() && !output.status.success();
        check(silent, || told(&[program, "--attempts"], &output))?;
    }
    Ok(())
}

fn left_open() -> Verdict {
    // A shell that forgot its files: one that only root reads, a directory, one far up.
    let forgets = "exec 9</etc/shadow 7</etc 123<>/dev/zero; exec \"$@\"";
    let served = Served::new("left-open", &["bash", "-c", forgets, "bash"])?;
    let vmm = served.vmm.pid();
    let processes = bulkhead_tests::host::sh(&format!(
        "echo {vmm}; for p in $(pgrep -P {vmm}); do echo $p; pgrep -P $p; done"
    ))?;
    let mut looked_at = 0;
    for pid in processes.split_whitespace() {
        let held = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .map_err(|e| format!("descriptors of {pid}: {e}"))?;
        for entry in held.flatten() {
            let Ok(what) = std::fs::read_link(entry.path()) else {
                continue;
            };
            let what = what.to_string_lossy().into_owned();
            let forgotten = ["/etc/shadow", "/etc", "/dev/zero"].contains(&what.as_str());
            check(!forgotten, || format!("{pid} holds {what}"))?;
        }
        looked_at += 1;
    }
    // The VMM, its launcher and a process for each of six devices.
    check(looked_at >= 8, || {
        format!("only {looked_at} processes: {processes}")
    })?;
    served.audited(&["--pid", &vmm.to_string()]).map(drop)
}
