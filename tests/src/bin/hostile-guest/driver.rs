//! A minimal virtio-pci driver (virtio 1.2, 3.1.1, 4.1.5) with one split ring and no
//! interrupts, which lets its caller put anything at all into the ring.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::function::{Function, Window};
use crate::raw::{PAGE, Pages, barrier};

/// Offsets in the common configuration (4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_MSIX_VECTOR: usize = 16;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_MSIX_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
}

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
/// DRIVER_OK
pub const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// DEVICE_NEEDS_RESET
pub const NEEDS_RESET: u8 = 0x40;
const NO_VECTOR: u16 = 0xffff;

/// VIRTIO_NET_F_CTRL_VQ (5.1.3)
const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_CTRL_RX
const F_CTRL_RX: u64 = 1 << 18;
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Size of the ring that cases use.
pub const SIZE: u16 = 16;
/// How long a device may take over anything.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// What each page is for.
pub mod page {
    pub const DESC: usize = 0;
    pub const AVAIL: usize = 1;
    pub const USED: usize = 2;
    pub const REQUEST: usize = 3;
    pub const DATA: usize = 4;
    pub const TABLE: usize = 5;
    pub const TABLE2: usize = 6;
    /// How many.
    pub const COUNT: usize = 7;
}

/// Where in the request's page its status byte lies.
pub const STATUS_BYTE: usize = 256;
/// What the status byte holds until the device writes it.
const UNWRITTEN: u8 = 0xee;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// How a queue is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub size: u16,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

/// What the device did about a ring.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// It set DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// The status byte, if it wrote one.
    pub status: Option<u8>,
}

/// What the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk, attacked on its first queue.
    Block,
    /// A network device of one queue pair, attacked on its control queue.
    Net,
}

/// Queues of a network device of one pair (5.1.2): receive, transmit, control.
pub const NET_QUEUES: [u16; 3] = [0, 1, 2];
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;

/// The device and the pages it is given.
pub struct Driver {
    pub kind: Kind,
    pub function: Function,
    pub pages: Pages,
    queue: Cell<u16>,
    accepted: Cell<u64>,
}

impl Driver {
    pub fn open(name: &str, kind: Kind) -> Result<Self, String> {
        // A page that moves is noticed; this makes it rare. Not every kernel has the switch.
        let _ = std::fs::write("/proc/sys/vm/compact_unevictable_allowed", "0");
        let pages = Pages::new(page::COUNT)?;
        Ok(Self {
            kind,
            function: Function::open(name)?,
            pages,
            queue: Cell::new(if kind == Kind::Net { CONTROL } else { 0 }),
            accepted: Cell::new(0),
        })
    }

    /// Chooses the queue that is set up and kicked from now on.
    pub fn choose(&self, queue: u16) {
        self.queue.set(queue);
    }

    /// The queue that cases attack.
    pub fn choose_attacked(&self) {
        self.choose(if self.kind == Kind::Net { CONTROL } else { 0 });
    }

    /// A register of the common configuration.
    fn at(&self, field: usize) -> usize {
        self.function.common.offset.saturating_add(field)
    }

    fn common(&self) -> Result<&crate::raw::Mapping, String> {
        self.function.bar(self.function.common)
    }

    pub fn write8(&self, field: usize, value: u8) -> Result<(), String> {
        self.common()?.w8(self.at(field), value)
    }

    pub fn write16(&self, field: usize, value: u16) -> Result<(), String> {
        self.common()?.w16(self.at(field), value)
    }

    pub fn write32(&self, field: usize, value: u32) -> Result<(), String> {
        self.common()?.w32(self.at(field), value)
    }

    /// Upper half first: the storm relies on it.
    pub fn write64(&self, field: usize, value: u64) -> Result<(), String> {
        self.write32(field + 4, (value >> 32) as u32)?;
        self.write32(field, value as u32)
    }

    fn read16(&self, field: usize) -> Result<u16, String> {
        self.common()?.r16(self.at(field))
    }

    pub fn status(&self) -> Result<u8, String> {
        self.common()?.r8(self.at(common::STATUS))
    }

