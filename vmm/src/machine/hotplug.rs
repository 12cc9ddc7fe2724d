//! Making a device while the machine exists, on a thread of its own that may wait for the
//! launcher, the device's process or somebody else's back-end, so that the manager need not.
//! The device comes back to the manager by a channel; on an error nothing of it stays.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::{
    ConsoleConfig, DiskConfig, FsConfig, MachineConfig, NetConfig, RngConfig, VhostUserConfig,
    VsockConfig,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Device, Site};
use super::net_external::{self, Foreign};
use super::net_start::Prepared;
use super::{console, disk, fs, net, rng, vsock};
use crate::api::config;
use crate::hypervisor::Hypervisor;
use crate::launcher::Launcher;
use crate::memory::GuestRam;
use crate::pci::RootComplex;
use crate::threads::{self, ThreadHook};

/// What is to be added.
#[derive(Clone, Debug, PartialEq)]
pub enum Addition {
    /// A disk.
    Disk(DiskConfig),
    /// A network device.
    Net(NetConfig),
    /// Somebody else's device.
    VhostUser(VhostUserConfig),
    /// An entropy device.
    Rng(RngConfig),
    /// The socket device.
    Vsock(VsockConfig),
    /// A console device.
    Console(ConsoleConfig),
    /// A directory.
    Fs(FsConfig),
}

impl Addition {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::VhostUser(device) => &device.id,
            Self::Rng(rng) => &rng.id,
            Self::Vsock(vsock) => &vsock.id,
            Self::Console(console) => &console.id,
            Self::Fs(fs) => &fs.id,
        }
    }

    /// Adds it to a configuration, behind this port where that places its ports itself.
    pub fn enter(&self, config: &mut MachineConfig, port: &str) {
        if let Some(place) = config.ports.iter_mut().find(|place| place.name == port) {
            self.id().clone_into(&mut place.behind);
        }
        match self {
            Self::Disk(disk) => config.disks.push(disk.clone()),
            Self::Net(net) => config.nets.push(net.clone()),
            Self::VhostUser(device) => config.vhost_users.push(device.clone()),
            Self::Rng(rng) => config.rngs.push(rng.clone()),
            Self::Vsock(vsock) => config.vsock = Some(vsock.clone()).into(),
            Self::Console(console) => config.consoles.push(console.clone()),
            Self::Fs(fs) => config.fs.push(fs.clone()),
        }
    }

    /// Checks its form beside the machine's other devices.
    ///
    /// # Errors
    /// One line that names the field and what it takes.
    pub fn validate(&self, machine: &MachineConfig) -> Result<(), String> {
        if let (Self::Vsock(_), Some(vsock)) = (self, machine.vsock.as_ref()) {
            return Err(format!(
                "vsock: the machine has a socket device, {}: a guest has one address",
                vsock.id
            ));
        }
        if matches!(self, Self::VhostUser(device) if device.optional) {
            return Err(
                "vhost_user.optional (required=off) is for devices that a machine starts with: leave it out"
                    .into(),
            );
        }
        let mut config = machine.clone();
        // Ports are counted when one is looked for.
        config.hotplug_ports.clear();
        config.ports.clear();
        self.enter(&mut config, "");
        let field = match self {
            Self::Disk(_) => format!("config.disks[{}]", machine.disks.len()),
            Self::Net(_) => format!("config.nets[{}]", machine.nets.len()),
            Self::VhostUser(_) => format!("config.vhost_users[{}]", machine.vhost_users.len()),
            Self::Rng(_) => format!("config.rngs[{}]", machine.rngs.len()),
            Self::Vsock(_) => "config.vsock".to_owned(),
            Self::Console(_) => format!("config.consoles[{}]", machine.consoles.len()),
            Self::Fs(_) => format!("config.fs[{}]", machine.fs.len()),
        };
        let name = match self {
            Self::Disk(_) => "disk",
            Self::Net(_) => "net",
            Self::VhostUser(_) => "vhost_user",
            Self::Rng(_) => "rng",
            Self::Vsock(_) => "vsock",
            Self::Console(_) => "console",
            Self::Fs(_) => "fs",
        };
        config::validate(&config).map_err(|why| why.replace(&field, name))
    }
}

/// Takes a device out of a configuration.
pub fn leave(config: &mut MachineConfig, id: &str) {
    config.disks.retain(|disk| disk.id != id);
    config.nets.retain(|net| net.id != id);
    config.vhost_users.retain(|device| device.id != id);
    config.rngs.retain(|rng| rng.id != id);
    config.consoles.retain(|console| console.id != id);
    config.fs.retain(|fs| fs.id != id);
    for port in &mut config.ports {
        if port.behind == id {
            port.behind.clear();
        }
    }
    if config.vsock.id == id {
        config.vsock = None.into();
    }
}

/// What a thread that makes a device needs of the machine.
pub struct Workshop {
    /// Who starts its process.
    pub launcher: Arc<Launcher>,
    /// Taps.
    pub prepared: Arc<Mutex<Prepared>>,
    /// The memory its rings lie in.
    pub ram: GuestRam,
    /// Doorbells and interrupts.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where its function goes.
    pub pci: Arc<RootComplex>,
    /// vCPUs that the machine started with.
    pub cpus: u32,
    /// Run first on every thread.
    pub hook: ThreadHook,
}

/// News for the manager.
pub enum News {
    /// A device was made, or not, by this operation.
    Made(u64, Box<Addition>, Result<Box<Device>, String>),
    /// A device that is to be removed has been drained, or could not be.
    Drained(u64),
    /// Memory has been plugged or unplugged, or could not be.
    Plugged(Result<(), String>),
    /// The memory device was told of a new size, or could not be.
    MemoryAsked(Result<(), RpcStatus>),
    /// A reset of the machine has come so far.
    Reset(super::reset::Progress),
}

