//! virtio-blk (virtio 1.2, 5.2) as a process of its own, over vhost-user.
//!
//! `main` opens or inherits the disk ([`disk`]), chooses an engine and hands a
//! [`device::Block`] to the runtime. Each queue's worker takes chains from its ring, reads
//! them as requests ([`request`]), and moves data by [`transfer`]s that its engine
//! ([`engine_uring`], [`engine_plain`]) carries out.

pub mod backing;
pub mod cli;
pub mod config;
pub mod device;
pub mod disk;
pub mod disk_options;
pub mod engine_plain;
pub mod engine_uring;
pub mod host;
pub mod image;
pub mod image_chain;
pub mod image_io;
pub mod look;
pub mod qcow2_header;
pub mod qcow2_journal;
pub mod qcow2_map;
pub mod qcow2_overlay;
pub mod qcow2_store;
pub mod queue;
pub mod request;
pub mod transfer;
mod uring_entries;
pub mod vectored;
