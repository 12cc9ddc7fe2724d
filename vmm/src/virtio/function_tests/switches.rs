//! Real network back-ends of other people: passt and DPDK's vhost PMD. An ARP request goes
//! out and its answer comes in; the back-end is killed, another one takes its place, and
//! it works as before. Each is tested where its program is found: on the path, or as
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
/// Rings of 256 at the places that `set_up_queue` chooses from these.
const RECEIVE: u64 = 0x1_0000;
const TRANSMIT: u64 = 0x2_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const FRAME: u64 = 0x6_0000;
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

/// A driver's network device with one queue pair.
struct Nic {
    machine: Machine,
    ram: Arc<File>,
    sent: u16,
    received: u16,
}

impl Nic {
    fn bring_up(&mut self) {
        let ram = &self.ram;
        ram.write_all_at(&[0; 0x3000], RECEIVE).unwrap();
        ram.write_all_at(&[0; 0x3000], TRANSMIT).unwrap();
        for buffer in 0..COUNT {
            let address = BUFFERS + BUFFER * u64::from(buffer);
            self.descriptor(RECEIVE, buffer, address, BUFFER as u32, 2);
            put_u16(ram, RECEIVE + AVAILABLE + 4 + 2 * u64::from(buffer), buffer);
        }
        put_u16(ram, RECEIVE + AVAILABLE + 2, COUNT);
        (self.sent, self.received) = (0, 0);
        let machine = &self.machine;
        machine.map();
        machine.enable_interrupts();
        assert_eq!(machine.negotiate(), 11);
        machine.set_up_queue(0, RECEIVE);
        machine.set_up_queue(1, TRANSMIT);
        machine.set_common(common::DEVICE_STATUS, 1, 15);
        assert_eq!(machine.device_status(), 15);
        assert!(machine.hypervisor.write(doorbell(0)));
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0; 2]);
        let place = table + 16 * u64::from(index);
        self.ram.write_all_at(&descriptor, place).unwrap();
    }

    /// Asks who has an address, and again if need be, until somebody says it.
    fn resolve(&mut self, wanted: [u8; 4]) {
        for _ in 0..100 {
            self.ask(wanted);
            for _ in 0..100 {
                if self.answered(wanted) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        panic!("no answer: {:?}", self.machine.function.status());
    }

    fn ask(&mut self, wanted: [u8; 4]) {
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
        self.descriptor(TRANSMIT, 0, FRAME, frame.len() as u32, 0);
        let entry = TRANSMIT + AVAILABLE + 4 + 2 * u64::from(self.sent % 256);
        put_u16(&self.ram, entry, 0);
        self.sent = self.sent.wrapping_add(1);
        put_u16(&self.ram, TRANSMIT + AVAILABLE + 2, self.sent);
        assert!(self.machine.hypervisor.write(doorbell(1)));
    }

    /// Takes what has come in, gives the buffers back, and looks for the answer.
    fn answered(&mut self, wanted: [u8; 4]) -> bool {
        let mut found = false;
        while self.received != get_u16(&self.ram, RECEIVE + USED + 2) {
            let place = RECEIVE + USED + 4 + 8 * u64::from(self.received % 256);
            let buffer = get_u16(&self.ram, place);
            assert!(buffer < COUNT);
            let mut frame = [0; HEADER + 42];
            let at = BUFFERS + BUFFER * u64::from(buffer);
            self.ram.read_exact_at(&mut frame, at).unwrap();
            let frame = &frame[HEADER..];
            // An ARP reply from that address.
            found |= frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == wanted;
            self.received = self.received.wrapping_add(1);
            let next = self.received.wrapping_add(COUNT);
            let entry = RECEIVE + AVAILABLE + 4 + 2 * u64::from(next.wrapping_sub(1) % 256);
            put_u16(&self.ram, entry, buffer);
            put_u16(&self.ram, RECEIVE + AVAILABLE + 2, next);
            self.machine.hypervisor.write(doorbell(0));
        }
        found
    }

    fn adopt(&self, frontend: Frontend) {
        let done = self.machine.function.reconnect(frontend).unwrap();
        assert_eq!((done.queues, done.needs_reset), (2, false));
    }
}

/// Drives a back-end that `start` starts on a socket and that answers for `address`.
fn drive(address: [u8; 4], start: impl Fn(&Path, &Path) -> Command) {
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
    let options = VirtioPciOptions::external_net("net0", MAC, 1, 0);
    let mut nic = Nic {
        machine: machine_in_front_of(options, Some(frontend), Arc::new(memory)),
        ram,
        sent: 0,
        received: 0,
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
    drive([192, 0, 2, 1], |socket, _| {
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
    drive([192, 0, 2, 1], |socket, directory| {
        let mut command = Command::new(&testpmd);
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        command.args(["--no-huge", "-m", "128", "--no-pci", "--no-telemetry"]);
        command.args(["--lcores", "0@0,1@0", "--file-prefix"]);
        command.arg(format!("{name}-{}", std::process::id()));
        command.arg("--vdev");
        command.arg(format!("net_vhost0,iface={},queues=1", socket.display()));
        command.args(["--", "--forward-mode=icmpecho", "--auto-start"]);
        command.args(["--total-num-mbufs=4096", "--stats-period=1"]);
        command.env("XDG_RUNTIME_DIR", directory);
        command
    });
}
