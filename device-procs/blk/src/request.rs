//! Reads a block request out of a descriptor chain (virtio 1.2, 5.2.6) and decides what is
//! to be done with it. Pure: no I/O, so that it can be fuzzed as it stands.
//!
//! The driver may split header, data and status over descriptors as it likes: the header is
//! the first sixteen readable bytes, the status the last writable byte, the data what is
//! left. Called by a queue's worker.

use bulkhead_runtime::chain::{Buffer, Chain};
use bulkhead_runtime::memory::Memory;
use libc::iovec;

use crate::disk::Geometry;
use crate::transfer::{Direction, Transfer};

/// Bytes of struct virtio_blk_req before the data.
const HEADER: u32 = 16;
/// Shift from bytes to sectors.
const SECTOR_SHIFT: u32 = 9;
const SECTOR: u32 = 512;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

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

/// Reads the request in `chain`. For reads and writes, `transfer` is filled in.
#[inline]
pub fn parse(
    chain: &Chain,
    memory: &Memory,
    disk: &Geometry,
    transfer: &mut Transfer,
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
        T_OUT if disk.readonly => Action::Answer(Status::IoErr, 0),
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
            let id = disk.serial.get(..len as usize).unwrap_or_default();
            scatter(memory, chain.writable(), id);
            Action::Answer(Status::Ok, len)
        }
        _ => Action::Answer(Status::Unsupported, 0),
    };
    Ok(Request {
        status_addr,
        action,
    })
}

impl Geometry {
    /// Byte offset of a range of whole sectors that lies on the disk.
    #[inline]
    fn range(&self, sector: u64, len: u32) -> Option<u64> {
        let end = sector.checked_add(u64::from(len >> SECTOR_SHIFT))?;
        let block = u64::from(self.block_size.max(SECTOR)) - 1;
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

/// Writes `bytes` at the beginning of `buffers`.
fn scatter(memory: &Memory, buffers: &[Buffer], bytes: &[u8]) {
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
        memory.write(buffer.addr, now);
        rest = later;
    }
}
