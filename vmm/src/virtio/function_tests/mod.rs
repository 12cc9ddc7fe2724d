//! A virtio function behind a root port as a guest's driver meets it, with the `vhost`
//! crate's back-end behind it and a hypervisor that treats eventfds as KVM does.

mod any_access;
mod external;
mod filled;
mod guest;
mod killed;
mod memory;
mod races;
mod real_backends;
mod stood_in;
mod succession;
mod switches;

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::*;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::pci::PciFunction;
use crate::pci::mock_hypervisor::{MockHypervisor, consume, is_signalled};
use crate::vhost_user::BackendChannel;
use crate::vhost_user::test_backend::{FEATURES, Recorder, Ring, TestBackend};
use crate::virtio::registers::{common, status as bits};
use crate::virtio::{ConfigSource, DEFAULT_QUEUE_SIZE};
use guest::*;

#[test]
fn the_function_looks_as_the_specification_says() {
    let guest = guest();
    assert_eq!(guest.read(Machine::config(0), 4), 0x1042_1af4);
    assert_eq!(guest.read(Machine::config(8), 4), 0x0180_0001);
    // Sizing as Linux does it, decoding off.
    guest.write(Machine::config(0x10), 4, 0xffff_ffff);
    assert_eq!(guest.read(Machine::config(0x10), 4), 0xffff_8000);
    guest.write(Machine::config(0x14), 4, 0xffff_ffff);
    assert_eq!(guest.read(Machine::config(0x14), 4), 0, "no BAR 1");
    for (kind, offset, length) in [
        (1, bar::COMMON, 56),
        (2, bar::NOTIFY, 8),
        (3, bar::ISR, 1),
        (4, bar::DEVICE, 0x1000),
    ] {
        let at = guest.capability(9, kind);
        assert_eq!(guest.read(Machine::config(at + 4), 1), 0);
        assert_eq!(guest.read(Machine::config(at + 8), 4), offset);
        assert_eq!(guest.read(Machine::config(at + 12), 4), length);
    }
    let notify = guest.capability(9, 2);
    assert_eq!(guest.read(Machine::config(notify + 16), 4), 4);
    let msix = guest.capability(0x11, 0);
    assert_eq!(guest.read(Machine::config(msix + 2), 2), 2, "three vectors");
    assert_eq!(guest.read(Machine::config(msix + 4), 4), bar::MSIX_TABLE);
    assert_eq!(guest.read(Machine::config(msix + 8), 4), bar::MSIX_PBA);
    let express = guest.capability(0x10, 0);
    assert_eq!(
        guest.read(Machine::config(express + 2), 2),
        2,
        "an endpoint"
    );
    assert_eq!(
        guest.read(Machine::config(0x100), 4),
        0,
        "no extended capabilities"
    );
}

#[test]
fn data_and_interrupts_pass_the_vmm_by() {
    let guest = guest();
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    {
        let recorder = guest.backend.lock();
        assert_eq!(recorder.features, FEATURES, "with the transport's bit");
        assert_eq!(recorder.regions.len(), 1);
        let ring = &recorder.rings[1];
        assert_eq!(ring.size, u32::from(DEFAULT_QUEUE_SIZE));
        let user = |guest: u64| crate::vhost_user::user_address(guest).unwrap();
        let expected = [0x2_0000, 0x2_2000, 0x2_1000].map(user);
        assert_eq!((ring.addresses, ring.enabled), (Some(expected), true));
    }
    // A doorbell is one that KVM takes: the bus is not asked.
    assert!(guest.hypervisor.write(doorbell(1)));
    assert!(guest.kick_arrived(1) && !guest.kick_arrived(0));
    assert!(guest.hypervisor.write(doorbell(0)));
    assert!(guest.kick_arrived(0));
    guest.complete(0);
    assert_eq!(guest.interrupts(), [0x41]);
    guest.complete(1);
    assert_eq!(guest.interrupts(), [0x42]);
    let status = guest.function.status();
    assert!(status.active && !status.needs_reset && status.failure.is_none());
    assert_eq!(status.features, FEATURES & !(1 << 30));
}

#[test]
fn a_reset_takes_the_rings_back_and_the_device_comes_up_again() {
    let guest = guest();
    guest.bring_up();
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 0);
    {
        let recorder = guest.backend.lock();
        let stops = recorder
            .log
            .iter()
            .filter(|what| **what == "GET_VRING_BASE");
        assert_eq!(stops.count(), 2);
        assert!(
            recorder
                .rings
                .iter()
                .all(|ring| ring.kick.is_none() && !ring.enabled)
        );
    }
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    guest.complete(1);
    assert_eq!(guest.interrupts(), [0x42]);
}

