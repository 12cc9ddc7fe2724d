//! Sockets between guest and host: connections that the guest begins, and much that goes both
//! ways; beside rust-vmm's vhost-device-vsock, which must do the same for the same guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, patience};

use super::disk::LIMIT;
use super::shell::{READER, Shell};
use super::vsock::{accept, connect, echo, io, joined, kill_process, pattern};
use crate::net_modes::tool;

const MIB: usize = 1 << 20;
/// The host's port that sends everything back.
const ECHO: u32 = 1234;

/// The tests.
pub fn tests() -> Vec<Test> {
    let test = |name, long, run| Test {
        subject: "vsock",
        name,
        long,
        run,
    };
    vec![
        test(
            "a socket device that is added joins the guest to whoever listens on the host and to nobody else, peers and then itself are killed, and it is removed and added again",
            false,
            from_the_guest,
        ),
        test(
            "a guest's connections are joined by vhost-device-vsock and by bulkhead-vsock alike",
            false,
            beside,
        ),
        test(
            "64 MiB go through a socket each way and are what they were",
            false,
            || much(64),
        ),
        test(
            "1 GiB goes through a socket each way and is what it was",
            true,
            || much(1024),
        ),
    ]
}

/// Somebody who sends back what comes, to the end of it; ends with the process.
fn echoes(path: &str) -> Verdict {
    let listener = UnixListener::bind(path).map_err(io("bind"))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut writer = stream.try_clone()?;
                std::io::copy(&mut &stream, &mut writer)?;
                stream.shutdown(Shutdown::Write)
            });
        }
    });
    Ok(())
}

/// A guest that carries out what is typed, and has the driver.
fn guest(scratch: &Scratch, more: &[&str]) -> Result<Shell, String> {
    let args = [&["--cpus", "2", "--memory", "768M"], more].concat();
    let vmm = debian(scratch, READER, &[] as &[&str], &args)?;
    let mut guest = Shell::new(vmm)?;
    guest.run("modprobe -q vmw_vsock_virtio_transport; modprobe -q vsock; true")?;
    Ok(guest)
}

fn leave(guest: Shell) -> Verdict {
    guest.ends()
}

