//! Clients that ask for too much, say nonsense, or do not read.

use std::io::{Read, Write};
use std::time::Duration;

use bulkhead_proto::Code;
use bulkhead_proto::frame::{self, FrameReader, Header, TYPE_DATA, TYPE_REQUEST};
use bulkhead_proto::machine::{CreateRequest, InfoRequest};
use bulkhead_proto::stubs::{blocking, ttrpc};

use super::*;

#[test]
fn requests_beyond_the_connections_limit_wait_their_turn() {
    let limits = Limits {
        calls: 2,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut stream = fixture.connect();
    let five: Vec<u8> = (0..5).flat_map(|n| request(2 * n + 1, "Boot")).collect();
    stream.write_all(&five).unwrap();
    let first = requests.recv_timeout(LONG).unwrap();
    let second = requests.recv_timeout(LONG).unwrap();
    assert!(
        requests.recv_timeout(SHORT).is_err(),
        "the third is held back"
    );
    for (_, reply) in [first, second] {
        reply.complete(Ok(ApiResponse::Done));
    }
    for _ in 0..3 {
        requests
            .recv_timeout(LONG)
            .unwrap()
            .1
            .complete(Ok(ApiResponse::Done));
    }
    for _ in 0..5 {
        assert_eq!(answer(&mut stream).1, Ok(()));
    }
}

#[test]
fn giving_up_again_and_again_does_not_fill_the_managers_queue() {
    let limits = Limits {
        outstanding: 4,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut stream = fixture.connect();
    for n in 0..4 {
        stream
            .write_all(&request_with(2 * n + 1, "Boot", &[], 1))
            .unwrap();
        assert_eq!(
            answer(&mut stream),
            (2 * n + 1, Err(Code::DeadlineExceeded))
        );
    }
    stream.write_all(&request(9, "Boot")).unwrap();
    assert_eq!(answer(&mut stream), (9, Err(Code::ResourceExhausted)));
    // The manager catches up, and the client may ask again.
    let kept: Vec<_> = (0..4)
        .map(|_| requests.recv_timeout(LONG).unwrap())
        .collect();
    drop(kept);
    stream.write_all(&request(11, "Boot")).unwrap();
    requests
        .recv_timeout(LONG)
        .unwrap()
        .1
        .complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut stream), (11, Ok(())));
}

#[test]
fn a_request_beyond_the_limit_is_refused_on_its_header_and_skipped() {
    let fixture = Fixture::prompt();
    let mut stream = fixture.connect();
    let length = Limits::default().request + 1;
    let header = Header {
        length,
        stream_id: 1,
        kind: TYPE_REQUEST,
        flags: 0,
    };
    stream.write_all(&header.to_bytes()).unwrap();
    assert_eq!(
        answer(&mut stream),
        (1, Err(Code::ResourceExhausted)),
        "before its body is sent"
    );
    stream.write_all(&vec![0; length as usize]).unwrap();
    stream.write_all(&request(3, "Boot")).unwrap();
    assert_eq!(answer(&mut stream), (3, Ok(())));
}

#[test]
fn a_request_beyond_what_ttrpc_allows_ends_the_connection() {
    let fixture = Fixture::prompt();
    let mut stream = fixture.connect();
    let header = Header {
        length: u32::MAX,
        stream_id: 1,
        kind: TYPE_REQUEST,
        flags: 0,
    };
    stream.write_all(&header.to_bytes()).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::ResourceExhausted)));
    assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0);
}

#[test]
fn the_reference_clients_oversize_request_gets_its_refusal() {
    let fixture = Fixture::prompt();
    let client = ttrpc::Client::connect(&fixture.address()).unwrap();
    let machine = blocking::machine_ttrpc::MachineClient::new(client);
    let mut request = CreateRequest::new();
    request.config.mut_or_insert_default().cmdline = "x".repeat(3 << 20);
    let context = || ttrpc::context::with_duration(LONG);
    let Err(ttrpc::Error::RpcStatus(status)) = machine.create(context(), &request) else {
        panic!("it is too long")
    };
    assert_eq!(status.code(), ttrpc::Code::RESOURCE_EXHAUSTED);
    assert!(
        machine.info(context(), &InfoRequest::new()).is_ok(),
        "the connection goes on"
    );
}

#[test]
fn malformed_requests_cost_their_sender_an_error() {
    let fixture = Fixture::prompt();
    let mut stream = fixture.connect();
    let mut send = |bytes: &[u8]| {
        stream.write_all(bytes).unwrap();
        answer(&mut stream)
    };
    let mut garbage = Vec::new();
    frame::encode(&mut garbage, TYPE_REQUEST, 1, 0, &[0xff; 30]).unwrap();
    assert_eq!(send(&garbage), (1, Err(Code::InvalidArgument)));
    assert_eq!(
        send(&request(2, "Info")),
        (2, Err(Code::InvalidArgument)),
        "an even stream id"
    );
    assert_eq!(send(&request(3, "Explode")), (3, Err(Code::Unimplemented)));
    assert_eq!(
        send(&request_with(5, "Info", &[], -1)),
        (5, Err(Code::InvalidArgument))
    );
    let mut data = Vec::new();
    frame::encode(&mut data, TYPE_DATA, 7, 0, b"x").unwrap();
    assert_eq!(send(&data), (7, Err(Code::InvalidArgument)));
    let mut unknown = Vec::new();
    frame::encode(&mut unknown, 200, 9, 0, b"ignored").unwrap();
    unknown.extend_from_slice(&request(11, "Info"));
    assert_eq!(send(&unknown), (11, Ok(())));
}

