//! Another back-end in the place of one that died, at every point of a driver's life.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::virtio::succession::{ReconnectError, Reconnected};

/// Where `set_up_queue` puts the used and the available ring's index of queue 0 and 1.
pub const DESCRIPTORS: [u64; 2] = [0x1_0000, 0x2_0000];

pub fn patient() -> VirtioPciOptions {
    VirtioPciOptions {
        successor: true,
        ..options()
    }
}

pub fn patient_guest() -> Guest {
    guest_with(patient())
}

/// Another back-end for the guest's function, and what came of it.
pub fn succeed(
    guest: &mut Guest,
    change: impl FnOnce(&mut Recorder),
) -> Result<Reconnected, ReconnectError> {
    let (backend, socket) = TestBackend::start_with(&CONFIG, change);
    let frontend = Frontend::connect(socket, PATIENT).unwrap();
    let result = guest.function.reconnect(frontend);
    // The one before may serve until here.
    guest.backend = backend;
    result
}

fn set_indices(guest: &Guest, queue: usize, available: u16, used: u16) {
    let ram = &guest.ram.file;
    let at = DESCRIPTORS[queue];
    ram.write_all_at(&available.to_le_bytes(), at + 0x1002)
        .unwrap();
    ram.write_all_at(&used.to_le_bytes(), at + 0x2002).unwrap();
}

/// What the manager hears of the end of a back-end.
pub fn lost(guest: &Guest) -> FailReason {
    match guest.function.on_event(EventSource::Hangup) {
        Outcome::Suspended(reason) => reason,
        other => panic!("{other:?}"),
    }
}

