//! A thread's ring in io_uring: what the engine asks of the kernel, as entries, and what comes
//! back, as [`Event`]s.
//!
//! Writes and batches of reads carry RWF_NOWAIT: the kernel ends them while it takes them, and
//! [`FrameRing::turn`] does not return before all of them have ended. What may stay under way
//! between two turns are polls, which hold no memory, and one read into memory of the ring's
//! own. Guest memory is never registered as buffers.
//!
//! Made and used by the worker thread of a pair; the ring is bound to it.

#![allow(unsafe_code)] // entries whose memory must outlive the operation

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use bulkhead_runtime::sys;
use bulkhead_seccomp::uring::{self, RestrictedRing, RingSpec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::pair::PLACES;
use crate::tap::{MAX_FRAME, Tap};
use crate::transmit::{BATCH, Segment};

/// Submission entries: a batch both ways, polls and interrupts.
const ENTRIES: u32 = 128;
/// Most frames read at once.
pub const SLOTS: usize = 32;
/// Room for a frame, and for one that is too long to be seen as such.
const SLOT: usize = MAX_FRAME + 64;

// Registered files; those of a place lie one after another.
const TAP: types::Fixed = types::Fixed(0);
const WAKEUP: u32 = 1;
const KICK: u32 = WAKEUP + PLACES as u32;
const CALL: u32 = KICK + PLACES as u32;
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
/// slot, a place, or a place and its kick's generation.
const TAG_WRITE: u32 = 0;
const TAG_READ: u32 = 1;
const TAG_FIRST: u32 = 2;
const TAG_KICK: u32 = 3;
const TAG_WAKEUP: u32 = 4;
const TAG_WRITABLE: u32 = 5;
const TAG_OTHER: u32 = 6;

/// What is written to an eventfd.
static ONE: u64 = 1;

/// Something that has ended, or happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The tap's answer for the frame of that number: a length, or a negative errno.
    Written(usize, i32),
    /// The tap's answer for a read into that slot.
    Read(usize, i32),
    /// The answer for the read that waits for a frame, in slot 0.
    First(i32),
    /// The kick of a place, of that generation, with the poll's result, and whether it goes on.
    Kick {
        /// Which place.
        place: usize,
        /// Counts its kicks' descriptors.
        generation: u32,
        /// The poll's result.
        result: i32,
        /// The poll goes on.
        more: bool,
    },
    /// The mailbox of a place, and whether its poll goes on.
    Wakeup(usize, bool),
    /// The tap may have room.
    Writable,
}

/// The ring, and memory for frames that come.
pub struct FrameRing {
    uring: IoUring,
    /// Completions of what went well can be left out.
    quiet: bool,
    slots: Vec<u8>,
    /// Reads and writes without waiting that the kernel has not answered.
    under_way: usize,
    /// The read into slot 0 that waits.
    first: bool,
    /// Times that the kernel was entered.
    entered: u64,
}

