//! What the launcher keeps of the devices whose processes it started: their own descriptors
//! and what to start them with. So files can be grown, locks outlive a process that dies,
//! and another process can take its place. Used on the launcher's only thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::rc::Rc;

use super::device::Order;
use super::paths::reason;
use super::tap;
use super::{MAX_DEVICES, printable};

/// Descriptors at the head of an order that are a process's and not the device's: its
/// channels.
const CHANNELS: usize = 2;

/// Number of /dev/vhost-net: MISC_MAJOR and VHOST_NET_MINOR of the kernel's headers.
const VHOST_NET: u64 = libc::makedev(10, 238);

/// A descriptor of a device's own.
enum Own {
    File(File),
    /// Of /dev/vhost-net: what the kernel was told by one belongs to the process that told it,
    /// and goes on until its last descriptor is closed. So none is kept; a successor gets a
    /// fresh one.
    VhostNet,
}

impl Own {
    fn new(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let vhost_net = file.metadata().is_ok_and(|metadata| {
            metadata.file_type().is_char_device() && metadata.rdev() == VHOST_NET
        });
        if vhost_net {
            Self::VhostNet
        } else {
            Self::File(file)
        }
    }

    fn again(&self) -> Result<OwnedFd, String> {
        match self {
            Self::File(file) => file
                .as_fd()
                .try_clone_to_owned()
                .map_err(|error| reason(&error)),
            Self::VhostNet => tap::open_vhost_net(1)?
                .pop()
                .ok_or_else(|| "no descriptor of vhost-net".to_owned()),
        }
    }
}

/// A device, whether or not its process lives.
struct KeptDevice {
    binary: String,
    /// Of a live update.
    program: Option<Rc<OwnedFd>>,
    policy: String,
    args: Vec<String>,
    fence: bool,
    files: Vec<Own>,
    dial: Option<PathBuf>,
}

/// Devices by their ids.
#[derive(Default)]
pub struct Kept(BTreeMap<String, KeptDevice>);

impl Kept {
    /// Whether a device of this id can be kept.
    pub fn has_room(&self, id: &str) -> bool {
        self.0.len() < MAX_DEVICES || self.0.contains_key(id)
    }

    /// Keeps what a process was started with, and whether it has a fence. Not the channels,
    /// nor the fence itself: it must hang up with the process.
    pub fn keep(&mut self, order: Order, fence: bool) {
        let files = order.fds.into_iter().skip(CHANNELS).map(Own::new);
        let device = KeptDevice {
            binary: order.binary,
            program: order.program,
            policy: order.policy,
            args: order.args,
            fence,
            files: files.collect(),
            dial: order.dial,
        };
        self.0.insert(order.id, device);
    }

    /// What to start another process of a device with, on these channels, and whether it is
    /// to have a fence.
    pub fn order(
        &self,
        id: &str,
        incarnation: u64,
        channels: Vec<OwnedFd>,
    ) -> Result<(Order, bool), String> {
        let device = self.find(id)?;
        if channels.len() != CHANNELS {
            return Err(format!(
                "device {}: another process needs {CHANNELS} channels",
                printable(id)
            ));
        }
        let mut fds = channels;
        for file in &device.files {
            let own = file.again();
            fds.push(own.map_err(|why| format!("device {}: {why}", printable(id)))?);
        }
        let order = Order {
            id: id.to_owned(),
            incarnation,
            binary: device.binary.clone(),
            program: device.program.clone(),
            policy: device.policy.clone(),
            args: device.args.clone(),
            fds,
            dial: device.dial.clone(),
        };
        Ok((order, device.fence))
    }

    /// Later processes of a device execute this.
    pub fn set_program(&mut self, id: &str, program: Rc<OwnedFd>) {
        if let Some(device) = self.0.get_mut(id) {
            device.program = Some(program);
        }
    }

    fn find(&self, id: &str) -> Result<&KeptDevice, String> {
        self.0.get(id).ok_or_else(|| {
            format!(
                "device {}: no process was started for it: is it another's?",
                printable(id)
            )
        })
    }

    /// Lets go of a device.
    pub fn forget(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// Grows a device's file to `size` bytes, never shrinking it, and says which size it has
    /// then. A block device is only measured.
    pub fn grow(&self, id: &str, index: u32, size: u64) -> Result<u64, String> {
        let name = printable(id);
        let device = self.find(id)?;
        let file = usize::try_from(index)
            .ok()
            .and_then(|index| device.files.get(index))
            .ok_or_else(|| format!("device {name}: has no descriptor number {index}"))?;
        let Own::File(file) = file else {
            return Err(format!("device {name}: its descriptor is no file"));
        };
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
            program: None,
            policy: "x".into(),
            args: Vec::new(),
            fds,
            dial: None,
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
        kept.keep(order("d", vec![copy(&temp()), copy(&file)]), false);
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
        kept.keep(order("d", vec![copy(&temp())]), false);
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
        kept.keep(
            order("d", vec![read.into(), null.into(), readonly.into()]),
            false,
        );
        for index in 0..2 {
            let error = kept.grow("d", index, 1 << 20).unwrap_err();
            assert!(error.contains("is no file"), "{error}");
        }
        let error = kept.grow("d", 2, 1 << 50).unwrap_err();
        assert!(error.contains("cannot grow"), "{error}");
    }

    #[test]
    fn another_process_gets_what_the_last_one_had() {
        let file = temp();
        file.set_len(77).unwrap();
        let mut kept = Kept::default();
        let mut first = order("d", vec![copy(&file)]);
        first.args = vec!["--disk".into()];
        kept.keep(first, true);
        let channels = || vec![temp().into(), temp().into()];
        let (again, fence) = kept.order("d", 5, channels()).unwrap();
        assert!(fence);
        assert_eq!((again.id.as_str(), again.incarnation), ("d", 5));
        assert_eq!((again.binary.as_str(), again.policy.as_str()), ("x", "x"));
        assert_eq!(again.args, ["--disk"]);
        assert_eq!(again.fds.len(), 3);
        let own = File::from(again.fds.into_iter().nth(2).unwrap());
        assert_eq!(own.metadata().unwrap().len(), 77);
        // And the program that a live update brought.
        assert!(again.program.is_none());
        kept.set_program("d", Rc::new(temp().into()));
        assert!(kept.order("d", 6, channels()).unwrap().0.program.is_some());
        for refused in [
            kept.order("e", 1, channels()),
            kept.order("d", 1, Vec::new()),
            kept.order("d", 1, vec![temp().into(), temp().into(), temp().into()]),
        ] {
            assert!(refused.is_err_and(|line| line.starts_with("device ")));
        }
    }

    #[test]
    fn no_more_devices_are_kept_than_there_may_be() {
        let mut kept = Kept::default();
        for n in 0..MAX_DEVICES {
            assert!(kept.has_room(&format!("d{n}")));
            kept.keep(order(&format!("d{n}"), Vec::new()), false);
        }
        assert!(kept.has_room("d3") && !kept.has_room("another"));
        kept.forget("d3");
        assert!(kept.has_room("another"));
    }
}
