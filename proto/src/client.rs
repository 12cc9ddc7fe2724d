//! A ttrpc client that trusts its peer with nothing: one call at a time, a deadline for
//! the *whole* exchange (a peer that drips bytes gains no time), a limit on every frame,
//! and no frame but the one that is due.
//!
//! Used by the VMM's manager for the first call to a device process, and by the CLI towards
//! the API; what must not wait uses [`crate::AsyncClient`]. It blocks its thread up to the
//! deadline; it makes no system calls but send, recv and poll.
//! After any error but [`ClientError::Status`] and [`ClientError::Request`] the channel is
//! in an unknown state, and every later call answers [`ClientError::Closed`].

use std::io;
use std::marker::PhantomData;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use protobuf::Message;

use crate::async_client::{AsyncClient, AsyncLimits};
use crate::envelope::{self, RequestView, ResponseView};
use crate::frame::{self, Frame, FrameError, FrameReader};
use crate::status::RpcStatus;
use crate::sys::{self, Interest};

/// How long a frame of a subscription may take from its first byte to its last.
const STREAM_FRAME_DEADLINE: Duration = Duration::from_secs(10);
const CHUNK: usize = 8192;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The deadline passed before the whole answer was there.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The peer ended the connection, or an earlier call broke it.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer announced a frame beyond the limit.
    #[error("the peer sent {0}")]
    Oversize(#[from] FrameError),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Malformed(String),
    /// Too many calls are waiting for their answers; the channel is as it was.
    #[error("{0} calls are waiting for an answer already")]
    Busy(usize),
    /// The peer answered that the call failed.
    #[error(transparent)]
    Status(#[from] RpcStatus),
    /// The request cannot be sent; the channel is as it was.
    #[error("the request cannot be sent: {0}")]
    Request(String),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

impl ClientError {
    /// The channel is usable after this error.
    pub fn is_recoverable(&self) -> bool {
        matches!(self, Self::Status(_) | Self::Request(_) | Self::Busy(_))
    }
}

/// When to give up: a point in time, and the span to name in the error.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Option<Instant>,
    span: Duration,
}

impl Deadline {
    fn after(span: Duration) -> Self {
        // A span beyond what the clock can hold is as good as none.
        Self {
            at: Instant::now().checked_add(span),
            span,
        }
    }

    const NEVER: Self = Self {
        at: None,
        span: Duration::MAX,
    };

    fn left(self) -> Result<Option<Duration>, ClientError> {
        match self.at {
            None => Ok(None),
            Some(at) => match at.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Ok(Some(left)),
                _ => Err(ClientError::Timeout(self.span)),
            },
        }
    }
}

/// A bounded, blocking ttrpc client over one connected stream socket.
#[derive(Debug)]
pub struct BlockingClient {
    socket: OwnedFd,
    reader: FrameReader,
    max_frame: u32,
    chunk: Box<[u8; CHUNK]>,
    unread: Range<usize>,
    next_stream: u32,
    broken: bool,
}

impl BlockingClient {
    /// A client on a connected stream socket that accepts and sends frames of at most
    /// `max_frame` bytes ([`crate::server::CONTROL_MAX_FRAME`] towards a device). Makes no
    /// system call; the socket need not be non-blocking.
    pub fn new(socket: impl Into<OwnedFd>, max_frame: u32) -> Self {
        Self {
            socket: socket.into(),
            reader: FrameReader::new(max_frame),
            max_frame,
            chunk: Box::new([0; CHUNK]),
            unread: 0..0,
            next_stream: 1,
            broken: false,
        }
    }

    /// Calls a method and waits for its answer, at most `timeout` in all. The peer is told
    /// the timeout.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn call<Req: Message, Resp: Message>(
        &mut self,
        service: &str,
        method: &str,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, ClientError> {
        let deadline = Deadline::after(timeout);
        let frame = self.request_frame(service, method, request, Some(timeout), 0)?;
        self.guarded(|this| {
            let stream_id = this.send_request(&frame, deadline)?;
            let frame = this.receive(deadline)?;
            let header = frame.header;
            if header.kind != frame::TYPE_RESPONSE || header.stream_id != stream_id {
                return Err(unexpected(&frame, stream_id));
            }
            match response(&frame)? {
                ResponseView::Ok(payload) => parse(payload),
                ResponseView::Failed(status) => Err(status.into()),
            }
        })
    }

