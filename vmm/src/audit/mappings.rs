//! What a process has mapped, as far as it decides whether data can become code: /proc/PID/maps
//! (proc(5)). Called by the audit only.

use std::fs;
use std::io::{self, BufRead, BufReader};

use serde::Serialize;

use crate::launcher::printable;

/// Most mappings that are read of one process.
const MAX_MAPPINGS: usize = 100_000;
/// Most that are named.
const MAX_NAMED: usize = 8;

/// The mappings of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mappings {
    /// All of them.
    pub total: usize,
    /// Those that can be executed.
    pub executable: usize,
    /// Those that can be written and executed: the kernel's lines, escaped, the first few.
    pub writable_and_executable: Vec<String>,
}

/// Reads them.
pub fn read(pid: i32) -> io::Result<Mappings> {
    let mut mappings = Mappings::default();
    let lines = BufReader::new(fs::File::open(format!("/proc/{pid}/maps"))?).lines();
    for line in lines.take(MAX_MAPPINGS) {
        mappings.add(&line?);
    }
    Ok(mappings)
}

impl Mappings {
    fn add(&mut self, line: &str) {
        self.total = self.total.saturating_add(1);
        // "00400000-0040b000 r-xp 00000000 08:01 393 /path"
        let rights = line.split(' ').nth(1).unwrap_or("rwx");
        if rights.contains('x') {
            self.executable = self.executable.saturating_add(1);
            if rights.contains('w') && self.writable_and_executable.len() < MAX_NAMED {
                self.writable_and_executable.push(printable(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memory_that_is_both_written_and_executed_is_named() {
        let mut mappings = Mappings::default();
        for line in [
            "00400000-0040b000 r-xp 00000000 08:01 393 /w",
            "0060b000-0060c000 rw-p 0000b000 08:01 393 /x",
            "7f0000000000-7f0000001000 rwxp 00000000 00:00 0 ",
        ] {
            mappings.add(line);
        }
        assert_eq!((mappings.total, mappings.executable), (3, 2));
        assert_eq!(mappings.writable_and_executable.len(), 1);
        assert!(mappings.writable_and_executable[0].starts_with("7f0"));
    }

    #[test]
    fn this_process_has_code() {
        let own = read(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.executable > 0 && own.total > own.executable);
    }
}
