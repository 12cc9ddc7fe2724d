//! The qcow2 engine by itself, on images that `qemu-img` made and checks: random requests
//! against a model, chains, crashes at any moment.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/images.rs"]
mod images;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bulkhead_blk::qcow2_journal::Kept;
use images::*;

const FLAVOURS: [&[&str]; 8] = [
    &[],
    &["-o", "cluster_size=512"],
    &["-o", "cluster_size=4k"],
    &["-o", "cluster_size=2M"],
    &["-o", "compat=0.10"],
    &["-o", "refcount_bits=1"],
    &["-o", "refcount_bits=64,cluster_size=1k"],
    &["-o", "preallocation=metadata,lazy_refcounts=on"],
];

#[test]
fn random_requests_agree_with_a_model_and_with_qemu() {
    let scratch = Scratch::new("model");
    for (i, options) in FLAVOURS.iter().enumerate() {
        let size = 8 * MIB + 512 * 3;
        let path = scratch.create(&format!("{i}.qcow2"), size, options);
        let mut model = vec![0; size as usize];
        let mut dice = Dice(0x9e37_79b9 + i as u64);
        {
            let image = open(&[&path], true).unwrap();
            assert_eq!(image.size(), size);
            play(&image, &mut model, &mut dice, 400, true);
            image.flush().unwrap();
        }
        assert_clean(&path);
        assert_qemu_sees(&path, &model);
        let image = open(&[&path], false).unwrap();
        assert_content(&image, &model);
        drop(image);
        let image = open(&[&path], true).unwrap();
        play(&image, &mut model, &mut dice, 200, true);
        image.flush().unwrap();
        drop(image);
        assert_clean(&path);
        assert_qemu_sees(&path, &model);
    }
}

