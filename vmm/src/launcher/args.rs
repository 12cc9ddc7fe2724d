//! The launcher's command line: written by the VMM (`to_argv`), read by the launcher
//! (`parse`). Nobody else starts the launcher, so there is no help and no convenience.

use std::ffi::{CString, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::helper;
use super::identity::{Mapped, Rights};

/// Descriptor of the control socket in the launcher.
pub const CONTROL_FD: RawFd = 3;
/// Descriptor of the VMM's pidfd in the launcher.
pub const VMM_FD: RawFd = 4;
/// Descriptor of the first device binary in the launcher; the others follow.
pub const FIRST_BINARY_FD: RawFd = 5;

/// What the launcher is told at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// How it was cloned.
    pub rights: Rights,
    /// First host id of its devices, where they have ids of their own.
    pub host_ids: Option<u32>,
    /// Whether what holds those ids follows everything else.
    pub ids_held: bool,
    /// Names of the device binaries, at FIRST_BINARY_FD and on.
    pub binaries: Vec<String>,
    /// Prefixes that every path of a request must lie under; none: no restriction.
    pub allow_paths: Vec<PathBuf>,
    /// Kinds of external helpers, whose programs follow the device binaries.
    pub helpers: Vec<String>,
    /// Directories that hold the helpers' libraries.
    pub helper_libraries: Vec<PathBuf>,
    /// Directories of programs for live updates, whose descriptors follow the programs; whether
    /// each is root's.
    pub device_dirs: Vec<(PathBuf, bool)>,
    /// The VM's cgroup, whose directory follows the programs.
    pub cgroup: Option<CgroupArgs>,
    /// Why there is no cgroup, or not every controller.
    pub cgroup_note: String,
    /// Where the note of what the VM made is; it follows the cgroup.
    pub note: Option<PathBuf>,
}

/// What the launcher is told of the VM's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupArgs {
    /// Controllers of its leaves.
    pub controllers: Vec<String>,
    /// Its path below the mount; the last part is its name.
    pub path: String,
}

impl Args {
    /// Which ids the launcher maps into its children.
    pub fn mapped(&self) -> Mapped {
        let shares = self.helpers.iter().any(|kind| kind == helper::VIRTIOFSD);
        match self.host_ids {
            Some(_) if !shares => Mapped::OwnIds,
            _ => Mapped::Root,
        }
    }

    /// argv for the launcher; `None` when a string holds a zero byte.
    pub fn to_argv(&self) -> Option<Vec<CString>> {
        let mut argv = vec![c"bulkhead-launcher".to_owned()];
        let mut push = |key: &str, value: &[u8]| -> Option<()> {
            argv.push(CString::new([key.as_bytes(), b"=", value].concat()).ok()?);
            Some(())
        };
        push("--rights", self.rights.word().as_bytes())?;
        if let Some(ids) = self.host_ids {
            push("--host-ids", ids.to_string().as_bytes())?;
        }
        if self.ids_held {
            push("--ids-held", b"")?;
        }
        for binary in &self.binaries {
            push("--binary", binary.as_bytes())?;
        }
        for path in &self.allow_paths {
            push("--allow-path", path.as_os_str().as_bytes())?;
        }
        for kind in &self.helpers {
            push("--helper", kind.as_bytes())?;
        }
        for path in &self.helper_libraries {
            push("--helper-libraries", path.as_os_str().as_bytes())?;
        }
        for (path, roots) in &self.device_dirs {
            let key = if *roots {
                "--root-device-dir"
            } else {
                "--own-device-dir"
            };
            push(key, path.as_os_str().as_bytes())?;
        }
        if let Some(cgroup) = &self.cgroup {
            let text = format!("{}:{}", cgroup.controllers.join(","), cgroup.path);
            push("--cgroup", text.as_bytes())?;
        }
        push("--cgroup-note", self.cgroup_note.as_bytes())?;
        if let Some(path) = &self.note {
            push("--note", path.as_os_str().as_bytes())?;
        }
        Some(argv)
    }

