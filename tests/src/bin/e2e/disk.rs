//! Disks as they are deployed: verified by fio in every cache mode and number of queues,
//! with file systems on them, grown, limited, drained, counted and locked.

use std::time::{Duration, Instant};

use bulkhead_tests::host::{allocated, debian, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl};

/// Nothing fails by slowness: emulated guests on a busy machine take their time.
pub const LIMIT: Duration = Duration::from_secs(240);
const MIB: u64 = 1 << 20;
/// The cache modes of `--disk`.
const MODES: [&str; 4] = ["none", "writeback", "writethrough", "unsafe"];

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("disk");
    let long = Test::long("disk");
    vec![
        test(
            "fio verifies crc32c in every cache mode over 2 queues, and the host finds the same",
            || verified(2, 2),
        ),
        long(
            "fio verifies crc32c in every cache mode over 1 queue",
            || verified(1, 8),
        ),
        long(
            "fio verifies crc32c in every cache mode over 4 queues",
            || verified(4, 8),
        ),
        test(
            "mkfs, an untar of a thousand files, fsck: content as the host packed it",
            || untar(1000),
        ),
        long(
            "mkfs, an untar of ten thousand files, fsck: content as the host packed it",
            || untar(10_000),
        ),
        test(
            "discard shrinks the host's file, write-zeroes reads as zeroes",
            discard,
        ),
        test(
            "a disk grows while the guest runs, and its file system with it",
            grow,
        ),
        test(
            "a rate limit holds the guest back at least as long as it says, and is lifted live",
            rate_limit,
        ),
        test("the counters of a disk are what the guest did", counters),
        test(
            "a drained disk takes nothing, a resumed one finishes what waited",
            drain,
        ),
        test(
            "two VMs cannot open one image for writing; readers may share it",
            locked,
        ),
        test(
            "the guest sees the limits of the disk that the host has",
            topology,
        ),
        test(
            "the guest switches the write cache and the device follows",
            write_cache,
        ),
    ]
}

/// A sparse file.
pub fn sparse(scratch: &Scratch, name: &str, size: u64) -> Result<String, String> {
    let path = scratch.path(name);
    std::fs::File::create(&path)
        .and_then(|f| f.set_len(size))
        .map_err(|e| format!("{path}: {e}"))?;
    Ok(path)
}

/// The same job writes in the guest and verifies on the host.
fn fio(file: &str, jobs: u32, mib: u32, more: &str) -> String {
    format!(
        "fio --name=v --thread --filename={file} --direct=1 --bs=16k --rw=randwrite --numjobs={jobs} \
         --size={mib}M --offset_increment={mib}M --verify=crc32c --verify_fatal=1 --verify_state_save=0 {more}"
    )
}

