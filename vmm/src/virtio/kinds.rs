//! What the PCI function needs to know of each virtio device type: its class code and the
//! size of its configuration space (VIRTIO 1.2 sections 4.1.2.1 and 5).

/// PCI class code, 24 bits. Types without a class of their own are "unclassified, other".
pub fn class_code(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_0000,      // network: Ethernet controller
        2 | 26 => 0x01_8000, // block, file system: other mass storage controller
        3 | 19 => 0x07_8000, // console, vsock: other communication controller
        8 => 0x01_0000,      // SCSI host: SCSI controller
        16 => 0x03_8000,     // GPU: other display controller
        18 => 0x09_8000,     // input: other input controller
        20 => 0x10_8000,     // crypto: other encryption controller
        25 => 0x04_0100,     // sound: audio controller
        _ => 0x00_ff00,
    }
}

/// Bytes of configuration space that the device process is asked for. No more than every
/// back-end in use can answer: some refuse a size beyond their own structure.
pub fn config_size(device_type: u16) -> usize {
    match device_type {
        1 => 12,   // network: mac, status, max_virtqueue_pairs, mtu
        2 => 60,   // block: up to write zeroes
        3 => 12,   // console
        5 => 16,   // balloon
        8 => 36,   // SCSI host
        16 => 16,  // GPU
        18 => 136, // input
        19 => 8,   // vsock
        20 => 56,  // crypto
        24 => 56,  // memory
        25 => 12,  // sound
        26 => 40,  // file system: tag, num_request_queues
        27 => 16,  // persistent memory
        41 => 8,   // GPIO
        _ => 0,
    }
}
