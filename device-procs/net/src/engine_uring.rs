//! The io_uring engine: one ring per thread holds kicks, orders, interrupts and the tap's
//! frames, so that a busy worker enters the kernel once per batch of frames and direction.
//!
//! Reads and writes of the tap carry RWF_NOWAIT: the kernel ends them while it takes them, so
//! after each entry nothing of this thread is under way but polls. Kick and mailbox are
//! watched by multishot polls, which fire for every write to the eventfd and need no read;
//! the tap by one-shot polls, armed only when it was found empty or full. Guest memory is
//! never registered as buffers.
//!
//! Runs on the worker thread of a pair, which makes the ring too (it is bound to it).

#![allow(unsafe_code)] // entries whose segments must outlive the operation

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use bulkhead_runtime::clock;
use bulkhead_runtime::sys;
use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libc::iovec;

use crate::pair::{Change, PLACES, Pair, Serving};
use crate::receive::Delivery;
use crate::tap::{MAX_FRAME, Tap};
use crate::transmit::BATCH;

/// Submission entries: a batch both ways, polls and interrupts.
const ENTRIES: u32 = 128;
/// Most frames read at once.
const SLOTS: usize = 32;
/// Frames asked for when it is not known whether there are many.
const FEW: usize = 4;
/// Room for a frame, and for one that is too long to be seen as such.
const SLOT: usize = MAX_FRAME + 64;
/// Shortest time to sleep for a limit.
const NAP: Duration = Duration::from_millis(1);
/// When to look again at a tap that cannot be read.
const RETRY: Duration = Duration::from_secs(1);

// Registered files; those of a place lie one after another.
const TAP: types::Fixed = types::Fixed(0);
const WAKEUP: u32 = 1;
const KICK: u32 = WAKEUP + PLACES as u32;
const CALL: u32 = KICK + PLACES as u32;
const SPARE: u32 = 2 * PLACES as u32;
const FENCE: usize = CALL as usize + PLACES;

/// Operations that the ring takes, and no others.
const OPCODES: [u8; 5] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// What a completion belongs to, as the upper half of user_data; the lower half is a frame, a
/// place, or a place and its kick's generation.
const TAG_WRITE: u32 = 0;
const TAG_READ: u32 = 1;
const TAG_KICK: u32 = 2;
const TAG_WAKEUP: u32 = 3;
const TAG_READABLE: u32 = 4;
const TAG_WRITABLE: u32 = 5;
const TAG_OTHER: u32 = 6;

/// More than this many polls in a row that end at once are no accident of a full ring.
const SPENT: u8 = 8;

/// What is written to an eventfd.
static ONE: u64 = 1;

fn user_data(tag: u32, value: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

/// A kick's poll: the generation in the upper, the place in the lower bits.
fn kick_data(place: usize, generation: u32) -> u64 {
    user_data(TAG_KICK, generation << 8 | place as u32 & 0xff)
}

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
struct Inbox {
    memory: Vec<u8>,
    lengths: [usize; SLOTS],
    next: usize,
    filled: usize,
    /// How many to ask for at once.
    ask: usize,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.next >= self.filled
    }

    fn clear(&mut self) {
        self.next = 0;
        self.filled = 0;
    }

    fn slot(&mut self, number: usize) -> Option<&mut [u8]> {
        self.memory.chunks_exact_mut(SLOT).nth(number)
    }
}

/// The polls of a place.
#[derive(Clone, Copy, Default)]
struct Watch {
    arm_wakeup: bool,
    arm_kick: bool,
    /// Times in a row that the kick's poll fired and ended at once, as an eventfd's does not.
    spent: u8,
    /// Counts the kick eventfds, so that a late completion of an old one is known as such.
    generation: u32,
    /// There may be an order.
    ordered: bool,
}

/// The engine of one thread.
pub struct Engine {
    pair: Pair,
    uring: IoUring,
    inbox: Inbox,
    has_tap: bool,
    /// The tap may have frames.
    readable: bool,
    /// The tap cannot be read: it is looked at again then.
    retry: Option<Instant>,
    polls_readable: bool,
    /// The tap has no room: frames wait for its poll.
    full: bool,
    polls_writable: bool,
    watches: [Watch; PLACES],
    /// Reads and writes of the tap that the kernel has not answered.
    under_way: usize,
    /// Frames asked for, and those that came.
    asked: usize,
    got: usize,
    reaped: Vec<(u64, i32, u32)>,
}