    /// Reads the arguments after argv[0].
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let (mut rights, mut host_ids, mut ids_held) = (None, None, false);
        let (mut binaries, mut allow_paths) = (Vec::new(), Vec::new());
        let (mut helpers, mut helper_libraries) = (Vec::new(), Vec::new());
        let mut device_dirs = Vec::new();
        let (mut cgroup, mut cgroup_note, mut note) = (None, String::new(), None);
        for arg in args {
            let bytes = arg.as_bytes();
            let bad = || {
                format!(
                    "{}: not an argument of the launcher, which only bulkhead starts",
                    super::printable(&arg.to_string_lossy())
                )
            };
            let equals = bytes.iter().position(|b| *b == b'=').ok_or_else(bad)?;
            let (key, value) = bytes.split_at(equals);
            let value = value.get(1..).unwrap_or_default();
            let text = std::str::from_utf8(value);
            match key {
                b"--rights" => {
                    rights = Some(text.ok().and_then(Rights::from_word).ok_or_else(bad)?);
                }
                b"--host-ids" => {
                    host_ids = Some(text.ok().and_then(|t| t.parse().ok()).ok_or_else(bad)?);
                }
                b"--ids-held" => ids_held = true,
                b"--binary" => binaries.push(text.map_err(|_| bad())?.to_owned()),
                b"--helper" => helpers.push(text.map_err(|_| bad())?.to_owned()),
                b"--helper-libraries" => {
                    helper_libraries.push(PathBuf::from(OsString::from_vec(value.to_owned())));
                }
                b"--root-device-dir" | b"--own-device-dir" => {
                    let path = PathBuf::from(OsString::from_vec(value.to_owned()));
                    device_dirs.push((path, key == b"--root-device-dir"));
                }
                b"--allow-path" => {
                    allow_paths.push(PathBuf::from(OsString::from_vec(value.to_owned())));
                }
                b"--cgroup" => {
                    let (controllers, path) =
                        text.ok().and_then(|t| t.split_once(':')).ok_or_else(bad)?;
                    let words = controllers.split(',').filter(|word| !word.is_empty());
                    cgroup = Some(CgroupArgs {
                        controllers: words.map(str::to_owned).collect(),
                        path: path.to_owned(),
                    });
                }
                b"--cgroup-note" => cgroup_note = text.map_err(|_| bad())?.to_owned(),
                b"--note" => note = Some(PathBuf::from(OsString::from_vec(value.to_owned()))),
                _ => return Err(bad()),
            }
        }
        let rights =
            rights.ok_or("--rights is missing: bulkhead-launcher is started by bulkhead only")?;
        Ok(Self {
            rights,
            host_ids,
            ids_held,
            binaries,
            allow_paths,
            helpers,
            helper_libraries,
            device_dirs,
            cgroup,
            cgroup_note,
            note,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_vmm_writes_the_launcher_reads() {
        let args = Args {
            rights: Rights::User,
            host_ids: Some(0x7000_0040),
            ids_held: true,
            binaries: vec!["bulkhead-blk".into(), "bulkhead-net".into()],
            allow_paths: vec!["/srv/a=b".into(), "".into()],
            helpers: vec!["passt".into()],
            helper_libraries: vec!["/lib".into()],
            device_dirs: vec![("/usr/lib/b=".into(), true), ("/home/x".into(), false)],
            cgroup: Some(CgroupArgs {
                controllers: vec!["cpu".into(), "pids".into()],
                path: "/a:b/bulkhead-vm-1-2".into(),
            }),
            cgroup_note: "no io: x".into(),
            note: Some("/run/bulkhead/vm-1-2.run".into()),
        };
        let argv = args.to_argv().unwrap();
        let read = argv
            .iter()
            .skip(1)
            .map(|a| OsString::from_vec(a.as_bytes().to_vec()));
        assert_eq!(Args::parse(read), Ok(args));
        for wrong in ["--rights", "--rights=king", "--host-ids=x", "--help=1", "x"] {
            assert!(
                Args::parse([OsString::from(wrong)].into_iter()).is_err(),
                "{wrong}"
            );
        }
        assert!(Args::parse(std::iter::empty()).is_err());
    }
}
