//! A network device of ours that was given up: its driver's commands are answered all the same.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::external::{CONTROL, adopt, answer, bring_up, command, send};
use super::*;
use crate::virtio::registers::net;
use crate::virtio::{ConfigSource, kinds};

const RX_PROMISC: [u8; 3] = [0, 0, 1];
const ERR: u8 = 1;

fn offers(recorder: &mut Recorder) {
    recorder.offered |= net::F_MQ | net::F_CTRL_VQ;
    recorder.queues = 5;
    recorder.rings = (0..5).map(|_| Ring::default()).collect();
}

fn ours() -> Guest {
    let options = VirtioPciOptions {
        config: ConfigSource::Backend(12),
        fenced: true,
        successor: true,
        ..VirtioPciOptions::new("net0", kinds::NET, 5)
    };
    guest_of(options, &[0; 12], offers)
}

/// Commands that the driver has had answered, by the ring.
fn used(guest: &Guest) -> u16 {
    let mut bytes = [0; 2];
    let ram = &guest.ram.file;
    ram.read_exact_at(&mut bytes, CONTROL + 0x2002).unwrap();
    u16::from_le_bytes(bytes)
}

#[test]
fn commands_to_a_process_that_was_given_up_are_answered_with_an_error() {
    let mut guest = ours();
    bring_up(&guest);
    // One that the process has answered.
    let ram = &guest.ram.file;
    ram.write_all_at(&1_u16.to_le_bytes(), CONTROL + 0x2002)
        .unwrap();
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    send(&guest, 1, &RX_PROMISC);
    guest.function.fail(FailReason::Hangup);
    // What is left of the process may still write there.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((answer(&guest), used(&guest)), (0xff, 1));
    guest.function.quiesced();
    let end = Instant::now() + PATIENT;
    while !guest.interrupts().contains(&0x42) {
        assert!(Instant::now() < end, "no interrupt");
        std::thread::yield_now();
    }
    assert_eq!((answer(&guest), used(&guest)), (ERR, 2));
    assert_eq!(command(&guest, 2, &[4, 0, 2, 0]), ERR);
    assert_eq!(used(&guest), 3);

    // The next process goes on behind that, and is alone with the ring.
    let (backend, socket) = TestBackend::start_with(&[0; 12], offers);
    guest.backend = backend;
    assert!(matches!(adopt(&guest, socket), Outcome::Reconnected(_)));
    assert_eq!(guest.backend.lock().rings[4].base, Some(3));
    send(&guest, 3, &RX_PROMISC);
    let end = Instant::now() + PATIENT;
    while !guest.kick_arrived(4) {
        assert!(Instant::now() < end, "no kick");
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((answer(&guest), used(&guest)), (0xff, 3));
}

#[test]
fn a_driver_that_begins_anew_without_a_process_is_answered_too() {
    let guest = ours();
    bring_up(&guest);
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    guest.function.quiesced();
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    let ram = &guest.ram.file;
    ram.write_all_at(&[0; 0x3000], CONTROL).unwrap();
    bring_up(&guest);
    guest.function.fail(FailReason::Hangup);
    assert_eq!(command(&guest, 0, &RX_PROMISC), ERR);
    // Nor does nonsense do harm.
    ram.write_all_at(&[0xff, 0xff], CONTROL + 0x1002).unwrap();
    guest.hypervisor.write(doorbell(4));
    guest.set_common(common::DEVICE_STATUS, 1, 0);
}
