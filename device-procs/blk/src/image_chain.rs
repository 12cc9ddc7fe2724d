//! Opens a disk image and the files beneath it, from descriptors: nothing is opened by name,
//! and a chain that names more files than were given, or fewer, is refused.
//!
//! Called by the main thread, after confinement. Every byte that is read here is an
//! attacker's.

use std::io;
use std::sync::Arc;

use bulkhead_runtime::sys;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use crate::disk_options::Format;
use crate::image_io::{self, Buffer};
use crate::qcow2_header::{AT_AUTOCLEAR, Header, HeaderError, LOOK, Name};
use crate::qcow2_journal::Record;
use crate::qcow2_map::{Map, MapError};
use crate::qcow2_overlay::Overlay;
use crate::qcow2_store::{Backend, Store};

/// Memory that the tables of one disk may come to occupy, in bytes.
const BUDGET: u64 = 256 << 20;
/// L2 tables and refcount blocks that the driver keeps per image.
const CACHED_L2: u64 = 128;
const CACHED_REFBLOCKS: u64 = 32;
/// Changed sectors that may wait for the guest's next flush (8 MiB).
pub const MAX_PENDING: usize = 16 * 1024;

/// One file of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What it is called in an error.
    pub name: String,
    /// The file.
    pub backend: Arc<Backend>,
}

impl Layer {
    /// Length of the file now.
    fn len(&self) -> u64 {
        // A block device's is not to be had so; it was measured before.
        let now = sys::file_size(&self.backend.file).map_or(0, |(len, _)| len);
        now.max(self.backend.len)
    }
}

/// Why an image is not served: one line with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("disk {name}: cannot read: {source}")]
    Read {
        /// Which file.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("disk {name}: cannot write: {source}")]
    Write {
        /// Which file.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Its header is not served.
    #[error("disk {name}: {source}")]
    Header {
        /// Which file.
        name: String,
        /// Why.
        source: HeaderError,
    },
    /// Its tables are not trusted.
    #[error("disk {name}: {source}")]
    Tables {
        /// Which file.
        name: String,
        /// Why.
        source: MapError,
    },
    /// The chain goes on, but there is no descriptor.
    #[error(
        "disk {name}: names a backing file {backing}, which was not granted: give backing=PATH \
         (all files of the chain, top first)"
    )]
    NotGranted {
        /// Which file.
        name: String,
        /// What it names.
        backing: Name,
    },
    /// There are more descriptors than the chain is long.
    #[error("disk {name}: names no backing file, but {surplus} more were given: leave them out")]
    Surplus {
        /// Where the chain ends.
        name: String,
        /// How many files are left.
        surplus: usize,
    },
    /// O_DIRECT cannot do what the image needs.
    #[error(
        "disk {name}: O_DIRECT takes blocks of {align} bytes here, and the image has sectors of \
         512: leave O_DIRECT out (cache=writeback)"
    )]
    Unaligned {
        /// Which file.
        name: String,
        /// Bytes of a block.
        align: u32,
    },
    /// Its tables would take too much memory.
    #[error(
        "disk {name}: its tables could take {needed} MiB of memory, more than {most}; convert it \
         to clusters of 64 KiB (qemu-img convert -O qcow2 -o cluster_size=64k IMAGE COPY)"
    )]
    Memory {
        /// The top file.
        name: String,
        /// MiB.
        needed: u64,
        /// MiB.
        most: u64,
    },
    /// The log of another image.
    #[error("disk {name}: the log that the front-end keeps belongs to another image")]
    ForeignLog {
        /// Which file.
        name: String,
    },
    /// The format driver refuses it.
    #[error("disk {name}: {source}")]
    Driver {
        /// Which file.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A chain that was opened.
#[derive(Debug)]
pub struct Opened {
    /// What the guest sees.
    pub access: FormatAccess<Store>,
    /// The top file.
    pub top: Store,
    /// Its header.
    pub header: Header,
    /// Size of what lies beneath it.
    pub beneath: Option<u64>,
}

/// Opens a qcow2 image and what lies beneath it, top first. `recovered` is what another
/// process had changed and not written: it is written before anything is believed.
pub fn open(chain: &[Layer], writable: bool, recovered: Vec<Record>) -> Result<Opened, ImageError> {
    let overlay = Overlay::recovered(recovered);
    let mut layers = read_headers(chain, writable, &overlay)?;
    let Some((top, Some(header))) = layers.pop_front() else {
        return Err(ImageError::Surplus {
            name: String::new(),
            surplus: 0,
        });
    };
    let needed = layers
        .iter()
        .filter_map(|(_, header)| header.as_ref())
        .map(|h| table_memory(h, None))
        .fold(
            table_memory(&header, writable.then_some(top.len())),
            u64::saturating_add,
        );
    if needed > BUDGET {
        return Err(ImageError::Memory {
            name: top.name,
            needed: needed >> 20,
            most: BUDGET >> 20,
        });
    }
    let mut beneath: Option<Arc<FormatAccess<Store>>> = None;
    while let Some((layer, header)) = layers.pop_back() {
        let len = layer.len();
        let store = Store::read_only(layer.backend, len, header.as_ref());
        let access = match header {
            None => open_raw(store),
            Some(_) => open_qcow2(store, beneath.take(), false),
        };
        let access = access.map_err(|source| ImageError::Driver {
            name: layer.name,
            source,
        })?;
        beneath = Some(Arc::new(access));
    }
    let size_beneath = beneath.as_ref().map(|b| b.size());
    let len = top.len();
    let store = if writable {
        let end = len.div_ceil(header.cluster_size()) << header.cluster_bits;
        if !overlay.fits(end) {
            return Err(ImageError::ForeignLog { name: top.name });
        }
        let map = read_map(&top, &header, &overlay)?;
        Store::writable(top.backend, len, &header, map, overlay)
    } else {
        Store::read_only(top.backend, len, Some(&header))
    };
    let name = top.name;
    store.apply().map_err(|source| ImageError::Write {
        name: name.clone(),
        source,
    })?;
    if writable && header.autoclear != 0 {
        log::warn!(
            "disk {name}: it holds what this program does not keep up to date (dirty bitmaps): \
             marked as stale"
        );
        store
            .write_header(&[0; 8], AT_AUTOCLEAR)
            .map_err(|source| ImageError::Write {
                name: name.clone(),
                source,
            })?;
    }
    let access = open_qcow2(store.clone(), beneath, writable)
        .map_err(|source| ImageError::Driver { name, source })?;
    Ok(Opened {
        access,
        top: store,
        header,
        beneath: size_beneath,
    })
}

type Layers = std::collections::VecDeque<(Layer, Option<Header>)>;

/// Reads the headers of a chain from the top down, as far as it goes.
fn read_headers(chain: &[Layer], writable: bool, overlay: &Overlay) -> Result<Layers, ImageError> {
    let mut layers = Layers::new();
    let mut left = chain.iter();
    let mut format = Format::Qcow2;
    let mut named: Option<(String, Name)> = None;
    loop {
        let Some(layer) = left.next() else {
            let (name, backing) = named.unwrap_or_default();
            return Err(ImageError::NotGranted { name, backing });
        };
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(if layers.is_empty() {
                read_header(layer, writable, overlay)?
            } else {
                read_header(layer, false, &Overlay::default())?
            }),
        };
        let name = layer.name.clone();
        let backing = header.as_ref().and_then(|h| h.backing.clone());
        layers.push_back((layer.clone(), header));
        let Some(backing) = backing else {
            return match left.len() {
                0 => Ok(layers),
                surplus => Err(ImageError::Surplus { name, surplus }),
            };
        };
        format = backing.format;
        named = Some((name, backing.name));
    }
}

