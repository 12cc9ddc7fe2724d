//! Opens a disk image and the files beneath it, from descriptors: nothing is opened by name,
//! and a chain that names more files than were given, or fewer, is refused.
//!
//! Called by the main thread, after confinement. Every byte that is read here is an
//! attacker's.

use std::io;
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use crate::image_io::{self, Buffer};
use crate::qcow2_header::{AT_AUTOCLEAR, Format, Header, HeaderError, LOOK, Name};
use crate::qcow2_map::{Map, MapError};
use crate::qcow2_store::{Backend, Store};

/// Memory that the tables of one disk may come to occupy, in bytes.
const BUDGET: u64 = 256 << 20;
/// L2 tables and refcount blocks that the driver keeps per image.
const CACHED_L2: u64 = 128;
const CACHED_REFBLOCKS: u64 = 32;
/// Changed sectors that may wait for the guest's next flush (8 MiB).
pub const MAX_PENDING: usize = 16 * 1024;

/// One file of a chain.
#[derive(Debug)]
pub struct Layer {
    /// What it is called in an error.
    pub name: String,
    /// The file.
    pub backend: Backend,
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
        "disk {name}: its clusters of {cluster} bytes are smaller than what O_DIRECT takes \
         ({align} bytes): leave O_DIRECT out (cache=writeback)"
    )]
    Unaligned {
        /// Which file.
        name: String,
        /// Bytes of a cluster.
        cluster: u64,
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

/// Opens a qcow2 image and what lies beneath it, top first.
pub fn open(chain: Vec<Layer>, writable: bool) -> Result<Opened, ImageError> {
    let mut layers = read_headers(chain, writable)?;
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
            table_memory(&header, writable.then_some(top.backend.len)),
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
        let store = Store::read_only(layer.backend, header.as_ref());
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
    let Layer { name, backend } = top;
    let store = if writable {
        let map = read_map(&name, &backend, &header)?;
        Store::writable(backend, &header, map)
    } else {
        Store::read_only(backend, Some(&header))
    };
    if writable && header.autoclear != 0 {
        log::warn!(
            "disk {name}: it holds what this program does not keep up to date (dirty \
                 bitmaps): marked as stale"
        );
        store
            .write_header(&[0; 8], AT_AUTOCLEAR)
            .map_err(|source| ImageError::Driver {
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
fn read_headers(chain: Vec<Layer>, writable: bool) -> Result<Layers, ImageError> {
    let mut layers = Layers::new();
    let mut left = chain.into_iter();
    let mut format = Format::Qcow2;
    let mut named: Option<(String, Name)> = None;
    loop {
        let Some(layer) = left.next() else {
            let (name, backing) = named.unwrap_or_default();
            return Err(ImageError::NotGranted { name, backing });
        };
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(read_header(&layer, writable && layers.is_empty())?),
        };
        let name = layer.name.clone();
        let backing = header.as_ref().and_then(|h| h.backing.clone());
        layers.push_back((layer, header));
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

fn read_at(name: &str, backend: &Backend, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
    let align = backend.direct.map_or(1, |d| d.offset.max(d.memory));
    let len = usize::try_from(len).unwrap_or(0);
    let whole = len.next_multiple_of(align as usize);
    let mut buffer = Buffer::new(whole, align as usize);
    image_io::read(&backend.file, buffer.bytes(), offset).map_err(|source| ImageError::Read {
        name: name.into(),
        source,
    })?;
    Ok(buffer.bytes().get(..len).unwrap_or_default().to_vec())
}

fn read_header(layer: &Layer, writable: bool) -> Result<Header, ImageError> {
    let len = layer.backend.len.min(LOOK as u64);
    let bytes = read_at(&layer.name, &layer.backend, 0, len)?;
    let header = Header::parse(&bytes, layer.backend.len, writable).map_err(|source| {
        ImageError::Header {
            name: layer.name.clone(),
            source,
        }
    })?;
    if let Some(direct) = layer.backend.direct
        && u64::from(direct.offset) > header.cluster_size()
    {
        return Err(ImageError::Unaligned {
            name: layer.name.clone(),
            cluster: header.cluster_size(),
            align: direct.offset,
        });
    }
    Ok(header)
}

fn read_map(name: &str, backend: &Backend, header: &Header) -> Result<Map, ImageError> {
    let l1 = read_at(
        name,
        backend,
        header.l1_offset,
        u64::from(header.l1_entries) * 8,
    )?;
    let reftable = read_at(
        name,
        backend,
        header.reftable_offset,
        header.reftable_entries() * 8,
    )?;
    Map::new(header, &l1, &reftable, backend.len).map_err(|source| ImageError::Tables {
        name: name.into(),
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
