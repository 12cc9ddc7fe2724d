//! Given a tap that cannot be used, or a command line that makes no sense: one line that names
//! the thing and the remedy, and the exit status that goes with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::os::unix::net::UnixStream;

use bulkhead_net::tap::Tap;
use support::*;

/// Status and the one line that was said.
fn refused(args: &[&str]) -> (i32, String) {
    let done = Net::command().args(args).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    (done.status.code().unwrap(), said)
}

#[test]
fn help_and_version_go_to_stdout() {
    for (flag, expected) in [("--help", "Usage:"), ("--version", "bulkhead-net ")] {
        let mut command = Net::command();
        command.stdout(std::process::Stdio::piped()).arg(flag);
        let done = command.output().unwrap();
        assert!(done.status.success());
        let text = String::from_utf8(done.stdout).unwrap();
        assert!(text.contains(expected), "{text}");
    }
    let (status, said) = refused(&["--socket", "/s"]);
    assert_eq!(status, 2);
    assert!(said.contains("--tap: is missing"), "{said}");
}

#[test]
fn a_tap_that_cannot_be_used_is_named_with_the_remedy() {
    if !isolated() {
        return;
    }
    let scratch = Scratch::new("bad-tap");
    let socket = scratch.path("s");
    let socket = socket.to_str().unwrap();
    ip(&["tuntap", "add", "tun0", "mode", "tun"]);
    ip(&["tuntap", "add", "one0", "mode", "tap"]);
    ip(&["tuntap", "add", "many0", "mode", "tap", "multi_queue"]);
    let busy = Tap::attach("one0", 1, None).unwrap();
    for (tap, pairs, expected) in [
        ("tun0", "1", "exists and is no tap"),
        ("lo", "1", "exists and is no tap"),
        ("one0", "1", "in use by another process"),
        ("one0", "2", "multi_queue"),
        ("lo", "2", "exists and is no tap"),
    ] {
        let args = ["--socket", socket, "--tap", tap, "--queue-pairs", pairs];
        let (status, said) = refused(&args);
        assert_eq!(status, 1, "{said}");
        assert!(said.contains(tap) && said.contains(expected), "{said}");
    }
    drop(busy);
    // More than the tap has would be lost on the way to the guest.
    let socket_ = ["--socket", socket, "--tap", "many0", "--mtu"];
    let (status, said) = refused(&[socket_.as_slice(), &["1501"]].concat());
    assert_eq!(status, 1, "{said}");
    assert!(
        said.contains("its MTU is 1500, 1501 is asked for"),
        "{said}"
    );
    drop(Net::listen(socket.as_ref(), "many0", &["--mtu", "1500"]));
    // One that is made here has what is asked for.
    let made = Net::listen(socket.as_ref(), "made0", &["--mtu", "9000"]);
    let links = bulkhead_taps::Links::open().unwrap();
    assert_eq!(links.look("made0").unwrap().unwrap().mtu, 9000);
    drop(made);
    // The kernel would let a second process share the frames of a tap of several queues, which is
    // down here.
    let shared = Tap::attach("many0", 2, None).unwrap();
    for pairs in ["1", "2"] {
        let args = ["--socket", socket, "--tap", "many0", "--queue-pairs", pairs];
        let (status, said) = refused(&args);
        assert_eq!(status, 1, "{said}");
        assert!(
            said.contains("many0: is in use by another process"),
            "{said}"
        );
    }
    // One who leaves soon is waited for.
    let leaver = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(shared);
    });
    let next = Net::listen(socket.as_ref(), "many0", &["--queue-pairs", "2"]);
    leaver.join().unwrap();
    drop(next);
    // A tap of several queues serves one, too.
    let mut net = Net::listen(socket.as_ref(), "many0", &[]);
    let (status, said) = refused(&["--socket", socket, "--tap", "new0"]);
    assert_eq!(status, 1);
    assert!(said.contains("already in use"), "{said}");
    assert!(net.is_running());
}

#[test]
fn inherited_descriptors_are_judged() {
    if !isolated() {
        return;
    }
    let (control, vhost) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let base = [
        "--control-fd",
        "3",
        "--vhost-fd",
        "4",
        "--mac",
        MAC,
        "--tap",
    ];
    let mut command = Net::command();
    command.args(base).arg("fds=5");
    {
        use std::os::fd::AsRawFd;
        pass(
            &mut command,
            vec![control.as_raw_fd(), vhost.as_raw_fd(), null.as_raw_fd()],
        );
    }
    let done = command.output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(said.contains("fd 5: is not an attached tap"), "{said}");
    // Nothing at all was passed.
    let (status, said) = refused(&[base.as_slice(), &["fds=50"]].concat());
    assert_eq!(status, 1);
    assert!(
        said.contains("fd 3") || said.contains("control channel"),
        "{said}"
    );
}
