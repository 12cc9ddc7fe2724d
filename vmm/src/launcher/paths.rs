//! What the launcher opens and binds for the VMM: paths that the API named. Every refusal
//! is one line that names the role, the path and the remedy.
//!
//! A path is first resolved with O_PATH, which touches nothing (a FIFO does not hang, a
//! tape does not rewind); kind and allowed prefix are checked on what was found, and that
//! same inode is then opened through /proc/self/fd. Runs on the launcher's only thread.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::leftovers::Note;
use super::made::Made;
use super::packet::{MAX_SOCKET_PATH, bind_listen, somebody_listens};
use super::{ENTROPY_ROLE, MAX_PATH, isolate, lock, printable, sys};

/// Smallest disk: one sector.
const SECTOR: u64 = 512;
/// Most sockets bound at a time.
const MAX_SOCKETS: usize = 64;
/// Most directories that are made for sockets: one of the API's, one of who only reads it.
const MAX_MADE: usize = 2;
/// Number of /dev/random (the kernel's list of devices: memory devices, 8).
const RANDOM: u64 = libc::makedev(1, 8);

/// How to open; mirrors the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// O_RDONLY.
    Read,
    /// O_RDWR.
    ReadWrite,
    /// O_WRONLY, O_APPEND, O_CREAT.
    Append,
}

/// A path that was opened.
#[derive(Debug)]
pub struct Opened {
    /// It.
    pub file: File,
    /// O_DIRECT holds.
    pub direct: bool,
    /// In bytes.
    pub size: u64,
    /// It is a block device.
    pub block_device: bool,
    /// One that is open for writing and can erase securely.
    pub secure_erase: bool,
}

/// A socket that was bound, to be removed when the VM ends.
struct Bound {
    /// As the request named it.
    path: PathBuf,
    /// Its directory (O_PATH), whatever becomes of the names above it.
    directory: File,
    name: OsString,
    /// The socket's inode, held (O_PATH) so that its number cannot pass to another file.
    socket: File,
}

/// The launcher's view of the file system.
pub struct Paths {
    allowed: Vec<PathBuf>,
    bound: Vec<Bound>,
    made: Vec<Made>,
    /// Where sockets are noted, should this process not get to remove them.
    note: Option<Note>,
}

/// A line that says what failed, on which path, and the remedy.
pub(super) fn refuse<T>(role: &str, path: &Path, why: &str) -> Result<T, String> {
    Err(format!(
        "{role} {}: {why}",
        printable(&path.to_string_lossy())
    ))
}

/// What std prints for an error, without the "(os error N)".
pub(super) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error")
        .next()
        .unwrap_or(&text)
        .to_lowercase()
}

/// The name of a descriptor in /proc, which opens the very inode behind it.
pub(super) fn by_fd(fd: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

pub(super) fn resolve(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | flags)
        .open(path)
}

impl Paths {
    /// `allowed`: canonical prefixes; none: no restriction.
    pub fn new(allowed: Vec<PathBuf>) -> Self {
        Self {
            allowed,
            bound: Vec::new(),
            made: Vec::new(),
            note: None,
        }
    }

    /// Sockets are noted here.
    pub fn noted_in(self, note: Option<Note>) -> Self {
        Self { note, ..self }
    }

    /// There is nothing left that would have to be noted.
    pub fn end_note(&mut self) {
        if let Some(note) = self.note.take() {
            note.remove();
        }
    }

    pub(super) fn check_text(role: &str, path: &Path) -> Result<(), String> {
        let length = path.as_os_str().len();
        if length == 0 || length > MAX_PATH {
            return refuse(role, path, "empty or longer than 4095 bytes; name a file");
        }
        Ok(())
    }

