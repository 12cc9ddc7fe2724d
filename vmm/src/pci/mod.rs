//! PCI Express: one root complex with root ports, and what functions behind them share
//! (configuration space, BAR decoding, MSI-X). PCI Express Base Specification 5.0
//! chapter 7 and PCI Local Bus 3.0 chapter 6.
//!
//! vCPU threads enter through [`RootComplex`]'s ECAM and CF8/CFC bus devices; the
//! manager thread attaches and detaches functions. Lock order, outermost first: a
//! function's own locks, [`BarDecoder`], a [`BarListener`]'s lock. Nothing is locked
//! across functions, so that one that works for long delays only its own callers.

mod bar;
mod config;
#[cfg(test)]
pub(crate) mod mock_hypervisor;
mod msix;
mod root_complex;
mod root_port;

use std::fmt;

pub use bar::{AddressRange, BarClaim, BarDecoder, BarListener, Windows};
pub use config::{ConfigSpace, Identity, reg};
pub use msix::{MAX_VECTORS, MSIX_CAPABILITY_ID, Msix, NO_VECTOR, VECTOR_ENTRY_SIZE};
pub use root_complex::{PciDeviceInfo, PortInfo, RootComplex, is_same};
pub use root_port::PortConfig;

/// Command register: memory space enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;

/// Where a function answers: segment 0, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus number as currently programmed.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "0000:{:02x}:{:02x}.{}",
            self.bus, self.device, self.function
        )
    }
}

/// Which kind of window a BAR wants to lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB whose reads may have side effects.
    Memory32,
    /// 64-bit prefetchable memory.
    Prefetchable64,
}

/// Waits for the end of a reset.
pub type Reset = Box<dyn FnOnce() + Send>;

/// A function of a device on the bus. `offset` is below 4096 and `data` is 1, 2 or 4
/// bytes long and naturally aligned. Called from any vCPU thread, several at once.
pub trait PciFunction: Send + Sync {
    /// The name by which the API knows the device.
    fn id(&self) -> &str;
    /// Answers a configuration read by filling all of `data`.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Takes a configuration write.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Asks where each BAR shall be, before the guest sees the function; decoding stays
    /// off until the guest enables it. `place` answers None when there is no room.
    fn place_bars(&self, place: &mut dyn FnMut(BarKind, u64) -> Option<u64>);
    /// A conventional reset through the port above (secondary bus reset).
    fn bus_reset(&self);
    /// Begins to reset the device and all of the function's registers, as power that goes off and
    /// on does; who calls what comes back waits for the end. Its BARs are to be placed anew.
    fn begin_reset(&self) -> Reset {
        self.bus_reset();
        Box::new(|| ())
    }
    /// The function has left the bus: stop decoding, drop doorbells and interrupts.
    fn unplug(&self);
    /// Where a driver that holds the function now will write a zero byte when it lets go of it,
    /// a guest-physical address in one of its BARs; `None`: no driver holds it.
    fn release_register(&self) -> Option<u64>;
}

/// Why the root complex refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// A port declared twice, or outside devices 1 to 31 of bus 0.
    #[error("PCI port {name} at device {device}: {why}")]
    BadPort {
        /// The port's name.
        name: String,
        /// Its device number.
        device: u8,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The windows are too small for the declared ports.
    #[error("the PCI windows are too small for {ports} root ports")]
    WindowsTooSmall {
        /// How many ports were asked for.
        ports: usize,
    },
    /// No port of that name.
    #[error("there is no PCI port named {0}; list the ports that were declared")]
    NoSuchPort(String),
    /// The port has a device already.
    #[error("PCI port {0} is occupied; choose another or remove its device first")]
    Occupied(String),
    /// The guest has not let go yet of what was pulled out of it.
    #[error(
        "port {0}: the guest has not let go yet of the device that was pulled out of it: name another, or retry when it has"
    )]
    Vacating(String),
    /// The port has no device, or another one.
    #[error("PCI port {0} does not have the device")]
    Empty(String),
    /// No room for another capability.
    #[error("the configuration space has no room for capability {0:#x}")]
    ConfigSpaceFull(u8),
    /// More interrupt vectors than MSI-X or we allow.
    #[error("{0} MSI-X vectors are outside 1 to 256")]
    BadVectorCount(u16),
    /// An eventfd could not be made.
    #[error("cannot create an eventfd for an interrupt vector: {0}; raise the open files limit")]
    EventFd(String),
}
