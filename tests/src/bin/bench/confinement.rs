//! What confinement costs: the spawn of a device process to ready, and its steady I/O, beside the
//! same programs built with the feature `unconfined` (BULKHEAD_UNCONFINED, their directory), in
//! turns. Without it there are no namespaces, no empty root, no ids, no limits, no capabilities
//! dropped, no Landlock, no seccomp, no reports to the launcher and no restrictions of rings.
//! No guest runs.

use std::path::PathBuf;

use bulkhead_tests::vmm::{Scratch, bin};

use crate::Options;
use crate::blk::{self, Load};
use crate::blk_backend::Backend;
use crate::spawn;
use crate::table::{Table, median, spread};

/// Said by every program that is built without confinement.
const SENTENCE: &[u8] = b"built without confinement";

/// Measures both, and prints two tables.
pub fn measure(options: &Options) -> crate::Report {
    let without = std::env::var_os("BULKHEAD_UNCONFINED")
        .map(PathBuf::from)
        .ok_or("BULKHEAD_UNCONFINED names no directory of programs without confinement")?;
    let programs = ["bulkhead", "bulkhead-launcher", "bulkhead-blk"];
    for (name, program) in programs.map(|name| (name, bin(name))) {
        let shipped = says_so(&program)?;
        if shipped {
            return Err(format!("{} confines nothing", program.display()));
        }
        // The launcher says nothing itself.
        if name == "bulkhead-blk" && !says_so(&without.join(name))? {
            return Err(format!("{} is confined", without.join(name).display()));
        }
    }
    let mut text = spawns(&without, options.runs.unwrap_or(40))?;
    text += &steady(
        &without,
        options.runs.unwrap_or(7),
        options.seconds.unwrap_or(2),
    )?;
    Ok(text)
}

fn says_so(program: &std::path::Path) -> Result<bool, String> {
    let bytes = std::fs::read(program).map_err(|e| format!("{}: {e}", program.display()))?;
    Ok(bytes.windows(SENTENCE.len()).any(|w| w == SENTENCE))
}

fn spawns(without: &std::path::Path, runs: usize) -> crate::Report {
    let scratch = Scratch::new("bench-confinement")?;
    let disk = scratch.disk("disk.img", 1 << 20, 3)?;
    let (mut on, mut off) = (Vec::new(), Vec::new());
    // The first of each is a warm-up.
    for run in 0..=runs {
        let confined = spawn::once(&bin("bulkhead"), &scratch, &disk)?.spawn_ms;
        let free = spawn::once(&without.join("bulkhead"), &scratch, &disk)?.spawn_ms;
        if run > 0 {
            on.push(confined);
            off.push(free);
        }
    }
    let added: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on - off).collect();
    let verdict = match median(&added) {
        Some(added) if added <= 2.0 => "≤ 2 ms: met",
        _ => "≤ 2 ms: **missed**",
    };
    let mut table = Table::new(&[
        "bulkhead-blk, spawn → ready, ms",
        "median (least–most)",
        "aim",
    ]);
    table.row(vec!["confined".into(), spread(&on, 2), String::new()]);
    table.row(vec!["not".into(), spread(&off, 2), String::new()]);
    table.row(vec![
        "added, by pairs".into(),
        spread(&added, 2),
        verdict.into(),
    ]);
    Ok(format!(
        "## confinement: what it adds, {runs} pairs of spawns, each in turn\n\n{}\n",
        table.text()
    ))
}

fn steady(without: &std::path::Path, runs: usize, seconds: u32) -> crate::Report {
    let scratch = Scratch::new("bench-confinement")?;
    let file = format!("/dev/shm/bulkhead-bench-{}.img", std::process::id());
    let result = blk::prepare(&file).and_then(|_| loads(without, &scratch, &file, runs, seconds));
    let _ = std::fs::remove_file(&file);
    result
}

fn loads(
    without: &std::path::Path,
    scratch: &Scratch,
    file: &str,
    runs: usize,
    seconds: u32,
) -> crate::Report {
    let free = without.join("bulkhead-blk").to_string_lossy().into_owned();
    let ours = bin("bulkhead-blk").to_string_lossy().into_owned();
    let mut table = Table::new(&[
        "load on tmpfs",
        "requests/s confined",
        "requests/s not",
        "confined of not, by pairs",
        "CPU µs confined",
        "CPU µs not",
    ]);
    let engines = [("io_uring", 1), ("io_uring", 32), ("preadv2", 32)];
    for (engine, depth) in engines {
        let load = Load {
            pattern: "randread",
            block: 4096,
            depth,
            queues: 1,
        };
        let on = Backend::bulkhead("confined", &ours, engine, scratch, file)?;
        let off = Backend::bulkhead("not", &free, engine, scratch, file)?;
        let (mut confined, mut not) = (Vec::new(), Vec::new());
        for run in 0..runs {
            // Who goes first takes turns.
            if run % 2 == 0 {
                confined.push(on.load(load, seconds)?);
                not.push(off.load(load, seconds)?);
            } else {
                not.push(off.load(load, seconds)?);
                confined.push(on.load(load, seconds)?);
            }
        }
        let ratios: Vec<f64> = confined
            .iter()
            .zip(&not)
            .map(|(on, off)| on.rate / off.rate)
            .collect();
        let of = |samples: &[crate::blk_backend::Sample], cpu: bool| {
            let field = |s: &crate::blk_backend::Sample| if cpu { s.cpu_us } else { s.rate };
            let values: Vec<f64> = samples.iter().map(field).collect();
            spread(&values, if cpu { 2 } else { 0 })
        };
        table.row(vec![
            format!("randread 4k d{depth}, {engine}"),
            of(&confined, false),
            of(&not, false),
            spread(&ratios, 3),
            of(&confined, true),
            of(&not, true),
        ]);
    }
    Ok(format!(
        "\nSteady state, medians of {runs} pairs of {seconds} s (least–most): `bulkhead-blk --socket`, \
         whose filter is its own alone; the aim is that nothing can be measured.\n\n{}\n",
        table.text()
    ))
}
