//! What hostile clients do to a server's socket, whichever services it has: frames that are too large,
//! cut short or full of nothing, clients that never read, that vanish, and a thousand at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_proto::frame::{self, TYPE_REQUEST};
use bulkhead_proto::machine::{CreateRequest, InfoRequest, InfoResponse};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{BlockingClient, MACHINE_SERVICE, VM_SERVICE, envelope};
use bulkhead_tests::host::{Undo, sh};
use bulkhead_tests::runner::{Verdict, check};
use bulkhead_tests::vmm::{guest_file, patience};

/// How long anything of it may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Clients at once.
const CROWD: usize = 1000;
/// Connections that a server has at most, whoever calls.
const CONNECTIONS: usize = 64;
/// Other descriptors that may come and go meanwhile: of devices, and of a call that is carried out.
const OTHERS: usize = 16;
/// Entries of a list in a frame that is read: two bytes each.
const ENTRIES: usize = 120_000;

/// A call as bytes.
///
/// # Errors
/// It is longer than a frame may be.
pub fn encoded(
    service: &str,
    stream_id: u32,
    method: &str,
    payload: &[u8],
) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    let request = envelope::RequestView {
        service,
        method,
        payload,
        timeout_nano: 0,
    };
    envelope::encode_request(&mut body, &request);
    let mut bytes = Vec::new();
    frame::encode(&mut bytes, TYPE_REQUEST, stream_id, 0, &body)
        .map_err(|e| format!("{service}.{method}: {e:?}"))?;
    Ok(bytes)
}

/// One that is far shorter than a frame may be.
pub fn frame_of(service: &str, stream_id: u32, method: &str, payload: &[u8]) -> Vec<u8> {
    encoded(service, stream_id, method, payload).unwrap_or_default()
}

/// Create of a machine without a device, as a frame.
pub fn create() -> Result<Vec<u8>, String> {
    let mut request = CreateRequest::new();
    let config = request.config.mut_or_insert_default();
    config.kernel = sh(&format!("realpath {}", guest_file("vmlinux")))?
        .trim()
        .to_owned();
    config.memory_bytes = 96 << 20;
    let request = request.write_to_bytes().map_err(|e| e.to_string())?;
    Ok(frame_of(MACHINE_SERVICE, 1, "Create", &request))
}

/// A client of that socket.
pub fn connect(socket: &str) -> Result<UnixStream, String> {
    UnixStream::connect(socket).map_err(|e| format!("{socket}: {e}"))
}

/// Resident memory of a process, KiB.
pub fn resident(pid: u32) -> Result<u64, String> {
    let kib = sh(&format!(
        "awk '/^RssAnon/ {{ print $2 }}' /proc/{pid}/status"
    ))?;
    kib.trim().parse().map_err(|e| format!("{kib:?}: {e}"))
}

/// What bulkhead.v1.Machine says on a new connection.
pub fn info(socket: &str) -> Result<InfoResponse, String> {
    let mut client = BlockingClient::new(connect(socket)?, 1 << 20);
    let info = client.call(MACHINE_SERVICE, "Info", &InfoRequest::new(), LIMIT);
    info.map_err(|e| e.to_string())
}

/// All of it, to the VMM of that process id, where `creates` are requests to vanish in. Returns those
/// who are still there.
pub fn assault(socket: &str, pid: u32, creates: &[Vec<u8>]) -> Result<Vec<UnixStream>, String> {
    envelopes(socket)?;
    let mut held = frames(socket)?;
    held.push(deaf(socket)?);
    passers(socket, creates)?;
    crowd(socket, pid)?;
    Ok(held)
}

fn io(e: std::io::Error) -> String {
    e.to_string()
}

/// What is answered to these bytes; nothing, if they are hung up on.
fn said(socket: &str, bytes: &[u8]) -> Result<String, String> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(io)?;
    // It may be cut off while it still writes.
    let _ = stream.write_all(bytes);
    let mut answer = [0; 512];
    let got = match stream.read(&mut answer) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => {
            return Err("no answer to what is too large".to_owned());
        }
        other => other.unwrap_or(0),
    };
    Ok(String::from_utf8_lossy(answer.get(..got).unwrap_or_default()).into_owned())
}

