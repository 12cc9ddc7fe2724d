//! What network devices and devices of somebody else's must look like in a configuration:
//! the part of `config` that knows them. Whether the tap exists and the switch answers is
//! seen when the machine is built. Called on the `api` thread for every Create and UpdateNet.

use std::collections::BTreeSet;

use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::machine::{
    MachineConfig, NetConfig, TapBackend, VhostUserConfig, net_config, tap_backend::Datapath,
};

use super::config::{check_device_id, known, path};
use super::config_user::{check_listeners, check_user};
use crate::launcher::MAX_QUEUE_PAIRS;
use crate::machine::net_mac::MacAddress;

/// Longest name of an interface (IFNAMSIZ without its end).
const MAX_INTERFACE_NAME: usize = 15;
/// Smallest and largest MTU (VIRTIO 1.2 section 5.1.4.1).
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// Largest MTU of a tap, as the kernel has it, and of passt: without an Ethernet header.
pub(crate) const TAP_MTU: u32 = 65521;
/// Most bytes of a configuration space.
const MAX_CONFIG: usize = 256;

/// Checks `nets` and `vhost_users` of a configuration; `ids` are those taken so far.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate<'a>(
    config: &'a MachineConfig,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    let cpus = config.cpus.as_ref().map_or(1, |cpus| cpus.boot);
    let mut taps = BTreeSet::new();
    let mut fds = BTreeSet::new();
    let mut macs = BTreeSet::new();
    let mut listeners = Vec::new();
    for (index, net) in config.nets.iter().enumerate() {
        let name = format!("config.nets[{index}]");
        known(&name, net)?;
        take_id(&name, &net.id, ids)?;
        check_net(&name, net, cpus)?;
        check_listeners(&name, net, &mut listeners)?;
        if !net.mac.is_empty() && !macs.insert(net.mac.as_slice()) {
            return Err(format!(
                "{name}.mac: {} is another device's address: give each its own, or none",
                crate::machine::net_mac::format(&net.mac)
            ));
        }
        if let Some(net_config::Backend::Tap(tap)) = &net.backend {
            if !tap.name.is_empty() && !taps.insert(tap.name.as_str()) {
                return Err(format!(
                    "{name}.tap.name: {} is another device's tap: give each its own",
                    tap.name
                ));
            }
            if let Some(fd) = tap.fds.iter().find(|fd| !fds.insert(**fd)) {
                return Err(format!(
                    "{name}.tap.fds: {fd} is named twice: give each queue pair its own"
                ));
            }
        }
    }
    for (index, device) in config.vhost_users.iter().enumerate() {
        let name = format!("config.vhost_users[{index}]");
        known(&name, device)?;
        take_id(&name, &device.id, ids)?;
        check_vhost_user(&name, device)?;
    }
    Ok(())
}

/// Checks an id, and that no other device has it.
///
/// # Errors
///
/// One line that names the field.
pub(super) fn take_id<'a>(
    name: &str,
    id: &'a str,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    check_device_id(id).map_err(|error| format!("{name}.id: {error}"))?;
    if ids.insert(id) {
        return Ok(());
    }
    Err(format!(
        "{name}.id {id} is taken by another device: give each its own"
    ))
}

