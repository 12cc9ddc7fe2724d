//! The disk as the queues serve it: opened or inherited, looked at once, before confinement.
//! Made by the main thread; the workers share it. What changes while they run (size, cache
//! mode, limits) is atomic.

use std::fs::{File, FileType, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_runtime::limit::Limiter;
use bulkhead_runtime::sys;

use crate::backing::Backing;
use crate::config::{F_CONFIG_WCE, F_FLUSH};
use crate::disk_options::{Cache, DiskOptions, DiskSource, Format};
use crate::host::{self, SECTOR};
pub use crate::host::{Alignment, Topology};
use crate::image;
use crate::request::ID_BYTES;

/// How long a lock may be held that another process should have let go.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Why a disk cannot be served: one line with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("disk {name}: cannot open: {source}{remedy}")]
    Open {
        /// Path or fd.
        name: String,
        /// The kernel's answer.
        source: std::io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// Neither a regular file nor a block device.
    #[error("disk {name}: is {what}; give an image file or a block device")]
    Kind {
        /// Path or fd.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// Not even one sector.
    #[error(
        "disk {name}: has {len} bytes, less than one sector of {sector}; enlarge it (truncate -s)"
    )]
    Short {
        /// Path or fd.
        name: String,
        /// Its length.
        len: u64,
        /// The sector size.
        sector: u64,
    },
    /// The descriptor does not allow what the options ask for.
    #[error("disk {name}: is open for reading only; add readonly=on or open it for writing")]
    ReadOnly {
        /// Path or fd.
        name: String,
    },
    /// O_DIRECT was demanded.
    #[error("disk {name}: the file system has no O_DIRECT; leave out direct=on")]
    NoDirect {
        /// Path or fd.
        name: String,
    },
    /// Larger than it may be.
    #[error("disk {name}: has {len} bytes, more than max-size={max}; raise max-size")]
    TooLarge {
        /// Path or fd.
        name: String,
        /// Its length.
        len: u64,
        /// What it may have.
        max: u64,
    },
    /// Another process uses it.
    #[error("disk {name}: is in use by another process, which locked it; {remedy}")]
    Locked {
        /// Path or fd.
        name: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Its file system cannot lock.
    #[error("disk {name}: cannot be locked: {source}; add lock=off if nobody else uses it")]
    NoLocks {
        /// Path or fd.
        name: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// What requests are judged by, beside the size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block size told to the guest: requests are multiples of it.
    pub block_size: u32,
    /// Writes are refused.
    pub readonly: bool,
    /// What GET_ID answers.
    pub serial: [u8; ID_BYTES],
    /// How the host likes to be used.
    pub topology: Topology,
}

/// What is done about a range that shall be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOp {
    /// The content is needed no longer.
    Discard,
    /// It shall read as zeros.
    Zero,
    /// It shall read as zeros, and its space may be given back.
    ZeroUnmap,
    /// Nobody shall be able to read it any more, from the medium itself.
    SecureErase,
}

/// How a raw disk does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeHow {
    /// FALLOC_FL_PUNCH_HOLE
    Punch,
    /// FALLOC_FL_ZERO_RANGE
    ZeroRange,
    /// BLKSECDISCARD
    SecureErase,
    /// By writing zeros.
    Write,
    /// Not at all.
    Ignore,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    /// Where its content is.
    pub backing: Backing,
    /// What requests are judged by.
    pub geometry: Geometry,
    /// Set when the file is open with O_DIRECT.
    pub direct: Option<Alignment>,
    /// Whether it is a regular file (RLIMIT_FSIZE applies).
    pub regular: bool,
    /// Whether its content is in memory: an I/O never waits.
    pub in_memory: bool,
    /// Limits of all queues together.
    pub limiter: Limiter,
    /// What becomes of written data.
    pub cache: Cache,
    /// Most bytes that the file may have.
    pub max_size: Option<u64>,
    sectors: AtomicU64,
    /// The driver's choice, while it has one (VIRTIO_BLK_F_CONFIG_WCE).
    writeback: AtomicBool,
    /// It is being pulled out: requests fail.
    pulled: AtomicBool,
    /// Discard is offered: what was offered once stays so.
    discard: bool,
    /// Secure erase is offered.
    secure_erase: bool,
    punch: AtomicBool,
    zero: AtomicBool,
}

