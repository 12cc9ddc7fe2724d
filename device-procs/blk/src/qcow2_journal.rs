//! Changed metadata of an image, kept where they outlive this process.
//!
//! A guest goes on when the process that serves its disk dies: what it wrote before must be
//! there when the next process takes over, flushed or not. The data are, in the host's page
//! cache; the tables that lead to them may still wait in the overlay
//! ([`crate::qcow2_overlay`]). So before a write completes, the sectors that it changed are
//! appended here, to memory that the front-end holds; whoever comes next applies them
//! before it opens the image. The log is emptied whenever the overlay is applied.
//!
//! It does not outlive the host, and must not: after a power cut its order would mean
//! nothing. There a guest has lost what it did not flush, as on any disk.
//!
//! ```text
//!    0  magic u64     8  bytes of records that count u64
//!   64  records: sector number u64, content 512 bytes; a later one replaces an earlier one
//! ```
//!
//! Called under the image's lock. What is found in the memory at first was written by
//! another process and is read as if by anyone.

use std::fmt;

use crate::qcow2_overlay::SECTOR;

const MAGIC: u64 = u64::from_be_bytes(*b"bh-qcow2");
const AT_MAGIC: usize = 0;
const AT_LEN: usize = 8;
const AT_RECORDS: usize = 64;
const RECORD: usize = 8 + SECTOR;

/// Bytes that a log is best given.
pub const LOG_BYTES: u64 = 4 << 20;

/// Memory that outlives the process. Stores are seen in the order in which they are made.
pub trait Kept: fmt::Debug + Send + Sync {
    /// Its size in bytes.
    fn len(&self) -> usize;

    /// Whether there is none at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads; zeros where there is nothing.
    fn read(&self, at: usize, buffer: &mut [u8]);

    /// Writes.
    fn write(&self, at: usize, bytes: &[u8]);

    /// Writes eight bytes at a multiple of eight: all of them or, if the process ends just
    /// then, none.
    fn store(&self, at: usize, value: u64);
}

/// A log that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Too little memory.
    #[error("the log of the disk's image has {0} bytes, which is too little")]
    Small(usize),
    /// Something else lies there.
    #[error("the log of the disk's image is none; the front-end gave another device's memory")]
    Foreign,
}

/// The log.
#[derive(Debug)]
pub struct Journal {
    kept: Box<dyn Kept>,
    used: usize,
}

/// A sector that the last process had changed.
pub type Record = (u64, [u8; SECTOR]);

impl Journal {
    /// Begins a log, or takes over the one that is there: its records, oldest first.
    ///
    /// # Errors
    /// There is no log and no room for one.
    pub fn open(kept: Box<dyn Kept>) -> Result<(Self, Vec<Record>), JournalError> {
        let have = kept.len();
        if have < AT_RECORDS + 64 * RECORD {
            return Err(JournalError::Small(have));
        }
        let load = |at: usize| {
            let mut bytes = [0; 8];
            kept.read(at, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let (magic, len) = (load(AT_MAGIC), load(AT_LEN));
        let room = (have - AT_RECORDS) as u64;
        if magic != MAGIC && (magic, len) != (0, 0) {
            return Err(JournalError::Foreign);
        }
        if len > room || len % RECORD as u64 != 0 {
            return Err(JournalError::Foreign);
        }
        let mut records = Vec::new();
        for at in (AT_RECORDS..).step_by(RECORD).take(len as usize / RECORD) {
            let (mut number, mut content) = ([0; 8], [0; SECTOR]);
            kept.read(at, &mut number);
            kept.read(at + 8, &mut content);
            records.push((u64::from_le_bytes(number), content));
        }
        kept.store(AT_MAGIC, MAGIC);
        let used = len as usize;
        Ok((Self { kept, used }, records))
    }

    /// Appends sectors: all of them or, if there is no room, none and false.
    pub fn append<'a>(
        &mut self,
        sectors: impl ExactSizeIterator<Item = (u64, &'a [u8; SECTOR])>,
    ) -> bool {
        let room = self.kept.len().saturating_sub(AT_RECORDS + self.used);
        if sectors.len() > room / RECORD {
            return false;
        }
        let mut at = AT_RECORDS + self.used;
        for (number, content) in sectors {
            self.kept.write(at, &number.to_le_bytes());
            self.kept.write(at + 8, content);
            at = at.saturating_add(RECORD);
        }
        self.used = at.saturating_sub(AT_RECORDS);
        self.kept.store(AT_LEN, self.used as u64);
        true
    }

    /// Forgets everything: it is in the file now.
    pub fn clear(&mut self) {
        self.used = 0;
        self.kept.store(AT_LEN, 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Debug)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Kept for Memory {
        fn len(&self) -> usize {
            self.0.lock().unwrap().len()
        }
        fn read(&self, at: usize, buffer: &mut [u8]) {
            buffer.copy_from_slice(&self.0.lock().unwrap()[at..at + buffer.len()]);
        }
        fn write(&self, at: usize, bytes: &[u8]) {
            self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        }
        fn store(&self, at: usize, value: u64) {
            self.write(at, &value.to_le_bytes());
        }
    }

    fn memory(len: usize) -> Memory {
        Memory(Arc::new(Mutex::new(vec![0; len])))
    }

    #[test]
    fn the_next_process_finds_what_was_appended() {
        let memory = memory(AT_RECORDS + 100 * RECORD);
        let (mut log, old) = Journal::open(Box::new(memory.clone())).unwrap();
        assert_eq!(old, []);
        assert!(log.append([(7, &[1; SECTOR]), (9, &[2; SECTOR])].into_iter()));
        assert!(log.append([(7, &[3; SECTOR])].into_iter()));
        let many: Vec<_> = (0..98).map(|i| (i, &[0; SECTOR])).collect();
        assert!(!log.append(many.into_iter()));
        let (mut log, old) = Journal::open(Box::new(memory.clone())).unwrap();
        assert_eq!(old, [(7, [1; SECTOR]), (9, [2; SECTOR]), (7, [3; SECTOR])]);
        log.clear();
        let (_, old) = Journal::open(Box::new(memory)).unwrap();
        assert_eq!(old, []);
    }

    #[test]
    fn what_is_no_log_is_refused() {
        assert_eq!(
            Journal::open(Box::new(memory(100))).map(|_| ()),
            Err(JournalError::Small(100))
        );
        let refused = |at: usize, value: u64| {
            let memory = memory(AT_RECORDS + 100 * RECORD);
            Journal::open(Box::new(memory.clone())).unwrap();
            memory.store(at, value);
            Journal::open(Box::new(memory)).map(|_| ()) == Err(JournalError::Foreign)
        };
        assert!(refused(AT_MAGIC, 1));
        assert!(refused(AT_LEN, 1));
        assert!(refused(AT_LEN, u64::MAX));
        assert!(refused(AT_LEN, 101 * RECORD as u64));
    }
}
