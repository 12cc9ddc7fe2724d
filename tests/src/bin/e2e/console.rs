//! Consoles and named ports of a guest's on sockets of the host's: bytes both ways, sizes, clients
//! that come and go, and the process that joins them killed and updated in the middle.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::rng::{audited, kill_process, refused};
use super::shell::{Shell, guest};
use super::update::Binaries;
use super::vsock::{io, pattern};

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    vec![Test::short("console")(
        "a guest's consoles and named ports are joined to clients, resized, and go on when their process is killed",
        in_a_guest,
    )]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![Test::short("console")(
        "consoles are made, resized, added and removed, and a process of one that dies is replaced",
        without_a_guest,
    )]
}

/// Bytes that are kept for a client that does not read.
const KEPT: usize = 256 << 10;

/// Joins the port, in whose queue the client may have to wait.
fn join(path: &str) -> Result<UnixStream, String> {
    let client = UnixStream::connect(path).map_err(io("connect"))?;
    let limit = Some(patience(LIMIT));
    client.set_read_timeout(limit).map_err(io("limit"))?;
    client.set_write_timeout(limit).map_err(io("limit"))?;
    Ok(client)
}

/// Sends bytes to a program that sends them back.
fn echo(client: &UnixStream, bytes: &[u8]) -> Verdict {
    let mut back = vec![0; bytes.len()];
    std::thread::scope(|scope| {
        let write = scope.spawn(move || (&*client).write_all(bytes));
        let read = (&*client).read_exact(&mut back).map_err(io("read"));
        let wrote = write.join().map_err(|_| "the writer".to_owned())?;
        wrote.map_err(io("write")).and(read)
    })?;
    check(back == bytes, || "something else came back".to_owned())
}

/// A program in the guest that sends back what comes by the port of this name.
pub(super) fn answers(guest: &mut Shell, name: &str) -> Verdict {
    guest.run(&format!(
        "until grep -lx {name} /sys/class/virtio-ports/*/name >/tmp/p 2>/dev/null; do sleep 0.1; done; p=/dev/$(basename $(dirname $(cat /tmp/p))); [ -c $p ]"
    ))?;
    // Its read ends when the client goes.
    guest.run("(exec 3<>$p && while :; do cat <&3 >&3 || exit; sleep 0.1; done) 2>/dev/null & true")
}

/// The guest's idea of a console's size.
fn sized(guest: &mut Shell, tty: &str, size: &str) -> Verdict {
    guest.run(&format!(
        "until [ \"$(stty -F /dev/{tty} size)\" = '{size}' ]; do stty -F /dev/{tty} size; sleep 0.2; done"
    ))
}

/// The console takes bytes both ways.
fn converses(guest: &mut Shell, path: &str, round: usize) -> Verdict {
    let mut client = join(path)?;
    let (input, output) = (pattern(20_000, round), pattern(100_000, round + 50));
    let sum = |bytes: &[u8]| {
        let sum = bytes.iter().fold(0_u64, |sum, b| sum + u64::from(*b));
        sum.to_string()
    };
    guest.run("head -c 20000 </dev/hvc0 >/tmp/in & reader=$!")?;
    client.write_all(&input).map_err(io("write"))?;
    guest.run("wait $reader")?;
    guest.run(&format!(
        "[ $(od -An -v -tu1 -w1 /tmp/in | awk '{{ s += $1 }} END {{ print s }}') = {} ]",
        sum(&input)
    ))?;
    // It comes back as it was, five times.
    guest.run("cat /tmp/in /tmp/in /tmp/in /tmp/in /tmp/in >/dev/hvc0 & true")?;
    let mut back = vec![0; output.len()];
    client.read_exact(&mut back).map_err(io("read"))?;
    check(back == input.repeat(5), || {
        "something else came back from the console".to_owned()
    })
}

