//! Clients of the API at consoles: at the serial port, which is the VMM's own, or at a port of a
//! console device, to whose socket the launcher connects as it would for anybody. The manager
//! lets a client in; a thread `console` for each port moves its bytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use bulkhead_proto::{Code, RpcStatus, sys};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Host;
use crate::api::{ApiResponse, ReplyHandle};
use crate::kvm::borrow_fd;
use crate::line::{Line, MOST_CLIENTS};
use crate::machine::device::Special;
use crate::serial::poll::{Interest, poll};
use crate::threads;

/// Clients at ports of console devices, each with a thread.
const MOST_AT_PORTS: usize = 8;
/// Bytes moved at a time.
const PIECE: usize = 4096;

/// A client at a port, as long as its thread lives.
pub(super) struct Attached {
    device: String,
    port: u32,
    thread: Weak<()>,
}

impl Host {
    /// Lets a client in.
    pub(super) fn attach_console(
        &mut self,
        device: &str,
        port: u32,
        history: usize,
        reply: ReplyHandle,
    ) {
        let Some(machine) = &self.machine else {
            let line = "cannot attach to a console: no machine yet: create one";
            return reply.complete(Err(RpcStatus::failed_precondition(line)));
        };
        if device.is_empty() {
            let client = machine.parts.serial.line().join(history);
            let client = client.ok_or_else(|| {
                exhausted(format!(
                    "{MOST_CLIENTS} clients are attached to the serial port: end one of them"
                ))
            });
            return reply.complete(client.map(|c| ApiResponse::Console(Arc::new(c))));
        }
        self.attached.retain(|a| a.thread.strong_count() > 0);
        if let Err((status, reply)) = self.attach_port(device, port, reply) {
            reply.complete(Err(status));
        }
    }

    fn attach_port(
        &mut self,
        id: &str,
        port: u32,
        reply: ReplyHandle,
    ) -> Result<(), (RpcStatus, ReplyHandle)> {
        let path = match self.socket_of(id, port) {
            Ok(path) => path,
            Err(status) => return Err((status, reply)),
        };
        let wake = match EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK) {
            Ok(wake) => Arc::new(wake),
            Err(e) => {
                let line = format!("device {id}: an eventfd for its port: {e}: try again later");
                return Err((exhausted(line), reply));
            }
        };
        let (launcher, alive) = (Arc::clone(&self.launcher), Arc::new(()));
        let thread = Arc::downgrade(&alive);
        let body = move || {
            let _alive = alive;
            // Within the launcher's deadline.
            let socket = match launcher.connect_unix(&path, "console") {
                Ok(socket) => socket,
                Err(e) => {
                    return reply.complete(Err(RpcStatus::failed_precondition(e.to_string())));
                }
            };
            let line = Line::new(Arc::clone(&wake));
            let Some(client) = line.join(0) else {
                return;
            };
            reply.complete(Ok(ApiResponse::Console(Arc::new(client))));
            serve(&socket, &line, &wake);
        };
        let hook = Arc::clone(&self.hooks.helper);
        // The reply goes with the body where there is no thread: the client is told.
        if let Err(e) = threads::spawn("console".to_owned(), hook, || Ok(()), body) {
            log::warn!("device {id}: a thread for a client of its port {port}: {e}");
            return Ok(());
        }
        self.attached.push(Attached {
            device: id.to_owned(),
            port,
            thread,
        });
        Ok(())
    }

    /// Where clients of a port are heard.
    fn socket_of(&self, id: &str, port: u32) -> Result<PathBuf, RpcStatus> {
        let devices = self.machine.as_ref().map(|m| &m.parts.devices);
        let found = devices.and_then(|devices| devices.iter().find(|d| d.id == id));
        let device = found.ok_or_else(|| {
            let line = format!("there is no device {id}: see Devices");
            RpcStatus::new(Code::NotFound, line)
        })?;
        let Special::Console(paths) = &device.special else {
            return Err(RpcStatus::failed_precondition(format!(
                "device {id}: is no console but {}: see Devices",
                device.kind
            )));
        };
        let index = usize::try_from(port).unwrap_or(usize::MAX);
        let path = paths.get(index).ok_or_else(|| {
            RpcStatus::invalid_argument(format!(
                "device {id}: there is no port {port}: it has {}, from 0",
                paths.len()
            ))
        })?;
        if device.process.is_none() {
            return Err(RpcStatus::failed_precondition(format!(
                "device {id}: it has no process: see ResumeDevice"
            )));
        }
        let mut others = self.attached.iter();
        if others.any(|a| a.device == id && a.port == port) {
            return Err(RpcStatus::failed_precondition(format!(
                "device {id}: another client is attached to port {port}, which takes one at a time: end that one"
            )));
        }
        if self.attached.len() >= MOST_AT_PORTS {
            return Err(exhausted(format!(
                "{MOST_AT_PORTS} clients are attached to ports of consoles: end one, or connect to {}",
                path.display()
            )));
        }
        Ok(path.clone())
    }
}

fn exhausted(line: String) -> RpcStatus {
    RpcStatus::new(Code::ResourceExhausted, line)
}

/// Moves bytes until the client has left or the device's process hangs up, of which nothing is
/// believed.
fn serve(socket: &UnixStream, line: &Line, wake: &EventFd) {
    let result = move_bytes(socket, line, wake);
    if let Err(error) = result {
        log::debug!("a client's connection to a console: {error}");
    }
    line.close();
}

fn move_bytes(socket: &UnixStream, line: &Line, wake: &EventFd) -> io::Result<()> {
    let mut typed: Vec<u8> = Vec::new();
    let mut piece = vec![0; PIECE];
    while line.is_joined() {
        if typed.is_empty() {
            typed = line.take_typed(PIECE);
        }
        let room = line.room().min(PIECE);
        let fd = socket.as_fd();
        let [woken, writable, readable] = poll(
            [
                Some((borrow_fd(wake, wake.as_raw_fd()), Interest::Readable)),
                (!typed.is_empty()).then_some((fd, Interest::Writable)),
                (room > 0).then_some((fd, Interest::Readable)),
            ],
            None,
        )?;
        if woken {
            let _ = wake.read();
        }
        if writable {
            let sent = sys::send(fd, &typed)?.unwrap_or(0);
            typed.drain(..sent.min(typed.len()));
        }
        if readable && let Some(space) = piece.get_mut(..room) {
            match sys::recv(fd, space)? {
                Some(0) => return Ok(()),
                Some(count) => line.print(space.get(..count).unwrap_or_default()),
                None => {}
            }
        }
    }
    Ok(())
}
