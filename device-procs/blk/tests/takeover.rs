//! Given a block process that is killed under load, again and again, another takes over with
//! the in-flight region: each request is completed exactly once, by an interrupt, and what was
//! written is on the disk. BULKHEAD_TAKEOVERS makes it longer, BULKHEAD_SEED makes it another
//! one, and BULKHEAD_CHAOS has it print what it does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_runtime::driver::{DriverRing, WRITE};
use bulkhead_runtime::frontend::{
    GREETINGS, Numbers, Region, Step, fd, greet, inject, negotiate, say_reset, steps, takeovers,
};
use bulkhead_runtime::sys::{self, PollFd};
use support::*;
use vhost::VhostBackend;

const QUEUES: u16 = 2;
/// Descriptors per request: header, data, status.
const PARTS: u16 = 3;
const DEPTH: u16 = RING_SIZE / PARTS;
const LEN: u32 = 512;
/// Buffers are used in turn: the kernel may still write to those of a process that was just
/// killed, and here nobody waits for that as a supervisor does. For the same reason no sector
/// is written twice.
const BUFFERS: u64 = 3000;
const HEADERS: u64 = GPA;
const DATA: u64 = GPA + 0x4000;
/// Sectors that hold their own number and are only read.
const READ_ONLY: u64 = 64;

#[derive(Clone, Copy, Debug)]
struct Request {
    write: bool,
    sector: u64,
    data: u64,
}

/// A guest that outlives its block processes, and the front-end's part that does.
struct Machine {
    vm: Vm,
    region: Region,
    flying: Vec<HashMap<u16, Request>>,
    next_sector: u64,
    next_buffer: u64,
    completed: u64,
}

