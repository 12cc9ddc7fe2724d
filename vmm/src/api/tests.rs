//! The API server over real unix sockets, against the reference implementation's clients
//! and against raw bytes, with a machine that the tests play themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bulkhead_proto::client::ClientError;
use bulkhead_proto::frame::{self, FrameReader, Header, TYPE_DATA, TYPE_REQUEST, TYPE_RESPONSE};
use bulkhead_proto::machine::{
    BootRequest, BootResponse, CreateRequest, DevicesRequest, DevicesResponse, Event,
    EventsRequest, InfoRequest, InfoResponse, PauseRequest, PauseResponse, ShutdownRequest,
};
use bulkhead_proto::stubs::{asynchronous, blocking, ttrpc};
use bulkhead_proto::{BlockingClient, Code, MACHINE_SERVICE, RpcStatus, envelope};

use super::connection::Limits;
use super::*;

/// Ends every wait of a test that should not have waited.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

/// A machine that hands every request to the test.
struct Machine(Mutex<mpsc::Sender<(ApiRequest, ReplyHandle)>>);

impl MachineService for Machine {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        // A test that has ended drops the reply with the receiver.
        let _ = self.0.lock().unwrap().send((request, reply));
    }
}

/// A machine that answers at once, on the `api` thread.
struct Prompt;

impl MachineService for Prompt {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        let outcome = match request {
            ApiRequest::Info => {
                let mut info = InfoResponse::new();
                info.version = "test".into();
                info.stop_reason = "x".repeat(4000);
                Ok(ApiResponse::Info(Box::new(info)))
            }
            ApiRequest::Devices => {
                let mut devices = DevicesResponse::new();
                devices.devices.resize_with(3, Default::default);
                Ok(ApiResponse::Devices(Box::new(devices)))
            }
            ApiRequest::Pause => Err(RpcStatus::failed_precondition("boot it first")),
            _ => Ok(ApiResponse::Done),
        };
        reply.complete(outcome);
    }
}

struct Fixture {
    path: PathBuf,
    events: Arc<EventLog>,
    handle: ApiServerHandle,
}

impl Fixture {
    fn new(service: impl MachineService + 'static, limits: Limits, events: EventLog) -> Self {
        Self::admitting(service, limits, events, true)
    }

    fn admitting(
        service: impl MachineService + 'static,
        limits: Limits,
        events: EventLog,
        admit: bool,
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("bulkhead-api-{}-{number}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let events = Arc::new(events);
        let admits = Box::new(move |_: &_| admit);
        let handle = ApiServer::start_with(
            listener,
            Arc::new(service),
            Arc::clone(&events),
            limits,
            admits,
        )
        .unwrap();
        Self {
            path,
            events,
            handle,
        }
    }

    /// A server whose machine answers at once.
    fn prompt() -> Self {
        Self::new(Prompt, Limits::default(), EventLog::new())
    }

    /// A server whose machine is the test.
    fn manual(limits: Limits) -> (Self, mpsc::Receiver<(ApiRequest, ReplyHandle)>) {
        let (sender, receiver) = mpsc::channel();
        (
            Self::new(Machine(Mutex::new(sender)), limits, EventLog::new()),
            receiver,
        )
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream
    }

    fn client(&self) -> BlockingClient {
        BlockingClient::new(self.connect(), 1 << 20)
    }

    fn address(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn info(client: &mut BlockingClient) -> Result<InfoResponse, ClientError> {
    client.call(MACHINE_SERVICE, "Info", &InfoRequest::new(), LONG)
}

fn code_of<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Status(status)) => status.code,
        other => panic!("{other:?}"),
    }
}

fn request_with(stream_id: u32, method: &str, payload: &[u8], timeout_nano: i64) -> Vec<u8> {
    let mut body = Vec::new();
    let view = envelope::RequestView {
        service: MACHINE_SERVICE,
        method,
        payload,
        timeout_nano,
    };
    envelope::encode_request(&mut body, &view);
    let mut out = Vec::new();
    frame::encode(&mut out, TYPE_REQUEST, stream_id, 0, &body).unwrap();
    out
}

fn request(stream_id: u32, method: &str) -> Vec<u8> {
    request_with(stream_id, method, &[], 0)
}

/// The next frame, or `None` at the server's end.
fn next_frame(stream: &mut UnixStream, reader: &mut FrameReader) -> Option<frame::Frame> {
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(1) => {}
            Ok(_) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        }
        if let Some(frame) = reader.feed(&mut &byte[..]).unwrap() {
            return Some(frame);
        }
    }
}

fn answer(stream: &mut UnixStream) -> (u32, Result<(), Code>) {
    let frame = next_frame(stream, &mut FrameReader::new(1 << 20)).expect("an answer");
    assert_eq!(frame.header.kind, TYPE_RESPONSE);
    let outcome = match envelope::parse_response(&frame.body).unwrap() {
        envelope::ResponseView::Ok(_) => Ok(()),
        envelope::ResponseView::Failed(status) => Err(status.code),
    };
    (frame.header.stream_id, outcome)
}

