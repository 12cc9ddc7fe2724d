//! The API: the machine's states over ttrpc, events, and the command line as its client.

use std::time::{Duration, Instant};

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, guest_file, nothing_left};

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("api");
    vec![
        test(
            "a served VMM is created, booted, paused, resumed and shut down",
            whole_life,
        ),
        test("the power button reaches the guest", power_button),
        test("two VMs at once do not meet", two_at_once),
        test(
            "a socket path in use is refused, a stale one is taken over",
            socket_in_use,
        ),
    ]
}

/// Waits until the API answers.
fn up(vmm: &Vmm, socket: &str) -> Verdict {
    let end = Instant::now() + LIMIT;
    while let Err(e) = ctl(socket, &["info"]) {
        if Instant::now() > end {
            return Err(vmm.story(&e));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn refused(socket: &str, command: &[&str], words: &[&str]) -> Verdict {
    match ctl(socket, command) {
        Ok(_) => Err(format!("{command:?} was obeyed")),
        Err(e) => check(
            e.trim().lines().count() == 1 && words.iter().all(|w| e.contains(w)),
            || format!("{command:?}: {e:?} lacks one of {words:?}"),
        ),
    }
}

fn state(socket: &str) -> Result<String, String> {
    Ok(ctl(socket, &["info"])?["state"].to_string().to_lowercase())
}

fn whole_life() -> Verdict {
    let scratch = Scratch::new("life")?;
    let socket = scratch.path("api");
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    up(&vmm, &socket)?;
    refused(&socket, &["boot"], &["no machine"])?;
    let script = scratch.script(
        "s",
        "i=0; while :; do i=$((i+1)); echo TICK=$i; usleep 50000; done",
    )?;
    let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initrd.img"));
    let disk = format!("path={script},readonly=on,id=ticker");
    let create = [
        "create",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--memory",
        "256M",
        "--disk",
        &disk,
        "--cmdline",
        "console=ttyS0 quiet panic=-1 bh.cmd=script",
    ];
    refused(&socket, &["create", "--kernel", "/absent"], &["/absent"])?;
    ctl(&socket, &create)?;
    // Once more, as by a client that has missed the answer.
    ctl(&socket, &create)?;
    check(state(&socket)?.contains("created"), || {
        format!("{:?}", state(&socket))
    })?;
    refused(&socket, &["pause"], &["created", "boot"])?;
    refused(&socket, &["resume"], &["created", "boot"])?;
    let devices = ctl(&socket, &["devices"])?;
    check(devices.to_string().contains("ticker"), || {
        devices.to_string()
    })?;

    // Given up, and made anew.
    ctl(&socket, &["delete"])?;
    check(state(&socket)?.contains("none"), || {
        format!("{:?}", state(&socket))
    })?;
    refused(&socket, &["boot"], &["no machine"])?;
    ctl(&socket, &create)?;

    ctl(&socket, &["boot"])?;
    ctl(&socket, &["boot"])?;
    ctl(&socket, &["resume"])?;
    vmm.wait_for("TICK=3", LIMIT)?;

    ctl(&socket, &["pause"])?;
    check(state(&socket)?.contains("paused"), || {
        format!("{:?}", state(&socket))
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let before = vmm.output().len();
    std::thread::sleep(Duration::from_millis(700));
    check(vmm.output().len() == before, || {
        "a paused guest went on printing".to_string()
    })?;
    ctl(&socket, &["pause"])?;
    refused(&socket, &["shutdown"], &["paused"])?;
    ctl(&socket, &["resume"])?;
    let end = Instant::now() + LIMIT;
    while vmm.output().len() == before {
        check(Instant::now() < end, || {
            "a resumed guest stays silent".to_string()
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }

    let events = bulkhead(&[
        "ctl", "--socket", &socket, "--json", "events", "--from", "1",
    ])?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    for kind in [
        "device.ready",
        "machine.created",
        "machine.running",
        "machine.paused",
    ] {
        check(events.contains(kind), || format!("no {kind} in {events}"))?;
    }
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    check(!std::path::Path::new(&socket).exists(), || {
        format!("{socket} is left behind")
    })?;
    nothing_left(Duration::from_secs(5))
}

fn power_button() -> Verdict {
    let scratch = Scratch::new("button")?;
    let socket = scratch.path("api");
    // The guest has no logind: it reads the button's input device itself, and ends.
    let script = scratch.script(
        "s",
        "tries=0
while [ -z \"$node\" ] && [ $tries -lt 100 ]; do
  for e in /sys/class/input/event*; do
    grep -q 'Power Button' $e/device/name 2>/dev/null && node=/dev/input/${e##*/}
  done
  tries=$((tries + 1)); usleep 50000
done
echo WAITING $node; echo EVENT=$(dd if=$node bs=24 count=1 2>/dev/null | wc -c)",
    )?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot("bh.cmd=script", &["--disk", &disk, "--api-socket", &socket])?;
    vmm.wait_for("WAITING /dev/input/event", LIMIT)?;
    // Give dd the time to open the node: what happened before is not told.
    std::thread::sleep(Duration::from_secs(1));
    check(!vmm.output().contains("EVENT="), || {
        vmm.story("an event without a press")
    })?;
    ctl(&socket, &["shutdown", "--timeout", "60"])?;
    vmm.wait_for("EVENT=24", LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn two_at_once() -> Verdict {
    let scratch = Scratch::new("two")?;
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    let mut first = Vmm::boot("bh.cmd=hang", &["--api-socket", &a])?;
    let mut second = Vmm::boot("bh.cmd=hang", &["--api-socket", &b])?;
    first.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    second.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    ctl(&a, &["shutdown", "--force"])?;
    first.ends_with(0, LIMIT)?;
    check(state(&b)?.contains("running"), || {
        format!("{:?}", state(&b))
    })?;
    ctl(&b, &["shutdown", "--force"])?;
    second.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn socket_in_use() -> Verdict {
    let scratch = Scratch::new("inuse")?;
    let socket = scratch.path("api");
    let mut first = Vmm::start(&["serve", "--api-socket", &socket])?;
    up(&first, &socket)?;
    let output = bulkhead(&["serve", "--api-socket", &socket])?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    check(
        output.status.code() == Some(1) && errors.contains(&socket) && errors.lines().count() == 1,
        || format!("{:?}: {errors}", output.status),
    )?;
    // The first is untouched by the second's failure.
    up(&first, &socket)?;
    first.kill();
    nothing_left(Duration::from_secs(5))?;
    std::os::unix::net::UnixListener::bind(scratch.path("stale")).map_err(|e| e.to_string())?;
    let stale = scratch.path("stale");
    let mut third = Vmm::start(&["serve", "--api-socket", &stale])?;
    up(&third, &stale)?;
    refused(&stale, &["shutdown"], &["no machine"])?;
    third.kill();
    nothing_left(Duration::from_secs(20))
}
