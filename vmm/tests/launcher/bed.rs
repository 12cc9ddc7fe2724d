#![allow(unsafe_code)] // mkfifo(3), kill(2) and geteuid(2) of the libc crate.
//! What the tests stand on: a directory with the programs, a launcher, a VMM that can be
//! killed, and looks into /proc.

use std::ffi::CStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_vmm::launcher::{Launcher, LauncherConfig, SpawnSpec};

/// A directory of one test's own, with the launcher, the probe, and room for sockets.
pub struct Bed(PathBuf);

impl Bed {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bh-launcher-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let bed = Self(path);
        let own = std::env::current_exe().unwrap();
        for (from, to) in [
            (
                Path::new(env!("CARGO_BIN_EXE_bulkhead-launcher")),
                "bulkhead-launcher",
            ),
            (&own, "bulkhead-blk"),
        ] {
            let to = bed.path(to);
            if fs::hard_link(from, &to).is_err() {
                fs::copy(from, &to).unwrap();
            }
        }
        bed
    }

    /// Where the directory of another process's bed is.
    pub fn at(path: &str) -> Self {
        Self(path.into())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn config(&self) -> LauncherConfig {
        let mut devices = vec!["bulkhead-blk".to_owned()];
        for name in ["bulkhead-net", "bulkhead-blk-image"] {
            if self.path(name).exists() {
                devices.push(name.into());
            }
        }
        LauncherConfig {
            cgroup: Default::default(),
            libexec: self.0.clone(),
            devices,
            allow_paths: Vec::new(),
            helpers: Vec::new(),
            device_dirs: Vec::new(),
            ids: None,
        }
    }

    pub fn launcher(&self) -> Launcher {
        Launcher::start(&self.config()).unwrap()
    }

    pub fn fake_vmm(&self, mode: &str) -> FakeVmm {
        self.fake_vmm_as(mode, None)
    }

    /// Starts this program as a VMM of its own process, by its only ignored test.
    pub fn fake_vmm_as(&self, mode: &str, uid: Option<u32>) -> FakeVmm {
        let mut command = Command::new(self.path("bulkhead-blk"));
        command
            .args(["--exact", "fake_vmm::fake_vmm", "--ignored", "--nocapture"])
            .env("BULKHEAD_FAKE_VMM", mode)
            .env("BULKHEAD_FAKE_BED", &self.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(id) = uid {
            fs::set_permissions(&self.0, fs::Permissions::from_mode(0o777)).unwrap();
            command.uid(id).gid(id);
        }
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        FakeVmm { child, out }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::env::var_os("BULKHEAD_FAKE_VMM").is_none() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// This program as a VMM.
pub struct FakeVmm {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl FakeVmm {
    /// The next line that it meant for us: libtest prints too.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            if self.out.read_line(&mut line).unwrap() == 0 {
                panic!("the fake VMM has ended: {}", self.stderr());
            }
            // libtest begins "test NAME ... " on the same line.
            if let Some((_, said)) = line.split_once("fake: ") {
                return said.trim_end().to_owned();
            }
        }
    }

    pub fn until(&mut self, prefix: &str) -> String {
        loop {
            let line = self.line();
            if line.starts_with(prefix) {
                return line;
            }
        }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end; true when it ended well.
    pub fn wait(&mut self) -> bool {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap().success()
    }

    /// What came on its stderr, its launcher's lines included.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut text).unwrap();
        }
        text
    }
}

impl Drop for FakeVmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn spec(id: &str, args: &[&str]) -> SpawnSpec {
    SpawnSpec {
        dial: None,
        device_id: id.into(),
        binary: "bulkhead-blk".into(),
        // It installs none, and so stays under the outer one.
        policy: "bulkhead-blk".into(),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        incarnation: 0,
        fds: Vec::new(),
        fence: false,
    }
}

/// Waits for what must come, but need not come at once.
pub fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A field of /proc/PID/status.
pub fn proc_field(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
        .unwrap();
    line.trim().to_owned()
}

/// Whether the process exists and has not ended.
pub fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with(['Z', 'X'])
    })
}

/// Processes below another.
pub fn children(of: i32) -> Vec<i32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
                let fields = stat.rsplit(')').next().unwrap().to_owned();
                fields.split_whitespace().nth(1) == Some(&of.to_string())
            })
        })
        .collect()
}

pub fn root() -> bool {
    // SAFETY: geteuid cannot fail.
    unsafe { libc::geteuid() == 0 }
}

pub fn kill(pid: i32) {
    // SAFETY: kill takes integers; the pid is of a child of this test.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

pub fn mkfifo(path: &CStr) -> i32 {
    // SAFETY: the string lives across the call.
    unsafe { libc::mkfifo(path.as_ptr(), 0o600) }
}