    /// Calls a server-streaming method. The connection serves nothing else from then on;
    /// dropping the subscription ends it.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; that the *peer* refuses is seen on the first
    /// [`Subscription::next`].
    pub fn subscribe<Req: Message, Item: Message>(
        mut self,
        service: &str,
        method: &str,
        request: &Req,
        timeout: Duration,
    ) -> Result<Subscription<Item>, ClientError> {
        let frame =
            self.request_frame(service, method, request, None, frame::FLAG_REMOTE_CLOSED)?;
        let stream_id = self.guarded(|this| this.send_request(&frame, Deadline::after(timeout)))?;
        Ok(Subscription {
            client: self,
            stream_id,
            ended: false,
            item: PhantomData,
        })
    }

    /// Calls a method whose client goes on speaking; `first` is its first message. As
    /// [`subscribe`](Self::subscribe) otherwise.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn converse<Req: Message, Item: Message>(
        mut self,
        service: &str,
        method: &str,
        first: &Req,
        timeout: Duration,
    ) -> Result<(Speaker, Subscription<Item>), ClientError> {
        let deadline = Deadline::after(timeout);
        let mut frame = Vec::new();
        let mut body = Vec::new();
        let view = RequestView {
            service,
            method,
            payload: &[],
            timeout_nano: 0,
        };
        envelope::encode_request(&mut body, &view);
        let flags = frame::FLAG_REMOTE_OPEN;
        frame::encode(
            &mut frame,
            frame::TYPE_REQUEST,
            self.next_stream,
            flags,
            &body,
        )
        .map_err(|error| ClientError::Request(error.to_string()))?;
        let stream_id = self.guarded(|this| this.send_request(&frame, deadline))?;
        let speaker = Speaker {
            socket: self.socket.try_clone()?,
            stream_id,
        };
        speaker.say(first, timeout)?;
        let subscription = Subscription {
            client: self,
            stream_id,
            ended: false,
            item: PhantomData,
        };
        Ok((speaker, subscription))
    }

    /// The same channel for an event loop, which must not wait: [`AsyncClient`].
    ///
    /// # Errors
    ///
    /// [`ClientError::Closed`] if an earlier call broke the channel, [`ClientError::Malformed`]
    /// if the peer has sent more than it was asked for.
    pub fn into_async(self, limits: AsyncLimits) -> Result<AsyncClient, ClientError> {
        if self.broken {
            return Err(ClientError::Closed);
        }
        if !self.unread.is_empty() || !self.reader.is_idle() {
            return Err(ClientError::Malformed("bytes that nobody asked for".into()));
        }
        Ok(AsyncClient::new(self.socket, limits).resume_at(self.next_stream))
    }

    /// Runs one exchange; anything but the peer's regular answer breaks the channel.
    fn guarded<T>(
        &mut self,
        exchange: impl FnOnce(&mut Self) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        if self.broken {
            return Err(ClientError::Closed);
        }
        let result = exchange(self);
        self.broken = result.as_ref().is_err_and(|error| !error.is_recoverable());
        result
    }

    /// The frame for the next stream id.
    fn request_frame<Req: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
        timeout: Option<Duration>,
        flags: u8,
    ) -> Result<Vec<u8>, ClientError> {
        let mut out = Vec::new();
        let call = OutgoingCall {
            service,
            method,
            timeout,
            stream_id: self.next_stream,
            flags,
        };
        call.encode(&mut out, request, self.max_frame)?;
        Ok(out)
    }

    fn send_request(&mut self, frame: &[u8], deadline: Deadline) -> Result<u32, ClientError> {
        let stream_id = self.next_stream;
        send_all(self.socket.as_fd(), frame, deadline)?;
        self.next_stream = stream_after(stream_id);
        Ok(stream_id)
    }

    /// The next frame, or an error at `deadline` however its bytes trickle in.
    fn receive(&mut self, deadline: Deadline) -> Result<Frame, ClientError> {
        loop {
            if let Some(frame) = self.buffered_frame()? {
                return Ok(frame);
            }
            self.fill(deadline)?;
        }
    }

    /// A frame from what has been read already.
    fn buffered_frame(&mut self) -> Result<Option<Frame>, ClientError> {
        let mut input = self.chunk.get(self.unread.clone()).unwrap_or_default();
        let before = input.len();
        let outcome = self.reader.feed(&mut input);
        let used = before.saturating_sub(input.len());
        self.unread.start = self.unread.start.saturating_add(used);
        Ok(outcome?)
    }

    /// Reads once, waiting for it up to the deadline.
    fn fill(&mut self, deadline: Deadline) -> Result<(), ClientError> {
        loop {
            // Looked at before every read, so that a peer that always has one more byte
            // does not keep us here.
            let left = deadline.left()?;
            match sys::recv(self.socket.as_fd(), &mut self.chunk[..]) {
                Ok(Some(0)) => return Err(ClientError::Closed),
                Ok(Some(count)) => {
                    self.unread = 0..count;
                    return Ok(());
                }
                Ok(None) => sys::wait(self.socket.as_fd(), Interest::Readable, left)?,
                Err(error) => return Err(closed_or(error)),
            }
        }
    }
}

