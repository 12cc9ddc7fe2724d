//! `bulkhead run` and `bulkhead serve`: start the VMM in this process.

use std::process::ExitCode;

use super::{EXIT_USAGE, RunArgs, ServeArgs, fail};
use crate::logger;
use crate::machine::host::{self, HostOptions};

/// `bulkhead run`: create, boot, and stay until the machine ends.
pub fn run(args: RunArgs) -> ExitCode {
    logger::init(args.host.log);
    let config = match args.machine.to_config() {
        Ok(config) => config,
        Err(e) => return fail(EXIT_USAGE, &e),
    };
    finish(host::run(HostOptions {
        libexec: args.host.libexec,
        passt: args.host.passt,
        cgroup: args.host.cgroup.unwrap_or_default(),
        api_socket: args.api_socket,
        first: Some(config),
        restarts: args.host.restarts,
        device_dirs: args.host.device_dir,
        allow_paths: args.host.allow_path,
        ids: args.host.uid_range,
    }))
}

/// `bulkhead serve`: wait for a client to create the machine.
pub fn serve(args: ServeArgs) -> ExitCode {
    logger::init(args.host.log);
    finish(host::run(HostOptions {
        libexec: args.host.libexec,
        passt: args.host.passt,
        cgroup: args.host.cgroup.unwrap_or_default(),
        api_socket: Some(args.api_socket),
        first: None,
        restarts: args.host.restarts,
        device_dirs: args.host.device_dir,
        allow_paths: args.host.allow_path,
        ids: args.host.uid_range,
    }))
}

fn finish(result: Result<crate::machine::stop::StopReason, String>) -> ExitCode {
    use crate::machine::stop::StopReason;
    match result {
        Ok(reason) => {
            match &reason {
                StopReason::PowerOff | StopReason::Forced | StopReason::Signal(_) => {}
                other => {
                    let _ = fail(0, &other.to_string());
                }
            }
            ExitCode::from(reason.exit_code())
        }
        Err(e) => fail(1, &e),
    }
}
