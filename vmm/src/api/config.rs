//! What a machine configuration must look like before anything is opened for it: lengths,
//! counts and names. Whether the files exist and the host has the memory is seen when the
//! machine is built. Called on the `api` thread for every Create.

use std::collections::BTreeSet;

use bulkhead_proto::machine::{MachineConfig, SerialConfig, serial_config::Mode};
use bulkhead_proto::protobuf::Message;

use crate::cli::machine_args::{MAX_CPUS, check_id};
use crate::machine::mem;

/// Linux's PATH_MAX counts the terminating zero.
const MAX_PATH: usize = 4095;
/// Linux's own limit on x86-64 is 2047 characters (COMMAND_LINE_SIZE); other kernels and
/// architectures take more.
pub(super) const MAX_CMDLINE: usize = 8192;
/// Devices behind root ports on bus 0.
pub(super) const MAX_DEVICES: usize = 31;
/// How a refusal of more devices ends.
pub const BUS_IS_FULL: &str = "devices and empty ports fit on the bus";

/// Subjects of operations beside devices: what the machine itself does.
const SUBJECTS: [&str; 3] = ["machine", mem::ID, "vcpus"];

/// Checks the name of a device: operations on it are told from those on the machine.
///
/// # Errors
///
/// What it takes.
pub(super) fn check_device_id(id: &str) -> Result<(), String> {
    check_id(id)?;
    match SUBJECTS.contains(&id) {
        false => Ok(()),
        true => Err(format!(
            "{id} is what operations call a part of the machine itself: give another name, such as {id}0"
        )),
    }
}

/// Checks the form of a configuration.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub fn validate(config: &MachineConfig) -> Result<(), String> {
    known("config", config)?;
    path("config.kernel", &config.kernel)?;
    if !config.initrd.is_empty() {
        path("config.initrd", &config.initrd)?;
    }
    text("config.cmdline", &config.cmdline, MAX_CMDLINE)?;
    if config.memory_bytes == 0 {
        return Err("config.memory_bytes is 0: give the guest's memory in bytes".into());
    }
    if config.memory_max_bytes != 0 && config.memory_max_bytes <= config.memory_bytes {
        return Err(format!(
            "config.memory_max_bytes is {}: give more than memory_bytes, or 0 for as much",
            config.memory_max_bytes
        ));
    }
    if let Some(cpus) = config.cpus.as_ref() {
        known("config.cpus", cpus)?;
        let pins = cpus.pin.len();
        if cpus.boot == 0 || cpus.boot > MAX_CPUS {
            return Err(format!(
                "config.cpus.boot is {}: give 1 to {MAX_CPUS}",
                cpus.boot
            ));
        }
        if cpus.max != 0 && !(cpus.boot..=MAX_CPUS).contains(&cpus.max) {
            return Err(format!(
                "config.cpus.max is {}: give {} to {MAX_CPUS}, or 0 for as many as boot",
                cpus.max, cpus.boot
            ));
        }
        let all = cpus.max.max(cpus.boot);
        if pins != 0 && u32::try_from(pins) != Ok(all) {
            return Err(format!(
                "config.cpus.pin has {pins} host CPUs for {all} vCPUs: give one for each, or none"
            ));
        }
    } else {
        return Err(format!(
            "config.cpus is missing: give boot, 1 to {MAX_CPUS}"
        ));
    }
    let all = [
        ("disks", config.disks.len()),
        ("nets", config.nets.len()),
        ("vhost_users", config.vhost_users.len()),
        ("rngs", config.rngs.len()),
        ("vsock", usize::from(config.vsock.is_some())),
        ("consoles", config.consoles.len()),
        ("fs", config.fs.len()),
        ("hotplug_ports", config.hotplug_ports.len()),
        (
            "memory_max_bytes",
            usize::from(config.memory_max_bytes != 0),
        ),
    ];
    if let Err(number) = config.on_reset.enum_value() {
        return Err(format!(
            "config.on_reset: {number} is unknown: give 0 (end) or 1 (restart)"
        ));
    }
    let mut devices = 0_usize;
    for (field, count) in all {
        devices = devices.saturating_add(count);
        if devices > MAX_DEVICES {
            return Err(format!(
                "config.{field} has {count} entries: at most {MAX_DEVICES} {BUS_IS_FULL}"
            ));
        }
    }
    check_ports(&config.hotplug_ports)?;
    let mut ids = BTreeSet::new();
    if config.memory_max_bytes != 0 {
        ids.insert(mem::ID);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let name = format!("config.disks[{index}]");
        super::config_disk::check_disk(&name, disk)?;
        if !ids.insert(disk.id.as_str()) {
            return Err(format!(
                "{name}.id {} is taken by another device: give each its own",
                disk.id
            ));
        }
    }
    super::config_disk::check_together(&config.disks)?;
    super::config_net::validate(config, &mut ids)?;
    super::config_rng::validate(config, &mut ids)?;
    super::config_vsock::validate(config, &mut ids)?;
    super::config_console::validate(config, &mut ids)?;
    super::config_fs::validate(config, &mut ids)?;
    super::config_ports::validate(config, &ids)?;
    if let Some(serial) = config.serial.as_ref() {
        check_serial(serial)?;
    }
    super::config_sockets::validate(config)
}