impl Machine {
    fn new(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).unwrap())
    }

    fn over(stream: UnixStream) -> Self {
        let mut vm = Vm::over(stream, QUEUES);
        for q in &mut vm.queues {
            q.ring.reset();
        }
        Self {
            vm,
            region: None,
            flying: vec![HashMap::new(); usize::from(QUEUES)],
            next_sector: READ_ONLY,
            next_buffer: 0,
            completed: 0,
        }
    }

    /// The front-end meets a new process.
    fn reconnect(&mut self, socket: &Path) {
        self.vm.frontend = negotiate(UnixStream::connect(socket).unwrap(), QUEUES, |f| f).0;
    }

    fn ring(&self, queue: usize) -> &DriverRing {
        &self.vm.queues[queue].ring
    }

    fn step(&mut self, step: Step) {
        let memory = self.vm.region();
        let Vm {
            frontend, queues, ..
        } = &mut self.vm;
        step.say(frontend, &memory, &mut self.region, queues);
    }

    fn set_up(&mut self) {
        for step in steps(QUEUES) {
            self.step(step);
        }
    }

    /// Makes one more request available on a queue, if there is room.
    fn submit(&mut self, queue: usize, write: bool, numbers: &mut Numbers) {
        let free = (0..DEPTH)
            .map(|slot| slot * PARTS)
            .find(|head| !self.flying[queue].contains_key(head));
        let Some(head) = free else {
            return;
        };
        let data = DATA + u64::from(LEN) * (self.next_buffer % BUFFERS);
        self.next_buffer += 1;
        let sector = if write {
            self.next_sector += 1;
            self.vm.write_mem(data, &sector(self.next_sector));
            self.next_sector
        } else {
            self.vm.write_mem(data, &[0xee; LEN as usize]);
            numbers.below(READ_ONLY)
        };
        let header = HEADERS + 32 * (u64::from(head) + u64::from(RING_SIZE) * queue as u64);
        let status = header + 16;
        self.vm
            .header(header, if write { T_OUT } else { T_IN }, sector);
        self.vm.write_mem(status, &[0xff]);
        let flags = if write { 0 } else { WRITE };
        let chain = [d(header, 16, 0), d(data, LEN, flags), d(status, 1, WRITE)];
        let ring = &mut self.vm.queues[queue].ring;
        ring.chain(head, &chain);
        ring.offer(head);
        let request = Request {
            write,
            sector,
            data,
        };
        self.flying[queue].insert(head, request);
        self.vm.kick(queue);
    }

    /// Takes the completions that are there; each must belong to a request.
    fn reap(&mut self) {
        for queue in 0..usize::from(QUEUES) {
            while let Some((head, len)) = self.vm.queues[queue].ring.take_used() {
                let head = u16::try_from(head).unwrap();
                let Some(request) = self.flying[queue].remove(&head) else {
                    panic!("queue {queue}: descriptor {head} was completed twice");
                };
                let header = HEADERS + 32 * (u64::from(head) + u64::from(RING_SIZE) * queue as u64);
                assert_eq!(self.vm.read_mem(header + 16, 1), [0], "{request:?}");
                assert_eq!(len, if request.write { 1 } else { LEN + 1 });
                if !request.write {
                    let got = self.vm.read_mem(request.data, LEN as usize);
                    assert_eq!(got, sector(request.sector), "{request:?}");
                }
                self.completed += 1;
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.flying.iter().map(HashMap::len).sum()
    }

    /// Sleeps until there is an interrupt for a queue with requests.
    fn wait_interrupt(&mut self) {
        let mut fds = Vec::new();
        for (queue, flying) in self.flying.iter().enumerate() {
            let call = &self.vm.queues[queue].call;
            let _ = call.read();
            if !flying.is_empty() {
                if self.ring(queue).want_interrupt() {
                    return;
                }
                fds.push(PollFd::new(fd(call), libc::POLLIN));
            }
        }
        let n = sys::poll(&mut fds, PATIENCE.as_millis() as i32).unwrap();
        assert!(n > 0, "no interrupt for {:?}", self.flying);
    }

    /// Waits for everything that is in flight.
    fn finish(&mut self) {
        self.reap();
        while self.in_flight() > 0 {
            self.wait_interrupt();
            self.reap();
        }
    }
}

fn kill(mut blk: Blk) {
    blk.child.kill().unwrap();
    blk.child.wait().unwrap();
}

/// A disk on which the first sectors hold their numbers and there is room for the writes.
fn disk(scratch: &Scratch) -> PathBuf {
    let path = scratch.disk(READ_ONLY);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(512 << 20).unwrap();
    path
}

/// Everything that was written is where it belongs.
fn verify(path: &Path, machine: &Machine) {
    for s in READ_ONLY + 1..=machine.next_sector {
        assert_eq!(on_disk(path, s, 512), sector(s), "sector {s}");
    }
}

#[test]
fn a_process_killed_under_load_is_replaced_and_no_request_lost_or_done_twice() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("takeover-{engine}"));
        let disk = disk(&scratch);
        let socket = scratch.path("s");
        // Past the host's cache where that can be, so that requests take a while.
        let spec = format!("path={}", disk.display());
        let args = ["--queues", "2", "--io-engine", engine];
        let mut numbers = Numbers::seeded(0x5eed_1234_5678_9abc);
        let mut blk = Blk::listen(&socket, &spec, &args);
        let mut machine = Machine::new(&socket);
        machine.set_up();
        for round in 0..takeovers(15) {
            // Some work, and the end at a moment of its own in the middle of it.
            let moment = Duration::from_micros(numbers.below(5000));
            inject(|| format!("{engine}: kill {round} after {} us", moment.as_micros()));
            let killer = std::thread::spawn(move || {
                std::thread::sleep(moment);
                kill(blk);
            });
            while !killer.is_finished() {
                for _ in 0..=numbers.below(20) {
                    let queue = numbers.below(u64::from(QUEUES)) as usize;
                    let write = numbers.below(2) == 0;
                    machine.submit(queue, write, &mut numbers);
                }
                machine.reap();
            }
            killer.join().unwrap();
            // The guest goes on meanwhile.
            machine.submit(round as usize % 2, true, &mut numbers);
            blk = Blk::listen(&socket, &spec, &args);
            machine.reconnect(&socket);
            machine.set_up();
            if round % 4 == 0 {
                machine.finish();
            }
        }
        machine.finish();
        verify(&disk, &machine);
        assert!(blk.is_running());
    }
}

#[test]
fn a_process_may_be_killed_at_every_step_of_its_setup() {
    let scratch = Scratch::new("takeover-steps");
    let disk = disk(&scratch);
    let socket = scratch.path("s");
    let spec = format!("path={},direct=off", disk.display());
    let args = ["--queues", "2"];
    let mut numbers = Numbers::seeded(0x5eed_0000_1111_2222);
    let mut blk = Blk::listen(&socket, &spec, &args);
    let mut machine = Machine::new(&socket);
    machine.set_up();
    for count in 0..GREETINGS {
        for i in 0..10 {
            machine.submit(i % 2, i % 3 > 0, &mut numbers);
        }
        inject(|| format!("set-up: kill after {count} of {GREETINGS} messages of greeting"));
        kill(blk);
        blk = Blk::listen(&socket, &spec, &args);
        let stream = UnixStream::connect(&socket).unwrap();
        machine.vm.frontend = greet(stream, QUEUES, |f| f, count).0;
    }
    for count in 0..=steps(QUEUES).len() {
        for i in 0..10 {
            machine.submit(i % 2, i % 3 > 0, &mut numbers);
        }
        inject(|| {
            format!(
                "set-up: kill after {count} of {} messages",
                steps(QUEUES).len()
            )
        });
        kill(blk);
        blk = Blk::listen(&socket, &spec, &args);
        machine.reconnect(&socket);
        for step in steps(QUEUES).into_iter().take(count) {
            machine.step(step);
            // A ring may be at work before the others are set up.
            machine.reap();
        }
    }
    kill(blk);
    let _blk = Blk::listen(&socket, &spec, &args);
    machine.reconnect(&socket);
    machine.set_up();
    machine.finish();
    assert!(machine.completed > 0);
    verify(&disk, &machine);
}

