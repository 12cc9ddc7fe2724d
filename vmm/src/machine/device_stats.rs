//! A device's counters, from the words of to those of the API. The process is
//! hostile: what it says is bounded and made printable here. Called on the manager thread.

use std::sync::Arc;

use bulkhead_proto::common::{NetLimits, ProcessLimits, TokenBucket};
use bulkhead_proto::device::{HelloResponse, NetState, StatsResponse};
use bulkhead_proto::machine::{DeviceStatsResponse, NetStatus};

use super::usage::Usage;
use crate::launcher::printable;

/// Buckets of a latency histogram.
const MAX_BUCKETS: usize = 64;
/// Addresses and VLANs in a filter; VIRTIO 1.2 section 5.1.6.5 leaves the number open.
const MAX_FILTER: usize = 4096;

/// What is known of a device without asking it.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// As the API names it.
    pub id: String,
    /// Its kind's name.
    pub kind: String,
    /// Virtqueues.
    pub queues: usize,
    /// A network device's MTU as the guest is told; 0: nothing is said.
    pub mtu: u32,
    /// A network device's tap.
    pub tap: String,
    /// What its processes use of the host.
    pub usage: Option<Arc<Usage>>,
}

/// The API's answer.
///
/// # Errors
/// What the process said that cannot be true: a line to follow its name.
pub fn response(about: &About, stats: &StatsResponse) -> Result<DeviceStatsResponse, String> {
    if stats.queues.len() > about.queues {
        return Err(format!(
            "counts for {} queues and has {}",
            stats.queues.len(),
            about.queues
        ));
    }
    if stats
        .queues
        .iter()
        .any(|q| q.latency_us_log2.len() > MAX_BUCKETS)
    {
        return Err("has a histogram with too many buckets".into());
    }
    let mut response = DeviceStatsResponse::new();
    response.id.clone_from(&about.id);
    response.kind.clone_from(&about.kind);
    response.queues.clone_from(&stats.queues);
    for queue in &mut response.queues {
        queue.special_fields.mut_unknown_fields().clear();
    }
    response.usage = about.usage.as_ref().map(|usage| usage.read()).into();
    if let Some(net) = stats.net.as_ref() {
        response.net = Some(net_status(about, net)?).into();
    }
    Ok(response)
}

fn net_status(about: &About, net: &NetState) -> Result<NetStatus, String> {
    let longest = net
        .unicast_filter
        .len()
        .max(net.multicast_filter.len())
        .max(net.vlan_filter.len());
    if longest > MAX_FILTER {
        return Err(format!("has a filter of {longest} entries"));
    }
    let macs = |list: &[Vec<u8>]| -> Result<Vec<String>, String> {
        list.iter().map(|mac| mac_text(mac)).collect()
    };
    let mut status = NetStatus::new();
    status.link_up = net.link_up;
    status.queue_pairs = net.queue_pairs;
    status.mac = mac_text(&net.mac)?;
    status.mtu = about.mtu;
    status.promiscuous = net.promiscuous;
    status.all_multicast = net.all_multicast;
    status.unicast_filter = macs(&net.unicast_filter)?;
    status.multicast_filter = macs(&net.multicast_filter)?;
    status.vlan_filter.clone_from(&net.vlan_filter);
    status.datapath = match net.datapath.as_str() {
        known @ ("tap" | "vhost-net" | "") => known.to_owned(),
        _ => return Err("tells of a datapath that there is not".into()),
    };
    status.to_guest = limits(net.to_guest.as_ref()).into();
    status.from_guest = limits(net.from_guest.as_ref()).into();
    if status.datapath == "vhost-net" {
        let tap = printable(&about.tap);
        status.counted_by = format!("the host's kernel: `ip -s link show dev {tap}`");
    }
    Ok(status)
}

/// Limits, without anything that the process put beside them.
fn limits(limits: Option<&NetLimits>) -> Option<NetLimits> {
    let bucket = |bucket: Option<&TokenBucket>| {
        let mut clean = TokenBucket::new();
        (clean.per_second, clean.burst) = bucket.map(|b| (b.per_second, b.burst))?;
        Some(clean)
    };
    let mut clean = NetLimits::new();
    clean.bytes = bucket(limits?.bytes.as_ref()).into();
    clean.packets = bucket(limits?.packets.as_ref()).into();
    Some(clean)
}

/// Six bytes as people write them.
fn mac_text(mac: &[u8]) -> Result<String, String> {
    if mac.len() != 6 {
        return Err(format!("tells of a MAC address of {} bytes", mac.len()));
    }
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(bytes.join(":"))
}

/// What a process says of its limits, and nothing else that it may have put there.
pub(super) fn own_limits(hello: &HelloResponse) -> Option<ProcessLimits> {
    let said = hello.confinement.limits.as_ref()?;
    let mut limits = ProcessLimits::new();
    limits.descriptors = said.descriptors;
    limits.file_bytes = said.file_bytes;
    limits.threads = said.threads;
    Some(limits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::common::QueueStats;

    fn about() -> About {
        About {
            id: "n0".into(),
            kind: "net".into(),
            queues: 3,
            mtu: 1500,
            tap: "tap0".into(),
            usage: None,
        }
    }

    #[test]
    fn a_network_device_is_told_as_people_write_it() {
        let mut net = NetState::new();
        net.link_up = true;
        net.mac = vec![0x52, 0x54, 0, 0xab, 1, 2];
        net.unicast_filter = vec![vec![2; 6]];
        net.datapath = "tap".into();
        let limits = net.to_guest.mut_or_insert_default();
        limits.bytes.mut_or_insert_default().per_second = 1000;
        let mut stats = StatsResponse::new();
        stats.net = Some(net).into();
        stats.queues = vec![QueueStats::new(); 3];
        let response = response(&about(), &stats).unwrap();
        assert_eq!(response.queues.len(), 3);
        assert_eq!(response.net.mac, "52:54:00:ab:01:02");
        assert_eq!(response.net.unicast_filter, ["02:02:02:02:02:02"]);
        assert_eq!((response.net.mtu, response.net.link_up), (1500, true));
        assert_eq!(response.net.counted_by, "");
        assert_eq!(response.net.to_guest.bytes.per_second, 1000);
        assert!(response.net.to_guest.packets.is_none());
        stats.net.mut_or_insert_default().datapath = "vhost-net".into();
        stats.queues.truncate(1);
        let response = super::response(&about(), &stats).unwrap();
        assert!(response.net.counted_by.ends_with("dev tap0`"));
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        let refused = |change: &dyn Fn(&mut StatsResponse)| {
            let mut stats = StatsResponse::new();
            stats.queues = vec![QueueStats::new()];
            let mut net = NetState::new();
            net.mac = vec![2; 6];
            stats.net = Some(net).into();
            assert!(response(&about(), &stats).is_ok());
            change(&mut stats);
            let error = response(&about(), &stats).unwrap_err();
            assert!(!error.is_empty() && !error.contains(char::is_control));
        };
        refused(&|s| s.queues = vec![QueueStats::new(); 4]);
        refused(&|s| s.queues[0].latency_us_log2 = vec![1; 65]);
        refused(&|s| s.net.mut_or_insert_default().mac = vec![1; 5]);
        refused(&|s| s.net.mut_or_insert_default().unicast_filter = vec![vec![]]);
        refused(&|s| s.net.mut_or_insert_default().vlan_filter = vec![1; 5000]);
        refused(&|s| s.net.mut_or_insert_default().datapath = "\x1b[2J".into());
    }
}
