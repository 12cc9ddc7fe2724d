//! Log lines on standard error, one line each: `bulkhead: LEVEL: text`. The level comes
//! from `--log` (error, warn, info, debug; default warn).
//!
//! Nobody waits for who reads them, as far as that can be had: a pipe or a terminal is opened
//! anew, non-blocking, so that whoever shares it is not told so too; a regular file makes no
//! writer wait; a socket has no second description, and its reader is waited for.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

/// Lines for which there was no room since the last that was written.
static DROPPED: AtomicU64 = AtomicU64::new(0);

struct StderrLogger;

impl log::Log for StderrLogger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let line: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(1000)
            .collect();
        let level = record.level().as_str().to_ascii_lowercase();
        // A closed standard error must not end a VM.
        // One write, so that lines of other processes do not come between.
        let line = format!("bulkhead: {level}: {line}\n");
        let mut stderr = std::io::stderr().lock();
        let mut write = |line: &str| match stderr.write(line.as_bytes()) {
            Err(why) => why.kind() != ErrorKind::WouldBlock,
            Ok(_) => true,
        };
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let note = format!(
                "bulkhead: warn: {dropped} lines are missing here: whoever reads standard error does not keep up\n"
            );
            if !write(&note) {
                // It cannot be written either.
                DROPPED.fetch_add(dropped.saturating_add(1), Ordering::Relaxed);
                return;
            }
        }
        if !write(&line) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// Puts a description of its own, non-blocking, in the place of a standard error that is a pipe
/// or a terminal. Where that may not be opened anew, things stay as they are.
fn unblock() {
    let place = "/proc/self/fd/2";
    let waits = std::fs::metadata(place).map(|m| m.file_type());
    if !waits.is_ok_and(|kind| kind.is_fifo() || kind.is_char_device()) {
        return;
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let anew = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(place);
    if let Ok(anew) = anew {
        let _ = rustix::stdio::dup2_stderr(&anew);
    }
}

/// Installs the logger at `level`. A second call only changes the level. On the main thread, before
/// the process confines itself.
pub fn init(level: log::LevelFilter) {
    unblock();
    static LOGGER: StderrLogger = StderrLogger;
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}