#[test]
fn a_masked_completion_pends_until_it_is_unmasked() {
    let guest = guest();
    guest.bring_up();
    let entry = BAR + bar::MSIX_TABLE + 16;
    guest.write(entry + 12, 4, 1);
    guest.complete(0);
    assert!(guest.interrupts().is_empty());
    assert_eq!(guest.read(BAR + bar::MSIX_PBA, 8), 1 << 1);
    guest.write(entry + 12, 4, 0);
    assert_eq!(guest.interrupts(), [0x41]);
}

#[test]
fn a_queue_moves_to_another_vector_while_it_runs() {
    let guest = guest();
    guest.bring_up();
    guest.set_common(common::QUEUE_SELECT, 2, 0);
    guest.set_common(common::QUEUE_VECTOR, 2, 2);
    guest.complete(0);
    assert_eq!(guest.interrupts(), [0x42]);
    guest.set_common(common::QUEUE_VECTOR, 2, 0xffff);
    guest.complete(0);
    assert!(guest.interrupts().is_empty(), "a queue without a vector");
    assert_eq!(guest.device_status(), 15);
}

#[test]
fn a_malformed_ring_asks_for_a_reset_which_repairs_it() {
    let guest = guest();
    guest.bring_up();
    let error = guest.backend.lock().rings[1].error.take().unwrap();
    (&error).write_all(&1_u64.to_ne_bytes()).unwrap();
    let watched = guest.function.poll_fds();
    let fd = watched
        .iter()
        .find(|fd| fd.source == EventSource::RingError(1))
        .unwrap();
    assert!(is_signalled(&fd.fd));
    assert!(matches!(
        guest.function.on_event(fd.source),
        Outcome::Handled
    ));
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(guest.read(BAR + bar::ISR, 1), u64::from(ISR_CONFIG));
    assert_eq!(guest.read(BAR + bar::ISR, 1), 0, "reading acknowledges");
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
}

#[test]
fn rings_outside_memory_or_misaligned_cost_the_guest_its_device_only() {
    for descriptor in [
        RAM - 0xff0,
        RAM,
        u64::MAX - 0xf,
        0x1_0008,
        u64::MAX - 0x1000,
    ] {
        let guest = guest();
        guest.map();
        guest.enable_interrupts();
        guest.negotiate();
        guest.set_common(common::CONFIG_VECTOR, 2, 0);
        guest.set_common(common::QUEUE_DESC, 8, descriptor);
        guest.set_common(common::QUEUE_DRIVER, 8, 0x1000);
        guest.set_common(common::QUEUE_DEVICE, 8, 0x2000);
        guest.set_common(common::QUEUE_ENABLE, 2, 1);
        let before = guest.backend.lock().log.len();
        guest.set_common(common::DEVICE_STATUS, 1, 15);
        assert_eq!(
            guest.device_status(),
            15 | bits::NEEDS_RESET,
            "{descriptor:#x}"
        );
        assert_eq!(guest.interrupts(), [0x40]);
        assert_eq!(guest.backend.lock().log.len(), before, "nothing was sent");
        guest.bring_up();
        assert_eq!(guest.device_status(), 15);
    }
}

#[test]
fn a_refused_activation_asks_for_a_reset() {
    let guest = guest();
    guest.backend.lock().refuse = Some("SET_VRING_ADDR");
    guest.bring_up();
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    guest.backend.lock().refuse = None;
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    assert_eq!(guest.function.status().failure, None);
}

#[test]
fn a_dead_process_leaves_a_function_that_answers_sanely() {
    let guest = guest();
    guest.bring_up();
    guest.backend.die();
    let outcome = guest.function.on_event(EventSource::Hangup);
    assert!(matches!(outcome, Outcome::Failed(FailReason::Hangup)));
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(
        guest.read(BAR + bar::DEVICE, 4),
        0x0403_0201,
        "as last seen"
    );
    guest.write(BAR + bar::DEVICE, 1, 9);
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 0, "Linux waits for this");
    assert_eq!(
        guest.negotiate() & u64::from(bits::FEATURES_OK),
        0,
        "the driver gives up"
    );
}

#[test]
fn a_process_that_dies_during_activation_is_noticed_there() {
    let guest = guest();
    guest.map();
    guest.enable_interrupts();
    guest.negotiate();
    guest.set_common(common::CONFIG_VECTOR, 2, 0);
    guest.backend.die();
    guest.set_common(common::DEVICE_STATUS, 1, 15);
    assert_eq!(guest.device_status(), 15 | bits::NEEDS_RESET);
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(guest.function.status().failure, Some(FailReason::Hangup));
}

