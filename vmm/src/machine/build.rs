//! Makes a machine from its configuration: memory, interrupt controller, serial port,
//! PCIe, a process for every device, ACPI tables, kernel, vCPUs. Runs on the manager
//! thread, confined: every path is opened by the launcher, and KVM is the descriptor that
//! was opened at the start.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_proto::machine::{MachineConfig, serial_config};

use super::boot_files::{self, BootFiles};
use super::console;
use super::device::{self, Device, END_LIMIT, Site, Special};
use super::device_table::DeviceTable;
use super::disk;
use super::fs;
use super::mem;
use super::net;
use super::net_external::{self, Foreign};
use super::net_start::Prepared;
use super::rng;
use super::vsock;
use crate::arch::x86_64::boot::BootEntry;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::events::EventSender;
use crate::ged::Ged;
use crate::hotplug::HotplugRegisters;
use crate::hypervisor::{Gsi, Hypervisor};
use crate::kvm::KvmVm;
use crate::launcher::{Access, Launcher, LauncherError};
use crate::memory::{self, GuestRam};
use crate::pci::RootComplex;
use crate::power;
use crate::serial::{Serial, SerialBackend};
use crate::threads::ThreadHook;
use crate::vcpu::{VcpuConfig, VcpuManager};

/// What a machine is made of. Fields drop in this order: vCPUs first.
pub struct Parts {
    /// vCPU threads.
    pub vcpus: VcpuManager,
    /// COM1.
    pub serial: Arc<Serial>,
    /// The generic event device.
    pub ged: Arc<Ged>,
    /// What tells the guest of hot-plug.
    pub hotplug: Arc<HotplugRegisters>,
    /// PCIe.
    pub pci: Arc<RootComplex>,
    /// One process each.
    pub devices: DeviceTable,
    /// Devices that the machine starts without, and why.
    pub absent: Vec<(String, String)>,
    /// KVM.
    pub kvm: Arc<KvmVm>,
    /// Guest memory.
    pub ram: GuestRam,
    /// What a reset loads again.
    pub boot: Arc<BootFiles>,
    /// Where the kernel was entered last.
    pub entry: Arc<BootEntry>,
}

/// The standard streams, cloned before confinement.
pub struct Stdio {
    /// Standard input.
    pub input: OwnedFd,
    /// Standard output.
    pub output: OwnedFd,
}

/// Fills in what a checked configuration leaves to us.
pub fn fill_defaults(config: &mut MachineConfig) {
    let cpus = config.cpus.as_ref().map_or(1, |c| c.boot);
    for disk in &mut config.disks {
        if disk.queues == 0 {
            disk.queues = cpus.min(u32::from(super::kinds::BLK.max_queues));
        }
    }
}

