//! What is opened, bound and refused, on a directory of each test's own.

use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

/// A directory of one test's own, removed at its end.
struct Scratch(PathBuf);
impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bh-paths-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }
    fn file(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, vec![0; bytes]).unwrap();
        path
    }
}
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn refusal(paths: &Paths, path: &Path, role: &str, mode: Mode) -> String {
    let line = paths.open(path, role, mode, false, false).unwrap_err();
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with(role), "{line}");
    line
}

#[test]
fn what_is_no_disk_is_refused_in_one_line_with_a_remedy() {
    let scratch = Scratch::new("refused");
    let paths = Paths::new(Vec::new());
    let at = |name: &str| scratch.0.join(name);
    fs::create_dir(at("dir")).unwrap();
    let _socket = UnixListener::bind(at("sock")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    scratch.file("short", 511);
    scratch.file("plain", 512);
    for (name, says) in [
        ("absent", "no such file"),
        ("dangling", "no such file"),
        ("dir", "is a directory"),
        ("sock", "is a socket"),
        ("short", "511 bytes are less than a sector"),
        ("plain/x", "not a directory"),
    ] {
        let line = refusal(&paths, &at(name), "disk", Mode::Read);
        assert!(line.contains(says), "{line}");
    }
    assert!(
        refusal(&paths, Path::new("/dev/zero"), "disk", Mode::ReadWrite)
            .contains("character device")
    );
    assert!(refusal(&paths, Path::new(""), "disk", Mode::Read).contains("empty"));
    let line = refusal(&paths, Path::new("/no\nsuch"), "disk", Mode::Read);
    assert!(line.contains("\\n"), "{line}");
    scratch.file("empty", 0);
    assert!(refusal(&paths, &at("empty"), "kernel", Mode::Read).contains("is empty"));
}

#[test]
fn a_file_opens_with_its_size_and_a_log_is_created_private() {
    let scratch = Scratch::new("opened");
    let paths = Paths::new(Vec::new());
    let disk = paths
        .open(
            &scratch.file("disk", 4096),
            "disk",
            Mode::ReadWrite,
            true,
            true,
        )
        .unwrap();
    assert_eq!((disk.size, disk.block_device), (4096, false));
    let log = scratch.0.join("log");
    for size in [0, 3] {
        use std::io::Write;
        let opened = paths
            .open(&log, "serial", Mode::Append, false, false)
            .unwrap();
        assert_eq!(opened.size, size);
        (&opened.file).write_all(b"abc").unwrap();
    }
    assert_eq!(fs::read(&log).unwrap(), b"abcabc");
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o077, 0);
}

#[test]
fn a_link_does_not_lead_out_of_the_allowed_paths() {
    let scratch = Scratch::new("allowed");
    let inside = scratch.0.join("inside");
    fs::create_dir(&inside).unwrap();
    let outside = scratch.file("outside", 512);
    symlink(&outside, inside.join("link")).unwrap();
    fs::write(inside.join("disk"), [0; 512]).unwrap();
    let mut paths = Paths::new(vec![inside.clone()]);
    assert!(
        paths
            .open(&inside.join("disk"), "disk", Mode::Read, false, false)
            .is_ok()
    );
    for path in [inside.join("link"), outside, inside.join("../outside")] {
        assert!(refusal(&paths, &path, "disk", Mode::Read).contains("--allow-path"));
    }
    assert!(
        refusal(&paths, &scratch.0.join("log"), "serial", Mode::Append).contains("--allow-path")
    );
    assert!(
        paths
            .bind(&scratch.0.join("s"), "API socket")
            .unwrap_err()
            .contains("--allow-path")
    );
    assert!(paths.bind(&inside.join("s"), "API socket").is_ok());
    paths.remove_all();
    assert!(!inside.join("s").exists());
}

#[test]
fn a_live_socket_is_left_alone_a_stale_one_replaced_and_only_our_own_removed() {
    let scratch = Scratch::new("bind");
    let mut paths = Paths::new(Vec::new());
    let path = scratch.0.join("api");
    let live = UnixListener::bind(&path).unwrap();
    assert!(
        paths
            .bind(&path, "API socket")
            .unwrap_err()
            .contains("in use")
    );
    drop(live);
    let ours = paths.bind(&path, "API socket").unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
    drop(ours);
    // Somebody else's socket has taken the name.
    fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    paths.remove_all();
    assert!(path.exists());

    let plain = scratch.file("plain", 1);
    assert!(
        paths
            .bind(&plain, "API socket")
            .unwrap_err()
            .contains("not a socket")
    );
    let deep = scratch.0.join("x".repeat(80)).join("y".repeat(60));
    assert!(
        paths
            .bind(&deep.join("s"), "API socket")
            .unwrap_err()
            .contains("directory")
    );
    fs::create_dir_all(&deep).unwrap();
    let _deep = paths.bind(&deep.join("s"), "API socket").unwrap();
    assert!(std::os::unix::fs::FileTypeExt::is_socket(
        &fs::metadata(deep.join("s")).unwrap().file_type()
    ));
    paths.forget(&deep.join("s")).unwrap();
    assert!(!deep.join("s").exists());
    assert!(paths.forget(&deep.join("s")).is_err());
}

#[test]
fn the_hosts_generator_opens_for_entropy_alone() {
    let elsewhere = Paths::new(vec!["/nowhere".into()]);
    let random = Path::new("/dev/random");
    let open = |role, path, mode| elsewhere.open(path, role, mode, false, false);
    let mut bytes = [0; 16];
    let opened = open(ENTROPY_ROLE, random, Mode::Read).unwrap();
    io::Read::read_exact(&mut &opened.file, &mut bytes).unwrap();
    assert_ne!(bytes, [0; 16]);
    assert!(open("disk", random, Mode::Read).is_err());
    assert!(open(ENTROPY_ROLE, random, Mode::ReadWrite).is_err());
    assert!(open(ENTROPY_ROLE, Path::new("/dev/zero"), Mode::Read).is_err());
    assert!(open(ENTROPY_ROLE, Path::new("/etc/passwd"), Mode::Read).is_err());
}

#[test]
fn two_directories_are_made_for_sockets_at_most_and_those_that_are_empty_go() {
    let scratch = Scratch::new("made");
    let mut paths = Paths::new(Vec::new());
    let made = |name: &str| {
        let directory = scratch.0.join(name);
        fs::create_dir(&directory).unwrap();
        directory.join("socket")
    };
    paths.has_made_directory(&made("one")).unwrap();
    paths.has_made_directory(&made("two")).unwrap();
    let third = paths.has_made_directory(&made("three")).unwrap_err();
    assert!(third.contains("no more are made for one VM"), "{third}");
    fs::write(scratch.0.join("two/other"), b"").unwrap();
    paths.remove_all();
    let there = |name: &str| scratch.0.join(name).exists();
    assert_eq!(["one", "two", "three"].map(there), [false, true, true]);
}
