//! io_uring rings that can do no more than they must: io_uring_register(2),
//! IORING_REGISTER_RESTRICTIONS.
//!
//! seccomp does not see what a ring is asked to do, so the ring itself must refuse. A ring is
//! created disabled, its files are registered, the operations it will take are listed, and only
//! then is it enabled; from there on the kernel answers EACCES to any other operation, to one
//! on a descriptor that is not registered, and to any registration but FILES_UPDATE (by which
//! a kick eventfd that arrives later gets into the table).
//!
//! Called on the worker thread that will submit (the ring is bound to the thread that enables
//! it), before the seccomp filter, which knows no io_uring_setup.

use io_uring::register::Restriction;
use io_uring::{IoUring, squeue};
use std::io;
use std::os::fd::RawFd;
use thiserror::Error;

/// IORING_REGISTER_FILES_UPDATE of linux/io_uring.h.
const REGISTER_FILES_UPDATE: u8 = 6;

/// What a ring is for.
#[derive(Clone, Copy, Debug)]
pub struct RingSpec<'a> {
    /// Submission entries; the completion ring has twice as many.
    pub entries: u32,
    /// The operations it takes (`io_uring::opcode::Read::CODE` and its like).
    pub opcodes: &'a [u8],
    /// Descriptors registered from the start, at index 0 and on.
    pub files: &'a [RawFd],
    /// Empty places after them, for [`IoUring::submitter`]'s `register_files_update`.
    pub spare_files: u32,
}

/// A restricted ring, enabled. It can wait for a time (IORING_FEAT_EXT_ARG).
pub struct RestrictedRing {
    /// Every entry must carry `squeue::Flags::FIXED_FILE`, may carry `SKIP_SUCCESS` where
    /// the ring is [`Self::quiet`], and no other flag.
    pub ring: IoUring,
    /// Entries may ask for no completion unless they fail. False before Linux 5.17.
    pub quiet: bool,
    /// Completions are posted only while this thread waits in `io_uring_enter`
    /// (IORING_SETUP_DEFER_TASKRUN): always wait with GETEVENTS. False before Linux 6.1.
    pub deferred: bool,
    /// Size of the table of registered files.
    pub files: u32,
}

/// Why there is no ring. The caller serves with preadv2 and pwritev2 instead when
/// [`UringError::is_unavailable`].
#[derive(Debug, Error)]
#[error("io_uring: {what}: {source}")]
pub struct UringError {
    /// What was attempted.
    pub what: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

impl UringError {
    /// This host has no io_uring for this process, or none that can be restricted.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EINVAL | libc::ENOMEM)
        )
    }
}

/// Whether this process may have restricted rings, tried by making one.
///
/// # Errors
/// Why it may not: `kernel.io_uring_disabled`, a filter around this process, an old kernel.
pub fn available() -> Result<(), UringError> {
    restricted(&RingSpec {
        entries: 1,
        opcodes: &[io_uring::opcode::Nop::CODE],
        files: &[],
        spare_files: 1,
    })
    .map(drop)
}

/// Creates a ring on the calling thread, registers its files and its restrictions, enables it.
///
/// # Errors
/// The kernel refused a step; nothing is left behind.
pub fn restricted(spec: &RingSpec<'_>) -> Result<RestrictedRing, UringError> {
    let (ring, deferred) = create(spec.entries)?;
    if !ring.params().is_feature_ext_arg() {
        return Err(UringError {
            what: "waiting for a time (Linux 5.11 or later)",
            source: io::Error::from_raw_os_error(libc::ENOSYS),
        });
    }
    let quiet = ring.params().is_feature_skip_cqe_on_success();
    let submitter = ring.submitter();

    let spare = usize::try_from(spec.spare_files).unwrap_or(usize::MAX);
    let total = spec.files.len().saturating_add(spare);
    let files = u32::try_from(total).map_err(|_| UringError {
        what: "registering files",
        source: io::Error::from_raw_os_error(libc::EMFILE),
    })?;
    if files > 0 {
        // -1 is an empty place.
        let mut table = spec.files.to_vec();
        table.resize(total, -1);
        submitter
            .register_files(&table)
            .map_err(|source| UringError {
                what: "registering files",
                source,
            })?;
    }

    let mut restrictions: Vec<Restriction> = spec
        .opcodes
        .iter()
        .map(|code| Restriction::sqe_op(*code))
        .collect();
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let skip = if quiet {
        squeue::Flags::SKIP_SUCCESS.bits()
    } else {
        0
    };
    restrictions.push(Restriction::sqe_flags_allowed(fixed | skip));
    restrictions.push(Restriction::sqe_flags_required(fixed));
    restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    restrict(&submitter, &mut restrictions)?;
    submitter
        .register_enable_rings()
        .map_err(|source| UringError {
            what: "enabling the ring",
            source,
        })?;
    Ok(RestrictedRing {
        ring,
        quiet,
        deferred,
        files,
    })
}

/// Creates a ring on the calling thread that can wait for any descriptor of this process and
/// do nothing else: what ppoll(2) can do.
///
/// # Errors
/// The kernel refused a step; nothing is left behind.
pub fn polling(entries: u32) -> Result<IoUring, UringError> {
    let (ring, _) = create(entries)?;
    let mut restrictions = [
        Restriction::sqe_op(io_uring::opcode::PollAdd::CODE),
        Restriction::sqe_op(io_uring::opcode::PollRemove::CODE),
    ];
    let submitter = ring.submitter();
    restrict(&submitter, &mut restrictions)?;
    submitter
        .register_enable_rings()
        .map_err(|source| UringError {
            what: "enabling the ring",
            source,
        })?;
    Ok(ring)
}

fn restrict(
    submitter: &io_uring::Submitter<'_>,
    restrictions: &mut [Restriction],
) -> Result<(), UringError> {
    if crate::confine::UNCONFINED {
        return Ok(());
    }
    submitter
        .register_restrictions(restrictions)
        .map_err(|source| UringError {
            what: "registering restrictions (Linux 5.10 or later)",
            source,
        })
}

/// Newest set of features first; an older kernel says EINVAL to a flag that it does not know.
fn create(entries: u32) -> Result<(IoUring, bool), UringError> {
    let newest = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries);
    let oldest = match newest {
        Ok(ring) => return Ok((ring, true)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(entries),
        Err(e) => Err(e),
    };
    oldest
        .map(|ring| (ring, false))
        .map_err(|source| UringError {
            what: "creating a ring (is kernel.io_uring_disabled set?)",
            source,
        })
}
