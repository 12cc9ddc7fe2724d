//! Compiles `proto/*.proto` into Rust: the messages always, and for the feature `stubs`
//! the reference implementation's clients and servers that the tests speak to. Pure Rust:
//! no `protoc`.

use std::path::PathBuf;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 3] = [
    "proto/device.proto",
    "proto/launcher.proto",
    "proto/machine.proto",
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

    // The same services once for the blocking API, once for the asynchronous one.
    for (name, async_all) in [("sync", false), ("async", true)] {
        let dir = out.join(name);
        fs::create_dir_all(&dir)?;
        Codegen::new()
            .out_dir(&dir)
            .inputs(PROTOS)
            .include("proto")
            .customize(Customize {
                async_all,
                gen_mod: true,
                ..Customize::default()
            })
            .run()?;
    }
    Ok(())
}
