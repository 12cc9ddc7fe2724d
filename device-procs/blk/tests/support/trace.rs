//! Watches what a device process asks of the kernel: every system call of every thread, by
//! ptrace(2), and of each io_uring_enter(2) the entries that it submits, through a second
//! mapping of the ring. A call's answer can be changed, so that a device that nobody has can
//! be played. x86-64.
//!
//! One thread starts the process, traces it and reaps it, so that no other test's wait can
//! take its stops away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::zombie_processes)] // the tracer reaps it, by a wait of its own

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{ChildStderr, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// linux/fs.h
pub const BLKSECDISCARD: u64 = 0x127d;

/// One entry that a ring was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub opcode: u8,
    pub offset: u64,
    pub len: u32,
    /// rw_flags, fsync_flags, whatever the operation has.
    pub flags: u32,
}

/// One system call.
#[derive(Clone, Debug)]
pub struct Call {
    pub thread: i32,
    pub number: i64,
    pub args: [u64; 6],
    /// What io_uring_enter submitted.
    pub entries: Vec<Entry>,
    /// The two numbers that BLKSECDISCARD reads.
    pub range: [u64; 2],
}

/// Answers a call in the kernel's place, which has answered already.
pub type Answer = Box<dyn Fn(&Call) -> Option<i64> + Send>;

/// A process that is watched; killed with the test.
pub struct Traced {
    pid: i32,
    stderr: ChildStderr,
    calls: Arc<Mutex<Vec<Call>>>,
    tracer: Option<JoinHandle<()>>,
}

/// Whether this process may look into one that has made itself undumpable.
pub fn permitted() -> bool {
    // SAFETY: it takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("skipped: only root can watch a confined process");
    }
    root
}

impl Traced {
    pub fn start(mut command: Command, answer: Answer) -> Self {
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let (tell, told) = mpsc::channel();
        let to = Arc::clone(&calls);
        let tracer = std::thread::spawn(move || {
            // SAFETY: ptrace is a system call without memory here.
            unsafe {
                command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
            let mut child = command.spawn().unwrap();
            drop(command);
            let pid = i32::try_from(child.id()).unwrap();
            tell.send((pid, child.stderr.take().unwrap())).unwrap();
            Tracer::new(pid, to, answer).run();
        });
        let (pid, stderr) = told.recv().unwrap();
        Self {
            pid,
            stderr,
            calls,
            tracer: Some(tracer),
        }
    }

    /// The calls since the last time, by all threads.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The flags with which the process has this file open, as fcntl(F_GETFL) has them.
    pub fn open_flags(&self, path: &std::path::Path) -> i32 {
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap() {
            let entry = entry.unwrap();
            if std::fs::read_link(entry.path()).is_ok_and(|to| to == path) {
                let name = entry.file_name();
                let info = format!("/proc/{}/fdinfo/{}", self.pid, name.to_str().unwrap());
                let text = std::fs::read_to_string(info).unwrap();
                let flags = text.lines().find_map(|l| l.strip_prefix("flags:"));
                return i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            }
        }
        panic!("{} is not open", path.display());
    }

    /// Ends it; what it wrote to stderr.
    pub fn end(mut self) -> String {
        self.stop();
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).unwrap();
        text
    }

