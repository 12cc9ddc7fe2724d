//! Requests that begin, halt or end a machine, filled at random and bent, to VMMs of their own: those
//! that can be read are carried out or refused as the machine's state says, the others are refused
//! and change nothing, and whatever ends the machine leaves nothing.

use std::collections::BTreeMap;

use bulkhead_proto::machine::{InfoRequest, InfoResponse, State};
use bulkhead_proto::protobuf::reflect::{FileDescriptor, MessageDescriptor};
use bulkhead_proto::{BlockingClient, Code, MACHINE_SERVICE};
use bulkhead_tests::host::sh;
use bulkhead_tests::kata::Client;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, guest_file, nothing_left};

use super::api_fuzz::{Answer, Filler, MOMENT, PATIENCE, call, methods};
use super::bad_input::appears;
use super::disk::LIMIT;

/// What a stranger may well do to a machine, and then it is done.
pub(super) const OBEYED: [&str; 12] = [
    "Boot",
    "Delete",
    "Pause",
    "Reset",
    "Reboot",
    "Resume",
    "Shutdown",
    "TeardownVM",
    "PauseVM",
    "ResumeVM",
    "WaitVM",
    "Quit",
];
/// VMMs that are given such requests.
const VMMS: u64 = 16;
/// Requests of one that none of them ends.
const REQUESTS: u64 = 120;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    vec![Test::short("api-fuzz")(
        "requests that begin, halt or end a machine are obeyed as its state allows, bent ones never, and nothing is left",
        obeyed,
    )]
}

/// Whether a decoder can make something of it that the message has.
fn is_readable(kind: &MessageDescriptor, bytes: &[u8]) -> bool {
    let message = kind.parse_from_bytes(bytes);
    message.is_ok_and(|message| message.unknown_fields_dyn().iter().next().is_none())
}

/// A request that it cannot.
fn unreadable(filler: &mut Filler, kind: &MessageDescriptor) -> Vec<u8> {
    loop {
        let mut bytes = filler.request(kind);
        if bytes.is_empty() || filler.below(4) == 0 {
            // A field that there is not, of any of the types.
            let tag = (2 + filler.below(13) as u8) << 3;
            match filler.below(4) {
                0 => bytes.extend([tag, 1]),
                1 => bytes.extend([tag | 1, 1, 2, 3, 4, 5, 6, 7, 8]),
                2 => bytes.extend([tag | 2, 3, 0xff, 0xfe, 0xfd]),
                _ => bytes.extend([tag | 2, 0x7f]),
            }
        }
        if !is_readable(kind, &bytes) {
            return bytes;
        }
    }
}

/// Fails unless what cannot be read was refused for that.
fn not_read(what: &str, answer: &Answer) -> Verdict {
    let refused = match answer {
        Answer::Refused(status) => {
            matches!(status.code, Code::InvalidArgument | Code::Unimplemented)
                && !status.message.is_empty()
                && !status.message.contains('\n')
        }
        _ => false,
    };
    check(refused, || format!("{what}, unreadable: {answer:?}"))
}

/// As many unreadable requests of each of these services' messages that would be obeyed; how many
/// messages that were.
pub(super) fn bent(
    socket: &str,
    scratch: &str,
    services: &[&FileDescriptor],
    rounds: u64,
) -> Result<usize, String> {
    let mut filler = Filler::new(scratch);
    let mut messages = 0;
    for (service, method) in methods(services) {
        let name = method.proto().name().to_owned();
        if !OBEYED.contains(&name.as_str()) {
            continue;
        }
        messages += 1;
        for _ in 0..rounds {
            let request = unreadable(&mut filler, &method.input_type());
            let answer = call(socket, &service, &name, &request, PATIENCE)?;
            not_read(&format!("{name} {request:x?}"), &answer)?;
        }
    }
    Ok(messages)
}

