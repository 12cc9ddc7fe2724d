//! vhost-user devices by CreateVM and AddPcieDevice: a disk and a device by its number, of
//! qemu-storage-daemon's and of bulkhead-blk's own at a socket, as the message says and refused where
//! it is wrong.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::Code;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::{CreateVMRequest, VMState, VhostUser, virtio_device::Kind};
use bulkhead_tests::kata::{self, Client, QUIT, vhost_user_disk};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, ctl, guest_file, nothing_left, patience};

use super::disk::{LIMIT, sparse};
use super::hotplug::device;
use super::net_modes::storage_daemon;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    vec![Test::short("kata")(
        "vhost-user disks and devices by number are made as CreateVM and AddPcieDevice say, refused where they are wrong, and seen to go",
        configured,
    )]
}

/// bulkhead-blk, started by hand.
fn ours(disk: &str, socket: &str) -> Result<Vmm, String> {
    let mut command = Command::new(bin("bulkhead-blk"));
    command.args(["--socket", socket, "--queues", "2"]);
    command.args(["--disk", &format!("path={disk},readonly=on,lock=off")]);
    let running = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while !Path::new(socket).exists() {
        check(Instant::now() < end, || running.story("does not listen"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(running)
}

/// A device by its number.
fn other(socket: &str, number: u32, sizes: &[u32]) -> Kind {
    let mut device = VhostUser::new();
    device.socket_path = socket.into();
    let other = device.device.mut_or_insert_default().mut_other();
    (other.device_id, other.queue_sizes) = (number, sizes.to_vec());
    Kind::VhostUser(device)
}

/// CreateVM of a machine that has these two.
fn machine(first: Kind, second: Kind) -> CreateVMRequest {
    let mut request = kata::create(
        (&guest_file("vmlinux"), "", "console=ttyS0"),
        (128, 1),
        "",
        vec![("rootfs", 1, first), ("second", 2, second)],
    );
    let config = request.config.mut_or_insert_default();
    config.serial_config.mut_or_insert_default().ports.clear();
    request
}

fn configured() -> Verdict {
    let scratch = Scratch::new("kata-vhost-user")?;
    let disk = sparse(&scratch, "disk", 4 << 20)?;
    let (theirs, own) = (scratch.path("theirs"), scratch.path("own"));
    let daemon = storage_daemon(&disk, &theirs)?;
    let running = ours(&disk, &own)?;
    let socket = scratch.path("vm.sock");
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    let good = || vhost_user_disk(&theirs, Some(1), Some(128));
    let precondition = Code::FailedPrecondition;
    let absent = scratch.path("absent");
    let file = scratch.file("file", b"no socket")?;
    let mut nothing = VhostUser::new();
    nothing.socket_path.clone_from(&own);
    for (second, code, words) in [
        (
            vhost_user_disk(&absent, None, None),
            precondition,
            "/absent",
        ),
        (vhost_user_disk(&file, None, None), precondition, "/file"),
        (
            vhost_user_disk(&own, Some(3), None),
            precondition,
            "serves 2 queues, not 3; ask for fewer",
        ),
        (
            vhost_user_disk(&own, Some(0), None),
            Code::InvalidArgument,
            "vhost_user.device.blk: 0 queues: give 1 to 254",
        ),
        (
            vhost_user_disk(&own, None, Some(100)),
            Code::InvalidArgument,
            "vhost_user.device.blk: queue size 100",
        ),
        (
            vhost_user_disk("relative", None, None),
            Code::InvalidArgument,
            "vhost_user.socket_path",
        ),
        (
            Kind::VhostUser(nothing),
            Code::InvalidArgument,
            "vhost_user.device is empty: give blk, fs or other",
        ),
        (
            other(&own, 0, &[128]),
            Code::InvalidArgument,
            "other.device_id is 0",
        ),
        (
            other(&own, 64, &[128]),
            Code::InvalidArgument,
            "other.device_id is 64",
        ),
        (
            other(&own, 2, &[]),
            Code::InvalidArgument,
            "other.queue_sizes is empty",
        ),
        (
            other(&own, 2, &[128, 64]),
            Code::Unimplemented,
            "other.queue_sizes: queues of different sizes",
        ),
    ] {
        client.refused("CreateVM", &machine(good(), second), code, words)?;
        // Nothing of the first one stays either: its back-end serves one front-end at a time.
        let state = client.properties()?.state;
        check(state == VMState::UNINITIALIZED.into(), || {
            format!("{words}: {state:?}")
        })?;
    }
    client.tell("CreateVM", &machine(good(), other(&own, 2, &[64, 64])))?;
    let config = ctl(&socket, &["info"])?["config"]["vhost_users"].clone();
    for (index, id, place, queues, size) in
        [(0, "rootfs", &theirs, 1, 128), (1, "second", &own, 2, 64)]
    {
        let told = &config[index];
        let made = device(&socket, id)?.unwrap_or_default();
        check(
            told["id"] == id
                && told["socket"] == **place
                && told["device_id"] == 2
                && told["queues"] == queues
                && told["queue_size"] == size
                && made["kind"] == "blk"
                && made["queues"] == queues
                && made["state"] == "ready"
                && made["port"] == id,
            || format!("{id}: {told} {made}"),
        )?;
    }

    // Behind a port that is for it; the back-end of one serves nobody else meanwhile.
    let late = scratch.path("late");
    let third = ours(&disk, &late)?;
    let add = |kind| kata::addition("hp3", kind);
    let more = vhost_user_disk(&late, Some(5), None);
    let words = "serves 2 queues, not 5";
    client.refused("AddPcieDevice", &add(more), precondition, words)?;
    client.add("hp3", vhost_user_disk(&late, Some(2), None))?;
    let made = device(&socket, "hp3")?.unwrap_or_default();
    check(made["queues"] == 2 && made["state"] == "ready", || {
        made.to_string()
    })?;
    client.remove("hp3")?;
    check(device(&socket, "hp3")?.is_none(), || "hp3 stays".into())?;
    // And again, at the same back-end.
    client.add("hp3", other(&late, 2, &[256]))?;

    // One that dies is said to be away, the others are not.
    drop(third);
    let end = Instant::now() + patience(LIMIT);
    let state = |id: &str| -> Result<String, String> {
        let found = device(&socket, id)?.unwrap_or_default();
        Ok(found["state"].as_str().unwrap_or_default().to_owned())
    };
    while state("hp3")? != "disconnected" {
        check(Instant::now() < end, || {
            vmm.story("hp3 is not said to be away")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    check(
        state("rootfs")? == "ready" && state("second")? == "ready",
        || "the others are away, too".into(),
    )?;
    client.plain("TeardownVM")?;
    client
        .call::<_, Empty>("Quit", &Empty::new())
        .map_err(|e| format!("{e:?}"))?;
    vmm.ends_with(0, LIMIT)?;
    drop((daemon, running));
    nothing_left(QUIT)
}
