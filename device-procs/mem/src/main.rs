//! bulkhead-mem: see `--help`, and the library beside this file.

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_mem::cli::{self, HELP, Options};
use bulkhead_mem::device::Mem;
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
    #[error("inherited fd {0} (bell) is not open: {1}; start this program through bulkhead")]
    Bell(i32, std::io::Error),
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
        name: "bulkhead-mem",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.run(cli::parse, |options| options.verbose, run)
}

fn run(options: &Options) -> Result<(), MainError> {
    // Inherited numbers first, before anything else can take them.
    let channels = Channels::inherited(options.control, options.vhost, options.fence)?;
    let bell = sys::take_inherited(options.bell).map_err(|e| MainError::Bell(options.bell, e))?;
    let device = Arc::new(Mem::new(options.area, File::from(bell)));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_MEM,
            rlimits: Rlimits::new().nofile(FDS),
        },
    )?;
    Ok(())
}
