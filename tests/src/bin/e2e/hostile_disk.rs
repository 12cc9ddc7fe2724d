//! Disk processes that go wrong in the middle of a guest's work: one whose ring stands still while
//! it answers the VMM, one that crashes at every try. The guest's other disks work on, the
//! slow one among them.

use std::time::{Duration, Instant};

use bulkhead_tests::host::debian;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, nothing_left};
use serde_json::Value;

use crate::disk::{LIMIT, sparse};
use crate::hostile_device::libexec;
use crate::recovery::field;

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("hostile-device");
    vec![
        test(
            "a ring that stands still is found hung, though the process answers; a throttled one is left alone",
            hung,
        ),
        test(
            "a disk that crashes at every try ends quarantined, while fio and checksums pass on another; pulled out, it lets go of who waits for it",
            crashing,
        ),
    ]
}

/// Events so far.
fn events(socket: &str) -> Result<Vec<Value>, String> {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines().map(serde_json::from_str);
    lines
        .collect::<Result<_, _>>()
        .map_err(|e| format!("{e} in {text}"))
}

/// Waits for the given number of events of a kind about a device; all about it so far.
fn wait_for(
    vmm: &Vmm,
    socket: &str,
    device: &str,
    kind: &str,
    count: usize,
) -> Result<Vec<Value>, String> {
    let end = Instant::now() + LIMIT;
    loop {
        let mut about = events(socket)?;
        about.retain(|e| e["subject"] == device);
        if about.iter().filter(|e| e["kind"] == kind).count() >= count {
            return Ok(about);
        }
        check(Instant::now() < end, || {
            vmm.story(&format!("not {count} {kind} of {device}: {about:?}"))
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn crashes(events: &[Value]) -> Vec<Value> {
    let crashes = events.iter().filter(|e| e["kind"] == "device.crashed");
    crashes.map(|e| e["what"].clone()).collect()
}

fn hung() -> Verdict {
    let scratch = Scratch::new("stuck")?;
    let disk = |id: &str, more: &str| -> Result<String, String> {
        let path = sparse(&scratch, id, 8 * MIB)?;
        Ok(format!("path={path},id={id},queues=1{more}"))
    };
    let disks = [
        // It is limited, too, which is no excuse.
        disk("stuck", ",serial=evil-stuck,iops=100000")?,
        // A read of 256 KiB is paid for in 20 s.
        disk("slow", ",bps=13107:4096")?,
    ];
    let script = "read_() { dd if=/dev/$1 of=/dev/null bs=256k count=1 skip=$2 iflag=direct status=none; }
echo READY; read -r line
(read_ vdb 24; echo UNSTUCK) & (for i in 1 2; do read_ vdc 0 || exit; done; echo SLOW-OK) & read -r line";
    let (socket, libexec) = (scratch.path("api"), libexec(&scratch)?);
    let options = [
        "--api-socket",
        &socket,
        "--libexec",
        &libexec,
        "--restarts",
        "1:3600",
    ];
    let mut vmm = debian(&scratch, script, &disks, &options)?;
    vmm.wait_for("READY", LIMIT)?;
    let begun = Instant::now();
    vmm.type_text("go\n")?;
    wait_for(&vmm, &socket, "stuck", "device.restarted", 1)?;
    check(begun.elapsed() >= Duration::from_secs(9), || {
        format!("hung after {:?}", begun.elapsed())
    })?;
    // Its successor has the same request in its ring, and does the same.
    let about = wait_for(&vmm, &socket, "stuck", "device.quarantined", 1)?;
    let crashes = crashes(&about);
    check(crashes.len() == 2, || format!("{about:?}"))?;
    for crash in crashes {
        check(crash["why"] == "hung" && crash["queue"] == 0, || {
            crash.to_string()
        })?;
    }
    vmm.wait_for("SLOW-OK", LIMIT)?;
    check(begun.elapsed() >= Duration::from_secs(15), || {
        format!("the slow disk was not slow: {:?}", begun.elapsed())
    })?;
    for device in ["slow", "rootfs", "script"] {
        check(field(&socket, device, "incarnation")? == 1, || {
            vmm.story(&format!("{device} was replaced"))
        })?;
    }
    check(!vmm.output().contains("UNSTUCK"), || vmm.story("unstuck"))?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn crashing() -> Verdict {
    let scratch = Scratch::new("crashing")?;
    let bad = sparse(&scratch, "bad", 8 * MIB)?;
    let good = sparse(&scratch, "good", 32 * MIB)?;
    let disks = [format!("path={good},id=good")];
    let evil = format!("path={bad},id=bad,queues=1,serial=evil-crash");
    // Before, while and after the bad one crashes.
    let script = "cd /tmp; dd if=/dev/urandom of=data bs=1M count=4 status=none; sum=$(sha256sum <data)
put() { dd if=data of=/dev/vdb bs=64k oflag=direct conv=fsync status=none; }
same() { [ \"$(dd if=/dev/vdb bs=64k count=64 iflag=direct status=none | sha256sum)\" = \"$sum\" ]; }
fio_() { fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=16k --rw=randwrite --offset=8M --size=16M --ioengine=libaio \\
    --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1; }
put && same && echo READY; read -r line; until [ -b /dev/vdd ]; do sleep 0.1; done
(dd if=/dev/vdd of=/dev/null bs=4k count=1 skip=1536 iflag=direct status=none; echo ALIVE $?) &
echo STARTED; rounds=0
while fio_ && same && put; do rounds=$((rounds + 1)); echo ROUND; read -r -t 0.1 line && break; done
same && fio_ && echo GOOD after $rounds || { echo BAD; tail -5 /tmp/out; }; read -r line";
    let (socket, libexec) = (scratch.path("api"), libexec(&scratch)?);
    let options = [
        "--api-socket",
        &socket,
        "--libexec",
        &libexec,
        "--restarts",
        "3:3600",
        "--hotplug-ports",
        "1",
    ];
    let mut vmm = debian(&scratch, script, &disks, &options)?;
    vmm.wait_for("READY", LIMIT)?;
    ctl(&socket, &["add-disk", &evil])?;
    vmm.type_text("go\n")?;
    let about = wait_for(&vmm, &socket, "bad", "device.quarantined", 1)?;
    let crashes = crashes(&about);
    check(crashes.len() == 4, || format!("{about:?}"))?;
    for crash in crashes {
        check(crash["why"] == "exit" && crash["status"] == 9, || {
            crash.to_string()
        })?;
    }
    check(field(&socket, "bad", "state")? == "quarantined", || {
        "not quarantined".into()
    })?;
    vmm.wait_for("ROUND", LIMIT)?;
    vmm.type_text("stop\n")?;
    vmm.wait_for("GOOD after", LIMIT)?;
    let output = vmm.output();
    check(!output.contains("BAD") && !output.contains("ALIVE"), || {
        vmm.story("an error")
    })?;
    check(field(&socket, "good", "incarnation")? == 1, || {
        "the good disk was replaced".into()
    })?;
    // A request hangs until then, as Linux's driver has it.
    ctl(&socket, &["remove-device", "bad", "--force"])?;
    vmm.wait_for("ALIVE 1", LIMIT)?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}
