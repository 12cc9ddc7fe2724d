//! The engine for hosts without io_uring: one frame at a time by read(2) and write(2), kicks,
//! orders and the tap by ppoll.
//!
//! Frames that lie in several pieces are gathered in private memory first, so that one policy
//! can do without readv and writev. Runs on the worker thread of a pair.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_runtime::clock;
use bulkhead_runtime::sys::{self, PollFd};

use crate::pair::{PLACES, Pair, Serving};
use crate::receive::Delivery;
use crate::tap::MAX_FRAME;
use crate::tap_ioctl;
use crate::transmit::Segment;

/// Frames read before the other rings are looked at.
const READS: usize = 64;
/// Room for a frame that is too long, to be seen as such.
const BUFFER: usize = MAX_FRAME + 64;
/// Shortest time to sleep for a limit.
const NAP: Duration = Duration::from_millis(1);
/// When to look again at a tap that cannot be read: poll would say "readable" at once.
const RETRY: Duration = Duration::from_secs(1);

/// What the thread must wait for.
#[derive(Default)]
struct Wait {
    /// There may be more to do at once.
    busy: bool,
    /// Frames in the tap.
    readable: bool,
    /// Room in the tap.
    writable: bool,
    /// A limit.
    nap: Option<Duration>,
}

impl Wait {
    fn nap(&mut self, wait: Duration) {
        let wait = wait.max(NAP);
        self.nap = Some(self.nap.map_or(wait, |nap| nap.min(wait)));
    }
}

/// The engine of one thread.
pub struct Engine {
    pair: Pair,
    /// The frame that was read last, and its length if it is not delivered yet.
    frame: Vec<u8>,
    pending: Option<usize>,
    /// A frame in one piece, on its way to the tap.
    gathered: Vec<u8>,
}

impl Engine {
    /// An engine for this pair.
    pub fn new(pair: Pair) -> Self {
        let moves_frames = pair.kernel.is_none();
        let buffer = |len| vec![0; if moves_frames { len } else { 0 }];
        Self {
            frame: buffer(BUFFER),
            pending: None,
            gathered: buffer(MAX_FRAME),
            pair,
        }
    }

    /// Serves the pair for ever.
    pub fn run(mut self) -> ! {
        loop {
            let mut wait = Wait::default();
            if let Some(control) = self.pair.control() {
                wait.busy |= control.serve() || control.ring().enable_kicks();
            }
            self.transmit(&mut wait);
            self.receive(&mut wait);
            self.pair.settle_kernel();
            self.sleep(&wait);
        }
    }

    fn transmit(&mut self, wait: &mut Wait) {
        let state = Arc::clone(&self.pair.state);
        let Some(queue) = state.tap().queue(self.pair.number) else {
            return;
        };
        let Some(half) = self.pair.transmit() else {
            return;
        };
        half.ring().disable_kicks();
        half.fill(clock::now);
        let mut calls = 0;
        for number in 0..half.count() {
            let Some(segments) = half.waiting(number) else {
                continue;
            };
            let result = write(queue.file(), segments, &mut self.gathered);
            calls += 1;
            half.answered(number, result);
            if result == -libc::EAGAIN {
                break;
            }
        }
        wait.writable = half.settle();
        half.ring().flush();
        if let Some(held) = half.held() {
            wait.nap(held);
        } else if !wait.writable {
            wait.busy |= half.ring().enable_kicks();
        }
        self.pair.count_syscalls(1, calls);
    }

    fn receive(&mut self, wait: &mut Wait) {
        if !self.pair.is_receiving() {
            if self.pair.receive().is_none() {
                self.pending = None;
            }
            return;
        }
        let state = Arc::clone(&self.pair.state);
        let Some(queue) = state.tap().queue(self.pair.number) else {
            return;
        };
        let Some(half) = self.pair.receive() else {
            return;
        };
        half.ring().disable_kicks();
        let (mut calls, mut failed) = (0, false);
        for _ in 0..READS {
            if self.pending.is_none() {
                calls += 1;
                let got = tap_ioctl::read(queue.file(), &mut self.frame);
                match usize::try_from(got) {
                    Ok(len) => self.pending = Some(len),
                    Err(_) if got == -libc::EAGAIN => break,
                    Err(_) => {
                        half.failed(got.wrapping_neg());
                        failed = true;
                        break;
                    }
                }
            }
            let len = self.pending.unwrap_or(0);
            let Some(frame) = self.frame.get_mut(..len) else {
                self.pending = None;
                continue;
            };
            match half.deliver(frame, clock::now) {
                Delivery::Done => self.pending = None,
                Delivery::NoBuffers => break,
                Delivery::Held(time) => {
                    wait.nap(time);
                    break;
                }
            }
        }
        half.ring().flush();
        wait.readable = self.pending.is_none() && !failed;
        if failed {
            wait.nap(RETRY);
        }
        self.pair.count_syscalls(0, calls);
    }

