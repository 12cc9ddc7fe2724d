//! bulkhead-blk: see `--help`, and the library beside this file.

use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_blk::backing::Backing;
use bulkhead_blk::cli::{self, Endpoint, EngineChoice, HELP, Options};
use bulkhead_blk::device::{Block, EngineKind};
use bulkhead_blk::disk::{Disk, DiskError};
use bulkhead_blk::host;
use bulkhead_blk::image_io;
use bulkhead_runtime::channels::{ChannelError, Channels};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeError, ServeOptions, serve, sys};
use bulkhead_seccomp::policy::{self, Policy};
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_seccomp::uring::{self, UringError};

/// Descriptors of the process itself, and those that come with a table of as many memory regions as there may
/// be and go again.
const BASE_FDS: u64 = 40;
/// Descriptors of a queue: kick, call, err and the successor of each, an eventfd, a ring.
const FDS_PER_QUEUE: u64 = 8;

/// Address space for the tables of an image, and something over.
const IMAGE_HEAP: usize = 384 << 20;
/// Address space for malloc's arena without one: of the process, and of each queue. A ring
/// of 1024 requests of 254 segments each, as many as are offered, has room in it.
const HEAP: usize = 8 << 20;
const QUEUE_HEAP: usize = 10 << 20;

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("{0}; use --io-engine preadv2")]
    Uring(#[from] UringError),
    #[error("an image is not served by io_uring; leave out --io-engine")]
    Image,
    #[error("no address space for an image's tables: {0}; raise the limit on data (ulimit -d)")]
    Heap(std::io::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn main() -> ExitCode {
    #[cfg(feature = "hostile")]
    if bulkhead_runtime::hostile::listed() {
        return ExitCode::SUCCESS;
    }
    sys::frugal_malloc();
    let program = Program {
        name: "bulkhead-blk",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.run(cli::parse, |options| options.verbose, run)
}

fn run(options: &Options) -> Result<(), MainError> {
    // Inherited numbers first, before anything else can take them.
    let (mut disk, channels) = match &options.endpoint {
        Endpoint::Inherited {
            control,
            vhost,
            fence,
        } => {
            let channels = Channels::inherited(*control, *vhost, *fence)?;
            (Disk::open(&options.disk)?, channels)
        }
        Endpoint::Socket(path) => {
            let disk = Disk::open(&options.disk)?;
            (disk, Channels::listen(path)?)
        }
    };
    let is_image = matches!(disk.backing, Backing::Image(_));
    let engine = match options.engine {
        EngineChoice::Plain => EngineKind::Plain,
        EngineChoice::IoUring if is_image => return Err(MainError::Image),
        EngineChoice::Auto if is_image => EngineKind::Plain,
        EngineChoice::IoUring => {
            uring::available()?;
            EngineKind::IoUring
        }
        EngineChoice::Auto => match uring::available() {
            Ok(()) => EngineKind::IoUring,
            Err(e) => {
                log::info!("{e}; the preadv2 engine serves instead");
                EngineKind::Plain
            }
        },
    };
    if engine == EngineKind::Plain {
        // Such a process makes as many kinds of call as it may without it.
        disk.without_secure_erase();
    }
    let policy: &'static Policy = match (&options.endpoint, engine) {
        (Endpoint::Socket(_), _) if is_image => &policy::BULKHEAD_BLK_IMAGE_SOCKET,
        (Endpoint::Inherited { .. }, _) if is_image => &policy::BULKHEAD_BLK_IMAGE,
        (Endpoint::Socket(_), _) if disk.secure_erases() => &policy::BULKHEAD_BLK_ERASE_SOCKET,
        (Endpoint::Inherited { .. }, _) if disk.secure_erases() => &policy::BULKHEAD_BLK_ERASE,
        (Endpoint::Socket(_), _) => &policy::BULKHEAD_BLK_SOCKET,
        (_, EngineKind::IoUring) => &policy::BULKHEAD_BLK,
        (_, EngineKind::Plain) => &policy::BULKHEAD_BLK_PLAIN,
    };
    let heap = if is_image {
        IMAGE_HEAP
    } else {
        HEAP.saturating_add(QUEUE_HEAP.saturating_mul(usize::from(options.queues)))
    };
    image_io::prepare(heap).map_err(MainError::Heap)?;
    let files = u64::try_from(options.disk.backing.len()).unwrap_or(u64::MAX);
    let descriptors = BASE_FDS + FDS_PER_QUEUE * u64::from(options.queues);
    let mut rlimits = Rlimits::new().nofile(descriptors.saturating_add(files));
    if let Some(limit) = disk.file_limit() {
        host::survive_size_limit();
        rlimits = rlimits.fsize(limit);
    }
    let device = Arc::new(Block::new(disk, options.queues, engine));
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
