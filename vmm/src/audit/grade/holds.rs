//! What a VMM may hold: its standard streams, its own KVM machine, guest memory, what it speaks to its
//! launcher, devices and clients by, taps, the statistics of its devices' cgroups, and a file that the
//! serial port is written to. It reads the kernel and the initial RAM disk, and no other file of
//! anybody's.

use crate::audit::fds::{Fd, Kind};
use crate::audit::limits;
use crate::launcher::{USAGE_FILES, printable};

/// Character devices of a VMM's, beside /dev/kvm and a terminal that is its standard stream.
const DEVICES: [&str; 2] = ["/dev/net/tun", "/dev/vhost-net"];

/// Files that a guest is booted from, where nobody tells which: kernel and initial RAM disk.
const BOOT_FILES: usize = 2;

/// Descriptors that no VMM has. `boot`: the files that its guest is booted from, if that was told.
pub fn surplus_of_vmm<'a>(
    fds: &'a [Fd],
    boot: Option<&'a [String]>,
) -> impl Iterator<Item = &'a Fd> {
    let standard = |fd: &Fd| is_standard(fds, fd);
    let mut booted_from = 0;
    let mut boots = move |fd: &Fd| {
        // They may be called otherwise by now.
        let most = boot.map_or(BOOT_FILES, <[String]>::len);
        booted_from += usize::from(fd.access == "r");
        fd.access == "r" && booted_from <= most
    };
    let (mut machines, mut vcpus) = (0, Vec::new());
    fds.iter().filter(move |fd| match &fd.kind {
        Kind::Block | Kind::Directory | Kind::Other => true,
        Kind::File => !standard(fd) && reads(fd) && !is_statistics(fd) && !boots(fd),
        Kind::Character => !standard(fd) && !DEVICES.contains(&fd.target.as_str()),
        Kind::Anonymous(name) if name == "kvm-vm" => {
            machines += 1;
            machines > 1
        }
        Kind::Anonymous(name) if name.starts_with("kvm-vcpu:") => {
            let twice = vcpus.contains(&name);
            vcpus.push(name);
            twice
        }
        Kind::Anonymous(name) => !WAITS.contains(&name.as_str()),
        _ => false,
    })
}

/// Anonymous inodes by which a VMM or a launcher waits, and knows processes.
const WAITS: [&str; 5] = ["eventfd", "eventpoll", "pidfd", "signalfd", "timerfd"];
/// And a launcher makes namespaces and confines.
const MAKES: [&str; 3] = ["seccomp notify", "fscontext", "landlock-ruleset"];

/// What the copy of virtiofsd is called.
const PROGRAM_IN_MEMORY: &str = "/memfd:virtiofsd (deleted)";

/// Descriptors that no launcher has; files it opens for others.
pub fn surplus_of_launcher(fds: &[Fd]) -> impl Iterator<Item = &Fd> {
    fds.iter().filter(|fd| match &fd.kind {
        Kind::Kvm => true,
        // A program that it may start, which nobody can write to.
        Kind::Memfd => fd.access != "r" || fd.target != PROGRAM_IN_MEMORY,
        Kind::Anonymous(name) => {
            let name = name.as_str();
            !WAITS.contains(&name) && !MAKES.contains(&name)
        }
        _ => false,
    })
}

/// A standard stream, or a copy of one.
fn is_standard(fds: &[Fd], fd: &Fd) -> bool {
    let mut of = fds.iter().filter(|of| of.number <= 2);
    fd.number <= 2 || of.any(|of| of.target == fd.target)
}

/// What is none of these.
pub fn beside_standard(fds: &[Fd]) -> impl Iterator<Item = &Fd> {
    fds.iter().filter(|fd| !is_standard(fds, fd))
}

/// A serial port's file is only written.
fn reads(fd: &Fd) -> bool {
    fd.access != "w"
}

/// A file of the leaf of a device, from which its use of the host is read.
fn is_statistics(fd: &Fd) -> bool {
    fd.access == "r"
        && fd.target.rsplit_once('/').is_some_and(|(leaf, name)| {
            let name = name.trim_end_matches(" (deleted)");
            limits::is_leaf(leaf) && USAGE_FILES.contains(&name)
        })
}

