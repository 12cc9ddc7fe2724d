//! One vhost-user connection: takes messages off the socket only when a whole one is
//! there, so that a peer that sends half a message, or reads no replies, never blocks the
//! main thread (the `vhost` crate's handler reads and writes until it is done).
//!
//! Three messages are handled here, because the handler cannot: SET_VRING_ENABLE, which it
//! refuses before SET_FEATURES (QEMU's vhost-user-net sends it there), SET_BACKEND_REQ_FD,
//! whose socket it wraps in a proxy that knows no configuration change, and
//! GET_INFLIGHT_FD, for which it would have the file to itself: there is one, and no call
//! to make another is left.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use crate::clock;
use crate::sys::{self, PollFd};

/// Time for the whole of one message to arrive, and for its reply to leave.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(2);
/// How often to look whether the rest of a message has come.
const PARTIAL_RETRY_MS: i32 = 2;

const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_INFLIGHT_FD: u32 = 31;
/// Version 1 in a header's flags, and the bits that say "this is a reply" and "reply".
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What the back-end does on the messages that are handled here.
pub(crate) trait Intercepted {
    /// SET_VRING_ENABLE
    fn enable_ring(&mut self, index: u32, enable: bool) -> Result<(), Error>;
    /// SET_BACKEND_REQ_FD
    fn set_backend_channel(&mut self, socket: OwnedFd) -> Result<(), Error>;
    /// GET_INFLIGHT_FD: a region for so many queues of such a size, all zeros; its bytes, and
    /// the file that it begins.
    fn offer_inflight(&mut self, queues: u16, queue_size: u16) -> Result<(u64, &File), Error>;
    /// VHOST_USER_PROTOCOL_F_REPLY_ACK was accepted.
    fn acknowledges(&self) -> bool;
}

/// Bytes of a vhost-user message header: request, flags, size.
const HEADER: usize = 12;
/// Largest message body (the `vhost` crate's MAX_MSG_SIZE).
const MAX_BODY: usize = 0x1000;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The front-end closed it.
    #[error("closed by the front-end")]
    Closed,
    /// A message did not become complete, or its reply was not read.
    #[error("message not complete within {} s", MESSAGE_DEADLINE.as_secs())]
    Deadline,
    /// A body larger than any message has.
    #[error("message body of {0} bytes")]
    Oversize(usize),
    /// The message was refused.
    #[error("{0}")]
    Message(Error),
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// A connection and the back-end behind it.
pub(crate) struct Link<B: VhostUserBackendReqHandlerMut> {
    handler: BackendReqHandler<Mutex<B>>,
    backend: Arc<Mutex<B>>,
    waiting_since: Option<Instant>,
    peeked: Box<[u8; HEADER + MAX_BODY]>,
}

/// A message that is handled here.
struct Own {
    request: u32,
    flags: u32,
    /// Of the whole message.
    bytes: usize,
}

