//! What `qemu-img` makes, and makes of images.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};

pub fn run_qemu_img(args: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img; tests/setup installs it")
}

pub fn qemu_img(args: &[&str]) {
    let out = run_qemu_img(args);
    assert!(
        out.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// `qemu-img create -f qcow2 …`
pub fn create(path: &Path, size: u64, options: &[&str]) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(options);
    let size = size.to_string();
    args.extend([path.to_str().unwrap(), &size]);
    qemu_img(&args);
}

/// What it makes of the image is this.
pub fn assert_qemu_sees(path: &Path, model: &[u8]) {
    let raw = path.with_extension("converted");
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    assert!(
        std::fs::read(&raw).unwrap() == model,
        "qemu-img reads something else"
    );
}
