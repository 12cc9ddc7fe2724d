//! A `bulkhead` process under test: started with arguments, its output collected, its
//! end awaited with a deadline, and nothing of it left when the test ends.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Directory of the binaries under test (`BULKHEAD_BIN`).
pub fn bin(name: &str) -> PathBuf {
    let dir = std::env::var_os("BULKHEAD_BIN").map(PathBuf::from);
    let dir = dir.or_else(|| {
        std::env::current_exe()
            .ok()
            .and_then(|e| e.parent().map(PathBuf::from))
    });
    dir.unwrap_or_default().join(name)
}

/// The limit, or what `BULKHEAD_PATIENCE` (seconds) says if that is less: for whoever writes
/// tests and does not want to wait for what will not come.
pub fn patience(limit: Duration) -> Duration {
    let given = std::env::var("BULKHEAD_PATIENCE")
        .ok()
        .and_then(|s| s.parse().ok());
    given.map_or(limit, |seconds| limit.min(Duration::from_secs(seconds)))
}

/// A file that `tests/guest/make` made (`BULKHEAD_GUEST`, default `target/guest`).
pub fn guest_file(name: &str) -> String {
    let dir = std::env::var("BULKHEAD_GUEST").unwrap_or_else(|_| "target/guest".to_string());
    format!("{dir}/{name}")
}

