//! bulkhead-net: see `--help`, and the library beside this file.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_net::cli::{self, Endpoint, EngineChoice, HELP, Options, TapSource};
use bulkhead_net::device::{EngineKind, Net};
use bulkhead_net::filter::Mac;
use bulkhead_net::state::{Settings, State};
use bulkhead_net::tap::{Tap, TapError};
use bulkhead_net::{frame_ring, kernel};
use bulkhead_runtime::channels::{ChannelError, Channels};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeError, ServeOptions, serve, sys};
use bulkhead_seccomp::policy::{self, Policy};
use bulkhead_seccomp::privileges::Rlimits;

/// Descriptors of the process itself, those that come with a table of as many memory regions as there may be and
/// go again, and of the control queue: kick, call, err and the successor of each, an eventfd, the fence or a ring.
const BASE_FDS: u64 = 47;
/// Descriptors of a pair: of each ring kick, call, err, the successor of each and an eventfd; the tap's.
const FDS_PER_PAIR: u64 = 15;

/// Small blocks of memory, all together: connections, messages, tables. Costs nothing until used.
const HEAP: usize = 8 << 20;
/// The same of a pair: its rings' tables and frames that are under way. These are large blocks, but malloc
/// takes those from the heap, too, as long as they fit.
const PAIR_HEAP: usize = 2560 << 10;

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("{0}; use --io-engine plain")]
    Uring(String),
    #[error("{0}")]
    Kernel(String),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn main() -> ExitCode {
    #[cfg(feature = "hostile")]
    if bulkhead_runtime::hostile::listed() {
        return ExitCode::SUCCESS;
    }
    let program = Program {
        name: "bulkhead-net",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.run(
        cli::parse,
        |options| options.verbose,
        |options| run(options),
    )
}

/// A random address that nobody has been assigned.
fn random_mac() -> Mac {
    let [a, b, c, d, e, f, ..] = RandomState::new().build_hasher().finish().to_le_bytes();
    [a & 0xfc | 2, b, c, d, e, f]
}

/// Descriptors that a process holds at most.
fn descriptors(engine: EngineKind, pairs: u16) -> u64 {
    let pairs = u64::from(pairs);
    let engines = match engine {
        // A ring for each pair and one for the main thread; they hold the fence.
        EngineKind::IoUring => pairs + 1,
        // The fence for each ring.
        EngineKind::Plain => 2 * pairs,
        // That, vhost-net's, and what it signals for each ring.
        EngineKind::Kernel => 5 * pairs,
    };
    BASE_FDS + FDS_PER_PAIR * pairs + engines
}

fn run(options: &Options) -> Result<(), MainError> {
    sys::fixed_heap(HEAP + PAIR_HEAP * usize::from(options.pairs));
    // Inherited numbers first, before anything else can take them.
    let channels = match &options.endpoint {
        Endpoint::Inherited {
            control,
            vhost,
            fence,
        } => Some(Channels::inherited(*control, *vhost, *fence)?),
        Endpoint::Socket(_) => None,
    };
    let tap = match &options.tap {
        TapSource::Fds(fds) => Tap::inherit(fds)?,
        TapSource::Name(name) => Tap::attach(name, options.pairs, options.mtu)?,
    };
    let channels = match (channels, &options.endpoint) {
        (Some(channels), _) => channels,
        (None, Endpoint::Socket(path)) => Channels::listen(path)?,
        (None, Endpoint::Inherited { control, vhost, .. }) => Channels::inherit(*control, *vhost)?,
    };
    let kernel = options.vhost_net.iter().map(|fd| kernel::inherit(*fd));
    let kernel: Vec<_> = kernel
        .collect::<Result<_, _>>()
        .map_err(MainError::Kernel)?;
    let engine = match options.engine {
        _ if !kernel.is_empty() => EngineKind::Kernel,
        EngineChoice::Plain => EngineKind::Plain,
        EngineChoice::IoUring => {
            frame_ring::supported(&tap).map_err(MainError::Uring)?;
            EngineKind::IoUring
        }
        EngineChoice::Auto => match frame_ring::supported(&tap) {
            Ok(()) => EngineKind::IoUring,
            Err(why) => {
                log::info!("{why}; the plain engine serves instead");
                EngineKind::Plain
            }
        },
    };
    let policy: &'static Policy = match (&options.endpoint, engine) {
        (Endpoint::Socket(_), _) => &policy::BULKHEAD_NET_SOCKET,
        (_, EngineKind::IoUring) => &policy::BULKHEAD_NET,
        (_, EngineKind::Plain) => &policy::BULKHEAD_NET_PLAIN,
        (_, EngineKind::Kernel) => &policy::BULKHEAD_NET_VHOST,
    };
    let rlimits = Rlimits::new()
        .nofile(descriptors(engine, options.pairs))
        .fsize(0);
    log::debug!("tap {}, {} queue pairs", tap.name(), tap.queues());
    let settings = Settings {
        mac: options.mac.unwrap_or_else(random_mac),
        mtu: options.mtu,
        link_up: options.link_up,
        to_guest: options.to_guest,
        from_guest: options.from_guest,
        kernel: engine == EngineKind::Kernel,
    };
    let device = Arc::new(Net::new(State::new(tap, &settings), engine, kernel));
    serve(
        device,
        ServeOptions {
            channels,
            policy,
            rlimits,
        },
    )?;
    Ok(())
}
