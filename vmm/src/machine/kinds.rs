//! The table of device kinds: what the VMM must know of each to start its process and to
//! put a virtio-pci function in front of it. A new kind is one entry here.

use bulkhead_proto::machine::DiskConfig;

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
}

/// virtio-blk.
pub static BLK: DeviceKind = DeviceKind {
    name: "blk",
    binary: "bulkhead-blk",
    virtio_id: 2,
    max_queues: 64,
};

/// Every kind.
pub static ALL: [&DeviceKind; 1] = [&BLK];

/// What a disk process is told on its command line: everything it must know before it is
/// confined. `direct`: the descriptor it gets (fd 5) was opened with O_DIRECT.
pub fn blk_args(disk: &DiskConfig, queues: u32, direct: bool) -> Vec<String> {
    let serial = if disk.serial.is_empty() {
        &disk.id
    } else {
        &disk.serial
    };
    let mut spec = String::from("fd=5");
    if disk.readonly {
        spec.push_str(",readonly=on");
    }
    if direct {
        spec.push_str(",direct=on");
    }
    // VIRTIO 1.2 section 5.2.6: the serial is at most 20 bytes.
    let serial: String = serial.chars().filter(char::is_ascii).take(20).collect();
    spec.push_str(&format!(",serial={serial}"));
    [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--disk",
        &spec,
        "--queues",
        &queues.to_string(),
    ]
    .map(str::to_string)
    .to_vec()
}
