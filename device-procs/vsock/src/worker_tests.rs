//! A worker on a thread, with a driver's three rings on one side and clients on the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bulkhead_runtime::driver::{Desc, DriverRing, WRITE, guest};
use bulkhead_runtime::mailbox::{Answer, Order, WorkerHandle, mailbox};
use bulkhead_runtime::worker_bed;

use proptest::prelude::*;

use super::*;
use crate::packet::{HOST_CID, Op, STREAM};

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x20_0000;
const RING: u16 = 16;
const CID: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(20);
/// Buffers of a ring, each of so many bytes.
const BUFFERS: u64 = GPA + 0x10_0000;
const BUFFER: u64 = 4096;

struct Bed {
    handles: Vec<WorkerHandle>,
    kicks: Vec<Arc<File>>,
    errs: Vec<Arc<File>>,
    memory: Arc<Memory>,
    rings: Vec<DriverRing>,
    path: std::path::PathBuf,
    /// The launcher's end, and who listens for the guest.
    launcher: Option<OwnedFd>,
    /// Of the transmit ring.
    sent: u16,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Bed {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bh-vsock-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        sys::set_nonblocking(listener.as_fd()).unwrap();
        let (_, memory) = guest(GPA, RAM).unwrap();
        let (mut handles, mut ports) = (Vec::new(), Vec::new());
        for queue in 0..3 {
            let (handle, port) = mailbox(queue).unwrap();
            handles.push(handle);
            ports.push(port);
        }
        let (launcher, end) = UnixStream::pair().unwrap();
        let dial = Some(Dialer::new(end.into()));
        let streams = Streams::new(CID, 1);
        let worker = Worker::new(ports, Arc::new(listener), dial, streams).unwrap();
        std::thread::spawn(move || worker.run());
        let event = || Arc::new(sys::eventfd().unwrap());
        let ring = |n: u64| {
            let mut ring = DriverRing::new(Arc::clone(&memory), GPA + n * 0x1_0000, RING);
            ring.reset();
            ring
        };
        Self {
            handles,
            kicks: vec![event(), event(), event()],
            errs: vec![event(), event(), event()],
            rings: (0..3).map(ring).collect(),
            memory,
            path,
            launcher: Some(launcher.into()),
            sent: 0,
        }
    }

    /// A driver that has given its buffers.
    fn started() -> Self {
        let mut bed = Self::new();
        for queue in [0, 2] {
            for head in 0..RING {
                bed.give(queue, head);
            }
        }
        bed.start();
        assert_eq!(bed.used(2), (0, 4), "whoever was there before is told");
        bed
    }

    fn start(&self) {
        for queue in 0..3 {
            assert_eq!(self.order(queue, self.setup(queue)), Answer::Done);
        }
    }

    fn setup(&self, queue: usize) -> Order {
        let (kick, err) = (&self.kicks[queue], &self.errs[queue]);
        worker_bed::start(&self.memory, &self.rings[queue], 0, kick, err)
    }

    fn order(&self, queue: usize, order: Order) -> Answer {
        worker_bed::order(&self.handles[queue], order)
    }

    fn place(queue: usize, head: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(RING) + u64::from(head)) * BUFFER
    }

    /// Gives a buffer to be filled.
    fn give(&mut self, queue: usize, head: u16) {
        let addr = Self::place(queue, head);
        let desc = Desc {
            addr,
            len: BUFFER as u32,
            flags: WRITE,
            next: 0,
        };
        self.rings[queue].desc(head, desc);
        self.rings[queue].offer(head);
        sys::signal(&self.kicks[queue]);
    }

    fn used(&mut self, queue: usize) -> (u32, u32) {
        worker_bed::completion(&mut self.rings[queue])
    }

    /// The next packet for the guest; its buffer is given again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.used(0);
        let mut bytes = vec![0; len as usize];
        let at = Self::place(0, head as u16);
        assert!(self.memory.read(at, &mut bytes));
        self.give(0, head as u16);
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        (header, bytes[HEADER..].to_vec())
    }

    /// A packet of the guest's.
    fn say(&mut self, (ours, theirs): (u32, u32), op: Op, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: theirs,
            dst_port: ours,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(data);
        self.send(&bytes);
        let head = u32::from((self.sent + RING - 1) % RING);
        assert_eq!(self.used(1), (head, 0));
    }

    fn send(&mut self, bytes: &[u8]) {
        let head = self.sent % RING;
        self.sent = (self.sent + 1) % RING;
        let addr = Self::place(1, head);
        assert!(self.memory.write(addr, bytes));
        let desc = Desc {
            addr,
            len: bytes.len() as u32,
            flags: 0,
            next: 0,
        };
        self.rings[1].desc(head, desc);
        self.rings[1].offer(head);
        sys::signal(&self.kicks[1]);
    }

    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = client.write_all(format!("CONNECT {port}\n").as_bytes());
        client
    }

    fn joined(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client(port);
        let (request, _) = self.packet();
        assert_eq!((request.op, request.dst_port), (Op::Request, port));
        let ports = (request.src_port, port);
        self.say(ports, Op::Response, &[]);
        let wanted = format!("OK {}\n", ports.0);
        let mut line = vec![0; wanted.len()];
        client.read_exact(&mut line).unwrap();
        (client, ports)
    }
}

