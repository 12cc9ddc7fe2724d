//! Stand-alone device processes, for front-ends of others: no launcher is there to say at which call
//! one was stopped, its policy kills it (SIGSYS), and the kernel's log has the call. Each attempt is one
//! process of a program of its own name, in a namespace of processes of its own, so that what it sends
//! no signal to is nothing of the host's.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_runtime::sys::send_now;
use bulkhead_tests::host::{Undo, sh};
use bulkhead_tests::vmm::{Vmm, patience};

use crate::attack::{Attempt, End, Ground, said};
use crate::hosts::{Host, block_device, has_loops};
use crate::kernel_log::KernelLog;
use crate::variants::{MEMORY, RING};
use crate::victim::LIMIT;

/// 128 and the signal's number.
const KILLED_BY_POLICY: i32 = 128 + libc::SIGSYS;

/// A stand-alone process under its policy.
pub struct Alone {
    /// The policy, by its file's name.
    pub policy: &'static str,
    /// The program.
    pub binary: &'static str,
    device: Device,
}

#[derive(Clone, Copy)]
enum Device {
    Raw,
    Block,
    Image,
    Tap,
}

/// All that are to be had here; and those that are not, with the reason.
pub fn all() -> (Vec<Alone>, Vec<(&'static str, &'static str)>) {
    let alone = |policy, binary, device| Alone {
        policy,
        binary,
        device,
    };
    let mut absent = Vec::new();
    let mut all = vec![
        alone("bulkhead-blk-socket", "bulkhead-blk", Device::Raw),
        alone("bulkhead-blk-image-socket", "bulkhead-blk", Device::Image),
        alone("bulkhead-net-socket", "bulkhead-net", Device::Tap),
    ];
    let erase = "bulkhead-blk-erase-socket";
    if has_loops() {
        all.push(alone(erase, "bulkhead-blk", Device::Block));
    } else {
        absent.push((erase, "there is no loop device to be had"));
    }
    (all, absent)
}

impl Alone {
    /// What it has that not every process has, as attempts on it are called.
    pub fn own(&self) -> &'static [&'static str] {
        match self.device {
            Device::Image => &[MEMORY],
            Device::Raw | Device::Block | Device::Tap => &[MEMORY, RING],
        }
    }

    fn options(
        &self,
        number: usize,
        ground: &Ground<'_>,
        made: &mut Option<Undo>,
    ) -> Result<[String; 2], String> {
        let scratch = ground.scratch;
        Ok(match self.device {
            Device::Raw => {
                let disk = scratch.disk(&format!("alone-disk-{number}"), 1 << 16, 7)?;
                [
                    "--disk".into(),
                    format!("path={disk},serial=hostile-{number}"),
                ]
            }
            Device::Block => {
                let (device, undo) = block_device(scratch, &format!("alone-block-{number}"))?;
                *made = Some(undo);
                let spec = format!("path={device},serial=hostile-{number}");
                ["--disk".into(), spec]
            }
            Device::Image => {
                let disk = scratch.path(&format!("alone-{number}.qcow2"));
                sh(&format!("qemu-img create -q -f qcow2 {disk} 1M"))?;
                let spec = format!("path={disk},format=qcow2,serial=hostile-{number}");
                ["--disk".into(), spec]
            }
            Device::Tap => {
                let tap = format!("al{number}");
                if ground.namespace.sh(&format!("ip link show {tap}")).is_err() {
                    ground.namespace.tap(&tap, "", "user root")?;
                }
                // Its last part chooses the attempt.
                let mac = format!("02:b0:b0:b0:b0:{number:02x}");
                ["--tap".into(), format!("{tap} --mac {mac}")]
            }
        })
    }

    /// Makes the attempts, one process each.
    ///
    /// # Errors
    /// A process does not serve.
    pub fn attack(
        &self,
        attempts: &[&Attempt],
        ground: &Ground<'_>,
        log: Option<&KernelLog>,
    ) -> Result<BTreeMap<usize, End>, String> {
        let mut ends = BTreeMap::new();
        for attempt in attempts {
            if let Some(end) = self.one(attempt, ground, log)? {
                ends.insert(attempt.number, end);
            }
        }
        Ok(ends)
    }

    fn one(
        &self,
        attempt: &Attempt,
        ground: &Ground<'_>,
        log: Option<&KernelLog>,
    ) -> Result<Option<End>, String> {
        let socket = ground
            .scratch
            .path(&format!("api/alone-{}", attempt.number));
        let _ = std::fs::remove_file(&socket);
        let mut made = None;
        let [option, value] = self.options(attempt.number, ground, &mut made)?;
        let [by, place] = ground.namespace.enter();
        let mut command = Command::new(by);
        command.arg(place);
        command.args(["unshare", "--pid", "--fork", "--kill-child", "--"]);
        let built = format!("{}/{}", ground.libexec, self.binary);
        let program = format!("{built}-{}-{}", self.policy, attempt.number);
        std::fs::hard_link(&built, &program).map_err(|e| format!("{program}: {e}"))?;
        command.arg(&program);
        command
            .args(["--socket", &socket, &option])
            .args(value.split(' '));
        // What is sent to its group is sent to nobody else.
        command.process_group(0);
        if let Device::Block = self.device {
            Host::Erasing.starts(&mut command);
        }
        let mut process = Vmm::spawn(command)?;
        let end = Instant::now() + patience(LIMIT);
        // This is what it waits for.
        let front_end = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            if Instant::now() > end || process.ended().is_some() {
                return Err(process.story(&format!("{}: does not serve", self.policy)));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if attempt.name.starts_with(MEMORY) {
            give_memory(&front_end)?;
        }
        while Instant::now() < end {
            if let Some((_, end)) = said(&[attempt], &process.errors()).pop() {
                process.kill();
                return Ok(Some(end));
            }
            match process.ended() {
                Some(KILLED_BY_POLICY) => {
                    let Some(log) = log else {
                        return Ok(Some(End::Stopped(attempt.call.clone())));
                    };
                    let call = log.call(&program);
                    let call = call.ok_or("a call that the kernel's log does not name");
                    return Ok(Some(End::Stopped(call.unwrap_or_else(str::to_owned))));
                }
                Some(other) => {
                    return Ok(Some(End::Through(format!("it ended with status {other}"))));
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        process.kill();
        Ok(None)
    }
}

/// SET_MEM_TABLE of the vhost-user protocol, with a page.
fn give_memory(front_end: &UnixStream) -> Result<(), String> {
    const SET_MEM_TABLE: u32 = 5;
    const VERSION: u32 = 1;
    const PAGE: u64 = 4096;
    let text = |e: std::io::Error| format!("guest memory: {e}");
    let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(std::io::Error::from)
        .map_err(text)?;
    let memory = File::from(memory);
    memory.set_len(PAGE).map_err(text)?;
    let mut message = Vec::new();
    // The body: one region, and a word that pads; where the guest has it, how much, where the
    // front-end has it, and from where in the file.
    for word in [SET_MEM_TABLE, VERSION, 40, 1, 0] {
        message.extend(word.to_ne_bytes());
    }
    for word in [0, PAGE, PAGE, 0] {
        message.extend(word.to_ne_bytes());
    }
    match send_now(front_end.as_fd(), &message, Some(memory.as_fd())) {
        Ok(len) if len == message.len() => Ok(()),
        answer => Err(format!("guest memory: not sent: {answer:?}")),
    }
}
