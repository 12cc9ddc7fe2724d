//! A device of the machine: its process, its control channel and the virtio-pci function
//! in front of it. Owned by the manager thread; the function is shared with vCPU threads.
//! What is true of one kind only is in a module of its own (`disk`, …).

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::common::Resources;
use bulkhead_proto::device::{HelloRequest, HelloResponse};
use bulkhead_proto::machine::{DeviceInfo, MachineConfig};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use vmm_sys_util::epoll::EventSet;

use super::control::ControlChannel;
use super::device_stats::{self, About};
use super::disk::Disk;
use super::kinds::DeviceKind;
use super::life::Life;
use super::mem::Memory;
use super::net_switch::Switch;
use super::newcomer::{Changes, Newcomer};
use super::supervise::{Budget, HangDetector};
use super::trial::Trial;
use super::usage::Usage;
use crate::arch::x86_64::acpi::AcpiConfig;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::hypervisor::Hypervisor;
use crate::launcher::{Launcher, LauncherError, Least, SpawnSpec};
use crate::memory::GuestRam;
use crate::pci::{
    AddressRange, PciAddress, PciError, PciFunction, PortConfig, PortInfo, RootComplex, Windows,
};
use crate::threads::ThreadHook;
use crate::vhost_user::{Frontend, MemoryMap, MemoryRegion};
use crate::virtio::{VirtioPciFunction, VirtioPciOptions};

/// Version of `bulkhead.device.v1` that this VMM speaks.
pub const DEVICE_PROTOCOL: u32 = 1;
/// How long a device process has for its first answer, confinement included.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for the end of one that hung up, to say how it ended.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a killed process may take to end.
pub const END_LIMIT: Duration = Duration::from_secs(2);
/// How long one vhost-user message may take.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// fd of a device process's first own descriptor.
const FIRST_OWN_FD: usize = 5;
/// Nothing more can be plugged in.
pub const NO_PORT: &str = "every root port is taken, or waits for the guest to let go of what was pulled out of it: remove a device, or start the machine with more --hotplug-ports";
/// Most root ports on bus 0: one for each device number but the host bridge's.
const MAX_PORTS: u8 = 31;

/// A device of the machine.
pub struct Device {
    /// As the API names it.
    pub id: String,
    /// Its kind's name.
    pub kind: &'static str,
    /// Its process; `None`: its back-end is somebody else's.
    pub process: Option<Process>,
    /// What only its kind has.
    pub special: Special,
    /// The function the guest sees.
    pub function: Arc<VirtioPciFunction>,
    /// Where it sits.
    pub address: PciAddress,
    /// Name of the root port.
    pub port: String,
    /// Virtqueues.
    pub queues: u32,
    /// Why it is no longer served.
    pub failed: Option<String>,
    /// It was drained and takes no requests until it is resumed.
    pub drained: bool,
    /// When a malformed ring was last reported, and how many were not since, lest a guest fill the log.
    pub ring_errors: (Option<std::time::Instant>, u64),
    /// How often its process has said so in the present second, and since when that lasts.
    pub ring_alarms: (Option<std::time::Instant>, u32),
    /// fds handed over at exec, from fd 3 on.
    pub granted: Vec<String>,
}

/// A device's process, past its first call, and what is known of those before and after it.
pub struct Process {
    /// Its kind.
    pub kind: &'static DeviceKind,
    /// What becomes of it, and of its successors.
    pub life: Life,
    /// Its successor, on its way in.
    pub newcomer: Option<Newcomer>,
    /// A process of another binary that may come to take its place.
    pub trial: Option<Trial>,
    /// The launcher is still to be told that this incarnation has taken another one's place.
    pub unsettled: bool,
    /// The last incarnation that the launcher was asked for.
    pub last_incarnation: u64,
    /// What each successor must be told.
    pub changes: Changes,
    /// Hangs up when nothing is left of it, nor of its I/O. Gone once it has.
    pub fence: Option<OwnedFd>,
    /// Of each queue, whether it makes progress.
    pub detectors: Vec<HangDetector>,
    /// Counts the processes that have served the device.
    pub incarnation: u64,
    /// Host pid.
    pub pid: i32,
    /// Keeps the pid from being reused while the device exists.
    pub pidfd: OwnedFd,
    /// The control channel.
    pub control: ControlChannel,
    /// What epoll has been told of it.
    pub interest: EventSet,
    /// What the process said of itself.
    pub hello: HelloResponse,
    /// Spawn to ready, microseconds.
    pub ready_us: u64,
}