/// Envelopes and messages of nothing but empty entries.
fn envelopes(socket: &str) -> Verdict {
    let entries: Vec<u8> = [0x2a, 0].repeat(2 << 20);
    let mut big = Vec::new();
    // A whole frame of 4 MiB of empty metadata entries, again and again.
    frame::encode(&mut big, TYPE_REQUEST, 1, 0, &entries).map_err(|e| format!("{e:?}"))?;
    let mut small = Vec::new();
    // As many as fit a frame that is read.
    let fit = entries.get(..256 << 10).unwrap_or_default();
    frame::encode(&mut small, TYPE_REQUEST, 1, 0, fit).map_err(|e| format!("{e:?}"))?;
    // A list of empty messages within a message: disks, root complexes.
    let list = |outer: &[u8], inner: u8| {
        let list = [inner, 0].repeat(ENTRIES);
        let mut message = outer.to_vec();
        let mut length = list.len();
        while length > 0x7f {
            message.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend(list);
        message
    };
    let disks = frame_of(MACHINE_SERVICE, 1, "Create", &list(&[0x0a], 6 << 3 | 2));
    let ports = frame_of(VM_SERVICE, 1, "AddPcieDevice", &list(&[0x12], 1 << 3 | 2));
    for _ in 0..8 {
        let text = said(socket, &big)?;
        check(text.contains("262144 are allowed"), || {
            format!("an oversize frame: {text:?}")
        })?;
        let text = said(socket, &small)?;
        check(text.contains("more than 128 fields"), || {
            format!("an envelope of empty entries: {text:?}")
        })?;
        for message in [&disks, &ports] {
            let text = said(socket, message)?;
            check(!text.is_empty(), || "a list of empty messages".to_owned())?;
        }
    }
    Ok(())
}

/// Frames that promise more than comes, and noise.
fn frames(socket: &str) -> Result<Vec<UnixStream>, String> {
    let mut held = Vec::new();
    for length in [
        1_u32,
        200 << 10,
        256 << 10,
        4 << 20,
        (4 << 20) + 1,
        u32::MAX,
    ] {
        let mut stream = connect(socket)?;
        let mut start = length.to_be_bytes().to_vec();
        start.extend_from_slice(&[0, 0, 0, 1, TYPE_REQUEST, 0, 1, 2, 3]);
        stream.write_all(&start).map_err(io)?;
        held.push(stream);
    }
    for seed in 0..64_u8 {
        let mut stream = connect(socket)?;
        let noise: Vec<u8> = (0..=255_u8).map(|n| n.wrapping_mul(seed) ^ seed).collect();
        let _ = stream.write_all(&noise);
    }
    Ok(held)
}

/// A client that never reads.
fn deaf(socket: &str) -> Result<UnixStream, String> {
    let mut deaf = connect(socket)?;
    deaf.set_write_timeout(Some(Duration::from_millis(500)))
        .map_err(io)?;
    for id in 0..20_000_u32 {
        let call = match id % 2 {
            0 => frame_of(VM_SERVICE, id * 2 + 1, "PropertiesVM", &[0x08, 0, 0x08, 1]),
            _ => frame_of(MACHINE_SERVICE, id * 2 + 1, "Info", &[]),
        };
        if deaf.write_all(&call).is_err() {
            break;
        }
    }
    Ok(deaf)
}

/// A thousand that come and go, in parts of a request and in whole ones; and waiters that give up.
fn passers(socket: &str, creates: &[Vec<u8>]) -> Verdict {
    for (number, create) in (0..CROWD).zip(creates.iter().cycle()) {
        let mut stream = connect(socket)?;
        let cut = create.len() * (number % 11) / 10;
        let _ = stream.write_all(create.get(..cut).unwrap_or_default());
    }
    for _ in 0..300 {
        let mut stream = connect(socket)?;
        let _ = stream.write_all(&frame_of(VM_SERVICE, 1, "WaitVM", &[]));
    }
    Ok(())
}

fn descriptors(pid: u32) -> Result<usize, String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
    entries
        .map(Iterator::count)
        .map_err(|e| format!("descriptors of {pid}: {e}"))
}

/// Waits until somebody else is served.
fn served(socket: &str) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    while let Err(why) = info(socket) {
        check(Instant::now() < end, || {
            format!("nobody is served after the crowd: {why}")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A thousand at once, who stay: first with nothing or half a frame, then with a stream each that they
/// never read.
fn crowd(socket: &str, pid: u32) -> Verdict {
    let ours = std::process::id();
    let before = sh(&format!(
        "prlimit --pid {ours} --nofile --noheadings --raw --output SOFT"
    ))?;
    sh(&format!("prlimit --pid {ours} --nofile=4096:"))?;
    let _back = Undo::new(format!("prlimit --pid {ours} --nofile={}:", before.trim()));
    // Those who were here before may not have been let go of.
    served(socket)?;
    let first = descriptors(pid)?;
    let follow = frame_of(MACHINE_SERVICE, 1, "Events", &[0x08, 0]);
    let half = follow.get(..follow.len() / 2).unwrap_or_default();
    for (what, makes_room) in [([&[][..], half], true), ([&follow, &follow], false)] {
        let mut all = Vec::new();
        for says in what.iter().cycle().take(CROWD) {
            let mut stream = connect(socket)?;
            let _ = stream.write_all(says);
            all.push(stream);
        }
        let most = first + CONNECTIONS + OTHERS;
        let now = descriptors(pid)?;
        check(now <= most && now >= CONNECTIONS, || {
            format!("{CROWD} clients: {now} descriptors, and {first} before")
        })?;
        // Who has asked for nothing makes room for others.
        let mut another = info(socket);
        let end = Instant::now() + patience(LIMIT);
        // One of whom nothing had been read yet may have made room: another one takes the place.
        while !makes_room && another.is_ok() && Instant::now() < end {
            let mut stream = connect(socket)?;
            let _ = stream.write_all(&follow);
            all.push(stream);
            std::thread::sleep(Duration::from_millis(50));
            another = info(socket);
        }
        check(another.is_ok() == makes_room, || {
            let served = another.map(|info| info.version);
            format!("beside {CROWD} clients: {served:?}")
        })?;
        drop(all);
        served(socket)?;
        let end = Instant::now() + patience(LIMIT);
        while descriptors(pid)? > first + OTHERS {
            check(Instant::now() < end, || {
                "the crowd's connections stay".into()
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}
