//! VMs of other tenants: ordinary device processes under an ordinary VMM, which what is tried
//! beside them must not touch.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{AS_USER, Namespace, Undo, for_user};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, patience};
use serde_json::Value;

use crate::BINARIES;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A VM of another tenant's.
pub struct Victim {
    _vmm: Vmm,
    _undo: Option<Undo>,
    /// Its API socket.
    pub socket: String,
}

impl Victim {
    /// Starts one with a disk and sockets, and what `more` says, in a network namespace if one is
    /// given; `host` are further arguments of `serve`.
    ///
    /// # Errors
    /// Why not.
    pub fn start(
        scratch: &Scratch,
        name: &str,
        namespace: Option<&Namespace>,
        host: &[&str],
        more: &[&str],
    ) -> Result<Self, String> {
        let mut command = match namespace {
            Some(namespace) => {
                let [by, place] = namespace.enter();
                let mut command = Command::new(by);
                command.arg(place).arg(bin("bulkhead"));
                command
            }
            None => Command::new(bin("bulkhead")),
        };
        command.arg("serve").args(host);
        let kernel = guest_file("vmlinux");
        Self::of(scratch, name, command, &kernel, None, more)
    }

    /// The same of an ordinary user's, all of which lies in the directory of that name.
    ///
    /// # Errors
    /// Why not.
    pub fn of_user(
        scratch: &Scratch,
        name: &str,
        namespace: &Namespace,
        more: &[&str],
    ) -> Result<Self, String> {
        let io = |e: std::io::Error| format!("{name}: {e}");
        let own = scratch.path(name);
        std::fs::create_dir_all(&own).map_err(io)?;
        for program in BINARIES.iter().chain(&["bulkhead", "bulkhead-launcher"]) {
            std::fs::copy(bin(program), format!("{own}/{program}")).map_err(io)?;
        }
        let kernel = format!("{own}/vmlinux");
        std::fs::copy(guest_file("vmlinux"), &kernel).map_err(io)?;
        scratch.disk(&format!("{name}/{name}"), 1 << 20, 41)?;
        let undo = for_user(&own)?;
        let [by, place] = namespace.enter();
        let mut command = Command::new(by);
        command.arg(place).args(AS_USER);
        command.arg(format!("{own}/bulkhead")).arg("serve");
        let name = format!("{name}/{name}");
        Self::of(scratch, &name, command, &kernel, Some(undo), more)
    }

    /// `name`: of its files, and the end of it its disk's.
    fn of(
        scratch: &Scratch,
        name: &str,
        mut command: Command,
        kernel: &str,
        undo: Option<Undo>,
        more: &[&str],
    ) -> Result<Self, String> {
        let disk = match undo {
            None => scratch.disk(name, 1 << 20, 41)?,
            Some(_) => scratch.path(name),
        };
        let socket = scratch.path(&format!("{name}.sock"));
        command.args(["--api-socket", &socket]);
        let vmm = up(Vmm::spawn(command)?, &socket)?;
        let id = name.rsplit('/').next().unwrap_or(name);
        let disk = format!("path={disk},id={id}");
        let vsock = format!("socket={}", scratch.path(&format!("{name}.vsock")));
        let mut create = vec!["create", "--kernel", kernel];
        if !more.contains(&"--memory") {
            create.extend(["--memory", "96M"]);
        }
        let console = format!("socket={}", scratch.path(&format!("{name}.console")));
        create.extend(["--disk", &disk, "--vsock", &vsock, "--console", &console]);
        create.extend_from_slice(more);
        ctl(&socket, &create).map_err(|e| vmm.story(&e))?;
        Ok(Self {
            _vmm: vmm,
            _undo: undo,
            socket,
        })
    }

    /// Its VMM's and launcher's processes, and those of its devices, with what each executes.
    ///
    /// # Errors
    /// It does not say.
    pub fn processes(&self) -> Result<Vec<(String, i64)>, String> {
        let info = ctl(&self.socket, &["info"])?;
        let devices = ctl(&self.socket, &["devices"])?;
        let mut pids = vec![info["vmm_pid"].as_i64(), info["launcher_pid"].as_i64()];
        for device in devices.as_array().into_iter().flatten() {
            pids.push(device["pid"].as_i64());
        }
        pids.into_iter()
            .map(|pid| {
                let pid = pid.filter(|pid| *pid > 0);
                let pid = pid.ok_or_else(|| format!("a device has no process: {devices}"))?;
                let path = format!("/proc/{pid}/exe");
                let exe = std::fs::read_link(&path).map_err(|e| format!("{path}: {e}"))?;
                let name = exe.file_name().map(|name| name.to_string_lossy());
                Ok((name.unwrap_or_default().into_owned(), pid))
            })
            .collect()
    }

    /// Its VMM, its launcher and the process of its first device.
    ///
    /// # Errors
    /// It does not say.
    pub fn first_pids(&self) -> Result<[i64; 3], String> {
        let mut pids = self.processes()?.into_iter().map(|(_, pid)| pid);
        match (pids.next(), pids.next(), pids.next()) {
            (Some(vmm), Some(launcher), Some(device)) => Ok([vmm, launcher, device]),
            _ => Err("the VM has no device".into()),
        }
    }

    /// The directory of a process's cgroup.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn cgroup(&self, pid: i64) -> Result<String, String> {
        let path = format!("/proc/{pid}/cgroup");
        let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
        let (groups, mounts) = (read(&path)?, read("/proc/mounts")?);
        let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let place = fields.nth(1)?;
            (fields.next()? == "cgroup2").then_some(place)
        });
        Ok(format!(
            "{}{}",
            mount.unwrap_or("/sys/fs/cgroup"),
            own.unwrap_or("/").trim_end_matches('/')
        ))
    }

    /// All of its processes are those they were, and as they should be.
    ///
    /// # Errors
    /// What is not.
    pub fn unharmed(&self, before: &[(String, i64)]) -> Result<(), String> {
        let now = self.processes()?;
        if now != before {
            return Err(format!("the other VM was harmed: {before:?}, now {now:?}"));
        }
        let output = bulkhead(&["audit", "--api-socket", &self.socket])?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "the other VM was harmed: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Waits until the API answers.
///
/// # Errors
/// It does not.
pub fn up(vmm: Vmm, socket: &str) -> Result<Vmm, String> {
    let end = Instant::now() + patience(LIMIT);
    while ctl(socket, &["info"]).is_err() {
        if Instant::now() > end || ended(&vmm) {
            return Err(vmm.story("the API does not answer"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(vmm)
}

fn ended(vmm: &Vmm) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", vmm.pid()));
    stat.map_or(true, |text| text.contains(") Z "))
}

/// Every event so far.
///
/// # Errors
/// The VMM does not tell.
pub fn events(socket: &str) -> Result<Vec<Value>, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|e| format!("{e} in {line:?}")))
        .collect()
}
