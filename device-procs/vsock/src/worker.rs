//! The worker of all three queues: packets to the guest, packets from it, and events. One thread,
//! which sleeps on kicks, orders, the listening socket, the launcher's answers and the streams'
//! sockets at once.
//!
//! A packet of the guest's is done when it is taken, and one for it is written into a buffer only
//! when it is there: nothing is in flight in between. Streams end with the process, and with the
//! driver: a driver that was there before is told by an event (VIRTIO 1.2 section 5.10.6.7).

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::clock;
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::seat::Seat;
use bulkhead_runtime::status::Sleep;
use bulkhead_runtime::sys::{self, PollFd};

use crate::dial::Dialer;
use crate::packet::{HEADER, Header};
use crate::streams::{MOST, Ports, Streams};

/// The queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// How many there are.
pub const QUEUES: usize = 3;
/// Packets each way before orders and sockets are looked at.
const BATCH: u32 = 64;
/// Most bytes of data in a packet, either way.
const DATA: usize = 64 << 10;
/// Clients accepted, and answers of the launcher's taken, before anything else is looked at.
const CLIENTS: u32 = 16;
/// Where in ppoll's list the listening socket, the launcher's channel and the streams are: behind
/// orders and kicks.
const LISTENER: usize = 2 * QUEUES;
const LAUNCHER: usize = LISTENER + 1;
const STREAMS: usize = LAUNCHER + 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The worker.
pub struct Worker {
    seats: [Seat; QUEUES],
    listener: Arc<UnixListener>,
    dial: Option<Dialer>,
    streams: Streams,
    chain: Chain,
    packet: Box<[u8]>,
    fds: Vec<PollFd>,
    ports: Vec<Ports>,
    /// The driver is to be told that no stream of before exists.
    reset: bool,
}

impl Worker {
    /// A worker without rings; `None`: there are not three queues.
    pub fn new(
        ports: Vec<WorkerPort>,
        listener: Arc<UnixListener>,
        dial: Option<Dialer>,
        streams: Streams,
    ) -> Option<Self> {
        let seats: Vec<Seat> = ports.into_iter().map(Seat::new).collect();
        Some(Self {
            seats: seats.try_into().ok()?,
            listener,
            dial,
            streams,
            chain: Chain::new(),
            packet: vec![0; HEADER.saturating_add(DATA)].into(),
            fds: Vec::with_capacity(MOST.saturating_add(8)),
            ports: Vec::with_capacity(MOST),
            reset: true,
        })
    }

    /// Serves for ever.
    pub fn run(mut self) -> ! {
        loop {
            let more = self.serve();
            self.wait(more);
        }
    }

    /// Moves packets; true if there may be more.
    fn serve(&mut self) -> bool {
        self.streams.expire(clock::now());
        let mut more = self.transmit();
        // What cannot be asked for is refused, by a packet.
        self.ask();
        more |= self.receive();
        more |= self.tell();
        for seat in &mut self.seats {
            if let Some(ring) = &mut seat.ring {
                ring.flush();
            }
        }
        more
    }

    /// Takes packets of the guest's.
    fn transmit(&mut self) -> bool {
        let [
            _,
            Seat {
                port,
                ring: Some(ring),
            },
            _,
        ] = &mut self.seats
        else {
            return false;
        };
        let now = clock::now();
        for _ in 0..BATCH {
            if !self.streams.takes_packets() {
                return false;
            }
            let Some(head) = ring.pop(&mut self.chain) else {
                return ring.enable_kicks();
            };
            let memory = Arc::clone(ring.memory());
            let Some((header, len)) = take(&self.chain, &memory, &mut self.packet) else {
                ring.reject(head, &"no packet of a socket device");
                return false;
            };
            let data = self.packet.get(HEADER..len).unwrap_or_default();
            self.streams.packet(&header, data, now);
            ring.complete(head, 0);
            port.status().requests.add(1);
            port.status().written_bytes.add(header.len.into());
        }
        true
    }

