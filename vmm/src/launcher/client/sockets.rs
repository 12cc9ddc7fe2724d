//! The launcher's client for sockets that the VMM listens on.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use bulkhead_proto::launcher as wire;

use super::{Launcher, LauncherError, PATH_DEADLINE, path_text};
use crate::launcher::packet;

impl Launcher {
    /// Binds a unix socket, mode 0600, and listens; it does not block. The path is removed
    /// when the VM ends.
    pub fn bind_unix(&self, path: &Path, role: &str) -> Result<UnixListener, LauncherError> {
        self.bind_for(path, role, false, false)
    }

    /// The same; with `anybody`, mode 0666; with `made_directory`, its directory goes with it.
    pub fn bind_for(
        &self,
        path: &Path,
        role: &str,
        anybody: bool,
        made_directory: bool,
    ) -> Result<UnixListener, LauncherError> {
        let op = wire::BindUnix {
            path: path_text(path, role)?,
            role: role.to_owned(),
            anybody,
            made_directory,
            ..Default::default()
        };
        let (reply, mut fds, _) =
            self.call(wire::request::Op::BindUnix(op), &[], PATH_DEADLINE, "bind")?;
        match (reply.result, fds.pop(), fds.pop()) {
            (Some(wire::reply::Result::Bound(_)), Some(fd), None) => {
                // So that SO_PEERCRED names this process and not the launcher to clients.
                packet::listen(fd.as_fd()).map_err(|e| LauncherError::Io("listen", e))?;
                Ok(fd.into())
            }
            _ => Err(LauncherError::Protocol(
                "a bind was answered with something else",
            )),
        }
    }

    /// Removes a path that `bind_unix` made.
    pub fn forget(&self, path: &Path) -> Result<(), LauncherError> {
        let op = wire::Forget {
            path: path_text(path, "socket")?,
            ..Default::default()
        };
        self.call(wire::request::Op::Forget(op), &[], PATH_DEADLINE, "removal")
            .map(|_| ())
    }
}
