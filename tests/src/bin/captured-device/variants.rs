//! What is attacked from: each kind of device process, with each of its policies.

use bulkhead_tests::host::{Namespace, Undo, sh};
use bulkhead_tests::vmm::Scratch;

use crate::hosts::{Host, block_device, has_loops};

/// Devices of one VM at most: one for each attempt.
const AT_ONCE: usize = 24;

/// How attempts are called on what not every process has: the channel by which it asks the launcher
/// for connections, a ring of io_uring, guest memory where no guest has been started.
pub const ASKING: &str = "asking for connections: ";
/// Sockets of every family there may be, by number: for some kinds of process, which have filters
/// alike to those of the others in that.
pub const FAMILIES: &str = "a socket of family";
/// See [`ASKING`].
pub const RING: &str = "its own ring: ";
/// See [`ASKING`].
pub const MEMORY: &str = "guest memory: ";

/// A kind of device process under one of its policies.
pub struct Variant {
    /// The policy, by its file's name.
    pub policy: &'static str,
    /// The program.
    pub binary: &'static str,
    /// What host the VM is on.
    pub host: Host,
    /// How a device is asked for: see [`Variant::option`].
    device: Device,
}

enum Device {
    Raw,
    Block,
    Image,
    Tap { backend: &'static str },
    Memory,
    Entropy,
    Sockets,
    Consoles,
}

/// All that are to be had here; and those that are not, with the reason.
pub fn all() -> (Vec<Variant>, Vec<(&'static str, &'static str)>) {
    let on = |host, policy, binary, device| Variant {
        policy,
        binary,
        host,
        device,
    };
    let variant = |policy, binary, device| on(Host::This, policy, binary, device);
    let (blk, net) = ("bulkhead-blk", "bulkhead-net");
    let tap = |backend| Device::Tap { backend };
    let mut all = vec![
        variant("bulkhead-blk", blk, Device::Raw),
        on(Host::WithoutRings, "bulkhead-blk-plain", blk, Device::Raw),
        variant("bulkhead-blk-image", blk, Device::Image),
        variant("bulkhead-net", net, tap("user")),
        on(Host::WithoutRings, "bulkhead-net-plain", net, tap("user")),
        variant("bulkhead-mem", "bulkhead-mem", Device::Memory),
        variant("bulkhead-rng", "bulkhead-rng", Device::Entropy),
        variant("bulkhead-vsock", "bulkhead-vsock", Device::Sockets),
        variant("bulkhead-console", "bulkhead-console", Device::Consoles),
    ];
    let mut absent = Vec::new();
    if has_loops() {
        all.push(on(Host::Erasing, "bulkhead-blk-erase", blk, Device::Block));
    } else {
        absent.push(("bulkhead-blk-erase", "there is no loop device to be had"));
    }
    if std::fs::exists("/dev/vhost-net").unwrap_or(false) {
        all.push(variant("bulkhead-net-vhost", net, tap("vhost-net")));
    } else {
        absent.push(("bulkhead-net-vhost", "there is no /dev/vhost-net"));
    }
    (all, absent)
}

impl Variant {
    /// How many attempts one VM makes.
    pub fn at_once(&self) -> usize {
        match self.device {
            // A machine has one of them.
            Device::Memory | Device::Sockets => 1,
            _ => AT_ONCE,
        }
    }

    /// The device that makes attempt `number`, as the VM calls it.
    pub fn id(&self, number: usize) -> String {
        match self.device {
            Device::Memory => "memory".to_owned(),
            _ => format!("a{number}"),
        }
    }

    /// Arguments of `create` for the device that makes attempt `number`; what undoes what was made
    /// for it goes to `made`.
    ///
    /// # Errors
    /// What it needs could not be made.
    pub fn option(
        &self,
        number: usize,
        scratch: &Scratch,
        namespace: &Namespace,
        made: &mut Vec<Undo>,
    ) -> Result<[String; 2], String> {
        // One and the number, since none at all is no size.
        let size = number.saturating_add(1).saturating_mul(128);
        let (option, value) = match self.device {
            Device::Raw => {
                let disk = scratch.disk(&format!("d{number}"), 1 << 16, 7)?;
                let serial = format!("serial=hostile-{number}");
                (
                    "--disk",
                    format!("path={disk},id=a{number},{serial},queues=1"),
                )
            }
            Device::Block => {
                let (device, undo) = block_device(scratch, &format!("b{number}"))?;
                made.push(undo);
                let serial = format!("serial=hostile-{number}");
                let spec = format!("path={device},id=a{number},{serial},queues=1");
                ("--disk", spec)
            }
            Device::Image => {
                let disk = scratch.path(&format!("d{number}.qcow2"));
                if !std::fs::exists(&disk).unwrap_or(false) {
                    let empty = scratch.path("empty.qcow2");
                    if !std::fs::exists(&empty).unwrap_or(false) {
                        sh(&format!("qemu-img create -q -f qcow2 {empty} 1M"))?;
                    }
                    std::fs::copy(&empty, &disk).map_err(|e| format!("{disk}: {e}"))?;
                }
                let serial = format!("serial=hostile-{number}");
                let spec = format!("path={disk},format=qcow2,id=a{number},{serial},queues=1");
                ("--disk", spec)
            }
            Device::Tap { backend } => {
                let tap = format!("bh{number}");
                if namespace.sh(&format!("ip link show {tap}")).is_err() {
                    namespace.tap(&tap, "", "user root")?;
                }
                let mac = format!("mac=02:b0:b0:b0:b0:{number:02x}");
                (
                    "--net",
                    format!("tap={tap},id=a{number},{mac},backend={backend}"),
                )
            }
            Device::Memory => {
                let max = size.saturating_add(96);
                ("--memory", format!("96M,max={max}M"))
            }
            Device::Entropy => ("--rng", format!("id=a{number},bps=1M:{size}M")),
            Device::Sockets => {
                let listen = sockets(scratch, number);
                let cid = format!("cid=1000000{number}");
                ("--vsock", format!("id=a{number},socket={listen},{cid}"))
            }
            Device::Consoles => {
                let listen = scratch.path(&format!("c{number}"));
                let name = format!("name=hostile-{number}");
                ("--console", format!("id=a{number},socket={listen},{name}"))
            }
        };
        Ok([option.to_owned(), value])
    }

    /// Whether `option` says how much memory the VM has.
    pub fn is_memory(&self) -> bool {
        matches!(self.device, Device::Memory)
    }

    /// Whether it may ask for connections.
    fn asks(&self) -> bool {
        matches!(self.device, Device::Sockets)
    }

    /// What it has that not every process has, as attempts on it are called.
    pub fn own(&self) -> &'static [&'static str] {
        match self.device {
            Device::Sockets => &[ASKING],
            Device::Block => &[RING],
            Device::Raw | Device::Tap { backend: "user" } if self.host == Host::This => {
                &[RING, FAMILIES]
            }
            Device::Entropy | Device::Consoles => &[FAMILIES],
            _ => &[],
        }
    }

    /// The socket beside which the device that makes attempt `number` may ask for connections.
    pub fn asks_beside(&self, number: usize, scratch: &Scratch) -> Option<String> {
        self.asks().then(|| sockets(scratch, number))
    }
}

fn sockets(scratch: &Scratch, number: usize) -> String {
    scratch.path(&format!("sockets/v{number}"))
}
