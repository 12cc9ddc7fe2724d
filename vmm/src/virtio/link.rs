//! The function's tie to its back-end: whether there is one, what to watch and to hang up,
//! and the back-end's own channel.
//!
//! ```text
//!             lost, a successor is expected
//!   serving ───────────────────────────────▶ awaiting
//!      ▲ │                                    │  │
//!      │ └──────────── given up ────────┐     │  │ given up
//!      │                                ▼     │  ▼
//!      └────────── successor ◀──────── failed ◀──┘
//!                      ▲                      │
//!                      └──────────────────────┘
//! ```
//!
//! Any thread may call this: its locks are held for a few instructions, and what they say
//! is never waited for.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd as Watched, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};

use super::events::FailReason;
use crate::vhost_user::{BackendChannel, Drained, Frontend, VhostUserError};

const SERVING: u8 = 0;
const AWAITING: u8 = 1;
const FAILED: u8 = 2;

/// Whether there is a back-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It serves.
    Serving,
    /// It is gone for this reason, and a successor is expected.
    Awaiting(FailReason),
    /// It was given up for this reason.
    Failed(FailReason),
}

/// What a new back-end brings along.
pub struct Ends {
    socket: Arc<OwnedFd>,
    channel: Option<BackendChannel>,
    channel_socket: Option<Arc<OwnedFd>>,
}

impl Ends {
    /// Takes them from a connection.
    pub fn of(frontend: &mut Frontend) -> Result<Self, VhostUserError> {
        let socket = Arc::new(frontend.clone_socket()?.into());
        let channel = frontend.take_backend_channel();
        let channel_socket = match &channel {
            Some(channel) => Some(Arc::new(channel.clone_socket()?.into())),
            None => None,
        };
        Ok(Self {
            socket,
            channel,
            channel_socket,
        })
    }
}

struct State {
    presence: Presence,
    socket: Option<Arc<OwnedFd>>,
    channel_socket: Option<Arc<OwnedFd>>,
    /// The socket of a successor that is being brought in.
    candidate: Option<Arc<OwnedFd>>,
    /// How often the function was given up.
    failures: u64,
    /// The manager has not been told yet that the back-end is gone.
    untold: bool,
}

/// A successor is being brought in.
pub struct Ticket {
    failures: u64,
}

/// The tie.
pub struct Link {
    state: Mutex<State>,
    channel: Mutex<Option<BackendChannel>>,
    /// The presence without its reason.
    mirror: AtomicU8,
}

impl Link {
    /// To a back-end that serves, or to one that has not been there yet.
    pub fn new(ends: Option<Ends>) -> Self {
        let (presence, mirror) = match ends {
            Some(_) => (Presence::Serving, SERVING),
            None => (Presence::Awaiting(FailReason::Absent), AWAITING),
        };
        let link = Self {
            state: Mutex::new(State {
                presence,
                socket: None,
                channel_socket: None,
                candidate: None,
                failures: 0,
                untold: false,
            }),
            channel: Mutex::new(None),
            mirror: AtomicU8::new(mirror),
        };
        if let Some(ends) = ends {
            link.put(&mut link.lock(), ends);
        }
        link
    }

    /// There is a back-end.
    pub fn serving(&self) -> bool {
        self.mirror.load(Ordering::Acquire) == SERVING
    }

    /// The back-end was given up.
    pub fn failed(&self) -> bool {
        self.mirror.load(Ordering::Acquire) == FAILED
    }

    /// Whether there is a back-end, and why not.
    pub fn presence(&self) -> Presence {
        self.lock().presence.clone()
    }

    /// Why the back-end is gone, once for each that is.
    pub fn loss(&self) -> Option<FailReason> {
        let mut state = self.lock();
        let untold = std::mem::take(&mut state.untold);
        match &state.presence {
            Presence::Awaiting(reason) if untold => Some(reason.clone()),
            _ => None,
        }
    }

