//! The socket device as the runtime sees it. Called on the main thread.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_runtime::device::{Device, Worker};
use bulkhead_runtime::mailbox::WorkerPort;

use crate::dial::Dialer;
use crate::streams::Streams;
use crate::worker::{self, QUEUES};

/// One socket device.
pub struct Vsock {
    listener: Arc<UnixListener>,
    /// Until there is a worker, which takes it.
    dial: Mutex<Option<Dialer>>,
    cid: u64,
    /// No two processes of a device begin with the same, as a rule.
    mark: u32,
}

impl Vsock {
    /// A device of a guest with this address, for the clients that come here, and that asks for
    /// others there.
    pub fn new(listener: UnixListener, dial: Option<Dialer>, cid: u64) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            listener: Arc::new(listener),
            dial: Mutex::new(dial),
            cid,
            mark: since.map_or(0, |time| (time.as_micros() & 0xffff_ffff) as u32),
        }
    }
}

impl Device for Vsock {
    fn kind(&self) -> &'static str {
        "vsock"
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn io_engine(&self) -> &'static str {
        "none"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        QUEUES as u16
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn sharing(&self, _queue: u16) -> u16 {
        QUEUES as u16
    }

    fn worker(&self, _port: WorkerPort) -> io::Result<Worker> {
        // All queues share a thread.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shared_worker(&self, ports: Vec<WorkerPort>) -> io::Result<Worker> {
        let listener = Arc::clone(&self.listener);
        let streams = Streams::new(self.cid, self.mark);
        let mut dial = self.dial.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = worker::Worker::new(ports, listener, dial.take(), streams)
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Box::new(move |prepared| {
            prepared.ready();
            worker.run()
        }))
    }
}
