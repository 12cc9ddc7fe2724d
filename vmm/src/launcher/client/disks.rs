//! The launcher's client for what is a disk's: opening it under a lock, growing its file
//! without waiting for it, and letting go of it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;

use super::{
    Access, DEADLINE, Inner, Launcher, LauncherError, LauncherEvent, OpenedInfo, path_text, take,
};
use crate::launcher::sys::{self, ExitOutcome};

/// Growths that may be under way.
const MAX_BEGUN: usize = 64;

impl Launcher {
    /// Opens a disk; with `lock`, no other process may open it in a way that conflicts as
    /// long as any descriptor of this opening lives: writable excludes everybody.
    pub fn open_disk(
        &self,
        path: &Path,
        access: Access,
        direct: bool,
        lock: bool,
    ) -> Result<(File, OpenedInfo), LauncherError> {
        self.open(path, "disk", access, direct, lock)
    }

    /// Kills a device process and closes what the launcher keeps of the device: its
    /// descriptors, and with them locks.
    pub fn kill_and_forget(&self, device_id: &str, incarnation: u64) -> Result<(), LauncherError> {
        let op = wire::Kill {
            device_id: device_id.to_owned(),
            incarnation,
            forget: true,
            ..Default::default()
        };
        self.call(wire::request::Op::Kill(op), &[], DEADLINE, "kill")
            .map(|_| ())
    }

    /// Begins to start a process in the place of a device's last one, which has ended. Does
    /// not wait: the answer is a [`Linked`](super::LauncherEvent::Linked) with the ticket that
    /// this returns; our ends of its control and vhost-user channels come back at once.
    pub fn begin_respawn(
        &self,
        device_id: &str,
        incarnation: u64,
    ) -> Result<(u64, UnixStream, UnixStream), LauncherError> {
        self.begin_successor(wire::Respawn {
            device_id: device_id.to_owned(),
            incarnation,
            ..Default::default()
        })
    }

    /// Begins to start a process of another program on trial, beside the device's own, as
    /// [`begin_respawn`](Self::begin_respawn) does.
    pub fn begin_update(
        &self,
        device_id: &str,
        incarnation: u64,
        program: &str,
    ) -> Result<(u64, UnixStream, UnixStream), LauncherError> {
        self.begin_successor(wire::Respawn {
            device_id: device_id.to_owned(),
            incarnation,
            program: program.to_owned(),
            ..Default::default()
        })
    }

    fn begin_successor(
        &self,
        op: wire::Respawn,
    ) -> Result<(u64, UnixStream, UnixStream), LauncherError> {
        let pair = || UnixStream::pair().map_err(|e| LauncherError::Io("socketpair", e));
        let (control, control_end) = pair()?;
        let (vhost, vhost_end) = pair()?;
        let op = wire::request::Op::Respawn(op);
        let ticket = self.begin_link(op, &[control_end.as_fd(), vhost_end.as_fd()])?;
        Ok((ticket, control, vhost))
    }

    /// A process that was on trial has the device: those before it are killed, and later ones
    /// are of its program. Does not wait for the launcher to say that it was done.
    pub fn begin_settle(&self, device_id: &str, incarnation: u64) -> Result<(), LauncherError> {
        let op = wire::request::Op::Settle(wire::Settle {
            device_id: device_id.to_owned(),
            incarnation,
            ..Default::default()
        });
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        send(&inner, id, op)?;
        inner.last_id = id;
        Ok(())
    }

    /// Kills a device process as [`kill`](Self::kill) does, and does not wait for the launcher
    /// to say that it was done.
    pub fn begin_kill(&self, device_id: &str, incarnation: u64) -> Result<(), LauncherError> {
        self.begin_end(device_id, incarnation, false)
    }

    /// Removes a path that `bind_unix` made, without waiting for the launcher's answer.
    pub fn begin_forget_path(&self, path: &Path) -> Result<(), LauncherError> {
        let op = wire::request::Op::Forget(wire::Forget {
            path: path_text(path, "socket")?,
            ..Default::default()
        });
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        send(&inner, id, op)?;
        inner.last_id = id;
        Ok(())
    }

