//! Hot-plug: request to what the guest's driver prints when it has probed the device, and removal
//! to its end, of a disk, a network device and a vCPU; 1 GiB of memory to its last block and back.
//! Beside QEMU q35 (`device_add`, virtio-mem). Runs where KVM runs guests, as root; both machines
//! run at once and take turns.

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{
    AddDeviceRequest, AddDeviceResponse, InfoRequest, InfoResponse, RemoveDeviceRequest,
    RemoveDeviceResponse, ResizeCpusRequest, ResizeCpusResponse, ResizeMemoryRequest,
    ResizeMemoryResponse, TapBackend, net_config,
};
use bulkhead_proto::{BlockingClient, MACHINE_SERVICE};
use bulkhead_tests::host::{Namespace, rootfs};
use bulkhead_tests::vmm::{Scratch, bin, guest_file};
use protobuf::Message;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::qmp::{Qmp, connect};
use crate::table::{Table, figure, median, spread};

const LIMIT: Duration = Duration::from_secs(2800);
const CALL: Duration = Duration::from_secs(240);
const MAX_FRAME: u32 = 1 << 20;
const SECTORS: u64 = 2048;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// What the guests start with, MiB: room for the page tables and page descriptors of the rest.
const MEMORY: u64 = 1024;
/// Growths of 1 GiB, at most; the first is not counted.
const GROWTHS: u64 = 21;
/// Removals of 1 GiB: a guest takes a minute or two for each.
const REMOVALS: u64 = 4;
const CMDLINE: &str =
    "console=ttyS0 panic=-1 bh.cmd=script root=/dev/vda memhp_default_state=online_movable";
/// A line for each network interface that comes.
const SCRIPT: &str = "ip -o monitor link | while read -r line; do case $line in *Deleted*) ;; *eth*) echo LINK-SEEN ;; esac; done &\nsleep 1; echo BENCH-READY\nsleep 100000\n";

/// What comes and goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Disk,
    Net,
    Cpu,
    Memory,
}

const KINDS: [Kind; 4] = [Kind::Disk, Kind::Net, Kind::Cpu, Kind::Memory];

impl Kind {
    fn label(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Net => "network device",
            Self::Cpu => "one vCPU",
            Self::Memory => "1 GiB",
        }
    }
}

/// How a VMM is asked.
enum Control {
    Bulkhead(BlockingClient),
    Qemu(Qmp),
}

/// A round's own things.
struct Round<'a> {
    disk: &'a str,
    tap: &'a str,
}

impl Control {
    fn ask<Request: Message, Response: Message>(
        client: &mut BlockingClient,
        method: &str,
        request: &Request,
    ) -> Result<Response, String> {
        let answer = client.call(MACHINE_SERVICE, method, request, CALL);
        answer.map_err(|e| format!("{method}: {e}"))
    }

