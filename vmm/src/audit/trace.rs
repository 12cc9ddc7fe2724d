//! A thread's seccomp filters as the kernel has them (ptrace(2), PTRACE_SECCOMP_GET_FILTER), told
//! back as system calls and held against the policies of this program.
//!
//! The kernel shows them to CAP_SYS_ADMIN of the host alone, of a stopped thread: each is stopped
//! for some microseconds, as by a signal that it does not see. Called by the audit only.
#![allow(unsafe_code)] // ptrace(2), waitpid(2) and kcmp(2).

use std::collections::BTreeSet;
use std::io::Error;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use bulkhead_seccomp::policy::{self, Stage, allowed_syscalls, sock_filter, syscall_name};
use serde::Serialize;

const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
/// The kernel's BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;
/// Most filters of a thread that are read.
const MAX_FILTERS: usize = 32;
/// How long a thread may take to stop.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a thread may call, by the kernel's account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Filters {
    /// The policies that its filters were compiled from, the oldest first; "?" for one that is
    /// none of this program's. The name of one in its set-up stage ends with ":setup".
    pub policies: Vec<String>,
    /// How many system calls each of them lets through, at least for some arguments; 0 for one that
    /// could not be followed.
    pub counts: Vec<usize>,
    /// The system calls that all of them let through, at least for some arguments, by name.
    pub syscalls: Vec<String>,
}

/// Reads the filters of a thread. `None`: the kernel does not show them to us, or it has ended.
pub fn read(tid: i32) -> Option<Filters> {
    let stopped = Stopped::stop(tid)?;
    let (mut policies, mut counts) = (Vec::new(), Vec::new());
    let mut allowed: Option<BTreeSet<u32>> = None;
    for index in 0..MAX_FILTERS {
        let Ok(filter) = stopped.filter(index) else {
            break;
        };
        // What cannot be followed lets everything through, for all that is known.
        let calls = allowed_syscalls(&filter);
        counts.push(calls.as_ref().map_or(0, Vec::len));
        if let Ok(calls) = calls {
            let calls: BTreeSet<u32> = calls.into_iter().collect();
            allowed = Some(match allowed {
                Some(before) => before.intersection(&calls).copied().collect(),
                None => calls,
            });
        }
        policies.push(name_of(&filter));
    }
    drop(stopped);
    let syscalls = allowed?
        .into_iter()
        .map(|nr| syscall_name(nr).map_or_else(|| nr.to_string(), str::to_owned))
        .collect();
    Some(Filters {
        policies,
        counts,
        syscalls,
    })
}

/// The policy that a filter was compiled from. Only what becomes of a call that it does not
/// allow may differ: see `bulkhead_seccomp::notify`.
fn name_of(filter: &[sock_filter]) -> String {
    for policy in policy::all() {
        for (stage, suffix) in [(Stage::Steady, ""), (Stage::Setup, ":setup")] {
            let built = match stage {
                Stage::Steady => policy.steady,
                Stage::Setup => policy.setup,
            };
            if is_from(filter, built) {
                return format!("{}{suffix}", policy.name);
            }
        }
    }
    "?".to_owned()
}

fn is_from(filter: &[sock_filter], built: &[sock_filter]) -> bool {
    const RETURN: u16 = 0x06;
    let milder = [libc::SECCOMP_RET_USER_NOTIF, libc::SECCOMP_RET_TRACE];
    filter.len() == built.len()
        && filter.iter().zip(built).all(|(is, was)| {
            let denies = was.code == RETURN && was.k == libc::SECCOMP_RET_KILL_PROCESS;
            (is.code, is.jt, is.jf) == (was.code, was.jt, was.jf)
                && (is.k == was.k || denies && milder.contains(&is.k))
        })
}

/// KCMP_FILES and KCMP_FS of the kernel's <linux/kcmp.h>.
const TABLES: [libc::c_ulong; 2] = [2, 3];

/// Whether a thread has a table of descriptors, or of root and current directory, that is not its
/// process's (kcmp(2)). What may not be asked is not known to be.
pub fn apart(pid: i32, tid: i32) -> bool {
    let differs = |what: libc::c_ulong| {
        let none: libc::c_ulong = 0;
        let (pid, tid) = (libc::c_long::from(pid), libc::c_long::from(tid));
        // SAFETY: kcmp(2) compares what two processes have in the kernel; it takes five numbers and no
        // memory.
        let answer = unsafe { libc::syscall(libc::SYS_kcmp, pid, tid, what, none, none) };
        answer > 0
    };
    TABLES.into_iter().any(differs)
}

/// A thread that this process has stopped. It goes on with the value's end.
struct Stopped(i32);

impl Stopped {
    fn stop(tid: i32) -> Option<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, 0).ok()?;
        let thread = Self(tid);
        request(libc::PTRACE_INTERRUPT, tid, 0, 0).ok()?;
        let end = Instant::now().checked_add(PATIENCE)?;
        loop {
            let mut status = 0;
            // SAFETY: waitpid(2) writes one int, and `status` is one.
            let found =
                unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if found == tid {
                return libc::WIFSTOPPED(status).then_some(thread);
            }
            if found < 0 || Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Its filter of that index, from the oldest on.
    fn filter(&self, index: usize) -> Result<Vec<sock_filter>, Error> {
        // Without a place to put them, the kernel says how many instructions there are.
        let count = request(PTRACE_SECCOMP_GET_FILTER, self.0, index, 0)?;
        let count = usize::try_from(count)
            .ok()
            .filter(|count| (1..=MAX_INSTRUCTIONS).contains(count))
            .ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        let empty = sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        // A filter never changes, and this one belongs to a stopped thread.
        let mut filter = vec![empty; count];
        request(
            PTRACE_SECCOMP_GET_FILTER,
            self.0,
            index,
            filter.as_mut_ptr() as usize,
        )?;
        Ok(filter)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = request(libc::PTRACE_DETACH, self.0, 0, 0);
    }
}

fn request(request: libc::c_uint, tid: i32, addr: usize, data: usize) -> Result<i64, Error> {
    let data = if data == 0 {
        null_mut::<libc::c_void>()
    } else {
        data as *mut libc::c_void
    };
    // SAFETY: of the requests made here only PTRACE_SECCOMP_GET_FILTER writes to memory of ours:
    // as many instructions as it said there are, to a vector of that length.
    let answer = unsafe { libc::ptrace(request, tid, addr, data) };
    if answer < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_known_whatever_becomes_of_what_it_does_not_allow() {
        for policy in policy::all() {
            let name = name_of(policy.steady);
            // Policies that are alike are one to the kernel.
            let alike = policy::get(name.trim_end_matches(":setup")).unwrap();
            assert!(is_from(alike.steady, policy.steady), "{name}");
            let mut milder = policy.steady.to_vec();
            for i in &mut milder {
                if i.code == 6 && i.k == libc::SECCOMP_RET_KILL_PROCESS {
                    i.k = libc::SECCOMP_RET_USER_NOTIF;
                }
            }
            assert_eq!(name_of(&milder), name);
            let mut wider = policy.steady.to_vec();
            for i in &mut wider {
                if i.code == 6 {
                    i.k = libc::SECCOMP_RET_ALLOW;
                }
            }
            assert_eq!(name_of(&wider), "?");
        }
        assert_eq!(name_of(&[]), "?");
    }

    #[test]
    fn a_thread_that_is_not_there_has_no_filters() {
        assert_eq!(read(i32::MAX), None);
    }
}
