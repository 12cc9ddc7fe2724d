//! bulkhead-rng: one virtio entropy device (VIRTIO 1.2 section 5.4) in one process.
//!
//! ```text
//!   guest ── ring ──▶ worker ── read(2) ──▶ /dev/random, opened by the launcher
//! ```
//!
//! The host's generator is all that it has beside the guest's memory. A request is bounded, and so
//! is what is done before orders are looked at; a limit in bytes per second is the operator's.

pub mod cli;
pub mod device;
pub mod worker;
