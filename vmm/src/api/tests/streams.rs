//! The Events stream.

use std::io::Write;
use std::time::Duration;

use bulkhead_proto::client::ClientError;
use bulkhead_proto::machine::{Event, EventsRequest, InfoRequest};
use bulkhead_proto::stubs::{asynchronous, ttrpc};
use bulkhead_proto::{Code, MACHINE_SERVICE};

use super::*;

#[test]
fn the_reference_asynchronous_client_follows_events() {
    let fixture = Fixture::prompt();
    fixture.events.publish("machine.created", "", "");
    fixture.events.publish("device.ready", "disk0", "");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = ttrpc::r#async::Client::connect(&fixture.address())
            .await
            .unwrap();
        let machine = asynchronous::machine_ttrpc::MachineClient::new(client);
        let context = || ttrpc::context::with_duration(Duration::ZERO);
        let mut stream = machine
            .events(context(), &EventsRequest::new())
            .await
            .unwrap();
        let first = stream.recv().await.unwrap().unwrap();
        assert_eq!(
            (first.sequence, first.kind.as_str()),
            (1, "machine.created")
        );
        let second = stream.recv().await.unwrap().unwrap();
        assert_eq!((second.sequence, second.subject.as_str()), (2, "disk0"));
        // Unary calls go on beside the stream.
        let answer = machine
            .info(ttrpc::context::with_duration(LONG), &InfoRequest::new())
            .await;
        assert_eq!(answer.unwrap().version, "test");
        fixture.events.publish("machine.running", "", "");
        assert_eq!(
            stream.recv().await.unwrap().unwrap().kind,
            "machine.running"
        );

        let mut some = EventsRequest::new();
        some.from = 2;
        some.backlog_only = true;
        let mut stream = machine.events(context(), &some).await.unwrap();
        assert_eq!(stream.recv().await.unwrap().unwrap().sequence, 2);
        assert_eq!(stream.recv().await.unwrap().unwrap().sequence, 3);
        assert!(
            stream.recv().await.unwrap().is_none(),
            "the backlog ends cleanly"
        );
    });
}

#[test]
fn a_subscriber_that_falls_behind_is_told_and_costs_nothing() {
    let fixture = Fixture::new(
        Prompt,
        Limits {
            backlog: 2000,
            ..Limits::default()
        },
        EventLog::with_capacity(50),
    );
    let mut stream = fixture
        .client()
        .subscribe::<_, Event>(MACHINE_SERVICE, "Events", &EventsRequest::new(), LONG)
        .unwrap();
    fixture.events.publish("first", "", "");
    assert_eq!(stream.next(Some(LONG)).unwrap().unwrap().kind, "first");
    // More than the socket, the server's backlog and the ring hold together.
    for _ in 0..20_000 {
        fixture.events.publish("flood", "", &"x".repeat(1000));
    }
    let mut expected = 2;
    loop {
        match stream.next(Some(LONG)) {
            Ok(Some(event)) => {
                assert_eq!(event.sequence, expected, "no event is skipped in silence");
                expected += 1;
            }
            Err(ClientError::Status(status)) => {
                assert_eq!(status.code, Code::OutOfRange);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(expected < 20_000);
}

#[test]
fn events_that_are_gone_are_told_to_a_reader_that_asks_for_gaps() {
    let fixture = Fixture::new(Prompt, Limits::default(), EventLog::with_capacity(2));
    for _ in 0..5 {
        fixture.events.publish("k", "", "");
    }
    let mut request = EventsRequest::new();
    (request.from, request.backlog_only, request.gaps) = (2, true, true);
    let mut stream = fixture
        .client()
        .subscribe::<_, Event>(MACHINE_SERVICE, "Events", &request, LONG)
        .unwrap();
    let gap = stream.next(Some(LONG)).unwrap().unwrap();
    assert_eq!((gap.kind.as_str(), gap.sequence), ("events.gap", 3));
    assert_eq!((gap.gap().first, gap.gap().last), (2, 3));
    for expected in [4, 5] {
        assert_eq!(stream.next(Some(LONG)).unwrap().unwrap().sequence, expected);
    }
    assert_eq!(stream.next(Some(LONG)).unwrap(), None);
}

#[test]
fn events_that_are_gone_are_an_error_and_those_to_come_a_wait() {
    let fixture = Fixture::new(Prompt, Limits::default(), EventLog::with_capacity(2));
    for _ in 0..5 {
        fixture.events.publish("k", "", "");
    }
    let subscribe = |from| {
        let mut request = EventsRequest::new();
        request.from = from;
        fixture
            .client()
            .subscribe::<_, Event>(MACHINE_SERVICE, "Events", &request, LONG)
            .unwrap()
    };
    assert_eq!(code_of(subscribe(1).next(Some(LONG))), Code::OutOfRange);
    assert_eq!(subscribe(0).next(Some(LONG)).unwrap().unwrap().sequence, 4);
    let mut future = subscribe(7);
    assert!(matches!(
        future.next(Some(SHORT)),
        Err(ClientError::Timeout(_))
    ));
    fixture.events.publish("sixth", "", "");
    fixture.events.publish("seventh", "", "");
    assert_eq!(future.next(Some(LONG)).unwrap().unwrap().kind, "seventh");
}

#[test]
fn event_streams_are_bounded_in_number_and_time() {
    let fixture = Fixture::new(
        Prompt,
        Limits {
            subscriptions: 1,
            ..Limits::default()
        },
        EventLog::new(),
    );
    let mut stream = fixture.connect();
    stream
        .write_all(&[request(1, "Events"), request(3, "Events")].concat())
        .unwrap();
    assert_eq!(answer(&mut stream), (3, Err(Code::ResourceExhausted)));
    let mut timed = fixture.connect();
    timed.write_all(&request_with(1, "Events", &[], 1)).unwrap();
    assert_eq!(answer(&mut timed), (1, Err(Code::DeadlineExceeded)));
}
