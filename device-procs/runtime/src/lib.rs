//! What every Bulkhead device process shares: its channels, its confinement, the
//! vhost-user back-end, split rings, and the orders between main thread and queue workers.
//!
//! ```text
//!   VMM ── control (ttrpc) ──┐
//!   VMM ── vhost-user ───────┤ main thread            queue-N thread, one per queue
//!                            │  serve: poll loop       sleeps in io_uring or ppoll on
//!                            │  control: Device        its kick and its mailbox
//!                            │  link+backend: messages ── Order ──▶  ActiveRing
//!                            │                         ◀─ Answer ──  Ring, Chain
//!                            └─ QueueStatus (counters) ◀───────────  Memory (snapshot)
//! ```
//!
//! A device kind implements [`device::Device`] and calls [`serve()`]; everything that a
//! guest writes goes through [`ring`], [`chain`] and [`memory`], which trust none of it.

pub mod active;
mod backend;
mod backend_channel;
pub mod backlog;
pub mod chain;
pub mod channels;
pub mod clock;
#[cfg(any(test, feature = "testing"))]
pub mod command_lines;
pub mod control;
#[cfg(test)]
mod crash;
pub mod device;
#[cfg(any(test, feature = "testing"))]
pub mod driver;
#[cfg(any(test, feature = "testing"))]
pub mod frontend;
#[cfg(any(test, feature = "testing"))]
pub mod frontend_vm;
#[cfg(feature = "hostile")]
pub mod hostile;
pub mod inflight;
pub mod inherited;
pub mod limit;
mod link;
pub mod logger;
pub mod mailbox;
pub mod memory;
pub mod program;
pub mod ring;
pub mod seat;
pub mod serve;
pub mod status;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod test_process;
mod waiter;
#[cfg(any(test, feature = "testing"))]
pub mod worker_bed;

pub use serve::{ServeError, ServeOptions, serve};
