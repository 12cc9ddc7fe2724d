#![allow(unsafe_code)] // System calls that std has no name for, and C strings for the mount API.
//! What isolates a process, as safe functions: session, ids (setresuid(2)), limits,
//! capabilities and securebits (capabilities(7)), no_new_privs, and an empty root by the
//! mount API (fsopen(2), fsmount(2), move_mount(2), pivot_root(2)).
//!
//! Called by the launcher's only thread on itself, and by the device child between clone
//! and exec.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr;

use super::sys::{check, check_long, own};

/// A new session and process group.
pub fn setsid() -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::setsid() }).map(|_| ())
}

/// Sets the file mode mask and returns the old one.
pub fn umask(mask: u32) -> u32 {
    // SAFETY: umask cannot fail and touches no memory.
    unsafe { libc::umask(mask) }
}

/// Effective uid and gid.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: neither call can fail or touches memory.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Gives up supplementary groups and becomes `uid` and `gid` in every respect. Raw system
/// calls: glibc's functions would look for threads to tell.
pub fn become_ids(uid: u32, gid: u32, drop_groups: bool) -> io::Result<()> {
    // SAFETY: setgroups with a count of zero reads no memory; the others take integers.
    unsafe {
        if drop_groups {
            check_long(libc::syscall(
                libc::SYS_setgroups,
                0,
                ptr::null::<libc::gid_t>(),
            ))?;
        }
        check_long(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check_long(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

/// Sets both limits of a resource (RLIMIT_*).
fn limit(resource: u32, soft_and_hard: u64) -> io::Result<()> {
    let value = libc::rlimit64 {
        rlim_cur: soft_and_hard,
        rlim_max: soft_and_hard,
    };
    // SAFETY: `value` is valid across the call, the old value is not asked for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &value,
            ptr::null_mut::<libc::rlimit64>(),
        )
    };
    check_long(result).map(|_| ())
}

/// The same, unless the hard limit is lower already.
pub fn limit_at_most(resource: u32, most: u64) -> io::Result<()> {
    let mut now = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills `now`; no new value is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            ptr::null::<libc::rlimit64>(),
            &mut now,
        )
    };
    check_long(result)?;
    limit(resource, most.min(now.rlim_max))
}

// ---------------------------------------------------------------- capabilities

/// __user_cap_header_struct.
#[repr(C)]
#[derive(Clone)]
pub(super) struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// _LINUX_CAPABILITY_VERSION_3 for the calling thread.
pub(super) const CAP_HEADER: CapHeader = CapHeader {
    version: 0x2008_0522,
    pid: 0,
};

/// __user_cap_data_struct.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct CapWord {
    effective: u32,
    pub(super) permitted: u32,
    pub(super) inheritable: u32,
}

/// The two words of each set.
#[repr(C)]
#[derive(Default)]
pub(super) struct CapabilitySets(pub(super) [CapWord; 2]);

/// Keeps exactly `keep` (where permitted) in the permitted and effective sets, nothing in
/// the inheritable and ambient sets.
pub fn keep_capabilities(keep: &[u32]) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64)?;
    set_capabilities(keep, false)
}

/// The same, for a program that is to have them after exec, too: it becomes able to hand them on
/// (inheritable and ambient sets), but no others, and cannot raise more of them. Empties the
/// bounding set as [`bar_capabilities`] does; changes of uid have their usual effect.
pub fn hand_on_capabilities(keep: &[u32]) -> io::Result<()> {
    // SETPCAP among them: that of changing the bounding set and the securebits.
    set_capabilities(keep, true)?;
    for cap in keep {
        raise_ambient(*cap)?;
    }
    bar_with(LOCKED & !NO_SETUID_FIXUP)
}

fn raise_ambient(cap: u32) -> io::Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
    // SAFETY: PR_CAP_AMBIENT takes integers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, u64::from(cap), 0u64, 0u64) })
        .map(|_| ())
}

