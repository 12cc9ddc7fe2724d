//! A block device of the host whose I/O can be made to stand still.

use bulkhead_tests::host::{Undo, sh};
use bulkhead_tests::runner::Verdict;

/// A device-mapper device over a loop device; both go with the value.
pub struct Mapped {
    name: String,
    _undo: Undo,
}

impl Mapped {
    /// Over a file of this many sectors.
    pub fn new(file: &str, sectors: u64) -> Result<Self, String> {
        let name = format!("bh-slow-{}", std::process::id());
        let device = sh(&format!(
            "device=$(losetup --find --show {file})
printf '0 {sectors} linear %s 0\\n' $device | dmsetup create {name}
dmsetup mknodes {name} >/dev/null; echo $device"
        ))?;
        let undo = Undo::new(format!(
            "dmsetup resume {name}; dmsetup remove --force {name}; losetup --detach {}",
            device.trim()
        ));
        Ok(Self { name, _undo: undo })
    }

    pub fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// Nothing that is asked of it ends from now on.
    pub fn suspend(&self) -> Verdict {
        sh(&format!(
            "dmsetup suspend --nolockfs --noflush {}",
            self.name
        ))
        .map(drop)
    }

    pub fn resume(&self) -> Verdict {
        sh(&format!("dmsetup resume {}", self.name)).map(drop)
    }
}
