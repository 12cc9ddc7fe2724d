//! One vhost-user connection: takes messages off the socket only when a whole one is
//! there, so that a peer that sends half a message, or reads no replies, never blocks the
//! main thread (the `vhost` crate's handler reads and writes until it is done).

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use crate::sys::{self, PollFd};

/// Time for the whole of one message to arrive, and for its reply to leave.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(2);
/// How often to look whether the rest of a message has come.
const PARTIAL_RETRY_MS: i32 = 2;

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
    waiting_since: Option<Instant>,
    peeked: Box<[u8; HEADER + MAX_BODY]>,
}

impl<B: VhostUserBackendReqHandlerMut> Link<B> {
    pub(crate) fn new(socket: UnixStream, backend: Arc<Mutex<B>>) -> Self {
        Self {
            handler: BackendReqHandler::from_stream(socket, backend),
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
            let since = *self.waiting_since.get_or_insert_with(Instant::now);
            return if since.elapsed() > MESSAGE_DEADLINE {
                Err(LinkError::Deadline)
            } else {
                Ok(())
            };
        }
        self.waiting_since = None;
        match self.handler.handle_request() {
            Ok(()) => Ok(()),
            Err(Error::Disconnected) => Err(LinkError::Closed),
            Err(e) => Err(LinkError::Message(e)),
        }
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
