//! The worker of the one queue (VIRTIO 1.2 section 5.4.6): fills the guest's buffers with what it
//! reads from the host's generator, in the order in which they come. How much one request gets,
//! and how much is done before orders are looked at, is bounded; nothing is in flight in between.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_runtime::chain::Chain;
use bulkhead_runtime::clock;
use bulkhead_runtime::limit::Limiter;
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::memory::Memory;
use bulkhead_runtime::seat::{Seat, Wait};
use bulkhead_runtime::status::Sleep;

/// Most bytes for one request: a device may give less than the buffers take.
const MOST: u32 = 64 << 10;
/// Requests, and bytes, before orders are looked at.
const BATCH: u32 = 64;
const TURN: u32 = 256 << 10;
/// Bytes read at a time.
const PIECE: usize = 4096;
/// When to ask a generator again that had nothing.
const RETRY: Duration = Duration::from_millis(100);

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// There may be more.
    More,
    /// A kick.
    Kick,
    /// This time, by a limit or because the host has nothing.
    Pause(Duration, Sleep),
}

/// What became of a request's buffers.
#[derive(Debug)]
enum Filled {
    /// So many bytes are in them.
    Bytes(u32),
    /// They have left the guest's memory.
    Gone,
    /// The generator gave nothing.
    Nothing(std::io::Error),
}

/// The worker.
pub struct Worker {
    seat: Seat,
    source: Arc<File>,
    limiter: Arc<Limiter>,
    chain: Chain,
    piece: Box<[u8; PIECE]>,
    /// The last error of the host was logged.
    complained: bool,
}

impl Worker {
    /// A worker without a ring.
    pub fn new(port: WorkerPort, source: Arc<File>, limiter: Arc<Limiter>) -> Self {
        Self {
            seat: Seat::new(port),
            source,
            limiter,
            chain: Chain::new(),
            piece: Box::new([0; PIECE]),
            complained: false,
        }
    }

    /// Serves for ever.
    pub fn run(mut self) -> ! {
        loop {
            let next = self.serve();
            self.wait(next);
        }
    }

    fn serve(&mut self) -> Next {
        let Some(ring) = &mut self.seat.ring else {
            return Next::Kick;
        };
        let status = self.seat.port.status();
        let mut next = Next::More;
        let mut left = TURN;
        for _ in 0..BATCH {
            if left == 0 {
                break;
            }
            let Some(head) = ring.pop(&mut self.chain) else {
                next = if ring.enable_kicks() {
                    Next::More
                } else {
                    Next::Kick
                };
                break;
            };
            if self.chain.readable_len() != 0 || self.chain.writable_len() == 0 {
                ring.reject(head, &"no request of an entropy device");
                break;
            }
            let wanted = self.chain.writable_len().min(MOST);
            if let Err(wait) = self.limiter.take(clock::now(), wanted.into(), 1) {
                ring.unpop(head);
                status.throttled.add(1);
                next = Next::Pause(wait, Sleep::ByOrder);
                break;
            }
            let memory = Arc::clone(ring.memory());
            match fill(&self.source, &mut self.piece, &self.chain, &memory, wanted) {
                Filled::Bytes(given) => {
                    ring.complete(head, given);
                    status.requests.add(1);
                    status.read_bytes.add(given.into());
                    self.complained = false;
                    left = left.saturating_sub(wanted);
                }
                Filled::Gone => {
                    ring.reject(head, &"its buffers are no guest memory");
                    break;
                }
                Filled::Nothing(why) => {
                    ring.unpop(head);
                    if !self.complained {
                        self.complained = true;
                        status.host_error(why.raw_os_error().unwrap_or(libc::EIO), 0);
                        log::warn!("the host has no random bytes: {why}; tried again until it has");
                    }
                    next = Next::Pause(RETRY, Sleep::ForHost);
                    break;
                }
            }
        }
        ring.flush();
        next
    }

    /// Sleeps until there is something to do; then obeys an order.
    fn wait(&mut self, next: Next) {
        let (kick, limit, why) = match next {
            Next::More => (true, Some(Duration::ZERO), Sleep::Idle),
            Next::Kick => (true, None, Sleep::Idle),
            // Before the time is over, a kick would change nothing.
            Next::Pause(left, why) => (false, Some(left), why),
        };
        self.seat.wait(Wait { kick, limit, why }, || {});
    }
}

/// Fills the first `wanted` bytes of a chain's buffers, or as many as the host has.
fn fill(
    mut source: &File,
    piece: &mut [u8; PIECE],
    chain: &Chain,
    memory: &Memory,
    wanted: u32,
) -> Filled {
    let mut given = 0_u32;
    for buffer in chain.writable() {
        let mut done = 0_u32;
        while done < buffer.len && given < wanted {
            let room = buffer
                .len
                .saturating_sub(done)
                .min(wanted.saturating_sub(given));
            let room = usize::try_from(room).unwrap_or(PIECE).min(PIECE);
            let Some(place) = piece.get_mut(..room) else {
                return Filled::Gone;
            };
            let got = match source.read(place) {
                Err(why) if why.kind() == ErrorKind::Interrupted => continue,
                Ok(0) if given == 0 => return Filled::Nothing(ErrorKind::UnexpectedEof.into()),
                Err(why) if given == 0 => return Filled::Nothing(why),
                Ok(0) | Err(_) => return Filled::Bytes(given),
                Ok(got) => got,
            };
            let bytes = place.get(..got).unwrap_or_default();
            if !memory.write(buffer.addr.saturating_add(done.into()), bytes) {
                return Filled::Gone;
            }
            let got = u32::try_from(got).unwrap_or(0);
            done = done.saturating_add(got);
            given = given.saturating_add(got);
        }
    }
    Filled::Bytes(given)
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