/// What the machine is.
fn state(socket: &str) -> Result<State, String> {
    let stream = std::os::unix::net::UnixStream::connect(socket);
    let stream = stream.map_err(|e| format!("{socket}: {e}"))?;
    let mut client = BlockingClient::new(stream, 1 << 20);
    let info: Result<InfoResponse, _> =
        client.call(MACHINE_SERVICE, "Info", &InfoRequest::new(), PATIENCE);
    let info = info.map_err(|e| format!("Info: {e}"))?;
    let state = info.state.enum_value();
    state.map_err(|number| format!("Info: state {number}"))
}

/// What a request that can be read must come to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expect {
    /// It is done, and the machine is so.
    Done(State),
    /// The state does not allow it.
    Refused,
    /// It waits for the machine's end.
    Waits,
    /// It is done, or is to be done in its time; the machine ends.
    Ends,
    /// It is done in its time, and the machine goes on; or its time is too long.
    Later,
}

fn expected(method: &str, state: State) -> Expect {
    use State::{STATE_CREATED as CREATED, STATE_NONE as NONE};
    use State::{STATE_PAUSED as PAUSED, STATE_RUNNING as RUNNING};
    match (method, state) {
        ("Boot", CREATED | RUNNING) | ("ResumeVM", CREATED | PAUSED) => Expect::Done(RUNNING),
        ("Resume", PAUSED | RUNNING) => Expect::Done(RUNNING),
        ("Pause" | "PauseVM", RUNNING | PAUSED) => Expect::Done(PAUSED),
        ("Reset", RUNNING | PAUSED) => Expect::Done(state),
        ("Reboot", RUNNING) => Expect::Later,
        ("Delete", NONE | CREATED) => Expect::Done(NONE),
        ("WaitVM", CREATED | RUNNING | PAUSED) => Expect::Waits,
        ("Delete" | "Quit", _) | ("Shutdown" | "TeardownVM", CREATED | RUNNING | PAUSED) => {
            Expect::Ends
        }
        _ => Expect::Refused,
    }
}

/// What became of one VMM's requests.
#[derive(Default)]
struct Told {
    /// Requests that were obeyed, by their method and the state before.
    obeyed: BTreeMap<String, u64>,
    unreadable: u64,
    refused: u64,
}

fn obeyed() -> Verdict {
    let scratch = Scratch::new("api-obeyed")?;
    let play = scratch.path("play");
    let disk = scratch.path("disk");
    sh(&format!("truncate -s 4M {disk}; mkdir {play}"))?;
    let root = format!("path={disk},id=root");
    let kernel = guest_file("vmlinux");
    let create = ["create", "--kernel", &kernel, "--memory", "96M"];
    let more = ["--disk", &root, "--rng", "--serial", "none"];
    let create = [create.as_slice(), &more].concat();
    let mut filler = Filler::new(&play);
    let mut told = Told::default();
    for number in 0..VMMS {
        let socket = scratch.path(&format!("api{number}"));
        let mut vmm = Vmm::start(&["--ttrpc", &socket])?;
        appears(&socket)?;
        // Some have no machine at first, or are rid of it later.
        if number % 4 != 3 {
            ctl(&socket, &create)?;
        }
        let lived = one(&socket, &mut filler, &mut told);
        lived.map_err(|why| vmm.story(&why))?;
        if vmm.ended().is_none() {
            // It may be about to end by itself.
            let answer = ctl(&socket, &["shutdown", "--force"]);
            if answer.is_err_and(|why| why.contains("no machine")) {
                let _ = Client::connect(&socket).and_then(|mut client| client.plain("Quit"));
            }
        }
        vmm.ends_with(0, LIMIT)?;
        nothing_left(LIMIT)?;
        check(!std::path::Path::new(&socket).exists(), || {
            format!("{socket} is left")
        })?;
    }
    println!(
        "[obeyed: {:?}; refused: {}; unreadable: {}]",
        told.obeyed, told.refused, told.unreadable
    );
    let reached = |what: &str| told.obeyed.keys().any(|key| key.starts_with(what));
    for method in OBEYED {
        check(reached(&format!("{method} ")), || {
            format!("{method} was never obeyed: {:?}", told.obeyed)
        })?;
    }
    Ok(())
}

