//! Whether a VM's launcher could give its devices user namespaces of their own (user_namespaces(7)):
//! it goes without where the host forbids them, and then only as root. Called by the audit only.
#![allow(unsafe_code)] // clone(2) and waitpid(2).

use std::io::Error;
use std::ptr::null;

use super::Role;
use super::process;
use super::targets::Target;

/// A launcher that has one can make more; anyone but root is refused without; and root has none only
/// where none can be made.
pub fn expected(targets: &[Target]) -> bool {
    let launcher = targets.iter().find(|target| target.role == Role::Launcher);
    let own = launcher.is_some_and(|target| process::has_own_namespace(target.pid, "user"));
    own || can_be_made()
}

/// Makes one, with a process in it that ends at once.
fn can_be_made() -> bool {
    // As wide as the kernel reads them: the call is variadic.
    let (flags, none): (libc::c_long, libc::c_long) =
        (libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0);
    // SAFETY: without CLONE_VM the child has a copy of this memory, as by fork(2), and does nothing in
    // it but end; no pointer is given.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, null::<u8>(), none, none, none) };
    if child == 0 {
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(0) };
    }
    let Ok(pid) = libc::pid_t::try_from(child) else {
        return false;
    };
    if pid < 0 {
        return false;
    }
    let mut status = 0;
    loop {
        // SAFETY: waitpid(2) writes one int, and `status` is one.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if ended == pid || Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_unshare_can_make_can_be_made() {
        let command = std::process::Command::new("unshare")
            .args(["--user", "true"])
            .status();
        let Ok(status) = command else {
            return;
        };
        assert_eq!(can_be_made(), status.success());
    }
}
