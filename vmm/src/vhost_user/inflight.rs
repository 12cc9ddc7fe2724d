//! The log of requests in flight (vhost-user protocol, "Inflight I/O tracking"): the
//! back-end makes the shared memory that it lies in, the front-end keeps it and hands it
//! to the back-end's successor.
//!
//! The VMM never maps it: what stands in it is between one back-end and the next. All
//! that is checked here is that the next one can map it without harm; how many requests it
//! has in flight is read for an event. vCPU threads and
//! the thread that brings a successor in call this under their function's lock.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat};
use vhost::vhost_user::message::FrontendReq;

use super::error::{VhostUserError, Violation};
use super::{Deadline, Frontend};

type Result<T> = std::result::Result<T, VhostUserError>;

/// mmap size, mmap offset, number of queues, queue size; padded as every implementation
/// in use has it.
const DESCRIPTION: u32 = 24;
/// The specification's queue region: a header and one entry per descriptor.
const QUEUE_HEADER: u64 = 16;
const QUEUE_ENTRY: u64 = 16;
/// Where implementations put each queue's region.
const QUEUE_ALIGN: u64 = 64;
/// What an implementation may add to each queue's region by alignment or fields of its own,
/// as a factor and a constant.
const MAX_FACTOR: u64 = 4;
const MAX_EXTRA: u64 = 64 << 10;
/// What a device may add for its own use behind all queues' regions.
const MAX_OWN: u64 = 16 << 20;
const PAGE: u64 = 4096;

/// How many queues of what size a region tracks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Number of queues.
    pub queues: u16,
    /// Descriptors of the largest.
    pub queue_size: u16,
}

/// Shared memory in which back-ends log what they have in flight.
#[derive(Debug)]
pub struct InflightRegion {
    file: File,
    size: u64,
    offset: u64,
    geometry: Geometry,
}

impl InflightRegion {
    /// The queues that the region was made for.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Requests that the log has in flight, by the layout that the specification gives for
    /// split rings, each queue's region at a multiple of 64 bytes. What stands there is a
    /// device's word: it is told to people and nothing depends on it.
    pub fn in_flight(&self) -> u64 {
        let entries = usize::from(self.geometry.queue_size);
        let bytes = entries.saturating_mul(QUEUE_ENTRY as usize);
        let stride = (bytes as u64)
            .saturating_add(QUEUE_HEADER)
            .next_multiple_of(QUEUE_ALIGN);
        let mut states = vec![0; bytes];
        let mut count = 0u64;
        for queue in 0..u64::from(self.geometry.queues) {
            let at = self
                .offset
                .saturating_add(queue.saturating_mul(stride))
                .saturating_add(QUEUE_HEADER);
            if self.file.read_exact_at(&mut states, at).is_err() {
                break;
            }
            let flags = states.iter().step_by(QUEUE_ENTRY as usize);
            count = count.saturating_add(flags.filter(|flag| **flag == 1).count() as u64);
        }
        count
    }

    fn description(size: u64, offset: u64, geometry: Geometry) -> Vec<u8> {
        let mut payload = Vec::with_capacity(DESCRIPTION as usize);
        payload.extend_from_slice(&size.to_ne_bytes());
        payload.extend_from_slice(&offset.to_ne_bytes());
        payload.extend_from_slice(&geometry.queues.to_ne_bytes());
        payload.extend_from_slice(&geometry.queue_size.to_ne_bytes());
        payload.resize(DESCRIPTION as usize, 0);
        payload
    }

    /// Checks an answer to GET_INFLIGHT_FD. A region that could shrink under the next
    /// back-end is accepted only `unsealed`, from one that is not ours.
    fn check(
        reply: &[u8],
        fd: Option<OwnedFd>,
        asked: Geometry,
        unsealed: bool,
    ) -> std::result::Result<Self, Violation> {
        let wrong = Violation::BadValue;
        let (size, offset) = (u64_at(reply, 0), u64_at(reply, 8));
        let geometry = Geometry {
            queues: u16_at(reply, 16),
            queue_size: u16_at(reply, 18),
        };
        if geometry != asked {
            return Err(wrong("number or size of in-flight queues"));
        }
        let queues = u64::from(asked.queues);
        let least = u64::from(asked.queue_size)
            .saturating_mul(QUEUE_ENTRY)
            .saturating_add(QUEUE_HEADER);
        let most = least.saturating_mul(MAX_FACTOR).saturating_add(MAX_EXTRA);
        let most = most.saturating_mul(queues).saturating_add(MAX_OWN);
        if !(least.saturating_mul(queues)..=most).contains(&size) {
            return Err(wrong("size of the in-flight region"));
        }
        if !offset.is_multiple_of(PAGE) {
            return Err(wrong("offset of the in-flight region"));
        }
        let fd = fd.ok_or(wrong("in-flight reply: it has no descriptor"))?;
        let unusable = |_| wrong("descriptor of the in-flight region");
        let stat = fstat(&fd).map_err(unusable)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(wrong("kind of in-flight descriptor: it is no memfd"));
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(wrong("in-flight region: it is larger than its file"));
        }
        let sealed = fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed && !unsealed {
            return Err(wrong("in-flight descriptor: it is not sealed"));
        }
        Ok(Self {
            file: fd.into(),
            size,
            offset,
            geometry,
        })
    }
}

impl Frontend {
    /// GET_INFLIGHT_FD: has the back-end make the region. One whose file is `unsealed` is
    /// accepted of somebody else's program only: it harms none but itself.
    pub fn get_inflight_fd(
        &mut self,
        geometry: Geometry,
        unsealed: bool,
        deadline: Deadline,
    ) -> Result<InflightRegion> {
        let what = "GET_INFLIGHT_FD";
        if !self.has_inflight() {
            return Err(VhostUserError::Unsupported("in-flight tracking"));
        }
        let payload = InflightRegion::description(0, 0, geometry);
        let (reply, fd) = self.ask_for_fd(
            FrontendReq::GET_INFLIGHT_FD,
            what,
            &payload,
            DESCRIPTION,
            deadline,
        )?;
        // How a back-end says that it could not make one.
        if u64_at(&reply, 0) == 0 && fd.is_none() {
            return Err(VhostUserError::Refused(what));
        }
        InflightRegion::check(&reply, fd, geometry, unsealed)
            .map_err(|violation| self.breach(violation.into()))
    }

    /// SET_INFLIGHT_FD: hands the region to the back-end, before its rings start.
    pub fn set_inflight_fd(&mut self, region: &InflightRegion, deadline: Deadline) -> Result<()> {
        if !self.has_inflight() {
            return Err(VhostUserError::Unsupported("in-flight tracking"));
        }
        let payload = InflightRegion::description(region.size, region.offset, region.geometry);
        self.command(
            FrontendReq::SET_INFLIGHT_FD,
            "SET_INFLIGHT_FD",
            &payload,
            &[region.file.as_fd()],
            deadline,
        )
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |chunk| u64::from_ne_bytes(*chunk))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |chunk| u16::from_ne_bytes(*chunk))
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