impl Disk {
    /// A disk of `sectors` over `backing`, with everything else as plain as can be.
    pub fn new(backing: Backing, geometry: Geometry, sectors: u64) -> Self {
        Self {
            backing,
            geometry,
            direct: None,
            regular: true,
            in_memory: false,
            limiter: Limiter::default(),
            cache: Cache::None,
            max_size: None,
            sectors: AtomicU64::new(sectors),
            writeback: AtomicBool::new(true),
            pulled: AtomicBool::new(false),
            discard: false,
            secure_erase: false,
            punch: AtomicBool::new(false),
            zero: AtomicBool::new(true),
        }
    }

    /// The same disk, which gives space back.
    #[must_use]
    pub fn with_discard(mut self) -> Self {
        self.discard = true;
        self.punch = AtomicBool::new(true);
        self
    }

    /// Opens or takes over the disk that the options describe. What is in an image is not
    /// looked at yet.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        let name = options.source.to_string();
        let top = open_source(&options.source, options, options.readonly)?;
        let block_size = top.block_size();
        let block = u64::from(block_size);
        if let Some(max) = options.max_size
            && top.len > max
        {
            let len = top.len;
            return Err(DiskError::TooLarge { name, len, max });
        }
        let geometry = Geometry {
            block_size,
            readonly: options.readonly,
            serial: options.serial,
            topology: top.topology,
        };
        let (direct, regular, len) = (top.direct, top.regular, top.len);
        let by_path = matches!(options.source, DiskSource::Path(_));
        let mut disk = match options.format {
            Format::Raw if len < block => {
                return Err(DiskError::Short {
                    name,
                    len,
                    sector: block,
                });
            }
            Format::Raw => {
                let rest = len % block;
                if rest != 0 {
                    log::warn!(
                        "{name}: its last {rest} bytes are not served: a sector has {block}"
                    );
                }
                let discard = !options.readonly && host::can_punch(&top.file, len, !regular);
                let in_memory = host::in_memory(&top.file);
                let secure_erase = !options.readonly
                    && !regular
                    && options.secure_erase.unwrap_or(by_path)
                    && host::can_secure_erase(&top.file);
                let mut disk = Self::new(Backing::Raw(top.file), geometry, 0);
                disk.sectors = AtomicU64::new(whole_sectors(len, block_size));
                disk.in_memory = in_memory;
                disk.secure_erase = secure_erase;
                if discard { disk.with_discard() } else { disk }
            }
            Format::Qcow2 => {
                let mut chain = vec![(name, top)];
                for source in &options.backing {
                    let file = open_source(source, options, true)?;
                    chain.push((source.to_string(), file));
                }
                let geometry = Geometry {
                    block_size: SECTOR,
                    ..geometry
                };
                let image = image::qcow2(chain, options);
                Self::new(Backing::Image(image), geometry, 0)
            }
        };
        disk.direct = direct;
        disk.regular = regular;
        disk.cache = options.cache;
        disk.max_size = options.max_size;
        disk.limiter = Limiter::new(options.bytes, options.operations, Instant::now());
        Ok(disk)
    }

    /// Capacity in sectors of 512 bytes.
    #[inline]
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// From now on the disk is this large.
    pub fn set_size(&self, bytes: u64) {
        let sectors = whole_sectors(bytes, self.geometry.block_size);
        self.sectors.store(sectors, Ordering::Release);
    }

    /// Most bytes that the process may make a file have; None: no limit.
    pub fn file_limit(&self) -> Option<u64> {
        if !self.regular {
            return None;
        }
        if self.geometry.readonly {
            return Some(0);
        }
        self.max_size
    }

    /// The driver's choice of cache mode; true is writeback (5.2.5).
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }

    /// The disk is being pulled out: from now on every request that is taken fails, for good.
    pub fn pull(&self) {
        self.pulled.store(true, Ordering::Release);
    }

    /// Whether it is being pulled out.
    #[inline]
    pub fn is_pulled(&self) -> bool {
        self.pulled.load(Ordering::Acquire)
    }

    /// The cache mode as the driver reads it.
    pub fn writeback(&self) -> bool {
        self.cache != Cache::Writethrough && self.writeback.load(Ordering::Acquire)
    }

    /// Whether a write must be on stable storage when it completes, with these features
    /// accepted (5.2.6.2).
    #[inline]
    pub fn durable_writes(&self, features: u64) -> bool {
        match self.cache {
            Cache::Unsafe => false,
            Cache::Writethrough => true,
            Cache::None | Cache::Writeback if features & F_CONFIG_WCE != 0 => !self.writeback(),
            Cache::None | Cache::Writeback => features & F_FLUSH == 0,
        }
    }

    /// Whether there is anything to flush.
    #[inline]
    pub fn flushes(&self) -> bool {
        self.cache != Cache::Unsafe && !self.geometry.readonly && !self.in_memory
    }

    /// Whether discard is offered.
    pub fn discards(&self) -> bool {
        if self.geometry.readonly {
            return false;
        }
        match &self.backing {
            Backing::Raw(_) => self.discard,
            Backing::Image(image) => image.get().is_some_and(|i| i.can_discard()),
        }
    }

    /// Whether secure erase is offered.
    pub fn secure_erases(&self) -> bool {
        self.secure_erase
    }

    /// No more: what serves the disk cannot do it.
    pub fn without_secure_erase(&mut self) {
        self.secure_erase = false;
    }

    /// What a discard should be a multiple of, in bytes.
    pub fn discard_granularity(&self) -> u32 {
        let physical = self.geometry.topology.physical;
        let image = match &self.backing {
            Backing::Raw(_) => 0,
            Backing::Image(image) => image.get().map_or(0, |i| i.discard_granularity()),
        };
        physical.max(self.geometry.block_size).max(image)
    }

    /// How a raw disk empties a range now.
    pub fn how(&self, op: RangeOp) -> RangeHow {
        let punch = self.punch.load(Ordering::Relaxed);
        match op {
            RangeOp::Discard if punch => RangeHow::Punch,
            // A hint, which may be ignored.
            RangeOp::Discard => RangeHow::Ignore,
            RangeOp::ZeroUnmap if punch => RangeHow::Punch,
            // In no other way: the guest relies on it.
            RangeOp::SecureErase => RangeHow::SecureErase,
            _ if self.zero.load(Ordering::Relaxed) => RangeHow::ZeroRange,
            _ => RangeHow::Write,
        }
    }

    /// The host says that it cannot do it like this.
    pub fn cannot(&self, how: RangeHow) {
        match how {
            RangeHow::Punch => self.punch.store(false, Ordering::Relaxed),
            RangeHow::ZeroRange => self.zero.store(false, Ordering::Relaxed),
            RangeHow::Write | RangeHow::Ignore | RangeHow::SecureErase => {}
        }
    }
}