/// The manager's end of the channel.
pub struct Mail {
    sender: Sender<News>,
    receiver: Receiver<News>,
    bell: Arc<EventFd>,
}

/// The other end.
#[derive(Clone)]
pub struct Post {
    sender: Sender<News>,
    bell: Arc<EventFd>,
}

impl Mail {
    /// An empty channel.
    ///
    /// # Errors
    /// When there is no descriptor left for the eventfd.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        Ok(Self {
            sender,
            receiver,
            bell: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
        })
    }

    /// Readable while there may be news.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// An end to send by.
    pub fn post(&self) -> Post {
        Post {
            sender: self.sender.clone(),
            bell: Arc::clone(&self.bell),
        }
    }

    /// What has come; the bell is silent afterwards.
    pub fn take(&self) -> Vec<News> {
        let _ = self.bell.read();
        self.receiver.try_iter().collect()
    }
}

impl Post {
    /// Sends; never blocks.
    pub fn send(&self, news: News) {
        if self.sender.send(news).is_ok() {
            // Private and non-blocking: at worst it is readable already.
            let _ = self.bell.write(1);
        }
    }
}

/// Begins to make a device.
///
/// # Errors
/// When no thread can be started.
pub fn begin(
    operation: u64,
    addition: Addition,
    port: String,
    workshop: Workshop,
    post: Post,
) -> io::Result<()> {
    let hook = Arc::clone(&workshop.hook);
    threads::spawn(
        "hotplug".to_owned(),
        hook,
        || Ok(()),
        move || {
            let mut addition = addition;
            let made = make(&mut addition, &port, &workshop).map(Box::new);
            workshop.launcher.settle(addition.id(), made.is_ok());
            post.send(News::Made(operation, Box::new(addition), made));
        },
    )?;
    Ok(())
}

fn make(addition: &mut Addition, port: &str, workshop: &Workshop) -> Result<Device, String> {
    let site = Site {
        launcher: &workshop.launcher,
        ram: &workshop.ram,
        hypervisor: &workshop.hypervisor,
        pci: &workshop.pci,
        port: (!port.is_empty()).then_some(port),
        hook: &workshop.hook,
        at_start: false,
    };
    match addition {
        Addition::Disk(disk) => {
            if disk.queues == 0 {
                disk.queues = workshop.cpus.min(u32::from(super::kinds::BLK.max_queues));
            }
            disk::spawn(disk, &site)
        }
        Addition::Net(config) => {
            let mut prepared = workshop
                .prepared
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            prepared.fill_net(config);
            let ready = prepared.take(config);
            // The launcher, the process or somebody else's is waited for now: others need not.
            drop(prepared);
            net::make(config, ready, &site)
        }
        Addition::Rng(config) => rng::spawn(config, &site),
        Addition::Vsock(config) => vsock::spawn(config, &site),
        Addition::Console(config) => console::spawn(config, &site),
        Addition::Fs(config) => fs::spawn(config, &site),
        Addition::VhostUser(config) => match net_external::make_any(config, &site)? {
            Foreign::Made(device) => Ok(*device),
            Foreign::Absent(_) => Err(format!(
                "device {}: its back-end is not there: start that first",
                config.id
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachineConfig {
        let mut config = MachineConfig::new();
        config.kernel = "/k".into();
        config.memory_bytes = 64 << 20;
        config.cpus.mut_or_insert_default().boot = 1;
        config.disks.push(disk("root"));
        config.hotplug_ports = (1..=30).map(|n| format!("hp{n}")).collect();
        config
    }

    fn disk(id: &str) -> DiskConfig {
        let mut disk = DiskConfig::new();
        (disk.id, disk.path) = (id.into(), format!("/{id}"));
        disk
    }

    #[test]
    fn an_addition_is_checked_beside_what_is_there() {
        let mut machine = machine();
        let good = Addition::Disk(disk("data"));
        assert_eq!(good.validate(&machine), Ok(()));
        let twice = Addition::Disk(disk("root")).validate(&machine);
        assert!(twice.is_err_and(|why| why.starts_with("disk.id root is taken")));
        let mut wrong = disk("data");
        wrong.path = "relative".into();
        let wrong = Addition::Disk(wrong).validate(&machine).unwrap_err();
        assert!(wrong.starts_with("disk.path is \"relative\""), "{wrong}");
        let mut absent = VhostUserConfig::new();
        absent.optional = true;
        let why = Addition::VhostUser(absent).validate(&machine).unwrap_err();
        assert!(why.contains("required=off"), "{why}");
        let bare = Addition::Net(NetConfig::new());
        assert!(bare.validate(&machine).is_err());
        let mut socket = VsockConfig::new();
        (socket.id, socket.socket) = ("v".into(), "/run/v".into());
        let socket = Addition::Vsock(socket);
        assert_eq!(socket.validate(&machine), Ok(()));
        socket.enter(&mut machine, "");
        let second = socket.validate(&machine).unwrap_err();
        assert!(second.starts_with("vsock: the machine has"), "{second}");
        leave(&mut machine, "v");
        assert_eq!(socket.validate(&machine), Ok(()));
        good.enter(&mut machine, "");
        assert_eq!(machine.disks.len(), 2);
        leave(&mut machine, "data");
        leave(&mut machine, "nothing");
        assert_eq!(machine.disks.len(), 1);
    }
}