#[test]
fn the_reference_blocking_client_calls_every_unary_method() {
    let fixture = Fixture::prompt();
    let client = ttrpc::Client::connect(&fixture.address()).unwrap();
    let machine = blocking::machine_ttrpc::MachineClient::new(client);
    let context = || ttrpc::context::with_duration(LONG);
    assert_eq!(
        machine
            .info(context(), &InfoRequest::new())
            .unwrap()
            .version,
        "test"
    );
    assert_eq!(
        machine
            .devices(context(), &DevicesRequest::new())
            .unwrap()
            .devices
            .len(),
        3
    );
    machine.boot(context(), &BootRequest::new()).unwrap();
    machine.resume(context(), &Default::default()).unwrap();
    machine
        .shutdown(context(), &ShutdownRequest::new())
        .unwrap();
    let Err(ttrpc::Error::RpcStatus(status)) = machine.pause(context(), &PauseRequest::new())
    else {
        panic!("the machine refuses to pause")
    };
    assert_eq!(status.code(), ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(status.message(), "boot it first");
    let Err(ttrpc::Error::RpcStatus(status)) = machine.create(context(), &CreateRequest::new())
    else {
        panic!("a configuration is missing")
    };
    assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
}

#[test]
fn two_hundred_calls_at_once_on_one_connection_are_all_answered() {
    let fixture = Fixture::prompt();
    let client = ttrpc::Client::connect(&fixture.address()).unwrap();
    let machine = blocking::machine_ttrpc::MachineClient::new(client);
    let threads: Vec<_> = (0..200)
        .map(|_| {
            let machine = machine.clone();
            std::thread::spawn(move || {
                machine
                    .info(ttrpc::context::with_duration(LONG), &InfoRequest::new())
                    .unwrap()
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap().version, "test");
    }
}

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
fn an_answer_may_come_from_another_thread_and_in_another_order() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream
        .write_all(&[request(1, "Boot"), request(3, "Info")].concat())
        .unwrap();
    let (boot, boot_reply) = requests.recv_timeout(LONG).unwrap();
    let (info, info_reply) = requests.recv_timeout(LONG).unwrap();
    assert_eq!((boot, info), (ApiRequest::Boot, ApiRequest::Info));
    info_reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut stream), (3, Ok(())));
    boot_reply.complete(Err(RpcStatus::failed_precondition("no")));
    assert_eq!(answer(&mut stream), (1, Err(Code::FailedPrecondition)));
}

#[test]
fn a_reply_that_is_dropped_says_that_the_machine_is_gone() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    drop(requests.recv_timeout(LONG).unwrap());
    assert_eq!(answer(&mut stream), (1, Err(Code::Aborted)));
}

#[test]
fn a_deadline_is_kept_by_the_server_and_the_late_answer_meets_nobody() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    let nanos = i64::try_from(SHORT.as_nanos()).unwrap();
    stream
        .write_all(&request_with(1, "Boot", &[], nanos))
        .unwrap();
    let (_, late) = requests.recv_timeout(LONG).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::DeadlineExceeded)));
    assert!(late.is_abandoned());
    // The same stream id again: the old answer must not be taken for the new one's.
    stream.write_all(&request(1, "Pause")).unwrap();
    let (_, current) = requests.recv_timeout(LONG).unwrap();
    assert!(!current.is_abandoned());
    late.complete(Ok(ApiResponse::Done));
    current.complete(Err(RpcStatus::failed_precondition("the right one")));
    assert_eq!(answer(&mut stream), (1, Err(Code::FailedPrecondition)));
}

#[test]
fn the_server_has_a_limit_of_its_own_on_a_calls_time() {
    let limits = Limits {
        call_time: SHORT,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::DeadlineExceeded)));
    drop(requests);
}

#[test]
fn a_client_that_hangs_up_abandons_its_calls() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    let (_, reply) = requests.recv_timeout(LONG).unwrap();
    drop(stream);
    while !reply.is_abandoned() {
        std::thread::sleep(Duration::from_millis(1));
    }
    reply.complete(Ok(ApiResponse::Done));
    drop(requests);
}

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
fn a_client_that_never_reads_is_not_listened_to_and_then_cut_off() {
    let limits = Limits {
        stall: Duration::from_millis(200),
        ..Limits::default()
    };
    let fixture = Fixture::new(Prompt, limits, EventLog::new());
    let mut stream = fixture.connect();
    stream.set_nonblocking(true).unwrap();
    let one = request(1, "Info");
    // 4 KiB of answer for each of these: without bounds the server would hold them all.
    let mut requests = 0u64;
    let ended = loop {
        match stream.write(&one) {
            Ok(count) if count == one.len() => requests += 1,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => break error.kind(),
        }
        assert!(requests < 1_000_000, "the server takes requests for ever");
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
    let mut stream = fixture.connect();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_may_close_its_writing_half_and_still_gets_its_answer() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    requests
        .recv_timeout(LONG)
        .unwrap()
        .1
        .complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut stream), (1, Ok(())));
    assert_eq!(
        stream.read(&mut [0]).unwrap(),
        0,
        "then the server closes too"
    );
}

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
    let one = request(1, "Info");
    while stream.write(&one).is_ok() {}
    fixture.handle.end(SHORT);
    assert!(
        UnixStream::connect(&fixture.path).is_err(),
        "the listener is closed"
    );
}
