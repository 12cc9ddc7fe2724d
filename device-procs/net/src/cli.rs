//! The command line: parsed once, into types that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use bulkhead_runtime::limit::Rate;
use bulkhead_runtime::program::{self, Given, UsageError, bad, distinct, fd};
use lexopt::prelude::*;

use crate::filter::{Mac, is_multicast};
use crate::state::Limits;
use crate::tap::interface_name;

/// Most queue pairs of one device; each costs a thread, and a tap has no more queues.
pub const MAX_PAIRS: u16 = 64;
/// Smallest MTU of IPv4.
const MIN_MTU: u16 = 68;
/// The kernel's largest for a tap.
const MAX_MTU: u16 = 65521;

/// Text of --help.
pub const HELP: &str = "\
bulkhead-net: the virtio-net device process of Bulkhead

Serves one network interface over vhost-user. Bulkhead starts it confined, with its channels
and its tap as inherited file descriptors; with --socket it serves any vhost-user front-end
(QEMU's vhost-user netdev, DPDK's virtio-user), one connection after another.

Usage:
  bulkhead-net --socket PATH --tap NAME [OPTION]...
  bulkhead-net --control-fd 3 --vhost-fd 4 --tap fds=5[:6]... [OPTION]...

  --socket PATH        listen at PATH; a stale socket there is replaced
  --control-fd N       inherited control channel (ttrpc)
  --vhost-fd N         inherited vhost-user channel
  --fence-fd N         inherited write end of a pipe, kept open until all I/O has ended
  --tap SPEC           the tap:
                         NAME        attach to the interface, or create it (with --socket)
                         fds=N[:N]…  attached already, inherited, one per queue pair
  --vhost-net fds=N[:N]…
                       inherited descriptors of /dev/vhost-net, one per queue pair: the
                       kernel moves the frames
  --queue-pairs N      number of queue pairs, 1 to 64 [default: one per descriptor, or 1]
  --mac XX:XX:XX:XX:XX:XX
                       the guest's address [default, with --socket: a random one]
  --mtu N              MTU that the guest is told [default: none]
  --link up|down       whether the cable is in at first [default: up]
  --rx-bps N[:BURST]   bytes per second to the guest, and how many may be saved up
  --rx-pps N[:BURST]   the same in frames
  --tx-bps N[:BURST]   bytes per second from the guest
  --tx-pps N[:BURST]   the same in frames
  --io-engine ENGINE   auto, io_uring or plain [default: auto]
  -v, --verbose        log more
  -h, --help           this text
  -V, --version        version

Exit status: 0 when its channels close or it is told to, 1 on failure, 2 on wrong usage.
";

/// What the command line asks for.
pub type Command = program::Command<Box<Options>>;

/// Where the front-end is.
#[derive(Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Inherited descriptors.
    Inherited {
        /// Control channel.
        control: RawFd,
        /// vhost-user channel.
        vhost: RawFd,
        /// Fence.
        fence: Option<RawFd>,
    },
    /// A socket of its own.
    Socket(PathBuf),
}

/// Where the tap is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// To be attached to.
    Name(String),
    /// Inherited, attached.
    Fds(Vec<RawFd>),
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
    /// The tap.
    pub tap: TapSource,
    /// Descriptors of /dev/vhost-net.
    pub vhost_net: Vec<RawFd>,
    /// Queue pairs.
    pub pairs: u16,
    /// The guest's address.
    pub mac: Option<Mac>,
    /// MTU to tell.
    pub mtu: Option<u16>,
    /// The cable is in.
    pub link_up: bool,
    /// Limits to the guest.
    pub to_guest: Limits,
    /// Limits from the guest.
    pub from_guest: Limits,
    /// Which engine.
    pub engine: EngineChoice,
    /// Log more.
    pub verbose: bool,
}

