//! A device process that attacks the VMM by every channel that it has: the VM and its other disk
//! go on, the event says why the process had to go, and the device ends quarantined. No guest is
//! booted: `bulkhead serve` and a machine that is created are enough.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_tests::chaos;
use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// An attack and the class of the crash that comes of it.
const ATTACKS: [(&str, &str); 8] = [
    ("oversize", "protocol"),
    ("unasked", "protocol"),
    ("control-fds", "protocol"),
    ("be-flood", "protocol"),
    ("be-oversize", "protocol"),
    ("be-fds", "protocol"),
    // No process of ours may close half a socket, so that it does not come to that.
    ("half-ctl", "seccomp"),
    ("half-vu", "seccomp"),
];
/// Attacks on vhost-user's own channel while the VMM asks nothing there.
const UNHEARD: [&str; 3] = ["vu-flood", "vu-oversize", "vu-fds"];
/// Attacks before the first answer, and what `create` says of them.
const EARLY: [(&str, &str); 8] = [
    ("early-vu-flood", "a header with flags 0x1"),
    ("early-vu-large", "4294967295 bytes"),
    ("early-vu-fds", "descriptors"),
    ("early-half-ctl", "ended at its start"),
    ("early-half-vu", "closed"),
    ("early-oversize", "65536 are allowed"),
    ("early-end", "exit status 7"),
    ("early-silence", "within 5"),
];

/// Everywhere.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hostile-device");
    vec![
        test(
            "floods, oversize frames, surplus descriptors: only that disk is lost",
            attacks,
        ),
        test("an answer that never ends misses its deadline", drip),
        test("one that does not even start is one line", early),
        test(
            "a successor that ends by itself is told by its status; events come in their order",
            order,
        ),
    ]
}

/// Nothing of any VM is left, where these tests have the host for themselves.
fn left() -> Verdict {
    match std::env::var_os("BULKHEAD_HOST") {
        Some(_) => nothing_left(Duration::from_secs(5)),
        None => Ok(()),
    }
}

struct Bed {
    vmm: Vmm,
    socket: String,
    scratch: Scratch,
}

/// A directory for `--libexec` in which the hostile device is `bulkhead-blk`.
pub fn libexec(scratch: &Scratch) -> Result<String, String> {
    let libexec = scratch.path("libexec");
    std::fs::create_dir(&libexec).map_err(|e| e.to_string())?;
    for (link, to) in [
        ("bulkhead-launcher", "bulkhead-launcher"),
        ("bulkhead-net", "bulkhead-net"),
        ("bulkhead-blk", "hostile-device"),
    ] {
        let place = Path::new(&libexec).join(link);
        let program = std::path::absolute(bin(to)).map_err(|e| e.to_string())?;
        symlink(program, place).map_err(|e| e.to_string())?;
    }
    Ok(libexec)
}

fn serve(name: &str) -> Result<Bed, String> {
    let scratch = Scratch::new(name)?;
    let libexec = libexec(&scratch)?;
    let socket = scratch.path("api");
    let args = [
        "serve",
        "--api-socket",
        &socket,
        "--libexec",
        &libexec,
        "--restarts",
        "1:3600",
    ];
    let vmm = Vmm::start(&args)?;
    let end = Instant::now() + LIMIT;
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("it does not serve"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Bed {
        vmm,
        socket,
        scratch,
    })
}

