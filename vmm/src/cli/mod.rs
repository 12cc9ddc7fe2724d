//! The command line: one module per command. Usage errors are one line and exit code 2,
//! every other error one line and exit code 1.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::launcher::{CgroupChoice, IdRange};
use crate::machine::supervise::{Budget, MAX_BUDGET};

pub mod audit;
pub mod config_file;
pub mod console_args;
pub mod ctl;
mod ctl_console;
mod ctl_device;
mod ctl_hotplug;
mod ctl_operation;
pub mod ctl_output;
mod ctl_output_config;
mod ctl_output_net;
mod ctl_stats;
pub mod disk_args;
mod event_json;
pub mod fs_args;
pub mod machine_args;
mod machine_base;
pub mod net_args;
pub mod resource_args;
pub mod rng_args;
pub mod run;
pub mod vsock_args;

/// What ids of other user namespaces show as (/proc/sys/kernel/overflowuid).
pub(crate) const OVERFLOW_ID: u32 = 65534;
/// Exit code of a wrong command line.
pub const EXIT_USAGE: u8 = 2;

/// A virtual machine monitor in which every device is a confined process of its own.
#[derive(Parser, Debug)]
#[command(name = "bulkhead", version, about, max_term_width = 100)]
#[command(
    after_help = "For Kata Containers: `bulkhead --ttrpc PATH` makes the socket PATH and serves \
vmservice.VM there; further options are those of serve.\n\n\
Exit codes of run, serve and --ttrpc: 0 the guest switched itself off, 1 error, \
2 wrong command line, 3 the guest asked for a reset, 4 the guest triple-faulted, \
5 the launcher died, 128+N ended by signal N."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Boot a machine and stay until it ends
    Run(Box<RunArgs>),
    /// Wait on an API socket for a machine to be created
    Serve(Box<ServeArgs>),
    /// Drive a running `bulkhead` through its API socket
    Ctl(Box<ctl::CtlArgs>),
    /// Show what the kernel says of every process of a VM, graded against what it should be
    Audit(audit::AuditArgs),
    /// Remove what VMs have left behind that ended by a power cut: sockets, cgroups, notes
    Reap(crate::reap::ReapArgs),
}

/// Options of the VMM itself.
#[derive(clap::Args, Debug, Clone)]
pub struct HostArgs {
    /// Directory of bulkhead-launcher and the device binaries [default: that of bulkhead]
    #[arg(long, value_name = "DIR")]
    pub libexec: Option<PathBuf>,
    /// passt for `--net user`, from the start or added later [default where run has one:
    /// /usr/bin/passt, …]
    #[arg(long, value_name = "PATH")]
    pub passt: Option<PathBuf>,
    /// virtiofsd for `--fs`, from the start or added later [default where run has one:
    /// /usr/libexec/virtiofsd, …]
    #[arg(long, value_name = "PATH")]
    pub virtiofsd: Option<PathBuf>,
    /// The cgroup v2 that the devices' own are made in, a directory; off: none [default: that of
    /// bulkhead, where it is delegated]
    #[arg(long, value_name = "PATH|off", value_parser = cgroup)]
    pub cgroup: Option<CgroupChoice>,
    /// How often a device's process may be replaced, within how many seconds, before the device
    /// is left without one; 0: never
    #[arg(long, value_name = "N[:SECONDS]", default_value = "5:60", value_parser = restarts)]
    pub restarts: Budget,
    /// A directory under which binaries for `ctl update-device` may lie, root's or your own and
    /// not writable by others; may be repeated
    #[arg(long, value_name = "DIR")]
    pub device_dir: Vec<PathBuf>,
    /// A file, or a directory above all files, that the launcher may open, bind or connect for the
    /// command line and the API; may be repeated [default: whatever the user may]
    #[arg(long, value_name = "PATH")]
    pub allow_path: Vec<PathBuf>,
    /// Who may call the API
    #[command(flatten)]
    pub api: ApiArgs,
    /// Host uids and gids for device processes, as root: each VM takes 64 of them that no other
    /// has [default: 64 from 0x70000000 on, by the VMM's pid]
    #[arg(long, value_name = "FIRST:COUNT")]
    pub uid_range: Option<IdRange>,
    /// What to log on standard error: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = log_level)]
    pub log: log::LevelFilter,
}

/// Who may call the API, and what.
#[derive(clap::Args, Debug, Clone)]
pub struct ApiArgs {
    /// A second unix socket to make, on which the API only tells: info, devices, statistics, events
    #[arg(long, value_name = "SOCKET")]
    pub api_read_only: Option<PathBuf>,
    /// A user whose calls are heard beside root's and your own, on both sockets; may be repeated.
    /// Then anybody may connect (mode 0666), and who is not named is hung up on. Who is heard acts
    /// with bulkhead's own rights: as root, give --allow-path, or they can have any file of the host
    #[arg(long, value_name = "UID", value_parser = caller)]
    pub api_uid: Vec<u32>,
    /// The same for a group: that which the caller's process has as its own
    #[arg(long, value_name = "GID", value_parser = caller)]
    pub api_gid: Vec<u32>,
    /// A user whose calls are heard on the socket of --api-read-only alone; may be repeated
    #[arg(long, value_name = "UID", value_parser = caller, requires = "api_read_only")]
    pub api_read_uid: Vec<u32>,
    /// The same for a group
    #[arg(long, value_name = "GID", value_parser = caller, requires = "api_read_only")]
    pub api_read_gid: Vec<u32>,
}

