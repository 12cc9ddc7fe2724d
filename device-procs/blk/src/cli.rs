//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use bulkhead_runtime::program::{self, Given, UsageError, bad, fd};
use lexopt::prelude::*;

use crate::disk_options::DiskOptions;
pub use crate::disk_options::DiskSource;

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
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --disk SPEC          the disk, comma-separated:
                         path=FILE     raw image or block device (with --socket)
                         fd=N          the same, inherited
                         readonly=on   refuse writes
                         format=FORMAT raw or qcow2; never guessed [default: raw]
                         cache=MODE    none: O_DIRECT where the file allows it [default];
                                       writeback: through the page cache;
                                       writethrough: each write is durable when it ends;
                                       unsafe: flushes are ignored
                         direct=on|off O_DIRECT, whatever the cache mode
                         serial=TEXT   what the guest reads as serial, up to 20 bytes
                         bps=N[:BURST] most bytes per second, with K, M, G or T
                         iops=N[:BURST] most requests per second
                         max-size=SIZE the file may never be made larger than this
                         backing=PATH[:PATH]... files beneath a qcow2 image, top first
                         backing-fds=N[:N]... the same, inherited
                         secure-erase=on|off offer it where a block device can, with
                                       io_uring [default: on with path=, off with fd=]
                         lock=off      do not lock the file: who else writes it corrupts it
  --queues N           number of queues, 1 to 64 [default: 1]
  --io-engine ENGINE   auto, io_uring or preadv2 [default: auto]
  -v, --verbose        log more
  -h, --help           this text
  -V, --version        version

A comma in a path is written twice.

Exit status: 0 when its channels close or it is told to, 1 on failure, 2 on wrong usage.
";

/// What the command line asks for.
pub type Command = program::Command<Options>;

/// Where the front-end is.
#[derive(Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Inherited descriptors.
    Inherited {
        /// Control channel.
        control: RawFd,
        /// vhost-user channel.
        vhost: RawFd,
        /// Write end of the fence.
        fence: Option<RawFd>,
    },
    /// A socket of its own.
    Socket(PathBuf),
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
    let mut fence = None;
    let (mut queues, mut engine, mut verbose) = (1u16, EngineChoice::Auto, false);
    let mut given = Given::default();
    while let Some(arg) = parser.next()? {
        given.once(&arg)?;
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Short('v') | Long("verbose") => verbose = true,
            Long("socket") => socket = Some(PathBuf::from(parser.value()?)),
            Long("control-fd") => control = Some(fd("--control-fd", &parser.value()?.string()?)?),
            Long("vhost-fd") => vhost = Some(fd("--vhost-fd", &parser.value()?.string()?)?),
            Long("fence-fd") => fence = Some(fd("--fence-fd", &parser.value()?.string()?)?),
            Long("disk") => disk = Some(DiskOptions::parse(&parser.value()?)?),
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
        (Some(path), None, None) if fence.is_none() => Endpoint::Socket(path),
        (None, Some(control), Some(vhost))
            if control != vhost && fence.is_none_or(|fd| fd != control && fd != vhost) =>
        {
            Endpoint::Inherited {
                control,
                vhost,
                fence,
            }
        }
        _ => {
            return bad(
                "--socket",
                "give either it, or both --control-fd and --vhost-fd (and --fence-fd)",
            );
        }
    };
    let Some(disk) = disk else {
        return bad("--disk", "is missing");
    };
    if let Endpoint::Inherited {
        control,
        vhost,
        fence,
    } = &endpoint
        && disk
            .fds()
            .any(|fd| fd == *control || fd == *vhost || Some(fd) == *fence)
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
                vhost: 4,
                fence: None
            }
        );
        assert_eq!(o.disk.source, DiskSource::Fd(5));
        assert!(o.disk.readonly);
        assert_eq!(o.disk.direct, Some(true));
        assert_eq!(&o.disk.serial[..4], b"abc\0");
        assert_eq!(o.queues, 4);
    }

    #[test]
    fn a_second_disk_is_refused() {
        let two = serve("--socket /s --disk path=/a --disk path=/b").unwrap_err();
        assert!(two.contains("--disk: is given twice"), "{two}");
        let two = serve("--socket /s --disk path=/a --queues 1 --queues 2").unwrap_err();
        assert!(two.contains("--queues: is given twice"), "{two}");
    }

    #[test]
    fn a_fence_goes_with_channels() {
        let o = serve("--control-fd 3 --vhost-fd 4 --fence-fd 6 --disk fd=5").unwrap();
        assert_eq!(
            o.endpoint,
            Endpoint::Inherited {
                control: 3,
                vhost: 4,
                fence: Some(6)
            }
        );
        for line in [
            "--socket /s --fence-fd 6 --disk path=/x",
            "--control-fd 3 --vhost-fd 4 --fence-fd 4 --disk fd=5",
            "--control-fd 3 --vhost-fd 4 --fence-fd 5 --disk fd=5",
        ] {
            assert!(serve(line).is_err(), "{line}");
        }
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
            ("--socket /s --disk path=/x --io-engine aio", "--io-engine"),
            ("--control-fd 3 --vhost-fd 4 --disk fd=4", "--disk"),
            (
                "--control-fd 3 --vhost-fd 4 --disk fd=5,format=qcow2,backing-fds=3",
                "--disk",
            ),
            ("--control-fd 1 --vhost-fd 4 --disk fd=5", "--control-fd"),
            ("--nonsense", "--nonsense"),
        ] {
            let e = serve(line).unwrap_err();
            assert!(e.contains(word), "{line}: {e}");
            assert!(!e.contains('\n'));
        }
    }
}
