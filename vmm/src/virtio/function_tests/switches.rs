//! Real network back-ends of other people: passt and DPDK's vhost PMD. An ARP request goes
//! out and its answer comes in; the back-end is killed, another one takes its place, and
//! it works as before; with several queue pairs over each of them. Each is tested where its program is found: on the path, or as
//! `BULKHEAD_PASST` and `BULKHEAD_TESTPMD` say.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::super::*;
use super::guest::*;
use super::real_backends::{Process, connect, found_on_path};
use crate::vhost_user::Frontend;
use crate::virtio::VirtioPciOptions;
use crate::virtio::registers::common;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
/// Rings of 256, one after the other, at the places that `set_up_queue` chooses.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const FRAME: u64 = 0x7_0000;
const STATUS: u64 = 0x7_1000;
const BUFFERS: u64 = 0x8_0000;
const BUFFER: u64 = 2048;
const COUNT: u16 = 32;
/// virtio_net_hdr_v1.
const HEADER: usize = 12;

fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let given = std::env::var_os(variable).map(PathBuf::from);
    let found = given.or_else(|| found_on_path(name).then(|| name.into()));
    if found.is_none() {
        eprintln!("skipped: {name} is not installed");
    }
    found
}

fn put_u16(ram: &File, at: u64, value: u16) {
    ram.write_all_at(&value.to_le_bytes(), at).unwrap();
}

fn get_u16(ram: &File, at: u64) -> u16 {
    let mut value = [0; 2];
    ram.read_exact_at(&mut value, at).unwrap();
    u16::from_le_bytes(value)
}

fn ring(queue: u16) -> u64 {
    RINGS * (u64::from(queue) + 1)
}

/// A driver's network device.
struct Nic {
    machine: Machine,
    ram: Arc<File>,
    pairs: u16,
    /// What was made available of each transmit queue and the control queue, and what was
    /// taken of each receive queue.
    done: Vec<u16>,
}

impl Nic {
    fn control(&self) -> u16 {
        self.pairs * 2
    }

    fn bring_up(&mut self) {
        self.done = vec![0; usize::from(self.control()) + 1];
        for queue in 0..=self.control() {
            let table = ring(queue);
            self.ram.write_all_at(&[0; 0x3000], table).unwrap();
            for buffer in 0..COUNT {
                if queue % 2 == 0 && queue < self.control() {
                    let address = self.buffer(queue, buffer);
                    self.descriptor(table, buffer, address, BUFFER as u32, 2);
                    let entry = table + AVAILABLE + 4 + 2 * u64::from(buffer);
                    put_u16(&self.ram, entry, buffer);
                    put_u16(&self.ram, table + AVAILABLE + 2, COUNT);
                }
            }
        }
        let machine = &self.machine;
        machine.map();
        machine.enable_interrupts();
        assert_eq!(machine.negotiate(), 11);
        for queue in 0..=self.control() {
            machine.set_up_queue(queue.into(), ring(queue));
            // Nobody is interrupted: the test looks.
            machine.set_common(common::QUEUE_VECTOR, 2, 0xffff);
        }
        machine.set_common(common::DEVICE_STATUS, 1, 15);
        assert_eq!(machine.device_status(), 15);
        if self.pairs > 1 {
            self.use_all_pairs();
        }
    }

    /// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
    fn use_all_pairs(&mut self) {
        let queue = self.control();
        let [low, high] = self.pairs.to_le_bytes();
        self.ram.write_all_at(&[4, 0, low, high], FRAME).unwrap();
        self.ram.write_all_at(&[0xff], STATUS).unwrap();
        self.descriptor(ring(queue), 0, FRAME, 4, 1);
        put_u16(&self.ram, ring(queue) + 14, 1);
        self.descriptor(ring(queue), 1, STATUS, 1, 2);
        self.offer(queue);
        let mut status = [0xff];
        while status == [0xff] {
            std::thread::yield_now();
            self.ram.read_exact_at(&mut status, STATUS).unwrap();
        }
        assert_eq!(status, [0]);
        // Said to the API a moment after the driver.
        while self.machine.function.status().queue_pairs != Some(self.pairs) {
            std::thread::yield_now();
        }
    }