impl Process {
    /// The incarnation that serves, or that is on its way in to do so.
    pub fn latest(&self) -> u64 {
        let newcomer = self.newcomer.as_ref();
        newcomer.map_or(self.incarnation, |newcomer| newcomer.incarnation)
    }
}

/// What only devices of one kind have.
pub enum Special {
    /// A disk.
    Disk(Disk),
    /// A network device whose process is ours.
    Net,
    /// An entropy device.
    Rng,
    /// A socket device, and where it listens.
    Vsock(PathBuf),
    /// A console device, and where its ports listen.
    Console(Vec<PathBuf>),
    /// The memory that comes and goes.
    Memory(Box<Memory>),
    /// A device whose back-end is somebody else's.
    Foreign(Box<Switch>),
}

impl Special {
    /// Where its process listens.
    pub fn sockets(&self) -> &[PathBuf] {
        match self {
            Self::Vsock(path) => std::slice::from_ref(path),
            Self::Console(paths) => paths,
            _ => &[],
        }
    }
}

impl Device {
    /// What the API says of it.
    pub fn info(&self) -> DeviceInfo {
        let status = self.function.status();
        let mut info = DeviceInfo::new();
        info.id = self.id.clone();
        info.kind = self.kind.to_string();
        info.pci_address = self.address.to_string();
        info.port = self.port.clone();
        info.state = if let Some(state) = self.process.as_ref().and_then(|p| p.life.state()) {
            state
        } else if self.failed.is_some() || status.failure.is_some() {
            "failed"
        } else if status.needs_reset {
            "needs-reset"
        } else if self.process.as_ref().is_some_and(|p| p.control.host_gone()) {
            "disconnected"
        } else if self.drained {
            "drained"
        } else if status.active {
            "running"
        } else {
            "ready"
        }
        .to_string();
        if let Some(process) = &self.process {
            // One that has ended, or is about to, has none: its number may be another's by now.
            let manned = process.life.is_manned();
            info.pid = if manned { process.pid } else { 0 };
            info.incarnation = process.incarnation;
            info.version = process.hello.version.clone();
            info.landlock_abi = process.hello.confinement.landlock_abi;
            info.limits = device_stats::own_limits(&process.hello).into();
            info.spawn_us = process.ready_us;
        }
        info.queues = self.queues;
        info.granted_fds = self.granted.clone();
        if let Special::Foreign(switch) = &self.special {
            switch.describe(&mut info);
        }
        info
    }

    /// Asks the launcher to end its process, if it has one, and to close what it keeps of it.
    ///
    /// # Errors
    /// When the launcher is gone or does not answer.
    pub fn forget(&self, launcher: &Launcher) -> Result<(), LauncherError> {
        let Some(process) = &self.process else {
            return match &self.special {
                Special::Foreign(switch) => switch.forget(launcher),
                _ => Ok(()),
            };
        };
        let ended = launcher.kill_and_forget(&self.id, process.incarnation);
        for path in self.special.sockets() {
            launcher.forget(path)?;
        }
        ended
    }
}

/// Guest memory as a device process maps it.
struct SharedRam(GuestRam);

impl MemoryMap for SharedRam {
    fn regions(&self) -> Vec<MemoryRegion> {
        self.0
            .present_regions()
            .into_iter()
            .map(|r| MemoryRegion {
                guest_base: r.guest_base,
                size: r.size,
                file: r.file,
                file_offset: r.file_offset,
            })
            .collect()
    }

