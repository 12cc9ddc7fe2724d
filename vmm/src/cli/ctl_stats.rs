//! How `bulkhead ctl stats` shows what a device has counted: a table for people, JSON for
//! programs. Latencies come as a histogram in powers of two; a percentile is the upper end of
//! the bucket that it falls into, so that it is never told too small.

use std::io::{self, Write};

use bulkhead_proto::common::{QueueStats, ResourceUsage};
use bulkhead_proto::machine::{DeviceStatsResponse, NetStatus};
use serde_json::{Value, json};

use super::ctl_output::{clean, table};
use super::ctl_output_net::{limits_json, limits_text};
use super::resource_args;

/// Per mille of the requests that are at least as fast as what is shown.
const PERCENTILES: [(&str, u64); 4] = [("p50", 500), ("p90", 900), ("p99", 990), ("p99.9", 999)];

/// The upper end, in microseconds, of the bucket in which a share of the requests ends;
/// `None`: nothing was measured, or it lies in the last bucket, which has no end.
fn percentile(buckets: &[u64], per_mille: u64) -> Option<u64> {
    let total = buckets.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
    if total == 0 {
        return None;
    }
    // Rounded up: of one request, the median is that one.
    let wanted = (u128::from(total) * u128::from(per_mille)).div_ceil(1000);
    let mut seen = 0u128;
    for (index, count) in buckets.iter().enumerate() {
        seen += u128::from(*count);
        if seen >= wanted {
            let last = index.saturating_add(1) == buckets.len();
            let shift = u32::try_from(index).ok()?;
            return (!last).then(|| 1u64.checked_shl(shift)).flatten();
        }
    }
    None
}

/// All queues' histograms together.
fn sum(queues: &[QueueStats]) -> Vec<u64> {
    let longest = queues.iter().map(|q| q.latency_us_log2.len()).max();
    let mut all = vec![0u64; longest.unwrap_or(0)];
    for queue in queues {
        // The last bucket of each is open at its end: to the last of all.
        for (to, from) in all.iter_mut().zip(&queue.latency_us_log2) {
            *to = to.saturating_add(*from);
        }
    }
    all
}

fn micros(buckets: &[u64], per_mille: u64) -> String {
    match percentile(buckets, per_mille) {
        None => "-".into(),
        Some(us @ 0..1000) => format!("<{us} us"),
        Some(us @ 1000..1_000_000) => format!("<{:.1} ms", us as f64 / 1e3),
        Some(us) => format!("<{:.1} s", us as f64 / 1e6),
    }
}

fn percentiles_json(buckets: &[u64]) -> Value {
    let entries = PERCENTILES
        .iter()
        .map(|(name, share)| ((*name).to_owned(), json!(percentile(buckets, *share))));
    Value::Object(entries.collect())
}

fn queue_json(queue: &QueueStats) -> Value {
    json!({
        "index": queue.index,
        "requests": queue.requests,
        "read_bytes": queue.read_bytes,
        "written_bytes": queue.written_bytes,
        "flushes": queue.flushes,
        "discards": queue.discards,
        "write_zeroes": queue.write_zeroes,
        "errors": queue.errors,
        "dropped": queue.dropped,
        "throttled": queue.throttled,
        "kicks": queue.kicks,
        "interrupts": queue.interrupts,
        "syscalls": queue.syscalls,
        "latency_us": percentiles_json(&queue.latency_us_log2),
        "latency_us_log2": queue.latency_us_log2,
    })
}

fn net_json(net: &NetStatus) -> Value {
    json!({
        "link_up": net.link_up,
        "queue_pairs": net.queue_pairs,
        "mac": net.mac,
        "mtu": net.mtu,
        "promiscuous": net.promiscuous,
        "all_multicast": net.all_multicast,
        "unicast_filter": net.unicast_filter,
        "multicast_filter": net.multicast_filter,
        "vlan_filter": net.vlan_filter,
        "datapath": net.datapath,
        "counted_by": net.counted_by,
        "to_guest": limits_json(net.to_guest.as_ref()),
        "from_guest": limits_json(net.from_guest.as_ref()),
    })
}

