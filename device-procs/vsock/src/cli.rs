//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::inherited::{self, Inherited, needed};
use bulkhead_runtime::program::{self, UsageError, bad};

/// Address of a guest that was given none: the first that a guest may have.
const DEFAULT_CID: u64 = 3;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-vsock: the virtio socket device process of Bulkhead

Joins clients of a unix socket of the host's to ports of a guest's, and the guest's to sockets of the
host's beside it. Bulkhead starts it confined, with its channels and the listening socket as inherited
file descriptors.

Usage:
  bulkhead-vsock --control-fd 3 --vhost-fd 4 --listen-fd 5 [--dial-fd 6] [--cid N]

  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --listen-fd N        inherited listening socket
  --dial-fd N          inherited channel to ask the launcher for connections; without it the guest
                       can begin none
  --cid N              the guest's address [default: 3]
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
    /// Where clients come.
    pub listener: RawFd,
    /// Where connections are asked for.
    pub dial: Option<RawFd>,
    /// The guest's address.
    pub cid: u64,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// It makes no sense.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let (mut listener, mut dial, mut cid) = (None, None, DEFAULT_CID);
    let command = inherited::parse(args, |name, value| {
        match name {
            "listen-fd" => listener = Some(value.fd("--listen-fd")?),
            "dial-fd" => dial = Some(value.fd("--dial-fd")?),
            "cid" => {
                cid = match value.text()?.parse::<u32>() {
                    Ok(cid) if (3..u32::MAX).contains(&cid) => cid.into(),
                    _ => return bad("--cid", "must be from 3 to 4294967294"),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    command.try_map(|inherited| {
        let listener = needed("--listen-fd", listener)?;
        inherited.distinct("--listen-fd", [listener].into_iter().chain(dial))?;
        Ok(Options {
            inherited,
            listener,
            dial,
            cid,
        })
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_runtime::command_lines::{assert_whole, served};

    use super::*;

    #[test]
    fn a_whole_command_line_is_understood_and_a_part_of_it_is_not() {
        let whole = "--control-fd 3 --vhost-fd 4 --listen-fd 5 --fence-fd 6 --dial-fd 7 --cid 77";
        let options = served(parse, whole).unwrap();
        assert_eq!(
            (
                options.listener,
                options.inherited.fence,
                options.dial,
                options.cid
            ),
            (5, Some(6), Some(7), 77)
        );
        assert_whole(
            parse,
            whole,
            &[
                ("--control-fd 3", ""),
                ("--listen-fd 5", ""),
                ("--listen-fd 5", "--listen-fd 4"),
                ("--listen-fd 5", "--listen-fd 1"),
                ("--dial-fd 7", "--dial-fd 6"),
                ("77", "2"),
                ("77", "4294967295"),
                ("77", "x"),
            ],
        );
    }
}
