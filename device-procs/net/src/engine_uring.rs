//! The io_uring engine: one ring per thread ([`FrameRing`]) holds kicks, orders, interrupts and
//! the tap's frames, so that a busy worker enters the kernel once per batch of frames both ways,
//! and a quiet one little more than once per frame.
//!
//! Kick and mailbox are watched by multishot polls, which fire for every write to the eventfd
//! and need no read. Frames from the tap are read in batches while there are many, and one at a
//! time, by a read that waits, while there are few.
//!
//! Runs on the worker thread of a pair.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use bulkhead_runtime::clock;

use crate::frame_ring::{Event, FrameRing, SLOTS};
use crate::pair::{Change, PLACES, Pair, Serving};
use crate::receive::Delivery;

/// Frames asked for when it is not known whether there are many.
const FEW: usize = 4;
/// After so many frames that were waited for, a batch is tried even if the last one failed.
const PROBE: usize = 8;
/// Shortest time to sleep for a limit.
const NAP: Duration = Duration::from_millis(1);
/// When to look again at a tap that cannot be read.
const RETRY: Duration = Duration::from_secs(1);
/// More than this many polls in a row that end at once are no accident of a full ring.
const SPENT: u8 = 8;

/// How the thread goes to sleep.
#[derive(Default)]
struct Wait {
    /// There may be more to do at once.
    busy: bool,
    /// A limit.
    nap: Option<Duration>,
}

impl Wait {
    fn nap(&mut self, wait: Duration) {
        let wait = wait.max(NAP);
        self.nap = Some(self.nap.map_or(wait, |nap| nap.min(wait)));
    }
}

/// Frames that were read and not yet delivered.
#[derive(Default)]
struct Inbox {
    /// Length of the frame in each slot, 0 if there is none.
    lengths: [usize; SLOTS],
    next: usize,
    filled: usize,
    /// How many to ask for at once.
    ask: usize,
    /// Ask for a batch: there may be many.
    many: bool,
    /// The last batch that followed a frame which had been waited for was empty.
    lonely: bool,
    /// Frames that were waited for since the last batch.
    waited_for: usize,
    /// Of a batch: how many came, and whether one did not.
    got: usize,
    drained: bool,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.next >= self.filled
    }

    fn clear(&mut self) {
        self.next = 0;
        self.filled = 0;
        self.lengths = [0; SLOTS];
    }

    fn put(&mut self, slot: usize, len: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = len;
            self.filled = self.filled.max(slot + 1);
            self.got += 1;
        }
    }
}

/// The polls of a place.
#[derive(Clone, Copy, Default)]
struct Watch {
    arm_wakeup: bool,
    arm_kick: bool,
    /// Times in a row that the kick's poll fired and ended at once, as an eventfd's does not.
    spent: u8,
    /// Counts the kick eventfds, so that a late event of an old one is known as such.
    generation: u32,
    /// There may be an order.
    ordered: bool,
}

/// The engine of one thread.
pub struct Engine {
    pair: Pair,
    ring: FrameRing,
    has_tap: bool,
    inbox: Inbox,
    /// The tap cannot be read: it is looked at again then.
    retry: Option<Instant>,
    /// The tap has no room: frames wait for its poll.
    full: bool,
    polls_writable: bool,
    watches: [Watch; PLACES],
    events: Vec<Event>,
}

impl Engine {
    /// Makes the ring. On the worker thread, before confinement is sealed.
    ///
    /// # Errors
    /// In one line, what the kernel refused.
    pub fn new(mut pair: Pair) -> Result<Self, String> {
        let tap = pair.state.tap().queue(pair.number);
        let tap = tap.map(|queue| queue.file().as_raw_fd());
        let (mut wakeups, mut fence) = ([None; PLACES], None);
        let mut watches = [Watch::default(); PLACES];
        for (n, place) in pair.places.iter_mut().enumerate() {
            fence = place.port.take_fence().or(fence);
            if let (Some(wakeup), Some(watch)) = (wakeups.get_mut(n), watches.get_mut(n)) {
                *wakeup = Some(place.port.wakeup().as_raw_fd());
                watch.arm_wakeup = true;
            }
        }
        Ok(Self {
            ring: FrameRing::new(tap, wakeups, fence)?,
            has_tap: tap.is_some(),
            pair,
            inbox: Inbox {
                ask: FEW,
                ..Inbox::default()
            },
            retry: None,
            full: false,
            polls_writable: false,
            watches,
            events: Vec::new(),
        })
    }

