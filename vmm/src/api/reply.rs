//! The way back: answers from whichever thread did the work to the `api` thread.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use bulkhead_proto::machine::{
    AddDeviceResponse, DeviceStatsResponse, DevicesResponse, InfoResponse, OperationInfo,
    OperationsResponse, RebootResponse, RemoveDeviceResponse, ResizeCpusResponse,
    ResizeMemoryResponse, UpdateDeviceResponse, UpdateDiskResponse, UpdateResourcesResponse,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::vmservice::{CapabilitiesVMResponse, PropertiesVMResponse};
use bulkhead_proto::{Code, RpcStatus};
use vmm_sys_util::eventfd::EventFd;

use crate::line::Client;

/// What a request that succeeded gives.
#[derive(Clone, Debug, PartialEq)]
pub enum ApiResponse {
    /// Nothing more to say: Create, Delete, Boot, Pause, Resume, Shutdown, Reset, UpdateNet,
    /// DrainDevice, ResumeDevice.
    Done,
    /// The answer to Reboot.
    Rebooted(RebootResponse),
    /// The answer to Info.
    Info(Box<InfoResponse>),
    /// The answer to Devices.
    Devices(Box<DevicesResponse>),
    /// The answer to DeviceStats.
    DeviceStats(Box<DeviceStatsResponse>),
    /// The answer to UpdateDisk.
    DiskUpdated(UpdateDiskResponse),
    /// The answer to AddDevice.
    DeviceAdded(Box<AddDeviceResponse>),
    /// The answer to RemoveDevice.
    DeviceRemoved(RemoveDeviceResponse),
    /// The answer to ResizeCpus.
    CpusResized(ResizeCpusResponse),
    /// The answer to ResizeMemory.
    MemoryResized(Box<ResizeMemoryResponse>),
    /// The answer to UpdateResources.
    ResourcesUpdated(UpdateResourcesResponse),
    /// The answer to UpdateDevice.
    DeviceUpdated(UpdateDeviceResponse),
    /// The answer to Operation.
    Operation(Box<OperationInfo>),
    /// The answer to Operations.
    Operations(Box<OperationsResponse>),
    /// What AttachConsole goes on with.
    Console(Arc<Client>),
    /// The answer to CapabilitiesVM.
    VmCapabilities(CapabilitiesVMResponse),
    /// The answer to PropertiesVM.
    VmProperties(Box<PropertiesVMResponse>),
}

impl ApiResponse {
    /// The response message on the wire.
    pub(super) fn encode(&self) -> Result<Vec<u8>, RpcStatus> {
        let encoded = match self {
            // All of these methods' responses are empty messages.
            Self::Done => return Ok(Vec::new()),
            Self::Rebooted(rebooted) => rebooted.write_to_bytes(),
            Self::Info(info) => info.write_to_bytes(),
            Self::Devices(devices) => devices.write_to_bytes(),
            Self::DeviceStats(stats) => stats.write_to_bytes(),
            Self::DiskUpdated(disk) => disk.write_to_bytes(),
            Self::DeviceAdded(device) => device.write_to_bytes(),
            Self::DeviceRemoved(removed) => removed.write_to_bytes(),
            Self::CpusResized(cpus) => cpus.write_to_bytes(),
            Self::MemoryResized(memory) => memory.write_to_bytes(),
            Self::ResourcesUpdated(updated) => updated.write_to_bytes(),
            Self::DeviceUpdated(device) => device.write_to_bytes(),
            Self::Operation(operation) => operation.write_to_bytes(),
            Self::Operations(operations) => operations.write_to_bytes(),
            Self::Console(_) => return Ok(Vec::new()),
            Self::VmCapabilities(capabilities) => capabilities.write_to_bytes(),
            Self::VmProperties(properties) => properties.write_to_bytes(),
        };
        encoded.map_err(|error| RpcStatus::internal(format!("cannot encode the reply: {error}")))
    }

    /// The response message of `vmservice.VM`: most are empty, whatever was done.
    pub(super) fn encode_for_vm(&self) -> Result<Vec<u8>, RpcStatus> {
        match self {
            Self::VmCapabilities(_) | Self::VmProperties(_) => self.encode(),
            _ => Ok(Vec::new()),
        }
    }
}

type Outcome = Result<ApiResponse, RpcStatus>;

/// Why the machine ended, once it has: with it ends the process.
static END: OnceLock<String> = OnceLock::new();

