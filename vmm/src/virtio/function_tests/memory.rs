//! Memory that comes and goes under a driver that is up.

use super::*;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const MORE: u64 = 4 << 30;

/// A guest whose back-end takes regions one by one, or not.
fn plugged(takes: bool) -> Guest {
    let ram = Ram::new();
    let (backend, socket) = TestBackend::start_with(&CONFIG, |recorder| {
        recorder.protocol |= Protocol::REPLY_ACK;
        if takes {
            recorder.protocol |= Protocol::CONFIGURE_MEM_SLOTS;
        }
    });
    let machine = machine(options(), socket, Arc::new(ram.clone()));
    Guest {
        machine,
        backend,
        ram,
    }
}

fn told(guest: &Guest) -> Vec<&'static str> {
    let mut recorder = guest.backend.lock();
    let log = std::mem::take(&mut recorder.log);
    log.into_iter()
        .filter(|what| what.contains("MEM"))
        .collect()
}

#[test]
fn a_device_in_use_is_told_of_each_region_once() {
    let guest = plugged(true);
    assert!(guest.function.takes_regions(8) && !guest.function.takes_regions(9));
    // Before a driver is up there is nothing to tell.
    guest.ram.more.lock().unwrap().push(MORE);
    guest.function.sync_memory().unwrap();
    assert!(told(&guest).is_empty());
    guest.bring_up();
    assert_eq!(told(&guest), ["SET_MEM_TABLE"]);
    assert_eq!(guest.backend.lock().regions.len(), 2);
    guest.function.sync_memory().unwrap();
    assert!(told(&guest).is_empty());

    guest.ram.more.lock().unwrap().push(2 * MORE);
    guest.function.sync_memory().unwrap();
    guest.function.sync_memory().unwrap();
    assert_eq!(told(&guest), ["ADD_MEM_REG"]);
    guest.ram.more.lock().unwrap().remove(0);
    guest.function.sync_memory().unwrap();
    assert_eq!(told(&guest), ["REM_MEM_REG"]);
    // A reset and another driver: all of it anew.
    guest.set_common(common::DEVICE_STATUS, 1, 0);
    guest.ram.more.lock().unwrap().clear();
    guest.function.sync_memory().unwrap();
    guest.bring_up();
    assert_eq!(told(&guest), ["SET_MEM_TABLE"]);
    assert_eq!(guest.backend.lock().regions.len(), 1);
}

#[test]
fn a_device_that_cannot_be_told_serves_on_without() {
    let guest = plugged(false);
    assert!(!guest.function.takes_regions(1));
    guest.bring_up();
    guest.ram.more.lock().unwrap().push(MORE);
    assert!(guest.function.sync_memory().is_err());
    guest.ram.more.lock().unwrap().clear();
    guest.function.sync_memory().unwrap();
    assert_eq!(told(&guest), ["SET_MEM_TABLE"]);
    assert_eq!(guest.device_status(), 15);

    let guest = plugged(true);
    guest.bring_up();
    guest.backend.lock().refuse = Some("ADD_MEM_REG");
    guest.ram.more.lock().unwrap().push(MORE);
    assert!(guest.function.sync_memory().is_err());
    guest.ram.more.lock().unwrap().clear();
    guest.function.sync_memory().unwrap();
    assert_eq!(told(&guest), ["SET_MEM_TABLE", "ADD_MEM_REG"]);
    assert_eq!(guest.device_status(), 15);
}

#[test]
fn a_device_that_keeps_memory_that_was_taken_back_is_lost() {
    let guest = plugged(true);
    guest.ram.more.lock().unwrap().push(MORE);
    guest.bring_up();
    guest.backend.lock().refuse = Some("REM_MEM_REG");
    guest.ram.more.lock().unwrap().clear();
    guest.function.sync_memory().unwrap();
    assert_eq!(guest.function.status().failure, Some(FailReason::Keeps));
}

#[test]
fn one_that_dies_over_it_counts_as_told() {
    let guest = plugged(true);
    guest.bring_up();
    guest.ram.more.lock().unwrap().push(MORE);
    guest.backend.die();
    guest.function.sync_memory().unwrap();
    assert!(guest.function.status().failure.is_some());
    guest.function.sync_memory().unwrap();
}

#[test]
fn a_configuration_space_of_the_vmms_own_changes_when_it_says_so() {
    let mut own = options();
    own.config = ConfigSource::Fixed(vec![1; 8]);
    let guest = guest_with(own);
    guest.bring_up();
    let generation = guest.common(20, 2) >> 8;
    guest.function.set_config(vec![2; 8], false);
    assert!(guest.interrupts().is_empty());
    assert_eq!(guest.read(BAR + bar::DEVICE, 4), 0x0202_0202);
    assert_eq!(guest.common(20, 2) >> 8, generation + 1);
    guest.function.set_config(vec![3; 8], true);
    guest.function.set_config(vec![3; 8], true);
    guest.function.set_config(vec![4; 7], true);
    assert_eq!(guest.interrupts(), [0x40]);
    assert_eq!(guest.read(BAR + bar::DEVICE, 4), 0x0303_0303);
}
