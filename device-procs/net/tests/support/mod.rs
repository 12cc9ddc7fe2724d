//! A vhost-user front-end with a guest's driver behind it, and the host's end of a tap, for
//! tests: they start the real `bulkhead-net`, confined as ever, in a network namespace of the
//! test's own.
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_net::tap::Tap;
use bulkhead_runtime::driver::{Desc, USER_BASE, WRITE, guest};
pub use bulkhead_runtime::frontend::Vq;
use bulkhead_runtime::frontend::{fd, negotiate};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::sys;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

pub mod bed;
pub mod host;
pub use host::*;

/// Long enough for a busy machine; a test never waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Guest memory: 16 MiB at 1 MiB.
pub const GPA: u64 = 0x10_0000;
pub const RAM: u64 = 0x100_0000;
/// Rings at its end; everything below is for data.
const RINGS: u64 = GPA + RAM - 0x10_0000;
pub const RING_SIZE: u16 = 64;
/// Buffers of queue `q` begin here, each of these many bytes.
pub const BUFFER: u32 = 2048;

pub const MAC: &str = "52:54:00:00:00:01";
pub const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub const HEADER: usize = 12;

pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_INDIRECT: u64 = 1 << 28;

/// Where the buffer of a ring's descriptor lies.
pub fn buffer(queue: usize, index: u16) -> u64 {
    GPA + 0x10_0000 * queue as u64 + u64::from(BUFFER) * u64::from(index)
}

/// A directory of the test's own, removed with it.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("bh-net-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running bulkhead-net, killed with the test.
pub struct Net {
    pub child: Child,
}

impl Net {
    pub fn command() -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_bulkhead-net"));
        c.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        c
    }

    /// Stand-alone, listening, on a tap that it makes.
    pub fn listen(socket: &Path, tap: &str, more: &[&str]) -> Self {
        let child = Self::command()
            .arg("--socket")
            .arg(socket)
            .args(["--tap", tap, "--mac", MAC])
            .args(more)
            .spawn()
            .unwrap();
        let net = Self { child };
        wait_for("the socket", || UnixStream::connect(socket).is_ok());
        up(tap);
        net
    }

    /// As the launcher starts it: channels at 3 and 4, the tap's queues from 5 on.
    pub fn inherit(tap: &Tap, more: &[&str]) -> (Self, OwnedFd, UnixStream) {
        Self::inherit_with(tap, &[], more)
    }

    /// The same, and what tells when all I/O of the process has ended.
    pub fn inherit_fenced(tap: &Tap, more: &[&str]) -> (Self, OwnedFd, UnixStream, PipeReader) {
        let (end, fence) = std::io::pipe().unwrap();
        let (net, control, vhost) = Self::inherit_all(tap, &[], Some(&fence), more);
        (net, control, vhost, end)
    }

    /// As [`Self::inherit`], with descriptors of /dev/vhost-net behind the tap's.
    pub fn inherit_with(
        tap: &Tap,
        vhost_net: &[File],
        more: &[&str],
    ) -> (Self, OwnedFd, UnixStream) {
        Self::inherit_all(tap, vhost_net, None, more)
    }

    fn inherit_all(
        tap: &Tap,
        vhost_net: &[File],
        fence: Option<&PipeWriter>,
        more: &[&str],
    ) -> (Self, OwnedFd, UnixStream) {
        let (control, control_theirs) = UnixStream::pair().unwrap();
        let (vhost, vhost_theirs) = UnixStream::pair().unwrap();
        let mut numbers = vec![control_theirs.as_raw_fd(), vhost_theirs.as_raw_fd()];
        let mut list = Vec::new();
        for pair in 0..tap.queues() {
            numbers.push(tap.queue(pair).unwrap().file().as_raw_fd());
            list.push((5 + pair).to_string());
        }
        let mut command = Self::command();
        let mut kernel = Vec::new();
        for file in vhost_net {
            numbers.push(file.as_raw_fd());
            kernel.push((2 + numbers.len()).to_string());
        }
        if !kernel.is_empty() {
            command.args(["--vhost-net", &format!("fds={}", kernel.join(":"))]);
        }
        if let Some(fence) = fence {
            numbers.push(fence.as_raw_fd());
            command.args(["--fence-fd", &(2 + numbers.len()).to_string()]);
        }
        command
            .args(["--control-fd", "3", "--vhost-fd", "4", "--mac", MAC])
            .args(["--tap", &format!("fds={}", list.join(":"))])
            .args(more);
        pass(&mut command, numbers);
        let child = command.spawn().unwrap();
        (Self { child }, control.into(), vhost)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the process to exit", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// A field of /proc/PID/status.
    pub fn status_field(&self, field: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|l| l.starts_with(&format!("{field}:")));
        line.unwrap().split_once(':').unwrap().1.trim().into()
    }

    /// What it wrote to stderr; after it has exited.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut text).unwrap();
        }
        text
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A front-end and its guest.
pub struct Vm {
    pub frontend: Frontend,
    pub file: File,
    pub memory: Arc<Memory>,
    pub queues: Vec<Vq>,
    pub features: u64,
}

