//! For tests only: a machine with one device, whose process is served a vhost-user front-end's
//! messages and a driver's rings.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use crate::driver::{Desc, USER_BASE, guest};
use crate::frontend::{Vq, fd, negotiate};
use crate::memory::Memory;
use crate::sys;

/// Long enough for a busy machine; a test never waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where things lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Where the first ring lies; everything below is for data.
    pub rings: u64,
    /// Bytes from one ring to the next.
    pub apart: u64,
    /// Descriptors of a ring.
    pub ring_size: u16,
}

/// A front-end and its guest.
pub struct Vm {
    /// The front-end.
    pub frontend: Frontend,
    /// Guest memory.
    pub file: File,
    /// The same, mapped.
    pub memory: Arc<Memory>,
    /// The driver's queues.
    pub queues: Vec<Vq>,
    /// What was negotiated.
    pub features: u64,
    layout: Layout,
}

impl Vm {
    /// Negotiates what `choose` makes of the features, up to but without memory and rings.
    pub fn negotiated(
        layout: Layout,
        stream: UnixStream,
        queues: u16,
        choose: impl Fn(u64) -> u64,
    ) -> Self {
        let (frontend, features) = negotiate(stream, queues, choose);
        let (file, memory) = guest(layout.start, layout.size).unwrap();
        let queues = (0..u64::from(queues))
            .map(|i| Vq::new(&memory, layout.rings + layout.apart * i, layout.ring_size))
            .collect();
        Self {
            frontend,
            file,
            memory,
            queues,
            features,
            layout,
        }
    }

    /// Guest memory as the front-end tells of it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.layout.start,
            memory_size: self.layout.size,
            userspace_addr: USER_BASE + self.layout.start,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Memory and all rings, from index 0.
    pub fn start(&mut self) {
        self.frontend.set_mem_table(&[self.region()]).unwrap();
        for i in 0..self.queues.len() {
            self.queues[i].ring.reset();
            self.start_queue(i, 0);
        }
    }

    /// One ring, from this index.
    pub fn start_queue(&mut self, index: usize, base: u16) {
        let q = &self.queues[index];
        let l = q.ring.layout();
        let f = &mut self.frontend;
        f.set_vring_num(index, q.ring.size()).unwrap();
        f.set_vring_base(index, base).unwrap();
        f.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: 1024,
                queue_size: q.ring.size(),
                flags: 0,
                desc_table_addr: l.desc,
                used_ring_addr: l.used,
                avail_ring_addr: l.avail,
                log_addr: None,
            },
        )
        .unwrap();
        f.set_vring_call(index, &q.call).unwrap();
        f.set_vring_err(index, &q.err).unwrap();
        f.set_vring_kick(index, &q.kick).unwrap();
        f.set_vring_enable(index, true).unwrap();
    }

    /// A part of the configuration space.
    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let buf = vec![0; len];
        let len = u32::try_from(len).unwrap();
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, data) = self.frontend.get_config(offset, len, flags, &buf).unwrap();
        data
    }

    /// What the guest writes to its memory.
    pub fn write_mem(&self, addr: u64, bytes: &[u8]) {
        assert!(self.memory.write(addr, bytes));
    }

    /// What the guest reads of its memory.
    pub fn read_mem(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.memory.read(addr, &mut out));
        out
    }

    /// Rings the doorbell.
    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// The next completion, if it is there: the chain's head and the bytes that were written.
    pub fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        self.queues[queue].ring.take_used()
    }

    /// Waits for the next completion, by the call eventfd.
    pub fn completion(&mut self, queue: usize) -> (u32, u32) {
        let start = Instant::now();
        loop {
            let q = &mut self.queues[queue];
            if let Some(used) = q.ring.take_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "no completion");
            let _ = q.call.read();
            if !q.ring.want_interrupt() {
                let limit = i32::try_from(PATIENCE.as_millis()).unwrap();
                sys::wait_readable(&fd(&q.call), limit).unwrap();
            }
        }
    }

    /// One chain, to completion; returns the used length.
    pub fn chain_on(&mut self, queue: usize, chain: &[Desc]) -> u32 {
        let q = &mut self.queues[queue];
        q.ring.chain(0, chain);
        q.ring.offer(0);
        self.kick(queue);
        let (head, len) = self.completion(queue);
        assert_eq!(head, 0);
        len
    }

    /// The device has complained of a ring.
    pub fn err_fired(&self, queue: usize) -> bool {
        self.queues[queue].err.read().is_ok()
    }
}

/// A descriptor.
pub fn d(addr: u64, len: u32, flags: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next: 0,
    }
}
