//! Reads and judges the header of a qcow2 image (QEMU's docs/interop/qcow2.rst, "Header" and
//! "Header extensions"). Pure: bytes in, a [`Header`] or one line out, so that it can be
//! fuzzed as it stands.
//!
//! The bytes are an attacker's. The crate that serves the image never sees them: it is shown
//! a header that [`Header::sanitized`] writes anew from the numbers that were checked here.
//!
//! Called by the main thread when an image is opened, after confinement.

use std::fmt;

use crate::disk_options::Format;

/// Bytes at the start of the file that are looked at: header and extensions lie there.
pub const LOOK: usize = 64 * 1024;
/// Largest virtual disk: 1 PiB.
const MAX_SIZE: u64 = 1 << 50;
/// Most entries of the table of tables (8 MiB).
const MAX_L1_ENTRIES: u32 = 1 << 20;
/// Largest refcount table.
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Longest backing file name, by the specification.
const MAX_NAME: u32 = 1023;

const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 104;

// Offsets of fields.
const AT_VERSION: usize = 4;
const AT_BACKING_OFFSET: usize = 8;
const AT_BACKING_LENGTH: usize = 16;
const AT_CLUSTER_BITS: usize = 20;
/// The virtual size, eight bytes.
pub const AT_SIZE: usize = 24;
const AT_CRYPT: usize = 32;
/// Number of entries of the L1 table, four bytes.
pub const AT_L1_ENTRIES: usize = 36;
/// Where the L1 table lies, eight bytes.
pub const AT_L1_OFFSET: usize = 40;
/// Where the refcount table lies, eight bytes.
pub const AT_REFTABLE_OFFSET: usize = 48;
/// Clusters of the refcount table, four bytes.
pub const AT_REFTABLE_CLUSTERS: usize = 56;
const AT_SNAPSHOTS: usize = 60;
/// Incompatible features, eight bytes; version 3.
pub const AT_INCOMPATIBLE: usize = 72;
/// Features that an ignorant writer must clear, eight bytes; version 3.
pub const AT_AUTOCLEAR: usize = 88;
const AT_REFCOUNT_ORDER: usize = 96;
const AT_LENGTH: usize = 100;

/// Incompatible feature: refcounts may be wrong.
pub const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

// Types of extensions.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// A name out of an image, for messages only: printable, and not endless.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    fn new(bytes: &[u8]) -> Self {
        const SHOWN: usize = 120;
        let text = String::from_utf8_lossy(bytes);
        let mut shown: String = text.chars().flat_map(char::escape_debug).collect();
        if shown.len() > SHOWN {
            let cut = (0..=SHOWN).rev().find(|&n| shown.is_char_boundary(n));
            shown.truncate(cut.unwrap_or(0));
            shown.push('…');
        }
        Self(shown)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an image says about the file beneath it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name in the header: never opened.
    pub name: Name,
    /// How it is to be read.
    pub format: Format,
}

/// Why an image is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No qcow2 at all.
    #[error("is no qcow2 image; if it is a raw one, give format=raw")]
    Magic,
    /// Neither version 2 nor 3.
    #[error("is qcow2 version {0}; only 2 and 3 are served")]
    Version(u32),
    /// Shorter than its header.
    #[error("ends within its header; it is cut short")]
    Short,
    /// A number that makes no sense.
    #[error("is corrupt: {what} is {value}; see qemu-img check")]
    Field {
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
    /// Two things in one place.
    #[error("is corrupt: {0} and {1} overlap; see qemu-img check")]
    Overlap(&'static str, &'static str),
    /// A number beyond what this program takes.
    #[error("has {what} of {value}, more than the {most} that are served; {remedy}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much.
        value: u64,
        /// What is served.
        most: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// Something that is not built.
    #[error("{what}, which is not served; {remedy}")]
    Unsupported {
        /// What the image has.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Not fit for writing.
    #[error("{what}; {remedy}")]
    NotForWriting {
        /// What is the matter.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A backing file whose format would have to be guessed.
    #[error(
        "names the backing file {0} without its format, which is never guessed; \
         say it: qemu-img rebase -u -b {0} -F raw|qcow2 IMAGE"
    )]
    NoBackingFormat(Name),
    /// A backing file in another format.
    #[error(
        "names the backing file {name} in the format {format}; only raw and qcow2 are served \
         (qemu-img rebase -b NEW -F qcow2 IMAGE)"
    )]
    BackingFormat {
        /// The file.
        name: Name,
        /// Its format.
        format: Name,
    },
}

