//! Processes that die, lie and are given up while guest, manager and successors are at
//! work.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::succession::{DESCRIPTORS, lost, patient, patient_guest, succeed, works};
use super::*;

#[test]
fn a_reset_waits_for_the_io_of_a_lost_process_where_it_can_outlive_it() {
    let fenced = VirtioPciOptions {
        fenced: true,
        ..patient()
    };
    let mut guest = guest_with(fenced.clone());
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 15, "not yet");
    assert_eq!(guest.common(18, 4), 0x000f_0002, "in a wider read too");
    guest.set_common(common::DEVICE_STATUS, 1, 1);
    assert_eq!(guest.device_status(), 15, "nothing is set up before");
    guest.function.quiesced();
    assert_eq!(guest.device_status(), 0);
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    succeed(&mut guest, |_| {}).unwrap();
    works(&guest);

    // A successor says it, too.
    guest.backend.die();
    lost(&guest);
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 15);
    succeed(&mut guest, |_| {}).unwrap();
    assert_eq!(guest.device_status(), 0);

    // And so it is for a process that is given up while it stops.
    let guest = guest_with(VirtioPciOptions {
        successor: false,
        ..fenced
    });
    guest.bring_up();
    let number = guest.backend.lock().log.len();
    guest.backend.lock().dies_at = Some(number);
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.device_status(), 15);
    guest.function.quiesced();
    assert_eq!(guest.device_status(), 0);
}

#[test]
fn a_driver_may_begin_anew_with_a_device_that_was_given_up() {
    let fenced = VirtioPciOptions {
        fenced: true,
        ..patient()
    };
    let mut guest = guest_with(fenced);
    guest.bring_up();
    guest.backend.die();
    lost(&guest);
    guest.function.fail(FailReason::Stopped("too often".into()));
    guest.function.quiesced();
    assert!(!guest.function.take_reset());
    // What it sets up is kept for a process that may come.
    guest.bring_up();
    assert_eq!(guest.device_status(), 15);
    assert!(guest.function.take_reset() && !guest.function.take_reset());
    succeed(&mut guest, |_| {}).unwrap();
    works(&guest);
}

#[test]
fn the_manager_never_waits_for_a_vcpu_that_waits_for_the_process() {
    let guest = patient_guest();
    guest.bring_up();
    let function = Arc::clone(&guest.function);
    // As a vCPU holds it through an activation.
    let held = guest.function.lock_device();
    let (said, heard) = std::sync::mpsc::channel();
    let manager = std::thread::spawn(move || {
        function.poll_fds();
        function.status();
        function.set_link(false);
        for source in [
            EventSource::RingError(0),
            EventSource::Backend,
            EventSource::Hangup,
            EventSource::Successor,
        ] {
            function.on_event(source);
        }
        function.suspend(FailReason::Hangup);
        function.quiesced();
        let (socket, _other) = UnixStream::pair().unwrap();
        function.adopt(socket).unwrap();
        function.fail(FailReason::Hangup);
        said.send(()).unwrap();
    });
    heard.recv_timeout(PATIENT).expect("the manager waits");
    drop(held);
    manager.join().unwrap();
}

#[test]
fn a_driver_that_comes_and_goes_while_processes_do_is_served_in_the_end() {
    let mut guest = patient_guest();
    guest.map();
    guest.enable_interrupts();
    let stop = AtomicBool::new(false);
    let mut backends = Vec::new();
    std::thread::scope(|scope| {
        let machine = &guest.machine;
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                machine.negotiate();
                machine.set_up_queue(0, DESCRIPTORS[0]);
                machine.set_up_queue(1, DESCRIPTORS[1]);
                machine.set_common(common::DEVICE_STATUS, 1, 15);
                machine.write(BAR + bar::DEVICE, 1, 9);
                machine.read(BAR + bar::DEVICE, 8);
                machine.set_common(common::QUEUE_VECTOR, 2, 2);
            }
        });
        for number in 0..200 {
            let die_at = (number % 3 == 0).then_some(number % 24);
            let (backend, socket) = TestBackend::start_with(&CONFIG, |r| r.dies_at = die_at);
            if machine.function.adopt(socket).is_ok() {
                while matches!(
                    machine.function.on_event(EventSource::Successor),
                    Outcome::Handled
                ) {
                    std::thread::yield_now();
                }
            }
            backend.die();
            machine.function.on_event(EventSource::Hangup);
            backends.push(backend);
        }
        stop.store(true, Ordering::Release);
    });
    succeed(&mut guest, |_| {}).unwrap();
    guest.bring_up();
    guest.hypervisor.write(doorbell(0));
    guest.hypervisor.write(doorbell(1));
    works(&guest);
}

/// Does what a driver does under the filter of a vCPU thread: a call that the filter lacks
/// would end the test's process. False where the filter may not be installed.
fn as_vcpu(machine: &Machine, access: impl FnOnce(&Machine) + Send) -> bool {
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let confined = crate::confine::vcpu_hook()().is_ok();
            if confined {
                access(machine);
            }
            confined
        });
        vcpu.join().unwrap()
    })
}

