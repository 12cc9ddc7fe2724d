//! One client's connection: frames in, calls in flight, replies and events out. Owned and
//! driven by the `api` thread; nothing here blocks.
//!
//! Streams on the wire are as in ttrpc's PROTOCOL.md and its Go and Rust implementations:
//! a unary call is a request frame and a response frame; `Events` is a request frame, any
//! number of data frames, and either a data frame that only closes or a response frame
//! with the error. `AttachConsole` has data frames of the client's, too.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bulkhead_proto::frame::{self, Frame, FrameError, FrameReader, Header};
use bulkhead_proto::outbox::Outbox;
use bulkhead_proto::{Code, RpcStatus, VM_SERVICE, envelope, sys};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::MachineService;
use super::access::Role;
use super::console::{self, Attachment};
use super::events::EventLog;
use super::limits::Limits;
use super::refused_calls::RefusedCalls;
use super::reply::{ApiResponse, CallKey, Replies};
use super::request::{self, ApiRequest, Call, Services};
use super::vmservice;

/// How long a call takes that waits for the machine's end: ten years.
const ENDLESS: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// What a connection needs of its server.
pub(super) struct Context<'a> {
    pub(super) service: &'a dyn MachineService,
    pub(super) replies: &'a Arc<Replies>,
    pub(super) events: &'a EventLog,
    pub(super) limits: &'a Limits,
    pub(super) services: Services,
    pub(super) refused: &'a RefusedCalls,
    pub(super) now: Instant,
}

/// How often a connection is served in one turn of all.
const ROUNDS: usize = 32;

mod streams;

use streams::Subscription;

