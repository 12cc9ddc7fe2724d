//! Block devices of the host as disks (loop devices over sparse files), and what is refused or
//! counted on the way from `bulkhead ctl` to the guest: several checks to a boot.

use bulkhead_tests::host::{Undo, allocated, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl};

use crate::disk::LIMIT;

const MIB: u64 = 1 << 20;

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "disk",
        name: "a block device of 4 KiB sectors: verified, discarded, grown; a file no further than max-size; queues as vCPUs; latencies of all requests",
        long: false,
        run: four_kib,
    }]
}

const SCRIPT: &str = "cd /tmp; q=/sys/block/vdb/queue
echo LOGICAL=$(cat $q/logical_block_size) PHYSICAL=$(cat $q/physical_block_size) SIZE=$(cat /sys/block/vdb/size)
for d in vdb vdc; do echo QUEUES-$d=$(ls -d /sys/block/$d/mq/* | wc -l); done
fio --name=v --thread --filename=/dev/vdb --direct=1 --bs=4k --rw=randwrite --size=2M --ioengine=libaio --iodepth=8 \
 --verify=crc32c --verify_fatal=1 --verify_state_save=0 >/tmp/out 2>&1 && echo VERIFIED || tail -5 /tmp/out
dd if=/dev/zero of=/dev/vdb bs=512 count=1 oflag=direct status=none 2>/dev/null && echo HALF=good || echo HALF=refused
blkdiscard -o 4M -l 8M /dev/vdb && echo DISCARDED
fallocate --punch-hole -o 4M -l 8M /dev/vdc && echo PUNCHED
echo LEFT=$(dd if=/dev/vdc bs=1M skip=4 count=8 iflag=direct status=none | tr -d '\\0' | wc -c)
sync; echo SUM=$(dd if=/dev/vdb bs=1M iflag=direct status=none | sha256sum)
echo STEP1; read -r line
until [ $(cat /sys/block/vdb/size) = 65536 ]; do sleep 0.2; done
dd if=/dev/urandom of=/dev/vdb bs=1M seek=31 count=1 oflag=direct conv=fsync status=none && echo GREW
echo TAIL=$(dd if=/dev/vdb bs=1M skip=31 iflag=direct status=none | sha256sum)
echo LIMITED=$(cat /sys/block/vdc/size)
echo STEP2; read -r line";

fn four_kib() -> Verdict {
    let scratch = Scratch::new("four")?;
    let (bytes, socket) = (16 << 20, scratch.path("api"));
    let (under, file) = (
        scratch.disk("under", bytes, 71)?,
        scratch.disk("file", bytes, 73)?,
    );
    let device = sh(&format!("losetup --find --show --sector-size 4096 {under}"))?;
    let device = device.trim();
    let _undo = Undo::new(format!("losetup --detach {device}"));
    let before = (allocated(&under)?, allocated(&file)?);
    let mut vmm = debian(
        &scratch,
        SCRIPT,
        &[
            format!("path={device},id=loop"),
            format!("path={file},id=data,max-size=24M"),
        ],
        &["--cpus", "2", "--api-socket", &socket],
    )?;
    vmm.wait_for("STEP1", LIMIT)?;
    let sum = sh(&format!("sync {under}; sha256sum <{under}"))?;
    let sum = format!("SUM={}", sum.split_whitespace().next().unwrap_or("?"));
    for wanted in [
        "LOGICAL=4096 PHYSICAL=4096 SIZE=32768",
        "QUEUES-vdb=2",
        "QUEUES-vdc=2",
        "VERIFIED",
        "HALF=refused",
        "DISCARDED",
        "PUNCHED",
        "LEFT=0",
        &sum,
    ] {
        check(vmm.output().contains(wanted), || {
            vmm.story(&format!("no {wanted}"))
        })?;
    }
    let after = (allocated(&under)?, allocated(&file)?);
    check(
        after.0 + 7 * MIB <= before.0 && after.1 + 7 * MIB <= before.1,
        || format!("8 MiB of each were given back: allocated {before:?}, then {after:?}"),
    )?;

    // A file grows to max-size and no further; a block device when it has grown.
    let grow = |id: &str, size: &str| ctl(&socket, &["update-disk", id, "--size", size]);
    let why = grow("data", "64M").err().unwrap_or_default();
    check(why.contains("max-size"), || {
        format!("beyond max-size: {why:?}")
    })?;
    check(grow("loop", "32M").is_err(), || {
        "a disk is larger than its device".to_string()
    })?;
    grow("data", "24M")?;
    sh(&format!("truncate -s 32M {under} && losetup -c {device}"))?;
    grow("loop", "32M")?;
    vmm.type_text("\n")?;
    vmm.wait_for("STEP2", LIMIT)?;
    let tail = sh(&format!("sync {under}; tail -c 1M {under} | sha256sum"))?;
    let tail = format!("TAIL={}", tail.split_whitespace().next().unwrap_or("?"));
    for wanted in ["GREW", "LIMITED=49152", &tail] {
        check(vmm.output().contains(wanted), || {
            vmm.story(&format!("no {wanted}"))
        })?;
    }

    // Every request has a place in the histogram of its queue.
    let stats = ctl(&socket, &["stats", "loop"])?;
    let queues = stats["queues"].as_array().cloned().unwrap_or_default();
    check(queues.len() == 2, || stats.to_string())?;
    for queue in &queues {
        let buckets = queue["latency_us_log2"].as_array();
        let counted: u64 = buckets
            .into_iter()
            .flatten()
            .filter_map(|b| b.as_u64())
            .sum();
        check(
            queue["requests"].as_u64() == Some(counted) && counted > 0,
            || format!("{counted} latencies in {queue}"),
        )?;
    }
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)
}
