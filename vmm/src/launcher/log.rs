//! What device processes say on their stderr: a pipe each, of which whole lines are passed
//! on to the launcher's stderr, prefixed with the device's id, control characters escaped,
//! bounded in length and rate. A device that floods is first cut short, then no longer read,
//! so that its own writes wait; it never costs the launcher more than a bounded share.
//!
//! Runs on the launcher's only thread; nothing here blocks.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{printable, sys};

/// Longest line passed on, bytes; the rest of it is dropped.
const MAX_LINE: usize = 512;
/// Passed on at once, and per second after that, bytes.
const PASS: (u32, u32) = (32 * 1024, 4 * 1024);
/// Read at once, and per second after that, bytes.
const READ: (u32, u32) = (1024 * 1024, 256 * 1024);

/// How long what a new helper says is held back: of one that ends by then the last line is told
/// with its end, by whoever knows whether that is news.
const HOLD: Duration = Duration::from_secs(2);
/// What a helper says though nothing is the matter: passt looks for its build for AVX2 beside its
/// program, and is executed where nothing is; where that build is installed it was chosen already.
const EXPECTED: &str = "Can't run AVX2 build";
/// Most lines that are held back.
const MAX_HELD: usize = 16;

/// A token bucket in bytes.
#[derive(Debug)]
struct Bucket {
    size: u32,
    per_second: u32,
    left: u32,
    filled: Instant,
}

