//! Requests whose device is busy: they wait for their turn, each with a number and an event of its
//! own, and no longer than their client was promised an answer.

use std::time::{Duration, Instant};

use bulkhead_proto::machine::AddDeviceRequest;
use bulkhead_proto::{Code, RpcStatus};

use crate::api::ReplyHandle;
use crate::machine::host::Host;

/// Requests that wait.
const MAX_WAITING: usize = 32;
/// So much before a client stops waiting it is told why.
const NOTICE: Duration = Duration::from_millis(500);

/// The place of a request that has waited.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The operation that it has been so far.
    pub(super) operation: u64,
    /// When its turn must have come.
    pub(super) until: Instant,
}

/// What is to be done.
pub(super) enum Request {
    Add {
        id: String,
        request: Box<AddDeviceRequest>,
    },
    Remove {
        id: String,
        force: bool,
        timeout: Duration,
    },
}

impl Request {
    fn id(&self) -> &str {
        match self {
            Self::Add { id, .. } | Self::Remove { id, .. } => id,
        }
    }

    fn verb(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Remove { force: true, .. } => "remove by force",
            Self::Remove { .. } => "remove",
        }
    }
}

/// A request that waits.
pub(super) struct Waiting {
    pub(super) place: Place,
    request: Request,
    reply: ReplyHandle,
}

impl Host {
    /// A request cannot be carried out: the operation of one that waited ends.
    pub(super) fn refuse(
        &mut self,
        place: Option<Place>,
        id: &str,
        status: RpcStatus,
        reply: ReplyHandle,
    ) {
        if let Some(place) = place {
            self.ended(place.operation, id, Err(&status.message));
        }
        reply.complete(Err(status));
    }

    /// Has a request wait until its device is free; again, if it has a place.
    pub(super) fn wait_for_turn(
        &mut self,
        place: Option<Place>,
        request: Request,
        reply: ReplyHandle,
    ) {
        if place.is_none() && self.hotplug.waiting.len() >= MAX_WAITING {
            return reply.complete(Err(RpcStatus::new(
                Code::ResourceExhausted,
                format!(
                    "{MAX_WAITING} requests wait for devices that come or go: retry when one has ended"
                ),
            )));
        }
        let place = place.unwrap_or_else(|| {
            let operation = self.hotplug.next_operation();
            let what = format!("{}, when its turn comes", request.verb());
            self.began(operation, request.id(), &what);
            let now = Instant::now();
            let deadline = reply.deadline();
            let deadline = deadline.checked_sub(NOTICE).unwrap_or(deadline);
            let until = match request {
                Request::Remove { timeout, .. } => now.checked_add(timeout).unwrap_or(now),
                Request::Add { .. } => deadline,
            };
            let until = until.min(deadline);
            Place { operation, until }
        });
        self.hotplug.waiting.push_back(Waiting {
            place,
            request,
            reply,
        });
    }

    /// The number of an operation that begins now: that which it had while it waited, or a new one.
    pub(super) fn begin_operation(
        &mut self,
        place: Option<Place>,
        subject: &str,
        what: &str,
    ) -> u64 {
        if let Some(place) = place {
            return place.operation;
        }
        let operation = self.hotplug.next_operation();
        self.began(operation, subject, what);
        operation
    }

    /// Begins what waited for its turn.
    pub(super) fn next_in_turn(&mut self) {
        for _ in 0..self.hotplug.waiting.len() {
            let Some(waiting) = self.hotplug.waiting.pop_front() else {
                return;
            };
            let (place, reply) = (Some(waiting.place), waiting.reply);
            // Whether or not its client still waits: it was told nothing else.
            match waiting.request {
                Request::Add { request, .. } => self.add_in_turn(place, *request, reply),
                Request::Remove { id, force, timeout } => {
                    self.remove_in_turn(place, id, force, timeout, reply);
                }
            }
        }
    }

    /// Ends what has waited too long.
    pub(super) fn end_late_turns(&mut self, now: Instant) {
        while let Some(at) = self
            .hotplug
            .waiting
            .iter()
            .position(|w| w.place.until <= now)
        {
            let Some(late) = self.hotplug.waiting.remove(at) else {
                return;
            };
            let id = late.request.id();
            let why = format!(
                "device {id}: what is under way has not ended in time (another operation on it, memory that comes or goes, many devices at once): see Events, then retry"
            );
            self.ended(late.place.operation, id, Err(&why));
            let status = RpcStatus::new(Code::DeadlineExceeded, why);
            late.reply.complete(Err(status));
        }
    }
}
