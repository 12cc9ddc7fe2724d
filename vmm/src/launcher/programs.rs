//! Programs of a live update: what may be executed beside the binaries that were opened at the
//! start. They lie under directories that were named then (`--device-dir`), and are opened
//! beneath them, through no link (openat2(2)); whoever but root and the VM's owner could have
//! made or changed one, or any directory on the way, is not to be trusted with it.
//!
//! [`open_directory`] runs in the VMM before it confines itself, where every owner can be seen;
//! the rest on the launcher's only thread.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::identity::Rights;
use super::paths::{reason, refuse};
use super::{MAX_PATH, isolate};

/// As whom an id shows that a user namespace does not map (/proc/sys/kernel/overflowuid).
const OVERFLOW_ID: u32 = 65534;
/// Most directories on the way to a program.
const MAX_DEPTH: usize = 16;
const OPTION: &str = "--device-dir";

/// A directory of device binaries.
#[derive(Debug)]
pub struct Directory {
    /// As it was named, absolute.
    pub path: PathBuf,
    /// It (O_PATH).
    pub file: File,
    /// It is root's.
    pub roots: bool,
}

/// Opens a directory that was named on the command line.
///
/// # Errors
/// One line.
pub fn open_directory(path: &Path) -> Result<Directory, String> {
    let text = std::path::absolute(path).or_else(|e| refuse(OPTION, path, &reason(&e)))?;
    let real = text.canonicalize().or_else(|error| {
        refuse(
            OPTION,
            path,
            &format!("{}; name a directory of device binaries", reason(&error)),
        )
    })?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(&real)
        .or_else(|error| refuse(OPTION, path, &reason(&error)))?;
    let metadata = file
        .metadata()
        .or_else(|error| refuse(OPTION, path, &reason(&error)))?;
    let (own, _) = isolate::effective_ids();
    if let Some(why) = writable(&metadata) {
        return refuse(OPTION, path, why);
    }
    if metadata.uid() != 0 && metadata.uid() != own {
        return refuse(OPTION, path, FOREIGN);
    }
    Ok(Directory {
        path: text,
        file,
        roots: metadata.uid() == 0,
    })
}

const FOREIGN: &str = "belongs to another user: it must be root's or your own";

fn writable(metadata: &Metadata) -> Option<&'static str> {
    (metadata.mode() & 0o022 != 0)
        .then_some("its group or others may write it: take that away (chmod go-w)")
}

/// Who may own what is executed, as the launcher sees owners.
#[derive(Clone, Copy, Debug)]
pub struct Owners {
    own: u32,
    /// Only the VM's owner is mapped: root cannot be told from anyone else.
    blind: bool,
}

impl Owners {
    /// As a launcher with these rights sees them.
    pub fn new(rights: Rights) -> Self {
        Self {
            own: isolate::effective_ids().0,
            blind: rights == Rights::User,
        }
    }

    /// Whether this owner is root or the VM's. `vouched`: it lies in a directory into which
    /// nobody but root can have put it.
    fn accept(self, uid: u32, vouched: bool) -> bool {
        if self.blind && uid == OVERFLOW_ID {
            return vouched;
        }
        uid == self.own || (!self.blind && uid == 0)
    }
}

/// Opens a program under one of these directories: an absolute path under it, or a path
/// beneath the first that has it.
///
/// # Errors
/// One line that names the path and the remedy.
pub fn open(directories: &[Directory], program: &str, owners: Owners) -> Result<OwnedFd, String> {
    let path = Path::new(program);
    let say = |why: &str| refuse("device binary", path, why);
    if program.is_empty() || path.as_os_str().len() > MAX_PATH {
        return say("empty or longer than 4095 bytes; name a file");
    }
    let mut under = directories.iter().filter_map(|directory| {
        if path.is_absolute() {
            path.strip_prefix(&directory.path)
                .ok()
                .map(|rest| (directory, rest))
        } else {
            Some((directory, path))
        }
    });
    let mut absent = None;
    let opened = loop {
        let Some((directory, rest)) = under.next() else {
            return match absent {
                Some(why) => say(why),
                None => say(
                    "not under a directory of device binaries: start bulkhead with --device-dir DIR for it",
                ),
            };
        };
        match beneath(directory, rest, owners) {
            Err(Refusal::Absent) => absent = Some("not found; check the path"),
            other => break other,
        }
    };
    match opened {
        Ok(file) => Ok(file.into()),
        Err(Refusal::Because(why)) => say(&why),
        Err(Refusal::Absent) => say("not found; check the path"),
    }
}