    /// Whether what a descriptor stands for (plus `name` in it) lies under a prefix.
    pub(super) fn check_allowed(
        &self,
        role: &str,
        path: &Path,
        at: &File,
        name: Option<&Path>,
    ) -> Result<(), String> {
        if self.allowed.is_empty() {
            return Ok(());
        }
        match fs::read_link(by_fd(at)) {
            Ok(real) => {
                let real = name.map_or_else(|| real.clone(), |name| real.join(name));
                if self.allowed.iter().any(|prefix| real.starts_with(prefix)) {
                    return Ok(());
                }
                refuse(
                    role,
                    path,
                    "not under an allowed path; start bulkhead with --allow-path for it",
                )
            }
            Err(error) => refuse(
                role,
                path,
                &format!("where it lies: {}; mount /proc", reason(&error)),
            ),
        }
    }

    /// Opens a path for a role and, with `lock`, locks the whole file: for this opening alone
    /// if it can write, else against those that can.
    pub fn open(
        &self,
        path: &Path,
        role: &str,
        mode: Mode,
        direct: bool,
        lock: bool,
    ) -> Result<Opened, String> {
        Self::check_text(role, path)?;
        let found = match resolve(path, 0) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound && mode == Mode::Append => {
                return self.create(path, role);
            }
            Err(error) => {
                let remedy = match error.kind() {
                    io::ErrorKind::NotFound => "check the path",
                    io::ErrorKind::PermissionDenied => {
                        "every directory above it must be searchable for bulkhead's user"
                    }
                    _ => "check the path",
                };
                return refuse(role, path, &format!("{}; {remedy}", reason(&error)));
            }
        };
        let metadata = match found.metadata() {
            Ok(metadata) => metadata,
            Err(error) => return refuse(role, path, &reason(&error)),
        };
        check_kind(role, path, mode, &metadata)?;
        // It leads nowhere, and has nothing of anybody's.
        if !is_generator(role, mode, &metadata) {
            self.check_allowed(role, path, &found, None)?;
        }
        let (file, direct) = reopen(&found, mode, direct, &metadata)
            .or_else(|error| refuse(role, path, &explain_open(&found, mode, &error)))?;
        if lock {
            lock::take(&file, mode != Mode::Read).or_else(|why| refuse(role, path, &why))?;
        }
        let block_device = metadata.file_type().is_block_device();
        let size = if block_device {
            // Not in st_size; the position goes back to where a fresh descriptor has it.
            let mut file = &file;
            match file
                .seek(SeekFrom::End(0))
                .and_then(|n| file.rewind().map(|()| n))
            {
                Ok(size) => size,
                Err(error) => return refuse(role, path, &format!("its size: {}", reason(&error))),
            }
        } else {
            // As it is under the lock: who had that before may have grown it.
            match file.metadata() {
                Ok(metadata) => metadata.len(),
                Err(error) => return refuse(role, path, &reason(&error)),
            }
        };
        match (role, size) {
            ("disk", 0..SECTOR) => refuse(
                role,
                path,
                &format!(
                    "{size} bytes are less than a sector of {SECTOR}; give a disk image or a block device"
                ),
            ),
            ("kernel" | "initrd", 0) => refuse(role, path, "is empty; give another file"),
            _ => Ok(Opened {
                secure_erase: block_device
                    && mode == Mode::ReadWrite
                    && sys::can_secure_erase(file.as_fd()),
                file,
                direct,
                size,
                block_device,
            }),
        }
    }

    /// Finds a directory that is to be served as it is: O_PATH, which reads nothing.
    ///
    /// # Errors
    /// One line that names the role, the path and the remedy.
    pub fn directory(&self, path: &Path, role: &str) -> Result<File, String> {
        Self::check_text(role, path)?;
        let found = resolve(path, libc::O_DIRECTORY).or_else(|error| {
            refuse(role, path, &format!("{}; name a directory", reason(&error)))
        })?;
        self.check_allowed(role, path, &found, None)?;
        Ok(found)
    }

    /// Creates a file to append to. A dangling link is not followed.
    fn create(&self, path: &Path, role: &str) -> Result<Opened, String> {
        let (directory, name) = self.directory_of(path, role)?;
        let made = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(by_fd(&directory).join(&name));
        match made {
            Ok(file) => Ok(Opened {
                file,
                direct: false,
                size: 0,
                block_device: false,
                secure_erase: false,
            }),
            Err(error) => refuse(
                role,
                path,
                &format!("cannot be created: {}; choose another path", reason(&error)),
            ),
        }
    }

    /// The directory that a path to be made lies in, checked, and the path's last name.
    fn directory_of(&self, path: &Path, role: &str) -> Result<(File, OsString), String> {
        let Some(name) = path.file_name() else {
            return refuse(role, path, "does not end with a file name");
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let directory = resolve(parent, libc::O_DIRECTORY).or_else(|error| {
            refuse(
                role,
                path,
                &format!(
                    "its directory: {}; create the directory or choose another path",
                    reason(&error)
                ),
            )
        })?;
        self.check_allowed(role, path, &directory, Some(Path::new(name)))?;
        Ok((directory, name.to_owned()))
    }

    /// Binds a socket that nobody else may connect to.
    #[cfg(test)]
    pub fn bind(&mut self, path: &Path, role: &str) -> Result<UnixListener, String> {
        self.bind_for(path, role, false)
    }

    /// Binds a unix socket, mode 0600, and listens. A socket nobody listens on is replaced. With
    /// `anybody`, mode 0666: who listens asks the kernel who has connected.
    pub fn bind_for(
        &mut self,
        path: &Path,
        role: &str,
        anybody: bool,
    ) -> Result<UnixListener, String> {
        Self::check_text(role, path)?;
        if self.bound.len() >= MAX_SOCKETS {
            return refuse(role, path, "too many sockets");
        }
        let (directory, name) = self.directory_of(path, role)?;
        let place = by_fd(&directory).join(&name);
        // The plain path where it fits and need not be the checked one: it is what ss(8)
        // and /proc/net/unix show.
        let address = if self.allowed.is_empty() && path.as_os_str().len() <= MAX_SOCKET_PATH {
            path.to_owned()
        } else {
            place.clone()
        };
        if address.as_os_str().len() > MAX_SOCKET_PATH {
            return refuse(
                role,
                path,
                "its file name is too long for a socket; choose a shorter one",
            );
        }
        match fs::symlink_metadata(&place) {
            Ok(old) if old.file_type().is_socket() => match somebody_listens(&address) {
                Ok(true) => {
                    return refuse(
                        role,
                        path,
                        "in use: another process listens on it; stop it or choose another path",
                    );
                }
                Ok(false) => {
                    if let Err(error) = fs::remove_file(&place) {
                        return refuse(
                            role,
                            path,
                            &format!("a stale socket that cannot be removed: {}", reason(&error)),
                        );
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return refuse(
                        role,
                        path,
                        &format!("a socket is there: {}; choose another path", reason(&error)),
                    );
                }
            },
            Ok(_) => {
                return refuse(
                    role,
                    path,
                    "exists and is not a socket; remove it or choose another path",
                );
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return refuse(
                    role,
                    path,
                    &format!("{}; choose another path", reason(&error)),
                );
            }
        }
        // This process has one thread: nothing else is created under this mask.
        let mask = isolate::umask(if anybody { 0o111 } else { 0o177 });
        let listener = bind_listen(&address);
        isolate::umask(mask);
        let listener = listener.or_else(|error| {
            refuse(role, path, &format!("cannot be bound: {}; choose a path in a directory that bulkhead's user may write", reason(&error)))
        })?;
        let socket = resolve(&place, libc::O_NOFOLLOW)
            .or_else(|error| refuse(role, path, &format!("vanished: {}", reason(&error))))?;
        if let (Some(note), Ok(metadata)) = (&mut self.note, socket.metadata()) {
            note.socket(path, &metadata);
        }
        self.bound.push(Bound {
            path: path.to_owned(),
            directory,
            name,
            socket,
        });
        Ok(listener)
    }

    /// The directory of a socket was made for it: it goes when the VM ends, too.
    pub fn has_made_directory(&mut self, socket: &Path) -> Result<(), String> {
        if self.made.len() >= MAX_MADE {
            return refuse("directory of", socket, "no more are made for one VM");
        }
        let made =
            Made::of(socket).or_else(|error| refuse("directory of", socket, &reason(&error)))?;
        if let (Some(note), Ok(metadata)) = (&mut self.note, made.directory.metadata()) {
            note.directory(&made.path, &metadata);
        }
        self.made.push(made);
        Ok(())
    }

    /// Whether `bind` made a socket at this path, which is still ours.
    pub fn has_bound(&self, path: &Path) -> bool {
        self.bound.iter().any(|bound| bound.path == path)
    }

    /// Removes a socket that `bind` made.
    pub fn forget(&mut self, path: &Path) -> Result<(), String> {
        match self.bound.iter().position(|bound| bound.path == path) {
            Some(index) => {
                self.bound.swap_remove(index).remove();
                Ok(())
            }
            None => refuse("socket", path, "was not bound by this VM"),
        }
    }

    /// Removes every socket that was bound, and directories that were made for them.
    pub fn remove_all(&mut self) {
        for bound in self.bound.drain(..) {
            bound.remove();
        }
        // One may lie in another.
        for made in self.made.drain(..).rev() {
            made.remove();
        }
    }
}

impl Bound {
    /// Unlinks the path if it is still the socket that was bound.
    fn remove(&self) {
        let place = by_fd(&self.directory).join(&self.name);
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let ours = match (fs::symlink_metadata(&place), self.socket.metadata()) {
            (Ok(there), Ok(bound)) => identity(there) == identity(bound),
            _ => false,
        };
        if ours {
            // A directory that has become read-only leaves a stale socket, which the next
            // start replaces.
            let _ = fs::remove_file(&place);
        }
    }
}

/// The host's generator, for an entropy device.
fn is_generator(role: &str, mode: Mode, metadata: &Metadata) -> bool {
    role == ENTROPY_ROLE
        && mode == Mode::Read
        && metadata.file_type().is_char_device()
        && metadata.rdev() == RANDOM
}

fn check_kind(role: &str, path: &Path, mode: Mode, metadata: &Metadata) -> Result<(), String> {
    let kind = metadata.file_type();
    let why = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "is a directory; name a file"
    } else if kind.is_block_device() {
        if role == "disk" {
            return Ok(());
        }
        "is a block device; name a file"
    } else if kind.is_char_device() {
        if mode == Mode::Append || is_generator(role, mode, metadata) {
            return Ok(());
        }
        "is a character device; name a file"
    } else if kind.is_fifo() {
        "is a FIFO; name a file"
    } else if kind.is_socket() {
        "is a socket; name a file"
    } else {
        "is no file; name a file"
    };
    refuse(role, path, why)
}