impl Bed {
    fn create(&self, attacks: &[&str]) -> Result<(), String> {
        let kernel = guest_file("vmlinux");
        let mut args = vec![
            "create".to_owned(),
            "--kernel".into(),
            kernel,
            "--memory".into(),
            "128M".into(),
            "--serial".into(),
            "none".into(),
        ];
        let mut disk = |id: &str, serial: &str| -> Result<(), String> {
            let path = self.scratch.disk(id, 1 << 20, 7)?;
            args.push("--disk".into());
            args.push(format!("path={path},id={id},serial={serial}"));
            Ok(())
        };
        disk("good", "good")?;
        for attack in attacks {
            disk(attack, &format!("evil-{attack}"))?;
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        ctl(&self.socket, &args)?;
        let of_time = |attack: &&&str| attack.starts_with("til-");
        for attack in attacks.iter().filter(|attack| !of_time(attack)) {
            // It begins then, and may end before it has answered; its successor is told the same.
            let told = ctl(&self.socket, &["update-disk", attack, "--iops", "1000"]);
            check(told.is_ok() || !UNHEARD.contains(attack), || {
                format!("{attack}: {told:?}")
            })?;
        }
        Ok(())
    }

    /// The good disk answers as it did before.
    fn good_lives(&self) -> Verdict {
        let stats = ctl(&self.socket, &["stats", "good"])?;
        check(stats["queues"].is_array(), || stats.to_string())?;
        let devices = ctl(&self.socket, &["devices"])?;
        let mut list = devices.as_array().into_iter().flatten();
        let good = list
            .find(|d| d["id"] == "good")
            .cloned()
            .unwrap_or_default();
        check(good["state"] == "ready" && good["incarnation"] == 1, || {
            good.to_string()
        })
    }

    /// Events so far, one of each line.
    fn events(&self) -> Result<Vec<Value>, String> {
        let output = bulkhead(&["ctl", "--socket", &self.socket, "--json", "events"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text.lines().map(serde_json::from_str);
        lines
            .collect::<Result<_, _>>()
            .map_err(|e| format!("{e} in {text}"))
    }

    fn wait_for(&self, kind: &str, subject: &str) -> Result<Value, String> {
        let end = Instant::now() + LIMIT;
        loop {
            let events = self.events()?;
            let mut list = events.iter();
            if let Some(event) = list.find(|e| e["kind"] == kind && e["subject"] == subject) {
                return Ok(event.clone());
            }
            check(Instant::now() < end, || {
                self.vmm
                    .story(&format!("no {kind} of {subject} in {events:?}"))
            })?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Kinds of the events about a device, and which process they are about.
    fn kinds(&self, subject: &str) -> Result<Vec<String>, String> {
        let events = self.events()?;
        let about = events.iter().filter(|e| e["subject"] == subject);
        let kind = |event: &Value| {
            let of = event["what"]["incarnation"].as_u64().unwrap_or(0);
            format!("{} {of}", event["kind"].as_str().unwrap_or_default())
        };
        Ok(about.map(kind).collect())
    }

    fn end(mut self) -> Verdict {
        ctl(&self.socket, &["shutdown", "--force"])?;
        self.vmm.ends_with(0, LIMIT)?;
        left()
    }
}

fn attacks() -> Verdict {
    let bed = serve("hostile")?;
    let mut names: Vec<&str> = ATTACKS.iter().map(|(name, _)| *name).collect();
    names.extend(UNHEARD);
    bed.create(&names)?;
    for (attack, class) in ATTACKS {
        let crash = bed.wait_for("device.crashed", attack)?;
        check(crash["what"]["why"] == class, || {
            format!("{attack}: {crash}")
        })?;
        let what = crash["what"]["what"].as_str().unwrap_or_default();
        check(!what.is_empty(), || format!("{attack}: {crash}"))?;
        chaos::injected(&format!("from a device process, twice: {attack}"));
        // Its successor does the same, which is once too often.
        bed.wait_for("device.quarantined", attack)?;
        bed.good_lives()?;
    }
    // What is sent where the VMM does not listen costs nobody anything.
    let devices = ctl(&bed.socket, &["devices"])?;
    for name in UNHEARD {
        let mut list = devices.as_array().into_iter().flatten();
        let found = list.find(|d| d["id"] == name).cloned().unwrap_or_default();
        check(
            found["state"] == "ready" && found["incarnation"] == 1,
            || found.to_string(),
        )?;
    }
    let events = bed.events()?;
    let numbers: Vec<u64> = events
        .iter()
        .filter_map(|e| e["sequence"].as_u64())
        .collect();
    check(numbers.windows(2).all(|w| w[0] + 1 == w[1]), || {
        format!("{numbers:?}")
    })?;
    for kind in [
        "device.spawned",
        "device.ready",
        "device.exited",
        "machine.created",
    ] {
        check(events.iter().any(|e| e["kind"] == kind), || {
            format!("no {kind}")
        })?;
    }
    bed.end()
}

fn drip() -> Verdict {
    let bed = serve("drip")?;
    bed.create(&["drip"])?;
    std::thread::sleep(Duration::from_secs(2));
    // The manager waits for no answer: others are served meanwhile.
    let socket = bed.socket.clone();
    let asked = std::thread::spawn(move || ctl(&socket, &["stats", "drip"]));
    let begun = Instant::now();
    bed.good_lives()?;
    check(begun.elapsed() < Duration::from_secs(4), || {
        "the good disk waits".into()
    })?;
    let answer = asked.join().map_err(|_| "a panic")?;
    check(answer.is_err(), || format!("{answer:?}"))?;
    let crash = bed.wait_for("device.crashed", "drip")?;
    let why = crash["what"]["why"].as_str().unwrap_or_default().to_owned();
    check(why == "deadline" || why == "protocol", || crash.to_string())?;
    bed.good_lives()?;
    bed.end()
}

fn early() -> Verdict {
    let bed = serve("early")?;
    for (attack, words) in EARLY {
        let error = bed.create(&[attack]).err().ok_or("it was created")?;
        check(error.lines().count() == 1, || error.clone())?;
        // The device has the attack's name.
        let why = error.replace(attack, "");
        check(why.contains(words), || error.clone())?;
    }
    // What became of its process was told, too.
    let kinds = bed.kinds("early-end")?;
    check(kinds == ["device.spawned 1", "device.exited 1"], || {
        format!("{kinds:?}")
    })?;
    let exit = bed.wait_for("device.exited", "early-end")?;
    check(exit["what"]["status"] == 7, || exit.to_string())?;
    // The VMM takes another.
    bed.create(&[])?;
    bed.good_lives()?;
    bed.end()
}

fn order() -> Verdict {
    let bed = serve("order")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let until = now.map_err(|e| e.to_string())?.as_secs() + 4;
    let name = format!("til-{until}");
    bed.create(&[&name])?;
    let devices = ctl(&bed.socket, &["devices"])?;
    let mut list = devices.as_array().into_iter().flatten();
    let pid = list.find(|d| d["id"] == name.as_str()).map(|d| &d["pid"]);
    let pid = pid.ok_or("no device")?.to_string();
    std::thread::sleep(Duration::from_secs(6));
    sh(&format!("kill -9 {pid}"))?;
    bed.wait_for("device.quarantined", &name)?;
    let kinds = bed.kinds(&name)?;
    let wanted = [
        "device.spawned 1",
        "device.ready 1",
        "device.crashed 1",
        "device.exited 1",
        "device.spawned 2",
        "device.crashed 2",
        "device.exited 2",
        "device.quarantined 0",
    ];
    check(kinds == wanted, || format!("{kinds:?}"))?;
    let mut events = bed.events()?;
    events.retain(|e| e["subject"] == name.as_str() && e["kind"] == "device.crashed");
    let whats: Vec<_> = events.iter().map(|e| &e["what"]).collect();
    check(
        whats[0]["why"] == "signal" && whats[0]["signal"] == 9,
        || format!("{whats:?}"),
    )?;
    check(whats[1]["why"] == "exit" && whats[1]["status"] == 7, || {
        format!("{whats:?}")
    })?;
    bed.good_lives()?;
    // One that is taken away: its process ends before it is gone.
    ctl(&bed.socket, &["remove-device", "good", "--force"])?;
    bed.wait_for("device.removed", "good")?;
    let mut kinds = bed.kinds("good")?;
    kinds.retain(|kind| kind.starts_with("device."));
    let end = kinds.iter().rev().take(2).rev();
    check(
        end.eq(["device.exited 1", "device.removed 0"].iter()),
        || format!("{kinds:?}"),
    )?;
    bed.end()
}
