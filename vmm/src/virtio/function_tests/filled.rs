//! Given a device process that makes the eventfds which it shares wait, and fills them: no thread
//! of the VMM that anybody waits for does.

use std::io::Write;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::succession::{lost, patient_guest, succeed, works};
use super::*;

/// The eventfd blocks whoever writes to it, and is as full as it can be.
fn fill(mut event: impl Write + AsFd) {
    let flags = fcntl_getfl(&event).unwrap();
    fcntl_setfl(&event, flags | OFlags::NONBLOCK).unwrap();
    // From an earlier attack it may be full.
    let _ = event.write_all(&(u64::MAX - 1).to_ne_bytes());
    fcntl_setfl(&event, flags - OFlags::NONBLOCK).unwrap();
}

/// The process fills all that it has of queue 0.
fn attack(guest: &Guest) {
    let recorder = guest.backend.lock();
    let ring = &recorder.rings[0];
    for event in [&ring.kick, &ring.call, &ring.error] {
        fill(event.as_ref().unwrap());
    }
}

/// Runs what must not wait.
fn at_once<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        let begun = std::time::Instant::now();
        while !worker.is_finished() {
            if begun.elapsed() > PATIENT {
                // The scope would wait for it.
                eprintln!("it waits for an eventfd of the process");
                std::process::abort();
            }
            std::thread::yield_now();
        }
        worker.join().unwrap()
    })
}

#[test]
fn full_eventfds_that_block_hold_up_neither_driver_nor_manager_nor_successor() {
    let mut guest = patient_guest();
    guest.bring_up();
    // Notifications that come by exit, as where KVM does not take them.
    let slow = |guest: &Guest| {
        for _ in 0..3 {
            guest.function.doorbells.ring(0);
            guest.function.doorbells.call(1);
        }
    };
    attack(&guest);
    at_once(|| {
        slow(&guest);
        assert_eq!(guest.device_status(), 15);
        guest.function.on_event(EventSource::RingError(0));
        guest.function.progress();
        guest.read(BAR + bar::MSIX_PBA, 8);
    });
    // What it made of its error eventfd costs it that device, which the driver may reset.
    assert_ne!(guest.device_status() & 0x40, 0, "DEVICE_NEEDS_RESET");
    at_once(|| {
        guest.set_common(common::DEVICE_STATUS, 1, 0);
        assert_eq!(guest.device_status(), 0);
        guest.bring_up();
    });
    assert_eq!(guest.device_status(), 15);

    // It dies of it, and another takes its place.
    attack(&guest);
    guest.backend.die();
    at_once(|| lost(&guest));
    at_once(|| slow(&guest));
    at_once(|| succeed(&mut guest, |_| {})).unwrap();
    // As a worker does that finds its kick signalled; as KVM does with a call.
    let recorder = guest.backend.lock();
    let ring = &recorder.rings[0];
    for event in [&ring.kick, &ring.call] {
        consume(event.as_ref().unwrap());
    }
    drop(recorder);
    guest.function.doorbells.ring(0);
    guest.function.doorbells.ring(1);
    works(&guest);
    at_once(move || drop(guest));
}
