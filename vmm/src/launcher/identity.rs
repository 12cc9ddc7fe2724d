//! User ids and user namespaces (user_namespaces(7)): how the launcher is cloned, and who
//! a device process is.
//!
//! | VMM runs as | launcher's user namespace | device process |
//! |---|---|---|
//! | root | its own, every id mapped to itself: capabilities over its children only | own namespace, id 1000 inside, a host id of its own outside |
//! | root where user namespaces are forbidden | the host's | the host's, a host id of its own |
//! | a user | its own, that user mapped to itself | own namespace, id 1000 inside, that user outside |
//!
//! The host ids are this VM's alone: by its pid, or out of a range that the operator names (`ids`).
//!
//! The VMM decides at start and tells the launcher; both use this module.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use bulkhead_seccomp::confine::UNCONFINED;

use super::MAX_DEVICES;

/// Every device process's uid and gid inside its own user namespace.
pub const INNER_ID: u32 = 1000;
/// Where the host ids of device processes begin: far above any that systems allot by
/// themselves, below 2^31. With 22 bits of pid and 64 slots they end at 0x7fff_ffff.
pub const HOST_ID_BASE: u32 = 0x7000_0000;

/// How the launcher relates to the host's user namespace; see the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Root of a namespace of its own.
    RootNamespace,
    /// Root itself.
    Root,
    /// An ordinary user, in a namespace of its own.
    User,
}

/// Which of the launcher's ids it maps into its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// Those that devices have for themselves.
    OwnIds,
    /// The launcher's own, too, since there are no others, or since a helper serves files of every
    /// owner.
    Root,
}

impl Rights {
    /// The word on the launcher's command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::RootNamespace => "root-namespace",
            Self::Root => "root",
            Self::User => "user",
        }
    }

    /// The reverse of `word`.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::RootNamespace, Self::Root, Self::User]
            .into_iter()
            .find(|r| r.word() == word)
    }

    /// Flags of the clone that makes the launcher.
    pub fn launcher_flags(self) -> u64 {
        let pid = libc::CLONE_NEWPID as u64;
        match self {
            Self::RootNamespace | Self::User => pid | libc::CLONE_NEWUSER as u64,
            Self::Root => pid,
        }
    }

    /// Flags of the clone that makes a device process.
    pub fn device_flags(self) -> u64 {
        if UNCONFINED {
            return 0;
        }
        let all = libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP;
        match self {
            Self::RootNamespace | Self::User => (all | libc::CLONE_NEWUSER) as u64,
            Self::Root => all as u64,
        }
    }

    /// Capabilities that the launcher is executed with: what it keeps, and SETPCAP, with which
    /// it empties its bounding set.
    pub fn exec_capabilities(self, maps: Mapped) -> Vec<u32> {
        const SETPCAP: u32 = 8;
        let mut capabilities = self.launcher_capabilities(maps);
        capabilities.push(SETPCAP);
        capabilities
    }

    /// Capabilities (numbers of <linux/capability.h>) that the launcher keeps, in its own user
    /// namespace where it has one.
    pub fn launcher_capabilities(self, maps: Mapped) -> Vec<u32> {
        const DAC_OVERRIDE: u32 = 1;
        const KILL: u32 = 5;
        const SETGID: u32 = 6;
        const SETUID: u32 = 7;
        const SYS_ADMIN: u32 = 21;
        const SETFCAP: u32 = 31;
        match self {
            // SYS_ADMIN: naming a child's pid in SCM_CREDENTIALS; without a user namespace
            // also the clone itself. SETUID, SETGID: a device's id map. DAC_OVERRIDE: root
            // opens what the API names whoever owns it.
            Self::RootNamespace if maps == Mapped::OwnIds => {
                vec![DAC_OVERRIDE, SETGID, SETUID, SYS_ADMIN]
            }
            // Mapping our own uid 0 into a child wants SETFCAP since Linux 5.12.
            Self::RootNamespace => vec![DAC_OVERRIDE, SETGID, SETUID, SYS_ADMIN, SETFCAP],
            // Without a user namespace of ours devices are nobody's but their uid's: KILL.
            Self::Root => vec![DAC_OVERRIDE, KILL, SETGID, SETUID, SYS_ADMIN],
            Self::User => vec![SYS_ADMIN],
        }
    }
}

/// First host id of the devices of the VM whose VMM has this pid. Two VMs' ranges do not
/// meet, since a pid names one process.
pub fn host_id_base(vmm_pid: i32) -> Option<u32> {
    let pid = u32::try_from(vmm_pid).ok().filter(|p| *p < 1 << 22)?;
    pid.checked_mul(u32::try_from(MAX_DEVICES).ok()?)?
        .checked_add(HOST_ID_BASE)
}

/// Whether this process's user namespace has the ids that VMs of root's take by their pids.
pub fn ids_of_vms_exist() -> bool {
    IdMap::own("uid_map").is_ok_and(|map| map.covers(HOST_ID_BASE, 1))
}

/// An id map as /proc/PID/uid_map shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct IdMap(Vec<(u32, u32)>);

