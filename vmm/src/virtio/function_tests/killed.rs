//! `bulkhead-blk` is killed with requests in flight, and the next one finishes them: none
//! is lost, and none is completed twice.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::super::*;
use super::guest::*;
use super::real_backends::{BLOCK, DISK_SECTORS, Process, SECTOR, bulkhead_blk, connect, made};
use crate::vhost_user::Frontend;
use crate::virtio::VirtioPciOptions;
use crate::virtio::registers::{bar, common};

const ROUNDS: u16 = 16;
/// Requests of a round: as many as the ring has room for at three descriptors each.
const REQUESTS: u16 = 80;
const RING: u64 = 256;
const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = DESCRIPTORS + 0x1000;
const USED: u64 = DESCRIPTORS + 0x2000;
/// Header, status and data of each request.
const HEADERS: u64 = 0x4_0000;
const STATUSES: u64 = 0x6_0000;
const DATA: u64 = 0x8_0000;

struct Disk {
    directory: TempDir,
    processes: u32,
}

impl Disk {
    fn process(&mut self, program: &Path) -> (Process, Frontend) {
        self.processes += 1;
        let name = format!("socket{}", self.processes);
        let socket = self.directory.as_path().join(name);
        let disk = self.directory.as_path().join("disk");
        let child = Command::new(program)
            .arg("--socket")
            .arg(&socket)
            .arg("--disk")
            .arg(format!("path={}", disk.display()))
            .spawn();
        let mut process = Process(child.unwrap());
        let stream = connect(&socket, &mut process);
        (process, Frontend::connect(stream, PATIENT).unwrap())
    }
}

/// What a request of a round writes.
fn pattern(round: u16, request: u16) -> [u8; SECTOR] {
    let mut data = [round as u8; SECTOR];
    data[..2].copy_from_slice(&request.to_le_bytes());
    data
}

/// Puts requests of a round into the ring.
fn offer(ram: &File, round: u16, requests: std::ops::Range<u16>) {
    for request in requests.clone() {
        let number = u64::from(request);
        let mut header = [0; 16];
        header[0] = 1;
        header[8..].copy_from_slice(&number.to_le_bytes());
        let data = DATA + number * SECTOR as u64;
        ram.write_all_at(&header, HEADERS + 16 * number).unwrap();
        ram.write_all_at(&pattern(round, request), data).unwrap();
        ram.write_all_at(&[0xff], STATUSES + number).unwrap();
        let head = request * 3;
        let chain = [
            (HEADERS + 16 * number, 16_u32, 1_u16),
            (data, SECTOR as u32, 1),
            (STATUSES + number, 1, 2),
        ];
        for (at, (address, length, flags)) in (head..).zip(chain) {
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((at + 1).to_le_bytes());
            let place = DESCRIPTORS + 16 * u64::from(at);
            ram.write_all_at(&descriptor, place).unwrap();
        }
        let index = round.wrapping_mul(REQUESTS).wrapping_add(request);
        let entry = AVAILABLE + 4 + 2 * (u64::from(index) % RING);
        ram.write_all_at(&head.to_le_bytes(), entry).unwrap();
    }
    let next = round.wrapping_mul(REQUESTS).wrapping_add(requests.end);
    ram.write_all_at(&next.to_le_bytes(), AVAILABLE + 2)
        .unwrap();
}

fn used_index(ram: &File) -> u16 {
    let mut index = [0; 2];
    ram.read_exact_at(&mut index, USED + 2).unwrap();
    u16::from_le_bytes(index)
}

/// Waits until that many requests of a round are completed.
fn wait(ram: &File, round: u16, completed: u16) {
    let first = round.wrapping_mul(REQUESTS);
    for _ in 0..300_000 {
        if used_index(ram).wrapping_sub(first) >= completed {
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    panic!("round {round}: {completed} requests never came back");
}

#[test]
fn a_killed_block_process_loses_no_request_and_completes_none_twice() {
    let Some(program) = bulkhead_blk() else {
        return;
    };
    let directory = TempDir::new().unwrap();
    let file = made(&directory.as_path().join("disk"), DISK_SECTORS * 512);
    let mut disk = Disk {
        directory,
        processes: 0,
    };
    let memory = Ram::new();
    let ram = Arc::clone(&memory.file);
    let (mut process, frontend) = disk.process(&program);
    let options = VirtioPciOptions {
        successor: true,
        ..VirtioPciOptions::new("disk0", BLOCK, 1)
    };
    let machine = machine_in_front_of(options, Some(frontend), Arc::new(memory));
    machine.map();
    machine.enable_interrupts();
    assert_eq!(machine.negotiate(), 11);
    machine.set_up_queue(0, DESCRIPTORS);
    machine.set_common(common::DEVICE_STATUS, 1, 15);
    assert_eq!(machine.device_status(), 15);
    for round in 0..ROUNDS {
        let before = REQUESTS - round;
        offer(&ram, round, 0..before);
        assert!(
            machine.hypervisor.write(BAR + bar::NOTIFY),
            "KVM's doorbell"
        );
        // Somewhere between the first and the last of them.
        wait(&ram, round, round * 4);
        process.0.kill().unwrap();
        process.0.wait().unwrap();
        let outcome = machine.function.on_event(EventSource::Hangup);
        assert!(matches!(outcome, Outcome::Suspended(FailReason::Hangup)));
        // The driver goes on meanwhile.
        offer(&ram, round, before..REQUESTS);
        assert!(machine.hypervisor.write(BAR + bar::NOTIFY));
        let (next, frontend) = disk.process(&program);
        process = next;
        let done = machine.function.reconnect(frontend).unwrap();
        assert_eq!((done.queues, done.logged), (1, true));
        assert!(!done.needs_reset && !done.config_changed);

        wait(&ram, round, REQUESTS);
        let first = round.wrapping_mul(REQUESTS);
        assert_eq!(used_index(&ram), first.wrapping_add(REQUESTS), "no more");
        let mut heads: Vec<u32> = (0..REQUESTS)
            .map(|at| {
                let index = u64::from(first.wrapping_add(at)) % RING;
                let mut head = [0; 4];
                ram.read_exact_at(&mut head, USED + 4 + 8 * index).unwrap();
                u32::from_le_bytes(head)
            })
            .collect();
        heads.sort_unstable();
        let expected: Vec<u32> = (0..REQUESTS).map(|r| u32::from(r) * 3).collect();
        assert_eq!(heads, expected, "round {round}: each once");
        for request in 0..REQUESTS {
            let mut status = [0xff];
            ram.read_exact_at(&mut status, STATUSES + u64::from(request))
                .unwrap();
            assert_eq!(status, [0]);
            let mut data = [0; SECTOR];
            file.read_exact_at(&mut data, u64::from(request) * SECTOR as u64)
                .unwrap();
            assert_eq!(data, pattern(round, request), "round {round}");
        }
    }
    assert_eq!(machine.device_status(), 15);
}
