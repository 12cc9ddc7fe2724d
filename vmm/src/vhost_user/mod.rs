//! vhost-user front-end: the VMM's side of the channel to a device process
//! (vhost-user protocol, "Communication", "Message Specification").
//!
//! The peer is treated as an attacker: each message has one deadline as a whole, a
//! maximum size and a maximum number of descriptors, and whatever breaks a rule ends the
//! connection for good. vCPU threads call [`Frontend`] under their function's lock; the
//! manager thread drains [`BackendChannel`].
//!
//! "User addresses" in memory tables and rings are guest-physical addresses plus a
//! constant, not the VMM's own: a device process learns nothing about the VMM's layout.

mod backend_channel;
mod error;
mod frontend;
mod inflight;
mod slots;
#[cfg(test)]
pub(crate) mod test_backend;
mod transport;
mod wire;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::memory::MappedMemory;
pub use backend_channel::{BackendChannel, Drained};
pub use error::{VhostUserError, Violation};
pub use frontend::{Frontend, RingAddresses};
pub use inflight::{Geometry, InflightRegion};

/// A point in time by which an operation must have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// That much time from now.
    pub fn after(time: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(time).unwrap_or(now))
    }

    /// The earlier of both.
    pub fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }

    /// Time left; None once it is over.
    pub fn remaining(self) -> Option<Duration> {
        self.0
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
    }
}

/// One region of guest memory as a device process maps it.
#[derive(Clone, Debug)]
pub struct MemoryRegion {
    /// Guest-physical address.
    pub guest_base: u64,
    /// Length in bytes.
    pub size: u64,
    /// The memfd behind it.
    pub file: Arc<File>,
    /// Where the region starts in the file.
    pub file_offset: u64,
}

/// Where the memory that a device may map is described.
pub trait MemoryMap: Send + Sync {
    /// The regions to hand to the device, as they are now.
    fn regions(&self) -> Vec<MemoryRegion>;

    /// The same memory in the VMM's own address space: for ring indices after a device
    /// process has died, and for the control queues that the VMM serves itself.
    fn memory(&self) -> &MappedMemory;
}

/// Guest-physical address 0 in the address space of the messages. Not zero, so that no
/// back-end takes a valid address for a null pointer.
const USER_BASE: u64 = 1 << 44;

/// The address that stands for a guest-physical one in messages.
pub fn user_address(guest: u64) -> Option<u64> {
    guest.checked_add(USER_BASE)
}
