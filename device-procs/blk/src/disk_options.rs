//! --disk: parsed once, on the command line, into a type that cannot hold nonsense.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use bulkhead_runtime::limit::Rate;

use crate::request::ID_BYTES;
use bulkhead_runtime::program::{UsageError, bad, fd};

/// Most files beneath a disk image.
const MAX_BACKING: usize = 16;

/// Where a disk, or a file beneath it, is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// To be opened.
    Path(PathBuf),
    /// Inherited.
    Fd(RawFd),
}

impl std::fmt::Display for DiskSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

/// What the file holds. Never guessed from its content: a guest writes that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk, byte for byte.
    #[default]
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// What becomes of written data, and of flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// O_DIRECT where the file has it; flushes reach the disk.
    #[default]
    None,
    /// Through the host's page cache; flushes reach the disk.
    Writeback,
    /// Every write is on stable storage when it completes.
    Writethrough,
    /// Flushes are ignored: a host crash loses data.
    Unsafe,
}

/// A disk as the command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Where it is.
    pub source: DiskSource,
    /// Refuse writes.
    pub readonly: bool,
    /// O_DIRECT: demanded, refused, or as the cache mode says and the file allows.
    pub direct: Option<bool>,
    /// What GET_ID answers, padded with zeros.
    pub serial: [u8; ID_BYTES],
    /// What the file holds.
    pub format: Format,
    /// What becomes of written data.
    pub cache: Cache,
    /// Files beneath an image, top first.
    pub backing: Vec<DiskSource>,
    /// Largest size that the file may ever have, in bytes.
    pub max_size: Option<u64>,
    /// Bytes per second.
    pub bytes: Option<Rate>,
    /// Requests per second.
    pub operations: Option<Rate>,
    /// Lock a file that this process opens.
    pub lock: bool,
    /// Offer secure erase where the device can do it. None: if this process opens it, and its
    /// own filter is all that it is under.
    pub secure_erase: Option<bool>,
}

impl DiskOptions {
    /// A disk at `source`, all else as it is by default.
    pub fn new(source: DiskSource) -> Self {
        Self {
            source,
            readonly: false,
            direct: None,
            serial: [0; ID_BYTES],
            format: Format::Raw,
            cache: Cache::None,
            backing: Vec::new(),
            max_size: None,
            bytes: None,
            operations: None,
            lock: true,
            secure_erase: None,
        }
    }

    /// Every inherited descriptor that it names.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        let all = std::iter::once(&self.source).chain(&self.backing);
        all.filter_map(|source| match source {
            DiskSource::Fd(fd) => Some(*fd),
            DiskSource::Path(_) => None,
        })
    }

    /// Reads SPEC.
    pub(crate) fn parse(spec: &OsString) -> Result<Self, UsageError> {
        let Some(spec) = spec.to_str() else {
            return bad("--disk", "must be UTF-8");
        };
        let mut source = None;
        let mut options = Self::new(DiskSource::Fd(-1));
        let mut keys = Vec::new();
        for part in split(spec) {
            let Some((key, value)) = part.split_once('=') else {
                return bad("--disk", format!("{part:?} is not KEY=VALUE"));
            };
            if keys.iter().any(|seen| seen == key) {
                return bad("--disk", format!("{key} is given twice"));
            }
            keys.push(key.to_owned());
            match key {
                "path" | "fd" if source.is_some() => {
                    return bad("--disk", "give one of path and fd, once");
                }
                "path" if value.is_empty() => return bad("--disk", "path is empty"),
                "path" => source = Some(DiskSource::Path(value.into())),
                "fd" => source = Some(DiskSource::Fd(fd("--disk fd", value)?)),
                _ => options.set(key, value)?,
            }
        }
        let Some(source) = source else {
            return bad("--disk", "needs path=FILE or fd=N");
        };
        options.source = source;
        options.check()
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), UsageError> {
        match key {
            "readonly" => self.readonly = switch(key, value)?,
            "direct" => self.direct = Some(switch(key, value)?),
            "lock" => self.lock = switch(key, value)?,
            "secure-erase" => self.secure_erase = Some(switch(key, value)?),
            "serial" => {
                let Some(place) = self.serial.get_mut(..value.len()) else {
                    return bad("--disk", format!("serial is longer than {ID_BYTES} bytes"));
                };
                place.copy_from_slice(value.as_bytes());
            }
            "format" => {
                self.format = match value {
                    "raw" => Format::Raw,
                    "qcow2" => Format::Qcow2,
                    _ => return bad("--disk", "format must be raw or qcow2"),
                }
            }
            "cache" => {
                self.cache = match value {
                    "none" => Cache::None,
                    "writeback" => Cache::Writeback,
                    "writethrough" => Cache::Writethrough,
                    "unsafe" => Cache::Unsafe,
                    _ => {
                        return bad(
                            "--disk",
                            "cache must be none, writeback, writethrough or unsafe",
                        );
                    }
                }
            }
            "backing" | "backing-fds" if !self.backing.is_empty() => {
                return bad("--disk", "give one of backing and backing-fds, once");
            }
            "backing" => {
                let paths = value.split(':').map(|p| DiskSource::Path(p.into()));
                self.backing = paths.collect();
                if value.split(':').any(str::is_empty) {
                    return bad("--disk", "backing must be PATH[:PATH]...");
                }
            }
            "backing-fds" => {
                for number in value.split(':') {
                    let number = fd("--disk backing-fds", number)?;
                    self.backing.push(DiskSource::Fd(number));
                }
            }
            "max-size" => match size(value) {
                Some(bytes) if bytes > 0 => self.max_size = Some(bytes),
                _ => return bad("--disk", "max-size must be a size in bytes, or 10G"),
            },
            "bps" => self.bytes = rate(key, value)?,
            "iops" => self.operations = rate(key, value)?,
            _ => return bad("--disk", format!("unknown key {key:?}")),
        }
        Ok(())
    }

    fn check(self) -> Result<Self, UsageError> {
        if self.format == Format::Raw && !self.backing.is_empty() {
            return bad(
                "--disk",
                "a raw disk has no backing files; add format=qcow2",
            );
        }
        if self.backing.len() > MAX_BACKING {
            return bad("--disk", format!("more than {MAX_BACKING} backing files"));
        }
        let mut fds: Vec<RawFd> = self.fds().collect();
        fds.sort_unstable();
        let all = fds.len();
        fds.dedup();
        if fds.len() != all {
            return bad("--disk", "the same descriptor is given twice");
        }
        Ok(self)
    }
}

