//! bulkhead-console: one virtio console (VIRTIO 1.2 section 5.3) in one process.
//!
//! ```text
//!   client ── unix socket of port 0 ──▶ Port ◀── two rings ──┐
//!   client ── unix socket of port 1 ──▶ Port ◀── two rings ──┤ worker ── guest
//!                                     Control ◀── two rings ──┘
//! ```
//!
//! A port without a name is a console of the guest's (hvc0, …), one with a name a channel to
//! whoever opens it there (/dev/virtio-ports/NAME). Each listens on a socket that the launcher
//! made, for one client at a time. The process makes no socket and connects to none: it accepts.

pub mod cli;
pub mod control;
pub mod device;
pub mod port;
pub mod worker;
