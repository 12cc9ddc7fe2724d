//! A ttrpc client for an event loop: it never waits, and trusts its peer with nothing.
//!
//! The VMM's manager has one for every device process, over the control channel that a
//! [`crate::BlockingClient`] opened, and drives it from its epoll loop: `on_readable` and
//! `on_writable` when the socket is, `check` when `next_deadline` has come. Answers carry the
//! token that the caller gave with the call.
//!
//! What a hostile peer can do is bounded in every direction: a frame's size is checked on
//! its header; an answer belongs to a call that waits for one, so that there are no more
//! frames than calls, and a byte that nobody asked for is a breach; a deadline holds for the
//! whole answer, however its bytes trickle in; and a peer that wakes the loop more often than
//! any honest one has broken the protocol too. After any error of `on_readable`,
//! `on_writable` or `check` the channel is at its end and whoever is behind it must be given
//! up. Makes no system calls but recvmsg and sendmsg.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use protobuf::Message;

use crate::client::{ClientError, OutgoingCall, closed_or, response, stream_after};
use crate::envelope::ResponseView;
use crate::frame::{self, Frame, FrameReader};
use crate::outbox::Outbox;
use crate::server::CONTROL_MAX_FRAME;
use crate::status::RpcStatus;
use crate::sys;

/// Read at once.
const CHUNK: usize = 8192;
/// Reads in one go before the caller's loop has its turn again.
const READS_PER_TURN: usize = 16;
/// Wake-ups that a call of ours is the cause of, and no fault of the peer's.
const WAKEUPS_PER_CALL: u32 = 4;
/// Over how long the peer's wake-ups are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// What a peer may make the client hold and do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncLimits {
    /// Bytes of a frame's body, either way.
    pub max_frame: u32,
    /// Calls that wait for their answers.
    pub max_outstanding: usize,
    /// Times per second that the socket may become readable or writable.
    pub wakeups_per_second: u32,
}

impl Default for AsyncLimits {
    /// For the control channel of a device process.
    fn default() -> Self {
        Self {
            max_frame: CONTROL_MAX_FRAME,
            max_outstanding: 8,
            wakeups_per_second: 1000,
        }
    }
}

/// An answer: the caller's token, and the method's response message or why it failed.
pub type Completion = (u64, Result<Vec<u8>, RpcStatus>);

#[derive(Debug)]
struct Waiting {
    token: u64,
    deadline: Option<Instant>,
    span: Duration,
}

/// A bounded, non-blocking ttrpc client over one connected stream socket.
#[derive(Debug)]
pub struct AsyncClient {
    socket: OwnedFd,
    limits: AsyncLimits,
    reader: FrameReader,
    chunk: Box<[u8; CHUNK]>,
    unread: Range<usize>,
    outbox: Outbox,
    waiting: BTreeMap<u32, Waiting>,
    next_stream: u32,
    window: (Option<Instant>, u32),
    broken: bool,
}

impl AsyncClient {
    /// A client on a connected stream socket. Makes no system call; the socket need not be
    /// non-blocking.
    pub fn new(socket: impl Into<OwnedFd>, limits: AsyncLimits) -> Self {
        Self {
            socket: socket.into(),
            limits,
            reader: FrameReader::new(limits.max_frame),
            chunk: Box::new([0; CHUNK]),
            unread: 0..0,
            outbox: Outbox::default(),
            waiting: BTreeMap::new(),
            next_stream: 1,
            window: (None, 0),
            broken: false,
        }
    }

    /// Goes on with the stream ids of an earlier client of the same channel.
    pub(crate) fn resume_at(mut self, stream_id: u32) -> Self {
        self.next_stream = stream_id;
        self
    }

    /// Sends a call, or as much of it as the socket takes now; its answer comes out of
    /// [`on_readable`](Self::on_readable) with `token`. If the whole answer is not there
    /// within `timeout`, [`check`](Self::check) says so.
    ///
    /// # Errors
    ///
    /// [`ClientError::Request`] and [`ClientError::Busy`] leave the channel as it was; after
    /// any other it is at its end.
    pub fn call<Req: Message>(
        &mut self,
        service: &str,
        method: &str,
        request: &Req,
        timeout: Duration,
        token: u64,
    ) -> Result<(), ClientError> {
        if self.broken {
            return Err(ClientError::Closed);
        }
        if self.waiting.len() >= self.limits.max_outstanding {
            return Err(ClientError::Busy(self.waiting.len()));
        }
        if self.outbox.len() > usize::try_from(self.limits.max_frame).unwrap_or(usize::MAX) {
            // An honest peer has read a call before it answers it.
            return self.guarded(|_| Err(malformed("it does not read what it is sent")));
        }
        let stream_id = self.next_stream;
        let call = OutgoingCall {
            service,
            method,
            timeout: Some(timeout),
            stream_id,
            flags: 0,
        };
        call.encode(self.outbox.buffer(), request, self.limits.max_frame)?;
        self.next_stream = stream_after(stream_id);
        let waiting = Waiting {
            token,
            // A span beyond what the clock can hold is as good as none.
            deadline: Instant::now().checked_add(timeout),
            span: timeout,
        };
        self.waiting.insert(stream_id, waiting);
        self.window.1 = self.window.1.saturating_sub(WAKEUPS_PER_CALL);
        self.guarded(|this| this.flush())
    }

