//! bulkhead-rng: see `--help`, and the library beside this file.

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_rng::cli::{self, HELP, Options};
use bulkhead_rng::device::Rng;
use bulkhead_runtime::inherited::{self, StartError};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeOptions, serve};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;

/// Descriptors that it holds at most: its own, those of its channels, kick, call and err of its ring and the
/// successors of each, the fence, and those that come with a table of as many memory regions as there may be.
const FDS: u64 = 48;

fn main() -> ExitCode {
    let program = Program {
        name: "bulkhead-rng",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.start(cli::parse, |options| options.inherited, run)
}

fn run(options: &Options) -> Result<(), StartError> {
    // Inherited numbers first, before anything else can take them.
    let channels = options.inherited.channels()?;
    let source = inherited::take(options.source, "entropy")?;
    let device = Arc::new(Rng::new(File::from(source), options.bytes));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_RNG,
            rlimits: Rlimits::new().nofile(FDS).fsize(0),
        },
    )?;
    Ok(())
}
