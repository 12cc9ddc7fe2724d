//! What clients of the API may make the server hold.

use std::time::Duration;

use super::request;

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
