//! Streams with a client on one side and the guest's packets on the other.

use std::io::{Read, Write};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::packet::{NO_RECEIVE, NO_SEND};
use bulkhead_runtime::backlog::ROOM;

const CID: u64 = 77;
const GUEST_ROOM: u32 = 100_000;

struct Bed {
    streams: Streams,
    now: Instant,
    out: Vec<u8>,
}

/// A packet for the guest.
type Packet = (Header, Vec<u8>);

impl Bed {
    fn new() -> Self {
        Self {
            streams: Streams::new(CID, 5),
            now: Instant::now(),
            out: vec![0; HEADER + 8192],
        }
    }

    /// What poll would tell.
    fn poll(&mut self) {
        let list: Vec<_> = self
            .streams
            .events(true)
            .map(|(p, s, e)| (p, s.try_clone().unwrap(), e))
            .collect();
        for (port, socket, events) in list {
            use std::os::fd::AsFd;
            let mut fds = [bulkhead_runtime::sys::PollFd::new(socket.as_fd(), events)];
            bulkhead_runtime::sys::poll(&mut fds, 0).unwrap();
            if fds[0].revents() != 0 {
                self.streams.happened(port, fds[0].revents(), self.now);
            }
        }
    }

    fn packet(&mut self) -> Option<Packet> {
        self.poll();
        let len = self.streams.next(&mut self.out)?;
        let header = Header::parse(self.out[..HEADER].try_into().unwrap());
        assert_eq!(
            (header.src_cid, header.dst_cid, header.kind),
            (HOST_CID, CID, STREAM)
        );
        assert_eq!(header.len as usize, len - HEADER);
        Some((header, self.out[HEADER..len].to_vec()))
    }

    fn said(&mut self) -> Packet {
        self.packet().expect("no packet")
    }

    /// A packet of the guest's: ports of ours and of the guest's.
    fn say(
        &mut self,
        (ours, theirs): (u32, u32),
        op: Op,
        change: impl FnOnce(&mut Header),
        data: &[u8],
    ) {
        let mut header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: theirs,
            dst_port: ours,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: GUEST_ROOM,
            fwd_cnt: 0,
        };
        change(&mut header);
        self.streams.packet(&header, data, self.now);
    }

    fn client(&mut self, line: &str) -> UnixStream {
        let (mut client, socket) = UnixStream::pair().unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        client.write_all(line.as_bytes()).unwrap();
        self.streams.accept(socket, self.now);
        client
    }

    /// A client that is joined to a port of the guest's.
    fn joined(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client(&format!("connect {port}\n"));
        let (request, _) = self.said();
        assert_eq!((request.op, request.dst_port), (Op::Request, port));
        assert_eq!(request.buf_alloc as usize, ROOM);
        let ports = (request.src_port, port);
        self.say(ports, Op::Response, |_| {}, &[]);
        let wanted = format!("OK {}\n", request.src_port);
        let mut line = vec![0; wanted.len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, wanted.as_bytes());
        (client, ports)
    }
}

fn ended(client: &mut UnixStream) -> bool {
    matches!(client.read(&mut [0]), Ok(0) | Err(_))
}

#[test]
fn a_client_that_nobody_listens_to_is_turned_away_at_once() {
    let mut bed = Bed::new();
    let mut client = bed.client("CONNECT 1024\n");
    let (request, _) = bed.said();
    bed.say((request.src_port, 1024), Op::Reset, |_| {}, &[]);
    assert!(ended(&mut client) && bed.streams.is_empty());
    assert_eq!(bed.packet(), None, "a reset is not answered");
}

