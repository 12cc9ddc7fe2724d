//! A worker on a thread, with a driver's rings on one side and clients on the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bulkhead_runtime::driver::{Desc, DriverRing, NEXT, WRITE, guest};
use bulkhead_runtime::frontend::Numbers;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerHandle, mailbox};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::worker_bed;

use super::*;
use crate::control::{F_MULTIPORT, Size, Traits};

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x40_0000;
const RING: u16 = 16;
const QUEUES: usize = 6;
const PATIENCE: Duration = Duration::from_secs(20);
/// Buffers of a ring, each of so many bytes.
const BUFFERS: u64 = GPA + 0x10_0000;
const BUFFER: u64 = 4096;
/// Queues of the console, and of the named port.
const CONSOLE: usize = 0;
const NAMED: usize = 4;

struct Bed {
    handles: Vec<WorkerHandle>,
    kicks: Vec<Arc<File>>,
    errs: Vec<Arc<File>>,
    memory: Arc<Memory>,
    rings: Vec<DriverRing>,
    sent: Vec<u16>,
    paths: Vec<PathBuf>,
    control: Arc<Control>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Bed {
    /// A console and a named port, of a driver that has given its buffers.
    fn new() -> Self {
        static NEXT_BED: AtomicU32 = AtomicU32::new(0);
        let number = NEXT_BED.fetch_add(1, Ordering::Relaxed);
        let path = |port| {
            let name = format!("bh-console-{}-{number}-{port}", std::process::id());
            std::env::temp_dir().join(name)
        };
        let paths = vec![path(0), path(1)];
        let ports = paths.iter().zip([true, false]).map(|(path, console)| {
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            Port::new(listener, console)
        });
        let traits = [None, Some("agent".to_owned())].map(|name| Traits {
            name,
            size: Size::default(),
        });
        let control = Arc::new(Control::new(traits.to_vec()));
        control.accepted(F_MULTIPORT);
        let (_, memory) = guest(GPA, RAM).unwrap();
        let (handles, queues) = (0..QUEUES as u16).map(|q| mailbox(q).unwrap()).unzip();
        let worker = Worker::new(queues, ports.collect(), Arc::clone(&control)).unwrap();
        std::thread::spawn(move || worker.run());
        let events = || {
            let event = |_| Arc::new(sys::eventfd().unwrap());
            (0..QUEUES).map(event).collect()
        };
        let ring = |n: usize| {
            let base = GPA + n as u64 * 0x1_0000;
            let mut ring = DriverRing::new(Arc::clone(&memory), base, RING);
            ring.reset();
            ring
        };
        let mut bed = Self {
            handles,
            kicks: events(),
            errs: events(),
            rings: (0..QUEUES).map(ring).collect(),
            sent: vec![0; QUEUES],
            memory,
            paths,
            control,
        };
        for queue in [CONSOLE, TO_DRIVER, NAMED] {
            for head in 0..RING {
                bed.give(queue, head);
            }
        }
        for queue in 0..QUEUES {
            assert_eq!(bed.start(queue, 0), Answer::Done);
        }
        bed
    }

    /// One whose driver has been told what there is, and has both ports open.
    fn open() -> Self {
        let mut bed = Self::new();
        for (port, event) in [(0, 0), (0, 3), (1, 3), (0, 6), (1, 6)] {
            bed.says(port, event, 1);
        }
        // Each is added; a console, and open; a name.
        for expected in [(0, 1), (1, 1), (0, 4), (0, 6), (1, 7)] {
            let message = bed.hears();
            assert_eq!((message[0], message[4]), expected, "{message:?}");
        }
        bed
    }

    fn start(&self, queue: usize, base: u16) -> Answer {
        let (kick, err) = (&self.kicks[queue], &self.errs[queue]);
        let start = worker_bed::start(&self.memory, &self.rings[queue], base, kick, err);
        self.order(queue, start)
    }

    fn order(&self, queue: usize, order: Order) -> Answer {
        worker_bed::order(&self.handles[queue], order)
    }

    fn place(queue: usize, head: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(RING) + u64::from(head)) * BUFFER
    }

    fn offer(&mut self, queue: usize, head: u16, desc: Desc) {
        self.rings[queue].desc(head, desc);
        self.rings[queue].offer(head);
        sys::signal(&self.kicks[queue]);
    }