pub fn works(guest: &Guest) {
    assert_eq!(guest.device_status(), 15);
    guest.interrupts();
    for queue in 0..2 {
        // It was greeted, perhaps by a thread that has not come round to it yet.
        let kick = guest.backend.lock().rings[queue].kick.take().unwrap();
        let mut fds = [rustix::event::PollFd::new(
            &kick,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
        consume(&kick);
        assert!(guest.hypervisor.write(doorbell(queue as u64)));
        assert!(consume(&kick), "queue {queue}");
        guest.backend.lock().rings[queue].kick = Some(kick);
        guest.complete(queue);
        let vector = 0x41 + queue as u32;
        assert!(guest.interrupts().contains(&vector));
    }
    let status = guest.function.status();
    assert!(status.active && !status.needs_reset);
    assert_eq!((status.failure, status.awaiting), (None, None));
}

/// Everything that the first back-end is told until the driver is up, by number.
fn messages_of_activation() -> std::ops::Range<usize> {
    let guest = patient_guest();
    let before = guest.backend.lock().log.len();
    guest.bring_up();
    let after = guest.backend.lock().log.len();
    assert!(after > before + 16, "{before} {after}");
    before..after
}

#[test]
fn a_successor_goes_on_where_the_process_before_it_ended() {
    let mut guest = patient_guest();
    guest.bring_up();
    let first = guest
        .backend
        .lock()
        .inflight
        .as_ref()
        .map(|(_, f)| inode(f));
    set_indices(&guest, 0, 9, 7);
    set_indices(&guest, 1, 0x8001, 0x7fff);
    guest.interrupts();
    guest.backend.die();
    assert_eq!(lost(&guest), FailReason::Hangup);
    assert!(
        matches!(
            guest.function.on_event(EventSource::Hangup),
            Outcome::Handled
        ),
        "told once"
    );
    assert_eq!(guest.device_status(), 15, "the driver is told nothing");
    assert!(guest.interrupts().is_empty());
    assert_eq!(guest.function.status().awaiting, Some(FailReason::Hangup));

    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!((done.queues, done.logged), (2, true));
    assert!(!done.config_changed && !done.needs_reset);
    {
        let recorder = guest.backend.lock();
        assert_eq!(recorder.features, FEATURES);
        assert_eq!(recorder.regions.len(), 1);
        let bases: Vec<_> = recorder.rings.iter().map(|ring| ring.base).collect();
        assert_eq!(bases, [Some(7), Some(0x7fff)]);
        assert!(recorder.rings.iter().all(|ring| ring.enabled));
        let second = recorder.inflight.as_ref().map(|(_, f)| inode(f));
        assert_eq!(first, second, "the same log");
        assert!(!recorder.log.contains(&"GET_INFLIGHT_FD"));
        let position = |what| recorder.log.iter().position(|message| *message == what);
        assert!(position("SET_INFLIGHT_FD") < position("SET_VRING_KICK"));
    }
    works(&guest);
    let link = guest.function.link_fds();
    assert_eq!(link.len(), 2);
    assert!(matches!(
        guest.function.on_event(EventSource::Hangup),
        Outcome::Handled
    ));
    guest.backend.die();
    assert_eq!(lost(&guest), FailReason::Hangup, "and again");
    succeed(&mut guest, |_| {}).unwrap();
    works(&guest);
}

fn inode(file: &std::fs::File) -> u64 {
    file.metadata().unwrap().ino()
}

#[test]
fn the_queues_are_kicked_and_called_once_after_a_succession() {
    let mut guest = patient_guest();
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    guest.interrupts();
    succeed(&mut guest, |_| {}).unwrap();
    // By a thread of its own: wait for what it owes.
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.extend(guest.interrupts());
    }
    seen.sort_unstable();
    assert_eq!(seen, [0x41, 0x42]);
    works(&guest);
}

#[test]
fn an_activation_is_completed_whatever_message_it_was_cut_off_at() {
    for number in messages_of_activation() {
        let mut guest = patient_guest();
        guest.backend.lock().dies_at = Some(number);
        guest.bring_up();
        assert_eq!(guest.device_status(), 15, "message {number}");
        assert_eq!(lost(&guest), FailReason::Hangup);
        let done = succeed(&mut guest, |_| {}).unwrap();
        assert_eq!((done.queues, done.needs_reset), (2, false));
        let bases: Vec<_> = guest.backend.lock().rings.iter().map(|r| r.base).collect();
        assert_eq!(bases, [Some(0), Some(0)], "message {number}");
        assert!(guest.backend.lock().inflight.is_some());
        works(&guest);
    }
}

#[test]
fn a_succession_is_completed_by_a_third_process_whatever_message_the_second_died_at() {
    let mut number = 0;
    loop {
        let mut guest = patient_guest();
        guest.bring_up();
        set_indices(&guest, 0, 5, 3);
        guest.backend.die();
        lost(&guest);
        let (backend, socket) = TestBackend::start_with(&CONFIG, |r| r.dies_at = Some(number));
        let cut_off = match Frontend::connect(socket, PATIENT) {
            Ok(frontend) => guest.function.reconnect(frontend).is_err(),
            Err(_) => true,
        };
        let status = guest.function.status();
        // One that dies when it has been given the first ring was the successor.
        let cut_off = cut_off || status.awaiting.is_some();
        if !cut_off {
            assert_eq!(status.awaiting, None);
            assert!(number > 16, "{number}");
            break;
        }
        drop(backend);
        assert_eq!(
            status.awaiting,
            Some(FailReason::Hangup),
            "message {number}"
        );
        assert_eq!(guest.device_status(), 15, "message {number}");
        succeed(&mut guest, |_| {}).unwrap();
        assert_eq!(guest.backend.lock().rings[0].base, Some(3));
        works(&guest);
        number += 1;
    }
}

#[test]
fn a_reset_is_completed_whatever_message_it_was_cut_off_at() {
    let asked = {
        let guest = patient_guest();
        guest.bring_up();
        let before = guest.backend.lock().log.len();
        guest.set_common(common::DEVICE_STATUS, 1, 0);
        before..guest.backend.lock().log.len()
    };
    assert_eq!(asked.len(), 4);
    for number in asked {
        let mut guest = patient_guest();
        guest.bring_up();
        guest.backend.lock().dies_at = Some(number);
        guest.set_common(common::DEVICE_STATUS, 1, 0);
        assert_eq!(guest.device_status(), 0, "message {number}");
        lost(&guest);
        let done = succeed(&mut guest, |_| {}).unwrap();
        assert_eq!(done.queues, 0, "nothing to serve");
        assert!(!guest.backend.lock().log.contains(&"SET_INFLIGHT_FD"));
        guest.bring_up();
        assert!(
            guest.backend.lock().log.contains(&"GET_INFLIGHT_FD"),
            "a new log"
        );
        guest.hypervisor.write(doorbell(0));
        guest.hypervisor.write(doorbell(1));
        works(&guest);
    }
}

#[test]
fn a_driver_is_reset_and_comes_up_while_there_is_no_process() {
    let mut guest = patient_guest();
    guest.bring_up();
    set_indices(&guest, 0, 9, 7);
    guest.backend.die();
    lost(&guest);
    // Reads come from what is known, writes are kept.
    assert_eq!(guest.read(BAR + bar::DEVICE, 4), 0x0403_0201);
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 0);
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    guest.set_common(common::QUEUE_SELECT, 2, 1);
    guest.set_common(common::QUEUE_VECTOR, 2, 1);
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!((done.queues, done.needs_reset), (2, false));
    assert_eq!(
        guest.backend.lock().rings[0].base,
        Some(0),
        "a new driver starts at the beginning"
    );
    guest.interrupts();
    guest.complete(1);
    assert!(
        guest.interrupts().contains(&0x41),
        "the vector chosen meanwhile"
    );
}