    /// What to watch: the socket and, where there is one, the back-end's own channel.
    pub fn sockets(&self) -> (Option<Arc<OwnedFd>>, Option<Arc<OwnedFd>>) {
        let state = self.lock();
        (state.socket.clone(), state.channel_socket.clone())
    }

    /// The back-end has hung up: an event of its predecessor's socket may be told late.
    pub fn hung_up(&self) -> bool {
        let Some(socket) = self.lock().socket.clone() else {
            return false;
        };
        let mut fds = [Watched::new(&*socket, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
            && fds.iter().any(|fd| fd.revents().intersects(ended))
    }

    /// The back-end is gone; a successor is expected. False when that changes nothing.
    pub fn suspend(&self, reason: FailReason) -> bool {
        let mut state = self.lock();
        if state.presence != Presence::Serving {
            return false;
        }
        hang_up(&state.socket);
        state.presence = Presence::Awaiting(reason);
        state.untold = true;
        self.mirror.store(AWAITING, Ordering::Release);
        true
    }

    /// The back-end is given up, and so is a successor on its way in. The first reason
    /// stays; false when it was before.
    pub fn fail(&self, reason: FailReason) -> bool {
        let mut state = self.lock();
        state.failures = state.failures.wrapping_add(1);
        hang_up(&state.socket);
        hang_up(&state.candidate);
        if matches!(state.presence, Presence::Failed(_)) {
            return false;
        }
        state.presence = Presence::Failed(reason);
        self.mirror.store(FAILED, Ordering::Release);
        true
    }

    /// The back-end was given up, and the driver begins anew: a successor may come. False when
    /// it was not given up.
    pub fn await_again(&self) -> bool {
        let mut state = self.lock();
        let Presence::Failed(reason) = &state.presence else {
            return false;
        };
        state.presence = Presence::Awaiting(reason.clone());
        state.untold = false;
        self.mirror.store(AWAITING, Ordering::Release);
        true
    }

    /// A successor is being brought in; `None` while another one is.
    pub fn begin(&self, ends: &Ends) -> Option<Ticket> {
        let mut state = self.lock();
        if state.candidate.is_some() {
            return None;
        }
        state.candidate = Some(Arc::clone(&ends.socket));
        Some(Ticket {
            failures: state.failures,
        })
    }

    /// The successor did not make it.
    pub fn abandon(&self) {
        self.lock().candidate = None;
    }

    /// The successor serves from now on; false when the function was given up meanwhile.
    pub fn finish(&self, ticket: &Ticket, ends: Ends) -> bool {
        let mut state = self.lock();
        if state.failures != ticket.failures {
            return false;
        }
        hang_up(&state.socket);
        self.put(&mut state, ends);
        true
    }

    fn put(&self, state: &mut State, ends: Ends) {
        state.candidate = None;
        state.socket = Some(ends.socket);
        state.channel_socket = ends.channel_socket;
        state.presence = Presence::Serving;
        *self.lock_channel() = ends.channel;
        self.mirror.store(SERVING, Ordering::Release);
    }

    /// Handles what the back-end asks on its own channel. An error ends the channel.
    pub fn drain_channel(&self) -> Result<Drained, VhostUserError> {
        let mut channel = self.lock_channel();
        let Some(open) = channel.as_mut() else {
            return Ok(Drained::default());
        };
        let drained = open.on_readable();
        if drained.is_err() {
            *channel = None;
        }
        drained
    }

    #[cfg(test)]
    pub fn set_channel(&self, channel: BackendChannel) {
        *self.lock_channel() = Some(channel);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_channel(&self) -> MutexGuard<'_, Option<BackendChannel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes whoever waits for an answer on a socket.
fn hang_up(socket: &Option<Arc<OwnedFd>>) {
    if let Some(socket) = socket {
        // Fails only when the other end is gone already.
        let _ = shutdown(&**socket, Shutdown::Both);
    }
}
