//! The client for event loops against an honest server, and against peers that mean harm.
//! Nothing here waits for time to pass: instants are made up and handed in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_proto::client::{BlockingClient, ClientError};
use bulkhead_proto::device::{HealthRequest, HelloRequest, HelloResponse};
use bulkhead_proto::frame::{self, FrameReader, Header, TYPE_DATA, TYPE_REQUEST, TYPE_RESPONSE};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::server::{CONTROL_MAX_FRAME, ControlServer};
use bulkhead_proto::{
    AsyncClient, AsyncLimits, Code, Completion, DEVICE_SERVICE, RpcStatus, envelope,
};
use proptest::prelude::*;

const LONG: Duration = Duration::from_secs(3600);

struct Bed {
    client: AsyncClient,
    peer: UnixStream,
    answers: Vec<Completion>,
    now: Instant,
}

fn bed() -> Bed {
    bed_with(AsyncLimits::default())
}

fn bed_with(limits: AsyncLimits) -> Bed {
    let (ours, peer) = UnixStream::pair().unwrap();
    Bed {
        client: AsyncClient::new(ours, limits),
        peer,
        answers: Vec::new(),
        now: Instant::now(),
    }
}

impl Bed {
    fn ask(&mut self, token: u64) -> Result<(), ClientError> {
        self.ask_within(token, LONG)
    }

    fn ask_within(&mut self, token: u64, timeout: Duration) -> Result<(), ClientError> {
        let request = HealthRequest::new();
        self.client
            .call(DEVICE_SERVICE, "Health", &request, timeout, token)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.peer.write_all(bytes).unwrap();
    }

    fn readable(&mut self) -> Result<(), ClientError> {
        self.client.on_readable(self.now, &mut self.answers)
    }

    fn tokens(&mut self) -> Vec<u64> {
        self.answers.drain(..).map(|(token, _)| token).collect()
    }
}

fn response(stream_id: u32, result: Result<&[u8], &RpcStatus>) -> Vec<u8> {
    let mut body = Vec::new();
    envelope::encode_response(&mut body, result);
    let mut out = Vec::new();
    frame::encode(&mut out, TYPE_RESPONSE, stream_id, 0, &body).unwrap();
    out
}

fn broken(result: Result<(), ClientError>, bed: &mut Bed) -> String {
    let error = result.unwrap_err();
    assert!(!error.is_recoverable());
    assert!(bed.client.is_broken());
    assert_eq!(bed.client.next_deadline(), None);
    assert!(matches!(bed.ask(99), Err(ClientError::Closed)));
    assert!(matches!(bed.readable(), Err(ClientError::Closed)));
    error.to_string()
}

#[test]
fn answers_come_back_with_their_tokens_in_any_order() {
    let mut bed = bed();
    for token in [10, 20, 30] {
        bed.ask(token).unwrap();
    }
    assert_eq!(bed.client.outstanding(), 3);
    let refusal = RpcStatus::failed_precondition("no");
    bed.send(&response(5, Ok(b"late")));
    bed.send(&response(1, Err(&refusal)));
    bed.readable().unwrap();
    assert_eq!(
        std::mem::take(&mut bed.answers),
        [(30, Ok(b"late".to_vec())), (10, Err(refusal))]
    );
    // The last one in pieces.
    let frame = response(3, Ok(&[7; 3000]));
    let (head, tail) = frame.split_at(100);
    bed.send(head);
    bed.readable().unwrap();
    assert!(bed.answers.is_empty());
    bed.send(tail);
    bed.readable().unwrap();
    assert_eq!(bed.answers, [(20, Ok(vec![7; 3000]))]);
    assert_eq!(bed.client.outstanding(), 0);
    bed.readable().unwrap();
    assert_eq!(bed.answers.len(), 1, "nothing more came of nothing");
}

