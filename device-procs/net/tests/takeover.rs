//! Given a network process that is killed at any moment, another takes its place: frames go both
//! ways again, rings go on at the used index, no buffer is skipped or given back twice, and a
//! frame is on the wire once more only if it was in flight. BULKHEAD_TAKEOVERS makes it longer,
//! BULKHEAD_SEED makes it another one, and BULKHEAD_CHAOS has it print what it does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{HashMap, VecDeque};
use std::io::{PipeReader, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_net::tap::Tap;
use bulkhead_proto::device::{DrainRequest, DrainResponse};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use bulkhead_runtime::driver::WRITE;
use bulkhead_runtime::frontend::{
    GREETINGS, Numbers, Region, Step, fd, greet, inject, say_reset, steps, takeovers,
};
use bulkhead_runtime::sys::{self, PollFd};
use support::*;

const PAIRS: u16 = 2;
const QUEUES: u16 = 2 * PAIRS + 1;
const CONTROL: usize = 2 * PAIRS as usize;
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Ethernet, IPv4, UDP; behind them the frame's number, again and again.
const LEAST: usize = 14 + 20 + 8 + 8;

/// Frame `number` of a flow of its own, so that the tap's queues share the frames out.
fn frame(to: [u8; 6], from: [u8; 6], number: u64, len: usize) -> Vec<u8> {
    let mut f = [to, from].concat();
    let [.., a, b, c] = number.to_be_bytes();
    let whole = u16::try_from(len - 14).unwrap().to_be_bytes();
    f.extend([8, 0, 0x45, 0, whole[0], whole[1], 0, 1, 0, 0, 64, 17, 0, 0]);
    f.extend([10, a, b, c, 11, 0, 0, 2]);
    let data = u16::try_from(len - 34).unwrap().to_be_bytes();
    f.extend([0x10, c, 0x20, b, data[0], data[1], 0, 0]);
    f.extend(number.to_le_bytes().into_iter().cycle().take(len - 42));
    f
}

/// The number of such a frame, which is whole.
fn number(to: [u8; 6], from: [u8; 6], got: &[u8]) -> u64 {
    let number = got[LEAST - 8..LEAST].try_into().unwrap();
    let number = u64::from_le_bytes(number);
    assert_eq!(got, frame(to, from, number, got.len()), "frame {number}");
    number
}

/// A queue's buffers with the device, in the order in which they were offered.
#[derive(Default)]
struct Flying(VecDeque<(u16, u64)>);

impl Flying {
    /// A buffer came back: it is the one that is due.
    fn take(&mut self, queue: usize, head: u32) -> u64 {
        let (due, number) = self.0.pop_front().expect("nothing is with the device");
        assert_eq!(head, u32::from(due), "queue {queue} goes on elsewhere");
        number
    }

    fn free(&self) -> Option<u16> {
        (0..RING_SIZE).find(|slot| self.0.iter().all(|(head, _)| head != slot))
    }
}

/// A guest that outlives its network processes, the wire, and the front-end's part that outlives
/// them, too.
struct Machine {
    engine: &'static str,
    tap: Tap,
    net: Option<Net>,
    fence: PipeReader,
    control: OwnedFd,
    vm: Vm,
    region: Region,
    wire: Wire,
    flying: Vec<Flying>,
    /// A received frame of which buffers are missing, and how many.
    begun: Vec<(Vec<u8>, u16)>,
    /// Frames that were sent to the wire: how often each was there, and may have been.
    seen: HashMap<u64, (u32, u32)>,
    /// Those of them that the device has given back.
    sent: Vec<u64>,
    next_out: u64,
    next_in: u64,
    /// The last frame that came in, for each queue.
    came: Vec<u64>,
    commands: u64,
}

/// The test with each engine, at the same time: a killed process's I/O is what takes long to end.
fn engines(test: impl Fn(&'static str) + Sync) {
    std::thread::scope(|scope| {
        for engine in ["io_uring", "plain"] {
            let test = &test;
            scope.spawn(move || isolated().then(|| test(engine)));
        }
    });
}

fn start(tap: &Tap, engine: &str) -> (Net, OwnedFd, std::os::unix::net::UnixStream, PipeReader) {
    Net::inherit_fenced(tap, &["--io-engine", engine])
}

impl Machine {
    fn new(engine: &'static str) -> Self {
        let tap = Tap::attach("t0", PAIRS, None).unwrap();
        ip(&["link", "set", "t0", "mtu", "9000"]);
        up("t0");
        let (net, control, vhost, fence) = start(&tap, engine);
        let mut machine = Self {
            engine,
            net: Some(net),
            fence,
            control,
            vm: Vm::over(vhost, QUEUES, |f| f),
            region: None,
            wire: Wire::new("t0", false),
            tap,
            flying: Vec::new(),
            begun: Vec::new(),
            seen: HashMap::new(),
            sent: Vec::new(),
            next_out: 1,
            next_in: 1,
            came: vec![0; usize::from(QUEUES)],
            commands: 0,
        };
        machine.begin_anew();
        machine
    }

    /// The driver sets up its rings, and takes all pairs.
    fn begin_anew(&mut self) {
        self.region = None;
        for q in &mut self.vm.queues {
            q.ring.reset();
        }
        self.flying = (0..QUEUES).map(|_| Flying::default()).collect();
        self.begun = vec![(Vec::new(), 0); usize::from(QUEUES)];
        self.set_up();
        let pairs = PAIRS.to_le_bytes();
        assert_eq!(self.vm.command(CONTROL, 4, 0, &pairs), 0);
        for queue in (0..CONTROL).step_by(2) {
            self.offer_buffers(queue);
        }
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

    /// Kills the process.
    fn kill(&mut self) {
        let mut net = self.net.take().unwrap();
        net.child.kill().unwrap();
        net.child.wait().unwrap();
    }

    /// Another process takes the place of one that was killed, whose I/O has ended first, as a
    /// supervisor sees to it. It is greeted, and told nothing else yet.
    fn replace(&mut self) {
        self.replace_greeted(GREETINGS);
    }

    /// The same, of whose greeting so many messages are said.
    fn replace_greeted(&mut self, greetings: usize) {
        assert_eq!(self.fence.read(&mut [0]).unwrap(), 0, "the fence falls");
        self.reap();
        // Frames that are with the device may come to the wire once more.
        for queue in (1..CONTROL).step_by(2) {
            for (_, number) in &self.flying[queue].0 {
                self.seen.entry(*number).or_default().1 += 1;
            }
        }
        let (net, control, vhost, fence) = start(&self.tap, self.engine);
        (self.net, self.control, self.fence) = (Some(net), control, fence);
        self.vm.frontend = greet(vhost, QUEUES, |f| f, greetings).0;
    }

    fn offer_buffers(&mut self, queue: usize) {
        while let Some(slot) = self.flying[queue].free() {
            self.vm.offer_buffer(queue, slot);
            self.flying[queue].0.push_back((slot, 0));
        }
        self.vm.kick(queue);
    }

    /// Makes one more frame available on a queue, if there is room; its number.
    fn send(&mut self, queue: usize, len: usize) -> Option<u64> {
        let slot = self.flying[queue].free()?;
        let number = self.next_out;
        self.next_out += 1;
        let at = buffer(queue, slot);
        self.vm.write_mem(at, &[0; HEADER]);
        let frame = frame(PEER, MAC_BYTES, number, len);
        self.vm.write_mem(at + HEADER as u64, &frame);
        let ring = &mut self.vm.queues[queue].ring;
        ring.chain(slot, &[d(at, (HEADER + len) as u32, 0)]);
        ring.offer(slot);
        self.flying[queue].0.push_back((slot, number));
        self.seen.insert(number, (0, 1));
        self.vm.kick(queue);
        Some(number)
    }

    /// Gives the device a command, if it has none.
    fn command(&mut self) {
        if !self.flying[CONTROL].0.is_empty() {
            return;
        }
        let (at, ack) = (buffer(CONTROL, 0), buffer(CONTROL, 1));
        self.vm.write_mem(at, &[0, 0, 1]);
        self.vm.write_mem(ack, &[0xff]);
        let ring = &mut self.vm.queues[CONTROL].ring;
        ring.chain(0, &[d(at, 3, 0), d(ack, 1, WRITE)]);
        ring.offer(0);
        self.flying[CONTROL].0.push_back((0, 0));
        self.vm.kick(CONTROL);
    }

    /// A frame for the guest, of a flow of its own.
    fn arrive(&mut self, len: usize) {
        let frame = frame(MAC_BYTES, PEER, self.next_in, len);
        self.next_in += 1;
        self.wire.send(&frame);
    }

    /// Takes what the device has given back, and looks at what is on the wire.
    fn reap(&mut self) {
        while let Some(got) = self.wire.receive_within(Duration::ZERO) {
            let number = number(PEER, MAC_BYTES, &got);
            let (times, may) = self.seen.get_mut(&number).expect("a frame that was sent");
            *times += 1;
            assert!(*times <= *may, "frame {number}: {times} times");
        }
        for queue in 0..usize::from(QUEUES) {
            while let Some((head, len)) = self.vm.take_used(queue) {
                let number = self.flying[queue].take(queue, head);
                match queue {
                    CONTROL => {
                        assert_eq!(self.vm.read_mem(buffer(CONTROL, 1), 1), [0]);
                        self.commands += 1;
                    }
                    _ if queue % 2 == 0 => self.received(queue, head, len),
                    _ => self.sent.push(number),
                }
            }
            if queue % 2 == 0 && queue != CONTROL {
                self.offer_buffers(queue);
            }
        }
    }

    fn received(&mut self, queue: usize, head: u32, len: u32) {
        let bytes = self.vm.read_mem(buffer(queue, head as u16), len as usize);
        let (frame, missing) = &mut self.begun[queue];
        if *missing == 0 {
            *missing = u16::from_le_bytes([bytes[10], bytes[11]]);
            frame.clear();
        }
        frame.extend(bytes);
        *missing -= 1;
        if *missing == 0 {
            let number = number(MAC_BYTES, PEER, &frame[HEADER..]);
            assert!((1..self.next_in).contains(&number));
            self.came[queue] = number;
        }
    }

    /// Work in every ring, of all sizes.
    fn load(&mut self, numbers: &mut Numbers) {
        for _ in 0..=numbers.below(12) {
            let queue = 1 + 2 * numbers.below(u64::from(PAIRS)) as usize;
            self.send(queue, LEAST + numbers.below(1400) as usize);
            self.arrive(LEAST + numbers.below(6000) as usize);
        }
        self.command();
    }

    /// Sleeps until there is an interrupt for a queue, or for a while in which nothing came that
    /// would need one.
    fn wait_interrupt(&mut self) {
        for q in &self.vm.queues {
            let _ = q.call.read();
            if q.ring.want_interrupt() {
                return;
            }
        }
        let calls = |time: i32| {
            let queues = self.vm.queues.iter();
            let mut fds: Vec<_> = queues
                .map(|q| PollFd::new(fd(&q.call), libc::POLLIN))
                .collect();
            sys::poll(&mut fds, time).unwrap() > 0
        };
        if calls(100) {
            return;
        }
        let came = self.vm.queues.iter().any(|q| q.ring.want_interrupt());
        let told = !came || calls(PATIENCE.as_millis() as i32);
        assert!(told, "{}: a completion without an interrupt", self.engine);
    }

    /// Frames go both ways in every queue, the driver is answered, and all that it was given
    /// back has been on the wire.
    fn flows(&mut self) {
        let begin = Instant::now();
        let (first_out, first_in, commands) = (self.next_out, self.next_in, self.commands);
        let mut wanted = Vec::new();
        self.command();
        loop {
            for queue in (1..CONTROL).step_by(2) {
                if !wanted.iter().any(|(q, _)| *q == queue)
                    && let Some(number) = self.send(queue, 200)
                {
                    wanted.push((queue, number));
                }
            }
            // Flows are shared out by a hash: with so many, every queue has some. What finds the
            // tap's queues full is lost.
            for _ in 0..8 {
                self.arrive(300);
            }
            self.reap();
            let out = wanted.len() == usize::from(PAIRS)
                && wanted.iter().all(|(_, n)| self.sent.contains(n));
            let back = (0..CONTROL).step_by(2).all(|q| self.came[q] >= first_in);
            if out && back && self.commands > commands {
                break;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "{}: out {out} ({first_out}), in {back} ({:?}, {first_in})",
                self.engine,
                self.came
            );
            self.wait_interrupt();
        }
        self.reap();
        for number in self.sent.drain(..) {
            assert!(self.seen[&number].0 > 0, "frame {number} was lost");
        }
        self.seen.retain(|_, (times, may)| times < may);
    }
}

#[test]
fn a_process_killed_under_traffic_is_replaced_and_frames_flow_on() {
    engines(|engine| {
        let mut numbers = Numbers::seeded(0x5eed_1234_5678_9abc);
        let mut machine = Machine::new(engine);
        machine.flows();
        for round in 0..takeovers(15) {
            let moment = Duration::from_micros(numbers.below(5000));
            inject(|| format!("{engine}: kill {round} after {} us", moment.as_micros()));
            let mut net = machine.net.take().unwrap();
            let killer = std::thread::spawn(move || {
                std::thread::sleep(moment);
                net.child.kill().unwrap();
                net.child.wait().unwrap();
            });
            while !killer.is_finished() {
                machine.load(&mut numbers);
                machine.reap();
            }
            killer.join().unwrap();
            // The guest and the wire go on meanwhile.
            machine.load(&mut numbers);
            machine.replace();
            machine.set_up();
            if round % 4 != 3 {
                machine.flows();
            }
        }
        machine.flows();
        assert!(machine.net.as_mut().unwrap().is_running());
    });
}

#[test]
fn a_process_may_be_killed_at_every_step_of_its_setup_twice_in_a_row() {
    engines(|engine| {
        let mut numbers = Numbers::seeded(0x5eed_0000_1111_2222);
        let mut machine = Machine::new(engine);
        for count in 0..GREETINGS {
            machine.load(&mut numbers);
            inject(|| {
                format!(
                    "{engine}: set-up: kill, and again after {count} of {GREETINGS} messages of greeting"
                )
            });
            machine.kill();
            machine.replace_greeted(count);
            machine.kill();
            machine.replace();
            machine.set_up();
            machine.flows();
        }
        for count in 0..=steps(QUEUES).len() {
            machine.load(&mut numbers);
            let all = steps(QUEUES).len();
            inject(|| format!("{engine}: set-up: kill, and again after {count} of {all} messages"));
            machine.kill();
            machine.replace();
            for step in steps(QUEUES).into_iter().take(count) {
                machine.step(step);
                // A ring may be at work before the others are set up.
                machine.reap();
            }
            machine.kill();
            machine.replace();
            machine.set_up();
            machine.flows();
        }
    });
}

#[test]
fn a_process_may_be_killed_at_every_step_of_a_reset() {
    engines(|engine| {
        let mut numbers = Numbers::seeded(0x5eed_0000_3333_4444);
        let mut machine = Machine::new(engine);
        for count in 0..=2 * usize::from(QUEUES) {
            machine.load(&mut numbers);
            inject(|| format!("{engine}: reset: kill after {count} messages"));
            for step in 0..count {
                say_reset(&mut machine.vm.frontend, step);
            }
            machine.kill();
            machine.replace();
            // The driver forgets what was in flight: it may have been sent, or not.
            machine.begin_anew();
            machine.flows();
        }
    });
}

#[test]
fn a_process_may_be_killed_while_it_drains() {
    engines(|engine| {
        let mut numbers = Numbers::seeded(0x5eed_0000_5555_6666);
        let mut machine = Machine::new(engine);
        for round in 0..12 {
            machine.load(&mut numbers);
            let looks = round % 4;
            inject(|| format!("{engine}: drain: kill after {looks} looks"));
            let channel = machine.control.try_clone().unwrap();
            let mut control = BlockingClient::new(channel, CONTROL_MAX_FRAME);
            for _ in 0..looks {
                let _: DrainResponse = control
                    .call(DEVICE_SERVICE, "Drain", &DrainRequest::new(), PATIENCE)
                    .unwrap();
            }
            machine.kill();
            machine.replace();
            machine.set_up();
            machine.flows();
        }
    });
}
