//! The manager's end of a device's control channel (service `bulkhead.device.v1.Device`):
//! what clients ask of the device, one request after the other, and a look at its health
//! once a second. Driven by the manager thread's epoll loop; nothing here blocks.
//!
//! ```text
//!  requests ─▶ waiting ─▶ current ──▶ grow (launcher) ──▶ call ──▶ answer
//!                                            call ◀── pause ◀─┘   (Drain, until drained)
//! ```
//!
//! Everything that comes from the process is hostile: see [`AsyncClient`] for the bytes;
//! what the messages say is bounded here. After an [`Err`] the process must be given up, and
//! [`ControlChannel::give_up`] answers whoever waits.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use bulkhead_proto::device::{
    DrainRequest, FinishRequestRequest, HealthRequest, ResumeRequest, StatsRequest,
    TakeRequestRequest, UpdateRequest, finish_request_request::Outcome,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{
    AsyncClient, AsyncLimits, BlockingClient, ClientError, Code, DEVICE_SERVICE, RpcStatus,
};

pub use types::{Breach, Grower, Notice, Task, Turn};

use super::device_stats::About;
use crate::api::{ApiResponse, ReplyHandle};

/// How long a device may take to answer: its main thread does nothing else.
pub const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long an update may take: a qcow2 file that grows writes to the disk.
const UPDATE_LIMIT: Duration = Duration::from_secs(30);
/// How long the launcher may take to grow a file.
const GROW_LIMIT: Duration = Duration::from_secs(30);
/// Requests that may wait for a device.
const MAX_WAITING: usize = 16;
/// Pauses between two looks at a device that drains.
const DRAIN_PAUSE_FIRST: Duration = Duration::from_millis(2);
const DRAIN_PAUSE_MAX: Duration = Duration::from_millis(100);
/// The same when another process waits to take over.
const REPLACE_PAUSE_FIRST: Duration = Duration::from_millis(1);
const REPLACE_PAUSE_MAX: Duration = Duration::from_millis(20);
/// The tokens of the calls that no request of a client waits for; those of requests are
/// greater: for its health, for what it wants, and for what came of that.
const HEALTH: u64 = 0;
const TAKE: u64 = 1;
const FINISH: u64 = 2;

#[derive(Debug)]
enum Phase {
    /// The launcher grows the file.
    Growing { ticket: u64, deadline: Instant },
    /// The device has been called.
    Called { token: u64 },
    /// Look again then.
    Pausing { until: Instant },
    /// The manager brings a successor in.
    Replacing,
}

#[derive(Debug)]
struct Current {
    task: Task,
    reply: ReplyHandle,
    phase: Phase,
    /// A drain: when it must be over, and the pause that comes next.
    drain: Option<(Instant, Duration)>,
    /// A drain that is taken back, and what its client is told.
    undoing: Option<RpcStatus>,
}

/// A device's control channel, its requests, and what is known of its health.
pub struct ControlChannel {
    client: AsyncClient,
    about: About,
    waiting: VecDeque<(Task, ReplyHandle)>,
    current: Option<Current>,
    last_token: u64,
    /// Failed requests of each ring when last looked at.
    host_errors: Vec<u64>,
    /// What it serves the guest from is gone, as it says.
    host_gone: bool,
    /// It was asked what it wants; and is to be asked again.
    taking: (bool, bool),
    /// Its health was to be asked for while it was busy.
    health_due: bool,
    /// Why it is given up.
    ended: Option<String>,
}

impl ControlChannel {
    /// Takes over the channel once Hello has been answered.
    ///
    /// # Errors
    /// When the process has said more than it was asked.
    pub fn new(client: BlockingClient, about: About) -> Result<Self, ClientError> {
        let client = client.into_async(AsyncLimits::default())?;
        Ok(Self::resume(client, about))
    }

    /// The same, on a channel that never waited.
    fn resume(client: AsyncClient, about: About) -> Self {
        Self {
            client,
            host_errors: vec![0; about.queues],
            host_gone: false,
            about,
            waiting: VecDeque::new(),
            current: None,
            last_token: FINISH,
            taking: (false, false),
            health_due: false,
            ended: None,
        }
    }

