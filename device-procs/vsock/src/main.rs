//! bulkhead-vsock: see `--help`, and the library beside this file.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_runtime::inherited::{self, StartError};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeOptions, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_vsock::cli::{self, HELP, Options};
use bulkhead_vsock::device::Vsock;
use bulkhead_vsock::dial::Dialer;
use bulkhead_vsock::streams;

/// Descriptors that it holds at most: its own, those of its channels, kick, call and err of its rings and the
/// successors of each, those that come with a table of as many memory regions as there may be, a stream each
/// and one that is turned away.
const FDS: u64 = 60 + streams::MOST as u64;

fn main() -> ExitCode {
    let program = Program {
        name: "bulkhead-vsock",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.start(cli::parse, |options| options.inherited, run)
}

fn run(options: &Options) -> Result<(), StartError> {
    // Inherited numbers first, before anything else can take them.
    let channels = options.inherited.channels()?;
    let listener = inherited::take(options.listener, "listener")?;
    sys::set_nonblocking(listener.as_fd()).map_err(|error| StartError::Descriptor {
        fd: options.listener,
        what: "listener",
        error,
    })?;
    let dial = options
        .dial
        .map(|fd| inherited::take(fd, "requests").map(Dialer::new));
    let listener = UnixListener::from(listener);
    let device = Arc::new(Vsock::new(listener, dial.transpose()?, options.cid));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_VSOCK,
            rlimits: Rlimits::new().nofile(FDS).fsize(0),
        },
    )?;
    Ok(())
}
