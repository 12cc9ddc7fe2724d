//! Kata's own sequence of calls in a real guest, as its runtime makes them: CreateVM, ResumeVM,
//! AddPcieDevice at once, … TeardownVM, Quit.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::protobuf::Message;
use bulkhead_proto::vmservice::{ModifyResourceRequest, ModifyType, VMState};
use bulkhead_proto::{Code, VM_SERVICE};
use bulkhead_tests::host::{Namespace, rootfs, sh};
use bulkhead_tests::kata::{self, Client, QUIT, disk};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, guest_file, nothing_left, patience};

use super::assault::{assault, frame_of, resident};
use super::disk::LIMIT;
use super::hotplug_memory::reaches;
use super::kata_native::{MAY_GROW, request_of};
use super::vsock::{accept, connect, echo, pattern};
use crate::net_modes::{storage_daemon, tool};

/// The tests.
pub fn tests() -> Vec<Test> {
    let test = Test::short("kata");
    vec![
        test(
            "Kata's calls: a disk added at once is at 08/00, a tap in a namespace carries traffic, virtiofsd's tree is there, hostile clients cost nothing, and a kill leaves nothing",
            replay,
        ),
        test(
            "a guest that ends by itself ends the process, and WaitVM and PropertiesVM say how",
            by_itself,
        ),
        test(
            "ModifyResource adds and takes processors and memory of a machine that Machine.Create made with room, on the same process, and TeardownVM leaves nothing",
            modified,
        ),
    ]
}

/// The guest's console, on its socket.
struct Console {
    stream: UnixStream,
    text: Arc<Mutex<String>>,
}

