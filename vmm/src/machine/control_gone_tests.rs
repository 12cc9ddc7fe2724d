//! What a device process says of the host's side of it: a tap that was deleted.

use super::*;

fn of_tap(tap: &str) -> Bed {
    let mut bed = bed();
    bed.control.about.tap = tap.to_owned();
    bed
}

fn gone() -> Answer {
    let mut health = HealthResponse::new();
    health.host_gone = true;
    Ok(health.write_to_bytes().unwrap())
}

fn look(bed: &mut Bed) -> Result<bool, Breach> {
    bed.turn(|control, _| control.ask_health()).unwrap();
    bed.device_answers(|_, _| gone());
    bed.readable()
}

#[test]
fn what_is_gone_on_the_host_is_told_once() {
    let mut bed = of_tap("tap0");
    for _ in 0..3 {
        look(&mut bed).unwrap();
    }
    let told = |bed: &Bed| {
        bed.notices
            .iter()
            .filter(|n| **n == Notice::HostGone)
            .count()
    };
    assert_eq!((told(&bed), bed.control.host_gone()), (1, true));
    // Another process of the device has the same tap.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = BlockingClient::new(ours, CONTROL_MAX_FRAME);
    let client = client.into_async(AsyncLimits::default()).unwrap();
    bed.control = bed.control.successor(client);
    bed.device = ControlServer::new(theirs, CONTROL_MAX_FRAME);
    assert!(bed.control.host_gone());
    look(&mut bed).unwrap();
    assert_eq!(told(&bed), 1);
}

#[test]
fn a_device_without_a_tap_that_says_it_is_gone_is_given_up() {
    let mut bed = of_tap("");
    assert!(matches!(look(&mut bed), Err(Breach::Protocol(_))));
    assert!(bed.notices.is_empty() && !bed.control.host_gone());
}
