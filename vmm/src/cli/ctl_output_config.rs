//! What `ctl info` says of a machine's configuration, as text and as JSON.

use bulkhead_proto::common::Resources;
use bulkhead_proto::machine::disk_config::{Cache, Format};
use bulkhead_proto::machine::machine_config::OnReset;
use bulkhead_proto::machine::{
    ConsoleConfig, DiskConfig, FsConfig, MachineConfig, RngConfig, RootPort, VsockConfig,
    fs_config, serial_config::Mode,
};
use serde_json::{Value, json};

use super::ctl_output::bucket_json;
use super::ctl_output_net as net;
use super::resource_args;

/// For `info --json`.
pub fn json(config: &MachineConfig) -> Value {
    let disks: Vec<Value> = config.disks.iter().map(disk_json).collect();
    let nets: Vec<Value> = config.nets.iter().map(net::net_json).collect();
    let others: Vec<Value> = config
        .vhost_users
        .iter()
        .map(net::vhost_user_json)
        .collect();
    let rngs: Vec<Value> = config.rngs.iter().map(rng_json).collect();
    let consoles: Vec<Value> = config.consoles.iter().map(console_json).collect();
    json!({
        "kernel": config.kernel,
        "initrd": config.initrd,
        "cmdline": config.cmdline,
        "memory_bytes": config.memory_bytes,
        "memory_max_bytes": config.memory_max_bytes,
        "cpus": { "boot": config.cpus.boot, "max": config.cpus.boot.max(config.cpus.max), "pin": config.cpus.pin },
        "disks": disks,
        "nets": nets,
        "vhost_users": others,
        "rngs": rngs,
        "vsock": config.vsock.as_ref().map(vsock_json),
        "consoles": consoles,
        "fs": config.fs.iter().map(fs_json).collect::<Vec<Value>>(),
        "serial": serial_text(config),
        "on_reset": on_reset(config),
        "hotplug_ports": config.hotplug_ports,
        "ports": config.ports.iter().map(port_json).collect::<Vec<Value>>(),
    })
}

/// For `info`: names and texts of lines, from the serial port on.
pub fn lines(config: &MachineConfig) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("serial", serial_text(config)),
        ("on reset", on_reset(config).to_owned()),
    ];
    lines.extend(config.disks.iter().map(|d| ("disk", disk_text(d))));
    lines.extend(config.nets.iter().map(|d| ("net", net::net_text(d))));
    let others = config.vhost_users.iter();
    lines.extend(others.map(|d| ("vhost-user", net::vhost_user_text(d))));
    lines.extend(config.rngs.iter().map(|d| ("rng", rng_text(d))));
    let vsock = config.vsock.as_ref();
    lines.extend(vsock.map(|d| ("vsock", format!("{}: {}", d.id, d.socket))));
    lines.extend(config.consoles.iter().map(|d| ("console", console_text(d))));
    lines.extend(config.fs.iter().map(|d| ("fs", fs_text(d))));
    if !config.hotplug_ports.is_empty() {
        lines.push(("hot-plug", config.hotplug_ports.join(", ")));
    }
    lines.extend(config.ports.iter().map(|p| ("port", port_text(p))));
    lines
}

/// Limits of a device's process; null: it has none.
pub(super) fn resources(resources: Option<&Resources>) -> Value {
    resources.map_or(Value::Null, resource_args::json)
}

fn on_reset(config: &MachineConfig) -> &'static str {
    match config.on_reset.enum_value() {
        Ok(OnReset::END) => "end",
        Ok(OnReset::RESTART) => "restart",
        Err(_) => "unknown",
    }
}

fn port_json(port: &RootPort) -> Value {
    json!({
        "name": port.name, "device": port.device, "hotplug": port.hotplug, "behind": port.behind,
    })
}

fn port_text(port: &RootPort) -> String {
    let hotplug = if port.hotplug { ", hot-plug" } else { "" };
    let behind = match port.behind.as_str() {
        "" => String::new(),
        id => format!(", for {id}"),
    };
    format!("{}: device {}{hotplug}{behind}", port.name, port.device)
}

fn serial_text(config: &MachineConfig) -> String {
    match config.serial.mode.enum_value() {
        Ok(Mode::NONE) => "none".into(),
        Ok(Mode::STDIO) => "stdio".into(),
        Ok(Mode::FILE) => format!("file={}", config.serial.path),
        Ok(Mode::SOCKET) => format!("socket={}", config.serial.path),
        Err(number) => format!("mode {number}"),
    }
}

