//! The sockets that the API is served on, made before the process confines itself: each in a directory
//! that nobody else may write to, which is made where it is missing, and open to others only where
//! others are to be heard.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bulkhead_proto::sys;

use crate::api::{Callers, Door, Role};
use crate::launcher::{Launcher, printable};

/// Others may write to it.
const WRITABLE: u32 = 0o022;
/// In it, each may remove only what is theirs, as in /tmp.
const STICKY: u32 = 0o1000;

/// Where to serve the API, and to whom.
#[derive(Clone, Debug, Default)]
pub struct ApiOptions {
    /// Where all of it is served.
    pub socket: Option<PathBuf>,
    /// Where it only tells.
    pub read_only: Option<PathBuf>,
    /// Who is heard, at both.
    pub callers: Callers,
    /// Who is heard at the latter, too.
    pub readers: Callers,
}

/// A directory that was made and nothing is in yet: removed with the value.
#[derive(Debug)]
struct Fresh(PathBuf);

impl Drop for Fresh {
    fn drop(&mut self) {
        // Somebody else's file in it keeps it.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Sockets whose directories are there.
#[derive(Debug)]
pub(super) struct Places {
    own: u32,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    role: Role,
    callers: Callers,
    fresh: Option<Fresh>,
}

impl Drop for Places {
    /// One directory may lie in another.
    fn drop(&mut self) {
        while self.places.pop().is_some() {}
    }
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Operator => "API socket",
            Self::Reader => "reading API socket",
        }
    }
}

impl ApiOptions {
    /// Checks the sockets' directories, and makes those that are missing.
    ///
    /// # Errors
    /// One line that names the socket and the remedy.
    pub(super) fn prepare(&self) -> Result<Places, String> {
        let own = sys::effective_uid();
        let mut readers = self.callers.clone();
        readers.uids.extend(&self.readers.uids);
        readers.gids.extend(&self.readers.gids);
        let sockets = [
            (&self.socket, Role::Operator, self.callers.clone()),
            (&self.read_only, Role::Reader, readers.clone()),
        ];
        let mut made = Places {
            own,
            places: Vec::new(),
        };
        let places = &mut made.places;
        for (path, role, callers) in sockets {
            let Some(path) = path else {
                continue;
            };
            let name = role.name();
            let path = std::path::absolute(path).map_err(|e| format!("{name}: {e}"))?;
            if places.iter().any(|place| place.path == path) {
                return Err(format!(
                    "{name} {}: is the API socket: give it a path of its own",
                    shown(&path)
                ));
            }
            // Both sockets may be in it.
            let others = !readers.is_empty();
            let fresh = directory(&path, own, others)
                .map_err(|why| format!("{name} {}: {why}", shown(&path)))?;
            places.push(Place {
                path,
                role,
                callers,
                fresh,
            });
        }
        Ok(made)
    }
}