#[test]
fn a_disk_may_be_smaller_than_a_cluster() {
    let scratch = Scratch::new("small");
    for (i, (size, options)) in [
        (512, FLAVOURS[0]),
        (5 * 512, FLAVOURS[4]),
        (70_144, FLAVOURS[0]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = scratch.create(&format!("{i}.qcow2"), size, options);
        let mut model = vec![0; size as usize];
        let image = open(&[&path], true).unwrap();
        play(&image, &mut model, &mut Dice(21 + i as u64), 200, true);
        image.grow(3 * MIB).unwrap();
        model.resize(3 * MIB as usize, 0);
        play(&image, &mut model, &mut Dice(51 + i as u64), 50, true);
        image.flush().unwrap();
        drop(image);
        assert_clean(&path);
        assert_qemu_sees(&path, &model);
    }
}

#[test]
fn a_chain_of_three_is_one_disk() {
    let scratch = Scratch::new("chain");
    let (base, mid, top) = (
        scratch.path("base.raw"),
        scratch.path("mid.qcow2"),
        "top.qcow2",
    );
    let size = 6 * MIB;
    let mut dice = Dice(7);
    // The raw base is shorter than the disk, and ends within a sector.
    let base_bytes: Vec<u8> = (0..3 * MIB as usize + 100)
        .map(|i| (i / 700) as u8 | 1)
        .collect();
    std::fs::write(&base, &base_bytes).unwrap();
    let mut model = base_bytes.clone();
    model.resize(size as usize, 0);
    let on_base = ["-b", base.to_str().unwrap(), "-F", "raw"];
    let mid = {
        scratch.create("mid.qcow2", size, &on_base);
        mid
    };
    {
        let image = open(&[&mid, &base], true).unwrap();
        play(&image, &mut model, &mut dice, 150, true);
        image.flush().unwrap();
    }
    assert_clean(&mid);
    let on_mid = ["-b", mid.to_str().unwrap(), "-F", "qcow2"];
    let top = scratch.create(top, size, &on_mid);
    let before = (std::fs::read(&mid).unwrap(), std::fs::read(&base).unwrap());
    {
        let image = open(&[&top, &mid, &base], true).unwrap();
        assert_content(&image, &model);
        play(&image, &mut model, &mut dice, 400, true);
        image.flush().unwrap();
        assert_content(&image, &model);
    }
    assert_clean(&top);
    assert_qemu_sees(&top, &model);
    let after = (std::fs::read(&mid).unwrap(), std::fs::read(&base).unwrap());
    assert!(before == after, "a file beneath was written");
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let scratch = Scratch::new("zlib");
    let raw = scratch.path("raw");
    let size = 4 * MIB;
    let mut model: Vec<u8> = (0..size as usize).map(|i| (i / 4096) as u8).collect();
    std::fs::write(&raw, &model).unwrap();
    let path = scratch.path("c.qcow2");
    let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", raw, name]);
    let mut dice = Dice(3);
    let image = open(&[&path], true).unwrap();
    assert_content(&image, &model);
    play(&image, &mut model, &mut dice, 300, true);
    image.flush().unwrap();
    drop(image);
    assert_clean(&path);
    assert_qemu_sees(&path, &model);
}

/// The file as it is at any moment is what a killed process leaves.
#[test]
fn a_killed_process_leaves_nothing_worse_than_leaks() {
    let scratch = Scratch::new("killed");
    for (i, options) in FLAVOURS.iter().enumerate().step_by(2) {
        let size = 8 * MIB;
        let path = scratch.create(&format!("{i}.qcow2"), size, options);
        let copy = scratch.path("copy.qcow2");
        let mut model = vec![0; size as usize];
        let mut dice = Dice(0x1234_5678 + i as u64);
        let image = open(&[&path], true).unwrap();
        for round in 0..16 {
            play(&image, &mut model, &mut dice, 8, true);
            let flushed = round % 4 == 0;
            if flushed {
                image.flush().unwrap();
            }
            std::fs::copy(&path, &copy).unwrap();
            assert_no_worse_than_leaks(&copy);
            let successor = open(&[&copy], true).unwrap();
            if flushed {
                assert_content(&successor, &model);
            }
            let mut other = model.clone();
            if flushed {
                play(&successor, &mut other, &mut Dice(99 + round), 20, true);
            }
            successor.flush().unwrap();
            drop(successor);
            assert_no_worse_than_leaks(&copy);
        }
    }
}

/// Memory of the front-end.
#[derive(Clone, Debug)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new(len: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0; len])))
    }

    /// What it is now, for a successor.
    fn copy(&self) -> Box<Self> {
        let bytes = self.0.lock().unwrap().clone();
        Box::new(Self(Arc::new(Mutex::new(bytes))))
    }
}

impl Kept for Memory {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
    fn read(&self, at: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0.lock().unwrap()[at..at + buffer.len()]);
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn store(&self, at: usize, value: u64) {
        self.write(at, &value.to_le_bytes());
    }
}

#[test]
fn a_successor_finds_every_completed_write() {
    let scratch = Scratch::new("successor");
    let base = scratch.path("base.raw");
    std::fs::write(&base, vec![5u8; 3 * MIB as usize]).unwrap();
    let flavours: [&[&str]; 4] = [
        &[],
        &["-o", "cluster_size=512"],
        &["-o", "compat=0.10"],
        &[
            "-o",
            "cluster_size=4k",
            "-b",
            base.to_str().unwrap(),
            "-F",
            "raw",
        ],
    ];
    for (i, options) in flavours.iter().enumerate() {
        let size = 8 * MIB;
        let path = scratch.create(&format!("{i}.qcow2"), size, options);
        let (copy, third) = (scratch.path("copy.qcow2"), scratch.path("third.qcow2"));
        let mut model = vec![0; size as usize];
        let chain = |top| if i == 3 { vec![top, &*base] } else { vec![top] };
        if i == 3 {
            model[..3 * MIB as usize].fill(5);
        }
        let mut dice = Dice(0x5555 + i as u64);
        let image = open(&chain(&path), true).unwrap();
        // A small log, so that it is full now and then.
        let memory = Memory::new(64 * 1024);
        image.keep(Box::new(memory.clone())).unwrap();
        for _ in 0..24 {
            play(&image, &mut model, &mut dice, 8, true);
            std::fs::copy(&path, &copy).unwrap();
            let left = memory.copy();
            assert_no_worse_than_leaks(&copy);
            let successor = open(&chain(&copy), true).unwrap();
            successor.keep(left.clone()).unwrap();
            assert_no_worse_than_leaks(&copy);
            assert_content(&successor, &model);
            // And its successor, after more writes.
            let mut other = model.clone();
            play(&successor, &mut other, &mut dice, 8, true);
            std::fs::copy(&copy, &third).unwrap();
            let left = left.copy();
            drop(successor);
            let successor = open(&chain(&third), true).unwrap();
            successor.keep(left).unwrap();
            assert_content(&successor, &other);
        }
        // Somebody else's log is not obeyed.
        let foreign = Memory::new(64 * 1024);
        foreign.write(0, b"whatever");
        assert!(image.keep(Box::new(foreign)).is_err());
        drop(image);
        assert_clean(&path);
    }
}