fn whole_sectors(bytes: u64, block_size: u32) -> u64 {
    let block = u64::from(block_size.max(SECTOR));
    (bytes / block).saturating_mul(block / u64::from(SECTOR))
}

/// An open file or block device.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: File,
    /// Its length in bytes.
    pub len: u64,
    /// What O_DIRECT asks for, if it is on.
    pub direct: Option<Alignment>,
    /// A regular file.
    pub regular: bool,
    /// How the host likes it to be used.
    pub topology: Topology,
}

impl Opened {
    fn block_size(&self) -> u32 {
        let direct = self.direct.map_or(0, |d| d.offset);
        SECTOR.max(direct).max(self.topology.logical)
    }
}

fn open_source(
    source: &DiskSource,
    options: &DiskOptions,
    readonly: bool,
) -> Result<Opened, DiskError> {
    let name = source.to_string();
    let (file, flags) = match source {
        DiskSource::Path(path) => open_path(path, options, readonly, &name)?,
        DiskSource::Fd(fd) => take_fd(*fd, &name)?,
    };
    let open_failed = |source| DiskError::Open {
        name: name.clone(),
        source,
        remedy: "",
    };
    let kind = file.metadata().map_err(open_failed)?.file_type();
    check_kind(kind, &name)?;
    if !readonly && flags & libc::O_ACCMODE != libc::O_RDWR {
        return Err(DiskError::ReadOnly { name });
    }
    let is_direct = flags & libc::O_DIRECT != 0;
    if options.direct == Some(true) && !is_direct && *source == options.source {
        return Err(DiskError::NoDirect { name });
    }
    if options.lock && matches!(source, DiskSource::Path(_)) {
        match host::lock(&file, !readonly, LOCK_PATIENCE) {
            Ok(true) => {}
            Ok(false) => {
                let remedy = if readonly {
                    "end that one, or serve it with readonly=on there too"
                } else {
                    "end that one, or serve it with readonly=on in both"
                };
                return Err(DiskError::Locked { name, remedy });
            }
            Err(source) => return Err(DiskError::NoLocks { name, source }),
        }
    }
    Ok(Opened {
        len: (&file).seek(SeekFrom::End(0)).map_err(open_failed)?,
        direct: is_direct.then(|| host::alignment(&file)),
        regular: kind.is_file(),
        topology: host::topology(&file, kind.is_block_device()),
        file,
    })
}