#[test]
fn a_client_that_says_nothing_or_nonsense_is_turned_away() {
    let mut bed = Bed::new();
    let mut nonsense = bed.client("GET / HTTP/1.1\n");
    let mut long = bed.client(&"CONNECT 1".repeat(20));
    let mut silent = bed.client("CONN");
    assert_eq!(bed.packet(), None);
    assert!(ended(&mut nonsense) && ended(&mut long));
    assert_eq!(bed.streams.len(), 1);
    silent.write_all(b"ECT 5").unwrap();
    bed.poll();
    bed.streams.expire(bed.now + Duration::from_secs(9));
    assert_eq!(bed.streams.len(), 1);
    bed.streams.expire(bed.now + Duration::from_secs(11));
    assert!(ended(&mut silent) && bed.streams.is_empty());
    assert_eq!(bed.packet(), None, "the guest never knew of it");
    // The guest does not answer.
    let mut waiting = bed.client("CONNECT 5\n");
    let (request, _) = bed.said();
    bed.streams.expire(bed.now + Duration::from_secs(11));
    assert!(ended(&mut waiting));
    let (reset, _) = bed.said();
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (Op::Reset, request.src_port, 5)
    );
}

#[test]
fn data_goes_both_ways_within_the_credit() {
    let mut bed = Bed::new();
    let (mut client, ports) = bed.joined(9);
    bed.say(ports, Op::Data, |_| {}, b"from the guest");
    let mut text = [0; 14];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");
    // More than the guest has room for.
    let all: Vec<u8> = (0..150_000_u32).map(|n| (n % 253) as u8).collect();
    let (mut got, mut forwarded) = (Vec::new(), 0_u32);
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while got.len() < all.len() {
        written += client.write(&all[written..]).unwrap_or(0);
        match bed.packet() {
            Some((header, data)) => {
                assert_eq!((header.op, header.fwd_cnt), (Op::Data, 14));
                got.extend(data);
                assert!(got.len() as u32 - forwarded <= GUEST_ROOM);
            }
            None => {
                assert_eq!(got.len() as u32 - forwarded, GUEST_ROOM, "it stopped early");
                forwarded = got.len() as u32;
                bed.say(ports, Op::CreditUpdate, |h| h.fwd_cnt = forwarded, &[]);
            }
        }
    }
    assert_eq!(got, all);
}

#[test]
fn what_the_host_does_not_take_waits_and_the_guest_is_told_of_the_room() {
    let mut bed = Bed::new();
    let (mut client, ports) = bed.joined(9);
    let piece = vec![7; 32 << 10];
    let mut sent = 0;
    let mut told = 0_u32;
    // A guest that keeps to its credit is never stopped, but has to wait.
    while sent - told as usize + piece.len() <= ROOM {
        bed.say(ports, Op::Data, |_| {}, &piece);
        sent += piece.len();
        while let Some((header, _)) = bed.packet() {
            assert_eq!(header.op, Op::CreditUpdate);
            told = header.fwd_cnt;
        }
    }
    bed.say(ports, Op::CreditRequest, |_| {}, &[]);
    let (header, _) = bed.said();
    assert_eq!(header.op, Op::CreditUpdate);
    assert!((header.fwd_cnt as usize) < sent);
    let mut all = vec![0; sent];
    client.set_nonblocking(true).unwrap();
    let mut at = 0;
    while at < sent {
        at += client.read(&mut all[at..]).unwrap_or(0);
        while let Some((header, _)) = bed.packet() {
            assert_eq!(header.op, Op::CreditUpdate);
            told = header.fwd_cnt;
        }
    }
    assert!(all.iter().all(|b| *b == 7) && told as usize + ROOM / 4 > sent);
    // One that does not keep to it loses the stream.
    for _ in 0..40 {
        bed.say(ports, Op::Data, |_| {}, &piece);
    }
    let (reset, _) = bed.said();
    assert_eq!(reset.op, Op::Reset);
    assert!(bed.streams.is_empty());
}

