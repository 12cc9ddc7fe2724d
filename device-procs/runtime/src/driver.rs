//! The driver's side of a split ring, for tests only: it writes whatever it is told to, be
//! it sense or nonsense.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::memory::{Memory, Region};
use crate::ring::RingLayout;
use crate::sys;

/// VIRTQ_DESC_F_NEXT
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT
pub const INDIRECT: u16 = 4;

/// What the test front-end adds to a guest physical address to get its own.
pub const USER_BASE: u64 = 0x7000_0000_0000;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Length.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// Next descriptor.
    pub next: u16,
}

impl Desc {
    /// The descriptor as it lies in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut raw = [0; 16];
        let parts = self.addr.to_le_bytes().into_iter();
        let parts = parts.chain(self.len.to_le_bytes());
        let parts = parts.chain(self.flags.to_le_bytes());
        let parts = parts.chain(self.next.to_le_bytes());
        for (to, from) in raw.iter_mut().zip(parts) {
            *to = from;
        }
        raw
    }
}

/// Guest memory of one region at `gpa`, in a file that it shares with nobody.
pub fn guest(gpa: u64, size: u64) -> std::io::Result<(std::fs::File, Arc<Memory>)> {
    let file = sys::memfd("guest")?;
    file.set_len(size)?;
    let region = Region::map(&file, gpa, size, USER_BASE.wrapping_add(gpa), 0)
        .map_err(std::io::Error::other)?;
    let memory = Memory::new(vec![region]).map_err(std::io::Error::other)?;
    Ok((file, Arc::new(memory)))
}

/// A split ring seen from the driver. All parts lie one after another from `base` on.
#[derive(Debug)]
pub struct DriverRing {
    memory: Arc<Memory>,
    base: u64,
    size: u16,
    avail_idx: u16,
    seen_used: u16,
}

impl DriverRing {
    /// A ring of `size` descriptors at guest address `base` (a multiple of 16).
    pub fn new(memory: Arc<Memory>, base: u64, size: u16) -> Self {
        Self {
            memory,
            base,
            size,
            avail_idx: 0,
            seen_used: 0,
        }
    }

    /// Bytes that a ring of `size` takes.
    pub fn bytes(size: u16) -> u64 {
        let n = u64::from(size);
        16 * n + (6 + 2 * n).next_multiple_of(4) + 6 + 8 * n
    }

    /// Guest address of the available ring.
    pub fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// Guest address of the used ring.
    pub fn used(&self) -> u64 {
        self.avail() + (6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where it lies for the front-end.
    pub fn layout(&self) -> RingLayout {
        RingLayout {
            size: u32::from(self.size),
            desc: USER_BASE + self.base,
            avail: USER_BASE + self.avail(),
            used: USER_BASE + self.used(),
        }
    }

    /// Zeroes all of it and begins at index 0.
    pub fn reset(&mut self) {
        let bytes = Self::bytes(self.size);
        self.memory.write(self.base, &vec![0; bytes as usize]);
        self.avail_idx = 0;
        self.seen_used = 0;
    }

    /// Writes a descriptor.
    pub fn desc(&self, index: u16, desc: Desc) {
        let at = self.base + 16 * u64::from(index);
        self.memory.write(at, &desc.bytes());
    }

    /// Writes descriptors from `first` on as one chain, adding NEXT as needed.
    pub fn chain(&self, first: u16, descs: &[Desc]) {
        for (i, desc) in (first..).zip(descs) {
            let last = usize::from(i - first) + 1 == descs.len();
            let flags = if last { desc.flags } else { desc.flags | NEXT };
            self.desc(
                i,
                Desc {
                    flags,
                    next: i + 1,
                    ..*desc
                },
            );
        }
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory
            .write(self.avail() + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Writes the available index.
    pub fn set_avail_idx(&mut self, idx: u16) {
        fence(Ordering::SeqCst);
        self.avail_idx = idx;
        self.memory.write(self.avail() + 2, &idx.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Writes the flags of the available ring.
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory.write(self.avail(), &flags.to_le_bytes());
    }

    /// Writes used_event.
    pub fn set_used_event(&self, event: u16) {
        let at = self.avail() + 4 + 2 * u64::from(self.size);
        self.memory.write(at, &event.to_le_bytes());
    }

    fn load(&self, at: u64) -> u16 {
        let mut raw = [0; 2];
        self.memory.read(at, &mut raw);
        u16::from_le_bytes(raw)
    }

    /// Flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        self.load(self.used())
    }

    /// avail_event.
    pub fn avail_event(&self) -> u16 {
        self.load(self.used() + 4 + 8 * u64::from(self.size))
    }

    /// The used index.
    pub fn used_idx(&self) -> u16 {
        fence(Ordering::SeqCst);
        let idx = self.load(self.used() + 2);
        fence(Ordering::SeqCst);
        idx
    }

    /// Asks for an interrupt for the next completion; true if it is there already.
    pub fn want_interrupt(&self) -> bool {
        self.set_used_event(self.seen_used);
        self.used_idx() != self.seen_used
    }

    /// The next completion, as (head, written), if there is one.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.seen_used {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.seen_used % self.size);
        let mut raw = [0; 8];
        self.memory.read(at, &mut raw);
        self.seen_used = self.seen_used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = raw;
        Some((
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        ))
    }
}