/// Descriptors of a device that are not what the API says they were granted as, one line each. A file
/// that was renamed since is still the file that it was.
pub fn not_as_granted(fds: &[Fd], granted: &[String]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (fd, number) in fds
        .iter()
        .filter_map(|fd| Some((fd, usize::try_from(fd.number).ok()?)))
    {
        let Some(granted) = number.checked_sub(3).and_then(|index| granted.get(index)) else {
            continue;
        };
        let as_granted = match &fd.kind {
            Kind::File | Kind::Block => {
                let readonly = granted.contains("(read-only");
                !readonly || fd.access == "r"
            }
            Kind::Character => match granted.split_once(' ') {
                Some(("tap", _)) => fd.target == "/dev/net/tun",
                _ => granted.split(',').next() == Some(fd.target.as_str()),
            },
            _ => true,
        };
        if !as_granted {
            wrong.push(format!(
                "holds descriptor {} ({} {}, {}), and was granted: {}",
                fd.number,
                fd.kind.label(),
                fd.target,
                fd.access,
                printable(granted)
            ));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd(number: i32, kind: Kind, target: &str, access: &str) -> Fd {
        Fd {
            number,
            kind,
            access: access.into(),
            target: target.into(),
            ring: None,
            family: None,
        }
    }

    #[test]
    fn a_launcher_keeps_what_it_grants_and_has_no_machine() {
        let own = [
            fd(3, Kind::Socket, "socket:[1]", "rw"),
            fd(
                4,
                Kind::Anonymous("pidfd".into()),
                "anon_inode:[pidfd]",
                "rw",
            ),
            fd(5, Kind::Block, "/dev/loop0", "rw"),
            fd(
                6,
                Kind::Anonymous("seccomp notify".into()),
                "anon_inode:seccomp notify",
                "rw",
            ),
        ];
        assert_eq!(surplus_of_launcher(&own).count(), 0);
        let strange = [
            fd(7, Kind::Kvm, "/dev/kvm", "rw"),
            fd(8, Kind::Memfd, "/memfd:guest-ram (deleted)", "rw"),
            fd(
                9,
                Kind::Anonymous("userfaultfd".into()),
                "anon_inode:[userfaultfd]",
                "rw",
            ),
            fd(
                10,
                Kind::Anonymous("kvm-vm".into()),
                "anon_inode:kvm-vm",
                "rw",
            ),
        ];
        assert_eq!(surplus_of_launcher(&strange).count(), 4);
    }

    #[test]
    fn what_is_not_as_it_was_granted_is_found() {
        let granted = [
            "control channel",
            "vhost-user channel",
            "/a b (x) (read-only)",
            "/c (read-write)",
            "tap t0, queue 0",
            "/dev/vhost-net, pair 0",
            "/dev/random",
        ]
        .map(str::to_owned);
        let with = |number: usize, kind: Kind, target: &str, access: &str| {
            let mut fds = vec![
                fd(3, Kind::Socket, "socket:[1]", "rw"),
                fd(5, Kind::File, "/a b (x)", "r"),
                fd(6, Kind::File, "/moved", "rw"),
                fd(7, Kind::Character, "/dev/net/tun", "rw"),
                fd(8, Kind::Character, "/dev/vhost-net", "rw"),
                fd(9, Kind::Character, "/dev/random", "r"),
                fd(10, Kind::Character, "/dev/zero", "rw"),
            ];
            if let Some(place) = fds.iter_mut().find(|fd| fd.number == number as i32) {
                *place = fd(number as i32, kind, target, access);
            }
            not_as_granted(&fds, &granted).len()
        };
        assert_eq!(with(0, Kind::Other, "", ""), 0);
        assert_eq!(with(5, Kind::File, "/a b (x)", "rw"), 1);
        for number in 7..=9 {
            assert_eq!(with(number, Kind::Character, "/dev/zero", "rw"), 1);
        }
    }

    #[test]
    fn what_a_vmm_may_not_hold_is_found_and_what_it_may_is_not() {
        let machine = || Kind::Anonymous("kvm-vm".into());
        let own = [
            fd(1, Kind::File, "/var/log/vm", "rw"),
            fd(2, Kind::Character, "/dev/pts/3", "rw"),
            fd(3, Kind::File, "/var/log/vm", "rw"),
            fd(4, Kind::Character, "/dev/pts/3", "rw"),
            fd(5, Kind::Kvm, "/dev/kvm", "rw"),
            fd(6, machine(), "anon_inode:kvm-vm", "rw"),
            fd(7, Kind::Character, "/dev/net/tun", "rw"),
            fd(
                8,
                Kind::File,
                "/sys/fs/cgroup/bulkhead-vm-1-2/dev-a/cpu.stat",
                "r",
            ),
            fd(9, Kind::File, "/tmp/serial", "w"),
            fd(11, Kind::File, "/boot/vmlinux", "r"),
            fd(12, Kind::File, "/boot/initrd", "r"),
            fd(10, Kind::Memfd, "/memfd:guest-ram (deleted)", "rw"),
            fd(
                13,
                Kind::Anonymous("kvm-vcpu:0".into()),
                "anon_inode:kvm-vcpu:0",
                "rw",
            ),
            fd(
                14,
                Kind::Anonymous("eventfd".into()),
                "anon_inode:[eventfd]",
                "rw",
            ),
        ];
        let boot = ["/boot/vmlinux", "/boot/initrd"].map(str::to_owned);
        assert_eq!(surplus_of_vmm(&own, Some(&boot)).count(), 0);
        assert_eq!(surplus_of_vmm(&own, None).count(), 0);
        assert_eq!(surplus_of_vmm(&own, Some(&[])).count(), 2);
        for surplus in [
            fd(20, Kind::File, "/etc/shadow", "rw"),
            fd(20, Kind::File, "net:[4026531840]", "r"),
            fd(20, Kind::Character, "/dev/random", "r"),
            fd(20, machine(), "anon_inode:kvm-vm", "rw"),
            fd(20, Kind::Block, "/dev/sda", "r"),
            fd(20, Kind::Directory, "/etc", "r"),
            fd(20, Kind::Other, "?", ""),
            fd(
                20,
                Kind::File,
                "/sys/fs/cgroup/bulkhead-vm-1-2/dev-a/cgroup.procs",
                "rw",
            ),
            fd(
                20,
                Kind::Anonymous("userfaultfd".into()),
                "anon_inode:[userfaultfd]",
                "rw",
            ),
            fd(
                20,
                Kind::Anonymous("kvm-vcpu:0".into()),
                "anon_inode:kvm-vcpu:0",
                "rw",
            ),
        ] {
            let all = [own.as_slice(), &[surplus]].concat();
            for boot in [Some(boot.as_slice()), None] {
                let found: Vec<i32> = surplus_of_vmm(&all, boot).map(|fd| fd.number).collect();
                assert_eq!(found, [20], "{:?}", all.last());
            }
        }
    }
}
