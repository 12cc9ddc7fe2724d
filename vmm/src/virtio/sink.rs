//! The queues by which the driver of a console sends (VIRTIO 1.2 section 5.3.2), where nobody serves
//! it any more: what it sends is given back unread. Linux waits for that on a vCPU that does nothing
//! else, with interrupts off at times.
//!
//! The rings are the guest's: of a chain only its head is looked at, and a ring that breaks the
//! rules stops until a reset. The function's own thread calls this under the function's lock.

use std::sync::atomic::Ordering;

use crate::memory::MappedMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::common::CommonConfig;
use super::control::{BATCH, Malformed, Served, ring_of, wants_interrupts};

/// The queues, by their numbers.
pub struct Sinks {
    queues: Vec<(u16, Queue)>,
}

impl Sinks {
    /// Goes on where whoever served these rings before has come to. Where the rings lie has been
    /// checked.
    pub fn new(common: &CommonConfig, memory: &MappedMemory) -> Self {
        let queues = common.queues().filter_map(|(index, queue)| {
            // Every second one is a port's, or the control queue, from the driver.
            if !queue.enabled || index.is_multiple_of(2) {
                return None;
            }
            let mut ring = ring_of(queue, common.accepted())?;
            let used = ring.used_idx(memory, Ordering::Acquire).ok()?;
            ring.set_next_avail(used.0);
            ring.set_next_used(used.0);
            Some((index, ring))
        });
        Self {
            queues: queues.collect(),
        }
    }

    /// Whose doorbells are to be listened to.
    pub fn queues(&self) -> impl Iterator<Item = u16> {
        self.queues.iter().map(|(index, _)| *index)
    }

    /// A turn at each.
    pub fn serve(&mut self, memory: &MappedMemory) -> Vec<(u16, Result<Served, Malformed>)> {
        let mut all = Vec::new();
        self.queues.retain_mut(|(index, ring)| {
            let served = turn(ring, memory);
            all.push((*index, served));
            served.is_ok()
        });
        all
    }
}

fn turn(ring: &mut Queue, memory: &MappedMemory) -> Result<Served, Malformed> {
    let (mut used, mut more) = (false, true);
    ring.disable_notification(memory).map_err(|_| Malformed)?;
    for _ in 0..BATCH {
        let chain = ring.iter(memory).map_err(|_| Malformed)?.next();
        let Some(chain) = chain else {
            if ring.enable_notification(memory).map_err(|_| Malformed)? {
                continue;
            }
            more = false;
            break;
        };
        let head = chain.head_index();
        ring.add_used(memory, head, 0).map_err(|_| Malformed)?;
        used = true;
    }
    let signal = used
        && ring.needs_notification(memory).map_err(|_| Malformed)?
        && (ring.event_idx_enabled() || wants_interrupts(ring, memory)?);
    Ok(Served { signal, more })
}

#[cfg(test)]
#[path = "sink_tests.rs"]
mod tests;