    /// Gives a buffer to be filled.
    fn give(&mut self, queue: usize, head: u16) {
        let desc = Desc {
            addr: Self::place(queue, head),
            len: BUFFER as u32,
            flags: WRITE,
            next: 0,
        };
        self.offer(queue, head, desc);
    }

    fn used(&mut self, queue: usize) -> (u32, u32) {
        worker_bed::completion(&mut self.rings[queue])
    }

    /// What comes next; its buffer is given again.
    fn got(&mut self, queue: usize) -> Vec<u8> {
        let (head, len) = self.used(queue);
        let mut bytes = vec![0; len as usize];
        assert!(
            self.memory
                .read(Self::place(queue, head as u16), &mut bytes)
        );
        self.give(queue, head as u16);
        bytes
    }

    fn hears(&mut self) -> Vec<u8> {
        self.got(TO_DRIVER)
    }

    /// So many bytes in all.
    fn receives(&mut self, queue: usize, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            all.extend(self.got(queue));
        }
        all
    }

    /// Sends without waiting for the end of it.
    fn begin(&mut self, queue: usize, bytes: &[u8]) -> u16 {
        let head = self.sent[queue] % RING;
        self.sent[queue] = (self.sent[queue] + 1) % RING;
        let addr = Self::place(queue, head);
        assert!(self.memory.write(addr, bytes));
        let desc = Desc {
            addr,
            len: bytes.len() as u32,
            flags: 0,
            next: 0,
        };
        self.offer(queue, head, desc);
        head
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let head = self.begin(queue, bytes);
        assert_eq!(self.used(queue), (head.into(), 0));
    }

    /// A message of the driver's.
    fn says(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.send(FROM_DRIVER, &message);
    }

    fn client(&self, port: usize) -> UnixStream {
        let stream = UnixStream::connect(&self.paths[port]).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn is_broken(&self, queue: usize) -> bool {
        sys::wait_readable(&*self.errs[queue], 20_000).unwrap()
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n % 251) as u8).collect()
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_go_both_ways_by_each_port() {
    let mut bed = Bed::open();
    let (mut console, mut agent) = (bed.client(0), bed.client(1));
    assert_eq!(bed.hears(), [1, 0, 0, 0, 6, 0, 1, 0], "the port is open");
    for round in 0..40 {
        let text = format!("console {round}");
        console.write_all(text.as_bytes()).unwrap();
        assert_eq!(bed.receives(CONSOLE, text.len()), text.as_bytes());
        bed.send(NAMED + 1, text.as_bytes());
        assert_eq!(read(&mut agent, text.len()), text.as_bytes());
        bed.send(CONSOLE + 1, b"x");
        assert_eq!(read(&mut console, 1), b"x");
    }
    let much = pattern(200_000);
    let (reader, copy) = (agent.try_clone().unwrap(), much.clone());
    let writer = std::thread::spawn(move || (&reader).write_all(&copy).unwrap());
    assert_eq!(bed.receives(NAMED, much.len()), much);
    writer.join().unwrap();
    let status = bed.handles[NAMED].status();
    assert!(status.read_bytes.get() >= 200_000);
}

#[test]
fn a_slow_client_holds_back_a_named_port_and_loses_a_consoles_output() {
    let mut bed = Bed::open();
    let (mut console, mut agent) = (bed.client(0), bed.client(1));
    bed.hears();
    let piece = vec![7; BUFFER as usize];
    // A console takes it all, whoever looks on.
    let most = 400;
    for _ in 0..most {
        bed.send(CONSOLE + 1, &piece);
    }
    let dropped = bed.handles[CONSOLE + 1].status().dropped.get();
    assert!(dropped > 0 && dropped < most, "{dropped}");
    assert_eq!(read(&mut console, ROOM), vec![7; ROOM]);

    // A named port takes what there is room for, and goes on where it was.
    let (mut begun, mut ended) = (0_u64, 0_u64);
    let stuck = loop {
        if begun - ended < 8 {
            let byte = (begun % 251) as u8;
            bed.begin(NAMED + 1, &vec![byte; BUFFER as usize]);
            begun += 1;
        }
        while bed.rings[NAMED + 1].take_used().is_some() {
            ended += 1;
        }
        let status = bed.handles[NAMED + 1].status();
        if begun - ended == 8 && status.held.load(Ordering::Relaxed) {
            break ended;
        }
        assert!(begun < 10_000, "nothing is held back");
        std::thread::yield_now();
    };
    // Those that were under way at the last look may have ended since.
    assert!((stuck as usize + 8) * BUFFER as usize >= ROOM);
    for n in 0..begun {
        let byte = (n % 251) as u8;
        assert_eq!(
            read(&mut agent, BUFFER as usize),
            vec![byte; BUFFER as usize]
        );
    }
    while ended < begun {
        bed.used(NAMED + 1);
        ended += 1;
    }
    assert_eq!(bed.handles[NAMED + 1].status().dropped.get(), 0);
}

