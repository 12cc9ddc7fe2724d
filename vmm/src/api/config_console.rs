//! What consoles must look like in a configuration, and what may be changed of them: the part of
//! `config` that knows them. Called on the `api` thread for every Create and UpdateConsole.

use std::collections::BTreeSet;

use bulkhead_proto::common::ConsoleSize;
use bulkhead_proto::machine::{ConsoleConfig, MachineConfig};

use super::config::{known, path};
use super::config_net::take_id;
use crate::cli::machine_args::check_id;

/// Most ports of one device.
pub const MOST_PORTS: usize = 16;
/// Most columns or rows.
const MOST: u32 = u16::MAX as u32;

/// Checks `consoles` of a configuration; `ids` are those taken so far.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn validate<'a>(
    config: &'a MachineConfig,
    ids: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    for (index, console) in config.consoles.iter().enumerate() {
        let name = format!("config.consoles[{index}]");
        known(&name, console)?;
        take_id(&name, &console.id, ids)?;
        check_ports(&name, console)?;
        let resources = console.resources.as_ref();
        super::config_resources::check(&format!("{name}.resources"), resources, false)?;
    }
    Ok(())
}

fn check_ports(name: &str, console: &ConsoleConfig) -> Result<(), String> {
    let count = console.ports.len();
    if count == 0 || count > MOST_PORTS {
        return Err(format!(
            "{name}.ports has {count} entries: give 1 to {MOST_PORTS}"
        ));
    }
    let mut names = BTreeSet::new();
    for (index, port) in console.ports.iter().enumerate() {
        let name = format!("{name}.ports[{index}]");
        path(&format!("{name}.socket"), &port.socket)?;
        let sized = port.cols != 0 || port.rows != 0;
        if port.name.is_empty() {
            check_size(&name, port.cols, port.rows)?;
            continue;
        }
        check_id(&port.name).map_err(|why| format!("{name}.name is {:?}: {why}", port.name))?;
        if !names.insert(port.name.as_str()) {
            return Err(format!(
                "{name}.name: {} is another port's: name each differently",
                port.name
            ));
        }
        if sized {
            return Err(format!(
                "{name}.cols and rows are of consoles: leave them out, or the name"
            ));
        }
    }
    Ok(())
}

fn check_size(name: &str, cols: u32, rows: u32) -> Result<(), String> {
    if (cols == 0) != (rows == 0) || cols > MOST || rows > MOST {
        return Err(format!(
            "{name}.cols and rows are {cols} and {rows}: give 1 to {MOST} each, or 0 for both"
        ));
    }
    Ok(())
}

/// Checks the sizes of UpdateConsole; whether there are such ports is the device's to say.
///
/// # Errors
///
/// One line that names the field and what it takes.
pub(super) fn check_sizes(sizes: &[ConsoleSize]) -> Result<(), String> {
    if sizes.is_empty() || sizes.len() > MOST_PORTS {
        return Err(format!(
            "sizes has {} entries: give 1 to {MOST_PORTS}",
            sizes.len()
        ));
    }
    let mut ports = BTreeSet::new();
    for (index, size) in sizes.iter().enumerate() {
        let name = format!("sizes[{index}]");
        if !ports.insert(size.port) {
            return Err(format!(
                "{name}.port: {} is there twice: give it once",
                size.port
            ));
        }
        check_size(&name, size.cols, size.rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::ConsolePort;

    fn checked(change: impl FnOnce(&mut ConsoleConfig)) -> Result<(), String> {
        let mut config = MachineConfig::new();
        let mut console = ConsoleConfig::new();
        console.id = "console".into();
        for name in ["", "agent"] {
            let mut port = ConsolePort::new();
            (port.socket, port.name) = (format!("/run/c{name}"), name.into());
            console.ports.push(port);
        }
        change(&mut console);
        config.consoles.push(console);
        validate(&config, &mut BTreeSet::from(["disk0"]))
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(checked(|_| {}), Ok(()));
        let sized = checked(|c| (c.ports[0].cols, c.ports[0].rows) = (80, 24));
        assert_eq!(sized, Ok(()));
        for (field, checked) in [
            ("id disk0", checked(|c| c.id = "disk0".into())),
            ("ports has 0", checked(|c| c.ports.clear())),
            (
                "ports has 18",
                checked(|c| c.ports.extend(vec![ConsolePort::new(); MOST_PORTS])),
            ),
            (
                "ports[0].socket",
                checked(|c| c.ports[0].socket = "c".into()),
            ),
            ("ports[1].name", checked(|c| c.ports[1].name = "a/b".into())),
            (
                "ports[1].name",
                checked(|c| c.ports[0].name = "agent".into()),
            ),
            ("ports[0].cols", checked(|c| c.ports[0].cols = 80)),
            (
                "ports[0].cols",
                checked(|c| (c.ports[0].cols, c.ports[0].rows) = (65_536, 1)),
            ),
            (
                "ports[1].cols",
                checked(|c| (c.ports[1].cols, c.ports[1].rows) = (80, 24)),
            ),
        ] {
            let error = checked.unwrap_err();
            assert!(
                error.starts_with(&format!("config.consoles[0].{field}")),
                "{field}: {error}"
            );
        }
    }

    #[test]
    fn sizes_are_of_ports_that_are_named_once() {
        let size = |port, cols, rows| {
            let mut size = ConsoleSize::new();
            (size.port, size.cols, size.rows) = (port, cols, rows);
            size
        };
        assert_eq!(check_sizes(&[size(0, 80, 24), size(7, 0, 0)]), Ok(()));
        for bad in [
            vec![],
            vec![size(0, 1, 1), size(0, 1, 1)],
            vec![size(0, 80, 0)],
            vec![size(0, 70_000, 1)],
            (0..17).map(|port| size(port, 1, 1)).collect(),
        ] {
            assert!(check_sizes(&bad).is_err(), "{bad:?}");
        }
    }
}
