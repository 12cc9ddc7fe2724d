//! The block device as the runtime sees it.

use std::io;
use std::sync::Arc;

use bulkhead_runtime::device::{Device, Worker};
use bulkhead_runtime::mailbox::WorkerPort;

use crate::config;
use crate::disk::Disk;
use crate::engine_plain;
use crate::engine_uring::Engine;

/// Which engine serves the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    IoUring,
    /// preadv2 and pwritev2.
    Plain,
}

/// One disk and its queues.
pub struct Block {
    disk: Arc<Disk>,
    queues: u16,
    engine: EngineKind,
    config: Vec<u8>,
}

impl Block {
    /// A device for this disk.
    pub fn new(disk: Disk, queues: u16, engine: EngineKind) -> Self {
        Self {
            config: config::space(&disk.geometry, queues).to_vec(),
            disk: Arc::new(disk),
            queues,
            engine,
        }
    }
}

impl Device for Block {
    fn kind(&self) -> &'static str {
        "blk"
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn io_engine(&self) -> &'static str {
        match self.engine {
            EngineKind::IoUring => "io_uring",
            EngineKind::Plain => "preadv2",
        }
    }

    fn features(&self) -> u64 {
        config::features(&self.disk.geometry, self.queues)
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn worker(&self, port: WorkerPort) -> io::Result<Worker> {
        let disk = Arc::clone(&self.disk);
        Ok(match self.engine {
            EngineKind::IoUring => Box::new(move |prepared| match Engine::new(port, disk) {
                Ok(engine) => {
                    prepared.ready();
                    engine.run()
                }
                Err(why) => prepared.failed(why),
            }),
            EngineKind::Plain => Box::new(move |prepared| {
                prepared.ready();
                engine_plain::run(&port, &disk)
            }),
        })
    }
}
