//! Block: loads on `bulkhead-blk --socket` (both engines) and on qemu-storage-daemon, driven
//! by libblkio's blkio-bench, and fio with io_uring on the file itself, which is the limit.
//! No guest runs. All runs of a load are interleaved.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use bulkhead_tests::vmm::Scratch;

use crate::Options;
use crate::blk_backend::{self as backend, Backend, Sample};
use crate::table::{Table, figure, median, spread};

const FILE_SIZE: u64 = 512 << 20;

/// One load: what is asked for, how much at a time and how much at once.
#[derive(Clone, Copy)]
pub struct Load {
    /// As blkio-bench and fio name it.
    pub pattern: &'static str,
    /// Bytes of a request.
    pub block: u32,
    /// Requests in flight on each queue.
    pub depth: u32,
    /// Queues, a thread each.
    pub queues: u32,
}

impl Load {
    fn name(self, place: &str) -> String {
        format!(
            "{place} {} {}k d{} q{}",
            self.pattern,
            self.block / 1024,
            self.depth,
            self.queues
        )
    }
}

/// The loads of the table, in its order.
fn loads() -> Vec<Load> {
    let mut all = Vec::new();
    for pattern in ["randread", "randwrite"] {
        for (depth, queues) in [(1, 1), (32, 1), (1, 2), (32, 2)] {
            all.push(Load {
                pattern,
                block: 4096,
                depth,
                queues,
            });
        }
    }
    for pattern in ["read", "write"] {
        all.push(Load {
            pattern,
            block: 128 << 10,
            depth: 8,
            queues: 1,
        });
    }
    all
}

/// A file without holes; says whether it takes O_DIRECT.
pub fn prepare(file: &str) -> Result<bool, String> {
    let fail = |e: std::io::Error| format!("{file}: {e}");
    let out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(file)
        .map_err(fail)?;
    let mut block = vec![0u8; 1 << 20];
    for index in 0..FILE_SIZE >> 20 {
        block.fill(index as u8 | 1);
        out.write_all_at(&block, index << 20).map_err(fail)?;
    }
    out.sync_all().map_err(fail)?;
    Ok(OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(file)
        .is_ok())
}

/// What the runs of one back-end under one load gave.
#[derive(Default)]
struct Runs {
    samples: Vec<Sample>,
    calls_and_kicks: Option<(f64, f64)>,
}

impl Runs {
    fn of(&self, field: fn(&Sample) -> f64) -> Vec<f64> {
        self.samples.iter().map(field).collect()
    }

    fn rate(&self) -> Option<f64> {
        median(&self.of(|s| s.rate))
    }

    fn cost(&self) -> Option<f64> {
        median(&self.of(|s| s.cpu_us))
    }
}

/// Runs the loads and prints the table.
pub fn measure(options: &Options) -> crate::Report {
    let (runs, seconds) = (options.runs.unwrap_or(5), options.seconds.unwrap_or(2));
    let disk = std::env::var("BENCH_DISK_DIR").unwrap_or_else(|_| ".".into());
    let mut table = Table::new(&[
        "load",
        "back-end",
        "requests/s",
        "of the limit",
        "of QSD's",
        "added µs",
        "CPU µs",
        "calls",
        "kicks",
        "interrupts",
        "aims",
    ]);
    let scratch = Scratch::new("bench-blk")?;
    let mut notes = String::new();
    for (place, dir) in [("tmpfs", "/dev/shm"), ("disk", disk.as_str())] {
        let wanted: Vec<Load> = loads()
            .into_iter()
            .filter(|l| options.wants(&l.name(place)))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let file = format!("{dir}/bulkhead-bench-{}.img", std::process::id());
        let result = prepare(&file).and_then(|direct| {
            if !direct {
                notes +=
                    &format!("{place}: without O_DIRECT, which this file system does not take.\n");
            }
            let backends = backend::all(&scratch, &file, direct)?;
            for load in &wanted {
                let name = load.name(place);
                eprintln!("bench: {name}");
                rows(
                    &mut table, &name, *load, runs, seconds, &backends, &file, direct, &mut notes,
                );
            }
            Ok(())
        });
        let _ = std::fs::remove_file(&file);
        result?;
    }
    Ok(format!(
        "## blk: medians of {runs} interleaved runs of {seconds} s (least–most)\n\n\
         dD: D requests in flight on each queue; qQ: Q queues. Nothing is pinned. CPU µs of the \
         back-end's process, its system calls and the driver's kicks (both of a further run, by perf) and the device's \
         interrupts are per request. Added: time per request beyond the limit's.\n\n{}\n{notes}",
        table.text()
    ))
}

