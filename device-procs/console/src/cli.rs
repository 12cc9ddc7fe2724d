//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;

use bulkhead_runtime::inherited::{self, Inherited, needed};
use bulkhead_runtime::program::{self, UsageError, bad};

use crate::control::Size;

/// Most ports of one device.
pub const MOST_PORTS: usize = 16;
/// Most bytes of a port's name.
const MOST_NAME: usize = 64;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-console: the virtio console device process of Bulkhead

Joins clients of unix sockets of the host's to consoles and named ports of a guest's. Bulkhead starts
it confined, with its channels and the listening sockets as inherited file descriptors.

Usage:
  bulkhead-console --control-fd 3 --vhost-fd 4 --ports FD[:NAME][,FD[:NAME]]… [--sizes PORT:COLSxROWS[,…]]

  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --ports FD[:NAME],…  inherited listening socket of each port, and its name; without one it is a
                       console
  --sizes PORT:COLSxROWS,…   how large a console is; PORT counts from 0
  -v, --verbose        log more
  -h, --help           this text
  -V, --version        version

Exit status: 0 when its channels close or it is told to, 1 on failure, 2 on wrong usage.
";

/// What the command line asks for.
pub type Command = program::Command<Options>;

/// One port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where clients come.
    pub listener: RawFd,
    /// `None`: a console.
    pub name: Option<String>,
    /// Of a console, once it is known.
    pub size: Size,
}

/// All options of a serving process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What every such process is told.
    pub inherited: Inherited,
    /// Its ports, 1 to [`MOST_PORTS`].
    pub ports: Vec<Place>,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// It makes no sense.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let (mut ports, mut sizes) = (None, Vec::new());
    let command = inherited::parse(args, |name, value| {
        match name {
            "ports" => ports = Some(places(&value.text()?)?),
            "sizes" => {
                for text in value.text()?.split(',') {
                    sizes.push(size(text)?);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    command.try_map(|inherited| {
        let mut ports = needed("--ports", ports)?;
        for (index, size) in sizes {
            match ports.get_mut(index) {
                Some(port) if port.name.is_none() => port.size = size,
                _ => return bad("--sizes", format!("port {index} is no console")),
            }
        }
        inherited.distinct("--ports", ports.iter().map(|port| port.listener))?;
        Ok(Options { inherited, ports })
    })
}

/// `FD[:NAME],…`
fn places(text: &str) -> Result<Vec<Place>, UsageError> {
    let mut places: Vec<Place> = Vec::new();
    for part in text.split(',') {
        let (number, name) = match part.split_once(':') {
            Some((number, name)) => (number, Some(name)),
            None => (part, None),
        };
        let good = |name: &str| {
            !name.is_empty()
                && name.len() <= MOST_NAME
                && name.bytes().all(|b| b.is_ascii_graphic())
        };
        if name.is_some_and(|name| !good(name)) {
            return bad(
                "--ports",
                format!("a name must have 1 to {MOST_NAME} letters"),
            );
        }
        if name.is_some() && places.iter().any(|place| place.name.as_deref() == name) {
            return bad("--ports", "a name is given twice");
        }
        places.push(Place {
            listener: program::fd("--ports", number)?,
            name: name.map(str::to_owned),
            size: Size::default(),
        });
    }
    if places.len() > MOST_PORTS {
        return bad("--ports", format!("at most {MOST_PORTS} ports"));
    }
    Ok(places)
}

/// `PORT:COLSxROWS`
fn size(text: &str) -> Result<(usize, Size), UsageError> {
    let parts = text.split_once(':').and_then(|(port, size)| {
        let (cols, rows) = size.split_once('x')?;
        let size = Size {
            cols: cols.parse().ok()?,
            rows: rows.parse().ok()?,
        };
        Some((port.parse().ok()?, size))
    });
    match parts {
        Some(parts) => Ok(parts),
        None => bad("--sizes", "must be PORT:COLSxROWS"),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_runtime::command_lines::{assert_whole, served};

    use super::*;

    #[test]
    fn a_whole_command_line_is_understood_and_a_part_of_it_is_not() {
        let whole = "--control-fd 3 --vhost-fd 4 --ports 5,6:agent,8 --fence-fd 7 --sizes 0:80x24,2:1x65535";
        let options = served(parse, whole).unwrap();
        let found: Vec<_> = options
            .ports
            .iter()
            .map(|p| (p.listener, p.name.as_deref(), p.size.cols, p.size.rows))
            .collect();
        assert_eq!(
            found,
            [
                (5, None, 80, 24),
                (6, Some("agent"), 0, 0),
                (8, None, 1, 65535)
            ]
        );
        assert_eq!(options.inherited.fence, Some(7));
        assert_whole(
            parse,
            whole,
            &[
                ("--control-fd 3", ""),
                ("--ports 5,6:agent,8", ""),
                ("5,6:agent", "5,5:agent"),
                ("5,6:agent", "4,6:agent"),
                ("5,6:agent", "1,6:agent"),
                ("5,6:agent", "5,,6:agent"),
                ("agent", ""),
                ("agent,8", "agent,8:agent"),
                ("0:80x24", "1:80x24"),
                ("0:80x24", "3:80x24"),
                ("0:80x24", "80x24"),
                ("0:80x24", "0:65536x24"),
            ],
        );
        let many: Vec<String> = (5..5 + MOST_PORTS).map(|fd| fd.to_string()).collect();
        let line = format!("--control-fd 3 --vhost-fd 4 --ports {}", many.join(","));
        assert!(served(parse, &line).is_ok());
        assert!(served(parse, &format!("{line},99")).is_err());
    }
}
