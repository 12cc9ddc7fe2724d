//! The launcher's client for what leads to a network or to somebody else's back-end: taps,
//! connections and external helpers. While the machine is made the manager waits for each;
//! afterwards it begins them and goes on, and the answer is an event.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;

use super::{DEADLINE, Launcher, LauncherError, PATH_DEADLINE, path_text};
use crate::launcher::helper::VIRTIOFSD;
use crate::launcher::sys;
use crate::launcher::tap::{self, Tap};

/// Connections and helpers that may be under way or not yet taken.
const MAX_LINKS: usize = 64;

/// An external helper that has been executed. It ends when it is killed, its channel is
/// closed, or the launcher ends.
#[derive(Debug)]
pub struct SpawnedHelper {
    /// Its pid as the VMM sees it.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Our end of its vhost-user channel (blocking).
    pub vhost: UnixStream,
}

/// What came with an answer to a request that was begun.
#[derive(Debug)]
pub struct Linked {
    /// The connection, or a process's pidfd.
    pub fd: OwnedFd,
    /// A process's pid as the VMM sees it.
    pub pid: Option<i32>,
    /// A device process's fence, or our end of the channel that was made for a helper.
    pub second: Option<OwnedFd>,
}

impl Launcher {
    /// Connects to a unix stream socket; the connection does not block.
    pub fn connect_unix(&self, path: &Path, role: &str) -> Result<UnixStream, LauncherError> {
        let op = wire::ConnectUnix {
            path: path_text(path, role)?,
            role: role.to_owned(),
            ..Default::default()
        };
        let op = wire::request::Op::ConnectUnix(op);
        let (reply, mut fds, _) = self.call(op, &[], PATH_DEADLINE, "connection")?;
        match (reply.result, fds.pop(), fds.pop()) {
            (Some(wire::reply::Result::Connected(_)), Some(fd), None) => Ok(fd.into()),
            _ => Err(LauncherError::Protocol(
                "a connection was answered with something else",
            )),
        }
    }

    /// Attaches to the tap `name` by `queues` queues; with `vhost_net`, as many descriptors of
    /// /dev/vhost-net come along. Asks again while somebody who may just be ending has it.
    pub fn open_tap(
        &self,
        name: &str,
        queues: u32,
        vhost_net: bool,
    ) -> Result<(Tap, Vec<OwnedFd>), LauncherError> {
        let op = wire::OpenTap {
            name: name.to_owned(),
            queues,
            vhost_net,
            ..Default::default()
        };
        let until = Instant::now() + bulkhead_taps::PATIENCE;
        let (reply, mut fds, _) = loop {
            let op = wire::request::Op::OpenTap(op.clone());
            match self.call(op, &[], DEADLINE, "tap") {
                Err(LauncherError::Refused(why))
                    if tap::passing(&why) && Instant::now() < until =>
                {
                    // Others' requests come in between.
                    let _ = sys::poll(&[], Some(Instant::now() + bulkhead_taps::PAUSE));
                }
                other => break other?,
            }
        };
        let count = usize::try_from(queues.max(1)).unwrap_or(usize::MAX);
        let wanted = if vhost_net {
            count.saturating_mul(2)
        } else {
            count
        };
        match reply.result {
            Some(wire::reply::Result::Tap(tap)) if fds.len() == wanted => {
                let vhost = fds.split_off(count);
                let tap = Tap {
                    name: tap.name,
                    queues: fds,
                    mtu: tap.mtu,
                };
                Ok((tap, vhost))
            }
            _ => Err(LauncherError::Protocol(
                "a tap was answered with something else",
            )),
        }
    }