#[allow(clippy::too_many_arguments)]
fn rows(
    table: &mut Table,
    name: &str,
    load: Load,
    runs: usize,
    seconds: u32,
    backends: &[Backend],
    file: &str,
    direct: bool,
    notes: &mut String,
) {
    let mut all: Vec<Runs> = backends.iter().map(|_| Runs::default()).collect();
    let mut limit = Runs::default();
    for _ in 0..runs {
        for (backend, runs) in backends.iter().zip(&mut all) {
            // blkio-bench gives up when 5 s pass without a completion: say so, and go on.
            match backend.load(load, seconds) {
                Ok(sample) => runs.samples.push(sample),
                Err(why) => *notes += &format!("{name}, {}: a run failed: {why}\n\n", backend.name),
            }
        }
        match backend::fio(file, load, seconds, direct) {
            Ok(sample) => limit.samples.push(sample),
            Err(why) => *notes += &format!("{name}, fio: a run failed: {why}\n\n"),
        }
    }
    for (backend, runs) in backends.iter().zip(&mut all) {
        match backend.calls_and_kicks(load) {
            Ok(counted) => runs.calls_and_kicks = Some(counted),
            Err(why) if !notes.contains(&why) => {
                *notes += &format!("Not counted: {why}\n\n");
            }
            Err(_) => {}
        }
    }
    let peer = backends
        .iter()
        .zip(&all)
        .find(|(b, _)| b.is_peer)
        .map(|(_, runs)| runs);
    for (backend, runs) in backends.iter().zip(&all) {
        let of = |other: Option<f64>| runs.rate().zip(other).map(|(ours, base)| ours / base);
        let peer_rate = peer.and_then(Runs::rate);
        let added = (load.depth == 1)
            .then(|| runs.rate().zip(limit.rate()))
            .flatten()
            .map(|(ours, limit)| (1e6 / ours - 1e6 / limit) * f64::from(load.queues));
        let verdicts = if backend.is_peer {
            String::new()
        } else {
            aims(
                name,
                load,
                of(limit.rate()),
                of(peer_rate),
                added,
                runs.cost().zip(peer.and_then(Runs::cost)),
            )
        };
        table.row(vec![
            name.into(),
            backend.name.clone(),
            spread(&runs.of(|s| s.rate), 0),
            figure(of(limit.rate()), 2),
            figure(of(peer_rate), 2),
            figure(added, 1),
            figure(runs.cost(), 2),
            figure(runs.calls_and_kicks.map(|c| c.0), 2),
            figure(runs.calls_and_kicks.map(|c| c.1), 2),
            figure(median(&runs.of(|s| s.interrupts)), 2),
            verdicts,
        ]);
    }
    table.row(vec![
        name.into(),
        "fio on the file".into(),
        spread(&limit.of(|s| s.rate), 0),
        "1.00".into(),
        figure(
            limit
                .rate()
                .zip(peer.and_then(Runs::rate))
                .map(|(l, p)| l / p),
            2,
        ),
        String::new(),
        figure(limit.cost(), 2),
    ]);
}

/// Which of the aims apply to a load, and whether they are met.
fn aims(
    name: &str,
    load: Load,
    of_limit: Option<f64>,
    of_peer: Option<f64>,
    added: Option<f64>,
    costs: Option<(f64, f64)>,
) -> String {
    let mut all = Vec::new();
    let mut judge = |met: Option<bool>, aim: &str| {
        all.push(match met {
            Some(true) => format!("{aim}: met"),
            Some(false) => format!("{aim}: **missed**"),
            None => format!("{aim}: –"),
        });
    };
    let random = load.pattern.starts_with("rand");
    if name.starts_with("disk ") && random && load.depth == 32 {
        judge(of_limit.map(|r| r >= 0.95), "≥ 0.95 of the limit");
        judge(of_peer.map(|r| r >= 1.3), "≥ 1.3 of QSD");
    }
    if name.starts_with("disk ") && random && load.depth == 1 {
        judge(added.map(|a| a <= 8.0), "≤ 8 µs added");
    }
    if name.starts_with("tmpfs ") && random && load.depth == 32 {
        judge(of_peer.map(|r| r >= 2.5), "≥ 2.5 of QSD");
    }
    judge(costs.map(|(ours, theirs)| ours < theirs), "less CPU");
    all.join(", ")
}