fn ended(client: &mut UnixStream) -> bool {
    matches!(client.read(&mut [0]), Ok(0) | Err(_))
}

#[test]
fn clients_are_joined_to_ports_and_bytes_go_both_ways() {
    let mut bed = Bed::started();
    let mut clients: Vec<_> = (100..130).map(|port| bed.joined(port)).collect();
    for (n, (client, ports)) in clients.iter_mut().enumerate() {
        bed.say(*ports, Op::Data, &[n as u8; 3000]);
        let mut bytes = [0; 3000];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [n as u8; 3000]);
        client.write_all(&[n as u8; 10_000]).unwrap();
        let mut got = Vec::new();
        while got.len() < 10_000 {
            let (header, data) = bed.packet();
            assert_eq!((header.op, header.src_port), (Op::Data, ports.0));
            got.extend(data);
        }
        assert_eq!(got, [n as u8; 10_000]);
    }
    let (client, ports) = &mut clients[7];
    bed.say(*ports, Op::Reset, &[]);
    assert!(ended(client));
}

#[test]
fn without_a_driver_a_client_is_turned_away_at_once_and_with_one_that_goes_all_are() {
    let bed = Bed::new();
    let begun = Instant::now();
    assert!(ended(&mut bed.client(1024)));
    assert!(begun.elapsed() < Duration::from_secs(5));
    let mut bed = Bed::started();
    let (mut client, _) = bed.joined(9);
    for queue in 0..3 {
        assert!(matches!(
            bed.order(queue, Order::Stop),
            Answer::Stopped { .. }
        ));
    }
    assert!(ended(&mut client) && ended(&mut bed.client(1024)));
    for queue in 0..3 {
        bed.rings[queue].reset();
    }
    bed.sent = 0;
    for queue in [0, 2] {
        for head in 0..RING {
            bed.give(queue, head);
        }
    }
    bed.start();
    assert_eq!(bed.used(2), (0, 4));
    bed.joined(9);
}

#[test]
fn a_guest_without_buffers_makes_clients_wait_and_orders_not() {
    let mut bed = Bed::new();
    bed.give(2, 0);
    bed.start();
    assert_eq!(bed.used(2), (0, 4));
    let mut client = bed.client(9);
    client.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let same = Arc::new(bed.memory.as_ref().clone());
    assert_eq!(bed.order(0, Order::Memory(same)), Answer::Done);
    assert!(client.read(&mut [0]).is_err());
    bed.give(0, 0);
    let (request, _) = bed.packet();
    assert_eq!(request.dst_port, 9);
}

#[test]
fn what_is_no_packet_breaks_the_ring_and_nothing_else() {
    let header = |len: u32| {
        let mut bytes = [0; HEADER];
        bytes[24..28].copy_from_slice(&len.to_le_bytes());
        bytes.to_vec()
    };
    for bytes in [
        vec![0; HEADER - 1],
        header(1),
        header(u32::MAX),
        header(70_000),
    ] {
        let mut bed = Bed::started();
        bed.send(&bytes);
        assert!(sys::wait_readable(&*bed.errs[1], 20_000).unwrap());
        assert!(bed.handles[1].status().broken.load(Ordering::Relaxed));
        for queue in 0..3 {
            assert!(matches!(
                bed.order(queue, Order::Stop),
                Answer::Stopped { .. }
            ));
            bed.rings[queue].reset();
        }
        bed.sent = 0;
        for queue in [0, 2] {
            for head in 0..RING {
                bed.give(queue, head);
            }
        }
        bed.start();
        bed.joined(5);
    }
    // A buffer without room for a byte of data.
    let mut bed = Bed::new();
    let desc = Desc {
        addr: Bed::place(0, 0),
        len: HEADER as u32,
        flags: WRITE,
        next: 0,
    };
    bed.rings[0].desc(0, desc);
    bed.rings[0].offer(0);
    bed.start();
    let _client = bed.client(5);
    assert!(sys::wait_readable(&*bed.errs[0], 20_000).unwrap());
}