#[test]
fn one_longer_than_all_room_goes_in_parts() {
    let mut bed = Bed::open();
    let mut agent = bed.client(1);
    bed.hears();
    let all = pattern(RAM as usize - 0x20_0000 - 7);
    let addr = GPA + 0x20_0000;
    assert!(bed.memory.write(addr, &all) && all.len() > 4 * ROOM);
    let desc = Desc {
        addr,
        len: all.len() as u32,
        flags: 0,
        next: 0,
    };
    bed.offer(NAMED + 1, 0, desc);
    assert_eq!(read(&mut agent, all.len()), all);
    assert_eq!(bed.used(NAMED + 1), (0, 0));
}

#[test]
fn clients_come_one_by_one_and_the_driver_is_told() {
    let mut bed = Bed::open();
    let mut first = bed.client(1);
    assert_eq!(bed.hears()[4..], [6, 0, 1, 0]);
    let mut second = bed.client(1);
    second.write_all(b"second").unwrap();
    first.write_all(b"first").unwrap();
    // It sends no more, and has its answer all the same.
    first.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bed.receives(NAMED, 5), b"first");
    bed.send(NAMED + 1, b"answer");
    assert_eq!(read(&mut first, 6), b"answer");
    drop(first);
    assert_eq!(bed.hears()[4..], [6, 0, 0, 0]);
    assert_eq!(bed.hears()[4..], [6, 0, 1, 0]);
    assert_eq!(bed.receives(NAMED, 6), b"second");
    drop(second);
    assert_eq!(bed.hears()[4..], [6, 0, 0, 0]);
    // Nobody is there: it is taken and thrown away.
    bed.send(NAMED + 1, b"nobody");
    assert_eq!(bed.handles[NAMED + 1].status().dropped.get(), 1);
    // Whoever goes before the guest opens its end leaves nothing behind.
    bed.says(1, 6, 0);
    let mut early = bed.client(1);
    assert_eq!(bed.hears()[4..], [6, 0, 1, 0]);
    early.write_all(b"early").unwrap();
    drop(early);
    assert_eq!(bed.hears()[4..], [6, 0, 0, 0]);
    let mut late = bed.client(1);
    late.write_all(b"late").unwrap();
    bed.says(1, 6, 1);
    assert_eq!(bed.receives(NAMED, 4), b"late");
}

#[test]
fn a_size_is_told_at_once() {
    let mut bed = Bed::open();
    bed.control.resize(
        0,
        Size {
            cols: 132,
            rows: 43,
        },
    );
    bed.handles[0].refresh();
    assert_eq!(bed.hears(), [0, 0, 0, 0, 5, 0, 0, 0, 132, 0, 43, 0]);
}

