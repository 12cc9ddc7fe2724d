//! The server's own end.

use std::io::Write;
use std::os::unix::net::UnixStream;

use bulkhead_proto::machine::{
    BootRequest, BootResponse, Event, EventsRequest, PauseRequest, PauseResponse,
};
use bulkhead_proto::{Code, MACHINE_SERVICE};

use super::*;

#[test]
fn stopping_delivers_what_was_answered_and_refuses_the_rest() {
    let (mut fixture, requests) = Fixture::manual(Limits::default());
    let mut asker = fixture.client();
    let waiting = std::thread::spawn(move || {
        asker.call::<_, PauseResponse>(MACHINE_SERVICE, "Pause", &PauseRequest::new(), LONG)
    });
    let (_, unanswered) = requests.recv_timeout(LONG).unwrap();
    let mut subscriber = fixture
        .client()
        .subscribe::<_, Event>(MACHINE_SERVICE, "Events", &EventsRequest::new(), LONG)
        .unwrap();
    fixture.events.publish("machine.created", "", "");
    assert!(subscriber.next(Some(LONG)).unwrap().is_some());
    let mut stopper = fixture.client();
    let stopping = std::thread::spawn(move || {
        stopper.call::<_, BootResponse>(MACHINE_SERVICE, "Boot", &BootRequest::new(), LONG)
    });
    let (_, stop) = requests.recv_timeout(LONG).unwrap();
    // As the manager does at its end: the last event, the answer, then the server.
    fixture.events.publish("machine.stopped", "", "");
    stop.complete(Ok(ApiResponse::Done));
    fixture.handle.end(LONG);
    assert!(stopping.join().unwrap().is_ok());
    assert_eq!(code_of(waiting.join().unwrap()), Code::Unavailable);
    assert!(unanswered.is_abandoned());
    assert_eq!(
        subscriber.next(Some(LONG)).unwrap().unwrap().kind,
        "machine.stopped"
    );
    assert!(
        subscriber.next(Some(LONG)).unwrap().is_none(),
        "the stream ends cleanly"
    );
    drop(requests);
}

#[test]
fn a_client_that_does_not_read_holds_up_the_end_no_longer_than_the_grace() {
    let mut fixture = Fixture::prompt();
    let mut stream = fixture.connect();
    stream.set_nonblocking(true).unwrap();
    let mut requests = 0;
    let full = loop {
        let one = request(2 * requests + 1, "Info");
        match stream.write(&one) {
            Ok(count) => {
                assert_eq!(count, one.len(), "so short a write is whole");
                requests += 1;
            }
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(full, std::io::ErrorKind::WouldBlock);
    fixture.handle.end(SHORT);
    assert!(
        UnixStream::connect(&fixture.path).is_err(),
        "the listener is closed"
    );
}
