//! What the PCI function needs to know of each virtio device type: its class code, the
//! size of its configuration space (VIRTIO 1.2 sections 4.1.2.1 and 5), and in what order
//! it completes.

use super::registers::net;

/// Virtio device ID of a network device.
pub const NET: u16 = 1;
/// Virtio device ID of a console.
pub const CONSOLE: u16 = 3;
const BLOCK: u16 = 2;

/// PCI class code, 24 bits. Types without a class of their own are "unclassified, other".
pub fn class_code(device_type: u16) -> u32 {
    match device_type {
        NET => 0x02_0000,               // Ethernet controller
        BLOCK | 26 | 28 => 0x01_8000,   // block, file system, RPMB: other mass storage
        8 => 0x01_0000,                 // SCSI host: SCSI controller
        9 | 10 | 29 => 0x02_8000,       // 9P, wireless: other network controller
        16 => 0x03_8000,                // GPU: other display controller
        25 => 0x04_0100,                // sound: audio controller
        30 | 31 => 0x04_8000,           // video encoder and decoder: other multimedia
        24 | 27 => 0x05_8000,           // memory, persistent memory: other memory controller
        CONSOLE | 11 | 19 => 0x07_8000, // console, remote serial, vsock: other communication
        18 => 0x09_8000,                // input: other input controller
        34 => 0x0c_0500,                // I2C adapter: SMBus
        36 => 0x0c_0900,                // CAN: CANbus
        40 => 0x0d_1100,                // Bluetooth: Bluetooth controller
        20 => 0x10_8000,                // crypto: other encryption controller
        _ => 0x00_ff00,
    }
}

/// Bytes of configuration space that the device process is asked for. No more than every
/// back-end in use can answer: some refuse a size beyond their own structure.
pub fn config_size(device_type: u16) -> usize {
    match device_type {
        NET => 12,     // mac, status, max_virtqueue_pairs, mtu
        BLOCK => 60,   // up to write zeroes
        CONSOLE => 12, // console
        5 => 16,       // balloon
        8 => 36,       // SCSI host
        16 => 16,      // GPU
        18 => 136,     // input
        19 => 8,       // vsock
        20 => 56,      // crypto
        24 => 56,      // memory
        25 => 12,      // sound
        26 => 40,      // file system: tag, num_request_queues
        27 => 16,      // persistent memory
        28 => 3,       // RPMB
        30 | 31 => 12, // video encoder and decoder
        36 => 2,       // CAN: status
        41 => 8,       // GPIO
        _ => 0,
    }
}

/// A block device's configuration space up to secure erase.
const BLOCK_TO_SECURE_ERASE: usize = 72;

/// Features of a device type that are not passed on, since their fields lie beyond a
/// configuration space of `config` bytes, or beyond [`config_size`].
pub fn withheld(device_type: u16, config: usize) -> u64 {
    match device_type {
        NET => net::WITHHELD,
        // SECURE_ERASE, unless the fields are asked for; ZONED
        BLOCK if config < BLOCK_TO_SECURE_ERASE => 1 << 16 | 1 << 17,
        BLOCK => 1 << 17,
        26 => 1, // NOTIFICATION: notify_buf_size
        _ => 0,
    }
}

/// Whether a queue's requests are completed in the order in which they were made
/// available. If so, the used index says all that a successor needs to know, and what was
/// in flight is done again; if not, it takes the log of the requests in flight.
pub fn in_order(device_type: u16, queue: u16) -> bool {
    match device_type {
        // Network, console, entropy, input, vsock, memory.
        1 | 3 | 4 | 18 | 19 | 24 => true,
        // SCSI host: control and event queues, not those of requests.
        8 => queue < 2,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_passed_on_with_its_fields_only() {
        const SECURE_ERASE: u64 = 1 << 16;
        assert_eq!(
            withheld(BLOCK, config_size(BLOCK)) & SECURE_ERASE,
            SECURE_ERASE
        );
        assert_eq!(withheld(BLOCK, 72) & SECURE_ERASE, 0);
        assert_ne!(withheld(BLOCK, 256), 0, "zoned");
    }
}
