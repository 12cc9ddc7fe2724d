//! Every request message of both services, filled at random and bent afterwards, to a VMM whose machine is there: each is
//! answered, and the machine, its device processes and the VMM's memory stay as they were.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::envelope::{self, ResponseView};
use bulkhead_proto::frame::{self, FLAG_REMOTE_OPEN, TYPE_DATA, TYPE_REQUEST};
use bulkhead_proto::protobuf::reflect::{
    FileDescriptor, MessageDescriptor, MethodDescriptor, ReflectValueBox, RuntimeFieldType,
    RuntimeType,
};
use bulkhead_proto::protobuf::{MessageDyn, UnknownValue};
use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, guest_file, nothing_left};

use super::api_obeyed::{self, OBEYED};
use super::assault::{assault, create, encoded, resident};
use super::bad_input::appears;
use super::block::sha256;
use super::disk::LIMIT;
use super::kata_native as kata;
use super::shell::guest;

/// Requests of each message.
const ROUNDS: u64 = 600;
/// The same, where a guest takes the CPU's time.
const ROUNDS_BESIDE_A_GUEST: u64 = 60;
/// What they may add to the VMM's memory, KiB.
const MAY_GROW: u64 = 16 << 10;
/// Longest answer that is waited for: a switch that nobody serves is waited for itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(40);
/// How long a stream is listened to.
pub(super) const MOMENT: Duration = Duration::from_millis(50);
/// Those that need no guest.
pub fn native() -> Vec<Test> {
    vec![Test::short("api-fuzz")(
        "every request message, filled at random and bent, is answered and harms nothing",
        fuzz,
    )]
}

/// Those that need one.
pub fn tests() -> Vec<Test> {
    vec![Test::short("api-fuzz")(
        "hostile clients and every request message cost a guest that runs nothing, and the VMM less than 16 MiB",
        beside_a_guest,
    )]
}

/// Fills messages by their descriptors.
pub(super) struct Filler {
    state: u64,
    scratch: String,
}

impl Filler {
    /// One that names files beneath this directory.
    pub(super) fn new(scratch: &str) -> Self {
        Self {
            state: 0x5eed,
            scratch: scratch.to_owned(),
        }
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005);
        self.state = self.state.wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % end.max(1)
    }

    fn text(&mut self) -> String {
        let scratch = self.scratch.clone();
        match self.below(12) {
            0 => String::new(),
            1 => "x".repeat(5000),
            2 => "\u{0}\n\u{1b}[2J\u{2028}".to_owned(),
            3 => format!("{scratch}/../{}", "../".repeat(300)),
            4 => format!("{scratch}/file"),
            5 => format!("{scratch}/socket{}", self.below(4)),
            6 => "/dev/zero".to_owned(),
            7 => "hp1".to_owned(),
            8 => "-1".to_owned(),
            9 => "%s%n".to_owned(),
            _ => format!("id{}", self.below(6)),
        }
    }

    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 1 << self.below(64),
            4 => u64::from(u32::MAX) + self.below(2),
            _ => self.below(1 << 12),
        }
    }

    fn value(&mut self, kind: &RuntimeType, depth: u32) -> Option<ReflectValueBox> {
        let number = self.number();
        Some(match kind {
            RuntimeType::I32 => (number as i32).into(),
            RuntimeType::I64 => (number as i64).into(),
            RuntimeType::U32 => (number as u32).into(),
            RuntimeType::U64 => number.into(),
            RuntimeType::Bool => number.is_multiple_of(2).into(),
            RuntimeType::String => self.text().into(),
            RuntimeType::VecU8 => self.text().into_bytes().into(),
            // Also one that there is not.
            RuntimeType::Enum(kind) => ReflectValueBox::Enum(kind.clone(), self.below(7) as i32),
            RuntimeType::Message(kind) if depth < 8 => {
                ReflectValueBox::Message(self.message(kind, depth + 1))
            }
            _ => return None,
        })
    }

    fn message(&mut self, kind: &MessageDescriptor, depth: u32) -> Box<dyn MessageDyn> {
        let mut message = kind.new_instance();
        for field in kind.fields() {
            if self.below(3) == 0 {
                continue;
            }
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(of) => {
                    if let Some(value) = self.value(&of, depth) {
                        field.set_singular_field(&mut *message, value);
                    }
                }
                RuntimeFieldType::Repeated(of) => {
                    let many = if self.below(20) == 0 { 300 } else { 3 };
                    for _ in 0..self.below(many) {
                        if let Some(value) = self.value(&of, depth) {
                            field.mut_repeated(&mut *message).push(value);
                        }
                    }
                }
                RuntimeFieldType::Map(..) => {}
            }
        }
        if self.below(10) == 0 {
            let unknown = message.mut_unknown_fields_dyn();
            unknown.add_value(1000, UnknownValue::Varint(1));
        }
        message
    }

    /// A request of this message; in every second case as no encoder would make it.
    pub(super) fn request(&mut self, kind: &MessageDescriptor) -> Vec<u8> {
        let mut bytes = self
            .message(kind, 0)
            .write_to_bytes_dyn()
            .unwrap_or_default();
        let at = self.below(bytes.len() as u64) as usize;
        match self.below(6) {
            0 => bytes.truncate(at),
            1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            2 => bytes.extend((0..self.below(40)).map(|n| (n * 37) as u8)),
            _ => {}
        }
        bytes.truncate(200 << 10);
        bytes
    }
}