fn set_capabilities(keep: &[u32], inheritable: bool) -> io::Result<()> {
    let mut sets = CapabilitySets::default();
    // SAFETY: header and sets are laid out as capget(2) says for version 3 (two words).
    check_long(unsafe {
        libc::syscall(
            libc::SYS_capget,
            &mut CAP_HEADER.clone(),
            sets.0.as_mut_ptr(),
        )
    })?;
    let mut wanted = [0u32; 2];
    for cap in keep {
        if let Some(word) = wanted.get_mut((cap / 32) as usize) {
            *word |= 1 << (cap % 32);
        }
    }
    for (word, wanted) in sets.0.iter_mut().zip(wanted) {
        word.permitted &= wanted;
        word.effective = word.permitted;
        word.inheritable = if inheritable { word.permitted } else { 0 };
    }
    // SAFETY: as above.
    check_long(unsafe { libc::syscall(libc::SYS_capset, &mut CAP_HEADER.clone(), sets.0.as_ptr()) })
        .map(|_| ())
}

/// Empties the bounding set and locks the securebits (no privilege for uid 0, no ambient
/// capabilities, no changes). Without CAP_SETPCAP in this user namespace it is an error
/// unless it is done already.
pub fn bar_capabilities() -> io::Result<()> {
    bar_with(LOCKED)
}

/// <linux/securebits.h>: NOROOT, NO_SETUID_FIXUP, KEEP_CAPS (off, locked),
/// NO_CAP_AMBIENT_RAISE, each with its lock.
const LOCKED: i32 = 0b1110_1111;
const NO_SETUID_FIXUP: i32 = 0b0000_0100;

fn bar_with(securebits: i32) -> io::Result<()> {
    for cap in 0..64u64 {
        match prctl(libc::PR_CAPBSET_READ, cap) {
            Ok(0) => {}
            Ok(_) => {
                prctl(libc::PR_CAPBSET_DROP, cap)?;
            }
            // The first number that this kernel does not know.
            Err(_) => break,
        }
    }
    if prctl(libc::PR_GET_SECUREBITS, 0)? != securebits {
        prctl(libc::PR_SET_SECUREBITS, securebits.unsigned_abs().into())?;
    }
    Ok(())
}

fn prctl(option: i32, argument: u64) -> io::Result<i32> {
    // SAFETY: only called with options whose arguments are integers.
    check(unsafe { libc::prctl(option, argument, 0u64, 0u64, 0u64) })
}

/// PR_SET_NO_NEW_PRIVS.
pub fn no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(|_| ())
}

/// PR_SET_DUMPABLE; off: no core file, no ptrace by its own uid, /proc entries of root.
pub fn dumpable(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, on.into()).map(|_| ())
}

/// The host name of this UTS namespace.
pub fn set_host_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length are of a live string, which the kernel copies.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(|_| ())
}

// ---------------------------------------------------------------- mounts

/// A new, empty, read-only tmpfs that is mounted nowhere yet, as a directory descriptor.
/// mount_setattr's flags are given at fsmount(2): nosuid, nodev, noexec, read-only.
pub fn empty_tmpfs(options: &[(&CStr, &CStr)]) -> io::Result<OwnedFd> {
    new_mount(c"tmpfs", options, NOTHING_SPECIAL | libc::MOUNT_ATTR_RDONLY)
}

/// The same, writable for the time being.
pub fn tmpfs(options: &[(&CStr, &CStr)]) -> io::Result<OwnedFd> {
    new_mount(c"tmpfs", options, NOTHING_SPECIAL)
}

/// The /proc of this process's pid namespace, read-only, mounted nowhere yet.
pub fn new_proc() -> io::Result<OwnedFd> {
    new_mount(c"proc", &[], NOTHING_SPECIAL | libc::MOUNT_ATTR_RDONLY)
}

/// The same with nothing in it but processes.
pub fn new_proc_of_processes() -> io::Result<OwnedFd> {
    let only = [(c"subset", c"pid")];
    new_mount(c"proc", &only, NOTHING_SPECIAL | libc::MOUNT_ATTR_RDONLY)
}

const NOTHING_SPECIAL: u64 =
    libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