    fn memory(&self) -> &crate::memory::MappedMemory {
        self.0.all()
    }
}

/// The root ports of a configuration: those that it places itself, or one for each of its
/// `devices` and those that are empty at first. A port that nothing is behind costs the guest
/// some 450 exits of bus enumeration.
pub fn ports(config: &MachineConfig, devices: usize) -> Vec<PortConfig> {
    let port = |(device, name, hotplug)| PortConfig {
        name,
        device,
        slot: u16::from(device),
        hotplug,
    };
    if !config.ports.is_empty() {
        let placed = config.ports.iter().map(|place| {
            // Checked with the configuration: 1 to 31.
            let device = u8::try_from(place.device).unwrap_or(u8::MAX);
            port((device, place.name.clone(), place.hotplug))
        });
        return placed.collect();
    }
    let empty = &config.hotplug_ports;
    let first = devices.max(usize::from(empty.is_empty()));
    let names = (1..=first).map(|number| format!("port{number}"));
    (1..=MAX_PORTS)
        .zip(names.chain(empty.iter().cloned()))
        .map(|(device, name)| port((device, name, true)))
        .collect()
}

/// The root complex with these ports, on the buses.
///
/// # Errors
/// One line.
pub fn root_complex(
    mmio: &Arc<Bus>,
    pio: &Arc<Bus>,
    mem64: Range<u64>,
    ports: &[PortConfig],
) -> Result<Arc<RootComplex>, String> {
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
    let complex = RootComplex::new(Arc::clone(mmio), windows, ports)
        .map_err(|e| format!("PCIe root complex: {e}"))?;
    complex
        .attach_to_buses(mmio, pio)
        .map_err(|e| format!("PCIe root complex: {e}"))?;
    Ok(complex)
}

/// What a device is made with.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// Who starts its process.
    pub launcher: &'a Launcher,
    /// The memory its rings lie in.
    pub ram: &'a GuestRam,
    /// Doorbells and interrupts.
    pub hypervisor: &'a Arc<dyn Hypervisor>,
    /// Where its function goes.
    pub pci: &'a Arc<RootComplex>,
    /// Behind which root port; `None`: the first that is free.
    pub port: Option<&'a str>,
    /// Run first on the function's own thread, where it has one.
    pub hook: &'a ThreadHook,
    /// The machine is being made: it could be made without a device that may be missing.
    pub at_start: bool,
}

/// A process to start for a device.
pub struct Order<'a> {
    /// The device.
    pub id: &'a str,
    /// Its kind.
    pub kind: &'static DeviceKind,
    /// What sets it apart from others of its kind, in the name of its seccomp policy.
    pub variant: Option<&'static str>,
    /// Arguments after argv[0].
    pub args: Vec<String>,
    /// Descriptors of its own, which it finds from 5 on.
    pub fds: Vec<OwnedFd>,
    /// Its own socket, if it may ask for connections to the listeners beside that.
    pub dial: Option<&'a Path>,
    /// Virtqueues.
    pub queues: u32,
    /// A network device's MTU as the guest is told; 0: nothing is said.
    pub mtu: u32,
    /// A network device's tap.
    pub tap: String,
    /// What its processes may use of the host.
    pub resources: Resources,
    /// MAJOR:MINOR of the block device that limits on I/O are for, or empty.
    pub block_device: String,
}

