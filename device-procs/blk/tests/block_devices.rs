//! Given a block device (a loop device over a sparse file) instead of a file: the driver is
//! told its limits, a request that is no multiple of its sectors is an error and nothing else,
//! what is discarded is given back, it grows, and what it fails is the guest's I/O error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::loops::Loop;
use support::*;

const DATA: u64 = GPA + 0x1_0000;
const IOERR: u8 = 1;

fn engines(test: impl Fn(&str, &str)) {
    for engine in ["io_uring", "preadv2"] {
        for cache in ["none", "writeback"] {
            test(engine, cache);
        }
    }
}

/// As the launcher hands it over.
fn start(device: &Loop, engine: &str, options: &str) -> (Blk, Control, Vm) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(device.path())
        .unwrap();
    let (blk, control, vhost) = Blk::inherit(file, options, &["--io-engine", engine]);
    let mut vm = Vm::over(vhost, 1);
    vm.start();
    (blk, Control::new(control), vm)
}

/// By its path, which is opened as the cache mode says.
fn serve(scratch: &Scratch, path: &Path, engine: &str, cache: &str) -> (Blk, Vm) {
    let socket = scratch.path("s");
    let spec = format!("path={},cache={cache}", path.display());
    let blk = Blk::listen(&socket, &spec, &["--io-engine", engine]);
    let mut vm = Vm::connect(&socket, 1);
    vm.start();
    (blk, vm)
}

/// What the file under the device holds, once the device has written all it has.
fn content(device: &Loop, file: &Path) -> Vec<u8> {
    File::open(device.path()).unwrap().sync_all().unwrap();
    std::fs::read(file).unwrap()
}

fn number(config: &[u8], at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&config[at..at + len]);
    u64::from_le_bytes(bytes)
}

fn segment(sector: u64, sectors: u32) -> Vec<u8> {
    let mut s = sector.to_le_bytes().to_vec();
    s.extend(sectors.to_le_bytes());
    s.extend([0; 4]);
    s
}

#[test]
fn the_driver_is_told_the_limits_of_the_device() {
    for sector in [512, 4096] {
        let scratch = Scratch::new(&format!("limits-{sector}"));
        let file = scratch.disk(16384);
        let Some(device) = Loop::over(&file, sector) else {
            return;
        };
        let (_blk, _control, mut vm) = start(&device, "io_uring", "");
        let config = vm.config(0, 72);
        let logical = device.limit("logical_block_size");
        assert_eq!(logical, u64::from(sector));
        assert_eq!(number(&config, 0, 8), 16384, "capacity, in sectors of 512");
        assert_eq!(number(&config, 20, 4), logical, "blk_size");
        let physical = device.limit("physical_block_size");
        assert_eq!(logical << config[24], physical, "physical_block_exp");
        assert_eq!(config[25], 0, "alignment_offset");
        let minimum = device.limit("minimum_io_size");
        assert_eq!(number(&config, 26, 2) * logical, minimum, "min_io_size");
        let optimal = device.limit("optimal_io_size");
        assert_eq!(number(&config, 28, 4) * logical, optimal, "opt_io_size");
        // No segment is larger than what the device takes in one piece.
        let largest = device.limit("max_sectors_kb") * 1024;
        assert_eq!(number(&config, 8, 4), largest.min(16 << 20), "size_max");
        assert_eq!(number(&config, 12, 4), 254, "seg_max");
        assert_eq!(number(&config, 44, 4) * 512, physical.max(logical));
    }
}

#[test]
fn requests_that_are_no_multiple_of_a_4_kib_sector_are_errors_and_change_nothing() {
    engines(|engine, cache| {
        let label = format!("{engine}, cache={cache}");
        let scratch = Scratch::new(&format!("4k-{engine}-{cache}"));
        let file = scratch.disk(16384);
        let Some(device) = Loop::over(&file, 4096) else {
            return;
        };
        let (mut blk, mut vm) = serve(&scratch, device.path(), engine, cache);
        assert_eq!(number(&vm.config(20, 4), 0, 4), 4096, "{label}");
        let before = std::fs::read(&file).unwrap();
        vm.write_mem(DATA, &[0xbd; 16384]);
        for (what, sector, len) in [
            ("begins within a block", 1, 4096),
            ("ends within a block", 8, 512),
            ("ends within the next", 8, 4096 + 512),
            ("seven sectors", 8, 3584),
            ("lies within one", 9, 512),
            ("across the end", 16384 - 8, 8192),
            ("at the end", 16384, 4096),
        ] {
            for kind in [T_OUT, T_IN] {
                let (status, _) = vm.request(kind, sector, DATA, len);
                assert_eq!(status, IOERR, "{label}: {kind} {what}");
            }
        }
        for (sector, sectors) in [(1, 8), (8, 7), (8, 9), (16376, 16)] {
            for kind in [T_DISCARD, T_WRITE_ZEROES] {
                vm.write_mem(DATA, &segment(sector, sectors));
                let (status, _) = vm.request(kind, 0, DATA, 16);
                assert_eq!(status, IOERR, "{label}: {kind} {sector} {sectors}");
            }
        }
        vm.request(T_FLUSH, 0, 0, 0);
        assert!(content(&device, &file) == before, "{label}");

        // Whole blocks are served, wherever in memory they are and in whatever pieces.
        for at in [DATA, DATA + 512, DATA + 3] {
            vm.write_mem(at, &[0x3c; 8192]);
            let (head, status) = (GPA + 0x100, GPA + 0x200);
            vm.header(head, T_OUT, 64);
            let chain = [
                d(head, 16, 0),
                d(at, 513, 0),
                d(at + 513, 8192 - 513, 0),
                d(status, 1, WRITE),
            ];
            vm.chain_on(0, &chain);
            assert_eq!(vm.read_mem(status, 1), [0], "{label}");
            assert_eq!(vm.request(T_IN, 56, at, 16384).0, 0, "{label}");
            let mut expected: Vec<u8> = (56..64).flat_map(sector).collect();
            expected.extend([0x3c; 8192]);
            expected.extend((80..88).flat_map(sector));
            assert!(vm.read_mem(at, 16384) == expected, "{label}");
        }
        vm.request(T_FLUSH, 0, 0, 0);
        let after = content(&device, &file);
        assert!(after[64 * 512..80 * 512].iter().all(|b| *b == 0x3c));
        assert!(after[80 * 512..] == before[80 * 512..] && after[..64 * 512] == before[..64 * 512]);
        assert!(blk.is_running());
    });
}

