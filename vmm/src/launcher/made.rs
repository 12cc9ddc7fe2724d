//! Directories that the VMM made for its API sockets, to be removed when the VM ends and they are
//! empty. Used on the launcher's only thread.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::cgroup_sys::remove_directory;
use super::paths::{by_fd, resolve};

/// One of them.
#[derive(Debug)]
pub(super) struct Made {
    /// What it lies in (O_PATH), whatever becomes of the names above it.
    parent: File,
    name: String,
    /// It (O_PATH), so that its number cannot pass to another.
    pub(super) directory: File,
    pub(super) path: PathBuf,
}

impl Made {
    /// That of a socket.
    ///
    /// # Errors
    /// It has no name, or cannot be found.
    pub(super) fn of(socket: &Path) -> io::Result<Self> {
        let nameless = || io::Error::from(io::ErrorKind::InvalidInput);
        let path = socket.parent().ok_or_else(nameless)?.to_owned();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(nameless)?.to_owned();
        let above = path.parent().ok_or_else(nameless)?;
        let parent = resolve(above, libc::O_DIRECTORY)?;
        let place = by_fd(&parent).join(&name);
        let directory = resolve(&place, libc::O_DIRECTORY | libc::O_NOFOLLOW)?;
        Ok(Self {
            parent,
            name,
            directory,
            path,
        })
    }

    /// Removes it if its name is still its own and nothing is in it.
    pub(super) fn remove(&self) {
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let place = by_fd(&self.parent).join(&self.name);
        let ours = match (fs::symlink_metadata(&place), self.directory.metadata()) {
            (Ok(there), Ok(made)) => identity(there) == identity(made),
            _ => false,
        };
        if ours {
            // What somebody else has put there is theirs, and keeps it.
            let _ = remove_directory(&self.parent, &self.name);
        }
    }
}