/// Starts a device process and greets it. Its vhost-user channel comes back beside it.
///
/// # Errors
/// One line that names the device, what failed and the remedy; nothing stays behind.
pub fn spawn(launcher: &Launcher, order: Order<'_>) -> Result<(Process, Frontend), String> {
    let Order {
        id,
        kind,
        variant,
        mut args,
        fds,
        dial,
        ..
    } = order;
    // The launcher sets the policy, so that the engine is not left for the process to choose.
    let policy = match (variant, launcher.io_uring()) {
        (Some(variant), _) => format!("{}-{variant}", kind.binary),
        (None, uring) => match (kind.plain_engine, uring) {
            (None, _) => kind.binary.to_owned(),
            (Some(_), true) => {
                args.extend(["--io-engine", "io_uring"].map(str::to_owned));
                kind.binary.to_owned()
            }
            (Some(plain), false) => {
                args.extend(["--io-engine", plain].map(str::to_owned));
                format!("{}-plain", kind.binary)
            }
        },
    };
    // Behind its own descriptors.
    let mut fence = FIRST_OWN_FD.saturating_add(fds.len());
    if dial.is_some() {
        args.extend(["--dial-fd".to_owned(), fence.to_string()]);
        fence = fence.saturating_add(1);
    }
    args.extend(["--fence-fd".to_owned(), fence.to_string()]);
    let started = std::time::Instant::now();
    let least = kind.least(order.queues, variant);
    let usage = place(launcher, id, &order.resources, &order.block_device, least)?;
    let incarnation = 1;
    let spawned = launcher
        .spawn(SpawnSpec {
            device_id: id.to_string(),
            binary: kind.binary.to_string(),
            policy,
            args,
            incarnation,
            fds,
            dial: dial.map(Path::to_owned),
            fence: true,
        })
        // Its cgroup is there, and where the answer came too late, its process may be.
        .map_err(|e| {
            forget(launcher, id, incarnation);
            e.to_string()
        })?;
    let undo = |why: String| undo(launcher, id, incarnation, &why);
    let mut control = BlockingClient::new(spawned.control, CONTROL_MAX_FRAME);
    let hello = hello(&mut control, id, kind, incarnation).map_err(|why| {
        undo(
            ended(launcher, id, incarnation, kind.binary).map_or(why, |how| {
                format!("{} ended at its start: {how}", kind.binary)
            }),
        )
    })?;
    let about = About {
        id: id.to_string(),
        kind: kind.name.to_string(),
        queues: usize::try_from(order.queues).unwrap_or(usize::MAX),
        mtu: order.mtu,
        tap: order.tap,
        usage: Some(usage),
    };
    let control = ControlChannel::new(control, about)
        .map_err(|e| undo(format!("its control channel: {e}")))?;
    let frontend = Frontend::connect(spawned.vhost, MESSAGE_LIMIT)
        .map_err(|e| undo(format!("its vhost-user channel: {e}")))?;
    let ready_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let process = Process {
        kind,
        life: Life::new(Budget::default()),
        newcomer: None,
        trial: None,
        unsettled: false,
        last_incarnation: incarnation,
        changes: Changes::default(),
        fence: spawned.fence,
        detectors: Vec::new(),
        incarnation,
        pid: spawned.pid,
        pidfd: spawned.pidfd,
        control,
        interest: EventSet::empty(),
        hello,
        ready_us,
    };
    Ok((process, frontend))
}

/// How a process that hung up ended, and what it said last: that tells more than a channel
/// without a peer.
pub fn ended(launcher: &Launcher, id: &str, incarnation: u64, program: &str) -> Option<String> {
    launcher
        .end_of(id, incarnation, LAST_WORDS)
        .map(|(outcome, said)| outcome.with_last_line(program, &said))
}

/// Makes a cgroup leaf for a device's processes, with these limits, if one can start with them.
///
/// # Errors
/// One line.
pub fn place(
    launcher: &Launcher,
    id: &str,
    resources: &Resources,
    block_device: &str,
    least: Least,
) -> Result<Arc<Usage>, String> {
    let placed = launcher
        .place(id, resources, block_device, least)
        .map_err(|e| e.to_string())?;
    for line in &placed.not_enforced {
        log::warn!("device {id}: a limit is not enforced: {line}");
    }
    Ok(Arc::new(Usage::new(placed, resources.clone())))
}

