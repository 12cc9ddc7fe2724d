//! Somebody else's back-ends: without protocol features, without a configuration space,
//! absent at first, and network back-ends whose control queue the VMM serves.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::*;
use crate::virtio::VirtioError;
use crate::virtio::registers::{F_VERSION_1, net};

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
const PAIRS: u16 = 2;
/// What a switch offers: VERSION_1, MRG_RXBUF, CSUM, MQ and, mistakenly, CTRL_RX.
const SWITCH: u64 = F_VERSION_1 | 1 << 30 | net::F_MRG_RXBUF | 1 | net::F_MQ | 1 << 18;
/// Link up and announce, in the configuration space.
const STATUS: u64 = BAR + bar::DEVICE + 6;
/// The control queue's rings, and a command of it.
pub(super) const CONTROL: u64 = 0x5_0000;
const COMMAND: u64 = 0x6_0000;

fn switch_with(pairs: u16) -> impl FnOnce(&mut Recorder) {
    move |recorder| {
        recorder.offered = SWITCH;
        recorder.protocol = Protocol::MQ | Protocol::REPLY_ACK;
        recorder.queues = pairs.into();
        recorder.rings = (0..2 * pairs).map(|_| Ring::default()).collect();
    }
}

fn net_options() -> VirtioPciOptions {
    VirtioPciOptions::external_net("net0", MAC, PAIRS, 1500)
}

fn switched() -> Guest {
    guest_of(net_options(), &[], switch_with(PAIRS))
}

/// What Linux does, with both pairs and the control queue. Vector 0 is for changes of
/// configuration, 1 for all queues.
pub(super) fn bring_up(guest: &Guest) {
    guest.map();
    guest.enable_interrupts();
    assert_eq!(guest.negotiate(), 11);
    guest.set_common(common::CONFIG_VECTOR, 2, 0);
    for queue in 0..4 {
        guest.set_up_queue(queue, 0x1_0000 * (queue + 1));
        guest.set_common(common::QUEUE_VECTOR, 2, 1);
    }
    guest.set_up_queue(4, CONTROL);
    guest.set_common(common::QUEUE_VECTOR, 2, 2);
    guest.set_common(common::DEVICE_STATUS, 1, 15);
    assert_eq!(guest.device_status(), 15);
}

/// Sends a command as the `number`-th and waits for its interrupt. Its answer.
pub(super) fn command(guest: &Guest, number: u16, bytes: &[u8]) -> u8 {
    send(guest, number, bytes);
    // The function's own thread serves it.
    while !guest.interrupts().contains(&0x42) {
        std::thread::yield_now();
    }
    answer(guest)
}

/// Sends a command as the `number`-th.
pub(super) fn send(guest: &Guest, number: u16, bytes: &[u8]) {
    let ram = &guest.ram.file;
    ram.write_all_at(bytes, COMMAND).unwrap();
    ram.write_all_at(&[0xff], COMMAND + 0x100).unwrap();
    let chain = [
        (COMMAND, bytes.len() as u32, 1_u16),
        (COMMAND + 0x100, 1, 2),
    ];
    for (at, (address, length, flags)) in (0_u16..).zip(chain) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend((at + 1).to_le_bytes());
        let place = CONTROL + 16 * u64::from(at);
        ram.write_all_at(&descriptor, place).unwrap();
    }
    let next = number + 1;
    let entry = CONTROL + 0x1004 + 2 * u64::from(number);
    ram.write_all_at(&[0, 0], entry).unwrap();
    ram.write_all_at(&next.to_le_bytes(), CONTROL + 0x1002)
        .unwrap();
    assert!(guest.hypervisor.write(doorbell(4)), "KVM's doorbell");
}

/// What stands where the answer to the last command goes.
pub(super) fn answer(guest: &Guest) -> u8 {
    let ram = &guest.ram.file;
    let mut answer = [0xff];
    ram.read_exact_at(&mut answer, COMMAND + 0x100).unwrap();
    answer[0]
}

fn enabled(guest: &Guest) -> Vec<bool> {
    let recorder = guest.backend.lock();
    recorder.rings.iter().map(|ring| ring.enabled).collect()
}

