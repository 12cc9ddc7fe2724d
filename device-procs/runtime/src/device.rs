//! What a device kind is to the runtime. A new kind is one crate that implements
//! [`Device`] and calls [`crate::serve`].

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::{
    FinishRequestRequest, StatsResponse, TakeRequestResponse, UpdateRequest,
};

use crate::inflight::KeptMemory;
use crate::mailbox::WorkerPort;

/// VIRTIO_F_INDIRECT_DESC
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1
pub const F_VERSION_1: u64 = 1 << 32;
/// VHOST_USER_F_PROTOCOL_FEATURES
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// What a worker thread runs. It prepares all that needs system calls which confinement
/// will forbid, says "prepared" by the given call, and serves until it is told to exit.
pub type Worker = Box<dyn FnOnce(Prepared) + Send>;

/// How a worker tells the main thread that its preparations are over. Not by a channel of the
/// library's: where its ends meet at one moment they make a system call more, sched_yield.
#[derive(Debug)]
pub struct Prepared(pub(crate) Arc<Preparation>);

/// What a worker has said.
#[derive(Debug, Default)]
pub(crate) struct Preparation {
    said: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
}

impl Preparation {
    fn say(&self, result: Result<(), String>) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        // The first word counts.
        said.get_or_insert(result);
        drop(said);
        self.changed.notify_all();
    }

    /// Waits for the worker's word.
    pub(crate) fn wait(&self, limit: Duration) -> Result<(), String> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut said, _) = self
            .changed
            .wait_timeout_while(said, limit, |said| said.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        said.take()
            .unwrap_or_else(|| Err("the worker does not get ready".into()))
    }
}

impl Prepared {
    /// Everything is in place; the process may be confined now.
    pub fn ready(self) {
        self.0.say(Ok(()));
    }

    /// Nothing can be served; the process ends with this line.
    pub fn failed(self, why: String) {
        self.0.say(Err(why));
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.0.say(Err("the worker ended".into()));
    }
}

/// What came of [`Device::update`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// The configuration space changed: the driver is told.
    pub config_changed: bool,
}

/// A kind of virtio device, as one process serves it.
///
/// The main thread calls all methods, before any guest is connected or on behalf of the
/// front-end; workers share nothing with it but what they take along in [`Worker`].
pub trait Device: Send + Sync {
    /// "blk", "net", …
    fn kind(&self) -> &'static str;

    /// Version of the binary.
    fn version(&self) -> &'static str;

    /// "io_uring" or "preadv2".
    fn io_engine(&self) -> &'static str;

    /// The process has given up all that it will: the device looks at what it does not trust
    /// (the format of an image), before any channel is read. Features, configuration and
    /// requests are asked for only afterwards.
    ///
    /// # Errors
    /// One line with the remedy; the process ends with it.
    fn confined(&self) -> Result<(), String> {
        Ok(())
    }

    /// Bytes that the device wants to outlive its process, beside its requests in flight.
    /// Asked for before confinement.
    fn kept_bytes(&self) -> u64 {
        0
    }

    /// The memory for them, from the front-end: no ring is being served, and none will be
    /// before this returns. Called each time that a front-end hands it over.
    ///
    /// # Errors
    /// What a process before this one left cannot be used: one line. The front-end's message
    /// is refused.
    fn keep(&self, _memory: KeptMemory) -> Result<(), String> {
        Ok(())
    }

    /// The front-end goes: the memory that it gave to be kept is a successor's from now on,
    /// and what happens to this device afterwards is not to be seen in it.
    fn let_go(&self) {}

    /// The kind's own feature bits. The runtime adds what rings need: VERSION_1,
    /// INDIRECT_DESC, EVENT_IDX and vhost-user's protocol features.
    fn features(&self) -> u64;

    /// Number of queues.
    fn queues(&self) -> u16;

    /// The configuration space as it is now. Reads beyond its end are zeros.
    fn config(&self) -> Vec<u8>;

    /// The driver wrote to the configuration space; false if it may not.
    fn write_config(&self, _offset: u32, _data: &[u8]) -> bool {
        false
    }

    /// The driver accepted these features; no ring is being served. Called again when they
    /// change, and with 0 when the device is reset.
    fn accepted(&self, _features: u64) {}

    /// The VMM changes what may change while the device runs: all of it or, on an error,
    /// nothing. Workers are told to look again afterwards, and the driver that the
    /// configuration space has changed, if it has.
    ///
    /// # Errors
    /// UNIMPLEMENTED if there is nothing of the kind, INVALID_ARGUMENT with one line that
    /// names the field.
    fn update(&self, _request: &UpdateRequest) -> Result<Update, RpcStatus> {
        Err(RpcStatus::unimplemented("Device", "Update"))
    }

    /// The configuration space has changed by itself since this was asked last: the driver is
    /// told. Asked whenever the VMM looks at the device's health.
    fn take_changed(&self) -> bool {
        false
    }

    /// What the device serves the guest from is gone for good. Asked with its health.
    fn host_gone(&self) -> bool {
        false
    }

    /// The VMM lets the device take requests again: another process may have been started
    /// beside this one, and have changed what they share on the host.
    fn resumed(&self) {}

    /// The device wants something of the VMM, and nothing has come of it yet.
    fn asks(&self) -> bool {
        false
    }

    /// What it wants of the VMM; the same until [`Self::finish_request`].
    ///
    /// # Errors
    /// UNIMPLEMENTED: such a device never wants anything.
    fn take_request(&self) -> Result<TakeRequestResponse, RpcStatus> {
        Err(RpcStatus::unimplemented("Device", "TakeRequest"))
    }

    /// What came of it. Workers are told to look again afterwards.
    ///
    /// # Errors
    /// UNIMPLEMENTED, or INVALID_ARGUMENT: it did not want that.
    fn finish_request(&self, _request: &FinishRequestRequest) -> Result<(), RpcStatus> {
        Err(RpcStatus::unimplemented("Device", "FinishRequest"))
    }

    /// Adds what only this kind knows to its statistics, which hold each queue's counters.
    fn stats(&self, _stats: &mut StatsResponse) {}

    /// The worker of one queue; runs on a thread of its own.
    fn worker(&self, port: WorkerPort) -> io::Result<Worker>;

    /// How many queues, beginning with this one, share a thread: [`Self::shared_worker`]
    /// serves them if it is more than one.
    fn sharing(&self, _queue: u16) -> u16 {
        1
    }

    /// The worker of several queues on one thread.
    ///
    /// # Errors
    /// None of this kind share a thread.
    fn shared_worker(&self, _ports: Vec<WorkerPort>) -> io::Result<Worker> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// All that the runtime offers to a driver of this device.
pub(crate) fn offered_features(device: &Arc<dyn Device>) -> u64 {
    device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_PROTOCOL_FEATURES
}
