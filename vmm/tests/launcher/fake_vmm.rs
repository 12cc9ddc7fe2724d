//! A process that plays the VMM, so that it can be killed, run as another user, and counted
//! without other tests beside it. It is this program's only ignored test; `Bed::fake_vmm`
//! starts it and reads what it prints after "fake: ".

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use bulkhead_vmm::launcher::{Access, Launcher};

use crate::bed::{Bed, alive, children, proc_field, soon, spec};

macro_rules! say {
    ($($arg:tt)*) => {
        println!("fake: {}", format_args!($($arg)*))
    };
}

#[test]
#[ignore = "started by other tests as a process of its own"]
fn fake_vmm() {
    let (Ok(mode), Ok(bed)) = (
        std::env::var("BULKHEAD_FAKE_VMM"),
        std::env::var("BULKHEAD_FAKE_BED"),
    ) else {
        return;
    };
    let bed = Bed::at(&bed);
    match mode.as_str() {
        "stay" => stay(&bed),
        "cycles" => cycles(&bed),
        "says" => says(&bed),
        "facts" | "facts-in-chroot" => facts(&bed),
        "refused" | "refused-namespaces" => refused(&bed),
        other => panic!("{other}"),
    }
}

/// A VM that runs until it is killed.
fn stay(bed: &Bed) {
    let launcher = bed.launcher();
    let _api = launcher.bind_unix(&bed.path("api"), "API socket").unwrap();
    let one = launcher.spawn(spec("one", &["wait"])).unwrap();
    let two = launcher.spawn(spec("two", &["wait"])).unwrap();
    for pid in [launcher.pid(), one.pid, two.pid] {
        say!("pid {pid}");
    }
    loop {
        std::thread::park();
    }
}

/// Spawns and kills; counts descriptors and processes before and after.
fn cycles(bed: &Bed) {
    let launcher = bed.launcher();
    let fds = |who: &str| fs::read_dir(format!("/proc/{who}/fd")).map(Iterator::count);
    let own = || fds("self").unwrap();
    // As a user one may not look into a process that is not dumpable.
    let its = || fds(&launcher.pid().to_string()).ok();
    let one = |incarnation: u64| {
        let begin = Instant::now();
        let mut spec = spec("disk0", &["wait"]);
        spec.incarnation = incarnation;
        let device = launcher.spawn(spec).unwrap();
        let seen = begin.elapsed().as_micros();
        launcher.kill("disk0", incarnation).unwrap();
        let mut events = Vec::new();
        soon("the exit", || {
            events.extend(launcher.poll_events().unwrap());
            !events.is_empty()
        });
        (u128::from(device.spawn_us), seen, device.pid)
    };
    one(0);
    let before = (own(), its());
    let mut times = Vec::new();
    for incarnation in 1..=200 {
        let (us, seen, pid) = one(incarnation);
        assert!(!alive(pid));
        times.push((us, seen));
    }
    assert_eq!((own(), its()), before);
    assert_eq!(children(launcher.pid()), [] as [i32; 0]);
    times.sort_unstable();
    let (us, seen) = times[times.len() / 2];
    let (worst, _) = times[times.len() * 99 / 100];
    say!(
        "spawn to exec: median {us} µs in the launcher, {seen} µs seen by the VMM, p99 {worst} µs (200 spawns)"
    );
}

fn says(bed: &Bed) {
    let launcher = bed.launcher();
    let _device = launcher.spawn(spec("disk0", &["say"])).unwrap();
    soon("its exit", || !launcher.poll_events().unwrap().is_empty());
}

fn facts(bed: &Bed) {
    let launcher = bed.launcher();
    let device = launcher.spawn(spec("disk0", &["wait"])).unwrap();
    let pid = device.pid;
    let own: Vec<&str> = ["user", "mnt", "pid", "net", "ipc", "uts"]
        .into_iter()
        .filter(|kind| {
            let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
            of(&pid.to_string()) != of("self")
        })
        .collect();
    say!(
        "facts uid {} caps {} nnp {} seccomp {} root {} own {}",
        proc_field(pid, "Uid").split_whitespace().next().unwrap(),
        proc_field(pid, "CapEff"),
        proc_field(pid, "NoNewPrivs"),
        proc_field(pid, "Seccomp"),
        fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(),
        own.join(",")
    );
    let disk = bed.path("read-only");
    fs::write(&disk, [0; 4096]).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o400)).unwrap();
    match launcher.open_path(&disk, "disk", Access::ReadWrite, false) {
        Ok(_) => assert!(crate::bed::root()),
        Err(line) => say!("read-only {line}"),
    }
    launcher.kill("disk0", 0).unwrap();
    soon("its end", || !launcher.poll_events().unwrap().is_empty());
    assert!(
        launcher
            .open_path(&disk, "disk", Access::Read, false)
            .is_ok()
    );
}

/// A start that fails: of what, `Bed` and `probe` have seen to.
fn refused(bed: &Bed) {
    let line = match Launcher::start(&bed.config()) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    say!("start {line}");
    assert_eq!(
        children(i32::try_from(std::process::id()).unwrap()),
        [] as [i32; 0]
    );
}