#[test]
fn what_the_driver_wrote_to_the_configuration_space_is_told_to_the_successor() {
    let mut guest = patient_guest();
    guest.bring_up();
    guest.write(BAR + bar::DEVICE + 1, 1, 0xaa);
    guest.backend.die();
    lost(&guest);
    guest.write(BAR + bar::DEVICE + 6, 2, 0xbbcc);
    assert_eq!(guest.read(BAR + bar::DEVICE + 6, 2), 0xbbcc);
    guest.interrupts();
    let generation = guest.common(20, 2) >> 8;
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!(
        guest.backend.lock().config,
        [1, 0xaa, 3, 4, 5, 6, 0xcc, 0xbb]
    );
    assert!(!done.config_changed);
    assert_eq!(guest.common(20, 2) >> 8, generation);

    guest.backend.die();
    lost(&guest);
    let done = succeed(&mut guest, |recorder| recorder.config[3] = 0x77).unwrap();
    assert!(done.config_changed);
    assert_eq!(guest.common(20, 2) >> 8, generation + 1);
    assert!(guest.interrupts().contains(&0x40));
    assert_eq!(guest.read(BAR + bar::DEVICE + 3, 1), 0x77);
}

#[test]
fn a_successor_that_lacks_what_the_driver_uses_fails_the_function_until_one_has_it() {
    let mut guest = patient_guest();
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    guest.interrupts();
    let error = succeed(&mut guest, |recorder| recorder.offered &= !2).unwrap_err();
    assert!(error.is_permanent());
    assert_eq!(
        error.to_string(),
        "device disk0: its new back-end lacks features that the driver uses (0x2): start one \
         that has them"
    );
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    assert_eq!(guest.interrupts(), [0x40]);
    assert!(matches!(
        guest.function.on_event(EventSource::Hangup),
        Outcome::Failed(_)
    ));
    let error = succeed(&mut guest, |recorder| recorder.queues = 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "device disk0: its back-end serves 1 queues, not 2; ask for fewer"
    );
    // A function that was given up is brought back.
    succeed(&mut guest, |_| {}).unwrap();
    works(&guest);
}

