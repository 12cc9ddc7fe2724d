//! The `bulkhead` command: reads the command line and hands over to the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::cli::main()
}
