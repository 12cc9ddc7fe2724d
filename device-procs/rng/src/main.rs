//! bulkhead-rng: see `--help`, and the library beside this file.

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_rng::cli::{self, HELP, Options};
use bulkhead_rng::device::Rng;
use bulkhead_runtime::channels::{ChannelError, Channels};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeError, ServeOptions, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;

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
    let program = Program {
        name: "bulkhead-rng",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.run(cli::parse, |options| options.verbose, run)
}

fn run(options: &Options) -> Result<(), MainError> {
    // Inherited numbers first, before anything else can take them.
    let channels = Channels::inherited(options.control, options.vhost, options.fence)?;
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