#[derive(Default)]
struct Raw {
    socket: Option<PathBuf>,
    control: Option<RawFd>,
    vhost: Option<RawFd>,
    fence: Option<RawFd>,
    tap: Option<TapSource>,
    vhost_net: Vec<RawFd>,
    pairs: Option<u16>,
    mac: Option<Mac>,
    mtu: Option<u16>,
    link_down: bool,
    to_guest: Limits,
    from_guest: Limits,
    engine: EngineChoice,
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
            Long("socket") => raw.socket = Some(PathBuf::from(parser.value()?)),
            Long("control-fd") => raw.control = Some(fd("--control-fd", &text(&mut parser)?)?),
            Long("vhost-fd") => raw.vhost = Some(fd("--vhost-fd", &text(&mut parser)?)?),
            Long("fence-fd") => raw.fence = Some(fd("--fence-fd", &text(&mut parser)?)?),
            Long("tap") => tap(&mut raw, &text(&mut parser)?)?,
            Long("vhost-net") => raw.vhost_net = fds("--vhost-net", &text(&mut parser)?)?,
            Long("queue-pairs") => {
                raw.pairs = match text(&mut parser)?.parse() {
                    Ok(pairs @ 1..=MAX_PAIRS) => Some(pairs),
                    _ => return bad("--queue-pairs", format!("must be 1 to {MAX_PAIRS}")),
                };
            }
            Long("mac") => raw.mac = Some(mac(&text(&mut parser)?)?),
            Long("mtu") => {
                raw.mtu = match text(&mut parser)?.parse() {
                    Ok(mtu @ MIN_MTU..=MAX_MTU) => Some(mtu),
                    _ => return bad("--mtu", format!("must be {MIN_MTU} to {MAX_MTU}")),
                };
            }
            Long("link") => {
                raw.link_down = match text(&mut parser)?.as_str() {
                    "up" => false,
                    "down" => true,
                    _ => return bad("--link", "must be up or down"),
                };
            }
            Long("rx-bps") => raw.to_guest.bytes = rate("--rx-bps", &text(&mut parser)?)?,
            Long("rx-pps") => raw.to_guest.packets = rate("--rx-pps", &text(&mut parser)?)?,
            Long("tx-bps") => raw.from_guest.bytes = rate("--tx-bps", &text(&mut parser)?)?,
            Long("tx-pps") => raw.from_guest.packets = rate("--tx-pps", &text(&mut parser)?)?,
            Long("io-engine") => {
                raw.engine = match text(&mut parser)?.as_str() {
                    "auto" => EngineChoice::Auto,
                    "io_uring" => EngineChoice::IoUring,
                    "plain" => EngineChoice::Plain,
                    _ => return bad("--io-engine", "must be auto, io_uring or plain"),
                };
            }
            other => return Err(other.unexpected().into()),
        }
    }
    raw.check().map(|options| Command::Serve(Box::new(options)))
}

impl Raw {
    fn check(self) -> Result<Options, UsageError> {
        let endpoint = match (self.socket, self.control, self.vhost) {
            (Some(path), None, None) if self.fence.is_none() => Endpoint::Socket(path),
            (None, Some(control), Some(vhost)) => Endpoint::Inherited {
                control,
                vhost,
                fence: self.fence,
            },
            _ => {
                return bad(
                    "--socket",
                    "give --socket PATH, or both --control-fd N and --vhost-fd N",
                );
            }
        };
        let Some(tap) = self.tap else {
            return bad("--tap", "is missing: give --tap NAME");
        };
        let pairs = match (&tap, self.pairs) {
            (TapSource::Name(_), pairs) => pairs.unwrap_or(1),
            (TapSource::Fds(fds), pairs) => {
                let given = u16::try_from(fds.len()).unwrap_or(u16::MAX);
                if pairs.unwrap_or(given) != given || !(1..=MAX_PAIRS).contains(&given) {
                    return bad("--tap", "needs one descriptor per queue pair");
                }
                given
            }
        };
        if !self.vhost_net.is_empty() && self.vhost_net.len() != usize::from(pairs) {
            return bad("--vhost-net", "needs one descriptor per queue pair");
        }
        let limited = [self.to_guest, self.from_guest] != [Limits::default(); 2];
        if !self.vhost_net.is_empty() && limited {
            return bad(
                "--vhost-net",
                "the kernel moves the frames and knows no limits",
            );
        }
        if let Endpoint::Inherited { .. } = endpoint {
            if self.mac.is_none() {
                return bad("--mac", "is missing");
            }
            if let TapSource::Name(_) = tap {
                return bad("--tap", "must be fds=N[:N]… with inherited channels");
            }
        }
        let mut numbers = Vec::new();
        if let Endpoint::Inherited {
            control,
            vhost,
            fence,
        } = &endpoint
        {
            numbers.extend([*control, *vhost]);
            numbers.extend(fence);
        }
        if let TapSource::Fds(fds) = &tap {
            numbers.extend(fds);
        }
        numbers.extend(&self.vhost_net);
        distinct("--tap", numbers)?;
        Ok(Options {
            endpoint,
            tap,
            vhost_net: self.vhost_net,
            pairs,
            mac: self.mac,
            mtu: self.mtu,
            link_up: !self.link_down,
            to_guest: self.to_guest,
            from_guest: self.from_guest,
            engine: self.engine,
            verbose: self.verbose,
        })
    }
}

