//! Packets to and from the launcher: one request, its reply, and the events on the way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use bulkhead_proto::launcher as wire;
use bulkhead_proto::protobuf::Message;
use bulkhead_seccomp::notify::Violation;

use super::{Inbox, LauncherError, LauncherEvent, Linked, MAX_EVENTS, MAX_LAST_LINE, resources};
use crate::launcher::packet::{Packet, PacketSocket};
use crate::launcher::sys::{self, ExitOutcome};
use crate::launcher::{printable, valid_id};

fn wait(
    socket: &PacketSocket,
    events: i16,
    deadline: Instant,
    what: &'static str,
) -> Result<(), LauncherError> {
    let revents = sys::poll(&[(socket.as_fd(), events)], Some(deadline))
        .map_err(|e| LauncherError::Io("poll", e))?;
    if revents.iter().all(|r| *r == 0) {
        return Err(LauncherError::Deadline(what));
    }
    Ok(())
}

pub(super) fn send(
    socket: &PacketSocket,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
    what: &'static str,
) -> Result<(), LauncherError> {
    loop {
        match socket.send(bytes, fds, None) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(socket, libc::POLLOUT, deadline, what)?;
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Err(LauncherError::Refused(format!(
                    "launcher: a {what} request larger than a packet"
                )));
            }
            Err(_) => return Err(LauncherError::Gone),
        }
    }
}

/// Waits for the reply to `id`; events on the way are kept, replies to requests that were
/// given up are dropped with their descriptors.
pub(super) fn receive(
    socket: &PacketSocket,
    inbox: &mut Inbox,
    id: u64,
    deadline: Instant,
    what: &'static str,
) -> Result<(wire::Reply, Vec<OwnedFd>, Option<i32>), LauncherError> {
    loop {
        match socket.receive() {
            Ok(Some(packet)) => {
                if let Some(answer) = take(packet, inbox, id)? {
                    return Ok(answer);
                }
                if Instant::now() > deadline {
                    return Err(LauncherError::Deadline(what));
                }
            }
            Ok(None) => return Err(LauncherError::Gone),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(socket, libc::POLLIN, deadline, what)?;
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Err(LauncherError::Protocol("a packet beyond the bounds"));
            }
            Err(_) => return Err(LauncherError::Gone),
        }
    }
}

pub(super) type Answer = (wire::Reply, Vec<OwnedFd>, Option<i32>);

/// Sorts one packet: the reply to `id` comes back, an event is kept, the rest is dropped.
/// The launcher's greeting is the one reply with id 0 and no event in it.
pub(super) fn take(
    packet: Packet,
    inbox: &mut Inbox,
    id: u64,
) -> Result<Option<Answer>, LauncherError> {
    let Inbox {
        events,
        begun,
        links,
        places,
        linked,
        beside,
    } = inbox;
    let Packet { bytes, fds, pid } = packet;
    let reply = wire::Reply::parse_from_bytes(&bytes)
        .map_err(|_| LauncherError::Protocol("a packet that is no message"))?;
    match (reply.id, &reply.result) {
        (0, Some(wire::reply::Result::Exited(exited))) => {
            if events.len() >= MAX_EVENTS || !valid_id(&exited.device_id) {
                return Err(LauncherError::Protocol("a flood of events"));
            }
            let outcome = match (exited.violation.as_ref(), exited.signal) {
                (Some(call), _) => ExitOutcome::Violation(Violation {
                    nr: call.nr,
                    arch: call.arch,
                }),
                (None, 0) => ExitOutcome::Status(exited.status),
                (None, signal) => ExitOutcome::Signal(signal),
            };
            let last_line: String = printable(&exited.last_line)
                .chars()
                .take(MAX_LAST_LINE)
                .collect();
            beside.note_end(&exited.device_id, exited.incarnation, outcome, &last_line);
            events.push_back(LauncherEvent::Exited {
                device_id: exited.device_id.clone(),
                incarnation: exited.incarnation,
                outcome,
                last_line,
                buried: false,
            });
            Ok(None)
        }
        (reply_id, _) if beside.waits(reply_id) => {
            beside.answer(reply_id, (reply, fds, pid));
            Ok(None)
        }
        (reply_id, _) if reply_id == id => Ok(Some((reply, fds, pid))),
        (reply_id, result) if begun.remove(&reply_id) => {
            if let Some(wire::reply::Result::Connected(_) | wire::reply::Result::Spawned(_)) =
                result
                && reply.error.is_empty()
                && links.remove(&reply_id)
            {
                let mut fds = fds.into_iter();
                let fd = fds.next().ok_or(LauncherError::Protocol(
                    "a connection without its descriptor",
                ))?;
                let second = fds.next();
                linked.insert(reply_id, Linked { fd, pid, second });
                events.push_back(LauncherEvent::Linked {
                    ticket: reply_id,
                    result: Ok(()),
                });
                return Ok(None);
            }
            if links.remove(&reply_id) {
                let why = match reply.error.as_str() {
                    "" => return Err(LauncherError::Protocol("no answer to a connection")),
                    error => printable(error),
                };
                events.push_back(LauncherEvent::Linked {
                    ticket: reply_id,
                    result: Err(why),
                });
                return Ok(None);
            }
            if places.remove(&reply_id) {
                let result = match (result, reply.error.as_str()) {
                    (Some(wire::reply::Result::Placed(placed)), "") => {
                        Ok(resources::lines(&placed.not_enforced))
                    }
                    (_, "") => return Err(LauncherError::Protocol("no answer to limits")),
                    (_, error) => Err(printable(error)),
                };
                events.push_back(LauncherEvent::Placed {
                    ticket: reply_id,
                    result,
                });
                return Ok(None);
            }
            let result = match (result, reply.error.as_str()) {
                (Some(wire::reply::Result::Grown(grown)), "") => Ok(grown.size),
                (_, "") => return Err(LauncherError::Protocol("a growth without a size")),
                (_, error) => Err(printable(error)),
            };
            // No more than were begun: it needs no bound of its own.
            events.push_back(LauncherEvent::Grown {
                ticket: reply_id,
                result,
            });
            Ok(None)
        }
        _ => Ok(None),
    }
}