    /// Sleeps until there is something to do, or only looks; then obeys orders.
    fn sleep(&mut self, wait: &Wait) {
        self.pair.falls_asleep();
        self.pair.count_syscalls(0, 1);
        let mut events = 0;
        if wait.readable {
            events |= libc::POLLIN;
        }
        if wait.writable {
            events |= libc::POLLOUT;
        }
        let state = Arc::clone(&self.pair.state);
        let tap = match state.tap().queue(self.pair.number) {
            Some(queue) if events != 0 => PollFd::new(queue.file().as_fd(), events),
            _ => PollFd::none(),
        };
        let mut wakeups = [PollFd::none(); PLACES];
        let mut kicks = [PollFd::none(); PLACES];
        let mut kick_files: [Option<Arc<File>>; PLACES] = [None, None];
        for (i, place) in self.pair.places.iter_mut().enumerate() {
            if let Some(fd) = wakeups.get_mut(i) {
                *fd = PollFd::new(place.port.wakeup().as_fd(), libc::POLLIN);
            }
            let ring = place.serving.as_mut().and_then(Serving::ring);
            if let Some(ring) = ring.filter(|ring| !ring.is_broken())
                && let Some(file) = kick_files.get_mut(i)
            {
                *file = Some(Arc::clone(ring.kick()));
            }
        }
        let mut errors = [PollFd::none(); PLACES];
        if let Some(kernel) = &self.pair.kernel {
            for (i, fd) in errors.iter_mut().enumerate() {
                if let Some(file) = kernel.error(i) {
                    *fd = PollFd::new(file.as_fd(), libc::POLLIN);
                }
            }
        }
        for (fd, file) in kicks.iter_mut().zip(&kick_files) {
            if let Some(file) = file {
                *fd = PollFd::new(file.as_fd(), libc::POLLIN);
            }
        }
        let [w0, w1] = wakeups;
        let [k0, k1] = kicks;
        let [e0, e1] = errors;
        let mut fds = [w0, w1, k0, k1, e0, e1, tap];
        let timeout = match (wait.busy, wait.nap) {
            (true, _) => 0,
            (false, None) => -1,
            (false, Some(nap)) => i32::try_from(nap.as_millis()).unwrap_or(i32::MAX),
        };
        // An error (short of memory) makes this a busy loop, no worse.
        let _ = sys::poll(&mut fds, timeout);
        self.pair.wakes();
        let [w0, w1, k0, k1, e0, e1, _] = fds;
        for (ring, fd) in [e0, e1].iter().enumerate() {
            if fd.revents() != 0 {
                self.pair.kernel_found_an_error(ring);
            }
        }
        for (place, (fd, file)) in [k0, k1].iter().zip(kick_files).enumerate() {
            if let Some(file) = file
                && fd.revents() != 0
            {
                self.kicked(place, fd.revents(), &file);
            }
        }
        for (place, fd) in [w0, w1].iter().enumerate() {
            if fd.revents() != 0 {
                self.pair.obey(place);
            }
        }
    }

    fn kicked(&mut self, place: usize, revents: i16, mut kick: &File) {
        self.pair.count_kick(place);
        self.pair.count_syscalls(place, 1);
        let mut count = [0; 8];
        if revents & libc::POLLIN != 0 && matches!(kick.read(&mut count), Ok(8)) {
            return;
        }
        if let Some(ring) = self.pair.ring(place) {
            ring.break_because(&"the kick descriptor is no eventfd");
        }
    }
}

fn write(file: &File, segments: &[Segment], gathered: &mut [u8]) -> i32 {
    if let [one] = segments {
        return tap_ioctl::write_segment(file, one);
    }
    let mut at = 0usize;
    for segment in segments {
        if let Some(rest) = gathered.get_mut(at..) {
            at = at.saturating_add(tap_ioctl::gather(segment, rest));
        }
    }
    tap_ioctl::write(file, gathered.get(..at).unwrap_or_default())
}