/// What becomes of a call.
#[derive(Debug)]
pub(super) enum Answer {
    Obeyed,
    Refused(RpcStatus),
    /// The connection was ended.
    HungUp,
    /// Nothing came in time.
    Silent,
}

/// Answers by their kind.
#[derive(Default)]
struct Answers {
    obeyed: u64,
    refused: u64,
    /// The connection was ended.
    hung_up: u64,
}

/// Attaches to the serial port, and then sends something else: whatever that leads to, the next
/// call is answered.
fn converse(socket: &str, service: &str, method: &str, payload: &[u8]) -> Result<Answer, String> {
    let say = |what: &str, e: std::io::Error| format!("{service}.{method}: {what}: {e}");
    let mut stream = UnixStream::connect(socket).map_err(|e| say("connect", e))?;
    let limited = stream.set_read_timeout(Some(PATIENCE));
    limited.map_err(|e| say("limit", e))?;
    let mut body = Vec::new();
    let request = envelope::RequestView {
        service,
        method,
        payload: &[],
        timeout_nano: 0,
    };
    envelope::encode_request(&mut body, &request);
    // ConsoleInput { attach: ConsoleAttach {} }.
    let attach = [0x0a, 0];
    let mut bytes = Vec::new();
    for (kind, flags, body) in [
        (TYPE_REQUEST, FLAG_REMOTE_OPEN, body.as_slice()),
        (TYPE_DATA, 0, &attach),
        (TYPE_DATA, 0, payload),
    ] {
        frame::encode(&mut bytes, kind, 1, flags, body).map_err(|e| format!("{e:?}"))?;
    }
    // It may be cut off while it still writes.
    let _ = stream.write_all(&bytes);
    let mut header = [0; 10];
    stream
        .read_exact(&mut header)
        .map_err(|e| say("it is not let in", e))?;
    check(header[..4] == [0; 4] && header[8] == TYPE_DATA, || {
        format!("{service}.{method}: at first comes {header:?}")
    })?;
    let limited = stream.set_read_timeout(Some(MOMENT));
    limited.map_err(|e| say("limit", e))?;
    // Either it was typed, or it is refused.
    match stream.read_exact(&mut header) {
        Ok(()) => Ok(Answer::Refused(RpcStatus::invalid_argument(""))),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => Ok(Answer::Silent),
        Err(_) => Ok(Answer::HungUp),
    }
}

