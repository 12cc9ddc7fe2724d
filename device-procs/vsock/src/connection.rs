//! One stream between a socket of the host's and a port of the guest's.
//!
//! ```text
//!   Greeting ── CONNECT port ──▶ Asked ── RESPONSE ──▶ Open ── both ends are done ──▶ Closing
//!       │                          │ RST                │ RST                            │ RST, time
//!       └──────────────────────────┴────────────────────┴──────────▶ gone ◀──────────────┘
//! ```
//!
//! One that the guest has begun is here from the time on at which the host's end is there: Open.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_runtime::backlog::{Backlog, ROOM};
use bulkhead_runtime::sys;

use crate::packet::{HEADER, Header, NO_RECEIVE, NO_SEND, Op};

/// Longest first line of a client: "CONNECT 4294967295" and its end.
const LINE: usize = 32;
/// How long a client has for its first line.
const GREETING: Duration = Duration::from_secs(10);
/// How long the guest has to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it has to agree to the end.
const END: Duration = Duration::from_secs(8);
/// Room that the guest does not know of before it is told.
const STEP: u32 = (ROOM / 4) as u32;

/// How far it has come.
#[derive(Debug)]
enum Phase {
    /// The client has not said which port; what it has said.
    Greeting(Vec<u8>),
    /// The guest is to answer.
    Asked,
    /// It is joined.
    Open,
    /// The guest is to agree to the end.
    Closing,
}

/// What there is to do for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    On,
    /// It is over; the guest is told so, if it knows of it.
    Over,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    phase: Phase,
    /// Until when the phase may last.
    until: Option<Instant>,
    /// The guest's port; 0 in the greeting.
    pub guest_port: u32,
    /// What waits for the host.
    buffer: Backlog,
    /// Bytes that the guest has room for, that it has taken out, and that it was sent.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// Bytes that have left our room, and what the guest was told of that.
    forwarded: u32,
    told: u32,
    /// Packets to be sent.
    request: bool,
    response: bool,
    credit: bool,
    shutdown: u32,
    /// The host sends no more.
    ended: bool,
    /// Nor receives, nor is there.
    hung_up: bool,
    /// The guest sends no more, and receives no more.
    guest_done: u32,
    /// The host was told that the guest sends no more.
    told_end: bool,
    /// The socket may have something.
    readable: bool,
}

impl Connection {
    /// A client that has just come.
    pub fn new(socket: UnixStream, now: Instant) -> Self {
        Self {
            socket,
            phase: Phase::Greeting(Vec::new()),
            until: now.checked_add(GREETING),
            guest_port: 0,
            buffer: Backlog::default(),
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told: 0,
            request: false,
            response: false,
            credit: false,
            shutdown: 0,
            ended: false,
            hung_up: false,
            guest_done: 0,
            told_end: false,
            readable: false,
        }
    }

    /// One that the guest has asked for by this packet, with the host's end of it.
    pub fn begun(socket: UnixStream, request: &Header, now: Instant) -> Self {
        Self {
            phase: Phase::Open,
            until: None,
            guest_port: request.src_port,
            peer_alloc: request.buf_alloc,
            peer_forwarded: request.fwd_cnt,
            response: true,
            ..Self::new(socket, now)
        }
    }

    /// Its socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Until when its phase may last.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// The guest knows of it.
    pub fn is_known(&self) -> bool {
        match self.phase {
            Phase::Greeting(_) => false,
            Phase::Asked => !self.request,
            Phase::Open | Phase::Closing => true,
        }
    }