/// A successor by the function's own thread, as the manager does it.
pub(super) fn adopt(guest: &Guest, socket: UnixStream) -> Outcome {
    guest.function.adopt(socket).unwrap();
    loop {
        match guest.function.on_event(EventSource::Successor) {
            Outcome::Handled => std::thread::yield_now(),
            outcome => return outcome,
        }
    }
}

#[test]
fn a_switch_gets_its_configuration_space_and_control_queue_from_the_vmm() {
    let guest = switched();
    assert_eq!(guest.read(Machine::config(0), 4), 0x1041_1af4);
    guest.map();
    assert_eq!(guest.common(common::NUM_QUEUES, 2), 5);
    let offered = {
        guest.set_common(common::DEVICE_FEATURE_SELECT, 4, 0);
        guest.common(common::DEVICE_FEATURE, 4)
    };
    let ours = net::F_MAC | net::F_STATUS | net::F_CTRL_VQ | net::F_GUEST_ANNOUNCE | net::F_MTU;
    assert_eq!(offered, (net::F_MRG_RXBUF | 1 | net::F_MQ) | ours);
    let mac = guest.read(BAR + bar::DEVICE, 8).to_le_bytes();
    assert_eq!(mac[..6], MAC);
    assert_eq!(guest.read(STATUS, 2), 1, "link up");
    assert_eq!(guest.read(BAR + bar::DEVICE + 8, 2), u64::from(PAIRS));
    assert_eq!(guest.read(BAR + bar::DEVICE + 10, 2), 1500);

    bring_up(&guest);
    {
        let recorder = guest.backend.lock();
        let passed = SWITCH & !(1 << 18);
        assert_eq!(recorder.features, passed, "only what the switch knows");
        let handed: Vec<_> = recorder.rings.iter().map(|r| r.kick.is_some()).collect();
        assert_eq!(handed, [true; 4]);
        assert_eq!(recorder.log.len(), recorder.log.len());
    }
    assert_eq!(enabled(&guest), [true, true, false, false]);
    assert_eq!(command(&guest, 0, &[4, 0, 2, 0]), 0);
    assert_eq!(enabled(&guest), [true; 4]);
    // Said to the API a moment after the driver.
    while guest.function.status().queue_pairs != Some(2) {
        std::thread::yield_now();
    }
    assert_eq!(command(&guest, 1, &[4, 0, 3, 0]), 1, "more than there are");
    assert_eq!(
        command(&guest, 2, &[0, 0, 1]),
        1,
        "promiscuous: not offered"
    );
    assert_eq!(command(&guest, 3, &[4, 0, 1, 0]), 0);
    assert_eq!(enabled(&guest), [true, true, false, false]);
    // Data passes the VMM by, and the control queue is no business of the switch.
    assert!(guest.hypervisor.write(doorbell(1)));
    assert!(guest.kick_arrived(1));
}

