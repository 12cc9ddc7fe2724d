//! `bulkhead ctl console`: the caller's terminal at a console of the guest's, by `AttachConsole`.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_proto::client::{ClientError, Speaker};
use bulkhead_proto::machine::{ConsoleAttach, ConsoleInput, ConsoleOutput};

use super::EXIT_USAGE;
use super::ctl::{Failure, Session};
use crate::launcher::sys;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Ctrl-].
const LEAVE: u8 = 0x1d;
/// How long the guest may take nothing of what is typed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Read of what is typed at once.
const PIECE: usize = 4096;

/// Options of `ctl console`.
#[derive(clap::Args, Debug, Clone)]
pub(super) struct ConsoleArgs {
    /// The console device [default: the serial port]
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// Which port of the device
    #[arg(long, value_name = "N", default_value_t = 0, requires = "id")]
    port: u32,
    /// Bytes that the serial port printed before, to be shown first
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 0,
        conflicts_with = "id",
        value_parser = clap::value_parser!(u32).range(0..=65536)
    )]
    history: u32,
}

impl ConsoleArgs {
    pub(super) fn check(&self, json: bool) -> Result<(), Failure> {
        if !json {
            return Ok(());
        }
        Err(Failure {
            code: EXIT_USAGE,
            line: "console has no JSON: leave --json out".into(),
        })
    }

    fn request(&self) -> ConsoleInput {
        let mut attach = ConsoleAttach::new();
        attach.device = self.id.clone().unwrap_or_default();
        (attach.port, attach.history_bytes) = (self.port, self.history);
        let mut input = ConsoleInput::new();
        input.set_attach(attach);
        input
    }

    /// Stays until the console ends or its user leaves.
    pub(super) fn run(&self, session: Session<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let request = self.request();
        let (speaker, mut stream, explain) =
            session.converse::<_, ConsoleOutput>("AttachConsole", &request)?;
        let terminal = Terminal::on_stdin().unwrap_or_default();
        // Before there are threads: a signal is for the one that waits for it.
        let signals = terminal.and_then(|_| Signals::block().ok());
        if let (Some(terminal), Some(signals)) = (terminal, signals) {
            std::thread::spawn(move || end_by_signal(terminal, &signals));
        }
        let raw = terminal.and_then(|terminal| terminal.raw().ok());
        match raw {
            Some(_) => eprint!("[attached: Ctrl-] leaves]\r\n"),
            None => eprintln!("[attached]"),
        }
        let left = Arc::new(AtomicBool::new(false));
        let (leaving, keys) = (Arc::clone(&left), raw.is_some());
        // Ends with the process: nobody can wake it from its read.
        std::thread::spawn(move || type_all(&speaker, keys, &leaving));
        loop {
            let output = match stream.next(None) {
                Ok(Some(output)) => output,
                Ok(None) => return Ok(()),
                Err(_) if left.load(Ordering::Acquire) => return Ok(()),
                Err(error) => return Err(explain(&error)),
            };
            if output.lost > 0 {
                eprint!("\r\n[{} bytes were lost]\r\n", output.lost);
            }
            let written = out.write_all(&output.printed).and_then(|()| out.flush());
            match written {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(e) => {
                    return Err(Failure::new(format!(
                        "cannot write to standard output: {e}"
                    )));
                }
            }
        }
    }
}

/// Waits for a signal that ends this program, and leaves a terminal behind as it was.
fn end_by_signal(terminal: Terminal, signals: &Signals) {
    loop {
        if let Some(signal) = signals.next() {
            let _ = terminal.restore();
            // As a shell tells it.
            std::process::exit(signal.saturating_add(128));
        }
        if sys::poll(&[(signals.as_fd(), libc::POLLIN)], None).is_err() {
            return;
        }
    }
}

/// Sends what comes by standard input, until that ends or its user leaves.
fn type_all(speaker: &Speaker, keys: bool, left: &AtomicBool) {
    let mut piece = [0; PIECE];
    let mut input = io::stdin();
    let outcome = loop {
        let typed = match input.read(&mut piece) {
            Ok(0) => break speaker.close(PATIENCE),
            Ok(count) => piece.get(..count).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => break Err(ClientError::Io(error)),
        };
        let leaves = typed.iter().position(|byte| keys && *byte == LEAVE);
        let typed = typed.get(..leaves.unwrap_or(typed.len())).unwrap_or(typed);
        let mut message = ConsoleInput::new();
        message.set_typed(typed.to_vec());
        let said = match typed {
            [] => Ok(()),
            _ => speaker.say(&message, PATIENCE),
        };
        if leaves.is_some() {
            left.store(true, Ordering::Release);
            speaker.hang_up();
            return;
        }
        if said.is_err() {
            break said;
        }
    };
    // That the connection is gone is told by who reads.
    if let Err(error @ (ClientError::Timeout(_) | ClientError::Io(_))) = outcome {
        eprint!("\r\nbulkhead: what is typed does not reach the guest any more: {error}\r\n");
    }
}