fn user_data(tag: u32, value: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

/// A kick's poll: the generation in the upper, the place in the lower bits.
fn kick_data(place: usize, generation: u32) -> u64 {
    user_data(TAG_KICK, generation << 8 | place as u32 & 0xff)
}

fn read_entry(slot: &mut [u8], flags: i32) -> squeue::Entry {
    let len = u32::try_from(slot.len()).unwrap_or(0);
    opcode::Read::new(TAP, slot.as_mut_ptr(), len)
        .rw_flags(flags)
        .build()
        .flags(squeue::Flags::FIXED_FILE)
}

fn write_entry(segments: &[Segment]) -> squeue::Entry {
    let entry = match segments {
        [one] => {
            let len = u32::try_from(one.len()).unwrap_or(0);
            opcode::Write::new(TAP, one.start(), len)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
        several => {
            let count = u32::try_from(several.len()).unwrap_or(0);
            opcode::Writev::new(TAP, Segment::list(several), count)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
        }
    };
    entry.flags(squeue::Flags::FIXED_FILE)
}

/// Whether the tap can be read and written by a ring without waiting.
///
/// # Errors
/// In one line why not: the kernel is too old, or io_uring is not to be had.
pub fn supported(tap: &Tap) -> Result<(), String> {
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
    let read = read_entry(&mut frame, libc::RWF_NOWAIT);
    // SAFETY: the buffer lives until the read has been answered, below.
    let pushed = unsafe { ring.submission().push(&read) };
    pushed.map_err(|e| e.to_string())?;
    let waited = ring.submit_and_wait(1);
    match ring.completion().next().map(|c| c.result()) {
        // A frame that was there is lost, as frames are before there is a guest.
        Some(n) if n >= 0 || n == -libc::EAGAIN => Ok(()),
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
            Err(format!(
                "io_uring: a read of the tap does not end: {waited:?}"
            ))
        }
    }
}

impl FrameRing {
    /// The attempt of a hostile build on the ring, if one is due.
    #[cfg(feature = "hostile")]
    pub fn strike(&mut self) {
        bulkhead_runtime::hostile::strike_ring(&mut self.uring, &OPCODES);
    }

    /// A ring for this tap, if there is one, and the mailboxes of the places. Before
    /// confinement. The fence, if there is one, stands until the ring is gone.
    ///
    /// # Errors
    /// In one line, what the kernel refused.
    pub fn new(
        tap: Option<RawFd>,
        wakeups: [Option<RawFd>; PLACES],
        fence: Option<OwnedFd>,
    ) -> Result<Self, String> {
        let mut files = vec![tap.unwrap_or(-1)];
        files.extend(wakeups.map(|fd| fd.unwrap_or(-1)));
        files.resize(FENCE, -1);
        files.extend(fence.as_ref().map(AsRawFd::as_raw_fd));
        let RestrictedRing { ring, quiet, .. } = uring::restricted(&RingSpec {
            entries: ENTRIES,
            opcodes: &OPCODES,
            files: &files,
            spare_files: 0,
        })
        .map_err(|e| e.to_string())?;
        Ok(Self {
            uring: ring,
            quiet,
            slots: vec![0; if tap.is_some() { SLOTS * SLOT } else { 0 }],
            under_way: 0,
            first: false,
            entered: 0,
        })
    }

    /// A slot's memory. That of slot 0 is not to be looked at while a read waits for it.
    pub fn slot(&mut self, number: usize) -> Option<&mut [u8]> {
        if number == 0 && self.first {
            return None;
        }
        self.slots.chunks_exact_mut(SLOT).nth(number)
    }

    /// Times that the kernel was entered since the last call.
    pub fn take_entered(&mut self) -> u64 {
        std::mem::take(&mut self.entered)
    }

    /// Watches the mailbox of a place.
    pub fn watch_wakeup(&mut self, place: usize) {
        let poll = poll(WAKEUP, place, libc::POLLIN).multi(true).build();
        self.push(poll.user_data(user_data(TAG_WAKEUP, place as u32)));
    }

    /// Watches the kick of a place.
    pub fn watch_kick(&mut self, place: usize, generation: u32) {
        let poll = poll(KICK, place, libc::POLLIN).multi(true).build();
        self.push(poll.user_data(kick_data(place, generation)));
    }

    /// Watches a kick no more.
    pub fn forget_kick(&mut self, place: usize, generation: u32) {
        let cancel = opcode::AsyncCancel::new(kick_data(place, generation)).build();
        self.push(cancel.user_data(user_data(TAG_OTHER, 0)));
        self.enter(0, None);
    }

    /// Waits for room in the tap.
    pub fn watch_writable(&mut self) {
        let poll = opcode::PollAdd::new(TAP, libc::POLLOUT as u32).build();
        self.push(poll.user_data(user_data(TAG_WRITABLE, 0)));
    }

    /// Sends the interrupt of a place, with the next entry.
    pub fn interrupt(&mut self, place: usize) {
        let call = types::Fixed(CALL.saturating_add(place as u32));
        let entry = opcode::Write::new(call, std::ptr::from_ref(&ONE).cast(), 8).build();
        let entry = entry.user_data(user_data(TAG_OTHER, 0));
        if self.quiet {
            self.push_flagged(entry, squeue::Flags::SKIP_SUCCESS);
        } else {
            self.push(entry);
        }
    }

    /// Reads the next frame into slot 0, whenever it comes.
    pub fn read_first(&mut self) {
        if self.first {
            return;
        }
        let Some(slot) = self.slots.get_mut(..SLOT) else {
            return;
        };
        // Without RWF_NOWAIT the kernel waits for the tap by itself.
        let entry = read_entry(slot, 0);
        self.first = true;
        self.push(entry.user_data(user_data(TAG_FIRST, 0)));
    }

    /// Whether a read waits for a frame.
    pub fn waits_for_frame(&self) -> bool {
        self.first
    }

    /// Registers the kick or the call of a place, or lets it go.
    fn register(&mut self, first: u32, place: usize, fd: Option<RawFd>) -> io::Result<()> {
        self.entered += 1;
        let at = first.saturating_add(place as u32);
        let submitter = self.uring.submitter();
        submitter.register_files_update(at, &[fd.unwrap_or(-1)])?;
        Ok(())
    }

    /// The kick of a place from now on.
    ///
    /// # Errors
    /// It cannot be registered.
    pub fn set_kick(&mut self, place: usize, fd: Option<RawFd>) -> io::Result<()> {
        self.register(KICK, place, fd)
    }

    /// The call of a place from now on.
    ///
    /// # Errors
    /// It cannot be registered.
    pub fn set_call(&mut self, place: usize, fd: Option<RawFd>) -> io::Result<()> {
        self.register(CALL, place, fd)
    }

    /// One turn: writes these frames, reads up to so many into the slots from 0 on, and does
    /// what else was asked for; with nothing to read or write, and if it may, sleeps until
    /// something happens or the nap is over. All reads and writes of this turn have ended then.
    pub fn turn<'a>(
        &mut self,
        frames: impl Iterator<Item = (usize, &'a [Segment])>,
        reads: usize,
        sleep: bool,
        nap: Option<Duration>,
        events: &mut Vec<Event>,
    ) {
        for (number, segments) in frames {
            let entry = write_entry(segments);
            self.under_way += 1;
            self.push_raw(&entry.user_data(user_data(TAG_WRITE, number as u32)));
        }
        debug_assert!(reads == 0 || !self.first);
        for number in 0..reads.min(SLOTS) {
            let Some(slot) = self.slots.chunks_exact_mut(SLOT).nth(number) else {
                break;
            };
            let entry = read_entry(slot, libc::RWF_NOWAIT);
            self.under_way += 1;
            self.push_raw(&entry.user_data(user_data(TAG_READ, number as u32)));
        }
        let want = if self.under_way > 0 {
            self.under_way
        } else {
            usize::from(sleep)
        };
        self.enter(want, nap);
        self.collect(events);
        while self.under_way > 0 {
            self.enter(1, None);
            self.collect(events);
        }
    }

    fn collect(&mut self, events: &mut Vec<Event>) {
        for completion in self.uring.completion() {
            let (data, result) = (completion.user_data(), completion.result());
            let value = data as u32;
            let more = cqueue::more(completion.flags());
            events.push(match (data >> 32) as u32 {
                TAG_WRITE => {
                    self.under_way = self.under_way.saturating_sub(1);
                    Event::Written(value as usize, result)
                }
                TAG_READ => {
                    self.under_way = self.under_way.saturating_sub(1);
                    Event::Read(value as usize, result)
                }
                TAG_FIRST => {
                    self.first = false;
                    Event::First(result)
                }
                TAG_KICK => Event::Kick {
                    place: (value & 0xff) as usize,
                    generation: value >> 8,
                    result,
                    more,
                },
                TAG_WAKEUP => Event::Wakeup(value as usize, more),
                TAG_WRITABLE => Event::Writable,
                // An interrupt, the cancelled poll of an old kick, or the cancellation itself.
                _ => continue,
            });
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        self.push_raw(&entry.flags(squeue::Flags::FIXED_FILE));
    }

    fn push_flagged(&mut self, entry: squeue::Entry, flags: squeue::Flags) {
        self.push_raw(&entry.flags(squeue::Flags::FIXED_FILE | flags));
    }

    /// Pushes an entry, submitting what is there if there is no room.
    fn push_raw(&mut self, entry: &squeue::Entry) {
        // Entries are taken at once; with all of them full, a second try has room.
        for _ in 0..2 {
            // SAFETY: polls and cancellations hold numbers only, an interrupt a static. A
            // frame's segments lie in guest memory, and in a list, that `turn` borrows from
            // the half of the pair that keeps them; a slot is this ring's own. Neither is
            // touched until the kernel has answered: turn does not return before, and the
            // slot of a read that waits is not lent (slot), nor moved, as the vector of slots
            // never grows. The ring's own end comes only with the process.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(0, None);
        }
        give_up(&io::Error::other("the ring takes no entries"));
    }

    /// Submits, and waits for at least `want` completions or until the nap is over.
    fn enter(&mut self, want: usize, nap: Option<Duration>) {
        loop {
            self.entered += 1;
            let waiting = {
                let mut queue = self.uring.submission();
                queue.sync();
                queue.len()
            };
            let done = match nap {
                None => {
                    const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS
                    let submit = u32::try_from(waiting).unwrap_or(u32::MAX);
                    let want = u32::try_from(want).unwrap_or(u32::MAX);
                    // SAFETY: no argument structure is passed; the entries are sound
                    // (push_raw).
                    unsafe {
                        self.uring
                            .submitter()
                            .enter::<libc::sigset_t>(submit, want, GETEVENTS, None)
                    }
                }
                Some(nap) => {
                    let time = types::Timespec::new()
                        .sec(nap.as_secs())
                        .nsec(nap.subsec_nanos());
                    let args = types::SubmitArgs::new().timespec(&time);
                    self.uring.submitter().submit_with_args(want, &args)
                }
            };
            match done {
                Ok(n) if n < waiting => {}
                Ok(_) => return,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR | libc::ETIME) => return,
                    // Completions must be taken first, or the kernel is short of memory for a
                    // moment: what was not submitted stays in the ring for the next turn.
                    Some(libc::EBUSY | libc::EAGAIN) => return,
                    _ => give_up(&e),
                },
            }
        }
    }
}

fn poll(first: u32, place: usize, events: libc::c_short) -> opcode::PollAdd {
    let file = first.saturating_add(place as u32);
    opcode::PollAdd::new(types::Fixed(file), u32::from(events.unsigned_abs()))
}

/// The ring itself fails: nothing can be served any more.
fn give_up(why: &io::Error) -> ! {
    log::error!("io_uring_enter: {why}; the process ends");
    sys::exit(1)
}

const _: () = assert!(BATCH + SLOTS + 8 * PLACES <= ENTRIES as usize);