/// `stats --json`.
pub fn json(stats: &DeviceStatsResponse) -> Value {
    let queues: Vec<Value> = stats.queues.iter().map(queue_json).collect();
    json!({
        "id": stats.id,
        "kind": stats.kind,
        "queues": queues,
        "latency_us": percentiles_json(&sum(&stats.queues)),
        "net": stats.net.as_ref().map(net_json),
        "usage": stats.usage.as_ref().map(usage_json),
    })
}

/// `stats`.
pub fn text(out: &mut dyn Write, stats: &DeviceStatsResponse) -> io::Result<()> {
    let head = [
        "QUEUE",
        "REQUESTS",
        "READ",
        "WRITTEN",
        "FLUSHES",
        "ERRORS",
        "DROPPED",
        "THROTTLED",
        "KICKS",
        "INTERRUPTS",
        "SYSCALLS",
        "p50",
        "p99",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(stats.queues.iter().map(|queue| {
        [
            queue.index.to_string(),
            queue.requests.to_string(),
            bytes(queue.read_bytes),
            bytes(queue.written_bytes),
            queue.flushes.to_string(),
            queue.errors.to_string(),
            queue.dropped.to_string(),
            queue.throttled.to_string(),
            queue.kicks.to_string(),
            queue.interrupts.to_string(),
            queue.syscalls.to_string(),
            micros(&queue.latency_us_log2, 500),
            micros(&queue.latency_us_log2, 990),
        ]
    }));
    table(out, &rows)?;
    let all = sum(&stats.queues);
    if all.iter().any(|n| *n > 0) {
        let shares = PERCENTILES.map(|(name, share)| format!("{name} {}", micros(&all, share)));
        writeln!(out, "latency      {}", shares.join(", "))?;
    }
    if let Some(net) = stats.net.as_ref() {
        net_text(out, net)?;
    }
    if let Some(usage) = stats.usage.as_ref() {
        usage_text(out, usage)?;
    }
    Ok(())
}

fn usage_json(usage: &ResourceUsage) -> Value {
    json!({
        "cgroup": usage.cgroup,
        "cpu_us": usage.cpu_us,
        "cpu_throttled_us": usage.cpu_throttled_us,
        "memory_bytes": usage.memory_bytes,
        "memory_peak_bytes": usage.memory_peak_bytes,
        "oom_kills": usage.oom_kills,
        "pids": usage.pids,
        "read_bytes": usage.read_bytes,
        "written_bytes": usage.written_bytes,
        "limits": usage.limits.as_ref().map(resource_args::json),
        "not_enforced": usage.not_enforced,
    })
}

fn usage_text(out: &mut dyn Write, usage: &ResourceUsage) -> io::Result<()> {
    let mut line = |name: &str, value: String| writeln!(out, "{name:<12} {}", clean(&value));
    if usage.cgroup.is_empty() {
        line("cgroup", "none: `ctl info` says why".into())?;
    } else {
        line("cgroup", usage.cgroup.clone())?;
        line(
            "cpu",
            format!(
                "{:.3} s, held up for {:.3} s",
                usage.cpu_us as f64 / 1e6,
                usage.cpu_throttled_us as f64 / 1e6
            ),
        )?;
        let killed = match usage.oom_kills {
            0 => String::new(),
            n => format!(", {n} processes killed at the limit"),
        };
        // Without their controllers there is nothing to tell.
        if usage.memory_bytes != 0 {
            line(
                "memory",
                format!(
                    "{}, at most {}{killed}",
                    bytes(usage.memory_bytes),
                    bytes(usage.memory_peak_bytes)
                ),
            )?;
        }
        if usage.pids != 0 {
            line("threads", usage.pids.to_string())?;
        }
        line(
            "block I/O",
            format!(
                "{} read, {} written",
                bytes(usage.read_bytes),
                bytes(usage.written_bytes)
            ),
        )?;
    }
    let limits = usage.limits.as_ref().map(resource_args::text);
    if let Some(limits) = limits.filter(|text| !text.is_empty()) {
        line("limits", limits)?;
    }
    for why in &usage.not_enforced {
        line("not enforced", why.clone())?;
    }
    Ok(())
}

fn net_text(out: &mut dyn Write, net: &NetStatus) -> io::Result<()> {
    let mut line = |name: &str, value: String| writeln!(out, "{name:<12} {}", clean(&value));
    line("link", if net.link_up { "up" } else { "down" }.into())?;
    line("datapath", net.datapath.clone())?;
    if !net.counted_by.is_empty() {
        line("counted by", net.counted_by.clone())?;
    }
    line("queue pairs", net.queue_pairs.to_string())?;
    line("mac", net.mac.clone())?;
    if net.mtu != 0 {
        line("mtu", net.mtu.to_string())?;
    }
    for (name, limits) in [("rx limits", &net.to_guest), ("tx limits", &net.from_guest)] {
        let limits = limits_text(limits.as_ref());
        if !limits.is_empty() {
            line(name, limits)?;
        }
    }
    let mut receives = Vec::new();
    if net.promiscuous {
        receives.push("everything".to_owned());
    }
    if net.all_multicast {
        receives.push("every multicast".to_owned());
    }
    receives.extend(net.unicast_filter.iter().cloned());
    receives.extend(net.multicast_filter.iter().cloned());
    if !receives.is_empty() {
        line("receives", receives.join(", "))?;
    }
    if !net.vlan_filter.is_empty() {
        let vlans: Vec<String> = net.vlan_filter.iter().map(u32::to_string).collect();
        line("vlans", vlans.join(", "))?;
    }
    Ok(())
}

/// A number of bytes, to three digits.
fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    let name = units.get(unit).copied().unwrap_or_default();
    format!("{value:.digits$} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_upper_end_of_its_bucket() {
        // Bucket i: less than 2^i microseconds.
        let mut buckets = vec![0u64; 32];
        assert_eq!(percentile(&buckets, 500), None);
        buckets[3] = 1;
        assert_eq!(percentile(&buckets, 1), Some(8));
        assert_eq!(percentile(&buckets, 999), Some(8));
        buckets[3] = 99;
        buckets[10] = 1;
        assert_eq!(percentile(&buckets, 500), Some(8));
        assert_eq!(percentile(&buckets, 990), Some(8));
        assert_eq!(percentile(&buckets, 991), Some(1024));
        buckets[31] = 1_000_000;
        assert_eq!(
            percentile(&buckets, 500),
            None,
            "the last bucket has no end"
        );
        assert_eq!(percentile(&[u64::MAX, u64::MAX, 0], 500), Some(1));
        assert_eq!(percentile(&[], 500), None);
    }

    #[test]
    fn latencies_are_told_as_people_read_them() {
        let at = |index: usize| {
            let mut buckets = vec![0u64; 32];
            buckets[index] = 1;
            micros(&buckets, 500)
        };
        assert_eq!(at(7), "<128 us");
        assert_eq!(at(12), "<4.1 ms");
        assert_eq!(at(21), "<2.1 s");
        assert_eq!(at(31), "-");
    }

    #[test]
    fn bytes_are_rounded() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1 << 20), "1.00 MiB");
        assert_eq!(bytes(1_500_000_000), "1.40 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn a_table_and_json_have_every_queue() {
        let mut stats = DeviceStatsResponse::new();
        (stats.id, stats.kind) = ("root".into(), "blk".into());
        for index in 0..2 {
            let mut queue = QueueStats::new();
            queue.index = index;
            queue.requests = 10;
            queue.latency_us_log2 = vec![0, 0, 5, 5, 0];
            stats.queues.push(queue);
        }
        let mut out = Vec::new();
        text(&mut out, &stats).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.lines().count(), 4, "{out}");
        assert!(out.contains("p50 <4 us, p90 <8 us, p99 <8 us"), "{out}");
        let value = json(&stats);
        assert_eq!(value["queues"][1]["requests"], 10);
        assert_eq!(value["queues"][1]["latency_us"]["p99"], 8);
        assert_eq!(value["latency_us"]["p50"], 4);
        assert!(value["net"].is_null());
    }

    #[test]
    fn a_network_device_shows_its_state() {
        let mut stats = DeviceStatsResponse::new();
        let net = stats.net.mut_or_insert_default();
        net.mac = "52:54:00:00:00:01".into();
        net.datapath = "tap\x1b[2J".into();
        net.vlan_filter = vec![5, 7];
        let mut out = Vec::new();
        text(&mut out, &stats).unwrap();
        let out = String::from_utf8(out).unwrap();
        for line in [
            "link         down",
            "vlans        5, 7",
            "datapath     tap?[2J",
        ] {
            assert!(out.lines().any(|l| l == line), "{line}: {out}");
        }
    }
}
