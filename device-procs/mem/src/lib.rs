//! bulkhead-mem: one virtio-mem device (VIRTIO 1.2 section 5.15) in one process.
//!
//! ```text
//!   guest ── ring ──▶ worker ── Desk ──▶ main thread ── TakeRequest ──▶ VMM
//!                       ▲                                                │ KVM, all devices
//!                       └─────── Desk ◀── main thread ◀─ FinishRequest ──┘
//! ```
//!
//! The process decides nothing: it reads what the guest wants, refuses what makes no sense, and
//! asks the VMM for the rest. It has no more of the memory than any other device.

pub mod cli;
pub mod desk;
pub mod device;
pub mod request;
pub mod state;
pub mod worker;