    /// Serves the pair for ever.
    pub fn run(mut self) -> ! {
        loop {
            #[cfg(feature = "hostile")]
            self.ring.strike();
            let mut wait = Wait::default();
            if let Some(control) = self.pair.control() {
                wait.busy |= control.serve() || control.ring().enable_kicks();
            }
            let (mut send, mut reads) = (false, 0);
            if self.has_tap {
                send = self.transmit(&mut wait);
                reads = self.receive(&mut wait);
                self.interrupt();
            }
            self.arm();
            let sleep = !wait.busy && !send && reads == 0;
            if sleep {
                self.pair.falls_asleep();
            }
            let half = self.pair.transmit().filter(|_| send);
            let half = half.map(|half| &*half).into_iter();
            let frames = half.flat_map(|half| (0..half.count()).map(move |n| (n, half)));
            let frames = frames.filter_map(|(n, half)| Some((n, half.waiting(n)?)));
            self.ring
                .turn(frames, reads, sleep, wait.nap, &mut self.events);
            if sleep {
                self.pair.wakes();
            }
            self.pair.count_syscalls(0, self.ring.take_entered());
            self.react(reads);
            self.obey();
        }
    }

    /// Gives back what was sent, and takes the next batch from the ring; true if there are
    /// frames for the tap.
    fn transmit(&mut self, wait: &mut Wait) -> bool {
        let Some(half) = self.pair.transmit() else {
            return false;
        };
        if half.settle() && self.full {
            return false;
        }
        half.fill(clock::now);
        if let Some(held) = half.held() {
            wait.nap(held);
        } else if half.count() == 0 {
            wait.busy |= half.ring().enable_kicks();
            return false;
        }
        half.ring().disable_kicks();
        // Some may be dropped already, and go back with the next turn.
        let waiting = (0..half.count()).any(|n| half.waiting(n).is_some());
        wait.busy |= half.count() > 0;
        waiting
    }

    /// Delivers what was read; how many frames are to be read now. If there are few, the next
    /// one is read when it comes.
    fn receive(&mut self, wait: &mut Wait) -> usize {
        if !self.pair.is_receiving() {
            if self.pair.receive().is_none() && !self.inbox.is_empty() {
                self.inbox.clear();
            }
            return 0;
        }
        let Some(half) = self.pair.receive() else {
            return 0;
        };
        while self.inbox.next < self.inbox.filled {
            let number = self.inbox.next;
            let len = self.inbox.lengths.get(number).copied().unwrap_or(0);
            let frame = self.ring.slot(number).and_then(|s| s.get_mut(..len));
            let Some(frame) = frame.filter(|f| !f.is_empty()) else {
                self.inbox.next += 1;
                continue;
            };
            match half.deliver(frame, clock::now) {
                Delivery::Done => self.inbox.next += 1,
                Delivery::NoBuffers => return 0,
                Delivery::Held(time) => {
                    wait.nap(time);
                    return 0;
                }
            }
        }
        if self.inbox.filled > 0 {
            half.ring().disable_kicks();
        }
        self.inbox.clear();
        if let Some(retry) = self.retry {
            let left = retry.saturating_duration_since(clock::now());
            if !left.is_zero() {
                wait.nap(left);
                return 0;
            }
            self.retry = None;
        }
        if self.ring.waits_for_frame() {
            return 0;
        }
        if self.inbox.many {
            return self.inbox.ask;
        }
        self.ring.read_first();
        0
    }

    /// Shows the driver what was completed; the interrupt goes along with the next entry.
    fn interrupt(&mut self) {
        for (number, place) in self.pair.places.iter_mut().enumerate() {
            if let Some(ring) = place.serving.as_mut().and_then(Serving::ring)
                && ring.publish()
            {
                self.ring.interrupt(number);
            }
        }
    }

    /// Renews the polls that are spent and needed.
    fn arm(&mut self) {
        for (place, watch) in self.watches.iter_mut().enumerate() {
            if std::mem::take(&mut watch.arm_wakeup) {
                self.ring.watch_wakeup(place);
            }
            if std::mem::take(&mut watch.arm_kick) {
                self.ring.watch_kick(place, watch.generation);
            }
        }
        if self.full && !self.polls_writable {
            self.ring.watch_writable();
            self.polls_writable = true;
        }
    }

