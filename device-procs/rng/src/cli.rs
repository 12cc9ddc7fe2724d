//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::inherited::{self, Inherited, needed};
use bulkhead_runtime::limit::Rate;
use bulkhead_runtime::program::{self, UsageError, bad};

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
    /// What every such process is told.
    pub inherited: Inherited,
    /// Where random bytes are read.
    pub source: RawFd,
    /// How many a second; `None`: as many as there are.
    pub bytes: Option<Rate>,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// It makes no sense.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let (mut source, mut bytes) = (None, None);
    let command = inherited::parse(args, |name, value| {
        match name {
            "source-fd" => source = Some(value.fd("--source-fd")?),
            "bps" => bytes = rate(&value.text()?)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    command.try_map(|inherited| {
        let source = needed("--source-fd", source)?;
        inherited.distinct("--source-fd", [source])?;
        Ok(Options {
            inherited,
            source,
            bytes,
        })
    })
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
    use bulkhead_runtime::command_lines::{assert_whole, served};

    use super::*;

    #[test]
    fn a_whole_command_line_is_understood_and_a_part_of_it_is_not() {
        let whole = "--control-fd 3 --vhost-fd 4 --source-fd 5 --fence-fd 6 --bps 1000:20";
        let options = served(parse, whole).unwrap();
        assert_eq!((options.source, options.inherited.fence), (5, Some(6)));
        assert_eq!(options.bytes, Rate::new("", 1000, 20).unwrap());
        assert_eq!(
            served(parse, "--control-fd 3 --vhost-fd 4 --source-fd 5").map(|o| o.bytes),
            Ok(None)
        );
        assert_whole(
            parse,
            whole,
            &[
                ("--control-fd 3", ""),
                ("--source-fd 5", ""),
                ("--source-fd 5", "--source-fd 4"),
                ("--source-fd 5", "--source-fd 1"),
                ("1000:20", "1000:"),
                ("1000:20", "0:20"),
                ("1000:20", "x"),
            ],
        );
    }
}
