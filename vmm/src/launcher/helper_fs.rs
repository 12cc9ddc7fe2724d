//! virtiofsd (https://gitlab.com/virtio-fs/virtiofsd), the external helper that serves a directory of
//! the host's: its command line, its directory and its capabilities. `seccomp/policies/virtiofsd.toml`
//! lists its exceptions.
//!
//! The launcher, on its only thread, opens the directory ([`Share::open`]) and makes the command line;
//! the child between clone and exec mounts the directory in its root, and makes the channel by
//! which the VMM reaches it ([`channel`]).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, MemfdFlags, SealFlags, fcntl_add_seals, fstatfs, memfd_create, symlinkat};

use super::confine::SHARE_NOFILE;
use super::identity::{INNER_ID, Rights};
use super::paths::{Paths, reason, refuse, resolve};
use super::{isolate, printable};

/// Where its directory is in its root.
pub const PLACE: &str = "share";
/// Where /proc is, of which it finds itself in its own place.
const PROCESSES: &str = "processes";
/// Threads that find themselves there: it has three.
const MAX_THREADS: u32 = 32;
/// What the directory is called in errors.
const ROLE: &str = "shared directory";
/// Capabilities over the files of its directory, in its own user namespace: it makes, owns and opens
/// them as the guest's users. CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP: what virtiofsd
/// asks for itself, but for MKNOD, which in a user namespace makes nothing.
pub const CAPABILITIES: [u32; 7] = [0, 1, 3, 4, 6, 7, 31];
/// Those that it is executed with: SETPCAP, too, without which libcap-ng gives up nothing. It is gone
/// when virtiofsd has given up what it does not need, before it speaks to anybody.
pub const EXEC_CAPABILITIES: [u32; 8] = [0, 1, 3, 4, 6, 7, 8, 31];

/// A directory to be served.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    /// What the launcher found there (O_PATH).
    found: File,
    readonly: bool,
    cache: &'static str,
    xattr: bool,
}

impl Share {
    /// From the options of a request:
    ///
    /// | option | means |
    /// |---|---|
    /// | `source=PATH` | the directory |
    /// | `readonly` | the guest changes nothing |
    /// | `cache=auto`, `always`, `metadata`, `never` | what the guest may keep |
    /// | `xattr` | with extended attributes |
    ///
    /// # Errors
    /// One line that names the option, or the path and the remedy.
    pub fn open(options: &[String], paths: &Paths) -> Result<Self, String> {
        let (mut source, mut readonly, mut cache, mut xattr) = (None, false, "auto", false);
        for option in options {
            let bad = || format!("{}: not an option of virtiofsd", printable(option));
            match option.split_once('=') {
                None if option == "readonly" => readonly = true,
                None if option == "xattr" => xattr = true,
                Some(("source", path)) if source.is_none() => source = Some(PathBuf::from(path)),
                Some(("cache", policy)) => {
                    let known = ["auto", "always", "metadata", "never"];
                    cache = known
                        .into_iter()
                        .find(|known| *known == policy)
                        .ok_or_else(bad)?;
                }
                _ => return Err(bad()),
            }
        }
        let path = source.ok_or("source=PATH is missing")?;
        let found = paths.directory(&path, ROLE)?;
        Ok(Self {
            path,
            found,
            readonly,
            cache,
            xattr,
        })
    }

    /// virtiofsd's command line, argv[0] included. It listens at the descriptor of that number.
    pub fn arguments(&self, listener: usize, rights: Rights) -> Vec<CString> {
        let mut argv = vec!["virtiofsd".to_owned()];
        argv.extend([format!("--fd={listener}"), format!("--shared-dir=/{PLACE}")]);
        // The launcher has made what it would: namespaces, a root, limits.
        argv.extend(
            [
                "--sandbox=none",
                "--rlimit-nofile=0",
                "--modcaps=-mknod",
                "--log-level=warn",
            ]
            .map(str::to_owned),
        );
        argv.push(format!("--cache={}", self.cache));
        if self.readonly {
            argv.push("--readonly".to_owned());
        }
        if self.xattr {
            argv.push("--xattr".to_owned());
        }
        if rights == Rights::User {
            // There is one user: root to the guest, as whom all of its users' files are made.
            let most = u32::MAX - 1;
            for kind in ["uid", "gid"] {
                argv.push(format!("--translate-{kind}=map:0:{INNER_ID}:1"));
                argv.push(format!(
                    "--translate-{kind}=squash-guest:1:{INNER_ID}:{most}"
                ));
            }
        }
        argv.into_iter()
            .filter_map(|argument| CString::new(argument).ok())
            .collect()
    }

    /// Makes what its root holds beside libraries: its directory, and of /proc what is said of its own
    /// processes, and the one number that it wants to know. It may have the ids of whoever
    /// owns what else there is. What is to be mounted comes back.
    ///
    /// # Errors
    /// One line.
    pub fn fill(&self, root: &Path) -> Result<[(OwnedFd, PathBuf); 2], String> {
        let step = |what: &str, error: io::Error| format!("its root: {what}: {error}");
        for directory in [PLACE, PROCESSES, "proc/sys/fs"] {
            fs::create_dir_all(root.join(directory)).map_err(|e| step(directory, e))?;
        }
        let most = format!("{SHARE_NOFILE}\n");
        fs::write(root.join("proc/sys/fs/nr_open"), most).map_err(|e| step("nr_open", e))?;
        let threads = (1..=MAX_THREADS).map(|thread| thread.to_string());
        for name in threads.chain(["self".to_owned()]) {
            let target = format!("/{PROCESSES}/{name}");
            let place = root.join("proc").join(&name);
            symlinkat(target, CWD, place).map_err(|e| step("/proc", e.into()))?;
        }
        let processes = isolate::new_proc_of_processes().map_err(|e| step("/proc", e))?;
        Ok([(processes, PROCESSES.into()), (self.mount()?, PLACE.into())])
    }