#[test]
fn either_end_may_be_the_first_to_say_no_more() {
    // The client.
    let mut bed = Bed::new();
    let (mut client, ports) = bed.joined(9);
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bed.said().1, b"question");
    let (header, _) = bed.said();
    assert_eq!((header.op, header.flags), (Op::Shutdown, NO_SEND));
    assert_eq!(bed.packet(), None, "it was told once");
    bed.say(ports, Op::Data, |_| {}, b"answer");
    bed.say(ports, Op::Shutdown, |h| h.flags = NO_SEND | NO_RECEIVE, &[]);
    assert_eq!(bed.said().0.op, Op::Reset);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert!(bed.streams.is_empty());
    // The guest.
    let (mut client, ports) = bed.joined(9);
    bed.say(ports, Op::Data, |_| {}, b"question");
    bed.say(ports, Op::Shutdown, |h| h.flags = NO_SEND, &[]);
    let mut question = String::new();
    client.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    client.write_all(b"answer").unwrap();
    assert_eq!(bed.said().1, b"answer");
    drop(client);
    assert_eq!(bed.said().0.op, Op::Reset);
    assert!(bed.streams.is_empty());
    // The client is gone altogether: the guest is told that nobody takes what it sends.
    let (client, ports) = bed.joined(9);
    drop(client);
    assert_eq!(bed.said().0.flags, NO_SEND);
    assert_eq!(bed.said().0.flags, NO_SEND | NO_RECEIVE);
    bed.say(ports, Op::Data, |_| {}, b"too late");
    assert_eq!(bed.packet(), None);
    bed.say(ports, Op::Reset, |_| {}, &[]);
    assert!(bed.streams.is_empty());
}

#[test]
fn what_is_no_streams_is_answered_by_a_reset_and_what_is_not_ours_by_nothing() {
    let mut bed = Bed::new();
    for op in [
        Op::Response,
        Op::Data,
        Op::Shutdown,
        Op::CreditRequest,
        Op::Unknown(9),
    ] {
        bed.say((1024, 33), op, |_| {}, &[]);
        let (reset, _) = bed.said();
        assert_eq!(
            (reset.op, reset.src_port, reset.dst_port),
            (Op::Reset, 1024, 33)
        );
    }
    // No stream: SOCK_SEQPACKET.
    bed.say((1024, 33), Op::Request, |h| h.kind = 2, &[]);
    assert_eq!(bed.said().0.op, Op::Reset);
    bed.say((1024, 33), Op::Reset, |_| {}, &[]);
    bed.say((1024, 33), Op::Request, |h| h.dst_cid = 5, &[]);
    bed.say((1024, 33), Op::Request, |h| h.src_cid = 5, &[]);
    assert_eq!(bed.packet(), None);
    // Another port of the guest's does not speak for a stream's.
    let (mut client, ports) = bed.joined(9);
    bed.say((ports.0, 10), Op::Data, |_| {}, b"x");
    assert_eq!(bed.said().0.dst_port, 10);
    bed.say(ports, Op::Data, |_| {}, b"y");
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"y");
    // What the guest cannot know of yet.
    let mut early = bed.client("CONNECT 12\n");
    bed.poll();
    let (port, _) = *bed.streams.connections.keys().last().unwrap();
    bed.say((port, 12), Op::Response, |_| {}, &[]);
    assert_eq!(bed.said().0.op, Op::Reset);
    assert_eq!(bed.said().0.op, Op::Request);
    early.set_nonblocking(true).unwrap();
    assert!(early.read(&mut byte).is_err());
}

/// The port that the launcher is asked for, and its ticket.
fn asked(bed: &mut Bed, port: u32) -> Ticket {
    let (ticket, of) = bed.streams.next_asked().unwrap();
    assert_eq!(of, port);
    ticket
}