impl Console {
    fn connect(path: &str) -> Result<Self, String> {
        let stream = UnixStream::connect(path).map_err(|e| format!("{path}: {e}"))?;
        let mut from = stream.try_clone().map_err(|e| e.to_string())?;
        let text = Arc::<Mutex<String>>::default();
        let to = Arc::clone(&text);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                let read = String::from_utf8_lossy(buffer.get(..n).unwrap_or_default());
                to.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&read);
            }
        });
        Ok(Self { stream, text })
    }

    fn text(&self) -> String {
        self.text
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn wait_for(&self, wanted: &str, vmm: &Vmm) -> Verdict {
        let end = Instant::now() + patience(LIMIT);
        while !self.text().contains(wanted) {
            check(Instant::now() < end, || {
                let text = self.text();
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines
                    .get(lines.len().saturating_sub(30)..)
                    .unwrap_or_default();
                vmm.story(&format!("no {wanted:?} in:\n{}", tail.join("\n")))
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Lets the script go on.
    fn go_on(&mut self) -> Verdict {
        self.stream.write_all(b"\n").map_err(|e| e.to_string())
    }
}

fn virtiofsd(scratch: &Scratch) -> Result<(Vmm, String), String> {
    let (socket, share) = (scratch.path("fs.sock"), scratch.path("share"));
    sh(&format!(
        "mkdir {share} && echo from-the-host >{share}/file"
    ))?;
    let mut command = Command::new(tool("VIRTIOFSD")?);
    command.args(["--socket-path", &socket, "--shared-dir", &share]);
    command.args(["--sandbox", "none", "--seccomp", "none"]);
    let running = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while !Path::new(&socket).exists() {
        check(Instant::now() < end, || {
            running.story("virtiofsd does not listen")
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok((running, socket))
}

fn bytes(message: &impl Message) -> Result<Vec<u8>, String> {
    message.write_to_bytes().map_err(|e| e.to_string())
}

fn sum(path: &str) -> Result<String, String> {
    sh(&format!("sha256sum <{path} | cut -d' ' -f1")).map(|sum| sum.trim().to_owned())
}

/// Kata's part of the guest: finds a disk by its PCI path alone.
const SCRIPT: &str = r#"
disk() { ls -d /sys/bus/pci/devices/0000:00:$1.0/*:00.0/virtio*/block/vd* 2>/dev/null; }
sum() { until [ -n "$(disk $1)" ]; do sleep 0.1; done; sha256sum <"/dev/$(basename "$(disk $1)")" | cut -d' ' -f1; }
modprobe -q vmw_vsock_virtio_transport
modprobe -q virtio_console
until [ -e /dev/hvc0 ]; do sleep 0.1; done
(read -r line </dev/hvc0; echo "CONSOLE=$line") &
echo "RANDOM=$(cat /sys/class/misc/hw_random/rng_current) $(head -c 64 /dev/hwrng | wc -c)"
socat -t 60 VSOCK-LISTEN:1024,fork EXEC:cat &
echo "FIRST=$(sum 08) ROOT=$(basename "$(disk 01)")"
ip link set eth0 up; ip addr add 10.6.0.2/24 dev eth0
echo "MAC=$(cat /sys/class/net/eth0/address) NET=$(ls -d /sys/bus/pci/devices/0000:00:04.0/*:00.0/virtio*/net/eth0 | wc -l)"
echo "GOT=$(socat -u TCP:10.6.0.1:7000,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1)"
mkdir /tmp/share && mount -t virtiofs kataShared /tmp/share && echo "SHARED=$(cat /tmp/share/file)" && echo from-the-guest >/tmp/share/back && sync
echo log-of-the-guest | socat -u - VSOCK-CONNECT:2:1025,retry=50,interval=0.2 && echo LOGGED
until [ -e /sys/bus/pci/devices/0000:00:09.0/*:00.0/virtio*/net/* ]; do sleep 0.1; done
ip link set eth1 up; ip addr add 10.7.0.2/24 dev eth1
echo "SECOND=$(cat /sys/class/net/eth1/address) $(socat -u TCP:10.7.0.1:7001,retry=50,interval=0.2 - | sha256sum | cut -d' ' -f1)"
echo "LAST=$(sum 1f)"
echo "THEIRS=$(sum 0b)"
echo TURN-1; read -r line
[ -z "$(disk 08)" ] && ! [ -e /sys/class/net/eth1 ] && echo FIRST-IS-GONE
echo TURN-2; read -r line
echo "AGAIN=$(sum 08)"
dmesg | grep -E 'BUG:|Oops|WARNING: CPU|Call Trace' && echo KERNEL-COMPLAINS
echo TURN-3
while :; do :; done
"#;

fn replay() -> Verdict {
    let scratch = Scratch::new("kata")?;
    let (socket, serial) = (scratch.path("vm.sock"), scratch.path("serial.sock"));
    let (first, last, again) = (
        scratch.disk("first", 2 << 20, 301)?,
        scratch.disk("last", 1 << 20, 302)?,
        scratch.disk("again", 3 << 20, 303)?,
    );
    let sent = scratch.disk("sent", 2 << 20, 304)?;
    let script = scratch.script("script", SCRIPT)?;
    let (fs, fs_socket) = virtiofsd(&scratch)?;
    let host = Namespace::new("kata")?;
    // As Kata makes it: without an owner.
    host.tap("tap0_kata", "10.6.0.1/24", "")?;
    let _sender = host.spawn(&format!(
        "socat -u FILE:{sent} TCP-LISTEN:7000,bind=10.6.0.1,reuseaddr"
    ))?;
    // One that is added later: the launcher attaches to it, so that it has an owner.
    host.tap("tap1_kata", "10.7.0.1/24", "user 0")?;
    let _second = host.spawn(&format!(
        "socat -u FILE:{sent} TCP-LISTEN:7001,bind=10.7.0.1,reuseaddr"
    ))?;
    let vsock = scratch.path("vm.vsock");
    let log = UnixListener::bind(format!("{vsock}_1025")).map_err(|e| e.to_string())?;
    let enter = host.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let mut vmm = kata::start(&by, &socket)?;
    let mut client = Client::connect(&socket)?;
    let create = kata::create(
        (
            &guest_file("vmlinux"),
            &guest_file("initrd.img"),
            "console=ttyS0 panic=-1 quiet bh.cmd=script root=/dev/vda",
        ),
        (384, 2),
        &serial,
        vec![
            ("rootfs", 1, disk(&rootfs()?, true)),
            ("sharefs", 2, kata::file_system(&fs_socket, "kataShared")),
            ("vsock", 3, kata::vsock(&vsock)),
            ("net0", 4, kata::net("tap0_kata", "02-AB-CD-00-00-01")),
            ("script", 5, disk(&script, true)),
            ("rng", 6, kata::rng()),
            ("console", 7, kata::console(&scratch.path("hvc"))),
        ],
    );
    client.tell("CreateVM", &create)?;
    let mut console = Console::connect(&serial)?;
    client.plain("ResumeVM")?;
    // At once: the guest has not made its first steps.
    client.add("hp0", disk(&first, false))?;
    // The agent is not there yet: at once, not after a time, since Kata tries again and again.
    let early = Instant::now();
    check(connect(&vsock, 1024)?.is_none(), || "who answered?".into())?;
    check(early.elapsed() < patience(Duration::from_secs(5)), || {
        format!("turned away after {:?}", early.elapsed())
    })?;
    let threads = kata::vcpu_threads(vmm.pid());
    check(threads == ["vp-0", "vp-1"], || format!("{threads:?}"))?;
    console.wait_for(&format!("FIRST={} ROOT=vda", sum(&first)?), &vmm)?;
    let mut typed = UnixStream::connect(scratch.path("hvc")).map_err(|e| e.to_string())?;
    typed.write_all(b"typed\n").map_err(|e| e.to_string())?;
    console.wait_for("CONSOLE=typed", &vmm)?;
    console.wait_for("RANDOM=virtio_rng.0 64", &vmm)?;
    // In lower case, as Kata writes it.
    echo(&vsock, &pattern(300_000, 7))?;
    console.wait_for("MAC=02:ab:cd:00:00:01 NET=1", &vmm)?;
    console.wait_for(&format!("GOT={}", sum(&sent)?), &vmm)?;
    console.wait_for("SHARED=from-the-host", &vmm)?;
    let mut stream = accept(&log)?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    check(text == "log-of-the-guest\n", || text)?;
    console.wait_for("LOGGED", &vmm)?;
    client.add("hp1", kata::net("tap1_kata", "02-AB-CD-00-00-02"))?;
    let second = format!("SECOND=02:ab:cd:00:00:02 {}", sum(&sent)?);
    // Into a guest that runs, at the far end.
    client.add("hp23", disk(&last, true))?;
    console.wait_for(&format!("LAST={}", sum(&last)?), &vmm)?;
    // A disk of another program's.
    let theirs = scratch.path("blk.sock");
    let daemon = storage_daemon(&again, &theirs)?;
    client.add("hp3", kata::vhost_user_disk(&theirs, Some(1), Some(64)))?;
    console.wait_for(&second, &vmm)?;
    console.wait_for(&format!("THEIRS={}", sum(&again)?), &vmm)?;
    console.wait_for("TURN-1", &vmm)?;
    let back = scratch.path("share/back");
    let back = std::fs::read_to_string(&back).map_err(|e| format!("{back}: {e}"))?;
    check(back.trim() == "from-the-guest", || back)?;

    client.remove("hp0")?;
    client.remove("hp1")?;
    console.go_on()?;
    console.wait_for("FIRST-IS-GONE", &vmm)?;
    console.wait_for("TURN-2", &vmm)?;
    client.add("hp0", disk(&again, false))?;
    console.go_on()?;
    console.wait_for(&format!("AGAIN={}", sum(&again)?), &vmm)?;
    console.wait_for("TURN-3", &vmm)?;
    check(!console.text().contains("KERNEL-COMPLAINS"), || {
        console.text()
    })?;

    let running = client.properties()?;
    let (memory, processor) = (&running.memory_stats, &running.processor_stats);
    check(
        running.state == VMState::RUNNING.into()
            && processor.total_runtime_ns > 0
            && memory.assigned_memory == 384 << 20
            && memory.working_set_bytes > 32 << 20,
        || format!("{running}"),
    )?;
    client.plain("PauseVM")?;
    let paused = client.properties()?;
    check(paused.state == VMState::PAUSED.into(), || {
        format!("{paused}")
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let later = client.properties()?;
    // Threads take a moment to fall asleep.
    let ran = |stats: &bulkhead_proto::vmservice::PropertiesVMResponse| {
        stats.processor_stats.total_runtime_ns
    };
    let most = ran(&paused).saturating_add(20_000_000);
    check(ran(&later) <= most, || {
        format!("a paused machine's vCPUs ran: {paused} {later}")
    })?;
    client.plain("ResumeVM")?;
    let none = bulkhead_proto::protobuf::well_known_types::empty::Empty::new();
    client.refused("ResumeVM", &none, Code::FailedPrecondition, "running")?;

    // Whatever others do at the socket, and beside them.
    let before = resident(vmm.pid())?;
    let creates = [
        request_of(&scratch)?,
        frame_of(VM_SERVICE, 1, "CreateVM", &bytes(&create)?),
    ];
    let held = assault(&socket, vmm.pid(), &creates)?;
    let after = resident(vmm.pid())?;
    check(after < before + MAY_GROW, || {
        format!("from {before} KiB to {after} KiB")
    })?;
    echo(&vsock, &pattern(100_000, 8))?;
    let after = client.properties()?;
    check(
        after.state == VMState::RUNNING.into() && ran(&after) > ran(&later),
        || format!("{later}, and after the assault {after}"),
    )?;

    // It is killed in the middle of all of that.
    let group = super::death::group(&socket)?;
    let there = group.as_ref().is_none_or(|group| group.exists());
    check(there, || format!("no {group:?}"))?;
    vmm.kill();
    nothing_left(QUIT)?;
    let hvc = scratch.path("hvc");
    let sockets = [&socket, &serial, &vsock, &hvc].map(|path| Path::new(path).to_path_buf());
    for path in sockets.into_iter().chain(group) {
        let end = Instant::now() + QUIT;
        while path.exists() {
            check(Instant::now() < end, || format!("{path:?} is left"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    drop(held);
    // The taps are Kata's, and nobody's any more; there is no other interface.
    host.sh(
        "for tap in tap0_kata tap1_kata; do ip -o link show $tap | grep -q NO-CARRIER; ip link del $tap; done; [ $(ip -o link show | wc -l) = 1 ]",
    )?;
    drop((fs, daemon));
    Ok(())
}

/// One guest that ends as its command line says.
fn ended(command: &str, code: i32, reason: &str) -> Verdict {
    let scratch = Scratch::new("kata-end")?;
    let (socket, serial) = (scratch.path("vm.sock"), scratch.path("serial.sock"));
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    let cmdline = format!("console=ttyS0 panic=-1 quiet bh.cmd={command}");
    let files = (guest_file("vmlinux"), guest_file("initrd.img"));
    let create = kata::create(
        (&files.0, &files.1, &cmdline),
        (256, 1),
        &serial,
        Vec::new(),
    );
    client.tell("CreateVM", &create)?;
    client.plain("ResumeVM")?;
    // 30 s may be too short for this host: again, on another connection, until it is answered.
    let end = Instant::now() + patience(LIMIT);
    while let Err(why) = Client::connect(&socket)?.plain("WaitVM") {
        check(
            (why.contains("DEADLINE_EXCEEDED") || why.contains("no answer"))
                && Instant::now() < end,
            || vmm.story(&why),
        )?;
    }
    let halted = client.properties()?;
    check(
        halted.state == VMState::HALTED.into() && halted.halt_reason.as_deref() == Some(reason),
        || format!("{halted}"),
    )?;
    // The client stays connected and says nothing: the process ends all the same.
    vmm.ends_with(code, QUIT)?;
    nothing_left(QUIT)
}

fn by_itself() -> Verdict {
    ended("poweroff", 0, "the guest switched itself off")?;
    ended("reboot", 3, "the guest asked for a reset")
}

/// What the guest has of either, step by step.
const SIZES: &str = r#"
modprobe -q vmw_vsock_virtio_transport
socat -t 60 VSOCK-LISTEN:1024,fork EXEC:cat &
ip link set eth0 up
total() { awk '/^MemTotal/ { print $2 }' /proc/meminfo; }
first=$(total); f=/sys/devices/system/cpu/cpu1
echo "CPUS-AT-FIRST=$(nproc)"; read -r line
until [ -d $f ]; do sleep 0.1; done; [ "$(cat $f/online)" = 1 ] || echo 1 >$f/online
taskset -c 1 true && echo "CPUS-GROWN=$(nproc)"; read -r line
until [ "$(nproc)" = 1 ]; do sleep 0.1; done; echo "CPUS-SHRUNK=$(nproc)"; read -r line
until [ "$(total)" -gt $((first + 200000)) ]; do sleep 0.1; done; echo MEMORY-'GROWN'; read -r line
until [ "$(total)" -lt $((first + 50000)) ]; do sleep 0.1; done; echo MEMORY-'SHRUNK'; read -r line
"#;

/// Asks on a connection of its own, as often as a call is given up on before this host has done it.
fn modify(socket: &str, request: &ModifyResourceRequest) -> Verdict {
    match Client::connect(socket)?.tell("ModifyResource", request) {
        Err(why) if why.contains("DEADLINE_EXCEEDED") || why.contains("no answer") => Ok(()),
        other => other,
    }
}

fn modified() -> Verdict {
    let scratch = Scratch::new("kata-modify")?;
    let (socket, serial) = (scratch.path("vm.sock"), scratch.path("serial.sock"));
    let host = Namespace::new("kata-modify")?;
    host.tap("tap0_kata", "10.6.0.1/24", "user 0")?;
    let enter = host.enter();
    let by: Vec<&str> = enter.iter().map(String::as_str).collect();
    let mut vmm = kata::start(&by, &socket)?;
    let mut client = Client::connect(&socket)?;
    let (vsock, hvc) = (scratch.path("vm.vsock"), scratch.path("hvc"));
    let script = format!("export LC_ALL=C\n{SIZES}");
    let disks = [rootfs()?, scratch.script("script", &script)?]
        .map(|path| format!("path={path},readonly=on,queues=1"));
    let (serial_at, kernel) = (format!("socket={serial}"), guest_file("vmlinux"));
    let initrd = guest_file("initrd.img");
    ctl(
        &socket,
        &[
            "create",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            "console=ttyS0 panic=-1 quiet bh.cmd=script root=/dev/vda memhp_default_state=online_movable",
            "--disk",
            &disks[0],
            "--disk",
            &disks[1],
            "--net",
            "tap=tap0_kata",
            "--vsock",
            &format!("socket={vsock},cid=3"),
            "--console",
            &format!("socket={hvc}"),
            "--serial",
            &serial_at,
            "--cpus",
            "1,max=2",
            "--memory",
            "384M,max=768M",
        ],
    )?;
    let mut console = Console::connect(&serial)?;
    client.plain("ResumeVM")?;
    console.wait_for("CPUS-AT-FIRST=1", &vmm)?;
    let memory = |socket: &str| {
        let properties = Client::connect(socket)?.properties()?;
        let memory = properties.memory_stats.unwrap_or_default();
        let sum = memory.working_set_bytes + memory.available_memory;
        check(sum == memory.assigned_memory, || format!("{memory}"))?;
        Ok::<_, String>((memory.assigned_memory >> 20, memory.reserved_memory >> 20))
    };
    let told = memory(&socket)?;
    check(told == (384, 384), || format!("at first {told:?}"))?;

    let mut request = ModifyResourceRequest::new();
    request.mut_processor().processor_index = 1;
    for (kind, count, wanted) in [
        (ModifyType::ADD, 2, "CPUS-GROWN=2"),
        (ModifyType::REMOVE, 1, "CPUS-SHRUNK=1"),
    ] {
        request.type_ = kind.into();
        console.go_on()?;
        modify(&socket, &request)?;
        console.wait_for(wanted, &vmm)?;
        let end = Instant::now() + patience(LIMIT);
        while ctl(&socket, &["info"])?["cpus"] != count {
            check(Instant::now() < end, || vmm.story("vCPUs"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    request.type_ = ModifyType::UPDATE.into();
    for (mib, wanted) in [(640, "MEMORY-GROWN"), (384, "MEMORY-SHRUNK")] {
        request.mut_memory().memory_mb = mib;
        console.go_on()?;
        modify(&socket, &request)?;
        reaches(&socket, mib, &vmm)?;
        console.wait_for(wanted, &vmm)?;
        let told = memory(&socket)?;
        check(told == (mib, 768 - mib), || format!("{mib}: {told:?}"))?;
    }
    // Beyond what it was made with there is none.
    request.mut_memory().memory_mb = 770;
    let mut other = Client::connect(&socket)?;
    let wrong = Code::FailedPrecondition;
    other.refused("ModifyResource", &request, wrong, "at most 768 MiB")?;
    echo(&vsock, &pattern(300_000, 9))?;

    let began = Instant::now();
    let mut other = Client::connect(&socket)?;
    other.plain("TeardownVM")?;
    kata::alone(vmm.pid())?;
    other.plain("Quit")?;
    vmm.ends_with(0, LIMIT)?;
    check(began.elapsed() < QUIT, || {
        format!("it took {:?}", began.elapsed())
    })?;
    nothing_left(QUIT)?;
    for path in [&socket, &serial, &vsock, &hvc] {
        check(!Path::new(path).exists(), || format!("{path} is left"))?;
    }
    // The tap is Kata's, and free again; there is no other interface.
    host.sh("ip link del tap0_kata && [ $(ip -o link show | wc -l) = 1 ]")
        .map(drop)
}
