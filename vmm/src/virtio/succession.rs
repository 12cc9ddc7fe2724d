//! A new back-end takes the place of one that has died, was restarted, or serves still
//! (vhost-user protocol, "Inflight I/O tracking").
//!
//! The successor is told all that its predecessor knew: features, what the driver wrote to
//! the configuration space, memory, each ring with the eventfds it had, where to go on, and
//! the log of requests in flight. Where the predecessor was cut off does not matter: the
//! register file says what the driver wants, and that is what the successor is given,
//! under the same lock that activations and resets hold.
//!
//! [`VirtioPciFunction::reconnect`] waits for the successor's answers, at most for the
//! operation's deadline: it is for a thread that may wait. The manager thread calls
//! [`VirtioPciFunction::adopt`], which leaves the work to the function's own thread.

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::VirtioError;
use super::backend::StartError;
use super::events::FailReason;
use super::function::{Device, VirtioPciFunction};
use super::link::{Ends, Ticket};
use super::registers::status;
use crate::vhost_user::{Deadline, Frontend, VhostUserError};

/// What a successor found to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reconnected {
    /// Queues that it serves; 0 while no driver is up.
    pub queues: u16,
    /// It has the log of what its predecessor had in flight.
    pub logged: bool,
    /// Requests that the log had in flight, which it makes again.
    pub resubmitted: u64,
    /// Its configuration space is different, and the driver was told so.
    pub config_changed: bool,
    /// The driver must reset the device before it is served: a ring is malformed, or
    /// requests were in flight and nobody logged which.
    pub needs_reset: bool,
    /// How long it took.
    pub took: Duration,
}

/// Why a successor did not take over.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// Another one is on its way in.
    #[error("device {0}: another back-end is just taking over")]
    Busy(String),
    /// The function was given up meanwhile.
    #[error("device {0}: it was given up while a new back-end took over")]
    GivenUp(String),
    /// It does not offer what the driver uses.
    #[error(
        "device {id}: its new back-end lacks features that the driver uses ({missing:#x}): \
         start one that has them"
    )]
    Features {
        /// The device.
        id: String,
        /// What is missing.
        missing: u64,
    },
    /// It cannot serve this function at all.
    #[error(transparent)]
    Unfit(#[from] VirtioError),
    /// Talking to it failed.
    #[error("device {0}: taking over: {1}")]
    Backend(String, #[source] VhostUserError),
}

impl ReconnectError {
    /// No back-end like this one can ever serve this driver.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Features { .. } | Self::Unfit(_))
    }
}

impl VirtioPciFunction {
    /// Brings in the back-end at the other end of `socket` on the function's own thread.
    /// Its end is told by [`EventSource::Successor`](super::EventSource::Successor) of
    /// [`on_event`](Self::on_event). Never blocks. For functions whose options say that
    /// there are successors.
    ///
    /// # Errors
    /// When another one is just being brought in.
    pub fn adopt(&self, socket: UnixStream) -> Result<(), ReconnectError> {
        if self.has_successors() && self.service.submit(socket) {
            Ok(())
        } else {
            Err(ReconnectError::Busy(self.options.id.clone()))
        }
    }

    /// Puts the back-end behind `frontend` in the place of the one before, whatever stage
    /// the driver and that one were at. A function that was given up comes back by it.
    ///
    /// May take as long as `operation_timeout`: not for the manager thread.
    ///
    /// # Errors
    /// The new connection is closed and the function is as it was before: a back-end that
    /// serves still goes on. If a process of ours is of the wrong kind ([permanent
    /// errors](ReconnectError::is_permanent)), the function has failed; for somebody else's
    /// another one is waited for.
    pub fn reconnect(&self, mut frontend: Frontend) -> Result<Reconnected, ReconnectError> {
        let begun = Instant::now();
        let id = || self.options.id.clone();
        let backend = |error| ReconnectError::Backend(id(), error);
        let ends = Ends::of(&mut frontend).map_err(backend)?;
        let ticket = self
            .link
            .begin(&ends)
            .ok_or_else(|| ReconnectError::Busy(id()))?;
        let result = self.take_over(frontend, ends, &ticket, begun);
        match &result {
            Ok(done) => log::info!(
                "device {}: another back-end serves {} queues after {:?}",
                id(),
                done.queues,
                done.took
            ),
            Err(error) => {
                self.link.abandon();
                let ours = !self.options.external;
                if ours && error.is_permanent() && !self.link.serving() {
                    self.fail(FailReason::Channel(error.to_string()));
                }
            }
        }
        result
    }

