//! bulkhead-vsock: one virtio socket device (VIRTIO 1.2 section 5.10) in one process.
//!
//! ```text
//!   client ── unix socket, "CONNECT port" ──▶ Streams ◀── packets ──▶ worker ── rings ── guest
//! ```
//!
//! Clients of a listening socket that the launcher made are joined to ports of the guest's, and
//! programs in the guest to whoever listens for them beside that socket. The process makes no
//! socket and connects to none: it accepts, and asks the launcher.

pub mod asked;
pub mod cli;
pub mod connection;
pub mod device;
pub mod dial;
pub mod packet;
pub mod streams;
pub mod worker;