    /// Adds it; the part that its process's start took, milliseconds.
    fn add(&mut self, kind: Kind, round: &Round<'_>) -> Result<Option<f64>, String> {
        match (self, kind) {
            (Self::Bulkhead(client), Kind::Disk | Kind::Net) => {
                let mut request = AddDeviceRequest::new();
                if kind == Kind::Disk {
                    let disk = request.mut_disk();
                    (disk.id, disk.path) = ("d0".into(), round.disk.into());
                } else {
                    let mut tap = TapBackend::new();
                    tap.name = round.tap.into();
                    let net = request.mut_net();
                    net.id = "d0".into();
                    net.backend = Some(net_config::Backend::Tap(tap));
                }
                let added: AddDeviceResponse = Self::ask(client, "AddDevice", &request)?;
                Ok(Some(added.device.spawn_us as f64 / 1e3))
            }
            (Self::Bulkhead(client), Kind::Cpu) => Self::vcpus(client, 2),
            (Self::Qemu(qmp), Kind::Disk) => {
                let file = json!({ "driver": "file", "filename": round.disk, "aio": "io_uring" });
                qmp.call(json!({ "execute": "blockdev-add",
                    "arguments": { "driver": "raw", "node-name": "n0", "file": file } }))?;
                qmp.call(json!({ "execute": "device_add", "arguments":
                    { "driver": "virtio-blk-pci", "id": "d0", "drive": "n0", "bus": "rp0" } }))?;
                Ok(None)
            }
            (Self::Qemu(qmp), Kind::Net) => {
                qmp.call(json!({ "execute": "netdev_add", "arguments":
                    { "type": "tap", "id": "n0", "ifname": round.tap, "script": "no", "downscript": "no" } }))?;
                qmp.call(json!({ "execute": "device_add", "arguments":
                    { "driver": "virtio-net-pci", "id": "d0", "netdev": "n0", "bus": "rp0", "romfile": "" } }))?;
                Ok(None)
            }
            (Self::Qemu(qmp), Kind::Cpu) => {
                let slots = qmp.call(json!({ "execute": "query-hotpluggable-cpus" }))?;
                let free = |slot: &&Value| slot.get("qom-path").is_none();
                let slot = slots.as_array().and_then(|slots| slots.iter().find(free));
                let slot = slot.ok_or("no place for a vCPU")?;
                let mut arguments = slot["props"].clone();
                arguments["driver"] = slot["type"].clone();
                arguments["id"] = "d0".into();
                qmp.call(json!({ "execute": "device_add", "arguments": arguments }))?;
                Ok(None)
            }
            (_, Kind::Memory) => Err("memory is resized".into()),
        }
    }

    /// Asks the guest to have so many GiB beside those of the start, and waits until it has.
    fn resize(&mut self, gib: u64) -> Result<(), String> {
        let bytes = gib * GIB;
        match self {
            Self::Bulkhead(client) => {
                Self::memory(client, MEMORY * MIB + bytes)?;
                self.settled(MEMORY * MIB + bytes)
            }
            Self::Qemu(qmp) => {
                Self::qemu_memory(qmp, bytes)?;
                self.settled(bytes)
            }
        }
    }

    /// Removes it and waits for its end.
    fn remove(&mut self, kind: Kind) -> Result<(), String> {
        match (&mut *self, kind) {
            (Self::Bulkhead(client), Kind::Disk | Kind::Net) => {
                let mut request = RemoveDeviceRequest::new();
                request.id = "d0".into();
                Self::ask::<_, RemoveDeviceResponse>(client, "RemoveDevice", &request).map(drop)
            }
            (Self::Bulkhead(client), Kind::Cpu) => Self::vcpus(client, 1).map(drop),
            (_, Kind::Memory) => Err("memory is resized".into()),
            (Self::Qemu(qmp), kind) => {
                qmp.call(json!({ "execute": "device_del", "arguments": { "id": "d0" } }))?;
                qmp.deleted("d0")?;
                let node = json!({ "node-name": "n0" });
                let netdev = json!({ "id": "n0" });
                match kind {
                    Kind::Disk => qmp.call(json!({ "execute": "blockdev-del", "arguments": node })),
                    Kind::Net => qmp.call(json!({ "execute": "netdev_del", "arguments": netdev })),
                    _ => Ok(Value::Null),
                }
                .map(drop)
            }
        }
    }

    fn vcpus(client: &mut BlockingClient, count: u32) -> Result<Option<f64>, String> {
        let mut request = ResizeCpusRequest::new();
        (request.count, request.timeout_ms) = (count, 200_000);
        Self::ask::<_, ResizeCpusResponse>(client, "ResizeCpus", &request).map(|_| None)
    }

    fn memory(client: &mut BlockingClient, bytes: u64) -> Result<(), String> {
        let mut request = ResizeMemoryRequest::new();
        (request.size_bytes, request.timeout_ms) = (bytes, 200_000);
        Self::ask::<_, ResizeMemoryResponse>(client, "ResizeMemory", &request).map(drop)
    }