#[test]
fn one_that_was_opened_while_another_served_it_sees_all_that_was_done() {
    let scratch = Scratch::new("beside");
    let path = scratch.create("d.qcow2", 16 * MIB, &["-o", "cluster_size=4096"]);
    let mut model = vec![0u8; 16 * MIB as usize];
    let mut dice = Dice(23);
    let memory = Memory::new(64 * 1024);
    let image = open(&[&path], true).unwrap();
    image.keep(Box::new(memory.clone())).unwrap();
    play(&image, &mut model, &mut dice, 100, true);
    let beside = open(&[&path], true).unwrap();
    play(&image, &mut model, &mut dice, 200, true);
    // Its queues stop.
    image.flush().unwrap();
    beside.keep(Box::new(memory)).unwrap();
    assert_content(&beside, &model);
    play(&beside, &mut model, &mut dice, 200, true);
    beside.flush().unwrap();
    drop((image, beside));
    assert_clean(&path);
    assert_qemu_sees(&path, &model);
}

#[test]
fn a_crash_spares_a_refcount_table_that_moves() {
    let scratch = Scratch::new("moves");
    let (path, copy) = (scratch.path("m.qcow2"), scratch.path("copy.qcow2"));
    let size = 10 * MIB;
    scratch.create("m.qcow2", size, &["-o", "cluster_size=512"]);
    let table = |path: &Path| std::fs::read(path).unwrap()[48..56].to_vec();
    let before = table(&path);
    let image = open(&[&path], true).unwrap();
    let memory = Memory::new(1 << 20);
    image.keep(Box::new(memory.clone())).unwrap();
    let mut model = vec![0; size as usize];
    let (mut dice, mut places) = (Dice(5), Vec::new());
    for (i, at) in (0..size).step_by(64 * 1024).enumerate() {
        let bytes = dice.bytes(64 * 1024);
        write(&image, at, &bytes);
        model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        let now = table(&path);
        let moved = places.last() != Some(&now);
        places.push(now);
        if moved || i % 50 == 0 {
            std::fs::copy(&path, &copy).unwrap();
            let left = memory.copy();
            assert_no_worse_than_leaks(&copy);
            let successor = open(&[&copy], true).unwrap();
            successor.keep(left).unwrap();
            assert_content(&successor, &model);
            drop(successor);
            assert_no_worse_than_leaks(&copy);
        }
    }
    drop(image);
    assert_clean(&path);
    assert!(table(&path) != before, "the table did not move");
    assert_qemu_sees(&path, &model);
}

#[test]
fn several_workers_share_an_image() {
    let scratch = Scratch::new("shared");
    let base = scratch.create("base.qcow2", 16 * MIB, &[]);
    let options = [
        "-b",
        base.to_str().unwrap(),
        "-F",
        "qcow2",
        "-o",
        "cluster_size=4k",
    ];
    let path = scratch.create("top.qcow2", 16 * MIB, &options);
    let image = open(&[&path, &base], true).unwrap();
    // Each worker has sectors of its own, side by side with the others' in every cluster.
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                let mut dice = Dice(worker + 77);
                let mut mine = std::collections::HashMap::new();
                for _ in 0..1500 {
                    let sector = dice.roll(8192) * 4 + worker;
                    match dice.roll(8) {
                        0..4 => {
                            let bytes = dice.bytes(512);
                            write(image, sector * 512, &bytes);
                            mine.insert(sector, bytes);
                        }
                        4 => image.flush().unwrap(),
                        5 => {
                            image.write_zeroes(sector * 512, 512, true).unwrap();
                            mine.insert(sector, vec![0; 512]);
                        }
                        _ => {
                            let zeros = vec![0; 512];
                            let want = mine.get(&sector).unwrap_or(&zeros);
                            assert!(read(image, sector * 512, 512) == *want);
                        }
                    }
                }
                for (sector, want) in mine {
                    assert!(read(image, sector * 512, 512) == want);
                }
            });
        }
    });
    image.flush().unwrap();
    drop(image);
    assert_clean(&path);
}

