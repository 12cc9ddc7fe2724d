//! Devices of somebody else's behind `--vhost-user`: rust-vmm's vhost-device-vsock and virtiofsd,
//! in one guest; both are killed and started again, and the guest goes on.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, patience};

use crate::net::LIMIT;
use crate::net_modes::tool;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "net",
        name: "vhost-device-vsock's connections and virtiofsd's files reach the guest, also after both were killed and restarted",
        long: false,
        run: others,
    }]
}

/// Starts a back-end.
fn start(command: &mut Command, socket: &str) -> Result<Vmm, String> {
    let _ = std::fs::remove_file(socket);
    Vmm::spawn(std::mem::replace(command, Command::new("true")))
}

/// Waits for its socket. Only while nobody connects: both take it away once somebody has.
fn listens(running: &Vmm, socket: &str) -> Verdict {
    let end = Instant::now() + patience(LIMIT);
    while !std::path::Path::new(socket).exists() {
        check(Instant::now() < end, || {
            running.story(&format!("nothing listens at {socket}"))
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Connections to the host's port 1234 lead to this socket.
fn sockets(scratch: &Scratch) -> Result<Vmm, String> {
    let mut command = Command::new(tool("VHOST_DEVICE_VSOCK")?);
    let (socket, place) = (scratch.path("vsock"), scratch.path("host"));
    let _ = std::fs::remove_file(&place);
    command.args([
        "--guest-cid",
        "42",
        "--socket",
        &socket,
        "--uds-path",
        &place,
    ]);
    start(&mut command, &socket)
}

fn files(scratch: &Scratch) -> Result<Vmm, String> {
    let mut command = Command::new(tool("VIRTIOFSD")?);
    let (socket, share) = (scratch.path("fs"), scratch.path("share"));
    command.args(["--socket-path", &socket, "--shared-dir", &share]);
    command.args(["--sandbox", "none", "--seccomp", "none"]);
    start(&mut command, &socket)
}

fn others() -> Verdict {
    let scratch = Scratch::new("others")?;
    sh(&format!("mkdir {}", scratch.path("share")))?;
    let file = scratch.disk("share/file", 3 << 20, 109)?;
    let script = "mkdir /tmp/m
for n in first again; do
  mount -t virtiofs home /tmp/m && echo MOUNTED-$n
  echo SUM-$n=$(sha256sum </tmp/m/file)
  head -c 1M /dev/urandom >/tmp/m/new-$n && sync && echo NEW-$n=$(sha256sum </tmp/m/new-$n | cut -d' ' -f1)
  socat -u FILE:/tmp/m/new-$n VSOCK-CONNECT:2:1234,retry=50,interval=0.2 && echo SENT-$n
  umount /tmp/m
  echo TURN-$n; read -r line
done";
    let (mut vsock, mut fs) = (sockets(&scratch)?, files(&scratch)?);
    listens(&vsock, &scratch.path("vsock"))?;
    listens(&fs, &scratch.path("fs"))?;
    let devices = [
        format!("socket={},kind=vsock,id=vsock", scratch.path("vsock")),
        format!("socket={},kind=fs,tag=home,id=home", scratch.path("fs")),
    ];
    let socket = scratch.path("api");
    let more = [
        "--vhost-user",
        &devices[0],
        "--vhost-user",
        &devices[1],
        "--api-socket",
        &socket,
    ];
    let mut vmm = debian(&scratch, script, &[] as &[&str], &more)?;
    let sum = sh(&format!("sha256sum <{file} | cut -d' ' -f1"))?;
    for round in ["first", "again"] {
        let came = scratch.path(&format!("came-{round}"));
        let mut receiver = Command::new("socat");
        receiver.args([
            "-u",
            &format!("UNIX-LISTEN:{}_1234,unlink-early", scratch.path("host")),
        ]);
        receiver.arg(format!("CREATE:{came}"));
        let place = format!("{}_1234", scratch.path("host"));
        let mut receiver = start(&mut receiver, &place)?;
        listens(&receiver, &place)?;
        if round == "again" {
            vmm.type_text("\n")?;
        }
        vmm.wait_for(&format!("TURN-{round}"), LIMIT)
            .map_err(|e| format!("{e}\n{}\n{}", vsock.story("vsock"), fs.story("fs")))?;
        receiver.ends_with(0, LIMIT)?;
        let new = sh(&format!(
            "sha256sum <{} | cut -d' ' -f1",
            scratch.path(&format!("share/new-{round}"))
        ))?;
        for wanted in [
            format!("MOUNTED-{round}"),
            format!("SUM-{round}={}", sum.trim()),
            format!("NEW-{round}={}", new.trim()),
            format!("SENT-{round}"),
        ] {
            check(vmm.output().contains(&wanted), || {
                vmm.story(&format!("no {wanted:?}"))
            })?;
        }
        let sent = sh(&format!("sha256sum <{came} | cut -d' ' -f1"))?;
        check(sent == new, || {
            vmm.story(&format!("{round}: what came by vsock is something else"))
        })?;
        if round == "first" {
            drop((vsock, fs));
            (vsock, fs) = (sockets(&scratch)?, files(&scratch)?);
            served(&socket)?;
        }
    }
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)
}

/// Waits until both have a back-end again.
fn served(socket: &str) -> Verdict {
    let end = Instant::now() + LIMIT;
    loop {
        let devices = bulkhead_tests::vmm::ctl(socket, &["devices"])?;
        let devices = devices.as_array().cloned().unwrap_or_default();
        let serves = |id: &str| {
            devices
                .iter()
                .any(|d| d["id"] == id && d["state"] == "running")
        };
        if serves("vsock") && serves("home") {
            return Ok(());
        }
        check(Instant::now() < end, || {
            let events = bulkhead_tests::vmm::ctl(socket, &["events"]);
            format!("not served again: {devices:?} {events:?}")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
}
