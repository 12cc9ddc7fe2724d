//! What a virtiofsd of the launcher's may be: see `seccomp/policies/virtiofsd.toml`. It names the host's
//! files where its directory is, and has capabilities over them alone.

use super::{DEVICE_NAMESPACES, Judgement, shares};
use crate::audit::fds::{Fd, Kind};
use crate::audit::process::Process;
use crate::launcher;

/// Where its root has its directory, and what of /proc it holds.
const PLACES: [&str; 2] = ["/share", "/processes"];

/// Its capabilities, in a user namespace of its own.
pub(super) fn capabilities() -> u64 {
    let all = launcher::SHARE_CAPABILITIES.into_iter();
    all.fold(0, |set, capability| set | 1 << capability)
}

impl Judgement {
    /// virtiofsd: its own filter is narrower than the launcher's, and everything that it holds open it has
    /// found in its root.
    pub(super) fn share(&mut self, process: &Process) {
        if shares(&process.namespaces, "user") {
            self.deviation("has no user namespace of its own");
        }
        self.namespaces(process, &DEVICE_NAMESPACES);
        if let Some(root) = &process.root {
            if root.shared || !root.entries.iter().any(|entry| entry == "share") {
                self.deviation("its root directory is not that of a virtiofsd");
            }
            if root.read_only != Some(true) {
                self.deviation("its root directory is not read-only");
            }
        }
        if process.pids.len() > 1 && process.pids.last() != Some(&1) {
            self.deviation("is not alone in its pid namespace");
        }
        for fd in process.fds.iter().filter(|fd| !may_hold(fd)) {
            self.surplus(fd);
        }
        self.note_once(
            "an external helper: it serves files of the host's as those whom they belong to, has no Landlock, and started with libraries in reach",
        );
    }
}

fn may_hold(fd: &Fd) -> bool {
    match (&fd.kind, fd.number) {
        (Kind::Null, 0 | 1) | (Kind::Socket | Kind::Memfd | Kind::Pipe, _) => true,
        (Kind::Anonymous(name), _) => matches!(name.as_str(), "eventfd" | "eventpoll"),
        (Kind::Directory, _) if fd.target == "/" => true,
        // A device node is named, and opened by nobody.
        (Kind::Null | Kind::Kvm, _) => fd.access == "path" && fd.target.starts_with("/share/"),
        // Of whatever kind.
        (Kind::File | Kind::Directory | Kind::Block | Kind::Character | Kind::Other, _) => {
            let at = |place: &str| {
                let rest = fd.target.strip_prefix(place);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            // What somebody has moved out of it since is still the file that it was.
            PLACES.into_iter().any(at) || fd.target.starts_with("(unreachable)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_holds_lies_in_its_directory() {
        let fd = |number, kind, target: &str| Fd {
            number,
            kind,
            access: "path".into(),
            target: target.into(),
            ring: None,
            family: None,
        };
        for held in [
            fd(0, Kind::Null, "/dev/null"),
            fd(3, Kind::Socket, "socket:[1]"),
            fd(5, Kind::Directory, "/"),
            fd(6, Kind::Directory, "/processes/1/fd"),
            fd(7, Kind::File, "/share/a"),
            fd(8, Kind::Other, "/share/link"),
            fd(9, Kind::Directory, "/share"),
            fd(
                10,
                Kind::Anonymous("eventfd".into()),
                "anon_inode:[eventfd]",
            ),
        ] {
            assert!(may_hold(&held), "{held:?}");
        }
        for surplus in [
            fd(5, Kind::File, "/"),
            fd(6, Kind::File, "/shared"),
            fd(7, Kind::File, "/etc/shadow"),
            fd(8, Kind::Directory, "/usr"),
            fd(9, Kind::Kvm, "/dev/kvm"),
            fd(10, Kind::Anonymous("kvm-vm".into()), "anon_inode:kvm-vm"),
        ] {
            assert!(!may_hold(&surplus), "{surplus:?}");
        }
        assert_eq!(capabilities(), 0x8000_00db);
    }
}
