//! Tests of grading: what is in order, and every single deviation.

use super::*;
use crate::audit::cgroups;
use crate::audit::fds::Ring;
use crate::audit::mappings::Mappings;
use crate::audit::process::{Capabilities, Root};

fn fd(number: i32, kind: Kind) -> Fd {
    Fd {
        number,
        kind,
        access: "rw".into(),
        target: "x".into(),
        ring: None,
        family: None,
    }
}

/// What the API says of it.
fn told() -> Told {
    Told {
        granted: Some(3),
        grants: Vec::new(),
        asked: Asked::default(),
        booted: false,
        boot: None,
        kind: Some("blk".into()),
        said: Said {
            descriptors: Some(40),
            file_bytes: Some(1 << 20),
            threads: None,
        },
        landlock: Some(7),
        newest_landlock: 7,
        made: None,
        user_namespaces: true,
        serves: false,
        own_ids: true,
    }
}

/// The VM's cgroup, and the device's leaf in it.
const GROUP: &str = "/a/bulkhead-vm-10-77";
const LEAF: &str = "/a/bulkhead-vm-10-77/dev-root";

/// What is wrong with where it is, beside its VMM, its launcher and another device.
fn misplaced(device: Process) -> Vec<String> {
    let mut vm = cgroups::tests::vm();
    vm[2].process = Some(device);
    let mut wrong = cgroups::grade(&cgroups::Told::ByApi(GROUP), &mut vm);
    wrong.extend(vm.into_iter().flat_map(|report| report.deviations));
    wrong
}

/// A resource limit of this value, soft and hard.
fn limited(name: &str, value: &str) -> Option<Limits> {
    let limits = vec![(name.to_owned(), value.to_owned())];
    Some(Limits {
        cgroup: LEAF.into(),
        own_leaf: true,
        rlimits: limits.clone(),
        hard_rlimits: limits,
        ..Limits::default()
    })
}

/// A device as it should be.
fn device() -> Process {
    let none = "0000000000000000".to_owned();
    let namespaces = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"].map(|kind| Namespace {
        kind: kind.into(),
        id: format!("{kind}:[1]"),
        shared: false,
    });
    Process {
        uid: vec![0x7000_0040; 4],
        pids: vec![500, 3, 1],
        threads: vec![Thread {
            tid: 500,
            name: "blk".into(),
            capabilities: Capabilities {
                inheritable: none.clone(),
                permitted: none.clone(),
                effective: none.clone(),
                bounding: none.clone(),
                ambient: none,
            },
            no_new_privs: true,
            seccomp_mode: 2,
            seccomp_filters: Some(3),
            worker: false,
            apart: false,
            tracer: 0,
            filters: Some(Filters {
                policies: ["bulkhead-blk", "bulkhead-blk", "bulkhead-launcher"]
                    .map(str::to_owned)
                    .into(),
                counts: vec![16, 16, 95],
                syscalls: vec!["read".into()],
            }),
        }],
        mappings: Some(Mappings {
            total: 2,
            executable: 1,
            ..Mappings::default()
        }),
        dumpable: Some(false),
        namespaces: namespaces.into(),
        root: Some(Root {
            shared: false,
            entries: Vec::new(),
            mounts: Some(1),
            mode: "0555".into(),
            read_only: Some(true),
        }),
        cwd: Some("/".into()),
        fds: vec![
            fd(0, Kind::Null),
            fd(1, Kind::Null),
            fd(2, Kind::Pipe),
            fd(3, Kind::Socket),
            fd(4, Kind::Socket),
            fd(5, Kind::File),
            fd(6, Kind::Memfd),
            fd(7, Kind::Anonymous("io_uring".into())),
        ],
        limits: limited("NOFILE", "40"),
        ..Process::default()
    }
}

#[test]
fn a_device_as_it_should_be_has_no_deviation() {
    assert_eq!(
        grade(Role::Device, &device(), &told()),
        Judgement::default()
    );
    assert_eq!(
        grade(
            Role::Device,
            &device(),
            &Told {
                granted: None,
                ..told()
            }
        ),
        Judgement::default()
    );
}