fn verified(queues: u32, mib: u32) -> Verdict {
    let scratch = Scratch::new("fio")?;
    let mut disks = Vec::new();
    let mut script = String::from("cd /tmp\n");
    for (index, mode) in MODES.iter().enumerate() {
        let path = sparse(&scratch, mode, u64::from(queues * mib) * MIB)?;
        disks.push(format!(
            "path={path},cache={mode},queues={queues},id={mode}"
        ));
        let device = format!(
            "/dev/vd{}",
            char::from(b'b' + u8::try_from(index).unwrap_or(0))
        );
        let job = fio(
            &device,
            queues,
            mib,
            "--ioengine=libaio --iodepth=8 --fsync=32 --cpus_allowed_policy=split --cpus_allowed=0-$(($(nproc)-1))",
        );
        script += &format!(
            "echo QUEUES-{mode}=$(ls -d /sys/block/{}/mq/* | wc -l)\n\
             {job} >/tmp/out 2>&1 && echo VERIFIED-{mode} || {{ echo BAD-{mode}; tail -5 /tmp/out; }}\n",
            device.trim_start_matches("/dev/")
        );
    }
    let cpus = queues.to_string();
    let mut vmm = debian(&scratch, &script, &disks, &["--cpus", &cpus])?;
    for mode in MODES {
        vmm.wait_for(&format!("QUEUES-{mode}={queues}"), LIMIT)?;
        vmm.wait_for(&format!("VERIFIED-{mode}"), LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)?;
    for mode in MODES {
        let job = fio(
            &scratch.path(mode),
            queues,
            mib,
            "--ioengine=psync --verify_only=1 --direct=0",
        );
        sh(&format!("cd /tmp && {}", job.replace("--direct=1 ", "")))
            .map_err(|e| format!("the host finds something else, cache={mode}: {e}"))?;
    }
    Ok(())
}

fn untar(files: u32) -> Verdict {
    let scratch = Scratch::new("untar")?;
    let (tar, disk) = (
        scratch.path("files.tar"),
        sparse(&scratch, "disk", 256 * MIB)?,
    );
    // Names in many directories, sizes from nothing to 9 KiB, content of its own in each.
    sh(&format!(
        "mkdir {dir} && cd {dir}
python3 - {files} <<'END'
import os, random, sys
random.seed(5)
for n in range(int(sys.argv[1])):
    d = f'd{{n % 100}}/e{{n % 7}}'
    os.makedirs(d, exist_ok=True)
    with open(f'{{d}}/f{{n}}', 'wb') as f:
        f.write(random.randbytes(random.choice((0, 1, 100, 511, 4096, 5000, 9000))))
END
find . -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -d' ' -f1 >{dir}.sum
find . -type f | wc -l >{dir}.count
tar cf {tar} .
rm -rf {dir}",
        dir = scratch.path("tree"),
    ))?;
    let read = |name: &str| {
        std::fs::read_to_string(scratch.path(name))
            .map(|t| t.trim().to_string())
            .map_err(|e| e.to_string())
    };
    let (sum, count) = (read("tree.sum")?, read("tree.count")?);
    check(count == files.to_string(), || format!("{count} files"))?;
    let script = "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt/data && cd /mnt/data && tar xf /dev/vdc && cd / && umount /mnt/data || echo FAILED-UNTAR
e2fsck -fn /dev/vdb && echo FSCK=clean
mount -o ro /dev/vdb /mnt/data && cd /mnt/data
echo COUNT=$(find . -path ./lost+found -prune -o -type f -print | wc -l)
echo SUM=$(find . -path ./lost+found -prune -o -type f -print | sort | xargs cat | sha256sum)
cd /; umount /mnt/data";
    let mut vmm = debian(
        &scratch,
        script,
        &[
            format!("path={disk},id=data"),
            format!("path={tar},readonly=on,id=tar"),
        ],
        &[],
    )?;
    vmm.wait_for("FSCK=clean", LIMIT)?;
    vmm.wait_for(&format!("COUNT={count}"), LIMIT)?;
    vmm.wait_for(&format!("SUM={sum}"), LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    sh(&format!("e2fsck -fn {disk}")).map(drop)
}

fn discard() -> Verdict {
    let scratch = Scratch::new("discard")?;
    let size = 32 * MIB;
    let disk = scratch.disk("disk", usize::try_from(size).unwrap_or(0), 3)?;
    let before = allocated(&disk)?;
    check(before >= size, || format!("{before} bytes allocated"))?;
    let script = "echo MAX=$(cat /sys/block/vdb/queue/discard_max_bytes) ZEROES=$(cat /sys/block/vdb/queue/write_zeroes_max_bytes)
blkdiscard -o 8M -l 16M /dev/vdb && echo DISCARDED
echo LEFT=$(dd if=/dev/vdb bs=1M skip=8 count=16 iflag=direct status=none | tr -d '\\0' | wc -c)
blkdiscard -z -o 1M -l 1M /dev/vdb && echo ZEROED
echo LEFT2=$(dd if=/dev/vdb bs=1M skip=1 count=1 iflag=direct status=none | tr -d '\\0' | wc -c)
echo STEP1; read -r line
mkfs.ext4 -q -E nodiscard /dev/vdb && mount /dev/vdb /mnt/data && dd if=/dev/urandom of=/mnt/data/f bs=1M count=20 status=none && sync && echo STEP2
read -r line
rm /mnt/data/f; sync; fstrim -v /mnt/data && umount /mnt/data && echo STEP3
e2fsck -fn /dev/vdb && echo FSCK=clean";
    let mut vmm = debian(&scratch, script, &[format!("path={disk},id=data")], &[])?;
    vmm.wait_for("STEP1", LIMIT)?;
    let output = vmm.output();
    check(
        ["DISCARDED", "LEFT=0", "ZEROED", "LEFT2=0"]
            .iter()
            .all(|w| output.contains(w))
            && !output.contains("MAX=0")
            && !output.contains("ZEROES=0"),
        || vmm.story("discard or write-zeroes did not work"),
    )?;
    let after = allocated(&disk)?;
    check(after + 16 * MIB <= before, || {
        format!("16 MiB were discarded: {before} bytes allocated, then {after}")
    })?;
    vmm.type_text("\n")?;
    vmm.wait_for("STEP2", LIMIT)?;
    let full = allocated(&disk)?;
    vmm.type_text("\n")?;
    vmm.wait_for("STEP3", LIMIT)?;
    let trimmed = allocated(&disk)?;
    check(trimmed + 18 * MIB <= full, || {
        format!("fstrim after rm of 20 MiB: {full} bytes allocated, then {trimmed}")
    })?;
    vmm.wait_for("FSCK=clean", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    println!(
        "[{} MiB, after blkdiscard {}, with a file {}, after fstrim {}]",
        before / MIB,
        after / MIB,
        full / MIB,
        trimmed / MIB
    );
    Ok(())
}

fn grow() -> Verdict {
    let scratch = Scratch::new("grow")?;
    let disk = sparse(&scratch, "disk", 16 * MIB)?;
    let socket = scratch.path("api");
    let script =
        "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt/data && head -c 6M /dev/urandom >/mnt/data/f
sum=$(sha256sum </mnt/data/f)
echo SIZE=$(cat /sys/block/vdb/size) READY
until [ $(cat /sys/block/vdb/size) = 131072 ]; do sleep 0.2; done
echo GREW; dmesg | grep -i 'vdb.*new size' | tail -1
resize2fs /dev/vdb 2>/dev/null && head -c 40M /dev/urandom >/mnt/data/g && echo WRITTEN
[ \"$sum\" = \"$(sha256sum </mnt/data/f)\" ] && echo KEPT
umount /mnt/data; e2fsck -fn /dev/vdb && echo FSCK=clean
dd if=/dev/zero of=/dev/vdb bs=512 seek=131071 count=1 oflag=direct && echo LAST-SECTOR
dd if=/dev/zero of=/dev/vdb bs=512 seek=131072 count=1 oflag=direct || echo BEYOND-REFUSED";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data")],
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("SIZE=32768 READY", LIMIT)?;
    let shrink = ctl(&socket, &["update-disk", "data", "--size", "8M"]);
    check(shrink.is_err(), || "a disk was shrunk".to_string())?;
    ctl(&socket, &["update-disk", "data", "--size", "64M"])?;
    for wanted in [
        "GREW",
        "WRITTEN",
        "KEPT",
        "FSCK=clean",
        "LAST-SECTOR",
        "BEYOND-REFUSED",
    ] {
        vmm.wait_for(wanted, LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)?;
    let size = std::fs::metadata(&disk).map_err(|e| e.to_string())?.len();
    check(size == 64 * MIB, || format!("the file has {size} bytes"))
}

fn rate_limit() -> Verdict {
    let scratch = Scratch::new("limit")?;
    let disk = sparse(&scratch, "disk", 64 * MIB)?;
    let socket = scratch.path("api");
    let script = "dd if=/dev/vdb of=/dev/null bs=64k count=1 iflag=direct status=none
echo BYTES; read -r line
dd if=/dev/vdb of=/dev/null bs=256k count=16 iflag=direct status=none; echo BYTES-DONE
read -r line
dd if=/dev/vdb of=/dev/null bs=4k count=150 iflag=direct status=none; echo OPS-DONE
read -r line
dd if=/dev/vdb of=/dev/null bs=256k count=64 iflag=direct status=none; echo FREE-DONE";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data,bps=1M:256K")],
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("BYTES", LIMIT)?;
    // 4 MiB at 1 MiB/s with a burst of 256 KiB, the last 256 KiB on credit: at least 3.5 s. The
    // host's clock, from a moment before to a moment after, so that no delay can make this fail.
    let start = Instant::now();
    vmm.type_text("\n")?;
    vmm.wait_for("BYTES-DONE", LIMIT)?;
    let bytes = start.elapsed();
    check(bytes >= Duration::from_millis(3450), || {
        format!("4 MiB at 1 MiB/s took {bytes:?}")
    })?;
    ctl(
        &socket,
        &["update-disk", "data", "--bps", "0", "--iops", "50:10"],
    )?;
    // 150 requests at 50/s with a burst of 10: at least 2.8 s.
    let start = Instant::now();
    vmm.type_text("\n")?;
    vmm.wait_for("OPS-DONE", LIMIT)?;
    let operations = start.elapsed();
    check(operations >= Duration::from_millis(2750), || {
        format!("150 requests at 50/s took {operations:?}")
    })?;
    ctl(&socket, &["update-disk", "data", "--iops", "0"])?;
    let start = Instant::now();
    vmm.type_text("\n")?;
    vmm.wait_for("FREE-DONE", LIMIT)?;
    println!(
        "[4 MiB at 1 MiB/s: {bytes:?}; 150 requests at 50/s: {operations:?}; 16 MiB without a limit: {:?}]",
        start.elapsed()
    );
    vmm.ends_with(0, LIMIT)
}

/// Sum of a counter over the queues of `ctl stats`.
fn sum(stats: &serde_json::Value, pointer: &str) -> Option<u64> {
    let queues = stats["queues"].as_array()?;
    queues
        .iter()
        .map(|q| q.pointer(pointer).and_then(serde_json::Value::as_u64))
        .sum()
}

fn counters() -> Verdict {
    let scratch = Scratch::new("count")?;
    let disk = sparse(&scratch, "disk", 16 * MIB)?;
    let socket = scratch.path("api");
    let script = "echo READY; read -r line
dd if=/dev/vdb of=/dev/null bs=64k count=64 iflag=direct status=none
dd if=/dev/zero of=/dev/vdb bs=4k count=100 oflag=direct status=none
echo DONE; read -r line";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data,queues=1")],
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    let before = ctl(&socket, &["stats", "data"])?;
    vmm.type_text("\n")?;
    vmm.wait_for("DONE", LIMIT)?;
    let after = ctl(&socket, &["stats", "data"])?;
    vmm.type_text("\n")?;
    vmm.ends_with(0, LIMIT)?;
    let grown = |pointer: &str| -> Result<u64, String> {
        let (b, a) = (sum(&before, pointer), sum(&after, pointer));
        a.zip(b)
            .map(|(a, b)| a.saturating_sub(b))
            .ok_or_else(|| format!("no {pointer} in {after}"))
    };
    let (requests, read) = (grown("/requests")?, grown("/read_bytes")?);
    let written = grown("/written_bytes")?;
    check(
        requests == 164 && read == 4 * MIB && written == 400 * 1024,
        || {
            format!(
                "64 reads of 64 KiB and 100 writes of 4 KiB were counted as {requests} requests, {read} bytes read, \
                 {written} written: {after}"
            )
        },
    )?;
    let (kicks, interrupts) = (sum(&after, "/kicks"), sum(&after, "/interrupts"));
    check(
        kicks.is_some_and(|k| k > 0) && interrupts.is_some_and(|i| i > 0),
        || after.to_string(),
    )
}