    /// Resets the device and waits until it says that it is (4.1.4.3.2).
    pub fn reset(&self) -> Result<(), String> {
        self.write8(common::STATUS, 0)?;
        let end = Instant::now() + DEADLINE;
        loop {
            match self.status()? {
                0 => return Ok(()),
                status if Instant::now() > end => {
                    return Err(format!("status {status:#x} {DEADLINE:?} after a reset"));
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Everything up to and with FEATURES_OK.
    pub fn negotiate(&self) -> Result<(), String> {
        self.reset()?;
        self.write8(common::STATUS, ACKNOWLEDGE)?;
        self.write8(common::STATUS, ACKNOWLEDGE | DRIVER)?;
        let mut offered = 0;
        for half in 0..2 {
            self.write32(common::DEVICE_FEATURE_SELECT, half)?;
            let bits = self.common()?.r32(self.at(common::DEVICE_FEATURE))?;
            offered |= u64::from(bits) << (32 * half);
        }
        if offered & F_VERSION_1 == 0 {
            return Err(format!("features {offered:#x} lack VERSION_1"));
        }
        let mut wanted = F_VERSION_1 | F_INDIRECT_DESC | F_ACCESS_PLATFORM;
        if self.kind == Kind::Net {
            wanted |= F_CTRL_VQ | F_CTRL_RX;
        }
        let accepted = offered & wanted;
        self.accepted.set(accepted);
        for half in 0..2 {
            self.write32(common::DRIVER_FEATURE_SELECT, half)?;
            self.write32(common::DRIVER_FEATURE, (accepted >> (32 * half)) as u32)?;
        }
        self.write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        match self.status()? {
            status if status & FEATURES_OK == 0 => Err(format!(
                "features {accepted:#x} refused: status {status:#x}"
            )),
            _ => Ok(()),
        }
    }

    /// A ring as it should be.
    pub fn honest(&self) -> Result<Setup, String> {
        Ok(Setup {
            size: SIZE,
            desc: self.pages.address(page::DESC)?,
            driver: self.pages.address(page::AVAIL)?,
            device: self.pages.address(page::USED)?,
        })
    }

    /// Sets the chosen queue up and enables it.
    pub fn queue(&self, setup: Setup) -> Result<(), String> {
        self.write16(common::CONFIG_MSIX_VECTOR, NO_VECTOR)?;
        self.write16(common::QUEUE_SELECT, self.queue.get())?;
        self.write16(common::QUEUE_MSIX_VECTOR, NO_VECTOR)?;
        self.write16(common::QUEUE_SIZE, setup.size)?;
        self.write64(common::QUEUE_DESC, setup.desc)?;
        self.write64(common::QUEUE_DRIVER, setup.driver)?;
        self.write64(common::QUEUE_DEVICE, setup.device)?;
        self.write16(common::QUEUE_ENABLE, 1)
    }

    /// DRIVER_OK.
    pub fn go(&self) -> Result<(), String> {
        self.write8(
            common::STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        )
    }

    /// Rings the chosen queue's doorbell.
    pub fn kick(&self) -> Result<(), String> {
        self.write16(common::QUEUE_SELECT, self.queue.get())?;
        let queue = usize::from(self.read16(common::QUEUE_NOTIFY_OFF)?);
        let Window { offset, .. } = self.function.notify;
        let bell = queue
            .saturating_mul(self.function.notify_multiplier)
            .saturating_add(offset);
        barrier();
        self.function
            .bar(self.function.notify)?
            .w16(bell, self.queue.get())
    }

    /// Guest-physical address of a byte of a page.
    pub fn address(&self, page: usize, offset: usize) -> Result<u64, String> {
        Ok(self.pages.address(page)?.wrapping_add(offset as u64))
    }

    /// Writes entry `index` of the descriptor table in `table`.
    pub fn desc(&self, table: usize, index: u16, desc: Desc) -> Result<(), String> {
        let (bytes, at) = (self.pages.bytes(), table * PAGE + usize::from(index) * 16);
        bytes.w64(at, desc.addr)?;
        bytes.w32(at + 8, desc.len)?;
        bytes.w16(at + 12, desc.flags)?;
        bytes.w16(at + 14, desc.next)
    }

    /// The chain as a table of descriptors, each linked to the one behind it.
    pub fn chain(&self, table: usize, chain: &[Desc]) -> Result<(), String> {
        for (desc, index) in chain.iter().zip(0..) {
            self.desc(
                table,
                index,
                Desc {
                    next: index + 1,
                    ..*desc
                },
            )?;
        }
        Ok(())
    }

    /// The header of a request (5.2.6), and its status byte unwritten.
    pub fn request(&self, kind: u32, sector: u64) -> Result<(), String> {
        let (bytes, at) = (self.pages.bytes(), page::REQUEST * PAGE);
        bytes.w32(at, kind)?;
        bytes.w32(at + 4, 0)?;
        bytes.w64(at + 8, sector)?;
        bytes.w8(at + STATUS_BYTE, UNWRITTEN)
    }

    /// The descriptor of the header.
    pub fn header(&self) -> Result<Desc, String> {
        let addr = self.address(page::REQUEST, 0)?;
        Ok(Desc {
            addr,
            len: 16,
            flags: NEXT,
            next: 0,
        })
    }

    /// The descriptor of `len` bytes that the device is to write.
    pub fn data(&self, len: u32) -> Result<Desc, String> {
        let addr = self.address(page::DATA, 0)?;
        Ok(Desc {
            addr,
            len,
            flags: NEXT | WRITE,
            next: 0,
        })
    }

    /// The descriptor of the status byte, which ends the chain.
    pub fn status_desc(&self) -> Result<Desc, String> {
        let addr = self.address(page::REQUEST, STATUS_BYTE)?;
        Ok(Desc {
            addr,
            len: 1,
            flags: WRITE,
            next: 0,
        })
    }

    /// Makes `heads` available, all at once.
    pub fn offer(&self, heads: &[u16]) -> Result<(), String> {
        let (bytes, at) = (self.pages.bytes(), page::AVAIL * PAGE);
        for (n, head) in heads.iter().enumerate() {
            bytes.w16(at + 4 + 2 * n, *head)?;
        }
        barrier();
        self.set_avail(heads.len() as u16)
    }

    /// Writes the available index.
    pub fn set_avail(&self, index: u16) -> Result<(), String> {
        self.pages.bytes().w16(page::AVAIL * PAGE + 2, index)?;
        barrier();
        Ok(())
    }

    /// Waits until the device gives up, or has used `completions` chains.
    pub fn wait(&self, completions: u16, limit: Duration) -> Result<Outcome, String> {
        let end = Instant::now() + limit;
        loop {
            let late = Instant::now() > end;
            // The index before the status: a device that completes and then gives up is not missed.
            let used = self.pages.bytes().r16(page::USED * PAGE + 2)?;
            barrier();
            let needs_reset = self.status()? & NEEDS_RESET != 0;
            if needs_reset || late || used >= completions {
                let status = self.pages.bytes().r8(page::REQUEST * PAGE + STATUS_BYTE)?;
                let status = (status != UNWRITTEN && used > 0).then_some(status);
                return Ok(Outcome {
                    needs_reset,
                    status,
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What an honest driver does after DEVICE_NEEDS_RESET: resets the device and uses it. Of a
    /// disk the first eight bytes are returned, of a network device zero.
    pub fn recover(&self) -> Result<u64, String> {
        match self.kind {
            Kind::Block => self.read_sector(),
            Kind::Net => {
                self.command_and_send()?;
                Ok(0)
            }
        }
    }

    /// A command on the control queue (5.1.6.5.1: promiscuous mode off) is answered, with OK if
    /// the device has it and with ERR if not, and a frame on the transmit queue is used.
    fn command_and_send(&self) -> Result<(), String> {
        self.reset()?;
        self.pages.clear()?;
        self.negotiate()?;
        self.choose(CONTROL);
        // Class 0, command 0, value 0: the page is zero. The status byte is not.
        self.request(0, 0)?;
        let command = Desc {
            len: 3,
            ..self.header()?
        };
        self.chain(page::DESC, &[command, self.status_desc()?])?;
        self.offer(&[0])?;
        self.queue(self.honest()?)?;
        self.go()?;
        self.kick()?;
        let answer = self.wait(1, DEADLINE)?;
        self.reset()?;
        self.pages.clear()?;
        self.negotiate()?;
        self.choose(TRANSMIT);
        // The header of 12 bytes and a frame of 60, zero but for the addresses.
        let at = page::DATA * PAGE;
        for place in [12, 18] {
            self.pages.bytes().w8(at + place, 2)?;
        }
        let frame = Desc {
            len: 72,
            flags: 0,
            ..self.data(0)?
        };
        self.chain(page::DESC, &[frame])?;
        self.offer(&[0])?;
        self.queue(self.honest()?)?;
        self.go()?;
        self.kick()?;
        let sent = self.wait(1, DEADLINE)?;
        let used = self.pages.bytes().r16(page::USED * PAGE + 2)?;
        self.choose_attacked();
        self.reset()?;
        let expected = u8::from(self.accepted.get() & F_CTRL_RX == 0);
        match (answer, sent, used) {
            (
                Outcome {
                    needs_reset: false,
                    status: Some(status),
                },
                Outcome {
                    needs_reset: false, ..
                },
                1,
            ) if status == expected => Ok(()),
            other => Err(format!("a command or a frame is not taken: {other:?}")),
        }
    }

    fn read_sector(&self) -> Result<u64, String> {
        self.reset()?;
        self.pages.clear()?;
        self.negotiate()?;
        self.request(0, 0)?;
        self.chain(
            page::DESC,
            &[self.header()?, self.data(512)?, self.status_desc()?],
        )?;
        self.offer(&[0])?;
        self.queue(self.honest()?)?;
        self.go()?;
        self.kick()?;
        let outcome = self.wait(1, DEADLINE)?;
        let first = self.pages.bytes().r64(page::DATA * PAGE)?;
        self.reset()?;
        match outcome {
            Outcome {
                needs_reset: false,
                status: Some(0),
            } => Ok(first),
            other => Err(format!("sector 0 cannot be read: {other:?}")),
        }
    }
}
