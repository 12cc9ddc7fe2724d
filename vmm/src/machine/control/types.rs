//! What a device's control channel is asked for and what it tells the manager.

use std::time::{Duration, Instant};

use bulkhead_proto::device::{BlkUpdate, ConsoleUpdate, MemRequest, MemUpdate, NetUpdate};

/// What a client asks of a device.
#[derive(Debug)]
pub enum Task {
    /// Its counters.
    Stats,
    /// A disk's size and limits.
    UpdateDisk {
        /// Have the launcher grow the file first.
        grow_to: Option<u64>,
        /// The size it has when nothing is said of it.
        size: u64,
        /// What the device is told.
        update: BlkUpdate,
    },
    /// A network device's link and limits.
    UpdateNet(NetUpdate),
    /// Sizes of consoles.
    UpdateConsole(ConsoleUpdate),
    /// What the guest is to be asked to have plugged.
    UpdateMemory(MemUpdate),
    /// Finish what is in flight and take nothing new.
    Drain {
        /// How long it may take.
        limit: Duration,
    },
    /// Take requests again.
    Resume,
    /// Make room for a process of another binary.
    Replace {
        /// The binary.
        binary: String,
        /// How long what is in flight may take to finish.
        limit: Duration,
    },
}

/// What the manager should know of.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// The device is well; of each ring, whether it says why it makes no progress, if so.
    Health {
        /// By the numbers of the rings.
        excused: Vec<bool>,
    },
    /// The host failed some of the device's requests.
    HostErrors {
        /// How many since the last look.
        count: u64,
        /// The last one's errno.
        errno: i32,
        /// And sector.
        sector: u64,
    },
    /// What it serves the guest from is gone; told once.
    HostGone,
    /// A disk was changed; the size it has now.
    DiskUpdated {
        /// What the device was told.
        update: BlkUpdate,
        /// In bytes; 0 when only the device knows.
        size: u64,
    },
    /// A network device was changed.
    NetUpdated(NetUpdate),
    /// Consoles are another size.
    ConsoleUpdated(ConsoleUpdate),
    /// It may want something of the VMM.
    Asks,
    /// It wants this.
    Wants {
        /// Counts its requests.
        id: u64,
        /// What.
        request: MemRequest,
    },
    /// The device has nothing in flight and takes nothing new.
    Drained,
    /// The device takes requests.
    Resumed,
    /// The device did not drain in time and takes requests again.
    DrainFailed,
    /// A process of this binary is wanted; other requests wait until
    /// [`end_replacement`](ControlChannel::end_replacement) or
    /// [`succeed`](ControlChannel::succeed).
    Replace {
        /// The binary.
        binary: String,
    },
    /// The device has nothing in flight, and its successor may have the rings.
    Quiet,
    /// It does not finish what is in flight in time: its successor is not to have them.
    NotQuiet(String),
}

/// Why the process must be given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// It hung up; its end may say more.
    #[error("its process closed the control channel")]
    HungUp,
    /// It did not answer in time.
    #[error("its process {0}")]
    Deadline(String),
    /// It said what it must not.
    #[error("its process {0}")]
    Protocol(String),
}

/// Who grows files: the launcher.
pub trait Grower {
    /// Begins to grow a file of a device; the answer comes with the ticket.
    ///
    /// # Errors
    /// One line: why it cannot even be asked.
    fn begin_grow(&self, device: &str, index: u32, size: u64) -> Result<u64, String>;
}

/// What a step of a channel needs and what comes of it.
pub struct Turn<'a> {
    /// Who grows files.
    pub grower: &'a dyn Grower,
    /// The time.
    pub now: Instant,
    /// What the manager should know of; added to.
    pub notices: &'a mut Vec<Notice>,
}
