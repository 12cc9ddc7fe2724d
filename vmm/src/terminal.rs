//! The operator's terminal: raw mode while a guest's serial port is on it, and back to
//! what it was before, however the VMM ends. Called by the manager thread alone.

#![allow(unsafe_code)] // tcgetattr and tcsetattr have no safe wrapper among our crates.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};

/// Standard input as a terminal, before anything changed it. Looked at before the VMM
/// confines itself: the steady filter admits setting a terminal's mode, not asking for it.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    fd: RawFd,
    before: libc::termios,
}

impl Terminal {
    /// Looks at standard input; `None` when it is no terminal or this process is not in the
    /// terminal's foreground (setting its mode would stop the process).
    ///
    /// # Errors
    /// What tcgetattr says.
    pub fn on_stdin() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let fd = stdin.as_raw_fd();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        // SAFETY: both calls only take an integer and return one.
        let foreground = unsafe { libc::tcgetpgrp(fd) == libc::getpgrp() };
        if !foreground {
            return Ok(None);
        }
        let mut termios = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: the pointer is to a live, writable termios for the length of the call.
        if unsafe { libc::tcgetattr(fd, termios.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded and filled it; all-zero bytes were valid anyway.
        let before = unsafe { termios.assume_init() };
        Ok(Some(Self { fd, before }))
    }

    /// Puts it back to what it was.
    ///
    /// # Errors
    /// What tcsetattr says.
    pub fn restore(self) -> io::Result<()> {
        set(self.fd, &self.before)
    }

    /// Puts it into raw mode until the result is dropped.
    ///
    /// # Errors
    /// What tcsetattr says.
    pub fn raw(self) -> io::Result<RawTerminal> {
        let mut raw = self.before;
        // SAFETY: `raw` is a live termios that cfmakeraw changes in place.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // What the VMM itself prints should still look like lines.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        set(self.fd, &raw)?;
        Ok(RawTerminal(self))
    }
}

/// Raw mode on standard input, undone on drop.
#[derive(Debug)]
pub struct RawTerminal(Terminal);

fn set(fd: RawFd, termios: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is to a live termios that the call only reads.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, termios) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(e) = self.0.restore() {
            log::warn!("the terminal could not be put back: {e}: run `reset`");
        }
    }
}