/// Calls, and waits so long for the answer.
pub(super) fn call(
    socket: &str,
    service: &str,
    method: &str,
    payload: &[u8],
    limit: Duration,
) -> Result<Answer, String> {
    let say = |what: &str, e: std::io::Error| format!("{service}.{method}: {what}: {e}");
    let mut stream = UnixStream::connect(socket).map_err(|e| say("connect", e))?;
    let limited = stream.set_read_timeout(Some(limit));
    limited
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(|e| say("limit", e))?;
    let bytes = encoded(service, 1, method, payload)?;
    // It may be cut off while it still writes.
    let _ = stream.write_all(&bytes);
    let mut header = [0; 10];
    match stream.read_exact(&mut header) {
        Ok(()) => {}
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => return Ok(Answer::Silent),
        Err(_) => return Ok(Answer::HungUp),
    }
    let [a, b, c, d, ..] = header;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    check(length <= 4 << 20, || format!("{method}: {length} bytes"))?;
    let mut answer = vec![0; length];
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.read_exact(&mut answer))
        .map_err(|e| say("half an answer", e))?;
    // An event of a stream is no answer's envelope.
    Ok(match envelope::parse_response(&answer) {
        Ok(ResponseView::Failed(status)) => Answer::Refused(status),
        _ => Answer::Obeyed,
    })
}

/// The methods of these services: each with its service's full name.
pub(super) fn methods(services: &[&FileDescriptor]) -> Vec<(String, MethodDescriptor)> {
    let mut all = Vec::new();
    for file in services {
        for service in file.services() {
            let name = match file.proto().package() {
                "" => service.proto().name().to_owned(),
                package => format!("{package}.{}", service.proto().name()),
            };
            all.extend(service.methods().map(|method| (name.clone(), method)));
        }
    }
    all
}

/// Every request message of these services, so many times.
fn bombard(
    socket: &str,
    scratch: &str,
    services: &[&FileDescriptor],
    rounds: u64,
) -> Result<(usize, Answers), String> {
    let mut filler = Filler::new(scratch);
    let mut all = Answers::default();
    let mut messages = 0;
    for (name, method) in methods(services) {
        let named = method.proto().name().to_owned();
        if OBEYED.contains(&named.as_str()) {
            continue;
        }
        messages += 1;
        // A stream of events may well begin with events that are yet to come.
        let limit = if named == "Events" { MOMENT } else { PATIENCE };
        for round in 0..rounds {
            let request = filler.request(&method.input_type());
            let speaks = method.proto().client_streaming() && round % 4 == 0;
            let answer = match speaks {
                true => converse(socket, &name, &named, &request)?,
                false => call(socket, &name, &named, &request, limit)?,
            };
            match answer {
                Answer::Silent if !speaks && limit == PATIENCE => {
                    return Err(format!("{name}.{named}: no answer"));
                }
                Answer::Obeyed | Answer::Silent => all.obeyed += 1,
                Answer::Refused(_) => all.refused += 1,
                Answer::HungUp => all.hung_up += 1,
            }
        }
    }
    Ok((messages, all))
}