    fn qemu_memory(qmp: &mut Qmp, bytes: u64) -> Result<(), String> {
        qmp.call(json!({ "execute": "qom-set", "arguments":
            { "path": "/machine/peripheral/vm0", "property": "requested-size", "value": bytes } }))
            .map(drop)
    }

    /// Waits until the guest has so much, as the VMM says it.
    fn settled(&mut self, bytes: u64) -> Result<(), String> {
        let end = Instant::now() + CALL;
        loop {
            let now = match self {
                Self::Bulkhead(client) => {
                    let info: InfoResponse = Self::ask(client, "Info", &InfoRequest::new())?;
                    info.memory.present_bytes
                }
                Self::Qemu(qmp) => {
                    let path = json!({ "path": "/machine/peripheral/vm0", "property": "size" });
                    let size = qmp.call(json!({ "execute": "qom-get", "arguments": path }))?;
                    size.as_u64().unwrap_or(u64::MAX)
                }
            };
            if now == bytes {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("the guest has {now} bytes, not {bytes}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What was measured of a kind, milliseconds.
#[derive(Default)]
struct Times {
    seen: Vec<f64>,
    spawn: Vec<f64>,
    removed: Vec<f64>,
}

/// One VMM.
struct Subject {
    label: &'static str,
    tap: &'static str,
    guest: Guest,
    control: Control,
    /// vCPUs and interfaces that came so far.
    came: [usize; 2],
    times: [Times; 4],
}

struct Host {
    scratch: Scratch,
    namespace: Namespace,
    kernel: String,
    initrd: String,
    rootfs: String,
    script: String,
}

impl Host {
    fn new() -> Result<Self, String> {
        let namespace = Namespace::new("bench")?;
        namespace.tap("hot0", "10.5.0.1/24", "user root")?;
        namespace.tap("hot1", "10.6.0.1/24", "user root")?;
        let scratch = Scratch::new("bench-hotplug")?;
        let copy = |name: &str| {
            let (from, to) = (guest_file(name), scratch.path(name));
            std::fs::copy(&from, &to).map_err(|e| format!("{from}: {e}: run `make guest`"))?;
            Ok::<_, String>(to)
        };
        Ok(Self {
            kernel: copy("vmlinux")?,
            initrd: copy("initrd.img")?,
            rootfs: rootfs()?,
            script: scratch.script("script", SCRIPT)?,
            namespace,
            scratch,
        })
    }

    fn command(&self, program: &str) -> Command {
        let [enter, net] = self.namespace.enter();
        let mut command = Command::new(enter);
        command.args([net.as_str(), program]);
        command
    }

    fn bulkhead(&self) -> Result<Subject, String> {
        let socket = self.scratch.path("api");
        let mut command = self.command(&bin("bulkhead").to_string_lossy());
        command
            .args(["run", "--kernel", &self.kernel, "--initrd", &self.initrd])
            .args(["--cmdline", CMDLINE, "--cpus", "1,max=2"])
            .args([
                "--memory",
                &format!("size={MEMORY}M,max={}M", MEMORY + GROWTHS * 1024),
            ])
            .args(["--hotplug-ports", "1", "--api-socket", &socket]);
        for (id, file) in [("root", &self.rootfs), ("script", &self.script)] {
            command.args([
                "--disk",
                &format!("path={file},readonly=on,id={id},queues=1"),
            ]);
        }
        self.start("bulkhead", "hot0", command, || {
            Ok(Control::Bulkhead(BlockingClient::new(
                connect(&socket)?,
                MAX_FRAME,
            )))
        })
    }

    fn qemu(&self) -> Result<Subject, String> {
        let socket = self.scratch.path("qmp");
        let mut command = self.command("qemu-system-x86_64");
        command
            .args([
                "-M",
                "q35,memory-backend=ram",
                "-accel",
                "kvm",
                "-cpu",
                "host",
            ])
            .args(["-smp", "1,maxcpus=2"])
            .args([
                "-m",
                &format!("{MEMORY}M,maxmem={}M", MEMORY + (GROWTHS + 1) * 1024),
            ])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=ram,share=on,size={MEMORY}M"),
            ])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=hot,share=on,size={GROWTHS}G,reserve=off"),
            ])
            .args([
                "-device",
                "virtio-mem-pci,id=vm0,memdev=hot,requested-size=0",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-serial",
                "stdio",
                "-kernel",
                &self.kernel,
                "-initrd",
                &self.initrd,
            ])
            .args(["-append", CMDLINE])
            .args(["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"])
            .args(["-qmp", &format!("unix:{socket},server=on,wait=off")]);
        for (index, file) in [&self.rootfs, &self.script].iter().enumerate() {
            command.args([
                "-drive",
                &format!("file={file},format=raw,file.locking=off,if=none,id=r{index},readonly=on"),
            ]);
            command.args([
                "-device",
                &format!("virtio-blk-pci,drive=r{index},addr={}", index + 8),
            ]);
        }
        self.start("QEMU q35", "hot1", command, || {
            Ok(Control::Qemu(Qmp::connect(&socket)?))
        })
    }

    fn start(
        &self,
        label: &'static str,
        tap: &'static str,
        command: Command,
        control: impl FnOnce() -> Result<Control, String>,
    ) -> Result<Subject, String> {
        let mut guest = Guest::start(command, &self.scratch, LIMIT)?;
        guest.reaches("BENCH-READY")?;
        Ok(Subject {
            label,
            tap,
            guest,
            control: control()?,
            came: [0; 2],
            times: Default::default(),
        })
    }
}

impl Subject {
    /// `sectors` tells this disk's line from all others.
    fn round(&mut self, kind: Kind, disk: &str, sectors: u64, counts: bool) -> Result<(), String> {
        let millis = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        let round = Round {
            disk,
            tap: self.tap,
        };
        let began = Instant::now();
        let spawn = self.control.add(kind, &round)?;
        match kind {
            Kind::Disk => {
                let line = format!("] {sectors} 512-byte logical blocks");
                self.guest.reaches(&line)?;
            }
            Kind::Net => {
                self.came[0] += 1;
                self.guest.reaches_times("LINK-SEEN", self.came[0])?;
            }
            Kind::Cpu => {
                self.came[1] += 1;
                self.guest
                    .reaches_times("has been hot-added", self.came[1])?;
            }
            Kind::Memory => return Err("memory is resized".into()),
        }
        let seen = millis(began);
        // The guest's work on what is new shall not be in the way of its removal.
        std::thread::sleep(Duration::from_millis(500));
        if kind == Kind::Net {
            // One may have been told twice.
            self.came[0] = self.guest.times("LINK-SEEN")?;
        }
        let began = Instant::now();
        self.control.remove(kind)?;
        let removed = millis(began);
        std::thread::sleep(Duration::from_millis(300));
        if let (true, Some(times)) = (counts, self.times.get_mut(kind as usize)) {
            times.seen.push(seen);
            times.spawn.extend(spawn);
            times.removed.push(removed);
        }
        Ok(())
    }
}

/// Grows each guest by 1 GiB again and again, and shrinks it a few times.
fn resize_memory(subjects: &mut [Subject], runs: u64) -> Result<(), String> {
    let growths = runs.saturating_add(1).min(GROWTHS);
    let removals = runs.min(REMOVALS).min(growths);
    let sizes = (1..=growths).chain((growths.saturating_sub(removals)..growths).rev());
    for (step, gib) in sizes.enumerate() {
        eprintln!("hotplug: 1 GiB, step {step}: {gib} GiB");
        for subject in subjects.iter_mut() {
            let began = Instant::now();
            let resized = subject.control.resize(gib);
            resized.map_err(|why| format!("{}, {gib} GiB: {why}", subject.label))?;
            let took = began.elapsed().as_secs_f64() * 1e3;
            if let Some(times) = subject.times.get_mut(Kind::Memory as usize) {
                match step as u64 {
                    // As with the others, the first is not counted.
                    0 => {}
                    step if step < growths => times.seen.push(took),
                    _ => times.removed.push(took),
                }
            }
            // The guest's work on what is new shall not be in the way of what comes next.
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    Ok(())
}

/// Runs the rounds and prints the table.
pub fn measure(runs: usize) -> crate::Report {
    let host = Host::new()?;
    let mut subjects = [host.bulkhead()?, host.qemu()?];
    let disk = host.scratch.path("disk");
    let mut notes = String::new();
    for kind in KINDS {
        if kind == Kind::Memory {
            if let Err(why) = resize_memory(&mut subjects, runs as u64) {
                notes += &format!("{}: {why}\n\n", kind.label());
            }
            continue;
        }
        'rounds: for (run, number) in (0..=runs).zip(0_u64..) {
            eprintln!("hotplug: {}, run {run} of {runs}", kind.label());
            for (subject, odd) in subjects.iter_mut().zip(0..) {
                let sectors = SECTORS + 2 * number + odd;
                File::create(&disk)
                    .and_then(|file| file.set_len(sectors * 512))
                    .map_err(|e| format!("{disk}: {e}"))?;
                // The first is not counted: programs and drivers are read from afar.
                if let Err(why) = subject.round(kind, &disk, sectors, run > 0) {
                    notes += &format!("{}, {}: {why}\n\n", subject.label, kind.label());
                    break 'rounds;
                }
            }
        }
    }
    let mut table = Table::new(&[
        "what",
        "VMM",
        "rounds",
        "request → seen in the guest, ms",
        "of q35's",
        "aim",
        "its process's start, ms",
        "request → removed, ms",
        "of q35's",
    ]);
    let [ours, theirs] = &subjects;
    for ((kind, mine), other) in KINDS.iter().zip(&ours.times).zip(&theirs.times) {
        let ratio = |a: &[f64], b: &[f64]| median(a).zip(median(b)).map(|(a, b)| a / b);
        let seen = ratio(&mine.seen, &other.seen);
        let aim = match (kind, seen) {
            (Kind::Disk, Some(ratio)) if ratio <= 0.36 => "≤ 0.36: met",
            (Kind::Disk, _) => "≤ 0.36: **missed**",
            _ => "",
        };
        for (label, times, seen, removed, aim) in [
            (
                ours.label,
                mine,
                seen,
                ratio(&mine.removed, &other.removed),
                aim,
            ),
            (theirs.label, other, Some(1.0), Some(1.0), ""),
        ] {
            table.row(vec![
                kind.label().into(),
                label.into(),
                times.seen.len().to_string(),
                spread(&times.seen, 1),
                figure(seen, 2),
                aim.into(),
                if times.spawn.is_empty() {
                    String::new()
                } else {
                    spread(&times.spawn, 1)
                },
                match times.removed.len() {
                    same if same == times.seen.len() => spread(&times.removed, 1),
                    fewer => format!("{}, {fewer} rounds", spread(&times.removed, 1)),
                },
                figure(removed, 2),
            ]);
        }
    }
    Ok(format!(
        "## hotplug: medians of {runs} interleaved rounds (least–most)\n\n\
         An idle guest of each VMM with {MEMORY} MiB and one vCPU. Seen: a disk by its driver's line on the serial\n\
         port, a network device by the guest's `ip monitor`, a vCPU by the kernel's \"has been hot-added\", memory when\n\
         the last of its blocks is plugged by virtio-mem. QEMU: `device_add` behind a pcie-root-port, `requested-size`.\n\
         1 GiB in eight requests: of ours, each goes from the guest to a process of its own, to the VMM, which tells KVM and\n\
         every other device process, and back; of QEMU's, all of it is one thread's. Software emulation pays for each switch.\n\n{}\n{notes}",
        table.text()
    ))
}
