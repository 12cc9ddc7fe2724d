//! bulkhead-vsock: one virtio socket device (VIRTIO 1.2 section 5.10) in one process.
//!
//! ```text
//!   client ── unix socket, "CONNECT port" ──▶ Streams ◀── packets ──▶ worker ── rings ── guest
//! ```
//!
//! Clients of a listening socket that the launcher made are joined to ports of the guest's. The
//! process makes no socket and connects to none: it accepts.

pub mod buffer;
pub mod cli;
pub mod connection;
pub mod device;
pub mod packet;
pub mod streams;
pub mod worker;
