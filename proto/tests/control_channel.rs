//! The two ends of a device's control channel over a real socketpair: against each other,
//! against the reference implementation, and against peers that mean harm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use bulkhead_proto::client::{BlockingClient, ClientError};
use bulkhead_proto::device::{
    HealthRequest, HealthResponse, HelloRequest, HelloResponse, RingHealth, StatsRequest,
    StatsResponse,
};
use bulkhead_proto::frame::{self, FrameError, Header, TYPE_DATA, TYPE_REQUEST, TYPE_RESPONSE};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::server::{CONTROL_MAX_FRAME, Closed, ControlServer, decode, encode};
use bulkhead_proto::stubs::{blocking::device_ttrpc, ttrpc};
use bulkhead_proto::sys::{self, Interest};
use bulkhead_proto::{Code, DEVICE_SERVICE, RpcStatus, envelope};

/// Ends every wait of a test that should not have waited.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

fn handler(service: &str, method: &str, payload: &[u8]) -> Result<Vec<u8>, RpcStatus> {
    match (service, method) {
        (DEVICE_SERVICE, "Hello") => {
            let request: HelloRequest = decode(payload)?;
            let mut reply = HelloResponse::new();
            reply.kind = "blk".into();
            reply.incarnation = request.incarnation;
            encode(&reply)
        }
        (DEVICE_SERVICE, "Stats") => Err(RpcStatus::failed_precondition("not started")),
        (DEVICE_SERVICE, "Health") => {
            let mut reply = HealthResponse::new();
            reply.rings = vec![RingHealth::new(); 64 * 1024];
            encode(&reply)
        }
        _ => Err(RpcStatus::unimplemented(service, method)),
    }
}

/// Runs a server as the device runtime does, on a thread of its own, until it ends.
fn serve(socket: UnixStream) -> thread::JoinHandle<Closed> {
    thread::spawn(move || {
        let mut server = ControlServer::new(socket, CONTROL_MAX_FRAME);
        loop {
            let interest = if server.wants_write() {
                Interest::Writable
            } else {
                Interest::Readable
            };
            assert!(
                server.wants_write() || server.wants_read(),
                "the loop would hang"
            );
            sys::wait(server.as_fd(), interest, None).unwrap();
            let turn = match interest {
                Interest::Writable => server.on_writable(&mut handler),
                Interest::Readable => server.on_readable(&mut handler),
            };
            if let Err(closed) = turn {
                return closed;
            }
        }
    })
}

fn hello(incarnation: u64) -> HelloRequest {
    let mut request = HelloRequest::new();
    request.device_id = "disk0".into();
    request.incarnation = incarnation;
    request
}

fn client(socket: UnixStream) -> BlockingClient {
    BlockingClient::new(socket, CONTROL_MAX_FRAME)
}

fn say_hello(client: &mut BlockingClient, within: Duration) -> Result<HelloResponse, ClientError> {
    client.call(DEVICE_SERVICE, "Hello", &hello(7), within)
}

fn response_frame(stream_id: u32) -> Vec<u8> {
    let mut reply = HelloResponse::new();
    reply.incarnation = 7;
    let payload = reply.write_to_bytes().unwrap();
    let mut body = Vec::new();
    envelope::encode_response(&mut body, Ok(&payload));
    let mut out = Vec::new();
    frame::encode(&mut out, TYPE_RESPONSE, stream_id, 0, &body).unwrap();
    out
}

#[test]
fn our_client_calls_our_server() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs);
    let mut client = client(ours);
    for _ in 0..300 {
        assert_eq!(say_hello(&mut client, LONG).unwrap().incarnation, 7);
    }
    let refused =
        client.call::<_, StatsResponse>(DEVICE_SERVICE, "Stats", &StatsRequest::new(), LONG);
    let Err(ClientError::Status(status)) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(status, RpcStatus::failed_precondition("not started"));
    let unknown = client.call::<_, StatsResponse>("x", "y", &StatsRequest::new(), LONG);
    assert!(matches!(unknown, Err(ClientError::Status(s)) if s.code == Code::Unimplemented));
    assert_eq!(
        say_hello(&mut client, LONG).unwrap().kind,
        "blk",
        "a refusal leaves the channel whole"
    );
    drop(client);
    assert!(matches!(server.join().unwrap(), Closed::Eof));
}

