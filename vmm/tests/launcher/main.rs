//! The launcher and its client, natively: no KVM is needed. Devices are this very program:
//! see `probe`. What must hold for a VMM that dies, and for a user who is not root, is tried
//! on a VMM that is this program too: see `fake_vmm`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Helpers of tests fail as tests do.

mod audits;
mod bed;
mod disks;
mod fake_vmm;
mod helpers;
mod links;
mod probe;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bed::{Bed, alive, proc_field, soon, spec};
use bulkhead_vmm::launcher::{Access, ExitOutcome, Launcher, LauncherError, LauncherEvent};

/// The exit that comes next.
fn next_exit(launcher: &Launcher) -> (String, u64, ExitOutcome) {
    let mut exits = Vec::new();
    soon("an exit", || {
        exits.extend(launcher.poll_events().unwrap());
        !exits.is_empty()
    });
    assert_eq!(exits.len(), 1, "{exits:?}");
    let LauncherEvent::Exited {
        device_id,
        incarnation,
        outcome,
        ..
    } = exits.remove(0)
    else {
        panic!("no exit: {exits:?}");
    };
    (device_id, incarnation, outcome)
}

#[test]
fn given_a_device_then_it_has_nothing_but_what_it_was_given() {
    let bed = Bed::new("given");
    let launcher = bed.launcher();
    let mut probe = spec("disk0", &["report"]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    probe.fds.push(theirs.into());
    let device = launcher.spawn(probe).unwrap();
    let mut control = device.control;
    control
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut told = String::new();
    while !told.ends_with("end\n") {
        let mut buffer = [0; 4096];
        let count = match control.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            count => count.unwrap(),
        };
        assert_ne!(count, 0, "{told}");
        told.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    // What it sees from inside.
    for line in [
        "pid 1",
        "fds 0 1 2 3 4 5",
        "args bulkhead-blk report",
        // That the launcher watches it.
        "environment 1",
        "bounding 0",
        "securebits 239",
        "open / Permission denied",
        "open /proc/self/status Permission denied",
        "clone3 Function not implemented",
    ] {
        assert!(told.lines().any(|l| l == line), "{line}: {told}");
    }
    // Its own descriptor is the one that was passed.
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut word = [0; 5];
    ours.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"fd 5\n");

    // What the kernel says of it from outside.
    let pid = device.pid;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(proc_field(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(proc_field(pid, "NoNewPrivs"), "1");
    assert_eq!(proc_field(pid, "Seccomp"), "2");
    assert_eq!(
        proc_field(pid, "NSpid").split_whitespace().last(),
        Some("1")
    );
    for kind in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{kind}");
    }
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(),
        0
    );
    let root = fs::metadata(format!("/proc/{pid}/root/")).unwrap();
    assert_eq!(root.permissions().mode() & 0o777, 0o555);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
    assert!(fs::write(format!("/proc/{pid}/root/x"), "x").is_err());
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(),
        Some("/")
    );
    if bed::root() {
        let uid: u32 = proc_field(pid, "Uid")
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!(uid >= 0x7000_0000, "{uid}");
        assert_eq!(proc_field(pid, "Groups"), "");
    }
}

#[test]
fn given_two_devices_then_each_has_an_identity_of_its_own() {
    let bed = Bed::new("two");
    let launcher = bed.launcher();
    let one = launcher.spawn(spec("one", &["wait"])).unwrap();
    let two = launcher.spawn(spec("two", &["wait"])).unwrap();
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(one.pid), of(two.pid), "{kind}");
    }
    if bed::root() {
        assert_ne!(proc_field(one.pid, "Uid"), proc_field(two.pid, "Uid"));
    }
    // The launcher itself: PID 1 of a namespace of its own, in a session of its own.
    let pid = launcher.pid();
    assert_eq!(
        proc_field(pid, "NSpid").split_whitespace().last(),
        Some("1")
    );
    assert_eq!(
        proc_field(pid, "NSsid").split_whitespace().last(),
        Some("1")
    );
    assert_eq!(proc_field(pid, "NoNewPrivs"), "1");
    assert_eq!(proc_field(pid, "Seccomp"), "2");
    assert_eq!(proc_field(pid, "CapBnd"), "0000000000000000");
}

