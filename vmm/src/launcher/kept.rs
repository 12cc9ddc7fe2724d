//! What the launcher keeps of the devices whose processes it started: their own descriptors
//! and what to start them with. So files can be grown, locks outlive a process that dies,
//! and another process can take its place. Used on the launcher's only thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;

use super::device::Order;
use super::paths::reason;
use super::{MAX_DEVICES, printable};

/// Descriptors at the head of an order that are a process's and not the device's: its
/// channels.
const CHANNELS: usize = 2;

/// A device, whether or not its process lives.
struct KeptDevice {
    files: Vec<File>,
}

/// Devices by their ids.
#[derive(Default)]
pub struct Kept(BTreeMap<String, KeptDevice>);

impl Kept {
    /// Whether a device of this id can be kept.
    pub fn has_room(&self, id: &str) -> bool {
        self.0.len() < MAX_DEVICES || self.0.contains_key(id)
    }

    /// Keeps what a process was started with.
    pub fn keep(&mut self, order: Order) {
        let files = order.fds.into_iter().skip(CHANNELS).map(File::from);
        let device = KeptDevice {
            files: files.collect(),
        };
        self.0.insert(order.id, device);
    }

    /// Lets go of a device.
    pub fn forget(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// Grows a device's file to `size` bytes, never shrinking it, and says which size it has
    /// then. A block device is only measured.
    pub fn grow(&self, id: &str, index: u32, size: u64) -> Result<u64, String> {
        let name = printable(id);
        let device = self.0.get(id).ok_or_else(|| {
            format!("device {name}: no process was started for it: is it another's?")
        })?;
        let file = usize::try_from(index)
            .ok()
            .and_then(|index| device.files.get(index))
            .ok_or_else(|| format!("device {name}: has no descriptor number {index}"))?;
        grow(file, size).map_err(|why| format!("device {name}: {why}"))
    }
}

fn grow(mut file: &File, size: u64) -> Result<u64, String> {
    let io =
        |what: &'static str| move |error: std::io::Error| format!("{what}: {}", reason(&error));
    let metadata = file.metadata().map_err(io("its file"))?;
    let kind = metadata.file_type();
    if kind.is_block_device() {
        // The position is nobody's: devices name the place in every request.
        return file.seek(SeekFrom::End(0)).map_err(io("its size"));
    }
    if !kind.is_file() {
        return Err("its descriptor is no file: only files and block devices can grow".into());
    }
    if size <= metadata.len() {
        return Ok(metadata.len());
    }
    file.set_len(size).map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => "free space on its file system",
            Some(libc::EFBIG) => "its file system or a limit of the host allows no larger file",
            Some(libc::EINVAL | libc::EBADF | libc::EPERM) => {
                "it is open read-only or its size is fixed"
            }
            _ => "nothing was changed",
        };
        format!(
            "its file cannot grow to {size} bytes: {}: {remedy}",
            reason(&error)
        )
    })?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};

    fn temp() -> File {
        let path = std::env::temp_dir().join(format!(
            "bh-kept-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    fn order(id: &str, own: Vec<OwnedFd>) -> Order {
        let channel = || temp().into();
        let mut fds = vec![channel(), channel()];
        fds.extend(own);
        Order {
            id: id.into(),
            incarnation: 1,
            binary: "x".into(),
            policy: "x".into(),
            args: Vec::new(),
            fds,
        }
    }

    fn copy(file: &File) -> OwnedFd {
        file.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_file_grows_and_never_shrinks() {
        let file = temp();
        file.set_len(1000).unwrap();
        let mut kept = Kept::default();
        kept.keep(order("d", vec![copy(&temp()), copy(&file)]));
        assert_eq!(kept.grow("d", 1, 4096), Ok(4096));
        assert_eq!(file.metadata().unwrap().len(), 4096);
        assert_eq!(kept.grow("d", 1, 512), Ok(4096));
        assert_eq!(file.metadata().unwrap().len(), 4096);
        let too_far = kept.grow("d", 1, u64::MAX).unwrap_err();
        assert!(!too_far.contains('\n'), "{too_far}");
        assert_eq!(file.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn only_a_kept_devices_own_descriptors_are_within_reach() {
        let mut kept = Kept::default();
        kept.keep(order("d", vec![copy(&temp())]));
        assert!(
            kept.grow("e", 0, 1)
                .unwrap_err()
                .contains("device e: no process")
        );
        assert!(
            kept.grow("d", 1, 1)
                .unwrap_err()
                .contains("no descriptor number 1")
        );
        kept.forget("d");
        assert!(kept.grow("d", 0, 1).is_err());
    }

    #[test]
    fn what_is_no_file_does_not_grow() {
        let (read, _write) = std::io::pipe().unwrap();
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let readonly = File::open("/proc/self/exe").unwrap();
        let mut kept = Kept::default();
        kept.keep(order("d", vec![read.into(), null.into(), readonly.into()]));
        for index in 0..2 {
            let error = kept.grow("d", index, 1 << 20).unwrap_err();
            assert!(error.contains("is no file"), "{error}");
        }
        let error = kept.grow("d", 2, 1 << 50).unwrap_err();
        assert!(error.contains("cannot grow"), "{error}");
    }

    #[test]
    fn no_more_devices_are_kept_than_there_may_be() {
        let mut kept = Kept::default();
        for n in 0..MAX_DEVICES {
            assert!(kept.has_room(&format!("d{n}")));
            kept.keep(order(&format!("d{n}"), Vec::new()));
        }
        assert!(kept.has_room("d3") && !kept.has_room("another"));
        kept.forget("d3");
        assert!(kept.has_room("another"));
    }
}
