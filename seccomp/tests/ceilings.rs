//! How many system calls each process may make, counted from the compiled filters, and those
//! that no steady state has.
#![allow(clippy::unwrap_used)] // A test says so by panicking.

use bulkhead_seccomp::policy::{self, Stage, syscall_name};

/// Ceilings of the steady state by the beginning of a policy's name, the longest first. A new
/// kind of process gets its line here.
const CEILINGS: &[(&str, usize)] = &[
    // Alone on a socket, with any engine and whatever a third-party front-end asks for.
    ("bulkhead-blk-erase-socket", 20),
    ("bulkhead-blk-image-socket", 17),
    ("bulkhead-blk-socket", 19),
    ("bulkhead-net-socket", 15),
    ("bulkhead-blk", 16),
    ("bulkhead-net", 12),
    ("bulkhead-mem", 11),
    ("bulkhead-rng", 10),
    ("bulkhead-vsock", 14),
    ("bulkhead-console", 13),
    ("bulkhead-vcpu", 12),
    ("bulkhead-vmm", 48),
];

/// What opens, connects, executes or escapes.
const NEVER: &[&str] = &[
    "open",
    "openat",
    "openat2",
    "open_by_handle_at",
    "creat",
    "socket",
    "connect",
    "bind",
    "execve",
    "execveat",
    "fork",
    "vfork",
    "clone",
    "clone3",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "kill",
    "tkill",
    "mount",
    "umount2",
    "move_mount",
    "fsopen",
    "pivot_root",
    "chroot",
    "unshare",
    "setns",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "memfd_create",
    "prctl",
    "keyctl",
    "add_key",
    "kexec_load",
    "init_module",
    "finit_module",
    "setuid",
    "setresuid",
    "capset",
    "personality",
    "modify_ldt",
    "pidfd_open",
    "pidfd_getfd",
];

/// Those of a VM's processes, but the launcher and what runs under its outer filter.
fn is_of_a_vm(name: &str) -> bool {
    !name.contains("launcher") && !["passt", "virtiofsd", "device-outer"].contains(&name)
}

/// The VMM makes threads, for devices that come while the machine runs, names them, and nothing else
/// by these calls.
fn may(policy: &str, call: &str) -> bool {
    policy == "bulkhead-vmm" && ["clone", "prctl"].contains(&call)
}

#[test]
fn no_steady_state_exceeds_its_ceiling() {
    for policy in policy::all().iter().filter(|p| is_of_a_vm(p.name)) {
        let ceiling = CEILINGS
            .iter()
            .filter(|(prefix, _)| policy.name.starts_with(prefix))
            .max_by_key(|(prefix, _)| prefix.len())
            .map(|(_, ceiling)| *ceiling);
        let Some(ceiling) = ceiling else {
            panic!("{}: say here how many calls it may have", policy.name);
        };
        let count = policy.syscalls(Stage::Steady).unwrap().len();
        assert!(count <= ceiling, "{}: {count} > {ceiling}", policy.name);
    }
}

#[test]
fn no_steady_state_opens_connects_executes_or_escapes() {
    for policy in policy::all().iter().filter(|p| is_of_a_vm(p.name)) {
        for nr in policy.syscalls(Stage::Steady).unwrap() {
            let name = syscall_name(nr).unwrap();
            let allowed = !NEVER.contains(&name) || may(policy.name, name);
            assert!(allowed, "{}: {name}", policy.name);
        }
    }
    // A misspelt name forbids nothing.
    for name in NEVER {
        assert!((0..600).any(|nr| syscall_name(nr) == Some(name)), "{name}");
    }
}

#[test]
fn clone_makes_threads_only() {
    use bulkhead_seccomp::notify::{Data, Judgement, judge};
    let arch = bulkhead_seccomp::filter::AUDIT_ARCH.unwrap();
    for policy in policy::all().iter().filter(|p| is_of_a_vm(p.name)) {
        for flags in [
            libc::SIGCHLD,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            libc::CLONE_NEWUSER | libc::SIGCHLD,
            libc::CLONE_NEWNS | libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND,
        ] {
            let data = Data {
                nr: u32::try_from(libc::SYS_clone).unwrap(),
                arch,
                instruction_pointer: 0,
                args: [u64::from(flags.cast_unsigned()), 0, 0, 0, 0, 0],
            };
            assert_ne!(judge(policy, &data), Judgement::Proceed, "{}", policy.name);
        }
    }
}

#[test]
fn prctl_names_threads_only() {
    use bulkhead_seccomp::notify::{Data, Judgement, judge};
    let arch = bulkhead_seccomp::filter::AUDIT_ARCH.unwrap();
    for policy in policy::all().iter().filter(|p| is_of_a_vm(p.name)) {
        for option in (0..80).chain([libc::PR_SET_PTRACER.cast_unsigned()]) {
            let data = Data {
                nr: u32::try_from(libc::SYS_prctl).unwrap(),
                arch,
                instruction_pointer: 0,
                args: [option.into(), 1, 0, 0, 0, 0],
            };
            let proceeds = judge(policy, &data) == Judgement::Proceed;
            assert!(
                !proceeds || option == libc::PR_SET_NAME.cast_unsigned(),
                "{}: {option}",
                policy.name
            );
        }
    }
}

#[test]
fn no_policy_but_that_of_helpers_makes_memory_executable() {
    use bulkhead_seccomp::notify::{Data, Judgement, judge};
    let arch = bulkhead_seccomp::filter::AUDIT_ARCH.unwrap();
    // A helper's libraries are loaded once it runs, under a launcher that may let it.
    let helpers = ["passt", "virtiofsd", "bulkhead-launcher-helpers"];
    for policy in policy::all().iter().filter(|p| !helpers.contains(&p.name)) {
        for call in [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_pkey_mprotect] {
            for exec in [libc::PROT_EXEC, libc::PROT_EXEC | libc::PROT_READ, 7] {
                let private = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unsigned_abs());
                let data = Data {
                    nr: u32::try_from(call).unwrap(),
                    arch,
                    instruction_pointer: 0,
                    args: [
                        0,
                        4096,
                        u64::from(exec.unsigned_abs()),
                        private,
                        u64::MAX,
                        0,
                    ],
                };
                let judged = judge(policy, &data);
                assert_ne!(judged, Judgement::Proceed, "{} {call} {exec}", policy.name);
            }
        }
    }
}
