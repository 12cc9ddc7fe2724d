//! All streams of a device: those that clients of the listening socket have asked for. Packets go in
//! and come out here; rings are the worker's. Nothing here sleeps.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::connection::{Connection, Fate};
use crate::packet::{HEADER, HOST_CID, Header, Op, STREAM};

/// Most streams at a time; who comes then waits to be accepted. With a descriptor each, and what
/// else the process holds, that is no more than the launcher lets a device have.
pub const MOST: usize = 384;
/// Most resets that wait for a buffer of the guest's. With so many, its packets wait.
const RESETS: usize = 256;
/// The first port of the host's side: below lie those that programs listen on.
const FIRST_PORT: u32 = 1 << 30;

/// All streams.
#[derive(Debug)]
pub struct Streams {
    guest_cid: u64,
    /// By the host's port.
    connections: BTreeMap<u32, Connection>,
    last_port: u32,
    /// To whom "there is none" is to be said: port of ours, and of the guest's.
    resets: VecDeque<(u32, u32)>,
    /// Who was last.
    cursor: u32,
}

impl Streams {
    /// None, to a guest with this address. Ports of ours are counted from somewhere above 2^30
    /// on: the guest may still know of those of a process before this one.
    pub fn new(guest_cid: u64, from: u32) -> Self {
        Self {
            guest_cid,
            connections: BTreeMap::new(),
            last_port: FIRST_PORT | (from & (FIRST_PORT - 1)),
            resets: VecDeque::new(),
            cursor: 0,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Another one can be.
    pub fn has_room(&self) -> bool {
        self.connections.len() < MOST
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
            if !self.connections.contains_key(&self.last_port) {
                let connection = Connection::new(socket, now);
                self.connections.insert(self.last_port, connection);
                return;
            }
        }
    }

    /// The guest's side is gone, and all streams with it.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.resets.clear();
    }

    /// What to wait for: a stream's port, its socket and the events.
    pub fn events(&self, takes: bool) -> impl Iterator<Item = (u32, &UnixStream, i16)> {
        self.connections
            .iter()
            .filter_map(move |(port, c)| Some((*port, c.socket(), c.events(takes)?)))
    }

    /// When a stream's time is over, the next one's.
    pub fn next_end(&self) -> Option<Instant> {
        self.connections
            .values()
            .filter_map(Connection::until)
            .min()
    }

    /// Something has happened on a stream's socket.
    pub fn happened(&mut self, port: u32, events: i16, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&port)
            && connection.happened(events, now) == Fate::Over
        {
            self.end(port);
        }
    }

    /// Ends those whose time is over.
    pub fn expire(&mut self, now: Instant) {
        let over = |c: &Connection| c.until().is_some_and(|until| until <= now);
        let late: Vec<u32> = self
            .connections
            .iter()
            .filter_map(|(port, c)| over(c).then_some(*port))
            .collect();
        for port in late {
            self.end(port);
        }
    }

    /// Ends a stream, and tells the guest, if it knows of it.
    fn end(&mut self, port: u32) {
        if let Some(connection) = self.connections.remove(&port)
            && connection.is_known()
        {
            self.resets.push_back((port, connection.guest_port));
        }
    }

    /// Takes a packet of the guest's.
    pub fn packet(&mut self, header: &Header, payload: &[u8]) {
        // What is not for us, or from somebody else, is nobody's business.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let (ours, theirs) = (header.dst_port, header.src_port);
        let known = self
            .connections
            .get_mut(&ours)
            .filter(|c| c.is_known() && c.guest_port == theirs);
        match known {
            Some(connection) if header.kind == STREAM => {
                if connection.packet(header, payload, ours) == Fate::Over {
                    if header.op == Op::Reset {
                        self.connections.remove(&ours);
                    } else {
                        self.end(ours);
                    }
                }
            }
            _ if header.op == Op::Reset => {}
            _ => self.resets.push_back((ours, theirs)),
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
            let has = |(_, c): &(&u32, &Connection)| c.has_packet();
            let mut behind = self.connections.range(after);
            let next = behind
                .find(has)
                .or_else(|| self.connections.range(..=self.cursor).find(has));
            let port = *next?.0;
            self.cursor = port;
            let like = self.header(port, 0);
            let connection = self.connections.get_mut(&port)?;
            let like = Header {
                dst_port: connection.guest_port,
                ..like
            };
            match connection.next(like, out) {
                Ok(Some(len)) => return Some(len),
                // It had nothing after all, and does not say that it has any more.
                Ok(None) => {}
                Err(_) => self.end(port),
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