/// Opens what O_PATH found. O_DIRECT is tried where it is wanted.
fn reopen(found: &File, mode: Mode, direct: bool, metadata: &Metadata) -> io::Result<(File, bool)> {
    let open = |extra: i32| {
        let mut options = OpenOptions::new();
        match mode {
            Mode::Read => options.read(true),
            Mode::ReadWrite => options.read(true).write(true),
            Mode::Append => options.append(true),
        };
        options
            .custom_flags(libc::O_NOCTTY | extra)
            .open(by_fd(found))
    };
    if metadata.file_type().is_char_device() {
        // A terminal line may wait for its carrier.
        return open(libc::O_NONBLOCK).map(|file| (file, false));
    }
    if direct {
        match open(libc::O_DIRECT) {
            Ok(file) => return Ok((file, true)),
            // The file system has no direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    open(0).map(|file| (file, false))
}

fn explain_open(found: &File, mode: Mode, error: &io::Error) -> String {
    let why = reason(error);
    let readable = || {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOCTTY)
            .open(by_fd(found))
            .is_ok()
    };
    match (error.raw_os_error(), mode) {
        (Some(libc::EACCES | libc::EPERM | libc::EROFS), Mode::ReadWrite) if readable() => {
            format!("read-only ({why}); make it writable for bulkhead's user or add readonly=on")
        }
        (Some(libc::EACCES | libc::EPERM), _) => {
            format!("{why}; give bulkhead's user access to it")
        }
        (Some(libc::ETXTBSY), _) => format!("{why}; it is a program that runs"),
        _ => format!("cannot be opened: {why}"),
    }
}

#[cfg(test)]
mod tests;
