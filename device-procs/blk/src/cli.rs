//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use lexopt::prelude::*;

use crate::request::ID_BYTES;

/// Most queues of one disk; each costs a thread and a ring.
const MAX_QUEUES: u16 = 64;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-blk: the virtio-blk device process of Bulkhead

Serves one disk over vhost-user. Bulkhead starts it confined, with its channels and its
disk as inherited file descriptors; with --socket it serves any vhost-user front-end
(QEMU's vhost-user-blk-pci, libblkio), one connection after another.

Usage:
  bulkhead-blk --socket PATH --disk path=FILE[,OPTION]...  [--queues N]
  bulkhead-blk --control-fd 3 --vhost-fd 4 --disk fd=5[,OPTION]...  [--queues N]

  --socket PATH        listen at PATH; a stale socket there is replaced
  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --disk SPEC          the disk, comma-separated:
                         path=FILE     raw image or block device (with --socket)
                         fd=N          the same, inherited
                         readonly=on   refuse writes
                         direct=on|off O_DIRECT; default: where the file allows it
                         serial=TEXT   what the guest reads as serial, up to 20 bytes
  --queues N           number of queues, 1 to 64 [default: 1]
  --io-engine ENGINE   auto, io_uring or preadv2 [default: auto]
  -v, --verbose        log more
  -h, --help           this text
  -V, --version        version

A comma in a path is written twice.

Exit status: 0 when its channels close or it is told to, 1 on failure, 2 on wrong usage.
";

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

fn bad<T>(option: &'static str, why: impl Into<String>) -> Result<T, UsageError> {
    Err(UsageError::Value {
        option,
        why: why.into(),
    })
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
    /// Serve.
    Serve(Options),
}

/// Where the front-end is.
#[derive(Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Inherited descriptors.
    Inherited {
        /// Control channel.
        control: RawFd,
        /// vhost-user channel.
        vhost: RawFd,
    },
    /// A socket of its own.
    Socket(PathBuf),
}

/// Where the disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// To be opened.
    Path(PathBuf),
    /// Inherited.
    Fd(RawFd),
}

/// --disk
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Where it is.
    pub source: DiskSource,
    /// Refuse writes.
    pub readonly: bool,
    /// O_DIRECT: demanded, refused, or where the file allows it.
    pub direct: Option<bool>,
    /// What GET_ID answers, padded with zeros.
    pub serial: [u8; ID_BYTES],
}

/// --io-engine
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the host allows it.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// The plain engine.
    Plain,
}

/// All options of a serving process.
#[derive(Debug)]
pub struct Options {
    /// Where the front-end is.
    pub endpoint: Endpoint,
    /// The disk.
    pub disk: DiskOptions,
    /// Number of queues.
    pub queues: u16,
    /// Which engine.
    pub engine: EngineChoice,
    /// Log more.
    pub verbose: bool,
}

/// Reads a command line, without the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = lexopt::Parser::from_args(args);
    let (mut socket, mut control, mut vhost, mut disk) = (None, None, None, None);
    let (mut queues, mut engine, mut verbose) = (1u16, EngineChoice::Auto, false);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Short('v') | Long("verbose") => verbose = true,
            Long("socket") => socket = Some(PathBuf::from(parser.value()?)),
            Long("control-fd") => control = Some(fd("--control-fd", &parser.value()?)?),
            Long("vhost-fd") => vhost = Some(fd("--vhost-fd", &parser.value()?)?),
            Long("disk") => disk = Some(parse_disk(&parser.value()?)?),
            Long("queues") => {
                queues = parser.value()?.parse()?;
                if !(1..=MAX_QUEUES).contains(&queues) {
                    return bad("--queues", format!("must be 1 to {MAX_QUEUES}"));
                }
            }
            Long("io-engine") => {
                engine = match parser.value()?.to_str() {
                    Some("auto") => EngineChoice::Auto,
                    Some("io_uring") => EngineChoice::IoUring,
                    Some("preadv2") => EngineChoice::Plain,
                    _ => return bad("--io-engine", "must be auto, io_uring or preadv2"),
                };
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let endpoint = match (socket, control, vhost) {
        (Some(path), None, None) => Endpoint::Socket(path),
        (None, Some(control), Some(vhost)) if control != vhost => {
            Endpoint::Inherited { control, vhost }
        }
        _ => {
            return bad(
                "--socket",
                "give either it, or both --control-fd and --vhost-fd",
            );
        }
    };
    let Some(disk) = disk else {
        return bad("--disk", "is missing");
    };
    if let (DiskSource::Fd(fd), Endpoint::Inherited { control, vhost }) = (&disk.source, &endpoint)
        && (fd == control || fd == vhost)
    {
        return bad("--disk", "fd is the number of a channel");
    }
    Ok(Command::Serve(Options {
        endpoint,
        disk,
        queues,
        engine,
        verbose,
    }))
}

