//! The stream of AttachConsole.

use std::io::Write;
use std::thread;
use std::time::Instant;

use bulkhead_proto::client::{Speaker, Subscription};
use bulkhead_proto::frame::{FLAG_REMOTE_OPEN, TYPE_DATA};
use bulkhead_proto::machine::{ConsoleAttach, ConsoleInput, ConsoleOutput};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::stubs::{asynchronous, ttrpc};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::line::{KEPT, Line};

/// A machine that has one console.
struct Console(Arc<Line>);

impl MachineService for Console {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        reply.complete(match request {
            ApiRequest::AttachConsole { history, .. } => self
                .0
                .join(history)
                .map(|client| ApiResponse::Console(Arc::new(client)))
                .ok_or_else(|| RpcStatus::new(Code::ResourceExhausted, "too many")),
            _ => Ok(ApiResponse::Info(Box::default())),
        });
    }
}

fn fixture() -> (Fixture, Arc<Line>) {
    let line = Line::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let console = Console(Arc::clone(&line));
    (
        Fixture::new(console, Limits::default(), EventLog::new()),
        line,
    )
}

fn attach(history: u32) -> ConsoleInput {
    let mut input = ConsoleInput::new();
    let mut attach = ConsoleAttach::new();
    attach.history_bytes = history;
    input.set_attach(attach);
    input
}

fn typed(bytes: &[u8]) -> ConsoleInput {
    let mut input = ConsoleInput::new();
    input.set_typed(bytes.to_vec());
    input
}

fn attached(fixture: &Fixture) -> (Speaker, Subscription<ConsoleOutput>) {
    let (speaker, mut stream) = fixture
        .client()
        .converse(MACHINE_SERVICE, "AttachConsole", &attach(0), LONG)
        .unwrap();
    let first: ConsoleOutput = stream.next(Some(LONG)).unwrap().unwrap();
    assert!(first.printed.is_empty());
    (speaker, stream)
}

fn until(what: &str, mut met: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !met() {
        assert!(Instant::now() < end, "{what}");
        thread::yield_now();
    }
}

#[test]
fn the_reference_client_reads_and_types() {
    let (fixture, line) = fixture();
    line.print(b"booted\n");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = ttrpc::r#async::Client::connect(&fixture.address())
            .await
            .unwrap();
        let machine = asynchronous::machine_ttrpc::MachineClient::new(client);
        let mut stream = machine
            .attach_console(ttrpc::context::with_duration(Duration::ZERO))
            .await
            .unwrap();
        stream.send(&attach(3)).await.unwrap();
        assert!(stream.recv().await.unwrap().printed.is_empty());
        assert_eq!(stream.recv().await.unwrap().printed, b"ed\n");
        stream.send(&typed(b"ls\n")).await.unwrap();
        until("it is typed", || line.is_typed());
        assert_eq!(line.take_typed(99), b"ls\n");
        line.print(b"bin\n");
        assert_eq!(stream.recv().await.unwrap().printed, b"bin\n");
        // Unary calls go on beside the stream.
        let question = InfoRequest::new();
        let info = machine.info(ttrpc::context::with_duration(LONG), &question);
        info.await.unwrap();
        stream.close_send().await.unwrap();
        line.print(b"still read");
        assert_eq!(stream.recv().await.unwrap().printed, b"still read");
        line.close();
        assert!(matches!(stream.recv().await, Err(ttrpc::Error::Eof)));
    });
}

#[test]
fn a_client_that_vanishes_leaves_nothing() {
    let (fixture, line) = fixture();
    for _ in 0..20 {
        let (speaker, stream) = attached(&fixture);
        assert!(line.is_joined());
        speaker.say(&typed(b"x"), LONG).unwrap();
        drop((speaker, stream));
        until("it has left", || !line.is_joined());
        line.take_typed(99);
    }
}

#[test]
fn what_the_guest_does_not_take_waits_in_the_clients_own_socket() {
    let (fixture, line) = fixture();
    let (speaker, _stream) = attached(&fixture);
    let text: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (send, all) = (text.clone(), text.len());
    let typist = thread::spawn(move || {
        for piece in send.chunks(60_000) {
            speaker.say(&typed(piece), LONG).unwrap();
        }
        speaker
    });
    let mut taken = Vec::new();
    until("all is typed", || {
        taken.extend(line.take_typed(1000));
        taken.len() >= all
    });
    assert!(taken == text);
    drop(typist.join().unwrap());
}

#[test]
fn a_client_that_reads_nothing_misses_bytes_costs_nobody_anything_and_is_cut_off() {
    let line = Line::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let limits = Limits {
        stall: SHORT,
        ..Limits::default()
    };
    let fixture = Fixture::new(Console(Arc::clone(&line)), limits, EventLog::new());
    let mut slow = fixture.connect();
    slow.write_all(&opening()).unwrap();
    slow.write_all(&data(&attach(0))).unwrap();
    until("it is attached", || line.is_joined());
    // Far more than the socket and the server hold.
    until("it is cut off", || {
        line.print(&[b'x'; KEPT]);
        !line.is_joined()
    });
    info(&mut fixture.client()).unwrap();
}

