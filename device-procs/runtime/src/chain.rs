//! Walks a descriptor chain (virtio 1.2, 2.7.5) without trusting a word of it.
//!
//! Every descriptor is copied once and judged by its copy. A chain that loops is one that
//! is longer than its table, so the count bounds the walk. What comes out is a list of
//! buffers that are inside guest memory, device-readable ones first.

use vm_memory::{Bytes, VolatileSlice};

use crate::memory::Memory;

/// Most descriptors in one indirect table. The specification's bound is the ring size;
/// Linux and libblkio use tables longer than a small ring, so QEMU's limit is taken.
pub const MAX_CHAIN: u16 = 1024;

const DESC_SIZE: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// What makes a chain malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the table has: the chain loops.
    #[error("loops or is longer than its table")]
    Loop,
    /// A `next` field beyond the table.
    #[error("next descriptor {0} is beyond the table")]
    Next(u16),
    /// A buffer that is not wholly in guest memory, or whose end overflows.
    #[error("buffer at {addr:#x} of {len:#x} bytes is not guest memory")]
    Buffer {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The buffers add up to 4 GiB or more.
    #[error("total length overflows")]
    Length,
    /// A device-readable buffer behind a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect descriptor that was not negotiated, is nested, or goes on.
    #[error("indirect descriptor where none is allowed")]
    Indirect,
    /// An indirect table that is empty, no multiple of 16 bytes, or too long.
    #[error("indirect table of {0} bytes")]
    IndirectLength(u32),
}

/// One buffer of a chain: inside guest memory when the chain was walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A validated chain. Reused from request to request so that walking does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    buffers: Vec<Buffer>,
    /// How many of the buffers are device-readable.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn parse(raw: [u8; 16]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = raw;
        Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// The device-readable buffers, in order.
    #[inline]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or(&[])
    }

    /// The device-writable buffers, in order.
    #[inline]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or(&[])
    }

    /// Bytes in all readable buffers.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes in all writable buffers.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies out of the readable buffers, from an offset in all of them on; false: they do not
    /// have as much, or are no memory of the guest's any more.
    #[must_use]
    pub fn read(&self, memory: &Memory, mut skip: usize, into: &mut [u8]) -> bool {
        let mut rest = into;
        for buffer in self.readable() {
            if rest.is_empty() {
                break;
            }
            let len = usize::try_from(buffer.len).unwrap_or(usize::MAX);
            let passed = skip.min(len);
            skip = skip.saturating_sub(passed);
            let count = len.saturating_sub(passed).min(rest.len());
            let Some((part, behind)) = rest.split_at_mut_checked(count) else {
                return false;
            };
            let at = buffer.addr.saturating_add(passed as u64);
            if !memory.read(at, part) {
                return false;
            }
            rest = behind;
        }
        rest.is_empty()
    }

    /// Copies into the writable buffers, from their beginning on; false: they do not take as much,
    /// or are no memory of the guest's any more.
    #[must_use]
    pub fn write(&self, memory: &Memory, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for buffer in self.writable() {
            let len = usize::try_from(buffer.len).unwrap_or(usize::MAX);
            let Some((part, behind)) = rest.split_at_checked(len.min(rest.len())) else {
                return false;
            };
            if !memory.write(buffer.addr, part) {
                return false;
            }
            rest = behind;
        }
        rest.is_empty()
    }

    /// Replaces this chain with the one that starts at `head` of `table`, a descriptor
    /// table of `size` entries.
    #[inline]
    pub fn walk(
        &mut self,
        memory: &Memory,
        table: &VolatileSlice<'_>,
        size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), ChainError> {
        self.clear();
        let mut index = head;
        for _ in 0..size {
            let mut raw = [0; DESC_SIZE as usize];
            table
                .read_slice(&mut raw, usize::from(index) * DESC_SIZE as usize)
                .map_err(|_| ChainError::Next(index))?;
            let desc = Descriptor::parse(raw);
            if desc.flags & F_INDIRECT != 0 {
                if !indirect_allowed || desc.flags & F_NEXT != 0 {
                    return Err(ChainError::Indirect);
                }
                return self.walk_indirect(memory, desc.addr, desc.len);
            }
            self.push(memory, &desc)?;
            if desc.flags & F_NEXT == 0 {
                return Ok(());
            }
            if desc.next >= size {
                return Err(ChainError::Next(desc.next));
            }
            index = desc.next;
        }
        Err(ChainError::Loop)
    }

    fn walk_indirect(&mut self, memory: &Memory, addr: u64, len: u32) -> Result<(), ChainError> {
        let entries = match u16::try_from(u64::from(len) / DESC_SIZE) {
            Ok(n) if n > 0 && n <= MAX_CHAIN && u64::from(len).is_multiple_of(DESC_SIZE) => n,
            _ => return Err(ChainError::IndirectLength(len)),
        };
        if !memory.contains(addr, u64::from(len)) {
            return Err(ChainError::Buffer { addr, len });
        }
        let mut index = 0;
        for _ in 0..entries {
            let mut raw = [0; DESC_SIZE as usize];
            // Cannot overflow: the whole table was found inside guest memory.
            if !memory.read(addr + u64::from(index) * DESC_SIZE, &mut raw) {
                return Err(ChainError::Buffer { addr, len });
            }
            let desc = Descriptor::parse(raw);
            if desc.flags & F_INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            self.push(memory, &desc)?;
            if desc.flags & F_NEXT == 0 {
                return Ok(());
            }
            if desc.next >= entries {
                return Err(ChainError::Next(desc.next));
            }
            index = desc.next;
        }
        Err(ChainError::Loop)
    }

    #[inline]
    fn push(&mut self, memory: &Memory, desc: &Descriptor) -> Result<(), ChainError> {
        let &Descriptor { addr, len, .. } = desc;
        if !memory.contains(addr, u64::from(len)) {
            return Err(ChainError::Buffer { addr, len });
        }
        let writable = desc.flags & F_WRITE != 0;
        if writable {
            self.writable_len = self
                .writable_len
                .checked_add(len)
                .ok_or(ChainError::Length)?;
        } else {
            if self.buffers.len() > self.readable {
                return Err(ChainError::Order);
            }
            self.readable_len = self
                .readable_len
                .checked_add(len)
                .ok_or(ChainError::Length)?;
            self.readable += 1;
        }
        self.buffers.push(Buffer { addr, len });
        Ok(())
    }

    fn clear(&mut self) {
        self.buffers.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }
}