/// Makes the machine, its vCPUs parked.
///
/// # Errors
/// One line that names what failed and the remedy. What was made is undone by dropping.
pub fn build(
    config: &MachineConfig,
    dev_kvm: OwnedFd,
    launcher: &Launcher,
    prepared: &mut Prepared,
    stdio: &Stdio,
    events: EventSender,
    hooks: &Hooks,
) -> Result<Parts, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    // Files first: a wrong path should cost nothing else.
    let files = Arc::new(open_boot_files(config, launcher)?);
    let backend = serial_backend(config, launcher, stdio)?;

    let host_total = memory::host_memory_total().map_err(|e| format!("host memory: {e}"))?;
    let kvm = Arc::new(KvmVm::create(dev_kvm).map_err(|e| text(&e))?);
    let phys_bits = kvm.phys_bits().map_err(|e| text(&e))?;
    let (size, max) = (config.memory_bytes, config.memory_max_bytes);
    memory::check_size(size, max, host_total, phys_bits).map_err(|e| text(&e))?;
    let ram = GuestRam::with_pluggable(size, max).map_err(|e| text(&e))?;
    kvm.map_ram(&ram).map_err(|e| text(&e))?;

    let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let serial = Serial::new(backend, &hooks.helper).map_err(|e| format!("serial: {e}"))?;
    serial.attach(&pio).map_err(|e| format!("serial: {e}"))?;
    kvm.add_irqfd(serial.irq_eventfd(), Gsi(layout::COM1_GSI))
        .map_err(|e| format!("serial interrupt: {e}"))?;
    power::attach(&pio, &events).map_err(|e| format!("power registers: {e}"))?;
    let ged = Ged::new(Box::new(kvm.irq_line(Gsi(layout::GED_GSI))));
    ged.attach(&mmio).map_err(|e| format!("GED: {e}"))?;

    let mem64 = boot_files::pci_mem64(&ram);
    let pci = device::root_complex(&mmio, &pio, mem64, &device::ports(config, count(config)))?;
    let cpus = config.cpus.clone().unwrap_or_default();
    let complex = Arc::downgrade(&pci);
    let detach = move |slot| {
        let pci = complex.upgrade()?;
        pci.detach_slot(slot)
    };
    let max_cpus = cpus.max.max(cpus.boot);
    let hotplug = HotplugRegisters::new(cpus.boot, max_cpus, Box::new(detach), events.clone());
    hotplug
        .attach(&mmio)
        .map_err(|e| format!("hot-plug registers: {e}"))?;

    let hypervisor: Arc<dyn Hypervisor> = kvm.clone();
    let site = Site {
        launcher,
        ram: &ram,
        hypervisor: &hypervisor,
        pci: &pci,
        port: None,
        hook: &hooks.helper,
        at_start: true,
    };
    // Behind the port that the configuration places it behind, or the first that is free.
    let behind = |id: &str| {
        let place = config.ports.iter().find(|port| port.behind == id);
        let port = place.map(|port| port.name.as_str());
        Site { port, ..site }
    };
    let mut devices = Undo {
        devices: Vec::new(),
        launcher,
        pci: Some(&pci),
    };
    for disk in &config.disks {
        devices.devices.push(disk::spawn(disk, &behind(&disk.id))?);
    }
    for net in &config.nets {
        let site = behind(&net.id);
        let ready = prepared.take(net);
        devices.devices.push(net::make(net, ready, &site)?);
    }
    let mut absent = Vec::new();
    for device in &config.vhost_users {
        match net_external::make_any(device, &behind(&device.id))? {
            Foreign::Made(made) => devices.devices.push(*made),
            Foreign::Absent(why) => absent.push((device.id.clone(), why)),
        }
    }

    for rng in &config.rngs {
        devices.devices.push(rng::spawn(rng, &behind(&rng.id))?);
    }

    if let Some(vsock) = config.vsock.as_ref() {
        devices
            .devices
            .push(vsock::spawn(vsock, &behind(&vsock.id))?);
    }

    for console in &config.consoles {
        let made = console::spawn(console, &behind(&console.id))?;
        devices.devices.push(made);
    }

    for directory in &config.fs {
        let made = fs::spawn(directory, &behind(&directory.id))?;
        devices.devices.push(made);
    }

    if let Some(area) = ram.pluggable() {
        let site = behind(mem::ID);
        devices.devices.push(mem::spawn(area, ram.size(), &site)?);
    }

    let entry = Arc::new(files.load(&ram, &pci, (cpus.boot, max_cpus))?);
    let vcpus = VcpuManager::new(
        &kvm,
        &VcpuConfig {
            count: max_cpus,
            boot: cpus.boot,
            pins: cpus.pin.iter().map(|p| *p as usize).collect(),
        },
        &mmio,
        &pio,
        &entry,
        &events,
        &hooks.vcpu,
    )
    .map_err(|e| match cpus.pin.as_slice() {
        [] => text(&e),
        pins => format!(
            "{e} (pin={})",
            pins.iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(":")
        ),
    })?;
    let devices = devices.keep();
    Ok(Parts {
        vcpus,
        serial,
        ged,
        hotplug,
        pci,
        devices: devices.into(),
        absent,
        kvm,
        ram,
        boot: files,
        entry,
    })
}

/// Devices of a configuration.
fn count(config: &MachineConfig) -> usize {
    let nets = config.nets.len().saturating_add(config.vhost_users.len());
    let memory = usize::from(config.memory_max_bytes != 0);
    config
        .disks
        .len()
        .saturating_add(nets)
        .saturating_add(config.rngs.len())
        .saturating_add(usize::from(config.vsock.is_some()))
        .saturating_add(config.consoles.len())
        .saturating_add(config.fs.len())
        .saturating_add(memory)
}