#[test]
fn what_is_discarded_on_a_block_device_is_given_back() {
    engines(|engine, cache| {
        let label = format!("{engine}, cache={cache}");
        let scratch = Scratch::new(&format!("trim-{engine}-{cache}"));
        let file = scratch.disk(16384);
        let Some(device) = Loop::over(&file, 512) else {
            return;
        };
        let (_blk, mut vm) = serve(&scratch, device.path(), engine, cache);
        assert_ne!(vm.features & F_DISCARD, 0, "{label}");
        let allocated = || std::fs::metadata(&file).unwrap().blocks();
        let before = allocated();
        vm.write_mem(DATA, &segment(1024, 8192));
        assert_eq!(vm.request(T_DISCARD, 0, DATA, 16).0, 0, "{label}");
        let discarded = allocated();
        assert!(discarded + 8000 <= before, "{label}: {before} {discarded}");
        // Zeroes that may give space back do, and those that may not are there.
        let mut unmap = segment(10240, 2048);
        unmap[12] = 1;
        vm.write_mem(DATA, &unmap);
        assert_eq!(vm.request(T_WRITE_ZEROES, 0, DATA, 16).0, 0, "{label}");
        let unmapped = allocated();
        assert!(unmapped + 2000 <= discarded, "{label}: {unmapped}");
        vm.write_mem(DATA, &segment(12288 + 8, 1024));
        assert_eq!(vm.request(T_WRITE_ZEROES, 0, DATA, 16).0, 0, "{label}");
        assert!(allocated() >= unmapped, "{label}");
        let now = content(&device, &file);
        for (sectors, empty) in [
            (0..1024, false),
            (1024..9216, true),
            (9216..10240, false),
            (10240..12288, true),
            (12288..12296, false),
            (12296..13320, true),
            (13320..16384, false),
        ] {
            let expected: Vec<u8> = match empty {
                true => vec![0; (sectors.end - sectors.start) * 512],
                false => sectors.clone().flat_map(|s| sector(s as u64)).collect(),
            };
            let got = &now[sectors.start * 512..sectors.end * 512];
            assert!(got == expected, "{label}: {sectors:?}");
        }
    });
}

#[test]
fn a_block_device_that_has_grown_is_a_larger_disk() {
    for engine in ["io_uring", "preadv2"] {
        let scratch = Scratch::new(&format!("larger-{engine}"));
        let file = scratch.disk(64);
        let Some(device) = Loop::over(&file, 512) else {
            return;
        };
        let options = ",max-size=1M";
        let (_blk, mut control, mut vm) = start(&device, engine, options);
        assert_eq!(number(&vm.config(0, 8), 0, 8), 64);
        assert_eq!(vm.request(T_IN, 64, DATA, 512).0, IOERR, "{engine}");
        let under = File::options().write(true).open(&file).unwrap();
        under.set_len(128 * 512).unwrap();
        device.measure();
        control.resize(128 * 512).unwrap();
        assert_eq!(number(&vm.config(0, 8), 0, 8), 128);
        vm.write_mem(DATA, &[0x9e; 512]);
        assert_eq!(vm.request(T_OUT, 127, DATA, 512).0, 0, "{engine}");
        assert_eq!(vm.request(T_FLUSH, 0, 0, 0).0, 0, "{engine}");
        assert_eq!(on_disk(&file, 127, 512), [0x9e; 512], "{engine}");
        assert_eq!(vm.request(T_IN, 128, DATA, 512).0, IOERR, "{engine}");
        let why = control.resize(2 << 20).unwrap_err();
        assert!(why.contains("max-size"), "{why}");
        let why = control.resize(64 * 512).unwrap_err();
        assert!(why.contains("shrink"), "{why}");
        // Told of more than there is: what lies beyond is an I/O error of the host.
        control.resize(256 * 512).unwrap();
        assert_eq!(vm.request(T_IN, 130, DATA, 512).0, IOERR, "{engine}");
        assert_eq!(control.health().rings[0].host_errors, 1, "{engine}");
        assert_eq!(vm.request(T_IN, 126, DATA, 512).0, 0, "{engine}");
    }
}
