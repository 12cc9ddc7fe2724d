//! The socket device: from its configuration to a `bulkhead-vsock` process and its arguments.
//! VIRTIO 1.2 section 5.10. Called on the manager thread.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use bulkhead_proto::machine::VsockConfig;

use super::device::{self, Device, Order, Site, Special};
use super::kinds;
use crate::launcher::printable;
use crate::virtio::VirtioPciOptions;

/// fd of the listening socket in the device process: after the channels.
const LISTEN_FD: i32 = 5;
/// The guest's address where none is given: the first that a guest may have.
pub const DEFAULT_CID: u32 = 3;

/// Listens, starts the process, and puts a function in front.
///
/// # Errors
/// One line that says what failed and the remedy; nothing stays behind.
pub fn spawn(vsock: &VsockConfig, site: &Site<'_>) -> Result<Device, String> {
    let path = PathBuf::from(&vsock.socket);
    let listener = site
        .launcher
        .bind_unix(&path, "vsock")
        .map_err(|e| e.to_string())?;
    start(vsock, &path, listener, site).inspect_err(|_| {
        let _ = site.launcher.forget(&path);
    })
}

fn start(
    vsock: &VsockConfig,
    path: &Path,
    listener: UnixListener,
    site: &Site<'_>,
) -> Result<Device, String> {
    let kind = &kinds::VSOCK;
    let order = Order {
        id: &vsock.id,
        kind,
        variant: None,
        args: args(vsock),
        fds: vec![listener.into()],
        queues: kind.max_queues.into(),
        dial: Some(path),
        mtu: 0,
        tap: String::new(),
        resources: vsock.resources.as_ref().cloned().unwrap_or_default(),
        block_device: String::new(),
    };
    let (process, frontend) = device::spawn(site.launcher, order)?;
    let options = VirtioPciOptions::new(&vsock.id, kind.virtio_id, kind.max_queues);
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, &vsock.id, process.incarnation, &why))?;
    Ok(Device {
        id: vsock.id.clone(),
        kind: kind.name,
        process: Some(process),
        special: Special::Vsock(path.to_owned()),
        function,
        address,
        port,
        queues: kind.max_queues.into(),
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted: vec![
            "control channel".to_owned(),
            "vhost-user channel".to_owned(),
            format!("{} (listening)", printable(&vsock.socket)),
            format!("requests to be joined to {}_PORT", printable(&vsock.socket)),
        ],
    })
}

/// What a socket process is told on its command line.
fn args(vsock: &VsockConfig) -> Vec<String> {
    let cid = match vsock.cid {
        0 => DEFAULT_CID,
        cid => cid,
    };
    [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--listen-fd",
        &LISTEN_FD.to_string(),
        "--cid",
        &cid.to_string(),
    ]
    .map(str::to_string)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_its_listener_and_the_guests_address() {
        let mut vsock = VsockConfig::new();
        let plain = "--control-fd 3 --vhost-fd 4 --listen-fd 5 --cid";
        assert_eq!(args(&vsock).join(" "), format!("{plain} 3"));
        vsock.cid = 77;
        assert_eq!(args(&vsock).join(" "), format!("{plain} 77"));
    }
}
