//! Real back-ends: a block request goes from the ring to the disk and back, through the
//! function, with nothing of ours between doorbell and interrupt. Each is tested where
//! its program is found: QEMU's storage daemon on the path, `bulkhead-blk` where cargo
//! puts it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::tempdir::TempDir;

use super::super::*;
use super::guest::*;
use crate::pci::mock_hypervisor::consume;
use crate::vhost_user::Frontend;
use crate::virtio::VirtioPciOptions;
use crate::virtio::registers::{bar, common};

pub const BLOCK: u16 = 2;
pub const SECTOR: usize = 512;
pub const DISK_SECTORS: u64 = 2048;
/// Where the driver keeps a request's header, data and status.
const HEADER: u64 = 0x8_0000;
const DATA: u64 = 0x8_1000;
const STATUS: u64 = 0x8_2000;
const DESCRIPTORS: u64 = 0x1_0000;

/// A process that ends with the test.
pub struct Process(pub Child);
impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn made(path: &Path, size: u64) -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).open(path);
    let file = file.unwrap();
    file.set_len(size).unwrap();
    file
}

pub fn connect(path: &Path, process: &mut Process) -> UnixStream {
    loop {
        if let Ok(socket) = UnixStream::connect(path) {
            return socket;
        }
        assert!(
            process.0.try_wait().unwrap().is_none(),
            "the back-end ended"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Puts a one-sector request into queue 0 as the `index`-th and waits for its completion.
fn request(machine: &Machine, ram: &File, kind: u32, sector: u64, index: u16) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    ram.write_all_at(&header, HEADER).unwrap();
    ram.write_all_at(&[0xff], STATUS).unwrap();
    let device_writes = if kind == 0 { 2 } else { 0 };
    let chain = [
        (HEADER, 16_u32, 1_u16, 1_u16),
        (DATA, SECTOR as u32, 1 | device_writes, 2),
        (STATUS, 1, 2, 0),
    ];
    for (at, (address, length, flags, next)) in (0_u64..).zip(chain) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend(next.to_le_bytes());
        ram.write_all_at(&descriptor, DESCRIPTORS + 16 * at)
            .unwrap();
    }
    let available = DESCRIPTORS + 0x1000;
    let entry = available + 4 + 2 * u64::from(index % 256);
    ram.write_all_at(&0_u16.to_le_bytes(), entry).unwrap();
    // used_event: an interrupt for this very request, where event indices are used.
    ram.write_all_at(&index.to_le_bytes(), available + 4 + 2 * 256)
        .unwrap();
    let next = index.wrapping_add(1);
    ram.write_all_at(&next.to_le_bytes(), available + 2)
        .unwrap();

    assert!(
        machine.hypervisor.write(BAR + bar::NOTIFY),
        "KVM's doorbell"
    );
    let interrupt = machine.function.msix.event(1).unwrap();
    let used = DESCRIPTORS + 0x2000;
    let mut done = [0; 2];
    while u16::from_le_bytes(done) != next {
        let mut fds = [PollFd::from_borrowed_fd(interrupt.as_fd(), PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no interrupt");
        consume(interrupt);
        ram.read_exact_at(&mut done, used + 2).unwrap();
    }
    let mut status = [0xff];
    ram.read_exact_at(&mut status, STATUS).unwrap();
    assert_eq!(status, [0]);
}

/// Brings the device up, reads and writes, kills the process between two requests, goes on
/// with the next one, resets the device, and does it again. `start` starts a process for a
/// disk on a socket.
fn drive(start: impl Fn(&Path, &Path) -> Command) {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("disk");
    let disk = made(&path, DISK_SECTORS * 512);
    let mut started = 0;
    let mut another = || {
        started += 1;
        let socket = directory.as_path().join(format!("socket{started}"));
        let mut process = Process(start(&socket, &path).spawn().unwrap());
        let stream = connect(&socket, &mut process);
        (process, stream)
    };
    let memory = Ram::new();
    let ram = Arc::clone(&memory.file);
    let (mut process, stream) = another();
    let options = VirtioPciOptions::external("disk0", BLOCK, 1, None);
    let machine = machine(options, stream, Arc::new(memory));
    machine.map();
    assert_eq!(machine.read(BAR + bar::DEVICE, 8), DISK_SECTORS, "capacity");
    for round in 1..3_u8 {
        // Vector 1 stays masked: the test takes the interrupts itself.
        machine.enable_interrupts();
        machine.write(BAR + bar::MSIX_TABLE + 16 + 12, 4, 1);
        ram.write_all_at(&[0; 0x3000], DESCRIPTORS).unwrap();
        assert_eq!(machine.negotiate(), 11);
        machine.set_up_queue(0, DESCRIPTORS);
        machine.set_common(common::DEVICE_STATUS, 1, 15);
        assert_eq!(machine.device_status(), 15);

        disk.write_all_at(&[round; SECTOR], 7 * 512).unwrap();
        request(&machine, &ram, 0, 7, 0);
        let mut data = [0; SECTOR];
        ram.read_exact_at(&mut data, DATA).unwrap();
        assert_eq!(data, [round; SECTOR]);

        process.0.kill().unwrap();
        process.0.wait().unwrap();
        let outcome = machine.function.on_event(EventSource::Hangup);
        assert!(matches!(outcome, Outcome::Suspended(_)), "{outcome:?}");
        let (next, stream) = another();
        process = next;
        let frontend = Frontend::connect(stream, PATIENT).unwrap();
        let done = machine.function.reconnect(frontend).unwrap();
        assert_eq!((done.queues, done.needs_reset), (1, false));
        // It was called once.
        consume(machine.function.msix.event(1).unwrap());

        ram.write_all_at(&[round ^ 0x80; SECTOR], DATA).unwrap();
        request(&machine, &ram, 1, 9, 1);
        disk.read_exact_at(&mut data, 9 * 512).unwrap();
        assert_eq!(data, [round ^ 0x80; SECTOR]);

        machine.set_common(common::DEVICE_STATUS, 1, 0);
        assert_eq!(machine.device_status(), 0);
        let status = machine.function.status();
        assert_eq!((status.failure, status.needs_reset), (None, false));
    }
}

pub fn found_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

#[test]
fn qemu_storage_daemon_serves_a_disk() {
    let program = "qemu-storage-daemon";
    if !found_on_path(program) {
        eprintln!("skipped: {program} is not installed");
        return;
    }
    drive(|socket, disk| {
        let blockdev = format!("driver=file,node-name=d,filename={}", disk.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut command = Command::new(program);
        command.args(["--blockdev", &blockdev, "--export", &export]);
        command
    });
}

/// Where cargo puts `bulkhead-blk`, if it has.
pub fn bulkhead_blk() -> Option<PathBuf> {
    let built: PathBuf = std::env::var_os("BULKHEAD_BLK").map_or_else(
        || {
            let test = std::env::current_exe().unwrap();
            test.ancestors().nth(2).unwrap().join("bulkhead-blk")
        },
        PathBuf::from,
    );
    if !built.is_file() {
        eprintln!("skipped: {} is not built", built.display());
        return None;
    }
    Some(built)
}

#[test]
fn bulkhead_blk_serves_a_disk() {
    let Some(built) = bulkhead_blk() else {
        return;
    };
    drive(|socket, disk| {
        let mut command = Command::new(&built);
        command.arg("--socket").arg(socket).arg("--disk");
        command.arg(format!("path={}", disk.display()));
        command
    });
}