#[test]
fn one_that_comes_back_to_it_is_told_what_it_missed() {
    let (fixture, line) = fixture();
    let (_speaker, mut stream) = attached(&fixture);
    let mut printed = 0_u64;
    for _ in 0..100 {
        line.print(&[b'x'; KEPT]);
        printed += KEPT as u64;
    }
    line.close();
    let (mut read, mut lost) = (0, 0);
    while let Some(output) = stream.next(Some(LONG)).unwrap() {
        read += output.printed.len() as u64;
        lost += output.lost;
    }
    assert_eq!(read + lost, printed);
}

/// The request that opens a stream.
fn opening() -> Vec<u8> {
    let mut body = Vec::new();
    let view = envelope::RequestView {
        service: MACHINE_SERVICE,
        method: "AttachConsole",
        payload: &[],
        timeout_nano: 0,
    };
    envelope::encode_request(&mut body, &view);
    let mut out = Vec::new();
    frame::encode(&mut out, TYPE_REQUEST, 1, FLAG_REMOTE_OPEN, &body).unwrap();
    out
}

fn data(input: &ConsoleInput) -> Vec<u8> {
    let mut out = Vec::new();
    let body = input.write_to_bytes().unwrap();
    frame::encode(&mut out, TYPE_DATA, 1, 0, &body).unwrap();
    out
}

#[test]
fn whatever_breaks_the_order_ends_the_stream_by_name() {
    let (fixture, line) = fixture();
    let mut end = Vec::new();
    frame::encode_end_of_stream(&mut end, 1);
    let mut garbage = Vec::new();
    frame::encode(&mut garbage, TYPE_DATA, 1, 0, &[0xff; 9]).unwrap();
    let mut wrong_device = attach(0);
    wrong_device.mut_attach().device = "../x".into();
    let mut with_history = attach(1);
    with_history.mut_attach().device = "con".into();
    for (frames, attached) in [
        (vec![data(&typed(b"first"))], false),
        (vec![data(&ConsoleInput::new())], false),
        (vec![end.clone()], false),
        (vec![garbage.clone()], false),
        (vec![data(&attach(65_537))], false),
        (vec![data(&wrong_device)], false),
        (vec![data(&with_history)], false),
        (vec![data(&attach(0)), data(&attach(0))], true),
        (vec![data(&attach(0)), data(&ConsoleInput::new())], true),
        (vec![data(&attach(0)), garbage], true),
        (vec![data(&attach(0)), data(&typed(&[0; 65_537]))], true),
        (vec![data(&attach(0)), end, data(&typed(b"late"))], true),
    ] {
        let mut stream = fixture.connect();
        stream.write_all(&opening()).unwrap();
        stream.write_all(&frames.concat()).unwrap();
        let mut reader = FrameReader::new(1 << 20);
        if attached {
            let first = next_frame(&mut stream, &mut reader).unwrap();
            assert_eq!(first.header.kind, TYPE_DATA);
        }
        assert_eq!(answer(&mut stream), (1, Err(Code::InvalidArgument)));
        until("it has left", || !line.is_joined());
    }
}

#[test]
fn streams_of_one_connection_and_clients_of_one_console_are_bounded() {
    let (fixture, _line) = fixture();
    let most = crate::line::MOST_CLIENTS;
    let clients: Vec<_> = (0..most).map(|_| attached(&fixture)).collect();
    let (_speaker, mut one_more) = fixture
        .client()
        .converse::<_, ConsoleOutput>(MACHINE_SERVICE, "AttachConsole", &attach(0), LONG)
        .unwrap();
    assert_eq!(code_of(one_more.next(Some(LONG))), Code::ResourceExhausted);
    drop(clients);

    let limits = Limits {
        subscriptions: 1,
        ..Limits::default()
    };
    let fixture = Fixture::new(Prompt, limits, EventLog::new());
    let mut stream = fixture.connect();
    stream
        .write_all(&[opening(), request(3, "AttachConsole")].concat())
        .unwrap();
    assert_eq!(answer(&mut stream), (3, Err(Code::ResourceExhausted)));
}

#[test]
fn a_client_that_never_says_which_console_it_wants_is_let_go_of_when_it_says_no_more() {
    use std::io::Read;
    let (fixture, line) = fixture();
    let mut stream = fixture.connect();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(&opening()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty() && !line.is_joined());
}

#[test]
fn a_reader_is_refused_and_no_other_method_takes_a_stream() {
    let (fixture, line) = fixture();
    let mut reader = fixture.reader();
    reader.write_all(&opening()).unwrap();
    assert_eq!(answer(&mut reader), (1, Err(Code::PermissionDenied)));
    assert!(!line.is_joined());
    let mut stream = fixture.connect();
    let mut other = request(1, "Info");
    // The flags end the header.
    other[9] = FLAG_REMOTE_OPEN;
    stream.write_all(&other).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::InvalidArgument)));
}

#[test]
fn the_servers_end_ends_the_stream_with_what_was_printed() {
    let (mut fixture, line) = fixture();
    let (_speaker, mut stream) = attached(&fixture);
    let read = thread::spawn(move || {
        let mut text = Vec::new();
        while let Some(output) = stream.next(Some(LONG)).unwrap() {
            text.extend(output.printed);
        }
        text
    });
    line.print(b"last words");
    fixture.handle.end(LONG);
    assert_eq!(read.join().unwrap(), b"last words");
    assert!(!line.is_joined());
}
