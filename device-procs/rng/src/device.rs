//! The entropy device as the runtime sees it. Called on the main thread.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bulkhead_runtime::clock;
use bulkhead_runtime::device::{Device, Worker};
use bulkhead_runtime::limit::{Limiter, Rate};
use bulkhead_runtime::mailbox::WorkerPort;

use crate::worker;

/// One entropy device.
pub struct Rng {
    source: Arc<File>,
    limiter: Arc<Limiter>,
}

impl Rng {
    /// A device that gives what is read here, at most so many bytes a second.
    pub fn new(source: File, bytes: Option<Rate>) -> Self {
        Self {
            source: Arc::new(source),
            limiter: Arc::new(Limiter::new(bytes, None, clock::now())),
        }
    }
}

impl Device for Rng {
    fn kind(&self) -> &'static str {
        "rng"
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
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn worker(&self, port: WorkerPort) -> io::Result<Worker> {
        let (source, limiter) = (Arc::clone(&self.source), Arc::clone(&self.limiter));
        Ok(Box::new(move |prepared| {
            prepared.ready();
            worker::Worker::new(port, source, limiter).run()
        }))
    }
}
