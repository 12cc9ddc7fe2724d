//! A vhost-user front-end with a guest's driver behind it, for tests: it starts the real
//! `bulkhead-blk`, confined as ever, and drives its rings.
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(unsafe_code)] // the child's descriptors are put in place between fork and exec

pub mod loops;
pub mod trace;

use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_proto::common::{DiskLimits, TokenBucket};
use bulkhead_proto::device::{
    BlkUpdate, DrainRequest, DrainResponse, HealthRequest, HealthResponse, ResumeRequest,
    ResumeResponse, StatsRequest, StatsResponse, UpdateRequest, UpdateResponse,
};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
pub use bulkhead_runtime::driver::WRITE;
use bulkhead_runtime::frontend_vm::Layout;
pub use bulkhead_runtime::frontend_vm::{PATIENCE, Vm, d};
pub use bulkhead_runtime::test_process::{Process, wait_for};

/// Guest memory: 2 MiB at 1 MiB.
pub const GPA: u64 = 0x10_0000;
pub const RAM: u64 = 0x20_0000;
/// Rings at its end; everything below is for data.
const RINGS: u64 = GPA + RAM - 0x1_0000;
pub const RING_SIZE: u16 = 64;
const LAYOUT: Layout = Layout {
    start: GPA,
    size: RAM,
    rings: RINGS,
    apart: 0x1000,
    ring_size: RING_SIZE,
};

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;
pub const T_SECURE_ERASE: u32 = 14;

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
pub const F_SECURE_ERASE: u64 = 1 << 16;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;