impl Bed {
    /// What the launcher is asked.
    fn asked(&self) -> (u32, u32) {
        let launcher = self.launcher.as_ref().unwrap();
        assert!(sys::wait_readable(launcher, 20_000).unwrap());
        let mut bytes = [0; 8];
        assert_eq!(
            sys::receive_now(launcher.as_fd(), &mut bytes).unwrap(),
            Some(8)
        );
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (number(0), number(4))
    }

    /// What it says; a connection goes with it.
    fn answer(&self, ticket: u32, status: u32, stream: Option<&UnixStream>) {
        let launcher = self.launcher.as_ref().unwrap();
        let bytes = [ticket.to_le_bytes(), status.to_le_bytes()].concat();
        let sent = sys::send_now(launcher.as_fd(), &bytes, stream.map(AsFd::as_fd));
        assert_eq!(sent.unwrap(), 8);
    }
}

#[test]
fn the_guest_reaches_whom_the_launcher_finds_and_is_told_where_there_is_nobody() {
    let mut bed = Bed::started();
    bed.say((1025, 9), Op::Request, &[]);
    let (ticket, port) = bed.asked();
    assert_eq!(port, 1025);
    let (mut host, theirs) = UnixStream::pair().unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    bed.answer(ticket, 0, Some(&theirs));
    drop(theirs);
    assert_eq!(bed.packet().0.op, Op::Response);
    bed.say((1025, 9), Op::Data, b"question");
    let mut text = [0; 8];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"question");
    host.write_all(b"answer").unwrap();
    assert_eq!(bed.packet().1, b"answer");
    // Nobody; and something else than what was promised.
    for (status, stream) in [(1, None), (1, Some(&host)), (0, None)] {
        bed.say((1026, 9), Op::Request, &[]);
        let (ticket, _) = bed.asked();
        bed.answer(ticket, status, stream);
        assert_eq!(bed.packet().0.op, Op::Reset);
    }
    // The launcher is not there any more: those that wait, and those that come.
    bed.say((1027, 9), Op::Request, &[]);
    let _ = bed.asked();
    bed.launcher = None;
    assert_eq!(bed.packet().0.op, Op::Reset);
    bed.say((1028, 9), Op::Request, &[]);
    assert_eq!(bed.packet().0.op, Op::Reset);
    // What there is goes on.
    host.write_all(b"still").unwrap();
    assert_eq!(bed.packet().1, b"still");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_ring_of_a_hostile_guest_ends_the_worker(
        descs in prop::collection::vec((0u16..RING, any::<u64>(), any::<u32>(), 0u16..8, any::<u16>(), any::<bool>()), 1..24),
        heads in prop::collection::vec((0usize..3, any::<u16>(), any::<bool>()), 1..24),
        headers in prop::collection::vec((any::<[u8; 32]>(), any::<[u8; 12]>(), any::<bool>()), RING as usize),
        index in any::<u16>(),
    ) {
        let mut bed = Bed::new();
        // Packets that are nearly sound, so that some get far.
        for (head, (low, high, sound)) in headers.iter().enumerate() {
            let mut bytes = [low.as_slice(), high.as_slice()].concat();
            if *sound {
                bytes[..8].copy_from_slice(&CID.to_le_bytes());
                bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
                bytes[24..28].copy_from_slice(&u32::from(low[24]).to_le_bytes());
                bytes[28..30].copy_from_slice(&STREAM.to_le_bytes());
                bytes[30..32].copy_from_slice(&u16::from(low[30] % 9).to_le_bytes());
            }
            prop_assert!(bed.memory.write(Bed::place(1, head as u16), &bytes));
        }
        for queue in 0..3 {
            for (at, addr, len, flags, next, inside) in &descs {
                let (addr, len) = if *inside {
                    (Bed::place(queue, *at), len % 0x2000)
                } else {
                    (*addr, *len)
                };
                let next = if *inside { next % RING } else { *next };
                bed.rings[queue].desc(*at, Desc { addr, len, flags: *flags, next });
            }
        }
        for (queue, head, inside) in &heads {
            bed.rings[*queue].offer(if *inside { head % RING } else { *head });
        }
        if index % 4 == 0 {
            // An index from nowhere.
            bed.rings[usize::from(index) % 3].set_avail_idx(index);
        }
        bed.start();
        let _client = bed.client(7);
        for kick in &bed.kicks {
            sys::signal(kick);
        }
        // It obeys, whatever it found.
        for queue in 0..3 {
            let answer = bed.order(queue, Order::Stop);
            let stopped = matches!(answer, Answer::Stopped { .. });
            prop_assert!(stopped, "{answer:?}");
            bed.rings[queue].reset();
        }
        bed.sent = 0;
        for queue in [0, 2] {
            for head in 0..RING {
                bed.give(queue, head);
            }
        }
        bed.start();
        prop_assert_eq!(bed.used(2), (0, 4));
        bed.joined(9);
    }
}