impl Places {
    /// Has the launcher bind the sockets, and remove them and what was made for them at the end.
    ///
    /// # Errors
    /// One line that names the socket and the remedy.
    pub(super) fn bind(mut self, launcher: &Launcher) -> Result<Vec<Door>, String> {
        let own = self.own;
        let bind = |place: Place| {
            let anybody = !place.callers.is_empty();
            let (role, made) = (place.role, place.fresh.is_some());
            let listener = launcher
                .bind_for(&place.path, role.name(), anybody, made)
                .map_err(|e| e.to_string())?;
            // The launcher's from now on.
            if let Some(fresh) = place.fresh {
                std::mem::forget(fresh);
            }
            Ok(Door::new(listener, role, place.callers, own))
        };
        let places = std::mem::take(&mut self.places);
        places.into_iter().map(bind).collect()
    }
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Makes a socket's directory, or sees that nobody else can put another socket in the place of
/// one that is in it.
fn directory(socket: &Path, own: u32, others: bool) -> Result<Option<Fresh>, String> {
    let Some(path) = socket.parent() else {
        return Err("is no file's path: name a file".to_owned());
    };
    let mode = if others { 0o711 } else { 0o700 };
    match fs::metadata(path) {
        Ok(there) if !there.is_dir() => {
            Err("its directory is no directory: choose another path".to_owned())
        }
        Ok(there) if there.uid() != own && there.uid() != 0 => Err(format!(
            "its directory is of uid {}, who could put another socket there: name one of your own, or one that is not there yet",
            there.uid()
        )),
        Ok(there) if there.mode() & WRITABLE != 0 && there.mode() & STICKY == 0 => Err(format!(
            "others may write to its directory (mode {:04o}) and put another socket there: chmod go-w {}, or name one that is not there yet",
            there.mode() & 0o7777,
            shown(path)
        )),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new()
                .mode(mode)
                .create(path)
                .map_err(|error| {
                    format!(
                        "its directory cannot be made: {error}: make it, or choose another path"
                    )
                })?;
            let fresh = Fresh(path.to_owned());
            // The umask took what it takes.
            fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
                .open(path)
                .and_then(|made| made.set_permissions(fs::Permissions::from_mode(mode)))
                .map_err(|error| format!("its directory, just made: {error}"))?;
            Ok(Some(fresh))
        }
        Err(error) => Err(format!("its directory: {error}: choose another path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_directory_is_made_for_one_user_and_one_that_others_write_is_refused() {
        let bed = std::env::temp_dir().join(format!("bh-doors-{}", std::process::id()));
        let _ = fs::remove_dir_all(&bed);
        fs::create_dir(&bed).unwrap();
        let own = sys::effective_uid();
        let at = |name: &str| bed.join(name);
        let made = directory(&at("new/api"), own, false).unwrap().unwrap();
        assert_eq!(mode(&at("new")), 0o700);
        // The second socket's.
        assert!(directory(&at("new/read"), own, false).unwrap().is_none());
        drop(made);
        assert!(!at("new").exists());
        let made = directory(&at("new/api"), own, true).unwrap().unwrap();
        assert_eq!(mode(&at("new")), 0o711);
        fs::write(at("new/file"), "x").unwrap();
        drop(made);
        assert!(at("new/file").exists());
        for (bits, safe) in [
            (0o755, true),
            (0o700, true),
            (0o1777, true),
            (0o775, false),
            (0o757, false),
            (0o777, false),
        ] {
            fs::set_permissions(at("new"), fs::Permissions::from_mode(bits)).unwrap();
            let found = directory(&at("new/api"), own, false);
            assert_eq!(found.is_ok(), safe, "{bits:o}");
            if let Err(line) = found {
                assert!(line.contains("chmod go-w"), "{line}");
            }
        }
        fs::set_permissions(at("new"), fs::Permissions::from_mode(0o755)).unwrap();
        if own != 0 {
            fs::remove_dir_all(&bed).unwrap();
            return;
        }
        // Root's tests can give it to somebody else.
        std::os::unix::fs::chown(at("new"), Some(1234), None).unwrap();
        let line = directory(&at("new/api"), own, false).unwrap_err();
        assert!(line.contains("uid 1234"), "{line}");
        assert!(directory(&at("new/api"), 1234, false).unwrap().is_none());
        let line = directory(&at("no/such/api"), own, false).unwrap_err();
        assert!(line.contains("cannot be made"), "{line}");
        let line = directory(&at("new/file/api"), own, false).unwrap_err();
        assert!(line.contains("is no directory"), "{line}");
        fs::remove_dir_all(&bed).unwrap();
    }

    #[test]
    fn two_sockets_have_two_paths_and_what_was_made_for_none_goes() {
        let bed = std::env::temp_dir().join(format!("bh-places-{}", std::process::id()));
        let options = |read: &str| ApiOptions {
            socket: Some(bed.join("api")),
            read_only: Some(bed.join(read)),
            ..ApiOptions::default()
        };
        let line = options("api").prepare().unwrap_err();
        assert!(line.contains("a path of its own"), "{line}");
        assert!(!bed.exists());
        let places = options("read").prepare().unwrap();
        let fresh: Vec<bool> = places.places.iter().map(|p| p.fresh.is_some()).collect();
        assert_eq!(fresh, [true, false]);
        assert!(bed.exists());
        drop(places);
        assert!(!bed.exists());
    }
}
