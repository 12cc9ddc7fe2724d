//! What the host's file or block device can do: found out once, before confinement, by the
//! main thread. The disk's description for the guest is made from it.

#![allow(unsafe_code)] // statx, ioctl, fstatfs, fallocate and fcntl have no safe wrappers

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::vectored;

/// Bytes of a sector, the unit of everything in virtio-blk.
pub const SECTOR: u32 = 512;
const PAGE: u32 = 4096;
/// Block sizes above this are not believed.
const MAX_BLOCK: u32 = 1 << 16;

// linux/magic.h
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// What O_DIRECT asks of buffers and lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of buffers in memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub offset: u32,
}

/// How the host likes to be used, in bytes; 0 where it says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Logical block: what a request must be a multiple of. 0 for a file.
    pub logical: u32,
    /// Physical block: smaller writes are slow.
    pub physical: u32,
    /// Smallest good transfer.
    pub min_io: u32,
    /// Best transfer.
    pub opt_io: u32,
    /// How far the first physical block is from the beginning.
    pub aligned_at: u32,
    /// Largest transfer that is not split. 0 for a file.
    pub max_io: u32,
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

fn sane(block: u32) -> bool {
    block.is_power_of_two() && block <= MAX_BLOCK
}

/// What O_DIRECT wants of this file: as statx tells (Linux 6.1), or by trying.
pub fn alignment(file: &File) -> Alignment {
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
    if r == 0 && st.stx_mask & libc::STATX_DIOALIGN != 0 && sane(told.memory) && sane(told.offset) {
        return told;
    }
    let mut store = vec![0u8; 3 * PAGE as usize];
    let skip = store.as_ptr().align_offset(PAGE as usize);
    for (memory, offset) in [(SECTOR, SECTOR), (PAGE, SECTOR)] {
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

fn block_ioctl(file: &File, request: libc::Ioctl) -> u32 {
    let mut value: libc::c_uint = 0;
    // SAFETY: these requests (BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT, BLKALIGNOFF) write one
    // int, BLKSECTGET a short; value is an int, of which a short is the lower half where zeros
    // are the upper one; on anything but a block device they fail.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
    if r == 0 { value } else { 0 }
}

/// The limits of a block device, or what a file's system says of it.
pub fn topology(file: &File, block_device: bool) -> Topology {
    const BLKSECTGET: libc::Ioctl = 0x1267;
    const BLKSSZGET: libc::Ioctl = 0x1268;
    const BLKIOMIN: libc::Ioctl = 0x1278;
    const BLKIOOPT: libc::Ioctl = 0x1279;
    const BLKALIGNOFF: libc::Ioctl = 0x127a;
    const BLKPBSZGET: libc::Ioctl = 0x127b;
    if block_device {
        let sane = |n: u32| if sane(n) { n } else { 0 };
        return Topology {
            logical: sane(block_ioctl(file, BLKSSZGET)),
            physical: sane(block_ioctl(file, BLKPBSZGET)),
            min_io: block_ioctl(file, BLKIOMIN),
            opt_io: block_ioctl(file, BLKIOOPT),
            // Minus one: parts of it are aligned in different ways.
            aligned_at: i32::try_from(block_ioctl(file, BLKALIGNOFF)).map_or(0, i32::unsigned_abs),
            max_io: block_ioctl(file, BLKSECTGET).saturating_mul(SECTOR),
        };
    }
    let block = bulkhead_runtime::sys::file_size(file).map_or(0, |(_, block)| block);
    let block = u32::try_from(block).ok().filter(|b| sane(*b)).unwrap_or(0);
    Topology {
        logical: 0,
        physical: block,
        min_io: block,
        ..Topology::default()
    }
}

/// Whether the file lies in memory: nothing in it is ever waited for, nothing of it is durable.
/// What a block device says of its file system is said of the one that its node lies in, which
/// is in memory (devtmpfs).
pub fn in_memory(file: &File) -> bool {
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return false;
    }
    // SAFETY: an all-zero statfs is valid, and only a place to write to.
    let mut st: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: st is live and is what the kernel fills.
    let r = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut st) };
    let magic = st.f_type as u64 & 0xffff_ffff;
    r == 0 && (magic == TMPFS_MAGIC || magic == RAMFS_MAGIC)
}

/// Gives a range's space back; what was there reads as zeros. Never makes the file larger.
///
/// # Errors
/// The kernel's answer.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, PUNCH, offset, len)
}

