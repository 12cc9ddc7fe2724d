//! The `serial` thread: one poll loop between the port and the host's descriptors.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::output::Output;
use super::poll::{Interest, poll};
use super::{Counters, Registers, SerialBackend};
use crate::kvm::borrow_fd;
use crate::line::Line;

/// Bytes written at once: what a pipe that polls writable takes without blocking (PIPE_BUF).
const CHUNK: usize = 4096;

/// Everything the thread owns.
pub(super) struct Pump {
    registers: Arc<Mutex<Registers>>,
    output: Arc<Output>,
    line: Arc<Line>,
    counters: Arc<Counters>,
    wake: Arc<EventFd>,
    stops: mpsc::Receiver<Duration>,
    listener: Option<UnixListener>,
    sink: Option<File>,
    source: Option<File>,
}

impl Pump {
    pub(super) fn new(
        backend: SerialBackend,
        registers: Arc<Mutex<Registers>>,
        (output, line): (Arc<Output>, Arc<Line>),
        counters: Arc<Counters>,
        wake: Arc<EventFd>,
        stops: mpsc::Receiver<Duration>,
    ) -> io::Result<Self> {
        let mut pump = Self {
            registers,
            output,
            line,
            counters,
            wake,
            stops,
            listener: None,
            sink: None,
            source: None,
        };
        match backend {
            SerialBackend::Stdio { input, output } => {
                pump.source = input.map(File::from);
                pump.sink = Some(output.into());
            }
            SerialBackend::File(file) => pump.sink = Some(file.into()),
            SerialBackend::Listener(socket) => {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                pump.listener = Some(listener);
                pump.output.set_detached(true);
            }
            SerialBackend::Null => pump.output.close(),
        }
        Ok(pump)
    }

    pub(super) fn run(mut self) {
        let mut deadline: Option<Instant> = None;
        loop {
            if deadline.is_none()
                && let Ok(timeout) = self.stops.try_recv()
            {
                deadline = Instant::now().checked_add(timeout);
                self.source = None;
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left
                .is_some_and(|left| left.is_zero() || self.sink.is_none() || self.output.is_empty())
            {
                return;
            }
            if let Err(error) = self.step(left) {
                log::error!("serial port: poll failed: {error}");
                self.output.close();
                return;
            }
        }
    }

    /// Free places in the receive FIFO.
    fn room(&self) -> usize {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .fifo_capacity()
    }

    fn step(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        fn want(file: &File, interest: Interest) -> (BorrowedFd<'_>, Interest) {
            (file.as_fd(), interest)
        }
        self.take_typed();
        let room = self.room();
        let [woken, writable, readable, client] = poll(
            [
                Some((
                    borrow_fd(&*self.wake, self.wake.as_raw_fd()),
                    Interest::Readable,
                )),
                self.sink
                    .as_ref()
                    .filter(|_| !self.output.is_empty())
                    .map(|sink| want(sink, Interest::Writable)),
                self.source
                    .as_ref()
                    .filter(|_| room > 0)
                    .map(|source| want(source, Interest::Readable)),
                self.listener
                    .as_ref()
                    .filter(|_| self.sink.is_none())
                    .map(|listener| (listener.as_fd(), Interest::Readable)),
            ],
            timeout,
        )?;
        if woken {
            let _ = self.wake.read();
        }
        if client {
            self.accept();
        }
        if writable {
            self.write_some();
        }
        if readable {
            self.read_some(room);
        }
        Ok(())
    }

    /// Gives the guest what clients of the API have typed, as far as there is room: the FIFO's
    /// becoming empty, and what is typed, wake this thread.
    fn take_typed(&self) {
        loop {
            let room = self.room();
            if room == 0 {
                return;
            }
            let typed = self.line.take_typed(room);
            if typed.is_empty() {
                return;
            }
            self.enqueue(&typed);
        }
    }

    fn enqueue(&self, bytes: &[u8]) {
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // In loopback mode, and when the irqfd is full, nothing is taken: the bytes
        // are lost, as on a line whose receiver does not listen.
        let taken = registers.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.counters
            .bytes_in
            .fetch_add(taken as u64, Ordering::Relaxed);
    }

    fn accept(&mut self) {
        let stream = self.listener.as_ref().map(UnixListener::accept);
        let Some(Ok((stream, _))) = stream else {
            return;
        };
        let halves = |stream: UnixStream| -> io::Result<(File, File)> {
            stream.set_nonblocking(true)?;
            let copy = stream.as_fd().try_clone_to_owned()?;
            Ok((
                File::from(copy),
                File::from(std::os::fd::OwnedFd::from(stream)),
            ))
        };
        match halves(stream) {
            Ok((source, sink)) => {
                self.source = Some(source);
                self.sink = Some(sink);
                self.output.set_detached(false);
            }
            Err(error) => log::warn!("serial port: a client was turned away: {error}"),
        }
    }

    /// The host's end is gone: wait for the next client, or give up for good.
    fn hang_up(&mut self) {
        self.sink = None;
        if self.listener.is_some() {
            self.source = None;
            self.output.set_detached(true);
        } else {
            self.output.close();
        }
    }

    fn write_some(&mut self) {
        let Some(mut sink) = self.sink.as_ref() else {
            return;
        };
        match sink.write(&self.output.peek(CHUNK)) {
            Ok(0) => self.hang_up(),
            Ok(count) => {
                self.output.consume(count);
                self.counters
                    .bytes_out
                    .fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                if self.listener.is_none() {
                    log::warn!(
                        "serial port: {error}: what the guest prints from now on is lost; \
                         make room, or give --serial another place"
                    );
                }
                self.hang_up();
            }
        }
    }

    fn read_some(&mut self, room: usize) {
        let Some(mut source) = self.source.as_ref() else {
            return;
        };
        let mut buffer = [0; 64];
        let max = room.min(buffer.len());
        let Some(space) = buffer.get_mut(..max) else {
            return;
        };
        match source.read(space) {
            Ok(0) => {
                self.source = None;
                if self.listener.is_some() {
                    self.hang_up();
                }
            }
            Ok(count) => self.enqueue(buffer.get(..count).unwrap_or_default()),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.source = None,
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}
