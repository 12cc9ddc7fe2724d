//! Given a console process that is killed at any moment of its driver's life, another takes its
//! place: it goes on with what the driver was told, says that clients' ports are closed and open
//! again, and carries bytes both ways. BULKHEAD_TAKEOVERS makes it longer, BULKHEAD_SEED another.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_runtime::driver::{Desc, USER_BASE, WRITE, guest};
use bulkhead_runtime::frontend::{Numbers, Region, Vq, negotiate, steps, takeovers};
use bulkhead_runtime::memory::Memory;
use rustix::io::{FdFlags, fcntl_setfd};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::Frontend;

const GPA: u64 = 0x10_0000;
const RAM: u64 = 0x20_0000;
const BUFFERS: u64 = GPA + 0x10_0000;
const BUFFER: u64 = 4096;
const RING: u16 = 16;
const QUEUES: u16 = 6;
/// Queues of the console, of messages, and of the named port.
const CONSOLE: usize = 0;
const HEARS: usize = 2;
const SAYS: usize = 3;
const NAMED: usize = 4;
const PATIENCE: Duration = Duration::from_secs(20);
/// Messages: port and event.
const CLOSED: [u8; 8] = [1, 0, 0, 0, 6, 0, 0, 0];
const OPENED: [u8; 8] = [1, 0, 0, 0, 6, 0, 1, 0];

struct Process {
    child: Child,
    _control: UnixStream,
    _frontend: Frontend,
}

/// A guest and its front-end, which outlive the processes.
struct Machine {
    process: Option<Process>,
    listeners: Vec<UnixListener>,
    paths: Vec<PathBuf>,
    file: File,
    memory: Arc<Memory>,
    queues: Vec<Vq>,
    sent: Vec<u16>,
    region: Region,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Machine {
    /// Its driver has given its buffers, and nothing serves it.
    fn new(number: u64) -> Self {
        let path = |port| {
            let name = format!("bh-console-takeover-{}-{number}-{port}", std::process::id());
            std::env::temp_dir().join(name)
        };
        let paths = vec![path(0), path(1)];
        let bind = |path| UnixListener::bind(path).unwrap();
        let (file, memory) = guest(GPA, RAM).unwrap();
        let queues = (0..QUEUES).map(|n| {
            let mut queue = Vq::new(&memory, GPA + u64::from(n) * 0x2000, RING);
            queue.ring.reset();
            queue
        });
        let mut machine = Self {
            process: None,
            listeners: paths.iter().map(bind).collect(),
            paths,
            file,
            queues: queues.collect(),
            memory,
            sent: vec![0; QUEUES.into()],
            region: None,
        };
        for queue in [CONSOLE, HEARS, NAMED] {
            for head in 0..RING {
                machine.give(queue, head);
            }
        }
        machine
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }

    /// Another process, to which so many messages of the setup are said.
    fn start(&mut self, said: usize) {
        self.kill();
        let (control, its_control) = UnixStream::pair().unwrap();
        let (vhost, its_vhost) = UnixStream::pair().unwrap();
        let [first, second] = self.listeners.as_slice() else {
            panic!("two ports")
        };
        // It finds them at their own numbers.
        for fd in [
            its_control.as_fd(),
            its_vhost.as_fd(),
            first.as_fd(),
            second.as_fd(),
        ] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let ports = format!("{},{}:agent", first.as_raw_fd(), second.as_raw_fd());
        let child = Command::new(env!("CARGO_BIN_EXE_bulkhead-console"))
            .args(["--control-fd", &its_control.as_raw_fd().to_string()])
            .args(["--vhost-fd", &its_vhost.as_raw_fd().to_string()])
            .args(["--ports", &ports])
            .spawn()
            .unwrap();
        drop((its_control, its_vhost));
        let (mut frontend, _) = negotiate(vhost, QUEUES, |features| features);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: RAM,
            userspace_addr: USER_BASE + GPA,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        for step in steps(QUEUES).into_iter().take(said) {
            step.say(&mut frontend, &region, &mut self.region, &self.queues);
        }
        self.process = Some(Process {
            child,
            _control: control,
            _frontend: frontend,
        });
    }

    fn serve(&mut self) {
        self.start(usize::MAX);
    }

    fn place(queue: usize, head: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(RING) + u64::from(head)) * BUFFER
    }

    fn offer(&mut self, queue: usize, head: u16, len: u32, flags: u16) {
        let desc = Desc {
            addr: Self::place(queue, head),
            len,
            flags,
            next: 0,
        };
        self.queues[queue].ring.desc(head, desc);
        self.queues[queue].ring.offer(head);
        self.queues[queue].kick.write(1).unwrap();
    }