/// `bulkhead run`.
#[derive(clap::Args, Debug, Clone)]
pub struct RunArgs {
    #[command(flatten)]
    machine: machine_args::MachineArgs,
    /// Print the machine's configuration as a file for --config, and start nothing
    #[arg(long)]
    print_config: bool,
    /// Serve the API (bulkhead.v1.Machine over ttrpc) on a unix socket made here
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    host: HostArgs,
}

/// `bulkhead serve`.
#[derive(clap::Args, Debug, Clone)]
pub struct ServeArgs {
    /// The unix socket to make and serve bulkhead.v1.Machine on
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    #[command(flatten)]
    host: HostArgs,
}

/// `bulkhead --ttrpc`, which has no command's name: Kata's runtime gives just that option.
#[derive(Parser, Debug)]
#[command(name = "bulkhead", version, max_term_width = 100)]
#[command(about = "Wait on a socket for Kata Containers' runtime to create a machine")]
pub struct TtrpcArgs {
    /// The unix socket to make and serve vmservice.VM on, with bulkhead.v1.Machine beside it
    #[arg(long, value_name = "PATH")]
    ttrpc: PathBuf,
    #[command(flatten)]
    host: HostArgs,
}

fn restarts(text: &str) -> Result<Budget, String> {
    let wanted = || format!("give N or N:SECONDS, N up to {MAX_BUDGET}, such as 5:60");
    let (count, seconds) = text.split_once(':').unwrap_or((text, "60"));
    let restarts = count.parse().ok().filter(|n| *n <= MAX_BUDGET);
    let seconds = seconds.parse().ok().filter(|n| (1..=86_400).contains(n));
    match (restarts, seconds) {
        (Some(restarts), Some(seconds)) => Ok(Budget {
            restarts,
            window: Duration::from_secs(seconds),
        }),
        _ => Err(wanted()),
    }
}

/// An id of a caller's. What the kernel shows in the place of ids that it cannot name is nobody's.
fn caller(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(id) if id != OVERFLOW_ID && id != u32::MAX => Ok(id),
        _ => Err(format!(
            "give a number, such as 1000, but not {OVERFLOW_ID}: whoever has no id here has that"
        )),
    }
}

fn cgroup(text: &str) -> Result<CgroupChoice, String> {
    match text {
        "off" => Ok(CgroupChoice::Off),
        path if path.starts_with('/') => Ok(CgroupChoice::At(path.into())),
        _ => Err("give the absolute path of a directory of cgroup v2, or off".to_owned()),
    }
}

fn log_level(text: &str) -> Result<log::LevelFilter, String> {
    text.parse()
        .map_err(|_| "give error, warn, info, debug or trace".to_string())
}

/// The program.
pub fn main() -> ExitCode {
    let first = std::env::args_os().nth(1).unwrap_or_default();
    if first == "--ttrpc" || first.to_string_lossy().starts_with("--ttrpc=") {
        return match TtrpcArgs::try_parse() {
            Ok(args) => run::ttrpc(args),
            Err(e) => usage(&e),
        };
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Serve(args) => run::serve(*args),
        Command::Ctl(args) => ctl::run(*args),
        Command::Audit(args) => audit::run(&args),
        Command::Reap(args) => ExitCode::from(u8::from(crate::reap::run(&args) != 0)),
    }
}

/// Says in one line what clap says in several; help and version go out as they are.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed standard output is the reader's choice.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => fail(
            EXIT_USAGE,
            "give a command: run, serve, ctl, audit or reap (see `bulkhead --help`)",
        ),
        _ => {
            let what = one_line(&error.to_string());
            let command = asked(std::env::args_os().skip(1));
            fail(EXIT_USAGE, &format!("{what} (see `{command} --help`)"))
        }
    }
}

/// What clap says before its usage, in one line; its tips are sentences of their own.
fn one_line(text: &str) -> String {
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|l| !l.starts_with("Usage:"))
        .filter(|l| !l.is_empty() && !l.starts_with("For more information"));
    let mut what = String::new();
    for line in lines {
        match (what.is_empty(), line.strip_prefix("tip: ")) {
            (true, _) => what.push_str(line.strip_prefix("error: ").unwrap_or(line)),
            (false, Some(tip)) => what.push_str(&format!("; {tip}")),
            (false, None) => what.push_str(&format!(" {line}")),
        }
    }
    what
}

/// The command whose help lists the options that were given.
fn asked(args: impl Iterator<Item = OsString>) -> String {
    let mut command = <Cli as clap::CommandFactory>::command();
    let mut words = vec!["bulkhead".to_owned()];
    for arg in args {
        if let Some(next) = command.find_subcommand(&arg).cloned() {
            words.push(next.get_name().to_owned());
            command = next;
        }
    }
    words.join(" ")
}

/// One line on standard error, and the exit code.
pub fn fail(code: u8, what: &str) -> ExitCode {
    use std::io::Write;
    let line: String = what
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    // Nowhere left to say that standard error is closed.
    let line = format!("bulkhead: {line}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tip_of_claps_is_a_sentence_of_its_own() {
        let given = "bulkhead ctl resize-console c 1x1 --port 1".split(' ');
        let error = Cli::try_parse_from(given).unwrap_err();
        assert_eq!(
            one_line(&error.to_string()),
            "unexpected argument '--port' found; to pass '--port' as a value, use '-- --port'"
        );
        let missing = Cli::try_parse_from(["bulkhead", "audit", "--pid"]).unwrap_err();
        let line = one_line(&missing.to_string());
        assert!(!line.contains('\n') && !line.starts_with("error"), "{line}");
        assert!(line.contains("a value is required for"), "{line}");
    }
}
