//! The worker of all three queues: packets to the guest, packets from it, and events. One thread,
//! which sleeps on kicks, orders, the listening socket and those of the streams at once.
//!
//! A packet of the guest's is done when it is taken, and one for it is written into a buffer only
//! when it is there: nothing is in flight in between. Streams end with the process, and with the
//! driver: a driver that was there before is told by an event (VIRTIO 1.2 section 5.10.6.7).

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_runtime::active::ActiveRing;
use bulkhead_runtime::chain::{Buffer, Chain};
use bulkhead_runtime::clock;
use bulkhead_runtime::mailbox::{Answer, Order, WorkerPort};
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::sys::{self, PollFd};

use crate::packet::{HEADER, Header};
use crate::streams::{MOST, Streams};

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
/// Clients accepted before anything else is looked at.
const CLIENTS: u32 = 16;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

struct Place {
    port: WorkerPort,
    ring: Option<ActiveRing>,
}

/// The worker.
pub struct Worker {
    places: [Place; QUEUES],
    listener: Arc<UnixListener>,
    streams: Streams,
    chain: Chain,
    packet: Box<[u8]>,
    fds: Vec<PollFd>,
    ports: Vec<u32>,
    /// The driver is to be told that no stream of before exists.
    reset: bool,
}

impl Worker {
    /// A worker without rings; `None`: there are not three queues.
    pub fn new(
        ports: Vec<WorkerPort>,
        listener: Arc<UnixListener>,
        streams: Streams,
    ) -> Option<Self> {
        let places = ports.into_iter().map(|port| Place { port, ring: None });
        let places: Vec<Place> = places.collect();
        Some(Self {
            places: places.try_into().ok()?,
            listener,
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
        more |= self.receive();
        more |= self.tell();
        for place in &mut self.places {
            if let Some(ring) = &mut place.ring {
                ring.flush();
            }
        }
        more
    }

    /// Takes packets of the guest's.
    fn transmit(&mut self) -> bool {
        let [
            _,
            Place {
                port,
                ring: Some(ring),
            },
            _,
        ] = &mut self.places
        else {
            return false;
        };
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
            self.streams.packet(&header, data);
            ring.complete(head, 0);
            port.status().requests.add(1);
            port.status().written_bytes.add(header.len.into());
        }
        true
    }

    /// Fills buffers of the guest's.
    fn receive(&mut self) -> bool {
        let [
            Place {
                port,
                ring: Some(ring),
            },
            _,
            _,
        ] = &mut self.places
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
            if !put(self.chain.writable(), ring.memory(), bytes) {
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
            Place {
                port,
                ring: Some(ring),
            },
        ] = &mut self.places
        else {
            return false;
        };
        let Some(head) = ring.pop(&mut self.chain) else {
            return ring.enable_kicks();
        };
        if put(self.chain.writable(), ring.memory(), &TRANSPORT_RESET) {
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
        let [receive, transmit, _] = &self.places;
        receive.ring.is_some() && transmit.ring.is_some()
    }

    /// The kick of a queue, if anything would come of it.
    fn kick(&self, queue: usize) -> Option<Arc<File>> {
        let ring = self.places.get(queue)?.ring.as_ref()?;
        (!ring.is_broken()).then(|| Arc::clone(ring.kick()))
    }

    /// Sleeps until there is something to do; then does what concerns orders and sockets.
    fn wait(&mut self, mut more: bool) {
        let takes = match &mut self.places {
            [
                Place {
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
        let kicks: [_; QUEUES] = [
            (!takes).then(|| self.kick(RECEIVE)).flatten(),
            self.streams
                .takes_packets()
                .then(|| self.kick(TRANSMIT))
                .flatten(),
            (self.reset && self.is_joined())
                .then(|| self.kick(EVENT))
                .flatten(),
        ];
        self.fds.clear();
        self.ports.clear();
        for place in &self.places {
            self.fds
                .push(PollFd::new(place.port.wakeup().as_fd(), libc::POLLIN));
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
        for (port, socket, events) in self.streams.events(takes) {
            self.fds.push(PollFd::new(socket.as_fd(), events));
            self.ports.push(port);
        }
        let timeout = match (more, self.streams.next_end()) {
            (true, _) => 0,
            (false, None) => -1,
            (false, Some(end)) => {
                let left = end.saturating_duration_since(clock::now()).as_millis();
                i32::try_from(left.saturating_add(1)).unwrap_or(i32::MAX)
            }
        };
        let [first, ..] = &self.places;
        first.port.status().syscalls.add(1);
        // An error of ppoll (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut self.fds, timeout);
        let happened = |at: usize| self.fds.get(at).map_or(0, PollFd::revents);
        let ordered: [bool; QUEUES] = std::array::from_fn(|queue| happened(queue) != 0);
        let kicked: [i16; QUEUES] =
            std::array::from_fn(|queue| happened(queue.saturating_add(QUEUES)));
        let called = happened(QUEUES.saturating_add(QUEUES)) != 0;
        self.sockets();
        if called {
            self.accept();
        }
        for (queue, (kick, events)) in kicks.iter().zip(kicked).enumerate() {
            if let (Some(kick), true) = (kick, events != 0) {
                self.drain(queue, kick, events);
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
        let first = QUEUES.saturating_mul(2).saturating_add(1);
        let fds = self.fds.get(first..).unwrap_or_default();
        for (port, fd) in self.ports.iter().zip(fds) {
            if fd.revents() != 0 {
                self.streams.happened(*port, fd.revents(), now);
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

    fn drain(&mut self, queue: usize, mut kick: &File, events: i16) {
        let Some(place) = self.places.get_mut(queue) else {
            return;
        };
        place.port.status().kicks.add(1);
        let mut count = [0; 8];
        let sound = events & libc::POLLIN != 0 && matches!(kick.read(&mut count), Ok(8));
        if let (false, Some(ring)) = (sound, &mut place.ring) {
            ring.break_because(&"the kick descriptor is no eventfd");
        }
    }

    fn order(&mut self, queue: usize) {
        let Some(place) = self.places.get_mut(queue) else {
            return;
        };
        let order = place.port.take();
        place.port.take_refresh();
        let Some(order) = order else {
            return;
        };
        let answer = match order {
            Order::Start(setup) => {
                match ActiveRing::start(*setup, place.port.index(), place.port.status()) {
                    Ok(ring) => {
                        place.ring = Some(ring);
                        Answer::Done
                    }
                    Err(why) => Answer::Refused(why.to_string()),
                }
            }
            Order::Stop => {
                // Whoever comes next knows nothing of the streams.
                if place.ring.is_some() && queue != EVENT {
                    self.streams.clear();
                    self.reset = true;
                }
                Answer::Stopped {
                    next_avail: place.ring.take().map(ActiveRing::stop),
                }
            }
            Order::Memory(memory) => match place.ring.as_mut().map(|r| r.swap_memory(memory)) {
                Some(Err(why)) => Answer::Refused(why.to_string()),
                _ => Answer::Done,
            },
            Order::Call(call) => {
                if let Some(ring) = &mut place.ring {
                    ring.set_call(call);
                }
                Answer::Done
            }
            Order::Err(err) => {
                if let Some(ring) = &mut place.ring {
                    ring.set_err(err);
                }
                Answer::Done
            }
        };
        place.port.answer(answer);
    }
}

/// Copies a packet of the guest's: its header, and its length with the header.
fn take(chain: &Chain, memory: &Memory, into: &mut [u8]) -> Option<(Header, usize)> {
    let have = usize::try_from(chain.readable_len()).ok()?;
    if have < HEADER || chain.writable_len() != 0 {
        return None;
    }
    let read = |from: usize, into: &mut [u8]| get(chain.readable(), memory, from, into);
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

/// Copies out of buffers, from an offset in all of them on.
fn get(buffers: &[Buffer], memory: &Memory, mut skip: usize, into: &mut [u8]) -> Option<()> {
    let mut rest = into;
    for buffer in buffers {
        let len = usize::try_from(buffer.len).ok()?;
        let passed = skip.min(len);
        skip = skip.saturating_sub(passed);
        let count = len.saturating_sub(passed).min(rest.len());
        let (part, behind) = rest.split_at_mut_checked(count)?;
        let at = buffer.addr.checked_add(u64::try_from(passed).ok()?)?;
        if !memory.read(at, part) {
            return None;
        }
        rest = behind;
    }
    rest.is_empty().then_some(())
}

/// Writes into buffers, from their beginning on; false: they are too small, or gone.
fn put(buffers: &[Buffer], memory: &Memory, bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for buffer in buffers {
        let len = usize::try_from(buffer.len).unwrap_or(usize::MAX);
        let Some((part, behind)) = rest.split_at_checked(len.min(rest.len())) else {
            return false;
        };
        if !memory.write(buffer.addr, part) {
            return false;
        }
        rest = behind;
    }
    rest.is_empty()
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
