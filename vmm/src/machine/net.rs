//! Network devices on taps: from their configuration to a `bulkhead-net` process and its
//! arguments. VIRTIO 1.2 section 5.1. Called on the manager thread while the machine is made.
//!
//! Queues are receive 0, transmit 0, receive 1, … and the control queue, which is always
//! there and the last one.

use std::os::fd::OwnedFd;

use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::machine::{NetConfig, TapBackend, net_config};

use super::device::{self, Device, Order, Site, Special};
use super::kinds;
use super::net_external;
use super::net_mac::MacAddress;
use super::net_start::{Link, open_by_launcher};
use crate::virtio::VirtioPciOptions;

/// fd of the first queue of the tap in the device process: after the channels.
const FIRST_TAP_FD: usize = 5;

/// Makes a network device of any kind. `ready` is what [`Prepared::take`] said of its tap.
///
/// # Errors
/// One line that names the device or what it is attached to, and the remedy; nothing stays
/// behind.
///
/// [`Prepared::take`]: super::net_start::Prepared::take
pub fn make(
    net: &NetConfig,
    ready: Result<Option<Link>, String>,
    site: &Site<'_>,
) -> Result<Device, String> {
    let Some(net_config::Backend::Tap(tap)) = &net.backend else {
        return net_external::make_net(net, site);
    };
    match ready.and_then(|link| spawn(net, tap, link, site)) {
        Err(why) if net.optional => {
            log::warn!("device {}: {why}; its link stays down", net.id);
            net_external::make_absent(net, why, site)
        }
        made => made,
    }
}

/// Starts the device's process on its tap, which the launcher opens if there is none yet, and
/// puts a function in front.
fn spawn(
    net: &NetConfig,
    backend: &TapBackend,
    link: Option<Link>,
    site: &Site<'_>,
) -> Result<Device, String> {
    let kind = &kinds::NET;
    let link = match link {
        Some(link) => link,
        None => open_by_launcher(net, backend, site.launcher)?,
    };
    let Link { tap, vhost } = link;
    let mtu = mtu(net.mtu, tap.mtu, &tap.name)?;
    let args = args(net, tap.queues.len(), vhost.len(), mtu)?;
    let mut granted = vec![
        "control channel".to_owned(),
        "vhost-user channel".to_owned(),
    ];
    let name = crate::launcher::printable(&tap.name);
    granted.extend((0..tap.queues.len()).map(|queue| format!("tap {name}, queue {queue}")));
    granted.extend((0..vhost.len()).map(|pair| format!("/dev/vhost-net, pair {pair}")));
    let vhost_net = !vhost.is_empty();
    let fds: Vec<OwnedFd> = tap.queues.into_iter().chain(vhost).collect();
    let queues = net.queues.saturating_mul(2).saturating_add(1);
    let order = Order {
        id: &net.id,
        kind,
        variant: vhost_net.then_some("vhost"),
        args,
        fds,
        queues,
        dial: None,
        mtu,
        tap: tap.name,
        resources: net.resources.as_ref().cloned().unwrap_or_default(),
        block_device: String::new(),
    };
    let (process, frontend) = device::spawn(site.launcher, order)?;
    let count = u16::try_from(queues).unwrap_or(kind.max_queues);
    let options = VirtioPciOptions::new(&net.id, kind.virtio_id, count);
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, &net.id, process.incarnation, &why))?;
    Ok(Device {
        id: net.id.clone(),
        kind: kind.name,
        process: Some(process),
        special: Special::Net,
        function,
        address,
        port,
        queues,
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted,
    })
}

/// The MTU that the guest is told: what is asked for, or what the tap has. More than the tap
/// has would be lost on the way to the guest. 0: unknown.
fn mtu(wanted: u32, has: u32, tap: &str) -> Result<u32, String> {
    match (wanted, has) {
        (0, has) => Ok(has.min(u32::from(u16::MAX))),
        (wanted, 0) => Ok(wanted),
        (wanted, has) if wanted > has => {
            let tap = crate::launcher::printable(tap);
            Err(format!(
                "tap {tap}: its MTU is {has}, {wanted} is asked for: run `ip link set {tap} mtu {wanted}` first"
            ))
        }
        (wanted, _) => Ok(wanted),
    }
}