    /// Bytes that the guest has room for.
    fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(under_way)
    }

    /// What to wait for on the socket; `None`: nothing. `takes`: the guest has buffers.
    pub fn events(&self, takes: bool) -> Option<i16> {
        match self.phase {
            Phase::Greeting(_) => Some(libc::POLLIN),
            Phase::Asked => Some(0),
            Phase::Closing => None,
            Phase::Open => {
                let mut events = 0;
                if !self.buffer.is_empty() {
                    events |= libc::POLLOUT;
                }
                let wanted = !self.ended && self.guest_done & NO_RECEIVE == 0;
                if takes && wanted && !self.readable && self.room() > 0 {
                    events |= libc::POLLIN;
                }
                // With nothing to wait for, its end is; and that just once.
                (events != 0 || (self.ended && !self.hung_up)).then_some(events)
            }
        }
    }

    /// Something happened on the socket.
    pub fn happened(&mut self, events: i16, now: Instant) -> Fate {
        match &mut self.phase {
            Phase::Greeting(line) => {
                let fate = greet(&self.socket, line);
                let Ok(Some(port)) = fate else {
                    return match fate {
                        Ok(_) => Fate::On,
                        Err(()) => Fate::Over,
                    };
                };
                self.guest_port = port;
                self.phase = Phase::Asked;
                self.until = now.checked_add(ANSWER);
                self.request = true;
                Fate::On
            }
            // It has not waited.
            Phase::Asked => Fate::Over,
            Phase::Closing => Fate::On,
            Phase::Open => {
                if events & libc::POLLOUT != 0 && self.flush() == Fate::Over {
                    return Fate::Over;
                }
                if events & libc::POLLIN != 0 {
                    self.readable = true;
                } else if events & (libc::POLLHUP | libc::POLLERR) != 0 {
                    if self.ended {
                        // Nobody is there to take what the guest sends.
                        self.hung_up = true;
                        self.close(now);
                    } else {
                        // What it has left behind is read first.
                        self.readable = true;
                    }
                }
                self.settle()
            }
        }
    }

    /// Writes what waits, as far as the host takes it.
    fn flush(&mut self) -> Fate {
        while !self.buffer.is_empty() {
            match sys::send_now(self.socket.as_fd(), self.buffer.front(), None) {
                Ok(count) => {
                    self.buffer.advance(count);
                    self.forward(count);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Fate::On,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Fate::Over,
            }
        }
        Fate::On
    }

    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.forwarded.wrapping_sub(self.told) >= STEP {
            self.credit = true;
        }
    }

    /// Tells the guest that nothing comes or goes any more.
    fn close(&mut self, now: Instant) {
        self.shutdown = NO_SEND | NO_RECEIVE;
        self.phase = Phase::Closing;
        self.until = now.checked_add(END);
    }

    /// Does what follows from what both ends have said.
    fn settle(&mut self) -> Fate {
        if self.guest_done & NO_SEND == 0 || !self.buffer.is_empty() {
            return Fate::On;
        }
        if self.guest_done & NO_RECEIVE != 0 || (self.ended && self.shutdown == 0) {
            // The reset is the guest's sign that all has arrived.
            return Fate::Over;
        }
        if !std::mem::replace(&mut self.told_end, true) {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Fate::On
    }

    /// A packet of the guest's; `payload` is its data.
    pub fn packet(&mut self, header: &Header, payload: &[u8], host_port: u32) -> Fate {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        match (header.op, &self.phase) {
            (Op::Reset, _) => Fate::Over,
            (Op::Response, Phase::Asked) if !self.request => {
                // The first bytes that this socket gets: there is room for them.
                let line = format!("OK {host_port}\n");
                match sys::send_now(self.socket.as_fd(), line.as_bytes(), None) {
                    Ok(count) if count == line.len() => {}
                    _ => return Fate::Over,
                }
                self.phase = Phase::Open;
                self.until = None;
                Fate::On
            }
            (Op::Data, Phase::Open) if self.guest_done & NO_SEND == 0 => self.data(payload),
            // Under way when the host hung up.
            (Op::Data | Op::Shutdown | Op::CreditUpdate | Op::CreditRequest, Phase::Closing) => {
                Fate::On
            }
            (Op::Shutdown, Phase::Open) => {
                self.guest_done |= header.flags & (NO_SEND | NO_RECEIVE);
                self.settle()
            }
            (Op::CreditUpdate, Phase::Open) => Fate::On,
            (Op::CreditRequest, Phase::Open) => {
                self.credit = true;
                Fate::On
            }
            _ => Fate::Over,
        }
    }

    fn data(&mut self, payload: &[u8]) -> Fate {
        let mut rest = payload;
        if self.buffer.is_empty() {
            while !rest.is_empty() {
                match sys::send_now(self.socket.as_fd(), rest, None) {
                    Ok(count) => {
                        self.forward(count);
                        rest = rest.get(count..).unwrap_or_default();
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => return Fate::Over,
                }
            }
        }
        // More than it was told that there is room for.
        if !self.buffer.push(rest) {
            return Fate::Over;
        }
        Fate::On
    }

    /// Whether there is, or may be, a packet for the guest.
    pub fn has_packet(&self) -> bool {
        self.request
            || self.response
            || self.credit
            || self.shutdown != 0
            || (self.readable && self.room() > 0 && matches!(self.phase, Phase::Open))
    }

    /// The next packet for the guest, into `out` from its beginning on, header and data: its
    /// length, if there is one. `like` has the addresses.
    pub fn next(&mut self, like: Header, out: &mut [u8]) -> Result<Option<usize>, Fate> {
        let mut header = like;
        header.buf_alloc = u32::try_from(ROOM).unwrap_or(u32::MAX);
        header.fwd_cnt = self.forwarded;
        let mut len = 0;
        if self.request {
            self.request = false;
            header.op = Op::Request;
        } else if self.response {
            self.response = false;
            header.op = Op::Response;
        } else if self.shutdown != 0 {
            header.op = Op::Shutdown;
            header.flags = std::mem::take(&mut self.shutdown);
        } else if self.readable && self.room() > 0 && matches!(self.phase, Phase::Open) {
            header.op = Op::Data;
            let room = usize::try_from(self.room()).unwrap_or(usize::MAX);
            let Some(place) = out.get_mut(HEADER..).filter(|place| !place.is_empty()) else {
                return Ok(None);
            };
            let most = place.len().min(room);
            match sys::receive_now(
                self.socket.as_fd(),
                place.get_mut(..most).unwrap_or_default(),
            ) {
                Ok(None) => {
                    self.readable = false;
                    if !self.credit {
                        return Ok(None);
                    }
                    header.op = Op::CreditUpdate;
                }
                Ok(Some(0)) | Err(_) => {
                    self.readable = false;
                    self.ended = true;
                    if self.settle() == Fate::Over {
                        return Err(Fate::Over);
                    }
                    header.op = Op::Shutdown;
                    header.flags = NO_SEND;
                }
                Ok(Some(count)) => len = count,
            }
        } else if self.credit {
            header.op = Op::CreditUpdate;
        } else {
            return Ok(None);
        }
        header.len = u32::try_from(len).unwrap_or(0);
        self.sent = self.sent.wrapping_add(header.len);
        // Every packet tells it.
        self.credit = false;
        self.told = self.forwarded;
        let Some(place) = out.get_mut(..HEADER) else {
            return Ok(None);
        };
        place.copy_from_slice(&header.encode());
        Ok(Some(HEADER.saturating_add(len)))
    }
}

/// Reads a client's first line, and no byte behind it: the port, when all of it is there.
fn greet(socket: &UnixStream, line: &mut Vec<u8>) -> Result<Option<u32>, ()> {
    loop {
        let mut byte = [0];
        match sys::receive_now(socket.as_fd(), &mut byte) {
            Ok(None) => return Ok(None),
            Ok(Some(1)) if byte == *b"\n" => return parse_greeting(line).map(Some).ok_or(()),
            Ok(Some(1)) if line.len() < LINE => line.extend(byte),
            _ => return Err(()),
        }
    }
}

/// `CONNECT port`, in any case.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let text = text.strip_suffix('\r').unwrap_or(text);
    let (word, port) = text.split_once(' ')?;
    if !word.eq_ignore_ascii_case("connect") || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_line_names_a_port() {
        for (line, port) in [
            ("CONNECT 1024", Some(1024)),
            ("connect 1024", Some(1024)),
            ("Connect 4294967295\r", Some(u32::MAX)),
            ("CONNECT 4294967296", None),
            ("CONNECT +5", None),
            ("CONNECT", None),
            ("CONNECT ", None),
            ("CONNECT 1 2", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(parse_greeting(line.as_bytes()), port, "{line:?}");
        }
    }
}
