//! bulkhead-rng: see `--help`, and the library beside this file.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_rng::cli::{self, Command, HELP, Options};
use bulkhead_rng::device::Rng;
use bulkhead_runtime::channels::{ChannelError, Channels};
use bulkhead_runtime::{ServeError, ServeOptions, logger, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;
use log::LevelFilter;

/// Descriptors of the process itself, and those that come and go with messages.
const FDS: u64 = 100;

/// Small blocks of memory, all together: connections, messages, tables. Costs nothing until used.
const HEAP: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("inherited fd {0} (entropy) is not open: {1}; start this program through bulkhead")]
    Source(i32, std::io::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn main() -> ExitCode {
    #[cfg(feature = "hostile")]
    if bulkhead_runtime::hostile::listed() {
        return ExitCode::SUCCESS;
    }
    sys::fixed_heap(HEAP);
    let options = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Help) => return print(HELP),
        Ok(Command::Version) => {
            return print(concat!("bulkhead-rng ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        Err(e) => {
            complain(&e);
            return ExitCode::from(2);
        }
    };
    logger::init(if options.verbose {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
    match run(&options) {
        Ok(()) => sys::exit(0),
        Err(e) => {
            complain(&e);
            sys::exit(1)
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn complain(e: &dyn std::error::Error) {
    let _ = writeln!(std::io::stderr(), "bulkhead-rng: {e}");
}

fn run(options: &Options) -> Result<(), MainError> {
    // Inherited numbers first, before anything else can take them.
    let channels = Channels::inherit(options.control, options.vhost)?;
    let channels = match options.fence {
        Some(fence) => channels.with_fence(fence)?,
        None => channels,
    };
    let source =
        sys::take_inherited(options.source).map_err(|e| MainError::Source(options.source, e))?;
    let device = Arc::new(Rng::new(File::from(source), options.bytes));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_RNG,
            rlimits: Rlimits::new().nofile(FDS),
        },
    )?;
    Ok(())
}
