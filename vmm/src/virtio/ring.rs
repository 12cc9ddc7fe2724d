//! The indices of a split ring as they stand in guest memory (VIRTIO 1.2 sections 2.7.6
//! and 2.7.8). What stands there is the guest's word, or that of a process that has died:
//! it is handed on, never relied upon.

use std::sync::atomic::Ordering;

use crate::memory::MappedMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::vhost_user::RingAddresses;

/// Behind the flags.
const INDEX: u64 = 2;

/// How far driver and device have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indices {
    /// What the driver has made available.
    pub available: u16,
    /// What the device has used.
    pub used: u16,
}

/// Reads them; `None` when the ring is not in memory.
pub fn indices(memory: &MappedMemory, ring: &RingAddresses) -> Option<Indices> {
    let read = |at: u64| {
        let address = GuestAddress(at.checked_add(INDEX)?);
        let index: u16 = memory.load(address, Ordering::Acquire).ok()?;
        Some(u16::from_le(index))
    };
    // Used first: it never passes the other.
    let used = read(ring.used)?;
    Some(Indices {
        available: read(ring.available)?,
        used,
    })
}