/// Each way in which a device may be wrong, alone, is found.
#[test]
fn every_single_deviation_is_found() {
    type Change = fn(&mut Process);
    let changes: [(&str, Change); 48] = [
        ("effective", |p| {
            p.threads[0].capabilities.effective = "1".into()
        }),
        ("permitted", |p| {
            p.threads[0].capabilities.permitted = "200000".into()
        }),
        ("inheritable", |p| {
            p.threads[0].capabilities.inheritable = "1".into()
        }),
        ("ambient", |p| {
            p.threads[0].capabilities.ambient = "1".into()
        }),
        ("bounding", |p| {
            p.threads[0].capabilities.bounding = "1ffffffffff".into()
        }),
        ("unreadable set", |p| {
            p.threads[0].capabilities.effective = String::new()
        }),
        ("no_new_privs", |p| p.threads[0].no_new_privs = false),
        ("tracer", |p| p.tracer = 7),
        ("seccomp", |p| p.threads[0].seccomp_mode = 0),
        ("own filter", |p| p.threads[0].seccomp_filters = Some(2)),
        ("filter of nobody's", |p| {
            p.threads[0]
                .filters
                .as_mut()
                .unwrap()
                .policies
                .push("?".into())
        }),
        ("device's filter once", |p| {
            p.threads[0].filters.as_mut().unwrap().policies.remove(0);
        }),
        ("no filter of the launcher's", |p| {
            p.threads[0].filters.as_mut().unwrap().policies.pop();
        }),
        ("writable code", |p| {
            let mappings = p.mappings.as_mut().unwrap();
            mappings.writable_and_executable.push("0-1 rwxp".into());
        }),
        ("pinned memory", |p| {
            p.fds[7].ring = Some(Ring {
                buffers: 1,
                ..Ring::default()
            });
        }),
        ("polled ring", |p| {
            p.fds[7].ring = Some(Ring {
                polled: true,
                ..Ring::default()
            });
        }),
        ("dumpable", |p| p.dumpable = Some(true)),
        ("core", |p| p.limits = limited("CORE", "unlimited")),
        ("core of hard limit", |p| {
            p.limits = limited("CORE", "0");
            let limits = p.limits.as_mut().unwrap();
            limits.hard_rlimits[0].1 = "1".into();
        }),
        ("threads", |p| p.limits = limited("NPROC", "161")),
        ("file size", |p| p.limits = limited("FSIZE", "1048577")),
        ("one descriptor more", |p| {
            p.limits = limited("NOFILE", "41")
        }),
        ("message queues", |p| p.limits = limited("MSGQUEUE", "1")),
        ("priority", |p| p.limits = limited("NICE", "1")),
        ("real time", |p| p.limits = limited("RTPRIO", "1")),
        ("second thread", |p| {
            let mut thread = p.threads[0].clone();
            thread.seccomp_mode = 0;
            p.threads.push(thread);
        }),
        ("net namespace", |p| p.namespaces[3].shared = true),
        ("root of the host by its map", |p| p.uid = vec![0; 4]),
        ("another kind's filter", |p| {
            let policies = &mut p.threads[0].filters.as_mut().unwrap().policies;
            policies[0] = "bulkhead-rng".into();
        }),
        ("many descriptors", |p| {
            p.limits = limited("NOFILE", "unlimited")
        }),
        ("user namespace", |p| p.namespaces[0].shared = true),
        ("cgroup namespace", |p| p.namespaces[6].shared = true),
        ("a sibling's cgroup", |p| {
            p.limits.as_mut().unwrap().cgroup = format!("{GROUP}/dev-data");
        }),
        ("another VM's cgroup", |p| {
            p.limits.as_mut().unwrap().cgroup = "/a/bulkhead-vm-11-78/dev-root".into();
        }),
        ("the root cgroup", |p| {
            p.limits.as_mut().unwrap().cgroup = "/".into();
        }),
        ("root entries", |p| {
            p.root.as_mut().unwrap().entries.push("etc".into())
        }),
        ("root writable", |p| {
            p.root.as_mut().unwrap().read_only = Some(false)
        }),
        ("mounts", |p| p.root.as_mut().unwrap().mounts = Some(2)),
        ("cwd", |p| p.cwd = Some("/etc".into())),
        ("directory", |p| p.fds.push(fd(9, Kind::Directory))),
        ("kvm", |p| p.fds.push(fd(9, Kind::Kvm))),
        ("ungranted file", |p| p.fds.push(fd(6, Kind::File))),
        ("code of others", |p| {
            let line = "7f0-7f1 r-xp 00000000 08:01 9 /lib/libc.so.6";
            p.mappings.as_mut().unwrap().foreign_code = vec![line.to_owned()];
        }),
        ("code that was written to", |p| {
            p.mappings.as_mut().unwrap().changed_code = vec!["7f0-7f1 r-xp".to_owned()];
        }),
        ("a file that is written by its mapping", |p| {
            p.mappings.as_mut().unwrap().written_files = vec!["7f0-7f1 rw-s".to_owned()];
        }),
        ("a thread with descriptors of its own", |p| {
            p.threads[0].apart = true
        }),
        ("a ring on a file that it was not given", |p| {
            p.fds[7].ring = Some(Ring {
                files: vec!["/etc/shadow".to_owned()],
                ..Ring::default()
            });
        }),
        ("a socket that reaches a network", |p| {
            p.fds[3].family = Some("inet".into());
        }),
    ];
    for (what, change) in changes {
        let mut process = device();
        change(&mut process);
        let mut found = grade(Role::Device, &process, &told()).deviations;
        found.extend(misplaced(process));
        assert_eq!(found.len(), 1, "{what}: {found:?}");
    }
    let mut less = told();
    less.landlock = Some(6);
    let found = grade(Role::Device, &device(), &less).deviations;
    assert_eq!(found.len(), 1, "Landlock of an older kernel: {found:?}");
}

