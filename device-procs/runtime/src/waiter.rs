//! How the main thread waits under a policy that has io_uring and does without ppoll: a ring
//! that can poll and do nothing else.
//!
//! [`install`]ed by the main thread before confinement; [`poll`] then stands in for ppoll on
//! that thread ([`crate::sys::poll`] asks it first). Each call arms one-shot polls, waits, and
//! takes back those that did not fire, so that nothing is left over from one to the next.

#![allow(unsafe_code)] // entries without pointers

use std::cell::RefCell;
use std::io;

use bulkhead_seccomp::uring::{self, UringError};
use io_uring::{IoUring, opcode, squeue, types};

use crate::sys::PollFd;

/// Descriptors waited for at once, at most.
const ENTRIES: u32 = 16;
/// user_data of what takes polls back; those of polls are their place and turn.
const REMOVAL: u64 = u64::MAX;

struct Waiter {
    ring: IoUring,
    turn: u32,
}

thread_local! {
    static WAITER: RefCell<Option<Waiter>> = const { RefCell::new(None) };
}

/// Makes this thread wait by a ring from now on.
pub(crate) fn install() -> Result<(), UringError> {
    let ring = uring::polling(ENTRIES)?;
    WAITER.with_borrow_mut(|waiter| *waiter = Some(Waiter { ring, turn: 0 }));
    Ok(())
}

/// As [`crate::sys::poll`], if this thread waits by a ring.
pub(crate) fn poll(fds: &mut [PollFd], timeout_ms: i32) -> Option<io::Result<usize>> {
    WAITER.with_borrow_mut(|waiter| Some(waiter.as_mut()?.poll(fds, timeout_ms)))
}

impl Waiter {
    fn poll(&mut self, fds: &mut [PollFd], timeout_ms: i32) -> io::Result<usize> {
        self.turn = self.turn.wrapping_add(1);
        let turn = u64::from(self.turn) << 32;
        let mut armed = 0usize;
        for (place, fd) in (0u64..).zip(fds.iter_mut()) {
            fd.happened(0);
            if let Some((number, events)) = fd.wanted() {
                let events = u32::from(events.unsigned_abs());
                let poll = opcode::PollAdd::new(types::Fd(number), events).build();
                self.push(&poll.user_data(turn | place))?;
                armed += 1;
            }
        }
        self.enter(usize::from(timeout_ms != 0), timeout_ms)?;
        let fired = self.collect(fds, turn);
        let mut left = armed.saturating_sub(fired);
        if left > 0 {
            for (place, fd) in (0u64..).zip(fds.iter()) {
                if fd.wanted().is_some() && fd.revents() == 0 {
                    let removal = opcode::PollRemove::new(turn | place).build();
                    self.push(&removal.user_data(REMOVAL))?;
                }
            }
        }
        while left > 0 {
            self.enter(1, -1)?;
            left = left.saturating_sub(self.collect(fds, turn));
        }
        Ok(fds.iter().filter(|fd| fd.revents() != 0).count())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: polls and their removal hold numbers only, no pointers.
        unsafe { self.ring.submission().push(entry) }
            .map_err(|_| io::Error::other("more descriptors to wait for than the ring has room"))
    }

    fn enter(&mut self, want: usize, timeout_ms: i32) -> io::Result<()> {
        let done = match u32::try_from(timeout_ms) {
            Ok(ms) if want > 0 => {
                let time = types::Timespec::new()
                    .sec(u64::from(ms / 1000))
                    .nsec(ms % 1000 * 1_000_000);
                let args = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => {
                const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS
                let submit = {
                    let mut queue = self.ring.submission();
                    queue.sync();
                    u32::try_from(queue.len()).unwrap_or(u32::MAX)
                };
                let want = u32::try_from(want).unwrap_or(u32::MAX);
                // SAFETY: no argument structure is passed; the entries are sound (push).
                unsafe {
                    self.ring
                        .submitter()
                        .enter::<libc::sigset_t>(submit, want, GETEVENTS, None)
                }
            }
        };
        match done {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// Takes completions; how many polls of this turn have ended.
    fn collect(&mut self, fds: &mut [PollFd], turn: u64) -> usize {
        let mut ended = 0;
        for completion in self.ring.completion() {
            let data = completion.user_data();
            if data == REMOVAL || data & !0xffff_ffff != turn {
                continue;
            }
            ended += 1;
            let place = usize::try_from(data & 0xffff_ffff).unwrap_or(usize::MAX);
            let result = completion.result();
            let Some(fd) = fds.get_mut(place) else {
                continue;
            };
            match i16::try_from(result) {
                Ok(events) if events >= 0 => fd.happened(events),
                _ if result == -libc::ECANCELED => {}
                // No descriptor of that number, or none that can be waited for.
                _ => fd.happened(libc::POLLNVAL),
            }
        }
        ended
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys;

    #[test]
    fn a_ring_waits_as_ppoll_does() {
        let work = || {
            install().unwrap();
            let event = sys::eventfd().unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let fds = || {
                [
                    PollFd::new(event.as_fd(), libc::POLLIN),
                    PollFd::none(),
                    PollFd::new(ours.as_fd(), libc::POLLIN | libc::POLLOUT),
                ]
            };
            let mut set = fds();
            for _ in 0..3 {
                assert_eq!(sys::poll(&mut set, -1).unwrap(), 1);
                let events = set.map(|fd| fd.revents());
                assert_eq!(events, [0, 0, libc::POLLOUT]);
            }
            sys::signal(&event);
            assert_eq!(sys::poll(&mut set, 0).unwrap(), 2);
            sys::drain(&event);
            drop(theirs);
            assert_eq!(sys::poll(&mut set, 1000).unwrap(), 1);
            let [_, _, hung_up] = set.map(|fd| fd.revents());
            assert_ne!(hung_up & libc::POLLHUP, 0);
            // Nothing of an earlier call answers a later one.
            let mut one = [PollFd::new(event.as_fd(), libc::POLLIN)];
            let start = Instant::now();
            assert_eq!(sys::poll(&mut one, 30).unwrap(), 0);
            assert!(start.elapsed() >= Duration::from_millis(25));
            let other = event.try_clone().unwrap();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                sys::signal(&other);
            });
            assert_eq!(sys::poll(&mut one, -1).unwrap(), 1);
            thread.join().unwrap();
        };
        std::thread::spawn(work).join().unwrap();
    }
}