#[test]
fn the_link_goes_down_with_the_switch_and_comes_up_with_its_successor() {
    let mut guest = switched();
    bring_up(&guest);
    assert_eq!(command(&guest, 0, &[4, 0, 2, 0]), 0);
    guest.interrupts();
    guest.backend.die();
    let outcome = guest.function.on_event(EventSource::Hangup);
    assert!(matches!(outcome, Outcome::Suspended(FailReason::Hangup)));
    assert_eq!(guest.read(STATUS, 2), 0);
    assert_eq!(guest.interrupts(), [0x40], "the driver is told");
    assert_eq!(guest.device_status(), 15, "but not to reset");
    // Commands are answered all the same, and kept.
    assert_eq!(command(&guest, 1, &[4, 0, 1, 0]), 0);
    assert_eq!(command(&guest, 2, &[4, 0, 2, 0]), 0);

    // Receive queues always hold buffers: they are taken up at the used index.
    let ram = &guest.ram.file;
    for (queue, used) in [(0_u64, 5_u16), (1, 6), (2, 7), (3, 8)] {
        let at = 0x1_0000 * (queue + 1);
        ram.write_all_at(&200_u16.to_le_bytes(), at + 0x1002)
            .unwrap();
        ram.write_all_at(&used.to_le_bytes(), at + 0x2002).unwrap();
    }
    guest.interrupts();
    let (backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    guest.backend = backend;
    match adopt(&guest, socket) {
        Outcome::Reconnected(done) => {
            assert_eq!(
                (done.queues, done.needs_reset, done.logged),
                (4, false, false)
            );
        }
        other => panic!("{other:?}"),
    }
    let bases: Vec<_> = guest.backend.lock().rings.iter().map(|r| r.base).collect();
    assert_eq!(bases, [5, 6, 7, 8].map(Some));
    assert_eq!(
        enabled(&guest),
        [true; 4],
        "the pairs that the driver chose"
    );
    assert_eq!(guest.read(STATUS, 2), 3, "link up, and announce yourself");
    assert!(guest.interrupts().contains(&0x40));
    let generation = || guest.function.signals.generation.load(Ordering::Acquire);
    let before = generation();
    assert_eq!(command(&guest, 3, &[3, 0]), 0);
    assert_eq!(guest.read(STATUS, 2), 3, "again, once it has seen the link");
    let end = std::time::Instant::now() + PATIENT;
    while generation() == before {
        assert!(std::time::Instant::now() < end, "the driver is not told");
        std::thread::yield_now();
    }
    assert_eq!(command(&guest, 4, &[3, 0]), 0);
    assert_eq!(guest.read(STATUS, 2), 1, "it has");

    // A reset ends all of it.
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.function.status().queue_pairs, Some(1));
    bring_up(&guest);
    assert_eq!(enabled(&guest), [true, true, false, false]);
}