/// Names of empty root ports: unlike each other and those of the ports that devices are behind
/// from the start.
fn check_ports(ports: &[String]) -> Result<(), String> {
    let mut names = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let name = format!("config.hotplug_ports[{index}]");
        check_id(port).map_err(|error| format!("{name}: {error}"))?;
        if !names.insert(port) {
            return Err(format!(
                "{name}: {port} is there twice: name each differently"
            ));
        }
        if port
            .strip_prefix("port")
            .is_some_and(|n| n.parse::<u8>().is_ok())
        {
            return Err(format!(
                "{name}: {port} is the name of a port that a device is behind from the start: choose another, such as hp{}",
                index.saturating_add(1)
            ));
        }
    }
    Ok(())
}

fn check_serial(serial: &SerialConfig) -> Result<(), String> {
    known("config.serial", serial)?;
    match serial.mode.enum_value() {
        Ok(Mode::FILE | Mode::SOCKET) => path("config.serial.path", &serial.path),
        Ok(Mode::NONE | Mode::STDIO) if serial.path.is_empty() => Ok(()),
        Ok(Mode::NONE | Mode::STDIO) => {
            Err("config.serial.path is set: only the modes FILE and SOCKET take one".into())
        }
        Err(number) => Err(format!("config.serial.mode is {number}: give 0 to 3")),
    }
}

/// An absolute path: the launcher that opens it has another working directory.
pub(super) fn path(field: &str, path: &str) -> Result<(), String> {
    text(field, path, MAX_PATH)?;
    if !path.starts_with('/') {
        return Err(format!("{field} is {path:?}: give an absolute path"));
    }
    if path.contains(char::is_control) {
        return Err(format!("{field} contains control characters: rename it"));
    }
    Ok(())
}

pub(super) fn text(field: &str, text: &str, max: usize) -> Result<(), String> {
    if text.len() > max {
        return Err(format!(
            "{field} has {} bytes: at most {max} are allowed",
            text.len()
        ));
    }
    if text.contains('\0') {
        return Err(format!("{field} contains a zero byte: leave it out"));
    }
    Ok(())
}

