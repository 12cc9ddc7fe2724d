//! How `bulkhead ctl` shows answers: tables for people, JSON for programs. What a device
//! process or a path put into a string is printed without control characters, so that it
//! cannot drive the user's terminal.

use std::io::{self, Write};

use super::ctl_hotplug::{memory_json, memory_text};
use super::ctl_output_config as config;
use super::resource_args;
use bulkhead_proto::common::{ProcessLimits, TokenBucket};
use bulkhead_proto::machine::{DeviceInfo, DevicesResponse, Event, InfoResponse, PortInfo, State};
use serde_json::{Value, json};

fn state_name(info: &InfoResponse) -> &'static str {
    match info.state.enum_value() {
        Ok(State::STATE_NONE) => "none",
        Ok(State::STATE_CREATED) => "created",
        Ok(State::STATE_RUNNING) => "running",
        Ok(State::STATE_PAUSED) => "paused",
        Ok(State::STATE_STOPPED) => "stopped",
        Err(_) => "unknown",
    }
}

/// `info --json`.
pub fn info_json(info: &InfoResponse) -> Value {
    let config = info.config.as_ref().map(config::json);
    let ports: Vec<Value> = info
        .ports
        .iter()
        .map(|port| json!({ "name": port.name, "pci_address": port.pci_address, "device": port.device, "vacating": port.vacating }))
        .collect();
    json!({
        "version": info.version,
        "state": state_name(info),
        "stop_reason": info.stop_reason,
        "vmm_pid": info.vmm_pid,
        "launcher_pid": info.launcher_pid,
        "cgroup": info.cgroup,
        "cgroup_note": info.cgroup_note,
        "landlock_abi": info.landlock_abi,
        "config": config,
        "cpus": info.cpus,
        "ports": ports,
        "memory": info.memory.as_ref().map(memory_json),
        "counters": {
            "vcpu_exits": info.counters.vcpu_exits,
            "mmio_exits": info.counters.mmio_exits,
            "pio_exits": info.counters.pio_exits,
            "manager_wakeups": info.counters.manager_wakeups,
            "heartbeat_wakeups": info.counters.heartbeat_wakeups,
            "serial_bytes": info.counters.serial_bytes,
            "msi_gsis": info.counters.msi_gsis,
            "memory_slots": info.counters.memory_slots,
        },
    })
}

/// `info`.
pub fn info_text(out: &mut dyn Write, info: &InfoResponse) -> io::Result<()> {
    let mut line = |name: &str, value: &str| writeln!(out, "{name:<12} {}", clean(value));
    let mut state = state_name(info).to_owned();
    if !info.stop_reason.is_empty() {
        state = format!("{state}: {}", info.stop_reason);
    }
    line("state", &state)?;
    line("version", &info.version)?;
    line(
        "processes",
        &format!("vmm {}, launcher {}", info.vmm_pid, info.launcher_pid),
    )?;
    if let Some(abi) = info.landlock_abi {
        line("landlock", &format!("ABI {abi}"))?;
    }
    let cgroup = match (info.cgroup.as_str(), info.cgroup_note.as_str()) {
        ("", why) => format!("none: {why}"),
        (path, "") => path.to_owned(),
        (path, note) => format!("{path}; {note}"),
    };
    line("cgroup", &cgroup)?;
    if let Some(config) = info.config.as_ref() {
        line("kernel", &config.kernel)?;
        if !config.initrd.is_empty() {
            line("initrd", &config.initrd)?;
        }
        line("cmdline", &config.cmdline)?;
        match info.memory.as_ref() {
            Some(memory) => line("memory", &memory_text(memory))?,
            None => line("memory", &size(config.memory_bytes))?,
        }
        let pins: Vec<String> = config.cpus.pin.iter().map(u32::to_string).collect();
        let pinned = if pins.is_empty() {
            String::new()
        } else {
            format!(", on host CPUs {}", pins.join(":"))
        };
        let most = match config.cpus.max.max(config.cpus.boot) {
            most if most > info.cpus => format!(" of {most}"),
            _ => String::new(),
        };
        line("cpus", &format!("{}{most}{pinned}", info.cpus))?;
        for (name, text) in config::lines(config) {
            line(name, &text)?;
        }
    }
    let behind = |port: &PortInfo| match port.device.as_str() {
        "" if port.vacating => format!("{} (vacating)", port.name),
        "" => port.name.clone(),
        id => format!("{} ({id})", port.name),
    };
    let ports: Vec<String> = info.ports.iter().map(behind).collect();
    if !ports.is_empty() {
        line("ports", &ports.join(", "))?;
    }
    let counters = &info.counters;
    line(
        "exits",
        &format!(
            "{} of the vCPUs (mmio {}, pio {})",
            counters.vcpu_exits, counters.mmio_exits, counters.pio_exits
        ),
    )?;
    line(
        "wake-ups",
        &format!(
            "{} of the manager, {} more for its heartbeat",
            counters.manager_wakeups, counters.heartbeat_wakeups
        ),
    )?;
    line("serial out", &format!("{} bytes", counters.serial_bytes))?;
    line(
        "of KVM",
        &format!(
            "{} interrupt routes of devices, {} memory slots",
            counters.msi_gsis, counters.memory_slots
        ),
    )
}

