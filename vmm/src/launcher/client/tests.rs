//! A launcher that says what it should not: the client has an error for it, never a hang,
//! a panic or a leak.

use super::*;
use proptest::prelude::*;

/// A client's end and the end of whoever plays the launcher.
fn ends() -> (PacketSocket, PacketSocket) {
    PacketSocket::pair().unwrap()
}

fn reply(id: u64, result: Option<wire::reply::Result>) -> Vec<u8> {
    wire::Reply {
        id,
        result,
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap()
}

fn exited(device_id: &str, incarnation: u64) -> Vec<u8> {
    let exited = wire::Exited {
        device_id: device_id.into(),
        incarnation,
        signal: 9,
        ..Default::default()
    };
    reply(0, Some(wire::reply::Result::Exited(exited)))
}

fn answer(
    here: &PacketSocket,
    events: &mut VecDeque<LauncherEvent>,
    id: u64,
) -> Result<Answer, LauncherError> {
    receive(
        here,
        events,
        id,
        Instant::now() + Duration::from_millis(1),
        "test",
    )
}

#[test]
fn events_beside_a_reply_are_kept_and_late_replies_are_dropped() {
    let (here, there) = ends();
    let (pipe, _write) = sys::pipe().unwrap();
    let mut events = VecDeque::new();
    // 6 was given up; its descriptor must not stay.
    there.send(&reply(6, None), &[pipe.as_fd()], None).unwrap();
    there.send(&exited("disk0", 1), &[], None).unwrap();
    there.send(&reply(7, None), &[], None).unwrap();
    there.send(&exited("disk0", 2), &[], None).unwrap();
    let (got, fds, _) = answer(&here, &mut events, 7).unwrap();
    assert_eq!((got.id, fds.len(), events.len()), (7, 0, 1));
    // Nothing more that answers 8: the deadline ends the wait, and the event is not lost.
    assert!(matches!(
        answer(&here, &mut events, 8),
        Err(LauncherError::Deadline(_))
    ));
    assert_eq!(events.len(), 2);
    drop(there);
    assert!(matches!(
        answer(&here, &mut events, 9),
        Err(LauncherError::Gone)
    ));
}

#[test]
fn a_flood_of_events_is_a_breach_and_not_a_growing_queue() {
    let (here, there) = ends();
    let mut events = VecDeque::new();
    let mut result = Ok(None);
    for incarnation in 0..=MAX_EVENTS as u64 {
        there
            .send(&exited("disk0", incarnation), &[], None)
            .unwrap();
        result = take(here.receive().unwrap().unwrap(), &mut events, 1);
    }
    assert!(result.is_err_and(|error| error.is_gone()));
    assert_eq!(events.len(), MAX_EVENTS);
    there.send(&exited("bad id", 0), &[], None).unwrap();
    assert!(answer(&here, &mut VecDeque::new(), 1).is_err_and(|error| error.is_gone()));
}

proptest! {
    #[test]
    fn no_packet_whatever_makes_the_client_panic(bytes in prop::collection::vec(any::<u8>(), 1..600), id in 0..3u64) {
        let mut events = VecDeque::new();
        let _ = take(Packet { bytes, ..Packet::default() }, &mut events, id);
        prop_assert!(events.len() <= 1);
    }
}
