//! The host's end of a port: a listening socket, the one client that is joined to the port, and
//! what the guest has sent that the client has not taken yet. Owned by the worker.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use bulkhead_runtime::backlog::Backlog;
use bulkhead_runtime::sys;

/// Pieces sent to a client before others are looked at.
const SENDS: u32 = 8;

/// Who is joined to a port.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    pending: Backlog,
    /// It sends no more, and may still receive.
    ended: bool,
    /// It may have sent something.
    readable: bool,
    /// It is gone; what it has sent may be still to be read.
    gone: bool,
    /// The first byte of that.
    first: Option<u8>,
}

/// A port as the host has it.
#[derive(Debug)]
pub struct Port {
    listener: UnixListener,
    client: Option<Client>,
    console: bool,
}

/// What a client has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// So many bytes.
    Bytes(usize),
    /// None at present, or none any more.
    Nothing,
}

impl Port {
    /// A port whose clients come here. A console's output is never held back: a guest's kernel
    /// waits for it with everything else at a standstill.
    pub fn new(listener: UnixListener, console: bool) -> Self {
        Self {
            listener,
            client: None,
            console,
        }
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// There is a client.
    pub fn is_joined(&self) -> bool {
        self.client.is_some()
    }

    /// The client's socket, and what ppoll is to look for there. `reads`: the guest takes more.
    pub fn events(&self, reads: bool) -> Option<(&UnixStream, i16)> {
        let client = self.client.as_ref().filter(|client| !client.gone)?;
        let mut events = 0;
        if reads && !client.ended && !client.readable {
            events |= libc::POLLIN;
        }
        if !client.pending.is_empty() {
            events |= libc::POLLOUT;
        }
        Some((&client.stream, events))
    }

    /// What ppoll has found on the client's socket.
    pub fn happened(&mut self, events: i16) {
        let Some(client) = &mut self.client else {
            return;
        };
        client.readable |= events & libc::POLLIN != 0;
        if events & (libc::POLLHUP | libc::POLLERR) != 0 {
            client.pending = Backlog::default();
            client.gone = true;
            client.readable = true;
            // The guest need not have room for it to be seen that nothing is left.
            let mut first = [0; 1];
            if client.first.is_none() && !client.ended {
                match sys::receive_now(client.stream.as_fd(), &mut first) {
                    Ok(Some(1)) => client.first = first.first().copied(),
                    _ => client.ended = true,
                }
            }
            if client.ended {
                self.client = None;
            }
        }
        self.send();
    }

    /// Takes a client in, if there is none and one waits. One that is gone stays until the guest
    /// has taken what it sent: whoever comes next waits for that.
    pub fn accept(&mut self) {
        if self.is_joined() {
            return;
        }
        // Gone again, or this process is short of descriptors: the next one may do.
        if let Ok((stream, _)) = self.listener.accept() {
            self.client = Some(Client {
                stream,
                pending: Backlog::default(),
                ended: false,
                readable: true,
                gone: false,
                first: None,
            });
        }
    }

    /// Nobody in the guest reads from the port: nor will what a client has sent that is gone.
    pub fn drop_gone(&mut self) {
        if self.client.as_ref().is_some_and(|client| client.gone) {
            self.client = None;
        }
    }

    /// The client may have sent something that was not read.
    pub fn may_have(&self) -> bool {
        self.client.as_ref().is_some_and(|c| c.readable && !c.ended)
    }

    /// Reads what the client has sent.
    pub fn read(&mut self, into: &mut [u8]) -> Got {
        let Some(client) = &mut self.client else {
            return Got::Nothing;
        };
        if let (Some(place), Some(first)) = (into.first_mut(), client.first.take()) {
            *place = first;
            return Got::Bytes(1);
        }
        match sys::receive_now(client.stream.as_fd(), into) {
            Ok(Some(0)) => {
                client.ended = true;
                if client.gone {
                    self.client = None;
                }
                Got::Nothing
            }
            Ok(Some(count)) => Got::Bytes(count),
            Ok(None) => {
                client.readable = false;
                Got::Nothing
            }
            Err(_) => {
                self.client = None;
                Got::Nothing
            }
        }
    }

    /// How many bytes of the guest's are taken now; `None`: as many as there are, and they are
    /// thrown away.
    pub fn room(&self) -> Option<usize> {
        match &self.client {
            Some(client) if client.gone => None,
            Some(client) if self.console && client.pending.room() == 0 => None,
            Some(client) => Some(client.pending.room()),
            None => None,
        }
    }

    /// A console: what there is no room for is thrown away.
    pub fn is_console(&self) -> bool {
        self.console
    }

    /// Takes bytes of the guest's, for which there is room.
    pub fn push(&mut self, bytes: &[u8]) {
        if let Some(client) = &mut self.client {
            client.pending.push(bytes);
        }
    }

    /// Sends the client what it takes.
    pub fn send(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        for _ in 0..SENDS {
            if client.pending.is_empty() {
                return;
            }
            match sys::send_now(client.stream.as_fd(), client.pending.front(), None) {
                Ok(count) => client.pending.advance(count),
                Err(why)
                    if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    return;
                }
                // It takes no more; what it has sent is read all the same.
                Err(_) => {
                    client.pending = Backlog::default();
                    if client.ended {
                        self.client = None;
                    }
                    return;
                }
            }
        }
    }
}