fn new_mount(kind: &CStr, options: &[(&CStr, &CStr)], attributes: u64) -> io::Result<OwnedFd> {
    // SAFETY: every pointer is to a C string that lives across its call, or null where the
    // command (fsconfig CMD_CREATE) wants null.
    unsafe {
        let context = own(check_long(libc::syscall(
            libc::SYS_fsopen,
            kind.as_ptr(),
            FSOPEN_CLOEXEC,
        ))?)?;
        for (key, value) in options {
            check_long(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            ))?;
        }
        check_long(libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            ptr::null::<libc::c_char>(),
            ptr::null::<libc::c_char>(),
            0,
        ))?;
        own(check_long(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        ))?)
    }
}

/// <linux/mount.h>.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

/// What is mounted at `path` and below it, once more, mounted nowhere yet: read-only, nosuid,
/// nodev.
pub fn clone_tree(path: &CStr) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE;
    // SAFETY: the path is a C string that lives across the call.
    let tree = own(check_long(unsafe {
        libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags)
    })?)?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    restrict(tree.as_fd(), attributes, AT_RECURSIVE)?;
    Ok(tree)
}

/// The same of the directory behind a descriptor, alone: nosuid, nodev and noexec, and read-only where
/// that is wanted. Where other file systems are mounted below it the kernel refuses (EINVAL), since what
/// they cover would be seen.
pub fn clone_directory(directory: BorrowedFd<'_>, readonly: bool) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.unsigned_abs();
    // SAFETY: the path is a C literal.
    let tree = own(check_long(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            directory.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    })?)?;
    let readonly = if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    restrict(tree.as_fd(), NOTHING_SPECIAL | readonly, 0)?;
    Ok(tree)
}

/// Adds attributes to a mount, where nothing is mounted from now on that is mounted on the host: what is
/// cloned would follow what it was cloned from.
fn restrict(mount: BorrowedFd<'_>, attributes: u64, flags: libc::c_uint) -> io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: `change` is a mount_attr of the size told and lives across the call; the path is
    // a C literal.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH.unsigned_abs(),
            ptr::from_ref(&change),
            size_of::<libc::mount_attr>(),
        )
    })
    .map(|_| ())
}

/// <linux/mount.h> and <linux/fcntl.h>.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC.unsigned_abs();
const AT_RECURSIVE: libc::c_uint = 0x8000;

/// Makes the detached mount `root`, with `mounts` in their places below it, the root of this
/// mount namespace, read-only, and lets go of every other mount.
pub fn enter_built_root(root: BorrowedFd<'_>, mounts: &[(OwnedFd, PathBuf)]) -> io::Result<()> {
    cover_root(root)?;
    for (mount, place) in mounts {
        let place = CString::new(place.as_os_str().as_bytes())?;
        // SAFETY: both paths are C strings that live across the call.
        check_long(unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                mount.as_raw_fd(),
                c"".as_ptr(),
                root.as_raw_fd(),
                place.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        })?;
    }
    restrict(root, libc::MOUNT_ATTR_RDONLY, 0)?;
    leave_old_root(root)
}

/// Makes the detached mount `root` the root of this mount namespace and lets go of every
/// other mount in it. Nothing of the old tree can be reached afterwards.
pub fn enter_root(root: BorrowedFd<'_>) -> io::Result<()> {
    cover_root(root)?;
    leave_old_root(root)
}

/// Mounts `root` over the present root.
fn cover_root(root: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all strings are C literals; null source, type and data are what a propagation
    // change wants.
    unsafe {
        // No mount event may come in from outside or go out, and pivot_root demands it.
        check(libc::mount(
            ptr::null(),
            c"/".as_ptr(),
            ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            ptr::null(),
        ))?;
        check_long(libc::syscall(
            libc::SYS_move_mount,
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        ))?;
    }
    Ok(())
}

/// Makes what covers the root the root.
fn leave_old_root(root: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all strings are C literals.
    unsafe {
        check(libc::fchdir(root.as_raw_fd()))?;
        // pivot_root(2), "pivot_root(".", ".")": the old root comes to lie on top of the new
        // one, and is detached from there.
        let dot = c".".as_ptr();
        check_long(libc::syscall(libc::SYS_pivot_root, dot, dot))?;
        check(libc::umount2(dot, libc::MNT_DETACH))?;
        check(libc::chdir(c"/".as_ptr()))?;
    }
    Ok(())
}
