//! What `ctl info` says of network devices and of other vhost-user devices, as text and as JSON.

use bulkhead_proto::machine::{NetConfig, VhostUserConfig, net_config::Backend};
use serde_json::{Value, json};

fn mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
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
        "queues": net.queues, "mtu": net.mtu, "required": !net.optional,
    })
}

/// One network device for `info`.
pub fn net_text(net: &NetConfig) -> String {
    let (kind, name) = backend(net);
    let plural = if net.queues == 1 { "" } else { "s" };
    format!(
        "{}: {kind} {name}, {}, {} queue pair{plural}",
        net.id,
        mac(&net.mac),
        net.queues
    )
}

/// One device of somebody else's for `info --json`.
pub fn vhost_user_json(device: &VhostUserConfig) -> Value {
    json!({
        "id": device.id, "socket": device.socket, "server": device.server,
        "device_id": device.device_id, "queues": device.queues,
        "queue_size": device.queue_size, "required": !device.optional,
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
        net.mut_vhost_user().socket = "/s".into();
        assert_eq!(net_json(&net)["name"], "/s");
    }
}
