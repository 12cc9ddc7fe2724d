//! Requests on their way from the API thread to the manager: bounded, never blocking the
//! sender, with an eventfd that wakes the manager.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{ApiRequest, MachineService, ReplyHandle};

/// Most requests that may wait for the manager.
const DEPTH: usize = 64;

/// Most of them that the manager takes before it looks at what else has happened: places that
/// become free are taken again at once.
pub const TURN: usize = DEPTH;

/// The API thread's end.
pub struct RequestSender {
    sender: SyncSender<(ApiRequest, ReplyHandle)>,
    wake: Arc<EventFd>,
}

/// The manager's end.
pub struct RequestReceiver {
    receiver: Receiver<(ApiRequest, ReplyHandle)>,
    wake: Arc<EventFd>,
}

/// A new queue.
///
/// # Errors
/// When there is no descriptor left for the eventfd.
pub fn channel() -> std::io::Result<(RequestSender, RequestReceiver)> {
    let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    let (sender, receiver) = sync_channel(DEPTH);
    let sending = RequestSender {
        sender,
        wake: Arc::clone(&wake),
    };
    Ok((sending, RequestReceiver { receiver, wake }))
}

impl MachineService for RequestSender {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        match self.sender.try_send((request, reply)) {
            Ok(()) => {
                // Non-blocking; a full counter means that the manager is woken already.
                let _ = self.wake.write(1);
            }
            Err(TrySendError::Full((_, reply))) => reply.complete(Err(RpcStatus::new(
                Code::ResourceExhausted,
                "the machine has too many requests waiting: retry later",
            ))),
            Err(TrySendError::Disconnected((_, reply))) => reply.complete(Err(RpcStatus::new(
                Code::Unavailable,
                "the machine is ending",
            ))),
        }
    }
}

impl RequestReceiver {
    /// The next request, if one waits. Never blocks.
    pub fn try_next(&self) -> Option<(ApiRequest, ReplyHandle)> {
        self.receiver.try_recv().ok()
    }

    /// Takes the wake-up back, before the queue is looked at.
    pub fn clear(&self) {
        let _ = self.wake.read();
    }

    /// More may wait than were taken: wakes the manager once more.
    pub fn look_again(&self) {
        let _ = self.wake.write(1);
    }

    /// Readable while requests may wait.
    pub fn raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
