//! The streams of a connection: events to its client, and consoles.

use std::time::{Duration, Instant};

use bulkhead_proto::frame;
use bulkhead_proto::machine::ConsoleInput;
use bulkhead_proto::{Code, RpcStatus};

use super::{Connection, Context};
use crate::api::console::{Attachment, Next};
use crate::api::events::{self, Lookup};
use crate::api::limits::Limits;
use crate::api::request::EventsFrom;

/// A client that follows events.
pub(super) struct Subscription {
    next: u64,
    backlog_only: bool,
    gaps: bool,
    pub(super) deadline: Option<Instant>,
}

impl Connection {
    pub(super) fn subscribe(
        &mut self,
        stream_id: u32,
        wanted: EventsFrom,
        timeout: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<(), RpcStatus> {
        self.check_streams(context.limits)?;
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
    pub(super) fn pump(&mut self, context: &Context<'_>) {
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
                        let gap = events::gap(stream.next, oldest);
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

    /// Begins a stream to a console; `open`: the client has more to say than `first`.
    pub(super) fn attach(
        &mut self,
        stream_id: u32,
        first: Option<ConsoleInput>,
        open: bool,
        timeout: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<(), RpcStatus> {
        self.check_streams(context.limits)?;
        let deadline = timeout.and_then(|timeout| context.now.checked_add(timeout));
        let mut console = Attachment::new(deadline);
        let next = match (first, open) {
            (None, true) => Ok(Next::More),
            (Some(first), true) => console.on_message(first),
            (first, false) => console.on_only_message(first.unwrap_or_default()),
        };
        self.consoles.insert(stream_id, console);
        self.go_on(stream_id, Some(next), context);
        Ok(())
    }

    /// What a message of a console's client leads to; an error ends its stream.
    pub(super) fn go_on(
        &mut self,
        stream_id: u32,
        next: Option<Result<Next, RpcStatus>>,
        context: &Context<'_>,
    ) {
        let done = match next {
            Some(Ok(Next::Ask(request))) => self.submit(stream_id, request, None, None, context),
            Some(Err(status)) => Err(status),
            Some(Ok(Next::More)) | None => Ok(()),
        };
        if let Err(status) = done {
            self.consoles.remove(&stream_id);
            self.reply(stream_id, Err(status), context.limits);
        }
    }

    /// Moves bytes between the client and its consoles.
    pub(super) fn pump_consoles(&mut self, context: &Context<'_>) {
        let mut ended = Vec::new();
        for (&stream_id, console) in &mut self.consoles {
            let over = console.pump(stream_id, &mut self.outbox, context.limits.backlog);
            let rest = self.outbox.len() >= context.limits.backlog && console.is_open();
            if over || self.ending && !rest {
                ended.push(stream_id);
            }
        }
        for stream_id in ended {
            self.consoles.remove(&stream_id);
            frame::encode_end_of_stream(self.outbox.buffer(), stream_id);
        }
    }

    fn check_streams(&self, limits: &Limits) -> Result<(), RpcStatus> {
        let streams = self.subscriptions.len().saturating_add(self.consoles.len());
        if streams < limits.subscriptions {
            return Ok(());
        }
        Err(RpcStatus::new(
            Code::ResourceExhausted,
            format!("{streams} streams on one connection are enough: use another connection"),
        ))
    }
}
