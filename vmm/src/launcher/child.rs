//! The child between clone and exec: a copy of the launcher that confines itself step by
//! step and becomes a device binary. It has one thread (the launcher has), so ordinary code
//! may run; it leaves by exec or by `_exit`, never by returning into the launcher.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use bulkhead_seccomp::confine::UNCONFINED;
use bulkhead_seccomp::policy::Policy;
use bulkhead_seccomp::{filter, notify, policy};

use super::cgroup::Fallback;
use super::identity::{INNER_ID, Rights};
use super::{confine, helper, helper_fs, isolate, packet, sys};

/// Everything the child needs.
pub struct Child<'a> {
    /// How the launcher was cloned.
    pub rights: Rights,
    /// Its uid and gid after all is done: inside its own user namespace, or the host's where
    /// it has none.
    pub id: u32,
    /// Give up supplementary groups. Where ids are not ours to give, setgroups is forbidden:
    /// the groups stay, and name nothing in an empty root.
    pub drop_groups: bool,
    /// The device binary.
    pub program: BorrowedFd<'a>,
    /// argv.
    pub argv: &'a [CString],
    /// What become 0, 1, 2, …
    pub fds: &'a [RawFd],
    /// The child's end: waits for a byte, reports a failure as a line, ends by exec.
    pub sync: BorrowedFd<'a>,
    /// What it becomes.
    pub sandbox: &'a Sandbox<'a>,
    /// Resource limits in the place of cgroup controllers that are missing.
    pub fallback: Fallback,
}

/// Around what a process of the launcher runs.
pub enum Sandbox<'a> {
    /// A device process: nothing is in reach, and this policy is its steady state's.
    Device(&'static Policy),
    /// An external helper: see `helper` for its exceptions.
    Helper(helper::Root<'a>),
}

impl Sandbox<'_> {
    /// Flags of the clone. passt stays in the network namespace of the host.
    pub fn flags(&self, rights: Rights) -> u64 {
        let all = rights.device_flags();
        match self {
            Self::Helper(root) if root.share.is_none() => all & !(libc::CLONE_NEWNET as u64),
            _ => all,
        }
    }

    /// Whether it is virtiofsd.
    pub fn shares(&self) -> bool {
        matches!(self, Self::Helper(root) if root.share.is_some())
    }
}

type Step<T> = Result<T, String>;

fn step<T>(what: &'static str, result: io::Result<T>) -> Step<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

impl Child<'_> {
    /// Runs the child to its exec or its end.
    pub fn run(&self) -> ! {
        let mut report = self.sync.as_raw_fd();
        let line = match self.become_device(&mut report) {
            Ok(never) => match never {},
            Err(line) => line,
        };
        let _ = sys::write(sys::kept_fd(report), line.as_bytes());
        sys::exit_now(126)
    }

    fn become_device(&self, report: &mut RawFd) -> Step<std::convert::Infallible> {
        // The launcher writes this namespace's id maps first.
        let mut go = [0];
        if step("waiting for the launcher", sys::read(self.sync, &mut go))? != 1 {
            return Err("the launcher has ended".into());
        }
        step("signals", sys::reset_signals())?;
        if !UNCONFINED {
            self.leave_the_host()?;
        }
        let mut fds = self.fds.to_vec();
        let channel = match self.sandbox.shares() {
            true => Some(step("its channel", helper_fs::channel())?),
            false => None,
        };
        if let Some((listener, ours)) = &channel {
            fds.push(listener.as_raw_fd());
            step(
                "handing over its channel",
                packet::send_descriptor(self.sync, ours.as_fd()),
            )?;
        }
        let kept = step(
            "descriptors",
            sys::arrange_fds(&fds, &[self.program, self.sync]),
        )?;
        let [program, sync] = kept.as_slice() else {
            return Err("descriptors: lost".into());
        };
        *report = *sync;
        if !UNCONFINED {
            self.give_up_rights()?;
        }
        match self.sandbox {
            Sandbox::Device(policy) => {
                let listener = notify::apply_filter_with_listener(policy)
                    .map_err(|e| format!("filter: {e}"))?;
                step(
                    "handing over the listener",
                    packet::send_descriptor(sys::kept_fd(*sync), listener.as_fd()),
                )?;
                // Who kept it could answer its own reports.
                drop(listener);
            }
            Sandbox::Helper(root) => {
                let policy = match root.share {
                    Some(_) => &policy::VIRTIOFSD,
                    None => &policy::PASST,
                };
                filter::apply_filter_this_thread(policy).map_err(|e| format!("filter: {e}"))?;
            }
        }
        let error = sys::execveat(sys::kept_fd(*program), self.argv);
        let remedy = match error.raw_os_error() {
            Some(libc::EACCES) => "; the binary must be executable by everybody (chmod 0755)",
            Some(libc::ENOEXEC) => "; is it a program of this machine?",
            Some(libc::ENOENT) => {
                "; the loader that it wants is missing: a device binary must be static"
            }
            _ => "",
        };
        Err(format!("exec: {error}{remedy}"))
    }

    /// Its namespaces, ids and root.
    fn leave_the_host(&self) -> Step<()> {
        if self.sandbox.shares() {
            // It can be dumped again once it is executed, and does nothing about that.
            step("cores", helper_fs::dump_no_memory())?;
        }
        step("dumpable", isolate::dumpable(false))?;
        step("a new session", isolate::setsid())?;
        isolate::umask(0o077);
        step("host name", isolate::set_host_name("device"))?;
        // In its own user namespace it becomes 1000 first, so that the mounts are 1000's, and
        // loses no capability by it; without one, capabilities for the mounts go with uid 0.
        if self.rights != Rights::Root {
            self.become_ids()?;
        }
        match self.sandbox {
            Sandbox::Device(_) => self.enter_empty_root()?,
            Sandbox::Helper(root) => root.enter()?,
        }
        if self.rights == Rights::Root {
            self.become_ids()?;
        }
        Ok(())
    }

    fn give_up_rights(&self) -> Step<()> {
        let limits = match self.sandbox {
            Sandbox::Device(_) => confine::device_limits(self.fallback),
            Sandbox::Helper(_) if self.sandbox.shares() => confine::share_limits(self.fallback),
            Sandbox::Helper(_) => confine::helper_limits(self.fallback),
        };
        step("limits", limits)?;
        if self.sandbox.shares() && self.rights != Rights::User {
            let keep = isolate::hand_on_capabilities(&helper_fs::EXEC_CAPABILITIES);
            step("capabilities", keep)?;
            return step("no_new_privs", isolate::no_new_privs());
        }
        step("bounding set", isolate::bar_capabilities())?;
        step("capabilities", isolate::keep_capabilities(&[]))?;
        step("no_new_privs", isolate::no_new_privs())
    }

    fn become_ids(&self) -> Step<()> {
        step(
            "uid",
            isolate::become_ids(self.id, self.id, self.drop_groups),
        )
    }

    fn enter_empty_root(&self) -> Step<()> {
        // One inode, the root itself; a page is the smallest limit that tmpfs takes.
        let options = [
            (c"mode", c"0555"),
            (c"size", c"4096"),
            (c"nr_inodes", c"2"),
            (c"source", c"empty"),
        ];
        let root = step("an empty root", isolate::empty_tmpfs(&options))?;
        step("entering the empty root", isolate::enter_root(root.as_fd()))
    }
}

/// The id of a device inside: see `Child::id`.
pub fn inner_id(rights: Rights, host_id: u32) -> u32 {
    match rights {
        Rights::Root => host_id,
        Rights::RootNamespace | Rights::User => INNER_ID,
    }
}
