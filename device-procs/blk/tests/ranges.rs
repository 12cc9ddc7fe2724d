//! Given a driver that discards and zeroes: the ranges are empty and nothing else is, on
//! file systems that can do all, some or none of it; and whatever a hostile driver asks for
//! costs it a status and nothing more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use support::*;
use vhost::VhostBackend;

const DATA: u64 = GPA + 0x1_0000;
const SECTORS: u64 = 4096;
const UNMAP: u32 = 1;

/// A file on a disk (ZERO_RANGE as a rule) and one in memory (never), by each engine.
fn everywhere(name: &str, test: impl Fn(&str, &Path, &[&str])) {
    for dir in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        for engine in ["io_uring", "preadv2"] {
            let place = dir.to_string_lossy().replace('/', "-");
            let scratch = Scratch::new_in(&dir, &format!("ranges-{name}-{engine}{place}"));
            let disk = scratch.disk(SECTORS);
            let label = format!("{engine} in {}", dir.display());
            test(&label, &disk, &["--io-engine", engine]);
        }
    }
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut s = sector.to_le_bytes().to_vec();
    s.extend(sectors.to_le_bytes());
    s.extend(flags.to_le_bytes());
    s
}

/// One request with these segments; its status.
fn ranges(vm: &mut Vm, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
    let bytes: Vec<u8> = segments
        .iter()
        .flat_map(|(sector, sectors, flags)| segment(*sector, *sectors, *flags))
        .collect();
    vm.write_mem(DATA, &bytes);
    let (status, used) = vm.request(kind, 0, DATA, bytes.len() as u32);
    assert_eq!(used, 1);
    status
}

fn serve(disk: &Path, options: &str, args: &[&str]) -> (Blk, Vm) {
    let socket = disk.with_file_name("s");
    let spec = format!("path={}{options}", disk.display());
    let blk = Blk::listen(&socket, &spec, args);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    (blk, vm)
}

fn is_empty(disk: &Path, sector: u64, sectors: u64) -> bool {
    let content = on_disk(disk, sector, (sectors * 512) as usize);
    content.iter().all(|b| *b == 0)
}

fn is_untouched(disk: &Path, sectors: std::ops::Range<u64>) -> bool {
    sectors
        .into_iter()
        .all(|s| on_disk(disk, s, 512) == sector(s))
}

#[test]
fn discarded_space_is_given_back() {
    everywhere("discard", |label, disk, args| {
        let (_blk, mut vm) = serve(disk, "", args);
        assert_ne!(vm.features & F_DISCARD, 0, "{label}");
        let before = std::fs::metadata(disk).unwrap().blocks();
        // Two ranges; the rest stays.
        assert_eq!(
            ranges(&mut vm, T_DISCARD, &[(8, 1024, 0), (2048, 512, 0)]),
            0,
            "{label}"
        );
        assert!(
            is_empty(disk, 8, 1024) && is_empty(disk, 2048, 512),
            "{label}"
        );
        assert!(is_untouched(disk, 0..8), "{label}");
        assert!(is_untouched(disk, 1032..1040), "{label}");
        assert!(is_untouched(disk, 2560..2568), "{label}");
        let meta = std::fs::metadata(disk).unwrap();
        assert!(meta.blocks() + 1400 < before, "{label}: {}", meta.blocks());
        assert_eq!(meta.len(), SECTORS * 512, "{label}");
        // The guest reads zeros, and may write there again.
        assert_eq!(vm.request(T_IN, 100, DATA, 512).0, 0);
        assert_eq!(vm.read_mem(DATA, 512), [0; 512]);
        vm.write_mem(DATA, &[7; 512]);
        assert_eq!(vm.request(T_OUT, 100, DATA, 512).0, 0);
        assert_eq!(on_disk(disk, 100, 512), [7; 512]);
    });
}

#[test]
fn zeroes_are_written_with_and_without_unmapping() {
    everywhere("zeroes", |label, disk, args| {
        for cache in ["none", "writeback", "writethrough", "unsafe"] {
            let (_blk, mut vm) = serve(disk, &format!(",cache={cache}"), args);
            assert_ne!(vm.features & F_WRITE_ZEROES, 0, "{label}");
            let config = vm.config(0, 60);
            let most = u32::from_le_bytes(config[48..52].try_into().unwrap());
            assert!(most >= 2048, "{label}");
            assert_eq!(config[56], 1, "{label}: unmap may give space back");
            for (flags, first) in [(0, 16u64), (UNMAP, 2048)] {
                let before = std::fs::metadata(disk).unwrap().blocks();
                let status = ranges(&mut vm, T_WRITE_ZEROES, &[(first, 1000, flags)]);
                assert_eq!(status, 0, "{label}, {cache}, flags {flags}");
                assert!(is_empty(disk, first, 1000), "{label}, {cache}, {flags}");
                assert!(is_untouched(disk, first - 8..first), "{label}");
                assert!(is_untouched(disk, first + 1000..first + 1010), "{label}");
                let after = std::fs::metadata(disk).unwrap().blocks();
                // Without unmap the space must stay.
                assert!(flags == UNMAP || after >= before, "{label}, {cache}");
                // For the next cache mode.
                let content: Vec<u8> = (first..first + 1000).flat_map(sector).collect();
                vm.write_mem(DATA, &content);
                assert_eq!(vm.request(T_OUT, first, DATA, 512_000).0, 0);
            }
            assert_eq!(std::fs::metadata(disk).unwrap().len(), SECTORS * 512);
        }
    });
}

