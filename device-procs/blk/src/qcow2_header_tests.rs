//! Headers, good and bad.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

const CLUSTER: u64 = 1 << 16;
const FILE: u64 = 10 * CLUSTER;

/// An image of 1 GiB as `qemu-img create` makes it.
fn good() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    put(&mut bytes, 0, &MAGIC.to_be_bytes());
    put(&mut bytes, AT_VERSION, &3u32.to_be_bytes());
    put(&mut bytes, AT_CLUSTER_BITS, &16u32.to_be_bytes());
    put(&mut bytes, AT_SIZE, &(1u64 << 30).to_be_bytes());
    put(&mut bytes, AT_L1_ENTRIES, &2u32.to_be_bytes());
    put(&mut bytes, AT_L1_OFFSET, &(3 * CLUSTER).to_be_bytes());
    put(&mut bytes, AT_REFTABLE_OFFSET, &CLUSTER.to_be_bytes());
    put(&mut bytes, AT_REFTABLE_CLUSTERS, &1u32.to_be_bytes());
    put(&mut bytes, AT_REFCOUNT_ORDER, &4u32.to_be_bytes());
    put(&mut bytes, AT_LENGTH, &104u32.to_be_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn extension(bytes: &mut [u8], at: usize, kind: u32, data: &[u8]) -> usize {
    put(bytes, at, &kind.to_be_bytes());
    put(bytes, at + 4, &(data.len() as u32).to_be_bytes());
    put(bytes, at + 8, data);
    (at + 8 + data.len()).next_multiple_of(8)
}

fn with_backing(format: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = good();
    let mut at = 104;
    if let Some(format) = format {
        at = extension(&mut bytes, at, EXT_BACKING_FORMAT, format);
    }
    at = extension(&mut bytes, at, EXT_END, b"");
    put(&mut bytes, at, b"/images/base\x1b[2J.img");
    put(&mut bytes, AT_BACKING_OFFSET, &(at as u64).to_be_bytes());
    put(&mut bytes, AT_BACKING_LENGTH, &20u32.to_be_bytes());
    bytes
}

fn refused(bytes: &[u8], writable: bool) -> String {
    Header::parse(bytes, FILE, writable)
        .unwrap_err()
        .to_string()
}

#[test]
fn a_good_header_is_read_and_written_anew() {
    let header = Header::parse(&good(), FILE, true).unwrap();
    assert_eq!((header.size, header.cluster_size()), (1 << 30, CLUSTER));
    assert_eq!(header.backing, None);
    let again = Header::parse(&header.sanitized(), FILE, true).unwrap();
    assert_eq!(again, header);
}

#[test]
fn a_backing_file_needs_its_format() {
    let header = Header::parse(&with_backing(Some(b"raw")), FILE, true).unwrap();
    let backing = header.backing.unwrap();
    assert_eq!(backing.format, Format::Raw);
    // The name is printable, whatever it is.
    assert_eq!(backing.name.to_string(), "/images/base\\u{1b}[2J.img");
    let qcow2 = Header::parse(&with_backing(Some(b"qcow2")), FILE, true).unwrap();
    assert_eq!(qcow2.backing.map(|b| b.format), Some(Format::Qcow2));
    assert!(refused(&with_backing(None), false).contains("qemu-img rebase -u"));
    assert!(refused(&with_backing(Some(b"vmdk")), false).contains("in the format vmdk"));
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let feature = |bits: u64| {
        let mut bytes = good();
        put(&mut bytes, AT_INCOMPATIBLE, &bits.to_be_bytes());
        bytes
    };
    let mut external = feature(EXTERNAL_DATA);
    extension(&mut external, 104, EXT_DATA_FILE, b"data.raw");
    assert!(refused(&external, false).contains("external file data.raw"));
    assert!(refused(&feature(EXTENDED_L2), false).contains("extended L2"));
    assert!(refused(&feature(COMPRESSION_TYPE), false).contains("zlib"));
    assert!(refused(&feature(1 << 40), false).contains("feature 40"));
    // These are wrong only for a writer.
    for (bits, word) in [(DIRTY, "not closed"), (CORRUPT, "marked as corrupt")] {
        assert!(Header::parse(&feature(bits), FILE, false).is_ok());
        assert!(refused(&feature(bits), true).contains(word));
    }
    let mut snapshots = good();
    put(&mut snapshots, AT_SNAPSHOTS, &2u32.to_be_bytes());
    assert!(Header::parse(&snapshots, FILE, false).is_ok());
    assert!(refused(&snapshots, true).contains("2 internal snapshots"));
    let mut encrypted = good();
    put(&mut encrypted, AT_CRYPT, &2u32.to_be_bytes());
    assert!(refused(&encrypted, false).contains("encrypted"));
    assert!(refused(&[0; 512], false).contains("format=raw"));
    assert!(refused(&good()[..50], false).contains("cut short"));
}

#[test]
fn absurd_numbers_are_refused() {
    let cases: [(usize, &[u8]); 14] = [
        (AT_CLUSTER_BITS, &8u32.to_be_bytes()),
        (AT_CLUSTER_BITS, &22u32.to_be_bytes()),
        (AT_SIZE, &511u64.to_be_bytes()),
        (AT_SIZE, &u64::MAX.to_be_bytes()),
        (AT_L1_ENTRIES, &1u32.to_be_bytes()),
        (AT_L1_ENTRIES, &u32::MAX.to_be_bytes()),
        (AT_L1_OFFSET, &(3 * CLUSTER + 512).to_be_bytes()),
        (AT_L1_OFFSET, &FILE.to_be_bytes()),
        (AT_L1_OFFSET, &CLUSTER.to_be_bytes()),
        (AT_REFTABLE_CLUSTERS, &u32::MAX.to_be_bytes()),
        (AT_REFTABLE_CLUSTERS, &0u32.to_be_bytes()),
        (AT_REFTABLE_OFFSET, &u64::MAX.to_be_bytes()),
        (AT_REFCOUNT_ORDER, &7u32.to_be_bytes()),
        (AT_LENGTH, &(1u32 << 20).to_be_bytes()),
    ];
    for (at, value) in cases {
        let mut bytes = good();
        put(&mut bytes, at, value);
        assert!(
            Header::parse(&bytes, FILE, false).is_err(),
            "{at} {value:x?}"
        );
    }
}

proptest! {
    /// Whatever the bytes: one answer, and numbers that can be reckoned with.
    #[test]
    fn any_bytes_are_judged(
        edits in proptest::collection::vec((0usize..400, any::<u8>()), 0..24),
        backing in any::<bool>(),
        cut in 0usize..4096,
        writable in any::<bool>(),
    ) {
        let mut bytes = if backing { with_backing(Some(b"qcow2")) } else { good() };
        for (at, value) in edits {
            bytes[at] = value;
        }
        if cut < 200 {
            bytes.truncate(cut);
        }
        if let Ok(header) = Header::parse(&bytes, FILE, writable) {
            prop_assert!(header.size <= MAX_SIZE);
            let end = FILE.next_multiple_of(header.cluster_size());
            prop_assert!(header.l1_offset + u64::from(header.l1_entries) * 8 <= end);
            prop_assert!(header.reftable_offset + header.reftable_entries() * 8 <= end);
            let again = Header::parse(&header.sanitized(), FILE, writable).unwrap();
            prop_assert_eq!(again, Header { backing: None, autoclear: 0, snapshots: 0, ..header });
        }
    }
}
