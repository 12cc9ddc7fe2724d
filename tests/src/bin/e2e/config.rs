//! A machine's configuration as a file: printed, read, mixed with options, refused by the line, and
//! booted.

use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bulkhead, ctl, guest_file, nothing_left};

use super::bad_input::{appears, expect};
use super::disk::LIMIT;

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("config");
    vec![test(
        "a guest boots by --config what --print-config printed of a command line",
        boots,
    )]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    let test = Test::short("config");
    vec![
        test(
            "what --print-config prints of a command line comes to the same when it is read, and starts nothing",
            printed,
        ),
        test(
            "a file that is wrong is refused in one line with the file, the key and a remedy",
            refused,
        ),
        test("ctl create takes a file, too", created),
    ]
}

/// What `run --print-config` prints.
fn print(args: &[&str]) -> Result<String, String> {
    let all = [["run", "--print-config"].as_slice(), args].concat();
    let output = bulkhead(&all)?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    check(output.status.success() && errors.is_empty(), || {
        format!("{args:?}: {}: {errors}", output.status)
    })?;
    String::from_utf8(output.stdout).map_err(|e| e.to_string())
}

fn boots() -> Verdict {
    let scratch = Scratch::new("config")?;
    let script = scratch.script(
        "s",
        "echo ONLINE=$(cat /sys/devices/system/cpu/online); echo DISKS=$(ls /sys/block | grep -c vd); echo SUM=$(sha256sum </dev/vdb); grep MemTotal /proc/meminfo; ls /sys/class/misc/hw_random && echo RNG=$(cat /sys/class/misc/hw_random/rng_current)",
    )?;
    let data = scratch.disk("data", 1 << 20, 41)?;
    let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initrd.img"));
    let text = print(&[
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        "console=ttyS0 panic=-1 quiet bh.cmd=script",
        "--memory",
        "256M",
        "--cpus",
        "2",
        "--disk",
        &format!("path={script},readonly=on,id=script"),
        "--rng",
    ])?;
    let file = scratch.file("vm.toml", text.as_bytes())?;
    // An option adds to what the file has.
    let disk = format!("path={data},readonly=on");
    let mut vmm = Vmm::start(&["run", "--config", &file, "--disk", &disk])?;
    vmm.wait_for("ONLINE=0-1", LIMIT)?;
    vmm.wait_for("DISKS=2", LIMIT)?;
    vmm.wait_for(&format!("SUM={}", crate::block::sha256(&data)?), LIMIT)?;
    vmm.wait_for("RNG=virtio_rng", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    check(vmm.errors().is_empty(), || vmm.story("it complained"))?;
    nothing_left(Duration::from_secs(5))
}

fn printed() -> Verdict {
    let scratch = Scratch::new("printed")?;
    // Nothing of it is opened.
    let everything = [
        "--kernel",
        "/no/such/kernel",
        "--initrd",
        "/no/such/initrd",
        "--cmdline",
        "a=\"b c\" d",
        "--memory",
        "size=1G,max=3G",
        "--cpus",
        "2,max=4,pin=0:1:0:1",
        "--hotplug-ports",
        "2",
        "--serial",
        "file=/no/such/log",
        "--disk",
        "path=/a,,b,serial=S1,queues=2,format=qcow2,cache=unsafe,backing=/c:/d,max-size=1G,bps=10M:1M,iops=500:7,lock=off,cpu=150,memory=64M,pids=20,io=rbps=1M:wiops=100",
        "--disk",
        "path=/e,readonly=on,id=root",
        "--net",
        "tap=tap0,queues=2,mac=52:54:00:12:34:56,mtu=1400,backend=user,required=off,rx-bps=1M:2M,tx-pps=100",
        "--net",
        "fd=7:8,id=handed",
        "--net",
        "vhost-user=/sw,server=on,id=switched",
        "--net",
        "user,forward=8080:80,forward=udp:[::1]:5300:53,cpu=10",
        "--vhost-user",
        "socket=/fs,kind=fs,tag=share,queue-size=128,required=off",
        "--rng",
        "id=dice,bps=1M:64K",
        "--vsock",
        "socket=/vs,cid=77,pids=9",
        "--console",
        "socket=/c0,size=80x24,socket=/c1,name=agent,memory=32M",
    ];
    let text = print(&everything)?;
    let file = scratch.file("vm.toml", text.as_bytes())?;
    let again = print(&["--config", &file])?;
    check(again == text, || format!("{text}\n--- again:\n{again}"))?;
    // No single value of it was lost on the way.
    for wanted in [
        "cmdline = \"a=\\\"b c\\\" d\"",
        "hotplug_ports = [\"hp1\", \"hp2\"]",
        "size = \"1G\"",
        "pin = [0, 1, 0, 1]",
        "path = \"/a,b\"",
        "format = \"qcow2\"",
        "unlocked = true",
        "backing_paths = [\"/c\", \"/d\"]",
        "[disk.limits.operations]",
        "[disk.resources.io]",
        "mac = \"52:54:00:12:34:56\"",
        "datapath = \"user\"",
        "fds = [7, 8]",
        "server = true",
        "[[net.user.forward]]",
        "protocol = \"udp\"",
        "device_id = 26",
        "cid = 77",
        "[[console.port]]",
        "name = \"agent\"",
        "cols = 80",
    ] {
        check(text.contains(wanted), || {
            format!("no {wanted:?} in\n{text}")
        })?;
    }
    let mixed = print(&["--config", &file, "--memory", "2G", "--rng"])?;
    check(
        mixed.contains("size = \"2G\"") && mixed.matches("[[rng]]").count() == 2,
        || mixed.clone(),
    )?;
    nothing_left(Duration::from_secs(5))
}

fn refused() -> Verdict {
    let scratch = Scratch::new("refused")?;
    let wrong = |text: &[u8], words: &[&str]| {
        let file = scratch.file("vm.toml", text)?;
        let mut wanted = vec!["--config", file.as_str()];
        wanted.extend_from_slice(words);
        expect(&bulkhead(&["run", "--config", &file])?, 2, &wanted)
            .map_err(|e| format!("{}: {e}", String::from_utf8_lossy(text)))
    };
    wrong(b"", &["kernel is missing", "give"])?;
    wrong(
        b"kernel = '/k'\nmemroy = '1G'",
        &[":2:", "memroy is unknown", "memory"],
    )?;
    wrong(
        b"kernel = '/k'\n[memory]\nsize = true",
        &[":3:", "memory.size is true", "give"],
    )?;
    wrong(
        b"kernel = '/k'\nkernel = '/l'",
        &[":2:", "\"kernel\"", "once"],
    )?;
    wrong(
        b"kernel = '/k'\n[[disk]]\npath = 'd'",
        &[":3:", "disk[0].path", "absolute"],
    )?;
    wrong(
        b"kernel = '/k'\n[[disk]]\npath = '/d'\nqueues = 99",
        &[":4:", "disk[0].queues is 99"],
    )?;
    wrong(b"kernel = /k", &[":1:", "TOML"])?;
    wrong(b"kernel = '\xff'", &["UTF-8"])?;
    wrong(&vec![b'\n'; (1 << 20) + 1], &["1048576"])?;
    let run = |args: &[&str], words: &[&str]| {
        expect(&bulkhead(args)?, 2, words).map_err(|e| format!("{args:?}: {e}"))
    };
    run(
        &["run", "--config", "/no/such"],
        &["--config /no/such", "name a file"],
    )?;
    run(&["run", "--config", "/"], &["--config /:", "name a file"])?;
    // Endless, and never read to its end.
    run(
        &["run", "--config", "/dev/zero"],
        &["--config /dev/zero", "1048576"],
    )?;
    run(&["run", "--print-config"], &["--kernel"])?;
    let file = scratch.file("vm.toml", b"kernel = '/k'\n[[disk]]\npath = '/d'\n")?;
    run(
        &["run", "--config", &file, "--disk", "path=/e,id=disk0"],
        &["--disk path=/e,id=disk0", "id=NAME"],
    )
}

fn created() -> Verdict {
    let scratch = Scratch::new("created")?;
    let kernel = guest_file("vmlinux");
    let kernel = std::path::absolute(&kernel).map_err(|e| e.to_string())?;
    let disk = scratch.disk("disk", 1 << 20, 43)?;
    let text = format!(
        "kernel = '{}'\nmemory = {{ size = '128M' }}\n[serial]\nmode = 'none'\n[[disk]]\nid = 'data'\npath = '{disk}'\n",
        kernel.display()
    );
    let file = scratch.file("vm.toml", text.as_bytes())?;
    let socket = scratch.path("api");
    let mut vmm = Vmm::start(&["serve", "--api-socket", &socket])?;
    appears(&socket)?;
    ctl(&socket, &["create", "--config", &file])?;
    let devices = ctl(&socket, &["devices"])?.to_string();
    check(devices.contains("\"data\""), || devices)?;
    ctl(&socket, &["shutdown", "--force"])?;
    vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}
