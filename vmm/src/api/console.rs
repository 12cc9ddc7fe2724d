//! A client that is attached to a console, or about to be: the stream of `AttachConsole`. Part of a
//! connection, on the `api` thread.
//!
//! ```text
//!   a request ──▶ opening ── attach ──▶ asked ── the manager's answer ──▶ open
//! ```

use std::sync::Arc;
use std::time::Instant;

use bulkhead_proto::frame::{self, Frame};
use bulkhead_proto::machine::{ConsoleAttach, ConsoleInput, ConsoleOutput, console_input};
use bulkhead_proto::outbox::Outbox;
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::eventfd::EventFd;

use super::request::{self, ApiRequest, short};
use crate::cli::machine_args::check_id;
use crate::line::{Client, KEPT, Printed};

/// Most bytes of a message either way, beside what frames it.
const PIECE: usize = 16 * 1024;
const MOST_TYPED: usize = 64 * 1024;

enum Stage {
    /// Nothing has been said of which console.
    Opening,
    /// The manager is asked for it.
    Asked,
    Open(Arc<Client>),
}

/// A client at a console.
pub(super) struct Attachment {
    stage: Stage,
    /// The client types no more.
    input_closed: bool,
    /// What it has typed and there was no room for.
    typed: Vec<u8>,
    /// When the client wants it to end.
    pub(super) deadline: Option<Instant>,
}

/// What a message leads to.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// The next one.
    More,
    /// Ask the manager.
    Ask(ApiRequest),
}

impl Attachment {
    pub(super) fn new(deadline: Option<Instant>) -> Self {
        Self {
            stage: Stage::Opening,
            input_closed: false,
            typed: Vec::new(),
            deadline,
        }
    }

    /// The client has not said which console it wants.
    pub(super) fn is_opening(&self) -> bool {
        matches!(self.stage, Stage::Opening)
    }

    /// Nothing more of its connection is read: what comes next cannot be taken yet.
    pub(super) fn holds_back(&self) -> bool {
        matches!(self.stage, Stage::Asked) || !self.typed.is_empty()
    }

    /// A data frame of the client's.
    pub(super) fn on_frame(&mut self, frame: &Frame) -> Result<Next, RpcStatus> {
        let header = frame.header;
        if self.input_closed {
            return Err(invalid(
                "the client has closed its direction of the stream: attach again to type",
            ));
        }
        self.input_closed = header.has(frame::FLAG_REMOTE_CLOSED);
        if header.has(frame::FLAG_NO_DATA) {
            return match self.stage {
                Stage::Opening => Err(first_is_missing()),
                _ => Ok(Next::More),
            };
        }
        self.on_message(request::console_input(&frame.body)?)
    }

    /// The only message of a client that will not type.
    pub(super) fn on_only_message(&mut self, message: ConsoleInput) -> Result<Next, RpcStatus> {
        self.input_closed = true;
        self.on_message(message)
    }

    pub(super) fn on_message(&mut self, message: ConsoleInput) -> Result<Next, RpcStatus> {
        match (&self.stage, message.what) {
            (Stage::Opening, Some(console_input::What::Attach(attach))) => {
                let request = attach_request(attach)?;
                self.stage = Stage::Asked;
                Ok(Next::Ask(request))
            }
            (Stage::Opening, _) => Err(first_is_missing()),
            (_, Some(console_input::What::Typed(typed))) if typed.len() > MOST_TYPED => {
                Err(invalid(&format!(
                    "typed has {} bytes: send at most {MOST_TYPED} in a message",
                    typed.len()
                )))
            }
            (_, Some(console_input::What::Typed(typed))) => {
                self.typed.extend_from_slice(&typed);
                self.type_in();
                Ok(Next::More)
            }
            (_, Some(console_input::What::Attach(_))) => Err(invalid(
                "attach comes first and once: use another stream for another console",
            )),
            (_, _) => Err(invalid("a message that says nothing: give typed")),
        }
    }

    /// The manager has found it.
    pub(super) fn open(&mut self, client: Arc<Client>, bell: &Arc<EventFd>) {
        client.attend(bell);
        self.stage = Stage::Open(client);
    }

    fn type_in(&mut self) {
        if let Stage::Open(client) = &self.stage
            && !self.typed.is_empty()
        {
            let taken = client.type_in(&self.typed);
            self.typed.drain(..taken.min(self.typed.len()));
        }
    }

    /// There is nothing to come but what its console has printed already.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_))
    }

    /// Moves bytes as far as both ends keep up: `room` is how much may wait for the client. True:
    /// the console has ended.
    pub(super) fn pump(&mut self, stream_id: u32, outbox: &mut Outbox, room: usize) -> bool {
        self.type_in();
        let Stage::Open(client) = &self.stage else {
            return false;
        };
        while outbox.len() < room {
            let (lost, printed) = match client.read(PIECE) {
                Printed::Bytes { lost, bytes } => (lost, bytes),
                Printed::NotYet => return false,
                Printed::Ended => return true,
            };
            let mut output = ConsoleOutput::new();
            (output.lost, output.printed) = (lost, printed);
            put(outbox, stream_id, &output);
        }
        false
    }
}

/// Says that the client is attached.
pub(super) fn put_first(outbox: &mut Outbox, stream_id: u32) {
    put(outbox, stream_id, &ConsoleOutput::new());
}

fn put(outbox: &mut Outbox, stream_id: u32, output: &ConsoleOutput) {
    // A piece of bytes and a number: neither fails.
    let body = output.write_to_bytes().unwrap_or_default();
    let _ = frame::encode(outbox.buffer(), frame::TYPE_DATA, stream_id, 0, &body);
}

fn attach_request(attach: ConsoleAttach) -> Result<ApiRequest, RpcStatus> {
    let history = usize::try_from(attach.history_bytes).unwrap_or(usize::MAX);
    if attach.device.is_empty() {
        if attach.port != 0 {
            return Err(invalid(&format!(
                "port is {}: the serial port is one alone: name the console in device",
                attach.port
            )));
        }
        if history > KEPT {
            return Err(invalid(&format!(
                "history_bytes is {history}: at most {KEPT} are kept"
            )));
        }
    } else if history != 0 {
        return Err(invalid(
            "history_bytes: nothing is kept of a device's console: give 0, or name no device for the serial port",
        ));
    }
    if !attach.device.is_empty() && check_id(&attach.device).is_err() {
        return Err(invalid(&format!(
            "device is {:?}: no device has such a name (see Devices)",
            short(&attach.device)
        )));
    }
    Ok(ApiRequest::AttachConsole {
        device: attach.device,
        port: attach.port,
        history,
    })
}

fn first_is_missing() -> RpcStatus {
    invalid("attach is missing: say in the first message which console it is to be")
}

fn invalid(line: &str) -> RpcStatus {
    RpcStatus::new(Code::InvalidArgument, line)
}
