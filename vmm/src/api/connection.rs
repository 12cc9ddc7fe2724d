//! One client's connection: frames in, calls in flight, replies and events out. Owned and
//! driven by the `api` thread; nothing here blocks.
//!
//! Streams on the wire are as in ttrpc's PROTOCOL.md and its Go and Rust implementations:
//! a unary call is a request frame and a response frame; `Events` is a request frame, any
//! number of data frames, and either a data frame that only closes or a response frame
//! with the error.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bulkhead_proto::frame::{self, Frame, FrameError, FrameReader};
use bulkhead_proto::outbox::Outbox;
use bulkhead_proto::{Code, RpcStatus, envelope, sys};
use vmm_sys_util::epoll::EventSet;

use super::MachineService;
use super::access::Role;
use super::events::{EventLog, Lookup};
use super::reply::{ApiResponse, CallKey, Replies};
use super::request::{self, ApiRequest, Call, EventsFrom, Services};

/// How long a call takes that waits for the machine's end: ten years.
const ENDLESS: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// What one client, and all of them together, may make the server hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Connections at once.
    pub(super) connections: usize,
    /// Bytes of one request's frame.
    pub(super) request: u32,
    /// A request longer than `request` but not than this is read and thrown away, so that
    /// its client gets round to reading the refusal: no ttrpc client sends more.
    pub(super) skipped_request: u32,
    /// Bytes of one reply's frame.
    pub(super) reply: usize,
    /// Calls of one connection that are in flight; more are not read.
    pub(super) calls: usize,
    /// Calls of all clients, past and present, that the manager has not answered.
    pub(super) outstanding: usize,
    /// Event streams of one connection.
    pub(super) subscriptions: usize,
    /// Bytes waiting for a client to read them, from where on it is not listened to.
    pub(super) backlog: usize,
    /// From where on it is cut off: what calls in flight may still add.
    pub(super) backlog_max: usize,
    /// How long a client may read nothing while bytes wait for it.
    pub(super) stall: Duration,
    /// How long a call may take, whatever the client says.
    pub(super) call_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            request: 256 * 1024,
            skipped_request: 4 * 1024 * 1024,
            reply: 512 * 1024,
            calls: 32,
            outstanding: 256,
            subscriptions: 4,
            backlog: 64 * 1024,
            backlog_max: 1024 * 1024,
            stall: Duration::from_secs(30),
            call_time: request::WAIT_MAX.saturating_add(Duration::from_secs(60)),
        }
    }
}

/// What a connection needs of its server.
pub(super) struct Context<'a> {
    pub(super) service: &'a dyn MachineService,
    pub(super) replies: &'a Arc<Replies>,
    pub(super) events: &'a EventLog,
    pub(super) limits: &'a Limits,
    pub(super) services: Services,
    pub(super) now: Instant,
}

struct InFlight {
    call: u64,
    /// Of `vmservice.VM`.
    vm: bool,
    deadline: Instant,
    abandoned: Arc<AtomicBool>,
}

struct Subscription {
    next: u64,
    backlog_only: bool,
    gaps: bool,
    deadline: Option<Instant>,
}

/// A client's connection.
pub(super) struct Connection {
    socket: UnixStream,
    token: u64,
    /// Of the socket it came in by.
    role: Role,
    reader: FrameReader,
    /// Read, but not handled while the client is over a limit. At most one read's worth.
    unread: Vec<u8>,
    outbox: Outbox,
    calls: BTreeMap<u32, InFlight>,
    subscriptions: BTreeMap<u32, Subscription>,
    next_call: u64,
    /// It has called `vmservice.VM`: its client has this one connection for the machine's
    /// life, and is not asked to make another one.
    stays: bool,
    /// Since when the client has read nothing although bytes wait for it.
    stalled: Option<Instant>,
    last_active: Instant,
    /// The client has no more requests; it may still read.
    read_closed: bool,
    /// The client broke the protocol, or the server ends: write what waits, then close.
    ending: bool,
    /// Close at once.
    dead: bool,
    /// What epoll has been told.
    pub(super) interest: EventSet,
}

impl Connection {
    pub(super) fn new(
        socket: UnixStream,
        (token, role): (u64, Role),
        limits: &Limits,
        now: Instant,
    ) -> Self {
        Self {
            socket,
            token,
            role,
            reader: FrameReader::new(limits.request).skipping(limits.skipped_request),
            unread: Vec::new(),
            outbox: Outbox::default(),
            calls: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            next_call: 0,
            stays: false,
            stalled: None,
            last_active: now,
            read_closed: false,
            ending: false,
            dead: false,
            interest: EventSet::IN,
        }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// Nothing is asked for or owed; the server may close it to make room.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let owes = self.stays
            || !self.calls.is_empty()
            || !self.subscriptions.is_empty()
            || !self.outbox.is_empty()
            || !self.unread.is_empty();
        (!owes).then_some(self.last_active)
    }