fn check_net(name: &str, net: &NetConfig, cpus: u32) -> Result<(), String> {
    if !net.mac.is_empty() {
        MacAddress::new(&net.mac).map_err(|error| {
            let shown = crate::machine::net_mac::format(&net.mac);
            format!("{name}.mac: {shown:?} {error}")
        })?;
    }
    let most = match &net.backend {
        Some(net_config::Backend::VhostUser(_)) => *MTU.end(),
        _ => TAP_MTU,
    };
    if net.mtu != 0 && !(*MTU.start()..=most).contains(&net.mtu) {
        return Err(format!(
            "{name}.mtu is {}: give {} to {most}, or 0 for what the other side has",
            net.mtu,
            MTU.start()
        ));
    }
    let most = cpus.min(MAX_QUEUE_PAIRS);
    if net.queues > most {
        return Err(format!(
            "{name}.queues is {}: give at most {most}, one pair for each of the {cpus} vCPUs and no more than {MAX_QUEUE_PAIRS}",
            net.queues
        ));
    }
    for (field, limits) in [("to_guest", &net.to_guest), ("from_guest", &net.from_guest)] {
        if let Some(limits) = limits.as_ref() {
            check_limits(&format!("{name}.{field}"), limits)?;
        }
    }
    let resources = net.resources.as_ref();
    super::config_resources::check(&format!("{name}.resources"), resources, false)?;
    if resources.is_some() && matches!(net.backend, Some(net_config::Backend::VhostUser(_))) {
        return Err(format!(
            "{name}.resources is set: the other side is no process of ours; limit it where it is started"
        ));
    }
    let limited = net.to_guest.is_some() || net.from_guest.is_some();
    match &net.backend {
        Some(net_config::Backend::Tap(tap)) => check_tap(name, net, tap, limited, most),
        Some(net_config::Backend::VhostUser(_) | net_config::Backend::User(_)) if limited => {
            Err(format!(
                "{name}: to_guest and from_guest are kept by bulkhead-net, which serves taps only: set limits at the other side"
            ))
        }
        Some(net_config::Backend::VhostUser(switch)) => {
            known(&format!("{name}.vhost_user"), switch)?;
            path(&format!("{name}.vhost_user.socket"), &switch.socket)
        }
        Some(net_config::Backend::User(user)) => check_user(name, net, user),
        _ => Err(format!(
            "{name} has no backend: give tap, vhost_user or user"
        )),
    }
}

fn check_tap(
    name: &str,
    net: &NetConfig,
    tap: &TapBackend,
    limited: bool,
    most: u32,
) -> Result<(), String> {
    known(&format!("{name}.tap"), tap)?;
    match tap.datapath.enum_value() {
        Ok(Datapath::VHOST_NET) if limited => {
            return Err(format!(
                "{name}.tap.datapath is VHOST_NET, where the kernel moves the packets and knows no limits: choose USER, or leave to_guest and from_guest out"
            ));
        }
        Ok(_) => {}
        Err(number) => return Err(format!("{name}.tap.datapath is {number}: give 0 to 2")),
    }
    match (tap.name.is_empty(), tap.fds.as_slice()) {
        (true, []) => Err(format!(
            "{name}.tap: give the name of a tap, or descriptors of one (fd=)"
        )),
        (false, []) => check_interface_name(&tap.name)
            .map_err(|e| format!("{name}.tap.name is {:?}: {e}", tap.name)),
        (false, _) => Err(format!("{name}.tap has a name and fds: give one of them")),
        (true, fds) => {
            if let Some(fd) = fds.iter().find(|fd| **fd < 3) {
                return Err(format!(
                    "{name}.tap.fds: {fd} is no descriptor of a tap: give numbers from 3 on"
                ));
            }
            let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
            if count > most {
                return Err(format!(
                    "{name}.tap.fds has {count} entries: at most {most} queue pairs fit this machine"
                ));
            }
            if net.queues != 0 && net.queues != count {
                return Err(format!(
                    "{name}.queues is {}, but {name}.tap.fds has {count}: give one for each queue pair",
                    net.queues
                ));
            }
            Ok(())
        }
    }
}

/// A name that an interface can have: the kernel takes no other, and makes one of its own
/// from a '%'.
///
/// # Errors
/// What to give instead.
pub(crate) fn check_interface_name(name: &str) -> Result<(), String> {
    let fits = name.len() <= MAX_INTERFACE_NAME
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b));
    if fits {
        return Ok(());
    }
    Err(format!(
        "give the name of an interface, 1 to {MAX_INTERFACE_NAME} characters without blanks, '/', ':' and '%'"
    ))
}

fn check_vhost_user(name: &str, device: &VhostUserConfig) -> Result<(), String> {
    path(&format!("{name}.socket"), &device.socket)?;
    if !(1..=63).contains(&device.device_id) {
        return Err(format!(
            "{name}.device_id is {}: give a virtio device id, 1 to 63",
            device.device_id
        ));
    }
    if device.queues > 255 {
        return Err(format!(
            "{name}.queues is {}: give 1 to 255, or 0 for what the kind has",
            device.queues
        ));
    }
    let size = device.queue_size;
    if size != 0 && !(size.is_power_of_two() && (2..=1024).contains(&size)) {
        return Err(format!(
            "{name}.queue_size is {size}: give a power of two from 2 to 1024, or 0"
        ));
    }
    if device.config.len() > MAX_CONFIG {
        return Err(format!(
            "{name}.config has {} bytes: at most {MAX_CONFIG} are allowed",
            device.config.len()
        ));
    }
    Ok(())
}

