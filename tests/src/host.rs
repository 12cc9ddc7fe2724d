//! The host's side of the end-to-end tests: shell commands, the root file system's copy in
//! memory, block devices that fail on purpose.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::vmm::{Scratch, Vmm, guest_file};

/// Runs a script by bash, in which any failing command is the script's; its output.
///
/// # Errors
/// What it printed, if it failed.
pub fn sh(script: &str) -> Result<String, String> {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("bash: {e}"))?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!(
        "{}: {script}\n{}\n{}",
        output.status,
        out.trim(),
        errors.trim()
    ))
}

/// The command in front that makes a program an ordinary user's: nobody's.
pub const AS_USER: [&str; 5] = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--no-new-privs",
];

/// Gives what lies there to the user of [`AS_USER`], who may use /dev/kvm and taps of its own until the
/// value goes.
///
/// # Errors
/// Why not.
pub fn for_user(path: &str) -> Result<Undo, String> {
    let modes = sh("stat --format='chmod %a %n' /dev/kvm /dev/net/tun")?;
    sh(&format!(
        "chmod 666 /dev/kvm /dev/net/tun; chown -R 65534:65534 {path}"
    ))?;
    Ok(Undo::new(modes))
}

/// A script that runs when the value goes: what undoes a change of the host.
pub struct Undo(String);

impl Undo {
    /// Remembers the script.
    pub fn new(script: impl Into<String>) -> Self {
        Self(script.into())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = sh(&self.0);
    }
}

/// The Debian root file system, in memory, where many guests may read it at once.
///
/// # Errors
/// Why it could not be copied.
pub fn rootfs() -> Result<String, String> {
    static COPY: OnceLock<Result<String, String>> = OnceLock::new();
    COPY.get_or_init(|| {
        let from = guest_file("rootfs.ext4");
        let to = std::env::temp_dir().join(format!("bh-rootfs-{}.ext4", std::process::id()));
        let to = to.to_string_lossy().into_owned();
        sh(&format!("cp --sparse=always {from} {to}"))
            .map_err(|e| format!("{e}\nrun `make guest`"))?;
        Ok(to)
    })
    .clone()
}

/// A guest that runs a bash script in the Debian root file system (vda, read-only), with
/// `disks` as vdb, vdc, … The script's own disk is the last. `more` are further arguments.
///
/// # Errors
/// Why it could not be started.
pub fn debian<S: AsRef<str>>(
    scratch: &Scratch,
    script: &str,
    disks: &[S],
    more: &[&str],
) -> Result<Vmm, String> {
    debian_by(&[], scratch, script, disks, more)
}

/// The same, by a command in front that becomes `bulkhead`.
///
/// # Errors
/// Why it could not be started.
pub fn debian_by<S: AsRef<str>>(
    by: &[&str],
    scratch: &Scratch,
    script: &str,
    disks: &[S],
    more: &[&str],
) -> Result<Vmm, String> {
    debian_told(by, scratch, "", script, disks, more)
}

/// The same, with more words for its kernel.
///
/// # Errors
/// Why it could not be started.
pub fn debian_told<S: AsRef<str>>(
    by: &[&str],
    scratch: &Scratch,
    words: &str,
    script: &str,
    disks: &[S],
    more: &[&str],
) -> Result<Vmm, String> {
    let root = format!("path={},readonly=on,id=rootfs,queues=1", rootfs()?);
    // A failure of the script's commands is for it to see: it prints what the test waits for.
    let script = format!("export HOME=/root LC_ALL=C\n{script}");
    let script = format!(
        "path={},readonly=on,id=script,queues=1",
        scratch.script("script", &script)?
    );
    let mut args = vec!["--disk", &root];
    for disk in disks {
        args.extend_from_slice(&["--disk", disk.as_ref()]);
    }
    args.extend_from_slice(&["--disk", &script]);
    args.extend_from_slice(more);
    if !more.contains(&"--memory") {
        args.extend_from_slice(&["--memory", "384M"]);
    }
    let cmdline = format!("bh.cmd=script root=/dev/vda {words}");
    Vmm::boot_by(by, cmdline.trim_end(), &args)
}

/// A network namespace of a test's own, with what is in it; gone with the value.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one.
    ///
    /// # Errors
    /// Why not.
    pub fn new(name: &str) -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bh-{name}-{number}-{}", std::process::id());
        sh(&format!(
            "ip netns add {name} && ip -n {name} link set lo up"
        ))?;
        Ok(Self { name })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The command in front that runs another one in it.
    pub fn enter(&self) -> [String; 2] {
        ["nsenter".into(), format!("--net=/run/netns/{}", self.name)]
    }

    /// Runs a script in it; see [`sh`].
    ///
    /// # Errors
    /// What it printed, if it failed.
    pub fn sh(&self, script: &str) -> Result<String, String> {
        let quoted = script.replace('\'', "'\\''");
        sh(&format!(
            "nsenter --net=/run/netns/{} bash -euo pipefail -c '{quoted}'",
            self.name
        ))
        .map_err(|e| e.replace(&quoted, script))
    }

    /// Makes a tap: up, with an address (`10.1.0.1/24`) unless that is empty.
    ///
    /// # Errors
    /// What `ip` said.
    pub fn tap(&self, name: &str, address: &str, options: &str) -> Result<(), String> {
        let address = match address {
            "" => String::new(),
            given => format!("ip addr add {given} dev {name}"),
        };
        self.sh(&format!(
            "ip tuntap add {name} mode tap vnet_hdr {options}
sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1
{address}
ip link set {name} up"
        ))
        .map(drop)
    }

    /// A guest that runs a script (see [`debian`]), its `bulkhead` started in here.
    ///
    /// # Errors
    /// Why it could not be started.
    pub fn debian(&self, scratch: &Scratch, script: &str, more: &[&str]) -> Result<Vmm, String> {
        let enter = self.enter();
        let by: Vec<&str> = enter.iter().map(String::as_str).collect();
        debian_by(&by, scratch, script, &[] as &[&str], more)
    }

    /// Starts a command in here; killed with the value.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn spawn(&self, script: &str) -> Result<Vmm, String> {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        command.args([&enter[1], "bash", "-c", &format!("exec {script}")]);
        Vmm::spawn(command)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "ip netns pids {0} | xargs -r kill -KILL; ip netns del {0}",
            self.name
        ));
    }
}

/// Allocated bytes of a file.
///
/// # Errors
/// Why they could not be read.
pub fn allocated(path: &str) -> Result<u64, String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|e| format!("{path}: {e}"))?;
    Ok(metadata.blocks() * 512)
}