#[test]
fn what_is_no_request_breaks_the_ring_and_nothing_else() {
    let outside = (GPA + RAM - 2, 8, 0);
    for (queue, (addr, len, flags)) in [
        (FROM_DRIVER, (BUFFERS, 8, WRITE)),
        (FROM_DRIVER, (BUFFERS, 7, 0)),
        (FROM_DRIVER, outside),
        (TO_DRIVER, (BUFFERS, 8, 0)),
        (TO_DRIVER, (BUFFERS, 4, WRITE)),
        (CONSOLE, (BUFFERS, 8, 0)),
        (CONSOLE, (BUFFERS, 0, WRITE)),
        (CONSOLE + 1, (BUFFERS, 8, WRITE)),
        (CONSOLE + 1, outside),
        (NAMED + 1, (BUFFERS, 8, NEXT)),
    ] {
        let mut bed = Bed::open();
        let (mut console, _agent) = (bed.client(0), bed.client(1));
        bed.hears();
        assert!(matches!(
            bed.order(queue, Order::Stop),
            Answer::Stopped { .. }
        ));
        bed.rings[queue].reset();
        bed.sent[queue] = 0;
        let desc = Desc {
            addr,
            len,
            flags,
            next: 0,
        };
        bed.offer(queue, 0, desc);
        assert_eq!(bed.start(queue, 0), Answer::Done);
        if queue == TO_DRIVER {
            bed.control.resize(0, Size { cols: 9, rows: 9 });
            bed.handles[0].refresh();
        }
        if queue == CONSOLE {
            console.write_all(b"x").unwrap();
        }
        assert!(bed.is_broken(queue), "{queue} {len} {flags}");
        let other = if queue < NAMED {
            NAMED + 1
        } else {
            CONSOLE + 1
        };
        bed.send(other, b"goes on");
        assert!(bed.handles[queue].status().broken.load(Ordering::Relaxed));
    }
}

/// BULKHEAD_SEED makes it another one, BULKHEAD_TAKEOVERS longer.
#[test]
fn a_driver_that_says_anything_at_all_leaves_it_well() {
    let mut numbers = Numbers::seeded(0xc0_0501e);
    let rounds = bulkhead_runtime::frontend::takeovers(40);
    let mut bed = Bed::open();
    for round in 0..rounds {
        let mut clients = Vec::new();
        for _ in 0..60 {
            let queue = numbers.below(QUEUES as u64) as usize;
            match numbers.below(8) {
                0 => clients.push(bed.client(numbers.below(2) as usize)),
                1 => drop(clients.pop()),
                2 => {
                    if let Some(client) = clients.last() {
                        client.set_nonblocking(true).unwrap();
                        let _ = (&mut &*client).write(&pattern(numbers.below(9000) as usize));
                    }
                }
                3 => {
                    // Anything in the tables of a ring, and in the rings themselves.
                    let at = GPA + queue as u64 * 0x1_0000 + numbers.below(1024);
                    let byte = [numbers.below(256) as u8];
                    assert!(bed.memory.write(at, &byte));
                    sys::signal(&bed.kicks[queue]);
                }
                4 => {
                    let desc = Desc {
                        addr: GPA + numbers.below(RAM + 64),
                        len: numbers.below(0x2_0000) as u32,
                        flags: numbers.below(8) as u16,
                        next: numbers.below(20) as u16,
                    };
                    bed.offer(queue, numbers.below(RING.into()) as u16, desc);
                }
                _ => {
                    let message = [
                        numbers.below(4) as u8,
                        0,
                        0,
                        (numbers.below(16) / 15) as u8,
                        numbers.below(10) as u8,
                        0,
                        numbers.below(2) as u8,
                        0,
                    ];
                    let len = if numbers.below(8) == 0 { 5 } else { 8 };
                    bed.begin(FROM_DRIVER, &message[..len]);
                }
            }
        }
        // A reset, and everything is as at the start.
        for queue in 0..QUEUES {
            assert!(matches!(
                bed.order(queue, Order::Stop),
                Answer::Stopped { .. }
            ));
        }
        bed.control.accepted(0);
        bed.control.accepted(F_MULTIPORT);
        drop(clients);
        for queue in 0..QUEUES {
            bed.rings[queue].reset();
            bed.sent[queue] = 0;
            sys::drain(&bed.kicks[queue]);
            sys::drain(&bed.errs[queue]);
        }
        for queue in [CONSOLE, TO_DRIVER, NAMED] {
            for head in 0..RING {
                bed.give(queue, head);
            }
        }
        for queue in 0..QUEUES {
            assert_eq!(bed.start(queue, 0), Answer::Done, "round {round}");
        }
        for (port, event) in [(0, 0), (0, 3), (0, 6)] {
            bed.says(port, event, 1);
        }
        // Clients of before may be there still, and gone.
        let mut console = bed.client(0);
        console.write_all(b"well").unwrap();
        let mut all = Vec::new();
        while !all.ends_with(b"well") {
            all.extend(bed.got(CONSOLE));
        }
    }
}
