//! What a process has mapped, as far as it decides whether data can become code: /proc/PID/maps
//! (proc(5)). Called by the audit only.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::makedev;
use serde::Serialize;

use super::fds::{Inode, memory_devices};
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
    /// Code that is not as its file has it: somebody has written to it. Lines, escaped, the first few.
    pub changed_code: Vec<String>,
    /// Files of file systems that it can write to by their mapping: lines, escaped, the first few.
    pub written_files: Vec<String>,
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
    let pages = fs::File::open(format!("/proc/{pid}/pagemap")).ok();
    let lines = BufReader::new(fs::File::open(format!("/proc/{pid}/maps"))?).lines();
    for line in lines.take(MAX_MAPPINGS) {
        let line = line?;
        mappings.add(&line, &program);
        if let Some(pages) = &pages
            && mappings.changed_code.len() < MAX_NAMED
            && let Some(range) = code(&line)
            && changed(pages, range)
        {
            mappings.changed_code.push(printable(&line));
        }
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
        let name = name(line);
        if let Some(inode) = inode.filter(|_| rights.ends_with('s')) {
            self.shared.insert(inode);
            if rights.contains('w')
                && name.starts_with('/')
                && !memory_devices().contains(&inode.0)
                && self.written_files.len() < MAX_NAMED
            {
                self.written_files.push(printable(line));
            }
        }
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

/// Most code of one mapping that is looked through, bytes.
const MAX_CODE: u64 = 64 << 20;
const PAGE: u64 = 4096;
/// Bits of an entry of pagemap (Linux's Documentation/admin-guide/mm/pagemap.rst): the page is there,
/// or swapped out; it is a file's, or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Where a file's code is mapped.
fn code(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let executable = words.next()?.contains('x');
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let range = (hex(start)?, hex(end)?);
    (executable && name(line).starts_with('/')).then_some(range)
}

/// Whether a page there is none of the file's any more: the first write to a private mapping makes a
/// copy.
fn changed(pages: &fs::File, (start, end): (u64, u64)) -> bool {
    let length = end.saturating_sub(start).min(MAX_CODE) / PAGE;
    let bytes = usize::try_from(length.saturating_mul(8)).unwrap_or(0);
    let mut entries = vec![0; bytes];
    if pages
        .read_exact_at(&mut entries, (start / PAGE).saturating_mul(8))
        .is_err()
    {
        return false;
    }
    let (entries, _) = entries.as_chunks::<8>();
    entries
        .iter()
        .map(|entry| u64::from_ne_bytes(*entry))
        .any(|entry| entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0)
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
            "7f2-7f3 r--s 00000000 00:01 5 /memfd:guest-ram (deleted)",
            "7f4-7f5 r-xp 00000000 00:1a 83                         /a program",
        ] {
            mappings.add(line, &program(1, 1));
        }
        assert_eq!(mappings.foreign_code, [""; 0]);
        assert_eq!(mappings.shared, BTreeSet::from([(makedev(0, 1), 5)]));
        let line = "7f2-7f3 rw-s 00000000 08:01 5 /etc/hostname";
        mappings.add(line, &program(1, 1));
        assert_eq!(mappings.written_files, [line]);
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
    fn code_that_somebody_has_written_to_is_found() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Until it is itself, and sleeps.
        let sleeps = || {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            comm == "sleep\n" && stat.contains(") S ")
        };
        while !sleeps() {
            std::thread::yield_now();
        }
        assert_eq!(read(pid).unwrap().changed_code, [""; 0]);
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let (start, _) = maps.lines().find_map(code).unwrap();
        let mut memory = fs::OpenOptions::new();
        let memory = memory.read(true).write(true);
        let memory = memory.open(format!("/proc/{pid}/mem")).unwrap();
        let mut byte = [0];
        memory.read_exact_at(&mut byte, start).unwrap();
        memory.write_all_at(&byte, start).unwrap();
        let found = read(pid).unwrap().changed_code;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
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