impl Bucket {
    fn new((size, per_second): (u32, u32), now: Instant) -> Self {
        Self {
            size,
            per_second,
            left: size,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let millis = now.saturating_duration_since(self.filled).as_millis();
        let fresh = millis.saturating_mul(self.per_second.into()) / 1000;
        if fresh > 0 {
            self.left = u32::try_from(fresh)
                .unwrap_or(u32::MAX)
                .saturating_add(self.left)
                .min(self.size);
            self.filled = now;
        }
    }

    fn take(&mut self, bytes: usize) -> bool {
        match u32::try_from(bytes)
            .ok()
            .and_then(|b| self.left.checked_sub(b))
        {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// One device's pipe.
#[derive(Debug)]
pub struct LogSource {
    id: String,
    pipe: Option<OwnedFd>,
    line: Vec<u8>,
    /// The last line that was not empty, as it would be passed on.
    last: String,
    pass: Bucket,
    read: Bucket,
    dropped: u64,
    /// Until when lines are held back, and those that are.
    held: Option<(Instant, Vec<String>)>,
    /// Of a helper.
    helper: bool,
}

impl LogSource {
    /// The read end of the pipe of device `id`, made non-blocking.
    pub fn new(id: &str, pipe: OwnedFd) -> io::Result<Self> {
        sys::set_nonblocking(pipe.as_fd())?;
        let now = Instant::now();
        Ok(Self {
            id: id.to_owned(),
            pipe: Some(pipe),
            line: Vec::new(),
            last: String::new(),
            pass: Bucket::new(PASS, now),
            read: Bucket::new(READ, now),
            dropped: 0,
            held: None,
            helper: false,
        })
    }

    /// The same of a helper: what it says at its start is held back for a moment.
    #[must_use]
    pub fn holding(mut self) -> Self {
        let until = Instant::now().checked_add(HOLD);
        self.held = until.map(|until| (until, Vec::new()));
        self.helper = true;
        self
    }

    /// What to poll for input: nothing after the end, nor while the device is over its rate.
    pub fn wants(&self) -> Option<BorrowedFd<'_>> {
        (self.read.left > 0)
            .then(|| self.pipe.as_ref().map(AsFd::as_fd))
            .flatten()
    }

    /// Whether it is over its rate, or holds lines back: look again in a while.
    pub fn waits(&self) -> bool {
        let holds = self.held.as_ref().is_some_and(|(_, held)| !held.is_empty());
        self.pipe.is_some() && (self.read.left == 0 || holds)
    }

    /// Fills the buckets, and passes on what was held back long enough; to be called on every
    /// turn of the loop.
    pub fn tick(&mut self, now: Instant, sink: &mut Sink) {
        self.read.fill(now);
        self.pass.fill(now);
        let Some((_, held)) = self.held.take_if(|(until, _)| *until <= now) else {
            return;
        };
        // What there was no room for came after what is held.
        let dropped = std::mem::take(&mut self.dropped);
        for text in held {
            self.pass_on(&text, sink);
        }
        self.dropped = self.dropped.saturating_add(dropped);
        self.report_dropped(sink);
    }

    /// The last line that said something.
    pub fn last_line(&self) -> &str {
        &self.last
    }

    /// Reads once and passes whole lines on.
    pub fn on_readable(&mut self, sink: &mut Sink) {
        // The loop may have slept since it looked.
        self.tick(Instant::now(), sink);
        let mut buffer = [0; 4096];
        let Some(pipe) = &self.pipe else { return };
        match sys::read(pipe.as_fd(), &mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                let count = count.min(buffer.len());
                self.read.left = self
                    .read
                    .left
                    .saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
                self.take_bytes(buffer.get(..count).unwrap_or_default(), sink);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.pipe = None,
        }
    }

    /// The device has ended: what is left in its pipe, and what was dropped.
    pub fn finish(&mut self, sink: &mut Sink) {
        self.tick(Instant::now(), sink);
        // A pipe holds 64 KiB by default and 1 MiB at most.
        for _ in 0..256 {
            let ready = self.pipe.as_ref().is_some_and(|pipe| {
                sys::poll(&[(pipe.as_fd(), libc::POLLIN)], Some(Instant::now()))
                    .is_ok_and(|revents| revents.iter().any(|r| *r != 0))
            });
            if !ready {
                break;
            }
            self.on_readable(sink);
        }
        if !self.line.is_empty() {
            self.end_line(sink);
        }
        self.pipe = None;
        if self.held.take().is_none() {
            self.report_dropped(sink);
        }
    }

    fn take_bytes(&mut self, bytes: &[u8], sink: &mut Sink) {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(sink),
                byte if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self, sink: &mut Sink) {
        let text = printable(&String::from_utf8_lossy(&self.line));
        self.line.clear();
        if self.helper && text.starts_with(EXPECTED) {
            return;
        }
        match &mut self.held {
            Some((_, held)) if held.len() < MAX_HELD => held.push(text.clone()),
            Some(_) => self.dropped = self.dropped.saturating_add(1),
            None => self.pass_on(&text, sink),
        }
        if !text.trim().is_empty() {
            self.last = text;
        }
    }

    fn pass_on(&mut self, text: &str, sink: &mut Sink) {
        if self.pass.take(text.len().saturating_add(self.id.len())) {
            self.report_dropped(sink);
            sink.line(&self.id, text);
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    fn report_dropped(&mut self, sink: &mut Sink) {
        if self.dropped > 0 {
            sink.line(
                &self.id,
                &format!("({} lines dropped: too many)", self.dropped),
            );
            self.dropped = 0;
        }
    }
}

/// The launcher's stderr, written without ever waiting for who reads it.
pub struct Sink(Target);

enum Target {
    /// A description of its own, non-blocking.
    File(std::fs::File),
    Socket(UnixStream),
    /// Shared with the VMM; a regular file never makes a writer wait.
    Inherited,
    #[cfg(test)]
    Memory(Vec<String>),
}

impl Sink {
    /// Over the inherited stderr. O_NONBLOCK set on it would be the VMM's too, so that a pipe
    /// or a terminal is opened anew.
    pub fn stderr() -> Self {
        let kind = std::fs::metadata("/proc/self/fd/2").map(|m| m.file_type());
        let target = match kind {
            Ok(kind) if kind.is_fifo() || kind.is_char_device() => OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open("/proc/self/fd/2")
                .map_or(Target::Inherited, Target::File),
            Ok(kind) if kind.is_socket() => sys::standard_fd(2)
                .try_clone_to_owned()
                .map_or(Target::Inherited, |fd| Target::Socket(fd.into())),
            _ => Target::Inherited,
        };
        Self(target)
    }

    /// Writes `id: text` as one line, or drops it where the reader is too slow.
    pub fn line(&mut self, id: &str, text: &str) {
        let line = format!("{id}: {text}\n");
        // Whoever reads stderr being slow or gone must not matter to the VM.
        let _ = match &mut self.0 {
            Target::File(file) => file.write(line.as_bytes()),
            Target::Socket(socket) => {
                bulkhead_proto::sys::send(socket.as_fd(), line.as_bytes()).map(|n| n.unwrap_or(0))
            }
            Target::Inherited => {
                let stderr = sys::standard_fd(2);
                let ready = sys::poll(&[(stderr, libc::POLLOUT)], Some(Instant::now()));
                match ready {
                    Ok(revents) if revents.iter().any(|r| r & libc::POLLOUT != 0) => {
                        sys::write(stderr, line.as_bytes())
                    }
                    _ => Ok(0),
                }
            }
            #[cfg(test)]
            Target::Memory(lines) => {
                lines.push(line);
                Ok(0)
            }
        };
    }
}

/// How long the loop may sleep while a device is over its rate.
pub const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (LogSource, OwnedFd, Sink) {
        let (read, write) = sys::pipe().unwrap();
        (
            LogSource::new("disk0", read).unwrap(),
            write,
            Sink(Target::Memory(Vec::new())),
        )
    }

    fn lines(sink: &Sink) -> &[String] {
        match &sink.0 {
            Target::Memory(lines) => lines,
            _ => &[],
        }
    }

    #[test]
    fn lines_are_prefixed_escaped_and_cut() {
        let (mut source, write, mut sink) = source();
        let long = "x".repeat(MAX_LINE + 100);
        let said = format!("a\u{1b}[2Jb\rc\n{long}\n\ntail");
        assert_eq!(
            sys::write(write.as_fd(), said.as_bytes()).unwrap(),
            said.len()
        );
        drop(write);
        source.on_readable(&mut sink);
        assert_eq!(lines(&sink).len(), 3);
        source.finish(&mut sink);
        let cut = "x".repeat(MAX_LINE);
        assert_eq!(source.last_line(), "tail");
        assert_eq!(
            lines(&sink),
            [
                "disk0: a\\u{1b}[2Jb\\rc\n",
                &format!("disk0: {cut}\n"),
                "disk0: \n",
                "disk0: tail\n"
            ]
        );
        assert!(source.wants().is_none());
    }

    #[test]
    fn what_a_helper_says_at_its_start_is_told_with_its_end_or_a_little_later() {
        let said = |lives: bool| {
            let (source, write, mut sink) = source();
            let mut source = source.holding();
            sys::write(write.as_fd(), b"one\ntwo\n").unwrap();
            source.on_readable(&mut sink);
            assert!(source.waits() && lines(&sink).is_empty());
            if lives {
                source.tick(Instant::now() + HOLD, &mut sink);
                assert!(!source.waits());
            }
            sys::write(write.as_fd(), b"three\n").unwrap();
            source.finish(&mut sink);
            assert_eq!(source.last_line(), "three");
            lines(&sink).concat()
        };
        assert_eq!(said(false), "");
        assert_eq!(said(true), "disk0: one\ndisk0: two\ndisk0: three\n");
    }

    #[test]
    fn a_passt_of_which_nothing_is_the_matter_says_nothing() {
        let (source, write, mut sink) = source();
        let mut source = source.holding();
        let said = "Can't run AVX2 build, using non-AVX2 version: No such file or directory\nx\n";
        sys::write(write.as_fd(), said.as_bytes()).unwrap();
        source.on_readable(&mut sink);
        source.tick(Instant::now() + HOLD, &mut sink);
        assert_eq!(lines(&sink), ["disk0: x\n"]);
    }

    #[test]
    fn the_last_words_of_a_helper_that_lived_long_are_passed_on() {
        let said = |line: &str, count: usize| {
            let (source, write, mut sink) = source();
            let mut source = source.holding();
            let before = line.repeat(count);
            sys::write(write.as_fd(), before.as_bytes()).unwrap();
            if count > 0 {
                source.on_readable(&mut sink);
            }
            // Hours later, and nothing was to be done meanwhile: nobody has looked at the clock.
            source.held.as_mut().unwrap().0 = Instant::now();
            sys::write(write.as_fd(), b"two\nthree\n").unwrap();
            source.finish(&mut sink);
            lines(&sink).to_vec()
        };
        let last = ["disk0: two\n", "disk0: three\n"];
        assert_eq!(said("", 0), last);
        let got = said("one\n", MAX_HELD + 2);
        let (held, rest) = got.split_at(MAX_HELD);
        assert!(held.iter().all(|line| line == "disk0: one\n"), "{got:?}");
        assert_eq!(rest[0], "disk0: (2 lines dropped: too many)\n");
        assert_eq!(rest[1..], last);
    }

    #[test]
    fn a_flood_is_cut_short_and_then_no_longer_read() {
        let (mut source, write, mut sink) = source();
        let start = Instant::now();
        source.pass.filled = start;
        source.read.filled = start;
        let chunk = [b"y".repeat(99).as_slice(), b"\n"].concat().repeat(40);
        let mut written = 0usize;
        while source.wants().is_some() {
            written += sys::write(write.as_fd(), &chunk).unwrap();
            source.on_readable(&mut sink);
            assert!(written < 2 * READ.0 as usize);
        }
        assert!(source.waits());
        let passed: usize = lines(&sink).iter().map(String::len).sum();
        assert!(passed <= 2 * PASS.0 as usize, "{passed}");
        // A second later it may go on, and says what is missing. The loop may have taken longer.
        source.tick(Instant::now() + Duration::from_secs(1), &mut sink);
        assert!(source.wants().is_some());
        sys::write(write.as_fd(), b"z\n").unwrap();
        source.finish(&mut sink);
        assert!(lines(&sink).iter().any(|l| l.contains("lines dropped")));
    }
}
