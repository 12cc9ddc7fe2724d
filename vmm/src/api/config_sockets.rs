//! That no two devices of a configuration, the serial port among them, want one socket that
//! Bulkhead makes, and that the serial port's file is no disk: the part of `config` that knows it.
//! Called on the `api` thread for every Create.

use std::collections::BTreeMap;

use bulkhead_proto::machine::{MachineConfig, net_config, serial_config::Mode};

/// A socket that the configuration names.
struct Named<'a> {
    field: String,
    path: &'a str,
    /// Bulkhead makes it; otherwise it connects to it.
    made: bool,
}

fn sockets(config: &MachineConfig) -> Vec<Named<'_>> {
    let mut all = Vec::new();
    let mut add = |field: String, path, made| all.push(Named { field, path, made });
    if config.serial.mode == Mode::SOCKET.into() {
        add("config.serial.path".to_owned(), &config.serial.path, true);
    }
    for (index, net) in config.nets.iter().enumerate() {
        if let Some(net_config::Backend::VhostUser(switch)) = &net.backend {
            let field = format!("config.nets[{index}].vhost_user.socket");
            add(field, switch.socket.as_str(), switch.server);
        }
    }
    for (index, device) in config.vhost_users.iter().enumerate() {
        let field = format!("config.vhost_users[{index}].socket");
        add(field, &device.socket, device.server);
    }
    if let Some(vsock) = config.vsock.as_ref() {
        add("config.vsock.socket".to_owned(), &vsock.socket, true);
    }
    for (index, console) in config.consoles.iter().enumerate() {
        for (port, socket) in console.ports.iter().map(|p| &p.socket).enumerate() {
            let field = format!("config.consoles[{index}].ports[{port}].socket");
            add(field, socket, true);
        }
    }
    all
}

/// Checks all sockets of a configuration, whose paths are valid, and the serial port's file.
///
/// # Errors
///
/// One line that names the field and what has its socket already.
pub(super) fn validate(config: &MachineConfig) -> Result<(), String> {
    let mut seen: BTreeMap<&str, Named<'_>> = BTreeMap::new();
    for socket in sockets(config) {
        if let Some(other) = seen.get(socket.path)
            && (other.made || socket.made)
        {
            return Err(format!(
                "{}: {} is another's socket, of {}: give each its own",
                socket.field, socket.path, other.field
            ));
        }
        seen.entry(socket.path).or_insert(socket);
    }
    if config.serial.mode != Mode::FILE.into() {
        return Ok(());
    }
    let path = config.serial.path.as_str();
    match config.disks.iter().position(|disk| disk.path == path) {
        None => Ok(()),
        Some(index) => Err(format!(
            "config.serial.path: {path} is the disk of config.disks[{index}].path: give the serial port a file of its own"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::machine::{
        ConsoleConfig, ConsolePort, DiskConfig, NetConfig, SerialConfig, VhostUserBackend,
        VhostUserConfig, VsockConfig,
    };

    fn net(path: &str, server: bool) -> NetConfig {
        let mut switch = VhostUserBackend::new();
        (switch.socket, switch.server) = (path.into(), server);
        let mut net = NetConfig::new();
        net.backend = Some(net_config::Backend::VhostUser(switch));
        net
    }

    fn any(path: &str, server: bool) -> VhostUserConfig {
        let mut device = VhostUserConfig::new();
        (device.socket, device.server) = (path.into(), server);
        device
    }

    fn serial(mode: Mode, path: &str) -> SerialConfig {
        let mut serial = SerialConfig::new();
        (serial.mode, serial.path) = (mode.into(), path.into());
        serial
    }

    #[test]
    fn the_serial_ports_file_is_no_disk() {
        let mut config = MachineConfig::new();
        for path in ["/srv/root", "/srv/data"] {
            let mut disk = DiskConfig::new();
            disk.path = path.into();
            config.disks.push(disk);
        }
        config.serial = Some(serial(Mode::FILE, "/srv/log")).into();
        assert_eq!(validate(&config), Ok(()));
        config.serial.mut_or_insert_default().path = "/srv/data".into();
        let told = validate(&config).unwrap_err();
        let start = "config.serial.path: /srv/data is the disk of config.disks[1].path: ";
        assert!(told.starts_with(start), "{told}");
    }

    #[test]
    fn a_socket_that_is_made_is_one_devices() {
        let mut config = MachineConfig::new();
        config.nets = vec![net("/run/a", true), net("/run/b", false)];
        // A back-end may have several front-ends.
        config.vhost_users = vec![any("/run/b", false)];
        let mut vsock = VsockConfig::new();
        vsock.socket = "/run/v".into();
        config.vsock = Some(vsock).into();
        let mut port = ConsolePort::new();
        port.socket = "/run/c".into();
        let mut console = ConsoleConfig::new();
        console.ports = vec![port];
        config.consoles = vec![console];
        config.serial = Some(serial(Mode::SOCKET, "/run/s")).into();
        assert_eq!(validate(&config), Ok(()));
        for (path, server, other) in [
            ("/run/a", true, "config.nets[0].vhost_user.socket"),
            // It would wait for itself.
            ("/run/a", false, "config.nets[0].vhost_user.socket"),
            ("/run/b", true, "config.nets[1].vhost_user.socket"),
        ] {
            let mut config = config.clone();
            config.vhost_users.push(any(path, server));
            let told = validate(&config).unwrap_err();
            let expected = format!(
                "config.vhost_users[1].socket: {path} is another's socket, of {other}: give each its own"
            );
            assert_eq!(told, expected);
        }
        for path in ["/run/a", "/run/v", "/run/c", "/run/s"] {
            let mut config = config.clone();
            config.consoles.push(config.consoles[0].clone());
            config.consoles[1].ports[0].socket = path.into();
            let told = validate(&config).unwrap_err();
            assert!(
                told.starts_with("config.consoles[1].ports[0].socket: ") && told.contains(path),
                "{told}"
            );
        }
    }
}
