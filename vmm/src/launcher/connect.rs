//! Connecting to unix sockets that the API named: switches and other people's vhost-user
//! back-ends. As in `paths`, the path is resolved without touching it, its kind and prefix are
//! checked on what was found, and that same socket is connected to. Never blocks: a back-end
//! that does not accept leaves the connection in its backlog, and one whose backlog is full is
//! an error. Runs on the launcher's only thread.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::packet;
use super::paths::{Paths, by_fd, reason, refuse, resolve};

impl Paths {
    /// Connects to the socket at `path`; the connection does not block.
    ///
    /// # Errors
    /// One line that names the role, the path and the remedy.
    pub fn connect(&self, path: &Path, role: &str) -> Result<UnixStream, String> {
        Self::check_text(role, path)?;
        let found = resolve(path, 0).or_else(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => "start what serves it first, or check the path",
                io::ErrorKind::PermissionDenied => {
                    "every directory above it must be searchable for bulkhead's user"
                }
                _ => "check the path",
            };
            refuse(role, path, &format!("{}; {remedy}", reason(&error)))
        })?;
        match found.metadata() {
            Ok(metadata) if metadata.file_type().is_socket() => {}
            Ok(_) => return refuse(role, path, "is no socket; name the socket of a back-end"),
            Err(error) => return refuse(role, path, &reason(&error)),
        }
        self.check_allowed(role, path, &found, None)?;
        packet::connect(&by_fd(&found)).or_else(|error| {
            let why = match error.raw_os_error() {
                Some(libc::ECONNREFUSED) => {
                    "nobody listens on it; start what serves it first".to_owned()
                }
                Some(libc::EAGAIN) => {
                    "its owner accepts no connections: too many wait; restart it".to_owned()
                }
                Some(libc::EPROTOTYPE) => "is a socket, but no stream; name another".to_owned(),
                Some(libc::EACCES | libc::EPERM) => {
                    format!(
                        "{}; give bulkhead's user write access to it",
                        reason(&error)
                    )
                }
                _ => reason(&error),
            };
            refuse(role, path, &why)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("bh-connect-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_listener_is_reached_and_everything_else_is_refused_by_name() {
        let scratch = Scratch::new();
        let place = |name: &str| scratch.0.join(name);
        let paths = Paths::new(Vec::new());
        let listener = UnixListener::bind(place("live")).unwrap();
        let mut ours = paths.connect(&place("live"), "switch").unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"x").unwrap();
        let mut byte = [0];
        theirs.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");

        drop(UnixListener::bind(place("dead")).unwrap());
        let _datagram = UnixDatagram::bind(place("datagram")).unwrap();
        std::fs::write(place("file"), "").unwrap();
        for (name, why) in [
            ("absent", "start what serves it"),
            ("dead", "nobody listens"),
            ("datagram", "no stream"),
            ("file", "is no socket"),
        ] {
            let line = paths.connect(&place(name), "switch").unwrap_err();
            assert!(line.starts_with("switch /") && line.contains(why), "{line}");
        }
        let fenced = Paths::new(vec!["/nonexistent".into()]);
        let line = fenced.connect(&place("live"), "switch").unwrap_err();
        assert!(line.contains("--allow-path"), "{line}");
    }
}