impl AsFd for BlockingClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send_all(socket: BorrowedFd<'_>, bytes: &[u8], deadline: Deadline) -> Result<(), ClientError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match sys::send(socket, rest) {
            Ok(Some(count)) => rest = rest.get(count..).unwrap_or_default(),
            Ok(None) => {
                let left = deadline.left()?;
                sys::wait(socket, Interest::Writable, left)?;
            }
            Err(error) => return Err(closed_or(error)),
        }
    }
    Ok(())
}

/// The client's side of a call in which both speak; for a thread of its own.
#[derive(Debug)]
pub struct Speaker {
    socket: OwnedFd,
    stream_id: u32,
}

impl Speaker {
    /// Sends a message.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; after any of them nothing can be said any more.
    pub fn say<M: Message>(&self, message: &M, timeout: Duration) -> Result<(), ClientError> {
        let refused = |error: String| ClientError::Request(error);
        let body = message
            .write_to_bytes()
            .map_err(|error| refused(error.to_string()))?;
        let mut out = Vec::new();
        frame::encode(&mut out, frame::TYPE_DATA, self.stream_id, 0, &body)
            .map_err(|error| refused(error.to_string()))?;
        send_all(self.socket.as_fd(), &out, Deadline::after(timeout))
    }

    /// Ends the connection, in the middle of whatever another thread waits for.
    pub fn hang_up(&self) {
        if let Ok(socket) = self.socket.try_clone() {
            // One that is not connected any more has ended already.
            let _ = UnixStream::from(socket).shutdown(Shutdown::Both);
        }
    }

    /// Says no more.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn close(&self, timeout: Duration) -> Result<(), ClientError> {
        let mut out = Vec::new();
        frame::encode_end_of_stream(&mut out, self.stream_id);
        send_all(self.socket.as_fd(), &out, Deadline::after(timeout))
    }
}

/// The messages of a server-streaming call.
#[derive(Debug)]
pub struct Subscription<Item> {
    client: BlockingClient,
    stream_id: u32,
    ended: bool,
    item: PhantomData<Item>,
}

impl<Item: Message> Subscription<Item> {
    /// Waits for the next message: up to `idle` for its first byte (`None`: for ever), and
    /// ten seconds from there to its last. `Ok(None)`: the peer ended the stream.
    ///
    /// A timeout before the first byte leaves the subscription intact.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; after any but an idle timeout the subscription has ended.
    pub fn next(&mut self, idle: Option<Duration>) -> Result<Option<Item>, ClientError> {
        if self.ended {
            return Ok(None);
        }
        let result = self.next_frame(idle);
        let idle_timeout =
            matches!(result, Err(ClientError::Timeout(_))) && self.client.reader.is_idle();
        self.ended |= match &result {
            Ok(message) => message.is_none(),
            Err(_) => !idle_timeout,
        };
        result
    }