#[test]
fn a_vcpus_filter_admits_all_that_a_process_can_make_it_do() {
    let mut number = 0;
    loop {
        let guest = patient_guest();
        // What needs the mock hypervisor's own calls comes first.
        guest.map();
        guest.enable_interrupts();
        let window = guest.capability(9, 5);
        // In turn: nothing wrong, a death, a lie.
        let mut backend = guest.backend.lock();
        let messages = backend.log.len();
        match number % 3 {
            0 => {}
            1 => backend.dies_at = Some(messages + number / 3),
            _ => backend.garbage_at = Some((messages + number / 3, vec![0xff; 40])),
        }
        drop(backend);
        let ran = as_vcpu(&guest.machine, |machine| {
            machine.negotiate();
            machine.set_up_queue(0, DESCRIPTORS[0]);
            machine.set_up_queue(1, DESCRIPTORS[1]);
            machine.set_common(common::DEVICE_STATUS, 1, 15);
            machine.write(BAR + bar::DEVICE, 1, 9);
            machine.read(BAR + bar::DEVICE, 8);
            machine.set_common(common::QUEUE_VECTOR, 2, 2);
            // A doorbell that KVM does not see.
            machine.write(Machine::config(window + 8), 4, bar::NOTIFY + 4);
            machine.write(Machine::config(window + 12), 4, 2);
            machine.write(Machine::config(window + 16), 2, 1);
            machine.set_common(common::DEVICE_STATUS, 1, 0);
        });
        if !ran {
            eprintln!("skipped: a filter may not be installed here");
            return;
        }
        assert_eq!(guest.device_status(), 0);
        assert!(!guest.function.status().needs_reset);
        let lost = guest.function.status().awaiting.is_some();
        if !lost && number > 0 && number % 3 != 0 {
            break;
        }
        number += 1;
    }
    assert!(number > 60, "{number}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a process says at whatever message: it is hung up on, and the next one
    /// takes over.
    #[test]
    fn a_process_that_lies_at_any_message_is_succeeded(
        first in 0_usize..30,
        second in 0_usize..30,
        garbage in proptest::collection::vec(any::<u8>(), 1..64),
        reset in any::<bool>(),
    ) {
        let mut guest = patient_guest();
        guest.backend.lock().garbage_at = Some((first, garbage.clone()));
        guest.bring_up();
        if reset {
            guest.set_common(common::DEVICE_STATUS, 1, 0);
        }
        guest.backend.die();
        guest.function.on_event(EventSource::Hangup);
        let (backend, socket) = TestBackend::start_with(&CONFIG, |recorder| {
            recorder.garbage_at = Some((second, garbage));
        });
        if let Ok(frontend) = Frontend::connect(socket, PATIENT) {
            let _ = guest.function.reconnect(frontend);
        }
        backend.die();
        guest.function.on_event(EventSource::Hangup);
        prop_assert!(guest.function.status().awaiting.is_some());
        prop_assert_eq!(guest.function.status().needs_reset, false);
        succeed(&mut guest, |_| {}).unwrap();
        if reset {
            guest.bring_up();
            guest.hypervisor.write(doorbell(0));
            guest.hypervisor.write(doorbell(1));
        }
        works(&guest);
    }
}

#[test]
fn the_functions_own_threads_work_under_the_filter_of_a_running_machine() {
    let options = VirtioPciOptions {
        hook: crate::confine::helper_hook(),
        ..patient()
    };
    let may = std::thread::spawn(|| crate::confine::helper_hook()().is_ok());
    if !may.join().unwrap() {
        eprintln!("skipped: a filter may not be installed here");
        return;
    }
    let mut guest = guest_with(options);
    guest.bring_up();
    let adopted = |guest: &Guest, socket| {
        guest.function.adopt(socket).unwrap();
        loop {
            match guest.function.on_event(EventSource::Successor) {
                Outcome::Handled => std::thread::yield_now(),
                outcome => return matches!(outcome, Outcome::Reconnected(_)),
            }
        }
    };
    let mut number = 0;
    loop {
        guest.backend.die();
        lost(&guest);
        // In turn: one that dies, one that lies.
        let (backend, socket) = TestBackend::start_with(&CONFIG, |recorder| match number % 2 {
            0 => recorder.dies_at = Some(number / 2),
            _ => recorder.garbage_at = Some((number / 2, vec![0xff; 40])),
        });
        let done = adopted(&guest, socket);
        drop(backend);
        if done {
            guest.function.on_event(EventSource::Hangup);
        }
        let (backend, socket) = TestBackend::start(&CONFIG);
        assert!(adopted(&guest, socket), "{number}");
        guest.backend = backend;
        works(&guest);
        if done && number % 2 == 1 {
            break;
        }
        number += 1;
    }
    assert!(number > 30, "{number}");
}

#[test]
fn a_process_that_closes_half_of_its_channel_is_lost() {
    for successor in [true, false] {
        let guest = guest_with(VirtioPciOptions {
            successor,
            ..patient()
        });
        guest.bring_up();
        let watched = guest.function.link_fds();
        let hangup = watched.iter().find(|p| p.source == EventSource::Hangup);
        let epoll = Epoll::new().unwrap();
        let hangup = hangup.unwrap();
        epoll
            .ctl(
                ControlOperation::Add,
                hangup.fd.as_raw_fd(),
                EpollEvent::new(EventSet::from_bits_truncate(hangup.events), 0),
            )
            .unwrap();
        let mut events = [EpollEvent::default()];
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
        // It goes on to read, and serves its rings.
        guest.backend.close_half();
        assert_eq!(epoll.wait(30_000, &mut events).unwrap(), 1);
        match guest.function.on_event(EventSource::Hangup) {
            Outcome::Suspended(FailReason::Hangup) if successor => {}
            Outcome::Failed(FailReason::Hangup) if !successor => {}
            other => panic!("{other:?}"),
        }
    }
}