fn fuzz() -> Verdict {
    let scratch = Scratch::new("api-fuzz")?;
    let machine_api = scratch.path("api");
    let disk = scratch.path("disk");
    sh(&format!(
        "truncate -s 4M {disk}; mkdir {0}; truncate -s 1M {0}/file",
        scratch.path("play")
    ))?;
    // Which serves both.
    let mut vmm = Vmm::start(&["--ttrpc", &machine_api])?;
    appears(&machine_api)?;
    let (kernel, root) = (guest_file("vmlinux"), format!("path={disk},id=root"));
    let create = ["create", "--kernel", &kernel, "--memory", "256M"];
    let more = ["--disk", &root, "--hotplug-ports", "2"];
    ctl(&machine_api, &[create.as_slice(), &more].concat())?;
    let resident = || resident(vmm.pid());
    let pid_of_root = || Ok::<_, String>(ctl(&machine_api, &["devices"])?["devices"][0].clone());
    let (before, root) = (resident()?, pid_of_root()?);
    let services = [
        bulkhead_proto::machine::file_descriptor(),
        bulkhead_proto::vmservice::file_descriptor(),
    ];
    let (messages, all) = bombard(&machine_api, &scratch.path("play"), &services, ROUNDS)?;
    println!(
        "[{messages} messages, {} requests obeyed, {} refused, {} hung up on]",
        all.obeyed, all.refused, all.hung_up
    );
    check(messages >= 20 && all.refused > all.obeyed, || {
        "the requests are not what they should be".to_owned()
    })?;
    let state = ctl(&machine_api, &["info"])?["state"].to_string();
    check(state.to_lowercase().contains("created"), || {
        vmm.story(&state)
    })?;
    let now = pid_of_root()?;
    check(
        now["pid"] == root["pid"] && now["state"] == root["state"],
        || vmm.story(&format!("the disk was {root}, and is {now}")),
    )?;
    let after = resident()?;
    check(after < before + MAY_GROW, || {
        format!("from {before} KiB to {after} KiB")
    })?;
    ctl(&machine_api, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

fn beside_a_guest() -> Verdict {
    let scratch = Scratch::new("api-fuzz-guest")?;
    let (socket, play) = (scratch.path("api"), scratch.path("play"));
    let disk = scratch.disk("disk", 8 << 20, 91)?;
    let device = format!("path={disk},id=root");
    let args = [
        "--api-socket",
        &socket,
        "--disk",
        &device,
        "--hotplug-ports",
        "2",
    ];
    sh(&format!("mkdir {play}; truncate -s 1M {play}/file"))?;
    let mut guest = guest(&[], &scratch, &[], &args)?;
    let sum = sha256(&disk)?;
    // It counts and reads on through all of it.
    guest.run("disk=$(grep -lx 16384 /sys/block/vd*/size | cut -d/ -f4) && [ -b /dev/$disk ]")?;
    guest.run("(while :; do dd if=/dev/$disk bs=1M iflag=direct 2>/dev/null | sha256sum >>/tmp/sums; done) & echo BEGUN")?;
    let before = resident(guest.vmm.pid())?;
    let machine = bulkhead_proto::machine::file_descriptor();
    let (messages, all) = bombard(&socket, &play, &[machine], ROUNDS_BESIDE_A_GUEST)?;
    println!(
        "[{messages} messages, {} requests obeyed, {} refused, {} hung up on]",
        all.obeyed, all.refused, all.hung_up
    );
    check(messages >= 15 && all.refused > all.obeyed, || {
        "the requests are not what they should be".to_owned()
    })?;
    let bent = api_obeyed::bent(&socket, &play, &[machine], ROUNDS_BESIDE_A_GUEST)?;
    check(bent == 7, || format!("{bent} messages that are obeyed"))?;
    let creates = [create()?, kata::request_of(&scratch)?];
    let held = assault(&socket, guest.vmm.pid(), &creates)?;
    let after = resident(guest.vmm.pid())?;
    drop(held);
    check(after < before + MAY_GROW, || {
        format!("from {before} KiB to {after} KiB")
    })?;
    // Strangers have typed at its serial port, too: the shell has done with that.
    guest.vmm.type_text("\n")?;
    // All that it has read is what it was to read.
    guest.run(&format!(
        "[ \"$(sort -u /tmp/sums | cut -d' ' -f1)\" = {sum} ]"
    ))?;
    let state = ctl(&socket, &["info"])?["state"].to_string();
    check(state.to_lowercase().contains("running"), || {
        guest.vmm.story(&state)
    })?;
    guest.ends()?;
    nothing_left(LIMIT)
}