    /// Starts an external helper and returns once its program runs: its pid, pidfd, and our end
    /// of its vhost-user channel (blocking).
    pub fn spawn_helper(
        &self,
        id: &str,
        kind: &str,
        incarnation: u64,
        options: Vec<String>,
    ) -> Result<SpawnedHelper, LauncherError> {
        let pair = channel(kind)?;
        let op = helper(id, kind, incarnation, options);
        let theirs: Vec<_> = pair.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        let called = self.call(op, &theirs, DEADLINE, "spawn");
        let (reply, mut fds, pid) = match called {
            Err(error @ LauncherError::Deadline(_)) => {
                // Should it come up later, nobody would know it.
                let _ = self.kill(id, incarnation);
                return Err(error);
            }
            other => other?,
        };
        let ours = pair.map(|(ours, _)| ours);
        let made = (fds.len() > 1).then(|| fds.pop()).flatten();
        let vhost = ours.or(made.map(UnixStream::from));
        match (reply.result, fds.pop(), fds.pop(), pid, vhost) {
            (Some(wire::reply::Result::Spawned(_)), Some(pidfd), None, Some(pid), Some(vhost)) => {
                self.untold().insert((id.to_owned(), incarnation), pid);
                Ok(SpawnedHelper { pid, pidfd, vhost })
            }
            _ => Err(LauncherError::Protocol(
                "a spawn was answered with something else",
            )),
        }
    }

    /// Begins to connect to a unix stream socket. Does not wait: the answer is a
    /// [`Linked`](super::LauncherEvent::Linked) with the ticket that this returns.
    pub fn begin_connect(&self, path: &Path, role: &str) -> Result<u64, LauncherError> {
        let op = wire::ConnectUnix {
            path: path_text(path, role)?,
            role: role.to_owned(),
            ..Default::default()
        };
        self.begin_link(wire::request::Op::ConnectUnix(op), &[])
    }

    /// Begins to start an external helper. Does not wait, as above; our end of its channel
    /// comes back at once, or with the answer where the launcher makes that.
    pub fn begin_helper(
        &self,
        id: &str,
        kind: &str,
        incarnation: u64,
        options: Vec<String>,
    ) -> Result<(u64, Option<UnixStream>), LauncherError> {
        let pair = channel(kind)?;
        let op = helper(id, kind, incarnation, options);
        let theirs: Vec<_> = pair.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        let ticket = self.begin_link(op, &theirs)?;
        Ok((ticket, pair.map(|(ours, _)| ours)))
    }

    /// What came with the answer of this ticket, once.
    pub fn take_linked(&self, ticket: u64) -> Option<Linked> {
        self.lock().inbox.linked.remove(&ticket)
    }

    pub(super) fn begin_link(
        &self,
        op: wire::request::Op,
        fds: &[BorrowedFd<'_>],
    ) -> Result<u64, LauncherError> {
        let mut inner = self.lock();
        let id = inner.last_id.wrapping_add(1).max(1);
        let request = wire::Request {
            id,
            op: Some(op),
            ..Default::default()
        };
        let bytes = request
            .write_to_bytes()
            .map_err(|_| LauncherError::Protocol("a request that cannot be encoded"))?;
        let inbox = &inner.inbox;
        if inbox.links.len().saturating_add(inbox.linked.len()) >= MAX_LINKS {
            return Err(busy());
        }
        let socket = inner.socket.as_ref().ok_or(LauncherError::Gone)?;
        match socket.send(&bytes, fds, None) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(busy()),
            Err(_) => return Err(LauncherError::Gone),
        }
        inner.last_id = id;
        inner.inbox.begun.insert(id);
        inner.inbox.links.insert(id);
        Ok(id)
    }
}

/// Both ends of the channel of a helper of this kind; `None`: the launcher makes it.
fn channel(kind: &str) -> Result<Option<(UnixStream, UnixStream)>, LauncherError> {
    if kind == VIRTIOFSD {
        return Ok(None);
    }
    let pair = UnixStream::pair().map_err(|e| LauncherError::Io("socketpair", e))?;
    Ok(Some(pair))
}

fn helper(id: &str, kind: &str, incarnation: u64, options: Vec<String>) -> wire::request::Op {
    wire::request::Op::SpawnHelper(wire::SpawnHelper {
        id: id.to_owned(),
        kind: kind.to_owned(),
        options,
        incarnation,
        ..Default::default()
    })
}

fn busy() -> LauncherError {
    LauncherError::Refused("the launcher is busy: retry later".into())
}
