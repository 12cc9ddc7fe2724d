//! PcieDeviceKind as the configuration of a device of ours. A device's id is the name of the
//! root port that it is behind.

use bulkhead_proto::RpcStatus;
use bulkhead_proto::machine::{
    ConsoleConfig, ConsolePort, DiskConfig, NetConfig, RngConfig, TapBackend, VhostUserConfig,
    VsockConfig, disk_config::Cache,
};
use bulkhead_proto::vmservice::{
    PcieDeviceKind, VhostUser, VhostUserFs, VhostUserOther, VirtioBlk, VirtioConsole, VirtioNet,
    VirtioVsock, disk_backend, nic_backend, pcie_device_kind, serial_backend, tap_backend,
    vhost_user_device, virtio_device,
};

use super::{not_offered, wrong};
use crate::api::check_interface_name;
use crate::api::config::path;
use crate::launcher::MAX_QUEUE_PAIRS;
use crate::machine::net_mac::MacAddress;

/// Virtio device ids (VIRTIO 1.2 section 5).
const BLOCK: u32 = 2;
const FILE_SYSTEM: u32 = 26;
/// Bytes of a file system's tag (VIRTIO 1.2 section 5.11.4).
const TAG: usize = 36;

/// A device.
#[derive(Debug, PartialEq)]
pub(super) enum Part {
    Disk(DiskConfig),
    Net(NetConfig),
    VhostUser(VhostUserConfig),
    Rng(RngConfig),
    Vsock(VsockConfig),
    Console(ConsoleConfig),
}

/// A device of this id, for a machine with `cpus` vCPUs.
pub(super) fn part(
    field: &str,
    id: &str,
    kind: PcieDeviceKind,
    cpus: u32,
) -> Result<Part, RpcStatus> {
    use pcie_device_kind::Kind as Endpoint;
    use virtio_device::Kind;
    let virtio = match kind.kind {
        Some(Endpoint::Virtio(virtio)) => virtio,
        Some(Endpoint::Nvme(_)) => {
            return Err(not_offered(&format!("{field}.nvme"), "give virtio.blk"));
        }
        Some(Endpoint::Vfio(_)) => {
            return Err(not_offered(&format!("{field}.vfio"), "leave it out"));
        }
        _ => return Err(wrong(format!("{field} is empty: give virtio"))),
    };
    let field = format!("{field}.virtio");
    match virtio.kind {
        Some(Kind::Blk(disk)) => disk_config(&format!("{field}.blk"), id, disk).map(Part::Disk),
        Some(Kind::Net(net)) => net_config(&format!("{field}.net"), id, net, cpus).map(Part::Net),
        Some(Kind::VhostUser(device)) => {
            vhost_user(&format!("{field}.vhost_user"), id, device).map(Part::VhostUser)
        }
        Some(Kind::Rng(_)) => {
            let mut rng = RngConfig::new();
            rng.id = id.to_owned();
            Ok(Part::Rng(rng))
        }
        Some(Kind::Vsock(vsock)) => {
            vsock_config(&format!("{field}.vsock"), id, vsock).map(Part::Vsock)
        }
        Some(Kind::Console(console)) => {
            console_config(&format!("{field}.console"), id, console).map(Part::Console)
        }
        _ => Err(wrong(format!(
            "{field} is empty: give blk, net, rng, vsock, console or vhost_user"
        ))),
    }
}

fn disk_config(field: &str, id: &str, from: VirtioBlk) -> Result<DiskConfig, RpcStatus> {
    let backend = from.backend.into_option().and_then(|backend| backend.kind);
    let Some(disk_backend::Kind::File(file)) = backend else {
        return Err(wrong(format!("{field}.backend is empty: give file")));
    };
    path(&format!("{field}.backend.file.path"), &file.path).map_err(wrong)?;
    let mut disk = DiskConfig::new();
    disk.id = id.to_owned();
    disk.path = file.path;
    disk.readonly = from.read_only;
    disk.cache = match file.direct {
        true => Cache::CACHE_NONE.into(),
        false => Cache::WRITEBACK.into(),
    };
    Ok(disk)
}