/// Requests of one VMM, until one ends it.
fn one(socket: &str, filler: &mut Filler, told: &mut Told) -> Verdict {
    let services = [
        bulkhead_proto::machine::file_descriptor(),
        bulkhead_proto::vmservice::file_descriptor(),
    ];
    let mut all = methods(&services);
    all.retain(|(_, method)| OBEYED.contains(&method.proto().name()));
    check(all.len() == OBEYED.len(), || format!("{}", all.len()))?;
    // Something that is to be done in its time may be done between two looks.
    let mut pending = false;
    for _ in 0..REQUESTS {
        let index = filler.below(all.len() as u64) as usize;
        let Some((service, method)) = all.get(index) else {
            continue;
        };
        let name = method.proto().name();
        let kind = method.input_type();
        let before = match state(socket) {
            // Whatever was pending has ended it.
            Err(_) if pending => return Ok(()),
            other => other?,
        };
        if filler.below(2) == 0 {
            let request = unreadable(filler, &kind);
            let answer = match call(socket, service, name, &request, PATIENCE) {
                Err(_) | Ok(Answer::HungUp) if pending => return Ok(()),
                other => other?,
            };
            not_read(&format!("{name} {request:x?}"), &answer)?;
            told.unreadable += 1;
            if !pending {
                let after = state(socket)?;
                check(after == before, || {
                    format!("{name} {request:x?}, unreadable: {before:?} became {after:?}")
                })?;
            }
            continue;
        }
        let expect = expected(name, before);
        // What ends it comes seldom: there is more to see before.
        if expect == Expect::Ends && filler.below(8) != 0 {
            continue;
        }
        let mut request = filler.request(&kind);
        while !is_readable(&kind, &request) {
            request = filler.request(&kind);
        }
        let limit = match expect {
            Expect::Waits | Expect::Ends | Expect::Later => MOMENT * 10,
            Expect::Done(_) | Expect::Refused => PATIENCE,
        };
        let answer = match call(socket, service, name, &request, limit) {
            Err(_) if pending => return Ok(()),
            other => other?,
        };
        let say = || format!("{name} {request:x?} of a machine that is {before:?}: {answer:?}");
        if let Answer::Refused(status) = &answer {
            told.refused += 1;
            let sane = matches!(
                status.code,
                Code::FailedPrecondition | Code::InvalidArgument | Code::Unavailable
            );
            check(
                sane && !status.message.is_empty() && !status.message.contains('\n'),
                say,
            )?;
        } else {
            let key = format!("{name} {before:?}");
            *told.obeyed.entry(key).or_default() += 1;
        }
        if pending {
            continue;
        }
        match (expect, &answer) {
            (Expect::Done(wanted), Answer::Obeyed) => {
                let after = state(socket)?;
                check(after == wanted, || format!("{}: {after:?}", say()))?;
            }
            (Expect::Waits, Answer::Silent) => check(state(socket)? == before, say)?,
            (Expect::Refused, Answer::Refused(_)) => check(state(socket)? == before, say)?,
            // Of a paused machine nobody presses the button, and more than ten minutes there are not.
            (Expect::Ends | Expect::Later, Answer::Refused(_)) => {
                let timed = matches!(name, "Shutdown" | "Reboot");
                check(timed && state(socket)? == before, say)?;
            }
            (Expect::Later, Answer::Silent | Answer::Obeyed) => pending = true,
            (Expect::Ends, Answer::Silent) => pending = true,
            (Expect::Ends, Answer::Obeyed) => return Ok(()),
            _ => return Err(say()),
        }
    }
    Ok(())
}