impl Vm {
    pub fn connect(socket: &Path, queues: u16) -> Self {
        Self::over(UnixStream::connect(socket).unwrap(), queues, |f| f)
    }

    /// Negotiates what `choose` makes of the features, up to but without memory and rings.
    pub fn over(stream: UnixStream, queues: u16, choose: impl Fn(u64) -> u64) -> Self {
        let (frontend, features) = negotiate(stream, queues, choose);
        let (file, memory) = guest(GPA, RAM).unwrap();
        let queues = (0..u64::from(queues))
            .map(|i| Vq::new(&memory, RINGS + 0x2000 * i, RING_SIZE))
            .collect();
        Self {
            frontend,
            file,
            memory,
            queues,
            features,
        }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: RAM,
            userspace_addr: USER_BASE + GPA,
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

    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let buf = vec![0; len];
        let (_, data) = self
            .frontend
            .get_config(offset, len as u32, VhostUserConfigFlags::WRITABLE, &buf)
            .unwrap();
        data
    }

    pub fn link_status(&mut self) -> u16 {
        let raw = self.config(6, 2);
        u16::from_le_bytes([raw[0], raw[1]])
    }

    pub fn write_mem(&self, addr: u64, bytes: &[u8]) {
        assert!(self.memory.write(addr, bytes));
    }

    pub fn read_mem(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.memory.read(addr, &mut out));
        out
    }

    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// The next completion, if it is there.
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
                sys::wait_readable(&fd(&q.call), PATIENCE.as_millis() as i32).unwrap();
            }
        }
    }

    /// Offers buffers `first` to `first + count` of a receive ring, one descriptor each.
    pub fn offer_buffers(&mut self, queue: usize, first: u16, count: u16) {
        for i in first..first + count {
            self.offer_buffer(queue, i);
        }
        self.kick(queue);
    }

    pub fn offer_buffer(&mut self, queue: usize, index: u16) {
        let ring = &mut self.queues[queue].ring;
        let one = d(buffer(queue, index), BUFFER, WRITE);
        ring.chain(index, &[one]);
        ring.offer(index);
    }

    /// The next received frame with its header, its buffers merged and offered again.
    pub fn receive(&mut self, queue: usize) -> Vec<u8> {
        let (head, len) = self.completion(queue);
        let mut frame = self.read_mem(buffer(queue, head as u16), len as usize);
        let mut heads = vec![head as u16];
        for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
            let (head, len) = self.completion(queue);
            frame.extend(self.read_mem(buffer(queue, head as u16), len as usize));
            heads.push(head as u16);
        }
        for head in heads {
            self.offer_buffer(queue, head);
        }
        self.kick(queue);
        frame
    }

    /// Sends a frame with its header in one piece, and waits until it is taken.
    pub fn send(&mut self, queue: usize, header: &[u8; HEADER], frame: &[u8]) {
        let at = buffer(queue, 0);
        self.write_mem(at, header);
        self.write_mem(at + HEADER as u64, frame);
        let len = (HEADER + frame.len()) as u32;
        self.send_chain(queue, &[d(at, len, 0)]);
    }

    /// One chain, to completion.
    pub fn send_chain(&mut self, queue: usize, chain: &[Desc]) {
        let q = &mut self.queues[queue];
        q.ring.chain(0, chain);
        q.ring.offer(0);
        self.kick(queue);
        let (head, _) = self.completion(queue);
        assert_eq!(head, 0);
    }

    /// A control command, to its answer.
    pub fn command(&mut self, queue: usize, class: u8, command: u8, data: &[u8]) -> u8 {
        let at = buffer(queue, 0);
        let ack = at + 0x1_0000;
        self.write_mem(at, &[class, command]);
        self.write_mem(at + 2, data);
        self.write_mem(ack, &[0xff]);
        let chain = [d(at, 2 + data.len() as u32, 0), d(ack, 1, WRITE)];
        self.send_chain(queue, &chain);
        self.read_mem(ack, 1)[0]
    }

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

/// An Ethernet frame of so many bytes, from one address to another, filled by a seed.
pub fn ether(to: [u8; 6], from: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut f = [to, from].concat();
    f.extend([0x88, 0xb5]);
    let filled = (0..).map(|i: usize| (i as u8).wrapping_mul(31).wrapping_add(seed));
    f.extend(filled.take(len.saturating_sub(14)));
    f
}

/// Datagrams of 40 connections, which the kernel spreads over the queues of a tap.
pub fn flows(seed: u8) -> Vec<Vec<u8>> {
    (0..40u8)
        .map(|i| {
            let mut f = ether(MAC_BYTES, [2, 0, 0, 0, seed, i], 80, i);
            f[12..14].copy_from_slice(&[8, 0]);
            f[14..34].copy_from_slice(&[
                0x45, 0, 0, 66, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, seed, i, 10, 0, 0, 2,
            ]);
            f[34..42].copy_from_slice(&[0x10, i, 0x20, seed, 0, 46, 0, 0]);
            f
        })
        .collect()
}
