//! A device of the machine: its process, its control channel and the virtio-pci function
//! in front of it. Owned by the manager thread; the function is shared with vCPU threads.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::device::{HelloRequest, HelloResponse};
use bulkhead_proto::machine::{DeviceInfo, DiskConfig};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};

use super::kinds::{self, DeviceKind};
use crate::arch::x86_64::acpi::AcpiConfig;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::hypervisor::Hypervisor;
use crate::launcher::{Access, Launcher, SpawnSpec};
use crate::memory::GuestRam;
use crate::pci::{AddressRange, PciAddress, PciFunction, PortConfig, RootComplex, Windows};
use crate::vhost_user::{Frontend, MemoryMap, MemoryRegion};
use crate::virtio::{VirtioPciFunction, VirtioPciOptions};

/// Version of `bulkhead.device.v1` that this VMM speaks.
pub const DEVICE_PROTOCOL: u32 = 1;
/// How long a device process has for its first answer, confinement included.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long one vhost-user message may take.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// Most root ports on bus 0: one for each device number but the host bridge's.
const MAX_PORTS: u8 = 31;

/// A device and its process.
pub struct DeviceProcess {
    /// As the API names it.
    pub id: String,
    /// Its kind.
    pub kind: &'static DeviceKind,
    /// Counts the processes that have served it.
    pub incarnation: u64,
    /// Host pid.
    pub pid: i32,
    /// Keeps the pid from being reused while the device exists.
    pub pidfd: OwnedFd,
    /// The control channel.
    pub control: BlockingClient,
    /// The function the guest sees.
    pub function: Arc<VirtioPciFunction>,
    /// Where it sits.
    pub address: PciAddress,
    /// Name of the root port.
    pub port: String,
    /// What the process said of itself.
    pub hello: HelloResponse,
    /// Spawn to ready, microseconds.
    pub ready_us: u64,
    /// Virtqueues.
    pub queues: u32,
    /// Why it is no longer served.
    pub failed: Option<String>,
    /// When a malformed ring was last reported, and how many were not since: a hostile guest
    /// must not fill the log.
    pub ring_errors: (Option<std::time::Instant>, u64),
    /// fds handed over at exec, from fd 3 on.
    pub granted: Vec<String>,
}

impl DeviceProcess {
    /// What the API says of it.
    pub fn info(&self) -> DeviceInfo {
        let status = self.function.status();
        let mut info = DeviceInfo::new();
        info.id = self.id.clone();
        info.kind = self.kind.name.to_string();
        info.pci_address = self.address.to_string();
        info.port = self.port.clone();
        info.pid = self.pid;
        info.incarnation = self.incarnation;
        info.state = if self.failed.is_some() || status.failure.is_some() {
            "failed"
        } else if status.needs_reset {
            "needs-reset"
        } else if status.active {
            "running"
        } else {
            "ready"
        }
        .to_string();
        info.version = self.hello.version.clone();
        info.spawn_us = self.ready_us;
        info.queues = self.queues;
        info.granted_fds = self.granted.clone();
        info
    }

    /// Asks the launcher to end its process.
    ///
    /// # Errors
    /// When the launcher is gone or does not answer.
    pub fn kill(&self, launcher: &Launcher) -> Result<(), String> {
        launcher
            .kill(&self.id, self.incarnation)
            .map_err(|e| e.to_string())
    }
}

/// Guest memory as a device process maps it.
struct SharedRam(GuestRam);

impl MemoryMap for SharedRam {
    fn regions(&self) -> Vec<MemoryRegion> {
        self.0
            .regions()
            .iter()
            .map(|r| MemoryRegion {
                guest_base: r.guest_base,
                size: r.size,
                file: Arc::clone(&r.file),
                file_offset: r.file_offset,
            })
            .collect()
    }

    fn memory(&self) -> &vm_memory::GuestMemoryMmap {
        self.0.memory()
    }
}

/// The root complex with a port for each of `devices`, on the buses. A port that nothing can
/// be behind would cost the guest some 450 exits of bus enumeration.
///
/// # Errors
/// One line.
pub fn root_complex(
    mmio: &Arc<Bus>,
    pio: &Arc<Bus>,
    mem64: Range<u64>,
    devices: usize,
) -> Result<Arc<RootComplex>, String> {
    let last = u8::try_from(devices)
        .unwrap_or(MAX_PORTS)
        .clamp(1, MAX_PORTS);
    let ports: Vec<PortConfig> = (1..=last)
        .map(|device| PortConfig {
            name: format!("port{device}"),
            device,
            slot: u16::from(device),
        })
        .collect();
    let windows = Windows {
        mem32: AddressRange {
            start: layout::PCI_MEM32_START,
            size: layout::PCI_MEM32_SIZE,
        },
        mem64: AddressRange {
            start: mem64.start,
            size: mem64.end.saturating_sub(mem64.start),
        },
    };
    let complex = RootComplex::new(Arc::clone(mmio), windows, &ports)
        .map_err(|e| format!("PCIe root complex: {e}"))?;
    complex
        .attach_to_buses(mmio, pio)
        .map_err(|e| format!("PCIe root complex: {e}"))?;
    Ok(complex)
}

