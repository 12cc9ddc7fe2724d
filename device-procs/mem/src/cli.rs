//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::program::{self, Given, UsageError, bad, distinct, fd};
use lexopt::prelude::*;

use crate::state::Area;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-mem: the virtio-mem device process of Bulkhead

Tells a guest how much memory it shall have, and asks the VMM to plug and unplug what the guest
wants. Bulkhead starts it confined, with its channels as inherited file descriptors.

Usage:
  bulkhead-mem --control-fd 3 --vhost-fd 4 --bell-fd 5 --area START:SIZE --block SIZE

  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --bell-fd N          inherited eventfd, written when the VMM is to look
  --area START:SIZE    where the memory lies that can be plugged, in bytes
  --block SIZE         it is plugged and unplugged in blocks of so many bytes
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
    /// Bell.
    pub bell: RawFd,
    /// The memory.
    pub area: Area,
    /// Log more.
    pub verbose: bool,
}

#[derive(Default)]
struct Raw {
    control: Option<RawFd>,
    vhost: Option<RawFd>,
    fence: Option<RawFd>,
    bell: Option<RawFd>,
    area: Option<(u64, u64)>,
    block: Option<u64>,
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
            Long("bell-fd") => raw.bell = Some(fd("--bell-fd", &parser.value()?.string()?)?),
            Long("area") => {
                let text = parser.value()?.string()?;
                let parts = text.split_once(':').map(|(a, b)| (a.parse(), b.parse()));
                raw.area = match parts {
                    Some((Ok(start), Ok(size))) => Some((start, size)),
                    _ => return bad("--area", "must be START:SIZE in bytes"),
                };
            }
            Long("block") => {
                raw.block = match parser.value()?.string()?.parse() {
                    Ok(block) => Some(block),
                    Err(_) => return bad("--block", "must be a number of bytes"),
                };
            }
            other => return Err(other.unexpected().into()),
        }
    }
    raw.check().map(Command::Serve)
}

impl Raw {
    fn check(self) -> Result<Options, UsageError> {
        let (Some(control), Some(vhost), Some(bell)) = (self.control, self.vhost, self.bell) else {
            return bad(
                "--control-fd",
                "is needed, and so are --vhost-fd and --bell-fd: start this program through bulkhead",
            );
        };
        let (Some((start, size)), Some(block)) = (self.area, self.block) else {
            return bad("--area", "is needed, and so is --block");
        };
        let area = match Area::new(start, size, block) {
            Ok(area) => area,
            Err(why) => return bad("--area", why),
        };
        let mut numbers = vec![control, vhost, bell];
        numbers.extend(self.fence);
        distinct("--bell-fd", numbers)?;
        Ok(Options {
            control,
            vhost,
            fence: self.fence,
            bell,
            area,
            verbose: self.verbose,
        })
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
        let whole = "--control-fd 3 --vhost-fd 4 --bell-fd 5 --fence-fd 6 --area 4294967296:4194304 --block 2097152";
        let options = serve(whole).unwrap();
        assert_eq!((options.bell, options.fence), (5, Some(6)));
        assert_eq!(options.area.size, 4 << 20);
        for (from, to) in [
            ("--control-fd 3", ""),
            ("--bell-fd 5", ""),
            ("--bell-fd 5", "--bell-fd 4"),
            ("--bell-fd 5", "--bell-fd 1"),
            ("--block 2097152", ""),
            ("2097152", "2097153"),
            ("4294967296:", ""),
            (":4194304", ":4194305"),
        ] {
            let text = whole.replacen(from, to, 1);
            assert!(serve(&text).is_err(), "{text}");
        }
        assert!(matches!(parse(["-h".into()]), Ok(Command::Help)));
    }
}
