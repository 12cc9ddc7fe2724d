//! The memory device as the runtime sees it. Called on the main thread.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::update_request::Kind;
use bulkhead_proto::device::{FinishRequestRequest, TakeRequestResponse, UpdateRequest};
use bulkhead_runtime::device::{Device, Update, Worker};
use bulkhead_runtime::mailbox::WorkerPort;

use crate::desk::Desk;
use crate::state::{Area, State};
use crate::worker;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: a driver must not read what is not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// One memory area.
pub struct Mem {
    desk: Arc<Desk>,
    /// Rung when something is wanted of the VMM.
    bell: Arc<File>,
}

impl Mem {
    /// A device for this area.
    pub fn new(area: Area, bell: File) -> Self {
        Self {
            desk: Arc::new(Desk::new(State::new(area))),
            bell: Arc::new(bell),
        }
    }
}

impl Device for Mem {
    fn kind(&self) -> &'static str {
        "mem"
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn io_engine(&self) -> &'static str {
        "none"
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        self.desk.with(|state| state.config())
    }

    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        let Some(Kind::Mem(update)) = &request.kind else {
            return Err(RpcStatus::invalid_argument("kind: this is memory"));
        };
        self.desk.with(|state| {
            let before = state.config();
            if !state.update(update) {
                return Err(RpcStatus::invalid_argument(
                    "requested_bytes or plugged: not of this memory",
                ));
            }
            Ok(Update {
                config_changed: state.config() != before,
            })
        })
    }

    fn asks(&self) -> bool {
        self.desk.asks()
    }

    fn take_request(&self) -> Result<TakeRequestResponse, RpcStatus> {
        Ok(self.desk.take())
    }

    fn finish_request(&self, request: &FinishRequestRequest) -> Result<(), RpcStatus> {
        self.desk.finish(request)
    }

    fn worker(&self, port: WorkerPort) -> io::Result<Worker> {
        let (desk, bell) = (Arc::clone(&self.desk), Arc::clone(&self.bell));
        Ok(Box::new(move |prepared| {
            prepared.ready();
            worker::Worker::new(port, desk, bell).run()
        }))
    }
}
