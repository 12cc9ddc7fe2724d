//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::inherited::{self, Inherited, needed};
use bulkhead_runtime::program::{self, UsageError, bad};

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
    /// What every such process is told.
    pub inherited: Inherited,
    /// Bell.
    pub bell: RawFd,
    /// The memory.
    pub area: Area,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// It makes no sense.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let (mut bell, mut area, mut block) = (None, None, None);
    let command = inherited::parse(args, |name, value| {
        match name {
            "bell-fd" => bell = Some(value.fd("--bell-fd")?),
            "area" => {
                let text = value.text()?;
                let parts = text.split_once(':').map(|(a, b)| (a.parse(), b.parse()));
                area = match parts {
                    Some((Ok(start), Ok(size))) => Some((start, size)),
                    _ => return bad("--area", "must be START:SIZE in bytes"),
                };
            }
            "block" => {
                block = match value.text()?.parse() {
                    Ok(block) => Some(block),
                    Err(_) => return bad("--block", "must be a number of bytes"),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    command.try_map(|inherited| {
        let bell = needed("--bell-fd", bell)?;
        let (start, size) = needed("--area", area)?;
        let area = match Area::new(start, size, needed("--block", block)?) {
            Ok(area) => area,
            Err(why) => return bad("--area", why),
        };
        inherited.distinct("--bell-fd", [bell])?;
        Ok(Options {
            inherited,
            bell,
            area,
        })
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_runtime::command_lines::{assert_whole, served};

    use super::*;

    #[test]
    fn a_whole_command_line_is_understood_and_a_part_of_it_is_not() {
        let whole = "--control-fd 3 --vhost-fd 4 --bell-fd 5 --fence-fd 6 --area 4294967296:4194304 --block 2097152";
        let options = served(parse, whole).unwrap();
        assert_eq!((options.bell, options.inherited.fence), (5, Some(6)));
        assert_eq!(options.area.size, 4 << 20);
        assert_whole(
            parse,
            whole,
            &[
                ("--control-fd 3", ""),
                ("--bell-fd 5", ""),
                ("--bell-fd 5", "--bell-fd 4"),
                ("--bell-fd 5", "--bell-fd 1"),
                ("--block 2097152", ""),
                ("2097152", "2097153"),
                ("4294967296:", ""),
                (":4194304", ":4194305"),
            ],
        );
    }
}