enum Refusal {
    Absent,
    Because(String),
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Self {
        Self::Because(why.to_owned())
    }
}

fn beneath(directory: &Directory, rest: &Path, owners: Owners) -> Result<File, Refusal> {
    let names: Vec<_> = rest.components().collect();
    let depth = names.len();
    if depth == 0 {
        return Err("is a directory; name a file".into());
    }
    if depth > MAX_DEPTH || names.iter().any(|n| !matches!(n, Component::Normal(_))) {
        return Err("leads out of its directory, or too far down; name it plainly".into());
    }
    let facts = directory.file.metadata().map_err(|e| explain(&e))?;
    if let Some(why) = writable(&facts) {
        return Err(Refusal::Because(format!("its directory: {why}")));
    }
    let mut at: Option<File> = None;
    for (index, name) in names.iter().enumerate() {
        let last = index.saturating_add(1) == depth;
        let name = name.as_os_str().as_bytes();
        let kind = if last {
            // Not a FIFO's or a terminal's to hold up.
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY
        } else {
            OFlags::PATH | OFlags::DIRECTORY
        };
        let opened = openat2(
            at.as_ref().unwrap_or(&directory.file),
            name,
            kind | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        );
        let file = File::from(opened.map_err(|errno| explain(&errno.into()))?);
        let facts = file.metadata().map_err(|e| explain(&e))?;
        let what = if last { "" } else { "its directory: " };
        if last && !facts.is_file() {
            return Err("is no regular file; name a program".into());
        }
        let vouched = directory.roots && depth == 1;
        if !owners.accept(facts.uid(), vouched) {
            return Err(Refusal::Because(format!("{what}{FOREIGN}")));
        }
        if let Some(why) = writable(&facts) {
            return Err(Refusal::Because(format!("{what}{why}")));
        }
        if last && facts.mode() & 0o111 == 0 {
            return Err("is not executable: make it so (chmod +x)".into());
        }
        at = Some(file);
    }
    at.ok_or_else(|| "is a directory; name a file".into())
}

