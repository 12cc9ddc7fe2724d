//! The table of device kinds: what the VMM must know of each to start its process and to
//! put a virtio-pci function in front of it. A new kind is one entry here.

use std::path::Path;

use bulkhead_proto::machine::MachineConfig;

use crate::launcher::Least;

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
    /// Queues that a thread of its process serves.
    pub queues_per_thread: u32,
    /// Threads of the kernel's beside each of those: one makes progress with I/O that must wait
    /// (io_uring).
    pub kernel_threads: u32,
    /// Address space that its process sets apart at its start.
    pub heap: u64,
    /// The same for each queue.
    pub queue_heap: u64,
}

/// The same of a disk in a format, whose tables are held in memory.
const IMAGE_HEAP: u64 = 384 << 20;
/// Memory of a process before it has a queue, and for each of them: its program, what it allocates
/// at its start, rings of io_uring.
const MEMORY: u64 = 8 << 20;
const QUEUE_MEMORY: u64 = 1 << 20;
/// Address space beside the heap: the program's data, and for each thread its stack and buffers.
const DATA: u64 = 4 << 20;
const THREAD_DATA: u64 = 256 << 10;

impl DeviceKind {
    /// What a process with so many queues needs to start. `variant`: as in the name of its policy.
    pub fn least(&self, queues: u32, variant: Option<&str>) -> Least {
        let threads = queues.div_ceil(self.queues_per_thread);
        let heap = match variant {
            Some("image") => IMAGE_HEAP,
            _ => {
                let queues = self.queue_heap.saturating_mul(queues.into());
                self.heap.saturating_add(queues)
            }
        };
        let all = threads.saturating_add(1);
        Least {
            memory: MEMORY.saturating_add(QUEUE_MEMORY.saturating_mul(queues.into())),
            data: heap
                .saturating_add(DATA)
                .saturating_add(THREAD_DATA.saturating_mul(all.into())),
            pids: all.saturating_add(threads.saturating_mul(self.kernel_threads)),
        }
    }
}

/// What passt touches at its start (16 MiB of its own, and its libraries), and what it allocates
/// beside the data that its program has from the start.
const PASST_MEMORY: u64 = 32 << 20;
const PASST_HEAP: u64 = 8 << 20;

/// What passt needs to start, whose program has so much data.
pub fn passt_least(data: u64) -> Least {
    Least {
        memory: PASST_MEMORY,
        data: data.saturating_add(PASST_HEAP),
        pids: 1,
    }
}

/// What virtiofsd touches at its start, and what it allocates beside its program's data: stacks of its
/// three threads, and a buffer for each request.
const VIRTIOFSD_MEMORY: u64 = 16 << 20;
const VIRTIOFSD_HEAP: u64 = 24 << 20;

/// What virtiofsd needs to start, whose program has so much data.
pub fn virtiofsd_least(data: u64) -> Least {
    Least {
        memory: VIRTIOFSD_MEMORY,
        data: data.saturating_add(VIRTIOFSD_HEAP),
        pids: 4,
    }
}

/// virtio-blk.
pub static BLK: DeviceKind = DeviceKind {
    name: "blk",
    binary: "bulkhead-blk",
    virtio_id: 2,
    max_queues: 64,
    plain_engine: Some("preadv2"),
    queues_per_thread: 1,
    kernel_threads: 1,
    heap: 8 << 20,
    queue_heap: 10 << 20,
};

/// virtio-net on a tap.
pub static NET: DeviceKind = DeviceKind {
    name: "net",
    binary: "bulkhead-net",
    virtio_id: 1,
    // A pair each, and the control queue.
    max_queues: 65,
    plain_engine: Some("plain"),
    // The control queue has one of its own.
    queues_per_thread: 2,
    kernel_threads: 0,
    heap: 8 << 20,
    // Frames of a pair that are under way.
    queue_heap: 1280 << 10,
};

/// virtio-mem.
pub static MEM: DeviceKind = DeviceKind {
    name: "mem",
    binary: "bulkhead-mem",
    virtio_id: 24,
    max_queues: 1,
    plain_engine: None,
    queues_per_thread: 1,
    kernel_threads: 0,
    heap: 8 << 20,
    queue_heap: 0,
};

/// Virtio entropy.
pub static RNG: DeviceKind = DeviceKind {
    name: "rng",
    binary: "bulkhead-rng",
    virtio_id: 4,
    max_queues: 1,
    plain_engine: None,
    queues_per_thread: 1,
    kernel_threads: 0,
    heap: 8 << 20,
    queue_heap: 0,
};

/// Virtio sockets.
pub static VSOCK: DeviceKind = DeviceKind {
    name: "vsock",
    binary: "bulkhead-vsock",
    virtio_id: 19,
    // To the guest, from it, events.
    max_queues: 3,
    plain_engine: None,
    queues_per_thread: 3,
    kernel_threads: 0,
    heap: 8 << 20,
    queue_heap: 0,
};

/// Virtio consoles.
pub static CONSOLE: DeviceKind = DeviceKind {
    name: "console",
    binary: "bulkhead-console",
    virtio_id: 3,
    // To the guest and from it, for each port and for messages about them.
    max_queues: 34,
    plain_engine: None,
    queues_per_thread: 34,
    kernel_threads: 0,
    heap: 8 << 20,
    // What a client has not taken yet, of each port.
    queue_heap: 256 << 10,
};

/// Every kind.
pub static ALL: [&DeviceKind; 6] = [&BLK, &NET, &MEM, &RNG, &VSOCK, &CONSOLE];

/// The binaries of the kinds that a machine has, beside those that could be added to it; of all
/// where it is not known yet, but for disks and networks where they are installed.
pub fn binaries(machine: Option<&MachineConfig>, libexec: &Path, grows: bool) -> Vec<String> {
    let installed = |kind: &DeviceKind| libexec.join(kind.binary).exists();
    let taps = |config: &MachineConfig| config.nets.iter().any(|net| net.has_tap());
    ALL.iter()
        .filter(|kind| match (machine, kind.name) {
            (None, "mem" | "rng" | "vsock" | "console") => installed(kind),
            (None, _) => true,
            // It is there from the start or never.
            (Some(config), "mem") => config.memory_max_bytes != 0,
            (Some(config), "blk") if !config.disks.is_empty() => true,
            (Some(config), "net") if taps(config) => true,
            (Some(config), "rng") if !config.rngs.is_empty() => true,
            (Some(config), "vsock") if config.vsock.is_some() => true,
            (Some(config), "console") if !config.consoles.is_empty() => true,
            (Some(_), _) => grows && installed(kind),
        })
        .map(|kind| kind.binary.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_needs_what_its_queues_do() {
        const MIB: u64 = 1 << 20;
        let disk = BLK.least(2, None);
        assert_eq!((disk.pids, disk.memory), (5, 10 * MIB));
        assert_eq!(disk.data, 28 * MIB + 4 * MIB + 3 * MIB / 4);
        assert!(BLK.least(1, Some("image")).data > 384 * MIB);
        // Two pairs and the control queue.
        assert_eq!(NET.least(5, None).pids, 4);
        assert_eq!(NET.least(3, Some("vhost")).pids, 3);
        let passt = passt_least(197 * MIB);
        assert_eq!((passt.memory, passt.data), (32 * MIB, 205 * MIB));
        for (kind, queues) in [(&MEM, 1), (&RNG, 1), (&VSOCK, 3), (&CONSOLE, 34)] {
            assert_eq!(kind.least(queues, None).pids, 2, "{}", kind.name);
        }
    }
}
