//! Images whose metadata lie: a refused start or an I/O error, never a panic, a hang or
//! memory without bound. Seeds are fixed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_blk::image::Image;
use bulkhead_blk::image_chain::Layer;
use bulkhead_blk::qcow2_store::Backend;
use bulkhead_blk::transfer::{Direction, Transfer};

const MIB: u64 = 1 << 20;
/// A case that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a test measures of this process is its own: they run one after another.
static ALONE: Mutex<()> = Mutex::new(());

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("bh-hostile-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output();
    let out = out.expect("qemu-img; tests/setup installs it");
    assert!(out.status.success(), "qemu-img {args:?}: {out:?}");
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

fn open(chain: &[&Path], writable: bool) -> Result<Image, String> {
    let layers = chain.iter().enumerate().map(|(i, path)| {
        let write = writable && i == 0;
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .unwrap();
        Layer {
            name: path.display().to_string(),
            backend: Arc::new(Backend {
                len: file.metadata().unwrap().len(),
                file,
                direct: None,
                durable: false,
            }),
        }
    });
    Image::open(layers.collect(), writable).map_err(|e| e.to_string())
}

/// One request, as far as it goes.
fn transfer(image: &Image, direction: Direction, offset: u64, bytes: &mut [u8]) {
    let mut t = Transfer::default();
    t.segments_mut().push(libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    });
    t.begin(direction, offset, bytes.len() as u32);
    while t.remaining() > 0 {
        let step = t.step();
        match image.transfer(direction, &step, false) {
            Ok(done) => {
                assert!(done > 0);
                t.advance(done);
            }
            Err(_) => return,
        }
    }
}

fn torment(image: &Image, dice: &mut Dice) {
    let size = image.size().min(1 << 40);
    let mut bytes = vec![dice.roll(256) as u8; 192 * 1024];
    for _ in 0..60 {
        let sectors = size / 512;
        // Near the beginning, where the tables are, or anywhere.
        let at = match dice.roll(3) {
            0 => dice.roll(sectors),
            _ => dice.roll(sectors.min(16384)),
        };
        let len = (1 + dice.roll(300)).min(sectors - at);
        let (at, len) = (at * 512, len * 512);
        let part = &mut bytes[..len as usize];
        match dice.roll(9) {
            0..3 => transfer(image, Direction::Read, at, part),
            3..6 => transfer(image, Direction::Write, at, part),
            6 => drop(image.discard(at, len)),
            7 => drop(image.write_zeroes(at, len, dice.roll(2) == 0)),
            _ => drop(image.flush()),
        }
    }
    if dice.roll(4) == 0 {
        let _ = image.grow(size + 512 * dice.roll(1 << 24));
        transfer(image, Direction::Write, size, &mut bytes[..512]);
    }
    let _ = image.flush();
}

fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Where the tables of an image lie: header, L1, refcount table, blocks, L2 tables.
fn tables(bytes: &[u8]) -> Vec<(u64, u64)> {
    let cluster = 1u64 << be(bytes, 20, 4);
    let (l1, l1_len) = (be(bytes, 40, 8), be(bytes, 36, 4) * 8);
    let (counts, counts_len) = (be(bytes, 48, 8), be(bytes, 56, 4) * cluster);
    let mut found = vec![
        (0, 120),
        (l1, l1_len.min(256)),
        (counts, counts_len.min(256)),
    ];
    for (table, len) in [(l1, l1_len), (counts, counts_len)] {
        for at in (table..table + len).step_by(8) {
            let entry = be(bytes, at as usize, 8) & 0x00ff_ffff_ffff_fe00;
            if entry != 0 {
                found.push((entry, cluster.min(2048)));
            }
        }
    }
    found
}