#[test]
fn given_a_device_that_ends_then_the_launcher_says_how() {
    let bed = Bed::new("ends");
    let launcher = bed.launcher();
    for (incarnation, (args, expected)) in [
        (&["exit", "7"][..], "exit status 7"),
        (&["exit", "0"], "exit status 0"),
        // A call outside the outer filter, which the binary did not set itself.
        (&["socket"], "the system call socket"),
        (&["mount"], "the system call mount"),
        (&["fault"], "signal 11"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut spec = spec("disk0", args);
        spec.incarnation = incarnation as u64;
        let device = launcher.spawn(spec).unwrap();
        let (id, of, outcome) = next_exit(&launcher);
        assert_eq!((id.as_str(), of), ("disk0", incarnation as u64));
        let told = match outcome {
            ExitOutcome::Status(status) => format!("exit status {status}"),
            ExitOutcome::Signal(signal) => format!("signal {signal}"),
            ExitOutcome::Violation(call) => format!("the system call {}", call.name()),
        };
        assert_eq!(told, expected, "{args:?}");
        soon("the process is gone", || !alive(device.pid));
    }
}

#[test]
fn given_a_kill_then_that_incarnation_ends_and_no_other() {
    let bed = Bed::new("kill");
    let launcher = bed.launcher();
    let mut old = spec("disk0", &["wait"]);
    old.incarnation = 1;
    let mut new = spec("disk0", &["wait"]);
    new.incarnation = 2;
    let old = launcher.spawn(old).unwrap();
    let new = launcher.spawn(new).unwrap();
    launcher.kill("disk0", 3).unwrap();
    launcher.kill("disk1", 1).unwrap();
    launcher.kill("disk0", 1).unwrap();
    assert_eq!(
        next_exit(&launcher),
        ("disk0".into(), 1, ExitOutcome::Signal(libc::SIGKILL))
    );
    // Twice is no error.
    launcher.kill("disk0", 1).unwrap();
    soon("the old one is gone", || !alive(old.pid));
    assert!(alive(new.pid));
    assert_eq!(launcher.poll_events().unwrap(), []);
}

#[test]
fn given_a_bad_order_then_one_line_says_so_and_nothing_stays_behind() {
    let bed = Bed::new("orders");
    fs::write(bed.path("bulkhead-net"), "no program").unwrap();
    fs::set_permissions(bed.path("bulkhead-net"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(bed.path("bulkhead-blk"), bed.path("bulkhead-blk-image")).unwrap();
    fs::set_permissions(
        bed.path("bulkhead-blk-image"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    let launcher = bed.launcher();
    let _running = launcher.spawn(spec("twin", &["wait"])).unwrap();
    let many = vec!["x".to_owned(); 65];
    let zero = ["a\0b".to_owned()];
    for (id, binary, args, says) in [
        ("../x", "bulkhead-blk", &[][..], "an id is"),
        ("", "bulkhead-blk", &[], "an id is"),
        ("a\nb", "bulkhead-blk", &[], "an id is"),
        ("twin", "bulkhead-blk", &[], "is running"),
        ("x", "bulkhead-nic", &[], "not a device binary of this VM"),
        ("x", "/bin/sh", &[], "not a device binary of this VM"),
        ("x", "bulkhead-blk", &many, "too many"),
        ("x", "bulkhead-blk", &zero, "zero byte"),
        ("x", "bulkhead-net", &[], "is it a program of this machine?"),
        ("x", "bulkhead-blk-image", &[], "chmod 0755"),
    ] {
        let mut order = spec(id, &[]);
        order.binary = binary.into();
        order.policy = binary.into();
        order.args = args.to_vec();
        let line = launcher.spawn(order).unwrap_err().to_string();
        assert!(line.contains(says), "{id} {binary}: {line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    for policy in [
        "",
        "none",
        "bulkhead-net",
        "bulkhead-vmm",
        "bulkhead-blk-socket",
    ] {
        let mut order = spec("x", &[]);
        order.policy = policy.into();
        let line = launcher.spawn(order).unwrap_err().to_string();
        assert!(line.ends_with(": not a policy of bulkhead-blk"), "{line}");
    }
    assert_eq!(launcher.poll_events().unwrap(), []);
    assert_eq!(bed::children(launcher.pid()).len(), 1);
}

#[test]
fn given_bad_paths_then_each_is_refused_in_one_line() {
    let bed = Bed::new("paths");
    let launcher = bed.launcher();
    let fifo = std::ffi::CString::new(bed.path("fifo").to_str().unwrap()).unwrap();
    assert_eq!(bed::mkfifo(&fifo), 0);
    fs::write(bed.path("short"), "x").unwrap();
    for (name, says) in [
        ("absent", "no such file"),
        ("fifo", "is a FIFO"),
        (".", "is a directory"),
        ("short", "less than a sector"),
    ] {
        let path = bed.path(name);
        let error = launcher
            .open_path(&path, "disk", Access::ReadWrite, true)
            .unwrap_err();
        assert!(matches!(error, LauncherError::Refused(_)), "{error:?}");
        let line = error.to_string();
        assert!(line.starts_with("disk ") && line.contains(says), "{line}");
    }
    let (file, info) = launcher
        .open_path(&bed.path("bulkhead-blk"), "disk", Access::Read, true)
        .unwrap();
    assert_eq!(info.size, file.metadata().unwrap().len());
    let listener = launcher.bind_unix(&bed.path("api"), "API socket").unwrap();
    let again = launcher
        .bind_unix(&bed.path("api"), "API socket")
        .unwrap_err()
        .to_string();
    assert!(again.contains("in use"), "{again}");
    // To clients the VMM is the one who listens.
    let client = UnixStream::connect(bed.path("api")).unwrap();
    let peer = bulkhead_proto::sys::peer_credentials(client.as_fd()).unwrap();
    assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
    drop(listener);
    launcher.forget(&bed.path("api")).unwrap();
    assert!(!bed.path("api").exists());
}

#[test]
fn given_the_end_of_the_launcher_then_devices_end_and_the_vmm_knows() {
    let bed = Bed::new("launcher-dies");
    let launcher = bed.launcher();
    let device = launcher.spawn(spec("disk0", &["wait"])).unwrap();
    bed::kill(launcher.pid());
    soon("the device is gone", || !alive(device.pid));
    soon("the client knows", || match launcher.poll_events() {
        Ok(_) => false,
        Err(error) => {
            assert!(error.is_gone(), "{error}");
            true
        }
    });
    let error = launcher.spawn(spec("disk1", &["wait"])).unwrap_err();
    assert!(error.is_gone(), "{error}");
}

#[test]
fn given_a_launcher_that_is_dropped_then_devices_and_sockets_go() {
    let bed = Bed::new("dropped");
    let launcher = bed.launcher();
    let device = launcher.spawn(spec("disk0", &["wait"])).unwrap();
    let _listener = launcher.bind_unix(&bed.path("api"), "API socket").unwrap();
    launcher.shutdown();
    // No waiting: when shutdown returns, all is done.
    assert!(!bed.path("api").exists());
    assert!(!alive(device.pid));
}

#[test]
fn given_the_death_of_the_vmm_then_launcher_devices_and_sockets_go() {
    let bed = Bed::new("vmm-dies");
    let mut vmm = bed.fake_vmm("stay");
    let mut pids = Vec::new();
    while pids.len() < 3 {
        let line = vmm.line();
        if let Some(pid) = line.strip_prefix("pid ") {
            pids.push(pid.parse::<i32>().unwrap());
        }
    }
    assert!(bed.path("api").exists());
    assert!(pids.iter().all(|pid| alive(*pid)));
    vmm.kill();
    soon("no process is left", || pids.iter().all(|pid| !alive(*pid)));
    soon("no socket is left", || !bed.path("api").exists());
}

#[test]
fn given_two_hundred_spawns_then_nothing_leaks() {
    let bed = Bed::new("cycles");
    let mut vmm = bed.fake_vmm("cycles");
    // It asserts by itself; here is what it measured.
    let line = vmm.until("spawn ");
    println!("{line}");
    assert!(vmm.wait(), "{line}");
}

#[test]
fn given_what_devices_say_then_it_reaches_stderr_prefixed_and_escaped() {
    let bed = Bed::new("says");
    let mut vmm = bed.fake_vmm("says");
    assert!(vmm.wait(), "{}", vmm.stderr());
    let said = vmm.stderr();
    assert!(
        said.lines().any(|l| l == "disk0: hello\\u{1b}[31m there"),
        "{said}"
    );
    assert!(!said.contains('\u{1b}'), "{said}");
    assert!(said.lines().any(|l| l == "disk0: last words"), "{said}");
}

#[test]
fn given_an_ordinary_user_then_the_picture_is_the_same() {
    if !bed::root() {
        // Then every other test here is this one.
        return;
    }
    let bed = Bed::new("user");
    let mut vmm = bed.fake_vmm_as("facts", Some(65534));
    let facts = vmm.until("facts ");
    assert_eq!(
        facts,
        "facts uid 65534 caps 0000000000000000 nnp 1 seccomp 2 root 0 own user,mnt,pid,net,ipc,uts"
    );
    let disk = vmm.until("read-only ");
    assert!(
        disk.contains("readonly=on") && disk.lines().count() == 1,
        "{disk}"
    );
    assert!(vmm.wait(), "{}", vmm.stderr());
}

#[test]
fn given_no_namespaces_then_the_start_is_refused_with_the_remedy() {
    let bed = Bed::new("refused");
    let mut vmm = bed.fake_vmm("refused-namespaces");
    let line = vmm.until("start ");
    assert!(
        line.contains("namespaces for device processes are not permitted")
            && line.contains("user.max_user_namespaces"),
        "{line}"
    );
    assert!(vmm.wait(), "{}", vmm.stderr());
}

#[test]
fn given_no_launcher_program_then_the_start_says_where_it_was_sought() {
    let bed = Bed::new("absent");
    let mut config = bed.config();
    config.devices = vec!["bulkhead-absent".into()];
    let line = Launcher::start(&config).err().unwrap().to_string();
    assert!(
        line.contains("bulkhead-absent") && line.contains("--libexec"),
        "{line}"
    );
}

#[test]
fn given_a_launcher_that_cannot_run_then_the_start_says_so_and_leaves_no_process() {
    let bed = Bed::new("broken");
    fs::remove_file(bed.path("bulkhead-launcher")).unwrap();
    fs::write(bed.path("bulkhead-launcher"), "text").unwrap();
    fs::set_permissions(
        bed.path("bulkhead-launcher"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let mut vmm = bed.fake_vmm("refused");
    let line = vmm.until("start ");
    assert!(
        line.contains("bulkhead-launcher") && line.contains("static program"),
        "{line}"
    );
    assert!(vmm.wait(), "{}", vmm.stderr());
}

#[test]
fn given_root_where_user_namespaces_are_forbidden_then_the_rest_still_holds() {
    if !bed::root() {
        return;
    }
    // The kernel makes no user namespace in a chroot.
    let bed = Bed::new("chroot");
    fs::create_dir(bed.path("root")).unwrap();
    let mut vmm = bed.fake_vmm("facts-in-chroot");
    let facts = vmm.until("facts ");
    let uid: u32 = facts.split(' ').nth(2).unwrap().parse().unwrap();
    assert!(uid >= 0x7000_0000, "{facts}");
    assert!(
        facts.ends_with("caps 0000000000000000 nnp 1 seccomp 2 root 0 own mnt,pid,net,ipc,uts"),
        "{facts}"
    );
    assert!(vmm.wait(), "{}", vmm.stderr());
}

#[test]
fn given_descriptors_beyond_the_bound_then_nothing_is_sent() {
    let bed = Bed::new("bound");
    let launcher = bed.launcher();
    let mut order = spec("disk0", &["wait"]);
    let null = fs::File::open("/dev/null").unwrap();
    order.fds = (0..71)
        .map(|_| OwnedFd::from(null.try_clone().unwrap()))
        .collect();
    let line = launcher.spawn(order).unwrap_err().to_string();
    assert!(line.contains("too many descriptors"), "{line}");
    let mut order = spec("disk0", &["report"]);
    order.fds = (0..70)
        .map(|_| OwnedFd::from(null.try_clone().unwrap()))
        .collect();
    let device = launcher.spawn(order).unwrap();
    (&device.control).write_all(b"x").unwrap();
    assert!(alive(device.pid));
}
