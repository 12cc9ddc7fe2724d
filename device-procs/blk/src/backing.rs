//! Where a disk's content is: a raw file or block device, or an image in a format.
//!
//! A raw one is served by [`crate::engine_uring`] or [`crate::engine_plain`] directly. A
//! format is served by the plain engine's loop, one request after another on each queue's
//! worker thread, which calls [`Image`]'s methods; so an implementation locks what its
//! queues share. Its files are opened before confinement; what is in them is an attacker's
//! and is looked at only when the process has given up its privileges
//! ([`Formatted::open`]).

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use bulkhead_runtime::inflight::KeptMemory;

use crate::transfer::{Direction, Step};

/// Looks at an image for the first time.
pub type Opener = Box<dyn FnOnce() -> Result<Box<dyn Image>, String> + Send>;

/// Where a disk's content is.
#[derive(Debug)]
pub enum Backing {
    /// In a file or block device, byte for byte.
    Raw(File),
    /// In an image.
    Image(Formatted),
}

/// An image, which is opened after confinement has begun.
pub struct Formatted {
    opener: Mutex<Option<Opener>>,
    image: OnceLock<Box<dyn Image>>,
    kept_bytes: u64,
}

impl Formatted {
    /// An image that `opener` will open, and that has so much for its successor to find.
    pub fn new(opener: Opener, kept_bytes: u64) -> Self {
        Self {
            opener: Mutex::new(Some(opener)),
            image: OnceLock::new(),
            kept_bytes,
        }
    }

    /// Opens it, unless it is open.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn open(&self) -> Result<(), String> {
        let mut opener = self.opener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = opener.take() {
            let image = open()?;
            self.image.get_or_init(|| image);
        }
        Ok(())
    }

    /// Bytes that outlive this process, if the front-end keeps them.
    pub fn kept_bytes(&self) -> u64 {
        self.kept_bytes
    }

    /// The image, once it is open.
    pub fn get(&self) -> Option<&dyn Image> {
        self.image.get().map(AsRef::as_ref)
    }
}

impl fmt::Debug for Formatted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Formatted").field(&self.image).finish()
    }
}

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

    /// A queue stops: what waits in this process is written, so that nothing is lost or
    /// leaked if it ends.
    ///
    /// # Errors
    /// As for [`Self::transfer`].
    fn settle(&self) -> io::Result<()>;

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

    /// What a discard must be a multiple of to give space back, in bytes.
    fn discard_granularity(&self) -> u32;

    /// From now on, what completed requests need to be found again is kept there too: the
    /// memory outlives this process. What another process left there is taken over first.
    /// Called on the main thread while no queue is being served.
    ///
    /// # Errors
    /// One line.
    fn keep(&self, memory: KeptMemory) -> Result<(), String>;

    /// Makes the disk larger, on the main thread, while the queues are being served.
    ///
    /// # Errors
    /// The disk is as it was.
    fn grow(&self, size: u64) -> io::Result<()>;
}
