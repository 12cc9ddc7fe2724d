//! A vhost-user front-end with a guest's driver behind it, and the host's end of a tap, for
//! tests: they start the real `bulkhead-net`, confined as ever, in a network namespace of the
//! test's own.
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{PipeReader, PipeWriter};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_net::tap::Tap;
use bulkhead_runtime::driver::WRITE;
use bulkhead_runtime::frontend_vm::Layout;
pub use bulkhead_runtime::frontend_vm::{PATIENCE, Vm, d};
pub use bulkhead_runtime::test_process::{Process, wait_for};

pub mod bed;
pub mod host;
pub use host::*;

/// Guest memory: 16 MiB at 1 MiB.
pub const GPA: u64 = 0x10_0000;
pub const RAM: u64 = 0x100_0000;
/// Rings at its end; everything below is for data.
const RINGS: u64 = GPA + RAM - 0x10_0000;
pub const RING_SIZE: u16 = 64;
const LAYOUT: Layout = Layout {
    start: GPA,
    size: RAM,
    rings: RINGS,
    apart: 0x2000,
    ring_size: RING_SIZE,
};
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
pub struct Net(pub Process);

impl Net {
    pub fn command() -> Command {
        Process::command(Path::new(env!("CARGO_BIN_EXE_bulkhead-net")))
    }

    /// Stand-alone, listening, on a tap that it makes.
    pub fn listen(socket: &Path, tap: &str, more: &[&str]) -> Self {
        let mut command = Self::command();
        command
            .arg("--socket")
            .arg(socket)
            .args(["--tap", tap, "--mac", MAC])
            .args(more);
        let net = Self(Process::spawn(&mut command));
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
        (Self(Process::spawn(&mut command)), control.into(), vhost)
    }
}

impl Deref for Net {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl DerefMut for Net {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.0
    }
}

/// What a test's driver of a network device does.
pub trait NetDriver: Sized {
    fn connect(socket: &Path, queues: u16) -> Self;

    /// Negotiates what `choose` makes of the features, up to but without memory and rings.
    fn over(stream: UnixStream, queues: u16, choose: impl Fn(u64) -> u64) -> Self;

    fn link_status(&mut self) -> u16;

    /// Offers buffers `first` to `first + count` of a receive ring, one descriptor each.
    fn offer_buffers(&mut self, queue: usize, first: u16, count: u16);

    fn offer_buffer(&mut self, queue: usize, index: u16);

    /// The next received frame with its header, its buffers merged and offered again.
    fn receive(&mut self, queue: usize) -> Vec<u8>;

    /// Sends a frame with its header in one piece, and waits until it is taken.
    fn send(&mut self, queue: usize, header: &[u8; HEADER], frame: &[u8]);

    /// A control command, to its answer.
    fn command(&mut self, queue: usize, class: u8, command: u8, data: &[u8]) -> u8;
}

impl NetDriver for Vm {
    fn connect(socket: &Path, queues: u16) -> Self {
        Self::over(UnixStream::connect(socket).unwrap(), queues, |f| f)
    }

    fn over(stream: UnixStream, queues: u16, choose: impl Fn(u64) -> u64) -> Self {
        Self::negotiated(LAYOUT, stream, queues, choose)
    }

    fn link_status(&mut self) -> u16 {
        let raw = self.config(6, 2);
        u16::from_le_bytes([raw[0], raw[1]])
    }

    fn offer_buffers(&mut self, queue: usize, first: u16, count: u16) {
        for i in first..first + count {
            self.offer_buffer(queue, i);
        }
        self.kick(queue);
    }

    fn offer_buffer(&mut self, queue: usize, index: u16) {
        let ring = &mut self.queues[queue].ring;
        let one = d(buffer(queue, index), BUFFER, WRITE);
        ring.chain(index, &[one]);
        ring.offer(index);
    }

    fn receive(&mut self, queue: usize) -> Vec<u8> {
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

    fn send(&mut self, queue: usize, header: &[u8; HEADER], frame: &[u8]) {
        let at = buffer(queue, 0);
        self.write_mem(at, header);
        self.write_mem(at + HEADER as u64, frame);
        let len = (HEADER + frame.len()) as u32;
        self.chain_on(queue, &[d(at, len, 0)]);
    }

    fn command(&mut self, queue: usize, class: u8, command: u8, data: &[u8]) -> u8 {
        let at = buffer(queue, 0);
        let ack = at + 0x1_0000;
        self.write_mem(at, &[class, command]);
        self.write_mem(at + 2, data);
        self.write_mem(ack, &[0xff]);
        let chain = [d(at, 2 + data.len() as u32, 0), d(ack, 1, WRITE)];
        self.chain_on(queue, &chain);
        self.read_mem(ack, 1)[0]
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
