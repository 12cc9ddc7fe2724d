//! Compiles `proto/*.proto` into Rust: the messages always, and for the feature `stubs`
//! the reference implementation's clients and servers that the tests speak to. Pure Rust:
//! no `protoc`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 5] = [
    "proto/common.proto",
    "proto/device.proto",
    "proto/launcher.proto",
    "proto/machine.proto",
    "proto/vmservice.proto",
];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("OUT_DIR is not set: run by cargo only"))?;

    Codegen::new()
        .out_dir(&out)
        .inputs(PROTOS)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;

    if env::var_os("CARGO_FEATURE_STUBS").is_none() {
        return Ok(());
    }
    stubs(Path::new("proto"), &out.join("async"), true)?;
    // The blocking generator knows no streams: leave those methods out.
    let unary = out.join("unary");
    fs::create_dir_all(&unary)?;
    for proto in PROTOS.map(Path::new) {
        let text = fs::read_to_string(proto)?;
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("rpc") || !line.contains("(stream "))
            .collect();
        let name = proto
            .file_name()
            .ok_or_else(|| io::Error::other("a .proto without a name"))?;
        fs::write(unary.join(name), kept.join("\n"))?;
    }
    stubs(&unary, &out.join("sync"), false)
}

fn stubs(protos: &Path, out: &Path, async_all: bool) -> io::Result<()> {
    fs::create_dir_all(out)?;
    Codegen::new()
        .out_dir(out)
        .inputs(["device.proto", "machine.proto"].map(|name| protos.join(name)))
        .include(protos)
        .customize(Customize {
            async_all,
            ..Customize::default()
        })
        .run()?;
    // Not the generator's own mod.rs: its inner attribute forbids include!.
    fs::write(
        out.join("mod.rs"),
        "pub mod device_ttrpc;\npub mod machine_ttrpc;\n",
    )
}