struct InFlight {
    call: u64,
    /// The method, of `vmservice.VM`.
    vm: Option<String>,
    deadline: Instant,
    abandoned: Arc<AtomicBool>,
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
    consoles: BTreeMap<u32, Attachment>,
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
            consoles: BTreeMap::new(),
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
            || !self.consoles.is_empty()
            || !self.outbox.is_empty()
            || !self.unread.is_empty();
        (!owes).then_some(self.last_active)
    }

    /// There is nothing left to do but to close it.
    pub(super) fn is_finished(&self) -> bool {
        // One that never said to which console it wants says nothing any more.
        let attached = self.consoles.values().any(|console| !console.is_opening());
        let quiet = self.outbox.is_empty() && self.subscriptions.is_empty() && !attached;
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
        let streams = streams.chain(self.consoles.values().filter_map(|c| c.deadline));
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

    /// An answer of the manager; `bell` wakes this thread.
    pub(super) fn on_completion(
        &mut self,
        key: CallKey,
        outcome: Result<ApiResponse, RpcStatus>,
        bell: &Arc<EventFd>,
        limits: &Limits,
        refused: &RefusedCalls,
    ) {
        let due = self.calls.get(&key.stream_id);
        if due.is_some_and(|call| call.call == key.call) {
            let vm = self.calls.remove(&key.stream_id).and_then(|call| call.vm);
            let outcome = match &vm {
                Some(method) => outcome
                    .map_err(vmservice::remedy::in_its_words)
                    .inspect_err(|status| refused.tell(method, status, Instant::now())),
                None => outcome,
            };
            if let Ok(ApiResponse::Console(client)) = outcome {
                if let Some(console) = self.consoles.get_mut(&key.stream_id) {
                    console.open(client, bell);
                    console::put_first(&mut self.outbox, key.stream_id);
                }
                return;
            }
            self.consoles.remove(&key.stream_id);
            let encoded = outcome.and_then(|response| match vm {
                Some(_) => response.encode_for_vm(),
                None => response.encode(),
            });
            self.reply(key.stream_id, encoded, limits);
        }
    }

    /// Does whatever can be done now: requests that were held back, events, deadlines,
    /// writing.
    pub(super) fn work(&mut self, context: &Context<'_>) {
        self.expire(context);
        for _ in 0..ROUNDS {
            if self.dead {
                return;
            }
            self.handle_unread(context);
            self.pump(context);
            self.pump_consoles(context);
            // What was typed may have been taken meanwhile.
            let more = !self.unread.is_empty() && self.accepts(context.limits);
            let done = self.outbox.is_empty() || self.flush(context.now).is_break();
            if done && !more {
                return;
            }
        }
        // A console prints as fast as this client reads: the others have their turns between.
        let _ = context.replies.bell().write(1);
    }

    /// The server ends: refuse what is unanswered, finish the event streams, and close
    /// when all is written.
    pub(super) fn end(&mut self, limits: &Limits) {
        self.ending = true;
        for (stream_id, call) in std::mem::take(&mut self.calls) {
            call.abandoned.store(true, Ordering::Release);
            self.consoles.remove(&stream_id);
            let status = RpcStatus::new(
                Code::Unavailable,
                format!(
                    "bulkhead is ending, and this request has no answer, what it was about ends with it{}",
                    super::reply::end_told()
                ),
            );
            self.reply(stream_id, Err(status), limits);
        }
    }

    fn accepts(&self, limits: &Limits) -> bool {
        !self.dead
            && !self.ending
            && self.outbox.len() < limits.backlog
            && self.calls.len() < limits.calls
            && !self.consoles.values().any(Attachment::holds_back)
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
            frame::TYPE_DATA if self.consoles.contains_key(&stream_id) => {
                let console = self.consoles.get_mut(&stream_id);
                let next = console.map(|console| console.on_frame(frame));
                self.go_on(stream_id, next, context);
            }
            // For a call of ours it is noise, else an error.
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
        let timeout = match u64::try_from(request.timeout_nano) {
            Ok(0) => None,
            Ok(nanos) => Some(Duration::from_nanos(nanos)),
            Err(_) => return Err(RpcStatus::invalid_argument("timeout_nano is negative")),
        };
        let begun = self.call(header, &request, timeout, context);
        if let Err(status) = &begun
            && context.services == Services::Vm
            && request.service == VM_SERVICE
        {
            context.refused.tell(request.method, status, context.now);
        }
        begun
    }

    fn call(
        &mut self,
        header: Header,
        request: &envelope::RequestView<'_>,
        timeout: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<(), RpcStatus> {
        self.role.allows(request.service, request.method)?;
        let services = context.services;
        let call = request::parse(services, request.service, request.method, request.payload)?;
        let open = header.has(frame::FLAG_REMOTE_OPEN);
        if open && !matches!(call, Call::Console(_)) {
            return Err(RpcStatus::invalid_argument(
                "no method but AttachConsole takes a stream of requests",
            ));
        }
        match call {
            Call::Unary(asked) => self.submit(header.stream_id, asked, None, timeout, context),
            Call::Vm(asked) => {
                self.stays = true;
                let method = Some(request.method.to_owned());
                self.submit(header.stream_id, asked, method, timeout, context)
            }
            Call::Events(wanted) => self.subscribe(header.stream_id, wanted, timeout, context),
            Call::Console(first) => self.attach(header.stream_id, first, open, timeout, context),
        }
    }

    fn submit(
        &mut self,
        stream_id: u32,
        request: ApiRequest,
        vm: Option<String>,
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

    fn expire(&mut self, context: &Context<'_>) {
        let now = context.now;
        let stall = self
            .stalled
            .and_then(|since| since.checked_add(context.limits.stall));
        if stall.is_some_and(|at| at <= now) {
            self.dead = true;
            return;
        }
        let mut late: BTreeSet<u32> = BTreeSet::new();
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
        let consoles = self.consoles.iter();
        let over = consoles.filter(|(_, c)| c.deadline.is_some_and(|at| at <= now));
        late.extend(over.map(|(id, _)| id));
        for stream_id in late {
            if let Some(call) = self.calls.remove(&stream_id) {
                call.abandoned.store(true, Ordering::Release);
            }
            self.subscriptions.remove(&stream_id);
            self.consoles.remove(&stream_id);
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
        self.calls.contains_key(&stream_id)
            || self.subscriptions.contains_key(&stream_id)
            || self.consoles.contains_key(&stream_id)
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