/// A directory of the test's own, removed with it.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        Self::new_in(&std::env::temp_dir(), name)
    }

    pub fn new_in(place: &Path, name: &str) -> Self {
        let dir = place.join(format!("bh-blk-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A disk whose every sector holds its own number.
    pub fn disk(&self, sectors: u64) -> PathBuf {
        let path = self.path("disk");
        let mut content = Vec::new();
        for s in 0..sectors {
            content.extend(sector(s));
        }
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The content of sector `s` of a test disk.
pub fn sector(s: u64) -> Vec<u8> {
    s.to_le_bytes().repeat(64)
}

/// A running bulkhead-blk, killed with the test.
pub struct Blk(pub Process);

impl Blk {
    pub fn command() -> Command {
        Process::command(Path::new(env!("CARGO_BIN_EXE_bulkhead-blk")))
    }

    /// Stand-alone, listening.
    pub fn listen(socket: &Path, disk: &str, more: &[&str]) -> Self {
        let blk = Self(Process::spawn(&mut Self::listening(socket, disk, more)));
        wait_for("the socket", || UnixStream::connect(socket).is_ok());
        blk
    }

    /// The command of [`Self::listen`].
    pub fn listening(socket: &Path, disk: &str, more: &[&str]) -> Command {
        let mut command = Self::command();
        command
            .arg("--socket")
            .arg(socket)
            .args(["--disk", disk])
            .args(more);
        command
    }

    /// As the launcher starts it: channels at 3 and 4, the disk at 5.
    pub fn inherit(disk: File, options: &str, more: &[&str]) -> (Self, OwnedFd, UnixStream) {
        let (mut command, control, vhost) = Self::inheriting(disk, options, more);
        (Self(Process::spawn(&mut command)), control, vhost)
    }

    /// The command of [`Self::inherit`].
    pub fn inheriting(disk: File, options: &str, more: &[&str]) -> (Command, OwnedFd, UnixStream) {
        let (control, control_theirs) = UnixStream::pair().unwrap();
        let (vhost, vhost_theirs) = UnixStream::pair().unwrap();
        let theirs: [OwnedFd; 3] = [control_theirs.into(), vhost_theirs.into(), disk.into()];
        let numbers: Vec<RawFd> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Self::command();
        command
            .args(["--control-fd", "3", "--vhost-fd", "4", "--disk"])
            .arg(format!("fd=5{options}"))
            .args(more);
        // SAFETY: dup and dup2 are async-signal-safe and touch descriptors only.
        unsafe {
            command.pre_exec(move || {
                // Open until the last child is made of this command.
                let _ = &theirs;
                let mut high = [0; 3];
                for (h, n) in high.iter_mut().zip(&numbers) {
                    *h = libc::fcntl(*n, libc::F_DUPFD_CLOEXEC, 100);
                }
                for (h, target) in high.iter().zip(3..) {
                    if libc::dup2(*h, target) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        (command, control.into(), vhost)
    }
}

impl Deref for Blk {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl DerefMut for Blk {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.0
    }
}

/// The VMM's end of the control channel.
pub struct Control(BlockingClient);

impl Control {
    pub fn new(fd: OwnedFd) -> Self {
        Self(BlockingClient::new(fd, CONTROL_MAX_FRAME))
    }

    pub fn health(&mut self) -> HealthResponse {
        let request = HealthRequest::new();
        self.0
            .call(DEVICE_SERVICE, "Health", &request, PATIENCE)
            .unwrap()
    }

    pub fn stats(&mut self) -> StatsResponse {
        let request = StatsRequest::new();
        self.0
            .call(DEVICE_SERVICE, "Stats", &request, PATIENCE)
            .unwrap()
    }

    pub fn update(&mut self, blk: BlkUpdate) -> Result<(), String> {
        let mut request = UpdateRequest::new();
        request.set_blk(blk);
        let reply: Result<UpdateResponse, _> =
            self.0.call(DEVICE_SERVICE, "Update", &request, PATIENCE);
        reply.map(drop).map_err(|e| e.to_string())
    }

    /// Takes no new requests; whether nothing is in flight any more.
    pub fn drain(&mut self) -> bool {
        let reply: DrainResponse = self
            .0
            .call(DEVICE_SERVICE, "Drain", &DrainRequest::new(), PATIENCE)
            .unwrap();
        reply.drained
    }

    pub fn resume(&mut self) {
        let _: ResumeResponse = self
            .0
            .call(DEVICE_SERVICE, "Resume", &ResumeRequest::new(), PATIENCE)
            .unwrap();
    }

    /// New limits, (rate, burst) of bytes and of operations; (0, 0) is none.
    pub fn limit(&mut self, bytes: (u64, u64), operations: (u64, u64)) -> Result<(), String> {
        let bucket = |(rate, burst)| {
            let mut bucket = TokenBucket::new();
            bucket.per_second = rate;
            bucket.burst = burst;
            MessageField::some(bucket)
        };
        let mut limits = DiskLimits::new();
        limits.bytes = bucket(bytes);
        limits.operations = bucket(operations);
        let mut update = BlkUpdate::new();
        update.limits = MessageField::some(limits);
        self.update(update)
    }

    /// The disk is pulled out.
    pub fn pull(&mut self) -> Result<(), String> {
        let mut update = BlkUpdate::new();
        update.pulled = true;
        self.update(update)
    }

    pub fn resize(&mut self, bytes: u64) -> Result<(), String> {
        let mut update = BlkUpdate::new();
        update.size_bytes = bytes;
        self.update(update)
    }
}

/// What a test's driver of a disk does.
pub trait DiskDriver: Sized {
    fn connect(socket: &Path, queues: u16) -> Self;

    /// Negotiates, up to but without memory and rings.
    fn over(stream: UnixStream, queues: u16) -> Self;

    /// Writes a request header at `addr`.
    fn header(&self, addr: u64, kind: u32, sector: u64);

    fn request_on(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: u64,
        len: u32,
    ) -> (u8, u32);

    /// One request on queue 0 with data in one piece at `data`; returns status and length.
    fn request(&mut self, kind: u32, sector: u64, data: u64, len: u32) -> (u8, u32) {
        self.request_on(0, kind, sector, data, len)
    }
}

impl DiskDriver for Vm {
    fn connect(socket: &Path, queues: u16) -> Self {
        Self::over(UnixStream::connect(socket).unwrap(), queues)
    }

    fn over(stream: UnixStream, queues: u16) -> Self {
        Self::negotiated(LAYOUT, stream, queues, |f| f)
    }

    fn header(&self, addr: u64, kind: u32, sector: u64) {
        let mut h = [0; 16];
        h[..4].copy_from_slice(&kind.to_le_bytes());
        h[8..].copy_from_slice(&sector.to_le_bytes());
        self.write_mem(addr, &h);
    }

    fn request_on(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: u64,
        len: u32,
    ) -> (u8, u32) {
        let (head, status) = (GPA + 0x100, GPA + 0x200);
        self.header(head, kind, sector);
        self.write_mem(status, &[0xff]);
        let out = [T_OUT, T_DISCARD, T_WRITE_ZEROES, T_SECURE_ERASE].contains(&kind);
        let flags = if out { 0 } else { WRITE };
        let mut chain = vec![d(head, 16, 0)];
        if len > 0 {
            chain.push(d(data, len, flags));
        }
        chain.push(d(status, 1, WRITE));
        let used = self.chain_on(queue, &chain);
        (self.read_mem(status, 1)[0], used)
    }
}

/// Reads sectors from the disk file itself.
pub fn on_disk(path: &Path, sector: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut out, sector * 512)
        .unwrap();
    out
}