fn drain() -> Verdict {
    let scratch = Scratch::new("drain")?;
    let disk = sparse(&scratch, "disk", 16 * MIB)?;
    let socket = scratch.path("api");
    let script = "echo READY; read -r line
dd if=/dev/vdb of=/dev/null bs=4k count=16 iflag=direct status=none; echo FIRST
read -r line
(dd if=/dev/vdb of=/dev/null bs=4k count=16 iflag=direct status=none; echo SECOND) &
sleep 1; echo ASKED; wait; echo DONE";
    let mut vmm = debian(
        &scratch,
        script,
        &[format!("path={disk},id=data")],
        &["--api-socket", &socket],
    )?;
    vmm.wait_for("READY", LIMIT)?;
    vmm.type_text("\n")?;
    vmm.wait_for("FIRST", LIMIT)?;
    ctl(&socket, &["drain", "data"])?;
    vmm.type_text("\n")?;
    vmm.wait_for("ASKED", LIMIT)?;
    check(!vmm.output().contains("SECOND"), || {
        vmm.story("a drained disk served a request")
    })?;
    ctl(&socket, &["resume-device", "data"])?;
    vmm.wait_for("SECOND", LIMIT)?;
    vmm.wait_for("DONE", LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn locked() -> Verdict {
    let scratch = Scratch::new("lock")?;
    let disk = sparse(&scratch, "disk", 4 * MIB)?;
    let writer = format!("path={disk},id=data");
    let reader = format!("path={disk},id=data,readonly=on");
    let mut first = Vmm::boot("bh.cmd=hang", &["--disk", &writer])?;
    first.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
    for second in [&writer, &reader] {
        let mut vmm = Vmm::boot("bh.cmd=hang", &["--disk", second])?;
        let code = vmm.wait(LIMIT)?;
        let errors = vmm.errors();
        check(
            code != 0 && errors.contains(&disk) && errors.to_lowercase().contains("lock"),
            || vmm.story(&format!("exit code {code}; not one line about the lock")),
        )?;
        println!("[{}]", errors.lines().last().unwrap_or_default());
    }
    check(first.output().contains("READY"), String::new)?;
    first.kill();
    let mut readers = Vec::new();
    for _ in 0..2 {
        let mut vmm = Vmm::boot("bh.cmd=hang", &["--disk", &reader])?;
        vmm.wait_for("BULKHEAD-GUEST-READY", LIMIT)?;
        readers.push(vmm);
    }
    let mut vmm = Vmm::boot("bh.cmd=hang", &["--disk", &writer])?;
    check(vmm.wait(LIMIT)? != 0, || {
        "a writer got a disk that others read".to_string()
    })
}

fn topology() -> Verdict {
    let scratch = Scratch::new("topology")?;
    let disk = sparse(&scratch, "disk", 4 * MIB)?;
    let script = "q=/sys/block/vdb/queue
echo LIMITS logical=$(cat $q/logical_block_size) physical=$(cat $q/physical_block_size) segments=$(cat $q/max_segments) segment=$(cat $q/max_segment_size) cache=$(cat $q/write_cache) ro=$(cat /sys/block/vdb/ro)
dd if=/dev/zero of=/dev/vdb bs=2M count=1 oflag=direct status=none && echo BIG-WRITE
echo FEATURES=$(cat /sys/block/vdb/device/features)";
    let mut vmm = debian(&scratch, script, &[format!("path={disk},id=data")], &[])?;
    vmm.wait_for("BIG-WRITE", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    let output = vmm.output();
    let field = |name: &str| -> Option<u64> {
        let line = output.lines().find(|l| l.starts_with("LIMITS"))?;
        let word = line.split_whitespace().find_map(|w| w.strip_prefix(name))?;
        word.trim_matches(|c: char| !c.is_ascii_digit())
            .parse()
            .ok()
    };
    let (logical, segments) = (field("logical="), field("segments="));
    check(
        matches!(logical, Some(512 | 4096)) && segments.is_some_and(|s| s >= 32),
        || vmm.story("limits that no disk of ours has"),
    )?;
    // Bits of virtio 1.2, 5.2.3 and 6: by number from the left of `features`.
    let features = output.lines().find_map(|l| l.strip_prefix("FEATURES="));
    let features: Vec<char> = features.unwrap_or_default().trim().chars().collect();
    let mut wanted = vec![
        (2, "SEG_MAX"),
        (6, "BLK_SIZE"),
        (9, "FLUSH"),
        (10, "TOPOLOGY"),
        (11, "CONFIG_WCE"),
        (13, "DISCARD"),
        (14, "WRITE_ZEROES"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (32, "VERSION_1"),
    ];
    wanted.retain(|(bit, _)| features.get(*bit) != Some(&'1'));
    check(wanted.is_empty(), || {
        vmm.story(&format!("features not offered or not taken: {wanted:?}"))
    })
}

fn write_cache() -> Verdict {
    let scratch = Scratch::new("wce")?;
    let disk = sparse(&scratch, "disk", 4 * MIB)?;
    let through = sparse(&scratch, "through", 4 * MIB)?;
    let socket = scratch.path("api");
    let script = "echo BEFORE=$(cat /sys/block/vdb/cache_type | tr ' ' -) THROUGH=$(cat /sys/block/vdc/cache_type | tr ' ' -)
echo 'write through' >/sys/block/vdb/cache_type; echo AFTER=$(cat /sys/block/vdb/cache_type | tr ' ' -)
dd if=/dev/urandom of=/dev/vdb bs=64k count=4 oflag=direct status=none && echo WRITTEN
echo 'write back' >/sys/block/vdb/cache_type; echo AGAIN=$(cat /sys/block/vdb/cache_type | tr ' ' -)
dd if=/dev/urandom of=/dev/vdb bs=64k count=4 oflag=direct conv=fsync status=none && echo FLUSHED";
    let mut vmm = debian(
        &scratch,
        script,
        &[
            format!("path={disk},id=data,cache=writeback"),
            format!("path={through},id=through,cache=writethrough"),
        ],
        &["--api-socket", &socket],
    )?;
    for wanted in [
        "BEFORE=write-back THROUGH=write-through",
        "AFTER=write-through",
        "WRITTEN",
        "AGAIN=write-back",
        "FLUSHED",
    ] {
        vmm.wait_for(wanted, LIMIT)?;
    }
    vmm.ends_with(0, LIMIT)
}