    /// The socket is readable, or its peer hung up: reads a bounded amount and adds the
    /// answers that are whole to `answers`, those before an error included.
    ///
    /// # Errors
    ///
    /// What the peer did; the channel is at its end.
    pub fn on_readable(
        &mut self,
        now: Instant,
        answers: &mut Vec<Completion>,
    ) -> Result<(), ClientError> {
        self.guarded(|this| {
            this.count_wakeup(now)?;
            this.receive(answers)
        })
    }

    /// The socket has room: sends what waits.
    ///
    /// # Errors
    ///
    /// As for [`on_readable`](Self::on_readable).
    pub fn on_writable(&mut self, now: Instant) -> Result<(), ClientError> {
        self.guarded(|this| {
            this.count_wakeup(now)?;
            this.flush()
        })
    }

    /// Whether to wait for room. Reading is always to be waited for: when nobody asked for
    /// anything it tells of the peer's end.
    pub fn wants_write(&self) -> bool {
        !self.broken && !self.outbox.is_empty()
    }

    /// When [`check`](Self::check) is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.broken {
            return None;
        }
        self.waiting.values().filter_map(|call| call.deadline).min()
    }

    /// Looks at the deadlines. An answer that has arrived and was not read yet counts: it is
    /// read first, so that whoever drives the client may itself have been held up.
    ///
    /// # Errors
    ///
    /// [`ClientError::Timeout`] once a deadline has passed, else as for
    /// [`on_readable`](Self::on_readable).
    pub fn check(
        &mut self,
        now: Instant,
        answers: &mut Vec<Completion>,
    ) -> Result<(), ClientError> {
        if self.next_deadline().is_none_or(|at| at > now) {
            return Ok(());
        }
        self.guarded(|this| {
            this.receive(answers)?;
            let late = this
                .waiting
                .values()
                .find(|call| call.deadline.is_some_and(|at| at <= now));
            late.map_or(Ok(()), |call| Err(ClientError::Timeout(call.span)))
        })
    }

    /// Gives every call in flight so much more time: nobody ran for as long.
    pub fn extend_deadlines(&mut self, span: Duration) {
        for call in self.waiting.values_mut() {
            call.deadline = call.deadline.and_then(|at| at.checked_add(span));
        }
    }

    /// Calls that wait for their answers.
    pub fn outstanding(&self) -> usize {
        self.waiting.len()
    }

    /// The channel is at its end.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Ends the channel on this side and gives the tokens of the calls that will not be
    /// answered, oldest first.
    pub fn give_up(&mut self) -> Vec<u64> {
        self.broken = true;
        std::mem::take(&mut self.waiting)
            .into_values()
            .map(|call| call.token)
            .collect()
    }

    fn guarded<T>(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        if self.broken {
            return Err(ClientError::Closed);
        }
        let result = step(self);
        self.broken = result.as_ref().is_err_and(|error| !error.is_recoverable());
        result
    }

    fn flush(&mut self) -> Result<(), ClientError> {
        self.outbox
            .flush(self.socket.as_fd())
            .map(|_| ())
            .map_err(closed_or)
    }

    /// A peer that sends byte by byte, or takes byte by byte, would keep the loop busy
    /// within every other bound.
    fn count_wakeup(&mut self, now: Instant) -> Result<(), ClientError> {
        let (start, count) = &mut self.window;
        let fresh = start.is_some_and(|start| now.saturating_duration_since(start) < WINDOW);
        if !fresh {
            (*start, *count) = (Some(now), 0);
        }
        *count = count.saturating_add(1);
        if *count > self.limits.wakeups_per_second {
            let limit = self.limits.wakeups_per_second;
            return Err(malformed(format!(
                "it woke us more than {limit} times in a second"
            )));
        }
        Ok(())
    }

    fn receive(&mut self, answers: &mut Vec<Completion>) -> Result<(), ClientError> {
        for _ in 0..READS_PER_TURN {
            while !self.unread.is_empty() {
                let mut input = self.chunk.get(self.unread.clone()).unwrap_or_default();
                let before = input.len();
                let outcome = self.reader.feed(&mut input);
                let used = before.saturating_sub(input.len());
                self.unread.start = self.unread.start.saturating_add(used);
                if let Some(frame) = outcome? {
                    answers.push(self.answer(&frame)?);
                }
            }
            if self.waiting.is_empty() && !self.reader.is_idle() {
                return Err(malformed("bytes that nobody asked for"));
            }
            match sys::recv(self.socket.as_fd(), &mut self.chunk[..]) {
                Ok(None) => return Ok(()),
                Ok(Some(0)) => return Err(ClientError::Closed),
                Ok(Some(count)) => self.unread = 0..count,
                Err(error) => return Err(closed_or(error)),
            }
            if self.waiting.is_empty() {
                return Err(malformed("bytes that nobody asked for"));
            }
        }
        Ok(())
    }

    /// Whose answer a frame is.
    fn answer(&mut self, frame: &Frame) -> Result<Completion, ClientError> {
        let header = frame.header;
        let call = (header.kind == frame::TYPE_RESPONSE)
            .then(|| self.waiting.remove(&header.stream_id))
            .flatten()
            .ok_or_else(|| {
                malformed(format!(
                    "a frame of type {} on stream {}, which is no answer to anything",
                    header.kind, header.stream_id
                ))
            })?;
        let result = match response(frame)? {
            ResponseView::Ok(payload) => Ok(payload.to_vec()),
            ResponseView::Failed(status) => Err(status),
        };
        Ok((call.token, result))
    }
}

impl AsFd for AsyncClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn malformed(what: impl Into<String>) -> ClientError {
    ClientError::Malformed(what.into())
}
