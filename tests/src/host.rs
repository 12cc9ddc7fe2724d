//! The host's side of the end-to-end tests: shell commands, the root file system's copy in
//! memory, block devices that fail on purpose.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

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
    Vmm::boot("bh.cmd=script root=/dev/vda", &args)
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