fn format_name(disk: &DiskConfig) -> &'static str {
    match disk.format.enum_value() {
        Ok(Format::RAW) => "raw",
        Ok(Format::QCOW2) => "qcow2",
        Err(_) => "unknown",
    }
}

fn cache_name(disk: &DiskConfig) -> &'static str {
    match disk.cache.enum_value() {
        Ok(Cache::CACHE_NONE) => "none",
        Ok(Cache::WRITEBACK) => "writeback",
        Ok(Cache::WRITETHROUGH) => "writethrough",
        Ok(Cache::UNSAFE) => "unsafe",
        Err(_) => "unknown",
    }
}

fn vsock_json(vsock: &VsockConfig) -> Value {
    json!({
        "id": vsock.id, "socket": vsock.socket, "cid": vsock.cid,
        "resources": resources(vsock.resources.as_ref()),
    })
}

fn console_json(console: &ConsoleConfig) -> Value {
    let ports: Vec<Value> = console
        .ports
        .iter()
        .map(|port| json!({ "socket": port.socket, "name": port.name, "cols": port.cols, "rows": port.rows }))
        .collect();
    json!({
        "id": console.id, "ports": ports,
        "resources": resources(console.resources.as_ref()),
    })
}

fn console_text(console: &ConsoleConfig) -> String {
    let ports: Vec<String> = console
        .ports
        .iter()
        .map(|port| match port.name.as_str() {
            "" => port.socket.clone(),
            name => format!("{} ({name})", port.socket),
        })
        .collect();
    format!("{}: {}", console.id, ports.join(", "))
}

fn fs_cache(fs: &FsConfig) -> &'static str {
    match fs.cache.enum_value() {
        Ok(fs_config::Cache::CACHE_AUTO) => "auto",
        Ok(fs_config::Cache::CACHE_ALWAYS) => "always",
        Ok(fs_config::Cache::CACHE_METADATA) => "metadata",
        Ok(fs_config::Cache::CACHE_NEVER) => "never",
        Err(_) => "unknown",
    }
}

fn fs_json(fs: &FsConfig) -> Value {
    json!({
        "id": fs.id, "tag": fs.tag, "source": fs.source, "readonly": fs.readonly,
        "cache": fs_cache(fs), "xattr": fs.xattr,
        "resources": resources(fs.resources.as_ref()),
    })
}

fn fs_text(fs: &FsConfig) -> String {
    let readonly = if fs.readonly { ", read-only" } else { "" };
    format!("{}: {} as {}{readonly}", fs.id, fs.source, fs.tag)
}

fn rng_json(rng: &RngConfig) -> Value {
    json!({
        "id": rng.id, "bytes": bucket_json(rng.bytes.as_ref()),
        "resources": resources(rng.resources.as_ref()),
    })
}

fn rng_text(rng: &RngConfig) -> String {
    match rng.bytes.per_second {
        0 => rng.id.clone(),
        rate => format!("{}: {rate} bytes per second", rng.id),
    }
}

fn disk_json(disk: &DiskConfig) -> Value {
    json!({
        "id": disk.id, "path": disk.path, "readonly": disk.readonly,
        "serial": disk.serial, "queues": disk.queues,
        "format": format_name(disk), "cache": cache_name(disk),
        "backing_paths": disk.backing_paths, "max_size": disk.max_size,
        "locked": !disk.unlocked,
        "limits": {
            "bytes": bucket_json(disk.limits.bytes.as_ref()),
            "operations": bucket_json(disk.limits.operations.as_ref()),
        },
        "resources": resources(disk.resources.as_ref()),
    })
}

fn disk_text(disk: &DiskConfig) -> String {
    let mut text = format!("{}: {}", disk.id, disk.path);
    if disk.readonly {
        text.push_str(", read-only");
    }
    if format_name(disk) != "raw" {
        text.push_str(&format!(", {}", format_name(disk)));
    }
    if cache_name(disk) != "none" {
        text.push_str(&format!(", cache {}", cache_name(disk)));
    }
    if disk.unlocked {
        text.push_str(", not locked");
    }
    for (bucket, unit) in [
        (disk.limits.bytes.as_ref(), "bytes/s"),
        (disk.limits.operations.as_ref(), "operations/s"),
    ] {
        if let Some(bucket) = bucket.filter(|b| b.per_second != 0) {
            text.push_str(&format!(", {} {unit}", bucket.per_second));
        }
    }
    text
}