/// Notes why the machine ended, for those whose requests are not answered any more.
pub fn note_end(why: &str) {
    let _ = END.set(why.to_owned());
}

/// Why the machine ended, as the end of a line; empty: it has not, or nobody has said.
pub(super) fn end_told() -> String {
    END.get().map(|why| format!(": {why}")).unwrap_or_default()
}

fn gone() -> RpcStatus {
    RpcStatus::new(Code::Aborted, format!("the machine is gone{}", end_told()))
}

/// The right, and the duty, to answer one request. May be completed on any thread; if it
/// is dropped instead, the client is told that the machine is gone.
pub struct ReplyHandle {
    sink: Option<Box<dyn FnOnce(Outcome) + Send>>,
    abandoned: Arc<AtomicBool>,
    deadline: Instant,
}

impl ReplyHandle {
    /// A handle that passes the answer to `sink`, for a caller inside the VMM.
    pub fn new(deadline: Instant, sink: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self {
            sink: Some(Box::new(sink)),
            abandoned: Arc::new(AtomicBool::new(false)),
            deadline,
        }
    }

    /// Answers. Never blocks.
    pub fn complete(mut self, outcome: Outcome) {
        self.send(outcome);
    }

    /// Nobody waits for the answer any more: the client hung up or its deadline passed. A
    /// request that has not been begun need not be.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// When the client is told that it took too long.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    fn send(&mut self, outcome: Outcome) {
        if let Some(sink) = self.sink.take() {
            sink(outcome);
        }
    }
}

impl Drop for ReplyHandle {
    fn drop(&mut self) {
        self.send(Err(gone()));
    }
}

impl std::fmt::Debug for ReplyHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplyHandle")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Which call of which connection an answer belongs to. Neither number is used twice, so
/// an answer that comes too late meets nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallKey {
    pub(super) connection: u64,
    pub(super) stream_id: u32,
    pub(super) call: u64,
}

/// An answer on its way to the `api` thread.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) key: CallKey,
    pub(super) outcome: Outcome,
}

/// Answers that the `api` thread has yet to send, and how many more may come.
pub(super) struct Replies {
    queue: Mutex<Vec<Completion>>,
    bell: Arc<EventFd>,
    /// Handles that exist: those of clients long gone count until they are completed, or
    /// a client could fill the manager's queue by giving up again and again.
    outstanding: AtomicUsize,
    /// Of these, what readers ask devices.
    asking: AtomicUsize,
}

/// Requests of readers that devices have to answer: an operator's never wait behind more.
const MOST_ASKING: usize = 2;

impl Replies {
    pub(super) fn new(bell: Arc<EventFd>) -> Self {
        Self {
            queue: Mutex::new(Vec::new()),
            bell,
            outstanding: AtomicUsize::new(0),
            asking: AtomicUsize::new(0),
        }
    }

    /// A handle for a call; `None` when `most` or more are unanswered, or, where a reader asks
    /// a device (`asks`), when others do. Called on `api` only.
    pub(super) fn handle(
        self: &Arc<Self>,
        key: CallKey,
        deadline: Instant,
        abandoned: Arc<AtomicBool>,
        most: usize,
        asks: bool,
    ) -> Option<ReplyHandle> {
        // Only this thread adds, so between the check and the addition it can only shrink.
        if self.outstanding.load(Ordering::Acquire) >= most {
            return None;
        }
        if asks && self.asking.load(Ordering::Acquire) >= MOST_ASKING {
            return None;
        }
        self.asking.fetch_add(usize::from(asks), Ordering::AcqRel);
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        let replies = Arc::clone(self);
        let sink = move |outcome| {
            {
                let mut queue = replies.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.push(Completion { key, outcome });
            }
            replies.outstanding.fetch_sub(1, Ordering::AcqRel);
            replies
                .asking
                .fetch_sub(usize::from(asks), Ordering::AcqRel);
            // Private to this process and non-blocking: at worst it is readable already.
            let _ = replies.bell.write(1);
        };
        Some(ReplyHandle {
            sink: Some(Box::new(sink)),
            abandoned,
            deadline,
        })
    }

    /// Wakes the `api` thread.
    pub(super) fn bell(&self) -> &Arc<EventFd> {
        &self.bell
    }

    /// The answers that have come.
    pub(super) fn take(&self) -> Vec<Completion> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
