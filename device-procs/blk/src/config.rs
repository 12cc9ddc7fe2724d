//! What the driver is told about the disk: feature bits (virtio 1.2, 5.2.3) and struct
//! virtio_blk_config (5.2.4). Made once at start.

use crate::disk::Geometry;

/// VIRTIO_BLK_F_SEG_MAX
const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO
const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE
const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_MQ
const F_MQ: u64 = 1 << 12;

/// Most data segments of a request: with header and status, a full ring of 256.
const SEG_MAX: u32 = 254;

/// Size of the configuration space (up to and with the secure erase fields).
const CONFIG_LEN: usize = 72;

/// The kind's feature bits.
pub fn features(disk: &Geometry, queues: u16) -> u64 {
    let mut bits = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
    if disk.readonly {
        bits |= F_RO;
    }
    if queues > 1 {
        bits |= F_MQ;
    }
    bits
}

/// The configuration space, little-endian.
pub fn space(disk: &Geometry, queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &disk.sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &disk.block_size.to_le_bytes());
    put(34, &queues.to_le_bytes());
    space
}
