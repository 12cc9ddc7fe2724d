//! For tests only: a device process that runs as a child of the test, and is killed with it.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::frontend_vm::PATIENCE;

/// The child.
pub struct Process {
    /// The same, as the library has it.
    pub child: Child,
}

impl Process {
    /// A command that runs this program, without a terminal.
    pub fn command(program: &Path) -> Command {
        let mut c = Command::new(program);
        c.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        c
    }

    /// Starts it.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        Self { child }
    }

    /// It has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the process to exit", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// A field of /proc/PID/status.
    pub fn status_field(&self, field: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|l| l.starts_with(&format!("{field}:")));
        line.unwrap().split_once(':').unwrap().1.trim().into()
    }

    /// What it wrote to stderr; after it has exited.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut text).unwrap();
        }
        text
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is so.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
