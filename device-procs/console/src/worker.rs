//! The worker of all queues: moves bytes between the rings and the clients of the ports, and tells
//! the driver what there is of those. Each turn is bounded before orders and sockets are looked at.
//! A buffer of the guest's goes back once what is in it was taken, and one for it is filled only
//! with what a client has sent already: nothing is in flight in between. Clients end with the
//! process; the driver is told that their ports are closed.
//!
//! ```text
//!   queue 0, 1: port 0, to the guest and from it    2, 3: messages about ports    4, 5: port 1 …
//! ```

use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_runtime::backlog::ROOM;
use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::seat::Seat;
use bulkhead_runtime::status::Sleep;
use bulkhead_runtime::sys::{self, PollFd};

use crate::control::{Control, MESSAGE};
use crate::port::{Got, Port};

/// Queues of the messages about ports.
const TO_DRIVER: usize = 2;
const FROM_DRIVER: usize = 3;
/// Buffers of a queue before others are looked at.
const BATCH: u32 = 64;
/// Bytes taken of a port before others are looked at.
const TURN: usize = 64 << 10;
/// Bytes moved at a time.
const PIECE: usize = 4096;

/// The worker.
pub struct Worker {
    seats: Vec<Seat>,
    ports: Vec<Port>,
    /// Of each port, bytes that were taken of the buffer that is next.
    taken: Vec<usize>,
    /// Ports by which the guest has sent more than there is room for.
    held: Vec<bool>,
    control: Arc<Control>,
    chain: Chain,
    piece: Box<[u8; PIECE]>,
    fds: Vec<PollFd>,
}

/// The queue that brings a port's bytes to the guest; the next one takes the guest's.
fn queue_of(port: usize) -> usize {
    match port {
        0 => 0,
        port => port.saturating_add(1).saturating_mul(2),
    }
}

impl Worker {
    /// A worker without rings; `None`: there are no queues for so many ports.
    pub fn new(queues: Vec<WorkerPort>, ports: Vec<Port>, control: Arc<Control>) -> Option<Self> {
        let alone = queues.len() == 2 && ports.len() == 1;
        let whole = ports.len().checked_add(1)?.checked_mul(2)? == queues.len();
        (alone || whole).then(|| Self {
            fds: Vec::with_capacity(queues.len().saturating_add(ports.len()).saturating_mul(2)),
            seats: queues.into_iter().map(Seat::new).collect(),
            taken: vec![0; ports.len()],
            held: vec![false; ports.len()],
            ports,
            control,
            chain: Chain::new(),
            piece: Box::new([0; PIECE]),
        })
    }

    /// Serves for ever.
    pub fn run(mut self) -> ! {
        loop {
            let more = self.serve();
            self.wait(more);
        }
    }

    /// Moves bytes and messages; true if there may be more.
    fn serve(&mut self) -> bool {
        let mut more = self.hear();
        for port in 0..self.ports.len() {
            more |= self.transmit(port);
            more |= self.receive(port);
        }
        for (index, port) in self.ports.iter().enumerate() {
            self.control.join(index, port.is_joined());
        }
        more |= self.tell();
        for seat in &mut self.seats {
            if let Some(ring) = &mut seat.ring {
                ring.flush();
            }
        }
        more
    }

    /// Takes the driver's messages.
    fn hear(&mut self) -> bool {
        let Some(Seat {
            port,
            ring: Some(ring),
        }) = self.seats.get_mut(FROM_DRIVER)
        else {
            return false;
        };
        for _ in 0..BATCH {
            let Some(head) = ring.pop(&mut self.chain) else {
                return ring.enable_kicks();
            };
            let mut message = [0; MESSAGE];
            let memory = Arc::clone(ring.memory());
            if self.chain.writable_len() != 0 || !self.chain.read(&memory, 0, &mut message) {
                ring.reject(head, &"no message of a console's driver");
                return false;
            }
            if !self.control.hear(message) {
                port.status().errors.add(1);
            }
            ring.complete(head, 0);
            port.status().requests.add(1);
        }
        true
    }

    /// Tells the driver what it should know.
    fn tell(&mut self) -> bool {
        let Some(Seat {
            port,
            ring: Some(ring),
        }) = self.seats.get_mut(TO_DRIVER)
        else {
            return false;
        };
        for _ in 0..BATCH {
            let Some(message) = self.control.next() else {
                return false;
            };
            let Some(head) = ring.pop(&mut self.chain) else {
                return ring.enable_kicks();
            };
            if self.chain.readable_len() != 0 || !self.chain.write(ring.memory(), &message.bytes) {
                ring.reject(head, &"no buffer for a message to a console's driver");
                return false;
            }
            ring.complete(head, u32::try_from(message.bytes.len()).unwrap_or(0));
            // It is told again, rather than not at all, by a process that comes after this one.
            ring.flush();
            self.control.told(&message);
            port.status().requests.add(1);
        }
        true
    }

