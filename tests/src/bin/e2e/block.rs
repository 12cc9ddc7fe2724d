//! Disks: the guest's bytes are the host's, and the VMM has no part in moving them.

use std::process::Command;
use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("block");
    vec![
        test(
            "the guest's checksum over a disk is the host's",
            checksum_of_a_disk,
        ),
        test(
            "what the guest writes and flushes is in the host's file",
            guest_writes,
        ),
        test(
            "a read-only disk refuses writes and changes nothing",
            read_only,
        ),
        test("GET_ID gives the serial, the size is the file's", identity),
        test("a block device is served like a file", block_device),
        test("many disks, each its own process and content", many_disks),
        test(
            "neither an I/O nor its completion enters the VMM",
            no_vmm_on_the_data_path,
        ),
        test("a disk survives driver unbind and bind", rebind),
    ]
}

/// SHA-256 by coreutils, as hexadecimal.
pub fn sha256(path: &str) -> Result<String, String> {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .map_err(|e| format!("sha256sum: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .next()
        .map(str::to_string)
        .ok_or_else(|| format!("sha256sum {path}: {text:?}"))
}

fn run_script(
    scratch: &Scratch,
    script: &str,
    disks: &[String],
    more: &[&str],
) -> Result<Vmm, String> {
    // The script's disk comes last, so that the disks under test are vda, vdb, …
    let script = format!(
        "path={},readonly=on,id=script",
        scratch.script("script", script)?
    );
    let mut args = Vec::new();
    for disk in disks {
        args.extend_from_slice(&["--disk", disk]);
    }
    args.extend_from_slice(&["--disk", &script]);
    args.extend_from_slice(more);
    Vmm::boot("bh.cmd=script", &args)
}

fn checksum_of_a_disk() -> Verdict {
    let scratch = Scratch::new("sum")?;
    let disk = scratch.disk("disk", 32 * MIB, 7)?;
    let expected = sha256(&disk)?;
    let mut vmm = run_script(
        &scratch,
        "echo SUM=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)
echo AGAIN=$(cat /dev/vda | sha256sum)",
        &[format!("path={disk}")],
        &[],
    )?;
    vmm.wait_for(&format!("SUM={expected}"), LIMIT)?;
    vmm.wait_for(&format!("AGAIN={expected}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn guest_writes() -> Verdict {
    let scratch = Scratch::new("write")?;
    let disk = scratch.disk("disk", 8 * MIB, 11)?;
    let mut vmm = run_script(
        &scratch,
        "dd if=/dev/urandom of=/dev/vda bs=1M count=8 2>/dev/null && sync
dd if=/dev/zero of=/dev/vda bs=512 seek=3 count=1 oflag=direct 2>/dev/null && sync
echo SUM=$(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum)",
        &[format!("path={disk}")],
        &[],
    )?;
    vmm.ends_with(0, LIMIT)?;
    let expected = sha256(&disk)?;
    check(vmm.output().contains(&format!("SUM={expected}")), || {
        vmm.story(&format!("the host's file has {expected}"))
    })
}

fn read_only() -> Verdict {
    let scratch = Scratch::new("ro")?;
    let disk = scratch.disk("disk", MIB, 13)?;
    let before = sha256(&disk)?;
    let mut vmm = run_script(
        &scratch,
        "echo RO=$(cat /sys/block/vda/ro)
dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null && echo WRITTEN || echo REFUSED",
        &[format!("path={disk},readonly=on")],
        &[],
    )?;
    vmm.wait_for("RO=1", LIMIT)?;
    vmm.wait_for("REFUSED", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    check(sha256(&disk)? == before, || "the file changed".to_string())
}

fn identity() -> Verdict {
    let scratch = Scratch::new("id")?;
    let disk = scratch.disk("disk", 3 * MIB + 512, 17)?;
    let mut vmm = run_script(
        &scratch,
        "echo SERIAL=$(cat /sys/block/vda/serial) SIZE=$(cat /sys/block/vda/size)",
        &[format!("path={disk},serial=bulkhead-serial-20by")],
        &[],
    )?;
    vmm.wait_for(
        &format!("SERIAL=bulkhead-serial-20by SIZE={}", (3 * MIB + 512) / 512),
        LIMIT,
    )?;
    vmm.ends_with(0, LIMIT)
}

fn many_disks() -> Verdict {
    let scratch = Scratch::new("many")?;
    let (mut disks, mut sums) = (Vec::new(), Vec::new());
    for n in 0..6 {
        let disk = scratch.disk(&format!("disk{n}"), MIB, 100 + n)?;
        sums.push(sha256(&disk)?);
        disks.push(format!("path={disk}"));
    }
    let mut vmm = run_script(
        &scratch,
        "for d in a b c d e f; do echo SUM=$(cat /dev/vd$d | sha256sum); done",
        &disks,
        &["--cpus", "2"],
    )?;
    for sum in &sums {
        vmm.wait_for(&format!("SUM={sum}"), LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)
}

/// Doorbells are ioeventfds and completions irqfds: while the guest reads a disk as fast as
/// it can, the exits that reach the VMM do not grow with the number of requests.
fn no_vmm_on_the_data_path() -> Verdict {
    let scratch = Scratch::new("path")?;
    let disk = scratch.disk("disk", 4 * MIB, 19)?;
    let socket = scratch.path("api");
    let mut vmm = run_script(
        &scratch,
        "dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; echo READY
read -r line
for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; done
echo DONE; read -r line",
        &[format!("path={disk}")],
        &["--api-socket", &socket],
    )?;
    let counters = || -> Result<(u64, u64), String> {
        let info = ctl(&socket, &["info"])?;
        let of = |name: &str| {
            info["counters"][name]
                .as_u64()
                .ok_or_else(|| format!("no {name} in {info}"))
        };
        Ok((of("mmio_exits")?, of("manager_wakeups")?))
    };
    vmm.wait_for("READY", LIMIT)?;
    std::thread::sleep(Duration::from_millis(500));
    let before = counters()?;
    vmm.type_text("\n")?;
    vmm.wait_for("DONE", LIMIT)?;
    let after = counters()?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    let requests: u64 = 4 * 4 * 1024 / 4;
    let (mmio, wakeups) = (after.0 - before.0, after.1 - before.1);
    check(mmio <= 16 && wakeups <= 16, || {
        format!(
            "{requests} requests made {mmio} MMIO exits to the VMM and {wakeups} manager wake-ups"
        )
    })?;
    println!("[{requests} requests: {mmio} MMIO exits to the VMM, {wakeups} manager wake-ups]");
    Ok(())
}

fn rebind() -> Verdict {
    let scratch = Scratch::new("rebind")?;
    let disk = scratch.disk("disk", MIB, 23)?;
    let expected = sha256(&disk)?;
    let mut vmm = run_script(
        &scratch,
        "device=$(basename $(readlink /sys/block/vda/device))
for i in 1 2 3; do
  echo $device > /sys/bus/virtio/drivers/virtio_blk/unbind
  echo $device > /sys/bus/virtio/drivers/virtio_blk/bind
done
for d in /dev/vd?; do echo SUM=$(cat $d | sha256sum); done",
        &[format!("path={disk}")],
        &[],
    )?;
    vmm.wait_for(&format!("SUM={expected}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn block_device() -> Verdict {
    let scratch = Scratch::new("loop")?;
    let disk = scratch.disk("disk", 4 * MIB, 41)?;
    let expected = sha256(&disk)?;
    let output = Command::new("losetup")
        .args(["--find", "--show", &disk])
        .output()
        .map_err(|e| format!("losetup: {e}"))?;
    let device = String::from_utf8_lossy(&output.stdout).trim().to_string();
    check(output.status.success(), || format!("losetup: {output:?}"))?;
    let verdict = run_script(
        &scratch,
        "echo SIZE=$(cat /sys/block/vda/size) SUM=$(sha256sum < /dev/vda)
dd if=/dev/zero of=/dev/vda bs=4k count=2 oflag=direct 2>/dev/null && sync && echo WRITTEN",
        &[format!("path={device}")],
        &[],
    )
    .and_then(|mut vmm| {
        vmm.wait_for("WRITTEN", LIMIT)?;
        vmm.ends_with(0, LIMIT)?;
        check(
            vmm.output().contains(&format!("SIZE=8192 SUM={expected}")),
            || vmm.story(&format!("the host's device has {expected}")),
        )
    });
    let _ = Command::new("losetup").args(["--detach", &device]).status();
    verdict?;
    let content = std::fs::read(&disk).map_err(|e| e.to_string())?;
    check(content.iter().take(8192).all(|b| *b == 0), || {
        "what the guest wrote is not on the device".to_string()
    })
}
