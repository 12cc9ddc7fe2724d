//! The launcher's watch over one device process: it judges the system calls that the process's
//! seccomp filter reports (`bulkhead_seccomp::notify`).
//!
//! Until the process has installed its own filter, what the outer policy allows is let through,
//! one exec included. After that there is nothing left to allow: a report is a violation, and the
//! process, which hangs at the call, is to be killed.
//!
//! Runs on the launcher's only thread; nothing here blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_seccomp::notify::{self, Judgement, Violation};
use bulkhead_seccomp::policy;

/// Calls that a start may take, from exec to its own filter; an honest one takes some hundred.
const MAX_SETUP_CALLS: u32 = 20_000;

/// A device process's listener and what came of it.
#[derive(Debug)]
pub struct Watch {
    listener: Option<OwnedFd>,
    executed: bool,
    sealed: bool,
    calls: u32,
    violation: Option<Violation>,
}

impl Watch {
    /// Over the listener of a child that has not executed anything yet.
    pub fn new(listener: OwnedFd) -> Self {
        Self {
            listener: Some(listener),
            executed: false,
            sealed: false,
            calls: 0,
            violation: None,
        }
    }

    /// Over nothing.
    pub fn none() -> Self {
        Self {
            listener: None,
            executed: false,
            sealed: false,
            calls: 0,
            violation: None,
        }
    }

    /// What to poll for input.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// The first system call outside its policy, if it made one.
    pub fn violation(&self) -> Option<Violation> {
        self.violation
    }

    /// The listener is readable. True if the process must be killed: it hangs at a call that it
    /// may not make.
    pub fn on_readable(&mut self) -> bool {
        let Some(listener) = &self.listener else {
            return false;
        };
        let report = match notify::receive(listener.as_fd()) {
            Ok(report) => report,
            // Its caller is gone already.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return false,
            // No process is left that has the filter.
            Err(_) => {
                self.listener = None;
                return false;
            }
        };
        self.calls = self.calls.saturating_add(1);
        let exec = i64::from(report.data.nr) == libc::SYS_execveat;
        let judgement = if self.sealed || self.calls > MAX_SETUP_CALLS || (exec && self.executed) {
            Judgement::Forbidden
        } else {
            notify::judge(&policy::DEVICE_OUTER, &report.data)
        };
        let errno = match judgement {
            Judgement::Proceed => None,
            Judgement::Fail(errno) => Some(errno),
            Judgement::Forbidden => {
                self.violation.get_or_insert(report.violation());
                return true;
            }
        };
        self.executed |= exec;
        self.sealed |= report.seals();
        // A caller that is gone needs no answer.
        let _ = notify::answer(listener.as_fd(), &report, errno);
        false
    }
}