#[test]
fn a_stream_id_used_twice_ends_the_connection() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream
        .write_all(&[request(1, "Boot"), request(1, "Boot")].concat())
        .unwrap();
    assert!(next_frame(&mut stream, &mut FrameReader::new(1000)).is_none());
    assert!(requests.recv_timeout(LONG).unwrap().1.is_abandoned());
}

#[test]
fn a_client_that_reads_late_loses_nothing() {
    let fixture = Fixture::prompt();
    let mut stream = fixture.connect();
    let count = 1000;
    // 4 KiB of answer to each: far more than is kept for a client that does not read.
    // In one piece, since the kernel charges for every piece of what is not read.
    let requests: Vec<u8> = (0..count)
        .flat_map(|n| request(2 * n + 1, "Info"))
        .collect();
    stream.write_all(&requests).unwrap();
    let mut reader = FrameReader::new(1 << 20);
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..count {
        let frame = next_frame(&mut stream, &mut reader).expect("not cut off");
        answered.insert(frame.header.stream_id);
    }
    assert_eq!(answered.len(), count as usize);
}

#[test]
fn a_client_that_never_reads_is_not_listened_to_and_then_cut_off() {
    let limits = Limits {
        stall: Duration::from_millis(200),
        ..Limits::default()
    };
    let fixture = Fixture::new(Prompt, limits, EventLog::new());
    let mut stream = fixture.connect();
    stream.set_nonblocking(true).unwrap();
    let begun = std::time::Instant::now();
    // 4 KiB of answer for each of these: without bounds the server would hold them all.
    let mut requests = 0;
    let ended = loop {
        let one = request(2 * requests + 1, "Info");
        match stream.write(&one) {
            Ok(count) => {
                assert_eq!(count, one.len(), "so short a write is whole");
                requests += 1;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => break error.kind(),
        }
        assert!(requests < 1_000_000, "the server takes requests for ever");
        assert!(begun.elapsed() < LONG, "the client is never cut off");
    };
    assert!(matches!(
        ended,
        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset
    ));
    assert!(
        info(&mut fixture.client()).is_ok(),
        "others are not affected"
    );
}

#[test]
fn idle_clients_make_room_and_busy_ones_do_not() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut busy = fixture.connect();
    busy.write_all(&request(1, "Boot")).unwrap();
    let (_, first) = requests.recv_timeout(LONG).unwrap();
    let mut idle = fixture.connect();
    let mut third = fixture.connect();
    third.write_all(&request(1, "Pause")).unwrap();
    let (pause, second) = requests.recv_timeout(LONG).unwrap();
    assert_eq!(pause, ApiRequest::Pause);
    assert_eq!(idle.read(&mut [0]).unwrap(), 0, "the idle one was closed");
    let mut fourth = fixture.connect();
    assert_eq!(
        fourth.read(&mut [0]).unwrap(),
        0,
        "two busy ones leave no room"
    );
    first.complete(Ok(ApiResponse::Done));
    second.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut busy), (1, Ok(())));
    assert_eq!(answer(&mut third), (1, Ok(())));
}

#[test]
fn strangers_are_turned_away_at_the_door() {
    let fixture = Fixture::admitting(Prompt, Limits::default(), EventLog::new(), false);
    for mut stream in [fixture.connect(), fixture.reader()] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    // Told once of one and the same.
    let told = |sequence| fixture.events.get(sequence);
    let own = bulkhead_proto::sys::effective_uid();
    match told(1) {
        crate::api::events::Lookup::Event(bytes) => {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(text.contains("api.refused"), "{text}");
            assert!(text.contains(&format!("of uid {own} and gid")), "{text}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(told(2), crate::api::events::Lookup::NotYet);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Frames with true lengths and made-up contents get further than pure noise.
    #[test]
    fn noise_costs_only_its_sender(
        frames in proptest::collection::vec(
            (
                proptest::prelude::any::<u32>(),
                0u8..5,
                0u8..8,
                proptest::collection::vec(0u8..0x40, 0..60),
            ),
            0..20,
        ),
        tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40),
    ) {
        static SERVER: std::sync::LazyLock<Fixture> = std::sync::LazyLock::new(Fixture::prompt);
        let mut bytes = Vec::new();
        for (stream_id, kind, flags, body) in frames {
            frame::encode(&mut bytes, kind, stream_id, flags, &body).unwrap();
        }
        bytes.extend_from_slice(&tail);
        let mut stream = SERVER.connect();
        // The server may have hung up on it by then.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answers = Vec::new();
        let _ = stream.read_to_end(&mut answers);
        let mut client = SERVER.client();
        proptest::prop_assert!(info(&mut client).is_ok());
    }
}