const CONVERT: &str = "make a plain copy (qemu-img convert -O qcow2 IMAGE COPY)";
const CHECK: &str = "repair it (qemu-img check -r all IMAGE) or add readonly=on";

/// A header that was found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, as a shift: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table lies.
    pub l1_offset: u64,
    /// Where the refcount table lies.
    pub reftable_offset: u64,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Width of a refcount in bits, as a shift: 0 to 6.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Features that a writer who does not know them clears.
    pub autoclear: u64,
    /// The file beneath.
    pub backing: Option<Backing>,
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(field.try_into().ok()?))
}

impl Header {
    /// Reads the header in `bytes`, the first [`LOOK`] bytes of a file of `file_len` bytes (or
    /// all of it, if it is shorter), for service with or without writing.
    pub fn parse(bytes: &[u8], file_len: u64, writable: bool) -> Result<Self, HeaderError> {
        if be32(bytes, 0) != Some(MAGIC) {
            return Err(HeaderError::Magic);
        }
        let word = |at| be32(bytes, at).ok_or(HeaderError::Short);
        let long = |at| be64(bytes, at).ok_or(HeaderError::Short);
        let version = word(AT_VERSION)?;
        if !(2..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let v3 = version == 3;
        let (incompatible, autoclear, refcount_order, length) = if v3 {
            (
                long(AT_INCOMPATIBLE)?,
                long(AT_AUTOCLEAR)?,
                word(AT_REFCOUNT_ORDER)?,
                word(AT_LENGTH)?,
            )
        } else {
            (0, 0, 4, V2_LENGTH)
        };
        let mut header = Self {
            version,
            cluster_bits: word(AT_CLUSTER_BITS)?,
            size: long(AT_SIZE)?,
            l1_entries: word(AT_L1_ENTRIES)?,
            l1_offset: long(AT_L1_OFFSET)?,
            reftable_offset: long(AT_REFTABLE_OFFSET)?,
            reftable_clusters: word(AT_REFTABLE_CLUSTERS)?,
            refcount_order,
            snapshots: word(AT_SNAPSHOTS)?,
            autoclear,
            backing: None,
        };
        if !(9..=21).contains(&header.cluster_bits) {
            return field("cluster_bits", header.cluster_bits);
        }
        if v3 && (length < V3_LENGTH || length % 8 != 0 || length as usize > LOOK) {
            return field("header_length", length);
        }
        if refcount_order > 6 {
            return field("refcount_order", refcount_order);
        }
        let extensions = Extensions::read(bytes, length as usize, header.cluster_bits);
        judge_features(incompatible, word(AT_CRYPT)?, &extensions, writable)?;
        header.judge_tables(file_len)?;
        if writable {
            header.judge_for_writing()?;
        }
        header.backing = backing(bytes, header.cluster_bits, &extensions)?;
        if extensions.cut {
            return Err(HeaderError::Unsupported {
                what: format!("has a header of more than {LOOK} bytes"),
                remedy: CONVERT,
            });
        }
        Ok(header)
    }

    /// Whether a disk of this size would still be served.
    pub fn may_grow_to(&self, size: u64) -> bool {
        let l1 = size.div_ceil(1 << self.l2_coverage_bits());
        size <= MAX_SIZE && l1 <= u64::from(MAX_L1_ENTRIES)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Virtual bytes that one L2 table maps, as a shift.
    pub fn l2_coverage_bits(&self) -> u32 {
        2 * self.cluster_bits - 3
    }

    /// Clusters that one refcount block counts, as a shift.
    pub fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Entries of the refcount table.
    pub fn reftable_entries(&self) -> u64 {
        (u64::from(self.reftable_clusters) << self.cluster_bits) / 8
    }

    fn judge_tables(&self, file_len: u64) -> Result<(), HeaderError> {
        let cluster = self.cluster_size();
        if self.size < 512 {
            return Err(HeaderError::Unsupported {
                what: "has a virtual disk of less than a sector".into(),
                remedy: "enlarge it (qemu-img resize IMAGE SIZE)",
            });
        }
        if self.size > MAX_SIZE {
            return Err(HeaderError::TooMuch {
                what: "a virtual size in bytes",
                value: self.size,
                most: MAX_SIZE,
                remedy: "serve it raw",
            });
        }
        if self.l1_entries > MAX_L1_ENTRIES {
            return Err(HeaderError::TooMuch {
                what: "L1 entries",
                value: u64::from(self.l1_entries),
                most: u64::from(MAX_L1_ENTRIES),
                remedy: "convert it to larger clusters (qemu-img convert -O qcow2 -o cluster_size=64k)",
            });
        }
        let needed = self.size.div_ceil(1 << self.l2_coverage_bits());
        if u64::from(self.l1_entries) < needed {
            return field("l1_size", self.l1_entries);
        }
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if self.reftable_clusters == 0 {
            return field("refcount_table_clusters", 0u32);
        }
        if reftable > MAX_REFTABLE_BYTES {
            return Err(HeaderError::TooMuch {
                what: "refcount table bytes",
                value: reftable,
                most: MAX_REFTABLE_BYTES,
                remedy: CONVERT,
            });
        }
        // A table may end within the last cluster of a file that does not fill it.
        let end_of_file = file_len.div_ceil(cluster).saturating_mul(cluster);
        let l1 = u64::from(self.l1_entries) * 8;
        for (what, offset, len) in [
            ("l1_table_offset", self.l1_offset, l1),
            ("refcount_table_offset", self.reftable_offset, reftable),
        ] {
            let end = offset.checked_add(len);
            let inside = end.is_some_and(|end| end <= end_of_file);
            if offset == 0 || offset % cluster != 0 || offset >= file_len || !inside {
                return field(what, offset);
            }
        }
        let overlap = self.l1_offset < self.reftable_offset.saturating_add(reftable)
            && self.reftable_offset < self.l1_offset.saturating_add(l1);
        if overlap {
            return Err(HeaderError::Overlap("the L1 table", "the refcount table"));
        }
        Ok(())
    }

    fn judge_for_writing(&self) -> Result<(), HeaderError> {
        if self.snapshots > 0 {
            return Err(HeaderError::NotForWriting {
                what: format!(
                    "holds {} internal snapshots and cannot be written with them",
                    self.snapshots
                ),
                remedy: "delete them (qemu-img snapshot -d NAME IMAGE) or add readonly=on",
            });
        }
        Ok(())
    }

    /// The same header with nothing in it but what was judged: no names, no extensions, no
    /// feature bits.
    pub fn sanitized(&self) -> [u8; V3_LENGTH as usize] {
        let mut bytes = [0; V3_LENGTH as usize];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(0, &MAGIC.to_be_bytes());
        put(AT_VERSION, &self.version.to_be_bytes());
        put(AT_CLUSTER_BITS, &self.cluster_bits.to_be_bytes());
        put(AT_SIZE, &self.size.to_be_bytes());
        put(AT_L1_ENTRIES, &self.l1_entries.to_be_bytes());
        put(AT_L1_OFFSET, &self.l1_offset.to_be_bytes());
        put(AT_REFTABLE_OFFSET, &self.reftable_offset.to_be_bytes());
        put(AT_REFTABLE_CLUSTERS, &self.reftable_clusters.to_be_bytes());
        if self.version == 3 {
            put(AT_REFCOUNT_ORDER, &self.refcount_order.to_be_bytes());
            put(AT_LENGTH, &V3_LENGTH.to_be_bytes());
        }
        bytes
    }
}

fn field<T>(what: &'static str, value: impl Into<u64>) -> Result<T, HeaderError> {
    Err(HeaderError::Field {
        what,
        value: value.into(),
    })
}

/// What the extensions say that matters here.
#[derive(Debug, Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
    /// They go on beyond what was looked at.
    cut: bool,
}

impl<'a> Extensions<'a> {
    /// Each step takes at least eight bytes of at most [`LOOK`].
    fn read(bytes: &'a [u8], start: usize, cluster_bits: u32) -> Self {
        let mut found = Self::default();
        let end = bytes.len().min(LOOK).min(1 << cluster_bits);
        // The name of the backing file, if there is one, ends the list.
        let end = match be64(bytes, AT_BACKING_OFFSET).map(usize::try_from) {
            Some(Ok(name)) if name > 0 => end.min(name),
            _ => end,
        };
        let area = bytes.get(..end).unwrap_or_default();
        let mut at = start;
        while let (Some(kind), Some(len)) = (be32(area, at), be32(area, at.saturating_add(4))) {
            if kind == EXT_END {
                return found;
            }
            let data = at.saturating_add(8);
            let data_end = data.saturating_add(len as usize);
            let Some(data) = area.get(data..data_end) else {
                found.cut = true;
                return found;
            };
            match kind {
                EXT_BACKING_FORMAT => found.backing_format = Some(data),
                EXT_DATA_FILE => found.data_file = Some(data),
                _ => {}
            }
            at = data_end.saturating_add(7) & !7;
        }
        found
    }
}

fn judge_features(
    incompatible: u64,
    crypt: u32,
    extensions: &Extensions<'_>,
    writable: bool,
) -> Result<(), HeaderError> {
    let unsupported = |what: String, remedy| Err(HeaderError::Unsupported { what, remedy });
    if crypt != 0 {
        return unsupported(
            "is encrypted".into(),
            "make a plain copy (qemu-img convert)",
        );
    }
    if incompatible & EXTERNAL_DATA != 0 {
        let what = match extensions.data_file {
            Some(name) => format!("keeps its data in the external file {}", Name::new(name)),
            None => "keeps its data in an external file".into(),
        };
        return unsupported(what, CONVERT);
    }
    if incompatible & EXTENDED_L2 != 0 {
        return unsupported("has extended L2 entries (subclusters)".into(), CONVERT);
    }
    if incompatible & COMPRESSION_TYPE != 0 {
        return unsupported(
            "is compressed by another method than zlib".into(),
            "make a copy (qemu-img convert -O qcow2 -o compression_type=zlib IMAGE COPY)",
        );
    }
    let known = DIRTY | CORRUPT | EXTERNAL_DATA | EXTENDED_L2 | COMPRESSION_TYPE;
    let unknown = incompatible & !known;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        return unsupported(
            format!("has the unknown incompatible feature {bit}"),
            CONVERT,
        );
    }
    let refuse = |what: &str| {
        Err(HeaderError::NotForWriting {
            what: what.into(),
            remedy: CHECK,
        })
    };
    match incompatible {
        _ if !writable => Ok(()),
        f if f & CORRUPT != 0 => refuse("is marked as corrupt"),
        f if f & DIRTY != 0 => refuse("was not closed: its reference counts may be wrong"),
        _ => Ok(()),
    }
}

fn backing(
    bytes: &[u8],
    cluster_bits: u32,
    extensions: &Extensions<'_>,
) -> Result<Option<Backing>, HeaderError> {
    let offset = be64(bytes, AT_BACKING_OFFSET).ok_or(HeaderError::Short)?;
    let len = be32(bytes, AT_BACKING_LENGTH).ok_or(HeaderError::Short)?;
    if offset == 0 {
        return Ok(None);
    }
    if len == 0 || len > MAX_NAME {
        return field("backing_file_size", len);
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|start| Some((start, start.checked_add(len as usize)?)))
        .filter(|&(_, end)| end <= 1 << cluster_bits)
        .and_then(|(start, end)| bytes.get(start..end));
    let Some(name) = name.map(Name::new) else {
        return field("backing_file_offset", offset);
    };
    let format = match extensions.backing_format {
        None => return Err(HeaderError::NoBackingFormat(name)),
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(other) => {
            return Err(HeaderError::BackingFormat {
                name,
                format: Name::new(other),
            });
        }
    };
    Ok(Some(Backing { name, format }))
}

#[cfg(test)]
#[path = "qcow2_header_tests.rs"]
mod tests;
