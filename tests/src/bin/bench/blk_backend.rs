//! The block back-ends that are compared, their load generator, and the limit.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use bulkhead_tests::vmm::{Scratch, bin};

use crate::blk::Load;
use crate::process;

/// A back-end that serves one file; ended when dropped.
pub struct Backend {
    /// As the table calls it.
    pub name: String,
    /// Not ours.
    pub is_peer: bool,
    socket: String,
    child: Child,
}

/// What one run gave, per second or per request.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Requests per second.
    pub rate: f64,
    /// CPU time of the back-end's process.
    pub cpu_us: f64,
    /// Notifications from the device.
    pub interrupts: f64,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Ours with both engines, an older one of ours (`BENCH_ALSO`, a path) and the peer.
///
/// # Errors
/// Which could not be started.
pub fn all(scratch: &Scratch, file: &str, direct: bool) -> Result<Vec<Backend>, String> {
    let ours = bin("bulkhead-blk").to_string_lossy().into_owned();
    let mut backends = vec![
        Backend::bulkhead("bulkhead-blk", &ours, "io_uring", scratch, file)?,
        Backend::bulkhead("bulkhead-blk preadv2", &ours, "preadv2", scratch, file)?,
    ];
    if let Ok(other) = std::env::var("BENCH_ALSO") {
        let name = "bulkhead-blk of BENCH_ALSO";
        backends.push(Backend::bulkhead(name, &other, "io_uring", scratch, file)?);
    }
    backends.push(Backend::qemu(scratch, file, direct)?);
    Ok(backends)
}

impl Backend {
    fn start(name: &str, is_peer: bool, socket: String, command: Command) -> Result<Self, String> {
        let mut command = command;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let child = command.spawn().map_err(|e| format!("{name}: {e}"))?;
        let backend = Self {
            name: name.into(),
            is_peer,
            socket,
            child,
        };
        process::appears(&backend.socket, Duration::from_secs(10))
            .map_err(|e| format!("{name}: {e}"))?;
        Ok(backend)
    }

    /// One of ours, by its program.
    ///
    /// # Errors
    /// It could not be started.
    pub fn bulkhead(
        name: &str,
        program: &str,
        engine: &str,
        scratch: &Scratch,
        file: &str,
    ) -> Result<Self, String> {
        let help = Command::new(program)
            .arg("--help")
            .output()
            .map_err(|e| format!("{program}: {e}"))?;
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        let mut disk = format!("path={file}");
        // Beside QSD with cache.direct=on and fio with direct=1.
        if help.contains("cache=") {
            disk += ",cache=none";
        }
        // Three processes of ours serve the one file.
        if help.contains("lock=") {
            disk += ",lock=off";
        }
        let socket = scratch.path(&format!("{}.sock", name.replace(' ', "-")));
        let mut command = Command::new(program);
        command.args(["--socket", &socket, "--disk", &disk, "--queues", "2"]);
        command.args(["--io-engine", engine]);
        Self::start(name, false, socket, command)
    }

    fn qemu(scratch: &Scratch, file: &str, direct: bool) -> Result<Self, String> {
        let socket = scratch.path("qemu.sock");
        let direct = if direct { "on" } else { "off" };
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--blockdev", &format!("driver=file,node-name=f,filename={file},aio=io_uring,cache.direct={direct},locking=off")])
            .args(["--object", "iothread,id=t", "--export"])
            .arg(format!(
                "vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=2,iothread=t"
            ));
        Self::start("qemu-storage-daemon", true, socket, command)
    }

    fn arguments(&self, command: &mut Command, load: Load, seconds: u32) {
        command.args([
            &format!("--num-threads={}", load.queues),
            &format!("--readwrite={}", load.pattern),
            &format!("--blocksize={}", load.block),
            &format!("--iodepth={}", load.depth),
            &format!("--runtime={seconds}"),
            "virtio-blk-vhost-user",
            &format!("path={}", self.socket),
        ]);
    }