/// The guest's address is 3: the message has none.
fn vsock_config(field: &str, id: &str, from: VirtioVsock) -> Result<VsockConfig, RpcStatus> {
    path(&format!("{field}.socket_path"), &from.socket_path).map_err(wrong)?;
    let mut vsock = VsockConfig::new();
    vsock.id = id.to_owned();
    vsock.socket = from.socket_path;
    Ok(vsock)
}

/// One console on one socket.
fn console_config(field: &str, id: &str, from: VirtioConsole) -> Result<ConsoleConfig, RpcStatus> {
    let backend = from.backend.into_option().and_then(|backend| backend.kind);
    let Some(serial_backend::Kind::Relay(relay)) = backend else {
        return Err(wrong(format!("{field}.backend is empty: give relay")));
    };
    let field = format!("{field}.backend.relay");
    path(&format!("{field}.socket_path"), &relay.socket_path).map_err(wrong)?;
    if relay.connect {
        let field = format!("{field}.connect");
        return Err(not_offered(
            &field,
            "leave it out: bulkhead listens on socket_path",
        ));
    }
    let mut port = ConsolePort::new();
    port.socket = relay.socket_path;
    let mut console = ConsoleConfig::new();
    console.id = id.to_owned();
    console.ports.push(port);
    Ok(console)
}

fn net_config(field: &str, id: &str, from: VirtioNet, cpus: u32) -> Result<NetConfig, RpcStatus> {
    use nic_backend::Kind;
    let backend = from.backend.into_option().and_then(|backend| backend.kind);
    let by_tap = "give tap, with the name of an interface";
    let tap = match backend {
        Some(Kind::Tap(tap)) => tap.kind,
        Some(Kind::Dio(_)) => return Err(not_offered(&format!("{field}.backend.dio"), by_tap)),
        Some(Kind::Consomme(_)) => {
            return Err(not_offered(&format!("{field}.backend.consomme"), by_tap));
        }
        _ => return Err(wrong(format!("{field}.backend is empty: {by_tap}"))),
    };
    let name = match tap {
        Some(tap_backend::Kind::Name(name)) => name,
        Some(tap_backend::Kind::FdName(_)) => {
            let field = format!("{field}.backend.tap.fd_name");
            return Err(not_offered(&field, "give the interface's name"));
        }
        _ => return Err(wrong(format!("{field}.backend.tap is empty: give name"))),
    };
    check_interface_name(&name)
        .map_err(|why| wrong(format!("{field}.backend.tap.name is {name:?}: {why}")))?;
    let mut net = NetConfig::new();
    net.id = id.to_owned();
    if !from.mac_address.is_empty() {
        net.mac = mac(&format!("{field}.mac_address"), &from.mac_address)?;
    }
    net.queues = match from.max_queues {
        None => 0,
        Some(0) => return Err(wrong(format!("{field}.max_queues is 0: give 1 or more"))),
        // It says how many there may be at most.
        Some(most) => most.min(cpus).min(MAX_QUEUE_PAIRS),
    };
    let mut tap = TapBackend::new();
    tap.name = name;
    net.set_tap(tap);
    Ok(net)
}

/// An address as Windows and Kata write it.
fn mac(field: &str, text: &str) -> Result<Vec<u8>, RpcStatus> {
    let shape = text.len() == 17 && !text.contains(':');
    let address = text.replace('-', ":").parse::<MacAddress>();
    match address {
        Ok(address) if shape => Ok(address.bytes().to_vec()),
        Err(why) if shape => Err(wrong(format!("{field} {why}"))),
        _ => Err(wrong(format!(
            "{field} is no MAC address: give six bytes such as 52-54-00-12-34-56"
        ))),
    }
}

