//! Disks: from their configuration to a device process and its arguments, and what may be
//! changed while they run. VIRTIO 1.2 section 5.2. Called on the manager thread.

use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::common::TokenBucket;
use bulkhead_proto::device::BlkUpdate;
use bulkhead_proto::machine::disk_config::{Cache, Format};
use bulkhead_proto::machine::{DiskConfig, UpdateDiskRequest};

use super::control::Task;
use super::device::{self, Device, Order, Site, Special};
use super::kinds;
use crate::launcher::Access;
use crate::virtio::{ConfigSource, VirtioPciOptions};

/// A disk's size is counted in these.
pub const SECTOR: u64 = 512;
/// fd of the first backing file: after the channels and the disk itself.
const FIRST_BACKING_FD: usize = 6;
/// Where in its arguments a disk process finds what it serves.
const DISK_SPEC: usize = 5;
/// The configuration space of a disk of ours: up to secure erase.
const CONFIG: usize = 72;
/// VIRTIO 1.2 section 5.2.6: the serial number of a disk, bytes.
const MAX_SERIAL: usize = 20;

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The guest cannot write to it.
    pub readonly: bool,
    /// It is its file, byte for byte; else the size is the process's business.
    pub raw: bool,
    /// As the guest sees it, in bytes; 0: only the process knows.
    pub size: u64,
    /// It may not grow beyond; 0: no limit.
    pub max_size: u64,
}

/// Opens a disk and its backing files, starts its process, and puts a function in front.
///
/// # Errors
/// One line that names the disk, what failed and the remedy; nothing stays behind.
pub fn spawn(disk: &DiskConfig, site: &Site<'_>) -> Result<Device, String> {
    let kind = &kinds::BLK;
    let raw = disk.format.enum_value() == Ok(Format::RAW);
    let direct = raw && disk.cache.enum_value() == Ok(Cache::CACHE_NONE);
    let (access, granted_as) = if disk.readonly {
        (Access::Read, "read-only")
    } else {
        (Access::ReadWrite, "read-write")
    };
    let open = |path: &str, access, direct| {
        site.launcher
            .open_disk(Path::new(path), access, direct, !disk.unlocked)
            .map_err(|e| e.to_string())
    };
    let (file, opened) = open(&disk.path, access, direct)?;
    if disk.max_size != 0 && opened.size > disk.max_size {
        return Err(format!(
            "disk {}: has {} bytes and max-size is {}: raise that",
            disk.path, opened.size, disk.max_size
        ));
    }
    let block_device = block_device(&file);
    let mut fds: Vec<OwnedFd> = vec![file.into()];
    let mut granted = vec![
        "control channel".to_string(),
        "vhost-user channel".to_string(),
        format!("{} ({granted_as})", disk.path),
    ];
    for path in &disk.backing_paths {
        fds.push(open(path, Access::Read, false)?.0.into());
        granted.push(format!("{path} (read-only, backing file)"));
    }
    let mut args = args(disk, opened.direct);
    // Where the ring is one of io_uring, which leaves room for the call in what such a process
    // may make; a format or the other engine does not.
    let erases = raw && opened.secure_erase && site.launcher.io_uring();
    if erases && let Some(spec) = args.get_mut(DISK_SPEC) {
        spec.push_str(",secure-erase=on");
        args.extend(["--io-engine", "io_uring"].map(str::to_string));
    }
    let variant = match disk.format.enum_value() {
        Ok(Format::QCOW2) => Some("image"),
        _ => erases.then_some("erase"),
    };
    let order = Order {
        id: &disk.id,
        kind,
        variant,
        args,
        fds,
        queues: disk.queues,
        dial: None,
        mtu: 0,
        tap: String::new(),
        resources: disk.resources.as_ref().cloned().unwrap_or_default(),
        block_device,
    };
    let (process, frontend) = device::spawn(site.launcher, order)?;
    let queues = u16::try_from(disk.queues).unwrap_or(kind.max_queues);
    let mut options = VirtioPciOptions::new(&disk.id, kind.virtio_id, queues);
    options.config = ConfigSource::Backend(CONFIG);
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, &disk.id, process.incarnation, &why))?;
    let size = if raw {
        opened.size / SECTOR * SECTOR
    } else {
        0
    };
    Ok(Device {
        id: disk.id.clone(),
        kind: kind.name,
        process: Some(process),
        special: Special::Disk(Disk {
            readonly: disk.readonly,
            raw,
            size,
            max_size: disk.max_size,
        }),
        function,
        address,
        port,
        queues: disk.queues,
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted,
    })
}

