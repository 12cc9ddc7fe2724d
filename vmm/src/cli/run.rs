//! `bulkhead run`, `bulkhead serve` and `bulkhead --ttrpc`: start the VMM in this process.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::{ApiArgs, EXIT_USAGE, HostArgs, RunArgs, ServeArgs, TtrpcArgs, config_file, fail};
use crate::api::{Callers, Services};
use crate::logger;
use crate::machine::host::{self, ApiOptions, HostOptions};

/// `bulkhead run`: create, boot, and stay until the machine ends.
pub fn run(args: RunArgs) -> ExitCode {
    logger::init(args.host.log);
    let config = match args.machine.to_config() {
        Ok(config) => config,
        Err(e) => return fail(EXIT_USAGE, &e),
    };
    if args.print_config {
        return match config_file::print(&config) {
            Ok(text) => show(&text),
            Err(e) => fail(1, &e),
        };
    }
    let api = args.host.api.options(args.api_socket);
    if api.socket.is_none() && api.read_only.is_none() && !api.callers.is_empty() {
        let line =
            "--api-uid and --api-gid: there is no socket: add --api-socket or --api-read-only";
        return fail(EXIT_USAGE, line);
    }
    finish(host::run(HostOptions {
        libexec: args.host.libexec,
        passt: args.host.passt,
        virtiofsd: args.host.virtiofsd,
        cgroup: args.host.cgroup.unwrap_or_default(),
        api,
        services: Services::Machine,
        first: Some(config),
        restarts: args.host.restarts,
        device_dirs: args.host.device_dir,
        allow_paths: args.host.allow_path,
        ids: args.host.uid_range,
    }))
}

impl ApiArgs {
    /// What they come to, beside the API's socket.
    fn options(&self, socket: Option<PathBuf>) -> ApiOptions {
        ApiOptions {
            socket,
            read_only: self.api_read_only.clone(),
            callers: Callers {
                uids: self.api_uid.clone(),
                gids: self.api_gid.clone(),
            },
            readers: Callers {
                uids: self.api_read_uid.clone(),
                gids: self.api_read_gid.clone(),
            },
        }
    }
}

fn show(text: &str) -> ExitCode {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(1, &format!("--print-config: standard output: {e}")),
    }
}

/// `bulkhead serve`: wait for a client to create the machine.
pub fn serve(args: ServeArgs) -> ExitCode {
    wait_on(args.api_socket, Services::Machine, args.host)
}

/// `bulkhead --ttrpc`: the same, for a client such as Kata's runtime.
pub fn ttrpc(args: TtrpcArgs) -> ExitCode {
    wait_on(args.ttrpc, Services::Vm, args.host)
}

fn wait_on(socket: PathBuf, services: Services, host: HostArgs) -> ExitCode {
    logger::init(host.log);
    finish(host::run(HostOptions {
        libexec: host.libexec,
        passt: host.passt,
        virtiofsd: host.virtiofsd,
        cgroup: host.cgroup.unwrap_or_default(),
        api: host.api.options(Some(socket)),
        services,
        first: None,
        restarts: host.restarts,
        device_dirs: host.device_dir,
        allow_paths: host.allow_path,
        ids: host.uid_range,
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