/// Changes some metadata: bits, bytes, and numbers that mean something.
fn spoil(bytes: &[u8], path: &Path, dice: &mut Dice) {
    std::fs::write(path, bytes).unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let tables = tables(bytes);
    let cluster = 1u64 << be(bytes, 20, 4);
    for _ in 0..1 + dice.roll(6) {
        let (table, len) = tables[dice.roll(tables.len() as u64) as usize];
        let at = table + dice.roll(len / 8) * 8;
        let old = be(bytes, at.min(bytes.len() as u64 - 8) as usize, 8);
        let (other, _) = tables[dice.roll(tables.len() as u64) as usize];
        let new = match dice.roll(12) {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ 1 << dice.roll(64),
            3 => 1 << 63 | other,
            4 => 1 << 62 | dice.roll(1 << 62),
            5 => (1 << 63) | (dice.roll(1 << 20) * cluster),
            6 => 1 << 63 | 0x00ff_ffff_ffff_ffff & !(cluster - 1),
            7 => other,
            8 => old.wrapping_add(cluster),
            9 => old & !(1 << 63),
            10 => 1 << dice.roll(64),
            _ => dice.roll(u64::MAX),
        };
        if dice.roll(4) == 0 {
            file.write_all_at(&new.to_be_bytes()[4..], at + 4 * dice.roll(2))
                .unwrap();
        } else {
            file.write_all_at(&new.to_be_bytes(), at).unwrap();
        }
    }
}

/// Says which seed it was.
struct Seed<'a>(u64, &'a AtomicU64);

impl Drop for Seed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
            self.1.store(u64::MAX, Ordering::Relaxed);
        }
    }
}

/// Runs `case` for each seed; one that does not end ends the test program.
fn each(name: &str, seeds: std::ops::Range<u64>, mut case: impl FnMut(u64, &mut Dice)) {
    let current = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let watched = Arc::clone(&current);
    let name = name.to_owned();
    std::thread::spawn(move || {
        let mut last = (u64::MAX, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let seed = watched.load(Ordering::Relaxed);
            if seed == u64::MAX {
                return;
            }
            if seed != last.0 {
                last = (seed, Instant::now());
            }
            if last.1.elapsed() > PATIENCE {
                eprintln!("{name}: seed {seed} hangs, after {:?}", started.elapsed());
                std::process::abort();
            }
        }
    });
    for seed in seeds {
        current.store(seed, Ordering::Relaxed);
        let _seed = Seed(seed, &current);
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.roll(2);
        }
        case(seed, &mut dice);
    }
    current.store(u64::MAX, Ordering::Relaxed);
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let first = number("BULKHEAD_FUZZ_FIRST").unwrap_or(0);
    first..first + number("BULKHEAD_FUZZ_SEEDS").unwrap_or(default)
}

/// Peak memory of this process, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Images of several shapes, with data, a compressed part and a file beneath.
fn specimens(scratch: &Scratch) -> Vec<(Vec<u8>, Vec<PathBuf>)> {
    let raw = scratch.path("raw");
    let bytes: Vec<u8> = (0..2 * MIB as usize).map(|i| (i / 3000) as u8).collect();
    std::fs::write(&raw, bytes).unwrap();
    let base = scratch.path("base.qcow2");
    let (raw, base) = (raw.to_str().unwrap(), base.to_str().unwrap());
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", raw, base]);
    let shapes: [&[&str]; 6] = [
        &[],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k,refcount_bits=1"],
        &["-o", "compat=0.10"],
        &["-o", "refcount_bits=64,cluster_size=2M"],
        &["-b", base, "-F", "qcow2", "-o", "cluster_size=1k"],
    ];
    let mut made = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let path = scratch.path("specimen.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(*shape);
        args.extend([path.to_str().unwrap(), "8M"]);
        qemu_img(&args);
        let beneath = if i == 5 {
            vec![PathBuf::from(base)]
        } else {
            vec![]
        };
        let mut chain = vec![&*path];
        chain.extend(beneath.iter().map(PathBuf::as_path));
        let image = open(&chain, true).unwrap();
        for at in [0, 3, 4, 9] {
            let mut data = vec![at as u8 + 1; 100 * 1024];
            transfer(&image, Direction::Write, at * MIB / 2, &mut data);
        }
        image.flush().unwrap();
        drop(image);
        made.push((std::fs::read(&path).unwrap(), beneath));
    }
    made.push((std::fs::read(base).unwrap(), vec![]));
    made
}