/// Says this and waits for it to come back: the program in the guest may send what it had read before.
/// How much of that there was.
fn marked(mut client: &UnixStream, mark: &str) -> Result<usize, String> {
    client.write_all(mark.as_bytes()).map_err(io("write"))?;
    let mut heard = Vec::new();
    let mut chunk = [0; 16 << 10];
    while !heard.ends_with(mark.as_bytes()) {
        let count = client.read(&mut chunk).map_err(io("read"))?;
        check(count > 0, || format!("the end comes before {mark}"))?;
        heard.extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
    Ok(heard.len() - mark.len())
}

/// Clients that leave with bytes unread, at a console and at a named port: the guest goes on. How much
/// the one at the named port has said, none of whose answers it has read.
fn leaves_unread(
    guest: &mut Shell,
    console: &str,
    named: &str,
    at_named: &UnixStream,
) -> Result<usize, String> {
    let deaf = join(console)?;
    // More than is kept for it: a console holds nothing back.
    guest.run("head -c 1000000 /dev/zero | tr '\\0' z >/dev/hvc0")?;
    drop(deaf);
    // A named port does, and lets go when its client leaves: so much is said that neither it nor the
    // guest's program can go on.
    at_named.set_nonblocking(true).map_err(io("limit"))?;
    let (mut said, block) = (0, pattern(64 << 10, 4));
    let end = Instant::now() + patience(Duration::from_secs(20));
    let mut stuck = 0;
    while stuck < 20 && Instant::now() < end {
        match (&*at_named).write(&block) {
            Ok(count) => (said, stuck) = (said + count, 0),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(format!("{named}: {e}")),
        }
    }
    check(stuck == 20 && said > KEPT, || {
        format!("{named}: {said} bytes are taken of a client that reads nothing")
    })?;
    let left = at_named.shutdown(std::net::Shutdown::Both);
    left.map_err(io("shutdown")).map(|()| said)
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("console")?;
    let socket = scratch.path("api");
    let (hvc0, agent, hvc1) = (scratch.path("0"), scratch.path("a"), scratch.path("1"));
    let binaries = Binaries::new(&scratch, "new")?;
    binaries.good("bulkhead-console", "bulkhead-console")?;
    let several = format!("id=con,socket={hvc0},size=80x24,socket={agent},name=agent.0");
    let alone = format!("id=alone,socket={hvc1},size=90x30");
    let args = [
        "--api-socket",
        &socket,
        "--hotplug-ports",
        "1",
        "--console",
        &several,
        "--console",
        &alone,
        "--device-dir",
        &binaries.path,
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    guest.run("modprobe -q virtio_console; until [ -e /dev/hvc0 ] && [ -e /dev/hvc1 ]; do sleep 0.1; done; exec 8<>/dev/hvc0 9<>/dev/hvc1; stty -F /dev/hvc0 raw -echo; stty -F /dev/hvc1 raw -echo")?;
    // The guest numbers them as it comes to them: here hvc0 is the first device's, whichever that was.
    guest.run("until [ \"$(stty -F /dev/hvc0 size)\" = '24 80' ] || [ \"$(stty -F /dev/hvc0 size)\" = '30 90' ]; do sleep 0.1; done; if [ \"$(stty -F /dev/hvc0 size)\" = '30 90' ]; then mv /dev/hvc0 /dev/other; mv /dev/hvc1 /dev/hvc0; mv /dev/other /dev/hvc1; fi")?;
    sized(&mut guest, "hvc1", "30 90")?;
    sized(&mut guest, "hvc0", "24 80")?;
    // Whatever nobody reads, the guest goes on.
    guest.run("head -c 2000000 /dev/zero >/dev/hvc0")?;
    answers(&mut guest, "agent.0")?;
    let mut before = join(&agent)?;
    echo(&before, &pattern(300_000, 1))?;
    converses(&mut guest, &hvc0, 1)?;
    let said = leaves_unread(&mut guest, &hvc0, &agent, &before)?;
    before = join(&agent)?;
    // What was kept for it is nobody's any more; what it has said may be answered yet.
    let heard = marked(&before, "AFTER-IT-LEFT.")?;
    check(heard + KEPT <= said, || {
        format!("{heard} bytes come of {said} that another client has said")
    })?;
    converses(&mut guest, &hvc0, 2)?;
    ctl(&socket, &["resize-console", "con", "132x43"])?;
    sized(&mut guest, "hvc0", "43 132")?;
    ctl(&socket, &["resize-console", "alone", "100x50"])?;
    sized(&mut guest, "hvc1", "50 100")?;
    audited(&socket, "bulkhead-console")?;

    // The process dies three times under who speaks by it, and is updated.
    for round in 0..4 {
        (&before).write_all(b"unheard").map_err(io("write"))?;
        if round < 3 {
            kill_process(&socket, "con")?;
        } else {
            ctl(&socket, &["update-device", "con"])?;
        }
        let mut rest = Vec::new();
        // An end or a reset.
        let _ = before.read_to_end(&mut rest);
        before = join(&agent)?;
        marked(&before, &format!("MARK-{round}."))?;
        echo(&before, &pattern(100_000, round))?;
        converses(&mut guest, &hvc0, round)?;
        sized(
            &mut guest,
            "hvc0",
            if round == 0 { "43 132" } else { "25 81" },
        )?;
        ctl(&socket, &["resize-console", "con", "0:81x25"])?;
        sized(&mut guest, "hvc0", "25 81")?;
    }

    // Another one comes and goes.
    let late = scratch.path("late");
    let added = ctl(
        &socket,
        &["add-console", &format!("id=more,socket={late},name=late")],
    )?;
    check(added["port"] == "hp1", || added.to_string())?;
    answers(&mut guest, "late")?;
    echo(&join(&late)?, &pattern(50_000, 9))?;
    ctl(&socket, &["remove-device", "more", "--timeout", "300"])?;
    check(!Path::new(&late).exists(), || "its socket stays".into())?;
    guest.run("! grep -x late /sys/class/virtio-ports/*/name")?;
    echo(&before, &pattern(1000, 3))?;
    // And one is pulled while it is open.
    ctl(&socket, &["remove-device", "alone", "--force"])?;
    guest.run(
        "exec 9>&-; until ! [ -e /dev/hvc1 ] || ! (: </dev/hvc1) 2>/dev/null; do sleep 0.1; done",
    )?;
    converses(&mut guest, &hvc0, 7)?;
    guest.ends()
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("console-native")?;
    let socket = scratch.path("api");
    let mut command = Command::new(bin("bulkhead"));
    command.args(["serve", "--api-socket", &socket]);
    let vmm = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(&socket, &["info"]).is_err() {
        check(Instant::now() < end, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let kernel = sh(&format!("realpath {}", guest_file("vmlinux")))?;
    let create = |more: &[&str]| {
        let mut args = vec!["create", "--kernel", kernel.trim(), "--memory", "96M"];
        args.extend(["--serial", "none", "--hotplug-ports", "1"]);
        args.extend(more);
        ctl(&socket, &args)
    };
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    let one = format!("socket={first},size=80x24,socket={second},name=agent");
    refused(create(&["--console", "id=c"]), "socket=PATH is missing")?;
    let twice = format!("{one},socket=/x,name=agent");
    refused(create(&["--console", &twice]), "is another port's")?;
    let sized = format!("{one},size=80x24");
    refused(create(&["--console", &sized]), "are of consoles")?;
    // What another listener has: nothing of the first port stays.
    let taken = format!("socket={first},socket={socket},name=x");
    refused(create(&["--console", &taken]), "console ")?;
    check(!Path::new(&first).exists(), || "the first stays".into())?;
    create(&["--console", &one, "--rng"])?;
    let config = || -> Result<serde_json::Value, String> {
        Ok(ctl(&socket, &["info"])?["config"]["consoles"].clone())
    };
    let made = config()?;
    check(
        made[0]["id"] == "console0" && made[0]["ports"][1]["name"] == "agent",
        || made.to_string(),
    )?;
    let mode = sh(&format!("stat -c %a {first}"))?;
    check(mode.trim() == "600", || mode)?;
    let held = device(&socket, "console0")?.unwrap_or_default()["granted_fds"].clone();
    check(held[3] == format!("{second} (listening)"), || {
        held.to_string()
    })?;
    let resize = |id: &str, size: &str| ctl(&socket, &["resize-console", id, size]);
    resize("console0", "132x43")?;
    refused(resize("console0", "1:80x24"), "has a name and no size")?;
    refused(resize("console0", "2:80x24"), "there is no port 2")?;
    refused(resize("console0", "80"), "such as 80x24")?;
    refused(resize("rng0", "80x24"), "is no console but rng")?;
    refused(resize("x", "80x24"), "there is no device x")?;
    kill_process(&socket, "console0")?;
    let made = config()?;
    check(made[0]["ports"][0]["cols"] == 132, || made.to_string())?;
    // Clients wait for a driver.
    let _client = join(&first)?;
    let third = scratch.path("third");
    let add = |what: &str| ctl(&socket, &["add-console", what]);
    refused(
        add(&format!("id=console0,socket={third}")),
        "console.id console0 is taken",
    )?;
    let added = add(&format!("id=more,socket={third}"))?;
    check(added["port"] == "hp1", || added.to_string())?;
    kill_process(&socket, "more")?;
    audited(&socket, "bulkhead-console")?;
    ctl(&socket, &["limit", "more", "--memory", "64M"])?;
    ctl(&socket, &["remove-device", "more"])?;
    check(!Path::new(&third).exists(), || "its socket stays".into())?;
    let left = config()?;
    check(left.as_array().map(Vec::len) == Some(1), || {
        left.to_string()
    })?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    // Its launcher may outlive it for a moment, and removes it.
    nothing_left(Duration::from_secs(20))?;
    check(!Path::new(&first).exists(), || {
        format!("{first}: is left behind")
    })
}