impl<B: VhostUserBackendReqHandlerMut + Intercepted> Link<B> {
    pub(crate) fn new(socket: UnixStream, backend: Arc<Mutex<B>>) -> Self {
        Self {
            handler: BackendReqHandler::from_stream(socket, Arc::clone(&backend)),
            backend,
            waiting_since: None,
            peeked: Box::new([0; HEADER + MAX_BODY]),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        sys::handler_fd(&self.handler)
    }

    /// What to wait for. While half a message is there, poll would say "readable" at
    /// once, so nothing is waited for and [`Self::timeout_ms`] paces the retries.
    pub(crate) fn poll_fd(&self) -> PollFd {
        match self.waiting_since {
            None => PollFd::new(self.fd(), libc::POLLIN),
            Some(_) => PollFd::none(),
        }
    }

    /// How long the poll loop may sleep before it calls [`Self::serve`].
    pub(crate) fn timeout_ms(&self) -> i32 {
        match self.waiting_since {
            None => -1,
            Some(_) => PARTIAL_RETRY_MS,
        }
    }

    /// Handles one message if a whole one is there.
    pub(crate) fn serve(&mut self) -> Result<(), LinkError> {
        if !self.message_complete()? || !self.reply_fits()? {
            let since = *self.waiting_since.get_or_insert_with(clock::now);
            return if clock::now().saturating_duration_since(since) > MESSAGE_DEADLINE {
                Err(LinkError::Deadline)
            } else {
                Ok(())
            };
        }
        self.waiting_since = None;
        if let Some(own) = self.own_message() {
            return self.handle(&own);
        }
        match self.handler.handle_request() {
            Ok(()) => Ok(()),
            Err(Error::Disconnected) => Err(LinkError::Closed),
            Err(e) => Err(LinkError::Message(e)),
        }
    }

    /// The message at the front of the queue, if it is one of those handled here.
    fn own_message(&self) -> Option<Own> {
        let mut words = self.peeked.chunks_exact(4).map(|w| match w {
            [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        });
        let (request, flags, size) = (words.next()?, words.next()?, words.next()?);
        matches!(
            request,
            SET_VRING_ENABLE | SET_BACKEND_REQ_FD | GET_INFLIGHT_FD
        )
        .then_some(Own {
            request,
            flags,
            bytes: HEADER.saturating_add(size as usize),
        })
    }

    fn handle(&mut self, own: &Own) -> Result<(), LinkError> {
        let mut bytes = vec![0; own.bytes];
        let (mut have, mut fds) = (0, Vec::new());
        while let Some(rest) = bytes.get_mut(have..).filter(|r| !r.is_empty()) {
            // All of it is there, and nobody else reads.
            match sys::receive(self.fd(), rest)? {
                Some((0, _)) => return Err(LinkError::Closed),
                Some((n, more)) => {
                    have = have.saturating_add(n);
                    fds.extend(more);
                }
                None => {}
            }
        }
        let body = bytes.get(HEADER..).unwrap_or_default();
        let mut backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
        if own.flags & VERSION_MASK != VERSION || own.flags & REPLY != 0 {
            return Err(LinkError::Message(Error::InvalidMessage));
        }
        if own.request == GET_INFLIGHT_FD {
            let (queues, queue_size) = inflight_wanted(body).map_err(LinkError::Message)?;
            let (size, file) = backend
                .offer_inflight(queues, queue_size)
                .map_err(LinkError::Message)?;
            let mut reply = size.to_le_bytes().to_vec();
            reply.extend(0u64.to_le_bytes());
            reply.extend(queues.to_le_bytes());
            reply.extend(queue_size.to_le_bytes());
            reply.extend([0; 4]);
            return self.reply(own.request, &reply, Some(file.as_fd()));
        }
        let result = perform(&mut *backend, own.request, body, fds);
        let acknowledges = backend.acknowledges();
        drop(backend);
        if acknowledges && own.flags & NEED_REPLY != 0 {
            // A u64, 0 for success.
            let value = u64::from(result.is_err());
            self.reply(own.request, &value.to_le_bytes(), None)?;
        }
        result.map_err(LinkError::Message)
    }

    fn reply(
        &self,
        request: u32,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), LinkError> {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let words = [request, VERSION | REPLY, size];
        let mut reply: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        reply.extend(body);
        // There is room: reply_fits.
        if sys::send_now(self.fd(), &reply, fd)? != reply.len() {
            return Err(LinkError::Deadline);
        }
        Ok(())
    }

    fn message_complete(&mut self) -> Result<bool, LinkError> {
        let Some(n) = sys::peek(sys::handler_fd(&self.handler), &mut self.peeked[..])? else {
            return Ok(false);
        };
        if n == 0 {
            return Err(LinkError::Closed);
        }
        let [.., s0, s1, s2, s3] = match self.peeked.first_chunk::<HEADER>() {
            Some(header) if n >= HEADER => *header,
            _ => return Ok(false),
        };
        let body = u32::from_le_bytes([s0, s1, s2, s3]) as usize;
        if body > MAX_BODY {
            return Err(LinkError::Oversize(body));
        }
        Ok(n >= HEADER + body)
    }

    /// A unix socket is "writable" while three quarters of its buffer are free, far more
    /// than a reply.
    fn reply_fits(&self) -> Result<bool, LinkError> {
        let mut fds = [PollFd::new(self.fd(), libc::POLLOUT)];
        sys::poll(&mut fds, 0)?;
        let [fd] = fds;
        Ok(fd.revents() & libc::POLLOUT != 0)
    }
}

/// The body of GET_INFLIGHT_FD: sizes that the back-end decides, queues, queue size, and what
/// the compiler of the front-end pads with.
fn inflight_wanted(body: &[u8]) -> Result<(u16, u16), Error> {
    match body.get(16..) {
        Some([n0, n1, s0, s1, rest @ ..]) if rest.len() <= 4 => Ok((
            u16::from_le_bytes([*n0, *n1]),
            u16::from_le_bytes([*s0, *s1]),
        )),
        _ => Err(Error::InvalidMessage),
    }
}

fn perform(
    backend: &mut impl Intercepted,
    request: u32,
    body: &[u8],
    mut fds: Vec<OwnedFd>,
) -> Result<(), Error> {
    match (request, body) {
        (SET_VRING_ENABLE, [i0, i1, i2, i3, n0, n1, n2, n3]) if fds.is_empty() => {
            let index = u32::from_le_bytes([*i0, *i1, *i2, *i3]);
            match u32::from_le_bytes([*n0, *n1, *n2, *n3]) {
                0 => backend.enable_ring(index, false),
                1 => backend.enable_ring(index, true),
                _ => Err(Error::InvalidParam),
            }
        }
        (SET_BACKEND_REQ_FD, _) if fds.len() == 1 => match fds.pop() {
            Some(socket) => backend.set_backend_channel(socket),
            None => Err(Error::IncorrectFds),
        },
        (SET_BACKEND_REQ_FD, _) => Err(Error::IncorrectFds),
        _ => Err(Error::InvalidMessage),
    }
}
