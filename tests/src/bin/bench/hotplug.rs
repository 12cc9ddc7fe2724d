//! Hot-plug of a disk: request to the line that the guest's driver prints when it has probed the
//! device, and removal to the end of it, beside QEMU q35 `device_add` and `device_del`. Runs where
//! KVM runs guests, as root; both machines run at once and take turns.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_proto::machine::{
    AddDeviceRequest, AddDeviceResponse, RemoveDeviceRequest, RemoveDeviceResponse,
};
use bulkhead_proto::{BlockingClient, MACHINE_SERVICE};
use serde_json::{Value, json};

use crate::guest::{Files, Guest, Vmm};
use crate::table::{Table, figure, median, spread};

const LIMIT: Duration = Duration::from_secs(1500);
const CALL: Duration = Duration::from_secs(120);
const CMDLINE: &str = "console=ttyS0 panic=-1 bh.cmd=hang";
const INIT_LINE: &str = "BULKHEAD-GUEST-INIT";
const SECTORS: u64 = 2048;
const MAX_FRAME: u32 = 1 << 20;

/// How a VMM is asked.
enum Control {
    Bulkhead(BlockingClient),
    Qemu(Qmp),
}

/// QEMU's monitor.
struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &str) -> Result<Self, String> {
        let stream = connect(path)?;
        let timeout = stream.set_read_timeout(Some(CALL));
        timeout.map_err(|e| e.to_string())?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        qmp.line(|line| line.get("QMP").is_some())?;
        qmp.call(json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    /// Reads until a line is the wanted one.
    fn line(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        loop {
            let mut text = String::new();
            let read = self.reader.read_line(&mut text);
            if read.map_err(|e| format!("QMP: {e}"))? == 0 {
                return Err("QMP: closed".into());
            }
            let line: Value = serde_json::from_str(&text).map_err(|e| format!("QMP: {e}"))?;
            if wanted(&line) {
                return Ok(line);
            }
        }
    }

    fn call(&mut self, command: Value) -> Result<(), String> {
        let sent = writeln!(self.reader.get_mut(), "{command}");
        sent.map_err(|e| format!("QMP: {e}"))?;
        let is_answer = |line: &Value| line.get("return").is_some() || line.get("error").is_some();
        let answer = self.line(is_answer)?;
        match answer.get("error") {
            Some(error) => Err(format!("{command}: {error}")),
            None => Ok(()),
        }
    }
}

fn connect(path: &str) -> Result<UnixStream, String> {
    let end = Instant::now() + CALL;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => return Err(format!("{path}: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Control {
    /// Adds the disk; the part that its process's start took, microseconds.
    fn add(&mut self, path: &str) -> Result<u64, String> {
        match self {
            Self::Bulkhead(client) => {
                let mut request = AddDeviceRequest::new();
                let disk = request.mut_disk();
                (disk.id, disk.path) = ("d0".into(), path.into());
                let added: AddDeviceResponse = client
                    .call(MACHINE_SERVICE, "AddDevice", &request, CALL)
                    .map_err(|e| e.to_string())?;
                Ok(added.device.spawn_us)
            }
            Self::Qemu(qmp) => {
                let file = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
                qmp.call(json!({ "execute": "blockdev-add",
                    "arguments": { "driver": "raw", "node-name": "n0", "file": file } }))?;
                qmp.call(json!({ "execute": "device_add", "arguments":
                    { "driver": "virtio-blk-pci", "id": "d0", "drive": "n0", "bus": "rp0" } }))?;
                Ok(0)
            }
        }
    }

    /// Removes it and waits for its end.
    fn remove(&mut self) -> Result<(), String> {
        match self {
            Self::Bulkhead(client) => {
                let mut request = RemoveDeviceRequest::new();
                request.id = "d0".into();
                let removed = client.call(MACHINE_SERVICE, "RemoveDevice", &request, CALL);
                removed
                    .map(|_: RemoveDeviceResponse| ())
                    .map_err(|e| e.to_string())
            }
            Self::Qemu(qmp) => {
                qmp.call(json!({ "execute": "device_del", "arguments": { "id": "d0" } }))?;
                qmp.line(|line| {
                    line["event"] == "DEVICE_DELETED" && line["data"]["device"] == "d0"
                })?;
                let node = json!({ "node-name": "n0" });
                qmp.call(json!({ "execute": "blockdev-del", "arguments": node }))
            }
        }
    }
}

/// One VMM and what was measured, in milliseconds.
struct Subject {
    vmm: Vmm,
    guest: Guest,
    control: Control,
    seen: Vec<f64>,
    spawn: Vec<f64>,
    removed: Vec<f64>,
}

impl Subject {
    fn start(vmm: Vmm, files: &Files) -> Result<Self, String> {
        let socket = files
            .scratch
            .path(if vmm == Vmm::Q35 { "qmp" } else { "api" });
        let mut command = vmm.command(files, CMDLINE, None, true);
        if vmm == Vmm::Q35 {
            command.args(["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]);
            command.args(["-qmp", &format!("unix:{socket},server=on,wait=off")]);
        } else {
            command.args(["--hotplug-ports", "1", "--api-socket", &socket]);
        }
        let mut guest = Guest::start(command, &files.scratch, LIMIT)?;
        guest.reaches(INIT_LINE)?;
        let control = match vmm {
            Vmm::Q35 => Control::Qemu(Qmp::connect(&socket)?),
            _ => Control::Bulkhead(BlockingClient::new(connect(&socket)?, MAX_FRAME)),
        };
        Ok(Self {
            vmm,
            guest,
            control,
            seen: Vec::new(),
            spawn: Vec::new(),
            removed: Vec::new(),
        })
    }

    /// `sectors` tells this disk's line from all others.
    fn round(&mut self, path: &str, sectors: u64, counts: bool) -> Result<(), String> {
        let millis = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        let began = Instant::now();
        let spawn = self.control.add(path)?;
        self.guest
            .reaches(&format!("[vda] {sectors} 512-byte logical blocks"))?;
        let seen = millis(began);
        // The guest's work on the new disk shall not be in the way of its removal.
        std::thread::sleep(Duration::from_millis(500));
        let began = Instant::now();
        self.control.remove()?;
        if counts {
            self.seen.push(seen);
            self.spawn.push(spawn as f64 / 1e3);
            self.removed.push(millis(began));
        }
        Ok(())
    }
}

/// Runs the rounds and prints the table.
pub fn measure(runs: usize) -> crate::Report {
    let files = Files::new()?;
    let mut subjects = [
        Subject::start(Vmm::Bulkhead, &files)?,
        Subject::start(Vmm::Q35, &files)?,
    ];
    let path = files.scratch.path("disk");
    for (run, number) in (0..=runs).zip(0_u64..) {
        eprintln!("hotplug: run {run} of {runs}");
        for (subject, odd) in subjects.iter_mut().zip(0..) {
            let sectors = SECTORS + 2 * number + odd;
            File::create(&path)
                .and_then(|file| file.set_len(sectors * 512))
                .map_err(|e| format!("{path}: {e}"))?;
            // The first is not counted: programs and drivers are read from afar.
            subject
                .round(&path, sectors, run > 0)
                .map_err(|why| format!("{}: {why}", subject.vmm.label()))?;
        }
    }
    let base = subjects
        .iter()
        .find(|s| s.vmm == Vmm::Q35)
        .and_then(|s| median(&s.seen));
    let mut table = Table::new(&[
        "VMM",
        "rounds",
        "request → disk in the guest, ms",
        "of q35's",
        "aim",
        "its process's start, ms",
        "request → removed, ms",
    ]);
    for subject in &subjects {
        let ours = subject.vmm == Vmm::Bulkhead;
        let ratio = median(&subject.seen)
            .zip(base)
            .map(|(time, base)| time / base);
        table.row(vec![
            subject.vmm.label().into(),
            subject.seen.len().to_string(),
            spread(&subject.seen, 1),
            figure(ratio, 2),
            if ours { "≤ 0.36" } else { "" }.into(),
            if ours {
                spread(&subject.spawn, 1)
            } else {
                String::new()
            },
            spread(&subject.removed, 1),
        ]);
    }
    Ok(format!(
        "## hotplug: medians of {runs} interleaved rounds (least–most)\n\n\
         One virtio-blk disk, added to an idle guest with 256 MiB and one vCPU until its driver's line on the\n\
         serial port, and removed. QEMU: `blockdev-add` and `device_add` behind a pcie-root-port.\n\n{}",
        table.text()
    ))
}
