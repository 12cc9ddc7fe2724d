//! Given a command line that cannot be served: one line on stderr that names the thing and
//! the remedy, exit status 1 (2 for usage), and nothing left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::*;

fn fails(args: &[&str], code: i32, words: &[&str]) {
    let mut blk = Blk(Process::spawn(Blk::command().args(args)));
    let status = blk.wait_exit();
    let said = blk.stderr();
    assert_eq!(status.code(), Some(code), "{args:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: {said}");
    }
}

#[test]
fn disks_that_cannot_be_served_are_named_with_the_remedy() {
    let scratch = Scratch::new("bad-disks");
    let socket = scratch.path("s");
    let socket = socket.to_str().unwrap();
    let short = scratch.path("short");
    std::fs::write(&short, [0; 511]).unwrap();
    let empty = scratch.path("empty");
    std::fs::write(&empty, []).unwrap();
    let dir = scratch.path("dir");
    std::fs::create_dir(&dir).unwrap();
    let missing = scratch.path("missing");
    for (path, words) in [
        (short.to_str().unwrap(), ["511 bytes", "truncate"]),
        (empty.to_str().unwrap(), ["0 bytes", "truncate"]),
        (dir.to_str().unwrap(), ["directory", "image file"]),
        (missing.to_str().unwrap(), ["missing", "make it first"]),
        ("/dev/null", ["/dev/null", "block device"]),
    ] {
        let disk = format!("path={path}");
        fails(&["--socket", socket, "--disk", &disk], 1, &words);
        assert!(!std::path::Path::new(socket).exists());
    }
}

#[test]
fn a_socket_in_use_is_not_taken_away() {
    let scratch = Scratch::new("in-use");
    let disk = scratch.disk(8);
    let disk = format!("path={},lock=off", disk.display());
    let socket = scratch.path("s");
    let mut first = Blk::listen(&socket, &disk, &[]);
    let path = socket.to_str().unwrap();
    fails(&["--socket", path, "--disk", &disk], 1, &["already in use"]);
    assert!(first.is_running());
    Vm::connect(&socket, 1);
}

#[test]
fn nonsense_is_a_usage_error() {
    fails(&["--frobnicate"], 2, &["frobnicate", "--help"]);
    fails(&[], 2, &["--socket"]);
    fails(
        &["--socket", "/nonexistent/s", "--disk", "path=/x,color=red"],
        2,
        &["color"],
    );
}

#[test]
fn inherited_descriptors_that_are_not_what_they_should_be_are_refused() {
    // 3 to 5 are closed, or whatever the test runner left there: no sockets.
    fails(
        &[
            "--control-fd",
            "200",
            "--vhost-fd",
            "201",
            "--disk",
            "fd=202",
        ],
        1,
        &["fd 200", "control channel"],
    );
}

#[test]
fn help_and_version_are_printed() {
    for (arg, word) in [("--help", "Usage:"), ("--version", "bulkhead-blk ")] {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-blk"))
            .arg(arg)
            .output()
            .unwrap();
        assert!(out.status.success());
        assert!(String::from_utf8(out.stdout).unwrap().contains(word));
    }
}
