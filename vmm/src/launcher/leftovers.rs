//! The note of what a VM has made on the host, for `bulkhead reap`, should a power cut or a
//! killed launcher leave it behind: a file of lines in the run directory, locked (flock) as long
//! as the VMM or its launcher lives.
//!
//! ```text
//!   /run/bulkhead/vm-PID-START.run         of root; else $XDG_RUNTIME_DIR/bulkhead/…, or
//!                                            /run/user/UID/bulkhead/… where that is not set
//!     socket DEV INO PATH                  bound by the launcher; PATH with \n and \\ escaped
//!     directory DEV INO PATH               made for an API socket
//! ```
//!
//! The VMM makes it on its main thread before it confines itself; the launcher adds to it and
//! removes it at its end. A host without a run directory does without.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{cgroup_parent, cgroup_sys, isolate};

/// What the note of a VM is called, before and after its name.
pub const PREFIX: &str = "vm-";
/// See [`PREFIX`].
pub const SUFFIX: &str = ".run";
/// Attempts to make it, should `bulkhead reap` take it for left behind before it is locked.
const ATTEMPTS: usize = 3;
/// Longest note, bytes: some thousand sockets.
pub const MAX_NOTE: u64 = 1024 * 1024;

/// A VM's note.
#[derive(Debug)]
pub struct Note {
    /// Its file, open for appending.
    pub file: File,
    /// Where it is.
    pub path: PathBuf,
}

/// A socket or a directory that is noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noted {
    /// Device number and inode of it itself.
    pub identity: (u64, u64),
    /// Where it was made.
    pub path: PathBuf,
}

/// The run directory of this user, whether or not it exists.
pub fn directory() -> Option<PathBuf> {
    let (uid, _) = isolate::effective_ids();
    if uid == 0 {
        return Some("/run/bulkhead".into());
    }
    // Where a session of the user's has its own, whoever starts this (cron, su) may not say so.
    let usual = || Some(format!("/run/user/{uid}").into()).filter(|own: &PathBuf| own.is_dir());
    let said = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let own = said.or_else(usual)?;
    own.is_absolute().then(|| own.join("bulkhead"))
}

impl Note {
    /// Begins this process's note. `None`: this host has no place for it.
    pub fn begin() -> Option<Self> {
        Self::begin_in(&directory()?)
    }

    fn begin_in(directory: &Path) -> Option<Self> {
        let made = fs::DirBuilder::new().mode(0o700).create(directory);
        let silent = |error: &io::Error| {
            log::warn!(
                "{}: {error}: nothing is noted for `bulkhead reap`",
                directory.display()
            );
        };
        if let Err(error) = made
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            silent(&error);
            return None;
        }
        let (uid, _) = isolate::effective_ids();
        let there = fs::symlink_metadata(directory).ok()?;
        if !there.is_dir() || there.uid() != uid || there.mode() & 0o022 != 0 {
            log::warn!(
                "{}: is not a directory of bulkhead's user alone: nothing is noted for `bulkhead reap`",
                directory.display()
            );
            return None;
        }
        let path = directory.join(format!("{PREFIX}{}{SUFFIX}", cgroup_parent::own_name()));
        for _ in 0..ATTEMPTS {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .inspect_err(silent)
                .ok()?;
            if cgroup_sys::try_lock(&file).ok()? && is_at(&file, &path) {
                return Some(Self { file, path });
            }
        }
        None
    }

    /// Adds a socket that has been bound.
    pub fn socket(&mut self, path: &Path, metadata: &fs::Metadata) {
        self.add("socket", path, metadata);
    }

    /// Adds a directory that has been made for one.
    pub fn directory(&mut self, path: &Path, metadata: &fs::Metadata) {
        self.add("directory", path, metadata);
    }

    fn add(&mut self, what: &str, path: &Path, metadata: &fs::Metadata) {
        let escaped = escape(&path.to_string_lossy());
        let line = format!("{what} {} {} {escaped}\n", metadata.dev(), metadata.ino());
        // Without it, a socket that is left behind is replaced by the next that binds it.
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            log::warn!(
                "{}: {error}: should the launcher be killed, `bulkhead reap` will not know of {escaped}",
                self.path.display()
            );
        }
    }

    /// There is nothing left to be noted.
    pub fn remove(&self) {
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a path still leads to an open file.
pub fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => identity(open) == identity(there),
        _ => false,
    }
}

/// The sockets of a note; what is no line of ours is skipped.
pub fn sockets(text: &str) -> Vec<Noted> {
    noted(text, "socket ")
}

/// Its directories.
pub fn directories(text: &str) -> Vec<Noted> {
    noted(text, "directory ")
}

fn noted(text: &str, what: &str) -> Vec<Noted> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.strip_prefix(what)?.splitn(3, ' ');
            let identity = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let path = PathBuf::from(unescape(fields.next()?));
            path.is_absolute().then_some(Noted { identity, path })
        })
        .collect()
}

fn escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace('\n', "\\n")
}

fn unescape(text: &str) -> String {
    let mut path = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => path.push('\n'),
                Some(other) => path.push(other),
                None => {}
            },
            c => path.push(c),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_note_is_locked_while_it_is_open_and_read_as_it_was_written() {
        let directory = std::env::temp_dir().join(format!("bh-note-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let mut mode = fs::metadata(&directory).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o700);
        fs::set_permissions(&directory, mode).unwrap();
        let mut note = Note::begin_in(&directory).unwrap();
        let other = File::open(&note.path).unwrap();
        assert!(!cgroup_sys::try_lock(&other).unwrap());
        let metadata = fs::metadata(&directory).unwrap();
        note.socket(Path::new("/a\nb \\n"), &metadata);
        note.directory(Path::new("/d"), &metadata);
        let text = fs::read_to_string(&note.path).unwrap();
        let read = sockets(&text);
        assert_eq!(read.len(), 1);
        assert_eq!(directories(&text)[0].path, Path::new("/d"));
        assert_eq!(directories(&text)[0].identity, read[0].identity);
        assert_eq!(read[0].path, Path::new("/a\nb \\n"));
        assert_eq!(read[0].identity, (metadata.dev(), metadata.ino()));
        note.remove();
        assert!(!note.path.exists());
        drop(note);
        assert!(cgroup_sys::try_lock(&other).unwrap());
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_is_not_used() {
        let directory = std::env::temp_dir().join(format!("bh-open-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let mut mode = fs::metadata(&directory).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o777);
        fs::set_permissions(&directory, mode).unwrap();
        assert!(Note::begin_in(&directory).is_none());
        fs::remove_dir(&directory).unwrap();
    }

    proptest! {
        #[test]
        fn any_path_survives_and_no_text_panics(path in "/[^\0]{0,40}", text in "\\PC{0,200}") {
            prop_assert_eq!(unescape(&escape(&path)), path);
            let _ = sockets(&text);
            let _ = sockets(&format!("socket {text}"));
        }
    }
}