fn switch(key: &str, value: &str) -> Result<bool, UsageError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bad("--disk", format!("{key} must be on or off")),
    }
}

/// A number with an optional K, M, G or T (powers of 1024).
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(digits) => (digits, "KMGT".find(text.chars().last()?)? * 10 + 10),
        None => (text, 0),
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// N[:BURST]
fn rate(key: &str, value: &str) -> Result<Option<Rate>, UsageError> {
    let (per_second, burst) = match value.split_once(':') {
        Some((per_second, burst)) => (size(per_second), size(burst)),
        None => (size(value), Some(0)),
    };
    match (per_second, burst) {
        (Some(per_second), Some(burst)) => {
            Rate::new(key, per_second, burst).or_else(|why| bad("--disk", why))
        }
        _ => bad(
            "--disk",
            format!("{key} must be N[:BURST], as 10M or 500:2000"),
        ),
    }
}

/// Splits at commas; two commas stand for one.
fn split(spec: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = spec.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(spec: &str) -> Result<DiskOptions, String> {
        DiskOptions::parse(&spec.into()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_disk_is_described_by_its_keys() {
        let d = parse(
            "fd=5,cache=writeback,max-size=2G,bps=10M:20M,iops=500,backing-fds=6:7,format=qcow2",
        )
        .unwrap();
        assert_eq!(d.source, DiskSource::Fd(5));
        assert_eq!(d.cache, Cache::Writeback);
        assert_eq!(d.max_size, Some(2 << 30));
        assert_eq!(d.bytes, Rate::new("", 10 << 20, 20 << 20).unwrap());
        assert_eq!(d.operations, Rate::new("", 500, 0).unwrap());
        assert_eq!(d.backing, [DiskSource::Fd(6), DiskSource::Fd(7)]);
        assert_eq!(d.fds().collect::<Vec<_>>(), [5, 6, 7]);
        assert!(d.lock);
        assert_eq!(d.secure_erase, None);
        let d = parse("path=/a,lock=off,iops=0,format=raw,cache=unsafe").unwrap();
        assert_eq!(
            d,
            DiskOptions {
                lock: false,
                cache: Cache::Unsafe,
                ..DiskOptions::new(DiskSource::Path("/a".into()))
            }
        );
    }

    #[test]
    fn a_path_may_hold_commas() {
        let d = parse("path=/a,,b,readonly=off").unwrap();
        assert_eq!(d.source, DiskSource::Path("/a,b".into()));
        assert!(!d.readonly);
    }

    #[test]
    fn sizes_have_suffixes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("3K", Some(3 << 10)),
            ("1T", Some(1 << 40)),
            ("", None),
            ("K", None),
            ("+1", None),
            ("1.5G", None),
            ("1k", None),
            ("99999999999T", None),
        ] {
            assert_eq!(size(text), bytes, "{text}");
        }
    }

    #[test]
    fn nonsense_is_one_line_that_names_the_key() {
        for (spec, word) in [
            ("path=/x,fd=5", "path and fd"),
            ("readonly=on", "path=FILE"),
            ("path=/x,readonly=yes", "readonly"),
            ("path=/x,serial=123456789012345678901", "serial"),
            ("path=/x,format=vhd", "format"),
            ("path=/x,cache=fast", "cache"),
            ("path=/x,secure-erase=yes", "secure-erase"),
            ("path=/x,bps=fast", "bps"),
            ("path=/x,iops=0:5", "iops"),
            ("path=/x,max-size=0", "max-size"),
            ("path=/x,backing=/b", "format=qcow2"),
            ("path=/x,format=qcow2,backing=/b:", "backing"),
            ("path=/x,format=qcow2,backing=/b,backing-fds=6", "once"),
            ("fd=5,format=qcow2,backing-fds=6:5", "twice"),
            ("fd=5,format=qcow2,backing-fds=6:x", "backing-fds"),
        ] {
            let e = parse(spec).unwrap_err();
            assert!(e.contains(word) && !e.contains('\n'), "{spec}: {e}");
        }
    }
}
