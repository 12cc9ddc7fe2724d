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

    /// Begins to start passt; our end of its channel comes back at once.
    ///
    /// # Errors
    /// One line.
    fn passt(
        &self,
        id: &str,
        incarnation: u64,
        options: &[String],
    ) -> Result<(u64, UnixStream), String>;

    /// Ends a passt that is no longer listened to.
    fn end_passt(&self, id: &str, incarnation: u64);
}

impl Links for Launcher {
    fn connect(&self, path: &Path) -> Result<u64, String> {
        self.begin_connect(path, "vhost-user")
            .map_err(|e| e.to_string())
    }

    fn passt(
        &self,
        id: &str,
        incarnation: u64,
        options: &[String],
    ) -> Result<(u64, UnixStream), String> {
        self.begin_helper(id, "passt", incarnation, options.to_vec())
            .map_err(|e| e.to_string())
    }

    fn end_passt(&self, id: &str, incarnation: u64) {
        if let Err(error) = self.kill(id, incarnation) {
            log::warn!("device {id}: {error}");
        }
    }
}
