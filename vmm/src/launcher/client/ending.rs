//! The launcher's end, as the VMM sees it: told by the end of what the VMM says, waited for within
//! bounds. What it says meanwhile of the processes that it ends is kept as events.

use std::io;
use std::os::fd::AsFd;
use std::sync::TryLockError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::exchange::take;
use super::{Launcher, PacketSocket};
use crate::launcher::sys;

/// How long the launcher has to end itself once the VMM says no more.
const END_DEADLINE: Duration = Duration::from_secs(3);

/// The launcher has not ended, and so perhaps not every process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the launcher (pid {pid}) has not ended within {} s: it is stopped, or waits for the host's storage: kill -KILL {pid} ends it with every process of its own, and `bulkhead reap` then removes sockets and cgroups that stay",
    END_DEADLINE.as_secs()
)]
pub struct Outlives {
    /// Its pid.
    pub pid: i32,
}

impl Launcher {
    /// Ends it, and with it every process and socket that is its own; waits for that, within
    /// bounds. Whoever still asks for something is told that it is gone. The ends of its processes
    /// are events that [`poll_events`](Self::poll_events) has.
    ///
    /// # Errors
    /// It has not ended in time. Its pidfd says when it has.
    pub fn end(&self) -> Result<(), Outlives> {
        let socket = {
            let mut inner = self.lock();
            inner.inbox.beside.lose();
            inner.socket.take()
        };
        self.see_out(socket)
    }

    /// The same for a thread that must not wait for another's call: while there is one, the
    /// launcher ends once this process has.
    pub fn end_unless_busy(&self) {
        let socket = match self.inner.try_lock() {
            Ok(mut inner) => inner.socket.take(),
            Err(TryLockError::Poisoned(inner)) => inner.into_inner().socket.take(),
            Err(TryLockError::WouldBlock) => return,
        };
        if let Err(why) = self.see_out(socket) {
            log::warn!("{why}");
        }
    }

    /// The end of what the VMM says tells the launcher to end everything. A confined VMM may
    /// neither signal nor reap it; it watches the VMM's pidfd besides, and this process is about to
    /// end.
    fn see_out(&self, mut socket: Option<PacketSocket>) -> Result<(), Outlives> {
        if let Some(socket) = &socket {
            // One that is there no more need not be told.
            let _ = socket.say_no_more();
        }
        let outlives = Err(Outlives { pid: self.pid });
        let again = self.seen_out.swap(true, Ordering::Relaxed);
        let deadline = match again {
            // It was waited for before.
            true => Instant::now(),
            false => Instant::now() + END_DEADLINE,
        };
        let ended = loop {
            let mut wanted = vec![(self.pidfd.as_fd(), libc::POLLIN)];
            wanted.extend(socket.as_ref().map(|socket| (socket.as_fd(), libc::POLLIN)));
            let ready = sys::poll(&wanted, Some(deadline)).unwrap_or_default();
            let is_ready = |at| ready.get(at).is_some_and(|events| *events != 0);
            let late = Instant::now() >= deadline;
            // First what it said, up to the end of that.
            let said = is_ready(1) && !late;
            if said && socket.as_ref().is_some_and(|socket| !self.hear(socket)) {
                socket = None;
            }
            if !said && (late || is_ready(0)) {
                break is_ready(0);
            }
        };
        if ended { Ok(()) } else { outlives }
    }

    /// Keeps the next event. False: there is none.
    fn hear(&self, socket: &PacketSocket) -> bool {
        match socket.receive() {
            Ok(Some(packet)) => {
                let heard = take(packet, &mut self.lock().inbox, 0).is_ok();
                let _ = self.pending.write(1);
                heard
            }
            Err(error) => error.kind() == io::ErrorKind::Interrupted,
            Ok(None) => false,
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let told = self.seen_out.load(Ordering::Relaxed);
        if let (Err(why), false) = (self.end(), told) {
            log::warn!("{why}");
        }
    }
}
