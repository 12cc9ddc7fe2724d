//! The VMMs under comparison, each booting the same kernel and initrd, and one boot.

use std::fs::File;
use std::io::Read;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_tests::vmm::{Scratch, bin, guest_file};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Guest memory of every VM here.
const MEMORY: &str = "256M";

/// A VMM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// The one under test.
    Bulkhead,
    /// QEMU's standard machine.
    Q35,
    /// QEMU's small machine.
    Microvm,
}

impl Vmm {
    /// How tables call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::Q35 => "QEMU q35",
            Self::Microvm => "QEMU microvm",
        }
    }

    /// The command that boots the guest, its first serial port on standard output.
    /// `shared`: guest RAM in a memfd (Bulkhead's always is).
    pub fn command(
        self,
        files: &Files,
        cmdline: &str,
        disk: Option<&str>,
        shared: bool,
    ) -> Command {
        if self == Self::Bulkhead {
            let mut command = Command::new(bin("bulkhead"));
            command
                .args(["run", "--kernel", &files.kernel, "--initrd", &files.initrd])
                .args(["--cmdline", cmdline, "--memory", MEMORY, "--cpus", "1"]);
            if let Some(disk) = disk {
                command.args(["--disk", &format!("path={disk}")]);
            }
            return command;
        }
        let mut machine = if self == Self::Q35 {
            "q35"
        } else {
            "microvm,pit=on,pic=on,rtc=on"
        }
        .to_string();
        let mut command = Command::new("qemu-system-x86_64");
        if shared {
            machine.push_str(",memory-backend=ram");
            command.args([
                "-object",
                &format!("memory-backend-memfd,id=ram,share=on,size={MEMORY}"),
            ]);
        }
        command
            .args([
                "-M", &machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", MEMORY,
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .args([
                "-kernel",
                &files.kernel,
                "-initrd",
                &files.initrd,
                "-append",
                cmdline,
            ]);
        if let Some(disk) = disk {
            command
                .args([
                    "-drive",
                    &format!("file={disk},format=raw,if=none,id=d0,cache=none,aio=io_uring"),
                ])
                .args(["-device", "virtio-blk-pci,drive=d0"]);
        }
        command
    }
}

/// Kernel and initrd, in memory of the host that runs the guests.
pub struct Files {
    kernel: String,
    initrd: String,
    /// Where VMs may leave their files.
    pub scratch: Scratch,
}

impl Files {
    /// Copies them to a directory of its own.
    ///
    /// # Errors
    /// Why not.
    pub fn new() -> Result<Self, String> {
        let scratch = Scratch::new("bench")?;
        let copy = |name: &str| {
            let (from, to) = (guest_file(name), scratch.path(name));
            std::fs::copy(&from, &to).map_err(|e| format!("{from}: {e}: run `make guest`"))?;
            Ok::<_, String>(to)
        };
        Ok(Self {
            kernel: copy("vmlinux")?,
            initrd: copy("initrd.img")?,
            scratch,
        })
    }
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM that runs; killed when dropped.
pub struct Guest {
    child: Arc<Mutex<Child>>,
    stdout: ChildStdout,
    text: Vec<u8>,
    errors: String,
    started: Instant,
    /// Its process.
    pub pid: u32,
}

impl Guest {
    /// Starts it. It is killed after `limit`.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn start(mut command: Command, scratch: &Scratch, limit: Duration) -> Result<Self, String> {
        let errors = scratch.path("stderr");
        let file = File::create(&errors).map_err(|e| format!("{errors}: {e}"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file);
        let started = Instant::now();
        let mut child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let pid = child.id();
        let stdout = child.stdout.take().ok_or("no pipe")?;
        let child = Arc::new(Mutex::new(child));
        let watched = Arc::downgrade(&child);
        // Reading blocks; a guest that falls silent is ended from here.
        std::thread::spawn(move || {
            while started.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(500));
                if watched.strong_count() == 0 {
                    return;
                }
            }
            if let Some(child) = watched.upgrade() {
                let _ = lock(&child).kill();
            }
        });
        Ok(Self {
            child,
            stdout,
            text: Vec::new(),
            errors,
            started,
            pid,
        })
    }

    /// Reads until the guest prints `wanted`; the time since the start.
    ///
    /// # Errors
    /// What it printed instead.
    pub fn reaches(&mut self, wanted: &str) -> Result<f64, String> {
        let mut buffer = [0; 4096];
        loop {
            if self
                .text
                .windows(wanted.len())
                .any(|w| w == wanted.as_bytes())
            {
                return Ok(self.started.elapsed().as_secs_f64());
            }
            match self.stdout.read(&mut buffer) {
                Ok(n @ 1..) => self
                    .text
                    .extend_from_slice(buffer.get(..n).unwrap_or_default()),
                _ => break,
            }
        }
        let errors = std::fs::read_to_string(&self.errors).unwrap_or_default();
        let said = String::from_utf8_lossy(&self.text);
        let lines: Vec<&str> = said.lines().chain(errors.lines()).collect();
        let last = lines.len().saturating_sub(12);
        Err(format!(
            "no {wanted:?}; last words:\n{}",
            lines.get(last..).unwrap_or_default().join("\n")
        ))
    }

    /// Reads until it has printed `wanted` that many times.
    ///
    /// # Errors
    /// What it printed instead.
    pub fn reaches_times(&mut self, wanted: &str, count: usize) -> Result<(), String> {
        let mut buffer = [0; 4096];
        while self.times(wanted)? < count {
            match self.stdout.read(&mut buffer) {
                Ok(n @ 1..) => self
                    .text
                    .extend_from_slice(buffer.get(..n).unwrap_or_default()),
                _ => return Err(format!("its output ended before {wanted:?}")),
            }
        }
        Ok(())
    }

    /// How often it has printed `wanted`, with what can be read at once.
    ///
    /// # Errors
    /// Its output cannot be read.
    pub fn times(&mut self, wanted: &str) -> Result<usize, String> {
        let mut buffer = [0; 4096];
        loop {
            let mut fds = [PollFd::new(&self.stdout, PollFlags::IN)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let ready = poll(&mut fds, Some(&now)).map_err(|e| e.to_string())?;
            if ready == 0 {
                break;
            }
            match self.stdout.read(&mut buffer) {
                Ok(n @ 1..) => self
                    .text
                    .extend_from_slice(buffer.get(..n).unwrap_or_default()),
                _ => break,
            }
        }
        let windows = self.text.windows(wanted.len());
        Ok(windows.filter(|w| *w == wanted.as_bytes()).count())
    }

    /// Reads until the line that begins with `start` is whole.
    ///
    /// # Errors
    /// What it printed instead.
    pub fn reaches_line(&mut self, start: &str) -> Result<(), String> {
        let from = self
            .text
            .windows(start.len())
            .position(|w| w == start.as_bytes())
            .ok_or("no such line")?;
        let mut buffer = [0; 4096];
        while !self.text.get(from..).unwrap_or_default().contains(&b'\n') {
            match self.stdout.read(&mut buffer) {
                Ok(n @ 1..) => self
                    .text
                    .extend_from_slice(buffer.get(..n).unwrap_or_default()),
                _ => return Err("its output ended in a line".into()),
            }
        }
        Ok(())
    }

    /// What follows `start` on its line.
    pub fn after(&self, start: &str) -> String {
        let text = String::from_utf8_lossy(&self.text);
        let rest = text.split_once(start).map(|(_, rest)| rest);
        let line = rest.and_then(|r| r.lines().next());
        line.unwrap_or_default().to_string()
    }

    /// Reads to the end of its output and waits for the process.
    pub fn finish(mut self) {
        let mut rest = Vec::new();
        let _ = self.stdout.read_to_end(&mut rest);
        let _ = lock(&self.child).wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