pub(super) fn bucket_json(bucket: Option<&TokenBucket>) -> Value {
    bucket.filter(|b| b.per_second != 0).map_or(
        Value::Null,
        |b| json!({ "per_second": b.per_second, "burst": b.burst }),
    )
}

/// What a process says it has limited itself to; null: it does not say, or left that as it was.
fn limits_json(limits: &ProcessLimits) -> Value {
    json!({
        "descriptors": limits.descriptors, "file_bytes": limits.file_bytes,
        "threads": limits.threads,
    })
}

/// `devices --json`.
pub fn devices_json(devices: &DevicesResponse) -> Value {
    let list: Vec<Value> = devices
        .devices
        .iter()
        .map(|device| {
            json!({
                "id": device.id, "kind": device.kind, "state": device.state,
                "pid": device.pid, "incarnation": device.incarnation,
                "pci_address": device.pci_address, "port": device.port,
                "version": device.version, "queues": device.queues,
                "spawn_us": device.spawn_us, "granted_fds": device.granted_fds,
                "helper": device.helper,
                "landlock_abi": device.landlock_abi,
                "limits": limits_json(&device.limits),
                "resources": device.resources.as_ref().map(resource_args::json),
                "not_enforced": device.not_enforced,
            })
        })
        .collect();
    Value::Array(list)
}

/// `devices`.
pub fn devices_text(out: &mut dyn Write, devices: &DevicesResponse) -> io::Result<()> {
    let head = [
        "ID", "KIND", "STATE", "PID", "RUN", "PCI", "PORT", "QUEUES", "SPAWN", "VERSION",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(devices.devices.iter().map(device_row));
    table(out, &rows)
}

fn device_row(device: &DeviceInfo) -> [String; 10] {
    [
        clean(&device.id),
        clean(&device.kind),
        clean(&device.state),
        match device.pid {
            0 => "-".to_owned(),
            pid => pid.to_string(),
        },
        device.incarnation.to_string(),
        clean(&device.pci_address),
        clean(&device.port),
        device.queues.to_string(),
        match device.spawn_us {
            // Not measured: nobody of ours started it.
            0 => "-".to_owned(),
            us => format!("{:.1} ms", us as f64 / 1000.0),
        },
        clean(&device.version),
    ]
}

/// Columns as wide as their widest cell.
pub(super) fn table<const N: usize>(out: &mut dyn Write, rows: &[[String; N]]) -> io::Result<()> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// One event as JSON.
pub fn event_json(event: &Event) -> Value {
    json!({
        "sequence": event.sequence, "time_ns": event.time_ns, "kind": event.kind,
        "subject": event.subject, "detail": event.detail,
        "what": super::event_json::what(event),
    })
}

/// One event as a line.
pub fn event_line(event: &Event) -> String {
    let line = format!(
        "{:>6}  {}  {:<20}  {:<12}  {}",
        event.sequence,
        utc(event.time_ns),
        clean(&event.kind),
        clean(&event.subject),
        clean(&event.detail)
    );
    line.trim_end().to_owned()
}

/// Without control characters.
pub(super) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// A size, exact.
pub(super) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    units
        .iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(
            || format!("{bytes} bytes"),
            |(shift, unit)| format!("{} {unit}", bytes >> shift),
        )
}

/// Unix time as RFC 3339 in UTC, to the millisecond.
fn utc(time_ns: u64) -> String {
    let millis = time_ns / 1_000_000;
    let (seconds, millis) = (millis / 1000, millis % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1970-01-01 to a date of the Gregorian calendar, counting years from March
    // so that the leap day comes last. 719468 days lie between 0000-03-01 and the epoch.
    let shifted = days.saturating_add(719_468);
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
#[path = "ctl_output_tests.rs"]
mod fields;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400_000_000_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(951_868_799_999_000_000), "2000-02-29T23:59:59.999Z");
        assert_eq!(utc(1_785_542_400_123_456_789), "2026-08-01T00:00:00.123Z");
        assert_eq!(utc(4_107_542_399_000_000_000), "2100-02-28T23:59:59.000Z");
        assert_eq!(utc(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000Z");
        assert!(utc(u64::MAX).starts_with("2554-"));
    }

    #[test]
    fn sizes_are_exact() {
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size(2 << 30), "2 GiB");
        assert_eq!(size((1 << 30) + 1), "1073741825 bytes");
        assert_eq!(size(0), "0 bytes");
    }

    #[test]
    fn a_devices_strings_cannot_drive_the_terminal() {
        let mut event = Event::new();
        event.detail = "\x1b[2Jgone\r\n".into();
        assert!(!event_line(&event).contains(char::is_control));
        let mut device = DeviceInfo::new();
        device.version = "\x1b]0;x\x07".into();
        assert!(
            device_row(&device)
                .iter()
                .all(|cell| !cell.contains(char::is_control))
        );
    }

    #[test]
    fn tables_line_up() {
        let mut out = Vec::new();
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        table(&mut out, &[row("ID", "KIND"), row("root-disk", "blk")]).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "ID         KIND\nroot-disk  blk\n"
        );
    }
}