/// What any such device must do for a guest. `more`: what ours does beyond that: it says at once
/// that nobody listens, and one direction of a stream may end alone.
fn converse(guest: &mut Shell, path: &str, more: bool) -> Verdict {
    let has = "[ -e /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio* ]";
    guest.run(&format!("until {has}; do sleep 0.1; done"))?;
    // From the guest: a question, its answer, and nobody at the next port.
    guest.run(&format!(
        "[ \"$(echo question | socat -t 2 - VSOCK-CONNECT:2:{ECHO} | head -n 1)\" = question ]"
    ))?;
    guest.run("! timeout 20 socat -u OPEN:/dev/null VSOCK-CONNECT:2:4321 2>/tmp/why")?;
    if more {
        guest.run("grep -q 'reset by peer' /tmp/why || { cat /tmp/why; false; }")?;
    }
    // From the host: nobody, and somebody.
    check(connect(path, 1024)?.is_none(), || "who answered?".into())?;
    guest.run("(socat -t 300 VSOCK-LISTEN:1024,fork,backlog=250 EXEC:cat 2>/dev/null & echo $! >/tmp/pid); sleep 0.5")?;
    let end = Instant::now() + patience(LIMIT);
    while connect(path, 1024)?.is_none() {
        check(Instant::now() < end, || "nobody listens".into())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut client = joined(path, 1024)?;
    let sent = pattern(100_000, 5);
    client.write_all(&sent).map_err(io("write"))?;
    let mut back = vec![0; sent.len()];
    client.read_exact(&mut back).map_err(io("read"))?;
    check(back == sent, || "another answer".into())?;
    drop(client);
    if more {
        echo(path, &pattern(MIB, 6))?;
        guest.run(&format!(
            "[ \"$(head -c 3000000 /dev/zero | socat -t 60 - VSOCK-CONNECT:2:{ECHO} | wc -c)\" = 3000000 ]"
        ))?;
    }
    guest.run("kill $(cat /tmp/pid)")
}

/// Host programs that are killed in the middle of a stream: the guest's end of it ends at once, as if
/// they had closed it, and the streams of others go on.
fn peers_killed(guest: &mut Shell, scratch: &Scratch, path: &str) -> Verdict {
    guest.run(&format!("rm -f /tmp/lines /tmp/lines.done; ((for i in $(seq 3000); do echo line-$i; sleep 0.01; [ -e /tmp/all-cut ] && break; done; echo last) | tee /tmp/said | socat -t 60 - VSOCK-CONNECT:2:{ECHO} >/tmp/lines; touch /tmp/lines.done) & (socat -t 60 VSOCK-LISTEN:1024,fork EXEC:cat 2>/dev/null & echo $! >/tmp/pid); sleep 0.5"))?;
    let told = scratch.path("told");
    // What the host's program does, what the guest does meanwhile, and how the guest sees the end.
    let ends = "socat -u OPEN:/dev/zero VSOCK-CONNECT:2:1240 2>/dev/null";
    let reads = "socat -u VSOCK-CONNECT:2:1240 OPEN:/dev/null";
    let listen = format!("UNIX-LISTEN:{path}_1240");
    for (peer, guests) in [
        // It takes what the guest sends, or leaves it lying.
        (format!("socat -u {listen} CREATE:{told}"), ends),
        (
            format!("socat -u {listen} SYSTEM:'head -c 65536 >{told}; sleep 600'"),
            ends,
        ),
        (
            format!(
                "socat -u SYSTEM:'head -c 65536 /dev/zero; echo x >{told}; exec cat /dev/zero' {listen}"
            ),
            reads,
        ),
        // A little at a time: a program of the guest's that can neither read nor write on is not told of
        // a reset by Linux's poll as long as bytes of the stream are unread.
        (
            format!(
                "bash -c '(echo connect 1024; while echo line; do sleep 0.01; done) | exec socat - UNIX-CONNECT:{path} >{told}'"
            ),
            "until ! pgrep -x cat >/dev/null; do sleep 0.05; done",
        ),
    ] {
        let _ = std::fs::remove_file(&told);
        let _ = std::fs::remove_file(format!("{path}_1240"));
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", &format!("exec {peer}")]);
        let mut running = Vmm::spawn(command)?;
        let end = Instant::now() + patience(LIMIT);
        while !Path::new(&format!("{path}_1240")).exists() && peer.contains("LISTEN") {
            check(Instant::now() < end, || running.story("nobody listens"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
        // A program of the guest's that a client of the host's has called is there before it is looked at.
        let called = match peer.contains("CONNECT") {
            true => "until pgrep -x cat >/dev/null; do sleep 0.05; done",
            false => "true",
        };
        guest.run(&format!(
            "rm -f /tmp/cut; {called}; ({guests}; touch /tmp/cut) & true"
        ))?;
        // In the middle: a good deal has gone.
        while std::fs::metadata(&told).is_ok_and(|file| file.len() < 1)
            || !Path::new(&told).exists()
        {
            check(Instant::now() < end, || {
                running.story(&format!("{peer}: nothing goes"))
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        guest.run("sleep 0.3; [ ! -e /tmp/cut ]")?;
        sh(&format!("kill -9 -- -{}", running.pid()))?;
        running.wait(LIMIT)?;
        let began = Instant::now();
        guest.run("n=0; until [ -e /tmp/cut ] || [ $((n = n + 1)) -gt 200 ]; do sleep 0.05; done; [ -e /tmp/cut ] || { ss --vsock -a; ps ax -o pid,ppid,stat,wchan:24,args | grep -E 'socat|cat' ; false; }")?;
        check(began.elapsed() < patience(Duration::from_secs(20)), || {
            format!("{peer}: killed, and seen after {:?}", began.elapsed())
        })?;
    }
    let _ = std::fs::remove_file(format!("{path}_1240"));
    guest.run("[ ! -e /tmp/lines.done ]; touch /tmp/all-cut; until [ -e /tmp/lines.done ]; do sleep 0.1; done; rm /tmp/all-cut; cmp /tmp/said /tmp/lines; tail -n 1 /tmp/lines | grep -x last; kill $(cat /tmp/pid)")
}

fn from_the_guest() -> Verdict {
    let scratch = Scratch::new("vsock-guest")?;
    let socket = scratch.path("api");
    let path = scratch.path("v.sock");
    echoes(&format!("{path}_{ECHO}"))?;
    // Not a socket at all.
    scratch.file("v.sock_4322", b"a file")?;
    let mut guest = guest(&scratch, &["--api-socket", &socket, "--hotplug-ports", "3"])?;
    let device = format!("socket={path},id=vsock");
    let second = format!("socket={path}-2,id=vsock2");
    for round in 0..2 {
        ctl(&socket, &["add-vsock", &device])?;
        let refused = ctl(&socket, &["add-vsock", &second]);
        check(
            refused
                .as_ref()
                .is_err_and(|line| line.contains("has a socket device")),
            || format!("{refused:?}"),
        )?;
        converse(&mut guest, &path, true)?;
        guest.run("! timeout 20 socat -u OPEN:/dev/null VSOCK-CONNECT:2:4322 2>/dev/null")?;
        // Many at once, that all have the host's one port.
        // Linux gives up after two seconds, which a busy host may take.
        guest.run(&format!("rm -f /tmp/bad; for i in $(seq 100); do (for t in 1 2 3 4 5; do [ \"$(echo $i-x | socat -t 60 - VSOCK-CONNECT:2:{ECHO} 2>/dev/null)\" = $i-x ] && exit; done; echo $i >>/tmp/bad) & done; wait; ! cat /tmp/bad 2>/dev/null"))?;
        if round == 0 {
            peers_killed(&mut guest, &scratch, &path)?;
            // Its process dies while a stream is open: the guest's end of it ends, the host's
            // listeners stay, and so does the port of its own.
            guest.run(&format!("(socat -t 1 - VSOCK-CONNECT:2:{ECHO} </dev/zero >/dev/null 2>&1; touch /tmp/ended) & sleep 0.5"))?;
            kill_process(&socket)?;
            guest.run("until [ -e /tmp/ended ]; do sleep 0.1; done")?;
            converse(&mut guest, &path, true)?;
        }
        ctl(&socket, &["remove-device", "vsock"])?;
        check(!Path::new(&path).exists(), || "its socket is left".into())?;
        guest.run(&format!(
            "! timeout 20 socat -u OPEN:/dev/null VSOCK-CONNECT:2:{ECHO} 2>/dev/null"
        ))?;
    }
    leave(guest)
}

/// rust-vmm's device and ours, by the same conversation.
fn beside() -> Verdict {
    let scratch = Scratch::new("vsock-beside")?;
    let (backend, theirs) = (scratch.path("backend"), scratch.path("theirs"));
    echoes(&format!("{theirs}_{ECHO}"))?;
    let mut command = Command::new(tool("VHOST_DEVICE_VSOCK")?);
    command.args(["--guest-cid", "42", "--socket", &backend]);
    command.args(["--uds-path", &theirs]);
    let running = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while !Path::new(&backend).exists() {
        check(Instant::now() < end, || running.story("does not listen"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let device = format!("socket={backend},kind=vsock,id=vsock");
    let mut other = guest(&scratch, &["--vhost-user", &device])?;
    // It lets whom nobody listens to wait for the driver's patience, and closes a stream of which
    // one direction has ended.
    converse(&mut other, &theirs, false).map_err(|e| format!("vhost-device-vsock: {e}"))?;
    leave(other)?;
    drop(running);

    let ours = scratch.path("ours");
    echoes(&format!("{ours}_{ECHO}"))?;
    let device = format!("socket={ours},cid=42");
    let mut own = guest(&scratch, &["--vsock", &device])?;
    converse(&mut own, &ours, false).map_err(|e| format!("bulkhead-vsock: {e}"))?;
    leave(own)
}

/// sha256sum of what is written to it.
struct Sum(Child);

impl Sum {
    fn new() -> Result<Self, String> {
        let mut command = Command::new("sha256sum");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().map(Self).map_err(io("sha256sum"))
    }

    fn add(&mut self, bytes: &[u8]) -> Verdict {
        let input = self.0.stdin.as_mut().ok_or("no input")?;
        input.write_all(bytes).map_err(io("sha256sum"))
    }

    fn end(mut self) -> Result<String, String> {
        drop(self.0.stdin.take());
        let output = self.0.wait_with_output().map_err(io("sha256sum"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let sum = text.split_whitespace().next().unwrap_or_default();
        check(sum.len() == 64, || text.clone())?;
        Ok(sum.to_owned())
    }
}

/// Into the guest and out of it.
fn much(mib: usize) -> Verdict {
    let scratch = Scratch::new("vsock-much")?;
    let path = scratch.path("v.sock");
    let listener = UnixListener::bind(format!("{path}_1031")).map_err(io("bind"))?;
    let device = format!("socket={path}");
    let mut guest = guest(&scratch, &["--vsock", &device])?;

    guest.run("(socat -u VSOCK-LISTEN:1030 - | sha256sum >/tmp/in; touch /tmp/in.done) & true")?;
    let mut client = joined(&path, 1030)?;
    let mut sum = Sum::new()?;
    for block in 0..mib {
        let bytes = pattern(MIB, block);
        client.write_all(&bytes).map_err(io("write"))?;
        sum.add(&bytes)?;
    }
    drop(client);
    guest.run("until [ -e /tmp/in.done ]; do sleep 0.1; done")?;
    guest.run(&format!(
        "[ \"$(cut -d' ' -f1 </tmp/in)\" = {} ]",
        sum.end()?
    ))?;

    // Numbers, which cost the guest less than random bytes do.
    guest.run(&format!("mkfifo /tmp/p; (sha256sum </tmp/p >/tmp/out; touch /tmp/out.done) & (seq 1 1000000000 | head -c {mib}M | tee /tmp/p | socat -u - VSOCK-CONNECT:2:1031) & true"))?;
    let mut stream = accept(&listener)?;
    let (sum, len) = drain(&mut stream)?;
    check(len == mib * MIB, || format!("{len} bytes of {mib} MiB"))?;
    guest.run("until [ -e /tmp/out.done ]; do sleep 0.1; done")?;
    guest.run(&format!("[ \"$(cut -d' ' -f1 </tmp/out)\" = {sum} ]"))?;
    leave(guest)
}

fn drain(stream: &mut UnixStream) -> Result<(String, usize), String> {
    let mut sum = Sum::new()?;
    let mut buffer = vec![0; 256 << 10];
    let mut len = 0;
    loop {
        match stream.read(&mut buffer).map_err(io("read"))? {
            0 => return Ok((sum.end()?, len)),
            n => {
                sum.add(buffer.get(..n).unwrap_or_default())?;
                len += n;
            }
        }
    }
}