#[test]
fn device_configuration_is_cached_written_through_and_refreshed_on_change() {
    let guest = guest();
    guest.bring_up();
    let asked = |guest: &Guest| {
        let recorder = guest.backend.lock();
        recorder
            .log
            .iter()
            .filter(|what| **what == "GET_CONFIG")
            .count()
    };
    let before = asked(&guest);
    assert_eq!(guest.read(BAR + bar::DEVICE + 2, 2), 0x0403);
    assert_eq!(
        guest.read(BAR + bar::DEVICE + 6, 4),
        0x0807,
        "zeroes past the end"
    );
    assert_eq!(asked(&guest), before, "from the cache");
    guest.write(BAR + bar::DEVICE + 1, 1, 0xaa);
    assert_eq!(guest.backend.lock().config[1], 0xaa);
    assert_eq!(guest.read(BAR + bar::DEVICE, 2), 0xaa01);
    guest.write(BAR + bar::DEVICE + 7, 2, 0xffff);
    assert_eq!(guest.read(BAR + bar::DEVICE + 7, 1), 8, "not past the end");

    let generation = guest.common(20, 2) >> 8;
    guest.backend.lock().config[0] = 0x55;
    // The crate's back-end cannot send this message: a socket in its place.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let channel = BackendChannel::new(ours, true);
    guest.function.link.set_channel(channel);
    for word in [2_u32, 1, 0] {
        theirs.write_all(&word.to_ne_bytes()).unwrap();
    }
    let outcome = guest.function.on_event(EventSource::Backend);
    assert!(matches!(outcome, Outcome::Handled));
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(guest.common(20, 2) >> 8, generation + 1);
    assert_eq!(guest.read(BAR + bar::DEVICE, 1), 0x55);
    drop(theirs);
    let outcome = guest.function.on_event(EventSource::Backend);
    assert!(matches!(outcome, Outcome::Failed(FailReason::Hangup)));
}

#[test]
fn the_bar_moves_with_its_doorbells_and_only_inside_the_windows() {
    let guest = guest();
    assert_eq!(guest.function.bar_address(), None);
    guest.map();
    assert_eq!(guest.function.bar_address(), Some(BAR));
    assert_eq!(guest.hypervisor.doorbells(), [doorbell(0), doorbell(1)]);
    guest.write(Machine::config(0x10), 4, BAR + 0x8000);
    assert_eq!(
        guest.hypervisor.doorbells(),
        [doorbell(0), doorbell(1)].map(|a| a + 0x8000)
    );
    for outside in [
        0,
        0x10_0000,
        layout::ECAM_START,
        layout::IOAPIC_START,
        0xffff_8000,
    ] {
        guest.write(Machine::config(0x10), 4, outside);
        assert_eq!(guest.function.bar_address(), None, "{outside:#x}");
        assert!(guest.hypervisor.doorbells().is_empty());
    }
    guest.map();
    guest.write(Machine::config(0x04), 2, 0);
    assert_eq!(guest.function.bar_address(), None, "decoding off");
}

#[test]
fn the_configuration_window_reaches_the_bar_and_no_further() {
    let guest = guest();
    let window = guest.capability(9, 5);
    let aim = |offset: u64, length: u64| {
        guest.write(Machine::config(window + 8), 4, offset);
        guest.write(Machine::config(window + 12), 4, length);
    };
    aim(common::NUM_QUEUES, 2);
    assert_eq!(guest.read(Machine::config(window + 16), 2), 2);
    aim(common::QUEUE_SELECT, 2);
    guest.write(Machine::config(window + 16), 2, 1);
    aim(common::QUEUE_NOTIFY_OFF, 2);
    assert_eq!(guest.read(Machine::config(window + 16), 2), 1);
    guest.write(Machine::config(window + 16), 4, 0);
    for (offset, length) in [
        (bar::SIZE, 4),
        (bar::SIZE - 2, 4),
        (0xffff_fffc, 4),
        (1, 2),
        (0, 3),
        (0, 8),
        (0, 0),
    ] {
        aim(offset, length);
        guest.write(Machine::config(window + 16), 4, 0x1234_5678);
        let read = guest.read(Machine::config(window + 16), 4);
        assert_eq!(
            read, 0x1234_5678,
            "{offset:#x}+{length}: a register, no access"
        );
    }
    guest.write(Machine::config(window + 4), 1, 1);
    aim(common::NUM_QUEUES, 2);
    assert_eq!(
        guest.read(Machine::config(window + 16), 4),
        0x1234_5678,
        "no BAR 1"
    );
}

