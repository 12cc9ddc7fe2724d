//! A launcher that says what it should not: the client has an error for it, never a hang,
//! a panic or a leak.

use super::*;
use crate::launcher::packet::Packet;
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

fn answer(here: &PacketSocket, inbox: &mut Inbox, id: u64) -> Result<Answer, LauncherError> {
    within(Duration::from_secs(20), here, inbox, id)
}

fn within(
    limit: Duration,
    here: &PacketSocket,
    inbox: &mut Inbox,
    id: u64,
) -> Result<Answer, LauncherError> {
    receive(here, inbox, id, Instant::now() + limit, "test")
}

#[test]
fn events_beside_a_reply_are_kept_and_late_replies_are_dropped() {
    let (here, there) = ends();
    let (pipe, _write) = sys::pipe().unwrap();
    let mut inbox = Inbox::default();
    // 6 was given up; its descriptor must not stay.
    there.send(&reply(6, None), &[pipe.as_fd()], None).unwrap();
    there.send(&exited("disk0", 1), &[], None).unwrap();
    there.send(&reply(7, None), &[], None).unwrap();
    there.send(&exited("disk0", 2), &[], None).unwrap();
    let (got, fds, _) = answer(&here, &mut inbox, 7).unwrap();
    assert_eq!((got.id, fds.len(), inbox.events.len()), (7, 0, 1));
    // Nothing more that answers 8: the deadline ends the wait, and the event is not lost.
    assert!(matches!(
        within(Duration::from_millis(500), &here, &mut inbox, 8),
        Err(LauncherError::Deadline(_))
    ));
    assert_eq!(inbox.events.len(), 2);
    drop(there);
    assert!(matches!(
        answer(&here, &mut inbox, 9),
        Err(LauncherError::Gone)
    ));
}

#[test]
fn a_flood_of_events_is_a_breach_and_not_a_growing_queue() {
    let (here, there) = ends();
    let mut inbox = Inbox::default();
    let mut result = Ok(None);
    for incarnation in 0..=MAX_EVENTS as u64 {
        there
            .send(&exited("disk0", incarnation), &[], None)
            .unwrap();
        result = take(here.receive().unwrap().unwrap(), &mut inbox, 1);
    }
    assert!(result.is_err_and(|error| error.is_gone()));
    assert_eq!(inbox.events.len(), MAX_EVENTS);
    there.send(&exited("bad id", 0), &[], None).unwrap();
    assert!(answer(&here, &mut Inbox::default(), 1).is_err_and(|error| error.is_gone()));
}

#[test]
fn an_answer_that_nobody_waits_for_is_an_event_once() {
    let (here, there) = ends();
    let mut inbox = Inbox::default();
    inbox.begun.extend([5, 6]);
    let grown = wire::Grown {
        size: 4096,
        ..Default::default()
    };
    let yes = reply(5, Some(wire::reply::Result::Grown(grown)));
    let no = wire::Reply {
        id: 6,
        error: "disk full\x1b".into(),
        ..Default::default()
    };
    there.send(&yes, &[], None).unwrap();
    there.send(&yes, &[], None).unwrap();
    there
        .send(&no.write_to_bytes().unwrap(), &[], None)
        .unwrap();
    there.send(&reply(7, None), &[], None).unwrap();
    answer(&here, &mut inbox, 7).unwrap();
    let expected = [
        LauncherEvent::Grown {
            ticket: 5,
            result: Ok(4096),
        },
        LauncherEvent::Grown {
            ticket: 6,
            result: Err("disk full\\u{1b}".into()),
        },
    ];
    assert_eq!(Vec::from(inbox.events), expected);

    let mut inbox = Inbox::default();
    inbox.begun.insert(8);
    there.send(&reply(8, None), &[], None).unwrap();
    assert!(answer(&here, &mut inbox, 9).is_err_and(|error| error.is_gone()));
}

proptest! {
    #[test]
    fn no_packet_whatever_makes_the_client_panic(bytes in prop::collection::vec(any::<u8>(), 1..600), id in 0..3u64) {
        let mut inbox = Inbox::default();
        let _ = take(Packet { bytes, ..Packet::default() }, &mut inbox, id);
        prop_assert!(inbox.events.len() <= 1);
    }
}
