//! What Bulkhead's processes say to each other, and how the bytes are bounded.
//!
//! [`device`], [`launcher`], [`machine`] and [`vmservice`] are generated from `proto/*.proto`. The rest is
//! ttrpc without ttrpc's own servers and clients, which set no bounds: [`frame`] and
//! [`envelope`] read and write the wire without I/O, [`server::ControlServer`] is the
//! device's end of its control channel, [`AsyncClient`] the VMM's end, and
//! [`client::BlockingClient`] the same for the first call and for the CLI. The outward API server is the VMM's own, over the same frames.

// Generated: their documentation is the .proto files.
#[allow(
    missing_docs,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod async_client;
pub mod block_map;
pub mod client;
pub mod envelope;
pub mod frame;
pub mod outbox;
pub mod payload;
pub mod server;
pub mod status;
pub mod sys;

pub use async_client::{AsyncClient, AsyncLimits, Completion};
pub use block_map::BlockMap;
pub use client::{BlockingClient, ClientError, Subscription};
pub use generated::{common, device, launcher, machine, vmservice};
pub use protobuf;
pub use server::ControlServer;
pub use status::{Code, RpcStatus};

/// Full name of the service that a device process serves on its control channel.
pub const DEVICE_SERVICE: &str = "bulkhead.device.v1.Device";
/// Full name of the service that the VMM serves on its API socket.
pub const MACHINE_SERVICE: &str = "bulkhead.v1.Machine";
/// Full name of the service that Kata Containers' runtime calls, which the VMM serves on the
/// socket of `bulkhead --ttrpc`. (A code generator would write `vmservice.Vm`.)
pub const VM_SERVICE: &str = "vmservice.VM";

/// The reference implementation's generated clients and servers, to test against.
#[cfg(feature = "stubs")]
#[allow(
    missing_docs,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
pub mod stubs {
    pub use ttrpc;

    /// Blocking clients and servers.
    pub mod blocking {
        use crate::{device, machine};
        include!(concat!(env!("OUT_DIR"), "/sync/mod.rs"));
    }

    /// Clients and servers over tokio.
    pub mod asynchronous {
        use crate::{device, machine};
        include!(concat!(env!("OUT_DIR"), "/async/mod.rs"));
    }
}
