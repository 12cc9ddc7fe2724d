//! What the driver is told about the disk: feature bits (virtio 1.2, 5.2.3) and struct
//! virtio_blk_config (5.2.4). Called by the main thread; what the driver reads is made anew
//! each time, so that it is never ahead of what the workers know.
//!
//! Block size and topology are the host's own. Segments are limited by what one request may
//! be, as the constants below say; a segment is besides no larger than what a block device
//! takes in one piece. The lifetime is not offered: no confined process can ask the host for it.

use crate::disk::Disk;
use crate::disk_options::Cache;
use crate::host::SECTOR;
use crate::request::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ERASE_SECTORS, MAX_ERASE_SEGMENTS,
    MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS,
};

/// VIRTIO_BLK_F_SIZE_MAX
const F_SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX
const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO
const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE
const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY
const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ
const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// VIRTIO_BLK_F_SECURE_ERASE
pub const F_SECURE_ERASE: u64 = 1 << 16;

/// VIRTIO_F_ACCESS_PLATFORM. The memory table is all that the platform grants: addresses are
/// guest-physical whether the driver accepts it or not. A front-end with an IOMMU of its own
/// must not pass it on, as there is no way to translate.
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Most data segments of a request: with header and status, a full ring of 256, which is the
/// most that a driver may chain there. The host takes 1024 (UIO_MAXIOV) in one call, and a block
/// device that takes fewer has them split by its kernel.
const SEG_MAX: u32 = 254;
/// Largest segment. A request of SEG_MAX of them stays below 4 GiB, as a chain must.
const SIZE_MAX: u32 = 16 << 20;
/// Smallest limit on it that is believed: a driver's page.
const PAGE: u32 = 4096;

/// Size of the configuration space (up to and with the secure erase fields).
const CONFIG_LEN: usize = 72;
/// Offset of `writeback`, the one field that a driver may write.
const AT_WRITEBACK: usize = 32;

/// The kind's feature bits.
pub fn features(disk: &Disk, queues: u16) -> u64 {
    let mut bits = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_ACCESS_PLATFORM;
    if disk.geometry.readonly {
        bits |= F_RO;
    } else {
        bits |= F_WRITE_ZEROES;
    }
    // Without a cache there is nothing to flush and nothing to choose (5.2.5).
    if disk.cache != Cache::Writethrough {
        bits |= F_FLUSH | F_CONFIG_WCE;
    }
    if queues > 1 {
        bits |= F_MQ;
    }
    if disk.discards() {
        bits |= F_DISCARD;
    }
    if disk.secure_erases() {
        bits |= F_SECURE_ERASE;
    }
    bits
}

/// The configuration space, little-endian.
pub fn space(disk: &Disk, queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    let block = disk.geometry.block_size.max(SECTOR);
    let topology = &disk.geometry.topology;
    let physical = topology.physical.max(block);
    let min_io = u16::try_from(topology.min_io / block).unwrap_or(u16::MAX);
    put(0, &disk.sectors().to_le_bytes());
    put(8, &size_max(topology.max_io).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    // physical_block_exp, alignment_offset, min_io_size, opt_io_size: in logical blocks.
    let aligned_at = u8::try_from(topology.aligned_at / block).unwrap_or(0);
    put(
        24,
        &[
            physical.ilog2().saturating_sub(block.ilog2()) as u8,
            aligned_at,
        ],
    );
    put(26, &min_io.to_le_bytes());
    put(28, &(topology.opt_io / block).to_le_bytes());
    put(AT_WRITEBACK, &[u8::from(disk.writeback())]);
    put(34, &queues.to_le_bytes());
    if disk.discards() {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &(disk.discard_granularity() / SECTOR).to_le_bytes());
    }
    if !disk.geometry.readonly {
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_ZEROES_SEGMENTS.to_le_bytes());
        put(56, &[u8::from(disk.discards())]);
    }
    if disk.secure_erases() {
        put(60, &MAX_ERASE_SECTORS.to_le_bytes());
        put(64, &MAX_ERASE_SEGMENTS.to_le_bytes());
        put(68, &(disk.discard_granularity() / SECTOR).to_le_bytes());
    }
    space
}

/// The largest segment for a host that takes `max_io` bytes in one piece; 0: it does not say.
fn size_max(max_io: u32) -> u32 {
    match max_io / PAGE * PAGE {
        0 => SIZE_MAX,
        whole => whole.min(SIZE_MAX),
    }
}

/// The driver writes to the configuration space: only `writeback` takes a value, and only
/// where the choice was offered. False if it is none of that.
pub fn write(disk: &Disk, offset: u32, data: &[u8]) -> bool {
    match data {
        [value @ (0 | 1)]
            if offset as usize == AT_WRITEBACK && disk.cache != Cache::Writethrough =>
        {
            disk.set_writeback(*value == 1);
            true
        }
        _ => false,
    }
}
