//! Runs tests one after another, prints a line each and `N passed, M failed` at the end.

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// What a test says: nothing, or why it failed.
pub type Verdict = Result<(), String>;

/// A test: its subject, its name as a sentence, and what it does.
pub struct Test {
    /// What `T=` selects.
    pub subject: &'static str,
    /// A sentence that says what is shown.
    pub name: &'static str,
    /// Runs only when long forms are asked for.
    pub long: bool,
    /// The test.
    pub run: fn() -> Verdict,
}

impl Test {
    /// Makes tests of this subject that always run.
    pub fn short(subject: &'static str) -> impl Fn(&'static str, fn() -> Verdict) -> Self {
        Self::of(subject, false)
    }

    /// Makes tests of this subject that run when long forms are asked for.
    pub fn long(subject: &'static str) -> impl Fn(&'static str, fn() -> Verdict) -> Self {
        Self::of(subject, true)
    }

    fn of(subject: &'static str, long: bool) -> impl Fn(&'static str, fn() -> Verdict) -> Self {
        move |name, run| Self {
            subject,
            name,
            long,
            run,
        }
    }
}

/// Runs those of `tests` whose subject or name contains `filter`, the long ones only if
/// `long`; prints verdicts and the count. With the variable `BULKHEAD_CLAIMS`, a directory
/// shared with other hosts, only those that none of them has begun.
pub fn run(tests: &[Test], filter: Option<&str>, long: bool) -> ExitCode {
    crate::vmm::remember_processes();
    let (mut passed, mut failed) = (0, Vec::new());
    let claims = std::env::var_os("BULKHEAD_CLAIMS").map(PathBuf::from);
    for (index, test) in tests.iter().enumerate() {
        if filter.is_some_and(|f| test.subject != f && !test.name.contains(f)) {
            continue;
        }
        if test.long && !long {
            continue;
        }
        // Hosts that share this directory share the tests: whoever makes the entry runs the test.
        if let Some(claims) = &claims {
            match std::fs::create_dir(claims.join(index.to_string())) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => {
                    println!("{}: {error}", claims.display());
                    return ExitCode::FAILURE;
                }
            }
        }
        print!("{}: {} … ", test.subject, test.name);
        let _ = std::io::stdout().flush();
        let start = Instant::now();
        let verdict = (test.run)();
        let seconds = start.elapsed().as_secs_f32();
        match verdict {
            Ok(()) => {
                passed += 1;
                println!("ok ({seconds:.1} s)");
            }
            Err(why) => {
                println!(
                    "FAILED ({seconds:.1} s)\n    {}",
                    why.replace('\n', "\n    ")
                );
                failed.push(format!("{}: {}", test.subject, test.name));
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("{passed} passed, {} failed", failed.len());
    if failed.is_empty() && passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Fails the test with `why` unless `holds`.
///
/// # Errors
/// `why`, when it does not hold.
pub fn check(holds: bool, why: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(why()) }
}
