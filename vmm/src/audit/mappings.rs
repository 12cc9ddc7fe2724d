//! What a process has mapped, as far as it decides whether data can become code: /proc/PID/maps
//! (proc(5)). Called by the audit only.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;

use rustix::fs::makedev;
use serde::Serialize;

use super::fds::Inode;
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
    /// Code that is neither its program's nor the kernel's: lines, escaped, the first few.
    pub foreign_code: Vec<String>,
    /// Device and inode of what it shares with whoever has mapped the same.
    #[serde(skip)]
    pub shared: BTreeSet<Inode>,
}

/// What a process executes. On overlayfs, what is mapped has the inode of a layer's file, and the
/// overlay's name.
struct Program {
    inode: Inode,
    name: String,
}

impl Program {
    fn is(&self, inode: Option<Inode>, name: &str) -> bool {
        let named = name == self.name && name.starts_with('/') && !name.starts_with("/memfd:");
        inode == Some(self.inode) || inode.is_some() && named
    }
}

/// Reads them.
pub fn read(pid: i32) -> io::Result<Mappings> {
    let mut mappings = Mappings::default();
    let exe = format!("/proc/{pid}/exe");
    let program = Program {
        inode: fs::metadata(&exe).map(|m| (m.dev(), m.ino()))?,
        name: fs::read_link(&exe)?.to_string_lossy().into_owned(),
    };
    let lines = BufReader::new(fs::File::open(format!("/proc/{pid}/maps"))?).lines();
    for line in lines.take(MAX_MAPPINGS) {
        mappings.add(&line?, &program);
    }
    Ok(mappings)
}

impl Mappings {
    fn add(&mut self, line: &str, program: &Program) {
        self.total = self.total.saturating_add(1);
        // "00400000-0040b000 r-xp 00000000 08:01 393 /path"
        let mut words = line.split_ascii_whitespace();
        let rights = words.nth(1).unwrap_or("rwx");
        let inode = inode(words.nth(1), words.next());
        if let Some(inode) = inode.filter(|_| rights.ends_with('s')) {
            self.shared.insert(inode);
        }
        let name = name(line);
        let kernels = inode.is_none() && matches!(name, "[vdso]" | "[vsyscall]");
        if rights.contains('x')
            && !kernels
            && !program.is(inode, name)
            && self.foreign_code.len() < MAX_NAMED
        {
            self.foreign_code.push(printable(line));
        }
        if rights.contains('x') {
            self.executable = self.executable.saturating_add(1);
            if rights.contains('w') && self.writable_and_executable.len() < MAX_NAMED {
                self.writable_and_executable.push(printable(line));
            }
        }
    }
}

/// What follows the first five words.
fn name(line: &str) -> &str {
    let mut rest = line;
    for _ in 0..5 {
        rest = rest
            .trim_start()
            .split_once(' ')
            .map_or("", |(_, rest)| rest);
    }
    rest.trim_start()
}

/// "08:01" and "393"; `None`: it is no file's.
fn inode(device: Option<&str>, inode: Option<&str>) -> Option<Inode> {
    let (major, minor) = device?.split_once(':')?;
    let number = |hex| u32::from_str_radix(hex, 16).ok();
    let inode = inode?.parse().ok().filter(|inode| *inode != 0)?;
    Some((makedev(number(major)?, number(minor)?), inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(device: u64, inode: u64) -> Program {
        Program {
            inode: (device, inode),
            name: "/a program".to_owned(),
        }
    }

    #[test]
    fn only_memory_that_is_both_written_and_executed_is_named() {
        let mut mappings = Mappings::default();
        for line in [
            "00400000-0040b000 r-xp 00000000 08:01 393 /w",
            "0060b000-0060c000 rw-p 0000b000 08:01 393 /x",
            "7f0000000000-7f0000001000 rwxp 00000000 00:00 0 ",
        ] {
            mappings.add(line, &program(makedev(8, 1), 393));
        }
        assert_eq!((mappings.total, mappings.executable), (3, 2));
        assert_eq!(mappings.foreign_code.len(), 1);
        assert_eq!(mappings.writable_and_executable.len(), 1);
        assert!(mappings.writable_and_executable[0].starts_with("7f0"));
    }

    #[test]
    fn code_of_others_is_named_and_the_kernels_is_not() {
        let mut mappings = Mappings::default();
        for line in [
            "7f0-7f1 r-xp 00000000 00:00 0                          [vdso]",
            "ff0-ff1 --xp 00000000 00:00 0                  [vsyscall]",
            "7f2-7f3 rw-s 00000000 00:01 5 /memfd:guest-ram (deleted)",
            "7f4-7f5 r-xp 00000000 00:1a 83                         /a program",
        ] {
            mappings.add(line, &program(1, 1));
        }
        assert_eq!(mappings.foreign_code, [""; 0]);
        assert_eq!(mappings.shared, BTreeSet::from([(makedev(0, 1), 5)]));
        for line in [
            "7f0-7f1 r-xp 00000000 00:01 9 /memfd:x (deleted)",
            "7f0-7f1 r-xp 00000000 00:01 9 [vdso]",
            "7f0-7f1 r-xp 00000000 00:01 9 /a program too",
            "7f0-7f1 r-xp 00000000 00:00 0",
            "garbled",
        ] {
            let before = mappings.foreign_code.len();
            mappings.add(line, &program(1, 1));
            assert_eq!(mappings.foreign_code.len(), before + 1, "{line}");
        }
    }

    #[test]
    fn this_process_has_code_and_shares_what_it_has_mapped_shared() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::empty()).unwrap();
        let memory = fs::File::from(memory);
        memory.set_len(4096).unwrap();
        let metadata = memory.metadata().unwrap();
        let region = vm_memory::mmap::MmapRegion::<()>::from_file(
            vm_memory::FileOffset::new(memory, 0),
            4096,
        )
        .unwrap();
        let own = read(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.shared.contains(&(metadata.dev(), metadata.ino())));
        drop(region);
        assert!(own.executable > 0 && own.total > own.executable);
    }
}
