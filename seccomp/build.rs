//! Compiles `policies/*.toml` into `$OUT_DIR/policies.rs`, which `src/policy/mod.rs` includes.

#[path = "compiler/mod.rs"]
mod compiler;

use compiler::Error;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    for watched in ["policies", "compiler", "src/syscalls.rs", "build.rs"] {
        println!("cargo:rerun-if-changed={watched}");
    }
    let env = |name: &str| std::env::var(name).map_err(|e| Error(format!("{name}: {e}")));
    let arch = env("CARGO_CFG_TARGET_ARCH")?;
    let mut policies = read_all(Path::new("policies"), &arch)?;
    compiler::extend(&mut policies)?;
    compiler::check_outers(&policies)?;
    let source = compiler::generate(&policies, &arch)?;
    let out = Path::new(&env("OUT_DIR")?).join("policies.rs");
    std::fs::write(&out, source).map_err(|e| Error(format!("{}: {e}", out.display())))
}

fn read_all(directory: &Path, arch: &str) -> Result<Vec<compiler::Policy>, Error> {
    let failed = |e: std::io::Error| Error(format!("{}: {e}", directory.display()));
    let mut policies = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let (Some(name), Some("toml")) = (
            path.file_stem().and_then(|s| s.to_str()),
            path.extension().and_then(|s| s.to_str()),
        ) else {
            continue;
        };
        let text = std::fs::read_to_string(&path).map_err(failed)?;
        policies.push(compiler::parse(name, &text, arch)?);
    }
    policies.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(policies)
}