    fn take_over(
        &self,
        frontend: Frontend,
        ends: Ends,
        ticket: &Ticket,
        begun: Instant,
    ) -> Result<Reconnected, ReconnectError> {
        let mut guard = self.lock_device();
        let device = &mut *guard;
        device.stand_in = None;
        let deadline = self.deadline();
        let negotiated = device.common.status() & status::FEATURES_OK != 0;
        self.options.check_backend(&frontend)?;
        let offered = self.options.offer(frontend.features());
        let missing = device.common.accepted() & !offered;
        if negotiated && missing != 0 {
            let id = self.options.id.clone();
            return Err(ReconnectError::Features { id, missing });
        }
        let failed = |error| ReconnectError::Backend(self.options.id.clone(), error);

        // One that serves still says itself how far it has come.
        let mut serving = self.link.serving();
        let mut stopped = Vec::new();
        if serving {
            match device.backend.stop(deadline) {
                Ok(bases) => stopped = bases,
                // Just then it died.
                Err(VhostUserError::Closed) => serving = false,
                Err(error) => {
                    self.lose(FailReason::from(&error));
                    return Err(failed(error));
                }
            }
        }
        let slots = frontend.memory_slots();
        let predecessor = device.backend.replace(Some(frontend));
        let result = self.bring_up(device, negotiated, &stopped, deadline);
        let (config, started) = match result {
            Ok(done) if self.link.finish(ticket, ends) => done,
            other => {
                let successor = device.backend.replace(predecessor);
                drop(successor);
                if serving {
                    self.resume_predecessor(device, &stopped);
                }
                return Err(match other {
                    Ok(_) => ReconnectError::GivenUp(self.options.id.clone()),
                    Err(error) => failed(error),
                });
            }
        };
        // Whoever brings a successor in has seen to the end of what was before it.
        self.quiesced();
        device.common.set_offered(offered);
        self.signals.slots.store(slots, Ordering::Release);
        self.signals.stale.store(false, Ordering::Release);
        let config_changed = config.is_some_and(|bytes| self.lock_space().replace(bytes));
        if let Err(error) = started {
            self.on_started(Err(error));
        }
        self.publish(device);
        device.backend.greet(&device.common);
        let done = Reconnected {
            queues: u16::try_from(device.backend.started().len()).unwrap_or(u16::MAX),
            logged: device.backend.logged(),
            resubmitted: device.backend.resubmitted(),
            config_changed,
            needs_reset: self.needs_reset(),
            took: begun.elapsed(),
        };
        drop(guard);
        self.follow_link();
        if config_changed {
            self.config_changed();
        }
        Ok(done)
    }

    /// Tells the successor what its predecessor knew. Gives its configuration space, and
    /// whether its rings run: a driver whose rings cannot be handed on is no fault of the
    /// successor's.
    #[expect(clippy::type_complexity, reason = "used once")]
    fn bring_up(
        &self,
        device: &mut Device,
        negotiated: bool,
        stopped: &[(u16, u16)],
        deadline: Deadline,
    ) -> Result<(Option<Vec<u8>>, Result<(), StartError>), VhostUserError> {
        let (size, writes) = {
            let space = self.lock_space();
            (space.served_size(), space.writes())
        };
        let frontend = device.backend.frontend()?;
        if negotiated && !writes.is_empty() {
            // What the driver may write depends on them.
            frontend.set_features(device.common.accepted(), deadline)?;
        }
        for (at, bytes) in &writes {
            match frontend.set_config(*at, bytes, deadline) {
                // As the driver's own write would have been.
                Ok(()) | Err(VhostUserError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let config = match size {
            0 => None,
            size => Some(frontend.get_config(size, deadline)?),
        };
        let shape = device.shape();
        if !device.common.driver_ok() {
            return Ok((config, Ok(())));
        }
        match device
            .backend
            .start(&device.common, shape, stopped, deadline)
        {
            Err(StartError::Backend(error)) => Err(error),
            started => Ok((config, started)),
        }
    }

    /// The successor did not make it: the one that was stopped for it goes on.
    fn resume_predecessor(&self, device: &mut Device, stopped: &[(u16, u16)]) {
        if !device.common.driver_ok() || stopped.is_empty() {
            return;
        }
        let (shape, deadline) = (device.shape(), self.deadline());
        let started = device
            .backend
            .start(&device.common, shape, stopped, deadline);
        if started.is_ok() {
            device.backend.greet(&device.common);
        }
        self.on_started(started);
    }
}
