//! What every device process's `main` does around its own work: the command line and what is
//! wrong with it, the logger, one line for an error, and the exit status.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::RawFd;
use std::process::ExitCode;

use lexopt::Arg;

use log::LevelFilter;

use crate::{logger, sys};

/// What a command line asks for.
#[derive(Debug)]
pub enum Command<O> {
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
    /// Serve.
    Serve(O),
}

impl<O> Command<O> {
    /// What is to be served, in other words.
    ///
    /// # Errors
    /// That of `change`.
    pub fn try_map<P, E>(self, change: impl FnOnce(O) -> Result<P, E>) -> Result<Command<P>, E> {
        match self {
            Self::Help => Ok(Command::Help),
            Self::Version => Ok(Command::Version),
            Self::Serve(options) => change(options).map(Command::Serve),
        }
    }
}

/// A command line that makes no sense; exit status 2.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The parser's own complaint.
    #[error("{0}; see --help")]
    Argument(#[from] lexopt::Error),
    /// A value that makes no sense.
    #[error("{option}: {why}; see --help")]
    Value {
        /// Which option.
        option: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// The value of an option makes no sense.
///
/// # Errors
/// Always.
pub fn bad<T>(option: &'static str, why: impl Into<String>) -> Result<T, UsageError> {
    let why = why.into();
    Err(UsageError::Value { option, why })
}

/// The number of an inherited descriptor.
///
/// # Errors
/// It is none, or that of a standard stream.
pub fn fd(option: &'static str, value: &str) -> Result<RawFd, UsageError> {
    match value.parse::<RawFd>() {
        Ok(fd) if fd > 2 => Ok(fd),
        _ => bad(option, "must be a descriptor number above 2"),
    }
}

/// Refuses a number that stands in a command line for two descriptors.
///
/// # Errors
/// It names `option`.
pub fn distinct(option: &'static str, mut numbers: Vec<RawFd>) -> Result<(), UsageError> {
    numbers.sort_unstable();
    if numbers.windows(2).any(|w| matches!(w, [a, b] if a == b)) {
        return bad(option, "a descriptor number is given twice");
    }
    Ok(())
}

/// Options that were given; each may be given once, but `--verbose`.
#[derive(Debug, Default)]
pub struct Given(BTreeSet<String>);

impl Given {
    /// Notes an argument.
    ///
    /// # Errors
    /// It is an option that was given before.
    pub fn once(&mut self, arg: &Arg<'_>) -> Result<(), UsageError> {
        match arg {
            Arg::Long(name) if *name != "verbose" && !self.0.insert((*name).to_owned()) => {
                let twice = format!("--{name}: is given twice: give it once");
                Err(lexopt::Error::Custom(twice.into()).into())
            }
            _ => Ok(()),
        }
    }
}

/// A program: what it is called, its version and its help text.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// As in its messages.
    pub name: &'static str,
    /// Its package's.
    pub version: &'static str,
    /// Text of --help.
    pub help: &'static str,
}

impl Program {
    /// Reads the command line and runs what it asks for. Exit status 0 when that is done, 1 if
    /// it fails, 2 on wrong usage.
    pub fn run<O, U: std::error::Error, E: std::error::Error>(
        self,
        parse: impl FnOnce(std::iter::Skip<std::env::ArgsOs>) -> Result<Command<O>, U>,
        verbose: impl FnOnce(&O) -> bool,
        serve: impl FnOnce(&O) -> Result<(), E>,
    ) -> ExitCode {
        let options = match parse(std::env::args_os().skip(1)) {
            Ok(Command::Serve(options)) => options,
            Ok(Command::Help) => return print(self.help),
            Ok(Command::Version) => return print(&format!("{} {}\n", self.name, self.version)),
            Err(e) => {
                logger::complain(self.name, &e);
                return ExitCode::from(2);
            }
        };
        logger::init(if verbose(&options) {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        });
        match serve(&options) {
            // Without the library's end of a process, which would take locks of threads.
            Ok(()) => sys::exit(0),
            Err(e) => {
                logger::complain(self.name, &e);
                sys::exit(1)
            }
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