#[test]
fn the_reference_client_calls_our_server() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs);
    let client = ttrpc::Client::new(ours.into_raw_fd()).unwrap();
    let device = device_ttrpc::DeviceClient::new(client);
    let context = || ttrpc::context::with_duration(LONG);
    let threads: Vec<_> = (0..8)
        .map(|n| {
            let device = device.clone();
            thread::spawn(move || {
                for round in 0..25 {
                    let incarnation = n * 100 + round;
                    let reply = device
                        .hello(ttrpc::context::with_duration(LONG), &hello(incarnation))
                        .unwrap();
                    assert_eq!(reply.incarnation, incarnation);
                }
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let refused = device.stats(context(), &StatsRequest::new());
    let Err(ttrpc::Error::RpcStatus(status)) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(status.code(), ttrpc::Code::FAILED_PRECONDITION);
    let too_long = device.health(context(), &HealthRequest::new());
    let Err(ttrpc::Error::RpcStatus(status)) = too_long else {
        panic!("{too_long:?}")
    };
    assert_eq!(status.code(), ttrpc::Code::RESOURCE_EXHAUSTED);
    drop(device);
    assert!(matches!(server.join().unwrap(), Closed::Eof));
}

struct Reference;

impl device_ttrpc::Device for Reference {
    fn hello(
        &self,
        _context: &ttrpc::TtrpcContext,
        request: HelloRequest,
    ) -> ttrpc::Result<HelloResponse> {
        let mut reply = HelloResponse::new();
        reply.incarnation = request.incarnation;
        Ok(reply)
    }
}

#[test]
fn our_client_calls_the_reference_server() {
    let path = std::env::temp_dir().join(format!("bulkhead-proto-{}.sock", std::process::id()));
    let address = format!("unix://{}", path.display());
    let mut server = ttrpc::Server::new()
        .bind(&address)
        .unwrap()
        .register_service(device_ttrpc::create_device(Arc::new(Reference)));
    server.start().unwrap();
    let mut client = client(UnixStream::connect(&path).unwrap());
    assert_eq!(say_hello(&mut client, LONG).unwrap().incarnation, 7);
    let absent =
        client.call::<_, StatsResponse>(DEVICE_SERVICE, "Stats", &StatsRequest::new(), LONG);
    assert!(matches!(absent, Err(ClientError::Status(_))), "{absent:?}");
    drop(client);
    server.shutdown();
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_frame_beyond_the_limit_is_answered_and_ends_the_channel() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs);
    let header = Header {
        length: CONTROL_MAX_FRAME + 1,
        stream_id: 5,
        kind: TYPE_REQUEST,
        flags: 0,
    };
    ours.write_all(&header.to_bytes()).unwrap();
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).unwrap();
    let frame = frame::FrameReader::new(1000)
        .feed(&mut &answer[..])
        .unwrap()
        .unwrap();
    assert_eq!(
        (frame.header.kind, frame.header.stream_id),
        (TYPE_RESPONSE, 5)
    );
    let envelope::ResponseView::Failed(status) = envelope::parse_response(&frame.body).unwrap()
    else {
        panic!("{frame:?}")
    };
    assert_eq!(status.code, Code::ResourceExhausted);
    assert!(matches!(
        server.join().unwrap(),
        Closed::Protocol(FrameError::Oversize { .. })
    ));
}

#[test]
fn malformed_requests_are_answered_and_cost_nothing_else() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs);
    let mut raw = ours.try_clone().unwrap();
    let mut bytes = Vec::new();
    frame::encode(&mut bytes, TYPE_REQUEST, 1, 0, &[0xff; 9]).unwrap();
    frame::encode(&mut bytes, TYPE_REQUEST, 2, 0, &[]).unwrap();
    frame::encode(&mut bytes, TYPE_DATA, 3, 0, b"x").unwrap();
    frame::encode(&mut bytes, 99, 5, 0, b"from the future: not answered").unwrap();
    frame::encode(
        &mut bytes,
        TYPE_REQUEST,
        7,
        0,
        &[0x0a, 1, b'x', 0x12, 1, b'y'],
    )
    .unwrap();
    // A byte at a time, as the worst client would.
    for byte in &bytes {
        raw.write_all(std::slice::from_ref(byte)).unwrap();
    }
    let mut reader = frame::FrameReader::new(1000);
    for (stream_id, code) in [
        (1, Code::InvalidArgument),
        (2, Code::InvalidArgument),
        (3, Code::InvalidArgument),
        (7, Code::Unimplemented),
    ] {
        let frame = loop {
            let mut byte = [0];
            raw.read_exact(&mut byte).unwrap();
            if let Some(frame) = reader.feed(&mut &byte[..]).unwrap() {
                break frame;
            }
        };
        assert_eq!(frame.header.stream_id, stream_id);
        let answer = envelope::parse_response(&frame.body).unwrap();
        assert!(matches!(answer, envelope::ResponseView::Failed(s) if s.code == code));
    }
    drop((ours, raw));
    assert!(matches!(server.join().unwrap(), Closed::Eof));
}