    fn react(&mut self, reads: usize) {
        self.inbox.got = 0;
        self.inbox.drained = false;
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                Event::Written(number, result) => {
                    self.full |= result == -libc::EAGAIN;
                    if let Some(half) = self.pair.transmit() {
                        half.answered(number, result);
                    }
                }
                Event::Read(slot, result) => self.read(slot, result),
                Event::First(result) => {
                    self.read(0, result);
                    self.inbox.waited_for += 1;
                    let try_many = !self.inbox.lonely || self.inbox.waited_for >= PROBE;
                    self.inbox.many = try_many && !self.inbox.drained;
                    self.inbox.ask = FEW;
                }
                Event::Kick {
                    place,
                    generation,
                    result,
                    more,
                } => self.kicked(place, generation, result, more),
                Event::Wakeup(place, more) => {
                    if let Some(watch) = self.watches.get_mut(place) {
                        watch.arm_wakeup |= !more;
                        watch.ordered = true;
                    }
                }
                Event::Writable => {
                    self.polls_writable = false;
                    self.full = false;
                }
            }
        }
        self.events = events;
        if reads > 0 {
            self.inbox.lonely = self.inbox.got == 0;
            self.inbox.waited_for = 0;
            self.inbox.many = !self.inbox.drained;
            self.inbox.ask = if self.inbox.drained {
                FEW
            } else {
                reads.saturating_mul(2).min(SLOTS)
            };
        }
    }

    fn read(&mut self, slot: usize, result: i32) {
        match usize::try_from(result) {
            Ok(len) => self.inbox.put(slot, len),
            Err(_) if matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR) => {
                self.inbox.drained = true;
            }
            Err(_) => {
                self.inbox.drained = true;
                if self.retry.is_none() {
                    self.retry = clock::now().checked_add(RETRY);
                    if let Some(half) = self.pair.receive() {
                        half.failed(result.wrapping_neg());
                    }
                }
            }
        }
    }

    fn kicked(&mut self, place: usize, generation: u32, result: i32, more: bool) {
        let Some(watch) = self.watches.get_mut(place) else {
            return;
        };
        if generation != watch.generation {
            return;
        }
        watch.arm_kick |= !more;
        watch.spent = if more {
            0
        } else {
            watch.spent.saturating_add(1)
        };
        self.pair.count_kick(place);
        let fired = result >= 0 && result & i32::from(libc::POLLIN) != 0;
        if !fired || watch.spent > SPENT {
            watch.arm_kick = false;
            self.break_ring(place);
        }
    }

    fn break_ring(&mut self, place: usize) {
        if let Some(ring) = self.pair.ring(place) {
            ring.break_because(&"the kick descriptor cannot be waited for");
        }
    }

    /// Carries out orders: nothing of this thread is under way in guest memory.
    fn obey(&mut self) {
        for place in 0..PLACES {
            let watch = self.watches.get_mut(place);
            if !watch.is_some_and(|w| std::mem::take(&mut w.ordered)) {
                continue;
            }
            // Whatever it was: look at the tap anew.
            self.retry = None;
            match self.pair.obey(place) {
                Change::None => {}
                Change::Started => self.watch(place, true),
                Change::Stopped => self.watch(place, false),
                Change::Call => self.set_call(place, true),
            }
        }
    }

    /// Begins or ends to watch the kick of a place.
    fn watch(&mut self, place: usize, on: bool) {
        let Some(watch) = self.watches.get_mut(place) else {
            return;
        };
        let old = watch.generation;
        watch.generation = watch.generation.wrapping_add(1) & 0xff_ffff;
        watch.arm_kick = on;
        watch.spent = 0;
        if !on {
            self.ring.forget_kick(place, old);
        }
        let ring = self.pair.ring(place).filter(|_| on);
        let kick = ring.map(|ring| ring.kick().as_raw_fd());
        if let Err(e) = self.ring.set_kick(place, kick) {
            log::warn!("io_uring: cannot register a kick descriptor: {e}");
            self.break_ring(place);
        }
        self.set_call(place, on);
    }

    fn set_call(&mut self, place: usize, on: bool) {
        let ring = self.pair.ring(place).filter(|_| on);
        let call = ring.and_then(|ring| Some(ring.call()?.as_raw_fd()));
        if let Err(e) = self.ring.set_call(place, call) {
            log::warn!("io_uring: cannot register a call descriptor: {e}");
        }
    }
}
