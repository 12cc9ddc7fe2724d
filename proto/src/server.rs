//! The device's end of a control channel: a single-threaded ttrpc server over one
//! connected socket, bounded in every direction.
//!
//! The device runtime drives it from its poll loop, on the device's main thread: nothing
//! here blocks. One request is handled at a time; the next is not read before the reply
//! to the last has left, so a VMM that does not read costs one reply, and at most one frame
//! of `max_frame` bytes is held.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use protobuf::Message;

use crate::envelope;
use crate::frame::{self, Frame, FrameError, FrameReader};
use crate::outbox::Outbox;
use crate::status::{Code, RpcStatus};
use crate::sys;

/// Largest frame on a device's control channel, either way.
pub const CONTROL_MAX_FRAME: u32 = 64 * 1024;
/// Frames handled in one go before the caller's poll loop has its turn again.
const FRAMES_PER_TURN: usize = 16;
/// Read at once.
const CHUNK: usize = 4096;

/// Why a channel is at its end. The owner drops the server.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The peer closed its end.
    #[error("the peer closed the control channel")]
    Eof,
    /// The peer sent a frame beyond the limit; it has been told so if it reads.
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// The socket failed.
    #[error("the control channel failed: {0}")]
    Io(#[from] io::Error),
}

/// What handles one call: service, method and request message in; reply message out.
pub type Handler<'a> = &'a mut dyn FnMut(&str, &str, &[u8]) -> Result<Vec<u8>, RpcStatus>;

/// A bounded ttrpc server over one connected stream socket.
#[derive(Debug)]
pub struct ControlServer {
    socket: OwnedFd,
    reader: FrameReader,
    max_frame: u32,
    outbox: Outbox,
    chunk: Box<[u8; CHUNK]>,
    /// The part of `chunk` that is read but not yet handled.
    unread: std::ops::Range<usize>,
    /// Set by a protocol error: write what is left, then end.
    fatal: Option<FrameError>,
}

impl ControlServer {
    /// A server on a connected stream socket, with frames of at most `max_frame` bytes
    /// ([`CONTROL_MAX_FRAME`]) either way. Makes no system call; the socket need not be
    /// non-blocking.
    pub fn new(socket: impl Into<OwnedFd>, max_frame: u32) -> Self {
        Self {
            socket: socket.into(),
            reader: FrameReader::new(max_frame),
            max_frame,
            outbox: Outbox::default(),
            chunk: Box::new([0; CHUNK]),
            unread: 0..0,
            fatal: None,
        }
    }

    /// Wait for POLLIN: false while a reply waits to leave.
    pub fn wants_read(&self) -> bool {
        self.outbox.is_empty() && self.fatal.is_none()
    }

    /// Wait for POLLOUT. Also true when something was left over from an earlier turn for
    /// which no POLLIN will come: POLLOUT comes at once.
    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty() || !self.unread.is_empty() || self.fatal.is_some()
    }

    /// The socket has bytes, or its peer hung up.
    ///
    /// # Errors
    ///
    /// [`Closed`] when the channel is at its end.
    pub fn on_readable(&mut self, handler: Handler<'_>) -> Result<(), Closed> {
        self.turn(handler)
    }

    /// The socket has room.
    ///
    /// # Errors
    ///
    /// [`Closed`] when the channel is at its end.
    pub fn on_writable(&mut self, handler: Handler<'_>) -> Result<(), Closed> {
        self.turn(handler)
    }

    fn turn(&mut self, handler: Handler<'_>) -> Result<(), Closed> {
        for _ in 0..FRAMES_PER_TURN {
            self.outbox.flush(self.socket.as_fd())?;
            if !self.outbox.is_empty() {
                return Ok(());
            }
            if let Some(error) = self.fatal {
                return Err(error.into());
            }
            if self.unread.is_empty() {
                match sys::recv(self.socket.as_fd(), &mut self.chunk[..])? {
                    None => return Ok(()),
                    Some(0) => return Err(Closed::Eof),
                    Some(count) => self.unread = 0..count,
                }
            }
            let mut input = self.chunk.get(self.unread.clone()).unwrap_or_default();
            let before = input.len();
            let outcome = self.reader.feed(&mut input);
            let used = before.saturating_sub(input.len());
            self.unread.start = self.unread.start.saturating_add(used);
            match outcome {
                Ok(Some(frame)) => self.handle(&frame, handler),
                Ok(None) => {}
                Err(error) => {
                    let FrameError::Oversize { header, max, .. } = error;
                    let status = RpcStatus::new(
                        Code::ResourceExhausted,
                        format!(
                            "a frame of {} bytes, where {max} are allowed",
                            header.length
                        ),
                    );
                    self.reply(header.stream_id, Err(status));
                    self.fatal = Some(error);
                }
            }
        }
        self.outbox.flush(self.socket.as_fd())?;
        Ok(())
    }

    fn handle(&mut self, frame: &Frame, handler: Handler<'_>) {
        let stream_id = frame.header.stream_id;
        let result = match frame.header.kind {
            frame::TYPE_REQUEST if stream_id.is_multiple_of(2) => {
                Err(RpcStatus::invalid_argument("stream id must be odd"))
            }
            frame::TYPE_REQUEST => match envelope::parse_request(&frame.body) {
                Ok(request) => handler(request.service, request.method, request.payload),
                Err(error) => Err(RpcStatus::invalid_argument(error.to_string())),
            },
            frame::TYPE_DATA => Err(RpcStatus::invalid_argument("no such stream")),
            // As the reference implementation does, for compatibility with what may come.
            _ => return,
        };
        self.reply(stream_id, result);
    }

    fn reply(&mut self, stream_id: u32, result: Result<Vec<u8>, RpcStatus>) {
        let mut body = Vec::new();
        envelope::encode_response(&mut body, result.as_deref());
        let limit = usize::try_from(self.max_frame).unwrap_or(usize::MAX);
        if body.len() > limit {
            let status = RpcStatus::new(
                Code::ResourceExhausted,
                format!(
                    "the reply has {} bytes, where {limit} are allowed",
                    body.len()
                ),
            );
            body.clear();
            envelope::encode_response(&mut body, Err(&status));
        }
        let encoded = frame::encode(
            self.outbox.buffer(),
            frame::TYPE_RESPONSE,
            stream_id,
            0,
            &body,
        );
        debug_assert!(encoded.is_ok(), "the body was bounded by a u32 above");
    }
}

impl AsRawFd for ControlServer {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for ControlServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads a request message, for use in a [`Handler`].
///
/// # Errors
///
/// INVALID_ARGUMENT if the bytes are not such a message.
pub fn decode<M: Message>(payload: &[u8]) -> Result<M, RpcStatus> {
    M::parse_from_bytes(payload)
        .map_err(|error| RpcStatus::invalid_argument(format!("malformed {}: {error}", M::NAME)))
}

/// Writes a reply message, for use in a [`Handler`].
///
/// # Errors
///
/// INTERNAL if the message cannot be encoded.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, RpcStatus> {
    message
        .write_to_bytes()
        .map_err(|error| RpcStatus::internal(format!("cannot encode {}: {error}", M::NAME)))
}
