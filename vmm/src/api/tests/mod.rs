//! The API server over real unix sockets, against the reference implementation's clients
//! and against raw bytes, with a machine that the tests play themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bulkhead_proto::client::ClientError;
use bulkhead_proto::frame::{self, FrameReader, TYPE_REQUEST, TYPE_RESPONSE};
use bulkhead_proto::machine::{DevicesResponse, InfoRequest, InfoResponse};
use bulkhead_proto::{BlockingClient, Code, MACHINE_SERVICE, RpcStatus, envelope};

use super::limits::Limits;
use super::*;

mod calls;
mod consoles;
mod devices;
mod end;
mod limits;
mod page;
mod roles;
mod streams;
mod vm;

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
    /// That of readers.
    reading: PathBuf,
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
        let reading = path.with_extension("reading");
        let door = |path, role| {
            let listener = UnixListener::bind(path).unwrap();
            Door::admitting(listener, role, Box::new(move |_: &_| admit))
        };
        let events = Arc::new(events);
        let handle = ApiServer::start_with(
            vec![door(&path, Role::Operator), door(&reading, Role::Reader)],
            Arc::new(service),
            Arc::clone(&events),
            (Services::Vm, limits),
            crate::threads::no_hook(),
        )
        .unwrap();
        Self {
            path,
            reading,
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
        Self::connect_to(&self.path)
    }

    /// As a reader.
    fn reader(&self) -> UnixStream {
        Self::connect_to(&self.reading)
    }

    fn connect_to(path: &PathBuf) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
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
        let _ = std::fs::remove_file(&self.reading);
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
