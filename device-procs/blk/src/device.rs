//! The block device as the runtime sees it. Called on the main thread.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::common::DiskLimits;
use bulkhead_proto::device::UpdateRequest;
use bulkhead_proto::device::update_request::Kind;
use bulkhead_runtime::device::{Device, Update, Worker};
use bulkhead_runtime::inflight::KeptMemory;
use bulkhead_runtime::limit::Rate;
use bulkhead_runtime::mailbox::WorkerPort;
use bulkhead_runtime::sys;

use crate::backing::Backing;
use crate::config;
use crate::disk::Disk;
use crate::engine_plain;
use crate::engine_uring::Engine;
use crate::host::SECTOR;

/// Which engine serves the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    IoUring,
    /// preadv2 and pwritev2, or an image's own calls.
    Plain,
}

/// One disk and its queues.
pub struct Block {
    disk: Arc<Disk>,
    queues: u16,
    engine: EngineKind,
}

type Limits = (Option<Rate>, Option<Rate>);

impl Block {
    /// A device for this disk.
    pub fn new(disk: Disk, queues: u16, engine: EngineKind) -> Self {
        Self {
            disk: Arc::new(disk),
            queues,
            engine,
        }
    }

    /// The disk grows: to a size that the file has already, or that the image takes.
    fn grow(&self, size: u64) -> Result<bool, RpcStatus> {
        let invalid = |why: String| Err(RpcStatus::invalid_argument(format!("size_bytes: {why}")));
        let disk = &self.disk;
        let now = disk.sectors().saturating_mul(u64::from(SECTOR));
        if size < now {
            return invalid(format!(
                "{size} is less than the disk's {now}; a disk in use cannot shrink"
            ));
        }
        if let Some(max) = disk.max_size
            && size > max
            && matches!(disk.backing, Backing::Raw(_))
        {
            return invalid(format!("{size} is more than max-size={max}"));
        }
        match &disk.backing {
            Backing::Raw(file) if disk.regular => match sys::file_size(file) {
                Ok((have, _)) if have < size => {
                    return invalid(format!(
                        "{size} is more than the file's {have}; grow it first"
                    ));
                }
                Ok(_) => {}
                Err(e) => return invalid(format!("cannot look at the file: {e}")),
            },
            // A block device cannot be asked any more: the VMM has.
            Backing::Raw(_) => {}
            Backing::Image(image) => {
                let Some(image) = image.get() else {
                    return invalid("the image is not open".into());
                };
                if size > now
                    && let Err(e) = image.grow(size)
                {
                    return invalid(format!("the image cannot grow to {size}: {e}"));
                }
            }
        }
        disk.set_size(size);
        Ok(disk.sectors().saturating_mul(u64::from(SECTOR)) != now)
    }
}

fn limits(limits: &DiskLimits) -> Result<Limits, RpcStatus> {
    Ok((
        Rate::from_message("limits.bytes", limits.bytes.as_ref())?,
        Rate::from_message("limits.operations", limits.operations.as_ref())?,
    ))
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

    fn confined(&self) -> Result<(), String> {
        if let Backing::Image(image) = &self.disk.backing {
            image.open()?;
            if let Some(image) = image.get() {
                self.disk.set_size(image.size());
            }
        }
        Ok(())
    }

    fn kept_bytes(&self) -> u64 {
        match &self.disk.backing {
            Backing::Raw(_) => 0,
            Backing::Image(image) => image.kept_bytes(),
        }
    }

    fn keep(&self, memory: KeptMemory) -> Result<(), String> {
        if let Backing::Image(image) = &self.disk.backing
            && let Some(image) = image.get()
        {
            image.keep(memory)?;
            // The process before this one may have made it larger.
            self.disk.set_size(image.size());
        }
        Ok(())
    }

    fn features(&self) -> u64 {
        config::features(&self.disk, self.queues)
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn config(&self) -> Vec<u8> {
        config::space(&self.disk, self.queues).to_vec()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        config::write(&self.disk, offset, data)
    }

    fn accepted(&self, features: u64) {
        // After a reset the driver has made no choice.
        if features == 0 {
            self.disk.set_writeback(true);
        }
    }

    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        let Some(Kind::Blk(update)) = &request.kind else {
            return Err(RpcStatus::invalid_argument("kind: this is a disk"));
        };
        // What can be refused comes first; nothing is done in part.
        let rates = update.limits.as_ref().map(limits).transpose()?;
        let mut done = Update::default();
        if update.size_bytes != 0 {
            done.config_changed = self.grow(update.size_bytes)?;
        }
        if update.pulled {
            self.disk.pull();
        }
        if let Some((bytes, operations)) = rates {
            self.disk.limiter.set(bytes, operations, Instant::now());
        }
        Ok(done)
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
                let worker = engine_plain::Worker::new();
                prepared.ready();
                engine_plain::run(&port, &disk, worker)
            }),
        })
    }
}
