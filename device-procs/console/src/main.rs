//! bulkhead-console: see `--help`, and the library beside this file.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_console::cli::{self, HELP, MOST_PORTS, Options};
use bulkhead_console::control::Traits;
use bulkhead_console::device::Console;
use bulkhead_console::port::Port;
use bulkhead_runtime::inherited::{self, StartError};
use bulkhead_runtime::program::Program;
use bulkhead_runtime::{ServeOptions, serve, sys};
use bulkhead_seccomp::policy;
use bulkhead_seccomp::privileges::Rlimits;

/// Descriptors of the process itself, those that come and go with messages, of each ring, and of
/// each port.
const FDS: u64 = 100 + 6 * 2 * (MOST_PORTS as u64 + 1) + 2 * MOST_PORTS as u64;

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
    let device = Arc::new(Console::new(ports, traits));
    serve(
        device,
        ServeOptions {
            channels,
            policy: &policy::BULKHEAD_CONSOLE,
            rlimits: Rlimits::new().nofile(FDS),
        },
    )?;
    Ok(())
}