    /// The channel of another process of the device: what is gone on the host stays so.
    #[must_use]
    pub fn successor(&self, client: AsyncClient) -> Self {
        let mut next = Self::resume(client, self.about.clone());
        next.host_gone = self.host_gone;
        next
    }

    /// The successor is ready: has the device finish what is in flight. [`Notice::Quiet`] or
    /// [`Notice::NotQuiet`] follows.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn make_quiet(&mut self, now: Instant) -> Result<(), Breach> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let Task::Replace { limit, .. } = &current.task else {
            return Ok(());
        };
        current.drain = Some((now.checked_add(*limit).unwrap_or(now), REPLACE_PAUSE_FIRST));
        self.call_current()
    }

    /// There is no successor after all, and this is what its client is told. With `resume` the
    /// device takes requests again first.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn end_replacement(
        &mut self,
        status: RpcStatus,
        resume: bool,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        if !matches!(current.task, Task::Replace { .. }) || current.undoing.is_some() {
            return Ok(());
        }
        if resume {
            current.undoing = Some(status);
            return self.call_current();
        }
        self.finish(Err(status));
        self.advance(turn)
    }

    /// The successor serves, and this is its channel from now on; requests that have waited
    /// wait for [`go_on`](Self::go_on). Gives who is to be told that it serves.
    pub fn succeed(&mut self, client: AsyncClient) -> Option<ReplyHandle> {
        let mut next = self.successor(client);
        next.waiting = std::mem::take(&mut self.waiting);
        let before = std::mem::replace(self, next);
        before.current.map(|current| current.reply)
    }

    /// Begins what waits.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn go_on(&mut self, turn: &mut Turn<'_>) -> Result<(), Breach> {
        self.advance(turn)
    }

    /// What is known of the device without asking it.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Takes a request; whoever asked is answered in any case.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn submit(
        &mut self,
        task: Task,
        reply: ReplyHandle,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        if let Some(why) = &self.ended {
            reply.complete(Err(self.unavailable(why)));
            return Ok(());
        }
        if self.waiting.len() >= MAX_WAITING {
            let why = format!(
                "device {}: {MAX_WAITING} requests are waiting for it: retry later",
                self.about.id
            );
            reply.complete(Err(RpcStatus::new(Code::ResourceExhausted, why)));
            return Ok(());
        }
        self.waiting.push_back((task, reply));
        self.advance(turn)
    }

    /// Asks for the device's health, where it is busy with something once it is not: that has a
    /// deadline too.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn ask_health(&mut self) -> Result<(), Breach> {
        if self.ended.is_some() {
            return Ok(());
        }
        self.health_due = self.current.is_some();
        if self.client.outstanding() > 0 {
            return Ok(());
        }
        self.call("Health", &HealthRequest::new(), CALL_LIMIT, HEALTH)
    }

    /// Asks what the device wants of the VMM; [`Notice::Wants`] follows if it wants something.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn take_request(&mut self) -> Result<(), Breach> {
        if self.ended.is_some() || std::mem::replace(&mut self.taking, (true, true)).0 {
            return Ok(());
        }
        self.taking = (true, false);
        self.call("TakeRequest", &TakeRequestRequest::new(), CALL_LIMIT, TAKE)
    }

    /// Tells the device what came of what it wanted.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn finish_request(&mut self, id: u64, outcome: Outcome) -> Result<(), Breach> {
        if self.ended.is_some() {
            return Ok(());
        }
        let mut request = FinishRequestRequest::new();
        (request.id, request.outcome) = (id, outcome.into());
        self.call("FinishRequest", &request, CALL_LIMIT, FINISH)
    }

    /// The channel is readable or its peer hung up. True: it was nothing but an answer to
    /// [`ask_health`](Self::ask_health).
    ///
    /// # Errors
    /// [`Breach`].
    pub fn on_readable(&mut self, turn: &mut Turn<'_>) -> Result<bool, Breach> {
        if self.ended.is_some() {
            return Ok(false);
        }
        let mut answers = Vec::new();
        let result = self.client.on_readable(turn.now, &mut answers);
        let heartbeat = answers.iter().all(|(token, _)| *token == HEALTH);
        // What it said before it broke the channel counts.
        self.take(answers, turn)?;
        result.map_err(breach)?;
        Ok(heartbeat)
    }

    /// The channel has room.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn on_writable(&mut self, now: Instant) -> Result<(), Breach> {
        if self.ended.is_some() {
            return Ok(());
        }
        self.client.on_writable(now).map_err(breach)
    }

    /// Looks at deadlines and pauses; to be called when [`next_timer`](Self::next_timer) has
    /// come, or at any other time.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn on_timer(&mut self, turn: &mut Turn<'_>) -> Result<(), Breach> {
        if self.ended.is_some() {
            return Ok(());
        }
        let mut answers = Vec::new();
        let result = self.client.check(turn.now, &mut answers);
        self.take(answers, turn)?;
        result.map_err(breach)?;
        match self.current.as_ref().map(|current| &current.phase) {
            Some(Phase::Pausing { until }) if *until <= turn.now => self.call_current()?,
            Some(Phase::Growing { deadline, .. }) if *deadline <= turn.now => {
                let why = "the launcher did not grow its file in time; is the file system stuck?";
                let status = RpcStatus::new(Code::DeadlineExceeded, self.line(why));
                self.finish(Err(status));
                self.advance(turn)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The launcher's answer to a growth.
    ///
    /// # Errors
    /// [`Breach`].
    pub fn on_grown(
        &mut self,
        ticket: u64,
        result: Result<u64, String>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Breach> {
        let wanted = match &self.current {
            Some(Current {
                phase: Phase::Growing { ticket: due, .. },
                task: Task::UpdateDisk { grow_to, .. },
                ..
            }) if *due == ticket => grow_to.unwrap_or_default(),
            _ => return Ok(()),
        };
        let why = match result {
            Ok(size) if size >= wanted => return self.call_current(),
            Ok(size) => self.line(&format!(
                "its block device has {size} bytes and {wanted} are wanted: grow that first"
            )),
            Err(why) => why,
        };
        self.finish(Err(RpcStatus::failed_precondition(why)));
        self.advance(turn)
    }

    /// When [`on_timer`](Self::on_timer) is due.
    pub fn next_timer(&self) -> Option<Instant> {
        if self.ended.is_some() {
            return None;
        }
        let current = self.current.as_ref().and_then(|c| match c.phase {
            Phase::Growing { deadline, .. } => Some(deadline),
            Phase::Pausing { until } => Some(until),
            Phase::Called { .. } | Phase::Replacing => None,
        });
        self.client.next_deadline().into_iter().chain(current).min()
    }

    /// Nothing is under way but, at most, a look at its health.
    pub fn only_heartbeat(&self) -> bool {
        self.current.is_none()
    }

    /// Wait for room in the channel, too.
    pub fn wants_write(&self) -> bool {
        self.ended.is_none() && self.client.wants_write()
    }

    /// What it serves the guest from is gone, as it says.
    pub fn host_gone(&self) -> bool {
        self.host_gone
    }

    /// The process was given up.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Gives calls in flight more time, because the manager itself was held up.
    pub fn extend_deadlines(&mut self, span: Duration) {
        self.client.extend_deadlines(span);
    }

    /// The process is given up: everyone who waits is told why, and whoever comes later.
    pub fn give_up(&mut self, why: &str) {
        self.ended = Some(why.to_owned());
        let _ = self.client.give_up();
        let status = self.unavailable(why);
        if let Some(current) = self.current.take() {
            current.reply.complete(Err(status.clone()));
        }
        for (_, reply) in self.waiting.drain(..) {
            reply.complete(Err(status.clone()));
        }
    }

    fn unavailable(&self, why: &str) -> RpcStatus {
        RpcStatus::new(Code::Unavailable, self.line(why))
    }

    fn line(&self, what: &str) -> String {
        format!("device {}: {what}", self.about.id)
    }

    fn call<Req: Message>(
        &mut self,
        method: &str,
        request: &Req,
        limit: Duration,
        token: u64,
    ) -> Result<(), Breach> {
        self.client
            .call(DEVICE_SERVICE, method, request, limit, token)
            .map_err(breach)
    }

    /// Begins what waits, if nothing is under way.
    fn advance(&mut self, turn: &mut Turn<'_>) -> Result<(), Breach> {
        let now = turn.now;
        // Before the next request: one after another may come for ever.
        if self.health_due && self.current.is_none() && self.client.outstanding() == 0 {
            self.ask_health()?;
        }
        while self.current.is_none() {
            let Some((task, reply)) = self.waiting.pop_front() else {
                break;
            };
            // A request that nobody waits for any more need not be begun.
            if reply.is_abandoned() {
                continue;
            }
            let drain = match &task {
                Task::Drain { limit } => {
                    Some((now.checked_add(*limit).unwrap_or(now), DRAIN_PAUSE_FIRST))
                }
                _ => None,
            };
            let grow_to = match &task {
                Task::UpdateDisk { grow_to, .. } => *grow_to,
                _ => None,
            };
            let replace = match &task {
                Task::Replace { binary, .. } => Some(Notice::Replace {
                    binary: binary.clone(),
                }),
                _ => None,
            };
            let phase = match grow_to.map(|size| turn.grower.begin_grow(&self.about.id, 0, size)) {
                Some(Err(why)) => {
                    reply.complete(Err(RpcStatus::new(Code::Unavailable, why)));
                    continue;
                }
                Some(Ok(ticket)) => Phase::Growing {
                    ticket,
                    deadline: now.checked_add(GROW_LIMIT).unwrap_or(now),
                },
                None if replace.is_some() => Phase::Replacing,
                None => Phase::Pausing { until: now },
            };
            turn.notices.extend(replace);
            let call = matches!(phase, Phase::Pausing { .. });
            self.current = Some(Current {
                task,
                reply,
                phase,
                drain,
                undoing: None,
            });
            if call {
                self.call_current()?;
            }
        }
        Ok(())
    }

    /// Calls the device for what is under way.
    fn call_current(&mut self) -> Result<(), Breach> {
        self.last_token = self.last_token.wrapping_add(1).max(FINISH + 1);
        let token = self.last_token;
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        current.phase = Phase::Called { token };
        let mut update = UpdateRequest::new();
        match &current.task {
            _ if current.undoing.is_some() => {
                self.call("Resume", &ResumeRequest::new(), CALL_LIMIT, token)
            }
            Task::Stats => self.call("Stats", &StatsRequest::new(), CALL_LIMIT, token),
            Task::UpdateDisk { update: blk, .. } => {
                update.set_blk(blk.clone());
                self.call("Update", &update, UPDATE_LIMIT, token)
            }
            Task::UpdateNet(net) => {
                update.set_net(net.clone());
                self.call("Update", &update, UPDATE_LIMIT, token)
            }
            Task::UpdateConsole(console) => {
                update.set_console(console.clone());
                self.call("Update", &update, CALL_LIMIT, token)
            }
            Task::UpdateMemory(mem) => {
                update.set_mem(mem.clone());
                self.call("Update", &update, CALL_LIMIT, token)
            }
            Task::Drain { .. } | Task::Replace { .. } => {
                self.call("Drain", &DrainRequest::new(), CALL_LIMIT, token)
            }
            Task::Resume => self.call("Resume", &ResumeRequest::new(), CALL_LIMIT, token),
        }
    }

    fn finish(&mut self, outcome: Result<ApiResponse, RpcStatus>) {
        if let Some(current) = self.current.take() {
            current.reply.complete(outcome);
        }
    }
}

impl AsFd for ControlChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

fn parse<M: Message>(payload: &[u8]) -> Result<M, Breach> {
    M::parse_from_bytes(payload)
        .map_err(|error| Breach::Protocol(format!("sent a malformed {}: {error}", M::NAME)))
}

fn breach(error: ClientError) -> Breach {
    match error {
        ClientError::Closed => Breach::HungUp,
        ClientError::Timeout(span) => {
            Breach::Deadline(format!("gave no answer within {} s", span.as_secs()))
        }
        ClientError::Malformed(what) => Breach::Protocol(format!("broke the protocol: {what}")),
        other => Breach::Protocol(format!("failed on its control channel: {other}")),
    }
}

mod answers;
mod types;

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