#[test]
fn a_process_may_be_killed_at_every_step_of_a_reset() {
    let scratch = Scratch::new("takeover-reset");
    let disk = disk(&scratch);
    let socket = scratch.path("s");
    let spec = format!("path={},direct=off", disk.display());
    let args = ["--queues", "2"];
    let mut numbers = Numbers::seeded(0x5eed_0000_3333_4444);
    let mut blk = Blk::listen(&socket, &spec, &args);
    let mut machine = Machine::new(&socket);
    machine.set_up();
    for count in 0..=2 * usize::from(QUEUES) {
        for i in 0..20 {
            machine.submit(i % 2, i % 3 > 0, &mut numbers);
        }
        inject(|| format!("reset: kill after {count} messages"));
        for step in 0..count {
            say_reset(&mut machine.vm.frontend, step);
        }
        kill(blk);
        machine.reap();
        // The driver forgets what it had in flight: it may have been done, or not.
        for queue in 0..usize::from(QUEUES) {
            machine.flying[queue].clear();
            machine.vm.queues[queue].ring.reset();
        }
        machine.region = None;
        blk = Blk::listen(&socket, &spec, &args);
        machine.reconnect(&socket);
        machine.set_up();
        let before = machine.completed;
        machine.submit(0, false, &mut numbers);
        machine.submit(1, false, &mut numbers);
        machine.finish();
        assert_eq!(
            machine.completed,
            before + 2,
            "and nothing of the last driver's"
        );
    }
}

#[test]
fn a_process_may_be_killed_while_it_drains() {
    let scratch = Scratch::new("takeover-drain");
    let disk = disk(&scratch);
    let mut numbers = Numbers::seeded(0x5eed_0000_5555_6666);
    let start = || {
        let file = File::options().read(true).write(true).open(&disk).unwrap();
        Blk::inherit(file, "", &["--queues", "2"])
    };
    let (mut blk, control, stream) = start();
    let mut control = Control::new(control);
    let mut machine = Machine::over(stream);
    machine.set_up();
    for round in 0..12 {
        for i in 0..30 {
            machine.submit(i % 2, i % 3 > 0, &mut numbers);
        }
        let looks = round % 4;
        inject(|| format!("drain: kill after {looks} looks"));
        for _ in 0..looks {
            control.drain();
        }
        kill(blk);
        let (next, channel, stream) = start();
        (blk, control) = (next, Control::new(channel));
        machine.vm.frontend = negotiate(stream, QUEUES, |f| f).0;
        machine.set_up();
        machine.finish();
    }
    verify(&disk, &machine);
    assert!(blk.is_running());
}

#[test]
fn a_region_that_was_tampered_with_costs_its_ring_until_the_driver_resets_it() {
    let scratch = Scratch::new("takeover-tampered");
    let disk = disk(&scratch);
    let socket = scratch.path("s");
    let spec = format!("path={},direct=off", disk.display());
    let args = ["--queues", "2"];
    let mut numbers = Numbers::seeded(1);
    let blk = Blk::listen(&socket, &spec, &args);
    let mut machine = Machine::new(&socket);
    machine.set_up();
    machine.submit(0, true, &mut numbers);
    machine.submit(1, true, &mut numbers);
    machine.finish();
    kill(blk);
    // Descriptor 9 of queue 0 is said to be in flight, twice over.
    let (_, region) = machine.region.as_ref().unwrap();
    std::os::unix::fs::FileExt::write_all_at(region, &[7], 16 + 16 * 9).unwrap();
    let mut blk = Blk::listen(&socket, &spec, &args);
    machine.reconnect(&socket);
    machine.set_up();
    assert!(machine.vm.err_fired(0) && !machine.vm.err_fired(1));
    machine.submit(1, true, &mut numbers);
    machine.finish();
    // The driver's reset: the front-end takes a new region, the driver sets up a new ring.
    for queue in 0..2 {
        machine.vm.frontend.get_vring_base(queue).unwrap();
        machine.vm.queues[queue].ring.reset();
    }
    machine.region = None;
    machine.set_up();
    for queue in [0, 1, 0, 1] {
        machine.submit(queue, true, &mut numbers);
    }
    machine.finish();
    verify(&disk, &machine);
    assert!(blk.is_running());
    blk.child.kill().unwrap();
    let said = blk.stderr();
    assert!(
        said.contains("queue 0") && said.contains("in-flight region"),
        "{said}"
    );
}
