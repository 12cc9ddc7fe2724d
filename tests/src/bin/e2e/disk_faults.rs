//! The host fails under a disk: the guest gets an I/O error for what failed and for nothing
//! else, the operator an event, and the VM lives on.

use std::time::{Duration, Instant};

use bulkhead_tests::host::{Undo, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, patience};

use crate::disk::LIMIT;

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("disk");
    vec![
        test(
            "EIO of the host is the guest's I/O error and an event, the rest of the disk works",
            eio,
        ),
        test(
            "ENOSPC under a sparse file is an I/O error and an event; with space again writes work",
            no_space,
        ),
        test(
            "a file truncated underneath gives I/O errors beyond its end, never stale data or a crash",
            truncated,
        ),
    ]
}

/// Waits for an event of this kind about this device; its line.
pub fn event(socket: &str, kind: &str, subject: &str) -> Result<String, String> {
    let end = Instant::now() + patience(LIMIT);
    loop {
        let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = text.lines().find(|l| {
            serde_json::from_str::<serde_json::Value>(l)
                .is_ok_and(|e| e["kind"] == kind && e["subject"] == subject)
        });
        if let Some(line) = found {
            return Ok(line.to_string());
        }
        if Instant::now() > end {
            return Err(format!("no event {kind} about {subject} in {text}"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Boots with the disk and goes through the script's steps: `STEP n` is answered by waiting
/// for the event if `errors[n]`, running `between[n]` on the host and typing a line.
fn steps(
    scratch: &Scratch,
    script: &str,
    disk: &str,
    between: &[(bool, &str)],
) -> Result<Vmm, String> {
    let socket = scratch.path("api");
    let mut vmm = debian(
        scratch,
        script,
        &[format!("path={disk},id=data")],
        &["--api-socket", &socket],
    )?;
    for (index, (failed, host)) in between.iter().enumerate() {
        vmm.wait_for(&format!("STEP{index}"), LIMIT)?;
        if *failed {
            let line = event(&socket, "device.io-error", "data").map_err(|e| vmm.story(&e))?;
            println!("[{line}]");
        }
        sh(host)?;
        vmm.type_text("\n")?;
    }
    Ok(vmm)
}

fn eio() -> Verdict {
    let scratch = Scratch::new("eio")?;
    let backing = scratch.disk("disk", 8 << 20, 43)?;
    let name = format!("bh-eio-{}", std::process::id());
    // Sectors 4096 to 8191 (2 to 4 MiB) fail.
    let device = sh(&format!(
        "modprobe dm_mod; device=$(losetup --find --show {backing})
printf '0 4096 linear %s 0\\n4096 4096 error\\n8192 8192 linear %s 8192\\n' $device $device | dmsetup create {name}
dmsetup mknodes {name} >/dev/null; echo $device"
    ))?;
    let _undo = Undo::new(format!(
        "dmsetup remove --force {name}; losetup --detach {}",
        device.trim()
    ));
    let script = "try() { dd if=/dev/vdb of=/dev/null bs=64k skip=$1 count=1 iflag=direct status=none 2>/dev/null && echo $2=good || echo $2=error; }
try 0 FIRST; try 40 MIDDLE; try 100 LAST
dd if=/dev/zero of=/dev/vdb bs=64k seek=40 count=1 oflag=direct status=none 2>/dev/null && echo WRITE=good || echo WRITE=error
dmesg | grep -c 'I/O error, dev vdb' | sed 's/^/DMESG=/'
echo SUM=$(dd if=/dev/vdb bs=1M count=2 iflag=direct status=none | sha256sum)
echo STEP0; read -r line; echo ALIVE";
    let path = format!("/dev/mapper/{name}");
    let expected = sh(&format!("head -c 2M {backing} | sha256sum"))?;
    let expected = format!("SUM={}", expected.split_whitespace().next().unwrap_or("?"));
    let mut vmm = steps(&scratch, script, &path, &[(true, "true")])?;
    for wanted in [
        "FIRST=good",
        "MIDDLE=error",
        "LAST=good",
        "WRITE=error",
        &expected,
    ] {
        check(vmm.output().contains(wanted), || {
            vmm.story(&format!("no {wanted}"))
        })?;
    }
    vmm.wait_for("ALIVE", LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn no_space() -> Verdict {
    let scratch = Scratch::new("enospc")?;
    let mount = scratch.path("small");
    sh(&format!(
        "mkdir {mount} && mount -t tmpfs -o size=8m tmpfs {mount} && truncate -s 64M {mount}/disk"
    ))?;
    let _undo = Undo::new(format!("umount --lazy {mount}"));
    let script = "dd if=/dev/urandom of=/dev/vdb bs=1M count=4 oflag=direct status=none && echo FOUR=good
dd if=/dev/urandom of=/dev/vdb bs=1M seek=4 count=20 oflag=direct status=none 2>/dev/null && echo MORE=good || echo MORE=error
dd if=/dev/vdb of=/dev/null bs=1M count=4 iflag=direct status=none && echo READ=good
echo STEP0; read -r line
dd if=/dev/urandom of=/dev/vdb bs=1M seek=4 count=20 oflag=direct status=none && echo LATER=good
sync; echo ALIVE";
    let mut vmm = steps(
        &scratch,
        script,
        &format!("{mount}/disk"),
        &[(true, &format!("mount -o remount,size=64m {mount}"))],
    )?;
    for wanted in [
        "FOUR=good",
        "MORE=error",
        "READ=good",
        "LATER=good",
        "ALIVE",
    ] {
        vmm.wait_for(wanted, LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)
}

fn truncated() -> Verdict {
    let scratch = Scratch::new("truncated")?;
    let disk = scratch.disk("disk", 8 << 20, 47)?;
    let before = sh(&format!("head -c 2M {disk} | sha256sum"))?;
    let before = before.split_whitespace().next().unwrap_or("?").to_string();
    let script = "dd if=/dev/vdb of=/dev/null bs=1M iflag=direct status=none && echo WHOLE=good
echo STEP0; read -r line
echo SUM=$(dd if=/dev/vdb bs=1M count=2 iflag=direct status=none | sha256sum)
dd if=/dev/vdb of=/dev/null bs=64k skip=32 count=1 iflag=direct status=none 2>/dev/null && echo ACROSS=good || echo ACROSS=error
dd if=/dev/vdb of=/dev/null bs=1M skip=6 count=1 iflag=direct status=none 2>/dev/null && echo BEYOND=good || echo BEYOND=error
echo STEP1; read -r line
dd if=/dev/vdb of=/dev/null bs=1M iflag=direct status=none && echo AGAIN=good
echo ALIVE";
    // In the middle of a 64 KiB read: a short read of the host.
    let cut = 2 * MIB + 32 * 1024;
    let mut vmm = steps(
        &scratch,
        script,
        &disk,
        &[
            (false, &format!("truncate -s {cut} {disk}")),
            (true, &format!("truncate -s 8M {disk}")),
        ],
    )?;
    for wanted in [
        "WHOLE=good",
        &format!("SUM={before}"),
        "ACROSS=error",
        "BEYOND=error",
        "AGAIN=good",
        "ALIVE",
    ] {
        vmm.wait_for(wanted, LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)
}
