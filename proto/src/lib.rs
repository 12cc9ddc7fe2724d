//! What Bulkhead's processes say to each other, and how the bytes are bounded.
//!
//! [`device`], [`launcher`] and [`machine`] are generated from `proto/*.proto`.

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

pub use generated::{device, launcher, machine};
pub use protobuf;