fn explain(error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOENT) => Refusal::Absent,
        Some(libc::ELOOP) => "is a symbolic link, or lies behind one: name the file itself".into(),
        Some(libc::EXDEV) => "leads out of its directory".into(),
        Some(libc::ENOTDIR) => "what it lies in is no directory; check the path".into(),
        Some(libc::EACCES) => "permission denied; give bulkhead's user access to it".into(),
        Some(libc::ENOSYS) => {
            "this kernel cannot open files beneath a directory: Linux 5.6 can".into()
        }
        _ => Refusal::Because(reason(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    struct Bed {
        base: PathBuf,
        directories: Vec<Directory>,
    }

    impl Bed {
        fn new(name: &str) -> Self {
            let base =
                std::env::temp_dir().join(format!("bh-programs-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&base);
            for directory in ["one/sub", "two"] {
                fs::create_dir_all(base.join(directory)).unwrap();
            }
            for directory in ["one", "one/sub", "two"] {
                mode(&base.join(directory), 0o755);
            }
            let directories = ["one", "two"].map(|d| open_directory(&base.join(d)).unwrap());
            Self {
                base,
                directories: directories.into(),
            }
        }

        fn program(&self, name: &str) -> String {
            let path = self.base.join(name);
            fs::write(&path, name).unwrap();
            mode(&path, 0o755);
            path.to_str().unwrap().to_owned()
        }

        fn open(&self, program: &str) -> Result<String, String> {
            let fd = open(&self.directories, program, Owners::new(Rights::Root))?;
            let mut text = String::new();
            io::Read::read_to_string(&mut File::from(fd), &mut text).unwrap();
            Ok(text)
        }

        fn refused(&self, program: &str, why: &str) {
            let line = self.open(program).unwrap_err();
            assert!(line.starts_with("device binary "), "{line}");
            assert!(
                line.contains(why) && !line.contains('\n'),
                "{program}: {line}"
            );
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.base);
        }
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_under_a_named_directory_is_opened() {
        let bed = Bed::new("good");
        let program = bed.program("one/blk");
        assert_eq!(bed.open(&program).unwrap(), "one/blk");
        assert_eq!(bed.open("blk").unwrap(), "one/blk");
        bed.program("two/blk");
        assert_eq!(bed.open("blk").unwrap(), "one/blk", "the first has it");
        bed.program("two/net");
        assert_eq!(bed.open("net").unwrap(), "two/net");
        bed.program("one/sub/blk");
        assert_eq!(bed.open("sub/blk").unwrap(), "one/sub/blk");
    }

    #[test]
    fn nothing_else_is() {
        let bed = Bed::new("bad");
        let program = bed.program("outside");
        bed.refused(&program, "--device-dir");
        bed.refused("/bin/sh", "--device-dir");
        bed.refused("", "empty");
        bed.refused(&"x/".repeat(3000), "longer");
        bed.refused("none", "not found");
        bed.refused("sub", "regular file");
        bed.refused("../outside", "leads out");
        bed.refused("sub/../../outside", "leads out");
        let one = bed.base.join("one");
        bed.refused(one.to_str().unwrap(), "is a directory");
        symlink(&program, one.join("link")).unwrap();
        bed.refused("link", "symbolic link");
        symlink(&bed.base, one.join("up")).unwrap();
        let line = bed.open("up/outside").unwrap_err();
        assert!(
            line.contains("symbolic link") || line.contains("no directory"),
            "{line}"
        );
        let fifo = one.join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o755),
            0,
        )
        .unwrap();
        bed.refused("fifo", "regular file");
    }

    #[test]
    fn what_others_could_have_changed_is_refused() {
        let bed = Bed::new("modes");
        let program = PathBuf::from(bed.program("one/blk"));
        for (bits, why) in [
            (0o775, "group or others"),
            (0o757, "group or others"),
            (0o644, "not executable"),
        ] {
            mode(&program, bits);
            bed.refused("blk", why);
        }
        mode(&program, 0o755);
        assert!(bed.open("blk").is_ok());
        bed.program("one/sub/blk");
        mode(&bed.base.join("one/sub"), 0o777);
        bed.refused("sub/blk", "its directory: its group or others");
        mode(&bed.base.join("one"), 0o777);
        bed.refused("blk", "its directory: its group or others");
        let line = open_directory(&bed.base.join("one")).unwrap_err();
        assert!(
            line.starts_with("--device-dir ") && line.contains("go-w"),
            "{line}"
        );
        assert!(open_directory(&bed.base.join("none")).is_err());
        assert!(open_directory(&program).is_err());
    }

    #[test]
    fn only_root_and_the_owner_are_trusted() {
        let seeing = Owners {
            own: 7,
            blind: false,
        };
        assert!(seeing.accept(0, false) && seeing.accept(7, false));
        assert!(!seeing.accept(8, false) && !seeing.accept(OVERFLOW_ID, true));
        // Who is not mapped could be anyone, but for what root alone can have put there.
        let blind = Owners {
            own: 7,
            blind: true,
        };
        assert!(blind.accept(7, false) && !blind.accept(OVERFLOW_ID, false));
        assert!(blind.accept(OVERFLOW_ID, true) && !blind.accept(8, true));
        let nobody = Owners {
            own: OVERFLOW_ID,
            blind: true,
        };
        assert!(!nobody.accept(OVERFLOW_ID, false));
        assert!(nobody.accept(OVERFLOW_ID, true));
    }
}
