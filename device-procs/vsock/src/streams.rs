//! All streams of a device: those that clients of the listening socket have asked for, and those
//! that the guest has. Packets go in and come out here; rings are the worker's. Nothing here sleeps.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::asked::{Asked, Ticket};
use crate::connection::{Connection, Fate};
use crate::packet::{HEADER, HOST_CID, Header, Op, STREAM};

/// Most streams at a time; who comes then waits to be accepted. With a descriptor each, and what
/// else the process holds, that is no more than the launcher lets a device have.
pub const MOST: usize = 384;
/// Most resets that wait for a buffer of the guest's. With so many, its packets wait.
const RESETS: usize = 256;
/// The first port of the host's side: below lie those that programs listen on.
const FIRST_PORT: u32 = 1 << 30;

/// A stream's ports: ours, and the guest's (0 while a client has not said which).
pub type Ports = (u32, u32);

/// All streams.
#[derive(Debug)]
pub struct Streams {
    guest_cid: u64,
    connections: BTreeMap<Ports, Connection>,
    /// Those that the guest wants, and whose other end is not there.
    asked: Asked,
    last_port: u32,
    /// To whom "there is none" is to be said.
    resets: VecDeque<Ports>,
    /// Who was last.
    cursor: Ports,
}

impl Streams {
    /// None, to a guest with this address. Ports of ours are counted from somewhere above 2^30
    /// on: the guest may still know of those of a process before this one.
    pub fn new(guest_cid: u64, from: u32) -> Self {
        Self {
            guest_cid,
            connections: BTreeMap::new(),
            asked: Asked::default(),
            last_port: FIRST_PORT | (from & (FIRST_PORT - 1)),
            resets: VecDeque::new(),
            cursor: (0, 0),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.connections.len().saturating_add(self.asked.count())
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Another one can be.
    pub fn has_room(&self) -> bool {
        self.len() < MOST
    }

    /// A packet of the guest's can be taken: there is room for what it may have to be told.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// A client has come.
    pub fn accept(&mut self, socket: UnixStream, now: Instant) {
        // One of so many is free.
        for _ in 0..=MOST {
            self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = (self.last_port, 0)..=(self.last_port, u32::MAX);
            if self.connections.range(ports).next().is_none() {
                let connection = Connection::new(socket, now);
                self.connections.insert((self.last_port, 0), connection);
                return;
            }
        }
    }

    /// The guest's side is gone, and all streams with it.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.asked.clear();
        self.resets.clear();
    }

    /// What to wait for: a stream's ports, its socket and the events.
    pub fn events(&self, takes: bool) -> impl Iterator<Item = (Ports, &UnixStream, i16)> {
        self.connections
            .iter()
            .filter_map(move |(ports, c)| Some((*ports, c.socket(), c.events(takes)?)))
    }

    /// When a stream's time is over, the next one's.
    pub fn next_end(&self) -> Option<Instant> {
        self.connections
            .values()
            .filter_map(Connection::until)
            .chain(self.asked.next_end())
            .min()
    }

    /// Something has happened on a stream's socket.
    pub fn happened(&mut self, ports: Ports, events: i16, now: Instant) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        let fate = connection.happened(events, now);
        let named = (ports.0, connection.guest_port);
        if fate == Fate::Over {
            self.end(ports);
        } else if named != ports
            && let Some(connection) = self.connections.remove(&ports)
            && !self.is_taken(named)
        {
            // The client has said which port. One that the guest has by itself joined to the
            // very ports is in its way, and the client is turned away.
            self.connections.insert(named, connection);
        }
    }

    fn is_taken(&self, ports: Ports) -> bool {
        self.connections.contains_key(&ports) || self.asked.holds(ports)
    }

    /// The next connection that the launcher is to make, to this port.
    pub fn next_asked(&mut self) -> Option<(Ticket, u32)> {
        self.asked.next_request()
    }

    /// The launcher is to answer something.
    pub fn is_waiting(&self) -> bool {
        self.asked.is_waiting()
    }

    /// The launcher has answered; or will not any more, nor anything else: see `unanswered`.
    pub fn answered(&mut self, ticket: Ticket, stream: Option<UnixStream>, now: Instant) {
        // The guest may have given it up.
        let Some(request) = self.asked.take(ticket) else {
            return;
        };
        let ports = (request.dst_port, request.src_port);
        match stream {
            Some(socket) => {
                let connection = Connection::begun(socket, &request, now);
                self.connections.insert(ports, connection);
            }
            None => self.resets.push_back(ports),
        }
    }

    /// The launcher answers no more.
    pub fn unanswered(&mut self) {
        self.resets.extend(self.asked.end());
    }

    /// Ends those whose time is over.
    pub fn expire(&mut self, now: Instant) {
        let over = |c: &Connection| c.until().is_some_and(|until| until <= now);
        let late: Vec<Ports> = self
            .connections
            .iter()
            .filter_map(|(ports, c)| over(c).then_some(*ports))
            .collect();
        for ports in late {
            self.end(ports);
        }
        self.resets.extend(self.asked.expire(now));
    }

    /// Ends a stream, and tells the guest, if it knows of it.
    fn end(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.remove(&ports)
            && connection.is_known()
        {
            self.resets.push_back(ports);
        }
    }

    /// Takes a packet of the guest's.
    pub fn packet(&mut self, header: &Header, payload: &[u8], now: Instant) {
        // What is not for us, or from somebody else, is nobody's business.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = (header.dst_port, header.src_port);
        let known = self.connections.get_mut(&ports).filter(|c| c.is_known());
        if let Some(connection) = known.filter(|_| header.kind == STREAM) {
            if connection.packet(header, payload, ports.0) == Fate::Over {
                if header.op == Op::Reset {
                    self.connections.remove(&ports);
                } else {
                    self.end(ports);
                }
            }
            return;
        }
        // Whatever it says before it has an answer, it does not wait for that any longer.
        self.asked.forget(ports);
        let wanted = header.op == Op::Request
            && header.kind == STREAM
            && self.has_room()
            && !self.is_taken(ports)
            && self.asked.want(*header, now);
        if !wanted && header.op != Op::Reset {
            self.resets.push_back(ports);
        }
    }

    /// Whether there is, or may be, a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || self.connections.values().any(Connection::has_packet)
    }

    /// The next packet for the guest, into `out` from its beginning on: its length. Streams
    /// take turns.
    pub fn next(&mut self, out: &mut [u8]) -> Option<usize> {
        for _ in 0..=self.connections.len() {
            if let Some((ours, theirs)) = self.resets.pop_front() {
                let mut header = self.header(ours, theirs);
                header.op = Op::Reset;
                out.get_mut(..HEADER)?.copy_from_slice(&header.encode());
                return Some(HEADER);
            }
            let after = (Bound::Excluded(self.cursor), Bound::Unbounded);
            let has = |(_, c): &(&Ports, &Connection)| c.has_packet();
            let mut behind = self.connections.range(after);
            let next = behind
                .find(has)
                .or_else(|| self.connections.range(..=self.cursor).find(has));
            let ports = *next?.0;
            self.cursor = ports;
            let like = self.header(ports.0, ports.1);
            let connection = self.connections.get_mut(&ports)?;
            match connection.next(like, out) {
                Ok(Some(len)) => return Some(len),
                // It had nothing after all, and does not say that it has any more.
                Ok(None) => {}
                Err(_) => self.end(ports),
            }
        }
        None
    }

    fn header(&self, src_port: u32, dst_port: u32) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port,
            dst_port,
            len: 0,
            kind: STREAM,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