fn read_at(layer: &Layer, offset: u64, len: u64, overlay: &Overlay) -> Result<Vec<u8>, ImageError> {
    let direct = layer.backend.direct;
    let align = direct.map_or(1, |d| d.offset.max(d.memory)) as usize;
    let len = usize::try_from(len).unwrap_or(0);
    let mut buffer = Buffer::new(len.next_multiple_of(align), align);
    image_io::read(&layer.backend.file, buffer.bytes(), offset).map_err(|source| {
        ImageError::Read {
            name: layer.name.clone(),
            source,
        }
    })?;
    let mut bytes = buffer.bytes().get(..len).unwrap_or_default().to_vec();
    overlay.patch(&mut bytes, offset);
    Ok(bytes)
}

fn read_header(layer: &Layer, writable: bool, overlay: &Overlay) -> Result<Header, ImageError> {
    let len = layer.len();
    let bytes = read_at(layer, 0, len.min(LOOK as u64), overlay)?;
    let header = Header::parse(&bytes, len, writable).map_err(|source| ImageError::Header {
        name: layer.name.clone(),
        source,
    })?;
    if let Some(direct) = layer.backend.direct
        && direct.offset > 512
    {
        return Err(ImageError::Unaligned {
            name: layer.name.clone(),
            align: direct.offset,
        });
    }
    Ok(header)
}

fn read_map(layer: &Layer, header: &Header, overlay: &Overlay) -> Result<Map, ImageError> {
    let l1 = u64::from(header.l1_entries) * 8;
    let l1 = read_at(layer, header.l1_offset, l1, overlay)?;
    let reftable = header.reftable_entries() * 8;
    let reftable = read_at(layer, header.reftable_offset, reftable, overlay)?;
    Map::new(header, &l1, &reftable, layer.len()).map_err(|source| ImageError::Tables {
        name: layer.name.clone(),
        source,
    })
}

fn open_raw(store: Store) -> io::Result<FormatAccess<Store>> {
    Ok(FormatAccess::new(Raw::open_image(store, false)?))
}

fn open_qcow2(
    store: Store,
    beneath: Option<Arc<FormatAccess<Store>>>,
    writable: bool,
) -> io::Result<FormatAccess<Store>> {
    let image = Qcow2::<Store, Arc<FormatAccess<Store>>>::builder(store)
        .backing(beneath)
        .data_file(None)
        .write(writable)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

/// What the tables of an image can come to occupy: those that the driver caches, and the
/// roots. `file_len` is given if it is written.
fn table_memory(header: &Header, file_len: Option<u64>) -> u64 {
    let cluster = header.cluster_size();
    let l2 = header.size.div_ceil(1 << header.l2_coverage_bits());
    let l1 = u64::from(header.l1_entries) * 8;
    let mut needed = l2.min(CACHED_L2).saturating_mul(cluster).saturating_add(l1);
    if let Some(len) = file_len {
        let clusters = len.saturating_add(header.size) >> header.cluster_bits;
        let blocks = (clusters >> header.refblock_bits()).saturating_add(1);
        needed = needed
            .saturating_add(blocks.min(CACHED_REFBLOCKS).saturating_mul(cluster))
            .saturating_add(header.reftable_entries().saturating_mul(8))
            // Where the tables lie.
            .saturating_add(l1.saturating_mul(4))
            .saturating_add(MAX_PENDING as u64 * 600);
    }
    needed
}
