//! What tests of the qcow2 engine share: images that `qemu-img` makes and checks, and random requests
//! against a model.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_blk::image::Image;
use bulkhead_blk::image_chain::{ImageError, Layer};
use bulkhead_blk::qcow2_store::Backend;
use bulkhead_blk::transfer::{Direction, Transfer};

mod qemu_img;
pub use qemu_img::*;

pub const MIB: u64 = 1 << 20;

/// A directory of the test's own, removed with it.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("bh-qcow2-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `qemu-img create -f qcow2 …`
    pub fn create(&self, name: &str, size: u64, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        create(&path, size, options);
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What `qemu-img check` says. 0: clean, 3: leaks only.
pub fn check(path: &Path) -> (i32, String) {
    let out = run_qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

pub fn assert_clean(path: &Path) {
    let (code, text) = check(path);
    assert_eq!(code, 0, "{text}");
}

pub fn assert_no_worse_than_leaks(path: &Path) {
    let (code, text) = check(path);
    assert!(code == 0 || code == 3, "{code}: {text}");
}

pub fn layer(path: &Path, writable: bool) -> Layer {
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(path)
        .unwrap();
    Layer {
        name: path.file_name().unwrap().to_str().unwrap().into(),
        backend: Arc::new(Backend {
            len: file.metadata().unwrap().len(),
            file,
            direct: None,
            durable: true,
        }),
    }
}

pub fn open(chain: &[&Path], writable: bool) -> Result<Image, ImageError> {
    let mut first = true;
    let layers = chain
        .iter()
        .map(|path| layer(path, std::mem::take(&mut first) && writable));
    Image::open(layers.collect(), writable)
}

pub fn transfer(image: &Image, direction: Direction, offset: u64, parts: &mut [&mut [u8]]) {
    let mut t = Transfer::default();
    let len = parts.iter().map(|p| p.len()).sum::<usize>();
    let list = t.segments_mut();
    for part in parts {
        list.push(libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        });
    }
    t.begin(direction, offset, len as u32);
    while t.remaining() > 0 {
        let step = t.step();
        let done = image.transfer(direction, &step, false).unwrap();
        t.advance(done);
    }
}

pub fn read(image: &Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    let (a, b) = bytes.split_at_mut(len / 3 / 512 * 512);
    transfer(image, Direction::Read, offset, &mut [a, b]);
    bytes
}

pub fn write(image: &Image, offset: u64, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let at = bytes.len() / 2 / 512 * 512;
    let (a, b) = bytes.split_at_mut(at);
    transfer(image, Direction::Write, offset, &mut [a, b]);
}

/// A small deterministic generator.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let seed = self.roll(255) as u8 + 1;
        (0..len)
            .map(|i| seed.wrapping_add(((i / 512) as u8).wrapping_mul(3)) | 1)
            .collect()
    }

    /// A range of sectors.
    pub fn range(&mut self, size: u64) -> (u64, usize) {
        let sectors = size / 512;
        let most = match self.roll(10) {
            0 => 600,
            1..4 => 100,
            _ => 12,
        };
        let at = self.roll(sectors);
        let len = (1 + self.roll(most)).min(sectors - at);
        (at * 512, len as usize * 512)
    }
}

/// Random requests; the model is changed along. Discarded sectors are None: they read as
/// zeros or as before.
pub fn play(image: &Image, model: &mut [u8], dice: &mut Dice, rounds: usize, discards: bool) {
    let size = model.len() as u64;
    for _ in 0..rounds {
        let (at, len) = dice.range(size);
        let place = at as usize..at as usize + len;
        match dice.roll(12) {
            0..6 => {
                let bytes = dice.bytes(len);
                write(image, at, &bytes);
                model[place].copy_from_slice(&bytes);
            }
            6..9 => assert!(read(image, at, len) == model[place], "at {at:#x}+{len:#x}"),
            9 => {
                image
                    .write_zeroes(at, len as u64, dice.roll(2) == 0)
                    .unwrap();
                model[place].fill(0);
            }
            10 if discards => {
                image.discard(at, len as u64).unwrap();
                let now = read(image, at, len);
                for (now, old) in now.chunks(512).zip(model[place].chunks_mut(512)) {
                    assert!(now == old || now.iter().all(|&b| b == 0));
                    old.copy_from_slice(now);
                }
            }
            _ => image.flush().unwrap(),
        }
    }
}

pub fn assert_content(image: &Image, model: &[u8]) {
    for (i, chunk) in model.chunks(MIB as usize).enumerate() {
        assert!(read(image, i as u64 * MIB, chunk.len()) == chunk, "MiB {i}");
    }
}
