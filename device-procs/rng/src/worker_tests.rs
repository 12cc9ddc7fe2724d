//! A worker on a thread, with a driver on one side and a pipe or the host's generator on the other.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use bulkhead_runtime::driver::{Desc, DriverRing, NEXT, WRITE, guest};
use bulkhead_runtime::limit::Rate;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerHandle, mailbox};
use bulkhead_runtime::sys;
use bulkhead_runtime::worker_bed;
use proptest::prelude::*;

use super::*;

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x10_0000;
const RING: u16 = 16;
const BUFFERS: u64 = GPA + 0x1_0000;
const PATIENCE: Duration = Duration::from_secs(20);

struct Bed {
    handle: WorkerHandle,
    limiter: Arc<Limiter>,
    err: Arc<File>,
    kick: Arc<File>,
    memory: Arc<Memory>,
    ring: DriverRing,
}

impl Bed {
    fn new(source: File, bytes: Option<Rate>) -> Self {
        let (_, memory) = guest(GPA, RAM).unwrap();
        let mut ring = DriverRing::new(Arc::clone(&memory), GPA, RING);
        ring.reset();
        let (handle, port) = mailbox(0).unwrap();
        let limiter = Arc::new(Limiter::new(bytes, None, clock::now()));
        let worker = Worker::new(port, Arc::new(source), Arc::clone(&limiter));
        std::thread::spawn(move || worker.run());
        let event = || Arc::new(sys::eventfd().unwrap());
        let bed = Self {
            handle,
            limiter,
            err: event(),
            kick: event(),
            memory,
            ring,
        };
        assert_eq!(bed.start(0), Answer::Done);
        bed
    }

    fn random() -> Self {
        Self::new(File::open("/dev/random").unwrap(), None)
    }

    fn start(&self, base: u16) -> Answer {
        let start = worker_bed::start(&self.memory, &self.ring, base, &self.kick, &self.err);
        self.order(start)
    }

    fn order(&self, order: Order) -> Answer {
        worker_bed::order(&self.handle, order)
    }

    /// Offers buffers from a descriptor on, one after another.
    fn offer(&mut self, first: u16, buffers: &[(u64, u32, bool)]) {
        let last = buffers.len() - 1;
        for (i, (addr, len, writable)) in buffers.iter().enumerate() {
            let index = first + i as u16;
            let mut flags = if *writable { WRITE } else { 0 };
            if i < last {
                flags |= NEXT;
            }
            self.ring.desc(
                index,
                Desc {
                    addr: *addr,
                    len: *len,
                    flags,
                    next: index + 1,
                },
            );
        }
        self.ring.offer(first);
        sys::signal(&self.kick);
    }

    /// The completion that comes next: which, and how many bytes.
    fn completed(&mut self) -> (u32, u32) {
        worker_bed::completion(&mut self.ring)
    }

    /// It comes to say this of its sleep.
    fn sleeps(&self, why: Sleep) {
        let begun = Instant::now();
        let status = self.handle.status();
        let said = || {
            let host = status.waits_for_host.load(Ordering::Relaxed);
            (host, status.held.load(Ordering::Relaxed))
        };
        while said() != (why == Sleep::ForHost, why == Sleep::ByOrder) {
            assert!(begun.elapsed() < PATIENCE, "not {why:?}: {:?}", said());
            std::thread::yield_now();
        }
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.memory.read(addr, &mut bytes));
        bytes
    }
}

/// The read end does not wait.
fn pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = OwnedFd::from(reader);
    sys::set_nonblocking(reader.as_fd()).unwrap();
    (File::from(reader), File::from(OwnedFd::from(writer)))
}

#[test]
fn a_guest_has_bytes_of_the_hosts_and_no_more_than_it_has_room_for() {
    let mut bed = Bed::random();
    for (at, len) in [(0, 64), (0x100, 4096), (0x2000, 10_000)] {
        bed.offer(0, &[(BUFFERS + at, len, true)]);
        assert_eq!(bed.completed(), (0, len));
    }
    let all = bed.bytes(BUFFERS, 0x2000 + 10_000 + 16);
    assert_ne!(all[..64], [0; 64]);
    assert_ne!(all[..64], all[0x100..0x140], "twice the same");
    assert_eq!(all[64..0x100], [0; 0x100 - 64]);
    assert_eq!(all[0x100 + 4096..0x2000], [0; 0x2000 - 0x1100]);
    assert_ne!(all[0x2000 + 9984..0x2000 + 10_000], [0; 16]);
    assert_eq!(all[0x2000 + 10_000..], [0; 16]);
    let status = bed.handle.status();
    assert_eq!(
        (status.requests.get(), status.read_bytes.get()),
        (3, 14_160)
    );
}

#[test]
fn a_request_gets_so_much_and_no_more() {
    let mut bed = Bed::random();
    let half = MOST / 2 + 100;
    bed.offer(
        3,
        &[
            (BUFFERS, half, true),
            (BUFFERS + 0x1_0000, half, true),
            (BUFFERS + 0x2_0000, 100, true),
        ],
    );
    assert_eq!(bed.completed(), (3, MOST));
    let second = bed.bytes(BUFFERS + 0x1_0000, half as usize);
    let end = (MOST - half) as usize;
    assert_ne!(second[end - 16..end], [0; 16]);
    assert_eq!(second[end..], vec![0; half as usize - end]);
    assert_eq!(bed.bytes(BUFFERS + 0x2_0000, 100), [0; 100]);
}

