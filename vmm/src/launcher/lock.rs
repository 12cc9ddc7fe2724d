//! The lock on a disk: an open-file-description lock (fcntl_locking(2)) on the whole file,
//! which lasts as long as any descriptor of the opening, in whatever process. Writable
//! openings exclude every other, read-only ones exclude writable ones; the byte locks that
//! QEMU puts on images conflict with it, too. Taken on the launcher's only thread, which waits
//! for nobody: who asked may ask again ([`PATIENCE`]).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use super::sys;

/// How long a lock of somebody who is just ending may stay: the I/O that a killed process had
/// in flight holds its files until it is over.
pub const PATIENCE: Duration = Duration::from_millis(1000);
/// When to ask again meanwhile.
pub const PAUSE: Duration = Duration::from_millis(20);
/// What is said of a file that somebody else has locked.
pub const HELD: &str = "is in use by another process, or by another disk of this machine (locked): end that, or open it read-only in both";

/// Locks a file, or says [`HELD`].
///
/// # Errors
/// Why not and the remedy, fit to follow the file's name.
pub fn take(file: &File, exclusive: bool) -> Result<(), String> {
    match sys::try_lock(file.as_fd(), exclusive) {
        Ok(true) => Ok(()),
        Ok(false) => Err(HELD.into()),
        Err(error) => Err(explain(&error)),
    }
}

fn explain(error: &io::Error) -> String {
    format!(
        "cannot be locked: {}: see to it that nothing else writes it, and add lock=off",
        super::paths::reason(error)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    struct Temp(std::path::PathBuf);

    impl Temp {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("bh-lock-{name}-{}", std::process::id()));
            std::fs::write(&path, [0; 512]).unwrap();
            Self(path)
        }

        fn open(&self, write: bool) -> File {
            OpenOptions::new()
                .read(true)
                .write(write)
                .open(&self.0)
                .unwrap()
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_writer_is_alone_and_readers_share() {
        let temp = Temp::new("share");
        let (first, second, writer) = (temp.open(false), temp.open(false), temp.open(true));
        take(&first, false).unwrap();
        take(&second, false).unwrap();
        assert!(!sys::try_lock(writer.as_fd(), true).unwrap());
        drop(first);
        drop(second);
        take(&writer, true).unwrap();
        let reader = temp.open(false);
        assert!(!sys::try_lock(reader.as_fd(), false).unwrap());
        let another = temp.open(true);
        let error = take(&another, true).unwrap_err();
        assert!(
            error.starts_with("is in use by another process, or by another disk "),
            "{error}"
        );
    }

    #[test]
    fn the_lock_lasts_as_long_as_any_descriptor_of_its_opening() {
        let temp = Temp::new("dup");
        let writer = temp.open(true);
        take(&writer, true).unwrap();
        let copy = writer.try_clone().unwrap();
        drop(writer);
        let other = temp.open(true);
        assert!(!sys::try_lock(other.as_fd(), true).unwrap());
        drop(copy);
        assert!(sys::try_lock(other.as_fd(), true).unwrap());
    }
}