    fn stop(&mut self) {
        if let Some(tracer) = self.tracer.take() {
            // SAFETY: the process is reaped by the tracer only, which ends after that.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            let ended = tracer.join();
            assert!(std::thread::panicking() || ended.is_ok(), "the tracer");
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A ring of the process's, seen from here.
struct Ring {
    rings: Mapping,
    entries: Mapping,
    head: usize,
    mask: usize,
    array: usize,
}

/// It goes with the tracer: as long as it is there, so is the ring, and with it the lock on the
/// disk that the ring holds.
struct Mapping {
    at: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(ring: &File, len: usize, offset: i64) -> Self {
        // SAFETY: a new mapping, of a size that the kernel has given the ring.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                ring.as_raw_fd(),
                offset,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { at, len }
    }

    fn word(&self, at: usize) -> u32 {
        assert!(at + 4 <= self.len);
        // SAFETY: it is in the mapping, aligned as the kernel does it, and changed by others,
        // hence the atomic.
        unsafe { (*self.at.cast::<u8>().add(at).cast::<AtomicU32>()).load(Ordering::Acquire) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

struct Tracer {
    pidfd: OwnedFd,
    calls: Arc<Mutex<Vec<Call>>>,
    answer: Answer,
    /// The call that each thread is in.
    inside: BTreeMap<i32, Call>,
    rings: BTreeMap<u64, Ring>,
}

impl Tracer {
    fn new(pid: i32, calls: Arc<Mutex<Vec<Call>>>, answer: Answer) -> Self {
        // SAFETY: pidfd_open takes integers; its answer is a descriptor of nobody else's.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(i32::try_from(fd).unwrap())
        };
        Self {
            pidfd,
            calls,
            answer,
            inside: BTreeMap::new(),
            rings: BTreeMap::new(),
        }
    }

    fn run(mut self) {
        let options =
            libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
        let mut prepared = false;
        loop {
            let mut status = 0;
            // SAFETY: status is live. Only what this thread started or traces is waited for.
            let tid =
                unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
            if tid < 0 {
                return;
            }
            if !libc::WIFSTOPPED(status) {
                self.inside.remove(&tid);
                continue;
            }
            if !prepared {
                prepared = true;
                // SAFETY: no memory is involved.
                let r = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options) };
                assert_eq!(r, 0);
            }
            let deliver = match libc::WSTOPSIG(status) {
                s if s == libc::SIGTRAP | 0x80 => {
                    self.syscall(tid);
                    0
                }
                // The exec, a new thread's beginning, and the event that announces it.
                libc::SIGTRAP | libc::SIGSTOP => 0,
                other => other,
            };
            // SAFETY: no memory is involved. A thread that was killed meanwhile is no error.
            unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, deliver) };
        }
    }

    fn syscall(&mut self, tid: i32) {
        // struct ptrace_syscall_info: op, arch, ip, sp, then by op.
        let mut info = [0u64; 16];
        const GET_SYSCALL_INFO: u32 = 0x420e;
        // SAFETY: info is live and as large as it is said to be.
        let r =
            unsafe { libc::ptrace(GET_SYSCALL_INFO, tid, size_of_val(&info), info.as_mut_ptr()) };
        if r < 0 {
            return;
        }
        match info[0] & 0xff {
            1 => {
                let mut call = Call {
                    thread: tid,
                    number: info[3] as i64,
                    args: info[4..10].try_into().unwrap(),
                    entries: Vec::new(),
                    range: [0; 2],
                };
                match call.number {
                    libc::SYS_io_uring_enter => call.entries = self.submitted(&call),
                    libc::SYS_ioctl if call.args[1] == BLKSECDISCARD => {
                        call.range = read(tid, call.args[2]);
                    }
                    _ => {}
                }
                self.calls
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(call.clone());
                self.inside.insert(tid, call);
            }
            2 => {
                let Some(call) = self.inside.remove(&tid) else {
                    return;
                };
                if let Some(answer) = (self.answer)(&call) {
                    set_result(tid, answer);
                } else if call.number == libc::SYS_io_uring_setup && info[3] as i64 >= 0 {
                    self.map_ring(tid, info[3], call.args[1]);
                }
            }
            _ => {}
        }
    }

    /// Maps a ring that the process has made.
    fn map_ring(&mut self, tid: i32, fd: u64, params: u64) {
        // struct io_uring_params: sq_entries first, sq_off at 40.
        let words: [u64; 10] = read(tid, params);
        let word = |at: usize| (words[at / 8] >> (at % 8 * 8)) as u32 as usize;
        let (count, head, mask, array) = (word(0), word(40), word(48), word(64));
        // SAFETY: pidfd_getfd takes integers; its answer is a descriptor of nobody else's.
        let ours = unsafe {
            let ours = libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0);
            assert!(ours >= 0, "{}", std::io::Error::last_os_error());
            File::from_raw_fd(i32::try_from(ours).unwrap())
        };
        let ring = Ring {
            rings: Mapping::new(&ours, array + 4 * count, 0),
            entries: Mapping::new(&ours, 64 * count, 0x1000_0000),
            head,
            mask,
            array,
        };
        self.rings.insert(fd, ring);
    }

    /// What a call submits: the thread that made it is stopped at it.
    fn submitted(&self, call: &Call) -> Vec<Entry> {
        let Some(ring) = self.rings.get(&call.args[0]) else {
            return Vec::new();
        };
        let (head, mask) = (ring.rings.word(ring.head), ring.rings.word(ring.mask));
        (0..u32::try_from(call.args[1]).unwrap())
            .map(|i| {
                let place = 4 * (head.wrapping_add(i) & mask) as usize;
                let index = ring.rings.word(ring.array + place) & mask;
                let word = |at: usize| ring.entries.word(64 * index as usize + at);
                Entry {
                    opcode: word(0) as u8,
                    offset: u64::from(word(8)) | u64::from(word(12)) << 32,
                    len: word(24),
                    flags: word(28),
                }
            })
            .collect()
    }
}

/// Reads words of a stopped thread's memory.
fn read<const N: usize>(tid: i32, at: u64) -> [u64; N] {
    let mut words = [0; N];
    for (word, offset) in words.iter_mut().zip((0..).step_by(8)) {
        // SAFETY: the kernel writes nothing here: the word is the raw call's last argument.
        let r = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKDATA,
                tid,
                at + offset,
                &raw mut *word,
            )
        };
        assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
    }
    words
}

fn set_result(tid: i32, answer: i64) {
    // SAFETY: the registers are a plain structure, which the kernel fills and reads.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        let r = libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut registers);
        assert_eq!(r, 0);
        registers.rax = answer as u64;
        let r = libc::ptrace(libc::PTRACE_SETREGS, tid, 0, &raw const registers);
        assert_eq!(r, 0);
    }
}
