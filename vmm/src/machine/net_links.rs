//! What ties to back-ends of somebody else's ask of the launcher. Called on the manager thread.

use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::launcher::Launcher;

/// What is asked of the launcher; nothing waits for its answer.
pub trait Links {
    /// Begins to connect to a socket; the answer comes with the ticket.
    ///
    /// # Errors
    /// One line.
    fn connect(&self, path: &Path) -> Result<u64, String>;

    /// Begins to start a helper; our end of its channel comes back at once, or with the answer.
    ///
    /// # Errors
    /// One line.
    fn helper(
        &self,
        kind: &str,
        id: &str,
        incarnation: u64,
        options: &[String],
    ) -> Result<(u64, Option<UnixStream>), String>;

    /// Ends a helper that is no longer listened to.
    fn end_helper(&self, id: &str, incarnation: u64);
}

impl Links for Launcher {
    fn connect(&self, path: &Path) -> Result<u64, String> {
        self.begin_connect(path, "vhost-user")
            .map_err(|e| e.to_string())
    }

    fn helper(
        &self,
        kind: &str,
        id: &str,
        incarnation: u64,
        options: &[String],
    ) -> Result<(u64, Option<UnixStream>), String> {
        self.begin_helper(id, kind, incarnation, options.to_vec())
            .map_err(|e| e.to_string())
    }

    fn end_helper(&self, id: &str, incarnation: u64) {
        if let Err(error) = self.kill(id, incarnation) {
            log::warn!("device {id}: {error}");
        }
    }
}
