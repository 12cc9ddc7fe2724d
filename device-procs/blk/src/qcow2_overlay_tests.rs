//! After a crash at any write, with any part of what was not yet durable lost, every
//! reference in the file is counted.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use super::*;
use crate::qcow2_header::Header;
use proptest::prelude::*;

/// 512-byte clusters: header 0, L1 1, refcount table 2, refcount block 3, L2 4, data from 5.
const CLUSTER: u64 = 512;
const L2_AT: u64 = 4 * CLUSTER;
const BLOCK_AT: u64 = 3 * CLUSTER;
const COPIED: u64 = 1 << 63;
const CLUSTERS: u64 = 64;

#[derive(Default)]
struct Disk {
    durable: RefCell<Vec<u8>>,
    /// Writes since the last barrier.
    volatile: RefCell<Vec<(u64, Vec<u8>)>>,
    /// Operations until it fails for ever.
    left: RefCell<usize>,
}

impl Disk {
    fn spend(&self) -> io::Result<()> {
        let mut left = self.left.borrow_mut();
        *left = left.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(())
    }

    /// What is there after a crash in which only the writes that `keep` picks got through.
    fn after_crash(&self, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let mut bytes = self.durable.borrow().clone();
        for (at, written) in self.volatile.borrow().iter() {
            for (i, sector) in written.chunks(SECTOR).enumerate() {
                let at = *at as usize + i * SECTOR;
                if keep() {
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        bytes
    }
}

impl Medium for Disk {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let now = self.after_crash(|| true);
        let at = offset as usize;
        buffer.copy_from_slice(&now[at..at + buffer.len()]);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.spend()?;
        self.volatile.borrow_mut().push((offset, bytes.to_vec()));
        Ok(())
    }

    fn barrier(&self) -> io::Result<()> {
        self.spend()?;
        let now = self.after_crash(|| true);
        *self.durable.borrow_mut() = now;
        self.volatile.borrow_mut().clear();
        Ok(())
    }
}

fn header(order: u32) -> Header {
    Header {
        version: 3,
        cluster_bits: 9,
        size: 64 * CLUSTER,
        l1_entries: 2,
        l1_offset: CLUSTER,
        reftable_offset: 2 * CLUSTER,
        reftable_clusters: 1,
        refcount_order: order,
        snapshots: 0,
        autoclear: 0,
        backing: None,
    }
}

fn set_count(block: &mut [u8], order: u32, cluster: u64, value: u8) {
    let bit = cluster << order;
    if order >= 3 {
        let width = 1usize << (order - 3);
        block[bit as usize / 8 + width - 1] = value;
    } else {
        let mask = ((1u16 << (1 << order)) - 1) as u8;
        let place = &mut block[bit as usize / 8];
        *place = *place & !(mask << (bit % 8)) | value << (bit % 8);
    }
}

fn start(order: u32) -> (Disk, Map) {
    let mut bytes = vec![0; (CLUSTERS * CLUSTER) as usize];
    bytes[512..520].copy_from_slice(&(COPIED | L2_AT).to_be_bytes());
    bytes[1024..1032].copy_from_slice(&BLOCK_AT.to_be_bytes());
    for cluster in 0..5 {
        set_count(&mut bytes[1536..2048], order, cluster, 1);
    }
    let map = Map::new(
        &header(order),
        &bytes[512..528],
        &bytes[1024..1536],
        bytes.len() as u64,
    );
    let disk = Disk {
        durable: RefCell::new(bytes),
        left: RefCell::new(usize::MAX),
        ..Disk::default()
    };
    (disk, map.unwrap())
}

fn assert_counted(bytes: &[u8], order: u32) {
    let counts: Vec<u64> = counts(&bytes[1536..2048], order).collect();
    for (guest, entry) in bytes[2048..2560].chunks(8).enumerate() {
        let entry = u64::from_be_bytes(entry.try_into().unwrap());
        let cluster = (entry & !COPIED) / CLUSTER;
        assert!(
            entry == 0 || counts[cluster as usize] > 0,
            "guest cluster {guest} lies in host cluster {cluster}, which is counted as free"
        );
    }
}

/// A guest cluster gets a host cluster, or loses it.
#[derive(Clone, Debug)]
struct Change {
    guest: usize,
    host: Option<u64>,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = (0usize..20, proptest::option::weighted(0.7, 0u64..16))
        .prop_map(|(guest, host)| Change { guest, host });
    proptest::collection::vec(change, 1..24)
}

proptest! {
    #[test]
    fn references_are_counted_after_any_crash(
        rounds in proptest::collection::vec(changes(), 1..4),
        order in 0u32..=4,
        fails_after in 0usize..16,
        coins in proptest::collection::vec(any::<bool>(), 64),
    ) {
        let (disk, map) = start(order);
        let mut overlay = Overlay::default();
        let mut l2 = vec![0u8; 512];
        let mut block = vec![0u8; 512];
        disk.read(&mut block, BLOCK_AT).unwrap();
        *disk.left.borrow_mut() = fails_after;
        let mut died = false;
        for round in rounds {
            let mut freed = false;
            for Change { guest, host } in round {
                let place = &mut l2[guest * 8..guest * 8 + 8];
                let old = u64::from_be_bytes((&*place).try_into().unwrap()) & !COPIED;
                let free = host.map(|h| h + 5).filter(|&h| {
                    counts(&block, order).nth(h as usize) == Some(0) && !freed
                });
                let new = free.map_or(0, |h| COPIED | (h * CLUSTER));
                place.copy_from_slice(&new.to_be_bytes());
                if let Some(host) = free {
                    set_count(&mut block, order, host, 1);
                }
                if old != 0 {
                    set_count(&mut block, order, old / CLUSTER, 0);
                    // As the store's users do: apply before anything is allocated anew.
                    freed = true;
                }
            }
            // In whichever order the driver writes them.
            overlay.write(&disk, &l2, L2_AT, None).unwrap();
            overlay.write(&disk, &block, BLOCK_AT, Some(order)).unwrap();
            if overlay.apply(&disk, &map, order).is_err() {
                died = true;
                break;
            }
        }
        let mut coins = coins.into_iter().cycle();
        assert_counted(&disk.after_crash(|| coins.next().unwrap_or(true)), order);
        assert_counted(&disk.after_crash(|| true), order);
        assert_counted(&disk.after_crash(|| false), order);
        if died {
            // The next attempt finds everything still there.
            *disk.left.borrow_mut() = usize::MAX;
            overlay.apply(&disk, &map, order).unwrap();
        }
        let mut now = vec![0; 512];
        disk.read(&mut now, L2_AT).unwrap();
        prop_assert_eq!(&now, &l2);
        disk.read(&mut now, BLOCK_AT).unwrap();
        prop_assert_eq!(&now, &block);
    }

    #[test]
    fn what_is_held_reads_back(
        writes in proptest::collection::vec((0u64..8000, 1usize..2000, any::<u8>()), 1..12),
        at in 0u64..8000,
        len in 1usize..4000,
    ) {
        let disk = Disk {
            durable: RefCell::new(vec![7; 16384]),
            left: RefCell::new(usize::MAX),
            ..Disk::default()
        };
        let mut overlay = Overlay::default();
        let mut model = vec![7u8; 16384];
        for (at, len, value) in writes {
            let bytes: Vec<u8> = (0..len).map(|i| value.wrapping_add(i as u8)).collect();
            overlay.write(&disk, &bytes, at, None).unwrap();
            model[at as usize..at as usize + len].copy_from_slice(&bytes);
        }
        let mut read = vec![0; len];
        disk.read(&mut read, at).unwrap();
        overlay.patch(&mut read, at);
        prop_assert_eq!(&read, &model[at as usize..at as usize + len]);
    }
}

#[test]
fn a_freed_cluster_is_noticed() {
    let (disk, _) = start(4);
    let mut overlay = Overlay::default();
    let mut block = vec![0u8; 512];
    disk.read(&mut block, BLOCK_AT).unwrap();
    set_count(&mut block, 4, 9, 1);
    overlay.write(&disk, &block, BLOCK_AT, Some(4)).unwrap();
    assert!(!overlay.take_freed());
    set_count(&mut block, 4, 9, 0);
    overlay.write(&disk, &block, BLOCK_AT, Some(4)).unwrap();
    assert!(overlay.take_freed());
    assert!(!overlay.take_freed());
}

#[test]
fn an_empty_overlay_is_still_a_barrier() {
    let (disk, map) = start(4);
    disk.write(&[1; 512], 40 * CLUSTER).unwrap();
    Overlay::default().apply(&disk, &map, 4).unwrap();
    assert!(disk.volatile.borrow().is_empty());
}