#[test]
fn a_peer_that_never_reads_stops_the_server_from_reading() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = ControlServer::new(theirs, CONTROL_MAX_FRAME);
    let handled = AtomicUsize::new(0);
    let mut handler = |_: &str, _: &str, _: &[u8]| {
        handled.fetch_add(1, Ordering::Relaxed);
        Ok(vec![0; 60_000])
    };
    let mut request = Vec::new();
    frame::encode(&mut request, TYPE_REQUEST, 1, 0, &[]).unwrap();
    let mut sent = 0usize;
    // Until neither side can move: the server has a reply that does not go out.
    loop {
        let room = sys::send(ours.as_fd(), &request).unwrap();
        let before = handled.load(Ordering::Relaxed);
        server.on_readable(&mut handler).unwrap();
        if room.is_none() && handled.load(Ordering::Relaxed) == before {
            break;
        }
        sent += usize::from(room.is_some());
        assert!(sent < 10_000_000, "the server takes requests for ever");
    }
    assert!(!server.wants_read());
    assert!(server.wants_write());
    assert!(handled.load(Ordering::Relaxed) < sent);
}

#[test]
fn silence_ends_a_call_at_its_deadline() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut client = client(ours);
    assert!(matches!(
        say_hello(&mut client, SHORT),
        Err(ClientError::Timeout(SHORT))
    ));
    assert!(
        matches!(say_hello(&mut client, LONG), Err(ClientError::Closed)),
        "the channel is spent"
    );
}

#[test]
fn a_peer_that_does_not_take_the_request_ends_the_call_at_its_deadline() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    while sys::send(ours.as_fd(), &[0; 4096]).unwrap().is_some() {}
    assert!(matches!(
        say_hello(&mut client(ours), SHORT),
        Err(ClientError::Timeout(_))
    ));
}

#[test]
fn a_drip_of_bytes_gains_no_time() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let dripper = thread::spawn(move || {
        // A valid frame that never ends in time: a byte now and then, until hung up on.
        let header = Header {
            length: 60_000,
            stream_id: 1,
            kind: TYPE_RESPONSE,
            flags: 0,
        };
        theirs.write_all(&header.to_bytes()).unwrap();
        while theirs.write_all(&[0x12]).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    });
    let mut client = client(ours);
    let answer = say_hello(&mut client, Duration::from_millis(200));
    assert!(matches!(answer, Err(ClientError::Timeout(_))), "{answer:?}");
    drop(client);
    dripper.join().unwrap();
}

#[test]
fn an_answer_in_small_pieces_is_still_an_answer() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        for byte in response_frame(1) {
            theirs.write_all(&[byte]).unwrap();
        }
        theirs
    });
    assert_eq!(say_hello(&mut client(ours), LONG).unwrap().incarnation, 7);
    peer.join().unwrap();
}

fn answer_to(bytes: &[u8]) -> Result<HelloResponse, ClientError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    say_hello(&mut client(ours), LONG)
}

#[test]
fn only_the_frame_that_is_due_is_taken() {
    assert!(answer_to(&response_frame(1)).is_ok());
    assert!(matches!(
        answer_to(&response_frame(3)),
        Err(ClientError::Malformed(_))
    ));
    for kind in [0, TYPE_REQUEST, TYPE_DATA, 4, 255] {
        let mut bytes = Vec::new();
        frame::encode(&mut bytes, kind, 1, 0, &[]).unwrap();
        assert!(
            matches!(answer_to(&bytes), Err(ClientError::Malformed(_))),
            "type {kind}"
        );
    }
    let mut garbage = Vec::new();
    frame::encode(&mut garbage, TYPE_RESPONSE, 1, 0, &[0xff; 40]).unwrap();
    assert!(matches!(
        answer_to(&garbage),
        Err(ClientError::Malformed(_))
    ));
    let mut garbage = Vec::new();
    frame::encode(&mut garbage, TYPE_RESPONSE, 1, 0, &[0x12, 2, 0x0a, 0x09]).unwrap();
    assert!(matches!(
        answer_to(&garbage),
        Err(ClientError::Malformed(_))
    ));
}

