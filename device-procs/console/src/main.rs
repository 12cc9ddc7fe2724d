//! bulkhead-console: see `--help`, and the library beside this file.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_console::cli::{self, HELP, Options};
use bulkhead_console::control::Traits;
use bulkhead_console::device::Console;
use bulkhead_console::port::Port;
use bulkhead_runtime::device::Device;
use bulkhead_runtime::inherited::{self, StartError};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeOptions, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;

/// Descriptors of the process itself, and those that come with a table of as many memory regions as there may
/// be and go again.
const BASE_FDS: u64 = 39;
/// Descriptors of a queue: kick, call, err and the successor of each, an eventfd, the fence.
const FDS_PER_QUEUE: u64 = 8;
/// Descriptors of a port: where clients come, and the one that is joined to it.
const FDS_PER_PORT: u64 = 2;

fn main() -> ExitCode {
    let program = Program {
        name: "bulkhead-console",
        version: env!("CARGO_PKG_VERSION"),
        help: HELP,
    };
    program.start(cli::parse, |options| options.inherited, run)
}

fn run(options: &Options) -> Result<(), StartError> {
    // Inherited numbers first, before anything else can take them.
    let channels = options.inherited.channels()?;
    let (mut ports, mut traits) = (Vec::new(), Vec::new());
    for place in &options.ports {
        let listener = inherited::take(place.listener, "listener")?;
        sys::set_nonblocking(listener.as_fd()).map_err(|error| StartError::Descriptor {
            fd: place.listener,
            what: "listener",
            error,
        })?;
        ports.push(Port::new(
            UnixListener::from(listener),
            place.name.is_none(),
        ));
        traits.push(Traits {
            name: place.name.clone(),
            size: place.size,
        });
    }
    let clients = FDS_PER_PORT.saturating_mul(u64::try_from(ports.len()).unwrap_or(u64::MAX));
    let device = Arc::new(Console::new(ports, traits));
    let rings = FDS_PER_QUEUE * u64::from(device.queues());
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_CONSOLE,
            rlimits: Rlimits::new()
                .nofile(clients.saturating_add(BASE_FDS + rings))
                .fsize(0),
        },
    )?;
    Ok(())
}