/// The block device that a disk is or lies on, as io.max names it; empty: unknown.
fn block_device(file: &std::fs::File) -> String {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let Ok(metadata) = file.metadata() else {
        return String::new();
    };
    let number = if metadata.file_type().is_block_device() {
        metadata.rdev()
    } else {
        metadata.dev()
    };
    format!("{}:{}", libc::major(number), libc::minor(number))
}

/// What a disk process is told on its command line: everything it must know before it is
/// confined. `direct`: the descriptor it gets (fd 5) was opened with O_DIRECT.
pub fn args(disk: &DiskConfig, direct: bool) -> Vec<String> {
    let mut spec = String::from("fd=5");
    if disk.readonly {
        spec.push_str(",readonly=on");
    }
    if direct {
        spec.push_str(",direct=on");
    }
    let serial = if disk.serial.is_empty() {
        &disk.id
    } else {
        &disk.serial
    };
    // A comma would begin another option; a checked configuration has none.
    let serial: String = serial
        .chars()
        .filter(|c| c.is_ascii_graphic() && *c != ',')
        .take(MAX_SERIAL)
        .collect();
    spec.push_str(&format!(",serial={serial}"));
    if disk.format.enum_value() == Ok(Format::QCOW2) {
        spec.push_str(",format=qcow2");
    }
    match disk.cache.enum_value() {
        Ok(Cache::CACHE_NONE) | Err(_) => {}
        Ok(Cache::WRITEBACK) => spec.push_str(",cache=writeback"),
        Ok(Cache::WRITETHROUGH) => spec.push_str(",cache=writethrough"),
        Ok(Cache::UNSAFE) => spec.push_str(",cache=unsafe"),
    }
    if disk.max_size != 0 {
        spec.push_str(&format!(",max-size={}", disk.max_size));
    }
    if !disk.backing_paths.is_empty() {
        let fds: Vec<String> = (FIRST_BACKING_FD..)
            .take(disk.backing_paths.len())
            .map(|fd| fd.to_string())
            .collect();
        spec.push_str(&format!(",backing-fds={}", fds.join(":")));
    }
    let limits = disk.limits.as_ref();
    for (name, bucket) in [
        ("bps", limits.and_then(|l| l.bytes.as_ref())),
        ("iops", limits.and_then(|l| l.operations.as_ref())),
    ] {
        if let Some(text) = bucket.and_then(bucket_text) {
            spec.push_str(&format!(",{name}={text}"));
        }
    }
    [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--disk",
        &spec,
        "--queues",
        &disk.queues.to_string(),
    ]
    .map(str::to_string)
    .to_vec()
}

/// `N[:BURST]`; `None`: no limit.
pub(super) fn bucket_text(bucket: &TokenBucket) -> Option<String> {
    match (bucket.per_second, bucket.burst) {
        (0, _) => None,
        (rate, 0) => Some(rate.to_string()),
        (rate, burst) => Some(format!("{rate}:{burst}")),
    }
}