impl IdMap {
    /// This process's own map; `file` is "uid_map" or "gid_map".
    pub fn own(file: &str) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/self/{file}"))?)
            .ok_or_else(|| io::Error::other(format!("/proc/self/{file} is not an id map")))
    }

    /// Keeps the first column and the count of each line: what exists in this namespace.
    fn parse(text: &str) -> Option<Self> {
        let mut extents = Vec::new();
        for line in text.lines() {
            let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
            let inside = numbers.next()?.ok()?;
            let _outside = numbers.next()?.ok()?;
            extents.push((inside, numbers.next()?.ok()?));
        }
        Some(Self(extents))
    }

    /// A map for a child namespace in which every id of this one stands for itself.
    pub fn identity(&self) -> String {
        self.0
            .iter()
            .map(|(first, count)| format!("{first} {first} {count}\n"))
            .collect()
    }

    /// Whether all of `first..first + count` exist here.
    pub fn covers(&self, first: u32, count: u32) -> bool {
        let end = u64::from(first) + u64::from(count);
        self.0
            .iter()
            .any(|(f, c)| *f <= first && end <= u64::from(*f) + u64::from(*c))
    }
}

/// Id maps of a new user namespace.
pub struct Maps {
    /// Text for uid_map.
    pub uid: String,
    /// Text for gid_map.
    pub gid: String,
    /// Forbid setgroups first: the only way for a process without CAP_SETGID.
    pub deny_setgroups: bool,
}

impl Maps {
    /// One id inside standing for one outside.
    pub fn single(inside: (u32, u32), outside: (u32, u32), deny_setgroups: bool) -> Self {
        Self {
            uid: format!("{} {} 1\n", inside.0, outside.0),
            gid: format!("{} {} 1\n", inside.1, outside.1),
            deny_setgroups,
        }
    }

    /// Writes the maps of the process behind `pidfd`, a child that has not been reaped.
    pub fn write(&self, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        let directory = format!("/proc/{}", proc_pid(pidfd)?);
        if self.deny_setgroups {
            write_once(&format!("{directory}/setgroups"), "deny")?;
        }
        write_once(&format!("{directory}/gid_map"), &self.gid)?;
        write_once(&format!("{directory}/uid_map"), &self.uid)
    }
}

/// An id map takes a single write.
fn write_once(path: &str, text: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// The number under which /proc knows the process: a launcher in a pid namespace of its
/// own sees the host's /proc, and its own numbers say nothing there.
fn proc_pid(pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
        .filter(|pid| *pid > 0)
        .ok_or_else(|| io::Error::other("the process has no number in /proc: is /proc of another pid namespace mounted here?"))
}

/// Why this host would not make namespaces for us and what to do about it, in one line
/// that ends an error.
pub fn namespace_remedy(root: bool) -> String {
    let is = |file: &str, value: &str| {
        fs::read_to_string(format!("/proc/sys/{file}")).is_ok_and(|text| text.trim() == value)
    };
    let remedy = if is("user/max_user_namespaces", "0") {
        "set sysctl user.max_user_namespaces=15000, or run as root"
    } else if is("kernel/unprivileged_userns_clone", "0") {
        "set sysctl kernel.unprivileged_userns_clone=1, or run as root"
    } else if !root && is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        "AppArmor forbids it: set sysctl kernel.apparmor_restrict_unprivileged_userns=0, install an AppArmor profile with `userns,` for bulkhead, or run as root"
    } else if root {
        "root lacks CAP_SYS_ADMIN or is in a chroot: in a container, run it with --privileged"
    } else {
        "in a container or a chroot: allow clone with CLONE_NEWUSER, or run as root"
    };
    remedy.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ids_of_two_vms_never_meet_and_stay_positive() {
        assert_eq!(host_id_base(1), Some(0x7000_0040));
        let last = host_id_base((1 << 22) - 1).unwrap();
        assert_eq!(last + 63, 0x7fff_ffff);
        assert_eq!(host_id_base(1 << 22), None);
        assert_eq!(host_id_base(-1), None);
        assert!(host_id_base(4001).unwrap() > host_id_base(4000).unwrap() + 63);
    }

    #[test]
    fn a_map_covers_what_its_extents_hold() {
        let host = IdMap::parse("         0          0 4294967295\n").unwrap();
        assert!(host.covers(0x7fff_ff00, 256));
        assert_eq!(host.identity(), "0 0 4294967295\n");
        let podman = IdMap::parse("0 1000 1\n1 100000 65536\n").unwrap();
        assert!(podman.covers(1, 65536));
        assert!(!podman.covers(1, 65537));
        assert!(!podman.covers(0x7000_0000, 64));
        assert_eq!(podman.identity(), "0 0 1\n1 1 65536\n");
        assert_eq!(IdMap::parse("0 0\n"), None);
        assert_eq!(IdMap::parse("0 0 -1\n"), None);
    }

    #[test]
    fn rights_survive_the_command_line() {
        for rights in [Rights::RootNamespace, Rights::Root, Rights::User] {
            assert_eq!(Rights::from_word(rights.word()), Some(rights));
        }
        assert_eq!(Rights::from_word("nobody"), None);
    }
}
