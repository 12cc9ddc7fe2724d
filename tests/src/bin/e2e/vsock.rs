//! Sockets between host and guest: clients of a unix socket reach programs in the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::shell::{READER, Shell};

const MIB: usize = 1 << 20;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "vsock",
        name: "socket clients reach programs in the guest, 200 at once, half-closed too, and their process is killed",
        long: false,
        run: in_a_guest,
    }]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![Test {
        subject: "vsock",
        name: "a socket device is made, its clients are turned away while there is no driver, and it is removed",
        long: false,
        run: without_a_guest,
    }]
}

fn pid_of(socket: &str) -> Result<i64, String> {
    let found = device(socket, "vsock")?;
    let pid = found.as_ref().and_then(|d| d["pid"].as_i64());
    pid.ok_or_else(|| format!("no vsock: {found:?}"))
}

pub(crate) fn kill_process(socket: &str) -> Verdict {
    let pid = pid_of(socket)?;
    sh(&format!("kill -9 {pid}"))?;
    let end = Instant::now() + patience(LIMIT);
    while pid_of(socket).map_or(true, |now| now == pid || now <= 0) {
        check(Instant::now() < end, || "no other process comes".to_owned())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn audited(socket: &str) -> Verdict {
    let output = bulkhead(&["audit", "--api-socket", socket])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let named = text.contains("bulkhead-vsock");
    check(output.status.success() && named, || text)
}

pub(crate) fn io(what: &'static str) -> impl Fn(std::io::Error) -> String {
    move |e| format!("{what}: {e}")
}

/// A client joined to a port; `None`: it was turned away.
pub(crate) fn connect(path: &str, port: u32) -> Result<Option<UnixStream>, String> {
    let mut client = UnixStream::connect(path).map_err(io("connect"))?;
    let limit = Some(patience(LIMIT));
    client.set_read_timeout(limit).map_err(io("limit"))?;
    let said = client.write_all(format!("connect {port}\n").as_bytes());
    let mut line = Vec::new();
    let mut byte = [0];
    while said.is_ok() && line.last() != Some(&b'\n') {
        match client.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => line.extend(byte),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(format!("no answer: {e}")),
        }
    }
    if said.is_err() {
        return Ok(None);
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    let number = line
        .strip_prefix("OK ")
        .map(|rest| rest.trim().parse::<u32>());
    check(matches!(number, Some(Ok(_))), || line)?;
    Ok(Some(client))
}

/// The next who calls.
pub(crate) fn accept(listener: &UnixListener) -> Result<UnixStream, String> {
    listener.set_nonblocking(true).map_err(io("accept"))?;
    let end = Instant::now() + patience(LIMIT);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let limit = Some(patience(LIMIT));
                stream.set_nonblocking(false).map_err(io("accept"))?;
                stream.set_read_timeout(limit).map_err(io("limit"))?;
                return Ok(stream);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(format!("accept: {e}")),
        }
        check(Instant::now() < end, || "nobody calls".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn joined(path: &str, port: u32) -> Result<UnixStream, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        match connect(path, port)? {
            Some(client) => return Ok(client),
            None if Instant::now() > end => return Err(format!("turned away from port {port}")),
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Sends bytes to a program that sends them back, and says no more before it has read them all.
pub(crate) fn echo(path: &str, bytes: &[u8]) -> Verdict {
    let mut client = joined(path, 1024)?;
    let mut writer = client.try_clone().map_err(io("clone"))?;
    std::thread::scope(|scope| {
        let write = scope.spawn(move || {
            writer.write_all(bytes)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut back = Vec::new();
        client.read_to_end(&mut back).map_err(io("read"))?;
        write
            .join()
            .map_err(|_| "the writer".to_owned())?
            .map_err(io("write"))?;
        check(back == bytes, || {
            format!("{} bytes came back of {}", back.len(), bytes.len())
        })
    })
}

pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|n| ((n * 31 + seed + (n >> 13)) % 251) as u8)
        .collect()
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("vsock")?;
    let socket = scratch.path("api");
    let path = scratch.path("v.sock");
    let vsock = format!("socket={path}");
    let args = ["--api-socket", &socket, "--cpus", "2", "--vsock", &vsock];
    let vmm = debian(&scratch, READER, &[] as &[&str], &args)?;
    let mut guest = Shell::new(vmm)?;
    // Nobody listens yet: turned away at once, not after a time.
    let begun = Instant::now();
    check(connect(&path, 1024)?.is_none(), || "who answered?".into())?;
    let took = begun.elapsed();
    check(took < patience(Duration::from_secs(5)), || {
        format!("{took:?}")
    })?;

    guest.run("(socat -t 300 VSOCK-LISTEN:1024,fork,backlog=250 EXEC:cat 2>/tmp/socat & echo $! >/tmp/pid); until ss --vsock -l 2>/dev/null | grep -q 1024 || [ $((n = n + 1)) -gt 30 ]; do sleep 0.1; done")?;
    let end = Instant::now() + patience(LIMIT);
    while connect(&path, 1024)?.is_none() {
        check(Instant::now() < end, || "nobody listens".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    echo(&path, b"question")?;
    echo(&path, &pattern(8 * MIB, 1))?;
    audited(&socket)?;

    // Many at once.
    let ends: Vec<Verdict> = std::thread::scope(|scope| {
        let path = path.as_str();
        let threads: Vec<_> = (0..200)
            .map(|n| scope.spawn(move || echo(path, &pattern(20_000 + n, n))))
            .collect();
        let ended = |thread: std::thread::ScopedJoinHandle<'_, Verdict>| {
            thread.join().unwrap_or_else(|_| Err("a thread".to_owned()))
        };
        threads.into_iter().map(ended).collect()
    });
    let failed: Vec<String> = ends.into_iter().filter_map(Result::err).collect();
    check(failed.is_empty(), || {
        format!("{} of 200: {failed:?}", failed.len())
    })?;

    // A file out of the guest, and one into it.
    guest.run("head -c 30000000 /dev/urandom >/tmp/f; (socat -u OPEN:/tmp/f VSOCK-LISTEN:1025 &) ; (socat -u VSOCK-LISTEN:1026 CREATE:/tmp/g; touch /tmp/g.done) & sleep 1")?;
    let mut file = Vec::new();
    let mut client = joined(&path, 1025)?;
    client.read_to_end(&mut file).map_err(io("read"))?;
    check(file.len() == 30_000_000, || format!("{} bytes", file.len()))?;
    let mut client = joined(&path, 1026)?;
    client.write_all(&file).map_err(io("write"))?;
    drop(client);
    guest.run("until [ -e /tmp/g.done ]; do sleep 0.1; done; cmp /tmp/f /tmp/g")?;

    // The process dies in the middle of streams: both ends notice, and new ones come.
    let mut client = joined(&path, 1024)?;
    client.write_all(b"x").map_err(io("write"))?;
    client.read_exact(&mut [0]).map_err(io("read"))?;
    kill_process(&socket)?;
    let end = client.read(&mut [0]);
    check(matches!(end, Ok(0) | Err(_)), || format!("{end:?}"))?;
    let end = Instant::now() + patience(LIMIT);
    while connect(&path, 1024)?.is_none() {
        check(Instant::now() < end, || "nobody is joined any more".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    echo(&path, &pattern(MIB, 2))?;
    guest.run("until [ $(pgrep -c -x cat) = 0 ]; do sleep 0.1; done")?;

    guest.is_well("")?;
    guest.run("kill $(cat /tmp/pid)")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)?;
    check(!std::path::Path::new(&path).exists(), || {
        "its socket is left".into()
    })
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("vsock-native")?;
    let socket = scratch.path("api");
    let path = scratch.path("v.sock");
    let mut command = Command::new(bin("bulkhead"));
    command.args(["serve", "--api-socket", &socket]);
    let vmm = Vmm::spawn(command)?;
    let end = Instant::now() + patience(Duration::from_secs(20));
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let kernel = guest_file("vmlinux");
    let create = |vsock: &str| {
        let args = [
            "create", "--kernel", &kernel, "--memory", "96M", "--serial", "none",
        ];
        ctl(&socket, &[&args[..], &["--vsock", vsock]].concat())
    };
    let taken = create(&format!("socket={socket}"));
    check(taken.is_err(), || "the API's socket".into())?;
    ctl(&socket, &["info"])?;
    let nowhere = create("socket=/nowhere/v.sock");
    check(
        nowhere
            .as_ref()
            .is_err_and(|line| line.contains("/nowhere")),
        || format!("{nowhere:?}"),
    )?;
    create(&format!("socket={path}"))?;
    check(connect(&path, 1024)?.is_none(), || "who answered?".into())?;
    kill_process(&socket)?;
    // The same socket, by another process.
    check(connect(&path, 1024)?.is_none(), || "who answered?".into())?;
    audited(&socket)?;
    ctl(&socket, &["remove-device", "vsock"])?;
    let end = Instant::now() + patience(Duration::from_secs(20));
    while std::path::Path::new(&path).exists() {
        check(Instant::now() < end, || "its socket is left".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))
}
