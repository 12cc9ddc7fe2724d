//! The console device as the runtime sees it. Called on the main thread.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::RpcStatus;
use bulkhead_proto::device::UpdateRequest;
use bulkhead_proto::device::update_request::Kind;
use bulkhead_runtime::device::{Device, Update, Worker};
use bulkhead_runtime::inflight::KeptMemory;
use bulkhead_runtime::mailbox::WorkerPort;

use crate::control::{Control, F_MULTIPORT, F_SIZE, Size, Traits};
use crate::port::Port;
use crate::worker;

/// One console device.
pub struct Console {
    control: Arc<Control>,
    /// Until there is a worker, which takes them.
    ports: Mutex<Vec<Port>>,
    count: u16,
    multiport: bool,
}

impl Console {
    /// A device with these ports. One console alone needs no messages about ports.
    pub fn new(ports: Vec<Port>, traits: Vec<Traits>) -> Self {
        Self {
            count: u16::try_from(ports.len()).unwrap_or(u16::MAX),
            multiport: ports.len() > 1 || traits.iter().any(|port| port.name.is_some()),
            control: Arc::new(Control::new(traits)),
            ports: Mutex::new(ports),
        }
    }
}

impl Device for Console {
    fn kind(&self) -> &'static str {
        "console"
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn io_engine(&self) -> &'static str {
        "none"
    }

    fn kept_bytes(&self) -> u64 {
        self.control.kept_bytes()
    }

    fn keep(&self, memory: KeptMemory) -> Result<(), String> {
        self.control.keep(memory);
        Ok(())
    }

    fn let_go(&self) {
        self.control.let_go();
    }

    fn features(&self) -> u64 {
        match self.multiport {
            true => F_SIZE | F_MULTIPORT,
            false => F_SIZE,
        }
    }

    fn queues(&self) -> u16 {
        let control = u16::from(self.multiport);
        self.count.saturating_add(control).saturating_mul(2)
    }

    /// cols u16, rows u16, max_nr_ports u32, emerg_wr u32
    fn config(&self) -> Vec<u8> {
        let size = self.control.size();
        let mut space = size.cols.to_le_bytes().to_vec();
        space.extend(size.rows.to_le_bytes());
        space.extend(u32::from(self.count).to_le_bytes());
        space.extend([0; 4]);
        space
    }

    fn accepted(&self, features: u64) {
        self.control.accepted(features);
    }

    fn update(&self, request: &UpdateRequest) -> Result<Update, RpcStatus> {
        let Some(Kind::Console(update)) = &request.kind else {
            return Err(RpcStatus::invalid_argument("kind: this is a console"));
        };
        let mut sizes = Vec::with_capacity(update.sizes.len());
        for size in &update.sizes {
            let (Ok(cols), Ok(rows)) = (u16::try_from(size.cols), u16::try_from(size.rows)) else {
                let line = "sizes: at most 65535 columns and rows";
                return Err(RpcStatus::invalid_argument(line));
            };
            let port = usize::try_from(size.port).unwrap_or(usize::MAX);
            self.control
                .check(port)
                .map_err(RpcStatus::invalid_argument)?;
            sizes.push((port, Size { cols, rows }));
        }
        let before = self.control.size();
        for (port, size) in sizes {
            self.control.resize(port, size);
        }
        Ok(Update {
            config_changed: self.control.size() != before,
        })
    }

    fn sharing(&self, _queue: u16) -> u16 {
        self.queues()
    }

    fn worker(&self, _port: WorkerPort) -> io::Result<Worker> {
        // All queues share a thread.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shared_worker(&self, ports: Vec<WorkerPort>) -> io::Result<Worker> {
        let mut taken = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let places = std::mem::take(&mut *taken);
        let control = Arc::clone(&self.control);
        let worker = worker::Worker::new(ports, places, control)
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Box::new(move |prepared| {
            prepared.ready();
            worker.run()
        }))
    }
}