fn vhost_user(field: &str, id: &str, from: VhostUser) -> Result<VhostUserConfig, RpcStatus> {
    use vhost_user_device::Kind;
    path(&format!("{field}.socket_path"), &from.socket_path).map_err(wrong)?;
    let mut device = VhostUserConfig::new();
    device.id = id.to_owned();
    device.socket = from.socket_path;
    match from.device.into_option().and_then(|device| device.kind) {
        Some(Kind::Blk(blk)) => {
            let field = format!("{field}.device.blk");
            device.device_id = BLOCK;
            device.queues = queues(&field, blk.num_queues, 0)?;
            device.queue_size = queue_size(&field, blk.queue_size)?;
        }
        Some(Kind::Fs(fs)) => file_system(&format!("{field}.device.fs"), &fs, &mut device)?,
        Some(Kind::Other(other)) => {
            other_device(&format!("{field}.device.other"), &other, &mut device)?;
        }
        _ => {
            return Err(wrong(format!(
                "{field}.device is empty: give blk, fs or other"
            )));
        }
    }
    Ok(device)
}

/// Its configuration space is ours, since no message to a back-end carries the tag.
fn file_system(
    field: &str,
    from: &VhostUserFs,
    device: &mut VhostUserConfig,
) -> Result<(), RpcStatus> {
    let tag = from.tag.as_bytes();
    if tag.is_empty() || tag.len() > TAG || tag.contains(&0) {
        return Err(wrong(format!(
            "{field}.tag has {} bytes: give 1 to {TAG} that are not zero",
            tag.len()
        )));
    }
    device.device_id = FILE_SYSTEM;
    device.queue_size = queue_size(field, from.queue_size)?;
    let all = queues(field, from.num_queues, 1)?;
    device.queues = match all {
        0 => 2,
        all => all,
    };
    let mut space = tag.to_vec();
    space.resize(TAG, 0);
    let requests = device.queues.saturating_sub(1);
    space.extend_from_slice(&requests.to_le_bytes());
    device.config = space;
    Ok(())
}

fn other_device(
    field: &str,
    from: &VhostUserOther,
    device: &mut VhostUserConfig,
) -> Result<(), RpcStatus> {
    if !(1..=63).contains(&from.device_id) {
        return Err(wrong(format!(
            "{field}.device_id is {}: give a virtio device id, 1 to 63",
            from.device_id
        )));
    }
    let Some(size) = from.queue_sizes.first() else {
        return Err(wrong(format!(
            "{field}.queue_sizes is empty: give a size for each queue"
        )));
    };
    if from.queue_sizes.iter().any(|other| other != size) {
        let field = format!("{field}.queue_sizes: queues of different sizes");
        return Err(not_offered(&field, "give each the same"));
    }
    device.device_id = from.device_id;
    device.queue_size = queue_size(field, Some(*size))?;
    let count = u32::try_from(from.queue_sizes.len()).unwrap_or(u32::MAX);
    device.queues = queues(field, Some(count), 0)?;
    Ok(())
}

/// Queues of a device that has `more` beside them; 0: what its kind has.
fn queues(field: &str, count: Option<u32>, more: u32) -> Result<u32, RpcStatus> {
    let Some(count) = count else { return Ok(0) };
    let all = count.saturating_add(more);
    if count == 0 || all > 255 {
        return Err(wrong(format!("{field}: {count} queues: give 1 to 254")));
    }
    Ok(all)
}

/// 0: what the device has when nothing is said.
fn queue_size(field: &str, size: Option<u32>) -> Result<u32, RpcStatus> {
    match size {
        None => Ok(0),
        Some(size) if size.is_power_of_two() && (2..=1024).contains(&size) => Ok(size),
        Some(size) => Err(wrong(format!(
            "{field}: queue size {size}: give a power of two from 2 to 1024"
        ))),
    }
}