    /// Takes what the guest sends by a port.
    fn transmit(&mut self, index: usize) -> bool {
        let queue = queue_of(index).saturating_add(1);
        let (Some(port), Some(taken), Some(held), Some(seat)) = (
            self.ports.get_mut(index),
            self.taken.get_mut(index),
            self.held.get_mut(index),
            self.seats.get_mut(queue),
        ) else {
            return false;
        };
        *held = false;
        let Some(ring) = &mut seat.ring else {
            return false;
        };
        let status = seat.port.status();
        let mut left = TURN;
        for _ in 0..BATCH {
            if left == 0 {
                port.send();
                return true;
            }
            let Some(head) = ring.pop(&mut self.chain) else {
                port.send();
                return ring.enable_kicks();
            };
            if self.chain.writable_len() != 0 {
                ring.reject(head, &"no buffer of a console's");
                return false;
            }
            let all = usize::try_from(self.chain.readable_len()).unwrap_or(usize::MAX);
            let mut done = (*taken).min(all);
            // In one piece, where that can be: whoever goes on with the ring begins it anew.
            let wanted = all.saturating_sub(done).min(ROOM);
            if !port.is_console() && port.room().is_some_and(|room| room < wanted) {
                port.send();
                if port.room().is_some_and(|room| room < wanted) {
                    ring.unpop(head);
                    *held = true;
                    return false;
                }
            }
            let memory = Arc::clone(ring.memory());
            while done < all {
                let Some(room) = port.room() else {
                    status.dropped.add(1);
                    done = all;
                    break;
                };
                let count = all.saturating_sub(done).min(room).min(PIECE);
                let Some(piece) = self.piece.get_mut(..count).filter(|p| !p.is_empty()) else {
                    break;
                };
                if !self.chain.read(&memory, done, piece) {
                    ring.reject(head, &"its buffers are no guest memory");
                    return false;
                }
                port.push(piece);
                done = done.saturating_add(count);
                left = left.saturating_sub(count);
                status.written_bytes.add(count as u64);
            }
            if done < all {
                *taken = done;
                ring.unpop(head);
                port.send();
                *held = port.room() == Some(0);
                return !*held;
            }
            *taken = 0;
            ring.complete(head, 0);
            status.requests.add(1);
        }
        port.send();
        true
    }

    /// Brings the guest what a client has sent.
    fn receive(&mut self, index: usize) -> bool {
        let (Some(port), Some(seat)) = (
            self.ports.get_mut(index),
            self.seats.get_mut(queue_of(index)),
        ) else {
            return false;
        };
        let Some(ring) = &mut seat.ring else {
            return false;
        };
        if !self.control.is_open(index) {
            port.drop_gone();
            return false;
        }
        for _ in 0..BATCH {
            if !port.may_have() {
                return false;
            }
            let Some(head) = ring.pop(&mut self.chain) else {
                return ring.enable_kicks();
            };
            let room = usize::try_from(self.chain.writable_len()).unwrap_or(PIECE);
            if self.chain.readable_len() != 0 || room == 0 {
                ring.reject(head, &"no buffer for a console's input");
                return false;
            }
            let Some(piece) = self.piece.get_mut(..room.min(PIECE)) else {
                ring.unpop(head);
                return false;
            };
            let Got::Bytes(count) = port.read(piece) else {
                ring.unpop(head);
                return false;
            };
            let bytes = piece.get(..count).unwrap_or_default();
            if !self.chain.write(ring.memory(), bytes) {
                ring.reject(head, &"its buffers are no guest memory");
                return false;
            }
            ring.complete(head, u32::try_from(count).unwrap_or(0));
            seat.port.status().requests.add(1);
            seat.port.status().read_bytes.add(count as u64);
        }
        true
    }

    /// The guest sends more by a port than its client takes.
    fn is_held(&mut self, index: usize) -> bool {
        let held = self.held.get(index).copied().unwrap_or(false);
        let queue = queue_of(index).saturating_add(1);
        let seat = self.seats.get_mut(queue);
        held && seat.is_some_and(|seat| match &mut seat.ring {
            Some(ring) => ring.available() > 0,
            None => false,
        })
    }

    /// A port's rings are there, and it may take a client in.
    fn is_served(&self, index: usize) -> bool {
        let queue = queue_of(index);
        let seats = self.seats.get(queue..queue.saturating_add(2));
        seats.is_some_and(|seats| seats.iter().all(|s| s.ring.is_some() && !s.port.paused()))
    }