fn fd(option: &'static str, value: &OsString) -> Result<RawFd, UsageError> {
    match value.to_str().and_then(|v| v.parse::<RawFd>().ok()) {
        Some(fd) if fd > 2 => Ok(fd),
        _ => bad(option, "must be a descriptor number above 2"),
    }
}

fn switch(key: &str, value: &str) -> Result<bool, UsageError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bad("--disk", format!("{key} must be on or off")),
    }
}

/// Splits at commas; two commas stand for one.
fn split(spec: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = spec.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

fn parse_disk(spec: &OsString) -> Result<DiskOptions, UsageError> {
    let Some(spec) = spec.to_str() else {
        return bad("--disk", "must be UTF-8");
    };
    let (mut source, mut readonly, mut direct, mut serial) = (None, false, None, [0; ID_BYTES]);
    for part in split(spec) {
        let Some((key, value)) = part.split_once('=') else {
            return bad("--disk", format!("{part:?} is not KEY=VALUE"));
        };
        match key {
            "path" | "fd" if source.is_some() => {
                return bad("--disk", "give one of path and fd, once");
            }
            "path" if value.is_empty() => return bad("--disk", "path is empty"),
            "path" => source = Some(DiskSource::Path(value.into())),
            "fd" => source = Some(DiskSource::Fd(fd("--disk fd", &value.into())?)),
            "readonly" => readonly = switch(key, value)?,
            "direct" => direct = Some(switch(key, value)?),
            "serial" => {
                let Some(place) = serial.get_mut(..value.len()) else {
                    return bad("--disk", format!("serial is longer than {ID_BYTES} bytes"));
                };
                place.copy_from_slice(value.as_bytes());
            }
            _ => return bad("--disk", format!("unknown key {key:?}")),
        }
    }
    match source {
        Some(source) => Ok(DiskOptions {
            source,
            readonly,
            direct,
            serial,
        }),
        None => bad("--disk", "needs path=FILE or fd=N"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn serve(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(OsString::from)) {
            Ok(Command::Serve(options)) => Ok(options),
            Ok(other) => panic!("{other:?}"),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn the_launchers_line_is_understood() {
        let o = serve(
            "--control-fd 3 --vhost-fd 4 --disk fd=5,readonly=on,direct=on,serial=abc --queues 4",
        )
        .unwrap();
        assert_eq!(
            o.endpoint,
            Endpoint::Inherited {
                control: 3,
                vhost: 4
            }
        );
        assert_eq!(o.disk.source, DiskSource::Fd(5));
        assert!(o.disk.readonly);
        assert_eq!(o.disk.direct, Some(true));
        assert_eq!(&o.disk.serial[..4], b"abc\0");
        assert_eq!(o.queues, 4);
    }

    #[test]
    fn a_path_may_hold_commas() {
        let o = serve("--socket /s --disk path=/a,,b,readonly=off").unwrap();
        assert_eq!(o.disk.source, DiskSource::Path("/a,b".into()));
        assert!(!o.disk.readonly);
    }

    #[test]
    fn nonsense_is_one_line_that_names_the_option() {
        for (line, word) in [
            ("--disk path=/x", "--socket"),
            ("--socket /s", "--disk"),
            ("--socket /s --vhost-fd 4 --disk path=/x", "--socket"),
            ("--socket /s --disk path=/x --queues 0", "--queues"),
            ("--socket /s --disk path=/x --queues 65", "--queues"),
            ("--socket /s --disk path=/x,fd=5", "--disk"),
            ("--socket /s --disk readonly=on", "--disk"),
            ("--socket /s --disk path=/x,readonly=yes", "readonly"),
            (
                "--socket /s --disk path=/x,serial=123456789012345678901",
                "serial",
            ),
            ("--socket /s --disk path=/x --io-engine aio", "--io-engine"),
            ("--control-fd 3 --vhost-fd 4 --disk fd=4", "--disk"),
            ("--control-fd 1 --vhost-fd 4 --disk fd=5", "--control-fd"),
            ("--nonsense", "--nonsense"),
        ] {
            let e = serve(line).unwrap_err();
            assert!(e.contains(word), "{line}: {e}");
            assert!(!e.contains('\n'));
        }
    }
}
