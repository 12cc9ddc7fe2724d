//! qcow2 disks: made by qemu-img, written by guests, checked by qemu-img; and a format is
//! never guessed.

use bulkhead_tests::host::{debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm};

use crate::disk::{LIMIT, sparse};

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("disk");
    vec![
        test(
            "a qcow2 image of qemu-img's is clean after the guest wrote, and holds what it wrote",
            qcow2,
        ),
        test("a qcow2 overlay leaves its backing file as it was", backing),
        test(
            "a backing file that was not handed in is refused in one line",
            foreign_backing,
        ),
        test(
            "a guest that writes a qcow2 header into a raw disk gains nothing",
            not_guessed,
        ),
    ]
}

const WRITE: &str = "cd /tmp
fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=32k --rw=randwrite --size=12M --offset=4M --ioengine=libaio \
 --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1 && echo VERIFIED || { echo BAD; tail -5 /tmp/out; }
dd if=/dev/urandom of=/dev/vdb bs=4k seek=5000 count=3 oflag=direct status=none
blkdiscard -o 16M -l 1M /dev/vdb && echo DISCARDED
sync
echo SUM=$(dd if=/dev/vdb bs=1M iflag=direct status=none | sha256sum)";

/// Boots, lets the guest write, checks the image and that the guest's checksum is of what
/// qemu-img finds in it.
fn write_and_check(scratch: &Scratch, image: &str, disk: &str) -> Verdict {
    let mut vmm = debian(scratch, WRITE, &[disk], &["--cpus", "2"])?;
    vmm.wait_for("VERIFIED", LIMIT)?;
    vmm.wait_for("SUM=", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let checked = sh(&format!("qemu-img check -f qcow2 {image} 2>&1"))?;
    let raw = scratch.path("raw");
    let sum = sh(&format!(
        "qemu-img convert -f qcow2 -O raw {image} {raw} && sha256sum <{raw}; rm -f {raw}"
    ))?;
    let sum = sum.split_whitespace().next().unwrap_or("?").to_string();
    check(checked.contains("No errors were found"), || checked.clone())?;
    check(vmm.output().contains(&format!("SUM={sum}")), || {
        vmm.story(&format!("qemu-img finds {sum}"))
    })
}

fn qcow2() -> Verdict {
    let scratch = Scratch::new("qcow2")?;
    let image = scratch.path("image");
    sh(&format!("qemu-img create -q -f qcow2 {image} 64M"))?;
    write_and_check(
        &scratch,
        &image,
        &format!("path={image},format=qcow2,id=data,queues=2"),
    )
}

fn backing() -> Verdict {
    let scratch = Scratch::new("overlay")?;
    let (base, image) = (scratch.path("base"), scratch.path("image"));
    let raw = scratch.disk("raw-base", 32 << 20, 53)?;
    sh(&format!(
        "qemu-img convert -f raw -O qcow2 {raw} {base} && qemu-img create -q -f qcow2 -b {base} -F qcow2 {image} 40M"
    ))?;
    let before = sh(&format!("sha256sum <{base}"))?;
    write_and_check(
        &scratch,
        &image,
        &format!("path={image},format=qcow2,backing={base},id=data"),
    )?;
    check(sh(&format!("sha256sum <{base}"))? == before, || {
        "the backing file changed".to_string()
    })
}

fn foreign_backing() -> Verdict {
    let scratch = Scratch::new("foreign")?;
    let (secret, image) = (scratch.disk("secret", 1 << 20, 59)?, scratch.path("image"));
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {secret} -F raw {image} 8M"
    ))?;
    let mut vmm = Vmm::boot(
        "bh.cmd=hang",
        &["--disk", &format!("path={image},format=qcow2")],
    )?;
    let code = vmm.wait(LIMIT)?;
    let errors = vmm.errors();
    check(
        code != 0 && errors.contains("backing") && !vmm.output().contains("BULKHEAD-GUEST"),
        || vmm.story(&format!("exit code {code}")),
    )?;
    println!("[{}]", errors.lines().last().unwrap_or_default());
    Ok(())
}

fn not_guessed() -> Verdict {
    let scratch = Scratch::new("guess")?;
    let (secret, image) = (scratch.disk("secret", 1 << 20, 61)?, scratch.path("image"));
    let disk = sparse(&scratch, "disk", 8 * MIB)?;
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {secret} -F raw {image} 64M && truncate -s 1M {image}"
    ))?;
    let data = format!("path={disk},id=data");
    let mut vmm = debian(
        &scratch,
        "dd if=/dev/vdc of=/dev/vdb bs=64k oflag=direct status=none && echo WRITTEN",
        &[data.clone(), format!("path={image},readonly=on,id=source")],
        &[],
    )?;
    vmm.wait_for("WRITTEN", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    sh(&format!("qemu-img info -f qcow2 {disk} >/dev/null"))?;
    let expected = sh(&format!("sha256sum <{disk}"))?;
    let expected = expected
        .split_whitespace()
        .next()
        .unwrap_or("?")
        .to_string();
    // The same raw disk once more: as large as the file, its content the header's bytes.
    let mut vmm = debian(
        &scratch,
        "echo SIZE=$(cat /sys/block/vdb/size) SUM=$(dd if=/dev/vdb bs=64k iflag=direct status=none | sha256sum)",
        &[data],
        &[],
    )?;
    vmm.wait_for(&format!("SIZE=16384 SUM={expected}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)
}
