//! bulkhead-vsock: see `--help`, and the library beside this file.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_runtime::channels::{ChannelError, Channels};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeError, ServeOptions, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;
use bulkhead_vsock::cli::{self, HELP, Options};
use bulkhead_vsock::device::Vsock;
use bulkhead_vsock::dial::Dialer;
use bulkhead_vsock::streams;

/// Descriptors of the process itself, those that come and go with messages, and a stream each.
const FDS: u64 = 100 + streams::MOST as u64;

/// Small blocks of memory, all together: connections, messages, tables. Costs nothing until used.
const HEAP: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("inherited fd {0} (listener) cannot be used: {1}; start this program through bulkhead")]
    Listener(i32, std::io::Error),
    #[error("inherited fd {0} (requests) is not open: {1}; start this program through bulkhead")]
    Dial(i32, std::io::Error),
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
        name: "bulkhead-vsock",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.run(cli::parse, |options| options.verbose, run)
}

fn run(options: &Options) -> Result<(), MainError> {
    // Inherited numbers first, before anything else can take them.
    let channels = Channels::inherited(options.control, options.vhost, options.fence)?;
    let listener = sys::take_inherited(options.listener)
        .and_then(|fd| sys::set_nonblocking(fd.as_fd()).map(|()| fd))
        .map_err(|e| MainError::Listener(options.listener, e))?;
    let dial = options.dial.map(|fd| {
        sys::take_inherited(fd)
            .map(Dialer::new)
            .map_err(|e| MainError::Dial(fd, e))
    });
    let listener = UnixListener::from(listener);
    let device = Arc::new(Vsock::new(listener, dial.transpose()?, options.cid));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_VSOCK,
            rlimits: Rlimits::new().nofile(FDS),
        },
    )?;
    Ok(())
}
