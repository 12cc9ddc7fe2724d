//! The file or block device behind the disk: opened or inherited, looked at once, before
//! confinement. Called by the main thread; the workers then share it unchanged.

#![allow(unsafe_code)] // statx, for what O_DIRECT wants, has no safe wrapper

use std::fs::{File, FileType, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use bulkhead_runtime::sys;

use crate::cli::{DiskOptions, DiskSource};
use crate::request::ID_BYTES;
use crate::vectored;

const SECTOR: u64 = 512;
const PAGE: u32 = 4096;

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
    #[error("disk {name}: is {what}; give a raw image file or a block device")]
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
}

/// What requests are judged by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size told to the guest: requests are multiples of it.
    pub block_size: u32,
    /// Writes are refused.
    pub readonly: bool,
    /// What GET_ID answers.
    pub serial: [u8; ID_BYTES],
}

/// What O_DIRECT asks of buffers and lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of buffers in memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub offset: u32,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    /// The file.
    pub file: File,
    /// What requests are judged by.
    pub geometry: Geometry,
    /// Set when the file is open with O_DIRECT.
    pub direct: Option<Alignment>,
    /// Whether it is a regular file (RLIMIT_FSIZE applies).
    pub regular: bool,
}

impl Disk {
    /// Opens or takes over the disk that the options describe.
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        let name = options.source.to_string();
        let (file, flags) = match &options.source {
            DiskSource::Path(path) => open_path(path, options, &name)?,
            DiskSource::Fd(fd) => take_fd(*fd, &name)?,
        };
        let open_failed = |source| DiskError::Open {
            name: name.clone(),
            source,
            remedy: "",
        };
        let meta = file.metadata().map_err(open_failed)?;
        let kind = meta.file_type();
        check_kind(kind, &name)?;
        if !options.readonly && flags & libc::O_ACCMODE != libc::O_RDWR {
            return Err(DiskError::ReadOnly { name });
        }
        let direct = (flags & libc::O_DIRECT != 0).then(|| alignment(&file));
        let block_size = direct.map_or(SECTOR as u32, |d| d.offset.max(SECTOR as u32));
        let len = (&file).seek(SeekFrom::End(0)).map_err(open_failed)?;
        let block = u64::from(block_size);
        if len < block {
            return Err(DiskError::Short {
                name,
                len,
                sector: block,
            });
        }
        Ok(Self {
            geometry: Geometry {
                sectors: (len / block) * (block / SECTOR),
                block_size,
                readonly: options.readonly,
                serial: options.serial,
            },
            direct,
            regular: kind.is_file(),
            file,
        })
    }
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

fn open_path(path: &Path, options: &DiskOptions, name: &str) -> Result<(File, i32), DiskError> {
    // Before the open, which would wait for a FIFO's other end.
    if let Ok(meta) = std::fs::metadata(path) {
        check_kind(meta.file_type(), name)?;
    }
    let open = |extra: i32| {
        OpenOptions::new()
            .read(true)
            .write(!options.readonly)
            .custom_flags(extra | libc::O_NOCTTY)
            .open(path)
    };
    let failed = |source: std::io::Error| {
        let remedy = match source.raw_os_error() {
            Some(libc::ENOENT) => "; make it first (truncate -s SIZE FILE)",
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if !options.readonly => {
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
    let access = if options.readonly {
        libc::O_RDONLY
    } else {
        libc::O_RDWR
    };
    if options.direct != Some(false) {
        match open(libc::O_DIRECT) {
            // A block size that would change what the guest sees is not chosen silently.
            Ok(file) if options.direct.is_some() || alignment(&file).offset <= SECTOR as u32 => {
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

/// What O_DIRECT wants of this file: as statx tells (Linux 6.1), or by trying.
fn alignment(file: &File) -> Alignment {
    // SAFETY: an all-zero statx is valid, and only a place to write to.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, which AT_EMPTY_PATH allows; st is live.
    let r = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut st,
        )
    };
    let told = Alignment {
        memory: st.stx_dio_mem_align,
        offset: st.stx_dio_offset_align,
    };
    let sane = |a: u32| a.is_power_of_two() && a <= 1 << 16;
    if r == 0 && st.stx_mask & libc::STATX_DIOALIGN != 0 && sane(told.memory) && sane(told.offset) {
        return told;
    }
    let mut store = vec![0u8; 3 * PAGE as usize];
    let skip = store.as_ptr().align_offset(PAGE as usize);
    let small = SECTOR as u32;
    for (memory, offset) in [(small, small), (PAGE, small)] {
        // A buffer at a multiple of `memory` and of nothing larger.
        let start = skip.saturating_add(if memory == PAGE { 0 } else { memory as usize });
        let end = start.saturating_add(offset as usize);
        let Some(buffer) = store.get_mut(start..end) else {
            break;
        };
        if vectored::read(file, buffer, 0).is_ok() {
            return Alignment { memory, offset };
        }
    }
    Alignment {
        memory: PAGE,
        offset: PAGE,
    }
}

impl std::fmt::Display for DiskSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}
