//! A hostile virtio driver, to be run as root inside a guest: takes a disk, or with --net a
//! network device of one queue pair, from the kernel's driver, gives its device malformed rings (virtio 1.2, 2.7), requests and
//! registers, and tells what the device did about each and whether it came back.
//!
//! usage: hostile-guest [--net] [--seed N] [--seconds N] DEVICE CASE...
//!        hostile-guest --frames [--seconds N] DEVICE
//!
//! DEVICE is a disk's name (`vda`) or a PCI address (`0000:01:00.0`), which it keeps when no
//! driver is bound; CASE is a name of `bulkhead_tests::hostile::CASES` or `all`. The device is
//! left reset and without a driver. One line for each case on standard output:
//!
//! `HOSTILE CASE needs_reset=yes|no status=N|none recovered=yes|no sector0=HEX16`
//!
//! With --frames it breaks no ring, but has no ear for a network device's link: it sends and
//! receives as long as it is told to.
//!
//! Exit status 0 if the device came back each time, 1 if not, 2 for usage and for what this
//! guest cannot do.

use std::process::ExitCode;
use std::time::Duration;

use bulkhead_tests::hostile::{CASES, NET_CASES, STORM};

use crate::driver::{Driver, Kind, NEEDS_RESET, Outcome};
use crate::storm::Random;

mod cases;
mod driver;
mod frames;
mod function;
mod raw;
mod storm;

struct Arguments {
    kind: Kind,
    frames: bool,
    seed: u64,
    seconds: u64,
    device: String,
    cases: Vec<String>,
}

fn arguments() -> Result<Arguments, String> {
    let (mut seed, mut seconds, mut rest) = (1, 2, Vec::new());
    let mut kind = Kind::Block;
    let mut frames = false;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().unwrap_or_default();
            value
                .parse::<u64>()
                .map_err(|_| format!("{word} wants a number, not {value:?}"))
        };
        match word.as_str() {
            "--seed" => seed = number()?,
            "--seconds" => seconds = number()?,
            "--net" => kind = Kind::Net,
            "--frames" => (kind, frames) = (Kind::Net, true),
            _ => rest.push(word),
        }
    }
    let mut rest = rest.into_iter();
    let device = rest
        .next()
        .ok_or("usage: hostile-guest [--net] [--seed N] [--seconds N] DEVICE CASE...")?;
    let mut cases: Vec<String> = rest.collect();
    if cases.iter().any(|c| c == "all") {
        let all = if kind == Kind::Net { NET_CASES } else { CASES };
        cases = all.iter().map(|c| c.name.to_string()).collect();
    }
    match cases
        .iter()
        .find(|name| !CASES.iter().any(|c| c.name == name.as_str()))
    {
        Some(unknown) => Err(format!("no case {unknown:?}")),
        None => Ok(Arguments {
            kind,
            frames,
            seed,
            seconds,
            device,
            cases,
        }),
    }
}

fn attack(driver: &Driver, name: &str, arguments: &Arguments) -> Result<Outcome, String> {
    if name == STORM {
        let mut random = Random::new(arguments.seed);
        let duration = Duration::from_secs(arguments.seconds);
        let done = storm::run(driver, &mut random, duration)?;
        println!("# storm: seed {}, {done} attacks", arguments.seed);
        let needs_reset = driver.status()? & NEEDS_RESET != 0;
        return Ok(Outcome {
            needs_reset,
            status: None,
        });
    }
    cases::run(driver, name)?.ok_or_else(|| format!("case {name:?} is not written"))
}

fn run() -> Result<bool, String> {
    let arguments = arguments()?;
    let driver = Driver::open(&arguments.device, arguments.kind)?;
    if arguments.frames {
        frames::run(&driver, Duration::from_secs(arguments.seconds))?;
        driver.reset()?;
        return Ok(true);
    }
    let mut all_well = true;
    for name in &arguments.cases {
        let outcome = attack(&driver, name, &arguments);
        let recovery = driver.recover();
        let (needs_reset, status) = match &outcome {
            Ok(o) => (if o.needs_reset { "yes" } else { "no" }, o.status),
            Err(_) => ("no", None),
        };
        let status = status.map_or("none".to_string(), |s| s.to_string());
        let recovered = match &recovery {
            Ok(first) => format!("recovered=yes sector0={:016x}", first.swap_bytes()),
            Err(_) => "recovered=no sector0=none".to_string(),
        };
        println!("HOSTILE {name} needs_reset={needs_reset} status={status} {recovered}");
        for (what, error) in [("attack", outcome.err()), ("recovery", recovery.err())] {
            if let Some(error) = error {
                println!("# {name}: {what}: {error}");
                all_well = false;
            }
        }
    }
    // Before the pages are given back to the kernel.
    driver.reset()?;
    Ok(all_well)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hostile-guest: {error}");
            ExitCode::from(2)
        }
    }
}