    fn buffer(&self, queue: u16, buffer: u16) -> u64 {
        let number = u64::from(queue / 2 * COUNT + buffer);
        BUFFERS + BUFFER * number
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0; 2]);
        let place = table + 16 * u64::from(index);
        self.ram.write_all_at(&descriptor, place).unwrap();
    }

    /// Makes descriptor 0 of a queue available once more.
    fn offer(&mut self, queue: u16) {
        let next = &mut self.done[usize::from(queue)];
        put_u16(
            &self.ram,
            ring(queue) + AVAILABLE + 4 + 2 * u64::from(*next % 256),
            0,
        );
        *next = next.wrapping_add(1);
        put_u16(&self.ram, ring(queue) + AVAILABLE + 2, *next);
        assert!(self.machine.hypervisor.write(doorbell(queue.into())));
    }

    /// Asks over each pair who has an address, and again if need be, until somebody says
    /// it.
    fn resolve(&mut self, wanted: [u8; 4]) {
        for pair in 0..self.pairs {
            let asked = |nic: &mut Self| {
                for _ in 0..100 {
                    nic.ask(pair, wanted);
                    for _ in 0..100 {
                        if nic.answered(wanted) {
                            return true;
                        }
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                false
            };
            let status = self.machine.function.status();
            assert!(asked(self), "no answer over pair {pair}: {status:?}");
        }
    }

    fn ask(&mut self, pair: u16, wanted: [u8; 4]) {
        let mut frame = vec![0; HEADER];
        frame.extend([0xff; 6]);
        frame.extend(MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(MAC);
        frame.extend([192, 0, 2, 77]);
        frame.extend([0; 6]);
        frame.extend(wanted);
        frame.resize(HEADER + 60, 0);
        self.ram.write_all_at(&frame, FRAME).unwrap();
        let queue = 2 * pair + 1;
        self.descriptor(ring(queue), 0, FRAME, frame.len() as u32, 0);
        self.offer(queue);
    }

    /// Takes what has come in, gives the buffers back, and looks for the answer.
    fn answered(&mut self, wanted: [u8; 4]) -> bool {
        let mut found = false;
        for queue in (0..self.control()).step_by(2) {
            let table = ring(queue);
            while self.done[usize::from(queue)] != get_u16(&self.ram, table + USED + 2) {
                let taken = self.done[usize::from(queue)];
                let buffer = get_u16(&self.ram, table + USED + 4 + 8 * u64::from(taken % 256));
                assert!(buffer < COUNT);
                let mut frame = [0; HEADER + 42];
                let at = self.buffer(queue, buffer);
                self.ram.read_exact_at(&mut frame, at).unwrap();
                let frame = &frame[HEADER..];
                // An ARP reply from that address.
                let reply = frame[12..14] == [8, 6] && frame[20..22] == [0, 2];
                found |= reply && frame[28..32] == wanted;
                self.done[usize::from(queue)] = taken.wrapping_add(1);
                let last = taken.wrapping_add(COUNT);
                let entry = table + AVAILABLE + 4 + 2 * u64::from(last % 256);
                put_u16(&self.ram, entry, buffer);
                put_u16(&self.ram, table + AVAILABLE + 2, last.wrapping_add(1));
                self.machine.hypervisor.write(doorbell(queue.into()));
            }
        }
        found
    }

    fn adopt(&self, frontend: Frontend) {
        let done = self.machine.function.reconnect(frontend).unwrap();
        assert_eq!((done.queues, done.needs_reset), (2 * self.pairs, false));
    }
}

/// Drives a back-end that `start` starts on a socket and that answers for `address`.
fn drive(pairs: u16, address: [u8; 4], start: impl Fn(&Path, &Path) -> Command) {
    let directory = TempDir::new().unwrap();
    let mut started = 0;
    let mut another = || {
        started += 1;
        let socket = directory.as_path().join(format!("socket{started}"));
        let mut command = start(&socket, directory.as_path());
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Process(child.spawn().unwrap());
        let stream = connect(&socket, &mut process);
        (process, Frontend::connect(stream, PATIENT).unwrap())
    };
    let (mut process, frontend) = another();
    let memory = Ram::new();
    let ram = Arc::clone(&memory.file);
    let options = VirtioPciOptions::external_net("net0", MAC, pairs, 0);
    let mut nic = Nic {
        machine: machine_in_front_of(options, Some(frontend), Arc::new(memory)),
        ram,
        pairs,
        done: Vec::new(),
    };
    nic.bring_up();
    nic.resolve(address);
    for _ in 0..3 {
        process.0.kill().unwrap();
        process.0.wait().unwrap();
        let outcome = nic.machine.function.on_event(EventSource::Hangup);
        assert!(matches!(outcome, Outcome::Suspended(_)), "{outcome:?}");
        let (next, frontend) = another();
        process = next;
        nic.adopt(frontend);
        nic.resolve(address);
    }
    // A reset, and the same driver again.
    nic.machine.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(nic.machine.device_status(), 0);
    nic.bring_up();
    nic.resolve(address);
    // Another back-end while this one serves.
    let (next, frontend) = another();
    nic.adopt(frontend);
    drop(std::mem::replace(&mut process, next));
    nic.resolve(address);
    let status = nic.machine.function.status();
    assert_eq!((status.failure, status.awaiting), (None, None));
}

#[test]
fn passt_answers_and_so_does_its_successor() {
    let Some(passt) = program("BULKHEAD_PASST", "passt") else {
        return;
    };
    drive(1, [192, 0, 2, 1], |socket, _| {
        let mut command = Command::new(&passt);
        command.args(["--vhost-user", "--foreground", "--socket"]);
        command.arg(socket);
        // It answers for every address but the guest's; which one that is must be known.
        command.args(["--address", "192.0.2.77", "--netmask", "24"]);
        command.args(["--gateway", "192.0.2.1"]);
        command
    });
}

#[test]
fn dpdk_answers_and_so_does_its_successor() {
    let Some(testpmd) = program("BULKHEAD_TESTPMD", "dpdk-testpmd") else {
        return;
    };
    for pairs in [1, 2] {
        drive(pairs, [192, 0, 2, 1], |socket, directory| {
            let mut command = Command::new(&testpmd);
            let name = socket.file_name().unwrap_or_default().to_string_lossy();
            command.args(["--no-huge", "-m", "128", "--no-pci", "--no-telemetry"]);
            command.args(["--lcores", "0@0,1@0", "--file-prefix"]);
            command.arg(format!("{name}-{pairs}-{}", std::process::id()));
            command.arg("--vdev");
            let interface = socket.display();
            command.arg(format!("net_vhost0,iface={interface},queues={pairs}"));
            command.args(["--", "--forward-mode=icmpecho", "--auto-start"]);
            command.args(["--total-num-mbufs=4096", "--stats-period=1"]);
            command.arg(format!("--rxq={pairs}"));
            command.arg(format!("--txq={pairs}"));
            command.env("XDG_RUNTIME_DIR", directory);
            command
        });
    }
}