    fn begin_end(
        &self,
        device_id: &str,
        incarnation: u64,
        forget: bool,
    ) -> Result<(), LauncherError> {
        let op = wire::request::Op::Kill(wire::Kill {
            device_id: device_id.to_owned(),
            incarnation,
            forget,
            ..Default::default()
        });
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        send(&inner, id, op)?;
        inner.last_id = id;
        Ok(())
    }

    /// How a process ended and what it said last, if that is told within `limit`; the event stays to be polled.
    /// For whoever waits for an answer that cannot come any more.
    pub fn end_of(
        &self,
        device_id: &str,
        incarnation: u64,
        limit: Duration,
    ) -> Option<(ExitOutcome, String)> {
        if self.is_beside() {
            return self.end_of_beside(device_id, incarnation, limit);
        }
        let deadline = Instant::now().checked_add(limit)?;
        let mut inner = self.lock();
        let Inner { socket, inbox, .. } = &mut *inner;
        let socket = socket.as_ref()?;
        let outcome = loop {
            let told = inbox.events.iter().find_map(|event| match event {
                LauncherEvent::Exited {
                    device_id: id,
                    incarnation: of,
                    outcome,
                    last_line,
                    buried: false,
                } if id == device_id && *of == incarnation => Some((*outcome, last_line.clone())),
                _ => None,
            });
            if told.is_some() || Instant::now() >= deadline {
                break told;
            }
            match socket.receive() {
                Ok(Some(packet)) => {
                    take(packet, inbox, 0).ok()?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    sys::poll(&[(socket.as_fd(), libc::POLLIN)], Some(deadline)).ok()?;
                }
                // The next call says so.
                Ok(None) | Err(_) => break None,
            }
        };
        if !inner.inbox.events.is_empty() {
            let _ = self.pending.write(1);
        }
        outcome
    }

    /// Waits, at most `limit`, for the end of a process that was killed; what is told of it is
    /// news from then on and no more: a later process of the same id and incarnation must not be
    /// taken for it.
    pub fn take_end(&self, device_id: &str, incarnation: u64, limit: Duration) {
        if self.is_beside() {
            // Whoever attends takes the event.
            return;
        }
        if self.end_of(device_id, incarnation, limit).is_none() {
            log::warn!("device {device_id}: its process has not ended");
        }
        for event in &mut self.lock().inbox.events {
            if let LauncherEvent::Exited {
                device_id: id,
                incarnation: of,
                buried,
                ..
            } = event
                && id == device_id
                && *of == incarnation
            {
                *buried = true;
            }
        }
    }

    /// The same, and closes what the launcher keeps of the device: its descriptors, and with
    /// them locks.
    pub fn begin_forget(&self, device_id: &str, incarnation: u64) -> Result<(), LauncherError> {
        self.begin_end(device_id, incarnation, true)
    }

    /// Asks for a device's own descriptor number `index` (from 0) to be grown to `size` bytes.
    /// Does not wait: the answer is a [`Grown`](super::LauncherEvent::Grown) with the ticket
    /// that this returns.
    pub fn begin_grow(&self, device_id: &str, index: u32, size: u64) -> Result<u64, LauncherError> {
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        let op = wire::request::Op::GrowFile(wire::GrowFile {
            device_id: device_id.to_owned(),
            index,
            size,
            ..Default::default()
        });
        if inner.inbox.begun.len() >= MAX_BEGUN {
            return Err(busy());
        }
        send(&inner, id, op)?;
        inner.last_id = id;
        inner.inbox.begun.insert(id);
        Ok(id)
    }
}

/// Sends a request now or not at all.
pub(super) fn send(inner: &Inner, id: u64, op: wire::request::Op) -> Result<(), LauncherError> {
    let request = wire::Request {
        id,
        op: Some(op),
        ..Default::default()
    };
    let bytes = request
        .write_to_bytes()
        .map_err(|_| LauncherError::Protocol("a request that cannot be encoded"))?;
    let socket = inner.socket.as_ref().ok_or(LauncherError::Gone)?;
    match socket.send(&bytes, &[], None) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(busy()),
        Err(_) => Err(LauncherError::Gone),
    }
}

pub(super) fn busy() -> LauncherError {
    LauncherError::Refused("the launcher is busy: retry later".into())
}
