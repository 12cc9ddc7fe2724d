//! Log lines on fd 2: one line, one write, no allocation that matters.
//!
//! Under the launcher fd 2 is a pipe whose reader adds the device's name and bounds the
//! rate; stand-alone it is the operator's terminal. Any thread may log; nothing on the
//! data path does, and what a guest can provoke is logged at most once per ring set-up.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// Longest line, and no more than a pipe takes in one piece.
const MAX_LINE: usize = 512;

struct Lines;

static LOGGER: Lines = Lines;

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // The libraries below log what this crate reports better.
        if !self.enabled(record.metadata()) || !record.target().starts_with("bulkhead") {
            return;
        }
        let mut line = [0u8; MAX_LINE];
        let mut rest = line.get_mut(..MAX_LINE - 1).unwrap_or_default();
        let room = rest.len();
        // A line that is too long is cut off.
        let _ = write!(
            rest,
            "{}: {}",
            record.level().as_str().to_ascii_lowercase(),
            record.args()
        );
        let used = room - rest.len();
        for byte in line.iter_mut().take(used) {
            blunt(byte);
        }
        if let Some(end) = line.get_mut(used) {
            *end = b'\n';
        }
        let _ = std::io::stderr().write(line.get(..=used).unwrap_or_default());
    }

    fn flush(&self) {}
}

/// A path or a message may hold what would move the cursor of the operator's terminal.
fn blunt(byte: &mut u8) {
    if byte.is_ascii_control() {
        *byte = b'?';
    }
}

/// Says on fd 2 why the program ends: one line, whatever the error holds.
pub fn complain(program: &str, error: &dyn std::error::Error) {
    let mut line = format!("{program}: {error}").into_bytes();
    line.iter_mut().for_each(blunt);
    line.push(b'\n');
    let _ = std::io::stderr().write_all(&line);
}

/// Sends log lines of this level and above to fd 2.
pub fn init(level: LevelFilter) {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}