    /// There is nothing left to do but to close it.
    pub(super) fn is_finished(&self) -> bool {
        let quiet = self.outbox.is_empty() && self.subscriptions.is_empty();
        let no_more_requests = self.read_closed && self.unread.is_empty() && self.calls.is_empty();
        self.dead || (quiet && (self.ending || no_more_requests))
    }

    /// What to wait for.
    pub(super) fn wanted(&self, limits: &Limits) -> EventSet {
        let mut wanted = EventSet::empty();
        if self.accepts(limits) && !self.read_closed {
            wanted |= EventSet::IN;
        }
        if !self.outbox.is_empty() {
            wanted |= EventSet::OUT;
        }
        wanted
    }

    /// When to look again although nothing has happened.
    pub(super) fn next_deadline(&self, limits: &Limits) -> Option<Instant> {
        let calls = self.calls.values().map(|call| call.deadline);
        let streams = self
            .subscriptions
            .values()
            .filter_map(|stream| stream.deadline);
        let stall = self
            .stalled
            .and_then(|since| since.checked_add(limits.stall));
        calls.chain(streams).chain(stall).min()
    }

    /// epoll says that something is ready.
    pub(super) fn on_ready(&mut self, events: EventSet, chunk: &mut [u8], now: Instant) {
        if events.contains(EventSet::IN) && !self.read_closed {
            self.last_active = now;
            match sys::recv(self.socket.as_fd(), chunk) {
                Ok(None) => {}
                Ok(Some(0)) => self.read_closed = true,
                Ok(Some(count)) => {
                    self.unread
                        .extend_from_slice(chunk.get(..count).unwrap_or_default());
                }
                Err(_) => self.dead = true,
            }
        }
        // Hung up for good, not merely shut down for writing: nobody can read an answer.
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            self.dead = true;
        }
    }

    /// An answer of the manager.
    pub(super) fn on_completion(
        &mut self,
        key: CallKey,
        outcome: Result<ApiResponse, RpcStatus>,
        limits: &Limits,
    ) {
        let due = self.calls.get(&key.stream_id);
        if let Some(vm) = due.filter(|call| call.call == key.call).map(|call| call.vm) {
            self.calls.remove(&key.stream_id);
            let encoded = outcome.and_then(|response| match vm {
                true => response.encode_for_vm(),
                false => response.encode(),
            });
            self.reply(key.stream_id, encoded, limits);
        }
    }

    /// Does whatever can be done now: requests that were held back, events, deadlines,
    /// writing.
    pub(super) fn work(&mut self, context: &Context<'_>) {
        self.expire(context);
        while !self.dead {
            self.handle_unread(context);
            self.pump(context);
            if self.outbox.is_empty() || self.flush(context.now).is_break() {
                break;
            }
        }
    }

    /// The server ends: refuse what is unanswered, finish the event streams, and close
    /// when all is written.
    pub(super) fn end(&mut self, limits: &Limits) {
        self.ending = true;
        for (stream_id, call) in std::mem::take(&mut self.calls) {
            call.abandoned.store(true, Ordering::Release);
            let status = RpcStatus::new(
                Code::Unavailable,
                "bulkhead is ending, and this request has no answer: what it was about ends with it",
            );
            self.reply(stream_id, Err(status), limits);
        }
    }

    fn accepts(&self, limits: &Limits) -> bool {
        !self.dead
            && !self.ending
            && self.outbox.len() < limits.backlog
            && self.calls.len() < limits.calls
    }

    fn handle_unread(&mut self, context: &Context<'_>) {
        if self.unread.is_empty() {
            return;
        }
        let unread = std::mem::take(&mut self.unread);
        let mut rest = unread.as_slice();
        while !rest.is_empty() && self.accepts(context.limits) {
            match self.reader.feed(&mut rest) {
                Ok(Some(frame)) => self.handle(&frame, context),
                Ok(None) => {}
                Err(FrameError::Oversize {
                    header,
                    max,
                    skipping,
                }) => {
                    let status = RpcStatus::new(
                        Code::ResourceExhausted,
                        format!(
                            "a request of {} bytes, where {max} are allowed",
                            header.length
                        ),
                    );
                    self.refuse(header.stream_id, status, context.limits);
                    self.ending |= !skipping;
                }
            }
        }
        // What follows a broken frame is noise.
        if !self.ending {
            self.unread = rest.to_vec();
        }
    }

    fn handle(&mut self, frame: &Frame, context: &Context<'_>) {
        let stream_id = frame.header.stream_id;
        match frame.header.kind {
            frame::TYPE_REQUEST => {
                if let Err(status) = self.begin(frame, context) {
                    self.refuse(stream_id, status, context.limits);
                }
            }
            // No method takes a stream. For a call of ours it is noise, else an error.
            frame::TYPE_DATA if !self.in_use(stream_id) => {
                let status = RpcStatus::invalid_argument("the stream is not active");
                self.reply(stream_id, Err(status), context.limits);
            }
            // Unknown types are ignored, as by the reference implementations.
            _ => {}
        }
    }

    fn begin(&mut self, frame: &Frame, context: &Context<'_>) -> Result<(), RpcStatus> {
        let header = frame.header;
        if header.stream_id.is_multiple_of(2) {
            return Err(RpcStatus::invalid_argument("stream id must be odd"));
        }
        if self.in_use(header.stream_id) {
            return Err(RpcStatus::invalid_argument("stream id is in use"));
        }
        let request = envelope::parse_request(&frame.body)
            .map_err(|error| RpcStatus::invalid_argument(error.to_string()))?;
        if header.has(frame::FLAG_REMOTE_OPEN) {
            return Err(RpcStatus::invalid_argument(
                "no method takes a stream of requests",
            ));
        }
        let timeout = match u64::try_from(request.timeout_nano) {
            Ok(0) => None,
            Ok(nanos) => Some(Duration::from_nanos(nanos)),
            Err(_) => return Err(RpcStatus::invalid_argument("timeout_nano is negative")),
        };
        self.role.allows(request.service, request.method)?;
        let services = context.services;
        match request::parse(services, request.service, request.method, request.payload)? {
            Call::Unary(request) => self.submit(header.stream_id, request, false, timeout, context),
            Call::Vm(request) => {
                self.stays = true;
                self.submit(header.stream_id, request, true, timeout, context)
            }
            Call::Events(wanted) => self.subscribe(header.stream_id, wanted, timeout, context),
        }
    }

    fn submit(
        &mut self,
        stream_id: u32,
        request: ApiRequest,
        vm: bool,
        timeout: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<(), RpcStatus> {
        let limit = match request.is_endless() {
            true => ENDLESS,
            false => context.limits.call_time,
        };
        let span = timeout.map_or(limit, |timeout| timeout.min(limit));
        let deadline = context.now.checked_add(span).unwrap_or(context.now);
        let call = self.next_call;
        let key = CallKey {
            connection: self.token,
            stream_id,
            call,
        };
        let abandoned = Arc::new(AtomicBool::new(false));
        // Readers leave half to operators.
        let most = match self.role {
            Role::Operator => context.limits.outstanding,
            Role::Reader => context.limits.outstanding / 2,
        };
        let asks = self.role == Role::Reader && matches!(request, ApiRequest::DeviceStats { .. });
        let handle = context
            .replies
            .handle(key, deadline, Arc::clone(&abandoned), most, asks)
            .ok_or_else(|| {
                RpcStatus::new(
                    Code::ResourceExhausted,
                    "too many requests are unanswered: try again later",
                )
            })?;
        self.next_call = call.wrapping_add(1);
        // Before submit: the answer may be there when it returns.
        self.calls.insert(
            stream_id,
            InFlight {
                call,
                vm,
                deadline,
                abandoned,
            },
        );
        context.service.submit(request, handle);
        Ok(())
    }

    fn subscribe(
        &mut self,
        stream_id: u32,
        wanted: EventsFrom,
        timeout: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<(), RpcStatus> {
        if self.subscriptions.len() >= context.limits.subscriptions {
            return Err(RpcStatus::new(
                Code::ResourceExhausted,
                format!(
                    "{} event streams on one connection are enough",
                    self.subscriptions.len()
                ),
            ));
        }
        let next = match wanted.from {
            0 => context.events.oldest(),
            from => from,
        };
        let deadline = timeout.and_then(|timeout| context.now.checked_add(timeout));
        let subscription = Subscription {
            next,
            backlog_only: wanted.backlog_only,
            gaps: wanted.gaps,
            deadline,
        };
        self.subscriptions.insert(stream_id, subscription);
        Ok(())
    }

    /// Copies events to the outbox, as far as the client keeps up.
    fn pump(&mut self, context: &Context<'_>) {
        let mut ended = Vec::new();
        for (&stream_id, stream) in &mut self.subscriptions {
            while self.outbox.len() < context.limits.backlog {
                match context.events.get(stream.next) {
                    Lookup::Event(bytes) => {
                        let out = self.outbox.buffer();
                        // An event is far shorter than a frame may be.
                        let _ = frame::encode(out, frame::TYPE_DATA, stream_id, 0, &bytes);
                        stream.next = stream.next.saturating_add(1);
                    }
                    Lookup::NotYet => {
                        if stream.backlog_only || self.ending {
                            ended.push((stream_id, None));
                        }
                        break;
                    }
                    Lookup::Gone(oldest) if stream.gaps => {
                        let gap = super::events::gap(stream.next, oldest);
                        let out = self.outbox.buffer();
                        // As above.
                        let _ = frame::encode(out, frame::TYPE_DATA, stream_id, 0, &gap);
                        stream.next = oldest;
                    }
                    Lookup::Gone(oldest) => {
                        let status = RpcStatus::new(
                            Code::OutOfRange,
                            format!(
                                "event {} is no longer kept: the oldest is {oldest}",
                                stream.next
                            ),
                        );
                        ended.push((stream_id, Some(status)));
                        break;
                    }
                }
            }
        }
        for (stream_id, error) in ended {
            self.subscriptions.remove(&stream_id);
            match error {
                None => frame::encode_end_of_stream(self.outbox.buffer(), stream_id),
                Some(status) => self.reply(stream_id, Err(status), context.limits),
            }
        }
    }

    fn expire(&mut self, context: &Context<'_>) {
        let now = context.now;
        let stall = self
            .stalled
            .and_then(|since| since.checked_add(context.limits.stall));
        if stall.is_some_and(|at| at <= now) {
            self.dead = true;
            return;
        }
        let mut late: Vec<u32> = Vec::new();
        late.extend(
            self.calls
                .iter()
                .filter(|(_, c)| c.deadline <= now)
                .map(|(id, _)| id),
        );
        late.extend(
            self.subscriptions
                .iter()
                .filter(|(_, s)| s.deadline.is_some_and(|at| at <= now))
                .map(|(id, _)| id),
        );
        for stream_id in late {
            if let Some(call) = self.calls.remove(&stream_id) {
                call.abandoned.store(true, Ordering::Release);
            }
            self.subscriptions.remove(&stream_id);
            let status = RpcStatus::new(Code::DeadlineExceeded, "the deadline has passed");
            self.reply(stream_id, Err(status), context.limits);
        }
    }

    /// Writes; breaks when the client must read first or is gone.
    fn flush(&mut self, now: Instant) -> ControlFlow<()> {
        match self.outbox.flush(self.socket.as_fd()) {
            Err(_) => {
                self.dead = true;
                ControlFlow::Break(())
            }
            Ok(_) if self.outbox.is_empty() => {
                self.stalled = None;
                self.last_active = now;
                ControlFlow::Continue(())
            }
            Ok(progress) => {
                if progress || self.stalled.is_none() {
                    self.stalled = Some(now);
                }
                ControlFlow::Break(())
            }
        }
    }

    fn in_use(&self, stream_id: u32) -> bool {
        self.calls.contains_key(&stream_id) || self.subscriptions.contains_key(&stream_id)
    }

    /// Refuses a request. On a stream that is in use the refusal would be taken for its
    /// answer, and the client is confused beyond help: end the connection.
    fn refuse(&mut self, stream_id: u32, status: RpcStatus, limits: &Limits) {
        if self.in_use(stream_id) {
            self.dead = true;
        } else {
            self.reply(stream_id, Err(status), limits);
        }
    }

    fn reply(&mut self, stream_id: u32, outcome: Result<Vec<u8>, RpcStatus>, limits: &Limits) {
        let mut body = Vec::new();
        envelope::encode_response(&mut body, outcome.as_deref());
        if body.len() > limits.reply {
            let status = RpcStatus::new(
                Code::ResourceExhausted,
                format!(
                    "the reply has {} bytes, where {} are allowed",
                    body.len(),
                    limits.reply
                ),
            );
            body.clear();
            envelope::encode_response(&mut body, Err(&status));
        }
        let out = self.outbox.buffer();
        let encoded = frame::encode(out, frame::TYPE_RESPONSE, stream_id, 0, &body);
        self.dead |= encoded.is_err() || self.outbox.len() > limits.backlog_max;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for call in self.calls.values() {
            call.abandoned.store(true, Ordering::Release);
        }
    }
}