/// Opens a disk, starts its process, and puts a function in front of it.
///
/// # Errors
/// One line that names the disk, what failed and the remedy; nothing stays behind.
pub fn spawn_disk(
    disk: &DiskConfig,
    launcher: &Launcher,
    ram: &GuestRam,
    hypervisor: &Arc<dyn Hypervisor>,
    pci: &Arc<RootComplex>,
) -> Result<DeviceProcess, String> {
    let kind = &kinds::BLK;
    let access = if disk.readonly {
        Access::Read
    } else {
        Access::ReadWrite
    };
    let (file, opened) = launcher
        .open_path(Path::new(&disk.path), "disk", access, true)
        .map_err(|e| e.to_string())?;
    let started = std::time::Instant::now();
    let incarnation = 1;
    let spawned = launcher
        .spawn(SpawnSpec {
            device_id: disk.id.clone(),
            binary: kind.binary.to_string(),
            args: kinds::blk_args(disk, disk.queues, opened.direct),
            incarnation,
            fds: vec![file.into()],
        })
        .map_err(|e| e.to_string())?;
    let undo = |why: String| {
        if let Err(e) = launcher.kill(&disk.id, incarnation) {
            log::warn!("device {}: {e}", disk.id);
        }
        format!("device {}: {why}", disk.id)
    };
    let mut control = BlockingClient::new(spawned.control, CONTROL_MAX_FRAME);
    let hello = hello(&mut control, &disk.id, kind, incarnation).map_err(&undo)?;
    let frontend = Frontend::connect(spawned.vhost, MESSAGE_LIMIT)
        .map_err(|e| undo(format!("its vhost-user channel: {e}")))?;
    let ready_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let queues = u16::try_from(disk.queues).unwrap_or(kind.max_queues);
    let mut options = VirtioPciOptions::new(&disk.id, kind.virtio_id, queues);
    options.hook = crate::confine::helper_hook();
    let function = VirtioPciFunction::new(
        options,
        frontend,
        Arc::new(SharedRam(ram.clone())),
        Arc::clone(hypervisor),
        pci.decoder(),
    )
    .map_err(|e| undo(e.to_string()))?;
    let port = pci
        .ports()
        .into_iter()
        .find(|p| !p.occupied)
        .ok_or_else(|| undo("every root port is taken: remove a device".to_string()))?
        .name;
    let address = pci
        .attach(&port, Arc::clone(&function) as Arc<dyn PciFunction>)
        .map_err(|e| undo(e.to_string()))?;
    let access = if disk.readonly {
        "read-only"
    } else {
        "read-write"
    };
    Ok(DeviceProcess {
        id: disk.id.clone(),
        kind,
        incarnation,
        pid: spawned.pid,
        pidfd: spawned.pidfd,
        control,
        function,
        address,
        port,
        hello,
        ready_us,
        queues: disk.queues,
        failed: None,
        ring_errors: (None, 0),
        granted: vec![
            "control channel".to_string(),
            "vhost-user channel".to_string(),
            format!("{} ({access})", disk.path),
        ],
    })
}

/// The first call on a control channel: is it the process that was spawned, and does it
/// speak our protocol?
fn hello(
    control: &mut BlockingClient,
    id: &str,
    kind: &DeviceKind,
    incarnation: u64,
) -> Result<HelloResponse, String> {
    let mut request = HelloRequest::new();
    request.device_id = id.to_string();
    request.incarnation = incarnation;
    let hello: HelloResponse = control
        .call(DEVICE_SERVICE, "Hello", &request, HELLO_LIMIT)
        .map_err(|e| format!("{} does not answer: {e}", kind.binary))?;
    if hello.kind != kind.name || hello.incarnation != incarnation {
        return Err(format!(
            "{} says that it is {:?} number {}: use the binaries of one build",
            kind.binary, hello.kind, hello.incarnation
        ));
    }
    if hello.protocol != DEVICE_PROTOCOL {
        return Err(format!(
            "{} speaks control protocol {}, this VMM {DEVICE_PROTOCOL}: use the binaries of one build",
            kind.binary, hello.protocol
        ));
    }
    Ok(hello)
}

/// What the ACPI tables must know.
pub fn acpi_config(pci: &RootComplex, cpus: u32, mem64: Range<u64>) -> AcpiConfig<'static> {
    AcpiConfig {
        cpus,
        pci_mem64: mem64,
        last_bus: pci.last_bus(),
        pci_root_aml: &[],
    }
}