#[test]
fn a_disk_grows_and_nothing_beneath_comes_to_light() {
    let scratch = Scratch::new("grow");
    let base = scratch.path("base.raw");
    std::fs::write(&base, vec![5u8; 12 * MIB as usize]).unwrap();
    let on_base = [
        "-b",
        base.to_str().unwrap(),
        "-F",
        "raw",
        "-o",
        "cluster_size=512",
    ];
    let path = scratch.create("top.qcow2", 4 * MIB, &on_base);
    let mut model = vec![5u8; 4 * MIB as usize];
    let mut dice = Dice(11);
    {
        let image = open(&[&path, &base], true).unwrap();
        play(&image, &mut model, &mut dice, 100, true);
        image.grow(40 * MIB).unwrap();
        assert_eq!(image.size(), 40 * MIB);
        model.resize(40 * MIB as usize, 0);
        assert_content(&image, &model);
        play(&image, &mut model, &mut dice, 300, true);
        image.flush().unwrap();
        assert!(image.grow(1 << 60).is_err());
        image.grow(MIB).unwrap();
        assert_eq!(image.size(), 40 * MIB);
    }
    assert_clean(&path);
    assert_qemu_sees(&path, &model);
}

#[test]
fn a_discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new("discard");
    let path = scratch.create("d.qcow2", 64 * MIB, &[]);
    let image = open(&[&path], true).unwrap();
    for i in 0..16 {
        write(&image, i * MIB, &vec![9; MIB as usize]);
    }
    image.flush().unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(blocks() > 16 * MIB);
    image.discard(512, 16 * MIB - 1024).unwrap();
    assert!(blocks() < 2 * MIB, "{}", blocks());
    // The clusters are free for others: the file does not grow.
    let len = std::fs::metadata(&path).unwrap().len();
    for i in 0..15 {
        write(&image, (40 + i) * MIB, &vec![3; MIB as usize]);
    }
    image.flush().unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() <= len);
    drop(image);
    assert_clean(&path);
}

#[test]
fn a_chain_is_the_files_that_were_given() {
    let scratch = Scratch::new("granted");
    let base = scratch.create("base.qcow2", MIB, &[]);
    let on_base = ["-b", base.to_str().unwrap(), "-F", "qcow2"];
    let top = scratch.create("top.qcow2", MIB, &on_base);
    let refused = |chain: &[&Path], writable| open(chain, writable).unwrap_err().to_string();
    let missing = refused(&[&top], true);
    assert!(
        missing.contains("base.qcow2, which was not granted"),
        "{missing}"
    );
    let surplus = refused(&[&top, &base, &base], false);
    assert!(
        surplus.contains("names no backing file, but 1 more"),
        "{surplus}"
    );
    assert!(refused(&[&base, &base], false).contains("names no backing file"));
    open(&[&top, &base], true).unwrap();
    // A backing file is read as the header says, whatever it is.
    let raw = scratch.path("raw");
    std::fs::copy(&base, &raw).unwrap();
    let on_raw = ["-b", raw.to_str().unwrap(), "-F", "raw"];
    let top = scratch.create("onraw.qcow2", MIB, &on_raw);
    let image = open(&[&top, &raw], false).unwrap();
    assert_eq!(&read(&image, 0, 512)[..4], b"QFI\xfb");
    let file = File::open(&raw).unwrap();
    assert!(file.metadata().unwrap().len() < MIB);
}