#[test]
fn before_a_driver_is_there_a_successor_may_offer_what_it_likes() {
    let mut guest = patient_guest();
    guest.map();
    guest.enable_interrupts();
    guest.backend.die();
    lost(&guest);
    let done = succeed(&mut guest, |recorder| recorder.offered &= !2).unwrap();
    assert_eq!(done.queues, 0);
    guest.bring_up();
    assert_eq!(guest.function.status().features, FEATURES & !(1 << 30) & !2);
    guest.hypervisor.write(doorbell(0));
    guest.hypervisor.write(doorbell(1));
    works(&guest);
}

#[test]
fn without_a_log_requests_in_flight_need_a_reset_and_idle_rings_go_on() {
    use vhost::vhost_user::message::VhostUserProtocolFeatures;
    let unlogged = |recorder: &mut Recorder| {
        recorder.protocol -= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    };
    let mut guest = patient_guest();
    guest.bring_up();
    set_indices(&guest, 0, 7, 7);
    guest.backend.die();
    lost(&guest);
    let done = succeed(&mut guest, unlogged).unwrap();
    assert!(!done.logged && !done.needs_reset);
    assert_eq!(guest.backend.lock().rings[0].base, Some(7));
    set_indices(&guest, 0, 9, 7);
    guest.backend.die();
    lost(&guest);
    // A log that begins now says nothing of what was before.
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!((done.queues, done.needs_reset), (0, true));
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    guest.bring_up();
    guest.hypervisor.write(doorbell(0));
    guest.hypervisor.write(doorbell(1));
    works(&guest);
}

#[test]
fn requests_that_came_while_nobody_was_there_were_in_flight_nowhere() {
    use vhost::vhost_user::message::VhostUserProtocolFeatures;
    let unlogged = |recorder: &mut Recorder| {
        recorder.protocol -= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    };
    // At the loss, and when the successor comes: available and used of ring 0.
    let cases = [
        ((7, 7), (9, 7), false),
        ((7, 7), (7, 7), false),
        ((9, 7), (9, 7), true),
        // Whoever completed that was not gone.
        ((7, 7), (9, 8), true),
    ];
    for (at_loss, then, needs_reset) in cases {
        let mut guest = patient_guest();
        guest.bring_up();
        succeed(&mut guest, unlogged).unwrap();
        set_indices(&guest, 0, at_loss.0, at_loss.1);
        guest.backend.die();
        assert_eq!(lost(&guest), FailReason::Hangup);
        set_indices(&guest, 0, then.0, then.1);
        let done = succeed(&mut guest, unlogged).unwrap();
        assert_eq!(done.needs_reset, needs_reset, "{at_loss:?} {then:?}");
        if !needs_reset {
            assert_eq!(guest.backend.lock().rings[0].base, Some(then.1.into()));
            works(&guest);
        }
    }
}

#[test]
fn a_process_that_serves_hands_over_and_goes_on_when_its_successor_fails() {
    let mut guest = patient_guest();
    guest.bring_up();
    set_indices(&guest, 0, 9, 7);
    let last = messages_of_activation().end;
    // The successor's messages before its first ring differ by the ones of `new`.
    for number in 0..last {
        let (backend, socket) = TestBackend::start_with(&CONFIG, |r| r.dies_at = Some(number));
        let Ok(frontend) = Frontend::connect(socket, PATIENT) else {
            continue;
        };
        if guest.function.reconnect(frontend).is_ok() {
            // It was given the first ring, and died.
            assert!(number > 16, "{number}");
            guest.backend = backend;
            assert_eq!(lost(&guest), FailReason::Hangup);
            break;
        }
        assert_eq!(guest.function.status().awaiting, None);
        assert_eq!(
            guest.backend.lock().rings[0].base,
            Some(17),
            "where it stopped"
        );
        works(&guest);
    }
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!(done.queues, 2);
    assert_eq!(
        guest.backend.lock().rings[0].base,
        Some(7),
        "the ring's own"
    );
    works(&guest);
    // One that serves says itself where it stopped.
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!(done.queues, 2);
    assert_eq!(guest.backend.lock().rings[0].base, Some(17));
    works(&guest);
}