#[test]
fn two_devices_in_one_namespace_are_found() {
    let (one, mut other) = (device(), device());
    for namespace in &mut other.namespaces {
        namespace.id = format!("{}:[2]", namespace.kind);
    }
    let vmm = Process {
        uid: vec![0x7000_007f; 4],
        ..Process::default()
    };
    let of = |vmm: &Process, one: &Process, other: &Process| {
        let all = [
            (Role::Vmm, "vmm", vmm),
            (Role::Device, "a", one),
            (Role::Device, "b", other),
        ];
        siblings(all.into_iter())
    };
    assert_eq!(
        of(&vmm, &one, &other),
        ["devices a and b share the uid 1879048256"]
    );
    let user = one.uid.clone();
    let users = Process {
        uid: user,
        ..Process::default()
    };
    assert!(of(&users, &one, &other).is_empty(), "a user's VM");
    other.uid = vec![0x7000_0041; 4];
    assert_eq!(of(&vmm, &one, &other), Vec::<String>::new());
    let own = other.namespaces[3].id.clone();
    other.namespaces[3].id = one.namespaces[3].id.clone();
    let shared = of(&vmm, &one, &other);
    assert_eq!(shared, ["devices a and b share namespace net:[1]"]);
    other.namespaces[3].id = own;
    let (mut of_group, mut above) = (one.clone(), vmm.clone());
    of_group.groups = vec![4, 27];
    let shared = of(&vmm, &of_group, &other);
    assert_eq!(shared, ["device a is in groups beside its own: 4, 27"]);
    assert!(
        of(&users, &of_group, &other).is_empty(),
        "a user's groups stay"
    );
    (of_group.gid, of_group.groups) = (vec![100; 4], Vec::new());
    other.gid = vec![100; 4];
    let shared = of(&vmm, &of_group, &other);
    assert_eq!(shared, ["devices a and b share the gid 100"]);
    above.namespaces = vec![other.namespaces[1].clone()];
    let shared = of(&above, &one, &other);
    assert_eq!(shared, ["device b shares namespace mnt:[2] with the vmm"]);
}

#[test]
fn a_vcpu_thread_has_a_filter_of_its_own() {
    let filters = |names: &[&str]| Filters {
        policies: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Filters::default()
    };
    let of = |thread, names: &[&str]| {
        unexpected(Role::Vmm, thread, &filters(names), &Told::default()).len()
    };
    assert_eq!(of("vp-0", &["bulkhead-vcpu", "bulkhead-vmm:setup"]), 0);
    assert_eq!(of("vp-0", &["bulkhead-vmm", "bulkhead-vmm:setup"]), 1);
    assert_eq!(of("bulkhead", &["bulkhead-vmm", "bulkhead-vmm:setup"]), 0);
    assert_eq!(of("bulkhead", &[]), 1);
}

#[test]
fn a_host_without_user_namespaces_is_noted_and_allowed() {
    let mut process = device();
    process.namespaces[0].shared = true;
    let told = Told {
        user_namespaces: false,
        ..told()
    };
    let judgement = grade(Role::Device, &process, &told);
    assert_eq!((judgement.deviations.len(), judgement.notes.len()), (0, 1));
    process.uid = vec![0; 4];
    let judgement = grade(Role::Device, &process, &told);
    assert_eq!(judgement.deviations.len(), 1, "{judgement:?}");
}

#[test]
fn an_external_helper_has_its_exceptions_and_no_others() {
    let helper = || {
        let mut process = device();
        process.namespaces[3].shared = true;
        process.threads[0].capabilities.bounding = "1ffffffffff".into();
        let filters = process.threads[0].filters.as_mut().unwrap();
        filters.policies = ["?", "passt", "bulkhead-launcher-helpers"]
            .map(str::to_owned)
            .into();
        process.fds.extend((20..90).map(|n| fd(n, Kind::Socket)));
        process
            .fds
            .retain(|fd| fd.number < 4 || fd.kind == Kind::Socket);
        process
    };
    let judgement = grade(Role::Helper, &helper(), &told());
    assert_eq!(judgement.deviations, Vec::<String>::new());
    assert!(judgement.notes.iter().any(|n| n.contains("host's network")));
    type Change = fn(&mut Process);
    let changes: [(&str, Change); 9] = [
        ("capability", |p| {
            p.threads[0].capabilities.effective = "1000".into()
        }),
        ("own filter", |p| p.threads[0].seccomp_filters = Some(2)),
        ("user namespace", |p| p.namespaces[0].shared = true),
        ("mnt namespace", |p| p.namespaces[1].shared = true),
        ("cgroup namespace", |p| p.namespaces[6].shared = true),
        ("descriptors", |p| p.limits = limited("NOFILE", "4097")),
        ("root entries", |p| {
            p.root.as_mut().unwrap().entries.push("usr".into())
        }),
        ("file", |p| p.fds.push(fd(9, Kind::File))),
        ("tap", |p| p.fds.push(fd(9, Kind::Character))),
    ];
    for (what, change) in changes {
        let mut process = helper();
        change(&mut process);
        let judgement = grade(Role::Helper, &process, &told());
        assert_eq!(judgement.deviations.len(), 1, "{what}: {judgement:?}");
    }
}

