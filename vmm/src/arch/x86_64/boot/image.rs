//! Bounded reading of the operator's kernel and initrd files.
//!
//! Every offset and length that a file states is checked against the file's size and the
//! guest's RAM before anything is read, so that a truncated or hostile file costs one
//! line, never a panic or a read past an end.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Problem};
use crate::memory::GuestRam;

/// An open file, its name for messages and its size.
pub(super) struct Image<'a> {
    file: &'a File,
    name: &'a str,
    size: u64,
    role: &'static str,
    /// Nothing is copied.
    only_checked: bool,
}

impl<'a> Image<'a> {
    pub(super) fn new(
        role: &'static str,
        file: &'a File,
        name: &'a str,
    ) -> Result<Self, BootError> {
        let mut image = Self {
            file,
            name,
            size: 0,
            role,
            only_checked: false,
        };
        let metadata = file.metadata().map_err(|e| image.error(Problem::Read(e)))?;
        if !metadata.is_file() {
            return Err(image.error(Problem::NotAFile));
        }
        image.size = metadata.len();
        if image.size == 0 {
            return Err(image.error(Problem::Empty));
        }
        Ok(image)
    }

    /// The same file, of which nothing is ever copied: what is checked on the way is.
    pub(super) fn only_checked(mut self) -> Self {
        self.only_checked = true;
        self
    }

    /// True when guest memory is to stay as it is.
    pub(super) fn is_only_checked(&self) -> bool {
        self.only_checked
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Wraps `problem` with the file's name.
    pub(super) fn error(&self, problem: Problem) -> BootError {
        BootError::File {
            role: self.role,
            name: self.name.to_owned(),
            problem,
        }
    }

    /// True when `offset..offset + len` lies in the file.
    pub(super) fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// `N` bytes at `offset`; the file is truncated when they are not there.
    pub(super) fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| {
                self.error(match error.kind() {
                    io::ErrorKind::UnexpectedEof => Problem::Truncated,
                    _ => Problem::Read(error),
                })
            })?;
        Ok(bytes)
    }

    /// A bounded piece as a vector; `len` must be small and checked by the caller.
    pub(super) fn vec(&self, offset: u64, len: usize) -> Result<Vec<u8>, BootError> {
        if !self.holds(offset, len as u64) {
            return Err(self.error(Problem::Truncated));
        }
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| self.error(Problem::Read(error)))?;
        Ok(bytes)
    }

    /// Copies `len` bytes at `offset` to guest-physical `address`.
    pub(super) fn copy(
        &self,
        offset: u64,
        len: u64,
        ram: &GuestRam,
        address: u64,
    ) -> Result<(), BootError> {
        if !self.holds(offset, len) {
            return Err(self.error(Problem::Truncated));
        }
        let end = address.checked_add(len);
        if end.is_none_or(|end| end > ram.low_end()) {
            return Err(self.too_big(ram, end.unwrap_or(u64::MAX)));
        }
        if self.only_checked {
            return Ok(());
        }
        let count = usize::try_from(len).map_err(|_| self.error(Problem::Truncated))?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(|error| self.error(Problem::Read(error)))?;
        let mut reader = file
            .try_clone()
            .map_err(|error| self.error(Problem::Read(error)))?;
        ram.memory()
            .read_exact_volatile_from(GuestAddress(address), &mut reader, count)
            .map_err(|error| self.error(Problem::Read(io::Error::other(error.to_string()))))
    }

    /// The file does not fit: it would need RAM up to `end`.
    pub(super) fn too_big(&self, ram: &GuestRam, end: u64) -> BootError {
        self.error(Problem::DoesNotFit {
            need: end.div_ceil(1 << 20),
            have: ram.low_end() >> 20,
        })
    }
}
