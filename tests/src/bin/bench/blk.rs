//! Block: 4 KiB random reads through `bulkhead-blk --socket` and through
//! qemu-storage-daemon, driven by libblkio's blkio-bench, and fio on the file itself.
//! No guest runs. The runs of the back-ends are interleaved.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use bulkhead_tests::vmm::{Scratch, bin};

use crate::process;
use crate::table::{Table, figure, median, spread};

const SECONDS: u32 = 2;
const FILE_SIZE: u64 = 512 << 20;

/// A back-end that serves one file; ended when dropped.
struct Backend {
    name: &'static str,
    socket: String,
    child: Child,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Backend {
    fn start(name: &'static str, socket: String, mut command: Command) -> Result<Self, String> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().map_err(|e| format!("{name}: {e}"))?;
        let backend = Self {
            name,
            socket,
            child,
        };
        process::appears(&backend.socket, Duration::from_secs(10))
            .map_err(|e| format!("{name}: {e}"))?;
        Ok(backend)
    }

    fn bulkhead(scratch: &Scratch, file: &str) -> Result<Self, String> {
        let socket = scratch.path("bulkhead.sock");
        let mut command = pinned(0, bin("bulkhead-blk").to_string_lossy().as_ref());
        command.args([
            "--socket",
            &socket,
            "--disk",
            &format!("path={file}"),
            "--queues",
            "2",
        ]);
        Self::start("bulkhead-blk", socket, command)
    }

    fn qemu(scratch: &Scratch, file: &str, direct: bool) -> Result<Self, String> {
        let socket = scratch.path("qemu.sock");
        let direct = if direct { "on" } else { "off" };
        let mut command = pinned(0, "qemu-storage-daemon");
        command
            .args(["--blockdev", &format!("driver=file,node-name=f,filename={file},aio=io_uring,cache.direct={direct}")])
            .args(["--object", "iothread,id=t", "--export"])
            .arg(format!(
                "vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=2,iothread=t"
            ));
        Self::start("qemu-storage-daemon", socket, command)
    }

    /// One run: requests per second, CPU µs of the back-end per request.
    fn load(&self, depth: u32) -> Result<(f64, f64), String> {
        let before = process::cpu(self.child.id());
        let mut command = pinned(1, &blkio_bench());
        command.args([
            "--num-threads=1",
            "--readwrite=randread",
            "--blocksize=4096",
            &format!("--iodepth={depth}"),
            &format!("--runtime={SECONDS}"),
            "virtio-blk-vhost-user",
            &format!("path={}", self.socket),
        ]);
        let answer = json(&finished(command)?)?;
        let rate = answer
            .pointer("/aggregate/kiops")
            .and_then(serde_json::Value::as_f64);
        let rate = rate.ok_or("blkio-bench: no kiops")? * 1000.0;
        let used = process::cpu(self.child.id())
            .saturating_sub(before)
            .as_secs_f64()
            * 1e6;
        Ok((rate, used / (rate * f64::from(SECONDS))))
    }

    /// System calls per request, counted by strace while it slows them.
    fn system_calls(&self, depth: u32, scratch: &Scratch) -> Result<f64, String> {
        let report = scratch.path("strace");
        let mut strace = Command::new("timeout")
            .args([
                "--signal=INT",
                &(SECONDS + 2).to_string(),
                "strace",
                "-c",
                "-f",
                "-o",
                &report,
            ])
            .args(["-p", &self.child.id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        // Let it attach.
        std::thread::sleep(Duration::from_millis(500));
        let load = self.load(depth);
        let _ = strace.wait();
        let text = std::fs::read_to_string(&report).map_err(|e| e.to_string())?;
        // `100.00    0.153612           3     43210        12 total`
        let total = text
            .lines()
            .rev()
            .find(|l| l.trim_end().ends_with(" total"));
        let calls = total.and_then(|l| l.split_whitespace().nth(3)?.parse::<f64>().ok());
        let (rate, _) = load?;
        Ok(calls.ok_or("strace: no total")? / (rate * f64::from(SECONDS)))
    }
}

/// A command on a CPU of its own, where there are two.
fn pinned(cpu: usize, program: &str) -> Command {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if cpus < 2 {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string(), program]);
    command
}

fn blkio_bench() -> String {
    std::env::var("BLKIO_BENCH").unwrap_or_else(|_| "blkio-bench".into())
}

/// Runs a command that ends by itself.
fn finished(mut command: Command) -> Result<Output, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        Ok(output)
    } else {
        Err(format!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

fn json(output: &Output) -> Result<serde_json::Value, String> {
    serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("{e} in {}", String::from_utf8_lossy(&output.stdout)))
}

/// fio on the file itself: what the host can do.
fn fio(file: &str, depth: u32, direct: bool) -> Result<f64, String> {
    let mut command = pinned(1, "fio");
    command.args([
        "--name=limit",
        &format!("--filename={file}"),
        "--readonly",
        "--ioengine=io_uring",
        "--rw=randread",
        "--bs=4k",
        &format!("--direct={}", u8::from(direct)),
        &format!("--iodepth={depth}"),
        "--time_based",
        &format!("--runtime={SECONDS}"),
        "--output-format=json",
    ]);
    let answer = json(&finished(command)?)?;
    answer
        .pointer("/jobs/0/read/iops")
        .and_then(serde_json::Value::as_f64)
        .ok_or_else(|| "fio: no iops".into())
}

/// A file without holes; says whether it takes O_DIRECT.
fn prepare(file: &str) -> Result<bool, String> {
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

/// Runs the loads and prints the table.
pub fn measure(runs: usize) -> crate::Report {
    let disk = std::env::var("BENCH_DISK_DIR").unwrap_or_else(|_| ".".into());
    let mut table = Table::new(&[
        "4 KiB random read",
        "back-end",
        "IOPS",
        "of qemu-storage-daemon's",
        "CPU µs per request",
        "system calls per request (strace)",
    ]);
    let scratch = Scratch::new("bench-blk")?;
    let mut notes = String::new();
    for (place, dir) in [("tmpfs", "/dev/shm"), ("disk", disk.as_str())] {
        let file = format!("{dir}/bulkhead-bench-{}.img", std::process::id());
        let result = prepare(&file).and_then(|direct| {
            if !direct {
                notes +=
                    &format!("{place}: without O_DIRECT, which this file system does not take.\n");
            }
            let backends = [
                Backend::bulkhead(&scratch, &file)?,
                Backend::qemu(&scratch, &file, direct)?,
            ];
            for depth in [1, 32] {
                rows(
                    &mut table,
                    &format!("{place}, depth {depth}"),
                    depth,
                    runs,
                    &backends,
                    &scratch,
                    &mut notes,
                );
                let limit: Result<Vec<f64>, String> =
                    (0..runs).map(|_| fio(&file, depth, direct)).collect();
                let limit = limit.map_or_else(|_| "–".into(), |all| spread(&all, 0));
                table.row(vec![
                    format!("{place}, depth {depth}"),
                    "fio on the file".into(),
                    limit,
                ]);
            }
            Ok(())
        });
        let _ = std::fs::remove_file(&file);
        result?;
    }
    Ok(format!(
        "## blk: medians of {runs} interleaved runs of {SECONDS} s (least–most), one queue, back-end and load on a CPU each\n\n{}\n{notes}",
        table.text()
    ))
}

fn rows(
    table: &mut Table,
    load: &str,
    depth: u32,
    runs: usize,
    backends: &[Backend],
    scratch: &Scratch,
    notes: &mut String,
) {
    let mut results: Vec<(Vec<f64>, Vec<f64>)> =
        backends.iter().map(|_| Default::default()).collect();
    for _ in 0..runs {
        for (backend, (rates, costs)) in backends.iter().zip(&mut results) {
            // blkio-bench gives up when half a second passes without a completion, which
            // a busy machine can bring about: say so, and go on.
            match backend.load(depth) {
                Ok((rate, cost)) => {
                    rates.push(rate);
                    costs.push(cost);
                }
                Err(why) => *notes += &format!("{load}, {}: a run failed: {why}\n\n", backend.name),
            }
        }
    }
    let base = results.last().and_then(|(rates, _)| median(rates));
    for (backend, (rates, costs)) in backends.iter().zip(&results) {
        let ratio = median(rates).zip(base).map(|(ours, base)| ours / base);
        table.row(vec![
            load.into(),
            backend.name.into(),
            spread(rates, 0),
            figure(ratio, 2),
            figure(median(costs), 1),
            figure(backend.system_calls(depth, scratch).ok(), 2),
        ]);
    }
}