    /// One run.
    ///
    /// # Errors
    /// What blkio-bench said.
    pub fn load(&self, load: Load, seconds: u32) -> Result<Sample, String> {
        let before = process::cpu(self.child.id());
        let mut command = Command::new(blkio_bench());
        self.arguments(&mut command, load, seconds);
        let output = finished(command)?;
        let used = process::cpu(self.child.id()).saturating_sub(before);
        let rate = rate(&output)?;
        let requests = rate * f64::from(seconds);
        // From tests/bench/blkio-count.c.
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let interrupts = errors
            .lines()
            .find_map(|l| l.strip_prefix("interrupts: ")?.parse::<f64>().ok());
        Ok(Sample {
            rate,
            cpu_us: used.as_secs_f64() * 1e6 / requests,
            interrupts: interrupts.map_or(f64::NAN, |n| n / requests),
        })
    }

    /// System calls of the back-end, and kicks (the load writes nothing else), per request:
    /// counted by perf's tracepoints in a run of its own.
    ///
    /// # Errors
    /// Why they could not be counted.
    pub fn calls_and_kicks(&self, load: Load) -> Result<(f64, f64), String> {
        let mut perf = Command::new("perf");
        perf.args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter"])
            .args(["-p", &self.child.id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let perf = perf.spawn().map_err(|e| format!("perf: {e}"))?;
        // Let it attach.
        std::thread::sleep(Duration::from_millis(400));
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-e", "syscalls:sys_enter_write"]);
        command.arg(blkio_bench());
        self.arguments(&mut command, load, 1);
        let result = finished(command);
        let _ = Command::new("kill")
            .args(["-INT", &perf.id().to_string()])
            .status();
        let output = perf.wait_with_output().map_err(|e| format!("perf: {e}"))?;
        let result = result?;
        let rate = rate(&result)?;
        let calls = counted(&output, "raw_syscalls").ok_or("perf cannot count system calls")?;
        let kicks = counted(&result, "sys_enter_write").ok_or("perf cannot count kicks")?;
        Ok((calls / rate, kicks / rate))
    }
}

/// The number before an event's name: `123456,,raw_syscalls:sys_enter,…`.
fn counted(output: &Output, event: &str) -> Option<f64> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|l| l.contains(event))?;
    line.split(',').next()?.parse().ok()
}

/// Requests per second.
fn rate(output: &Output) -> Result<f64, String> {
    let answer = json(output)?;
    let rate = answer
        .pointer("/aggregate/kiops")
        .and_then(serde_json::Value::as_f64);
    Ok(rate.ok_or("blkio-bench: no kiops")? * 1000.0)
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
    // fio may print notes first.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let start = text.find('{').unwrap_or(0);
    serde_json::from_str(text.get(start..).unwrap_or_default())
        .map_err(|e| format!("{e} in {text}"))
}

/// fio on the file itself: what the host can do.
///
/// # Errors
/// What it said.
pub fn fio(file: &str, load: Load, seconds: u32, direct: bool) -> Result<Sample, String> {
    let mut command = Command::new("fio");
    command.args([
        "--name=limit",
        &format!("--filename={file}"),
        "--ioengine=io_uring",
        &format!("--rw={}", load.pattern),
        &format!("--bs={}", load.block),
        &format!("--direct={}", u8::from(direct)),
        &format!("--iodepth={}", load.depth),
        &format!("--numjobs={}", load.queues),
        "--thread",
        "--group_reporting",
        "--time_based",
        "--overwrite=1",
        "--fallocate=none",
        &format!("--runtime={seconds}"),
        "--output-format=json",
    ]);
    let answer = json(&finished(command)?)?;
    let side = if load.pattern.ends_with("read") {
        "read"
    } else {
        "write"
    };
    let number = |path: &str| {
        answer
            .pointer(path)
            .and_then(serde_json::Value::as_f64)
            .ok_or_else(|| format!("fio: no {path}"))
    };
    let rate = number(&format!("/jobs/0/{side}/iops"))?;
    // Per cent of one CPU, averaged over the jobs.
    let busy = number("/jobs/0/usr_cpu")? + number("/jobs/0/sys_cpu")?;
    Ok(Sample {
        rate,
        cpu_us: busy / 100.0 * f64::from(load.queues) * 1e6 / rate,
        interrupts: f64::NAN,
    })
}
