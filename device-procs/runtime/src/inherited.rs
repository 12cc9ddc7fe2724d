//! The command line and the start of a device process that bulkhead alone starts: its channels and
//! whatever else it needs are inherited descriptors, named by their numbers.

use std::ffi::OsString;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::process::ExitCode;

use lexopt::prelude::*;

use crate::ServeError;
use crate::channels::{ChannelError, Channels};
use crate::program::{Command, Given, Program, UsageError, bad, distinct, fd};
use crate::sys;

/// Small blocks of memory, all together: connections, messages, tables. Costs nothing until used.
const HEAP: usize = 8 << 20;

/// What every such process is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// Control channel.
    pub control: RawFd,
    /// vhost-user channel.
    pub vhost: RawFd,
    /// Fence.
    pub fence: Option<RawFd>,
    /// Log more.
    pub verbose: bool,
}

/// The value of an option, read by who knows that it has one.
pub struct Value<'a>(&'a mut lexopt::Parser);

impl Value<'_> {
    /// As text.
    ///
    /// # Errors
    /// There is none, or it is not UTF-8.
    pub fn text(self) -> Result<String, UsageError> {
        Ok(self.0.value()?.string()?)
    }

    /// As the number of an inherited descriptor.
    ///
    /// # Errors
    /// It is none.
    pub fn fd(self, option: &'static str) -> Result<RawFd, UsageError> {
        fd(option, &self.text()?)
    }
}

/// Reads a command line, without the program's name. `own` takes the options that only this kind of
/// process has, by their names without dashes, and says false of any other.
///
/// # Errors
/// It makes no sense.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    mut own: impl FnMut(&str, Value<'_>) -> Result<bool, UsageError>,
) -> Result<Command<Inherited>, UsageError> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut given = Given::default();
    let (mut control, mut vhost, mut fence, mut verbose) = (None, None, None, false);
    while let Some(arg) = parser.next()? {
        given.once(&arg)?;
        let name = match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Short('v') | Long("verbose") => {
                verbose = true;
                continue;
            }
            Long(name) => name.to_owned(),
            other => return Err(other.unexpected().into()),
        };
        let value = Value(&mut parser);
        match name.as_str() {
            "control-fd" => control = Some(value.fd("--control-fd")?),
            "vhost-fd" => vhost = Some(value.fd("--vhost-fd")?),
            "fence-fd" => fence = Some(value.fd("--fence-fd")?),
            name if own(name, value)? => {}
            name => return Err(lexopt::Error::UnexpectedOption(format!("--{name}")).into()),
        }
    }
    Ok(Command::Serve(Inherited {
        control: needed("--control-fd", control)?,
        vhost: needed("--vhost-fd", vhost)?,
        fence,
        verbose,
    }))
}

/// What such a process cannot do without.
///
/// # Errors
/// It was not given.
pub fn needed<T>(option: &'static str, value: Option<T>) -> Result<T, UsageError> {
    match value {
        Some(value) => Ok(value),
        None => bad(option, "is needed: start this program through bulkhead"),
    }
}

impl Inherited {
    /// Refuses a descriptor's number that is given twice, `more` included.
    ///
    /// # Errors
    /// It names `option`.
    pub fn distinct(
        &self,
        option: &'static str,
        more: impl IntoIterator<Item = RawFd>,
    ) -> Result<(), UsageError> {
        let mut numbers = vec![self.control, self.vhost];
        numbers.extend(self.fence);
        numbers.extend(more);
        distinct(option, numbers)
    }

    /// Takes the channels: before anything else can take their numbers.
    ///
    /// # Errors
    /// One is not what it should be.
    pub fn channels(&self) -> Result<Channels, ChannelError> {
        Channels::inherited(self.control, self.vhost, self.fence)
    }
}

/// Why such a process could not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its channels.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Another descriptor.
    #[error(
        "inherited fd {fd} ({what}) cannot be used: {error}; start this program through bulkhead"
    )]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What it is for.
        what: &'static str,
        /// What is wrong with it.
        error: io::Error,
    },
    /// Serving.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Takes another descriptor than the channels.
///
/// # Errors
/// It is not open.
pub fn take(fd: RawFd, what: &'static str) -> Result<OwnedFd, StartError> {
    sys::take_inherited(fd).map_err(|error| StartError::Descriptor { fd, what, error })
}

impl Program {
    /// `main` of such a process; `inherited` is in its options. Exit status as of
    /// [`run`](Self::run).
    pub fn start<O>(
        self,
        parse: impl FnOnce(std::iter::Skip<std::env::ArgsOs>) -> Result<Command<O>, UsageError>,
        inherited: impl FnOnce(&O) -> Inherited,
        serve: impl FnOnce(&O) -> Result<(), StartError>,
    ) -> ExitCode {
        #[cfg(feature = "hostile")]
        if crate::hostile::listed() {
            return ExitCode::SUCCESS;
        }
        sys::fixed_heap(HEAP);
        self.run(parse, |options| inherited(options).verbose, serve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Inherited, Option<String>), String> {
        let mut own = None;
        let args = text.split_whitespace().map(OsString::from);
        let command = parse(args, |name, value| {
            if name != "own" {
                return Ok(false);
            }
            own = Some(value.text()?);
            Ok(true)
        });
        match command {
            Ok(Command::Serve(inherited)) => Ok((inherited, own)),
            Ok(_) => Err("not to serve".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn options_of_all_and_of_one_are_told_apart() {
        let whole = "--control-fd 3 --vhost-fd 4 --own x --fence-fd 5 -v";
        let (inherited, own) = read(whole).unwrap();
        assert_eq!((inherited.control, inherited.vhost), (3, 4));
        assert_eq!((inherited.fence, inherited.verbose), (Some(5), true));
        assert_eq!(own.as_deref(), Some("x"));
        inherited.distinct("--own-fd", [6, 7]).unwrap();
        for number in [3, 4, 5] {
            assert!(inherited.distinct("--own-fd", [number]).is_err());
        }
        for (from, to, told) in [
            ("--control-fd 3", "", "--control-fd: is needed"),
            ("--vhost-fd 4", "", "--vhost-fd: is needed"),
            ("--fence-fd 5", "--fence-fd 1", "--fence-fd: must be"),
            ("--own x", "--other x", "'--other'"),
            ("--own x", "--own x --own y", "--own: is given twice"),
            ("--own x", "y", "\"y\""),
            ("--fence-fd 5 -v", "--fence-fd", "--fence-fd"),
        ] {
            let why = read(&whole.replacen(from, to, 1)).unwrap_err();
            assert!(why.contains(told), "{why}");
        }
        for text in ["-h", "--control-fd 3 --version"] {
            assert_eq!(read(text), Err("not to serve".into()));
        }
    }
}
