//! Host ids out of a range that the operator has set aside (`--uid-range`), for VMs of root's.
//! Each VM takes a block of it that no other has: an open-file-description lock on those bytes of
//! `/run/bulkhead/uids.lock` whose places are the ids. It is the launcher's, and ends with it and
//! its devices. The VMM takes it on its main thread before it confines itself.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;

use super::identity::{self, HOST_ID_BASE};
use super::{MAX_DEVICES, isolate, leftovers, sys};

/// Ids that a VM needs.
const BLOCK: u32 = MAX_DEVICES as u32;

/// The kernel's overflow id (/proc/sys/kernel/overflowuid), Debian's nobody.
const NOBODY: u32 = 65_534;

/// Host ids `first` and on, uids and gids alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    count: u32,
}

/// Below are the ids of the host itself (systemd's and Debian's system users).
const FIRST_ID: u32 = 1000;

impl FromStr for IdRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, count) = text
            .split_once(':')
            .and_then(|(first, count)| Some((first.parse().ok()?, count.parse().ok()?)))
            .ok_or("give FIRST:COUNT, such as 100000:65536")?;
        let range = Self { first, count };
        if first < FIRST_ID {
            return Err(format!(
                "ids below {FIRST_ID} are root's and the host's own services': begin at {FIRST_ID} or above"
            ));
        }
        if count < BLOCK {
            return Err(format!("each VM takes {BLOCK} ids: give as many"));
        }
        if (range.first..=range.first.saturating_add(range.count - 1)).contains(&NOBODY) {
            return Err(format!(
                "id {NOBODY} is nobody's and stands for ids that do not exist: begin above it, or end below"
            ));
        }
        if range.end() > u64::from(HOST_ID_BASE) {
            return Err(format!(
                "ids from {HOST_ID_BASE} on are those of VMs without a range: end below"
            ));
        }
        Ok(range)
    }
}

/// A block that is this VM's as long as the file is open.
#[derive(Debug)]
pub struct Reserved {
    /// Its first id.
    pub first: u32,
    /// What holds it.
    pub lock: File,
}

impl IdRange {
    fn end(self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }

    /// The first block that no VM has.
    ///
    /// # Errors
    /// One line that says why there is none, and the remedy.
    pub fn reserve(self, directory: &Path) -> Result<Reserved, String> {
        let named = |why: String| format!("--uid-range: {why}");
        let lock = open(directory).map_err(named)?;
        for block in 0..self.count / BLOCK {
            let first = self.first + block * BLOCK;
            if take(&lock, first).map_err(named)? {
                return Ok(Reserved { first, lock });
            }
        }
        Err(format!(
            "--uid-range: other VMs have all of {}:{} or a part of each of its {} blocks: give a longer range",
            self.first,
            self.count,
            self.count / BLOCK
        ))
    }
}

/// Blocks that are looked at where no range was named.
const TRIES: i32 = 64;

/// The block of root's VM whose VMM has this pid, or, should a VM of another pid namespace have
/// it, one of those after it. `exist`: whether the ids from here on exist. `None`: there is no
/// directory that VMs share, and nothing but the pid tells them apart.
pub fn reserve_by_pid(vmm_pid: i32, exist: impl Fn(u32) -> bool) -> Option<Reserved> {
    let directory = leftovers::directory()?;
    let lock = open(&directory).ok()?;
    for pid in vmm_pid..vmm_pid.saturating_add(TRIES) {
        let first = identity::host_id_base(pid).filter(|first| exist(*first))?;
        if take(&lock, first).ok()? {
            return Some(Reserved { first, lock });
        }
    }
    None
}

/// The file whose bytes are the ids.
fn open(directory: &Path) -> Result<File, String> {
    let path = directory.join("uids.lock");
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let made = DirBuilder::new().mode(0o700).create(directory);
    if let Err(error) = made
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(failed(error));
    }
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed)?;
    let (uid, _) = isolate::effective_ids();
    let found = lock.metadata().map_err(failed)?;
    if found.uid() != uid || found.mode() & 0o022 != 0 {
        return Err(format!(
            "{}: others may write it: remove it",
            path.display()
        ));
    }
    Ok(lock)
}

/// Whether the block is ours now.
fn take(lock: &File, first: u32) -> Result<bool, String> {
    sys::try_lock_range(lock.as_fd(), first.into(), BLOCK.into())
        .map_err(|error| format!("uids.lock: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_checked_when_it_is_read() {
        assert_eq!(
            "100000:65536".parse(),
            Ok(IdRange {
                first: 100_000,
                count: 65_536
            })
        );
        for wrong in [
            "",
            "1",
            "1:",
            ":64",
            "0:64",
            "1000:63",
            "-1:64",
            "1879048192:64",
            "33:64",
            "1000:4294966295",
            "65534:64",
            "60000:65536",
        ] {
            assert!(wrong.parse::<IdRange>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn vms_of_one_pid_in_two_namespaces_share_no_id() {
        if leftovers::directory().is_none_or(|d| open(&d).is_err()) {
            return;
        }
        // A pid that nobody has.
        let pid = (1 << 22) - 200;
        let one = reserve_by_pid(pid, |_| true).unwrap();
        let two = reserve_by_pid(pid, |_| true).unwrap();
        assert!(one.first.abs_diff(two.first) >= BLOCK, "{one:?} {two:?}");
        assert!(reserve_by_pid(pid, |_| false).is_none());
    }

    #[test]
    fn two_vms_at_once_never_share_an_id() {
        let directory = std::env::temp_dir().join(format!("bh-ids-{}", std::process::id()));
        let range: IdRange = "1000:130".parse().unwrap();
        let one = range.reserve(&directory).unwrap();
        let two = range.reserve(&directory).unwrap();
        assert_eq!((one.first, two.first), (1000, 1064));
        let full = range.reserve(&directory).unwrap_err();
        assert!(full.contains("its 2 blocks"), "{full}");
        // Another range that meets this one in the middle of a block.
        let other: IdRange = "1100:200".parse().unwrap();
        let three = other.reserve(&directory).unwrap();
        assert_eq!(three.first, 1164);
        drop(one);
        assert_eq!(range.reserve(&directory).unwrap().first, 1000);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
