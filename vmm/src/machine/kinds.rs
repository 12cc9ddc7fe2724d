//! The table of device kinds: what the VMM must know of each to start its process and to
//! put a virtio-pci function in front of it. A new kind is one entry here.

use std::path::Path;

use bulkhead_proto::machine::MachineConfig;

/// What the VMM knows of a device kind.
#[derive(Debug)]
pub struct DeviceKind {
    /// The kind as the API and the device's own Hello name it.
    pub name: &'static str,
    /// Its binary, beside `bulkhead`.
    pub binary: &'static str,
    /// Virtio device id (VIRTIO 1.2 section 5).
    pub virtio_id: u16,
    /// Most virtqueues it may announce.
    pub max_queues: u16,
    /// `--io-engine` where io_uring is not to be had; its policy's name ends in `-plain`.
    /// `None`: it has no use for io_uring anywhere.
    pub plain_engine: Option<&'static str>,
}

/// virtio-blk.
pub static BLK: DeviceKind = DeviceKind {
    name: "blk",
    binary: "bulkhead-blk",
    virtio_id: 2,
    max_queues: 64,
    plain_engine: Some("preadv2"),
};

/// virtio-net on a tap.
pub static NET: DeviceKind = DeviceKind {
    name: "net",
    binary: "bulkhead-net",
    virtio_id: 1,
    // A pair each, and the control queue.
    max_queues: 65,
    plain_engine: Some("plain"),
};

/// virtio-mem.
pub static MEM: DeviceKind = DeviceKind {
    name: "mem",
    binary: "bulkhead-mem",
    virtio_id: 24,
    max_queues: 1,
    plain_engine: None,
};

/// Virtio entropy.
pub static RNG: DeviceKind = DeviceKind {
    name: "rng",
    binary: "bulkhead-rng",
    virtio_id: 4,
    max_queues: 1,
    plain_engine: None,
};

/// Virtio sockets.
pub static VSOCK: DeviceKind = DeviceKind {
    name: "vsock",
    binary: "bulkhead-vsock",
    virtio_id: 19,
    // To the guest, from it, events.
    max_queues: 3,
    plain_engine: None,
};

/// Every kind.
pub static ALL: [&DeviceKind; 5] = [&BLK, &NET, &MEM, &RNG, &VSOCK];

/// The binaries of the kinds that a machine has, beside those that could be added to it; of all
/// where it is not known yet, but for those of memory, entropy and sockets where they are not installed.
pub fn binaries(machine: Option<&MachineConfig>, libexec: &Path, grows: bool) -> Vec<String> {
    let installed = |kind: &DeviceKind| libexec.join(kind.binary).exists();
    let taps = |config: &MachineConfig| config.nets.iter().any(|net| net.has_tap());
    ALL.iter()
        .filter(|kind| match (machine, kind.name) {
            (None, "mem" | "rng" | "vsock") => installed(kind),
            (None, _) => true,
            // It is there from the start or never.
            (Some(config), "mem") => config.memory_max_bytes != 0,
            (Some(config), "blk") if !config.disks.is_empty() => true,
            (Some(config), "net") if taps(config) => true,
            (Some(config), "rng") if !config.rngs.is_empty() => true,
            (Some(config), "vsock") if config.vsock.is_some() => true,
            (Some(_), _) => grows && installed(kind),
        })
        .map(|kind| kind.binary.to_owned())
        .collect()
}