fn text(parser: &mut lexopt::Parser) -> Result<String, UsageError> {
    Ok(parser.value()?.string()?)
}

/// `fds=N:N…`
fn fds(option: &'static str, value: &str) -> Result<Vec<RawFd>, UsageError> {
    match value.strip_prefix("fds=") {
        Some(list) => list.split(':').map(|n| fd(option, n)).collect(),
        None => bad(option, "must be fds=N[:N]…"),
    }
}

/// `NAME`, `name=NAME` or `fds=N:N…`, the latter with `,vhost-fds=N:N…` behind it or not.
fn tap(raw: &mut Raw, value: &str) -> Result<(), UsageError> {
    let (first, rest) = value.split_once(',').unwrap_or((value, ""));
    raw.tap = Some(if first.starts_with("fds=") {
        TapSource::Fds(fds("--tap", first)?)
    } else {
        let name = first.strip_prefix("name=").unwrap_or(first);
        if interface_name(name).is_none() {
            return bad(
                "--tap",
                "an interface's name has 1 to 15 visible characters, without / : % or comma",
            );
        }
        TapSource::Name(name.into())
    });
    match rest.split_once('=') {
        None if rest.is_empty() => Ok(()),
        Some(("vhost-fds", list)) => {
            raw.vhost_net = list
                .split(':')
                .map(|n| fd("--tap vhost-fds", n))
                .collect::<Result<_, _>>()?;
            Ok(())
        }
        _ => bad("--tap", format!("unknown {rest:?}")),
    }
}

/// Six pairs of hexadecimal digits, the address of one machine.
fn mac(value: &str) -> Result<Mac, UsageError> {
    let mut mac = [0; 6];
    let mut parts = value.split(':');
    for byte in &mut mac {
        *byte = match parts.next() {
            Some(part) if part.len() == 2 && !part.starts_with('+') => u8::from_str_radix(part, 16)
                .or_else(|_| bad("--mac", "must be XX:XX:XX:XX:XX:XX"))?,
            _ => return bad("--mac", "must be XX:XX:XX:XX:XX:XX"),
        };
    }
    if parts.next().is_some() {
        return bad("--mac", "must be XX:XX:XX:XX:XX:XX");
    }
    if is_multicast(&mac) {
        return bad(
            "--mac",
            "is the address of a group; the first byte must be even",
        );
    }
    if mac == [0; 6] {
        return bad("--mac", "is all zeros");
    }
    Ok(mac)
}

/// `N[:BURST]`; a burst of nothing would let nothing pass.
fn rate(option: &'static str, value: &str) -> Result<Option<Rate>, UsageError> {
    let (rate, burst) = match value.split_once(':') {
        Some((rate, burst)) => (rate.parse(), burst.parse().map(Some)),
        None => (value.parse(), Ok(None)),
    };
    match (rate, burst) {
        (Ok(_), Ok(Some(0))) => bad(option, "a burst of 0 lets nothing pass; leave it out"),
        (Ok(rate), Ok(burst)) => {
            Rate::new("rate", rate, burst.unwrap_or(0)).or_else(|why| bad(option, why))
        }
        _ => bad(option, "must be N or N:BURST"),
    }
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