    /// Whether a queue's kick would change anything; true for `more`: look again now.
    fn wants_kick(&mut self, queue: usize, more: &mut bool) -> bool {
        // Buffers of the guest's are always wanted, but where its client does not keep up; buffers
        // for it where there is something to put in.
        let wanted = match queue {
            TO_DRIVER => self.control.next().is_some(),
            FROM_DRIVER => true,
            queue => {
                let index = (queue / 2).saturating_sub(usize::from(queue > FROM_DRIVER));
                match queue % 2 {
                    1 => !self.is_held(index),
                    _ => {
                        let has = self.ports.get(index).is_some_and(Port::may_have);
                        has && self.control.is_open(index)
                    }
                }
            }
        };
        let Some(ring) = self.seats.get_mut(queue).and_then(|s| s.ring.as_mut()) else {
            return false;
        };
        if wanted && !ring.is_broken() {
            *more |= ring.enable_kicks();
        }
        wanted
    }

    /// The guest takes what a client sends by this port, and has room for it.
    fn takes(&mut self, index: usize) -> bool {
        let open = self.control.is_open(index);
        let seat = self.seats.get_mut(queue_of(index));
        open && seat.is_some_and(|seat| match &mut seat.ring {
            Some(ring) => !ring.is_broken(),
            None => false,
        })
    }

    /// Sleeps until there is something to do; then does what concerns orders and sockets.
    fn wait(&mut self, mut more: bool) {
        let queues = self.seats.len();
        let kicks: Vec<_> = (0..queues)
            .map(|queue| {
                let wanted = self.wants_kick(queue, &mut more);
                let seat = self.seats.get(queue).filter(|_| wanted);
                seat.and_then(Seat::kick)
            })
            .collect();
        let reads: Vec<bool> = (0..self.ports.len()).map(|i| self.takes(i)).collect();
        self.fds.clear();
        for seat in &self.seats {
            let wakeup = seat.port.wakeup().as_fd();
            self.fds.push(PollFd::new(wakeup, libc::POLLIN));
        }
        for kick in &kicks {
            self.fds.push(match kick {
                Some(kick) => PollFd::new(kick.as_fd(), libc::POLLIN),
                None => PollFd::none(),
            });
        }
        for (index, port) in self.ports.iter().enumerate() {
            let listens = !port.is_joined() && self.is_served(index);
            self.fds.push(match listens {
                true => PollFd::new(port.listener().as_fd(), libc::POLLIN),
                false => PollFd::none(),
            });
            let reads = reads.get(index).copied().unwrap_or(false);
            self.fds.push(match port.events(reads) {
                Some((client, events)) => PollFd::new(client.as_fd(), events),
                None => PollFd::none(),
            });
        }
        for (queue, (seat, kick)) in self.seats.iter().zip(&kicks).enumerate() {
            // Buffers for what clients send wait for that, as those of the guest's do whose client
            // does not keep up.
            let held = queue % 2 == 0 || kick.is_none();
            let why = if held { Sleep::ByOrder } else { Sleep::Idle };
            // Messages to us never wait.
            let why = if queue == FROM_DRIVER {
                Sleep::Idle
            } else {
                why
            };
            seat.port.status().sleeps(why);
        }
        if let Some(first) = self.seats.first() {
            first.port.status().syscalls.add(1);
        }
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut self.fds, if more { 0 } else { -1 });
        for seat in &self.seats {
            seat.port.status().sleeps(Sleep::Idle);
        }
        let happened: Vec<i16> = self.fds.iter().map(PollFd::revents).collect();
        let (queued, sockets) = happened
            .split_at_checked(queues.saturating_mul(2))
            .unwrap_or_default();
        let (ordered, kicked) = queued.split_at_checked(queues).unwrap_or_default();
        for (port, events) in self.ports.iter_mut().zip(sockets.chunks(2)) {
            if let [called, events] = events {
                if *called != 0 {
                    port.accept();
                } else if *events != 0 {
                    port.happened(*events);
                }
            }
        }
        for (queue, (kick, events)) in kicks.iter().zip(kicked).enumerate() {
            if let (Some(kick), true, Some(seat)) = (kick, *events != 0, self.seats.get_mut(queue))
            {
                seat.drain(kick, *events);
            }
        }
        for (queue, ordered) in ordered.iter().enumerate() {
            if *ordered != 0 {
                self.order(queue);
            }
        }
    }

    fn order(&mut self, queue: usize) {
        let Some(seat) = self.seats.get_mut(queue) else {
            return;
        };
        seat.order(|| {});
        // Whoever goes on with the ring begins its first buffer anew.
        let ports = (0..self.ports.len()).zip(&mut self.taken);
        for (port, taken) in ports {
            if seat.ring.is_none() && queue_of(port).saturating_add(1) == queue {
                *taken = 0;
            }
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
