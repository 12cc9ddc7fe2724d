//! Block devices: loop devices over sparse files, where the host lets this process make them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A loop device, taken down with the test.
pub struct Loop(PathBuf);

impl Loop {
    /// Over `file`, with sectors of so many bytes. None, and a word about it, where there are
    /// no loop devices to be had.
    pub fn over(file: &Path, sector: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(Self(name.trim().into()))
            }
            _ => {
                eprintln!("skipped: no loop device: {output:?}");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Looks at the file's size again.
    pub fn measure(&self) {
        let status = Command::new("losetup").arg("-c").arg(&self.0).status();
        assert!(status.unwrap().success());
    }

    /// What the kernel says of its queue.
    pub fn limit(&self, name: &str) -> u64 {
        let device = self.0.file_name().unwrap().to_str().unwrap();
        let path = format!("/sys/block/{device}/queue/{name}");
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