#[test]
fn a_flood_does_not_keep_orders_waiting() {
    let mut bed = Bed::random();
    for head in 0..RING {
        bed.offer(head, &[(BUFFERS, MOST, true)]);
    }
    // More than a turn: it looks in between.
    let Answer::Stopped { next_avail } = bed.order(Order::Stop) else {
        panic!("no stop");
    };
    let done = bed.ring.used_idx();
    assert_eq!(next_avail, Some(done));
    assert_eq!(bed.start(done), Answer::Done);
    sys::signal(&bed.kick);
    for head in 0..RING {
        assert_eq!(bed.completed(), (head.into(), MOST), "in order");
    }
}

#[test]
fn a_limit_makes_the_guest_wait_and_orders_not() {
    let rate = Rate::new("bytes", 1000, 1000).unwrap();
    let mut bed = Bed::new(File::open("/dev/random").unwrap(), rate);
    let begun = Instant::now();
    for head in 0..3 {
        bed.offer(head, &[(BUFFERS, 1100, true)]);
    }
    assert_eq!(bed.completed(), (0, 1100));
    bed.sleeps(Sleep::ByOrder);
    let same = Arc::new(bed.memory.as_ref().clone());
    assert_eq!(bed.order(Order::Memory(same)), Answer::Done);
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(bed.completed(), (1, 1100));
    assert_eq!(bed.completed(), (2, 1100));
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1100), "{took:?}");
    assert!(bed.handle.status().throttled.get() > 0);
    // Lifted while one waits.
    bed.offer(3, &[(BUFFERS, 50_000, true)]);
    bed.offer(4, &[(BUFFERS, 1, true)]);
    bed.limiter.set(None, None, clock::now());
    bed.handle.refresh();
    assert_eq!((bed.completed().0, bed.completed().0), (3, 4));
    bed.sleeps(Sleep::Idle);
}

#[test]
fn what_the_host_has_not_yet_comes_later_and_is_told() {
    let (reader, mut writer) = pipe();
    let mut bed = Bed::new(reader, None);
    bed.offer(0, &[(BUFFERS, 8, true)]);
    std::thread::sleep(Duration::from_millis(50));
    assert!(bed.ring.take_used().is_none());
    bed.sleeps(Sleep::ForHost);
    assert_eq!(bed.handle.status().in_flight.get(), 0);
    assert_eq!(bed.handle.status().host_errors().1, libc::EAGAIN);
    writer.write_all(b"12345").unwrap();
    // Less than there is room for, and at least one byte.
    assert_eq!(bed.completed(), (0, 5));
    assert_eq!(bed.bytes(BUFFERS, 8), *b"12345\0\0\0");
    bed.offer(1, &[(BUFFERS, 8, true)]);
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(bed.handle.status().host_errors().0, 2, "told once each");
    let stopped = Answer::Stopped {
        next_avail: Some(1),
    };
    assert_eq!(bed.order(Order::Stop), stopped);
    // The next driver's worker, or the next process, finds it again.
    writer.write_all(b"abcdefgh").unwrap();
    assert_eq!(bed.start(1), Answer::Done);
    assert_eq!(bed.completed(), (1, 8));
    assert_eq!(bed.bytes(BUFFERS, 8), *b"abcdefgh");
}

#[test]
fn what_is_no_request_breaks_the_ring_and_nothing_else() {
    for buffers in [
        &[(BUFFERS, 8, false)][..],
        &[(BUFFERS, 8, false), (BUFFERS + 8, 8, true)],
        &[(BUFFERS, 0, true)],
        &[(GPA + RAM - 4, 8, true)],
        &[(u64::MAX - 4, 8, true)],
    ] {
        let mut bed = Bed::random();
        bed.offer(0, buffers);
        assert!(sys::wait_readable(&*bed.err, 20_000).unwrap());
        assert!(bed.handle.status().broken.load(Ordering::Relaxed));
        assert!(bed.ring.take_used().is_none());
        assert!(matches!(bed.order(Order::Stop), Answer::Stopped { .. }));
        bed.ring.reset();
        assert_eq!(bed.start(0), Answer::Done);
        bed.offer(0, &[(BUFFERS, 8, true)]);
        assert_eq!(bed.completed(), (0, 8));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn every_buffer_holds_what_was_read_for_it(
        requests in prop::collection::vec(prop::collection::vec(0u32..6000, 1..5), 1..6),
    ) {
        // A source whose bytes tell where they are of.
        let source = sys::memfd("source").unwrap();
        let known: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        (&source).write_all(&known).unwrap();
        std::io::Seek::rewind(&mut &source).unwrap();
        let mut bed = Bed::new(source, None);
        let mut at = 0_usize;
        for lens in requests {
            let mut addr = BUFFERS;
            let mut buffers = Vec::new();
            for len in lens {
                buffers.push((addr, len, true));
                addr += u64::from(len) + 1;
            }
            let all: u32 = buffers.iter().map(|b| b.1).sum();
            if all == 0 {
                continue;
            }
            bed.offer(0, &buffers);
            prop_assert_eq!(bed.completed(), (0, all));
            for (addr, len, _) in buffers {
                let end = at + len as usize;
                prop_assert_eq!(&bed.bytes(addr, len as usize)[..], &known[at..end]);
                prop_assert_eq!(bed.bytes(addr + u64::from(len), 1), [0]);
                at = end;
            }
            prop_assert!(bed.memory.write(BUFFERS, &[0; 30_000]));
        }
    }
}