#[test]
fn it_speaks_to_the_devices_server_after_a_blocking_hello() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut blocking = BlockingClient::new(ours, CONTROL_MAX_FRAME);
    let mut server = ControlServer::new(theirs, CONTROL_MAX_FRAME);
    let mut calls = Vec::new();
    let mut handler = |service: &str, method: &str, _: &[u8]| {
        calls.push(format!("{service}/{method}"));
        Ok(HelloResponse::new().write_to_bytes().unwrap())
    };
    std::thread::scope(|scope| {
        let hello = scope.spawn(|| {
            blocking.call::<_, HelloResponse>(DEVICE_SERVICE, "Hello", &HelloRequest::new(), LONG)
        });
        while !hello.is_finished() {
            server.on_readable(&mut handler).unwrap();
            std::thread::yield_now();
        }
        hello.join().unwrap().unwrap();
    });
    let mut client = blocking.into_async(AsyncLimits::default()).unwrap();
    let (now, mut answers) = (Instant::now(), Vec::new());
    for token in 0..50 {
        client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), LONG, token)
            .unwrap();
        server.on_readable(&mut handler).unwrap();
        client.on_readable(now, &mut answers).unwrap();
        assert_eq!(answers.pop().unwrap().0, token);
    }
    assert_eq!(calls.len(), 51);
}

#[test]
fn an_unfinished_exchange_is_not_taken_over() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut blocking = BlockingClient::new(ours, CONTROL_MAX_FRAME);
    // One answer and the beginning of another.
    peer.write_all(&response(1, Ok(&[]))).unwrap();
    peer.write_all(&response(3, Ok(&[]))[..5]).unwrap();
    blocking
        .call::<_, HelloResponse>(DEVICE_SERVICE, "Hello", &HelloRequest::new(), LONG)
        .unwrap();
    let error = blocking.into_async(AsyncLimits::default()).unwrap_err();
    assert!(matches!(error, ClientError::Malformed(_)), "{error}");
}

