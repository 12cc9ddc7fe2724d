//! Bytes on their way out of a non-blocking socket. Used by the frame loops, on their
//! thread; how much may be waiting is their decision.

use std::io;
use std::os::fd::BorrowedFd;

use crate::sys;

/// Keep an empty buffer's memory only up to here.
const KEEP: usize = 64 * 1024;

/// A queue of bytes that are written as the socket takes them.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    /// Bytes not yet written.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.sent)
    }

    /// Everything is written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where to append frames.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        &mut self.bytes
    }

    /// Writes what the socket takes now; true if it took anything.
    ///
    /// # Errors
    ///
    /// The socket's.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let mut progress = false;
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match sys::send(socket, rest)? {
                Some(count) => {
                    self.sent = self.sent.saturating_add(count);
                    progress = true;
                }
                None => return Ok(progress),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        if self.bytes.capacity() > KEEP {
            self.bytes = Vec::new();
        }
        Ok(progress)
    }
}
