//! Reads a block request out of a descriptor chain (virtio 1.2, 5.2.6) and decides what is
//! to be done with it. Pure: no I/O, so that it can be fuzzed as it stands.
//!
//! The driver may split header, data and status over descriptors as it likes: the header is
//! the first sixteen readable bytes, the status the last writable byte, the data what is
//! left. Called by a queue's worker.

use bulkhead_runtime::chain::{Buffer, Chain};
use bulkhead_runtime::memory::Memory;
use libc::iovec;

use crate::config::{F_DISCARD, F_SECURE_ERASE, F_WRITE_ZEROES};
use crate::disk::{Geometry, RangeOp};
use crate::host::SECTOR;
use crate::transfer::{Direction, Transfer};

/// Bytes of struct virtio_blk_req before the data.
const HEADER: u32 = 16;
/// Bytes of struct virtio_blk_discard_write_zeroes.
const SEGMENT: u32 = 16;
/// Shift from bytes to sectors.
const SECTOR_SHIFT: u32 = 9;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const T_SECURE_ERASE: u32 = 14;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
const FLAG_UNMAP: u32 = 1;

/// Most sectors of one range of a discard: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most ranges of a discard.
pub const MAX_DISCARD_SEGMENTS: u32 = 64;
/// Most sectors of one range of write-zeroes: 256 MiB, which may have to be written.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 19;
/// Most ranges of write-zeroes.
pub const MAX_ZEROES_SEGMENTS: u32 = 4;

/// Most sectors of one range of a secure erase: 32 MiB, because it may be slow and the queue
/// does nothing else meanwhile.
pub const MAX_ERASE_SECTORS: u32 = 1 << 16;
/// Most ranges of a secure erase. (Linux takes the lesser of this and the discard's for both.)
pub const MAX_ERASE_SEGMENTS: u32 = MAX_DISCARD_SEGMENTS;

/// Length of the device's name as GET_ID tells it.
pub const ID_BYTES: usize = 20;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
}

/// A chain that is no request at all: the ring is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Less than sixteen readable bytes.
    #[error("request header of {0} bytes")]
    Header(u32),
    /// Not one writable byte.
    #[error("request without a status byte")]
    NoStatus,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Move data; the transfer has been filled in.
    Transfer,
    /// Do this to ranges, which have been filled in.
    Ranges(RangeOp),
    /// Make what was written durable.
    Flush,
    /// Answer at once: with this status, and this many data bytes already written.
    Answer(Status, u32),
}

/// A request that has been understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Guest address of the status byte.
    pub status_addr: u64,
    /// What is to be done.
    pub action: Action,
}

/// A range of the disk, in bytes: whole blocks, on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// Its length; less than 4 GiB, not zero.
    pub len: u32,
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// What does not change.
    pub geometry: &'a Geometry,
    /// The disk's size now.
    pub sectors: u64,
    /// What the driver accepted.
    pub features: u64,
}

/// Reads the request in `chain`. For reads and writes, `transfer` is filled in; for discard,
/// write-zeroes and secure erase, `ranges`.
///
/// # Errors
/// It is no request at all.
#[inline]
pub fn parse(
    chain: &Chain,
    memory: &Memory,
    disk: &Rules<'_>,
    transfer: &mut Transfer,
    ranges: &mut Vec<Range>,
) -> Result<Request, Malformed> {
    let status_addr = last_byte(chain.writable()).ok_or(Malformed::NoStatus)?;
    let header = header(chain, memory).ok_or(Malformed::Header(chain.readable_len()))?;
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let data_in = chain.writable_len().saturating_sub(1);
    let data_out = chain.readable_len().saturating_sub(HEADER);

    let action = match kind {
        T_IN => match disk.range(sector, data_in) {
            None => Action::Answer(Status::IoErr, 0),
            Some(_) if data_in == 0 => Action::Answer(Status::Ok, 0),
            Some(offset) => {
                collect(
                    memory,
                    chain.writable(),
                    0,
                    data_in,
                    transfer.segments_mut(),
                );
                transfer.begin(Direction::Read, offset, data_in);
                Action::Transfer
            }
        },
        T_OUT if disk.geometry.readonly => Action::Answer(Status::IoErr, 0),
        T_OUT => match disk.range(sector, data_out) {
            None => Action::Answer(Status::IoErr, 0),
            Some(_) if data_out == 0 => Action::Answer(Status::Ok, 0),
            Some(offset) => {
                let segments = transfer.segments_mut();
                collect(memory, chain.readable(), HEADER, data_out, segments);
                transfer.begin(Direction::Write, offset, data_out);
                Action::Transfer
            }
        },
        T_FLUSH => Action::Flush,
        T_GET_ID => {
            let len = data_in.min(ID_BYTES as u32);
            let id = disk.geometry.serial.get(..len as usize).unwrap_or_default();
            scatter(memory, chain.writable(), id);
            Action::Answer(Status::Ok, len)
        }
        // Not offered where the disk is read-only; not to be sent if not accepted.
        T_DISCARD if disk.features & F_DISCARD != 0 => {
            range_request(kind, chain, memory, disk, ranges)
        }
        T_WRITE_ZEROES if disk.features & F_WRITE_ZEROES != 0 => {
            range_request(kind, chain, memory, disk, ranges)
        }
        T_SECURE_ERASE if disk.features & F_SECURE_ERASE != 0 => {
            range_request(kind, chain, memory, disk, ranges)
        }
        _ => Action::Answer(Status::Unsupported, 0),
    };
    Ok(Request {
        status_addr,
        action,
    })
}