fn check_kind(kind: FileType, name: &str) -> Result<(), DiskError> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else {
        "neither a file nor a block device"
    };
    Err(DiskError::Kind {
        name: name.into(),
        what,
    })
}

fn open_path(
    path: &Path,
    options: &DiskOptions,
    readonly: bool,
    name: &str,
) -> Result<(File, i32), DiskError> {
    // Before the open, which would wait for a FIFO's other end.
    let kind = std::fs::metadata(path).map(|meta| meta.file_type());
    if let Ok(kind) = kind {
        check_kind(kind, name)?;
    }
    let block_device = kind.is_ok_and(|k| k.is_block_device());
    let open = |extra: i32| {
        OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(extra | libc::O_NOCTTY)
            .open(path)
    };
    let failed = |source: std::io::Error| {
        let remedy = match source.raw_os_error() {
            Some(libc::ENOENT) => "; make it first (truncate -s SIZE FILE)",
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if !readonly => {
                "; make it writable or add readonly=on"
            }
            Some(libc::EACCES | libc::EPERM) => "; make it readable for this user",
            Some(libc::EBUSY | libc::ETXTBSY) => "; something else holds it",
            _ => "",
        };
        DiskError::Open {
            name: name.into(),
            source,
            remedy,
        }
    };
    let access = if readonly {
        libc::O_RDONLY
    } else {
        libc::O_RDWR
    };
    // An image's files are read and written in pieces of the format's choice.
    let default = options.cache == Cache::None && options.format == Format::Raw;
    if options.direct.unwrap_or(default) {
        match open(libc::O_DIRECT) {
            // A block size that would change what the guest sees is not chosen silently,
            // unless it is the device's own.
            Ok(file)
                if options.direct.is_some()
                    || block_device
                    || host::alignment(&file).offset <= SECTOR =>
            {
                return Ok((file, access | libc::O_DIRECT));
            }
            Err(e) if e.raw_os_error() != Some(libc::EINVAL) => return Err(failed(e)),
            _ if options.direct.is_some() => {
                return Err(DiskError::NoDirect { name: name.into() });
            }
            _ => {}
        }
    }
    Ok((open(0).map_err(failed)?, access))
}

fn take_fd(fd: RawFd, name: &str) -> Result<(File, i32), DiskError> {
    let failed = |source| DiskError::Open {
        name: name.into(),
        source,
        remedy: "; start this program through bulkhead, or give path=FILE",
    };
    let file: File = sys::take_inherited(fd).map_err(failed)?.into();
    let flags = sys::status_flags(file.as_fd()).map_err(failed)?;
    Ok((file, flags))
}