#[test]
fn a_doorbell_through_the_configuration_window_arrives() {
    let guest = guest();
    guest.bring_up();
    let window = guest.capability(9, 5);
    guest.write(Machine::config(window + 8), 4, bar::NOTIFY + 4);
    guest.write(Machine::config(window + 12), 4, 2);
    guest.write(Machine::config(window + 16), 2, 1);
    let kick = guest.backend.lock().rings[1].kick.take().unwrap();
    // Written by another thread: wait for it.
    let mut fds = [rustix::event::PollFd::new(
        &kick,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
    assert!(consume(&kick));
}

#[test]
fn a_removed_function_leaves_nothing_behind() {
    let mut guest = guest();
    guest.bring_up();
    assert_eq!(guest.hypervisor.gsis(), 3);
    let removed = guest.complex.detach("hp1", &guest.function).unwrap();
    assert_eq!(guest.read(Machine::config(0), 4), 0xffff_ffff);
    assert!(!guest.mmio.read(BAR, &mut [0; 4]));
    assert!(guest.hypervisor.doorbells().is_empty());
    assert_eq!(guest.hypervisor.irqfds(), 0);
    // A vCPU that was on its way in when it happened.
    guest.function.config_write(0x04, &[6, 0]);
    guest
        .function
        .config_write(0x10, &(BAR as u32).to_le_bytes());
    assert!(!guest.mmio.read(BAR, &mut [0; 4]));
    let weak = Arc::downgrade(&guest.function);
    drop(removed);
    let (backend, socket) = TestBackend::start(&[0; 8]);
    guest.function = VirtioPciFunction::new(
        options(),
        Frontend::connect(socket, PATIENT).unwrap(),
        Arc::new(Ram::new()),
        guest.hypervisor.clone(),
        guest.complex.decoder(),
    )
    .unwrap();
    // Its own thread holds it while it looks at it.
    let end = std::time::Instant::now() + PATIENT;
    while weak.upgrade().is_some() {
        assert!(std::time::Instant::now() < end, "somebody keeps it");
        std::thread::yield_now();
    }
    assert_eq!(guest.hypervisor.gsis(), 0);
    guest.backend = backend;
    guest.complex.attach("hp1", guest.function.clone()).unwrap();
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
}

#[test]
fn a_bus_reset_returns_the_function_to_its_first_state() {
    let guest = guest();
    guest.bring_up();
    guest.write(layout::ECAM_START | 1 << 15 | 0x3e, 2, 0x40);
    assert_eq!(guest.function.bar_address(), None);
    assert_eq!(guest.read(Machine::config(0x04), 2), 0);
    assert_eq!(guest.hypervisor.irqfds(), 0);
    guest.bring_up();
    guest.complete(0);
    assert_eq!(guest.interrupts(), [0x41]);
}

#[test]
fn a_reset_of_the_machine_returns_every_function_and_its_bars() {
    let guest = guest();
    let first: Vec<u64> = (0..64)
        .map(|n| guest.read(Machine::config(n * 4), 4))
        .collect();
    for _ in 0..3 {
        guest.bring_up();
        guest.write(Machine::config(0x3c), 1, 0x55);
        guest.complex.reset();
        assert_eq!(guest.function.bar_address(), None);
        assert_eq!(guest.hypervisor.irqfds(), 0);
        let now: Vec<u64> = (0..64)
            .map(|n| guest.read(Machine::config(n * 4), 4))
            .collect();
        assert_eq!(now, first);
        assert!(!guest.function.status().active);
    }
    guest.bring_up();
    guest.complete(0);
    assert_eq!(guest.interrupts(), [0x41]);
}

#[test]
fn options_are_checked_against_limits_and_the_process() {
    let refused = |change: fn(&mut VirtioPciOptions), process: fn(&mut Recorder)| {
        let (_backend, socket) = TestBackend::start_with(&[0; 8], process);
        let mut options = options();
        change(&mut options);
        let frontend = Frontend::connect(socket, PATIENT).unwrap();
        let decoder = BarDecoder::new(Arc::new(Bus::new()), WINDOWS);
        let hypervisor = Arc::new(MockHypervisor::default());
        let made = VirtioPciFunction::new(
            options,
            frontend,
            Arc::new(Ram::new()),
            hypervisor,
            &decoder,
        );
        made.err().unwrap().to_string()
    };
    let text = refused(|o| o.queues = 3, |_| {});
    assert_eq!(
        text,
        "device disk0: its back-end serves 2 queues, not 3; ask for fewer"
    );
    assert!(refused(|o| o.queues = 0, |_| {}).contains("queues"));
    assert!(refused(|o| o.queue_size = 100, |_| {}).contains("queue size"));
    assert!(refused(|o| o.queue_size = 2048, |_| {}).contains("queue size"));
    assert!(refused(|o| o.device_type = 64, |_| {}).contains("device type"));
    assert!(refused(|o| o.config = ConfigSource::Backend(257), |_| {}).contains("256"));
    let text = refused(|_| {}, |process| process.offered = 1 << 30);
    assert_eq!(
        text,
        "device disk0: its back-end does not offer VIRTIO_F_VERSION_1"
    );
    let text = refused(|o| o.config = ConfigSource::Backend(9), |_| {});
    assert_eq!(text, "device disk0: the back-end refused GET_CONFIG");
}