/// A directory of the test's own, gone with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one below the system's temporary directory.
    ///
    /// # Errors
    /// Why it could not be made.
    pub fn new(name: &str) -> Result<Self, String> {
        let dir = std::env::temp_dir().join(format!("bh-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Self(dir))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    /// Writes a file of it and says where.
    ///
    /// # Errors
    /// Why it could not be written.
    pub fn file(&self, name: &str, content: &[u8]) -> Result<String, String> {
        let path = self.path(name);
        std::fs::write(&path, content).map_err(|e| format!("{path}: {e}"))?;
        Ok(path)
    }

    /// A disk image of `size` bytes that no two offsets of share content.
    ///
    /// # Errors
    /// Why it could not be written.
    pub fn disk(&self, name: &str, size: usize, seed: u64) -> Result<String, String> {
        let mut state = seed | 1;
        let mut content = Vec::with_capacity(size);
        while content.len() < size {
            // xorshift64: fast, and good enough to tell sectors apart.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
        }
        content.truncate(size);
        self.file(name, &content)
    }

    /// A disk that the guest's `bh.cmd=script` runs.
    ///
    /// # Errors
    /// Why it could not be written.
    pub fn script(&self, name: &str, script: &str) -> Result<String, String> {
        let mut content = format!("#!bulkhead-test\n{script}\n").into_bytes();
        content.resize(content.len().next_multiple_of(4096), 0);
        self.file(name, &content)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[derive(Default)]
struct Collected {
    text: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Collected {
    fn follow(self: &Arc<Self>, mut from: impl Read + Send + 'static) {
        let to = Arc::clone(self);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                let mut text = to.text.lock().unwrap_or_else(PoisonError::into_inner);
                text.extend_from_slice(buffer.get(..n).unwrap_or_default());
                to.more.notify_all();
            }
            to.more.notify_all();
        });
    }

    fn text(&self) -> String {
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// A running `bulkhead`.
pub struct Vmm {
    child: Child,
    out: Arc<Collected>,
    err: Arc<Collected>,
}

impl Vmm {
    /// Starts `bulkhead` with `args`.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn start<S: AsRef<str>>(args: &[S]) -> Result<Self, String> {
        let mut command = Command::new(bin("bulkhead"));
        command.args(args.iter().map(AsRef::as_ref));
        Self::spawn(command)
    }

    /// Boots target/guest's kernel with `cmdline` and more arguments, serial on stdio.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn boot(cmdline: &str, more: &[&str]) -> Result<Self, String> {
        Self::boot_by(&[], cmdline, more)
    }

    /// The same, by a command in front (`nsenter …`, `env …`) that becomes `bulkhead`.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn boot_by(by: &[&str], cmdline: &str, more: &[&str]) -> Result<Self, String> {
        let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initrd.img"));
        let cmdline = format!("console=ttyS0 panic=-1 quiet {cmdline}");
        let mut args = vec![
            "run",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            &cmdline,
        ];
        args.extend_from_slice(more);
        if !more.contains(&"--memory") {
            args.extend_from_slice(&["--memory", "256M"]);
        }
        let Some((first, rest)) = by.split_first() else {
            return Self::start(&args);
        };
        let mut command = Command::new(first);
        command.args(rest).arg(bin("bulkhead")).args(&args);
        Self::spawn(command)
    }

    /// Starts a prepared command.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn spawn(mut command: Command) -> Result<Self, String> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let (out, err) = (Arc::<Collected>::default(), Arc::<Collected>::default());
        if let Some(stdout) = child.stdout.take() {
            out.follow(stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            err.follow(stderr);
        }
        Ok(Self { child, out, err })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far on standard output.
    pub fn output(&self) -> String {
        self.out.text()
    }

    /// What it printed so far on standard error.
    pub fn errors(&self) -> String {
        self.err.text()
    }

    /// Types at the guest's console.
    ///
    /// # Errors
    /// Why it could not.
    pub fn type_text(&mut self, text: &str) -> Result<(), String> {
        let stdin = self.child.stdin.as_mut().ok_or("no standard input")?;
        stdin.write_all(text.as_bytes()).map_err(|e| e.to_string())
    }

    /// Waits until the output contains `wanted`.
    ///
    /// # Errors
    /// All that was printed, when the time is up or the process ended without it.
    pub fn wait_for(&mut self, wanted: &str, limit: Duration) -> Result<(), String> {
        let end = Instant::now() + patience(limit);
        loop {
            if self.output().contains(wanted) {
                return Ok(());
            }
            let ended = matches!(self.child.try_wait(), Ok(Some(_)));
            if ended || Instant::now() > end {
                std::thread::sleep(Duration::from_millis(100));
                if self.output().contains(wanted) {
                    return Ok(());
                }
                return Err(self.story(&format!(
                    "no {wanted:?} {}",
                    if ended { "before the end" } else { "in time" }
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the process to end; its exit code (128+N for signal N).
    ///
    /// # Errors
    /// All that was printed, when the time is up (the process is then killed).
    pub fn wait(&mut self, limit: Duration) -> Result<i32, String> {
        let end = Instant::now() + patience(limit);
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                use std::os::unix::process::ExitStatusExt;
                // Let the readers see the end of the pipes.
                std::thread::sleep(Duration::from_millis(50));
                return Ok(status
                    .code()
                    .or(status.signal().map(|s| 128 + s))
                    .unwrap_or(-1));
            }
            if Instant::now() > end {
                let story = self.story("did not end in time");
                self.kill();
                return Err(story);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The exit code (128+N for signal N) if the process has ended.
    pub fn ended(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.try_wait().ok()??;
        let signal = status.signal().map(|s| 128 + s);
        Some(status.code().or(signal).unwrap_or(-1))
    }

    /// Waits for the end and checks the exit code.
    ///
    /// # Errors
    /// All that was printed, when it is another one.
    pub fn ends_with(&mut self, code: i32, limit: Duration) -> Result<(), String> {
        match self.wait(limit)? {
            got if got == code => Ok(()),
            got => Err(self.story(&format!("exit code {got}, not {code}"))),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What happened, for a failure's message.
    pub fn story(&self, what: &str) -> String {
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        };
        format!(
            "{what}\n--- output:\n{}\n--- errors:\n{}",
            tail(self.output()),
            tail(self.errors())
        )
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a `bulkhead` command to its end.
///
/// # Errors
/// Why it did not start.
pub fn bulkhead(args: &[&str]) -> Result<Output, String> {
    Command::new(bin("bulkhead"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("bulkhead {args:?}: {e}"))
}

/// Runs `bulkhead ctl` against a socket and returns what it printed as JSON.
///
/// # Errors
/// What it said on standard error.
pub fn ctl(socket: &str, args: &[&str]) -> Result<serde_json::Value, String> {
    let mut all = vec!["ctl", "--socket", socket, "--json"];
    all.extend_from_slice(args);
    let output = bulkhead(&all)?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    if text.trim().is_empty() {
        return Ok(serde_json::Value::Null);
    }
    serde_json::from_str(&text).map_err(|e| format!("{e} in {text:?}"))
}

/// Processes that were there before the first test, which are none of ours.
static BEFORE: OnceLock<Vec<i32>> = OnceLock::new();

/// Notes what runs before the first test.
pub fn remember_processes() {
    BEFORE.get_or_init(|| all_processes().into_iter().map(|(pid, _)| pid).collect());
}

/// Processes of the VMs under test.
pub fn bulkhead_processes() -> Vec<(i32, String)> {
    let before = BEFORE.get_or_init(Vec::new);
    let mut found = all_processes();
    found.retain(|(pid, _)| !before.contains(pid));
    found
}

fn all_processes() -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.starts_with("bulkhead") && !is_of_another_build(&entry.path()) {
            found.push((pid, comm.trim().to_string()));
        }
    }
    found
}

/// Whether a process runs a program of a whole other build, as of somebody who tries something
/// on the same machine. What a test has copied is no such build.
fn is_of_another_build(process: &Path) -> bool {
    let Ok(exe) = std::fs::read_link(process.join("exe")) else {
        return false;
    };
    let Some(place) = exe.parent() else {
        return false;
    };
    let whole = ["bulkhead", "bulkhead-launcher"].map(|name| place.join(name).is_file());
    let ours = std::fs::canonicalize(bin("")).is_ok_and(|ours| ours == place);
    let scratch = place.to_string_lossy().contains("/bh-");
    whole == [true, true] && !ours && !scratch
}

/// Waits until no process of any VM is left.
///
/// # Errors
/// Those that are left, when the time is up.
pub fn nothing_left(limit: Duration) -> Result<(), String> {
    let end = Instant::now() + limit;
    loop {
        let left = bulkhead_processes();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("left behind: {left:?}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
