//! Which rules of the seccomp policies are used, as the kernel sees it. `tests/rules` runs the
//! suites under this.
//!
//! usage: rule-coverage record FILE -- COMMAND [ARGUMENT]…
//!        rule-coverage judge [--violations] FILE…
//!
//! `record` runs a command, traces the system calls of everything that descends from it (ftrace,
//! raw_syscalls; needs root) and writes to FILE what rules they used. `judge` adds such files up:
//! each rule of each policy must have been used, or say in its file why none is (`unused`), and no
//! call may have been made that a policy stops. With --violations only the latter is judged.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

mod judge;
mod pages;
mod tracefs;
mod track;

use pages::{u32_at, u64_at};
use track::{Seen, Tracker, What};

const USAGE: &str =
    "usage: rule-coverage record FILE -- COMMAND [ARGUMENT]… | judge [--violations] FILE…";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["record", file, "--", command @ ..] if !command.is_empty() => {
            record(Path::new(file), command).unwrap_or_else(|error| {
                eprintln!("rule-coverage: {error}");
                ExitCode::from(125)
            })
        }
        // What `record` starts: a process that waits until it is traced.
        ["when-traced", program, rest @ ..] => {
            let error = match tracefs::wait_to_be_followed() {
                Ok(()) => Command::new(program).args(rest).exec(),
                Err(error) => error,
            };
            eprintln!("rule-coverage: {program}: {error}");
            ExitCode::from(125)
        }
        ["judge", "--violations", files @ ..] if !files.is_empty() => judge::judge(files, false),
        ["judge", files @ ..] if !files.is_empty() => judge::judge(files, true),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// How often what was seen is written.
const INTERVAL: Duration = Duration::from_secs(10);

/// Reads the buffers of all CPUs and puts their events in order.
struct Reader {
    buffers: Vec<File>,
    layout: Layout,
    waiting: Vec<Seen>,
    lost: u64,
}

/// Where everything lies in the events that are traced.
struct Layout {
    enter: tracefs::Event,
    exit: tracefs::Event,
    new: tracefs::Event,
    signal: tracefs::Event,
    pid: usize,
    enter_nr: usize,
    enter_args: usize,
    exit_nr: usize,
    exit_answer: usize,
    new_task: usize,
    new_flags: usize,
    signal_number: usize,
    signal_to: usize,
}

impl Layout {
    fn of(instance: &tracefs::Instance) -> io::Result<Self> {
        let enter = instance.event("raw_syscalls/sys_enter")?;
        let exit = instance.event("raw_syscalls/sys_exit")?;
        let new = instance.event("task/task_newtask")?;
        let signal = instance.event("signal/signal_generate")?;
        Ok(Self {
            pid: enter.field("common_pid")?.0,
            enter_nr: enter.field("id")?.0,
            enter_args: enter.field("args")?.0,
            exit_nr: exit.field("id")?.0,
            exit_answer: exit.field("ret")?.0,
            new_task: new.field("pid")?.0,
            new_flags: new.field("clone_flags")?.0,
            signal_number: signal.field("sig")?.0,
            signal_to: signal.field("pid")?.0,
            signal,
            enter,
            exit,
            new,
        })
    }

    fn event(&self, time: u64, record: &[u8]) -> Option<Seen> {
        let id = u16::try_from(u32_at(record, 0)? & 0xffff).ok()?;
        let what = if id == self.enter.id {
            let mut args = [0; 6];
            for (at, arg) in args.iter_mut().enumerate() {
                *arg = u64_at(record, self.enter_args + 8 * at)?;
            }
            What::Enter {
                nr: u32_at(record, self.enter_nr)?,
                args,
            }
        } else if id == self.exit.id {
            What::Exit {
                nr: u32_at(record, self.exit_nr)?,
                answer: u64_at(record, self.exit_answer)?.cast_signed(),
            }
        } else if id == self.new.id {
            let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
            What::New {
                task: u32_at(record, self.new_task)?,
                thread: u64_at(record, self.new_flags)? & thread != 0,
            }
        } else if id == self.signal.id {
            if u32_at(record, self.signal_number)? == libc::SIGSYS.unsigned_abs() {
                What::Killed
            } else {
                What::Kills {
                    task: u32_at(record, self.signal_to)?,
                }
            }
        } else {
            return None;
        };
        Some(Seen {
            time,
            task: u32_at(record, self.pid)?,
            what,
        })
    }
}

/// The trace's clock.
#[allow(unsafe_code)] // clock_gettime(2): the standard library has the clock, but not its number.
fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it fills the structure, which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or_default()
}

impl Reader {
    /// Takes what is there, and gives everything that is older to the tracker. Whether there was
    /// anything.
    fn turn(&mut self, tracker: &mut Tracker) -> io::Result<bool> {
        // What is newer than this may have older events beside it that are not read yet.
        let until = now();
        let mut any = false;
        let mut page = vec![0; 64 * 1024];
        for buffer in &mut self.buffers {
            loop {
                let length = match buffer.read(&mut page) {
                    Ok(0) => break,
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
                any = true;
                let read = page.get(..length).unwrap_or_default();
                let missed = pages::records(read, |time, record| {
                    self.waiting.extend(self.layout.event(time, record));
                });
                match missed {
                    Some(missed) => self.lost += u64::from(missed),
                    None => return Err(io::Error::other("the trace buffer has another format")),
                }
            }
        }
        self.waiting.sort_by_key(|seen| seen.time);
        let ready = self.waiting.partition_point(|seen| seen.time < until);
        for seen in self.waiting.drain(..ready) {
            tracker.note(&seen);
        }
        Ok(any)
    }
}

fn record(file: &Path, command: &[&str]) -> io::Result<ExitCode> {
    let instance = tracefs::Instance::new()?;
    let mut reader = Reader {
        buffers: instance.buffers()?,
        layout: Layout::of(&instance)?,
        waiting: Vec::new(),
        lost: 0,
    };
    let mut tracker = Tracker::default();
    let mut child: Child = Command::new("/proc/self/exe")
        .arg("when-traced")
        .args(command)
        .spawn()?;
    instance.follow(child.id())?;
    // Should this be ended, what was seen until then is not lost.
    let mut written = Instant::now();
    let status = loop {
        if written.elapsed() > INTERVAL {
            judge::write(file, &tracker, reader.lost)?;
            written = Instant::now();
        }
        if !reader.turn(&mut tracker)? {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    instance.stop()?;
    while reader.turn(&mut tracker)? {}
    reader.turn(&mut tracker)?;
    judge::write(file, &tracker, reader.lost)?;
    drop(reader);
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
