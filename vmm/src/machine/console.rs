//! Console devices: from their configuration to a `bulkhead-console` process and its arguments.
//! VIRTIO 1.2 section 5.3. Called on the manager thread, and where devices are added.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use bulkhead_proto::device::ConsoleUpdate;
use bulkhead_proto::machine::ConsoleConfig;

use super::device::{self, Device, Order, Site, Special};
use super::kinds;
use crate::launcher::printable;
use crate::virtio::VirtioPciOptions;

/// fd of the first port's listening socket in the device process: after the channels.
const LISTEN_FD: usize = 5;

/// Listens, starts the process, and puts a function in front.
///
/// # Errors
/// One line that says what failed and the remedy; nothing stays behind.
pub fn spawn(console: &ConsoleConfig, site: &Site<'_>) -> Result<Device, String> {
    let (mut paths, mut listeners) = (Vec::new(), Vec::new());
    let forget = |paths: &[PathBuf]| {
        for path in paths {
            let _ = site.launcher.forget(path);
        }
    };
    for port in &console.ports {
        let path = PathBuf::from(&port.socket);
        match site.launcher.bind_unix(&path, "console") {
            Ok(listener) => listeners.push(listener),
            Err(e) => {
                forget(&paths);
                return Err(e.to_string());
            }
        }
        paths.push(path);
    }
    start(console, paths.clone(), listeners, site).inspect_err(|_| forget(&paths))
}

fn start(
    console: &ConsoleConfig,
    paths: Vec<PathBuf>,
    listeners: Vec<UnixListener>,
    site: &Site<'_>,
) -> Result<Device, String> {
    let kind = &kinds::CONSOLE;
    let queues = queues(console);
    let mut granted = vec![
        "control channel".to_owned(),
        "vhost-user channel".to_owned(),
    ];
    let listening = paths.iter().map(|path| path.to_string_lossy());
    granted.extend(listening.map(|path| format!("{} (listening)", printable(&path))));
    let order = Order {
        id: &console.id,
        kind,
        variant: None,
        args: args(console),
        fds: listeners.into_iter().map(Into::into).collect(),
        queues: queues.into(),
        dial: None,
        mtu: 0,
        tap: String::new(),
        resources: console.resources.as_ref().cloned().unwrap_or_default(),
        block_device: String::new(),
    };
    let (process, frontend) = device::spawn(site.launcher, order)?;
    let options = VirtioPciOptions::new(&console.id, kind.virtio_id, queues);
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, &console.id, process.incarnation, &why))?;
    Ok(Device {
        id: console.id.clone(),
        kind: kind.name,
        process: Some(process),
        special: Special::Console(paths),
        function,
        address,
        port,
        queues: queues.into(),
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted,
    })
}

/// Two for each port, and two for messages about them unless there is one console alone.
fn queues(console: &ConsoleConfig) -> u16 {
    let alone = matches!(console.ports.as_slice(), [port] if port.name.is_empty());
    let pairs = console.ports.len().saturating_add(usize::from(!alone));
    u16::try_from(pairs.saturating_mul(2)).unwrap_or(u16::MAX)
}

/// What a console process is told on its command line.
fn args(console: &ConsoleConfig) -> Vec<String> {
    let ports = console.ports.iter().enumerate().map(|(index, port)| {
        let fd = LISTEN_FD.saturating_add(index);
        match port.name.as_str() {
            "" => fd.to_string(),
            name => format!("{fd}:{name}"),
        }
    });
    let ports = ports.collect::<Vec<_>>().join(",");
    let mut args = ["--control-fd", "3", "--vhost-fd", "4", "--ports", &ports]
        .map(str::to_string)
        .to_vec();
    let sized = console
        .ports
        .iter()
        .enumerate()
        .filter(|(_, p)| p.cols != 0);
    let sizes: Vec<String> = sized
        .map(|(index, port)| format!("{index}:{}x{}", port.cols, port.rows))
        .collect();
    if !sizes.is_empty() {
        args.extend(["--sizes".to_owned(), sizes.join(",")]);
    }
    args
}

/// Enters new sizes into a configuration.
pub fn resized(console: &mut ConsoleConfig, update: &ConsoleUpdate) {
    for size in &update.sizes {
        let index = usize::try_from(size.port).unwrap_or(usize::MAX);
        if let Some(port) = console.ports.get_mut(index) {
            (port.cols, port.rows) = (size.cols, size.rows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::common::ConsoleSize;
    use bulkhead_proto::machine::ConsolePort;

    #[test]
    fn a_process_is_told_its_listeners_names_and_sizes() {
        let mut console = ConsoleConfig::new();
        console.ports.push(ConsolePort::new());
        let plain = "--control-fd 3 --vhost-fd 4 --ports 5";
        assert_eq!(args(&console).join(" "), plain);
        assert_eq!(queues(&console), 2);
        console.ports.push(ConsolePort::new());
        console.ports[1].name = "agent".into();
        console.ports.push(ConsolePort::new());
        let mut update = ConsoleUpdate::new();
        for (port, cols, rows) in [(0, 80, 24), (2, 132, 43), (9, 1, 1)] {
            let mut size = ConsoleSize::new();
            (size.port, size.cols, size.rows) = (port, cols, rows);
            update.sizes.push(size);
        }
        resized(&mut console, &update);
        let whole = format!("{plain},6:agent,7 --sizes 0:80x24,2:132x43");
        assert_eq!(args(&console).join(" "), whole);
        assert_eq!(queues(&console), 8);
        console.ports.remove(0);
        console.ports.truncate(1);
        assert_eq!(queues(&console), 4, "a name is told by a message");
        console.ports = vec![ConsolePort::new(); crate::api::MOST_CONSOLE_PORTS];
        assert_eq!(queues(&console), kinds::CONSOLE.max_queues);
    }
}