impl Disk {
    /// What a change, its form checked, asks of the launcher and of the process.
    ///
    /// # Errors
    /// INVALID_ARGUMENT or FAILED_PRECONDITION: what is not possible, and the remedy.
    pub fn update(&self, id: &str, request: &UpdateDiskRequest) -> Result<Task, RpcStatus> {
        let wanted = request.size_bytes;
        let mut update = BlkUpdate::new();
        update.size_bytes = wanted;
        update.limits = request.limits.clone();
        if wanted == 0 {
            return Ok(Task::UpdateDisk {
                grow_to: None,
                size: self.size,
                update,
            });
        }
        let invalid = |why: String| Err(RpcStatus::invalid_argument(format!("disk {id}: {why}")));
        if self.readonly {
            return Err(RpcStatus::failed_precondition(format!(
                "disk {id}: is read-only and cannot grow: create it without readonly=on"
            )));
        }
        if wanted < self.size {
            return invalid(format!(
                "has {} bytes and cannot shrink to {wanted}: give at least as many",
                self.size
            ));
        }
        if self.max_size != 0 && wanted > self.max_size {
            return invalid(format!(
                "{wanted} bytes are more than its max-size of {}: give less, or create it with a larger one",
                self.max_size
            ));
        }
        Ok(Task::UpdateDisk {
            grow_to: self.raw.then_some(wanted),
            size: self.size,
            update,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::Code;
    use bulkhead_proto::common::DiskLimits;

    fn config() -> DiskConfig {
        let mut disk = DiskConfig::new();
        disk.id = "root".into();
        disk.queues = 2;
        disk
    }

    fn spec(disk: &DiskConfig, direct: bool) -> String {
        let args = args(disk, direct);
        assert_eq!(args[..4], ["--control-fd", "3", "--vhost-fd", "4"]);
        assert_eq!(args[DISK_SPEC - 1], "--disk");
        assert_eq!(args[6..], ["--queues", "2"]);
        args[5].clone()
    }

    #[test]
    fn a_plain_disk_says_little() {
        assert_eq!(spec(&config(), true), "fd=5,direct=on,serial=root");
    }

    #[test]
    fn every_option_reaches_the_process() {
        let mut disk = config();
        disk.readonly = true;
        disk.serial = "x y".into();
        disk.format = Format::QCOW2.into();
        disk.cache = Cache::UNSAFE.into();
        disk.max_size = 1 << 30;
        disk.backing_paths = vec!["/a".into(), "/b".into()];
        let mut limits = DiskLimits::new();
        limits.bytes.mut_or_insert_default().per_second = 1000;
        limits.bytes.mut_or_insert_default().burst = 5;
        limits.operations.mut_or_insert_default().per_second = 7;
        disk.limits = Some(limits).into();
        assert_eq!(
            spec(&disk, false),
            "fd=5,readonly=on,serial=xy,format=qcow2,cache=unsafe,max-size=1073741824,backing-fds=6:7,bps=1000:5,iops=7"
        );
    }

    #[test]
    fn a_serial_cannot_add_an_option() {
        let mut disk = config();
        disk.serial = "a,direct=on".into();
        assert_eq!(spec(&disk, false), "fd=5,serial=adirect=on");
    }

    fn disk() -> Disk {
        Disk {
            readonly: false,
            raw: true,
            size: 1 << 20,
            max_size: 1 << 22,
        }
    }

    fn grow(size: u64) -> UpdateDiskRequest {
        let mut request = UpdateDiskRequest::new();
        request.size_bytes = size;
        request
    }

    #[test]
    fn growth_is_checked_before_anything_is_done() {
        let code = |disk: &Disk, size| disk.update("d", &grow(size)).unwrap_err().code;
        assert_eq!(code(&disk(), (1 << 20) - 512), Code::InvalidArgument);
        assert_eq!(code(&disk(), (1 << 22) + 512), Code::InvalidArgument);
        let readonly = Disk {
            readonly: true,
            ..disk()
        };
        assert_eq!(code(&readonly, 1 << 21), Code::FailedPrecondition);
        let task = disk().update("d", &grow(1 << 22)).unwrap();
        assert!(
            matches!(&task, Task::UpdateDisk { grow_to: Some(size), update, .. } if *size == 1 << 22 && update.size_bytes == 1 << 22),
            "{task:?}"
        );
    }

    #[test]
    fn only_a_raw_file_is_grown_from_outside() {
        let qcow2 = Disk {
            raw: false,
            size: 0,
            ..disk()
        };
        let task = qcow2.update("d", &grow(1 << 20)).unwrap();
        assert!(
            matches!(&task, Task::UpdateDisk { grow_to: None, update, .. } if update.size_bytes == 1 << 20),
            "{task:?}"
        );
        // Limits alone, on a read-only disk too.
        let readonly = Disk {
            readonly: true,
            ..disk()
        };
        let task = readonly.update("d", &grow(0)).unwrap();
        assert!(matches!(task, Task::UpdateDisk { grow_to: None, size, .. } if size == 1 << 20));
    }
}
