//! Entropy devices: from their configuration to a `bulkhead-rng` process and its arguments.
//! VIRTIO 1.2 section 5.4. Called on the manager thread, and where devices are added.

use std::path::Path;

use bulkhead_proto::machine::RngConfig;

use super::device::{self, Device, Order, Site, Special};
use super::disk::bucket_text;
use super::kinds;
use crate::launcher::{Access, ENTROPY_ROLE};
use crate::virtio::VirtioPciOptions;

/// The host's generator: getrandom(2) by another name, as a descriptor.
const SOURCE: &str = "/dev/random";
/// fd of it in the device process: after the channels.
const SOURCE_FD: i32 = 5;

/// Starts the process, and puts a function in front.
///
/// # Errors
/// One line that says what failed and the remedy; nothing stays behind.
pub fn spawn(rng: &RngConfig, site: &Site<'_>) -> Result<Device, String> {
    let kind = &kinds::RNG;
    let (source, _) = site
        .launcher
        .open_path(Path::new(SOURCE), ENTROPY_ROLE, Access::Read, false)
        .map_err(|e| e.to_string())?;
    let order = Order {
        id: &rng.id,
        kind,
        variant: None,
        args: args(rng),
        fds: vec![source.into()],
        queues: 1,
        dial: None,
        mtu: 0,
        tap: String::new(),
        resources: rng.resources.as_ref().cloned().unwrap_or_default(),
        block_device: String::new(),
    };
    let (process, frontend) = device::spawn(site.launcher, order)?;
    let options = VirtioPciOptions::new(&rng.id, kind.virtio_id, kind.max_queues);
    let (function, address, port) = device::attach(site, options, frontend)
        .map_err(|why| device::undo(site.launcher, &rng.id, process.incarnation, &why))?;
    Ok(Device {
        id: rng.id.clone(),
        kind: kind.name,
        process: Some(process),
        special: Special::Rng,
        function,
        address,
        port,
        queues: 1,
        failed: None,
        drained: false,
        ring_errors: (None, 0),
        ring_alarms: (None, 0),
        granted: ["control channel", "vhost-user channel", SOURCE]
            .map(str::to_string)
            .to_vec(),
    })
}

/// What an entropy process is told on its command line.
fn args(rng: &RngConfig) -> Vec<String> {
    let mut args = [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--source-fd",
        &SOURCE_FD.to_string(),
    ]
    .map(str::to_string)
    .to_vec();
    if let Some(text) = rng.bytes.as_ref().and_then(bucket_text) {
        args.extend(["--bps".to_owned(), text]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_its_descriptors_and_its_limit() {
        let mut rng = RngConfig::new();
        let plain = "--control-fd 3 --vhost-fd 4 --source-fd 5";
        assert_eq!(args(&rng).join(" "), plain);
        let bytes = rng.bytes.mut_or_insert_default();
        (bytes.per_second, bytes.burst) = (1000, 20);
        assert_eq!(args(&rng).join(" "), format!("{plain} --bps 1000:20"));
    }
}