    /// Its directory as it is to be mounted, found once more in the caller's mount namespace.
    fn mount(&self) -> Result<OwnedFd, String> {
        let say = |error: io::Error| {
            let line: Result<(), String> = refuse(ROLE, &self.path, &reason(&error));
            line.err().unwrap_or_default()
        };
        let here = resolve(&self.path, libc::O_DIRECTORY).map_err(say)?;
        let (is, was) = (
            here.metadata().map_err(say)?,
            self.found.metadata().map_err(say)?,
        );
        if (is.dev(), is.ino()) != (was.dev(), was.ino()) {
            return refuse(
                ROLE,
                &self.path,
                "another directory was put in its place: retry",
            );
        }
        // Of these the kernel asks no capability of who is root by name.
        let kind = fstatfs(&here).map_err(|e| say(e.into()))?.f_type;
        if KERNELS_OWN
            .iter()
            .any(|own| i128::from(kind) == i128::from(*own))
        {
            return refuse(
                ROLE,
                &self.path,
                "is the kernel's own (/proc, /sys and the like): serve another directory",
            );
        }
        isolate::clone_directory(here.as_fd(), self.readonly).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EINVAL) => {
                    let why = "has other file systems mounted below it: serve a directory without, and each of them by itself";
                    let line: Result<(), String> = refuse(ROLE, &self.path, why);
                    line.err().unwrap_or_default()
                }
                _ => say(error),
            }
        })
    }
}

/// A listening socket that only who has this network namespace can reach, and a connection to it.
///
/// # Errors
/// What the system says.
pub fn channel() -> io::Result<(UnixListener, UnixStream)> {
    let address = SocketAddr::from_abstract_name(b"vhost-user")?;
    let listener = UnixListener::bind_addr(&address)?;
    let ours = UnixStream::connect_addr(&address)?;
    Ok((listener, ours))
}

/// From now on, through exec, a core of this process would hold none of its memory, nor the guest's.
///
/// # Errors
/// What the system says.
pub fn dump_no_memory() -> io::Result<()> {
    fs::write("/proc/self/coredump_filter", "0")
}

/// File systems that are the kernel's own: procfs, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs,
/// bpf, configfs, efivarfs, devpts, binfmt_misc, pstore, selinuxfs, resctrl (<linux/magic.h>).
const KERNELS_OWN: [u32; 15] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
    0x6265_6570,
    0xde5e_81e4,
    0x1cd1,
    0x4249_4e4d,
    0x6165_676c,
    0xf97c_ff8c,
    0x0765_5821,
];

/// A copy of a program that nobody can write to, in memory: whoever executes a file of the host's reaches
/// that by /proc/self/exe, and by that its owner and mode.
///
/// # Errors
/// What the system says.
pub fn sealed(program: &File) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memory = File::from(memfd_create(super::helper::VIRTIOFSD, flags)?);
    let mut from = program;
    io::copy(&mut from, &mut memory)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&memory, seals)?;
    // What somebody can write to is not executed.
    File::open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
}

/// Where virtiofsd is looked for.
pub const PATHS: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/local/libexec/virtiofsd",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn open(list: &[&str]) -> Result<Share, String> {
        let list: Vec<String> = list.iter().map(|o| (*o).to_owned()).collect();
        Share::open(&list, &Paths::new(vec!["/proc/self".into(), "/tmp".into()]))
    }

    fn words(share: &Share, rights: Rights) -> Vec<String> {
        let argv = share.arguments(3, rights);
        argv.iter()
            .map(|arg| arg.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn options_become_arguments_and_nothing_else_does() {
        let share = open(&["source=/tmp", "readonly", "cache=never", "xattr"]).unwrap();
        let argv = words(&share, Rights::RootNamespace);
        assert_eq!(argv[..3], ["virtiofsd", "--fd=3", "--shared-dir=/share"]);
        for part in ["--readonly", "--cache=never", "--xattr", "--sandbox=none"] {
            assert!(argv.iter().any(|arg| arg == part), "{argv:?}");
        }
        assert!(!argv.iter().any(|arg| arg.contains("translate")));
        let plain = words(&open(&["source=/tmp"]).unwrap(), Rights::User);
        assert!(!plain.iter().any(|arg| arg == "--readonly"), "{plain:?}");
        assert!(plain.contains(&"--translate-uid=map:0:1000:1".to_owned()));
        for bad in [
            "",
            "--xattrmap=x",
            "cache=",
            "cache=auto --readonly",
            "readonly=on",
            "tag=x",
        ] {
            let line = open(&["source=/tmp", bad]).unwrap_err();
            assert!(line.ends_with("not an option of virtiofsd"), "{line}");
        }
        assert!(open(&["source=/tmp", "source=/tmp"]).is_err());
        assert!(open(&["readonly"]).unwrap_err().contains("source="));
    }

    #[test]
    fn only_a_directory_that_is_allowed_is_served() {
        for (path, why) in [
            ("/etc", "--allow-path"),
            ("/tmp/../etc", "--allow-path"),
            ("/proc/self/root", "--allow-path"),
            ("/proc/self/maps", "not a directory"),
            ("/nonexistent", "no such"),
            ("", "empty"),
        ] {
            let line = open(&[&format!("source={path}")]).unwrap_err();
            assert!(line.starts_with("shared directory "), "{line}");
            assert!(line.contains(why), "{path}: {line}");
        }
    }
}