/// Ends a process that cannot be used after all, and says why.
pub fn undo(launcher: &Launcher, id: &str, incarnation: u64, why: &str) -> String {
    if forget(launcher, id, incarnation) {
        launcher.take_end(id, incarnation, END_LIMIT);
    }
    let name = format!("device {id}: ");
    match why.starts_with(&name) {
        true => why.to_owned(),
        false => name + why,
    }
}

/// Has the launcher end whatever is there of a device. False: it could not be told.
pub fn forget(launcher: &Launcher, id: &str, incarnation: u64) -> bool {
    let forgotten = launcher.kill_and_forget(id, incarnation);
    if let Err(e) = &forgotten {
        log::warn!("device {id}: {e}");
    }
    forgotten.is_ok()
}

/// Puts a function in front of a back-end, on the root port that is wanted, or the first free
/// one.
///
/// # Errors
/// One line, without the device's name; the back-end is as it was.
pub fn attach(
    site: &Site<'_>,
    mut options: VirtioPciOptions,
    frontend: impl Into<Option<Frontend>>,
) -> Result<(Arc<VirtioPciFunction>, PciAddress, String), String> {
    options.hook = crate::confine::helper_hook();
    if !options.external {
        // A process of ours is replaced when it dies, once its I/O has ended.
        options.successor = true;
        options.fenced = true;
    }
    let function = VirtioPciFunction::new(
        options,
        frontend,
        Arc::new(SharedRam(site.ram.clone())),
        Arc::clone(site.hypervisor),
        site.pci.decoder(),
    )
    .map_err(|e| e.to_string())?;
    let attach = |port: &str| {
        let function = Arc::clone(&function) as Arc<dyn PciFunction>;
        site.pci.attach(port, function)
    };
    if let Some(port) = site.port {
        let address = attach(port).map_err(|e| e.to_string())?;
        return Ok((function, address, port.to_owned()));
    }
    let mut ports = site.pci.ports();
    ports.retain(PortInfo::is_free);
    for port in ports {
        match attach(&port.name) {
            Ok(address) => return Ok((function, address, port.name)),
            // Another one was faster.
            Err(PciError::Occupied(_) | PciError::Vacating(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Err(NO_PORT.to_owned())
}

/// The first call on a control channel.
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
    check_hello(&hello, kind, incarnation).map(|()| hello)
}

/// Is it the process that was started, and does it speak our protocol?
///
/// # Errors
/// One line.
pub fn check_hello(
    hello: &HelloResponse,
    kind: &DeviceKind,
    incarnation: u64,
) -> Result<(), String> {
    if hello.kind != kind.name || hello.incarnation != incarnation {
        return Err(format!(
            "{} says that it is {:?} number {}: use the binaries of one build",
            kind.binary, hello.kind, hello.incarnation
        ));
    }
    if hello.protocol != DEVICE_PROTOCOL {
        return Err(format!(
            "{} {} speaks control protocol {}, this VMM {DEVICE_PROTOCOL}: use one of a build that speaks {DEVICE_PROTOCOL}",
            kind.binary,
            crate::launcher::printable(&hello.version),
            hello.protocol
        ));
    }
    Ok(())
}

/// What the ACPI tables must know.
pub fn acpi_config<'a>(
    pci: &RootComplex,
    (boot, max): (u32, u32),
    mem64: Range<u64>,
    ports: &'a [u8],
    ram: &GuestRam,
) -> AcpiConfig<'a> {
    let range = |base: u64, size: u64| base..base.saturating_add(size);
    let regions = ram.regions().iter();
    AcpiConfig {
        cpus: boot,
        max_cpus: max.max(boot),
        pci_mem64: mem64,
        last_bus: pci.last_bus(),
        ports,
        ram: regions.map(|r| range(r.guest_base, r.size)).collect(),
        pluggable: ram.pluggable().map(|area| range(area.start(), area.size())),
    }
}
