//! What `ctl info` says of network devices and of other vhost-user devices, as text and as JSON.

use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::machine::tap_backend::Datapath;
use bulkhead_proto::machine::user_backend::forward::Protocol;
use bulkhead_proto::machine::{NetConfig, VhostUserConfig, net_config::Backend};
use serde_json::{Value, json};

use super::ctl_output::bucket_json;
use super::ctl_output_config::resources;

fn mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What a network device is attached to: a kind and a name.
fn backend(net: &NetConfig) -> (&'static str, String) {
    match &net.backend {
        Some(Backend::Tap(tap)) if tap.name.is_empty() => {
            let fds: Vec<String> = tap.fds.iter().map(i32::to_string).collect();
            ("tap", format!("fd {}", fds.join(":")))
        }
        Some(Backend::Tap(tap)) => ("tap", tap.name.clone()),
        Some(Backend::VhostUser(switch)) => ("vhost-user", switch.socket.clone()),
        Some(Backend::User(_)) => ("user", "passt".to_owned()),
        Some(_) | None => ("unknown", String::new()),
    }
}

/// One network device for `info --json`.
pub fn net_json(net: &NetConfig) -> Value {
    let (kind, name) = backend(net);
    json!({
        "id": net.id, "backend": kind, "name": name, "mac": mac(&net.mac),
        "fds": net.tap().fds, "datapath": datapath(net), "server": net.vhost_user().server, "forwards": forwards(net),
        "queues": net.queues, "mtu": net.mtu, "required": !net.optional,
        "to_guest": limits_json(net.to_guest.as_ref()),
        "from_guest": limits_json(net.from_guest.as_ref()),
        "resources": resources(net.resources.as_ref()),
    })
}

/// Who moves a tap's packets; null: it is none.
fn datapath(net: &NetConfig) -> Option<&'static str> {
    let Some(Backend::Tap(tap)) = &net.backend else {
        return None;
    };
    Some(match tap.datapath.enum_value() {
        Ok(Datapath::AUTO) => "auto",
        Ok(Datapath::USER) => "user",
        Ok(Datapath::VHOST_NET) => "vhost-net",
        Err(_) => "unknown",
    })
}

/// Ports of the host's that lead to the guest by passt.
fn forwards(net: &NetConfig) -> Vec<Value> {
    let each = net.user().forwards.iter().map(|forward| {
        let protocol = match forward.protocol.enum_value() {
            Ok(Protocol::TCP) => "tcp",
            Ok(Protocol::UDP) => "udp",
            Err(_) => "unknown",
        };
        json!({
            "protocol": protocol, "address": forward.address,
            "host_port": forward.host_port, "guest_port": forward.guest_port,
        })
    });
    each.collect()
}

/// Limits of one direction for JSON.
pub fn limits_json(limits: Option<&NetLimits>) -> Value {
    json!({
        "bytes": bucket_json(limits.and_then(|l| l.bytes.as_ref())),
        "packets": bucket_json(limits.and_then(|l| l.packets.as_ref())),
    })
}

/// The same as text; empty: there are none.
pub fn limits_text(limits: Option<&NetLimits>) -> String {
    let text = |bucket: Option<&TokenBucket>, unit: &str| {
        let bucket = bucket.filter(|b| b.per_second != 0)?;
        let burst = match bucket.burst {
            0 => String::new(),
            burst => format!(" (burst {burst})"),
        };
        Some(format!("{} {unit}{burst}", bucket.per_second))
    };
    let bytes = limits.and_then(|l| text(l.bytes.as_ref(), "bytes/s"));
    let packets = limits.and_then(|l| text(l.packets.as_ref(), "frames/s"));
    let both: Vec<String> = bytes.into_iter().chain(packets).collect();
    both.join(", ")
}

/// One network device for `info`.
pub fn net_text(net: &NetConfig) -> String {
    let (kind, name) = backend(net);
    let plural = if net.queues == 1 { "" } else { "s" };
    let mut text = format!(
        "{}: {kind} {name}, {}, {} queue pair{plural}",
        net.id,
        mac(&net.mac),
        net.queues
    );
    for (direction, limits) in [("receives", &net.to_guest), ("sends", &net.from_guest)] {
        let limits = limits_text(limits.as_ref());
        if !limits.is_empty() {
            text.push_str(&format!(", {direction} at most {limits}"));
        }
    }
    text
}

/// One device of somebody else's for `info --json`.
pub fn vhost_user_json(device: &VhostUserConfig) -> Value {
    json!({
        "id": device.id, "socket": device.socket, "server": device.server,
        "device_id": device.device_id, "queues": device.queues,
        "queue_size": device.queue_size, "required": !device.optional,
        "config": hex(&device.config),
    })
}

/// One device of somebody else's for `info`.
pub fn vhost_user_text(device: &VhostUserConfig) -> String {
    format!(
        "{}: virtio device {} at {}, queues {}",
        device.id, device.device_id, device.socket, device.queues
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_device_is_told_with_its_backend() {
        let mut net = NetConfig::new();
        net.id = "eth0".into();
        net.mac = vec![2, 0, 0, 0, 0, 1];
        net.queues = 2;
        net.mut_tap().name = "tap0".into();
        assert_eq!(
            net_text(&net),
            "eth0: tap tap0, 02:00:00:00:00:01, 2 queue pairs"
        );
        let json = net_json(&net);
        assert_eq!(
            (json["backend"].as_str(), json["name"].as_str()),
            (Some("tap"), Some("tap0"))
        );
        let limits = net.to_guest.mut_or_insert_default();
        limits.bytes.mut_or_insert_default().per_second = 1000;
        limits.packets.mut_or_insert_default().per_second = 9;
        limits.packets.mut_or_insert_default().burst = 3;
        let text = net_text(&net);
        let told = ", receives at most 1000 bytes/s, 9 frames/s (burst 3)";
        assert!(text.ends_with(told), "{text}");
        let json = net_json(&net);
        assert_eq!(json["to_guest"]["packets"]["burst"], 3);
        assert!(json["from_guest"]["bytes"].is_null());
        net.mut_vhost_user().socket = "/s".into();
        assert_eq!(net_json(&net)["name"], "/s");
    }
}
