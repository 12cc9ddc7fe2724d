//! What root ports at places of their own must look like in a configuration: the part of
//! `config` that knows them. Called on the `api` thread for every Create.

use std::collections::BTreeSet;

use bulkhead_proto::machine::{MachineConfig, RootPort};

use super::config::{MAX_DEVICES, known};
use crate::cli::machine_args::check_id;

/// Checks `ports` of a configuration; `ids` are all its devices.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate(config: &MachineConfig, ids: &BTreeSet<&str>) -> Result<(), String> {
    if config.ports.is_empty() {
        return Ok(());
    }
    if !config.hotplug_ports.is_empty() {
        return Err(
            "config.hotplug_ports is set beside config.ports: name the empty ones in ports, too"
                .into(),
        );
    }
    if config.ports.len() > MAX_DEVICES {
        return Err(format!(
            "config.ports has {} entries: at most {MAX_DEVICES} fit on the bus",
            config.ports.len()
        ));
    }
    let (mut names, mut places) = (BTreeSet::new(), BTreeSet::new());
    let mut unplaced = ids.clone();
    for (index, port) in config.ports.iter().enumerate() {
        let field = format!("config.ports[{index}]");
        check(&field, port)?;
        if !names.insert(port.name.as_str()) {
            return Err(format!(
                "{field}.name: {} is there twice: name each differently",
                port.name
            ));
        }
        if !places.insert(port.device) {
            return Err(format!(
                "{field}.device: {} is another port's: give each its own",
                port.device
            ));
        }
        if !port.behind.is_empty() && !unplaced.remove(port.behind.as_str()) {
            return Err(format!(
                "{field}.behind: {:?} is no device, or behind another port: give the id of one",
                port.behind
            ));
        }
    }
    match unplaced.first() {
        None => Ok(()),
        Some(id) => Err(format!(
            "config.ports: device {id} is behind none of them: name it in behind of one"
        )),
    }
}

fn check(field: &str, port: &RootPort) -> Result<(), String> {
    known(field, port)?;
    check_id(&port.name).map_err(|error| format!("{field}.name: {error}"))?;
    if !(1..=31).contains(&port.device) {
        return Err(format!(
            "{field}.device is {}: give 1 to 31, its number on bus 0",
            port.device
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        let mut config = MachineConfig::new();
        for (name, device, behind) in [("rootfs", 1, "root"), ("hp0", 8, ""), ("hp1", 31, "")] {
            let mut port = RootPort::new();
            (port.name, port.device) = (name.into(), device);
            (port.behind, port.hotplug) = (behind.into(), behind.is_empty());
            config.ports.push(port);
        }
        config
    }

    fn checked(change: impl FnOnce(&mut MachineConfig)) -> Result<(), String> {
        let mut config = config();
        change(&mut config);
        validate(&config, &BTreeSet::from(["root"]))
    }

    #[test]
    fn each_device_is_behind_one_port() {
        assert_eq!(checked(|_| {}), Ok(()));
        assert_eq!(checked(|c| c.ports.clear()), Ok(()));
        for (start, error) in [
            (
                "config.ports: device root",
                checked(|c| c.ports[0].behind.clear()),
            ),
            (
                "config.ports[1].behind",
                checked(|c| c.ports[1].behind = "root".into()),
            ),
            (
                "config.ports[1].behind",
                checked(|c| c.ports[1].behind = "x".into()),
            ),
            (
                "config.ports[2].name",
                checked(|c| c.ports[2].name = "hp0".into()),
            ),
            (
                "config.ports[2].name",
                checked(|c| c.ports[2].name = "a b".into()),
            ),
            ("config.ports[2].device", checked(|c| c.ports[2].device = 8)),
            ("config.ports[2].device", checked(|c| c.ports[2].device = 0)),
            (
                "config.ports[2].device",
                checked(|c| c.ports[2].device = 32),
            ),
            (
                "config.ports has",
                checked(|c| c.ports = vec![RootPort::new(); 40]),
            ),
            (
                "config.hotplug_ports",
                checked(|c| c.hotplug_ports.push("x".into())),
            ),
        ] {
            let error = error.unwrap_err();
            assert!(error.starts_with(start), "{start}: {error}");
        }
    }
}