#[test]
fn no_more_calls_wait_than_the_limit() {
    let limits = AsyncLimits {
        max_outstanding: 2,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    bed.ask(1).unwrap();
    bed.ask(2).unwrap();
    assert!(matches!(bed.ask(3), Err(ClientError::Busy(2))));
    bed.send(&response(1, Ok(&[])));
    bed.readable().unwrap();
    bed.ask(3).unwrap();
    assert_eq!(bed.tokens(), [1]);
}

#[test]
fn a_request_beyond_the_limit_is_not_sent() {
    let limits = AsyncLimits {
        max_frame: 100,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    let mut request = HelloRequest::new();
    request.device_id = "x".repeat(200);
    let result = bed.client.call(DEVICE_SERVICE, "Hello", &request, LONG, 1);
    assert!(matches!(result, Err(ClientError::Request(_))));
    assert_eq!(bed.client.outstanding(), 0);
    bed.ask(2).unwrap();
    bed.send(&response(1, Ok(&[])));
    bed.readable().unwrap();
    assert_eq!(bed.tokens(), [2]);
}

#[test]
fn silence_ends_at_the_deadline_and_not_before() {
    let mut bed = bed();
    assert_eq!(bed.client.next_deadline(), None);
    bed.ask_within(1, LONG).unwrap();
    bed.ask_within(2, Duration::from_secs(5)).unwrap();
    let due = bed.client.next_deadline().unwrap();
    let before = due - Duration::from_millis(1);
    bed.client.check(before, &mut bed.answers).unwrap();
    let result = bed.client.check(due, &mut bed.answers);
    assert_eq!(broken(result, &mut bed), "no answer within 5000 ms");
    assert_eq!(bed.client.give_up(), [1, 2]);
}

#[test]
fn an_answer_that_waits_to_be_read_is_in_time() {
    let mut bed = bed();
    bed.ask_within(1, Duration::from_secs(5)).unwrap();
    bed.send(&response(1, Ok(&[])));
    let late = bed.now + LONG;
    bed.client.check(late, &mut bed.answers).unwrap();
    assert_eq!(bed.tokens(), [1]);
}

#[test]
fn a_drip_gains_no_time() {
    let mut bed = bed();
    bed.ask_within(1, Duration::from_secs(5)).unwrap();
    let due = bed.client.next_deadline().unwrap();
    for byte in &response(1, Ok(&[9; 50]))[..40] {
        bed.send(&[*byte]);
        bed.readable().unwrap();
    }
    let result = bed.client.check(due, &mut bed.answers);
    assert!(broken(result, &mut bed).contains("no answer within"));
}

#[test]
fn who_was_held_up_gives_more_time() {
    let mut bed = bed();
    bed.ask_within(1, Duration::from_secs(5)).unwrap();
    let due = bed.client.next_deadline().unwrap();
    bed.client.extend_deadlines(Duration::from_secs(60));
    bed.client.check(due, &mut bed.answers).unwrap();
    let later = due + Duration::from_secs(60);
    assert_eq!(bed.client.next_deadline(), Some(later));
}

#[test]
fn a_peer_that_wakes_us_too_often_has_failed() {
    let limits = AsyncLimits {
        wakeups_per_second: 20,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    bed.ask(1).unwrap();
    let frame = response(1, Ok(&[1; 500]));
    for byte in &frame[..20] {
        bed.send(&[*byte]);
        bed.readable().unwrap();
    }
    bed.send(&frame[20..21]);
    let result = bed.readable();
    assert!(broken(result, &mut bed).contains("more than 20 times in a second"));
}

#[test]
fn a_peer_that_is_asked_often_is_not_to_blame_for_its_answers() {
    let limits = AsyncLimits {
        wakeups_per_second: 20,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    for call in 0..200_u32 {
        bed.ask(u64::from(call)).unwrap();
        bed.client.on_writable(bed.now).unwrap();
        bed.send(&response(1 + 2 * call, Ok(&[])));
        bed.readable().unwrap();
    }
    assert_eq!(bed.tokens().len(), 200);
}

#[test]
fn wake_ups_are_counted_by_the_second() {
    let limits = AsyncLimits {
        wakeups_per_second: 20,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    bed.ask(1).unwrap();
    for byte in response(1, Ok(&[1; 500])).chunks(20) {
        for part in byte {
            bed.send(&[*part]);
            bed.readable().unwrap();
        }
        bed.now += Duration::from_secs(1);
    }
    assert_eq!(bed.tokens(), [1]);
}

#[test]
fn what_nobody_asked_for_is_a_breach() {
    let asked_first = |bytes: Vec<u8>| {
        let mut bed = bed();
        bed.ask(1).unwrap();
        bed.send(&bytes);
        let result = bed.readable();
        let text = broken(result, &mut bed);
        (text, bed.tokens())
    };
    // Twice the same answer: the first counts.
    let (text, tokens) = asked_first([response(1, Ok(&[])), response(1, Ok(&[]))].concat());
    assert!(text.contains("no answer to anything"), "{text}");
    assert_eq!(tokens, [1]);
    // An answer and the beginning of a frame.
    let (text, tokens) = asked_first([response(1, Ok(&[])), vec![0; 3]].concat());
    assert!(text.contains("nobody asked for"), "{text}");
    assert_eq!(tokens, [1]);
    for (stream_id, kind) in [
        (3, TYPE_RESPONSE),
        (1, TYPE_DATA),
        (1, TYPE_REQUEST),
        (1, 200),
    ] {
        let mut bytes = Vec::new();
        frame::encode(&mut bytes, kind, stream_id, 0, &[]).unwrap();
        let (text, tokens) = asked_first(bytes);
        assert!(text.contains("no answer to anything"), "{text}");
        assert!(tokens.is_empty());
    }
    let mut bed = bed();
    bed.send(&[0]);
    let result = bed.readable();
    assert!(broken(result, &mut bed).contains("nobody asked for"));
}

#[test]
fn an_oversize_frame_is_refused_by_its_header() {
    let mut bed = bed();
    bed.ask(1).unwrap();
    let header = Header {
        length: CONTROL_MAX_FRAME + 1,
        stream_id: 1,
        kind: TYPE_RESPONSE,
        flags: 0,
    };
    bed.send(&header.to_bytes());
    let result = bed.readable();
    assert!(broken(result, &mut bed).contains("65537 bytes"));
}

#[test]
fn an_envelope_that_is_none_is_a_breach() {
    let mut bed = bed();
    bed.ask(1).unwrap();
    let mut bytes = Vec::new();
    frame::encode(&mut bytes, TYPE_RESPONSE, 1, 0, &[0xff; 40]).unwrap();
    bed.send(&bytes);
    let result = bed.readable();
    assert!(broken(result, &mut bed).contains("broke the protocol"));
}

#[test]
fn the_peers_end_is_noticed_and_who_waits_is_named() {
    let mut bed = bed();
    bed.ask(4).unwrap();
    bed.ask(5).unwrap();
    bed.send(&response(1, Ok(&[])));
    bed.peer.shutdown(std::net::Shutdown::Both).unwrap();
    let result = bed.readable();
    assert!(matches!(result, Err(ClientError::Closed)));
    assert_eq!(bed.tokens(), [4], "what it said before its end counts");
    assert_eq!(bed.client.give_up(), [5]);
    assert!(bed.client.give_up().is_empty());
}

#[test]
fn half_a_socket_that_is_closed_is_as_good_as_a_hang_up() {
    // It reads on, but will never answer.
    let mut bed = bed();
    bed.ask(4).unwrap();
    bed.peer.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(bed.readable(), Err(ClientError::Closed)));
    assert_eq!(bed.client.give_up(), [4]);
    // It answers what it was asked, but will never hear of anything again.
    let mut bed = bed_with(AsyncLimits::default());
    bed.ask(4).unwrap();
    bed.peer.shutdown(std::net::Shutdown::Read).unwrap();
    bed.send(&response(1, Ok(&[])));
    bed.readable().unwrap();
    assert_eq!(bed.tokens(), [4]);
    assert!(bed.ask(5).is_err() && bed.client.is_broken());
}

/// Fills the socket, so that nothing more can be sent.
fn fill(bed: &mut Bed) {
    while !bed.client.wants_write() {
        bed.ask(0).unwrap();
    }
}

#[test]
fn a_peer_that_reads_late_gets_everything() {
    let limits = AsyncLimits {
        max_outstanding: usize::MAX,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    fill(&mut bed);
    let calls = bed.client.outstanding();
    let (mut reader, mut seen) = (FrameReader::new(CONTROL_MAX_FRAME), 0);
    bed.peer.set_nonblocking(true).unwrap();
    let mut chunk = vec![0; 1 << 16];
    while seen < calls {
        if let Ok(count) = bed.peer.read(&mut chunk) {
            let mut input = &chunk[..count];
            while !input.is_empty() {
                if let Some(frame) = reader.feed(&mut input).unwrap() {
                    assert_eq!(frame.header.kind, TYPE_REQUEST);
                    seen += 1;
                }
            }
        }
        bed.client.on_writable(bed.now).unwrap();
    }
    assert!(!bed.client.wants_write());
}

#[test]
fn a_peer_that_answers_without_reading_costs_a_bounded_amount() {
    let limits = AsyncLimits {
        max_outstanding: usize::MAX,
        ..AsyncLimits::default()
    };
    let mut bed = bed_with(limits);
    fill(&mut bed);
    let error = loop {
        if let Err(error) = bed.ask(0) {
            break error;
        }
        assert!(
            bed.client.outstanding() < 1 << 20,
            "the outbox grows without end"
        );
    };
    assert!(error.to_string().contains("does not read"), "{error}");
    assert!(bed.client.is_broken());
    assert!(bed.client.as_fd().try_clone_to_owned().is_ok());
}

#[test]
fn a_status_of_the_peers_is_no_error_of_the_channel() {
    let mut bed = bed();
    bed.ask(1).unwrap();
    let status = RpcStatus::unimplemented("x", "y");
    bed.send(&response(1, Err(&status)));
    bed.readable().unwrap();
    assert!(matches!(&bed.answers[..], [(1, Err(s))] if s.code == Code::Unimplemented));
    assert!(!bed.client.is_broken());
}

proptest! {
    #[test]
    fn garbage_neither_panics_nor_answers_anything_twice(
        asked in 0u64..8,
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        cuts in prop::collection::vec(1usize..80, 1..20),
    ) {
        let mut bed = bed();
        for token in 0..asked {
            bed.ask(token).unwrap();
        }
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (part, more) = rest.split_at((*cut).min(rest.len()));
            bed.send(part);
            if bed.readable().is_err() || more.is_empty() {
                break;
            }
            rest = more;
        }
        let mut tokens = bed.tokens();
        tokens.extend(bed.client.give_up());
        tokens.sort_unstable();
        prop_assert_eq!(tokens, (0..asked).collect::<Vec<_>>());
    }

    #[test]
    fn nearly_right_frames_are_taken_or_refused_whole(
        asked in 1u64..8,
        frames in prop::collection::vec(
            (0u32..20, 0u8..5, prop::collection::vec(any::<u8>(), 0..30)), 1..10),
    ) {
        let mut bed = bed();
        for token in 0..asked {
            bed.ask(token).unwrap();
        }
        let mut bytes = Vec::new();
        for (stream_id, kind, body) in &frames {
            frame::encode(&mut bytes, *kind, *stream_id, 0, body).unwrap();
        }
        bed.send(&bytes);
        let result = bed.readable();
        let good = bed.tokens().len();
        prop_assert!(good <= frames.len());
        prop_assert_eq!(result.is_err(), good < frames.len());
    }
}