#[test]
fn the_launcher_may_keep_its_capabilities_and_must_be_pid_1() {
    let mut process = device();
    process.pids = vec![400, 1];
    process.fds.truncate(6);
    process.threads[0].capabilities.permitted = "802000c2".into();
    process.threads[0].capabilities.effective = "802000c2".into();
    assert_eq!(
        grade(Role::Launcher, &process, &told()),
        Judgement::default()
    );
    process.threads[0].capabilities.effective = "802000c3".into();
    process.pids = vec![400, 2];
    process.fds.push(fd(7, Kind::Anonymous("kvm-vm".into())));
    assert_eq!(grade(Role::Launcher, &process, &told()).deviations.len(), 3);
}

/// A VMM of these threads, each with its filters.
fn vmm(threads: &[(&str, &[&str])]) -> Process {
    let mut process = device();
    let model = process.threads[0].clone();
    process.fds.truncate(5);
    process.pids = vec![model.tid];
    process.threads = (model.tid..)
        .zip(threads)
        .map(|(tid, (name, policies))| Thread {
            tid,
            name: (*name).into(),
            seccomp_filters: u32::try_from(policies.len()).ok(),
            filters: Some(Filters {
                policies: policies.iter().map(|p| (*p).to_owned()).collect(),
                ..Filters::default()
            }),
            ..model.clone()
        })
        .collect();
    process
}

#[test]
fn a_thread_of_the_vmms_that_stays_in_set_up_is_found_once_the_machine_is_made() {
    const SETUP: &[&str] = &["bulkhead-vmm:setup"];
    const STEADY: &[&str] = &["bulkhead-vmm:setup", "bulkhead-vmm"];
    const VCPU: &[&str] = &["bulkhead-vmm:setup", "bulkhead-vcpu"];
    let found = |process: &Process, made| {
        let booted = made == Some(true);
        let told = Told {
            made,
            booted,
            ..told()
        };
        grade(Role::Vmm, process, &told).deviations.len()
    };
    let whole = vmm(&[("bulkhead", STEADY), ("api", STEADY), ("vp-0", VCPU)]);
    let lax = vmm(&[("bulkhead", STEADY), ("api", SETUP), ("vp-0", VCPU)]);
    for made in [None, Some(true)] {
        assert_eq!(found(&whole, made), 0);
        assert_eq!(found(&lax, made), 1);
    }
    assert_eq!(found(&lax, Some(false)), 0);
    // Before it is made nothing but the set-up's is there.
    let before = vmm(&[("bulkhead", SETUP), ("api", STEADY)]);
    assert_eq!(found(&before, None), 0);
    assert_eq!(found(&before, Some(true)), 1);
    // Counted where they cannot be read.
    let mut counted = lax.clone();
    counted.threads.iter_mut().for_each(|t| t.filters = None);
    assert_eq!(found(&counted, None), 1);
    // A thread of the kernel's own in it runs none of its code.
    let mut kernels = lax;
    kernels.threads[1].worker = true;
    assert_eq!(found(&kernels, None), 0);
}

#[test]
fn the_vmm_and_the_launcher_have_limits_too() {
    let mut process = vmm(&[("bulkhead", &["bulkhead-vmm:setup"])]);
    process.limits = limited("NOFILE", "8192");
    let found = |role, process: &Process| grade(role, process, &Told::default()).deviations;
    assert_eq!(found(Role::Vmm, &process), [""; 0]);
    process.limits = limited("NOFILE", "8193");
    assert_eq!(found(Role::Vmm, &process).len(), 1);
    process.threads[0].filters.as_mut().unwrap().policies = vec!["bulkhead-launcher".into()];
    process.pids = vec![400, 1];
    assert_eq!(found(Role::Launcher, &process).len(), 1);
    process.limits = limited("NOFILE", "4096");
    assert_eq!(found(Role::Launcher, &process), [""; 0]);
}
