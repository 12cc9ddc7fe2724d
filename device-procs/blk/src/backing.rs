//! What a disk in an image format is to the engine that serves it.
//!
//! A raw file or block device is served by [`crate::engine_uring`] or
//! [`crate::engine_plain`] directly. A format is served by the plain engine's loop, one
//! request after another on each queue's worker thread, which calls these methods; so an
//! implementation locks what its queues share. Made before confinement, by
//! [`crate::disk::Disk::open`].

use std::fmt;
use std::io;

use crate::transfer::{Direction, Step};

/// A disk in an image format.
pub trait Image: fmt::Debug + Send + Sync {
    /// The disk's size in bytes, as the guest sees it.
    fn size(&self) -> u64;

    /// Does one step of a transfer, or its first part; how many bytes of it. The step lies
    /// on the disk as large as it was when the request was taken. With `durable`, what was
    /// written is on stable storage afterwards.
    ///
    /// # Errors
    /// What the host said: the guest is told VIRTIO_BLK_S_IOERR.
    fn transfer(&self, direction: Direction, step: &Step, durable: bool) -> io::Result<u32>;

    /// Makes everything that was written durable. Not called with cache=unsafe.
    ///
    /// # Errors
    /// As for [`Self::transfer`].
    fn flush(&self) -> io::Result<()>;

    /// Whether [`Self::discard`] may be offered.
    fn can_discard(&self) -> bool;

    /// The guest needs the content of this range no longer. Bounds are whole sectors.
    ///
    /// # Errors
    /// As for [`Self::transfer`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// From now on this range reads as zeros; with `unmap` its space may be given back.
    /// Bounds are whole sectors.
    ///
    /// # Errors
    /// As for [`Self::transfer`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger, on the main thread, while the queues are being served.
    ///
    /// # Errors
    /// The disk is as it was.
    fn grow(&self, size: u64) -> io::Result<()>;
}
