//! A socket that only tells, beside the one that has all: what it refuses, and that both share one
//! server's bounds.

use std::io::{Read, Write};

use bulkhead_proto::VM_SERVICE;
use bulkhead_proto::machine::{DevicesRequest, EventsRequest};
use bulkhead_proto::protobuf::Message;

use super::*;

fn told(client: &mut BlockingClient) {
    assert_eq!(info(client).unwrap().version, "test");
}

/// Whether the server has hung up on a client.
fn is_hung_up_on(mut stream: UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_reader_is_told_and_every_other_method_is_refused_by_name() {
    let fixture = Fixture::prompt();
    let mut reader = BlockingClient::new(fixture.reader(), 1 << 20);
    told(&mut reader);
    let devices: DevicesResponse = reader
        .call(MACHINE_SERVICE, "Devices", &DevicesRequest::new(), LONG)
        .unwrap();
    assert_eq!(devices.devices.len(), 3);
    for (service, method) in [
        (MACHINE_SERVICE, "Create"),
        (MACHINE_SERVICE, "Boot"),
        (MACHINE_SERVICE, "Pause"),
        (MACHINE_SERVICE, "Resume"),
        (MACHINE_SERVICE, "Shutdown"),
        (MACHINE_SERVICE, "UpdateDisk"),
        (MACHINE_SERVICE, "UpdateNet"),
        (MACHINE_SERVICE, "UpdateConsole"),
        (MACHINE_SERVICE, "UpdateResources"),
        (MACHINE_SERVICE, "DrainDevice"),
        (MACHINE_SERVICE, "UpdateDevice"),
        (MACHINE_SERVICE, "ResumeDevice"),
        (MACHINE_SERVICE, "AddDevice"),
        (MACHINE_SERVICE, "RemoveDevice"),
        (MACHINE_SERVICE, "ResizeCpus"),
        (MACHINE_SERVICE, "ResizeMemory"),
        (MACHINE_SERVICE, "OfALaterVersion"),
        (VM_SERVICE, "QuitVM"),
        (VM_SERVICE, "PropertiesVM"),
    ] {
        let refused: Result<InfoResponse, _> =
            reader.call(service, method, &InfoRequest::new(), LONG);
        match refused {
            Err(ClientError::Status(status)) => {
                assert_eq!(status.code, Code::PermissionDenied, "{method}");
                let message = status.message;
                assert!(message.starts_with(method), "{message}");
                assert!(message.contains("--api-socket"), "{message}");
            }
            other => panic!("{method}: {other:?}"),
        }
    }
    // It goes on.
    told(&mut reader);
    told(&mut fixture.client());
}

#[test]
fn a_reader_follows_events() {
    let fixture = Fixture::prompt();
    fixture.events.publish("machine.running", "", "");
    let mut stream = fixture.reader();
    let wanted = EventsRequest::new().write_to_bytes().unwrap();
    stream
        .write_all(&request_with(1, "Events", &wanted, 0))
        .unwrap();
    let mut reader = FrameReader::new(1 << 20);
    let first = next_frame(&mut stream, &mut reader).unwrap();
    assert_eq!(first.header.kind, frame::TYPE_DATA);
    fixture.events.publish("machine.paused", "", "");
    let second = next_frame(&mut stream, &mut reader).unwrap();
    assert!(!second.body.is_empty());
}

#[test]
fn readers_take_at_most_half_of_the_connections_and_no_operators() {
    let limits = Limits {
        connections: 4,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    // Two that wait for an answer, and so cannot be sent away.
    let mut busy: Vec<UnixStream> = (0..2)
        .map(|_| {
            let mut stream = fixture.reader();
            stream.write_all(&request(1, "Info")).unwrap();
            stream
        })
        .collect();
    let waiting: Vec<_> = (0..2)
        .map(|_| requests.recv_timeout(LONG).unwrap())
        .collect();
    assert!(is_hung_up_on(fixture.reader()));
    // Operators have the rest; one more takes the place of one that is idle.
    let operators: Vec<UnixStream> = (0..2).map(|_| fixture.connect()).collect();
    let mut third = fixture.connect();
    third.write_all(&request(1, "Boot")).unwrap();
    let (boot, reply) = requests.recv_timeout(LONG).unwrap();
    assert_eq!(boot, ApiRequest::Boot);
    reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut third), (1, Ok(())));
    let mut operators = operators.into_iter();
    assert!(is_hung_up_on(operators.next().unwrap()));
    // A reader does not take that of an operator that is idle.
    drop(waiting);
    for stream in &mut busy {
        assert_eq!(answer(stream), (1, Err(Code::Aborted)));
    }
    let mut left = operators.next().unwrap();
    for _ in 0..8 {
        let mut stream = fixture.reader();
        stream.write_all(&request(1, "Info")).unwrap();
        let (_, reply) = requests.recv_timeout(LONG).unwrap();
        reply.complete(Ok(ApiResponse::Done));
        assert_eq!(answer(&mut stream).0, 1);
    }
    left.write_all(&request(1, "Boot")).unwrap();
    let (_, reply) = requests.recv_timeout(LONG).unwrap();
    reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut left), (1, Ok(())));
}

#[test]
fn calls_of_both_sockets_count_together_and_half_are_operators() {
    let limits = Limits {
        outstanding: 4,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut reader = fixture.reader();
    for n in 0..3 {
        reader.write_all(&request(2 * n + 1, "Info")).unwrap();
    }
    assert_eq!(answer(&mut reader), (5, Err(Code::ResourceExhausted)));
    let mut operator = fixture.connect();
    for n in 0..3 {
        operator.write_all(&request(2 * n + 1, "Info")).unwrap();
    }
    assert_eq!(answer(&mut operator), (5, Err(Code::ResourceExhausted)));
    let kept: Vec<_> = (0..4)
        .map(|_| requests.recv_timeout(LONG).unwrap())
        .collect();
    drop(kept);
}

#[test]
fn readers_ask_devices_for_little_at_a_time() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut asked = bulkhead_proto::machine::DeviceStatsRequest::new();
    asked.id = "disk0".to_owned();
    let asked = asked.write_to_bytes().unwrap();
    let ask = |stream: &mut UnixStream, id: u32| {
        stream
            .write_all(&request_with(id, "DeviceStats", &asked, 0))
            .unwrap();
    };
    let mut first = fixture.reader();
    ask(&mut first, 1);
    ask(&mut first, 3);
    let kept: Vec<_> = (0..2)
        .map(|_| requests.recv_timeout(LONG).unwrap())
        .collect();
    // Those of one that has gone count until they are answered.
    drop(first);
    let mut second = fixture.reader();
    ask(&mut second, 1);
    assert_eq!(answer(&mut second), (1, Err(Code::ResourceExhausted)));
    // An operator has places of its own.
    let mut operator = fixture.connect();
    ask(&mut operator, 1);
    let (_, reply) = requests.recv_timeout(LONG).unwrap();
    reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut operator), (1, Ok(())));
    drop(kept);
    ask(&mut second, 3);
    let (_, reply) = requests.recv_timeout(LONG).unwrap();
    reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut second), (3, Ok(())));
}

#[test]
fn a_request_of_a_readers_is_bounded_too() {
    let limits = Limits {
        request: 64,
        ..Limits::default()
    };
    let fixture = Fixture::new(Prompt, limits, EventLog::new());
    let mut stream = fixture.reader();
    stream
        .write_all(&request_with(1, "Info", &[0; 100], 0))
        .unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::ResourceExhausted)));
}