    /// Fills buffers of the guest's.
    fn receive(&mut self) -> bool {
        let [
            Seat {
                port,
                ring: Some(ring),
            },
            _,
            _,
        ] = &mut self.seats
        else {
            return false;
        };
        for _ in 0..BATCH {
            if !self.streams.has_packet() {
                return false;
            }
            let Some(head) = ring.pop(&mut self.chain) else {
                return ring.enable_kicks();
            };
            let room = usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX);
            if self.chain.readable_len() != 0 || room <= HEADER {
                ring.reject(head, &"no buffer of a socket device");
                return false;
            }
            let room = room.min(self.packet.len());
            let len = self
                .packet
                .get_mut(..room)
                .and_then(|place| self.streams.next(place));
            let Some(len) = len else {
                ring.unpop(head);
                return false;
            };
            let bytes = self.packet.get(..len).unwrap_or_default();
            if !self.chain.write(ring.memory(), bytes) {
                ring.reject(head, &"its buffers are no guest memory");
                return false;
            }
            ring.complete(head, u32::try_from(len).unwrap_or(0));
            port.status().requests.add(1);
            let data = len.saturating_sub(HEADER);
            port.status().read_bytes.add(data as u64);
        }
        true
    }

    /// Tells the driver that streams of before are no more.
    fn tell(&mut self) -> bool {
        // Before its other queues are there, it may be the driver that goes.
        if !self.reset || !self.is_joined() {
            return false;
        }
        let [
            _,
            _,
            Seat {
                port,
                ring: Some(ring),
            },
        ] = &mut self.seats
        else {
            return false;
        };
        let Some(head) = ring.pop(&mut self.chain) else {
            return ring.enable_kicks();
        };
        if self.chain.write(ring.memory(), &TRANSPORT_RESET) {
            ring.complete(head, TRANSPORT_RESET.len() as u32);
            port.status().requests.add(1);
        } else {
            ring.reject(head, &"no buffer for an event");
        }
        self.reset = false;
        false
    }

    /// Whether the guest takes part.
    fn is_joined(&self) -> bool {
        let [receive, transmit, _] = &self.seats;
        receive.ring.is_some() && transmit.ring.is_some()
    }

    /// Asks the launcher for the host's ends of streams that the guest wants.
    fn ask(&mut self) {
        while let Some((ticket, port)) = self.streams.next_asked() {
            let asked = self
                .dial
                .as_ref()
                .is_some_and(|dial| dial.ask(ticket, port));
            if !asked {
                self.streams.answered(ticket, None, clock::now());
            }
        }
    }

    /// Sleeps until there is something to do; then does what concerns orders and sockets.
    fn wait(&mut self, mut more: bool) {
        let takes = match &mut self.seats {
            [
                Seat {
                    ring: Some(ring), ..
                },
                _,
                _,
            ] => {
                let takes = ring.available() > 0;
                more |= !takes && ring.enable_kicks();
                takes
            }
            _ => false,
        };
        let kick = |queue: usize| self.seats.get(queue).and_then(Seat::kick);
        let kicks: [_; QUEUES] = [
            (!takes).then(|| kick(RECEIVE)).flatten(),
            self.streams
                .takes_packets()
                .then(|| kick(TRANSMIT))
                .flatten(),
            (self.reset && self.is_joined())
                .then(|| kick(EVENT))
                .flatten(),
        ];
        self.fds.clear();
        self.ports.clear();
        for seat in &self.seats {
            self.fds
                .push(PollFd::new(seat.port.wakeup().as_fd(), libc::POLLIN));
        }
        for kick in &kicks {
            self.fds.push(match kick {
                Some(kick) => PollFd::new(kick.as_fd(), libc::POLLIN),
                None => PollFd::none(),
            });
        }
        self.fds.push(if self.streams.has_room() {
            PollFd::new(self.listener.as_fd(), libc::POLLIN)
        } else {
            PollFd::none()
        });
        let asked = self.dial.as_ref().filter(|_| self.streams.is_waiting());
        self.fds.push(match asked.and_then(Dialer::fd) {
            Some(fd) => PollFd::new(fd, libc::POLLIN),
            None => PollFd::none(),
        });
        for (ports, socket, events) in self.streams.events(takes) {
            self.fds.push(PollFd::new(socket.as_fd(), events));
            self.ports.push(ports);
        }
        let timeout = match (more, self.streams.next_end()) {
            (true, _) => 0,
            (false, None) => -1,
            (false, Some(end)) => {
                let left = end.saturating_duration_since(clock::now()).as_millis();
                i32::try_from(left.saturating_add(1)).unwrap_or(i32::MAX)
            }
        };
        let [first, transmit, event] = &self.seats;
        first.port.status().syscalls.add(1);
        // Buffers for packets and events wait for those; packets of the guest's wait where it takes
        // no answers.
        first.port.status().sleeps(Sleep::ByOrder);
        event.port.status().sleeps(Sleep::ByOrder);
        if !self.streams.takes_packets() {
            transmit.port.status().sleeps(Sleep::ByOrder);
        }
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut self.fds, timeout);
        for seat in &self.seats {
            seat.port.status().sleeps(Sleep::Idle);
        }
        let happened = |at: usize| self.fds.get(at).map_or(0, PollFd::revents);
        let ordered: [bool; QUEUES] = std::array::from_fn(|queue| happened(queue) != 0);
        let kicked: [i16; QUEUES] =
            std::array::from_fn(|queue| happened(queue.saturating_add(QUEUES)));
        let called = happened(LISTENER) != 0;
        let answered = happened(LAUNCHER) != 0;
        self.sockets();
        if called {
            self.accept();
        }
        if answered {
            self.answers();
        }
        for (queue, (kick, events)) in kicks.iter().zip(kicked).enumerate() {
            if let (Some(kick), true, Some(seat)) = (kick, events != 0, self.seats.get_mut(queue)) {
                seat.drain(kick, events);
            }
        }
        for (queue, ordered) in ordered.into_iter().enumerate() {
            if ordered {
                self.order(queue);
            }
        }
    }

    /// What has happened on streams' sockets.
    fn sockets(&mut self) {
        let now = clock::now();
        let fds = self.fds.get(STREAMS..).unwrap_or_default();
        for (ports, fd) in self.ports.iter().zip(fds) {
            if fd.revents() != 0 {
                self.streams.happened(*ports, fd.revents(), now);
            }
        }
    }

    /// Takes clients in; where no driver is, they are turned away at once.
    fn accept(&mut self) {
        for _ in 0..CLIENTS {
            if !self.streams.has_room() {
                return;
            }
            // Gone again, or this process is short of descriptors: the next one may do.
            let Ok((socket, _)) = self.listener.accept() else {
                return;
            };
            if self.is_joined() {
                self.streams.accept(socket, clock::now());
            }
        }
    }

    /// Takes what the launcher has found.
    fn answers(&mut self) {
        let now = clock::now();
        for _ in 0..CLIENTS {
            match self.dial.as_mut().map(Dialer::answer) {
                Some(Ok(Some(answer))) => self.streams.answered(answer.ticket, answer.stream, now),
                Some(Ok(None)) => return,
                Some(Err(why)) => {
                    log::warn!("{why}: the guest can begin no connections");
                    return self.streams.unanswered();
                }
                None => return self.streams.unanswered(),
            }
        }
    }

    fn order(&mut self, queue: usize) {
        let Some(seat) = self.seats.get_mut(queue) else {
            return;
        };
        let began = seat.ring.is_some();
        seat.order(|| {});
        // Whoever comes next knows nothing of the streams.
        if began && seat.ring.is_none() && queue != EVENT {
            self.streams.clear();
            self.reset = true;
        }
    }
}

/// Copies a packet of the guest's: its header, and its length with the header.
fn take(chain: &Chain, memory: &Memory, into: &mut [u8]) -> Option<(Header, usize)> {
    let have = usize::try_from(chain.readable_len()).ok()?;
    if have < HEADER || chain.writable_len() != 0 {
        return None;
    }
    let read = |from, into: &mut [u8]| chain.read(memory, from, into).then_some(());
    let mut head = [0; HEADER];
    read(0, &mut head)?;
    let header = Header::parse(&head);
    let len = HEADER.checked_add(usize::try_from(header.len).ok()?)?;
    if len > have {
        return None;
    }
    read(HEADER, into.get_mut(HEADER..len)?)?;
    Some((header, len))
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