#[test]
fn one_that_is_given_up_while_its_successor_comes_in_stays_given_up() {
    let mut guest = patient_guest();
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    guest.function.fail(FailReason::Stopped("by hand".into()));
    let stopped = FailReason::Stopped("by hand".into());
    assert_eq!(guest.function.status().failure, Some(stopped));
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    succeed(&mut guest, |_| {}).unwrap();
    works(&guest);

    // Between beginning and end.
    guest.backend.die();
    lost(&guest);
    let (_backend, socket) = TestBackend::start(&CONFIG);
    let mut frontend = Frontend::connect(socket, PATIENT).unwrap();
    let ends = Ends::of(&mut frontend).unwrap();
    let ticket = guest.function.link.begin(&ends).unwrap();
    assert!(guest.function.link.begin(&ends).is_none(), "one at a time");
    guest.function.fail(FailReason::Stopped("by hand".into()));
    assert!(!guest.function.link.finish(&ticket, ends));
    guest.function.link.abandon();
    assert!(guest.function.status().failure.is_some());
}

#[test]
fn the_functions_own_thread_brings_a_successor_in() {
    let mut guest = patient_guest();
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    let told = |guest: &Guest| {
        let fds = guest.function.poll_fds();
        let done = fds.iter().find(|fd| fd.source == EventSource::Successor);
        let mut fds = [rustix::event::PollFd::new(
            &done.unwrap().fd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
        loop {
            match guest.function.on_event(EventSource::Successor) {
                Outcome::Handled => {}
                outcome => return outcome,
            }
        }
    };
    // One that ends at once.
    let (socket, gone) = UnixStream::pair().unwrap();
    drop(gone);
    guest.function.adopt(socket).unwrap();
    assert!(matches!(told(&guest), Outcome::NotReconnected(_)));
    assert_eq!(guest.function.status().awaiting, Some(FailReason::Hangup));

    let (backend, socket) = TestBackend::start(&CONFIG);
    guest.backend = backend;
    guest.function.adopt(socket).unwrap();
    let (socket, _silent) = UnixStream::pair().unwrap();
    let error = guest.function.adopt(socket).unwrap_err();
    assert!(matches!(error, ReconnectError::Busy(_)), "{error}");
    match told(&guest) {
        Outcome::Reconnected(done) => assert_eq!(done.queues, 2),
        other => panic!("{other:?}"),
    }
    works(&guest);
    // Not for functions that have no successors.
    let plain = super::guest();
    let (socket, _silent) = UnixStream::pair().unwrap();
    assert!(plain.function.adopt(socket).is_err());
}

#[test]
fn a_spoilt_answer_about_the_log_is_refused() {
    let spoils: [fn(&mut vhost::vhost_user::message::VhostUserInflight); 7] = [
        |reply| reply.num_queues += 1,
        |reply| reply.queue_size /= 2,
        |reply| reply.mmap_size = 0,
        |reply| reply.mmap_size = u64::MAX,
        |reply| reply.mmap_size += 0x1000,
        |reply| reply.mmap_offset = 0x1000,
        |reply| reply.mmap_offset = u64::MAX - 0xfff,
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let mut guest = patient_guest();
        guest.backend.lock().spoil_inflight = spoil;
        guest.bring_up();
        let reason = lost(&guest);
        assert!(
            matches!(reason, FailReason::Violation(_)),
            "{number}: {reason}"
        );
        succeed(&mut guest, |_| {}).unwrap();
        works(&guest);
    }
}

#[test]
fn a_process_that_dies_when_asked_to_hand_over_is_succeeded_all_the_same() {
    let mut guest = patient_guest();
    guest.bring_up();
    set_indices(&guest, 0, 9, 7);
    let asked = guest.backend.lock().log.len() + 1;
    guest.backend.lock().dies_at = Some(asked);
    let done = succeed(&mut guest, |_| {}).unwrap();
    assert_eq!((done.queues, done.logged), (2, true));
    assert_eq!(guest.backend.lock().rings[0].base, Some(7));
    works(&guest);
}