/// Checks one direction's limits.
///
/// # Errors
///
/// One line that names the field.
pub(super) fn check_limits(name: &str, limits: &NetLimits) -> Result<(), String> {
    known(name, limits)?;
    for (field, bucket) in [("bytes", &limits.bytes), ("packets", &limits.packets)] {
        if let Some(bucket) = bucket.as_ref() {
            check_bucket(&format!("{name}.{field}"), bucket)?;
        }
    }
    Ok(())
}

pub(super) fn check_bucket(name: &str, bucket: &TokenBucket) -> Result<(), String> {
    known(name, bucket)?;
    if bucket.per_second == 0 && bucket.burst != 0 {
        return Err(format!(
            "{name}.burst is {} and {name}.per_second 0: give a rate, or neither for no limit",
            bucket.burst
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::{
        CpuConfig, UserBackend, VhostUserBackend, user_backend::Forward,
    };
    use bulkhead_proto::protobuf::EnumOrUnknown;

    fn tap(name: &str) -> NetConfig {
        let mut net = NetConfig::new();
        net.id = name.to_owned();
        let mut tap = TapBackend::new();
        tap.name = name.to_owned();
        net.set_tap(tap);
        net
    }

    fn with(nets: Vec<NetConfig>, devices: Vec<VhostUserConfig>) -> Result<(), String> {
        let mut config = MachineConfig::new();
        let mut cpus = CpuConfig::new();
        cpus.boot = 4;
        config.cpus = Some(cpus).into();
        config.nets = nets;
        config.vhost_users = devices;
        validate(&config, &mut BTreeSet::from(["disk0"]))
    }

    fn refused(change: impl FnOnce(&mut NetConfig)) -> String {
        let mut net = tap("tap0");
        change(&mut net);
        with(vec![net], Vec::new()).unwrap_err()
    }

    #[test]
    fn every_form_passes() {
        let mut fds = tap("a");
        fds.mut_tap().name.clear();
        fds.mut_tap().fds = vec![5, 6];
        let mut switch = tap("b");
        let mut backend = VhostUserBackend::new();
        backend.socket = "/run/s".into();
        switch.set_vhost_user(backend);
        switch.queues = 4;
        let mut user = tap("c");
        user.set_user(UserBackend::new());
        let mut forward = Forward::new();
        (forward.host_port, forward.guest_port) = (8080, 80);
        user.mut_user().forwards.push(forward);
        let mut fs = VhostUserConfig::new();
        (fs.id, fs.socket, fs.device_id) = ("fs0".into(), "/run/fs".into(), 26);
        assert_eq!(with(vec![tap("t"), fds, switch, user], vec![fs]), Ok(()));
    }

    #[test]
    fn errors_name_the_field() {
        let n = "config.nets[0]";
        let mut forward = Forward::new();
        (forward.host_port, forward.guest_port) = (8080, 80);
        let user = |change: fn(&mut Forward)| {
            let mut forward = forward.clone();
            change(&mut forward);
            refused(|net| {
                let mut user = UserBackend::new();
                user.forwards.push(forward);
                net.set_user(user);
            })
        };
        let mut bucket = NetLimits::new();
        bucket.bytes.mut_or_insert_default().per_second = 1;
        for (field, error) in [
            ("has no backend", refused(|net| net.backend = None)),
            (".id", refused(|net| net.id.clear())),
            (".id disk0", refused(|net| net.id = "disk0".into())),
            (".mac", refused(|net| net.mac = vec![2; 5])),
            (".mac", refused(|net| net.mac = vec![1, 0, 0, 0, 0, 1])),
            (".mac", refused(|net| net.mac = vec![0; 6])),
            (".mtu", refused(|net| net.mtu = 67)),
            (
                ".mtu is 65522: give 68 to 65521",
                refused(|net| net.mtu = 65522),
            ),
            (
                ".mtu is 65536: give 68 to 65535",
                refused(|net| {
                    net.set_vhost_user(VhostUserBackend::new());
                    net.mtu = 65536;
                }),
            ),
            (".queues is 5", refused(|net| net.queues = 5)),
            (".tap: give", refused(|net| net.mut_tap().name.clear())),
            (".tap has", refused(|net| net.mut_tap().fds.push(5))),
            (
                ".tap.name",
                refused(|net| net.mut_tap().name = "a/b".into()),
            ),
            (
                ".tap.name",
                refused(|net| net.mut_tap().name = "tap%d".into()),
            ),
            (
                ".tap.name",
                refused(|net| net.mut_tap().name = "x".repeat(16)),
            ),
            (
                ".tap.fds: 2",
                refused(|net| {
                    net.mut_tap().name.clear();
                    net.mut_tap().fds = vec![2];
                }),
            ),
            (
                ".tap.fds: 7 is named twice",
                refused(|net| {
                    net.mut_tap().name.clear();
                    net.mut_tap().fds = vec![7, 7];
                }),
            ),
            (
                ".queues is 1, but",
                refused(|net| {
                    net.queues = 1;
                    net.mut_tap().name.clear();
                    net.mut_tap().fds = vec![7, 8];
                }),
            ),
            (
                ".tap.datapath is 9",
                refused(|net| net.mut_tap().datapath = EnumOrUnknown::from_i32(9)),
            ),
            (
                ".tap.datapath is VHOST_NET",
                refused(|net| {
                    net.mut_tap().datapath = Datapath::VHOST_NET.into();
                    net.to_guest = Some(bucket.clone()).into();
                }),
            ),
            (
                ".from_guest.bytes.burst",
                refused(|net| {
                    let limits = net.from_guest.mut_or_insert_default();
                    limits.bytes.mut_or_insert_default().burst = 5;
                }),
            ),
            (
                ": to_guest and from_guest",
                refused(|net| {
                    net.set_user(UserBackend::new());
                    net.to_guest = Some(bucket.clone()).into();
                }),
            ),
            (
                ".vhost_user.socket",
                refused(|net| net.set_vhost_user(VhostUserBackend::new())),
            ),
            (
                ".queues is 2: a user-mode",
                refused(|net| {
                    net.queues = 2;
                    net.set_user(UserBackend::new());
                }),
            ),
            (".user.forwards[0].host_port", user(|f| f.host_port = 0)),
            (
                ".user.forwards[0].guest_port",
                user(|f| f.guest_port = 65536),
            ),
            (
                ".user.forwards[0].address",
                user(|f| f.address = "lo".into()),
            ),
            (
                ".user.forwards[0].protocol",
                user(|f| f.protocol = EnumOrUnknown::from_i32(5)),
            ),
        ] {
            assert!(
                error.starts_with(&format!("{n}{field}"))
                    || error == format!("{n} {field}")
                    || error.starts_with(&format!("{n} {field}")),
                "{field}: {error}"
            );
            assert!(!error.contains('\n'), "{error}");
        }
        let twice = with(
            vec![tap("a"), {
                let mut b = tap("b");
                b.mut_tap().name = "a".into();
                b
            }],
            Vec::new(),
        );
        assert!(twice.unwrap_err().starts_with("config.nets[1].tap.name"));
        let same = ["a", "b"].map(|name| {
            let mut net = tap(name);
            net.mac = vec![2, 0, 0, 0, 0, 1];
            net
        });
        let same = with(same.into(), Vec::new()).unwrap_err();
        let told = "config.nets[1].mac: 02:00:00:00:00:01 is another device's address";
        assert!(same.starts_with(told), "{same}");
    }

    #[test]
    fn a_foreign_device_is_checked() {
        let good = || {
            let mut fs = VhostUserConfig::new();
            (fs.id, fs.socket, fs.device_id) = ("fs0".into(), "/run/fs".into(), 26);
            fs
        };
        type Change = fn(&mut VhostUserConfig);
        let cases: [(&str, Change); 6] = [
            ("id", |d| d.id = "disk0".into()),
            ("socket", |d| d.socket = "fs".into()),
            ("device_id", |d| d.device_id = 64),
            ("queues", |d| d.queues = 256),
            ("queue_size", |d| d.queue_size = 96),
            ("config", |d| d.config = vec![0; 257]),
        ];
        for (field, change) in cases {
            let mut device = good();
            change(&mut device);
            let error = with(Vec::new(), vec![device]).unwrap_err();
            assert!(
                error.starts_with(&format!("config.vhost_users[0].{field}")),
                "{field}: {error}"
            );
        }
    }
}
