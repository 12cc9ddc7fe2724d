//! The launcher's client for what a device's processes may use of the host: their cgroup leaf,
//! made before the first of them, and its limits, changed while they run.

use std::fs::File;

use bulkhead_proto::common::Resources;
use bulkhead_proto::launcher as wire;

use super::disks::{busy, send};
use super::{DEADLINE, Launcher, LauncherError};
use crate::launcher::{Least, printable};

/// Changes that may be under way.
const MAX_PLACES: usize = 64;
/// Most lines about limits that are not enforced, and the longest.
const MAX_LINES: usize = 8;
const MAX_LINE: usize = 512;

/// A device's leaf.
#[derive(Debug, Default)]
pub struct Placed {
    /// Its path below the mount of cgroup v2; empty: there is none.
    pub cgroup: String,
    /// Files of it and their names, to be read for statistics.
    pub files: Vec<(String, File)>,
    /// Limits that are not enforced, and why.
    pub not_enforced: Vec<String>,
}

/// What the launcher said, bounded.
pub(super) fn lines(lines: &[String]) -> Vec<String> {
    lines
        .iter()
        .take(MAX_LINES)
        .map(|line| printable(line).chars().take(MAX_LINE).collect())
        .collect()
}

fn request(
    device_id: &str,
    resources: &Resources,
    block_device: &str,
    least: Least,
) -> wire::request::Op {
    wire::request::Op::Place(wire::Place {
        device_id: device_id.to_owned(),
        resources: Some(resources.clone()).into(),
        block_device: block_device.to_owned(),
        least_memory: least.memory,
        least_data: least.data,
        least_pids: least.pids,
        ..Default::default()
    })
}

impl Launcher {
    /// Makes a leaf for a device, before its first process is started. `block_device` is the
    /// MAJOR:MINOR that limits on I/O are for, or empty; limits below `least` are refused, now and
    /// later.
    pub fn place(
        &self,
        device_id: &str,
        resources: &Resources,
        block_device: &str,
        least: Least,
    ) -> Result<Placed, LauncherError> {
        let op = request(device_id, resources, block_device, least);
        let (reply, fds, _) = self.call(op, &[], DEADLINE, "limits")?;
        match reply.result {
            Some(wire::reply::Result::Placed(placed)) if placed.files.len() == fds.len() => {
                let files = placed.files.iter().cloned();
                Ok(Placed {
                    cgroup: printable(&placed.cgroup),
                    not_enforced: lines(&placed.not_enforced),
                    files: files.zip(fds.into_iter().map(File::from)).collect(),
                })
            }
            _ => Err(LauncherError::Protocol(
                "limits were answered with something else",
            )),
        }
    }

    /// Begins to change a device's limits. Does not wait: the answer is a
    /// [`Placed`](super::LauncherEvent::Placed) with the ticket that this returns.
    pub fn begin_place(
        &self,
        device_id: &str,
        resources: &Resources,
    ) -> Result<u64, LauncherError> {
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        if inner.inbox.places.len() >= MAX_PLACES {
            return Err(busy());
        }
        let op = request(device_id, resources, "", Least::default());
        send(&inner, id, op)?;
        inner.last_id = id;
        inner.inbox.begun.insert(id);
        inner.inbox.places.insert(id);
        Ok(id)
    }
}
