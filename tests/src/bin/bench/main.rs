//! The benchmarks: measures Bulkhead beside its peers and prints tables (Markdown). It
//! never fails because something is slow, only because something does not work.
//! `tests/bench/run` starts it: `boot`, `pss`, `hotplug` and `guestnet` where KVM runs guests, the others here.
//!
//! usage: bench [--runs N] [--seconds N] [--only TEXT]… SUBJECT…     (boot, pss, spawn, confinement, stall, blk, net, guestnet, hotplug)

use std::process::ExitCode;

mod blk;
mod blk_backend;
mod boot;
mod confinement;
mod guest;
mod guestnet;
mod hotplug;
mod kvm;
mod net;
mod process;
mod pss;
mod qmp;
mod spawn;
mod stall;
mod table;
mod tap;

/// What a benchmark prints, or why it could not measure.
type Report = Result<String, String>;

/// What the command line says beyond the subjects.
#[derive(Default)]
pub struct Options {
    /// Runs of each load.
    pub runs: Option<usize>,
    /// Seconds of a run.
    pub seconds: Option<u32>,
    /// Only loads whose name holds one of these.
    pub only: Vec<String>,
}

impl Options {
    /// Whether a load is to be run.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| name.contains(o))
    }
}

/// Subjects and options.
fn parse() -> Result<(Vec<String>, Options), String> {
    fn number<T: std::str::FromStr + PartialOrd + From<u8>>(
        name: &str,
        value: Option<String>,
    ) -> Result<Option<T>, String> {
        let number = value
            .and_then(|v| v.parse().ok())
            .filter(|n| *n > T::from(0));
        if number.is_none() {
            return Err(format!("{name} needs a number above 0"));
        }
        Ok(number)
    }
    let (mut subjects, mut options) = (Vec::new(), Options::default());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // No number of runs exceeds what a u32 holds.
            "--runs" => {
                options.runs = number::<u32>("--runs", arguments.next())?
                    .and_then(|n| usize::try_from(n).ok());
            }
            "--seconds" => options.seconds = number("--seconds", arguments.next())?,
            "--only" => options
                .only
                .push(arguments.next().ok_or("--only needs a text")?),
            _ => subjects.push(argument),
        }
    }
    if subjects.is_empty() {
        return Err(
            "no subject: give boot, pss, spawn, confinement, stall, blk, net, guestnet or hotplug"
                .into(),
        );
    }
    Ok((subjects, options))
}

/// The processes that `net` starts: this program once more, with a name as its subject.
fn helper() -> Option<Result<(), String>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (name, rest) = arguments.split_first()?;
    match name.as_str() {
        "tap-write" => Some(tap::bare_loop(rest, true)),
        "tap-read" => Some(tap::bare_loop(rest, false)),
        "feed" => Some(tap::feed(rest)),
        "feed-udp" => Some(net::feed_udp(rest)),
        "spin" => tap::spin(),
        _ => None,
    }
}

fn main() -> ExitCode {
    match helper() {
        None => {}
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(why)) => {
            eprintln!("bench: {why}");
            return ExitCode::FAILURE;
        }
    }
    let (subjects, options) = match parse() {
        Ok(parsed) => parsed,
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::from(2);
        }
    };
    let runs = options.runs;
    let mut failed = false;
    for subject in &subjects {
        let report = match subject.as_str() {
            "boot" => boot::measure(runs.unwrap_or(10)),
            "pss" => pss::measure(runs.unwrap_or(2)),
            "spawn" => spawn::measure(runs.unwrap_or(20)),
            "confinement" => confinement::measure(&options),
            "stall" => stall::measure(runs.unwrap_or(100)),
            "blk" => blk::measure(&options),
            "net" => net::measure(&options),
            "guestnet" => guestnet::measure(&options),
            "hotplug" => hotplug::measure(runs.unwrap_or(20)),
            _ => Err(
                "no such subject: give boot, pss, spawn, confinement, stall, blk, net, guestnet or hotplug"
                    .into(),
            ),
        };
        match report {
            Ok(text) => println!("{text}"),
            Err(why) => {
                println!("## {subject}: not measured\n\n{}\n", why.trim());
                failed = true;
            }
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