/// Makes a range read as zeros and keeps its space. Never makes the file larger.
///
/// # Errors
/// The kernel's answer.
pub fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, ZERO, offset, len)
}

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let arg =
        |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let (offset, len) = (arg(offset)?, arg(len)?);
    // SAFETY: no memory is involved.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a writable disk's space can be given back. A file is asked for a range beyond its
/// end, where there is nothing to lose. A block device cannot be asked without doing it: it
/// is believed, and says EOPNOTSUPP when it is tried.
pub fn can_punch(file: &File, len: u64, block_device: bool) -> bool {
    let page = u64::from(PAGE);
    block_device
        || len
            .checked_next_multiple_of(page)
            .is_some_and(|beyond| punch(file, beyond, page).is_ok())
}

/// Erases a range of a block device so that nobody can read it any more: from the medium, with
/// copies that the device may have made of it.
///
/// # Errors
/// The kernel's answer; EOPNOTSUPP where the device cannot.
pub fn secure_erase(file: &File, offset: u64, len: u64) -> io::Result<()> {
    const BLKSECDISCARD: libc::Ioctl = 0x127d;
    let range = [offset, len];
    // SAFETY: BLKSECDISCARD reads two u64 and writes nothing; on anything but a block device
    // it fails.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSECDISCARD, range.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether [`secure_erase`] works on what is open for writing here. Asked without erasing
/// anything: of a range that begins within a sector the kernel says EINVAL, but only once it
/// has seen that the device can do it (blk_ioctl_secure_erase; before Linux 5.19 any device
/// that discards passes for one, and says EOPNOTSUPP when it is tried).
pub fn can_secure_erase(file: &File) -> bool {
    secure_erase(file, 1, 0).is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
}

/// Locks the whole file (an open file description lock): to write it, or so that nobody
/// does. False if somebody else has it. QEMU's image locks conflict with it too.
///
/// The lock of a process that has ended may outlive it by a moment, because its rings are
/// taken down behind its back: so a lock that is held is tried again for as long as `patience`.
///
/// # Errors
/// The file system has no such locks.
pub fn lock(file: &File, write: bool, patience: Duration) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        if try_lock(file, write)? {
            return Ok(true);
        }
        if start.elapsed() >= patience {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn try_lock(file: &File, write: bool) -> io::Result<bool> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    // SAFETY: an all-zero flock is valid: from the beginning, whatever the length.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or(0);
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0);
    // SAFETY: F_OFD_SETLK reads one flock, and lock is one.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        e => Err(e),
    }
}

/// A write beyond the limit on the file's size fails, instead of ending the process.
pub fn survive_size_limit() {
    // SAFETY: SIG_IGN is no function of ours.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::FileExt;

    use bulkhead_runtime::sys::memfd;

    use super::*;

    #[test]
    fn ranges_of_a_file_in_memory_are_given_back_and_never_make_it_larger() {
        let file = memfd("disk").unwrap();
        file.write_all_at(&[7; 3 * PAGE as usize], 0).unwrap();
        let len = 3 * u64::from(PAGE);
        assert!(in_memory(&file));
        // Its node does; what it stands for is another matter.
        assert!(!in_memory(&File::open("/dev/null").unwrap()));
        assert!(can_punch(&file, len, false));
        punch(&file, u64::from(PAGE), 100 * u64::from(PAGE)).unwrap();
        let mut back = vec![1; len as usize];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back.iter().take(PAGE as usize).all(|b| *b == 7));
        assert!(back.iter().skip(PAGE as usize).all(|b| *b == 0));
        assert_eq!(file.metadata().unwrap().len(), len);
        // tmpfs has no ZERO_RANGE.
        assert_eq!(
            zero(&file, 0, 1).unwrap_err().raw_os_error(),
            Some(libc::EOPNOTSUPP)
        );
        assert!(punch(&file, u64::MAX, 1).is_err());
    }

    #[test]
    fn a_file_is_locked_against_writers_or_against_all() {
        let path = std::env::temp_dir().join(format!("bh-lock-{}", std::process::id()));
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        let (a, b) = (open().unwrap(), open().unwrap());
        let locked = |file: &File, write| lock(file, write, Duration::ZERO).unwrap();
        assert!(locked(&a, false));
        assert!(locked(&b, false));
        assert!(!locked(&b, true));
        drop(a);
        assert!(locked(&b, true));
        let c = open().unwrap();
        assert!(!locked(&c, false));
        let waiting = std::thread::spawn(move || lock(&c, true, Duration::from_secs(60)));
        drop(b);
        assert!(waiting.join().unwrap().unwrap());
        std::fs::remove_file(path).unwrap();
    }
}