/// Discard, write-zeroes and secure erase (5.2.6, 5.2.6.2): every range is checked before any is touched,
/// in a private copy.
fn range_request(
    kind: u32,
    chain: &Chain,
    memory: &Memory,
    disk: &Rules<'_>,
    ranges: &mut Vec<Range>,
) -> Action {
    let (max_segments, max_sectors) = match kind {
        T_DISCARD => (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS),
        T_SECURE_ERASE => (MAX_ERASE_SEGMENTS, MAX_ERASE_SECTORS),
        _ => (MAX_ZEROES_SEGMENTS, MAX_ZEROES_SECTORS),
    };
    let failed = Action::Answer(Status::IoErr, 0);
    let len = chain.readable_len().saturating_sub(HEADER);
    if len == 0 || !len.is_multiple_of(SEGMENT) || len / SEGMENT > max_segments {
        return failed;
    }
    let mut bytes = [0; (MAX_DISCARD_SEGMENTS * SEGMENT) as usize];
    let Some(bytes) = bytes.get_mut(..len as usize) else {
        return failed;
    };
    if !gather(memory, chain.readable(), HEADER, bytes) {
        return failed;
    }
    ranges.clear();
    let mut unmap = None;
    for segment in bytes.chunks_exact(SEGMENT as usize) {
        let Ok(segment) = <[u8; SEGMENT as usize]>::try_from(segment) else {
            return failed;
        };
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let known = if kind == T_WRITE_ZEROES {
            FLAG_UNMAP
        } else {
            0
        };
        if flags & !known != 0 {
            return Action::Answer(Status::Unsupported, 0);
        }
        if sectors > max_sectors {
            return failed;
        }
        // Cannot overflow: the limit is far below.
        let len = sectors << SECTOR_SHIFT;
        let Some(offset) = disk.range(sector, len) else {
            return failed;
        };
        if len > 0 {
            ranges.push(Range { offset, len });
        }
        // One request does one thing: where one range must keep its space, all do.
        unmap = Some(unmap.unwrap_or(true) && flags & FLAG_UNMAP != 0);
    }
    if ranges.is_empty() {
        return Action::Answer(Status::Ok, 0);
    }
    Action::Ranges(match (kind, unmap) {
        (T_DISCARD, _) => RangeOp::Discard,
        (T_SECURE_ERASE, _) => RangeOp::SecureErase,
        (_, Some(true)) => RangeOp::ZeroUnmap,
        _ => RangeOp::Zero,
    })
}

impl Rules<'_> {
    /// Byte offset of a range of whole sectors that lies on the disk.
    #[inline]
    fn range(&self, sector: u64, len: u32) -> Option<u64> {
        let end = sector.checked_add(u64::from(len >> SECTOR_SHIFT))?;
        let block = u64::from(self.geometry.block_size.max(SECTOR)) - 1;
        let offset = sector.checked_mul(u64::from(SECTOR))?;
        let whole = (offset | u64::from(len)) & block == 0;
        (whole && end <= self.sectors).then_some(offset)
    }
}

fn last_byte(buffers: &[Buffer]) -> Option<u64> {
    let last = buffers.iter().rev().find(|b| b.len > 0)?;
    last.addr.checked_add(u64::from(last.len) - 1)
}

/// The first sixteen readable bytes, copied once.
#[inline]
fn header(chain: &Chain, memory: &Memory) -> Option<[u8; HEADER as usize]> {
    let mut header = [0; HEADER as usize];
    let mut rest = header.as_mut_slice();
    for buffer in chain.readable() {
        let len = rest.len().min(buffer.len as usize);
        let (now, later) = rest.split_at_mut(len);
        if !memory.read(buffer.addr, now) {
            return None;
        }
        rest = later;
        if rest.is_empty() {
            return Some(header);
        }
    }
    None
}

/// Lists the pieces of `buffers`, from byte `skip` on, `len` bytes in all.
#[inline]
fn collect(memory: &Memory, buffers: &[Buffer], skip: u32, len: u32, into: &mut Vec<iovec>) {
    let (mut skip, mut left) = (skip, len);
    for buffer in buffers {
        let over = skip.min(buffer.len);
        skip = skip.saturating_sub(over);
        let take = buffer.len.saturating_sub(over).min(left);
        if take == 0 {
            continue;
        }
        left = left.saturating_sub(take);
        // The chain's buffers are guest memory of this snapshot: no piece can be missing.
        memory.for_each_slice(
            buffer.addr.saturating_add(u64::from(over)),
            u64::from(take),
            |slice| {
                into.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            },
        );
    }
}

/// Copies bytes out of `buffers`, from byte `skip` on; false if they are not so many.
fn gather(memory: &Memory, buffers: &[Buffer], skip: u32, into: &mut [u8]) -> bool {
    let (mut skip, mut rest) = (skip, into);
    for buffer in buffers {
        let over = skip.min(buffer.len);
        skip = skip.saturating_sub(over);
        let len = rest.len().min(buffer.len.saturating_sub(over) as usize);
        let (now, later) = rest.split_at_mut(len);
        let from = buffer.addr.saturating_add(u64::from(over));
        if !now.is_empty() && !memory.read(from, now) {
            return false;
        }
        rest = later;
    }
    rest.is_empty()
}

/// Writes `bytes` at the beginning of `buffers`.
fn scatter(memory: &Memory, buffers: &[Buffer], bytes: &[u8]) {
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
        memory.write(buffer.addr, now);
        rest = later;
    }
}
