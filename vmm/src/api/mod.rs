//! The outward API: service `bulkhead.v1.Machine` (proto/proto/machine.proto), ttrpc over
//! the API socket; and `vmservice.VM` (`vmservice`), which becomes the same requests.
//!
//! ```text
//!  clients ──▶ [ thread `api`: server ─ connections ] ──submit──▶ MachineService (the manager)
//!                    ▲            ▲                                        │
//!                 EventLog     replies ◀──────── ReplyHandle::complete ────┘
//! ```
//!
//! A socket's role says what its clients may call, and the kernel who they are (`access`). One
//! thread, one epoll, nothing that blocks, and the same bounds for all sockets. What a client can make the server hold is
//! bounded everywhere: connections, the size of a request (checked on its frame's header),
//! calls in flight, bytes of replies not yet read, subscriptions, and time. A client that
//! does not read is first no longer listened to and then cut off; it costs no other client
//! anything.

mod access;
pub mod config;
mod config_console;
mod config_disk;
mod config_fs;
pub(crate) mod config_net;
mod config_ports;
mod config_resources;
mod config_rng;
mod config_sockets;
mod config_user;
mod config_vsock;
mod connection;
mod console;
pub mod events;
mod limits;
mod refused_calls;
mod reply;
mod request;
mod request_hotplug;
mod server;
#[cfg(test)]
mod tests;
mod vmservice;

pub use access::{Callers, Door, Role};
#[cfg(test)]
pub(crate) use config_console::MOST_PORTS as MOST_CONSOLE_PORTS;
pub(crate) use config_fs::check_tag;
pub(crate) use config_net::check_interface_name;
pub use events::{EventLog, process_name};
pub use reply::{ApiResponse, ReplyHandle, note_end};
pub use request::{ApiRequest, Services};
pub use server::{ApiServer, ApiServerHandle};

/// What carries out the API's requests: the manager.
pub trait MachineService: Send + Sync {
    /// Takes a request. Called on the `api` thread: it must not block, so it queues the
    /// request and returns; whoever has done the work completes `reply`, from any thread.
    /// A reply dropped without completion tells the client that the machine is gone.
    fn submit(&self, request: ApiRequest, reply: ReplyHandle);
}