    fn give(&mut self, queue: usize, head: u16) {
        self.offer(queue, head, BUFFER as u32, WRITE);
    }

    /// What has come, if anything; its buffer is given again.
    fn try_got(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (head, len) = self.queues[queue].ring.take_used()?;
        let mut bytes = vec![0; len as usize];
        assert!(
            self.memory
                .read(Self::place(queue, head as u16), &mut bytes)
        );
        self.give(queue, head as u16);
        Some(bytes)
    }

    fn got(&mut self, queue: usize) -> Vec<u8> {
        let begun = Instant::now();
        loop {
            if let Some(bytes) = self.try_got(queue) {
                return bytes;
            }
            assert!(begun.elapsed() < PATIENCE, "queue {queue}: nothing comes");
            std::thread::yield_now();
        }
    }

    fn begin(&mut self, queue: usize, bytes: &[u8]) {
        let head = self.sent[queue];
        self.sent[queue] = (head + 1) % RING;
        assert!(self.memory.write(Self::place(queue, head), bytes));
        self.offer(queue, head, bytes.len() as u32, 0);
    }

    fn ended(&mut self, queue: usize) {
        let begun = Instant::now();
        while self.queues[queue].ring.take_used().is_none() {
            assert!(begun.elapsed() < PATIENCE, "queue {queue}: not taken");
            std::thread::yield_now();
        }
    }

    fn says(&mut self, port: u8, event: u8) {
        self.begin(SAYS, &[port, 0, 0, 0, event, 0, 1, 0]);
    }

    fn client(&self, port: usize) -> UnixStream {
        let client = UnixStream::connect(&self.paths[port]).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// Both ways by the port of these queues.
    fn converses(&mut self, client: &mut UnixStream, queue: usize, text: &[u8]) {
        client.write_all(text).unwrap();
        let mut all = Vec::new();
        while all.len() < text.len() {
            all.extend(self.got(queue));
        }
        assert_eq!(all, text);
        self.begin(queue + 1, text);
        let mut back = vec![0; text.len()];
        client.read_exact(&mut back).unwrap();
        assert_eq!(back, text);
        self.ended(queue + 1);
    }
}

/// What a driver hears of a console and a named port: each once, or twice what was under way when
/// the process died.
fn hears_all(machine: &mut Machine, mut killed: impl FnMut(&mut Machine, usize)) {
    let expected: [(u8, u8); 5] = [(0, 1), (1, 1), (0, 4), (0, 6), (1, 7)];
    let (mut heard, mut again) = (Vec::new(), 0);
    for (step, (port, event)) in [(0, 0), (0, 3), (1, 3), (0, 6), (1, 6)]
        .into_iter()
        .enumerate()
    {
        machine.says(port, event);
        killed(machine, step);
        machine.ended(SAYS);
    }
    while heard.len() < expected.len() {
        let message = machine.got(HEARS);
        let what = (message[0], message[4]);
        assert!(expected.contains(&what), "{message:?}");
        match heard.contains(&what) {
            true => again += 1,
            false => heard.push(what),
        }
    }
    assert!(again <= 5, "{again} were told again");
}

#[test]
fn a_process_goes_on_where_another_was_killed() {
    let mut numbers = Numbers::seeded(0x7a6e);
    for round in 0..takeovers(12) {
        let mut machine = Machine::new(round);
        machine.serve();
        // The driver begins, and the process dies while it does.
        let dies = numbers.below(6) as usize;
        let later = Duration::from_micros(numbers.below(1500));
        hears_all(&mut machine, |machine, step| {
            if step == dies {
                std::thread::sleep(later);
                machine.serve();
            }
        });
        let mut console = machine.client(0);
        let mut agent = machine.client(1);
        assert_eq!(machine.got(HEARS), OPENED);
        machine.converses(&mut console, CONSOLE, b"console");
        machine.converses(&mut agent, NAMED, b"agent");
        // It dies under its clients, and its successor at any message of its setup.
        let all = steps(QUEUES).len() as u64;
        for text in [b"first ".as_slice(), b"second"] {
            machine.begin(CONSOLE + 1, text);
            machine.start(numbers.below(all) as usize);
            machine.serve();
            machine.ended(CONSOLE + 1);
            let mut end = Vec::new();
            let _ = agent.read_to_end(&mut end);
            assert_eq!(end, b"");
            // Nothing else is told again.
            assert_eq!(machine.got(HEARS), CLOSED);
            agent = machine.client(1);
            assert_eq!(machine.got(HEARS), OPENED);
            console = machine.client(0);
            machine.converses(&mut agent, NAMED, text);
            machine.converses(&mut console, CONSOLE, text);
            assert_eq!(machine.try_got(HEARS), None);
        }
    }
}