    fn next_frame(&mut self, idle: Option<Duration>) -> Result<Option<Item>, ClientError> {
        let frame = match self.client.buffered_frame()? {
            Some(frame) => frame,
            None => {
                if self.client.reader.is_idle() {
                    self.client
                        .fill(idle.map_or(Deadline::NEVER, Deadline::after))?;
                }
                self.client
                    .receive(Deadline::after(STREAM_FRAME_DEADLINE))?
            }
        };
        let header = frame.header;
        if header.stream_id != self.stream_id {
            return Err(unexpected(&frame, self.stream_id));
        }
        match header.kind {
            frame::TYPE_DATA if header.has(frame::FLAG_NO_DATA) => {
                if !frame.body.is_empty() {
                    return Err(ClientError::Malformed(
                        "a body in a frame without data".into(),
                    ));
                }
                if header.has(frame::FLAG_REMOTE_CLOSED) {
                    return Ok(None);
                }
                Err(ClientError::Malformed("a frame that says nothing".into()))
            }
            frame::TYPE_DATA => {
                let item = parse(&frame.body)?;
                // The last message may carry the end with it.
                self.ended = header.has(frame::FLAG_REMOTE_CLOSED);
                Ok(Some(item))
            }
            frame::TYPE_RESPONSE => match response(&frame)? {
                ResponseView::Ok(_) => Ok(None),
                ResponseView::Failed(status) => Err(status.into()),
            },
            _ => Err(unexpected(&frame, self.stream_id)),
        }
    }
}

/// A request on its way into a frame.
pub(crate) struct OutgoingCall<'a> {
    pub(crate) service: &'a str,
    pub(crate) method: &'a str,
    /// What the peer is told of the deadline.
    pub(crate) timeout: Option<Duration>,
    pub(crate) stream_id: u32,
    pub(crate) flags: u8,
}

impl OutgoingCall<'_> {
    /// Appends the frame to `out`, or nothing on an error, which is a [`ClientError::Request`].
    pub(crate) fn encode<Req: Message>(
        &self,
        out: &mut Vec<u8>,
        request: &Req,
        max_frame: u32,
    ) -> Result<(), ClientError> {
        let refused = |error: String| ClientError::Request(error);
        let payload = request
            .write_to_bytes()
            .map_err(|error| refused(error.to_string()))?;
        let timeout_nano = self
            .timeout
            .map_or(0, |span| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX));
        let mut body = Vec::new();
        let view = RequestView {
            service: self.service,
            method: self.method,
            payload: &payload,
            timeout_nano,
        };
        envelope::encode_request(&mut body, &view);
        if body.len() > usize::try_from(max_frame).unwrap_or(usize::MAX) {
            return Err(refused(format!(
                "{} bytes, where {max_frame} are allowed",
                body.len()
            )));
        }
        frame::encode(out, frame::TYPE_REQUEST, self.stream_id, self.flags, &body)
            .map_err(|error| refused(error.to_string()))
    }
}

/// Stream ids of a client are odd; after 2^31 calls they start over.
pub(crate) fn stream_after(stream_id: u32) -> u32 {
    stream_id.checked_add(2).unwrap_or(1)
}

fn parse<M: Message>(payload: &[u8]) -> Result<M, ClientError> {
    M::parse_from_bytes(payload)
        .map_err(|error| ClientError::Malformed(format!("{}: {error}", M::NAME)))
}

pub(crate) fn response(frame: &Frame) -> Result<ResponseView<'_>, ClientError> {
    envelope::parse_response(&frame.body).map_err(|error| ClientError::Malformed(error.to_string()))
}

fn unexpected(frame: &Frame, stream_id: u32) -> ClientError {
    let header = frame.header;
    ClientError::Malformed(format!(
        "a frame of type {} on stream {}, where stream {stream_id} was due",
        header.kind, header.stream_id
    ))
}

/// A peer that closed with our bytes unread shows as a reset.
pub(crate) fn closed_or(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}
