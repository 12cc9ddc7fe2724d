//! Where an argument decides: what each compiled filter lets through and what it does not, as the
//! kernel would run it. The tables say it once more, apart from the policies.
#![allow(clippy::unwrap_used, clippy::panic)] // A test says so by panicking.

use bulkhead_seccomp::filter::AUDIT_ARCH;
use bulkhead_seccomp::notify::{Data, Judgement, judge};
use bulkhead_seccomp::policy::{self, Policy};

/// A call with its arguments, from the first on; those that are left out are 0.
type Call = (libc::c_long, &'static [u64]);

const fn int(value: libc::c_int) -> u64 {
    // As the register holds it.
    value as u32 as u64
}

fn judged(policy: &Policy, (nr, given): Call) -> Judgement {
    let mut args = [0; 6];
    for (arg, given) in args.iter_mut().zip(given) {
        *arg = *given;
    }
    let data = Data {
        nr: u32::try_from(nr).unwrap(),
        arch: AUDIT_ARCH.unwrap(),
        instruction_pointer: 0,
        args,
    };
    judge(policy, &data)
}

const PRIVATE: u64 = int(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
const SHARED: u64 = int(libc::MAP_SHARED);
const RW: u64 = int(libc::PROT_READ | libc::PROT_WRITE);
const EXEC: u64 = int(libc::PROT_EXEC);
/// What the upper half of a register holds is no part of an int.
const JUNK: u64 = 0xdead_beef << 32;

/// No process of a VM's steady state does this, whatever else its policy says: helpers and the
/// launcher that may start it have exceptions of their own.
const NOBODY: &[Call] = &[
    (libc::SYS_mmap, &[0, 4096, EXEC, PRIVATE, u64::MAX]),
    (libc::SYS_mmap, &[0, 4096, RW | EXEC, PRIVATE, u64::MAX]),
    (libc::SYS_mmap, &[0, 4096, RW | EXEC, SHARED, 7]),
    (libc::SYS_mprotect, &[0x1000, 4096, EXEC]),
    (libc::SYS_mprotect, &[0x1000, 4096, RW | EXEC]),
    (libc::SYS_pkey_mprotect, &[0x1000, 4096, EXEC, 0]),
    (libc::SYS_socket, &[int(libc::AF_INET), 1]),
    (libc::SYS_socket, &[int(libc::AF_INET6), 1]),
    (libc::SYS_socket, &[int(libc::AF_NETLINK), 3]),
    (libc::SYS_socket, &[int(libc::AF_PACKET), 3]),
    (libc::SYS_socket, &[int(libc::AF_VSOCK), 1]),
    (libc::SYS_socketpair, &[int(libc::AF_INET), 1]),
    (libc::SYS_ioctl, &[0, libc::TIOCSTI]),
    (libc::SYS_ioctl, &[0, libc::TIOCSTI | JUNK]),
    (libc::SYS_ioctl, &[0, 0x8933]),      // SIOCGIFINDEX
    (libc::SYS_ioctl, &[0, 0x401c_5820]), // FS_IOC_FSSETXATTR
    (libc::SYS_madvise, &[0x1000, 4096, int(libc::MADV_HWPOISON)]),
    (
        libc::SYS_madvise,
        &[0x1000, 4096, int(libc::MADV_SOFT_OFFLINE)],
    ),
    (
        libc::SYS_madvise,
        &[0x1000, 4096, int(libc::MADV_MERGEABLE)],
    ),
    (libc::SYS_madvise, &[0x1000, 4096, int(libc::MADV_REMOVE)]),
    (libc::SYS_prctl, &[int(libc::PR_SET_PTRACER), u64::MAX]),
    (libc::SYS_prctl, &[int(libc::PR_SET_MM), 1]),
    (libc::SYS_prctl, &[int(libc::PR_SET_PDEATHSIG), 9]),
    (libc::SYS_clone, &[int(libc::SIGCHLD)]),
    (libc::SYS_clone, &[int(libc::CLONE_NEWUSER | libc::SIGCHLD)]),
];

/// The same for a device process.
const NO_DEVICE: &[Call] = &[
    (libc::SYS_socket, &[int(libc::AF_UNIX), 1]),
    (libc::SYS_socketpair, &[int(libc::AF_UNIX), 1]),
    (libc::SYS_fcntl, &[3, int(libc::F_SETOWN), 1]),
    (libc::SYS_fcntl, &[3, 10, 9]),
    (libc::SYS_fcntl, &[3, int(libc::F_SETLEASE), 0]),
    (libc::SYS_fcntl, &[3, int(libc::F_NOTIFY), 1]),
    (libc::SYS_fcntl, &[3, int(libc::F_SETPIPE_SZ), 4096]),
    (libc::SYS_fcntl, &[3, int(libc::F_OFD_SETLK), 0]),
    (libc::SYS_io_uring_register, &[3, 0]), // buffers: guest memory would be pinned
    (libc::SYS_io_uring_register, &[3, 9]), // a personality
    (libc::SYS_io_uring_register, &[3, 11]), // restrictions
    (libc::SYS_io_uring_register, &[3, 13]), // files, in the newer way
    (libc::SYS_ioctl, &[3, 0x4004_54ca]),   // TUNSETIFF
    (libc::SYS_ioctl, &[3, 0xae80]),        // KVM_RUN
    (
        libc::SYS_mmap,
        &[0, 4096, RW, int(libc::MAP_PRIVATE | libc::MAP_GROWSDOWN), 0],
    ),
    (
        libc::SYS_fallocate,
        &[3, int(libc::FALLOC_FL_COLLAPSE_RANGE)],
    ),
    (libc::SYS_fallocate, &[3, int(libc::FALLOC_FL_INSERT_RANGE)]),
    (
        libc::SYS_fallocate,
        &[3, int(libc::FALLOC_FL_UNSHARE_RANGE)],
    ),
];

/// What a policy lets through, and what close to it it does not.
const ALLOWED: &[(&str, &[Call], &[Call])] = &[
    (
        "bulkhead-blk",
        &[
            (libc::SYS_mmap, &[0, 4096, RW, SHARED, 7]),
            (libc::SYS_io_uring_register, &[3, 6]),
            (libc::SYS_io_uring_register, &[3, 6 | JUNK]),
            (libc::SYS_sendmsg, &[3, 0x1000, int(libc::MSG_NOSIGNAL)]),
        ],
        &[
            (libc::SYS_sendmsg, &[3, 0x1000, int(libc::MSG_OOB)]),
            (libc::SYS_ioctl, &[3, 0x127d]), // BLKSECDISCARD
            (libc::SYS_fallocate, &[3, 3]),
        ],
    ),
    (
        "bulkhead-blk-erase",
        &[(libc::SYS_ioctl, &[3, 0x127d])],
        &[
            (libc::SYS_ioctl, &[3, 0x1277]), // BLKDISCARD
            (libc::SYS_ioctl, &[3, 0x125d]), // BLKROSET
            (libc::SYS_preadv2, &[3]),
        ],
    ),
    (
        "bulkhead-blk-plain",
        &[
            (
                libc::SYS_fallocate,
                &[
                    3,
                    int(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
                ],
            ),
            (
                libc::SYS_fallocate,
                &[
                    3,
                    int(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
                ],
            ),
        ],
        &[
            // It would grow the file.
            (libc::SYS_fallocate, &[3, 0]),
            (libc::SYS_fallocate, &[3, int(libc::FALLOC_FL_ZERO_RANGE)]),
        ],
    ),
    (
        "bulkhead-net",
        &[
            (libc::SYS_ioctl, &[3, 0x4004_54d0]), // TUNSETOFFLOAD
            (libc::SYS_ioctl, &[3, 0x4004_54d9]), // TUNSETQUEUE
            (libc::SYS_ioctl, &[3, 0x4004_54e2]), // TUNSETCARRIER
        ],
        &[
            (libc::SYS_ioctl, &[3, 0x4004_54cb]), // TUNSETPERSIST
            (libc::SYS_ioctl, &[3, 0x4010_54d5]), // TUNATTACHFILTER
            (libc::SYS_ioctl, &[3, 0x4004_54cc]), // TUNSETOWNER
            (libc::SYS_ioctl, &[3, 0x4008_af30]), // VHOST_NET_SET_BACKEND
        ],
    ),
    (
        "bulkhead-mem",
        &[
            (libc::SYS_mmap, &[0, 4096, RW, SHARED, 7]),
            (libc::SYS_sendmsg, &[3, 0, int(libc::MSG_NOSIGNAL)]),
        ],
        &[
            // It asks the VMM for what it plugs, and touches none of it itself.
            (libc::SYS_madvise, &[0x1000, 4096, int(libc::MADV_DONTNEED)]),
            (libc::SYS_fallocate, &[3, 3, 0, 4096]),
            (
                libc::SYS_mmap,
                &[0, 4096, RW, int(libc::MAP_SHARED | libc::MAP_LOCKED), 7],
            ),
            (libc::SYS_sendmsg, &[3, 0, int(libc::MSG_OOB)]),
        ],
    ),
    (
        "bulkhead-rng",
        &[
            (libc::SYS_mmap, &[0, 4096, RW, SHARED, 7]),
            (libc::SYS_sendmsg, &[3, 0, int(libc::MSG_NOSIGNAL)]),
            (libc::SYS_read, &[5]),
        ],
        &[
            (libc::SYS_ioctl, &[5, 0x5203]), // RNDADDENTROPY
            (libc::SYS_pread64, &[5]),
            (libc::SYS_fstat, &[7]),
            (
                libc::SYS_mmap,
                &[0, 4096, RW, int(libc::MAP_SHARED | libc::MAP_LOCKED), 7],
            ),
            (libc::SYS_sendmsg, &[3, 0, int(libc::MSG_OOB)]),
        ],
    ),
    (
        "bulkhead-vsock",
        &[
            (libc::SYS_mmap, &[0, 4096, RW, SHARED, 7]),
            (libc::SYS_sendmsg, &[8, 0, int(libc::MSG_NOSIGNAL)]),
            (libc::SYS_accept4, &[5, 0, 0, int(libc::SOCK_CLOEXEC)]),
            (libc::SYS_shutdown, &[8, int(libc::SHUT_WR)]),
        ],
        &[
            (libc::SYS_accept4, &[5, 0, 0, 0]),
            (libc::SYS_accept, &[5, 0, 0]),
            (libc::SYS_shutdown, &[5, int(libc::SHUT_RDWR)]),
            (libc::SYS_sendto, &[8, 0x1000, 1, 0, 0x2000, 16]),
            (
                libc::SYS_mmap,
                &[0, 4096, RW, int(libc::MAP_SHARED | libc::MAP_LOCKED), 7],
            ),
            (libc::SYS_sendmsg, &[8, 0, int(libc::MSG_OOB)]),
        ],
    ),
    (
        "bulkhead-console",
        &[
            (libc::SYS_mmap, &[0, 4096, RW, SHARED, 7]),
            (libc::SYS_sendmsg, &[8, 0, int(libc::MSG_NOSIGNAL)]),
            (libc::SYS_accept4, &[5, 0, 0, int(libc::SOCK_CLOEXEC)]),
        ],
        &[
            (libc::SYS_accept4, &[5, 0, 0, 0]),
            (libc::SYS_shutdown, &[8, int(libc::SHUT_WR)]),
            (libc::SYS_ioctl, &[0, 0x5413]), // TIOCGWINSZ
            (libc::SYS_sendmsg, &[8, 0, int(libc::MSG_OOB)]),
        ],
    ),
    (
        "bulkhead-net-vhost",
        &[(libc::SYS_ioctl, &[3, 0x4008_af30])],
        &[
            (libc::SYS_ioctl, &[3, 0xaf01]),      // VHOST_SET_OWNER: done before
            (libc::SYS_ioctl, &[3, 0xaf02]),      // VHOST_RESET_OWNER
            (libc::SYS_ioctl, &[3, 0x4008_af04]), // VHOST_SET_LOG_BASE
        ],
    ),
    (
        "bulkhead-vcpu",
        &[
            (libc::SYS_ioctl, &[3, 0xae80]),
            (libc::SYS_mmap, &[0, 4096, RW, PRIVATE, u64::MAX]),
        ],
        &[
            (libc::SYS_ioctl, &[3, 0x4020_ae46]), // KVM_SET_USER_MEMORY_REGION
            (libc::SYS_ioctl, &[3, 0xae41]),      // KVM_CREATE_VCPU
            (libc::SYS_clone, &[int(libc::CLONE_VM | libc::CLONE_THREAD)]),
        ],
    ),
    (
        "bulkhead-vmm",
        &[
            (libc::SYS_ioctl, &[3, 0xae80]),
            (libc::SYS_madvise, &[0x1000, 4096, int(libc::MADV_DONTNEED)]),
            (libc::SYS_socketpair, &[int(libc::AF_UNIX), 1]),
            (libc::SYS_fcntl, &[3, int(libc::F_DUPFD_CLOEXEC), 0]),
            (libc::SYS_prctl, &[int(libc::PR_SET_NAME), 1]),
            (libc::SYS_accept4, &[3, 0, 0, int(libc::SOCK_CLOEXEC)]),
        ],
        &[
            (libc::SYS_socket, &[int(libc::AF_UNIX), 1]),
            (libc::SYS_ioctl, &[3, 0xae01]), // KVM_CREATE_VM: set-up alone
            (libc::SYS_fcntl, &[3, int(libc::F_SETOWN), 1]),
            (libc::SYS_fcntl, &[3, int(libc::F_ADD_SEALS), 1]),
            // Whom a datagram goes to is not a client that was accepted.
            (libc::SYS_sendto, &[3, 0x1000, 1, 0, 0x2000, 16]),
            (libc::SYS_accept4, &[3, 0, 0, 0]),
            (libc::SYS_memfd_create, &[0x1000, int(1)]),
        ],
    ),
    (
        "device-outer",
        &[
            (
                libc::SYS_execveat,
                &[3, 0x1000, 0, 0, int(libc::AT_EMPTY_PATH)],
            ),
            (libc::SYS_io_uring_register, &[3, 11]),
            (libc::SYS_seccomp, &[1, 1]),
        ],
        &[
            (libc::SYS_execveat, &[3, 0x1000, 0, 0, 0]),
            (libc::SYS_io_uring_register, &[3, 0]),
            // A listener of its own would be the judge of its own calls.
            (libc::SYS_seccomp, &[1, 8]),
            (libc::SYS_prlimit64, &[1, 7]),
        ],
    ),
    (
        "bulkhead-launcher",
        &[
            (libc::SYS_socket, &[int(libc::AF_UNIX), 1]),
            (libc::SYS_unlinkat, &[3, 0x1000, int(libc::AT_REMOVEDIR)]),
            (libc::SYS_ioctl, &[3, 0x4004_54ca]),
        ],
        &[
            (libc::SYS_unlinkat, &[3, 0x1000, 0]),
            (libc::SYS_ioctl, &[3, 0xae01]),
            (libc::SYS_execve, &[0x1000]),
        ],
    ),
];

#[test]
fn what_no_process_does_is_stopped_in_every_policy() {
    let exceptions = ["passt", "virtiofsd", "bulkhead-launcher-helpers"];
    for policy in policy::all() {
        if exceptions.contains(&policy.name) {
            continue;
        }
        // The launcher makes processes; what it sets around a device is in force from then on.
        let clones = policy.name == "bulkhead-launcher";
        // Privileges are given up in these, which is before the steady state.
        let sets_up = ["bulkhead-launcher", "device-outer"].contains(&policy.name);
        // Memory that the guest gives back is punched out of its file.
        let punches = policy.name == "bulkhead-vmm";
        for call in NOBODY {
            if punches
                && call.0 == libc::SYS_madvise
                && call.1.get(2) == Some(&int(libc::MADV_REMOVE))
            {
                continue;
            }
            if clones && call.0 == libc::SYS_clone || sets_up && call.0 == libc::SYS_fcntl {
                continue;
            }
            let judged = judged(policy, *call);
            assert_ne!(judged, Judgement::Proceed, "{} {call:?}", policy.name);
        }
    }
}

/// Families of sockets that a policy lets its process make, by name; no other policy has any.
const FAMILIES: &[(&str, &[libc::c_int])] = &[
    ("bulkhead-launcher", &[libc::AF_UNIX]),
    (
        "bulkhead-launcher-helpers",
        &[
            libc::AF_UNIX,
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
        ],
    ),
    (
        "passt",
        &[
            libc::AF_UNIX,
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
        ],
    ),
];

#[test]
fn a_socket_of_each_family_is_for_those_alone_that_have_a_rule_for_it() {
    for policy in policy::all() {
        let own = FAMILIES.iter().find(|(name, _)| *name == policy.name);
        for family in 0..256 {
            for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_RAW] {
                let call: [u64; 2] = [int(family), int(kind | libc::SOCK_CLOEXEC)];
                let mut args = [0; 6];
                args[..2].copy_from_slice(&call);
                let data = Data {
                    nr: u32::try_from(libc::SYS_socket).unwrap(),
                    arch: AUDIT_ARCH.unwrap(),
                    instruction_pointer: 0,
                    args,
                };
                let proceeds = judge(policy, &data) == Judgement::Proceed;
                let may = own.is_some_and(|(_, families)| families.contains(&family));
                assert!(may || !proceeds, "{} family {family}", policy.name);
            }
        }
    }
}

#[test]
fn what_no_device_does_is_stopped_in_every_device_policy() {
    let mut seen = 0;
    for policy in policy::all() {
        let device = [
            "bulkhead-blk",
            "bulkhead-net",
            "bulkhead-mem",
            "bulkhead-rng",
            "bulkhead-vsock",
            "bulkhead-console",
        ]
        .iter()
        .any(|d| policy.name.starts_with(d));
        if !device {
            continue;
        }
        seen += 1;
        for call in NO_DEVICE {
            let judged = judged(policy, *call);
            assert_ne!(judged, Judgement::Proceed, "{} {call:?}", policy.name);
        }
    }
    assert!(seen >= 14, "{seen}");
}

#[test]
fn what_is_allowed_proceeds_and_what_lies_beside_it_does_not() {
    for (name, allowed, refused) in ALLOWED {
        let policy = policy::get(name).unwrap();
        for call in *allowed {
            assert_eq!(judged(policy, *call), Judgement::Proceed, "{name} {call:?}");
        }
        for call in *refused {
            assert_ne!(judged(policy, *call), Judgement::Proceed, "{name} {call:?}");
        }
    }
}

/// Each policy that looks at arguments is in the table, so that a new one is not forgotten.
#[test]
fn every_policy_whose_arguments_decide_has_its_calls_here() {
    for policy in policy::all() {
        let decides = policy
            .rules
            .iter()
            .any(|rule| rule.errno.is_none() && !rule.tests.is_empty());
        // Variants, held against the common tables and their own base.
        let variant = [
            "-socket",
            "-image",
            "-plain",
            "-helpers",
            "passt",
            "virtiofsd",
        ]
        .iter()
        .any(|part| policy.name.contains(part));
        let here = ALLOWED.iter().any(|(name, _, _)| *name == policy.name);
        assert!(!decides || variant || here, "{}", policy.name);
    }
}
