//! The memory device: from the machine's configuration to a `bulkhead-mem` process and its
//! arguments. VIRTIO 1.2 section 5.15. Called on the manager thread.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::device::{self, Device, Order, Site, Special};
use super::kinds;
use super::plugging::Plugging;
use crate::memory::Pluggable;
use crate::virtio::{ConfigSource, VirtioPciOptions};

/// The device's name: the machine has one.
pub const ID: &str = "memory";
/// fd of the bell: after the channels.
const BELL_FD: i32 = 5;
/// Most times per second that a process may ring: an honest one keeps a pace.
const MOST_RINGS: u32 = 1000;

/// What is known of a machine's memory device.
pub struct Memory {
    /// What is plugged.
    pub books: Plugging,
    /// Rung by the process when the guest wants something. It is shared: never read here.
    pub bell: OwnedFd,
    /// What is being done.
    pub busy: Option<Busy>,
    /// Regions in which nothing is plugged and which are there: a back-end could not let go.
    pub kept: Vec<usize>,
    /// The last wish that was answered, by incarnation and number: asked twice, the process
    /// may have named it once more meanwhile.
    pub answered: (u64, u64),
    /// Rings in the present second.
    rings: (Option<Instant>, u32),
}

/// A wish that is being carried out.
pub struct Busy {
    /// Its number, as the process has it.
    pub id: u64,
    /// Of which process.
    pub incarnation: u64,
    /// The wish.
    pub wish: bulkhead_proto::device::MemRequest,
}

impl Memory {
    /// The bell has rung. False: more often than it may.
    pub fn rang(&mut self, now: Instant) -> bool {
        let (since, count) = &mut self.rings;
        if since.is_none_or(|since| now.saturating_duration_since(since).as_secs() >= 1) {
            (*since, *count) = (Some(now), 0);
        }
        *count = count.saturating_add(1);
        *count <= MOST_RINGS
    }
}

/// Starts the process, and puts a function in front.
///
/// # Errors
/// One line that says what failed and the remedy; nothing stays behind.
pub fn spawn(area: &Pluggable, base: u64, site: &Site<'_>) -> Result<Device, String> {
    let kind = &kinds::MEM;
    let io = |e: std::io::Error| format!("device {ID}: {e}");
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let bell = eventfd(0, flags).map_err(|e| io(e.into()))?;
    let theirs = bell.as_fd().try_clone_to_owned().map_err(io)?;
    let args = [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--bell-fd",
        &BELL_FD.to_string(),
        "--area",
        &format!("{}:{}", area.start(), area.size()),
        "--block",
        &area.block().to_string(),
    ];
    let order = Order {
        id: ID,
        kind,
        variant: None,
        args: args.map(str::to_string).to_vec(),
        fds: vec![theirs],
        queues: 1,
        dial: None,
        mtu: 0,
        tap: String::new(),
        resources: bulkhead_proto::common::Resources::new(),
        block_device: String::new(),
    };
    let (mut process, frontend) = device::spawn(site.launcher, order)?;
    let regions = area.blocks_of_regions().collect();
    let books = Plugging::new(area.start(), area.block(), base, regions);
    process.changes.memory(books.update(0, true));
    let mut options = VirtioPciOptions::new(ID, kind.virtio_id, 1);
    options.config = ConfigSource::Fixed(books.config());
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, ID, process.incarnation, &why))?;
    Ok(Device {
        id: ID.to_string(),
        kind: kind.name,
        process: Some(process),
        special: Special::Memory(Box::new(Memory {
            books,
            bell,
            busy: None,
            kept: Vec::new(),
            answered: (0, 0),
            rings: (None, 0),
        })),
        function,
        address,
        port,
        queues: 1,
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted: [
            "control channel",
            "vhost-user channel",
            "eventfd of its requests",
        ]
        .map(str::to_string)
        .to_vec(),
    })
}