/// Whether the tap can be read and written by a ring without waiting.
///
/// # Errors
/// In one line why not: the kernel is too old, or io_uring is not to be had.
pub fn supported(tap: &Tap) -> Result<(), String> {
    uring::available().map_err(|e| e.to_string())?;
    let Some(queue) = tap.queue(0) else {
        return Err("no tap".into());
    };
    let ring = uring::restricted(&RingSpec {
        entries: 1,
        opcodes: &OPCODES,
        files: &[queue.file().as_raw_fd()],
        spare_files: 0,
    });
    let mut ring = ring.map_err(|e| e.to_string())?.ring;
    let mut frame = vec![0; SLOT];
    let read = read_entry(&mut frame).flags(squeue::Flags::FIXED_FILE);
    // SAFETY: the buffer lives until the read has been answered, below.
    let pushed = unsafe { ring.submission().push(&read) };
    pushed.map_err(|e| e.to_string())?;
    let waited = ring
        .submit_and_wait(1)
        .map_err(|e| format!("io_uring: {e}"));
    let answer = ring.completion().next().map(|c| c.result());
    match answer {
        // A frame that was there is lost, as frames are before there is a guest.
        Some(n) if n >= 0 || n == -libc::EAGAIN => waited.map(drop),
        Some(n) if n == -libc::EOPNOTSUPP => {
            Err("io_uring cannot read a tap without waiting (before Linux 6.4)".into())
        }
        Some(n) => {
            let e = io::Error::from_raw_os_error(n.wrapping_neg());
            Err(format!("io_uring: cannot read the tap: {e}"))
        }
        None => {
            // The read may still be under way: its buffer must stay.
            std::mem::forget(frame);
            Err("io_uring: a read of the tap does not end".into())
        }
    }
}

fn read_entry(slot: &mut [u8]) -> squeue::Entry {
    let len = u32::try_from(slot.len()).unwrap_or(0);
    opcode::Read::new(TAP, slot.as_mut_ptr(), len)
        .rw_flags(libc::RWF_NOWAIT)
        .build()
}