/// What a network process is told on its command line: everything it must know before it is
/// confined. Its fds from 5 on are the tap's queues, then vhost-net's.
fn args(net: &NetConfig, taps: usize, vhosts: usize, mtu: u32) -> Result<Vec<String>, String> {
    let mac = MacAddress::new(&net.mac).map_err(|e| format!("device {}: its MAC {e}", net.id))?;
    let spec = format!("fds={}", numbers(FIRST_TAP_FD, taps));
    let pairs = net.queues.to_string();
    let mac = mac.to_string();
    let mut args = [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--tap",
        &spec,
        "--mac",
        &mac,
        "--queue-pairs",
        &pairs,
    ]
    .map(str::to_owned)
    .to_vec();
    if vhosts > 0 {
        let first = FIRST_TAP_FD.saturating_add(taps);
        let spec = format!("fds={}", numbers(first, vhosts));
        args.extend(["--vhost-net".to_owned(), spec]);
    }
    if mtu != 0 {
        args.extend(["--mtu".to_owned(), mtu.to_string()]);
    }
    for (direction, limits) in [("rx", &net.to_guest), ("tx", &net.from_guest)] {
        args.extend(
            limits
                .as_ref()
                .map(|l| limit_args(direction, l))
                .unwrap_or_default(),
        );
    }
    Ok(args)
}

/// `first:…`, `count` of them.
fn numbers(first: usize, count: usize) -> String {
    let numbers: Vec<String> = (first..).take(count).map(|n| n.to_string()).collect();
    numbers.join(":")
}

/// `--rx-bps N[:BURST]` and so on, for what is limited.
fn limit_args(direction: &str, limits: &NetLimits) -> Vec<String> {
    let mut args = Vec::new();
    for (what, bucket) in [("bps", &limits.bytes), ("pps", &limits.packets)] {
        if let Some(text) = bucket.as_ref().and_then(bucket_text) {
            args.extend([format!("--{direction}-{what}"), text]);
        }
    }
    args
}

/// `N[:BURST]`; `None`: no limit.
fn bucket_text(bucket: &TokenBucket) -> Option<String> {
    match (bucket.per_second, bucket.burst) {
        (0, _) => None,
        (rate, 0) => Some(rate.to_string()),
        (rate, burst) => Some(format!("{rate}:{burst}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(pairs: u32) -> NetConfig {
        let mut net = NetConfig::new();
        net.id = "lan".into();
        net.queues = pairs;
        net.mac = vec![0x52, 0x54, 0, 1, 2, 3];
        net.set_tap(TapBackend::new());
        net
    }

    fn said(net: &NetConfig, taps: usize, vhosts: usize, mtu: u32) -> String {
        args(net, taps, vhosts, mtu).unwrap().join(" ")
    }

    #[test]
    fn a_process_is_told_its_descriptors_address_and_limits() {
        assert_eq!(
            said(&net(1), 1, 0, 0),
            "--control-fd 3 --vhost-fd 4 --tap fds=5 --mac 52:54:00:01:02:03 --queue-pairs 1"
        );
        let mut limited = net(2);
        let rx = limited.to_guest.mut_or_insert_default();
        rx.bytes.mut_or_insert_default().per_second = 1000;
        rx.packets.mut_or_insert_default();
        let tx = limited.from_guest.mut_or_insert_default();
        tx.packets.mut_or_insert_default().per_second = 9;
        tx.packets.mut_or_insert_default().burst = 3;
        assert_eq!(
            said(&limited, 2, 2, 9000),
            "--control-fd 3 --vhost-fd 4 --tap fds=5:6 --mac 52:54:00:01:02:03 --queue-pairs 2 --vhost-net fds=7:8 --mtu 9000 --rx-bps 1000 --tx-pps 9:3"
        );
        assert!(args(&NetConfig::new(), 1, 0, 0).is_err());
    }

    #[test]
    fn the_guest_is_told_an_mtu_that_the_tap_can_carry() {
        assert_eq!(mtu(0, 1500, "t"), Ok(1500));
        assert_eq!(mtu(0, 0, "t"), Ok(0));
        assert_eq!(mtu(1400, 1500, "t"), Ok(1400));
        assert_eq!(mtu(9000, 0, "t"), Ok(9000));
        let line = mtu(9000, 1500, "t").unwrap_err();
        assert!(line.contains("ip link set t mtu 9000"), "{line}");
    }
}