/// A field that this version does not know would silently not be honoured.
pub(super) fn known<M: Message>(name: &str, message: &M) -> Result<(), String> {
    match message.special_fields().unknown_fields().iter().next() {
        None => Ok(()),
        Some((number, _)) => Err(format!(
            "{name} has a field {number} that this version of bulkhead does not know: \
             use a client of the same version"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::{CpuConfig, DiskConfig};

    fn good() -> MachineConfig {
        let mut config = MachineConfig::new();
        config.kernel = "/boot/vmlinuz".into();
        config.memory_bytes = 512 << 20;
        let mut cpus = CpuConfig::new();
        cpus.boot = 2;
        config.cpus = Some(cpus).into();
        let mut disk = DiskConfig::new();
        disk.id = "root".into();
        disk.path = "/disk".into();
        config.disks.push(disk);
        config
    }

    fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
        let mut config = good();
        change(&mut config);
        validate(&config).unwrap_err()
    }

    #[test]
    fn a_plain_configuration_passes() {
        assert_eq!(validate(&good()), Ok(()));
    }

    #[test]
    fn errors_name_the_field() {
        for (field, error) in [
            ("config.kernel", refused(|c| c.kernel.clear())),
            ("config.kernel", refused(|c| c.kernel = "vmlinuz".into())),
            ("config.initrd", refused(|c| c.initrd = "/a\0b".into())),
            (
                "config.cmdline",
                refused(|c| c.cmdline = "x".repeat(MAX_CMDLINE + 1)),
            ),
            ("config.memory_bytes", refused(|c| c.memory_bytes = 0)),
            ("config.cpus", refused(|c| c.cpus = None.into())),
            (
                "config.cpus.boot",
                refused(|c| c.cpus.mut_or_insert_default().boot = 0),
            ),
            (
                "config.cpus.boot",
                refused(|c| c.cpus.mut_or_insert_default().boot = u32::MAX),
            ),
            (
                "config.cpus.pin",
                refused(|c| c.cpus.mut_or_insert_default().pin = vec![1]),
            ),
            (
                "config.disks",
                refused(|c| c.disks = vec![DiskConfig::new(); 100_000]),
            ),
            (
                "config.disks[0].id",
                refused(|c| c.disks[0].id = "../x".into()),
            ),
            (
                "config.disks[1].id",
                refused(|c| c.disks.push(c.disks[0].clone())),
            ),
            (
                "config.disks[0].path",
                refused(|c| c.disks[0].path = "/".repeat(5000)),
            ),
            (
                "config.disks[0].serial",
                refused(|c| c.disks[0].serial = "x".repeat(21)),
            ),
            (
                "config.disks[0].queues",
                refused(|c| c.disks[0].queues = 1000),
            ),
        ] {
            assert!(error.starts_with(field), "{field}: {error}");
        }
        let serial = |mode, path: &str| {
            let mut serial = SerialConfig::new();
            serial.mode = mode;
            serial.path = path.into();
            refused(|c| c.serial = Some(serial).into())
        };
        assert!(serial(Mode::FILE.into(), "").starts_with("config.serial.path"));
        assert!(serial(Mode::STDIO.into(), "/x").starts_with("config.serial.path"));
        let unknown = bulkhead_proto::protobuf::EnumOrUnknown::from_i32(9);
        assert!(serial(unknown, "").starts_with("config.serial.mode"));
    }

    #[test]
    fn no_device_has_a_name_of_the_machines_own() {
        for id in ["machine", "memory", "vcpus"] {
            let disk = refused(|c| c.disks[0].id = id.into());
            let start = format!("config.disks[0].id: {id} is what operations call");
            assert!(disk.starts_with(&start), "{disk}");
            let rng = refused(|c| {
                let mut rng = bulkhead_proto::machine::RngConfig::new();
                rng.id = id.into();
                c.rngs.push(rng);
            });
            assert!(rng.ends_with(&format!("such as {id}0")), "{rng}");
        }
        assert_eq!(check_device_id("memory0"), Ok(()));
    }

    #[test]
    fn a_field_from_the_future_is_refused_at_any_depth() {
        let top = refused(|c| c.special_fields.mut_unknown_fields().add_varint(99, 1));
        assert!(top.starts_with("config has a field 99"), "{top}");
        let deep = refused(|c| {
            c.disks[0]
                .special_fields
                .mut_unknown_fields()
                .add_varint(77, 1)
        });
        assert!(deep.starts_with("config.disks[0] has a field 77"), "{deep}");
    }
}