fn write_entry(segments: &[iovec]) -> squeue::Entry {
    match segments {
        [one] => {
            let len = u32::try_from(one.iov_len).unwrap_or(0);
            opcode::Write::new(TAP, one.iov_base.cast(), len)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
        several => {
            let count = u32::try_from(several.len()).unwrap_or(0);
            opcode::Writev::new(TAP, several.as_ptr(), count)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
    }
}

impl Engine {
    /// Makes the ring. On the worker thread, before confinement is sealed.
    ///
    /// # Errors
    /// In one line, what the kernel refused.
    pub fn new(mut pair: Pair) -> Result<Self, String> {
        let mut files: Vec<RawFd> = Vec::new();
        let tap = pair.state.tap().queue(pair.number);
        files.push(tap.map_or(-1, |queue| queue.file().as_raw_fd()));
        let has_tap = tap.is_some();
        let mut fence = None;
        for place in 0..PLACES {
            let place = pair.places.get_mut(place);
            files.push(place.map_or(-1, |place| {
                fence = place.port.take_fence().or(fence.take());
                place.port.wakeup().as_raw_fd()
            }));
        }
        files.resize(FENCE, -1);
        files.extend(fence.as_ref().map(AsRawFd::as_raw_fd));
        let RestrictedRing { ring, .. } = uring::restricted(&RingSpec {
            entries: ENTRIES,
            opcodes: &OPCODES,
            files: &files,
            spare_files: SPARE,
        })
        .map_err(|e| e.to_string())?;
        let mut watches = [Watch::default(); PLACES];
        for watch in watches.iter_mut().take(pair.places.len()) {
            watch.arm_wakeup = true;
        }
        Ok(Self {
            pair,
            uring: ring,
            inbox: Inbox {
                memory: vec![0; if has_tap { SLOTS * SLOT } else { 0 }],
                lengths: [0; SLOTS],
                next: 0,
                filled: 0,
                ask: FEW,
            },
            has_tap,
            readable: true,
            retry: None,
            polls_readable: false,
            full: false,
            polls_writable: false,
            watches,
            under_way: 0,
            asked: 0,
            got: 0,
            reaped: Vec::with_capacity(2 * ENTRIES as usize),
        })
    }

    /// Serves the pair for ever.
    pub fn run(mut self) -> ! {
        loop {
            let mut wait = Wait::default();
            if let Some(control) = self.pair.control() {
                wait.busy |= control.serve() || control.ring().enable_kicks();
            }
            if self.has_tap {
                self.transmit(&mut wait);
                self.receive(&mut wait);
                self.interrupt();
            }
            self.arm(&wait);
            let want = if self.under_way > 0 {
                self.under_way
            } else {
                usize::from(!wait.busy)
            };
            if self.under_way == 0 && !wait.busy {
                self.pair.waits_for_host();
            }
            self.enter(want, wait.nap);
            self.reap();
            while self.under_way > 0 {
                self.enter(1, None);
                self.reap();
            }
            self.obey();
        }
    }

    /// Gives back what was sent, and takes the next batch from the ring to the tap.
    fn transmit(&mut self, wait: &mut Wait) {
        let Some(half) = self.pair.transmit() else {
            return;
        };
        if half.settle() && self.full {
            return;
        }
        half.fill(clock::now);
        if let Some(held) = half.held() {
            wait.nap(held);
        } else if half.count() == 0 {
            wait.busy |= half.ring().enable_kicks();
            return;
        }
        half.ring().disable_kicks();
        for number in 0..half.count() {
            let entry = match half.waiting(number) {
                Some(segments) => write_entry(segments),
                // Its fate is known already.
                None => {
                    wait.busy = true;
                    continue;
                }
            };
            let entry = entry.user_data(user_data(TAG_WRITE, number as u32));
            push(&mut self.uring, &entry);
            self.under_way += 1;
        }
    }

    /// Delivers what was read, and reads more when that is done.
    fn receive(&mut self, wait: &mut Wait) {
        if !self.pair.is_receiving() {
            if self.pair.receive().is_none() {
                self.inbox.clear();
            }
            return;
        }
        let Some(half) = self.pair.receive() else {
            return;
        };
        while self.inbox.next < self.inbox.filled {
            let number = self.inbox.next;
            let len = self.inbox.lengths.get(number).copied().unwrap_or(0);
            let frame = self.inbox.slot(number).and_then(|s| s.get_mut(..len));
            let Some(frame) = frame.filter(|f| !f.is_empty()) else {
                self.inbox.next += 1;
                continue;
            };
            match half.deliver(frame, clock::now) {
                Delivery::Done => self.inbox.next += 1,
                Delivery::NoBuffers => return,
                Delivery::Held(time) => return wait.nap(time),
            }
        }
        self.inbox.clear();
        if let Some(retry) = self.retry {
            let left = retry.saturating_duration_since(clock::now());
            if !left.is_zero() {
                return wait.nap(left);
            }
            self.retry = None;
            self.readable = true;
        }
        if !self.readable {
            return;
        }
        half.ring().disable_kicks();
        let ask = self.inbox.ask;
        for (number, slot) in self
            .inbox
            .memory
            .chunks_exact_mut(SLOT)
            .take(ask)
            .enumerate()
        {
            let entry = read_entry(slot).user_data(user_data(TAG_READ, number as u32));
            push(&mut self.uring, &entry);
            self.under_way += 1;
        }
        self.inbox.lengths = [0; SLOTS];
        self.inbox.filled = ask;
        self.asked = ask;
        self.got = 0;
    }

    /// Shows the driver what was completed; the interrupt goes along with the next entry.
    fn interrupt(&mut self) {
        for (number, place) in (0u32..).zip(&mut self.pair.places) {
            if let Some(ring) = place.serving.as_mut().and_then(Serving::ring)
                && ring.publish()
            {
                let one = std::ptr::from_ref(&ONE).cast();
                let entry = opcode::Write::new(types::Fixed(CALL + number), one, 8).build();
                push(&mut self.uring, &entry.user_data(user_data(TAG_OTHER, 0)));
            }
        }
    }

    /// Renews the polls that are spent and needed.
    fn arm(&mut self, wait: &Wait) {
        for (number, watch) in (0u32..).zip(&mut self.watches) {
            if std::mem::take(&mut watch.arm_wakeup) {
                let poll = poll(WAKEUP + number, libc::POLLIN).multi(true).build();
                push(
                    &mut self.uring,
                    &poll.user_data(user_data(TAG_WAKEUP, number)),
                );
            }
            if std::mem::take(&mut watch.arm_kick) {
                let data = kick_data(number as usize, watch.generation);
                let poll = poll(KICK + number, libc::POLLIN).multi(true).build();
                push(&mut self.uring, &poll.user_data(data));
            }
        }
        if !self.has_tap || self.under_way > 0 {
            return;
        }
        let wants_frames = !self.readable && self.retry.is_none() && self.inbox.is_empty();
        if wants_frames && !wait.busy && !self.polls_readable && self.pair.is_receiving() {
            let poll = poll(TAP.0, libc::POLLIN).build();
            push(&mut self.uring, &poll.user_data(user_data(TAG_READABLE, 0)));
            self.polls_readable = true;
        }
        if self.full && !self.polls_writable {
            let poll = poll(TAP.0, libc::POLLOUT).build();
            push(&mut self.uring, &poll.user_data(user_data(TAG_WRITABLE, 0)));
            self.polls_writable = true;
        }
    }

    /// Submits, and waits for at least `want` completions or until the nap is over.
    fn enter(&mut self, want: usize, nap: Option<Duration>) {
        self.pair.count_syscalls(0, 1);
        if let Err(e) = enter(&mut self.uring, want, nap) {
            give_up(&e);
        }
    }

    fn reap(&mut self) {
        let completions = self.uring.completion();
        self.reaped
            .extend(completions.map(|c| (c.user_data(), c.result(), c.flags())));
        let mut batch = std::mem::take(&mut self.reaped);
        for (data, result, flags) in batch.drain(..) {
            self.completed(data, result, flags);
        }
        self.reaped = batch;
    }

    #[inline]
    fn completed(&mut self, data: u64, result: i32, flags: u32) {
        let value = data as u32;
        match (data >> 32) as u32 {
            TAG_WRITE => {
                self.under_way = self.under_way.saturating_sub(1);
                self.full |= result == -libc::EAGAIN;
                if let Some(half) = self.pair.transmit() {
                    half.answered(value as usize, result);
                }
            }
            TAG_READ => {
                self.under_way = self.under_way.saturating_sub(1);
                self.read(value as usize, result);
            }
            TAG_KICK => self.kicked(value, result, flags),
            TAG_WAKEUP => {
                if let Some(watch) = self.watches.get_mut(value as usize) {
                    watch.arm_wakeup |= !cqueue::more(flags);
                    watch.ordered = true;
                }
            }
            TAG_READABLE => {
                self.polls_readable = false;
                self.readable = true;
            }
            TAG_WRITABLE => {
                self.polls_writable = false;
                self.full = false;
            }
            // An interrupt, the cancelled poll of an old kick, or the cancellation itself.
            _ => {}
        }
    }

    fn read(&mut self, slot: usize, result: i32) {
        self.asked = self.asked.saturating_sub(1);
        match usize::try_from(result) {
            Ok(len) => {
                if let Some(length) = self.inbox.lengths.get_mut(slot) {
                    *length = len;
                }
                self.got += 1;
            }
            Err(_) if result == -libc::EAGAIN => self.readable = false,
            Err(_) => {
                self.readable = false;
                if self.retry.is_none() {
                    self.retry = Some(clock::now() + RETRY);
                    if let Some(half) = self.pair.receive() {
                        half.failed(result.wrapping_neg());
                    }
                }
            }
        }
        if self.asked == 0 {
            self.inbox.ask = if self.readable {
                self.inbox.ask.saturating_mul(2).min(SLOTS)
            } else {
                self.got.clamp(FEW, SLOTS)
            };
        }
    }

    fn kicked(&mut self, value: u32, result: i32, flags: u32) {
        let place = (value & 0xff) as usize;
        let Some(watch) = self.watches.get_mut(place) else {
            return;
        };
        if value >> 8 != watch.generation & 0xff_ffff {
            return;
        }
        let more = cqueue::more(flags);
        watch.arm_kick |= !more;
        watch.spent = if more {
            0
        } else {
            watch.spent.saturating_add(1)
        };
        self.pair.count_kick(place);
        let fired = result >= 0 && result as u32 & libc::POLLIN as u32 != 0;
        if !fired || watch.spent > SPENT {
            watch.arm_kick = false;
            self.break_ring(place, "the kick descriptor cannot be waited for");
        }
    }

    fn break_ring(&mut self, place: usize, why: &str) {
        if let Some(ring) = self.pair.ring(place) {
            ring.break_because(&why);
        }
    }

    /// Carries out orders, now that nothing is under way.
    fn obey(&mut self) {
        for place in 0..PLACES {
            let watch = self.watches.get_mut(place);
            if !watch.is_some_and(|w| std::mem::take(&mut w.ordered)) {
                continue;
            }
            // Whatever it was: look at the tap anew.
            self.retry = None;
            self.readable = true;
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
        let old = kick_data(place, watch.generation & 0xff_ffff);
        watch.generation = watch.generation.wrapping_add(1) & 0xff_ffff;
        watch.arm_kick = on;
        watch.spent = 0;
        if !on {
            let cancel = opcode::AsyncCancel::new(old).build();
            push(&mut self.uring, &cancel.user_data(user_data(TAG_OTHER, 0)));
            self.enter(0, None);
        }
        let ring = self.pair.ring(place).filter(|_| on);
        let kick = ring.map_or(-1, |ring| ring.kick().as_raw_fd());
        if !self.register(KICK, place, kick) {
            self.break_ring(place, "the kick descriptor cannot be waited for");
        }
        self.set_call(place, on);
    }

    fn set_call(&mut self, place: usize, on: bool) {
        let ring = self.pair.ring(place).filter(|_| on);
        let call = ring.and_then(|ring| ring.call());
        let call = call.map_or(-1, |call| call.as_raw_fd());
        self.register(CALL, place, call);
    }

    fn register(&mut self, first: u32, place: usize, fd: RawFd) -> bool {
        self.pair.count_syscalls(place, 1);
        let at = first.saturating_add(u32::try_from(place).unwrap_or(0));
        match self.uring.submitter().register_files_update(at, &[fd]) {
            Ok(_) => true,
            Err(e) => {
                log::warn!("io_uring: cannot register a descriptor of the front-end: {e}");
                false
            }
        }
    }
}

fn poll(file: u32, events: libc::c_short) -> opcode::PollAdd {
    opcode::PollAdd::new(types::Fixed(file), u32::from(events.unsigned_abs()))
}

/// Pushes an entry, submitting what is there if there is no room.
fn push(uring: &mut IoUring, entry: &squeue::Entry) {
    let entry = entry.clone().flags(squeue::Flags::FIXED_FILE);
    // Entries are taken at once; with all of them full, a second try has room.
    for _ in 0..2 {
        // SAFETY: an entry's segments lie in guest memory that the pair's rings keep mapped,
        // or in the inbox, and these, and the lists of segments, stay as they are until
        // nothing is under way (run).
        if unsafe { uring.submission().push(&entry) }.is_ok() {
            return;
        }
        if let Err(e) = enter(uring, 0, None) {
            give_up(&e);
        }
    }
    give_up(&io::Error::other("the ring takes no entries"));
}

fn enter(uring: &mut IoUring, want: usize, nap: Option<Duration>) -> io::Result<()> {
    loop {
        let waiting = {
            let mut queue = uring.submission();
            queue.sync();
            queue.len()
        };
        let done = match nap {
            None => {
                const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS
                let submit = u32::try_from(waiting).unwrap_or(u32::MAX);
                let want = u32::try_from(want).unwrap_or(u32::MAX);
                // SAFETY: no argument structure is passed; the entries are sound (push).
                unsafe {
                    uring
                        .submitter()
                        .enter::<libc::sigset_t>(submit, want, GETEVENTS, None)
                }
            }
            Some(nap) => {
                let time = types::Timespec::new()
                    .sec(nap.as_secs())
                    .nsec(nap.subsec_nanos());
                let args = types::SubmitArgs::new().timespec(&time);
                uring.submitter().submit_with_args(want, &args)
            }
        };
        match done {
            Ok(n) if n < waiting => {}
            Ok(_) => return Ok(()),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME) => return Ok(()),
                // Completions must be taken first, or the kernel is short of memory for a
                // moment: what was not submitted stays in the ring for the next turn.
                Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                _ => return Err(e),
            },
        }
    }
}

/// The ring itself fails: nothing can be served any more.
fn give_up(why: &io::Error) -> ! {
    log::error!("io_uring_enter: {why}; the process ends");
    sys::exit(1)
}

const _: () = assert!(BATCH + SLOTS + 8 * PLACES <= ENTRIES as usize);