#[test]
fn what_must_not_be_is_refused_and_touches_nothing() {
    const IOERR: u8 = 1;
    const UNSUPP: u8 = 2;
    everywhere("hostile", |label, disk, args| {
        let (mut blk, mut vm) = serve(disk, "", args);
        let config = vm.config(0, 60);
        let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let (discard_sectors, discard_segments) = (field(36), field(40));
        let (zero_sectors, zero_segments) = (field(48), field(52));
        let surplus = |count: u32| vec![(0, 1, 0); count as usize + 1];
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            let (sectors, segments) = match kind {
                T_DISCARD => (discard_sectors, discard_segments),
                _ => (zero_sectors, zero_segments),
            };
            for (what, list, expected) in [
                ("across the end", vec![(SECTORS - 1, 2, 0)], IOERR),
                ("far beyond", vec![(u64::MAX, 1, 0)], IOERR),
                ("an overflow", vec![(u64::MAX / 512, 8, 0)], IOERR),
                ("everything", vec![(0, u32::MAX, 0)], IOERR),
                ("more than the most", vec![(0, sectors + 1, 0)], IOERR),
                ("too many", surplus(segments), IOERR),
                ("an unknown flag", vec![(0, 1, 2)], UNSUPP),
                ("all flags", vec![(0, 1, u32::MAX)], UNSUPP),
                // The first is good, but all are looked at first.
                ("one bad of two", vec![(0, 8, 0), (SECTORS, 8, 0)], IOERR),
                ("nothing of it", vec![(0, 0, 0)], 0),
                ("nothing at the end", vec![(SECTORS, 0, 0)], 0),
            ] {
                let status = ranges(&mut vm, kind, &list);
                assert_eq!(status, expected, "{label}, {kind}: {what}");
            }
            for len in [0, 1, 15, 17, 31, 16 * (segments + 1)] {
                vm.write_mem(DATA, &segment(0, 8, 0).repeat(segments as usize + 1));
                let (status, _) = vm.request(kind, 0, DATA, len);
                assert_eq!(status, IOERR, "{label}, {kind}: {len} bytes");
            }
        }
        // Unmap is not discard's flag.
        assert_eq!(ranges(&mut vm, T_DISCARD, &[(0, 8, UNMAP)]), UNSUPP);
        assert!(is_untouched(disk, 0..64), "{label}");
        assert!(is_untouched(disk, SECTORS - 64..SECTORS), "{label}");
        assert_eq!(std::fs::metadata(disk).unwrap().len(), SECTORS * 512);
        assert!(!vm.err_fired(0));
        // As many as there may be, in as many pieces of memory as it takes.
        let most = vec![(64, 1, 0); discard_segments as usize];
        assert_eq!(ranges(&mut vm, T_DISCARD, &most), 0, "{label}");
        let bytes = segment(72, 8, 0);
        vm.write_mem(DATA, &bytes);
        let (head, status) = (GPA + 0x100, GPA + 0x200);
        vm.header(head, T_WRITE_ZEROES, 0);
        let chain = [
            d(head, 9, 0),
            d(head + 9, 7, 0),
            d(DATA, 3, 0),
            d(DATA + 3, 0, 0),
            d(DATA + 3, 13, 0),
            d(status, 1, support::WRITE),
        ];
        vm.chain_on(0, &chain);
        assert_eq!(vm.read_mem(status, 1), [0]);
        assert!(
            is_empty(disk, 72, 8) && is_untouched(disk, 80..88),
            "{label}"
        );
        assert!(blk.is_running());
    });
}

#[test]
fn what_was_not_accepted_is_not_done() {
    everywhere("unaccepted", |label, disk, args| {
        let (_blk, mut vm) = serve(disk, "", args);
        vm.frontend.get_vring_base(0).unwrap();
        let features = vm.features & !(F_DISCARD | F_WRITE_ZEROES);
        vm.frontend.set_features(features).unwrap();
        vm.queues[0].ring.reset();
        vm.start_queue(0, 0);
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(ranges(&mut vm, kind, &[(0, 8, 0)]), 2, "{label}");
        }
        assert!(is_untouched(disk, 0..8));
    });
}

#[test]
fn a_read_only_disk_offers_neither() {
    everywhere("readonly", |label, disk, args| {
        let (_blk, mut vm) = serve(disk, ",readonly=on", args);
        assert_eq!(vm.features & (F_DISCARD | F_WRITE_ZEROES), 0, "{label}");
        assert_eq!(vm.config(36, 24), [0; 24], "{label}");
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(ranges(&mut vm, kind, &[(0, 8, 0)]), 2, "{label}");
        }
        assert!(is_untouched(disk, 0..8));
    });
}

#[test]
fn a_file_truncated_underneath_is_not_made_larger_by_emptying_it() {
    everywhere("truncated", |label, disk, args| {
        let (_blk, mut vm) = serve(disk, "", args);
        let file = std::fs::File::options().write(true).open(disk).unwrap();
        file.set_len(1024 * 512).unwrap();
        for (kind, flags) in [(T_DISCARD, 0), (T_WRITE_ZEROES, UNMAP)] {
            ranges(&mut vm, kind, &[(1000, 1000, flags)]);
            let len = std::fs::metadata(disk).unwrap().len();
            assert_eq!(len, 1024 * 512, "{label}");
        }
        assert!(is_untouched(disk, 0..16));
    });
}