#[test]
fn the_guest_is_joined_to_whom_the_launcher_finds() {
    let mut bed = Bed::new();
    let ports = (1234, 700);
    bed.say(ports, Op::Request, |_| {}, &[]);
    assert_eq!(bed.packet(), None, "nothing is promised before it is there");
    let ticket = asked(&mut bed, 1234);
    assert!(bed.streams.next_asked().is_none() && bed.streams.is_waiting());
    let (mut host, socket) = UnixStream::pair().unwrap();
    host.write_all(b"at once").unwrap();
    bed.streams.answered(ticket, Some(socket), bed.now);
    let (response, _) = bed.said();
    assert_eq!(
        (response.op, response.src_port, response.dst_port),
        (Op::Response, 1234, 700)
    );
    assert_eq!(response.buf_alloc as usize, ROOM);
    assert_eq!(bed.said().1, b"at once");
    // The host has no line to say, nor to hear.
    bed.say(ports, Op::Data, |_| {}, b"from the guest");
    bed.say(ports, Op::Shutdown, |h| h.flags = NO_SEND, &[]);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from the guest");
    // The same port of the host's, by another one of the guest's.
    bed.say((1234, 701), Op::Request, |_| {}, &[]);
    let ticket = asked(&mut bed, 1234);
    let (_second, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(ticket, Some(socket), bed.now);
    assert_eq!((bed.said().0.dst_port, bed.streams.len()), (701, 2));
    host.write_all(b"and back").unwrap();
    assert_eq!(bed.said().1, b"and back");
    drop(host);
    assert_eq!(bed.said().0.op, Op::Reset);
    assert_eq!(bed.streams.len(), 1);
    // Asking for what it has, the guest loses it.
    bed.say((1234, 701), Op::Request, |_| {}, &[]);
    assert_eq!(bed.said().0.op, Op::Reset);
    assert!(bed.streams.is_empty() && !bed.streams.is_waiting());
}

#[test]
fn where_nobody_listens_the_guest_is_told_at_once() {
    let mut bed = Bed::new();
    for port in [1, 1025, u32::MAX] {
        bed.say((port, 700), Op::Request, |_| {}, &[]);
        let ticket = asked(&mut bed, port);
        bed.streams.answered(ticket, None, bed.now);
        let (reset, _) = bed.said();
        assert_eq!(
            (reset.op, reset.src_port, reset.dst_port),
            (Op::Reset, port, 700)
        );
    }
    // A launcher that is slow, and one that is silent.
    bed.say((5, 700), Op::Request, |_| {}, &[]);
    let late = asked(&mut bed, 5);
    bed.streams.expire(bed.now + Duration::from_secs(9));
    assert_eq!(bed.packet(), None);
    bed.streams.expire(bed.now + Duration::from_secs(11));
    assert_eq!(bed.said().0.op, Op::Reset);
    let (mut host, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(late, Some(socket), bed.now);
    assert!(ended(&mut host) && bed.streams.is_empty());
    bed.say((6, 700), Op::Request, |_| {}, &[]);
    bed.say((6, 701), Op::Request, |_| {}, &[]);
    asked(&mut bed, 6);
    bed.streams.unanswered();
    assert_eq!((bed.said().0.op, bed.said().0.op), (Op::Reset, Op::Reset));
    assert!(bed.streams.is_empty() && !bed.streams.is_waiting());
}

#[test]
fn what_the_guest_gives_up_is_let_go_of_and_what_it_asks_for_anew_is_another() {
    let mut bed = Bed::new();
    bed.say((5, 700), Op::Request, |_| {}, &[]);
    let first = asked(&mut bed, 5);
    bed.say((5, 700), Op::Reset, |_| {}, &[]);
    assert!(bed.streams.is_empty());
    bed.say((5, 700), Op::Request, |_| {}, &[]);
    let second = asked(&mut bed, 5);
    let (mut stale, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(first, Some(socket), bed.now);
    assert!(ended(&mut stale));
    assert_eq!(bed.packet(), None);
    let (_host, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(second, Some(socket), bed.now);
    assert_eq!(bed.said().0.op, Op::Response);
    // An answer to nobody.
    let (mut stale, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(second, Some(socket), bed.now);
    assert!(ended(&mut stale) && bed.streams.len() == 1);
    // A driver that goes takes its wishes with it.
    bed.say((6, 700), Op::Request, |_| {}, &[]);
    let ticket = asked(&mut bed, 6);
    bed.streams.clear();
    let (mut stale, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(ticket, Some(socket), bed.now);
    assert!(ended(&mut stale) && bed.streams.is_empty());
}

#[test]
fn a_guest_that_asks_and_asks_has_so_many_and_keeps_nobody_from_an_answer() {
    let mut bed = Bed::new();
    for port in 0..MOST as u32 {
        bed.say((5, port), Op::Request, |_| {}, &[]);
    }
    assert!(!bed.streams.has_room());
    bed.say((5, 5000), Op::Request, |_| {}, &[]);
    assert_eq!(bed.said().0.dst_port, 5000);
    let mut open = Vec::new();
    while let Some((ticket, _)) = bed.streams.next_asked() {
        open.push(ticket);
    }
    assert!(open.len() < 100, "{}", open.len());
    // Asked for and given up, again and again: no list grows.
    for _ in 0..10 * MOST {
        bed.say((5, 0), Op::Reset, |_| {}, &[]);
        bed.say((5, 0), Op::Request, |_| {}, &[]);
        while bed.packet().is_some() {}
    }
    assert!(bed.streams.len() <= MOST);
    let mut answers = 0;
    while let Some(ticket) = open.pop() {
        bed.streams.answered(ticket, None, bed.now);
        while let Some((ticket, _)) = bed.streams.next_asked() {
            open.push(ticket);
        }
        while let Some((reset, _)) = bed.packet() {
            assert_eq!(reset.op, Op::Reset);
            answers += 1;
        }
    }
    assert!(answers >= MOST - 1 && bed.streams.is_empty(), "{answers}");
}

#[test]
fn a_client_and_the_guest_can_not_have_the_same_ports() {
    let mut bed = Bed::new();
    let mut client = bed.client("CONN");
    bed.poll();
    let (ours, _) = *bed.streams.connections.keys().last().unwrap();
    bed.say((ours, 9), Op::Request, |_| {}, &[]);
    client.write_all(b"ECT 9\n").unwrap();
    bed.poll();
    assert!(ended(&mut client), "the guest was the first");
    let ticket = asked(&mut bed, ours);
    let (_host, socket) = UnixStream::pair().unwrap();
    bed.streams.answered(ticket, Some(socket), bed.now);
    assert_eq!(bed.said().0.op, Op::Response);
    assert_eq!((bed.packet(), bed.streams.len()), (None, 1));
}

#[test]
fn streams_take_turns() {
    let mut bed = Bed::new();
    let mut clients: Vec<_> = (1..6).map(|port| bed.joined(port)).collect();
    for (client, _) in &mut clients {
        client.write_all(&[1; 50_000]).unwrap();
    }
    let order: Vec<u32> = (0..10).map(|_| bed.said().0.dst_port).collect();
    let mut sorted = order[..5].to_vec();
    sorted.sort_unstable();
    assert_eq!(sorted, [1, 2, 3, 4, 5]);
    assert_eq!(order[..5], order[5..]);
    let before = bed.streams.len();
    bed.streams.clear();
    assert!(before == 5 && clients.iter_mut().all(|(client, _)| ended(client)));
}

#[test]
fn resets_that_nobody_takes_make_packets_wait() {
    let mut bed = Bed::new();
    for port in 0..RESETS as u32 {
        assert!(bed.streams.takes_packets());
        bed.say((1, port), Op::Data, |_| {}, &[]);
    }
    assert!(!bed.streams.takes_packets());
    assert_eq!(bed.said().0.op, Op::Reset);
    assert!(bed.streams.takes_packets());
}

proptest! {
    #[test]
    fn no_guest_gets_more_than_it_has_room_for_nor_breaks_anything(
        steps in prop::collection::vec((0u8..8, any::<u32>(), any::<u32>(), 0usize..5000, 0u32..4), 1..80),
    ) {
        let mut bed = Bed::new();
        let (mut client, ports) = bed.joined(9);
        client.set_nonblocking(true).unwrap();
        for (op, alloc, forwarded, len, flags) in steps {
            let _ = client.write(&vec![1; len]);
            if len % 3 == 0 {
                let _ = client.read(&mut vec![0; len * 2]);
            }
            let wild = len % 2 == 0;
            bed.say(ports, [Op::Data, Op::Data, Op::CreditUpdate, Op::CreditRequest, Op::Shutdown, Op::Response, Op::Reset, Op::Unknown(op.into())][usize::from(op)], |h| {
                h.flags = flags;
                if wild {
                    (h.buf_alloc, h.fwd_cnt) = (alloc, forwarded);
                }
            }, &vec![2; len]);
            for _ in 0..20 {
                let Some((header, data)) = bed.packet() else { break };
                prop_assert!(data.is_empty() || header.op == Op::Data);
                prop_assert!(header.op != Op::Request);
            }
            prop_assert!(bed.streams.len() <= 1 && bed.streams.resets.len() < RESETS);
        }
    }
}
