//! The benchmarks: measures Bulkhead beside its peers and prints tables (Markdown). It
//! never fails because something is slow, only because something does not work.
//! `tests/bench/run` starts it: `boot` and `pss` where KVM runs guests, the others here.
//!
//! usage: bench [--runs N] SUBJECT…     (boot, pss, spawn, blk)

use std::process::ExitCode;

mod blk;
mod boot;
mod guest;
mod kvm;
mod process;
mod pss;
mod spawn;
mod table;

/// What a benchmark prints, or why it could not measure.
type Report = Result<String, String>;

fn main() -> ExitCode {
    let mut runs = None;
    let mut subjects = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--runs" {
            let number = arguments
                .next()
                .and_then(|n| n.parse().ok())
                .filter(|n| *n > 0);
            if number.is_none() {
                eprintln!("bench: --runs needs a number above 0");
                return ExitCode::from(2);
            }
            runs = number;
        } else {
            subjects.push(argument);
        }
    }
    let mut failed = subjects.is_empty();
    for subject in &subjects {
        let report = match subject.as_str() {
            "boot" => boot::measure(runs.unwrap_or(10)),
            "pss" => pss::measure(runs.unwrap_or(2)),
            "spawn" => spawn::measure(runs.unwrap_or(20)),
            "blk" => blk::measure(runs.unwrap_or(3)),
            _ => Err("no such subject: give boot, pss, spawn or blk".into()),
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
