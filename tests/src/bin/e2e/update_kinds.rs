//! Live updates of what is neither disk nor network, each while the guest uses it: random bytes under a
//! reader, memory that is growing, sockets beside an open stream.

use std::io::{Read, Write};
use std::time::Duration;

use bulkhead_tests::host::debian;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, ctl, nothing_left};

use crate::disk::LIMIT;
use crate::hotplug_memory::reaches;
use crate::rng::given;
use crate::shell::{READER, Shell};
use crate::update::{Binaries, ctl_events, pid_of, program, refused, update};
use crate::vsock::{echo, io, joined, pattern};

/// The test.
pub fn tests() -> Vec<Test> {
    vec![Test {
        subject: "update",
        name: "random bytes, memory that grows and sockets: each is updated in use, in vain too, and the guest goes on",
        long: false,
        run: in_use,
    }]
}

/// One that is no good, then one that is.
fn updated(socket: &str, device: &str, kind: &str, binaries: &Binaries) -> Verdict {
    refused(socket, device, &binaries.fault("exit")?, "goes on")?;
    let before = pid_of(socket, device)?;
    let good = binaries.good(kind, &format!("{kind}-new"))?;
    let done = update(socket, device, &good)?;
    check(done["stall_us"].as_u64().is_some_and(|us| us > 0), || {
        done.to_string()
    })?;
    check(program(socket, device)? == good, || good.clone())?;
    check(pid_of(socket, device)? != before, || {
        "the same process".into()
    })
}

fn in_use() -> Verdict {
    let scratch = Scratch::new("updkinds")?;
    let binaries = Binaries::new(&scratch, "new")?;
    let (socket, path) = (scratch.path("api"), scratch.path("v.sock"));
    let vsock = format!("socket={path},id=vsock");
    let args = [
        "--api-socket",
        &socket,
        "--device-dir",
        &binaries.path,
        "--memory",
        "size=384M,max=640M",
        "--rng",
        "id=dice",
        "--vsock",
        &vsock,
    ];
    let mut guest = Shell::new(debian(&scratch, READER, &[] as &[&str], &args)?)?;

    guest.run("(while head -c 20000 /dev/hwrng >/tmp/r && [ $(stat -c %s /tmp/r) = 20000 ]; do echo >>/tmp/rounds; done; touch /tmp/ended) & until [ -s /tmp/rounds ]; do sleep 0.1; done")?;
    updated(&socket, "dice", "bulkhead-rng", &binaries)?;
    guest.run("n=$(stat -c %s /tmp/rounds); until [ $(stat -c %s /tmp/rounds) -gt $((n + 3)) ]; do sleep 0.1; done; ! [ -e /tmp/ended ]")?;
    check(given(&socket, "dice")? > 0, || "it gives nothing".into())?;

    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    ctl(&socket, &["resize-memory", "640M", "--timeout", "600"])?;
    updated(&socket, "memory", "bulkhead-mem", &binaries)?;
    reaches(&socket, 640, &guest.vmm)?;
    guest.run(
        "until [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 500000 ]; do sleep 0.2; done",
    )?;
    ctl(&socket, &["resize-memory", "384M", "--timeout", "600"])?;
    reaches(&socket, 384, &guest.vmm)?;

    guest.run("modprobe -q vmw_vsock_virtio_transport; (socat -t 300 VSOCK-LISTEN:1024,fork,backlog=250 EXEC:cat 2>/dev/null & echo $! >/tmp/pid); sleep 0.5")?;
    let mut stream = joined(&path, 1024)?;
    stream.write_all(b"x").map_err(io("write"))?;
    stream.read_exact(&mut [0]).map_err(io("read"))?;
    updated(&socket, "vsock", "bulkhead-vsock", &binaries)?;
    // A stream is its process's: both ends notice.
    let end = stream.read(&mut [0]);
    check(matches!(end, Ok(0) | Err(_)), || format!("{end:?}"))?;
    echo(&path, &pattern(1 << 20, 3))?;
    guest.run("until [ $(pgrep -c -x cat) = 0 ]; do sleep 0.1; done; kill $(cat /tmp/pid)")?;

    let events = ctl_events(&socket)?;
    check(!events.contains("device.crashed"), || events)?;
    guest.is_well("virtio_mem.*(error|fail)")?;
    guest.vmm.type_text("exit\n")?;
    guest.vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}
