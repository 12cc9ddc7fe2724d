//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::limit::Rate;
use bulkhead_runtime::program::{self, Given, UsageError, bad, distinct, fd};
use lexopt::prelude::*;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-rng: the virtio entropy device process of Bulkhead

Gives a guest random bytes of the host's. Bulkhead starts it confined, with its channels and the
host's generator as inherited file descriptors.

Usage:
  bulkhead-rng --control-fd 3 --vhost-fd 4 --source-fd 5 [--bps N[:BURST]]

  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --source-fd N        inherited descriptor of /dev/random
  --bps N[:BURST]      bytes per second, and how many may be saved up
  -v, --verbose        log more
  -h, --help           this text
  -V, --version        version

Exit status: 0 when its channels close or it is told to, 1 on failure, 2 on wrong usage.
";

/// What the command line asks for.
pub type Command = program::Command<Options>;

/// All options of a serving process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Control channel.
    pub control: RawFd,
    /// vhost-user channel.
    pub vhost: RawFd,
    /// Fence.
    pub fence: Option<RawFd>,
    /// Where random bytes are read.
    pub source: RawFd,
    /// How many a second; `None`: as many as there are.
    pub bytes: Option<Rate>,
    /// Log more.
    pub verbose: bool,
}

#[derive(Default)]
struct Raw {
    control: Option<RawFd>,
    vhost: Option<RawFd>,
    fence: Option<RawFd>,
    source: Option<RawFd>,
    bytes: Option<Rate>,
    verbose: bool,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// It makes no sense.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut raw = Raw::default();
    let mut given = Given::default();
    while let Some(arg) = parser.next()? {
        given.once(&arg)?;
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Short('v') | Long("verbose") => raw.verbose = true,
            Long("control-fd") => {
                raw.control = Some(fd("--control-fd", &parser.value()?.string()?)?)
            }
            Long("vhost-fd") => raw.vhost = Some(fd("--vhost-fd", &parser.value()?.string()?)?),
            Long("fence-fd") => raw.fence = Some(fd("--fence-fd", &parser.value()?.string()?)?),
            Long("source-fd") => raw.source = Some(fd("--source-fd", &parser.value()?.string()?)?),
            Long("bps") => raw.bytes = rate(&parser.value()?.string()?)?,
            other => return Err(other.unexpected().into()),
        }
    }
    raw.check().map(Command::Serve)
}

impl Raw {
    fn check(self) -> Result<Options, UsageError> {
        let (Some(control), Some(vhost), Some(source)) = (self.control, self.vhost, self.source)
        else {
            return bad(
                "--control-fd",
                "is needed, and so are --vhost-fd and --source-fd: start this program through bulkhead",
            );
        };
        let mut numbers = vec![control, vhost, source];
        numbers.extend(self.fence);
        distinct("--source-fd", numbers)?;
        Ok(Options {
            control,
            vhost,
            fence: self.fence,
            source,
            bytes: self.bytes,
            verbose: self.verbose,
        })
    }
}

/// `N[:BURST]`
fn rate(value: &str) -> Result<Option<Rate>, UsageError> {
    let (rate, burst) = value.split_once(':').unwrap_or((value, "0"));
    match (rate.parse(), burst.parse()) {
        (Ok(rate), Ok(burst)) => Rate::new("rate", rate, burst).or_else(|why| bad("--bps", why)),
        _ => bad("--bps", "must be N or N:BURST"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(text: &str) -> Result<Options, String> {
        match parse(text.split_whitespace().map(OsString::from)) {
            Ok(Command::Serve(options)) => Ok(options),
            Ok(_) => Err("not to serve".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn a_whole_command_line_is_understood_and_a_part_of_it_is_not() {
        let whole = "--control-fd 3 --vhost-fd 4 --source-fd 5 --fence-fd 6 --bps 1000:20";
        let options = serve(whole).unwrap();
        assert_eq!((options.source, options.fence), (5, Some(6)));
        assert_eq!(options.bytes, Rate::new("", 1000, 20).unwrap());
        assert_eq!(
            serve("--control-fd 3 --vhost-fd 4 --source-fd 5").map(|o| o.bytes),
            Ok(None)
        );
        for (from, to) in [
            ("--control-fd 3", ""),
            ("--source-fd 5", ""),
            ("--source-fd 5", "--source-fd 4"),
            ("--source-fd 5", "--source-fd 1"),
            ("1000:20", "1000:"),
            ("1000:20", "0:20"),
            ("1000:20", "x"),
        ] {
            let text = whole.replacen(from, to, 1);
            assert!(serve(&text).is_err(), "{text}");
        }
        assert!(matches!(parse(["-h".into()]), Ok(Command::Help)));
    }
}