#[test]
fn lying_tables_cost_an_error_at_most() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new("tables");
    let specimens = specimens(&scratch);
    let path = scratch.path("spoilt.qcow2");
    let (mut refused, mut served) = (0, 0);
    each("tables", seeds(400), |seed, dice| {
        let (bytes, beneath) = &specimens[seed as usize % specimens.len()];
        spoil(bytes, &path, dice);
        let mut chain = vec![&*path];
        chain.extend(beneath.iter().map(PathBuf::as_path));
        for writable in [false, true] {
            match open(&chain, writable) {
                Ok(image) => {
                    served += 1;
                    torment(&image, dice);
                }
                Err(why) => {
                    refused += 1;
                    assert!(!why.contains('\n'), "{why}");
                }
            }
        }
    });
    // Both happen, or this tests nothing.
    assert!(
        refused > 20 && served > 20,
        "{refused} refused, {served} served"
    );
    assert!(peak() < 600 * 1024, "{} KiB", peak());
}

#[test]
fn random_bytes_in_the_header_cost_a_refusal_at_most() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new("header");
    let specimens = specimens(&scratch);
    let path = scratch.path("spoilt.qcow2");
    each("header", seeds(600), |seed, dice| {
        let (bytes, beneath) = &specimens[seed as usize % specimens.len()];
        let mut bytes = bytes.clone();
        for _ in 0..1 + dice.roll(8) {
            bytes[dice.roll(512) as usize] = dice.roll(256) as u8;
        }
        if dice.roll(10) == 0 {
            bytes.truncate(dice.roll(bytes.len() as u64) as usize);
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut chain = vec![&*path];
        chain.extend(beneath.iter().map(PathBuf::as_path));
        if let Ok(image) = open(&chain, seed % 2 == 0) {
            torment(&image, dice);
        }
    });
}

/// Shapes that a fuzzer does not find.
#[test]
fn absurd_images_are_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new("absurd");
    let path = scratch.path("a.qcow2");
    let name = path.to_str().unwrap();
    // A feature name table that ends in the middle of a name: it is not even looked at.
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1G"]);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.write_all_at(&0x6803_f857u32.to_be_bytes(), 104)
        .unwrap();
    file.write_all_at(&1u32.to_be_bytes(), 108).unwrap();
    file.write_all_at(&[0; 8], 120).unwrap();
    torment(&open(&[&path], true).unwrap(), &mut Dice(1));

    // All of a large refcount table points to one full block.
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1G"]);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (table, block) = (be(&bytes, 48, 8), be(&bytes, be(&bytes, 48, 8) as usize, 8));
    for i in 0..8192 {
        file.write_all_at(&block.to_be_bytes(), table + i * 8)
            .unwrap();
    }
    assert!(
        open(&[&path], true)
            .unwrap_err()
            .contains("share the cluster")
    );

    // The virtual disk is as large as may be, and every table would have to be kept.
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=2M",
        name,
        "64T",
    ]);
    let before = peak();
    match open(&[&path], true) {
        Ok(image) => {
            let mut byte = [1; 512];
            for i in 0..300 {
                transfer(&image, Direction::Write, i << 37, &mut byte);
            }
            assert!(peak() - before < 300 * 1024, "{} KiB", peak() - before);
        }
        Err(why) => assert!(why.contains("MiB of memory"), "{why}"),
    }

    // A chain that runs in a circle is as long as its descriptors.
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    qemu_img(&["rebase", "-u", "-b", name, "-F", "qcow2", name]);
    let circle = [&*path; 5];
    assert!(
        open(&circle, false)
            .unwrap_err()
            .contains("was not granted")
    );
}