/// Devices of a machine that is not made yet: their processes end with it, so that nothing
/// of it is in the way of the next attempt.
struct Undo<'a> {
    devices: Vec<Device>,
    launcher: &'a Launcher,
    /// What holds their functions; `None`: they are kept.
    pci: Option<&'a RootComplex>,
}

impl Undo<'_> {
    fn keep(mut self) -> Vec<Device> {
        self.pci = None;
        std::mem::take(&mut self.devices)
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // It has said so, and ends what is left when the VMM ends, at the latest.
        let _ = end_all(&self.devices, self.launcher);
        if let Some(pci) = self.pci {
            pci.dismantle();
        }
    }
}

/// Where its serial port listens, if it does.
pub fn serial_socket(config: &MachineConfig) -> Option<PathBuf> {
    use bulkhead_proto::machine::serial_config::Mode;
    let socket = config.serial.mode.enum_value() == Ok(Mode::SOCKET);
    socket.then(|| PathBuf::from(&config.serial.path))
}

/// Ends the processes of devices that no guest has had, and removes their sockets.
///
/// # Errors
/// The launcher does not answer: it was not asked about the rest.
pub fn end_all(devices: &[Device], launcher: &Launcher) -> Result<(), LauncherError> {
    for device in devices {
        if let Err(e) = device.forget(launcher) {
            log::warn!("device {}: {e}", device.id);
            match e {
                LauncherError::Refused(_) => continue,
                silent => return Err(silent),
            }
        }
        let incarnation = match &device.special {
            Special::Foreign(switch) => switch.running(),
            _ => device.process.as_ref().and_then(|process| {
                // The end of one that has ended has been told.
                let over = process.newcomer.is_none() && process.life.has_exited();
                (!over).then(|| process.latest())
            }),
        };
        if let Some(incarnation) = incarnation {
            launcher.take_end(&device.id, incarnation, END_LIMIT);
        }
    }
    Ok(())
}

/// What runs first on each thread of a machine.
pub struct Hooks {
    /// On vCPU threads: their own seccomp filter.
    pub vcpu: ThreadHook,
    /// On the serial thread: the steady stage.
    pub helper: ThreadHook,
}

fn open_boot_files(config: &MachineConfig, launcher: &Launcher) -> Result<BootFiles, String> {
    let open = |path: &str, role: &str| {
        launcher
            .open_path(Path::new(path), role, Access::Read, false)
            .map(|(file, _)| file)
            .map_err(|e| e.to_string())
    };
    let kernel = (open(&config.kernel, "kernel")?, config.kernel.clone());
    let initrd = match config.initrd.is_empty() {
        true => None,
        false => Some((open(&config.initrd, "initrd")?, config.initrd.clone())),
    };
    Ok(BootFiles {
        kernel,
        initrd,
        cmdline: config.cmdline.clone(),
    })
}

fn serial_backend(
    config: &MachineConfig,
    launcher: &Launcher,
    stdio: &Stdio,
) -> Result<SerialBackend, String> {
    use serial_config::Mode;
    let clone = |fd: &OwnedFd| {
        fd.as_fd()
            .try_clone_to_owned()
            .map_err(|e| format!("serial: {e}"))
    };
    let Some(serial) = config.serial.as_ref() else {
        return Ok(SerialBackend::Null);
    };
    let path = Path::new(&serial.path);
    Ok(match serial.mode.enum_value() {
        Ok(Mode::NONE) => SerialBackend::Null,
        Ok(Mode::STDIO) => SerialBackend::Stdio {
            input: Some(clone(&stdio.input)?),
            output: clone(&stdio.output)?,
        },
        Ok(Mode::FILE) => SerialBackend::File(
            launcher
                .open_path(path, "serial", Access::Append, false)
                .map_err(|e| e.to_string())?
                .0
                .into(),
        ),
        Ok(Mode::SOCKET) => SerialBackend::Listener(
            launcher
                .bind_unix(path, "serial")
                .map_err(|e| e.to_string())?
                .into(),
        ),
        Err(n) => return Err(format!("serial.mode: {n} is unknown: give 0 to 3")),
    })
}