#[test]
fn an_oversize_answer_is_refused_on_its_header() {
    let header = Header {
        length: CONTROL_MAX_FRAME + 1,
        stream_id: 1,
        kind: TYPE_RESPONSE,
        flags: 0,
    };
    // No byte of the body is ever sent: were it awaited, this would not return.
    assert!(matches!(
        answer_to(&header.to_bytes()),
        Err(ClientError::Oversize(_))
    ));
}

#[test]
fn a_flood_of_frames_that_were_not_asked_for_breaks_the_channel() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let flooder = thread::spawn(move || {
        let frame = response_frame(1);
        while theirs.write_all(&frame).is_ok() {}
    });
    let mut client = client(ours);
    // The first answer has the right stream id; the second call finds it again.
    assert!(say_hello(&mut client, LONG).is_ok());
    assert!(matches!(
        say_hello(&mut client, LONG),
        Err(ClientError::Malformed(_))
    ));
    drop(client);
    flooder.join().unwrap();
}

#[test]
fn a_dead_peer_is_told_from_a_slow_one() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(
        say_hello(&mut client(ours), LONG),
        Err(ClientError::Closed)
    ));
}

#[test]
fn a_request_beyond_the_limit_is_not_sent_and_leaves_the_channel_whole() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs);
    let mut client = client(ours);
    let mut request = hello(1);
    request.device_id = "x".repeat(CONTROL_MAX_FRAME as usize);
    let refused = client.call::<_, HelloResponse>(DEVICE_SERVICE, "Hello", &request, LONG);
    assert!(matches!(refused, Err(ClientError::Request(_))));
    assert!(say_hello(&mut client, LONG).is_ok());
    drop(client);
    assert!(matches!(server.join().unwrap(), Closed::Eof));
}

fn subscribe_to(bytes: &[u8]) -> bulkhead_proto::Subscription<HelloResponse> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    client(ours)
        .subscribe(DEVICE_SERVICE, "Watch", &hello(1), LONG)
        .unwrap()
}

fn data_frame(stream_id: u32, flags: u8) -> Vec<u8> {
    let mut reply = HelloResponse::new();
    reply.incarnation = 7;
    let mut out = Vec::new();
    frame::encode(
        &mut out,
        TYPE_DATA,
        stream_id,
        flags,
        &reply.write_to_bytes().unwrap(),
    )
    .unwrap();
    out
}

#[test]
fn a_subscription_ends_as_the_server_says() {
    let mut end = Vec::new();
    frame::encode_end_of_stream(&mut end, 1);
    let mut stream = subscribe_to(&[data_frame(1, 0), data_frame(1, 0), end].concat());
    assert_eq!(stream.next(None).unwrap().unwrap().incarnation, 7);
    assert_eq!(stream.next(None).unwrap().unwrap().incarnation, 7);
    assert!(stream.next(None).unwrap().is_none());
    assert!(stream.next(None).unwrap().is_none());

    let mut with_data = subscribe_to(&data_frame(1, frame::FLAG_REMOTE_CLOSED));
    assert_eq!(with_data.next(None).unwrap().unwrap().incarnation, 7);
    assert!(with_data.next(None).unwrap().is_none());

    let mut body = Vec::new();
    envelope::encode_response(&mut body, Err(&RpcStatus::new(Code::OutOfRange, "gone")));
    let mut refusal = data_frame(1, 0);
    frame::encode(&mut refusal, TYPE_RESPONSE, 1, 0, &body).unwrap();
    let mut stream = subscribe_to(&refusal);
    assert!(stream.next(None).unwrap().is_some());
    assert!(matches!(stream.next(None), Err(ClientError::Status(s)) if s.code == Code::OutOfRange));
    assert!(stream.next(None).unwrap().is_none());
}

#[test]
fn a_subscription_survives_an_idle_timeout_and_nothing_worse() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut stream = client(ours)
        .subscribe::<_, HelloResponse>(DEVICE_SERVICE, "Watch", &hello(1), LONG)
        .unwrap();
    assert!(matches!(
        stream.next(Some(SHORT)),
        Err(ClientError::Timeout(_))
    ));
    theirs.write_all(&data_frame(1, 0)).unwrap();
    assert_eq!(stream.next(Some(LONG)).unwrap().unwrap().incarnation, 7);
    theirs.write_all(&data_frame(3, 0)).unwrap();
    assert!(matches!(
        stream.next(Some(LONG)),
        Err(ClientError::Malformed(_))
    ));
    assert!(stream.next(None).unwrap().is_none());
}

#[test]
fn peer_credentials_are_ours_on_a_pair() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let peer = sys::peer_credentials(ours.as_fd()).unwrap();
    assert_eq!(peer.uid, sys::effective_uid());
    assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
}