#[test]
fn the_api_takes_the_link_down_and_up() {
    let guest = switched();
    bring_up(&guest);
    assert!(guest.function.set_link(false));
    assert_eq!(guest.read(STATUS, 2), 0);
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(guest.function.status().link_up, Some(false));
    guest.function.set_link(false);
    assert!(guest.interrupts().is_empty(), "no change");
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    guest.function.set_link(true);
    assert_eq!(guest.read(STATUS, 2), 0, "there is nobody behind it");
    let (_backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    adopt(&guest, socket);
    assert_eq!(guest.read(STATUS, 2), 3);
    assert!(!super::guest().function.set_link(true), "no network device");
}

/// Until the function's own thread has told the back-end.
fn until_enabled(guest: &Guest, wanted: [bool; 4]) {
    let end = std::time::Instant::now() + PATIENT;
    while enabled(guest) != wanted {
        assert!(std::time::Instant::now() < end, "{:?}", enabled(guest));
        std::thread::yield_now();
    }
}

/// Until a greeting has reached the first transmit ring: a thread of its own makes them.
fn until_kicked(guest: &Guest, otherwise: &str) {
    let end = std::time::Instant::now() + PATIENT;
    while !guest.kick_arrived(1) {
        assert!(std::time::Instant::now() < end, "{otherwise}");
        std::thread::yield_now();
    }
}

#[test]
fn a_link_that_is_down_carries_nothing_whatever_the_driver_and_the_switch_do() {
    let mut guest = switched();
    bring_up(&guest);
    assert_eq!(command(&guest, 0, &[4, 0, 2, 0]), 0);
    assert_eq!(enabled(&guest), [true; 4]);
    assert!(guest.function.set_link(false));
    until_enabled(&guest, [false; 4]);
    // The driver chooses its pairs as ever.
    assert_eq!(command(&guest, 1, &[4, 0, 1, 0]), 0);
    assert_eq!(command(&guest, 2, &[4, 0, 2, 0]), 0);
    assert_eq!(enabled(&guest), [false; 4]);
    // The switch comes back.
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    let (backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    guest.backend = backend;
    assert!(matches!(adopt(&guest, socket), Outcome::Reconnected(_)));
    assert_eq!(enabled(&guest), [false; 4]);
    assert_eq!(guest.read(STATUS, 2), 0);
    // The driver begins anew, with empty rings.
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    let ram = &guest.ram.file;
    ram.write_all_at(&[0; 0x3000], CONTROL).unwrap();
    bring_up(&guest);
    assert_eq!(enabled(&guest), [false; 4]);
    until_kicked(&guest, "the successor is not greeted");
    assert!(guest.function.set_link(true));
    until_enabled(&guest, [true, true, false, false]);
    let end = std::time::Instant::now() + PATIENT;
    while guest.read(STATUS, 2) != 3 {
        assert!(std::time::Instant::now() < end, "the driver is not told");
        std::thread::yield_now();
    }
    until_kicked(&guest, "what was sent meanwhile is not looked at");
}

#[test]
fn a_switch_that_will_not_stop_its_rings_is_let_go() {
    let mut guest = switched();
    bring_up(&guest);
    guest.backend.lock().refuse = Some("SET_VRING_ENABLE");
    assert!(guest.function.set_link(false));
    let end = std::time::Instant::now() + PATIENT;
    while guest.function.status().awaiting != Some(FailReason::Unquiet) {
        assert!(std::time::Instant::now() < end, "it serves on");
        std::thread::yield_now();
    }
    let (backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    guest.backend = backend;
    assert!(matches!(adopt(&guest, socket), Outcome::Reconnected(_)));
    assert_eq!(enabled(&guest), [false; 4]);
}

#[test]
fn a_driver_without_multiqueue_finds_the_control_queue_behind_the_first_pair() {
    let guest = switched();
    guest.map();
    guest.enable_interrupts();
    guest.set_common(common::DEVICE_STATUS, 1, 3);
    for (half, features) in [(0, net::F_CTRL_VQ), (1, 1)] {
        guest.set_common(common::DRIVER_FEATURE_SELECT, 4, half);
        guest.set_common(common::DRIVER_FEATURE, 4, features);
    }
    guest.set_common(common::DEVICE_STATUS, 1, 11);
    guest.set_up_queue(0, 0x1_0000);
    guest.set_up_queue(1, 0x2_0000);
    guest.set_up_queue(2, CONTROL);
    guest.set_common(common::DEVICE_STATUS, 1, 15);
    assert_eq!(guest.device_status(), 15);
    let recorder = guest.backend.lock();
    let handed: Vec<_> = recorder.rings.iter().map(|r| r.kick.is_some()).collect();
    assert_eq!(handed, [true, true, false, false]);
}

#[test]
fn a_malformed_control_queue_asks_for_a_reset_which_repairs_it() {
    let guest = switched();
    bring_up(&guest);
    guest.interrupts();
    // A head outside the table.
    let ram = &guest.ram.file;
    ram.write_all_at(&[0xff, 0xff], CONTROL + 0x1004).unwrap();
    ram.write_all_at(&[1, 0], CONTROL + 0x1002).unwrap();
    guest.hypervisor.write(doorbell(4));
    while guest.device_status() & bits::NEEDS_RESET == 0 {
        std::thread::yield_now();
    }
    assert_eq!(guest.interrupts(), [0x40]);
    ram.write_all_at(&[0; 0x3000], CONTROL).unwrap();
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    bring_up(&guest);
    assert_eq!(command(&guest, 0, &[4, 0, 2, 0]), 0);
}

#[test]
fn a_switch_that_is_not_there_at_first_is_waited_for() {
    let ram = Ram::new();
    let machine = machine_in_front_of(net_options(), None, Arc::new(ram.clone()));
    let (backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    let guest = Guest {
        machine,
        backend,
        ram,
    };
    let status = guest.function.status();
    assert_eq!(status.awaiting, Some(FailReason::Absent));
    assert_eq!(guest.function.link_fds().len(), 0);
    bring_up(&guest);
    assert_eq!(guest.read(STATUS, 2), 0, "no link");
    assert_eq!(command(&guest, 0, &[4, 0, 2, 0]), 0);
    match adopt(&guest, socket) {
        Outcome::Reconnected(done) => assert_eq!(done.queues, 4),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.read(STATUS, 2) & 1, 1);
    assert_eq!(enabled(&guest), [true; 4]);
    assert_eq!(guest.backend.lock().rings[0].base, Some(0));
    guest.interrupts();
    guest.complete(0);
    assert!(guest.interrupts().contains(&0x41));
}

#[test]
fn a_switch_that_lacks_what_was_assumed_leaves_the_link_down() {
    let ram = Ram::new();
    let machine = machine_in_front_of(net_options(), None, Arc::new(ram.clone()));
    let (backend, socket) = TestBackend::start_with(&[], |recorder| {
        switch_with(PAIRS)(recorder);
        recorder.offered &= !net::F_MRG_RXBUF;
    });
    let guest = Guest {
        machine,
        backend,
        ram,
    };
    bring_up(&guest);
    match adopt(&guest, socket) {
        Outcome::NotReconnected(error) => assert!(error.is_permanent(), "{error}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.read(STATUS, 2), 0);
    assert_eq!(guest.device_status(), 15);
    assert!(guest.function.status().awaiting.is_some());
    let (_backend, socket) = TestBackend::start_with(&[], switch_with(PAIRS));
    match adopt(&guest, socket) {
        Outcome::Reconnected(done) => assert_eq!(done.queues, 4),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.read(STATUS, 2) & 1, 1);
}

#[test]
fn back_ends_without_protocol_features_are_driven_too() {
    let bare = |recorder: &mut Recorder| {
        recorder.offered = F_VERSION_1 | net::F_MRG_RXBUF;
        recorder.protocol = Protocol::empty();
    };
    let options = VirtioPciOptions::external_net("net0", MAC, 1, 0);
    let (backend, socket) = TestBackend::start_with(&[], bare);
    let ram = Ram::new();
    let machine = machine(options, socket, Arc::new(ram.clone()));
    let mut guest = Guest {
        machine,
        backend,
        ram,
    };
    let up = |guest: &Guest| {
        guest.bring_up();
        assert_eq!(guest.device_status(), 15);
    };
    up(&guest);
    {
        let recorder = guest.backend.lock();
        assert!(recorder.rings.iter().all(|ring| ring.kick.is_some()));
        assert!(!recorder.log.contains(&"SET_VRING_ENABLE"));
    }
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    up(&guest);
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    let (backend, socket) = TestBackend::start_with(&[], bare);
    guest.backend = backend;
    assert!(matches!(adopt(&guest, socket), Outcome::Reconnected(_)));
    guest.interrupts();
    guest.complete(1);
    assert!(guest.interrupts().contains(&0x42));
    // They know no disabled rings: those of a link that is down are stopped.
    let running = |guest: &Guest, wanted: bool| {
        let end = std::time::Instant::now() + PATIENT;
        let kicks = || -> Vec<bool> {
            let recorder = guest.backend.lock();
            recorder.rings.iter().map(|r| r.kick.is_some()).collect()
        };
        while kicks() != [wanted; 2] {
            assert!(std::time::Instant::now() < end, "not {wanted}");
            std::thread::yield_now();
        }
    };
    guest.function.set_link(false);
    running(&guest, false);
    guest.backend.die();
    guest.function.on_event(EventSource::Hangup);
    let (backend, socket) = TestBackend::start_with(&[], bare);
    guest.backend = backend;
    assert!(matches!(adopt(&guest, socket), Outcome::Reconnected(_)));
    running(&guest, false);
    guest.ram.file.write_all_at(&[7, 0], 0x1_2002).unwrap();
    guest.function.set_link(true);
    running(&guest, true);
    assert_eq!(guest.backend.lock().rings[0].base, Some(7));
}

#[test]
fn back_ends_that_cannot_serve_are_refused_with_the_reason() {
    let refused = |options: VirtioPciOptions, change: &dyn Fn(&mut Recorder)| {
        let (_backend, socket) = TestBackend::start_with(&[], |recorder| change(recorder));
        let frontend = Frontend::connect(socket, PATIENT).unwrap();
        let decoder = BarDecoder::new(Arc::new(Bus::new()), WINDOWS);
        let hypervisor = Arc::new(MockHypervisor::default());
        let ram = Arc::new(Ram::new());
        let made = VirtioPciFunction::new(options, frontend, ram, hypervisor, &decoder);
        made.err().unwrap().to_string()
    };
    let one_pair = "device net0: its back-end serves 1 queues, not 2; ask for fewer";
    let text = refused(net_options(), &|r| {
        switch_with(PAIRS)(r);
        r.offered &= !net::F_MQ;
    });
    assert_eq!(text, one_pair);
    let text = refused(net_options(), &|r| {
        switch_with(PAIRS)(r);
        r.protocol = Protocol::REPLY_ACK;
    });
    assert_eq!(text, one_pair);
    let text = refused(net_options(), &|r| switch_with(1)(r));
    assert_eq!(text, one_pair);
    let too_many = VirtioPciOptions::external_net("net0", MAC, 128, 0);
    let text = refused(too_many, &|r| switch_with(128)(r));
    assert!(text.contains("queue pairs"), "{text}");

    let fs = VirtioPciOptions::external("fs0", 26, 2, None);
    let text = refused(fs, &|r| r.protocol = Protocol::MQ);
    assert_eq!(
        text,
        "device fs0: its back-end serves no configuration space: give one by config=HEX, of a file system by tag=NAME"
    );
    let decoder = BarDecoder::new(Arc::new(Bus::new()), WINDOWS);
    let hypervisor = Arc::new(MockHypervisor::default());
    let fs = VirtioPciOptions::external("fs0", 26, 2, Some(vec![0; 40]));
    let made = VirtioPciFunction::new(fs, None, Arc::new(Ram::new()), hypervisor, &decoder);
    assert!(matches!(made, Err(VirtioError::Absent(id)) if id == "fs0"));
}

#[test]
fn a_configuration_space_of_the_vmms_own_is_shown_as_it_is() {
    let (backend, socket) = TestBackend::start_with(&[], |r| r.protocol = Protocol::MQ);
    let ram = Ram::new();
    let options = VirtioPciOptions::external("fs0", 26, 2, Some(vec![7; 5]));
    let machine = machine(options, socket, Arc::new(ram.clone()));
    let guest = Guest {
        machine,
        backend,
        ram,
    };
    guest.bring_up();
    assert_eq!(guest.read(BAR + bar::DEVICE, 8), 0x07_0707_0707);
    guest.write(BAR + bar::DEVICE, 1, 9);
    assert_eq!(guest.read(BAR + bar::DEVICE, 1), 7);
    assert_eq!(guest.device_status(), 15);
}

#[test]
fn eight_pairs_with_large_queues_have_a_vector_each() {
    let (backend, socket) = TestBackend::start_with(&[], switch_with(8));
    let ram = Ram::new();
    let mut options = VirtioPciOptions::external_net("net0", MAC, 8, 0);
    options.queue_size = 1024;
    let machine = machine(options, socket, Arc::new(ram.clone()));
    let guest = Guest {
        machine,
        backend,
        ram,
    };
    guest.map();
    assert_eq!(guest.common(common::NUM_QUEUES, 2), 17);
    let msix = guest.capability(0x11, 0);
    assert_eq!(guest.read(Machine::config(msix + 2), 2), 17, "18 vectors");
    assert_eq!(guest.negotiate(), 11);
    for queue in 0..17 {
        guest.set_common(common::QUEUE_SELECT, 2, queue);
        assert_eq!(guest.common(common::QUEUE_SIZE, 2), 1024);
        let place = 0x1_0000 * (queue + 1);
        guest.set_common(common::QUEUE_DESC, 8, place);
        guest.set_common(common::QUEUE_DRIVER, 8, place + 0x4000);
        guest.set_common(common::QUEUE_DEVICE, 8, place + 0x8000);
        guest.set_common(common::QUEUE_VECTOR, 2, queue + 1);
        assert_eq!(guest.common(common::QUEUE_VECTOR, 2), queue + 1);
        guest.set_common(common::QUEUE_ENABLE, 2, 1);
    }
    guest.set_common(common::DEVICE_STATUS, 1, 15);
    assert_eq!(guest.device_status(), 15);
    let recorder = guest.backend.lock();
    assert!(recorder.rings.iter().all(|ring| ring.size == 1024));
    assert_eq!(recorder.rings.iter().filter(|ring| ring.enabled).count(), 2);
}
