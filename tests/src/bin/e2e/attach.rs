//! Consoles through the API's socket: several clients at the serial port, one at a port of a console
//! device, what each is refused, and clients and processes that vanish in the middle.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::bad_input::appears;
use super::console::answers;
use super::disk::LIMIT;
use super::rng::kill_process;
use super::shell::guest;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    vec![Test::short("attach")(
        "clients of the API read and type at a guest's consoles, several at the serial port, and leave nothing",
        in_a_guest,
    )]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![
        Test::short("attach")(
            "a client of the API attaches to the consoles that there are, and is refused others by name",
            without_a_guest,
        ),
        Test::short("attach")(
            "ctl console puts its terminal back when its user leaves, the machine ends or a signal ends it",
            on_a_terminal,
        ),
    ]
}

/// `ctl console`, whose standard input is typed and whose output is collected.
fn console(socket: &str, args: &[&str]) -> Result<Vmm, String> {
    let mut command = Command::new(bin("bulkhead"));
    command
        .args(["ctl", "--socket", socket, "console"])
        .args(args);
    Vmm::spawn(command)
}

/// A client at a console, who reads nothing of what comes; killed with the value.
struct Deaf(Child);

impl Deaf {
    fn new(scratch: &Scratch, socket: &str, args: &[&str]) -> Result<Self, String> {
        let said = scratch.path("deaf");
        let errors = std::fs::File::create(&said).map_err(|e| format!("{said}: {e}"))?;
        let mut command = Command::new(bin("bulkhead"));
        command
            .args(["ctl", "--socket", socket, "console"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let deaf = Self(command.spawn().map_err(|e| e.to_string())?);
        let end = Instant::now() + patience(LIMIT);
        loop {
            let said = std::fs::read_to_string(&said).unwrap_or_default();
            if said.contains("[attached") {
                return Ok(deaf);
            }
            check(Instant::now() < end, || format!("not let in: {said}"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// It is not let in, and told why.
fn kept_out(socket: &str, args: &[&str], why: &str) -> Verdict {
    let said = bulkhead(&[&["ctl", "--socket", socket, "console"], args].concat())?;
    let line = String::from_utf8_lossy(&said.stderr).into_owned();
    check(!said.status.success() && line.contains(why), || {
        format!("{args:?}: {line:?} does not say {why:?}")
    })
}

/// The same, as soon as who was there before is seen to have left.
fn comes_in(socket: &str, args: &[&str], text: &str) -> Result<Vmm, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let mut client = console(socket, args)?;
        client.type_text(&format!("{text}\n"))?;
        match client.wait_for(text, LIMIT) {
            Ok(()) => return Ok(client),
            Err(why) if Instant::now() > end => return Err(why),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// One that says nothing, likewise.
fn comes_in_silent(socket: &str, args: &[&str]) -> Result<Vmm, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let mut client = console(socket, args)?;
        while client.ended().is_none() {
            if client.errors().contains("[attached") {
                return Ok(client);
            }
            check(Instant::now() < end, || client.story("not let in"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
        check(Instant::now() < end, || client.story("turned away"))?;
    }
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("attach")?;
    let (socket, hvc0, agent) = (scratch.path("api"), scratch.path("0"), scratch.path("a"));
    let ports = format!("id=con,socket={hvc0},socket={agent},name=agent.0");
    let args = ["--api-socket", &socket, "--console", &ports];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    // What was printed before they came, and then the same to all.
    let mut first = console(&socket, &["--history", "65536"])?;
    first.wait_for("GUEST-IS-READY", LIMIT)?;
    let mut second = console(&socket, &[])?;
    second.type_text("echo TYPED-BY-'THE-SECOND'\n")?;
    for client in [&mut first, &mut second, &mut guest.vmm] {
        client.wait_for("TYPED-BY-THE-SECOND", LIMIT)?;
    }
    first.type_text("echo TYPED-BY-'THE-FIRST'\n")?;
    second.wait_for("TYPED-BY-THE-FIRST", LIMIT)?;
    // One that vanishes costs the others nothing, nor does one that reads nothing.
    second.kill();
    let deaf = Deaf::new(&scratch, &socket, &[])?;
    guest.run("head -c 200000 /dev/zero | tr '\\0' x")?;
    first.type_text("echo STILL-'THERE'\n")?;
    first.wait_for("STILL-THERE", LIMIT)?;
    // It leaves with all of that unread: who comes next has the newest of it, in order.
    drop(deaf);
    let mut next = console(&socket, &["--history", "1000"])?;
    next.wait_for("STILL-THERE", LIMIT)?;
    check(next.output().len() <= 2000, || {
        next.story("more than was asked for")
    })?;
    drop(next);

    guest.run("modprobe -q virtio_console; until [ -e /dev/hvc0 ]; do sleep 0.1; done")?;
    answers(&mut guest, "agent.0")?;
    let port = ["con", "--port", "1"];
    let mut client = comes_in(&socket, &port, "one-of-the-api")?;
    kept_out(&socket, &port, "another client is attached to port 1")?;
    client.kill();
    let mut client = comes_in(&socket, &port, "another-of-the-api")?;
    // Its process dies: the client's stream ends, and it may come again.
    kill_process(&socket, "con")?;
    client.ends_with(0, LIMIT)?;
    let mut client = comes_in(&socket, &port, "after-a-crash")?;
    // One at a console that reads nothing, and leaves: the guest goes on, and who comes next has nothing
    // of what was there for the other.
    let deaf = Deaf::new(&scratch, &socket, &["con"])?;
    guest.run("head -c 700000 /dev/zero | tr '\\0' y >/dev/hvc0")?;
    drop(deaf);
    let mut other = comes_in_silent(&socket, &["con"])?;
    // What nobody looks at yet is dropped.
    guest.run(
        "(while :; do echo BY-THE-'CONSOLE' >/dev/hvc0; sleep 0.2; done) & echo $! >/tmp/says",
    )?;
    other.wait_for("BY-THE-CONSOLE", LIMIT)?;
    check(!other.output().contains('y'), || {
        other.story("another client's bytes")
    })?;
    guest.run("kill $(cat /tmp/says)")?;
    guest.ends()?;
    for client in [&mut first, &mut client, &mut other] {
        client.ends_with(0, LIMIT)?;
    }
    Ok(())
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("attach-native")?;
    let socket = scratch.path("api");
    let reading = scratch.path("reading");
    let mut vmm = Vmm::start(&[
        "serve",
        "--api-socket",
        &socket,
        "--api-read-only",
        &reading,
    ])?;
    appears(&socket)?;
    kept_out(&socket, &[], "no machine yet: create one")?;
    let (kernel, path) = (guest_file("vmlinux"), scratch.path("port"));
    let ports = format!("id=con,socket={path},name=agent");
    let create = ["create", "--kernel", &kernel, "--memory", "96M"];
    let more = ["--serial", "none", "--rng", "--console", &ports];
    ctl(&socket, &[create.as_slice(), &more].concat())?;
    kept_out(&reading, &[], "is not for this socket, which only tells")?;
    kept_out(&socket, &["x"], "there is no device x: see Devices")?;
    kept_out(&socket, &["rng0"], "is no console but rng")?;
    kept_out(
        &socket,
        &["con", "--port", "1"],
        "there is no port 1: it has 1, from 0",
    )?;
    kept_out(&socket, &["../x"], "no device has such a name")?;
    kept_out(&socket, &["--json"], "leave --json out")?;
    kept_out(&socket, &["con", "--history", "5"], "cannot be used with")?;
    // Nobody is kept out while one is at the other console.
    let mut serial = console(&socket, &[])?;
    let mut port = console(&socket, &["con"])?;
    let end = Instant::now() + patience(LIMIT);
    let both = |a: &Vmm, b: &Vmm| [a, b].iter().all(|c| c.errors().contains("[attached]"));
    while !both(&serial, &port) {
        check(Instant::now() < end && port.ended().is_none(), || {
            "nobody is let in at the consoles".to_owned()
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    kept_out(&socket, &["con"], "another client is attached to port 0")?;
    ctl(&socket, &["remove-device", "con"])?;
    port.ends_with(0, LIMIT)?;
    kept_out(&socket, &["con"], "there is no device con")?;
    check(serial.ended().is_none(), || serial.story("it ended"))?;
    ctl(&socket, &["shutdown", "--force"])?;
    serial.ends_with(0, LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}

/// `ctl console` at the serial port, on a terminal of its own whose settings are noted before and after.
struct OnTerminal<'a> {
    client: Vmm,
    scratch: &'a Scratch,
}

impl<'a> OnTerminal<'a> {
    fn attach(scratch: &'a Scratch, socket: &str) -> Result<Self, String> {
        let at = scratch.path("");
        let program = bin("bulkhead");
        let script = format!(
            "cd {at}; rm -f pid before after status; tty >tty; stty -g >before
{} ctl --socket {socket} console <&0 & echo $! >pid; wait $!; echo $? >status; stty -g >after",
            program.display()
        );
        let script = scratch.file("console.sh", script.as_bytes())?;
        let mut command = Command::new("socat");
        command.args(["-", &format!("EXEC:bash {script},pty,setsid,ctty,stderr")]);
        let mut client = Vmm::spawn(command)?;
        client.wait_for("[attached: Ctrl-] leaves]", LIMIT)?;
        let raw = sh(&format!("stty -F $(cat {at}/tty) -a"))?;
        check(raw.contains("-icanon") && raw.contains("-echo "), || raw)?;
        Ok(Self { client, scratch })
    }

    /// It has ended with this status, and the terminal is what it was.
    fn left(mut self, status: &str) -> Verdict {
        let after = self.scratch.path("after");
        let end = Instant::now() + patience(LIMIT);
        let written = || std::fs::metadata(&after).is_ok_and(|file| file.len() > 0);
        while !written() {
            check(Instant::now() < end, || self.client.story("it stays"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
        let at = self.scratch.path("");
        let same = sh(&format!("cd {at}; cmp before after; cat status"))?;
        check(same.trim() == status, || {
            self.client.story(&format!("{same:?} is not {status}"))
        })?;
        self.client.wait(LIMIT).map(drop)
    }
}

fn on_a_terminal() -> Verdict {
    let scratch = Scratch::new("attach-terminal")?;
    let socket = scratch.path("api");
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    let kernel = guest_file("vmlinux");
    let create = ["create", "--kernel", &kernel, "--memory", "96M", "--serial"];
    ctl(&socket, &[create.as_slice(), &["none"]].concat())?;
    let mut leaves = OnTerminal::attach(&scratch, &socket)?;
    // What was typed before it is the guest's, which has not booted.
    leaves.client.type_text("typed\u{1d}")?;
    leaves.left("0")?;
    for (signal, status) in [("TERM", "143"), ("HUP", "129")] {
        let killed = OnTerminal::attach(&scratch, &socket)?;
        sh(&format!("kill -{signal} $(cat {})", scratch.path("pid")))?;
        killed.left(status)?;
    }
    let ended = OnTerminal::attach(&scratch, &socket)?;
    ctl(&socket, &["shutdown", "--force"])?;
    ended.left("0")?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(LIMIT)
}
